"""Decode over a cache whose old codes are in host memory: time of a step beside that of its copies and attention.

    python tests/bench/bench_offload.py [--context 1048576] [--segment 16384] [--layers 2] [--json FILE]

Shapes of an 8B model (32 heads, 8 kv heads of 128), one row, K4/V2. The newest tokens are on the device, and all others
in pinned host memory, where the last segment is spilled by `offload.spill`. A step appends a token to every layer and
attends. Beside it: the same segments fetched and not read, one copy of all of them, and attention over the whole cache
on the device, whose answer must be that of the step (the largest difference over the largest number; also shown: that
to an answer with the segments in another order of heads). `hidden` is the share of the shorter of fetching and
attending that does not add to the step. Exit status 1 where the answers differ. Takes about half a minute on an H200.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hashed_codes
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import SingleDeviceSharding

from jaxquant import attention, cache, offload
from jaxquant._stacks import KVCache
from jaxquant.methods import turboquant

HEADS, KV_HEADS, DIM = 32, 8, 128
AGREE = 2e-3  # weights of a softmax are halves in the kernels: 2**-10 each, and sums in another order
RUNS = 7


def timed(run: Callable[[], Any]) -> float:
    """Give the median seconds of a run."""
    jax.block_until_ready(run())
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def split(whole: KVCache, segment: int, count: int, hot: int) -> offload.OffloadedCache:
    """Hold the first `count` segments in host memory, and what follows on the device, with room for `hot` tokens."""
    stack, cut = whole.stacks[0], count * segment
    host = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")

    @jax.jit
    def far(leaf: jax.Array) -> jax.Array:
        layers, batch, heads = leaf.shape[:3]
        parts = leaf[:, :, :, :cut].reshape(layers, batch, heads, count, segment, *leaf.shape[4:])
        parts = jnp.moveaxis(parts, 3, 1)
        return jnp.pad(parts, [(0, 0), (0, 2), *[(0, 0)] * (parts.ndim - 2)])  # one to be spilled, one never read

    @jax.jit
    def near(leaf: jax.Array) -> jax.Array:
        kept = leaf[:, :, :, cut:][:, :, :, :hot]
        return jnp.pad(kept, [(0, 0)] * 3 + [(0, hot - kept.shape[3])] + [(0, 0)] * (leaf.ndim - 4))

    stores = (stack.keys, stack.values)
    cold = tuple(jax.tree.map(lambda leaf: jax.device_put(far(leaf), host), store.codes) for store in stores)
    keys, values = (dataclasses.replace(store, codes=jax.tree.map(near, store.codes)) for store in stores)
    rest = dataclasses.replace(
        whole, stacks=(dataclasses.replace(stack, keys=keys, values=values),), length=whole.length - cut
    )
    return offload.OffloadedCache(
        hot=jax.tree.map(jnp.copy, rest),  # what donates it must not take the quantizers of the whole cache
        cold=cold,
        spilled=jnp.full(whole.batch, count, jnp.int32),
        length=jnp.copy(whole.length),
    )


@functools.partial(jax.jit, donate_argnums=0)
def step(
    hot: KVCache, rest: tuple[Any, jax.Array, jax.Array], q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[KVCache, jax.Array]:
    """Append a token to every layer of an offloaded cache, and attend."""
    cold, spilled, length = rest
    held, out = offload.OffloadedCache(hot=hot, cold=cold, spilled=spilled, length=length), q
    for layer in range(hot.layers):
        out, _, held = held.attend(q + 0.001 * out, k, v, layer)
    return held.hot, out


@functools.partial(jax.jit, donate_argnums=0)
def step_on_device(whole: KVCache, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[KVCache, jax.Array]:
    """Do the same with a cache on the device."""
    out = q
    for layer in range(whole.layers):
        whole = cache.append(whole, layer, k, v)
        out = attention.decode_attention((q + 0.001 * out)[:, 0], whole, layer)[0][:, None]
    return whole, out


@jax.jit
def fetch(cold: Any, count: jax.Array) -> jax.Array:
    """Copy every segment of every layer to the device, and look at one number of each."""
    total = jnp.int32(0)
    for layer in range(jax.tree.leaves(cold)[0].shape[0]):

        def body(number: jax.Array, total: jax.Array, layer: int = layer) -> jax.Array:
            for far in jax.tree.leaves(cold):
                begin = tuple(jnp.asarray(i, jnp.int32) for i in (layer, number, *(0,) * (far.ndim - 2)))
                part = lax.dynamic_slice(far, begin, (1, 1, *far.shape[2:]))
                part = lax.optimization_barrier(jax.device_put(part, jax.memory.Space.Device))
                total += part.reshape(-1)[0].astype(jnp.int32)
            return total

        total = lax.fori_loop(0, count, body, total)
    return total


def repeated(run: Callable[..., tuple[KVCache, jax.Array]], held: KVCache, *rest: Any) -> tuple[float, jax.Array]:
    """Time steps that each forget the token of the one before, and give the first answer."""
    length = np.asarray(held.length)

    def once() -> jax.Array:
        nonlocal held
        held, out = run(held, *rest)
        held = dataclasses.replace(held, length=jnp.asarray(length))
        return out

    first = once()
    return timed(once), first


def difference(got: jax.Array, want: jax.Array) -> float:
    """Give the largest difference over the largest number."""
    return float(jnp.max(jnp.abs(got - want)) / jnp.max(jnp.abs(want)))


def main() -> int:
    """Print a line for each time."""
    tiny = jax.default_backend() != "gpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=4096 if tiny else 1_048_576)
    parser.add_argument("--segment", type=int, default=512 if tiny else 16_384)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    began = time.perf_counter()
    context, segment = arguments.context, arguments.segment
    hot = 2 * segment
    count = (context - hot) // segment  # in host memory before the last one is spilled
    pair = turboquant.kv(jax.random.key(0), dim=DIM, bits_k=4, bits_v=2)
    sizes = {"layers": arguments.layers, "batch": 1, "kv_heads": KV_HEADS, "capacity": context}
    whole = hashed_codes.full(lambda: cache.init(*pair, **sizes))
    whole = dataclasses.replace(whole, length=jnp.full_like(whole.length, context - 1))
    held = jax.block_until_ready(split(whole, segment, count, hot))

    moved = held.host_nbytes // (count + 2)  # bytes of a segment of all layers
    spilling = time.perf_counter()
    held = jax.block_until_ready(offload.spill(held))
    first_spill = time.perf_counter() - spilling
    assert int(held.spilled[0]) == count + 1, "nothing was spilled"
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(held.cold)}

    q = jax.random.normal(jax.random.key(1), (1, 1, HEADS, DIM))
    k, v = (jax.random.normal(jax.random.key(i), (1, 1, KV_HEADS, DIM)) for i in (2, 3))
    rest = (held.cold, held.spilled, held.length)
    nbytes, near = moved * (count + 1), held.hot.nbytes
    flipped = jax.tree.map(lambda leaf: jax.device_put(np.flip(np.asarray(leaf), axis=3), leaf.sharding), held.cold)
    spare = jax.tree.map(jnp.copy, held.hot)
    misread = step(spare, (flipped, held.spilled, held.length), q, k, v)[1]
    del flipped, spare
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {arguments.layers} layers of 1 x {context:,} tokens, "
        f"{nbytes / 2**20:,.1f} MiB in {', '.join(sorted(kinds))} and {near / 2**20:,.1f} on the device",
        flush=True,
    )
    on_device, want = repeated(step_on_device, whole, q, k, v)
    spilled, got = repeated(step, held.hot, rest, q, k, v)
    fetching = timed(lambda: fetch(held.cold, jnp.int32(count + 1)))
    device = SingleDeviceSharding(jax.devices()[0], memory_kind="device")
    copying = timed(lambda: jax.device_put(held.cold, device))
    copied = held.host_nbytes
    off, wrong = difference(got, want), difference(misread, want)
    hidden = (fetching + on_device - spilled) / min(fetching, on_device)
    results = {
        "device": jax.devices()[0].device_kind,
        "context": context,
        "segment": segment,
        "layers": arguments.layers,
        "host_bytes": nbytes,
        "device_bytes": near,
        "step_ms": 1e3 * spilled,
        "step_on_device_ms": 1e3 * on_device,
        "fetching_ms": 1e3 * fetching,
        "fetching_gbs": nbytes / fetching / 1e9,
        "step_gbs": nbytes / spilled / 1e9,
        "one_copy_gbs": copied / copying / 1e9,
        "hidden": hidden,
        "first_spill_ms": 1e3 * first_spill,
        "difference": off,
        "wrong_operand": wrong,
    }
    print(f"a step {1e3 * spilled:.2f} ms ({nbytes / spilled / 1e9:.1f} GB/s from the host)")
    print(f"fetching alone {1e3 * fetching:.2f} ms ({nbytes / fetching / 1e9:.1f} GB/s)")
    print(f"one copy of all {1e3 * copying:.2f} ms ({copied / copying / 1e9:.1f} GB/s)")
    shown = "" if tiny else f"; hidden {hidden:.0%}"  # a CPU copies nothing, since all its memory is the host's
    print(f"all on the device {1e3 * on_device:.2f} ms{shown}")
    print(f"the answers differ by {off:.1e} (with a wrong order of heads {wrong:.1e})")
    results["seconds"] = time.perf_counter() - began
    print(f"{results['seconds']:.0f} s in all")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results) + "\n")
    return int(off > AGREE or not wrong > AGREE)


if __name__ == "__main__":
    sys.exit(main())
