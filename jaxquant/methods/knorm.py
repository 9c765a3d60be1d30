"""Keep the tokens whose keys are short: a low norm of a key foretells high attention.

References:
    A. Devoto, Y. Zhao, S. Scardapane, P. Minervini, "A simple and effective L2 norm-based strategy for KV cache
    compression", arXiv:2406.11430.

Differs from the paper: all layers are compressed (the paper leaves the first two whole: `exact_layers` does that), and
tokens that stay are coded.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxquant._pytree import pytree
from jaxquant.methods import h2o
from jaxquant.pipeline import Pipeline
from jaxquant.protocols import Context


@pytree
class ShortKeys:
    """Minus the norm of the key."""

    def init(self, batch: int, kv_heads: int, dim: int, /) -> None:
        """Hold nothing."""

    def score(
        self, state: None, x: Float[Array, "batch kv_heads tokens dim"], ctx: Context, /
    ) -> tuple[None, Float[Array, "batch kv_heads tokens"]]:
        """Give minus the norm."""
        return state, -jnp.linalg.norm(x.astype(jnp.float32), axis=-1)


def pipeline(key: PRNGKeyArray, *, dim: int, bits_k: int, bits_v: int, keep: float = 0.5, block: int = 32) -> Pipeline:
    """Build a pipeline that keeps a share of the tokens, coded with TurboQuant.

    Args:
        key: of the rotations.
        dim: of the vectors.
        bits_k: a coordinate of keys.
        bits_v: a coordinate of values.
        keep: share of the capacity that is kept.
        block: tokens that are judged together.

    Example:
        >>> pipeline(jax.random.key(0), dim=64, bits_k=4, bits_v=4).strategy.keep
        0.5
    """
    return h2o.evicting(key, ShortKeys(), dim=dim, bits_k=bits_k, bits_v=bits_v, keep=keep, block=block)


EXAMPLES = (lambda: ShortKeys(), lambda: pipeline(jax.random.key(0), dim=64, bits_k=4, bits_v=4, block=4))
