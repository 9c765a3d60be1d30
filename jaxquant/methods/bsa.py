"""Block saliency: score the tokens of a block by how well its summary answers the queries, and by how they differ.

Tokens are cut into blocks, each head its own. A block's summary is the mean of its keys. For the mean m and the spread
s of past queries, a token x in a block of mean c scores

    score = max(<m, c> + r |s . c|, <m, x> + r |s . x|) / sqrt(dim),

the larger of the block's and its own optimistic logit: a salient block keeps all its tokens, and an outlier survives in
a block that is not. Without queries (`query_aware=False`, or before any came), the score is the distance of the token
from its block's mean, relative to the norm of the mean.

References:
    C. Zhan, W. Li, C. Shen, J. Zhang, S. Wu, H. Zhang, "Bidirectional sparse attention for faster video diffusion
    training", arXiv:2509.01085 (blocks of keys are kept by the salience of their means to the queries);
    J. Tang, Y. Zhao, K. Zhu, G. Xiao, B. Kasikci, S. Han, "Quest: Query-aware sparsity for efficient long-context LLM
    inference", arXiv:2406.10774 (optimistic logits of a block).

Differs from the paper: blocks are scored once, when they leave the exact window, by running statistics of the queries
so far, and the score decides what is stored, where both papers choose anew for every query and store everything.
Differs from tqai, whose score is one number for a tensor and knows no queries.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxquant._pytree import pytree, static
from jaxquant.methods import h2o
from jaxquant.pipeline import Pipeline
from jaxquant.protocols import Context


@pytree
class Queries:
    """Decaying sums over past queries: of 1, of the query, and of its square."""

    count: Float[Array, " batch"]
    total: Float[Array, "batch kv_heads dim"]
    square: Float[Array, "batch kv_heads dim"]


@pytree
class BlockSalience:
    """The optimistic logit of a token or of its block.

    Attributes:
        optimism: r, the standard deviations of the queries that are added.
        decay: of a query's weight with each later query.
        size: tokens of a block; the last one of a call may be smaller.
        query_aware: whether queries count.
    """

    optimism: float | Float[Array, ""] = 1.0
    decay: float | Float[Array, ""] = 0.99
    size: int = static(default=16)
    query_aware: bool = static(default=True)

    def init(self, batch: int, kv_heads: int, dim: int, /) -> Queries:
        """Start without queries."""
        zeros = jnp.zeros((batch, kv_heads, dim), jnp.float32)
        return Queries(count=jnp.zeros(batch, jnp.float32), total=zeros, square=zeros)

    def score(
        self, state: Queries, x: Float[Array, "batch kv_heads tokens dim"], ctx: Context, /
    ) -> tuple[Queries, Float[Array, "batch kv_heads tokens"]]:
        """Score tokens against the queries so far."""
        x = x.astype(jnp.float32)
        tokens, dim = x.shape[2:]
        of = jnp.arange(tokens) // self.size
        member = jax.nn.one_hot(of, -(-tokens // self.size), axis=0, dtype=jnp.float32)
        means = jnp.einsum("gt,bhtd->bhgd", member / jnp.sum(member, axis=1, keepdims=True), x, precision="highest")
        mean = jnp.take(means, of, axis=2)
        norm = jnp.linalg.norm(mean, axis=-1)
        apart = jnp.linalg.norm(x - mean, axis=-1) / jnp.maximum(norm, 1e-10)
        if not self.query_aware:
            return state, apart
        count = jnp.maximum(state.count, 1e-10)[:, None, None]
        center = state.total / count
        spread = jnp.sqrt(jnp.maximum(state.square / count - center**2, 0.0))

        def logit(key: Array) -> Array:
            along = jnp.sum(center[:, :, None] * key, axis=-1)
            return (along + self.optimism * jnp.linalg.norm(spread[:, :, None] * key, axis=-1)) * dim**-0.5

        salient = jnp.maximum(logit(mean), logit(x))
        return state, jnp.where((state.count > 0)[:, None, None], salient, apart)

    def attend(
        self,
        state: Queries,
        scores: Float[Array, "batch kv_heads tokens"],
        weights: Float[Array, "batch kv_heads queries tokens"],
        queries: Float[Array, "batch kv_heads queries dim"],
        valid: Bool[Array, "batch queries"],
        /,
    ) -> tuple[Queries, Float[Array, "batch kv_heads tokens"]]:
        """Add queries to the statistics; scores stay."""
        share, old = h2o.faded(self.decay, valid)

        def added(total: Array, x: Array) -> Array:
            return total * old[:, None, None] + jnp.einsum("bn,bhnd->bhd", share, x, precision="highest")

        state = Queries(
            count=state.count * old + jnp.sum(share, axis=1),
            total=added(state.total, queries),
            square=added(state.square, queries**2),
        )
        return state, scores


def pipeline(
    key: PRNGKeyArray, *, dim: int, bits_k: int, bits_v: int, keep: float = 0.5, size: int = 16, block: int = 32
) -> Pipeline:
    """Build a pipeline that keeps the tokens of salient blocks, coded with TurboQuant.

    Args:
        key: of the rotations.
        dim: of the vectors.
        bits_k: a coordinate of keys.
        bits_v: a coordinate of values.
        keep: share of the capacity that is kept.
        size: tokens that share a summary.
        block: tokens that are judged together.

    Example:
        >>> pipeline(jax.random.key(0), dim=64, bits_k=4, bits_v=4).scorer.size
        16
    """
    scorer = BlockSalience(optimism=jnp.float32(1.0), decay=jnp.float32(0.99), size=size)
    return h2o.evicting(key, scorer, dim=dim, bits_k=bits_k, bits_v=bits_v, keep=keep, block=block)


EXAMPLES = (
    lambda: BlockSalience(optimism=jnp.float32(1.0), decay=jnp.float32(0.9), size=2),
    lambda: BlockSalience(optimism=jnp.float32(1.0), decay=jnp.float32(0.9), size=2, query_aware=False),
    lambda: pipeline(jax.random.key(0), dim=64, bits_k=4, bits_v=4, size=2, block=4),
)
