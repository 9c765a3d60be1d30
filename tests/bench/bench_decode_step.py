"""One decode step of an 8B model's shapes over a packed cache, beside the same step over a bfloat16 cache.

    python tests/bench/bench_decode_step.py [--implementation cuda] [--bits K4V4,K4V2] [--context 8192,32768,131072]

32 layers, 32 heads, 8 kv heads of 128, hidden 4096, MLP 14336: each layer appends a token to every row and attends,
with and without its matrices of random bfloat16 weights (norms without weights, no position encoding). All steps of a
run are one jit that donates the cache. Tokens a second are medians over runs; memory is what the compiled program holds
at most: arguments, results that are not the arguments' own buffers, and temporaries. Beside the time of a step stands
what `jaxquant plan` predicts at the read bandwidth of this run, where it has measured the share that attention reaches.
"""

import argparse
import dataclasses
import functools
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import device_profile
import jax
import jax.numpy as jnp
from jax import lax

from jaxquant import _stopwatch, attention, attention_benchmark, cache, plan, plan_cli

DIM, RUNS = 128, 5


class Model(NamedTuple):
    """Sizes of a decoder."""

    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    mlp: int = 14_336

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.heads * DIM


def weights(model: Model) -> list[dict[str, jax.Array]]:
    """Make matrices of the right size; what they hold does not matter, only that it is not all the same."""
    base = 0.02 * jax.random.normal(jax.random.key(0), (2**20,), jnp.bfloat16)
    shapes = {
        "qkv": (model.hidden, (model.heads + 2 * model.kv_heads) * DIM),
        "out": (model.hidden, model.hidden),
        "up": (model.hidden, 2 * model.mlp),
        "down": (model.mlp, model.hidden),
    }
    return [{name: _stopwatch.tiled(base, shape) for name, shape in shapes.items()} for _ in range(model.layers)]


def normalized(x: jax.Array) -> jax.Array:
    """Scale every row to unit mean square."""
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def step(model: Model, attend: Callable[..., Any], matrices: list, held: Any, x: jax.Array) -> tuple[Any, jax.Array]:
    """Run one token of every row through all layers."""
    batch, wide = x.shape[0], model.kv_heads * DIM
    for layer in range(model.layers):
        y = normalized(x)
        if matrices:
            y = y @ matrices[layer]["qkv"]
            q, k, v = jnp.split(y, [model.hidden, model.hidden + wide], axis=-1)
        else:
            q, k, v = y, y[:, :wide], y[:, -wide:]
        k, v = (part.reshape(batch, 1, model.kv_heads, DIM) for part in (k, v))
        out, held = attend(held, layer, q.reshape(batch, model.heads, DIM), k, v)
        out = out.reshape(batch, model.hidden)
        x = x + (out @ matrices[layer]["out"] if matrices else out)
        if matrices:
            gate, up = jnp.split(normalized(x) @ matrices[layer]["up"], 2, axis=-1)
            x = x + (jax.nn.silu(gate) * up) @ matrices[layer]["down"]
    return held, x


def packed(model: Model, batch: int, context: int, bits: tuple[int, int], steps: int, implementation: str) -> tuple:
    """Give a full cache of codes, how a layer uses it, and how to forget the steps of a run."""
    shape = attention_benchmark.Shape(batch=batch, tokens=context, heads=model.heads, kv_heads=model.kv_heads, dim=DIM)
    held = attention_benchmark.filled(shape, attention_benchmark.scalars(bits, DIM), layers=model.layers)

    def attend(held: Any, layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
        held = cache.append(held, layer, k, v)
        out, _ = attention.decode_attention(q, held, layer, implementation=implementation)  # pyright: ignore
        return out, held

    def rewound(held: Any) -> Any:
        return dataclasses.replace(held, length=jnp.full((model.layers, batch), context - steps, jnp.int32))

    return rewound(held), attend, rewound


def plain(model: Model, batch: int, context: int, steps: int) -> tuple:
    """Do the same with bfloat16: an array of keys and one of values a layer, so that no layer is sliced out."""
    base = jax.random.normal(jax.random.key(0), (2**20,), jnp.bfloat16)
    shape = (batch, context, model.kv_heads, DIM)
    buffers = [(_stopwatch.tiled(base, shape), _stopwatch.tiled(base[::-1], shape)) for _ in range(model.layers)]
    implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"

    def attend(held: Any, layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
        buffers, length = held
        written = [
            lax.dynamic_update_slice_in_dim(old, new, length[layer], axis=1)
            for old, new in zip(buffers[layer], (k, v), strict=True)
        ]
        length = length.at[layer].add(1)
        out = jax.nn.dot_product_attention(
            q[:, None],
            *written,
            key_value_seq_lengths=jnp.broadcast_to(length[layer], (batch,)),
            implementation=implementation,
        )
        return out[:, 0], ([*buffers[:layer], tuple(written), *buffers[layer + 1 :]], length)

    def rewound(held: Any) -> Any:
        return held[0], jnp.full(model.layers, context - steps, jnp.int32)

    return rewound((buffers, None)), attend, rewound


def predicted(model: Model, matrices: list, batch: int, context: int, name: str, bandwidth: float) -> float | None:
    """Give the milliseconds of a step that `jaxquant plan` predicts, or None where it has to assume a share."""
    kind = name.partition(" ")[0]
    bits = None if kind == "bf16" else attention_benchmark.widths(kind)

    def held(tokens: int) -> int:
        sizes = {"heads": model.heads, "kv_heads": model.kv_heads, "dim": DIM}
        shape = attention_benchmark.Shape(batch=batch, tokens=tokens, **sizes)
        return model.layers * (shape.nbytes(bits) if bits else shape.exact_bytes)

    found = plan_cli.predicted(
        f"K{bits[0]}V{bits[1]}" if bits else kind,
        held,
        plan.Machine(devices=1, memory=141e9, bandwidth=bandwidth),
        layers=model.layers,
        weights=sum(leaf.nbytes for leaf in jax.tree.leaves(matrices)),
        context=context,
        batch=batch,
    )
    return 1e3 * found["seconds"] if found["share_measured"] else None


def copied_bytes(program: str) -> int:
    """Give the bytes of the largest array that a compiled program copies, slices or transposes as an operation."""
    sizes = {"s8": 1, "u8": 1, "pred": 1, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}
    found = re.findall(r"= \(?(\w+)\[([\d,]*)\]\S* (?:copy|copy-start|dynamic-slice|slice|transpose)\(", program)
    return max(
        (sizes.get(kind, 4) * math.prod(map(int, filter(None, dims.split(",")))) for kind, dims in found), default=0
    )


def measure(model: Model, matrices: list, batch: int, steps: int, made: tuple, profiled: bool) -> dict[str, float]:
    """Time runs of `steps` steps."""
    held, attend, rewound = made

    @functools.partial(jax.jit, donate_argnums=1)
    def run(matrices: list, held: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        return lax.fori_loop(0, steps, lambda _, carry: step(model, attend, matrices, *carry), (held, x))

    x = jax.random.normal(jax.random.key(1), (batch, model.hidden), jnp.bfloat16)
    start = time.perf_counter()
    compiled = run.lower(matrices, held, x).compile()
    compiling = time.perf_counter() - start
    memory = compiled.memory_analysis()
    times, out = [], x
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        held, out = jax.block_until_ready(compiled(matrices, held, x))
        times.append(time.perf_counter() - start)
        held = rewound(held)
    assert bool(jnp.all(jnp.isfinite(out))), "the steps ran into infinity"
    seconds = statistics.median(times[1:])
    if profiled:
        seen = device_profile.profile(lambda: compiled(matrices, held, x))
        seen.show(steps)
        print(f"  copies to the host during {steps} steps: {seen.copies_to_host()}")
        assert seen.work, "the profiler saw nothing"
    live = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "tokens_per_second": batch * steps / seconds,
        "ms_per_step": seconds / steps * 1e3,
        "peak_bytes": live + memory.temp_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "compile_seconds": compiling,
        "largest_copy_bytes": copied_bytes(compiled.as_text()),
    }


def main() -> int:
    """Print a line for each cache; exit with 1 where nothing packed ran."""
    tiny = jax.default_backend() != "gpu"
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--implementation", default="xla", help="of attention over codes; names with commas")
    parser.add_argument("--bits", default="K4V4,K4V2,K2V2")
    parser.add_argument("--context", default="256" if tiny else "8192,32768,131072", help="tokens, with commas")
    parser.add_argument("--batch", default="2" if tiny else "16,16,4", help="rows, one number for each context")
    parser.add_argument("--steps", type=int, default=8, help="of a run")
    parser.add_argument("--weights", choices=("with", "without", "both"), default="both")
    parser.add_argument("--profile", action="store_true", help="list the kernels and copies of a run")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model = Model(layers=2, heads=8, kv_heads=2, mlp=512) if tiny else Model()
    every = weights(model)
    caches: dict[str, Callable[..., tuple]] = {"bf16": plain}
    for bits in arguments.bits.split(","):
        for name in arguments.implementation.split(","):
            caches[f"{bits} {name}"] = functools.partial(
                packed, bits=attention_benchmark.widths(bits), implementation=name
            )
    rows = []
    contexts, batches = ([int(x) for x in names.split(",")] for names in (arguments.context, arguments.batch))
    bandwidth = _stopwatch.read_bandwidth()
    read = f"reads {bandwidth / 1e9:,.0f} GB/s"
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {read}, {model}", flush=True)
    for context, batch in zip(contexts, batches, strict=True):
        for matrices in {"with": [every], "without": [[]], "both": [[], every]}[arguments.weights]:
            print(f"\n{batch} rows of {context:,} tokens, {'with' if matrices else 'without'} weights")
            base = None
            for name, make in caches.items():
                row: dict[str, Any] = {"cache": name, "batch": batch, "context": context, "weights": bool(matrices)}
                rows.append(row)
                try:
                    made = make(model, batch, context, steps=arguments.steps)
                    row |= measure(model, matrices, batch, arguments.steps, made, arguments.profile)
                    row["predicted_ms"] = predicted(model, matrices, batch, context, name, bandwidth)
                except Exception as problem:  # one that does not fit or is not there must not end the others
                    row["failed"] = _stopwatch.reason(problem)
                    print(f"{name:<16}{row['failed']}", flush=True)
                    continue
                base = row["tokens_per_second"] if name == "bf16" else base
                ratio = f"{row['tokens_per_second'] / base:6.2f} x bf16" if base else ""
                memory = f"{row['peak_bytes'] / 2**30:>9.2f} GiB ({row['temporary_bytes'] / 2**20:,.0f} MiB extra"
                memory += f", largest copy {row['largest_copy_bytes'] / 2**20:,.1f}, compiled in "
                memory += f"{row['compile_seconds']:.0f} s)"
                speed = f"{row['tokens_per_second']:>10,.0f} tokens/s{row['ms_per_step']:>10.2f} ms/step"
                if row["predicted_ms"] is not None:
                    speed += f" (plan: {row['predicted_ms']:.2f})"
                print(f"{name:<16}{speed}{memory}{ratio}", flush=True)
                del made
    if arguments.json is not None:
        arguments.json.write_text(
            json.dumps({"device": jax.devices()[0].device_kind, "read_bandwidth": bandwidth, "results": rows}) + "\n"
        )
    return int(not any("ms_per_step" in row and row["cache"] != "bf16" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
