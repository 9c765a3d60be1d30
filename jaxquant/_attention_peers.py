"""Attention over bfloat16 keys and values by others, timed: what attention over codes has to beat."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxquant import _stopwatch


def peers(batch: int, tokens: int, heads: int, kv_heads: int, dim: int) -> dict[str, Callable[[], float]]:
    """Give what there is for the default backend; each call gives the seconds of one decode step of one layer."""
    shape = (batch, tokens, kv_heads, dim)
    queries = jax.random.normal(jax.random.key(1), (batch, heads, dim), jnp.bfloat16)

    def timed(attend: Callable[[Array, Array, Array], Array]) -> float:
        def step(q: Array, pairs: list[tuple[Array, Array]]) -> Array:
            for k, v in pairs:
                q = _stopwatch.chained(q, attend(q, k, v))
            return q

        pairs = _pairs(shape)
        with jax.numpy_dtype_promotion("standard"):  # which JAX's own attention relies on
            return _stopwatch.median(step, queries, pairs) / len(pairs)

    def fused(q: Array, k: Array, v: Array, *, implementation: Any, lengths: bool) -> Array:
        held = jnp.full(batch, tokens, jnp.int32) if lengths else None
        attend = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
        return attend(q[:, None], k, v, key_value_seq_lengths=held)[:, 0]

    def split(q: Array, k: Array, v: Array) -> Array:
        from jax.experimental.pallas.ops.gpu import decode_attention

        groups = batch * kv_heads
        splits = 2 ** (max(1, min(tokens // 256, 1056 // groups)).bit_length() - 1)
        k, v = (x.reshape(groups, tokens, dim) for x in (k, v))  # other vectors, but as many of them
        out = decode_attention.mqa(q.reshape(groups, -1, dim), k, v, k_splits=splits, block_k=64, num_stages=3)
        return out.reshape(q.shape)

    attends: dict[str, Callable[[Array, Array, Array], Array]] = {
        "xla": functools.partial(fused, implementation="xla", lengths=False)
    }
    if jax.default_backend() == "gpu":
        attends["cudnn"] = functools.partial(fused, implementation="cudnn", lengths=False)
        attends["cudnn, lengths"] = functools.partial(fused, implementation="cudnn", lengths=True)
        attends["pallas mqa"] = split
    calls = {name: functools.partial(timed, attend) for name, attend in attends.items()}
    if jax.default_backend() == "gpu":
        calls["torch sdpa"] = functools.partial(_torch, queries, shape)
    return calls


def _torch(queries: Array, shape: tuple[int, int, int, int]) -> float:
    """Time PyTorch's attention in a CUDA graph, which launches without Python; queries of a kv head as its tokens."""
    import torch

    batch, _, kv_heads, dim = shape
    pairs = [[torch.from_dlpack(x).transpose(1, 2) for x in pair] for pair in _pairs(shape)]
    q = torch.from_dlpack(queries).reshape(batch, kv_heads, -1, dim)

    def step() -> None:
        for k, v in pairs:
            torch.nn.functional.scaled_dot_product_attention(q, k, v)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def run(times: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            graph.replay()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    run(1)
    times = max(1, math.ceil(_stopwatch.SECONDS / run(1)))
    return float(np.median([run(times) for _ in range(_stopwatch.RUNS)])) / times / len(pairs)


def _pairs(shape: tuple[int, int, int, int]) -> list[tuple[Array, Array]]:
    base = jax.random.normal(jax.random.key(4), (min(2**22, math.prod(shape)),), jnp.bfloat16)
    count = _stopwatch.layers(4 * math.prod(shape))
    return [(_stopwatch.tiled(base, shape), _stopwatch.tiled(base[::-1], shape)) for _ in range(count)]
