"""Reversible splits of floating-point words into a compressible plane and a plane of noise.

Both splits look at the top 16 bits of each word and know a base per channel (column), measured by the encoder:

* **nibbles** (bfloat16, float32): the exponent minus the channel's base fits 4 bits almost always; two consecutive
  tokens of a channel share a byte, so that an order-0 coder sees half of the correlation between tokens. Sign and
  mantissa make the second plane.
* **symbols** (every float): sign and top of the magnitude minus the channel's base make one 8-bit symbol; the sign may
  be taken against the channel's usual sign or against the previous token's, whichever repeats more. The low
  bits make the second plane. Symbols may be laid out in tiles of channels, so that each tile gets its own code.

What leaves the window is listed as (position, high bits): the window is placed so that this is rare.

The exponent and mantissa split is that of ZipNN (Hershcovitch et al., arXiv 2411.05239); the fixed 4-bit exponent
window that of SplitZip (arXiv 2605.01708).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jaxquant.codecs.coders import Bytes, scratch
from jaxquant.codecs.errors import CorruptError
from jaxquant.codecs.planes import Words

BLOCK = 1 << 19  # elements per pass: the calls cost more than the second-level cache saves
SIGN = np.uint16(0x8000)

Halves = NDArray[np.uint16]


@dataclass(frozen=True)
class Escapes:
    """Positions whose field left the window, ascending, and the bits above it."""

    positions: NDArray[np.int64]
    high: Bytes


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


def _padded(key: str, size: int, lanes: int, dtype: type[np.generic]) -> np.ndarray:
    """Return scratch for `size` elements whose tail, up to a multiple of `lanes`, is zero."""
    held = scratch(key, -(-size // lanes) * lanes, dtype)
    held[size:] = 0
    return held


def _outside(fields: np.ndarray, mask: int) -> NDArray[np.int64] | None:
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


def _gather(positions: list[NDArray[np.int64]], high: list[Bytes]) -> Escapes:
    if not positions:
        return Escapes(np.empty(0, np.int64), np.empty(0, np.uint8))
    return Escapes(np.concatenate(positions), np.concatenate(high))


def _block_rows(cols: int) -> int:
    return max(2, (BLOCK // cols) & ~1)


def _pack_pairs(low_nibbles: np.ndarray, rows: int, cols: int, out: Bytes) -> None:
    """Put row 2i and row 2i+1 of 4-bit values into one byte each; a missing last row counts as zero."""
    pairs = low_nibbles.reshape(-1, 2, cols)
    target = out.reshape(-1, cols)
    np.multiply(pairs[:, 1], 16, out=target)
    np.bitwise_or(target, pairs[:, 0], out=target)


def _unpack_pairs(packed: Bytes, cols: int, out: Bytes) -> None:
    pairs = out.reshape(-1, 2, cols)
    source = packed.reshape(-1, cols)
    np.bitwise_and(source, 15, out=pairs[:, 0])
    np.right_shift(source, 4, out=pairs[:, 1])


def split_nibbles(words: Words, base: Bytes) -> tuple[Bytes, Bytes, Escapes]:
    """Split into paired 4-bit exponents and sign-with-mantissa bytes.

    Args:
        words: rows of `base.size` words, flat, with an 8-bit exponent below the sign.
        base: smallest exponent of the window, per channel.

    Returns:
        `ceil(rows / 2) * cols` bytes of exponent pairs, one noise byte per word, and the escapes.
    """
    cols, rows = base.size, words.size // base.size
    packed = np.empty((rows + 1) // 2 * cols, np.uint8)
    noise = np.empty(words.size, np.uint8)
    positions, high = [], []
    step = _block_rows(cols)
    for row in range(0, rows, step):
        count = min(step, rows - row)
        size, even = count * cols, (count + 1) // 2 * 2 * cols
        x = top_halves(words[row * cols : row * cols + size])
        y = scratch("y", size, np.uint16)
        v = scratch("v", size, np.uint16)
        e = _padded("e", even, 8, np.uint8)
        np.right_shift(x, 7, out=y)
        np.copyto(e[:size], y, casting="unsafe")
        exponents = e[:size].reshape(count, cols)
        np.subtract(exponents, base, out=exponents)
        e[size:] = 0
        found = _outside(e, 0xF0)
        if found is not None:
            positions.append(found + row * cols)
            high.append(e[found] >> 4)
            e[found] &= 15
        _pack_pairs(e[:even], count, cols, packed[row // 2 * cols : row // 2 * cols + even // 2])
        np.bitwise_and(x, 0x807F, out=v)
        np.right_shift(v, 8, out=y)
        np.bitwise_or(v, y, out=v)
        np.copyto(noise[row * cols : row * cols + size], v, casting="unsafe")
    return packed, noise, _gather(positions, high)


def merge_nibbles(packed: Bytes, noise: Bytes, base: Bytes, escapes: Escapes, out: Words) -> None:
    """Invert `split_nibbles`; the words below the top 16 bits must be in `out` already."""
    cols, rows = base.size, out.size // base.size
    step = _block_rows(cols)
    cuts = np.searchsorted(escapes.positions, np.arange(0, rows + step, step) * cols)
    for block, row in enumerate(range(0, rows, step)):
        count = min(step, rows - row)
        size, even = count * cols, (count + 1) // 2 * 2 * cols
        e = scratch("e", even, np.uint8)
        _unpack_pairs(packed[row // 2 * cols : row // 2 * cols + even // 2], cols, e)
        here = slice(cuts[block], cuts[block + 1])
        e[escapes.positions[here] - row * cols] |= escapes.high[here] << 4
        exponents = e[:size].reshape(count, cols)
        np.add(exponents, base, out=exponents)
        y = scratch("y", size, np.uint16)
        v = scratch("v", size, np.uint16)
        # widening the noise byte as a signed one puts its sign at bit 15
        np.copyto(v.view(np.int16), noise[row * cols : row * cols + size].view(np.int8))
        np.bitwise_and(v, 0x807F, out=v)
        np.copyto(y, e[:size])
        np.multiply(y, 128, out=y)
        target = out[row * cols : row * cols + size]
        np.bitwise_or(y, v, out=target if out.itemsize == 2 else y)
        if out.itemsize != 2:
            add_top_halves(y, target)


@dataclass(frozen=True)
class SymbolModel:
    """How symbols are formed.

    `shift` low bits of the top half stay out (8 for float16 and 8-bit floats, 4 for the rest). `base` [cols] is
    subtracted from sign and magnitude above them; its top bit (of 16 - shift) flips the sign. `against_previous`
    [cols] is 0x8000 where the sign is coded against the previous row's. `tile` divides cols. `order` [cols], if there
    is one, is the permutation in which columns are laid out, alike ones side by side.
    """

    shift: int
    base: Halves
    against_previous: Halves
    tile: int
    order: NDArray[np.intp] | None = None


def _flip_signs(x: Halves, previous: Halves, model: SymbolModel, out: Halves) -> Halves:
    """XOR every row's sign with the row before it where the model says so."""
    cols = model.base.size
    flat = out.reshape(-1, cols)
    rows = x.reshape(-1, cols)
    np.bitwise_and(rows[:-1], model.against_previous, out=flat[1:])
    np.bitwise_and(previous, model.against_previous, out=flat[0])
    np.bitwise_xor(flat, rows, out=flat)
    return out


def _restore_signs(x: Halves, carry: Halves, model: SymbolModel) -> Halves:
    """Invert `_flip_signs` in place and return the last row's accumulated flips: a prefix XOR over rows."""
    cols = model.base.size
    rows = x.reshape(-1, cols)
    flips = scratch("flips", x.size, np.uint16).reshape(-1, cols)
    np.bitwise_and(rows, model.against_previous, out=flips)
    np.bitwise_xor(rows, flips, out=rows)
    np.bitwise_xor(flips[0], carry, out=flips[0])
    prefix_xor(flips)
    np.bitwise_xor(rows, flips, out=rows)
    return flips[-1].copy()


def prefix_xor(rows: np.ndarray, group: int = 16) -> None:
    """Replace each row by the XOR of all rows up to it, in place, in about two passes."""
    count = len(rows)
    whole = count // group * group
    if whole:
        grouped = rows[:whole].reshape(count // group, group, -1)
        for row in range(1, group):
            np.bitwise_xor(grouped[:, row], grouped[:, row - 1], out=grouped[:, row])
        if len(grouped) > 1:
            carries = grouped[:-1, -1].copy()
            prefix_xor(carries)
            np.bitwise_xor(grouped[1:], carries[:, None], out=grouped[1:])
    for row in range(max(whole, 1), count):
        np.bitwise_xor(rows[row], rows[row - 1], out=rows[row])


def split_symbols(words: Words, model: SymbolModel) -> tuple[Bytes, Bytes, Escapes]:
    """Split into 8-bit symbols of sign and top of the magnitude, and the bits below.

    Returns:
        One symbol per word in tiles [cols / tile, rows, tile]; the low bits (two rows share a byte where there are
        four, none for 8-bit words); and the escapes, which only occur with a shift of 4.
    """
    cols, rows = model.base.size, words.size // model.base.size
    paired = model.shift == 4
    symbols = np.empty(words.size, np.uint8)
    tiled = symbols.reshape(cols // model.tile, rows, model.tile)
    low = np.empty((rows + 1) // 2 * cols if paired else words.size * (words.itemsize > 1), np.uint8)
    flipping = bool(model.against_previous.any())
    previous = np.zeros(cols, np.uint16)
    positions, high = [], []
    step = _block_rows(cols)
    for row in range(0, rows, step):
        count = min(step, rows - row)
        size, even = count * cols, (count + 1) // 2 * 2 * cols
        x = top_halves(words[row * cols : row * cols + size])
        y = _padded("y", size, 4, np.uint16)
        if flipping:
            last = x[-cols:].copy()
            np.right_shift(_flip_signs(x, previous, model, y[:size]), model.shift, out=y[:size])
            previous = last
        else:
            np.right_shift(x, model.shift, out=y[:size])
        y2 = y[:size].reshape(count, cols)
        np.subtract(y2, model.base, out=y2)
        if paired:
            found = _outside(y, 0x780)
            if found is not None:
                positions.append(found + row * cols)
                high.append((y[found] >> 7).astype(np.uint8) & 15)
            v = scratch("v", size, np.uint16)
            np.right_shift(y[:size], 4, out=v)
            np.bitwise_and(v, 0x80, out=v)
            np.bitwise_and(y[:size], 0x7F, out=y[:size])
            np.bitwise_or(v, y[:size], out=y[:size])
            e = scratch("e", even, np.uint8)
            np.copyto(e[:size], x, casting="unsafe")
            np.bitwise_and(e[:size], 15, out=e[:size])
            e[size:] = 0
            _pack_pairs(e, count, cols, low[row // 2 * cols : row // 2 * cols + even // 2])
        elif low.size:
            np.copyto(low[row * cols : row * cols + size], x, casting="unsafe")
        laid = y2 if model.order is None else np.take(y2, model.order, axis=1)
        np.copyto(tiled[:, row : row + count], laid.reshape(count, -1, model.tile).transpose(1, 0, 2), casting="unsafe")
    return symbols, low, _gather(positions, high)


def merge_symbols(symbols: Bytes, low: Bytes, model: SymbolModel, escapes: Escapes, out: Words) -> None:
    """Invert `split_symbols`; the words below the top 16 bits must be in `out` already."""
    cols, rows = model.base.size, out.size // model.base.size
    paired = model.shift == 4
    tiled = symbols.reshape(cols // model.tile, rows, model.tile)
    flipping = bool(model.against_previous.any())
    carry = np.zeros(cols, np.uint16)
    inverse = None if model.order is None else np.argsort(model.order)
    step = _block_rows(cols)
    cuts = np.searchsorted(escapes.positions, np.arange(0, rows + step, step) * cols)
    for block, row in enumerate(range(0, rows, step)):
        count = min(step, rows - row)
        size, even = count * cols, (count + 1) // 2 * 2 * cols
        y = scratch("y", size, np.uint16)
        v = scratch("v", size, np.uint16)
        y2 = y.reshape(count, cols)
        source = tiled[:, row : row + count].transpose(1, 0, 2)
        if inverse is not None:
            source = np.take(source.reshape(count, cols), inverse, axis=1).reshape(count, -1, model.tile)
        if paired:
            # a signed symbol widens to sign bits above bit 7, of which bit 11 is the one to keep
            np.copyto(y2.view(np.int16).reshape(count, -1, model.tile), source.view(np.int8))
            np.bitwise_and(y, 0x87F, out=y)
            here = slice(cuts[block], cuts[block + 1])
            y[escapes.positions[here] - row * cols] |= escapes.high[here].astype(np.uint16) << 7
            e = scratch("e", even, np.uint8)
            _unpack_pairs(low[row // 2 * cols : row // 2 * cols + even // 2], cols, e)
            np.copyto(v, e[:size])
        else:
            np.copyto(y2.reshape(count, -1, model.tile), source)
            if low.size:
                np.copyto(v, low[row * cols : row * cols + size])
            else:
                v[:] = 0
        np.add(y2, model.base, out=y2)
        np.multiply(y, 1 << model.shift, out=y)
        target = out[row * cols : row * cols + size]
        halves = target if out.itemsize == 2 else y
        np.bitwise_or(y, v, out=halves)
        if flipping:
            carry = _restore_signs(halves, carry, model)
        if out.itemsize != 2:
            add_top_halves(y, target)


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
