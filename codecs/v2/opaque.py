"""Arbitrary bytes as QATQ's opaque profile keeps them: words of four bytes, labelled f32."""

from typing import Any

import numpy as np

from jaxquant.codecs import buffers, v2, workers
from jaxquant.codecs.errors import CorruptError, UnsupportedError
from jaxquant.codecs.limits import Limits
from jaxquant.codecs.v2 import container, payload


def encode_bytes(data: Any, *, profile: str = "v2", chunk: int | None = None, threads: int | None = None) -> bytes:
    """Encode arbitrary bytes as QATQ's opaque profile does; their length must be kept elsewhere.

    Args:
        data: Any contiguous buffer, path or binary file; the last word is padded with zeros.
        profile: "v2" or "parity".
        chunk: Four-byte words per chunk.
        threads: As in `qatc.encode`.

    Returns:
        A QATC v2 container.

    Raises:
        ValueError: The profile is a v3 one, or `chunk` is out of range.

    Example:
        >>> decode_bytes(encode_bytes(b"seven b"), 7)
        b'seven b'
    """
    if profile not in ("v2", "parity"):
        raise ValueError(f'profile: {profile!r}, opaque bytes are written as "v2" or "parity"')
    with buffers.opened(data) as view:
        padded = np.zeros(-(-len(view) // 4), np.uint32)
        padded.view(np.uint8)[: len(view)] = view
    if chunk is not None and not 1 <= chunk <= payload.MAX_VALUES:
        raise ValueError(f"chunk: {chunk} words, allowed are 1 to {payload.MAX_VALUES}")
    return v2.encode(
        padded,
        "f32",
        exact=profile == "parity",
        chunk=chunk or v2.CHUNK,
        stride=0,
        threads=threads or workers.available(),
    )


def decode_bytes(data: Any, length: int, *, chunk: int | None = None, limits: Limits | None = None) -> bytes:
    """Decode what `encode_bytes` wrote.

    Args:
        data: As in `qatc.decode`.
        length: Bytes that were encoded.
        chunk: Words per chunk that the writer declared, to insist on that layout.
        limits: As in `qatc.decode`.

    Returns:
        The bytes.

    Raises:
        CodecError: As in `qatc.decode`, or the file does not hold exactly `length` bytes laid out as declared.
    """
    limits = limits or Limits()
    limits.check("values", -(-length // 4), "length")
    with buffers.opened(data) as view:
        if bytes(view[:4]) != container.MAGIC:
            raise UnsupportedError("container, offset 0: opaque bytes are kept in QATC v2 containers")
        found = v2.inspect(view, limits)
        sizes = [piece.values for piece in found.chunks]
        if chunk is not None and sizes != [
            min(chunk, found.values - first) for first in range(0, max(found.values, 1), chunk)
        ]:
            raise CorruptError(f"container: chunks of {sizes[:3]} values and on, not of {chunk}")
        if found.dtype != "f32" or found.values != -(-length // 4):
            raise CorruptError(f"container: {found.values} values of {found.dtype} do not hold {length} bytes")
        octets = v2.decode(view, limits, 1).view(np.uint8)
    if octets[length:].any():
        raise CorruptError("container: the padding after the last byte is not zero")
    return octets[:length].tobytes()
