"""StreamingLLM: keep the first tokens, which serve as sinks of attention, and the newest; forget all between.

The first tokens are the `sinks` of the cache. The newest are a ring of `keep` times the capacity, coded, behind the
exact window. What a token says plays no part: this is the floor for every other eviction.

References:
    G. Xiao, Y. Tian, B. Chen, S. Han, M. Lewis, "Efficient streaming language models with attention sinks",
    arXiv:2309.17453.

Differs from the paper: positions are those of the text and not of the cache, since keys are stored after their
rotation; tokens that stay are coded.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxquant._pytree import pytree
from jaxquant.methods import h2o
from jaxquant.pipeline import Pipeline
from jaxquant.protocols import Context


@pytree
class Newest:
    """The position of the token."""

    def init(self, batch: int, kv_heads: int, dim: int, /) -> None:
        """Hold nothing."""

    def score(
        self, state: None, x: Float[Array, "batch kv_heads tokens dim"], ctx: Context, /
    ) -> tuple[None, Float[Array, "batch kv_heads tokens"]]:
        """Count on from the step."""
        token = ctx.step[:, None, None] + jnp.arange(x.shape[2], dtype=jnp.int32)
        return state, jnp.broadcast_to(token, x.shape[:3]).astype(jnp.float32)


def pipeline(key: PRNGKeyArray, *, dim: int, bits_k: int, bits_v: int, keep: float = 0.5, block: int = 32) -> Pipeline:
    """Build a pipeline that keeps the newest tokens, coded with TurboQuant.

    Args:
        key: of the rotations.
        dim: of the vectors.
        bits_k: a coordinate of keys.
        bits_v: a coordinate of values.
        keep: share of the capacity that is kept.
        block: tokens that leave together.

    Example:
        >>> pipeline(jax.random.key(0), dim=64, bits_k=4, bits_v=4).strategy.keep
        0.5
    """
    return h2o.evicting(key, Newest(), dim=dim, bits_k=bits_k, bits_v=bits_v, keep=keep, block=block)


EXAMPLES = (lambda: Newest(), lambda: pipeline(jax.random.key(0), dim=64, bits_k=4, bits_v=4, block=4))
