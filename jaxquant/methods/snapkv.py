"""SnapKV: keep the tokens that the newest queries look at, and their neighbours.

The votes of the newest queries, the observation window, are the attention weights they give; a token's score is the
mean vote over itself and its neighbours, so that what is kept comes in runs.

References:
    Y. Li, Y. Huang, B. Yang, B. Venkitesh, A. Locatelli, H. Ye, T. Cai, P. Lewis, D. Chen, "SnapKV: LLM knows what you
    are looking for before generation", arXiv:2404.14469, section 4.

Differs from the paper: the selection is made each time a block leaves the exact window, not once at the end of the
prompt, so that it also works in long generations; the observation window fades exponentially with time constant
`observed` instead of ending; neighbours are tokens next to each other among those still kept.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxquant._pytree import pytree, static
from jaxquant.methods import h2o
from jaxquant.pipeline import Pipeline
from jaxquant.protocols import Context


@pytree
class Votes:
    """Attention from the newest queries, averaged over neighbouring tokens.

    Attributes:
        observed: queries after which a vote has fallen to 1 / e.
        pool: tokens averaged over, an odd number.
    """

    observed: float | Float[Array, ""] = 32.0
    pool: int = static(default=5)

    def init(self, batch: int, kv_heads: int, dim: int, /) -> None:
        """Hold nothing: the scores are all there is."""

    def score(
        self, state: None, x: Float[Array, "batch kv_heads tokens dim"], ctx: Context, /
    ) -> tuple[None, Float[Array, "batch kv_heads tokens"]]:
        """Give the votes until now."""
        return h2o.Mass().score(state, x, ctx)

    def attend(
        self,
        state: Any,
        scores: Float[Array, "batch kv_heads tokens"],
        weights: Float[Array, "batch kv_heads queries tokens"],
        queries: Float[Array, "batch kv_heads queries dim"],
        valid: Bool[Array, "batch queries"],
        /,
    ) -> tuple[Any, Float[Array, "batch kv_heads tokens"]]:
        """Let votes fade, and add the new ones: pooling is linear, so it may come first."""
        side = self.pool // 2
        padded = jnp.pad(weights, ((0, 0), (0, 0), (0, 0), (side, side)))
        pooled = sum(padded[..., i : i + weights.shape[-1]] for i in range(self.pool)) / self.pool
        mass = h2o.Mass(decay=jnp.exp(-1.0 / jnp.asarray(self.observed, jnp.float32)))
        return mass.attend(state, scores, pooled, queries, valid)  # pyright: ignore[reportArgumentType]


def pipeline(
    key: PRNGKeyArray, *, dim: int, bits_k: int, bits_v: int, keep: float = 0.5, observed: float = 32.0, block: int = 32
) -> Pipeline:
    """Build a pipeline that keeps a share of the tokens, coded with TurboQuant.

    Args:
        key: of the rotations.
        dim: of the vectors.
        bits_k: a coordinate of keys.
        bits_v: a coordinate of values.
        keep: share of the capacity that is kept.
        observed: see `Votes`.
        block: tokens that are judged together.

    Example:
        >>> pipeline(jax.random.key(0), dim=64, bits_k=4, bits_v=4).scorer.pool
        5
    """
    scorer = Votes(observed=jnp.float32(observed))
    return h2o.evicting(key, scorer, dim=dim, bits_k=bits_k, bits_v=bits_v, keep=keep, block=block)


EXAMPLES = (
    lambda: Votes(observed=jnp.float32(8.0), pool=3),
    lambda: pipeline(jax.random.key(0), dim=64, bits_k=4, bits_v=4, block=4),
)
