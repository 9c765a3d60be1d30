"""Words to byte planes and back, and the differences between words that make planes compressible.

A word is the bit pattern of one number (or of one part of a complex number) as an unsigned integer of 1, 2, 4 or 8
bytes. Everything here is a bijection of words, so NaN payloads and signed zeros pass through.
"""

import numpy as np
from numpy.typing import NDArray

from jaxquant.codecs.v3.coders import Bytes, Take, fresh, scratch

NONE, DELTA, DELTA_TWICE, XOR = range(4)
ORDERED = 8  # flag: map floats to integers of the same order first

BLOCK = 1 << 18  # elements per pass: small enough for the cache, large enough to amortise the call

Words = NDArray[np.unsignedinteger]


def _signed(words: Words) -> np.ndarray:
    return words.view(np.dtype(f"i{words.itemsize}"))


def split(words: Words, index: int, take: Take = fresh) -> Bytes:
    """Return byte `index` of every word, 0 being the least significant."""
    if words.itemsize == 1:
        return words
    plane = take(words.size)
    shifted = scratch("split", min(BLOCK, words.size), words.dtype.type)
    for start in range(0, words.size, BLOCK):
        part = words[start : start + BLOCK]
        if index:
            np.right_shift(part, 8 * index, out=shifted[: part.size])
            part = shifted[: part.size]
        np.copyto(plane[start : start + BLOCK], part, casting="unsafe")
    return plane


def merge(planes: list[Bytes], out: Words) -> None:
    """Fill `out` from its byte planes, least significant first; absent high planes are zero."""
    if out.itemsize == 1:
        np.copyto(out, planes[0])
        return
    wide = scratch("merge", min(BLOCK, out.size), out.dtype.type)
    for start in range(0, out.size, BLOCK):
        part = out[start : start + BLOCK]
        np.copyto(part, planes[-1][start : start + BLOCK])
        for plane in planes[-2::-1]:
            np.multiply(part, 256, out=part)
            widened = wide[: part.size]
            np.copyto(widened, plane[start : start + BLOCK])
            np.bitwise_or(part, widened, out=part)


def _to_ordered(words: Words) -> Words:
    sign = (_signed(words) >> (8 * words.itemsize - 1)).view(words.dtype)
    return words ^ (sign | words.dtype.type(1 << (8 * words.itemsize - 1)))


def _from_ordered(words: Words) -> Words:
    sign = ~(_signed(words) >> (8 * words.itemsize - 1)).view(words.dtype)
    return words ^ (sign | words.dtype.type(1 << (8 * words.itemsize - 1)))


def _to_zigzag(words: Words) -> Words:
    signed = _signed(words)
    return ((signed << 1) ^ (signed >> (8 * words.itemsize - 1))).view(words.dtype)


def _from_zigzag(words: Words) -> Words:
    return (words >> words.dtype.type(1)) ^ (-_signed(words & words.dtype.type(1))).view(words.dtype)


def difference(words: Words, cols: int, predictor: int) -> Words:
    """Replace words by their difference to the word `cols` places before, as `predictor` says."""
    if predictor & ORDERED:
        words = _to_ordered(words)
    kind = predictor & ~ORDERED
    if kind == XOR:
        changed = words.copy()
        np.bitwise_xor(words[cols:], words[:-cols], out=changed[cols:])
        return changed
    for _ in range(kind):
        changed = words.copy()
        np.subtract(words[cols:], words[:-cols], out=changed[cols:])
        words = changed
    return _to_zigzag(words) if kind else words


def undo_difference(words: Words, cols: int, predictor: int) -> Words:
    """Invert `difference`."""
    kind = predictor & ~ORDERED
    rows = words.reshape(-1, cols)
    if kind == XOR:
        rows = np.bitwise_xor.accumulate(rows, axis=0)
    elif kind:
        rows = _from_zigzag(rows)
        for _ in range(kind):
            rows = np.cumsum(rows, axis=0, dtype=words.dtype)
    flat = rows.reshape(-1)
    return _from_ordered(flat) if predictor & ORDERED else flat
