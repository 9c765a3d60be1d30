"""The longest row that `jaxquant plan` predicts for Llama-3.1-8B's shapes on one device, allocated and decoded.

    python tests/bench/bench_contexts.py [--hbm 141] [--json FILE]

JAX is given 94 % of the memory (of `--hbm`, or of what the GPU has) in one pool, and plans keep 8 % free. Beside bytes
of bfloat16 that stand for the weights, a cache of every kind is made at the predicted length, full but for one token;
a token is appended to the last layer and attended to, with a key so near the query that the answer must be its value,
up to what so few bits lose. Then the same with 4 % more tokens, which must not fit. Calibrated codes have two sets of
widths, of 2.25 bits a coordinate on average, gains included, and bases of each head of each layer; fp8 has a scale of
two bytes a vector. Exit status 1 where a row is not as predicted. Takes about two minutes on an H200.
"""

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import _stopwatch, attention, cache, plan
from jaxquant.calibrate import levels
from jaxquant.methods import fp8, turboquant
from jaxquant.mixed import Mixed, Widths
from jaxquant.models import architecture as architectures
from jaxquant.plan_cli import LLAMA_8B
from jaxquant.quantizers import Exact

GIB = 2**30
POOL, MORE = 0.94, 1.04
DIM, KV_HEADS, HEADS = 128, 8, 32
# Widths of keys and of values, in turns; with a byte of gain each, 36 bytes a vector of 128 on average.
WIDTHS: list[tuple[Widths, Widths]] = [
    (((4, 32), (3, 32), (2, 32), (1, 32)), ((2, 112), (1, 16))),
    (((4, 16), (3, 32), (2, 64), (1, 16)), ((3, 32), (2, 64), (1, 32))),
]
# Largest relative error of a value that a code may leave: some way above the error of such codes of normal vectors.
LOST = {"bf16": 0.01, "fp8": 0.1, "K4V4": 0.2, "K4V2": 0.55, "K2V2": 0.55, "calibrated 2.25": 0.7}


def gpu_memory() -> tuple[int, int] | None:
    """Give the total and the free bytes of the first GPU, without starting JAX."""
    command = ["nvidia-smi", "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
    total, free = (int(number) * 2**20 for number in line.split(","))
    return total, free


def calibrated(widths: Widths, seed: int) -> Mixed:
    """Make a quantizer like one that calibration makes, for normal vectors."""
    rng = np.random.default_rng(seed)
    basis = jnp.asarray(np.linalg.qr(rng.normal(size=(KV_HEADS, DIM, DIM)))[0], jnp.float32)
    tables = [np.broadcast_to(levels.normal(bits), (KV_HEADS, count, 2**bits)) for bits, count in widths]
    return Mixed(
        mean=jnp.zeros((KV_HEADS, DIM)),
        analysis=basis,
        synthesis=basis,
        weights=jnp.full((KV_HEADS, DIM), 1 / DIM),
        levels=tuple(jnp.asarray(table, jnp.float32) for table in tables),
        widths=widths,
        dim=DIM,
    )


def kinds(layers: int) -> dict[str, tuple[Any, Any]]:
    """Give the quantizers of keys and values of every kind of cache."""
    key = jax.random.key(0)
    exact = Exact(dim=DIM)
    found: dict[str, tuple[Any, Any]] = {"bf16": (exact, exact), "fp8": fp8.kv(key, dim=DIM, bits_k=8, bits_v=8)}
    for bits_k, bits_v in ((4, 4), (4, 2), (2, 2)):
        found[f"K{bits_k}V{bits_v}"] = turboquant.kv(key, dim=DIM, bits_k=bits_k, bits_v=bits_v)
    each = [WIDTHS[i % 2] for i in range(layers)]
    keys, values = ([calibrated(pair[j], 2 * i + j) for i, pair in enumerate(each)] for j in range(2))
    return found | {"calibrated 2.25": (keys, values)}


@functools.partial(jax.jit, donate_argnums=0)
def step(held: cache.KVCache, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[cache.KVCache, jax.Array]:
    """Append a token to the last layer, and attend to it."""
    held = cache.append(held, -1, k, v)
    return held, attention.decode_attention(q, held, -1)[0]


def allocate(pair: tuple[Any, Any], layers: int, tokens: int) -> dict[str, Any]:
    """Make a cache that is full but for one token, append that one, and attend to it."""
    sizes = {"layers": layers, "batch": 1, "kv_heads": KV_HEADS, "capacity": tokens}
    held = jax.block_until_ready(cache.init(*pair, **sizes))
    nbytes = held.nbytes
    held = dataclasses.replace(held, length=jnp.full_like(held.length, tokens - 1))
    k, v = (jax.random.normal(jax.random.key(i), (1, 1, KV_HEADS, DIM), jnp.bfloat16) for i in range(2))
    q = 8 * jnp.repeat(k[:, 0], HEADS // KV_HEADS, axis=1)
    held, out = jax.block_until_ready(step(held, q, k, v))
    heads = np.asarray(out, np.float32).reshape(KV_HEADS, -1, DIM)
    value = np.asarray(v, np.float32).reshape(KV_HEADS, 1, DIM)
    assert held.length[-1, 0] == tokens, "the token was dropped"
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "bytes": nbytes,
        "peak": stats.get("peak_bytes_in_use"),
        "error": float(np.linalg.norm(heads - value) / np.linalg.norm(np.broadcast_to(value, heads.shape))),
        "wrong_error": float(np.linalg.norm(heads[::-1] - value) / np.linalg.norm(heads)),
    }


def attempt(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Give what is made, or why it cannot be."""
    try:
        return make()
    except Exception as problem:  # what the runtime raises where memory runs out is what is asked for here
        return {"failed": _stopwatch.reason(problem)}


def main() -> int:
    """Print a line for each kind of cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hbm", type=float, help="memory to plan for, in GB; default: what the GPU has")
    parser.add_argument("--seconds", type=float, default=150.0, help="after which no kind begins")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    began = time.perf_counter()
    seen = gpu_memory()
    memory = arguments.hbm * 1e9 if arguments.hbm else seen[0] if seen else 2e7
    if seen:  # read when JAX starts, which is below
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{POOL * memory / seen[1]:.4f}"
    gpu = jax.default_backend() == "gpu"
    shape = architectures.from_config(LLAMA_8B if gpu else LLAMA_8B | {"num_hidden_layers": 2})
    weights = plan.weights(shape) if gpu else 2**20
    model = jax.block_until_ready(jnp.ones(weights // 2, jnp.bfloat16))
    machine = plan.Machine(devices=1, memory=memory, bandwidth=1.0)
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {memory / 1e9:.2f} GB, "
        f"{limit / 1e9 if limit else 0:.2f} of them for JAX, {model.nbytes / 1e9:.2f} weights",
        flush=True,
    )
    print(f"{'cache':<17}{'longest, tokens':>16}{'predicted':>12}{'allocated':>12}{'error':>9}  4 % more tokens")
    rows, bad = [], False
    for name, pair in kinds(shape.layers).items():
        if time.perf_counter() - began > arguments.seconds:
            print(f"{name:<17}no time left")
            bad = True
            continue

        def held(tokens: int, pair: Any = pair) -> int:
            return plan.cache_bytes(shape, pair, context=tokens, batch=1)

        longest = plan.plan(held, weights, machine, context=1, batch=1, share=1).longest
        row: dict[str, Any] = {"cache": name, "longest": longest, "predicted": held(longest)}
        row |= attempt(functools.partial(allocate, pair, shape.layers, longest))
        jax.clear_caches()
        more = int(longest * MORE)
        row["more"] = (
            attempt(functools.partial(allocate, pair, shape.layers, more)).get("failed", "fits")
            if limit
            else "no limit"
        )
        good = "bytes" in row and row["bytes"] == row["predicted"] and row["error"] < LOST[name] < row["wrong_error"]
        bad |= not good or row["more"] == "fits"
        rows.append(row)
        allocated = f"{row['bytes'] / GIB:>8.2f} GiB{row['error']:>9.3f}" if "bytes" in row else row["failed"]
        verdict = "" if good else " NOT AS PREDICTED"
        print(
            f"{name:<17}{longest:>16,}{row['predicted'] / GIB:>8.2f} GiB{allocated}  {row['more']}{verdict}", flush=True
        )
    print(f"{time.perf_counter() - began:.0f} s in all")
    if arguments.json is not None:
        result = {"device": jax.devices()[0].device_kind, "memory": memory, "pool": limit, "rows": rows}
        arguments.json.write_text(json.dumps(result) + "\n")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
