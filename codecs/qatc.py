"""Encode arrays to QATC and back, bit for bit.

Two generations share this module. v2 is the format of QATQ 0.4: a sequence of f32, f16 or bf16 values without shape,
which the `qatq` program decodes. v3 is jaxquant's own: any dtype, shapes, names, random access, and smaller.
"""

from typing import Any

import numpy as np

from jaxquant.codecs import buffers, v2, v3, workers
from jaxquant.codecs.errors import CodecError, CorruptError, LimitError, UnsupportedError
from jaxquant.codecs.limits import Limits
from jaxquant.codecs.v2 import arrays, bodies, compact, lossy, parity, payload
from jaxquant.codecs.v2.opaque import decode_bytes, encode_bytes

__all__ = [
    "CodecError",
    "CorruptError",
    "LimitError",
    "Limits",
    "UnsupportedError",
    "decode",
    "decode_bytes",
    "encode",
    "encode_bytes",
    "encode_payload",
    "inspect",
    "open",
]

PROFILES = ("v2", "parity", "fast", "balanced", "small")
MODES = {name: mode for mode, name in payload.MODES.items()}


def encode(
    array: Any, *, profile: str = "v2", chunk: int | None = None, stride: int = 0, threads: int | None = None
) -> bytes:
    """Encode an array without losing a bit.

    Args:
        array: float32, float16 or bfloat16 values on one axis for the v2 profiles; anything for the others.
        profile: "v2" is decoded by QATQ and chosen for size and speed; "parity" is what QATQ itself writes, byte for
            byte; "fast", "balanced" and "small" are v3, which also keeps shape and every dtype.
        chunk: Values per chunk of a container. Without it "parity" writes one bare payload, as `qatq encode` does,
            "v2" one where the values fit into a single chunk of its choice, and v3 chooses.
        stride: Distance in values at which to expect similar ones, such as channels per token; a hint for 16-bit
            values in v2.
        threads: Chunks encoded at the same time; all cores by default.

    Returns:
        The encoded file.

    Raises:
        ValueError: The profile cannot express the array, or an argument is out of range.

    Example:
        >>> import numpy as np
        >>> data = encode(np.linspace(0, 1, 1000, dtype=np.float16))
        >>> data[:4], decode(data)[-1]
        (b'QATQ', np.float16(1.0))
    """
    if profile not in PROFILES:
        raise ValueError(f"profile: {profile!r} is none of {', '.join(PROFILES)}")
    if chunk is not None and not 1 <= chunk <= payload.MAX_VALUES:
        raise ValueError(f"chunk: {chunk} values, allowed are 1 to {payload.MAX_VALUES}")
    if profile not in ("v2", "parity"):
        values = np.asarray(array)
        size = v3.CHUNK if chunk is None else chunk * values.itemsize
        return v3.encode(values, profile=profile, threads=_threads(threads), chunk=size)
    if profile == "parity" and chunk is None:
        return encode_payload(array, stride=stride)
    words, dtype = arrays.words_of(array)
    whole = compact.chunk_values(words, v2.CHUNK)
    if chunk is None and words.size <= whole:
        return v2.encode_payload(words, dtype, _stride(stride, words))
    return v2.encode(
        words,
        dtype,
        exact=profile == "parity",
        chunk=chunk or whole,
        stride=_stride(stride, words),
        threads=_threads(threads),
    )


def encode_payload(
    array: Any, *, mode: str = "qatq-exact", strategy: int | None = None, stride: int = 0, seed: int = lossy.SEED
) -> bytes:
    """Write one bare QATQ payload, byte for byte as QATQ does.

    Args:
        array: As for v2 in `encode`, at most 2**26 values; float32 for every mode but "qatq-exact".
        mode: "qatq-exact", "lossless-f32", or one of the lossy four-bit modes "lossy-i4", "phase1-q4",
            "turboquant-q4".
        strategy: Wire id of an exact strategy to force; QATQ's own choice by default.
        stride: As in `encode`; required by strategy 10.
        seed: Of "phase1-q4", "turboquant-q4" and strategy 0.

    Returns:
        The payload.

    Raises:
        ValueError: The mode or strategy cannot express the array, or an argument is out of range.

    Example:
        >>> import numpy as np
        >>> encode_payload(np.ones(5, np.float32))[36:].hex()
        '843f848009'
    """
    words, dtype = arrays.words_of(array)
    if mode not in MODES:
        raise ValueError(f"mode: {mode!r} is none of {', '.join(MODES)}")
    if words.size > payload.MAX_VALUES:
        raise ValueError(f"array: {words.size} values, a payload holds {payload.MAX_VALUES}; pass chunk= to encode")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed: {seed} is not an unsigned 64-bit number")
    if MODES[mode] != 4:
        if dtype != "f32":
            raise ValueError(f"array: dtype {dtype} cannot be written in mode {mode}, only f32")
        return bodies.control(words.view(np.float32), MODES[mode], seed)
    if strategy is None:
        return parity.encode(words, dtype, stride=_stride(stride, words))
    served = payload.STRATEGIES.get(strategy)
    if served is None or words.itemsize not in served.widths:
        raise ValueError(f"strategy: {strategy} does not serve {dtype}")
    if strategy == 10 and not 1 <= stride < words.size:
        raise ValueError(f"stride: {stride} is outside 1 to {words.size - 1}")
    scale, body = bodies.body(words, strategy, stride=stride, seed=seed)
    head = payload.head(4, words.size, payload.checksum(words), scale)
    return head + payload.exact_head(strategy, dtype) + body


def decode(
    data: Any, *, limits: Limits | None = None, threads: int | None = None, out: np.ndarray | None = None
) -> Any:
    """Decode a file of any generation.

    Args:
        data: Buffer, path or binary file with a QATC v2 or v3 file or a bare QATQ payload.
        limits: What the file may claim; QATQ's own limits by default.
        threads: Chunks decoded at the same time; all cores by default.
        out: Array to fill, of the file's dtype and size.

    Returns:
        The values, on one axis for v2; for a v3 file of several tensors a dictionary.

    Raises:
        UnsupportedError: Not a file of these kinds, or one with something unknown in it.
        CorruptError: It contradicts itself or a checksum.
        LimitError: It claims more than the limits allow; nothing was allocated for it.

    Example:
        >>> import numpy as np
        >>> values = np.array([np.nan, -0.0, np.inf], np.float32)
        >>> decode(encode(values)).view(np.uint32) == values.view(np.uint32)
        array([ True,  True,  True])
    """
    limits = limits or Limits()
    with buffers.opened(data) as view:
        if v3.recognizes(view):
            return v3.decode(view, limits=limits, threads=_threads(threads), out=out)
        return v2.decode(view, limits, _threads(threads), out)


def inspect(data: Any, *, limits: Limits | None = None) -> Any:
    """Describe a file without decoding it.

    Args:
        data: As in `decode`.
        limits: As in `decode`.

    Returns:
        A `summary.Summary`, or a `summary.TensorsSummary` of a v3 file.

    Raises:
        CodecError: The file's structure is not valid; checksums are not looked at.

    Example:
        >>> import numpy as np
        >>> found = inspect(encode(np.zeros(100_000, np.float32), chunk=60_000))
        >>> found.format, found.dtype, found.values, [chunk.strategy for chunk in found.chunks]
        ('QATC v2', 'f32', 100000, ['byte-plane-blocks', 'byte-plane-blocks'])
    """
    limits = limits or Limits()
    with buffers.opened(data) as view:
        if v3.recognizes(view):
            return v3.inspect(view, limits=limits)
        return v2.inspect(view, limits)


def open(source: Any, *, size: int | None = None, limits: Limits | None = None) -> v3.Reader:  # noqa: A001
    """Open a v3 file to read parts of it: the tokens of one layer without the rest.

    Args:
        source: Buffer, path, seekable binary file, or a callable `read(offset, length)`.
        size: Bytes of the file, needed for a callable only.
        limits: As in `decode`.

    Returns:
        A `v3.Reader`, which is a context manager.

    Raises:
        UnsupportedError: Not a v3 file; v2 has no index, so it is decoded as a whole.
    """
    return v3.open(source, size=size, limits=limits)


def _threads(threads: int | None) -> int:
    if threads is not None and threads < 1:
        raise ValueError(f"threads: {threads}, at least 1 is needed")
    return threads or workers.available()


def _stride(stride: int, words: np.ndarray) -> int:
    """Check a hint: it must lie inside a 16-bit array, and means nothing for f32."""
    if stride and (words.itemsize == 4 or not 1 <= stride < max(words.size, 2)):
        raise ValueError(f"stride: {stride}, a hint is 1 to {words.size - 1} and for 16-bit values")
    return stride
