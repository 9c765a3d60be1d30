"""Caches sent over a pipe or a socket while they are encoded, and taken on by another process.

A message is a snapshot (`jaxquant.snapshot`, one QATC v3 file) in frames, so that it needs no known length:

    "JQKV" 01, then frames of a length (u32, little-endian, 1 to 2^24) and as many bytes, then a length of 0

The receiver holds what has arrived and nothing that was only promised; it returns a whole cache or raises a
`CodecError`. Another message may follow on the same stream.
"""

import dataclasses
import struct
from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

from jaxquant import _snapshot_reader, snapshot
from jaxquant.cache import KVCache
from jaxquant.codecs import v3
from jaxquant.codecs.errors import CorruptError, UnsupportedError
from jaxquant.codecs.limits import Limits
from jaxquant.codecs.v3.writer import Sink

MAGIC = b"JQKV\x01"
_LENGTH = struct.Struct("<I")
_MOST = 1 << 24  # bytes of a frame
_FULL = 1 << 20  # bytes at which a frame is sent


@runtime_checkable
class Source(Protocol):
    """A binary stream to read from, such as `socket.makefile("rb")` or the end of a pipe."""

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes, none at the end."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrived:
    """What came over a stream.

    Attributes:
        cache: ready to be continued.
        metadata: the sender's strings.
        nbytes: of the message.
    """

    cache: KVCache
    metadata: Mapping[str, str]
    nbytes: int


def send(
    stream: Sink,
    cache: KVCache,
    *,
    metadata: Mapping[str, str] | None = None,
    profile: str = "fast",
    threads: int | None = None,
) -> int:
    """Send a cache: its packed codes, or its 16-bit numbers if it does not compress; both without losing a bit.

    Args:
        stream: a binary file object, such as `socket.makefile("wb")`; it is flushed at the end, and stays open.
        cache: to send.
        metadata: strings for the receiver, such as the token to continue with.
        profile: "fast", "balanced" or "small"; see `snapshot.save`.
        threads: that encode at a time; all cores by default.

    Returns:
        Bytes of the message.

    Example:
        >>> import io
        >>> import jax, jax.numpy as jnp
        >>> from jaxquant import cache
        >>> from jaxquant.methods import turboquant
        >>> k, v = turboquant.kv(jax.random.key(0), dim=64, bits_k=4, bits_v=2)
        >>> held = cache.init(k, v, layers=1, batch=1, kv_heads=2, capacity=64)
        >>> held = cache.append(held, 0, jnp.ones((1, 20, 2, 64)), jnp.ones((1, 20, 2, 64)))
        >>> pipe = io.BytesIO()
        >>> sent = send(pipe, held, metadata={"next": "17"})
        >>> again = receive(io.BytesIO(pipe.getvalue()))
        >>> int(again.cache.length[0, 0]), again.metadata["next"], again.nbytes == sent
        (20, '17', True)
    """
    frames = _Frames(stream)
    snapshot.save(frames, cache, profile=profile, metadata=metadata, threads=threads)
    frames.finish()
    return frames.nbytes


def receive(
    stream: Source, *, limits: Limits | None = None, classes: Iterable[type] = (), threads: int | None = None
) -> Arrived:
    """Take a cache off a stream.

    Args:
        stream: from which `send`'s bytes come; what follows the message is not read.
        limits: what may arrive and what it may claim; `encoded_bytes` bounds the message itself.
        classes: quantizers, rotations and so on from outside of jaxquant that it may name.
        threads: that decode at a time; all cores by default.

    Raises:
        UnsupportedError: no such message, or one of another version, or a class not in `classes`.
        CorruptError: it ends early, contradicts itself or a checksum.
        LimitError: it is larger, or claims more, than `limits` allow.
    """
    limits = limits or Limits(encoded_bytes=1 << 34)
    if (start := _exactly(stream, len(MAGIC))) != MAGIC:
        raise UnsupportedError(f"the stream begins with {start!r}, not with a cache: {MAGIC!r}")
    data, total = bytearray(), len(MAGIC)
    while True:
        (length,) = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
        total += _LENGTH.size + length
        if not length:
            break
        if length > _MOST:
            raise CorruptError(f"a frame of {length} bytes, more than {_MOST}")
        limits.check("encoded_bytes", len(data) + length, "the stream")
        data += _exactly(stream, length)
    with v3.open(data, limits=limits) as reader:
        metadata = {key: text for key, text in reader.metadata.items() if key != _snapshot_reader.KEY}
    cache = snapshot.load(data, limits=limits, classes=classes, threads=threads)
    return Arrived(cache=cache, metadata=metadata, nbytes=total)


class _Frames:
    """A sink that cuts what is written to it into frames."""

    def __init__(self, stream: Sink) -> None:
        self._stream, self._held = stream, bytearray()
        self.nbytes = 0
        self._put(MAGIC)

    def write(self, data: memoryview, /) -> None:
        """Hold small pieces back until they fill a frame."""
        view = memoryview(data).cast("B")
        for first in range(0, len(view), _MOST):
            self._held += view[first : first + _MOST]
            if len(self._held) >= _FULL:
                self.flush()

    def flush(self) -> None:
        """Send what is held back."""
        for first in range(0, len(self._held), _MOST):
            part = self._held[first : first + _MOST]
            self._put(_LENGTH.pack(len(part)) + part)
        self._held.clear()

    def finish(self) -> None:
        """Mark the end."""
        self.flush()
        self._put(_LENGTH.pack(0))
        self._stream.flush()

    def _put(self, data: bytes | bytearray) -> None:
        view = memoryview(data)
        self.nbytes += len(view)
        while len(view):
            written = self._stream.write(view)
            view = view[len(view) if written is None else written :]


def _exactly(stream: Source, size: int) -> bytes:
    parts, missing = [], size
    while missing:
        part = stream.read(missing)
        if not part:
            raise CorruptError(f"the stream ends {missing} bytes early")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)
