"""Which split a chunk gets: costs in bits per word, estimated on a sample of its rows.

Nothing here is needed to decode: a chunk says how it was made.
"""

import math
from dataclasses import dataclass

import numpy as np

from jaxquant.codecs.v3 import coders, halves, planes, symbols
from jaxquant.codecs.v3.coders import Bytes
from jaxquant.codecs.v3.planes import Words

HUFFMAN_LOSS = 0.035  # bits per symbol above the entropy, code tables included
ESCAPE_BITS = 20
MATCHED = 0.15  # bits per word by which plain planes must seem smaller where values recur


@dataclass(frozen=True)
class Profile:
    """What an encoder may spend.

    Attributes:
        levels: zstd levels to judge on a probe of each plane; 0 is bare Huffman.
        context: how far symbols go: 0 for the channel alone, 1 for the previous token's sign as well, 2 for sorted
            channels as well.
        symbols: whether 8-bit symbols may be chosen where 4-bit exponents would do.
        trials: how many of the best estimates are encoded in full (one more where values recur, as matches are
            hard to foresee); the smallest result is kept.
        hasty: whether to look at half the sample, and to leave out a split once something was made that is smaller
            than its estimate.
    """

    levels: tuple[int, ...]
    symbols: bool
    context: int
    trials: int
    hasty: bool = False


PROFILES = {
    "fast": Profile(levels=(0, 1), symbols=False, context=0, trials=1, hasty=True),
    "balanced": Profile(levels=(0, 3), symbols=True, context=1, trials=1),
    "small": Profile(levels=(0, 3, 12), symbols=True, context=2, trials=3),
}


@dataclass(frozen=True)
class Plan:
    """One way to split a chunk and what it is expected to cost."""

    bits: float
    split: Bytes | symbols.Model | int
    """A base row of 4-bit exponents, a model of symbols, or the predictor of byte planes."""


def _rows(words: Words, cols: int, indices: np.ndarray) -> np.ndarray:
    tops = halves.top_halves(words.reshape(-1, cols)[indices].reshape(-1)).reshape(-1, cols)
    return tops if words.itemsize == 2 else tops.copy()


def _binary_entropy(share: np.ndarray) -> np.ndarray:
    share = np.clip(share, 1e-6, 1 - 1e-6)
    return -(share * np.log2(share) + (1 - share) * np.log2(1 - share))


class _Sample:
    """Rows spread over a chunk, each with the row before it."""

    def __init__(self, words: Words, cols: int, exponent_bits: int, most: int) -> None:
        rows = words.size // cols
        count = min(rows - 1, max(16, min(most, (1 << 16) // cols)))
        indices = 1 + np.arange(count) * (rows - 1) // count
        self._words, self._before = words.reshape(-1, cols), indices - 1
        self.halves = _rows(words, cols, indices)
        self.exponent_bits = exponent_bits
        shifted = self.halves >> (15 - exponent_bits)
        exponents = (shifted & ((1 << exponent_bits) - 1)).astype(np.int16 if exponent_bits > 8 else np.uint8)
        self.few = slice(0, None, max(1, exponents.size >> 13))
        self.exponents = exponents[self.few]
        # a channel's mean is pulled towards the common one by as much as sampling alone would spread it
        mean = np.add.reduce(exponents, axis=0, dtype=np.uint32).astype(np.float32) / count
        common, spread = float(mean.mean()), float(mean.var())
        within = max(0.0, float(self.exponents.astype(np.float32).var()) - spread) / count
        shrunk = common + (mean - common) * max(0.0, 1 - within / max(spread, 1e-9))
        # and lies about .8 below the exponent of a Gaussian's median magnitude
        self.typical = np.floor(shrunk + 0.8).astype(np.int32) - 1
        self.counts = np.bincount(self._centred(self.typical).reshape(-1), minlength=256)

    def before(self, which: slice = slice(None)) -> np.ndarray:
        """Return the rows before those sampled, or before some of them."""
        return _rows(self._words, self._words.shape[1], self._before[which])

    def smooth(self) -> bool:
        """Say whether most words share their top byte with the word before, as differences would need."""
        same = (self.halves[self.few] ^ self.before(self.few)) < 256
        return bool(np.count_nonzero(same) > 0.6 * same.size)

    def _centred(self, typical: np.ndarray) -> np.ndarray:
        if self.exponent_bits > 8:
            return np.clip(self.exponents - typical + 128, 0, 255)
        return self.exponents - (typical - 128).astype(np.uint8)

    def window(self, width: int) -> tuple[int, float]:
        """Return where, relative to the typical exponent, a window loses least, and the share it loses."""
        inside = np.convolve(self.counts, np.ones(width, int), "valid")
        best = np.flatnonzero(inside == inside.max())
        start = int(best[np.argmin(np.abs(best - (128 - width + 5)))])
        return start - 128, 1 - inside[start] / self.counts.sum()


def _nibbles(sample: _Sample, itemsize: int) -> Plan:
    start, lost = sample.window(16)
    base = np.clip(sample.typical + start, 0, 255).astype(np.uint8)
    entropy = coders.entropy_of(sample.counts)  # of single exponents: pairs can only cost less
    return Plan(8 * itemsize - 8 + entropy + HUFFMAN_LOSS / 2 + lost * ESCAPE_BITS, base)


def _side_by_side(sample: _Sample, nibbles: Plan) -> Plan | None:
    """Pair each channel with one of the same token, by rows of half the columns: a token that recurs then matches."""
    half, odd = divmod(sample.typical.size, 2)
    if odd:
        return None
    shared = sample.typical.reshape(2, half).sum(axis=0) // 2
    return Plan(nibbles.bits, np.clip(shared + sample.window(16)[0], 0, 255).astype(np.uint8))


def _tiled_entropy(coded: np.ndarray, tile: int) -> float:
    """Return the entropy of symbols given the tile of columns they are in."""
    cols = coded.shape[1]
    index = np.arange(cols, dtype=np.uint32) // tile
    return coders.entropy(coded + index * 256) - math.log2(cols // tile)


def _symbols(sample: _Sample, rows: int, itemsize: int, context: int) -> list[Plan]:
    shift = 8 if sample.exponent_bits + 8 < 16 and sample.exponent_bits != 8 else 4
    kept = 15 - shift - sample.exponent_bits  # mantissa bits inside the symbol's magnitude
    width = min(1 << (7 - kept), 96)
    start, lost = sample.window(width) if shift == 4 else (-8, 0.0)
    magnitude = (sample.typical + start) << kept
    if shift == 4:
        magnitude = np.maximum(magnitude, 0)
    before = sample.before()
    usual = (sample.halves >> 15).mean(axis=0, dtype=np.float32)
    flips = ((sample.halves ^ before) >> 15).mean(axis=0, dtype=np.float32)
    doubt = np.stack([_binary_entropy(usual), _binary_entropy(flips) + 0.05])  # about the sign, in bits
    previous = (doubt[1] < doubt[0]) & (context > 0)
    negative = np.where(previous, flips, usual) > 0.5
    base = ((magnitude + (negative.astype(np.int32) << (15 - shift))) & (0xFFFF >> shift)).astype(np.uint16)
    against = np.where(previous, symbols.SIGN, np.uint16(0)).astype(np.uint16)
    coded = ((sample.halves ^ (before & against))[sample.few] >> shift) - base
    found = (coded & 0x7F) | ((coded >> (8 - shift)) & 0x80) if shift == 4 else coded & 0xFF
    entropy, cols = coders.entropy(found), found.shape[1]
    tile = next((narrow for narrow in (32, 64, 128, 256) if cols % narrow == 0 and rows * narrow >= 1 << 16), cols)
    laid: list[tuple[float, int, np.ndarray | None]] = [(entropy, cols, None)]
    if tile < cols and context:
        tiled = _tiled_entropy(found, tile) + 0.02
        laid = [(tiled, tile, None) if tiled < entropy else (entropy, cols, None)]
        if context > 1 and cols <= 1 << 16:
            alike = np.lexsort((sample.typical, doubt.min(axis=0)))
            laid.append((_tiled_entropy(found[:, alike], tile) + 0.02, tile, alike))
    fixed = 8 * itemsize - (16 - shift) + HUFFMAN_LOSS + lost * ESCAPE_BITS
    return [Plan(fixed + bits, symbols.Model(shift, base, against, tile, order)) for bits, tile, order in laid]


def _plane_bits(words: Words, repeats: bool, level: int) -> float:
    """Cost the byte planes of some words, with matches where they may pay."""
    total = 0.15 * words.itemsize
    for index in range(words.itemsize):
        plane = planes.split(words, index)
        bits = min(8.0, coders.entropy(plane) + HUFFMAN_LOSS)
        total += min(bits, 8 * len(coders.compressed(plane, level)) / plane.size) if repeats else bits
    return total


def _planes(words: Words, cols: int, exponent_bits: int, repeats: bool, level: int, *, differences: bool) -> list[Plan]:
    """Cost the byte planes of a run of consecutive rows, plain and, if wanted, as differences."""
    rows = words.size // cols
    count = min(rows, max(4, min(64 if repeats else 16, (1 << 14) // cols)))
    first = (rows - count) // 2
    run = words[first * cols : (first + count) * cols]
    found = [Plan(_plane_bits(run, repeats, level), planes.NONE)]
    if count < 4 or not differences:
        return found
    ordered = planes.ORDERED if exponent_bits else 0
    for predictor in (planes.DELTA | ordered, planes.DELTA_TWICE | ordered, planes.XOR):
        changed = planes.difference(run, cols, predictor)[2 * cols :]
        found.append(Plan(_plane_bits(changed, repeats, level), predictor))
    return found


def recurring(words: Words, cols: int) -> bool:
    """Say whether values recur at the same channels often enough for repeated rows or matches to pay."""
    rows = words.size // cols
    if (cols * words.itemsize) % 8 or rows < 16:
        return True  # too small or too odd to tell cheaply
    wide = words.view(np.uint64).reshape(rows, -1)
    wide = wide[:, :: max(1, wide.shape[1] // 4)][:, :4]
    middle = rows // 2
    columns = np.sort(np.concatenate([wide[:middle][-192:], wide[middle :: max(1, rows // 128)]]), axis=0)
    return bool(np.count_nonzero(columns[1:] == columns[:-1]) > 0.004 * columns.size)


def plans(
    words: Words, cols: int, exponent_bits: int, repeats: bool, profile: Profile, *, distinct: bool = False
) -> list[Plan]:
    """Return the ways to split a chunk that are worth encoding in full, cheapest estimate first.

    Where values recur byte planes come before the others: matches make them smaller than estimated, and what they
    really cost shows whether the others are worth the time.

    Args:
        words: `rows * cols` words, flat.
        cols: words per row; a column is a channel.
        exponent_bits: of the number format, 0 for integers.
        repeats: what `recurring` says.
        profile: what may be spent.
        distinct: whether these rows stand for others, which know them by their place.
    """
    rows = words.size // cols
    found, smooth, beside = [], True, None
    if rows >= 8 and exponent_bits and cols * 4 <= words.size:
        sample = _Sample(words, cols, exponent_bits, 32 if profile.hasty else 64)
        smooth = sample.smooth()
        if exponent_bits == 8 and words.itemsize > 1:
            found.append(_nibbles(sample, words.itemsize))
            beside = _side_by_side(sample, found[0])
        if profile.symbols or not found:
            found += _symbols(sample, rows, words.itemsize, profile.context)
        if not repeats and not smooth:
            return sorted(found, key=lambda plan: plan.bits)[: profile.trials]
    matched = repeats or not exponent_bits
    plain = _planes(words, cols, exponent_bits, matched, profile.levels[1], differences=smooth)
    matching = [beside] if repeats and beside and not distinct else []
    if matching and profile.hasty and plain[0].bits > matching[0].bits - MATCHED:
        return [*matching, *found]  # matches among exponents alone take two thirds of the time
    best = sorted(found + plain, key=lambda plan: plan.bits)[: profile.trials + repeats]
    return matching + (sorted(best, key=lambda plan: not isinstance(plan.split, int)) if repeats else best)
