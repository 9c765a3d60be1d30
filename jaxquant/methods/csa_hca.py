"""Attention at two levels: small groups of tokens where a query looks closely, large ones everywhere else.

Tokens are pooled twice: the means of keys and values over `fine` tokens (compressed sparse attention) and over `coarse`
tokens (heavily compressed attention). A query picks the `top` fine groups of the largest logits, and sees them in place
of the coarse group they are part of. A mean that stands for n tokens has the weight of n,

    weight = n exp(<q, mean key> / sqrt(dim)):    n = fine for a chosen group,
                                                  n = coarse - fine * (chosen groups in it) for a coarse group,

so that no token counts twice, and with all groups of one token chosen this is exact attention. Tokens that do not fill
a coarse group yet are exact, so that no group holds a token that a query may not see.

References:
    No arXiv id: DeepSeek-AI, "DeepSeek-V4" technical report, 2026 (compressed sparse and heavily compressed attention).

Differs from the paper: nothing is trained, so that groups are pooled by their means where the report gates them with
learned weights, logits choose where the report has a learned indexer, and both levels serve one layer where the report
alternates them; the logarithm of the number of tokens is added; means are coded. A coarse mean keeps the share of the
chosen tokens in it, though their weight is taken off. Differs from tqai, where a mean of n tokens has the weight of
one, tokens count on both levels, and groups hold tokens of the future.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxquant import strategies
from jaxquant._pytree import pytree, static
from jaxquant.methods import turboquant
from jaxquant.pipeline import Pipeline
from jaxquant.protocols import Held
from jaxquant.strategies import Appended


@pytree
class Levels:
    """Codes of means.

    Attributes:
        fine: over a few tokens.
        coarse: over a block.
    """

    fine: Appended
    coarse: Appended


@pytree
class TwoLevel:
    """Means over `fine` tokens, and over the block of the pipeline.

    Attributes:
        fine: tokens of a fine group; divides the block.
        top: fine groups that a query sees.
    """

    fine: int = static(default=4)
    top: int = static(default=16)

    def init(self, quantizers: strategies.Pair, /, *, batch: int, kv_heads: int, capacity: int, block: int) -> Levels:
        """Allocate."""
        if self.fine < 1 or block % self.fine:
            raise ValueError(f"fine must divide the block of {block} tokens, got {self.fine}")
        nothing = jnp.zeros(batch, jnp.int32)
        fine, coarse = (
            Appended(
                codes=strategies.empty(quantizers, batch, kv_heads, capacity // size), tokens=nothing, start=nothing
            )
            for size in (self.fine, block)
        )
        return Levels(fine=fine, coarse=coarse)

    def store(self, state: Levels, quantizers: strategies.Pair, k, v, scores, step, threshold, /) -> Levels:
        """Pool a block twice and append the means."""

        def appended(held: Appended, size: int) -> Appended:
            means = (jnp.mean(x.reshape(*x.shape[:2], -1, size, x.shape[-1]), axis=3) for x in (k, v))
            codes = strategies.coded(quantizers, *means)
            return Appended(
                codes=strategies.append(held.codes, codes, held.tokens // k.shape[2]),
                tokens=held.tokens + k.shape[2],
                start=jnp.where(held.tokens == 0, step, held.start),
            )

        return Levels(fine=appended(state.fine, self.fine), coarse=appended(state.coarse, k.shape[2]))

    def read(
        self, state: Levels, quantizers: strategies.Pair, queries: Float[Array, "batch kv_heads rows dim"], /
    ) -> Held:
        """Choose fine groups for each query, and weigh both levels."""
        fine, coarse = (strategies.decoded(quantizers, level.codes) for level in (state.fine, state.coarse))
        groups, blocks = fine[0].shape[2], coarse[0].shape[2]
        each = groups // blocks
        there = [
            _last(level, entries, size)
            for level, entries, size in ((state.fine, groups, self.fine), (state.coarse, blocks, each * self.fine))
        ]
        logits = jnp.einsum("bhrd,bhtd->bhrt", queries, fine[0], precision="highest")
        logits = jnp.where((there[0] >= 0)[:, None], logits, -jnp.inf)
        _, best = jax.lax.top_k(logits, min(self.top, groups))
        row, head, query = jnp.ogrid[: logits.shape[0], : logits.shape[1], : logits.shape[2]]
        chosen = jnp.zeros(logits.shape, bool).at[row[..., None], head[..., None], query[..., None], best].set(True)
        chosen &= jnp.isfinite(logits)
        taken = jnp.sum(chosen.reshape(*chosen.shape[:3], blocks, each), axis=-1)
        left = (self.fine * (each - taken)).astype(jnp.float32)
        weight = jnp.concatenate([jnp.where(chosen, jnp.log(float(self.fine)), -jnp.inf), jnp.log(left)], axis=-1)
        return Held(
            k=jnp.concatenate([fine[0], coarse[0]], axis=2),
            v=jnp.concatenate([fine[1], coarse[1]], axis=2),
            position=jnp.concatenate(there, axis=2),
            weight=weight,
        )


def _last(level: Appended, entries: int, size: int) -> Int[Array, "batch 1 entries"]:
    """Give the position of the last token of each group, -1 where there is none."""
    last = (jnp.arange(entries, dtype=jnp.int32) + 1) * size - 1
    return jnp.where(last < level.tokens[:, None], level.start[:, None] + last, -1)[:, None]


def pipeline(
    key: PRNGKeyArray, *, dim: int, bits_k: int, bits_v: int, fine: int = 4, top: int = 64, block: int = 32
) -> Pipeline:
    """Build a pipeline of two levels, means coded with TurboQuant.

    Args:
        key: of the rotations.
        dim: of the vectors.
        bits_k: a coordinate of keys.
        bits_v: a coordinate of values.
        fine: tokens of a fine group.
        top: fine groups that a query sees.
        block: tokens of a coarse group; 128 in the report.

    Example:
        >>> pipeline(jax.random.key(0), dim=64, bits_k=4, bits_v=4).strategy.fine
        4
    """
    keys, values = turboquant.kv(key, dim=dim, bits_k=bits_k, bits_v=bits_v)
    return Pipeline(keys=keys, values=values, strategy=TwoLevel(fine=fine, top=top), block=block)


EXAMPLES = (lambda: pipeline(jax.random.key(0), dim=64, bits_k=4, bits_v=4, fine=2, top=2, block=4),)
