"""Code tensors that drift from step to step: error, bytes and cost of stream methods beside coding each step alone.

python tests/bench/bench_streams.py [--bits 2 3 4] [--steps 20] [--train 300] [--json]

Streams: random walks whose vectors move by a given share of their length at each step, a smooth path (each vector turns
at its own pace), and the keys and values of every layer of the small diffusion transformer along one guided sampling
run, after so many steps of training.

Methods: `direct` codes every step alone; beside it whatever in `jaxquant.methods` offers `stream`. Bytes are of what is
sent, a step and vector, averaged over the steps, and of what is held between steps. Error is the squared error over the
squared length, mean over all steps and vectors. Costs are medians of the processor time of a step, as multiples of
`direct`'s, in turn.
"""

import argparse
import functools
import importlib
import inspect
import json
import pkgutil
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxquant import methods, quantizers
from jaxquant.diffusion import flow, shapes
from jaxquant.methods import turboquant

Steps = Float[Array, "steps batch heads tokens dim"]


class Coder(NamedTuple):
    """The common call: each takes its state first, and gives payloads whose bytes are what is sent."""

    start: Callable[[Array], tuple[Any, Any]]
    step: Callable[[Any, Array], tuple[Any, Any]]
    value: Callable[[Any], Array]


def direct(key: Array, *, dim: int, bits: int) -> Coder:
    """Code each step alone."""
    quantizer = turboquant.mse(key, dim=dim, bits=bits, scale="least_squares")
    return Coder(
        start=lambda x: (quantizers.quantize(quantizer, x),) * 2,
        step=lambda _, x: (quantizers.quantize(quantizer, x),) * 2,
        value=lambda code: quantizers.dequantize(quantizer, code),
    )


def coders() -> Iterator[tuple[str, Callable[..., Coder]]]:
    """Find the methods."""
    yield "direct", direct
    for found in pkgutil.iter_modules(methods.__path__):
        module = importlib.import_module(f"{methods.__name__}.{found.name}")
        make = getattr(module, "stream", None)
        if make is not None and {"dim", "bits"} <= set(inspect.signature(make).parameters):
            yield found.name, functools.partial(streamed, make)


@functools.cache
def pieces() -> tuple[Any, Any]:
    """Give the module of streams and its compiled decoder: one for all, so that it compiles once for each shape."""
    streams = importlib.import_module("jaxquant.streams")
    return streams, jax.jit(streams.value)


def streamed(make: Callable[..., Any], key: Array, *, dim: int, bits: int) -> Coder:
    """Wrap a `jaxquant.streams.Stream`."""
    streams, value = pieces()
    stream = make(key, dim=dim, bits=bits)
    return Coder(
        start=lambda x: streams.start(stream, x),
        step=lambda state, x: streams.step(stream, state, x),
        value=lambda state: value(stream, state),
    )


def walk(key: Array, *, share: float, steps: int, shape: tuple[int, ...] = (2, 4, 64, 64)) -> Steps:
    """Let unit-variance vectors move by a share of their length at every step, and keep their length on average."""
    first, rest = jax.random.split(key)
    moves = jax.random.normal(rest, (steps - 1, *shape))
    keep = 1 - share**2 / 2  # |x' - x|² = 2 (1 - keep) |x|²

    def move(x: Array, noise: Array) -> tuple[Array, Array]:
        x = keep * x + (1 - keep**2) ** 0.5 * noise
        return x, x

    start = jax.random.normal(first, shape)
    return jnp.concatenate([start[None], jax.lax.scan(move, start, moves)[1]])


def smooth(key: Array, *, share: float, steps: int, shape: tuple[int, ...] = (2, 4, 64, 64)) -> Steps:
    """Turn each vector in a plane of its own, by `share` radians at a step on average."""
    keys = jax.random.split(key, 3)
    a, b = (jax.random.normal(each, shape) for each in keys[:2])
    pace = share * jax.random.uniform(keys[2], (*shape[:-1], 1), minval=0.5, maxval=1.5)
    angle = jnp.arange(steps).astype(jnp.float32).reshape(-1, 1, 1, 1, 1) * pace
    return jnp.cos(angle) * a + jnp.sin(angle) * b


def transformer(key: Array, *, steps: int, train: int) -> dict[str, Steps]:
    """Sample two guided pictures and keep what attention reads in every layer, heads first."""
    model, losses = shapes.train(key, steps=train)
    print(f"loss of the transformer: {losses[:10].mean():.3f} -> {losses[-10:].mean():.3f}", flush=True)

    def velocity(state: Any, x: Array, time: Array, label: Array) -> tuple[Any, Array]:
        index, held = state
        seen = []

        def tap(layer: int, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
            seen.append(jnp.swapaxes(jnp.stack([k, v]), 2, 3))
            return q, k, v

        out = model(x, time, label, tap=tap)
        return (index + 1, held.at[index].set(jnp.stack(seen))), out

    noise = jax.random.normal(jax.random.key(7), (2, 16, 16, 1))
    # [steps, layers, keys or values, two pictures with and without their class, heads, tokens, dim]
    start = (jnp.int32(0), jnp.zeros((steps, 3, 2, 4, 3, 64, 32)))
    run = jax.jit(lambda: flow.sample(velocity, start, noise, jnp.array([0, 3]), none=5, steps=steps, scale=2.0))
    (_, held), _ = run()
    both = jnp.moveaxis(held, 2, 0)
    return {f"DiT {name}": x.reshape(steps, -1, *x.shape[3:]) for name, x in zip(("keys", "values"), both, strict=True)}


def nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def follow(coder: Coder, x: Steps) -> tuple[float, float, float]:
    """Give the error, and the bytes sent and held."""
    state, payload = coder.start(x[0])
    sent, errors = [nbytes(payload)], []
    for i in range(len(x)):
        if i:
            state, payload = coder.step(state, x[i])
            sent.append(nbytes(payload))
        errors.append(float(jnp.sum(jnp.square(coder.value(state) - x[i])) / jnp.sum(jnp.square(x[i]))))
    vectors = x[0].size // x.shape[-1]
    return float(np.mean(errors)), float(np.mean(sent)) / vectors, nbytes(state) / vectors


def costs(each: dict[str, Coder], x: Steps, repeats: int = 9) -> dict[str, tuple[float, float]]:
    """Give each coder's median seconds of a step and of decoding."""
    states = {name: coder.start(x[0])[0] for name, coder in each.items()}
    taken: dict[str, list[list[float]]] = {name: [[], []] for name in each}
    for _ in range(repeats):
        for name, coder in each.items():
            for kind in (0, 1):
                start = time.process_time()
                jax.block_until_ready(coder.value(states[name]) if kind else coder.step(states[name], x[1]))
                taken[name][kind].append(time.process_time() - start)
    return {name: (float(np.median(a[1:])), float(np.median(b[1:]))) for name, (a, b) in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--train", type=int, default=300)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    tensors = transformer(jax.random.key(3), steps=options.steps, train=options.train)
    for share in (0.05, 0.2, 0.6, 2**0.5):
        tensors[f"walk {share:.2g}"] = walk(jax.random.key(1), share=share, steps=options.steps)
    tensors["smooth 0.1"] = smooth(jax.random.key(2), share=0.1, steps=options.steps)
    table = []
    if not options.json:
        print("| stream, moves | bits | method | error | direct / it | bytes sent | held | encode | decode |")
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for name, x in tensors.items():
        moved = float(jnp.sum(jnp.square(x[1:] - x[:-1])) / jnp.sum(jnp.square(x[1:]))) ** 0.5
        for bits in options.bits:
            each = {title: make(jax.random.key(0), dim=x.shape[-1], bits=bits) for title, make in coders()}
            found = {title: follow(coder, x) for title, coder in each.items()}
            taken = costs(each, x)
            for title, (error, sent, held) in found.items():
                encode, decode = (t / d for t, d in zip(taken[title], taken["direct"], strict=True))
                gain = found["direct"][0] / error
                table.append({
                    "stream": name, "moved": moved, "bits": bits, "method": title, "error": error, "gain": gain,
                    "sent": sent, "held": held, "encode": encode, "decode": decode,
                })  # fmt: skip
                if not options.json:
                    print(
                        f"| {name}, {moved:.2f} | {bits} | {title} | {error:.5f} | {gain:.2f} "
                        f"| {sent:.1f} | {held:.1f} | {encode:.2f} | {decode:.2f} |",
                        flush=True,
                    )
    if options.json:
        print(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
