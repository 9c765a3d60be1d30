"""Watch the entropy of attention: raise or lower the threshold when it has shifted.

The monitor keeps the entropies of the last blocks in a ring. With r the relative shift of their newest few from all of
them, |mean(newest) - mean(all)| / mean(all), the threshold becomes `fallen` when the entropy fell by more than the
tolerance, since then few tokens matter and they should be kept well, `risen` when it rose by more, and the pipeline's
own otherwise.

References:
    S. Zhai, T. Likhomanenko, E. Littwin, D. Busbridge, J. Ramapuram, Y. Zhang, J. Gu, J. Susskind, "Stabilizing
    transformer training by preventing attention entropy collapse", arXiv:2303.06296, for the entropy of attention as a
    sign of instability. The rule for the threshold is in no paper; it is that of tqai's `stability` monitor.

Differs from tqai, where nothing calls the monitor and its threshold exists on no scorer: here the pipeline feeds it the
entropy of real attention weights and the strategy obeys the threshold.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxquant._pytree import pytree, static
from jaxquant.methods import palm
from jaxquant.pipeline import Pipeline
from jaxquant.protocols import Observation


@pytree
class Ring:
    """The newest entropies, one a block.

    Attributes:
        entropies: the entropy of block n in slot n % window.
        blocks: seen.
    """

    entropies: Float[Array, "batch window"]
    blocks: Int[Array, " batch"]


@pytree
class Stability:
    """Threshold by the shift of the entropy.

    Attributes:
        tolerance: relative shift that counts.
        fallen: threshold after a fall.
        risen: threshold after a rise.
        window: blocks held.
        newest: of them, how many are compared with all.
    """

    tolerance: float | Float[Array, ""] = 0.3
    fallen: float | Float[Array, ""] = 0.3
    risen: float | Float[Array, ""] = 0.6
    window: int = static(default=16)
    newest: int = static(default=4)

    def init(self, batch: int, kv_heads: int, dim: int, /) -> Ring:
        """Start without entropies."""
        return Ring(entropies=jnp.zeros((batch, self.window), jnp.float32), blocks=jnp.zeros(batch, jnp.int32))

    def observe(
        self, state: Ring, seen: Observation, threshold: Float[Array, " batch"], /
    ) -> tuple[Ring, Float[Array, " batch"]]:
        """Add an entropy and compare; the first one cannot have shifted."""
        slot = jnp.arange(self.window, dtype=jnp.int32)
        entropies = jnp.where(slot == (state.blocks % self.window)[:, None], seen.entropy[:, None], state.entropies)
        blocks = state.blocks + 1
        age = (blocks[:, None] - 1 - slot) % self.window

        def mean(most: int) -> Array:
            held = age < jnp.minimum(blocks, most)[:, None]
            return jnp.sum(jnp.where(held, entropies, 0.0), axis=1) / jnp.sum(held, axis=1, dtype=jnp.float32)

        shift = mean(self.newest) / jnp.maximum(mean(self.window), 1e-10) - 1.0
        steered = jnp.where(
            shift < -self.tolerance, self.fallen, jnp.where(shift > self.tolerance, self.risen, threshold)
        )
        return Ring(entropies=entropies, blocks=blocks), steered


def pipeline(
    key: PRNGKeyArray, *, dim: int, bits_k: int, bits_v: int, share: float = 0.25, block: int = 32
) -> Pipeline:
    """Build palm's pipeline with this monitor.

    Args:
        key: of the rotations.
        dim: of the vectors.
        bits_k: a coordinate of keys in the upper tier.
        bits_v: a coordinate of values in the upper tier.
        share: of the capacity that the upper tier has room for.
        block: tokens that are judged together.

    Example:
        >>> pipeline(jax.random.key(0), dim=64, bits_k=4, bits_v=4).monitor.window
        16
    """
    base = palm.pipeline(key, dim=dim, bits_k=bits_k, bits_v=bits_v, share=share, block=block)
    monitor = Stability(tolerance=jnp.float32(0.3), fallen=jnp.float32(0.3), risen=jnp.float32(0.6))
    return dataclasses.replace(base, monitor=monitor, threshold=jnp.float32(0.4))


EXAMPLES = (
    lambda: Stability(tolerance=jnp.float32(0.1), fallen=jnp.float32(0.3), risen=jnp.float32(0.6), window=4, newest=1),
    lambda: pipeline(jax.random.key(0), dim=64, bits_k=4, bits_v=4, block=4),
)
