"""Arrays as the unsigned words that QATC v2 is made of."""

import sys

import numpy as np

from jaxquant.codecs.v2 import payload

_NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def words_of(array) -> tuple[np.ndarray, str]:
    """View an array as unsigned words.

    Args:
        array: float32, float16 or bfloat16, one axis; anything `numpy.asarray` understands.

    Returns:
        Contiguous native words, and the dtype's name on the wire.

    Raises:
        ValueError: QATC v2 cannot express the array.
    """
    values = np.asarray(array)
    if values.dtype.name not in _NAMES:
        raise ValueError(
            f"array: dtype {values.dtype.name} is none of float32, float16, bfloat16, all that QATC v2 can express; "
            'profile="balanced" stores every dtype'
        )
    if values.ndim != 1:
        raise ValueError(
            f"array: shape {values.shape}, but QATC v2 stores no shape; pass array.reshape(-1), "
            'or profile="balanced" to keep it'
        )
    dtype = _NAMES[values.dtype.name]
    values = np.ascontiguousarray(values)
    words = values.view(f"u{payload.WIDTHS[dtype]}")
    if values.dtype.byteorder not in ("=", "|", "<" if sys.byteorder == "little" else ">"):
        words = words.byteswap()
    return words, dtype
