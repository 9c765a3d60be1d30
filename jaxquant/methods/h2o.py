"""H2O: keep the tokens that have received the most attention so far.

The score of a token is the sum of the attention weights it received from every query since it came, the mean over the
query heads that share its kv head. Each kv head keeps its own tokens; what is kept is coded by the pipeline's
quantizers, and `window` of the cache is the paper's local part.

References:
    Z. Zhang, Y. Sheng, T. Zhou, T. Chen, L. Zheng, R. Cai, Z. Song, Y. Tian, C. Ré, C. Barrett, Z. Wang, B. Chen, "H2O:
    Heavy-hitter oracle for efficient generative inference of large language models", arXiv:2306.14048, algorithm 1.

Differs from the paper: tokens are evicted a block at a time (`block=1` is the paper's greedy rule); prompts are evicted
while they are read, and not once at their end, so that a prompt's cache never exceeds the budget; tokens that stay are
coded.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxquant._pytree import pytree
from jaxquant.methods import turboquant
from jaxquant.pipeline import Pipeline
from jaxquant.protocols import Context, Scorer
from jaxquant.strategies import Evict


@pytree
class Mass:
    """Accumulated attention.

    Attributes:
        decay: what is left of a token's score after each later query; the paper's rule is 1, which forgets nothing.
    """

    decay: float | Float[Array, ""] = 1.0

    def init(self, batch: int, kv_heads: int, dim: int, /) -> None:
        """Hold nothing: the scores are all there is."""

    def score(
        self, state: None, x: Float[Array, "batch kv_heads tokens dim"], ctx: Context, /
    ) -> tuple[None, Float[Array, "batch kv_heads tokens"]]:
        """Give what was received until now."""
        return state, jnp.zeros(x.shape[:3], jnp.float32) if ctx.received is None else ctx.received

    def attend(
        self,
        state: Any,
        scores: Float[Array, "batch kv_heads tokens"],
        weights: Float[Array, "batch kv_heads queries tokens"],
        queries: Float[Array, "batch kv_heads queries dim"],
        valid: Bool[Array, "batch queries"],
        /,
    ) -> tuple[Any, Float[Array, "batch kv_heads tokens"]]:
        """Let scores decay once for each query, and add the weights, each decayed for the queries after it."""
        share, old = faded(self.decay, valid)
        return state, scores * old[:, None, None] + jnp.einsum("bn,bhnt->bht", share, weights, precision="highest")


def faded(
    decay: float | Float[Array, ""], valid: Bool[Array, "batch queries"]
) -> tuple[Float[Array, "batch queries"], Float[Array, " batch"]]:
    """Give what new queries count for, each decayed once for every later one, and what is left of all before them.

    Example:
        >>> faded(0.5, jnp.array([[True, True, False]]))
        (Array([[0.5, 1. , 0. ]], dtype=float32), Array([0.25], dtype=float32))
    """
    count = jnp.sum(valid, axis=1)
    later = jnp.maximum(count[:, None] - 1 - jnp.arange(valid.shape[1]), 0).astype(jnp.float32)
    return jnp.where(valid, jnp.power(decay, later), 0.0), jnp.power(decay, count.astype(jnp.float32))


def evicting(
    key: PRNGKeyArray, scorer: Scorer, *, dim: int, bits_k: int, bits_v: int, keep: float, block: int
) -> Pipeline:
    """Build a pipeline that keeps a share of the tokens, coded with TurboQuant, by anybody's scores.

    Args:
        key: of the rotations.
        scorer: says which tokens to keep.
        dim: of the vectors.
        bits_k: a coordinate of keys.
        bits_v: a coordinate of values.
        keep: share of the capacity that is kept.
        block: tokens that are judged together.
    """
    keys, values = turboquant.kv(key, dim=dim, bits_k=bits_k, bits_v=bits_v)
    return Pipeline(keys=keys, values=values, strategy=Evict(keep=keep), scorer=scorer, block=block)


def pipeline(
    key: PRNGKeyArray, *, dim: int, bits_k: int, bits_v: int, keep: float = 0.5, decay: float = 1.0, block: int = 32
) -> Pipeline:
    """Build a pipeline that keeps a share of the tokens, coded with TurboQuant.

    Args:
        key: of the rotations.
        dim: of the vectors.
        bits_k: a coordinate of keys.
        bits_v: a coordinate of values.
        keep: share of the capacity that is kept.
        decay: see `Mass`.
        block: tokens that are judged together.

    Example:
        >>> pipeline(jax.random.key(0), dim=64, bits_k=4, bits_v=4).strategy.keep
        0.5
    """
    scorer = Mass(decay=jnp.float32(decay))
    return evicting(key, scorer, dim=dim, bits_k=bits_k, bits_v=bits_v, keep=keep, block=block)


EXAMPLES = (
    lambda: Mass(decay=jnp.float32(0.99)),
    lambda: pipeline(jax.random.key(0), dim=64, bits_k=4, bits_v=4, block=4),
)
