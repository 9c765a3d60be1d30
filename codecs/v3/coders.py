"""Byte planes to and from their smallest form: raw, one repeated byte, or a zstd frame.

zstd serves twice. With matches switched off as far as its parameters allow it is a fast Huffman coder, which is what
exponent planes want: the few short matches an ordinary level finds there cost more than they save. Where the sampled
plane repeats itself an ordinary level is used instead. A decoder does not see the difference.
"""

import math
import threading
from collections.abc import Callable, Iterable
from typing import ClassVar

import numpy as np
import zstandard
from numpy.typing import NDArray

from jaxquant.codecs.errors import CorruptError

RAW, CONSTANT, ZSTD = range(3)

Bytes = NDArray[np.uint8]
Buffer = bytes | memoryview | Bytes
Take = Callable[[int], Bytes]

_PROBE = 1 << 15
_GLANCE = 1 << 12
_SMALL = 32
_IDLE = 1 << 23  # bytes kept of each size
_HUFFMAN = zstandard.ZstdCompressionParameters(
    window_log=17, chain_log=6, hash_log=8, search_log=1, min_match=7, target_length=0, strategy=1
)


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.compressors: dict[int, zstandard.ZstdCompressor] = {}
        self.decompressor = zstandard.ZstdDecompressor()
        self.scratch: dict[tuple[str, np.dtype], np.ndarray] = {}


_thread = _PerThread()


def scratch(key: str, size: int, dtype: type[np.generic]) -> np.ndarray:
    """Return an uninitialised work array of this thread, reused by every call with the same key."""
    slot = (key, np.dtype(dtype))
    held = _thread.scratch.get(slot)
    if held is None or held.size < size:
        held = _thread.scratch[slot] = np.empty(size, dtype)
    return held[:size]


def fresh(size: int) -> Bytes:
    """Return an uninitialised plane of its own memory."""
    return np.empty(size, np.uint8)


class Lease:
    """Planes that a chunk holds until it is written. Memory goes round: fresh pages cost more than the transforms."""

    _idle: ClassVar[dict[int, list[Bytes]]] = {}

    def __init__(self) -> None:
        self._taken: list[tuple[Bytes, Bytes]] = []

    def take(self, size: int) -> Bytes:
        """Return an uninitialised plane."""
        room = 1 << max(size - 1, 0).bit_length()
        try:
            whole = self._idle[room].pop()
        except LookupError:
            whole = fresh(room)
        plane = whole[:size]
        self._taken.append((plane, whole))
        return plane

    def keep(self, parts: Iterable[Buffer] = ()) -> None:
        """Give back all planes but those among `parts`."""
        kept = {id(part) for part in parts}
        for plane, whole in self._taken:
            if id(plane) not in kept and whole.size * len(idle := self._idle.setdefault(whole.size, [])) < _IDLE:
                idle.append(whole)
        self._taken = [pair for pair in self._taken if id(pair[0]) in kept]


def _compressor(level: int) -> zstandard.ZstdCompressor:
    """Level 0 is the bare Huffman coder; others are zstd's own levels."""
    held = _thread.compressors.get(level)
    if held is None:
        held = zstandard.ZstdCompressor(level=level) if level else zstandard.ZstdCompressor(compression_params=_HUFFMAN)
        _thread.compressors[level] = held
    return held


def compressed(plane: Bytes, level: int) -> bytes:
    """Compress to one zstd frame that states its content size."""
    return _compressor(level).compress(plane.data)


def entropy(symbols: np.ndarray) -> float:
    """Estimate the bits per symbol of small non-negative integers, order 0, corrected for the size of the sample."""
    return entropy_of(np.bincount(symbols.reshape(-1)))


def entropy_of(counts: np.ndarray) -> float:
    """Estimate the bits per symbol from how often each was seen, corrected for the size of the sample."""
    seen = counts[counts > 0]
    total = float(seen.sum())
    return math.log2(total) - float(seen @ np.log2(seen)) / total + (seen.size - 1) / (2 * math.log(2) * total)


def probe(plane: Bytes) -> Bytes:
    """Return the middle of a plane, long enough to tell what compresses it."""
    middle = plane.size // 2
    half = min(_PROBE, max(_GLANCE, plane.size // 32)) // 2
    return plane[max(0, middle - half) : middle + half]


def encode(plane: Bytes, levels: tuple[int, ...]) -> tuple[int, Buffer]:
    """Code one plane with the best of `levels`, judged on a probe, or leave it raw where none pays.

    Args:
        plane: contiguous bytes.
        levels: zstd levels to consider, 0 meaning bare Huffman.

    Returns:
        The coder's id and the coded bytes, which may be `plane` itself.
    """
    if plane.size < _SMALL:
        return RAW, plane
    if plane[0] == plane[-1] and plane.max() == plane.min():
        return CONSTANT, plane[:1].tobytes()
    if plane.size <= _GLANCE and len(levels) == 2:
        levels = levels[1:]  # a second opinion costs more than it saves
    sample = probe(plane)
    tried = [compressed(sample, level) for level in levels]
    smallest = min(len(frame) for frame in tried)
    frame = next(frame for frame in tried if len(frame) <= 1.01 * smallest)  # the fastest that is as good
    if sample.size < plane.size:
        if len(frame) > 0.985 * sample.size:
            return RAW, plane
        frame = compressed(plane, levels[tried.index(frame)])
    return (ZSTD, frame) if len(frame) < plane.size else (RAW, plane)


def encode_noise(plane: Bytes, levels: tuple[int, ...]) -> tuple[int, Buffer]:
    """Code a plane that is expected to be noise: raw at once where a small sample agrees."""
    sample = plane[plane.size // 2 :][:_GLANCE]
    if sample.size == _GLANCE and entropy(sample) > 7.9:
        return RAW, plane
    return encode(plane, levels)


def _decode_raw(coded: Bytes, size: int) -> Bytes:
    if coded.size != size:
        raise CorruptError(f"a raw plane holds {coded.size} bytes where {size} belong")
    return coded


def _decode_constant(coded: Bytes, size: int) -> Bytes:
    if coded.size != 1:
        raise CorruptError(f"a constant plane holds {coded.size} bytes where 1 belongs")
    return np.broadcast_to(coded, (size,))


def _decode_zstd(coded: Bytes, size: int) -> Bytes:
    try:  # the size that the frame claims decides the allocation, so it is checked first
        claimed = zstandard.frame_content_size(coded.data)
        if claimed != size:
            raise CorruptError(f"a zstd plane claims {claimed} bytes where {size} belong")
        plane = _thread.decompressor.decompress(coded.data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptError(f"a zstd plane does not decode: {error}") from None
    if len(plane) != size:
        raise CorruptError(f"a zstd plane decodes to {len(plane)} bytes where {size} belong")
    return np.frombuffer(plane, np.uint8)


_DECODERS: dict[int, Callable[[Bytes, int], Bytes]] = {
    RAW: _decode_raw,
    CONSTANT: _decode_constant,
    ZSTD: _decode_zstd,
}


def decode(coder: int, coded: Bytes, size: int) -> Bytes:
    """Decode one plane of exactly `size` bytes.

    Raises:
        CorruptError: the coder is unknown or the bytes do not decode to `size` bytes.
    """
    decoder = _DECODERS.get(coder)
    if decoder is None:
        raise CorruptError(f"plane coder {coder} is none of {sorted(_DECODERS)}")
    return decoder(coded, size)
