"""The default choices: payloads that QATQ decodes, smaller than its own and made many times faster.

QATQ compresses all planes together at zstd level 3, which on noise-like planes finds matches that cost more than the
Huffman code they replace, and stores mantissas through the same search. Here every plane is a frame of its own, and a
sample decides: stored, entropy-coded alone, or matched at the level that pays. Runs are tried only where a bound says
that they can win.
"""

import dataclasses

import numpy as np

from jaxquant.codecs import bodies, byteplanes, runs, strategies, zframes

_SMALL = 64 << 10
_PIECES = 4
_SAMPLE = 32 << 10
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


def choose(words: np.ndarray, strides: tuple[int, ...] = ()) -> Body:
    """Encode words by what a sample of them, or all of them if they are few, says is smallest.

    Args:
        words: Unsigned 16- or 32-bit words, one axis.
        strides: Distances in elements, for 16-bit words, at which to expect similar values.

    Returns:
        A strategy and its body.
    """
    if words.size == 0:
        return Body(strategy=strategies.RAW, parts=[])
    if words.nbytes <= _SMALL:
        best = min((_zstd(made, _every_coder) for made in _transforms(words, strides)), key=_size)
    else:
        best = _by_sample(words, strides)
    return _or_runs(words, best)


def _size(body: Body) -> int:
    return body.nbytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Transform:
    """A strategy, its body's first bytes, and the words that its planes are made of."""

    strategy: int
    prefix: bytes
    words: np.ndarray


def _transforms(words: np.ndarray, strides: tuple[int, ...]) -> list[_Transform]:
    made = [_Transform(strategy=strategies.ZSTD, prefix=b"", words=words)]
    if words.itemsize == 4:
        return [*made, _Transform(strategy=strategies.DIFFERENCE, prefix=b"", words=byteplanes.subtract_previous(words))]
    made.append(_Transform(strategy=strategies.ADJACENT, prefix=b"", words=byteplanes.xor_previous(words)))
    for stride in strides:
        if 1 < stride < words.size:
            residual = byteplanes.xor_previous(words, stride)
            made.append(
                _Transform(strategy=strategies.STRIDED, prefix=stride.to_bytes(4, "big"), words=residual)
            )
    return made


def _zstd(transform: _Transform, code) -> Body:
    """Write the planes of a transform, each as `code` does it or all in one frame if that is smaller."""
    rows = byteplanes.split(transform.words)
    parts = [part for row in rows for part in code(row)]
    apart = Body(strategy=transform.strategy, parts=[transform.prefix, *parts])
    if apart.nbytes > _SMALL // 16:
        return apart
    together = [[transform.prefix, zframes.compress(rows, level)] for level in (3, 9)]
    return min([apart, *(Body(strategy=transform.strategy, parts=parts) for parts in together)], key=_size)


def _every_coder(row: np.ndarray) -> list:
    """Code a small plane every way and keep the smallest."""
    coded = [[zframes.entropy(row)], [zframes.compress(row, 3)], [zframes.compress(row, 9)]]
    smallest = min(coded, key=lambda parts: len(parts[0]))
    return smallest if len(smallest[0]) < row.size else zframes.store(memoryview(row))


def _by_sample(words: np.ndarray, strides: tuple[int, ...]) -> Body:
    """Choose transform and coders on a sample, then code everything that way."""
    length = _SAMPLE // _PIECES
    starts = [piece * (words.size - length) // (_PIECES - 1) for piece in range(_PIECES)]
    longest = max((stride for stride in strides if stride < length), default=1)
    best, coders, least = strategies.RAW, [], float("inf")
    sampled = [words[max(start - longest, 0) : start + length] for start in starts]
    candidates = [(strategies.ZSTD, 0), (strategies.DIFFERENCE, 0)]
    if words.itemsize == 2:
        candidates = [(strategies.ZSTD, 0), (strategies.ADJACENT, 1)]
        candidates += [(strategies.STRIDED, stride) for stride in strides if 1 < stride < length]
    for strategy, stride in candidates:
        residual = np.concatenate([_residual(part, strategy, stride)[-length:] for part in sampled])
        chosen = [_sample_coder(row) for row in byteplanes.split(residual)]
        size = sum(estimate for _, estimate in chosen)
        if size < least:
            best, best_stride, coders, least = strategy, stride, [coder for coder, _ in chosen], size
    if least >= 0.998 * _SAMPLE * words.itemsize and not _repeats(words):
        return Body(strategy=strategies.RAW, parts=[bodies.swapped(words)])
    rows = byteplanes.split(_residual(words, best, best_stride))
    if _ENTROPY in coders or _STORE in coders:
        matched = _repeats(words)
        coders = [(coder, 3) if matched and coder < 3 else (coder,) for coder in coders]
    else:
        coders = [(coder,) for coder in coders]
    parts = [best_stride.to_bytes(4, "big")] if best == strategies.STRIDED else []
    for row, choices in zip(rows, coders, strict=True):
        parts += min((_code(row, choice) for choice in choices), key=lambda made: sum(map(len, made)))
    return Body(strategy=best, parts=parts)


def _residual(words: np.ndarray, strategy: int, stride: int) -> np.ndarray:
    if strategy == strategies.DIFFERENCE:
        return byteplanes.subtract_previous(words)
    return byteplanes.xor_previous(words, stride) if stride else words


def _sample_coder(row: np.ndarray) -> tuple[int, int]:
    """Return a coder for planes like this sample, and the sample's size under it."""
    alone, matched = len(zframes.entropy(row)), len(zframes.compress(row, 1))
    if min(alone, matched) > 0.995 * row.size:
        return _STORE, row.size
    if alone < 0.99 * matched:
        return _ENTROPY, alone
    sizes = {_ENTROPY: alone, 1: matched, 3: len(zframes.compress(row, 3))}
    if sizes[3] < 0.75 * row.size:
        sizes[9] = len(zframes.compress(row, 9))
    coder = min(sizes, key=lambda level: sizes[level] * (1 + 0.005 * max(level, 0)))
    return coder, sizes[coder]


def _repeats(words: np.ndarray) -> bool:
    """Tell whether eight aligned bytes often occur again, at any distance: a sample by content, not by place."""
    wide = words[: words.size * words.itemsize // 8 * 8 // words.itemsize].view(np.uint64)
    mixed = wide * np.uint64(0x9E3779B97F4A7C15)
    kept = np.sort(mixed[mixed >> np.uint64(59) == 0])
    return bool(kept.size and np.count_nonzero(kept[1:] == kept[:-1]) > 0.02 * kept.size)


def _code(row: np.ndarray, coder: int) -> list:
    if coder == _STORE:
        return zframes.store(memoryview(row))
    return [zframes.entropy(row) if coder == _ENTROPY else zframes.compress(row, coder)]


def _or_runs(words: np.ndarray, best: Body) -> Body:
    """Replace a body by runs or blocks, where those are smaller."""
    if best.nbytes > words.nbytes // 4 + 64:
        return best
    least = best.nbytes
    rows = byteplanes.split(words)
    candidates = [(strategies.RUNS, bodies.swapped(words), runs.LONG)]
    candidates += [(strategies.PLANE_RUNS, rows.reshape(-1), runs.LONG)]
    candidates += [(strategies.PACKED, rows.reshape(-1), runs.PACKED)]
    if words.itemsize == 4:
        delta = byteplanes.split(byteplanes.xor_previous(words)).reshape(-1)
        candidates += [(strategies.DELTA_RUNS, delta, runs.LONG)]
    for strategy, source, grammar in candidates:
        if runs.at_least(source, grammar) < least:
            made = runs.encode(source, grammar)
            if len(made) < least:
                least, best = len(made), Body(strategy=strategy, parts=[made])
    if words.nbytes < least:
        return Body(strategy=strategies.RAW, parts=[bodies.swapped(words)])
    return best
