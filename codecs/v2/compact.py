"""The default choices: payloads that QATQ decodes, smaller than its own and made many times faster.

QATQ compresses all planes together at zstd level 3, which on noise-like planes finds matches that cost more than the
Huffman code they replace, and searches mantissas as long as exponents. Here every plane is coded on its own and a
sample decides how: stored, entropy-coded alone, or matched at the level that pays. Runs are tried only where a bound
says that they can win.
"""

import dataclasses

import numpy as np

from jaxquant.codecs.v2 import bodies, byteplanes, runs, strategies, zframes

_SMALL = 64 << 10
_TINY = 4 << 10
_PIECES, _PIECE = 4, 8 << 10
_STORE, _ENTROPY = -2, -1
_REPEAT_SPAN = 1 << 18
_GOLDEN = 0x9E3779B97F4A7C15


@dataclasses.dataclass(frozen=True, kw_only=True)
class Body:
    """A chosen strategy and the parts of its body, to be joined."""

    strategy: int
    parts: list

    @property
    def nbytes(self) -> int:
        """Bytes of the joined parts."""
        return sum(memoryview(part).nbytes for part in self.parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a sample says.

    Attributes:
        strategy: Wire id.
        stride: Of the strategy, 0 if it has none.
        coders: One per plane.
        expected: Encoded bytes per word.
        repeats: Whether whole rows come again, so that matches are worth a search where the sample shows none.
    """

    strategy: int
    stride: int
    coders: tuple[int, ...]
    expected: float
    repeats: bool


def choose(words: np.ndarray, stride: int = 0, plan: Plan | None = None) -> Body:
    """Encode words by what a sample of them, or all of them if they are few, says is smallest.

    Args:
        words: Unsigned 16- or 32-bit words, one axis.
        stride: Distance in elements, for 16-bit words, at which to expect similar values; 0 for none.
        plan: Made from a larger array that these words are a part of; followed if it turns out as it expected.

    Returns:
        A strategy and its body.
    """
    if words.size == 0:
        return Body(strategy=strategies.RAW, parts=[])
    followed = plan or make_plan(words, stride)
    best = _follow(words, followed)
    if plan is not None and abs(best.nbytes - plan.expected * words.size) > 0.02 * best.nbytes + _TINY:
        best = min([best, _follow(words, make_plan(words, stride))], key=_nbytes)
    best = _runs(words, best)
    if best.nbytes >= words.nbytes:
        return Body(strategy=strategies.RAW, parts=[bodies.swapped(words)])
    return best


def make_plan(words: np.ndarray, stride: int) -> Plan:
    """Choose a strategy, its stride and a coder per plane, on a sample."""
    candidates = [(strategies.ZSTD, 0)]
    if words.itemsize == 4:
        candidates.append((strategies.DIFFERENCE, 0))
    else:
        candidates.append((strategies.ADJACENT, 1))
    if 1 < stride < words.size and words.itemsize == 2:
        candidates.append((strategies.STRIDED, stride))
    repeats = words.nbytes > _SMALL and _repeats(words)
    plans = []
    for strategy, distance in candidates:
        sample = _sampled(words, strategy, distance)
        coders = [_coder(row) for row in byteplanes.split(sample)]
        expected = sum(size for _, size in coders) / sample.size
        chosen = tuple(coder for coder, _ in coders)
        plans.append(Plan(strategy=strategy, stride=distance, coders=chosen, expected=expected, repeats=repeats))
    return min(plans, key=lambda plan: plan.expected)


def chunk_values(words: np.ndarray, most: int) -> int:
    """Return how many values to put into a chunk: more where hardly anything is left of them."""
    if words.size <= most or make_plan(words, 0).expected * most > _TINY:
        return most
    return 16 * most


def _follow(words: np.ndarray, plan: Plan) -> Body:
    if set(plan.coders) == {_STORE} and not plan.repeats:
        return Body(strategy=strategies.RAW, parts=[words])
    return _zstd(words, plan)


def _residual(words: np.ndarray, strategy: int, stride: int) -> np.ndarray:
    if strategy == strategies.DIFFERENCE:
        return byteplanes.subtract_previous(words)
    return byteplanes.xor_previous(words, stride) if stride else words


def _sampled(words: np.ndarray, strategy: int, stride: int) -> np.ndarray:
    """Residuals of a few pieces spread over the words, or of all words if they are few."""
    if words.nbytes <= _SMALL or stride >= words.size - _PIECES * _PIECE:
        return _residual(words, strategy, stride)
    back = max(stride, 1)
    starts = [back + piece * (words.size - back - _PIECE) // (_PIECES - 1) for piece in range(_PIECES)]
    if strategy == strategies.ZSTD:
        return np.concatenate([words[start : start + _PIECE] for start in starts])
    combine = np.subtract if strategy == strategies.DIFFERENCE else np.bitwise_xor
    pieces = [combine(words[start : start + _PIECE], words[start - back : start - back + _PIECE]) for start in starts]
    return np.concatenate(pieces)


def _coder(row: np.ndarray) -> tuple[int, int]:
    """Return a coder for planes like this sample, and the sample's size under it."""
    sizes = {_STORE: row.size, _ENTROPY: len(zframes.entropy(row)), 1: len(zframes.compress(row, 1))}
    if sizes[_ENTROPY] > 0.99 * sizes[1] or sizes[_ENTROPY] < 0.3 * row.size:
        sizes[3] = len(zframes.compress(row, 3))
        if sizes[3] < 0.85 * row.size:
            sizes[9] = len(zframes.compress(row, 9))
    # A slower coder must save what its time is worth, half a per cent of the plane for a few levels.
    costs = {_STORE: 0, _ENTROPY: 0.003 * row.size}
    coder = min(
        sizes, key=lambda level: sizes[level] + costs.get(level, 0.003 * row.size + 0.002 * level * sizes[level])
    )
    return coder, sizes[coder]


def _repeats(words: np.ndarray) -> bool:
    """Tell whether four words in a row often come again, far off too: a sample chosen by content, not by place."""
    middle = max(words.size - _REPEAT_SPAN, 0) // 2
    near = words[middle : middle + _REPEAT_SPAN]
    mixed = near[:-3] * near.dtype.type(_GOLDEN >> (64 - 8 * near.itemsize))
    at = np.flatnonzero(mixed >> (8 * near.itemsize - 6) == 33)
    keys = np.zeros(at.size, np.uint64)
    for ahead in range(4):
        keys = keys * np.uint64(_GOLDEN) ^ near[at + ahead]
    keys.sort()
    return bool(np.count_nonzero(keys[1:] == keys[:-1]) > 0.02 * keys.size)


def _zstd(words: np.ndarray, plan: Plan) -> Body:
    """Write the planes of a strategy, each in its own frame or, where the result is tiny, all in one."""
    strategy = plan.strategy
    residual = _residual(words, strategy, plan.stride)
    prefix = plan.stride.to_bytes(4, "big") if strategy == strategies.STRIDED else b""
    frames = []
    for index, coder in enumerate(plan.coders):
        # Each plane has memory of its own, so that only those that are stored as they are stay behind.
        row = byteplanes.plane(residual, index)
        if bodies.constant(row):
            frames.append(zframes.Blocks(kind=zframes.RLE, data=row))
            continue
        made = zframes.entropy(row) if coder == _ENTROPY else zframes.compress(row, coder) if coder > 0 else b""
        if plan.repeats and coder < 3:
            other = zframes.compress(row, 3)
            made = other if not made or len(other) < len(made) else made
        stored = not made or len(made) >= row.size
        frames.append(zframes.Blocks(kind=zframes.RAW, data=row) if stored else made)
    apart = Body(strategy=strategy, parts=[prefix, *zframes.join(frames)])
    if apart.nbytes > _TINY:
        return apart
    rows = byteplanes.split(residual)
    together = [Body(strategy=strategy, parts=[prefix, zframes.compress(rows, level)]) for level in (3, 9)]
    return min([apart, *together], key=_nbytes)


def _nbytes(body: Body) -> int:
    return body.nbytes


def _runs(words: np.ndarray, best: Body) -> Body:
    """Replace a body by runs or blocks, where those are smaller."""
    if words.nbytes > _SMALL and best.nbytes > words.nbytes // 4:
        return best
    rows = byteplanes.split(words)
    candidates = [(strategies.RUNS, bodies.swapped(words), runs.LONG)]
    candidates += [(strategies.PLANE_RUNS, rows.reshape(-1), runs.LONG)]
    candidates += [(strategies.PACKED, rows.reshape(-1), runs.PACKED)]
    if words.itemsize == 4:
        tags = bodies.block_tags(rows)
        if bodies.block_size(tags, words.size) < best.nbytes:
            best = Body(strategy=strategies.BLOCKS, parts=[bodies.body(words, strategies.BLOCKS)[1]])
        delta = byteplanes.split(byteplanes.xor_previous(words)).reshape(-1)
        candidates += [(strategies.DELTA_RUNS, delta, runs.LONG)]
    for strategy, source, grammar in candidates:
        if runs.at_least(source, grammar) < best.nbytes:
            made = runs.encode(source, grammar)
            if len(made) < best.nbytes:
                best = Body(strategy=strategy, parts=[made])
    return best
