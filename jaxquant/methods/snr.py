"""Score the steps of a diffusion model by their signal-to-noise ratio: noisy steps first.

    score(step) = 1 / (1 + snr(step)),    snr = alpha_bar / (1 - alpha_bar).

The score is the same for all tokens of a step. A schedule is an array, one number for each step in the order they run.

References:
    A. Nichol, P. Dhariwal, "Improved denoising diffusion probabilistic models", arXiv:2102.09672, eq. 17 (the cosine
    schedule); T. Hang, S. Gu, C. Li, J. Bao, D. Chen, H. Hu, X. Geng, B. Guo, "Efficient diffusion training via Min-SNR
    weighting strategy", arXiv:2303.09556 (weights by the ratio). That noisy steps deserve more bits is tqai's
    assumption and in neither paper: measure before you believe it.

Differs from tqai: the ratio comes from a schedule and not from the caller's context, where nobody puts it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxquant._pytree import pytree
from jaxquant.methods import delta
from jaxquant.protocols import Context
from jaxquant.streams import Stream


@pytree
class Noise:
    """Share of noise in each step.

    Attributes:
        snr: of each step; the last one stands for all that follow.
    """

    snr: Float[Array, " steps"]

    def init(self, batch: int, kv_heads: int, dim: int, /) -> None:
        """Hold nothing."""

    def score(
        self, state: Any, x: Float[Array, "batch kv_heads tokens dim"], ctx: Context, /
    ) -> tuple[Any, Float[Array, "batch kv_heads tokens"]]:
        """Look the step up."""
        snr = jnp.take(self.snr, ctx.step, mode="clip").astype(jnp.float32)
        return state, jnp.broadcast_to((1.0 / (1.0 + snr))[:, None, None], x.shape[:3])


def cosine(steps: int, *, offset: float = 0.008) -> Float[Array, " steps"]:
    """Give the ratios of the cosine schedule, from noise to signal.

    Args:
        steps: of the sampler.
        offset: s of the paper's eq. 17.

    Example:
        >>> [round(float(ratio), 3) for ratio in cosine(3)[:2]]
        [0.0, 0.975]
    """
    time = 1.0 - jnp.arange(steps, dtype=jnp.float32) / max(steps - 1, 1)
    angle = (time + offset) / (1 + offset) * jnp.pi / 2
    return jnp.maximum(jnp.cos(angle), 0.0) ** 2 / jnp.maximum(jnp.sin(angle) ** 2, 1e-10)


def linear(steps: int, *, first: float = 1e-4, last: float = 0.02, trained: int = 1000) -> Float[Array, " steps"]:
    """Give the ratios of the schedule with linear variances, from noise to signal.

    Args:
        steps: of the sampler, evenly spaced among those trained.
        first: variance added by the first trained step.
        last: variance added by the last.
        trained: steps of training.

    Example:
        >>> ratios = linear(5)
        >>> bool((ratios[1:] > ratios[:-1]).all())
        True
    """
    signal = jnp.cumprod(1.0 - jnp.linspace(first, last, trained))
    chosen = jnp.round(jnp.linspace(trained - 1, 0, steps)).astype(jnp.int32)
    return signal[chosen] / (1.0 - signal[chosen])


def stream(key: PRNGKeyArray, *, dim: int, bits: int, steps: int = 50, threshold: float = 0.9) -> Stream:
    """Build delta's stream, whose noisiest steps are coded whole.

    Args:
        key: of the rotation.
        dim: of the vectors.
        bits: a coordinate.
        steps: of the sampler, with the cosine schedule.
        threshold: share of noise from which a step is coded whole.

    Example:
        >>> stream(jax.random.key(0), dim=64, bits=4).scorer.snr.shape
        (50,)
    """
    base = delta.stream(key, dim=dim, bits=bits)
    return dataclasses.replace(base, scorer=Noise(snr=cosine(steps)), threshold=jnp.float32(threshold))


EXAMPLES = (lambda: Noise(snr=cosine(8)), lambda: stream(jax.random.key(0), dim=64, bits=4, steps=8))
