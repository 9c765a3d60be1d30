"""What both splits of floating-point words share: top halves, pairs of 4-bit values, and escapes.

A split looks at the top 16 bits of each word. What leaves its window is listed as (position, high bits): the window is
placed so that this is rare.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jaxquant.codecs.errors import CorruptError
from jaxquant.codecs.v3.coders import Bytes, scratch
from jaxquant.codecs.v3.planes import Words

BLOCK = 1 << 19  # elements per pass: the calls cost more than the second-level cache saves

Halves = NDArray[np.uint16]


@dataclass(frozen=True)
class Escapes:
    """Positions whose field left the window, ascending, and the bits above it."""

    positions: NDArray[np.int64]
    high: Bytes


def pack_escapes(escapes: Escapes) -> Bytes:
    """Return the gaps between positions as four byte planes, then the high bits."""
    gaps = np.diff(escapes.positions, prepend=0).astype(np.uint32)
    return np.concatenate([gaps.view(np.uint8).reshape(-1, 4).T.reshape(-1), escapes.high])


def unpack_escapes(packed: Bytes, words: int) -> Escapes:
    """Invert `pack_escapes`, checking that every position lies within `words`.

    Raises:
        CorruptError: a position lies outside.
    """
    count = packed.size // 5
    gaps = np.ascontiguousarray(packed[: 4 * count].reshape(4, count).T).view("<u4").reshape(-1)
    positions = np.cumsum(gaps, dtype=np.int64)
    if count and positions[-1] >= words:
        raise CorruptError(f"an exception at word {positions[-1]} lies outside of {words} words")
    return Escapes(positions, packed[4 * count :])


def top_halves(words: Words) -> Halves:
    """Return the top 16 bits of words as a flat array; 8-bit words become the high byte."""
    if words.itemsize == 2:
        return words
    halves = scratch("top", words.size, np.uint16)
    if words.itemsize == 1:
        np.copyto(halves, words)
        np.multiply(halves, 256, out=halves)
        return halves
    wide = scratch("top-wide", words.size, words.dtype.type)
    np.right_shift(words, 8 * words.itemsize - 16, out=wide)
    np.copyto(halves, wide, casting="unsafe")
    return halves


def add_top_halves(halves: Halves, out: Words) -> None:
    """Set the top 16 bits of wider (or the 8 of narrower) words, whose lower bits are in place already."""
    if out.itemsize == 1:
        np.right_shift(halves, 8, out=halves)
        np.copyto(out, halves, casting="unsafe")
    else:
        wide = scratch("top-wide", out.size, out.dtype.type)
        np.copyto(wide, halves)
        np.left_shift(wide, 8 * out.itemsize - 16, out=wide)
        np.bitwise_or(out, wide, out=out)


def padded(key: str, size: int, lanes: int, dtype: type[np.generic]) -> np.ndarray:
    """Return scratch for `size` elements whose tail, up to a multiple of `lanes`, is zero."""
    held = scratch(key, -(-size // lanes) * lanes, dtype)
    held[size:] = 0
    return held


def outside(fields: np.ndarray, mask: int) -> NDArray[np.int64] | None:
    """Return the positions where any bit of `mask` is set, eight bytes at a time."""
    lanes = 8 // fields.itemsize
    repeated = int.from_bytes(mask.to_bytes(fields.itemsize, "little") * lanes, "little")
    wide = fields.view(np.uint64)
    masked = scratch("outside", wide.size, np.uint64)
    np.bitwise_and(wide, np.uint64(repeated), out=masked)
    hit = scratch("outside-hit", wide.size, np.bool_)
    np.not_equal(masked, 0, out=hit)
    found = np.flatnonzero(hit)
    if not found.size:
        return None
    narrow = (found[:, None] * lanes + np.arange(lanes)).reshape(-1)
    return narrow[(fields[narrow] & fields.dtype.type(mask)) != 0]


def gather(positions: list[NDArray[np.int64]], high: list[Bytes]) -> Escapes:
    """Join the escapes of all blocks."""
    if not positions:
        return Escapes(np.empty(0, np.int64), np.empty(0, np.uint8))
    return Escapes(np.concatenate(positions), np.concatenate(high))


def block_rows(cols: int) -> int:
    """Return how many rows one pass takes: an even number, so that pairs stay together."""
    return max(2, (BLOCK // cols) & ~1)


def pack_pairs(low_nibbles: np.ndarray, rows: int, cols: int, out: Bytes) -> None:
    """Put row 2i and row 2i+1 of 4-bit values into one byte each; a missing last row counts as zero."""
    pairs = low_nibbles.reshape(-1, 2, cols)
    target = out.reshape(-1, cols)
    np.multiply(pairs[:, 1], 16, out=target)
    np.bitwise_or(target, pairs[:, 0], out=target)


def unpack_pairs(packed: Bytes, cols: int, out: Bytes) -> None:
    """Invert `pack_pairs`."""
    pairs = out.reshape(-1, 2, cols)
    source = packed.reshape(-1, cols)
    np.bitwise_and(source, 15, out=pairs[:, 0])
    np.right_shift(source, 4, out=pairs[:, 1])
