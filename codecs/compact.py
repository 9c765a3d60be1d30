"""The default choices: payloads that QATQ decodes, smaller than its own and made many times faster.

QATQ compresses all planes together at zstd level 3, which on noise-like planes finds matches that cost more than the
Huffman code they replace, and searches mantissas as long as exponents. Here every plane is coded on its own and a
sample decides how: stored, entropy-coded alone, or matched at the level that pays. Runs are tried only where a bound
says that they can win.
"""

import dataclasses

import numpy as np

from jaxquant.codecs import bodies, byteplanes, runs, strategies, zframes

_SMALL = 64 << 10
_TINY = 4 << 10
_PIECES, _PIECE = 4, 8 << 10
_STORE, _ENTROPY = -2, -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Body:
    """A chosen strategy and the parts of its body, to be joined."""

    strategy: int
    parts: list

    @property
    def nbytes(self) -> int:
        """Bytes of the joined parts."""
        return sum(memoryview(part).nbytes for part in self.parts)


def choose(words: np.ndarray, stride: int = 0) -> Body:
    """Encode words by what a sample of them, or all of them if they are few, says is smallest.

    Args:
        words: Unsigned 16- or 32-bit words, one axis.
        stride: Distance in elements, for 16-bit words, at which to expect similar values; 0 for none.

    Returns:
        A strategy and its body.
    """
    if words.size == 0:
        return Body(strategy=strategies.RAW, parts=[])
    strategy, stride, coders = _plan(words, stride)
    best = Body(strategy=strategies.RAW, parts=[words])
    if strategy != strategies.RAW:
        best = _zstd(words, strategy, stride, coders)
    best = _runs(words, best)
    if best.nbytes >= words.nbytes:
        return Body(strategy=strategies.RAW, parts=[bodies.swapped(words)])
    return best


def _plan(words: np.ndarray, stride: int) -> tuple[int, int, list[int]]:
    """Choose a strategy, its stride and a coder per plane, on a sample."""
    candidates = [(strategies.ZSTD, 0)]
    if words.itemsize == 4:
        candidates.append((strategies.DIFFERENCE, 0))
    else:
        candidates.append((strategies.ADJACENT, 1))
    if 1 < stride < words.size and words.itemsize == 2:
        candidates.append((strategies.STRIDED, stride))
    best, least = (strategies.RAW, 0, []), float("inf")
    for strategy, distance in candidates:
        rows = byteplanes.split(_sampled(words, strategy, distance))
        coders = [_coder(row) for row in rows]
        size = sum(estimate for _, estimate in coders)
        if size < least:
            best, least = (strategy, distance, [coder for coder, _ in coders]), size
    if set(best[2]) == {_STORE} and not _repeats(words):
        return strategies.RAW, 0, []
    return best


def chunk_values(words: np.ndarray, most: int) -> int:
    """Return how many values to put into a chunk: more where hardly anything is left of them."""
    if words.size <= most or sum(_coder(row)[1] for row in byteplanes.split(_sampled(words, strategies.ZSTD, 0))) > _TINY:
        return most
    return 16 * most


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
    pieces = [
        combine(words[start : start + _PIECE], words[start - back : start - back + _PIECE]) for start in starts
    ]
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
    coder = min(sizes, key=lambda level: sizes[level] + costs.get(level, 0.003 * row.size + 0.002 * level * sizes[level]))
    return coder, sizes[coder]


def _repeats(words: np.ndarray) -> bool:
    """Tell whether eight aligned bytes often occur again, far off too: a sample by content, not by place."""
    near = words[: 1 << 18]
    wide = near[: near.nbytes // 8 * 8 // near.itemsize].view(np.uint64)
    mixed = wide * np.uint64(0x9E3779B97F4A7C15)
    kept = np.sort(mixed[mixed >> np.uint64(59) == 0])
    return bool(np.count_nonzero(kept[1:] == kept[:-1]) > 0.02 * kept.size)


def _zstd(words: np.ndarray, strategy: int, stride: int, coders: list[int]) -> Body:
    """Write the planes of a strategy, each in its own frame or, where the result is tiny, all in one."""
    rows = byteplanes.split(_residual(words, strategy, stride))
    prefix = stride.to_bytes(4, "big") if strategy == strategies.STRIDED else b""
    searched = words.nbytes > _SMALL and min(coders) < 1 and _repeats(words)
    frames = []
    for row, coder in zip(rows, coders, strict=True):
        if bodies.constant(row):
            frames.append(zframes.Blocks(kind=zframes.RLE, data=row))
            continue
        made = zframes.entropy(row) if coder == _ENTROPY else zframes.compress(row, coder) if coder > 0 else b""
        if searched and coder < 3:
            other = zframes.compress(row, 3)
            made = other if not made or len(other) < len(made) else made
        stored = not made or len(made) >= row.size
        frames.append(zframes.Blocks(kind=zframes.RAW, data=row) if stored else made)
    apart = Body(strategy=strategy, parts=[prefix, *zframes.join(frames)])
    if apart.nbytes > _TINY:
        return apart
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
