"""A small diffusion transformer: patches, adaptive normalisation by time and class, full self-attention.

The test bed for everything here. Its shape is the real ones', its size is not.

References:
    W. Peebles, S. Xie, "Scalable diffusion models with transformers", arXiv:2212.09748 (adaLN-Zero blocks).

Differs from the paper: no learned variance; pixels instead of latents; root-mean-square normalisation of queries and
keys, as later models have.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

Around = Callable[[int, Callable[[Array], Array], Array], Array]
"""Runs a layer's attention: layer, attention with its projections, and its input."""

Tap = Callable[[int, Array, Array, Array], tuple[Array, Array, Array]]
"""Sees, and may replace, what attention reads: layer, queries, keys and values, [batch, tokens, heads, dim] each."""


class DiT(nnx.Module):
    """Predict the velocity of a picture at a time, given its class.

    Args:
        side: height and width of the square pictures, in pixels.
        patch: height and width of a token.
        colours: channels.
        classes: numbers of classes; class `classes` is no class, for guidance.
        hidden: width of the residual stream.
        heads: of attention.
        layers: blocks.
        rngs: keys for the initial weights.

    Example:
        >>> model = DiT(side=8, classes=3, hidden=32, heads=2, layers=1, rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((2, 8, 8, 1)), jnp.array([0.0, 0.5]), jnp.array([0, 3])).shape
        (2, 8, 8, 1)
    """

    def __init__(
        self,
        *,
        side: int,
        patch: int = 2,
        colours: int = 1,
        classes: int,
        hidden: int,
        heads: int,
        layers: int,
        rngs: nnx.Rngs,
    ):
        self.side, self.patch, self.classes = side, patch, classes
        tokens = (side // patch) ** 2
        inputs = patch * patch * colours
        self.embed = nnx.Linear(inputs, hidden, rngs=rngs)
        self.place = nnx.Param(0.02 * jax.random.normal(rngs.params(), (tokens, hidden)))
        self.time = nnx.Linear(2 * _WAVES, hidden, rngs=rngs)
        self.label = nnx.Embed(classes + 1, hidden, rngs=rngs)
        self.blocks = nnx.List([Block(hidden, heads, layer, rngs=rngs) for layer in range(layers)])
        self.modulate = nnx.Linear(hidden, 2 * hidden, kernel_init=nnx.initializers.zeros, rngs=rngs)
        self.out = nnx.Linear(hidden, inputs, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch side side colours"],
        time: Float[Array, " batch"],
        label: Int[Array, " batch"],
        *,
        around: Around | None = None,
        tap: Tap | None = None,
    ) -> Float[Array, "batch side side colours"]:
        """Run the blocks.

        Args:
            x: pictures.
            time: 0 is noise, 1 the picture.
            label: class of each; `classes` for none.
            around: runs each layer's attention, for sharing it.
            tap: called in every layer with its queries, keys and values, for compressing them.
        """
        batch, side, _, colours = x.shape
        cut = x.reshape(batch, side // self.patch, self.patch, side // self.patch, self.patch, colours)
        tokens = jnp.swapaxes(cut, 2, 3).reshape(batch, -1, self.patch * self.patch * colours)
        h = self.embed(tokens) + self.place[...]
        condition = nnx.silu(self.time(_waves(time)) + self.label(label))
        for block in self.blocks:
            h = block(h, condition, around, tap)
        shift, factor = jnp.split(self.modulate(condition)[:, None], 2, axis=-1)
        tokens = self.out(_normalized(h) * (1 + factor) + shift)
        cut = tokens.reshape(batch, side // self.patch, side // self.patch, self.patch, self.patch, colours)
        return jnp.swapaxes(cut, 2, 3).reshape(x.shape)


class Block(nnx.Module):
    """Attention and a feed-forward block, each shifted, scaled and gated by the condition."""

    def __init__(self, hidden: int, heads: int, layer: int, *, rngs: nnx.Rngs):
        self.layer, self.heads = layer, heads
        self.qkv = nnx.Linear(hidden, 3 * hidden, rngs=rngs)
        self.proj = nnx.Linear(hidden, hidden, rngs=rngs)
        self.up = nnx.Linear(hidden, 4 * hidden, rngs=rngs)
        self.down = nnx.Linear(4 * hidden, hidden, rngs=rngs)
        self.modulate = nnx.Linear(hidden, 6 * hidden, kernel_init=nnx.initializers.normal(0.02), rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch tokens hidden"],
        condition: Float[Array, "batch hidden"],
        around: Around | None,
        tap: Tap | None,
    ) -> Float[Array, "batch tokens hidden"]:
        """Add both to the residual stream."""
        parts = jnp.split(self.modulate(condition)[:, None], 6, axis=-1)
        shift, factor, gate, late_shift, late_factor, late_gate = parts

        def attend(x: Array) -> Array:
            return self.attend(x, tap)

        h = _normalized(x) * (1 + factor) + shift
        x = x + gate * (attend(h) if around is None else around(self.layer, attend, h))
        h = _normalized(x) * (1 + late_factor) + late_shift
        return x + late_gate * self.down(nnx.gelu(self.up(h)))

    def attend(self, x: Float[Array, "batch tokens hidden"], tap: Tap | None) -> Float[Array, "batch tokens hidden"]:
        """Attend from every token to all, projections included."""
        batch, tokens, hidden = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(batch, tokens, 3, self.heads, -1), 2, 0)
        q, k = _normalized(q), _normalized(k)
        if tap is not None:
            q, k, v = tap(self.layer, q, k, v)
        out = jax.nn.dot_product_attention(q, k, v)
        return self.proj(out.reshape(batch, tokens, hidden))


_WAVES = 32


def _waves(time: Float[Array, " batch"]) -> Float[Array, "batch waves"]:
    frequency = jnp.exp(jnp.linspace(0, jnp.log(500.0), _WAVES))
    angle = time[:, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def _normalized(x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
