"""QATC as a numcodecs codec, so that Zarr finds it by the name "qatc"; needs the `numcodecs` extra."""

import numpy as np
from numcodecs import abc, compat  # pyright: ignore[reportMissingImports]

from jaxquant.codecs import qatc

_DTYPES = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(np.uint16)}


class QATC(abc.Codec):
    """Encode chunks of floating-point arrays as QATC v2.

    Shapes are Zarr's to keep. bfloat16, which Zarr stores as uint16, is named by `dtype`.

    Args:
        dtype: "f32", "f16" or "bf16".
        profile: "v2" or "parity", as in `qatc.encode`.
        threads: Chunks of one buffer encoded at the same time.

    Example:
        >>> values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
        >>> codec = QATC(dtype="f32")
        >>> bool((codec.decode(codec.encode(values)).reshape(8, 8) == values).all())
        True
    """

    codec_id = "qatc"

    def __init__(self, dtype: str = "f32", profile: str = "v2", threads: int = 1) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype: {dtype!r} is none of {', '.join(_DTYPES)}")
        self.dtype, self.profile, self.threads = dtype, profile, threads

    def encode(self, buf) -> bytes:
        """Return the encoded buffer."""
        octets = compat.ensure_contiguous_ndarray(buf).view(np.uint8)
        if octets.size % _DTYPES[self.dtype].itemsize:
            raise ValueError(f"buf: {octets.size} bytes are no whole number of {self.dtype} values")
        values = octets.view(_DTYPES[self.dtype])
        if self.dtype == "bf16":
            import ml_dtypes

            values = values.view(ml_dtypes.bfloat16)
        return qatc.encode(values, profile=self.profile, threads=self.threads)

    def decode(self, buf, out=None):
        """Return the decoded values, in `out` if it is given."""
        values = qatc.decode(compat.ensure_contiguous_ndarray(buf), threads=self.threads)
        return compat.ndarray_copy(values.view(_DTYPES[self.dtype]), out)
