"""How fast decode attention over codes is, beside attention over bfloat16 and the memory's read bandwidth in one run.

Every time is the median of several runs of one jitted loop, in which each call's queries depend on the result of the
call before, divided by the number of calls: dispatch from Python does not count. A step of a loop is several layers,
until these exceed any cache of the processor, as a model's decode step does.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxquant import _attention_peers, _ejkernel_peer, _stacks, _stopwatch, attention, cache, packing
from jaxquant.methods import turboquant
from jaxquant.protocols import Quantizer
from jaxquant.quantizers import Quantized

Pair = tuple[Quantizer, Quantizer]

_REFERENCE = 2, 1500  # rows and tokens on which errors are measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One decode step of one layer: `batch` rows of `tokens` tokens."""

    batch: int
    tokens: int
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128

    @property
    def exact_bytes(self) -> int:
        """Bytes of the keys and values in bfloat16."""
        return 4 * self.batch * self.tokens * self.kv_heads * self.dim

    def nbytes(self, bits: tuple[int, int]) -> int:
        """Bytes of their codes, with a scale of two bytes each."""
        each = sum(packing.packed_size(self.dim, bits=width) + 2 for width in bits)
        return self.batch * self.tokens * self.kv_heads * each


def shapes(pairs: Sequence[tuple[int, int]] | None = None, **kwargs: int) -> list[Shape]:
    """Give shapes for pairs of batch and tokens; None takes what suits the default backend.

    Example:
        >>> shapes([(8, 32768)], heads=64)
        [Shape(batch=8, tokens=32768, heads=64, kv_heads=8, dim=128)]
    """
    if pairs is None:
        large = [(32, 131_072), (8, 32_768), (1, 131_072), (1, 4_096)]
        pairs = large if jax.default_backend() == "gpu" else [(1, 2_048)]
    return [Shape(batch=batch, tokens=tokens, **kwargs) for batch, tokens in pairs]


def widths(name: str) -> tuple[int, int]:
    """Read bits of keys and of values out of a name such as K4V2.

    Raises:
        ValueError: it does not look like that.

    Example:
        >>> widths("K4V2")
        (4, 2)
    """
    found = re.fullmatch(r"[Kk]([1-8])/?[Vv]([1-8])", name)
    if found is None:
        raise ValueError(f"bits must look like K4V2, from 1 to 8 each, got {name!r}")
    return int(found[1]), int(found[2])


def scalars(bits: tuple[int, int], dim: int) -> Pair:
    """Make TurboQuant's quantizers, for keys and values of so many bits.

    Example:
        >>> scalars((4, 2), 64)[1].bits
        2
    """
    return turboquant.kv(jax.random.key(0), dim=dim, bits_k=bits[0], bits_v=bits[1])


def filled(shape: Shape, pair: Pair, *, layers: int) -> _stacks.KVCache:
    """Make a full cache of random codes and likely scales: to be timed, without any uncompressed data on the way."""
    made = cache.init(*pair, layers=layers, batch=shape.batch, kv_heads=shape.kv_heads, capacity=shape.tokens)
    stack = made.stacks[0]

    def store(old: _stacks.Store, seed: int) -> _stacks.Store:
        codes, scales = old.codes.codes, old.codes.scales
        bits, uniform = jax.random.split(jax.random.key(seed))
        code = Quantized(
            codes=_stopwatch.tiled(jax.random.bits(bits, (min(codes.size, 2**22),), jnp.uint8), codes.shape),
            scales=_stopwatch.tiled(
                jax.random.uniform(uniform, (min(scales.size, 2**20),), scales.dtype, 0.7, 1.3) * shape.dim**0.5,
                scales.shape,
            ),
        )
        return dataclasses.replace(old, codes=code)

    full = _stacks.Stack(keys=store(stack.keys, 1), values=store(stack.values, 2))
    return dataclasses.replace(made, stacks=(full,), length=jnp.full_like(made.length, shape.tokens))


def error(shape: Shape, pair: Pair, implementation: str | None) -> float:
    """Compare with attention in float64 over the decoded cache: relative error, on real codes and ragged rows.

    Example:
        >>> error(Shape(batch=1, tokens=100, heads=2, kv_heads=1, dim=64), scalars((4, 2), 64), "xla") < 1e-5
        True
    """
    batch, tokens = _reference(shape)
    c = cache.init(*pair, layers=2, batch=batch, kv_heads=shape.kv_heads, capacity=tokens)
    x = jax.random.normal(jax.random.key(2), (2, batch, tokens, shape.kv_heads, shape.dim))
    length = tokens - 7 * jnp.arange(batch)[:, None] % tokens
    c = cache.append(c, 1, x[0], x[1] + 0.5, mask=jnp.arange(tokens) < length)
    q = jax.random.normal(jax.random.key(3), (batch, shape.heads, shape.dim))
    out, _ = attention.decode_attention(q, c, 1, implementation=implementation)  # pyright: ignore[reportArgumentType]

    k, v = (np.asarray(x, np.float64) for x in cache.materialize(c, 1))
    rows = np.asarray(q, np.float64).reshape(batch, shape.kv_heads, -1, shape.dim)
    scores = np.einsum("bhrd,bthd->bhrt", rows, k, optimize=True) * shape.dim**-0.5
    scores = np.where(np.arange(tokens) < np.asarray(length)[:, :, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    want = np.einsum("bhrt,bthd->bhrd", weights, v, optimize=True).reshape(q.shape)
    return float(np.linalg.norm(np.asarray(out, np.float64) - want) / np.linalg.norm(want))


def measure(
    shape: Shape,
    bits: Sequence[tuple[int, int]],
    implementations: Sequence[str],
    bandwidth: float,
    *,
    ejkernel: bool = False,
) -> Iterator[dict[str, Any]]:
    """Time the bfloat16 peers, then every pair of bits with every implementation, and with ejkernel's where asked.

    Args:
        shape: of the step.
        bits: pairs of bits of keys and bits of values.
        implementations: names that `attention.decode_attention` takes.
        bandwidth: in bytes a second, as `_stopwatch.read_bandwidth` measures it.
        ejkernel: whether its attention over codes, which codes the step's token too, is timed.

    Yields:
        What a row of a table holds. Times are in milliseconds; `share` is of the bandwidth; `speedup` is over the
        fastest peer. What cannot run here has the reason under `failed` instead.
    """
    best = math.inf
    for name, peer in _attention_peers.peers(**dataclasses.asdict(shape)).items():
        row = {"batch": shape.batch, "tokens": shape.tokens, "bits": "bf16", "implementation": name}
        row |= _attempt(peer, shape.exact_bytes, bandwidth)
        best = min(best, row.get("ms", math.inf))
        yield row
    for widths_of in bits:
        pair = scalars(widths_of, shape.dim)
        calls = [
            (name, functools.partial(seconds, shape, pair, name), functools.partial(error, shape, pair, name))
            for name in implementations
        ]
        sizes = [shape.nbytes(widths_of)] * len(calls)
        if ejkernel:
            fields = dataclasses.asdict(shape)
            small = fields | dict(zip(("batch", "tokens"), _reference(shape), strict=True))
            for platform in _ejkernel_peer.PLATFORMS:
                timed = functools.partial(_ejkernel_peer.seconds, platform, widths_of, **fields)
                checked = functools.partial(_ejkernel_peer.error, platform, widths_of, **small)
                calls.append((f"ejkernel {platform}", timed, checked))
                sizes.append(_ejkernel_peer.nbytes(shape.batch, shape.tokens, shape.kv_heads, shape.dim))
        for (name, timed, checked), nbytes in zip(calls, sizes, strict=True):
            row = {"batch": shape.batch, "tokens": shape.tokens, "bits": f"K{widths_of[0]}V{widths_of[1]}"}
            row["implementation"] = name
            row |= _attempt(timed, nbytes, bandwidth, checked)
            if "ms" in row:
                row["speedup"] = best / row["ms"] if best < math.inf else None
            yield row


def plot(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Draw the speedups over the fastest bfloat16, a group of bars for each shape."""
    import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

    rows = [row for row in rows if row.get("speedup")]
    groups = list(dict.fromkeys((row["batch"], row["tokens"]) for row in rows))
    bars = list(dict.fromkeys((row["bits"], row["implementation"]) for row in rows))
    figure, axes = plt.subplots(figsize=(1.5 + 0.35 * len(groups) * (len(bars) + 1), 4), layout="constrained")
    for i, bar in enumerate(bars):
        held = [row for row in rows if (row["bits"], row["implementation"]) == bar]
        at = [groups.index((row["batch"], row["tokens"])) + (i + 0.5) / (len(bars) + 1) for row in held]
        axes.bar(at, [row["speedup"] for row in held], 0.9 / (len(bars) + 1), label=" ".join(bar))
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks([i + 0.5 for i in range(len(groups))], [f"{b} x {t:,}" for b, t in groups])
    axes.set(xlabel="rows x tokens", ylabel="speed, times the fastest bfloat16")
    axes.legend()
    figure.savefig(path)
    plt.close(figure)


def _reference(shape: Shape) -> tuple[int, int]:
    return min(shape.batch, _REFERENCE[0]), min(shape.tokens, _REFERENCE[1])


def _attempt(
    call: Callable[[], float], nbytes: int, bandwidth: float, check: Callable[[], float] | None = None
) -> dict[str, Any]:
    try:
        taken = call()
        errors = {} if check is None else {"error": check()}
    except Exception as problem:  # a peer may lack its library, its GPU or the memory, each with an error of its own
        return {"failed": _stopwatch.reason(problem)}
    return {"ms": taken * 1e3, "bytes": nbytes, "share": nbytes / taken / bandwidth} | errors


def seconds(shape: Shape, pair: Pair, implementation: str) -> float:
    """Time a decode step of one layer over a full cache of codes."""
    vector = [jax.eval_shape(made.quantize, jax.ShapeDtypeStruct((shape.dim,), jnp.float32)) for made in pair]
    each = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(vector))
    layers = _stopwatch.layers(shape.batch * shape.tokens * shape.kv_heads * each)
    held = filled(shape, pair, layers=layers)

    def step(q: Array, held: _stacks.KVCache) -> Array:
        for layer in range(layers):  # as the peers do, and as decoders are traced: XLA makes graphs of launches
            out, _ = attention.decode_attention(q, held, layer, implementation=implementation)  # pyright: ignore
            q = _stopwatch.chained(q, out)
        return q

    queries = jax.random.normal(jax.random.key(1), (shape.batch, shape.heads, shape.dim), jnp.bfloat16)
    return _stopwatch.median(step, queries, held) / layers
