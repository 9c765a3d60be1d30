"""Decode attention over two devices against one: kv heads, rows or tokens shared, and a context too long for bfloat16.

    python tests/bench/bench_two_gpus.py [--quick] [--axes tokens] [--symmetric] [--seconds 240] [--json FILE]

Shapes are those of an 8B model (32 heads, 8 kv heads of 128); codes are a hash of their place, the same on one device
and on two. Every time is that of one call, of layers one after another as in a decoder, in which each call's queries
depend on the result of the call before. Both results are compared at the first and the last layer, in float32: the
largest difference over the largest number, beside that to a wrong operand (heads in another order). On machines without
two GPUs simulated CPU devices and tiny shapes check that it runs:
`XLA_FLAGS=--xla_force_host_platform_device_count=2`.

With `--symmetric`, NCCL has symmetric buffers, an experimental flag of XLA.

The last part, left out with `--symmetric`, holds what an 8B model needs on one device: its weights (as bytes) and 32
layers of 1,048,576 tokens. Exit status 1 where a part failed, results differ, or, on GPUs, a goal is missed. A part
that would begin after `--seconds` is left out.
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
if "--symmetric" in sys.argv:
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_experimental_enable_nccl_symmetric_buffers"

import hashed_codes
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxquant import _stopwatch, attention, cache, plan, sharding
from jaxquant._stacks import KVCache
from jaxquant.attention_benchmark import Shape, widths
from jaxquant.methods import turboquant
from jaxquant.models import architecture as architectures
from jaxquant.plan_cli import LLAMA_8B

AXES = ["kv_heads", "batch", "tokens"]
AGREE = 2e-3  # weights of a softmax are halves in the kernels: 2**-10 each, and sums in another order
GPU = jax.default_backend() == "gpu"
IMPLEMENTATION: Any = "cuda" if GPU else "xla"
GIB = 2**30


class Case(NamedTuple):
    """What to share between devices, and how much faster that should be."""

    axis: str
    bits: str
    shape: Shape
    layers: int
    goal: float | None = None


def cases(quick: bool) -> list[Case]:
    """Give the cases for these devices, those of one shape and width together."""
    if not GPU:
        many, long = (Shape(batch=4, tokens=512, heads=8, kv_heads=2), Shape(batch=1, tokens=1024, heads=8, kv_heads=2))
        layers = 2
    elif quick:
        many, long, layers = Shape(batch=32, tokens=32_768), Shape(batch=1, tokens=262_144), 4
    else:
        many, long, layers = Shape(batch=32, tokens=131_072), Shape(batch=1, tokens=1_048_576), 32
    found = []
    for bits in ("K4V2", "K4V4"):
        found.append(Case("kv_heads", bits, many, 1, 1.85))
        found.append(Case("batch", bits, many, 1))
        found.append(Case("tokens", bits, long, layers, 1.7))
        found.append(Case("kv_heads", bits, long, layers))
    return found


def empty(case: Case, layout: sharding.Layout | None) -> KVCache:
    bits_k, bits_v = widths(case.bits)
    pair = turboquant.kv(jax.random.key(0), dim=case.shape.dim, bits_k=bits_k, bits_v=bits_v)
    sizes = {"layers": case.layers, "batch": case.shape.batch, "kv_heads": case.shape.kv_heads}
    sizes["capacity"] = case.shape.tokens
    return cache.init(*pair, **sizes) if layout is None else sharding.init(layout, *pair, **sizes)


def measured(case: Case, layout: sharding.Layout | None) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Time a call, and give what the first and the last layer answer."""
    held = hashed_codes.full(lambda: empty(case, layout), layout)

    def attend(q: jax.Array, held: KVCache, layer: jax.Array) -> jax.Array:
        if layout is None:
            return attention.decode_attention(q, held, layer, implementation=IMPLEMENTATION)[0]
        return sharding.decode_attention(layout, q, held, layer, implementation=IMPLEMENTATION)[0]

    def step(q: jax.Array, held: KVCache) -> jax.Array:
        for layer in range(case.layers):  # as decoders are traced
            q = _stopwatch.chained(q, attend(q, held, jnp.int32(layer)))
        return q

    def queries(dtype: Any) -> jax.Array:
        q = jax.random.normal(jax.random.key(1), (case.shape.batch, case.shape.heads, case.shape.dim), dtype)
        return q if layout is None else jax.device_put(q, NamedSharding(layout.mesh, layout.queries))

    answers = [np.asarray(jax.jit(attend)(queries(jnp.float32), held, jnp.int32(i))) for i in (0, case.layers - 1)]
    seconds = _stopwatch.median(step, queries(jnp.bfloat16), held) / case.layers
    shares: dict[int, int] = {}
    for leaf in jax.tree.leaves(held.stacks):
        for shard in leaf.addressable_shards:
            shares[shard.device.id] = shares.get(shard.device.id, 0) + shard.data.nbytes
    return {"ms": seconds * 1e3, "device_bytes": max(shares.values())}, answers


def difference(got: list[np.ndarray], want: list[np.ndarray]) -> float:
    """Give the largest difference over the largest number."""
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, want, strict=True))


def compare(case: Case, mesh: Mesh, alone: Callable[[], Any]) -> dict[str, Any]:
    """Measure one case on all devices of the mesh, beside one device."""
    one, want = alone()
    layout = sharding.Layout(mesh, **{case.axis: "x"})
    two, got = measured(case, layout)
    wrong = [x[:, ::-1] for x in want]
    return {
        "one_ms": one["ms"],
        "two_ms": two["ms"],
        "speedup": one["ms"] / two["ms"],
        "one_bytes": one["device_bytes"],
        "two_bytes": two["device_bytes"],
        "difference": difference(got, want),
        "wrong_operand": difference(got, wrong),
    }


def exchange(mesh: Mesh, shape: Shape) -> float:
    """Time the one collective of a token-sharded step alone, in seconds: outputs and log-sum-exps of all devices."""

    def step(x: jax.Array) -> jax.Array:
        def local(x: jax.Array) -> jax.Array:
            return x + 1e-3 * jnp.sum(lax.all_gather(x, "x"), axis=0)

        return jax.shard_map(local, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)(x)

    x = jnp.ones((shape.batch, shape.heads, shape.dim + 1), jnp.float32)
    return _stopwatch.median(step, jax.device_put(x, NamedSharding(mesh, PartitionSpec())))


def whole_model(quick: bool) -> dict[str, Any]:
    """Hold the weights and the cache of an 8B model's 32 layers on one device: bfloat16, then codes, decoded."""
    case = next(each for each in cases(quick) if each.axis == "tokens")
    shape, layers = case.shape, 32 if GPU else case.layers
    weights = plan.weights(architectures.from_config(LLAMA_8B)) if GPU else 2**20
    model = jax.block_until_ready(jnp.ones(weights // 2, jnp.bfloat16))
    found: dict[str, Any] = {"weights": weights, "exact_bytes": layers * shape.exact_bytes}
    stats = jax.devices()[0].memory_stats() or {}
    found["memory"] = stats.get("bytes_limit")
    try:
        exact = [jnp.zeros((layers, shape.batch, shape.tokens, shape.kv_heads, shape.dim), jnp.bfloat16) for _ in "kv"]
        jax.block_until_ready(exact)
        found["bf16"] = "fits"
        del exact
    except Exception as problem:  # what the runtime says where it does not fit
        found["bf16"] = _stopwatch.reason(problem)
    codes, _ = measured(case._replace(layers=layers), None)
    seconds = codes["ms"] / 1e3 * layers
    return found | {
        "weight_bytes_held": model.nbytes,
        "cache_bytes": codes["device_bytes"],
        "step_ms": seconds * 1e3,
        "tokens_per_second": shape.batch / seconds,
    }


def main() -> int:
    """Print a line for each part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="a quarter of the tokens, four layers")
    parser.add_argument("--symmetric", action="store_true", help="symmetric buffers for NCCL")
    parser.add_argument("--axes", nargs="+", default=AXES, choices=AXES, help="what to share")
    parser.add_argument("--seconds", type=float, default=240.0, help="after which no part begins")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    began = time.perf_counter()
    devices = jax.devices()[:2]
    if len(devices) < 2:
        parser.error(f"two devices are needed, got {devices}")
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
    print(f"2 x {devices[0].device_kind}, jax {jax.__version__}, implementation {IMPLEMENTATION}", flush=True)
    results: dict[str, Any] = {
        "device": devices[0].device_kind,
        "jax": jax.__version__,
        "symmetric": arguments.symmetric,
        "cases": [],
    }
    bad = False

    def attempt(name: str, part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        nonlocal bad
        if time.perf_counter() - began > arguments.seconds:
            found = {"failed": "no time left"}
        else:
            try:
                found = part()
            except Exception as problem:  # one that fails must not end the others
                found = {"failed": _stopwatch.reason(problem)}
        bad |= "failed" in found
        if "failed" in found:
            print(f"{name:<46}{found['failed']}", flush=True)
        return found

    alone = functools.cache(lambda bits, shape, layers: measured(Case("", bits, shape, layers), None))
    for case in cases(arguments.quick):
        if case.axis not in arguments.axes:
            continue
        name = f"{case.bits}, {case.shape.batch} x {case.shape.tokens:,}, {case.axis} over 2"
        one = functools.partial(alone, case.bits, case.shape, case.layers)
        row = attempt(name, functools.partial(compare, case, mesh, one))
        results["cases"].append(case._asdict() | {"shape": vars(case.shape)} | row)
        if "failed" in row:
            continue
        wrong = row["difference"] > AGREE or not row["wrong_operand"] > AGREE
        missed = GPU and not arguments.quick and case.goal is not None and row["speedup"] < case.goal
        bad |= wrong or missed
        goal = "" if case.goal is None else f" (goal {case.goal:g}{', MISSED' if missed else ''})"
        print(
            f"{name:<46}{row['one_ms']:>9.4f} ms ->{row['two_ms']:>9.4f} ms{row['speedup']:>6.2f} times{goal}, "
            f"{row['one_bytes'] / GIB:.2f} -> {row['two_bytes'] / GIB:.2f} GiB a device, differ by "
            f"{row['difference']:.1e}{' TOO MUCH' if wrong else ''} (wrong operand {row['wrong_operand']:.1f})",
            flush=True,
        )

    shape = next(case.shape for case in cases(arguments.quick) if case.axis == "tokens")
    row = attempt("the exchange alone", lambda: {"us": exchange(mesh, shape) * 1e6})
    results["exchange"] = row
    if "us" in row:
        print(f"the exchange of a token-sharded step alone: {row['us']:.1f} us", flush=True)

    row = attempt("one device", functools.partial(whole_model, arguments.quick)) if not arguments.symmetric else {}
    results["one_device"] = row
    if "step_ms" in row:
        limit = f" of {row['memory'] / GIB:.1f} GiB that may be taken" if row["memory"] else ""
        print(
            f"one device, 1 x {shape.tokens:,}, weights {row['weights'] / GIB:.1f} GiB and bfloat16 "
            f"{row['exact_bytes'] / GIB:.1f} GiB{limit}: {row['bf16']}\n"
            f"  K4V2 {row['cache_bytes'] / GIB:.2f} GiB: attention of a step {row['step_ms']:.2f} ms, "
            f"{row['tokens_per_second']:.1f} tokens/s",
            flush=True,
        )
    results["seconds"] = time.perf_counter() - began
    print(f"{results['seconds']:.0f} s in all")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results) + "\n")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
