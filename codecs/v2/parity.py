"""The choices of QATQ 0.4.2, so that the same values give the same bytes (with zstd 1.5.7, which it is linked to).

Its order decides ties: a candidate replaces the one before only if it is strictly smaller. Strategy 0 is left out: its
body cannot be the smallest unless nearly every prediction is right to the last bit, which no input is known to give.
"""

import numpy as np

from jaxquant.codecs.v2 import bodies, byteplanes, fnv, payload, runs, strategies, zframes

ORDER = {
    4: (
        strategies.RAW,
        strategies.RUNS,
        strategies.PLANE_RUNS,
        strategies.PACKED,
        strategies.ZSTD,
        strategies.DIFFERENCE,
        strategies.BLOCKS,
        strategies.DELTA_RUNS,
    ),
    2: (
        strategies.RAW,
        strategies.RUNS,
        strategies.PLANE_RUNS,
        strategies.PACKED,
        strategies.ADJACENT,
        strategies.STRIDED,
        strategies.ZSTD,
    ),
}


def choose(words: np.ndarray, stride: int = 0) -> tuple[int, bytes]:
    """Return the strategy that QATQ would pick, and its body.

    Args:
        words: Unsigned words, one axis.
        stride: Hint in elements for 16-bit words, 0 for none.
    """
    if words.size == 0:
        return strategies.RAW, b""
    zstd = {strategies.ZSTD, strategies.DIFFERENCE} if words.itemsize == 4 else {_zstd_of_16_bits(words, stride)}
    made = {strategy: bodies.body(words, strategy, stride=stride)[1] for strategy in zstd}
    sizes = {strategies.RAW: words.nbytes} | {strategy: len(body) for strategy, body in made.items()}
    rows = byteplanes.split(words)
    best = min(sizes.values())
    candidates = [(strategies.RUNS, bodies.swapped(words), runs.LONG)]
    candidates += [(strategies.PLANE_RUNS, rows.reshape(-1), runs.LONG)]
    candidates += [(strategies.PACKED, rows.reshape(-1), runs.PACKED)]
    if words.itemsize == 4:
        sizes[strategies.BLOCKS] = bodies.block_size(bodies.block_tags(rows), words.size)
        delta = byteplanes.split(byteplanes.xor_previous(words)).reshape(-1)
        candidates += [(strategies.DELTA_RUNS, delta, runs.LONG)]
    for strategy, source, grammar in candidates:
        if runs.at_least(source, grammar) <= best:
            sizes[strategy] = runs.size(source, grammar)
    order = ORDER[words.itemsize]
    chosen = min(sizes, key=lambda strategy: (sizes[strategy], order.index(strategy)))
    return chosen, made.get(chosen) or bodies.body(words, chosen)[1]


def _zstd_of_16_bits(words: np.ndarray, stride: int) -> int:
    if _mostly_zero_after_xor(words):
        return strategies.ADJACENT
    if stride and _stride_pays(words, stride):
        return strategies.STRIDED
    return strategies.ZSTD


def _zero_octets(residual: np.ndarray) -> int:
    return int(np.count_nonzero(residual.view(np.uint8) == 0))


def _sampled(size: int, most: int, first: int) -> np.ndarray:
    """Indices of up to 64 blocks spread over `size` elements, none before `first`."""
    sample = min(size, most)
    blocks = min(sample, 64)
    length = -(-sample // blocks)
    starts = [block * size // blocks for block in range(blocks)]
    return np.concatenate([np.arange(max(start, first), min(start + length, size)) for start in starts])


def _mostly_zero_after_xor(words: np.ndarray) -> bool:
    residual = byteplanes.xor_previous(words)
    sample = residual[_sampled(words.size, 4096, 0)]
    return _zero_octets(sample) > sample.nbytes // 2 and _zero_octets(residual) > words.size


def _stride_pays(words: np.ndarray, stride: int) -> bool:
    residual = byteplanes.xor_previous(words, stride)
    sample = residual[_sampled(words.size, 1024, stride)]
    zeros = _zero_octets(sample)
    if not (sample.size and sample.nbytes // 2 < zeros < sample.nbytes):
        return False
    if not words.size < _zero_octets(residual) < residual.nbytes - 1024:
        return False
    size = min(words.size, 1024)
    index = np.arange(size) * words.size // size
    plain, strided = (len(zframes.compress(byteplanes.split(part[index]), 3)) for part in (words, residual))
    return size >= 2 and 100 * strided <= 90 * plain


def encode(words: np.ndarray, dtype: str, *, stride: int = 0) -> bytes:
    """Write one payload as `qatq encode` does.

    Args:
        words: Unsigned words of the dtype's width, one axis, at most 2**26.
        dtype: "f32", "f16" or "bf16".
        stride: Hint in elements for 16-bit dtypes, 0 for none.

    Returns:
        The whole payload.
    """
    strategy, body = choose(words, stride)
    found = payload.checksum(words) if words.size else fnv.OFFSET
    return payload.head(4, words.size, found) + payload.exact_head(strategy, dtype) + body
