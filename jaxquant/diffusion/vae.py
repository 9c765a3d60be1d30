"""A small decoder of latent videos: convolutions, causal in time, that double height and width twice.

The test bed for tiled decoding: what it sees is known to the latent, and its state in time is explicit. Pictures are
videos of one frame.
"""

import itertools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

REACH = 2
"""Latents to each side on which a pixel depends: 1 by the first convolution, 1/2 by the second, 1/4 by the third."""

State = tuple[Array, ...]


class Decoder(nnx.Module):
    """From latents to pixels.

    Args:
        channels: of latents.
        hidden: channels inside.
        colours: channels of pixels.
        rngs: keys for the weights.

    Example:
        >>> decoder = Decoder(channels=4, hidden=8, rngs=nnx.Rngs(0))
        >>> decoder(jnp.zeros((1, 5, 6, 7, 4))).shape
        (1, 5, 24, 28, 3)
    """

    def __init__(self, *, channels: int, hidden: int, colours: int = 3, rngs: nnx.Rngs):
        sizes = (channels, hidden, hidden, colours)
        self.layers = nnx.List(
            [
                nnx.Conv(before, after, (3, 3, 3), padding=((0, 0), (1, 1), (1, 1)), rngs=rngs)
                for before, after in itertools.pairwise(sizes)
            ]
        )

    def init(self, latents: Float[Array, "batch frames height width channels"]) -> State:
        """Make the state before the first frame: two blank frames for every convolution."""
        batch, _, height, width, _ = latents.shape
        return tuple(
            jnp.zeros((batch, 2, height * 2**i, width * 2**i, layer.in_features), latents.dtype)
            for i, layer in enumerate(self.layers)
        )

    def step(
        self, state: State, latents: Float[Array, "batch frames height width channels"]
    ) -> tuple[State, Float[Array, "batch frames rows columns colours"]]:
        """Decode frames that follow those of the state."""
        after, x = [], latents
        for i, (layer, past) in enumerate(zip(self.layers, state, strict=True)):
            if i:
                x = jnp.repeat(jnp.repeat(nnx.silu(x), 2, axis=2), 2, axis=3)
            x = jnp.concatenate([past, x], axis=1)
            after.append(x[:, x.shape[1] - 2 :])
            x = layer(x)
        return tuple(after), x

    def __call__(
        self, latents: Float[Array, "batch frames height width channels"]
    ) -> Float[Array, "batch frames rows columns colours"]:
        """Decode a whole video at once."""
        return self.step(self.init(latents), latents)[1]
