"""Prefill over a packed past, append included, against cuDNN over a bfloat16 cache.

    python tests/bench/bench_prefill.py [--seconds 120] [--json FILE]
    python tests/bench/bench_prefill.py --check

One row, 32 query heads, 8 kv heads of 128, bfloat16 queries: chunks of 512, 2,048 and 8,192 tokens after 0, 8,192,
32,768 and 131,072 tokens. The bfloat16 cache is appended to in place and read by two calls, over the past and over the
chunk, joined by their log-sum-exp. A call that does not begin within `--seconds` is left out. `peak` is the share of
the multiplications a second that a bfloat16 product of large matrices reaches in the same run, where causal attention
counts half of the chunk; `temporary` is what the compiled call holds beside its operands and results. Errors are
relative to attention in float64 over the decoded cache, for a sample of queries of the chunks of 2,048 tokens; after
8,192 tokens also with float32 queries, whose output is not rounded to bfloat16.

`--check` compares "flash" with "xla" for every kind of mask, with float32 queries, two rows of different length and a
past that no block divides. Exit status 1 where they differ by 1e-3 or more.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxquant import _stopwatch, attention, attention_benchmark, cache
from jaxquant._kernels import flash
from jaxquant.methods import turboquant

ON_GPU = jax.default_backend() == "gpu"
CHUNKS = (512, 2048, 8192) if ON_GPU else (32, 64)
PASTS = (0, 8192, 32768, 131_072) if ON_GPU else (0, 256)
MEASURED = CHUNKS[1]  # chunks whose error is measured
HEADS, KV_HEADS, DIM = 32, 8, 128
BITS = [(4, 4), (4, 2)]
CHECKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sinks": {"sinks": 5},
    "window": {"window": 48},
    "sinks and window": {"sinks": 5, "window": 48},
    "exact chunk": {"chunk": "exact"},
    "exact chunk after a window": {"chunk": "exact", "sinks": 5, "window": 48},
    "sliding window": {"sliding_window": 100},
    "sliding window, exact chunk": {"chunk": "exact", "window": 48, "sliding_window": 100},
    "dim 64, 1 head a kv head": {"dim": 64, "heads": 2},
    "dim 256, 16 heads a kv head": {"dim": 256, "heads": 32, "window": 16},
}
SAMPLE = 8  # queries, and heads that share a kv head, of two kv heads
RUNS, LEAST = 5, 0.03  # runs, and the seconds that one should take at least


def main() -> int:
    """Print a line for each measurement."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="no call begins after so long")
    parser.add_argument("--implementation", default="flash,xla", help="names with commas, in the order of their turns")
    parser.add_argument("--json", type=Path, help="file for everything measured")
    parser.add_argument("--check", action="store_true", help="compare results only")
    arguments = parser.parse_args()
    if arguments.check:
        return _check()
    stop = time.monotonic() + arguments.seconds
    device = jax.devices()[0].device_kind
    peak = _peak()
    print(f"{device}, jax {jax.__version__}: multiplies bfloat16 at {peak / 1e12:,.3f} TFLOP/s", flush=True)
    print("chunk    past      what                ms      peak  of cuDNN   temporary      error", flush=True)

    best: dict[tuple[int, int], float] = {}
    rows: list[dict[str, Any]] = []
    shapes = [(new, past) for past in PASTS for new in CHUNKS]
    turns: list[tuple[str, tuple[int, int] | None]] = [("cudnn", None)]
    turns += [(name, bits) for name in arguments.implementation.split(",") for bits in BITS]
    ordered = [(shape, turn) for shape in shapes for turn in turns if turn[0] != "xla"]
    ordered += [(shape, turn) for shape in shapes for turn in turns if turn[0] == "xla"]
    for (new, past), (name, bits) in ordered:
        row: dict[str, Any] = {"new": new, "past": past, "implementation": name, "bits": bits}
        try:
            if time.monotonic() > stop:
                raise TimeoutError(f"{arguments.seconds:.0f} seconds are over")
            row |= _exact(new, past) if bits is None else _compressed(new, past, bits, name)
        except Exception as problem:  # a variant may lack its kernel or the memory, each with an error of its own
            row["failed"] = _stopwatch.reason(problem)
        rows.append(row)
        label = name if bits is None else f"{name} K{bits[0]}V{bits[1]}"
        print(f"{new:<9,}{past:<10,}{label:<14}", end="")
        if "failed" in row:
            print(f"  {row['failed']}", flush=True)
            continue
        if bits is None:
            best[new, past] = row["ms"]
        row["peak"] = _operations(new, past) / row["ms"] / 1e-3 / peak
        row["of_cudnn"] = best[new, past] / row["ms"] if (new, past) in best else None
        ratio = f"{row['of_cudnn']:.2f}" if row["of_cudnn"] else "?"
        print(f"{row['ms']:>10.3f}{row['peak']:>10.1%}{ratio:>10}{row['temporary'] / 2**20:>8,.1f} MiB", end="")
        print(f"{row['error']:>11.1e}" if "error" in row else "", end="")
        print(f"  {row['float32']:.1e} with float32 queries" if "float32" in row else "", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"device": device, "peak": peak, "results": rows}) + "\n")
    return int(any(row.get("error", 0.0) >= 1e-2 for row in rows))


def _peak() -> float:
    """Measure the operations a second of a product of large square matrices in bfloat16."""
    size = 8192 if ON_GPU else 512
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    seconds = _stopwatch.median(lambda x, y: x @ y * jnp.bfloat16(size**-0.5), x, x)
    return 2 * size**3 / seconds


def _operations(new: int, past: int) -> float:
    return 4 * HEADS * DIM * new * (past + new / 2)


def _chunk(new: int) -> list[Array]:
    shapes = [(1, new, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    keys = jax.random.split(jax.random.key(5), 3)
    return [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]


def _timed(step: Callable[..., Any], held: Any, *chunk: Array) -> tuple[dict[str, Any], Any]:
    """Time `out, held = step(held, *chunk)`, which gets `held` back as it was given; the last result comes along."""
    compiled = jax.jit(step, donate_argnums=0).lower(held, *chunk).compile()

    def run(times: int, held: Any) -> tuple[float, Any, Any]:
        out = None
        start = time.perf_counter()
        for _ in range(times):
            out, held = compiled(held, *chunk)
        jax.block_until_ready((out, held))
        return time.perf_counter() - start, out, held

    _, out, held = run(1, held)
    once, out, held = run(1, held)
    times = max(1, min(200, round(LEAST / once)))
    seconds = []
    for _ in range(RUNS):
        took, out, held = run(times, held)
        seconds.append(took / times)
    analysis = compiled.memory_analysis()
    return {"ms": float(np.median(seconds)) * 1e3, "temporary": analysis.temp_size_in_bytes}, (out, held)


def _exact(new: int, past: int) -> dict[str, Any]:
    base = jax.random.normal(jax.random.key(4), (2**18,), jnp.bfloat16)
    shape = (1, KV_HEADS, past + new, DIM)
    held = (_stopwatch.tiled(base, shape), _stopwatch.tiled(base[::-1], shape))

    def step(held: tuple[Array, Array], q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        q = q * jnp.asarray(DIM**-0.5, q.dtype)
        keys, values = (lax.dynamic_update_slice_in_dim(x, y, past, axis=2) for x, y in zip(held, (k, v), strict=True))
        out, lse = flash.kernel(q, k, v, causal=True, span=None, lengths=None)
        if past:
            lengths = jnp.full(1, past, jnp.int32)
            seen = flash.kernel(q, keys, values, causal=False, span=None, lengths=lengths)
            out, _ = attention.merge((out, lse), seen)
        return jnp.swapaxes(out, 1, 2).astype(q.dtype), (keys, values)

    return _timed(step, held, *_chunk(new))[0]


def _compressed(new: int, past: int, bits: tuple[int, int], implementation: str) -> dict[str, Any]:
    shape = attention_benchmark.Shape(batch=1, tokens=past + new, heads=HEADS, kv_heads=KV_HEADS, dim=DIM)
    made = attention_benchmark.filled(shape, attention_benchmark.scalars(bits, DIM), layers=1)
    made = dataclasses.replace(made, length=jnp.full_like(made.length, past))
    attend = functools.partial(attention.prefill_attention, implementation=implementation)  # pyright: ignore

    def step(held: cache.KVCache, q: Array, k: Array, v: Array) -> tuple[Array, cache.KVCache]:
        out, _, after = attend(q, k, v, held, 0)
        return out, dataclasses.replace(after, length=held.length)

    chunk = _chunk(new)
    row, (out, held) = _timed(step, made, *chunk)
    if new == MEASURED:
        full = dataclasses.replace(held, length=jnp.full_like(held.length, past + new))
        row["error"] = _error(full, chunk[0], out, past)
        if past == PASTS[1]:
            wide = [x.astype(jnp.float32) for x in chunk]
            row["float32"] = _error(full, wide[0], jax.jit(step)(held, *wide)[0], past)
    return row


def _error(full: cache.KVCache, q: Array, out: Array, past: int) -> float:
    """Compare a sample of queries with attention in float64 over the decoded cache."""
    at = np.linspace(0, q.shape[1] - 1, SAMPLE).astype(int)
    k, v = (np.asarray(x[0, :, :2], np.float64) for x in cache.materialize(full, 0))
    heads = HEADS // KV_HEADS * 2
    rows, got = (np.asarray(x[0, at, :heads], np.float64).reshape(SAMPLE, 2, -1, DIM) for x in (q, out))
    scores = np.einsum("phrd,thd->phrt", rows, k, optimize=True) * DIM**-0.5
    seen = np.arange(len(k)) <= past + at[:, None]
    scores = np.where(seen[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    want = np.einsum("phrt,thd->phrd", weights / weights.sum(axis=-1, keepdims=True), v, optimize=True)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def _check() -> int:
    flash.BLOCK = 256 if ON_GPU else 48
    worst = 0.0
    for name, case in CHECKS.items():
        try:
            out, lse = _difference(**case)
        except Exception as problem:  # so that the others are seen
            out = lse = float("inf")
            print(f"{type(problem).__name__}: {str(problem)[:300]}")
        print(f"{name:<32}{out:>10.1e} of the output{lse:>10.1e} log-sum-exp", flush=True)
        worst = max(worst, out, lse / 10) if np.isfinite(out + lse) else np.inf
    return int(worst >= 1e-3)


def _difference(
    *,
    dim: int = 128,
    heads: int = 8,
    sinks: int = 0,
    window: int = 0,
    chunk: str = "codes",
    sliding_window: int | None = None,
) -> tuple[float, float]:
    """Give the relative difference of outputs and the largest one of log-sum-exps."""
    past, new, kv_heads = (1300, 384, 2) if ON_GPU else (200, 48, 2)
    keys, values = turboquant.kv(jax.random.key(0), dim=dim, bits_k=4, bits_v=2)
    sizes = {"layers": 2, "batch": 2, "kv_heads": kv_heads, "capacity": past + new + 11}
    held = cache.init(keys, values, **sizes, sinks=sinks, window=window, dtype=jnp.float32)
    q = 2 * jax.random.normal(jax.random.key(1), (2, past + new, heads, dim))
    k, v = jax.random.normal(jax.random.key(2), (2, 2, past + new, kv_heads, dim))
    mask = jnp.arange(past + new) < jnp.array([[past + new], [past + new // 2]])
    mask = mask & (jnp.arange(past + new) >= jnp.array([[0], [past // 3]]))
    held = cache.append(held, 1, k[:, :past], v[:, :past], mask=mask[:, :past])
    results = []
    for implementation in ("flash", "xla"):
        out, lse, _ = attention.prefill_attention(
            *(x[:, past:] for x in (q, k, v)),
            held,
            1,
            mask=mask[:, past:],
            chunk=chunk,  # pyright: ignore[reportArgumentType]
            sliding_window=sliding_window,
            implementation=implementation,
        )
        results.append((np.asarray(out), np.asarray(lse)))
    (got, got_lse), (want, want_lse) = results
    seen = np.isfinite(want_lse)
    assert (seen == np.isfinite(got_lse)).all()
    difference = np.linalg.norm(got - want) / np.linalg.norm(want)
    return float(difference), float(np.abs(got_lse[seen] - want_lse[seen]).max())


if __name__ == "__main__":
    sys.exit(main())
