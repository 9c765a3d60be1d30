"""Which split a chunk gets: costs in bits per word, estimated on a sample of its rows.

Nothing here is needed to decode: a chunk says how it was made.
"""

from dataclasses import dataclass

import numpy as np

from jaxquant.codecs import coders, fields, planes
from jaxquant.codecs.coders import Bytes
from jaxquant.codecs.planes import Words

HUFFMAN_LOSS = 0.035  # bits per symbol above the entropy, code tables included
ESCAPE_BITS = 20


@dataclass(frozen=True)
class Profile:
    """What an encoder may spend.

    Attributes:
        levels: zstd levels to judge on a probe of each plane; 0 is bare Huffman.
        symbols: whether 8-bit symbols may be chosen where 4-bit exponents would do.
        trials: how many of the best estimates are encoded in full; the smallest result is kept.
        contexts: whether planes may be coded with a context model.
    """

    levels: tuple[int, ...]
    symbols: bool
    trials: int
    contexts: bool


PROFILES = {
    "fast": Profile(levels=(0, 1), symbols=False, trials=1, contexts=False),
    "balanced": Profile(levels=(0, 3), symbols=True, trials=1, contexts=False),
    "small": Profile(levels=(0, 3, 19), symbols=True, trials=3, contexts=True),
}


@dataclass(frozen=True)
class Plan:
    """One way to split a chunk and what it is expected to cost."""

    bits: float
    split: Bytes | fields.SymbolModel | int
    """A base row of 4-bit exponents, a model of symbols, or the predictor of byte planes."""


def _rows(words: Words, cols: int, indices: np.ndarray) -> np.ndarray:
    return fields.top_halves(words.reshape(-1, cols)[indices].reshape(-1)).reshape(-1, cols).copy()


def _binary_entropy(share: np.ndarray) -> np.ndarray:
    share = np.clip(share, 1e-6, 1 - 1e-6)
    return -(share * np.log2(share) + (1 - share) * np.log2(1 - share))


class _Sample:
    """Rows spread over a chunk, each with the row before it."""

    def __init__(self, words: Words, cols: int, exponent_bits: int) -> None:
        rows = words.size // cols
        count = min(rows - 1, max(16, min(64, (1 << 16) // cols)))
        self.indices = 1 + np.arange(count) * (rows - 1) // count
        self.halves = _rows(words, cols, self.indices)
        self.before = _rows(words, cols, self.indices - 1)
        self.exponent_bits = exponent_bits
        self.exponents = (self.halves >> (15 - exponent_bits)) & ((1 << exponent_bits) - 1)
        mean = self.exponents.mean(axis=0, dtype=np.float32)
        # the mean exponent of a Gaussian lies about .8 below that of its median magnitude
        typical = np.floor(mean + 0.8).astype(np.int32) - 1
        if mean.max() - mean.min() < 1.5:
            common = np.full_like(typical, int(np.floor(np.median(mean) + 0.8)) - 1)
            if coders.entropy(self.exponents) <= coders.entropy(self._centred(typical)) + 0.02:
                typical = common
        self.typical = typical

    def _centred(self, typical: np.ndarray) -> np.ndarray:
        return np.clip(self.exponents.astype(np.int32) - typical + 64, 0, 127)

    def window(self, width: int) -> tuple[int, float]:
        """Return where, relative to the typical exponent, a window loses least, and the share it loses."""
        counts = np.bincount(self._centred(self.typical).reshape(-1), minlength=128)
        inside = np.convolve(counts, np.ones(width, int), "valid")
        best = np.flatnonzero(inside == inside.max())
        start = int(best[np.argmin(np.abs(best - (64 - width + 5)))])
        return start - 64, 1 - inside[start] / counts.sum()


def _nibbles(sample: _Sample, itemsize: int) -> Plan:
    start, lost = sample.window(16)
    base = np.clip(sample.typical + start, 0, 255).astype(np.uint8)
    pairs = [(half >> 7).astype(np.uint8) - base for half in (sample.before, sample.halves)]
    entropy = coders.entropy((pairs[0] & 15) | ((pairs[1] & 15) << 4)) / 2
    return Plan(8 * itemsize - 8 + entropy + HUFFMAN_LOSS / 2 + lost * ESCAPE_BITS, base)


def _symbols(sample: _Sample, rows: int, itemsize: int) -> Plan:
    shift = 8 if sample.exponent_bits + 8 < 16 and sample.exponent_bits != 8 else 4
    kept = 15 - shift - sample.exponent_bits  # mantissa bits inside the symbol's magnitude
    width = min(1 << (7 - kept), 96)
    start, lost = sample.window(width) if shift == 4 else (-8, 0.0)
    magnitude = (sample.typical + start) << kept
    if shift == 4:
        magnitude = np.maximum(magnitude, 0)
    signs, before = sample.halves >> 15, sample.before >> 15
    usual, flips = signs.mean(axis=0, dtype=np.float32), (signs ^ before).mean(axis=0, dtype=np.float32)
    previous = _binary_entropy(flips) < _binary_entropy(usual) - 0.05
    negative = np.where(previous, flips, usual) > 0.5
    base = ((magnitude + (negative.astype(np.int32) << (15 - shift))) & (0xFFFF >> shift)).astype(np.uint16)
    against = np.where(previous, fields.SIGN, np.uint16(0)).astype(np.uint16)
    coded = ((sample.halves ^ (sample.before & against)) >> shift) - base
    symbols = (coded & 0x7F) | ((coded >> (8 - shift)) & 0x80) if shift == 4 else coded & 0xFF
    entropy, cols, tile = coders.entropy(symbols), symbols.shape[1], symbols.shape[1]
    for narrow in (32, 64, 128, 256):
        if narrow < cols and cols % narrow == 0 and rows * narrow >= 1 << 16:
            index = np.arange(cols, dtype=np.uint16) // narrow
            tiled = coders.entropy(symbols + index * 256) - np.log2(cols // narrow)
            if tiled < entropy - 0.02:
                entropy, tile = tiled, narrow
            break
    bits = 8 * itemsize - (16 - shift) + entropy + HUFFMAN_LOSS + lost * ESCAPE_BITS
    return Plan(bits, fields.SymbolModel(shift, base, against, tile))


def _planes(words: Words, cols: int, exponent_bits: int, levels: tuple[int, ...]) -> list[Plan]:
    """Cost the byte planes of a run of consecutive rows, plain and as differences."""
    rows = words.size // cols
    count = min(rows, max(4, min(64, (1 << 14) // cols)))
    first = (rows - count) // 2
    run = words[first * cols : (first + count) * cols]
    ordered = planes.ORDERED if exponent_bits else 0
    found = []
    for predictor in (planes.NONE, planes.DELTA | ordered, planes.DELTA_TWICE | ordered, planes.XOR):
        if predictor and count < 4:
            break
        kept = planes.difference(run, cols, predictor)[2 * cols if predictor else 0 :]
        split = [planes.split(kept, index) for index in range(words.itemsize)]
        bits = [min(8.0, coders.entropy(plane) + HUFFMAN_LOSS) for plane in split]
        if sum(bits) < 7.5 * words.itemsize or not predictor:
            best = [8 * len(coders.compressed(plane, levels[1])) / plane.size for plane in split]
            bits = [min(pair) for pair in zip(bits, best, strict=True)]
        found.append(Plan(sum(bits) + 0.15 * words.itemsize, predictor))
    return found


def plans(words: Words, cols: int, exponent_bits: int, profile: Profile) -> list[Plan]:
    """Return the ways to split a chunk, cheapest estimate first.

    Args:
        words: `rows * cols` words, flat.
        cols: words per row; a column is a channel.
        exponent_bits: of the number format, 0 for integers.
        profile: what may be spent.
    """
    rows = words.size // cols
    found = []
    if rows >= 8 and exponent_bits and cols * 4 <= words.size:
        sample = _Sample(words, cols, exponent_bits)
        if exponent_bits == 8 and words.itemsize > 1:
            found.append(_nibbles(sample, words.itemsize))
        if profile.symbols or not found:
            found.append(_symbols(sample, rows, words.itemsize))
    return sorted(found + _planes(words, cols, exponent_bits, profile.levels), key=lambda plan: plan.bits)
