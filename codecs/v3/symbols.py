"""The symbol split: sign and top of the magnitude, against the channel's base, as one 8-bit symbol.

For every float. The sign may be taken against the channel's usual sign or against the previous token's, whichever
repeats more. The low bits make the second plane. Symbols may be laid out in tiles of channels, so that each tile gets
its own code.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jaxquant.codecs.v3 import halves
from jaxquant.codecs.v3.coders import Bytes, Take, fresh, scratch
from jaxquant.codecs.v3.halves import Halves
from jaxquant.codecs.v3.planes import Words

SIGN = np.uint16(0x8000)


@dataclass(frozen=True)
class Model:
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


def _flip_signs(x: Halves, previous: Halves, model: Model, out: Halves) -> Halves:
    """XOR every row's sign with the row before it where the model says so."""
    cols = model.base.size
    flat = out.reshape(-1, cols)
    rows = x.reshape(-1, cols)
    np.bitwise_and(rows[:-1], model.against_previous, out=flat[1:])
    np.bitwise_and(previous, model.against_previous, out=flat[0])
    np.bitwise_xor(flat, rows, out=flat)
    return out


def _restore_signs(x: Halves, carry: Halves, model: Model) -> Halves:
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


def split(words: Words, model: Model, take: Take = fresh) -> tuple[Bytes, Bytes, halves.Escapes]:
    """Split into 8-bit symbols of sign and top of the magnitude, and the bits below.

    Returns:
        One symbol per word in tiles [cols / tile, rows, tile]; the low bits (two rows share a byte where there are
        four, none for 8-bit words); and the escapes, which only occur with a shift of 4.
    """
    cols, rows = model.base.size, words.size // model.base.size
    paired = model.shift == 4
    symbols = take(words.size)
    tiled = symbols.reshape(cols // model.tile, rows, model.tile)
    low = take((rows + 1) // 2 * cols if paired else words.size * (words.itemsize > 1))
    flipping = bool(model.against_previous.any())
    previous = np.zeros(cols, np.uint16)
    positions, high = [], []
    step = halves.block_rows(cols)
    for row in range(0, rows, step):
        count = min(step, rows - row)
        size, even = count * cols, (count + 1) // 2 * 2 * cols
        x = halves.top_halves(words[row * cols : row * cols + size])
        y = halves.padded("y", size, 4, np.uint16)
        if flipping:
            last = x[-cols:].copy()
            np.right_shift(_flip_signs(x, previous, model, y[:size]), model.shift, out=y[:size])
            previous = last
        else:
            np.right_shift(x, model.shift, out=y[:size])
        y2 = y[:size].reshape(count, cols)
        np.subtract(y2, model.base, out=y2)
        if paired:
            found = halves.outside(y, 0x780)
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
            halves.pack_pairs(e, count, cols, low[row // 2 * cols : row // 2 * cols + even // 2])
        elif low.size:
            np.copyto(low[row * cols : row * cols + size], x, casting="unsafe")
        laid = y2 if model.order is None else np.take(y2, model.order, axis=1)
        np.copyto(tiled[:, row : row + count], laid.reshape(count, -1, model.tile).transpose(1, 0, 2), casting="unsafe")
    return symbols, low, halves.gather(positions, high)


def merge(symbols: Bytes, low: Bytes, model: Model, escapes: halves.Escapes, out: Words) -> None:
    """Invert `split`; the words below the top 16 bits must be in `out` already."""
    cols, rows = model.base.size, out.size // model.base.size
    paired = model.shift == 4
    tiled = symbols.reshape(cols // model.tile, rows, model.tile)
    flipping = bool(model.against_previous.any())
    carry = np.zeros(cols, np.uint16)
    inverse = None if model.order is None else np.argsort(model.order)
    step = halves.block_rows(cols)
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
            halves.unpack_pairs(low[row // 2 * cols : row // 2 * cols + even // 2], cols, e)
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
        joined = target if out.itemsize == 2 else y
        np.bitwise_or(y, v, out=joined)
        if flipping:
            carry = _restore_signs(joined, carry, model)
        if out.itemsize != 2:
            halves.add_top_halves(y, target)
