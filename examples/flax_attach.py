"""A packed cache in your own Flax NNX model, which knows nothing of jaxquant: `attach` changes its attention.

python examples/flax_attach.py
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxquant import cache
from jaxquant.interop import flax
from jaxquant.methods import turboquant

VOCABULARY, WIDTH, HEADS, KV_HEADS, LAYERS, CAPACITY = 96, 128, 4, 2, 3, 256


class Block(nnx.Module):
    """Attention and a feed-forward block around the residual stream."""

    def __init__(self, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, num_kv_heads=KV_HEADS, decode=False, rngs=rngs)
        self.wide, self.narrow = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norms[0](x), is_causal=True)
        return x + self.narrow(jax.nn.gelu(self.wide(self.norms[1](x))))


class Model(nnx.Module):
    """A decoder with learned positions, written for training: it reads a whole text at once."""

    def __init__(self, rngs: nnx.Rngs):
        self.tokens, self.positions = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs), nnx.Embed(CAPACITY, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])

    def __call__(self, ids: jax.Array, start: int | jax.Array = 0) -> jax.Array:
        x = self.tokens(ids) + self.positions(start + jnp.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.tokens.attend(x)


# The recipe: quantizers, a cache for the model's sizes, and a model that uses it.
def packed(model: Model, batch: int) -> Model:
    """Give the model a packed cache: 4 bits a number, the newest 32 tokens exact."""
    keys, values = turboquant.kv(jax.random.key(0), dim=WIDTH // HEADS, bits_k=4, bits_v=4)
    held = cache.init(
        keys, values, layers=LAYERS, batch=batch, kv_heads=KV_HEADS, capacity=CAPACITY, sinks=4, window=32
    )
    return flax.attach(model, held)


@nnx.jit(donate_argnums=0)
def step(model: Model, ids: jax.Array) -> jax.Array:
    """Read tokens behind those that the cache holds, and choose the next one."""
    return jnp.argmax(model(ids, flax.held(model).length[0, 0])[:, -1], axis=-1)[:, None]


def main() -> None:
    """Continue two rows, and compare the logits of the last token with those of the model without a cache."""
    model = Model(nnx.Rngs(0))
    prompt = jax.random.randint(jax.random.key(1), (2, 100), 0, VOCABULARY)
    serving = packed(model, batch=2)
    ids = [prompt, step(serving, prompt)]
    for _ in range(20):
        ids.append(step(serving, ids[-1]))
    held = flax.held(serving)
    print(f"{int(held.length[0, 0])} tokens held, {held.bytes_per_token:.1f} bytes a token and kv head; 16 bits: 128")

    again = packed(model, batch=2)
    text = jnp.concatenate(ids, axis=1)
    exact, coded = (each(text)[:, -1] for each in (model, again))
    error = jnp.linalg.norm(coded - exact) / jnp.linalg.norm(exact)
    print(f"logits of the last token differ by {error:.1%}")
    assert 0 < error < 0.2


if __name__ == "__main__":
    main()
