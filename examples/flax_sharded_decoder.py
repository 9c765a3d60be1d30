"""A decoder in the style of MaxText and Tunix over a packed cache, sharded over rows and heads.

    python examples/flax_sharded_decoder.py

Weights are annotated with axes of the mesh, layers are stacked and scanned, tensors are [batch, tokens, heads, dim].
The cache is the carry of the scan, with the layer as a traced index: one compiled body for all layers. On a CPU four
devices are simulated.
"""

import os
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant import attention, cache, sharding
from jaxquant.cache import KVCache
from jaxquant.methods import turboquant
from jaxquant.models.rope import Rope, rotate

VOCABULARY, WIDTH, HEADS, KV_HEADS, DIM, LAYERS, BATCH, CAPACITY = 256, 128, 4, 2, 32, 4, 4, 128


def kernel(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    """Draw a weight and say which axis of the mesh splits which of its own."""
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), axes)
    return nnx.Param(init(rngs.params(), shape))


class Layer(nnx.Module):
    """Attention over the cache, and a gated block; heads and the wide axis lie along `model`."""

    def __init__(self, rngs: nnx.Rngs):
        self.q = kernel(rngs, (WIDTH, HEADS, DIM), (None, "model", None))
        self.k = kernel(rngs, (WIDTH, KV_HEADS, DIM), (None, "model", None))
        self.v = kernel(rngs, (WIDTH, KV_HEADS, DIM), (None, "model", None))
        self.o = kernel(rngs, (HEADS, DIM, WIDTH), ("model", None, None))
        self.up = kernel(rngs, (WIDTH, 2, 3 * WIDTH), (None, None, "model"))
        self.down = kernel(rngs, (3 * WIDTH, WIDTH), ("model", None))

    def __call__(
        self, x: jax.Array, positions: jax.Array, held: KVCache, layer: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        y = normalized(x)
        q, k, v = (jnp.einsum("btw,whd->bthd", y, w[...]) for w in (self.q, self.k, self.v))
        q, k = (rotate(z, positions, Rope(theta=10_000.0)) for z in (q, k))
        q, k, v = (jax.lax.with_sharding_constraint(z, P("data", None, "model", None)) for z in (q, k, v))
        out, _, held = attention.prefill_attention(q, k, v, held, layer)
        x = x + jnp.einsum("bthd,hdw->btw", out, self.o[...])
        gate, wide = jnp.moveaxis(jnp.einsum("btw,wgn->btgn", normalized(x), self.up[...]), 2, 0)
        return x + jnp.einsum("btn,nw->btw", jax.nn.silu(gate) * wide, self.down[...]), held


class Decoder(nnx.Module):
    """Stacked layers between an embedding and its transpose."""

    def __init__(self, rngs: nnx.Rngs):
        self.embedding = kernel(rngs, (VOCABULARY, WIDTH), (None, None))
        self.layers = nnx.vmap(Layer, in_axes=0, transform_metadata={nnx.PARTITION_NAME: None})(rngs.split(LAYERS))

    def __call__(self, ids: jax.Array, held: KVCache) -> tuple[jax.Array, KVCache]:
        graph, weights = nnx.split(self.layers)
        x = self.embedding[...][ids]
        positions = held.length[0][:, None] + jnp.arange(ids.shape[1], dtype=jnp.int32)

        def body(carry: tuple[jax.Array, KVCache], each: tuple) -> tuple[tuple[jax.Array, KVCache], None]:
            x, held = carry
            return nnx.merge(graph, each[1])(x, positions, held, each[0]), None

        (x, held), _ = jax.lax.scan(body, (x, held), (jnp.arange(LAYERS, dtype=jnp.int32), weights))
        return normalized(x[:, -1]) @ self.embedding[...].T, held


def normalized(x: jax.Array) -> jax.Array:
    """Divide by the root mean square."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def continued(devices: Sequence[Any], prompt: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Continue a prompt on some devices; return the tokens and the last logits."""
    mesh = Mesh(np.array(devices).reshape(-1, min(2, len(devices))), ("data", "model"))
    keys, values = turboquant.kv(jax.random.key(0), dim=DIM, bits_k=4, bits_v=4)
    empty = cache.init(
        keys, values, layers=LAYERS, batch=BATCH, kv_heads=KV_HEADS, capacity=CAPACITY, sinks=4, window=16
    )
    with jax.set_mesh(mesh):
        graph, weights = nnx.split(Decoder(nnx.Rngs(0)))  # placed as annotated
        held = jax.device_put(empty, sharding.shardings(sharding.Layout(mesh, batch="data", kv_heads="model"), empty))

        @jax.jit
        def step(weights: nnx.State, ids: jax.Array, held: KVCache) -> tuple[jax.Array, jax.Array, KVCache]:
            logits, held = nnx.merge(graph, weights)(ids, held)
            return jnp.argmax(logits, axis=-1)[:, None], logits, held

        ids, logits, held = step(weights, jax.device_put(prompt, NamedSharding(mesh, P("data"))), held)
        tokens = [ids]
        for _ in range(16):
            ids, logits, held = step(weights, ids, held)
            tokens.append(ids)
    codes = held.stacks[0].keys.codes.codes
    here = codes.addressable_shards[0].data.nbytes
    print(f"{len(devices)} devices: each holds {here:,} of the {codes.nbytes:,} bytes of the keys' codes")
    assert here * len(devices) == codes.nbytes
    return np.concatenate(tokens, axis=1), np.asarray(logits)


def main() -> None:
    """Continue four rows on four devices, and check that one device gives the same."""
    prompt = jax.random.randint(jax.random.key(1), (BATCH, 48), 0, VOCABULARY)
    (four, logits), (one, expected) = (continued(jax.devices()[:count], prompt) for count in (4, 1))
    print(f"{(four == one).mean():.1%} of the tokens alike; logits differ by {np.abs(logits - expected).max():.1e}")
    assert (four == one).mean() > 0.9, "sums in another order may decide a near tie, not more"


if __name__ == "__main__":
    main()
