"""The nibble split: 4-bit exponents, two tokens to a byte, and a plane of sign and mantissa.

For bfloat16 and float32. The exponent minus the channel's base, measured by the encoder, fits 4 bits almost always; two
consecutive tokens of a channel share a byte, so that an order-0 coder sees half of the correlation between tokens.

The exponent and mantissa split is that of ZipNN (Hershcovitch et al., arXiv 2411.05239); the fixed 4-bit exponent
window that of SplitZip (arXiv 2605.01708).
"""

import numpy as np

from jaxquant.codecs.v3 import halves
from jaxquant.codecs.v3.coders import Bytes, Take, fresh, scratch
from jaxquant.codecs.v3.planes import Words


def split(words: Words, base: Bytes, take: Take = fresh) -> tuple[Bytes, Bytes, halves.Escapes]:
    """Split into paired 4-bit exponents and sign-with-mantissa bytes.

    Args:
        words: rows of `base.size` words, flat, with an 8-bit exponent below the sign.
        base: smallest exponent of the window, per channel.
        take: where planes come from.

    Returns:
        `ceil(rows / 2) * cols` bytes of exponent pairs, one noise byte per word, and the escapes.
    """
    cols, rows = base.size, words.size // base.size
    packed, noise = take((rows + 1) // 2 * cols), take(words.size)
    positions, high = [], []
    step = halves.block_rows(cols)
    bases = np.tile(base, min(step, rows))
    for row in range(0, rows, step):
        count = min(step, rows - row)
        size, even = count * cols, (count + 1) // 2 * 2 * cols
        x = halves.top_halves(words[row * cols : row * cols + size])
        y = scratch("y", size, np.uint16)
        v = scratch("v", size, np.uint16)
        e = halves.padded("e", even, 8, np.uint8)
        np.right_shift(x, 7, out=e[:size], casting="unsafe")
        np.subtract(e[:size], bases[:size], out=e[:size])
        e[size:] = 0
        found = halves.outside(e, 0xF0)
        if found is not None:
            positions.append(found + row * cols)
            high.append(e[found] >> 4)
            e[found] &= 15
        halves.pack_pairs(e[:even], count, cols, packed[row // 2 * cols : row // 2 * cols + even // 2])
        np.bitwise_and(x, 0x807F, out=v)
        # of the low byte of each little-endian word, and of what it joins there, only the next byte matters: the sign
        octets = v.view(np.uint8)
        np.bitwise_or(octets[:-1], octets[1:], out=y.view(np.uint8)[:-1])
        np.copyto(noise[row * cols : row * cols + size], y, casting="unsafe")
    return packed, noise, halves.gather(positions, high)


def merge(packed: Bytes, noise: Bytes, base: Bytes, escapes: halves.Escapes, out: Words) -> None:
    """Invert `split`; the words below the top 16 bits must be in `out` already."""
    cols, rows = base.size, out.size // base.size
    step = halves.block_rows(cols)
    cuts = np.searchsorted(escapes.positions, np.arange(0, rows + step, step) * cols)
    for block, row in enumerate(range(0, rows, step)):
        count = min(step, rows - row)
        size, even = count * cols, (count + 1) // 2 * 2 * cols
        e = scratch("e", even, np.uint8)
        halves.unpack_pairs(packed[row // 2 * cols : row // 2 * cols + even // 2], cols, e)
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
            halves.add_top_halves(y, target)
