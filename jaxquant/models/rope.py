"""Rotary position embeddings, rotating the first half of a head against the second as Hugging Face weights expect.

References: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv:2104.09864;
the "llama3" rule is section 3.2 of "The Llama 3 Herd of Models", arXiv:2407.21783, with the released constants.
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Say how fast each pair of coordinates turns.

    Attributes:
        theta: base of the geometric sequence of wavelengths.
        scaling: "default" leaves it, "linear" slows every pair by `factor`, "llama3" only the pairs whose
            wavelength, in tokens, is long compared with `original_positions`.
        factor: how many times longer the context became.
        low_frequency_factor: wavelengths above `original_positions / low_frequency_factor` are slowed fully.
        high_frequency_factor: wavelengths below `original_positions / high_frequency_factor` are left alone.
        original_positions: context length, in tokens, before the extension.
    """

    theta: float = 10_000.0
    scaling: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_positions: int = 8192

    def frequencies(self, dim: int) -> Float[np.ndarray, " half"]:
        """Return radians per token of each of the `dim / 2` pairs, rounded to float32 after each step.

        So do the implementations that models are trained with: of 512 tokens, a frequency that is one unit in the last
        place away turns the fastest pairs 3e-5 radians too far.

        Args:
            dim: head dimension, even.

        >>> Rope(theta=100.0).frequencies(4).tolist()
        [1.0, 0.10000000149011612]
        """
        exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
        wavelength = (self.theta ** exponent.astype(np.float64)).astype(np.float32)
        frequency = np.float32(1) / wavelength
        if self.scaling == "linear":
            frequency = frequency / np.float32(self.factor)
        elif self.scaling == "llama3":
            turns = self.original_positions * frequency / np.float32(2 * math.pi)
            keep = (turns - self.low_frequency_factor) / (self.high_frequency_factor - self.low_frequency_factor)
            keep = np.clip(keep, 0.0, 1.0)
            frequency = (1 - keep) * (frequency / np.float32(self.factor)) + keep * frequency
        return frequency.astype(np.float32)


def rotate(
    x: Float[Array, "batch tokens heads dim"], positions: Int[Array, "batch tokens"], rope: Rope
) -> Float[Array, "batch tokens heads dim"]:
    """Rotate queries or keys to their positions; angles are in float32 whatever the dtype of `x`.

    Args:
        x: queries or keys.
        positions: position of each token in its row, from 0.
        rope: the speeds.

    Example:
        >>> x = jnp.ones((1, 2, 1, 2))
        >>> [f"{value:.2f}" for value in rotate(x, jnp.array([[0, 1]]), Rope())[0, 1, 0]]
        ['-0.30', '1.38']
    """
    angles = positions[..., None].astype(jnp.float32) * rope.frequencies(x.shape[-1])
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1).astype(x.dtype)
