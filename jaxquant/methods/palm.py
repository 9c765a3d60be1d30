"""Palm: score tokens by how new and how surprising they are.

Novelty of a key x is its mean distance from an exponential moving average of the keys before it, in standard deviations
that are averaged alike; surprise is how badly a coarse code of it errs:

    novelty = mean_j |x_j - mu_j| / sigma_j,     surprise = log(1 + |x - coded(x)|^2 / dim),
    score   = tanh(sqrt(novelty * surprise) / 2).

The averages move after every token, one pair for each row, head and channel, and the first token of all scores 1.

References:
    No paper. The name and the roles of novelty and surprise are those of tqai's `palm` scorer.

Differs from tqai: averages run over tokens and not over whole tensors, so that prompts and single tokens mix; the
surprise is there; scores are per token; the score saturates smoothly instead of being cut at 2.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxquant._pytree import pytree
from jaxquant.methods import tiered, turboquant
from jaxquant.pipeline import Pipeline
from jaxquant.protocols import Context, Quantizer


@pytree
class Average:
    """What came before, for each row, head and channel.

    Attributes:
        mean: moving average.
        variance: moving average of the squared distance from it.
        tokens: that came, of each row.
    """

    mean: Float[Array, "batch kv_heads dim"]
    variance: Float[Array, "batch kv_heads dim"]
    tokens: Int[Array, " batch"]


@pytree
class Palm:
    """Novelty times surprise.

    Attributes:
        probe: the coarse code whose error is the surprise.
        rate: weight of a new token in the averages.
    """

    probe: Quantizer
    rate: float | Float[Array, ""] = 0.05

    def init(self, batch: int, kv_heads: int, dim: int, /) -> Average:
        """Start without an average; deviations start at 1."""
        zeros = jnp.zeros((batch, kv_heads, dim), jnp.float32)
        return Average(mean=zeros, variance=zeros + 1.0, tokens=jnp.zeros(batch, jnp.int32))

    def score(
        self, state: Average, x: Float[Array, "batch kv_heads tokens dim"], ctx: Context, /
    ) -> tuple[Average, Float[Array, "batch kv_heads tokens"]]:
        """Compare each token with the average before it, then move the average."""
        x = x.astype(jnp.float32)
        missed = x - self.probe.restore(self.probe.expand(self.probe.quantize(x)))
        surprise = jnp.log1p(jnp.mean(missed**2, axis=-1))

        def one(past: Average, token: Array) -> tuple[Average, tuple[Array, Array]]:
            some = (past.tokens > 0)[:, None, None]
            away = token - past.mean
            novelty = jnp.mean(jnp.abs(away) * lax.rsqrt(past.variance + 1e-10), axis=-1)
            mean = jnp.where(some, past.mean + self.rate * away, token)
            variance = jnp.where(some, past.variance + self.rate * (away**2 - past.variance), past.variance)
            first = jnp.broadcast_to(some[..., 0], novelty.shape)
            return Average(mean=mean, variance=variance, tokens=past.tokens + 1), (novelty, first)

        state, (novelty, known) = lax.scan(one, state, jnp.moveaxis(x, 2, 0))
        novelty, known = (jnp.moveaxis(part, 0, 2) for part in (novelty, known))
        return state, jnp.where(known, jnp.tanh(jnp.sqrt(novelty * surprise) / 2), 1.0)


def pipeline(
    key: PRNGKeyArray, *, dim: int, bits_k: int, bits_v: int, share: float = 0.25, rate: float = 0.05, block: int = 32
) -> Pipeline:
    """Build a pipeline that gives the most novel and surprising tokens their lower bits.

    Args:
        key: of the rotations.
        dim: of the vectors.
        bits_k: a coordinate of keys in the upper tier.
        bits_v: a coordinate of values in the upper tier.
        share: of the capacity that the upper tier has room for.
        rate: see `Palm`.
        block: tokens that are judged together.

    Example:
        >>> pipeline(jax.random.key(0), dim=64, bits_k=4, bits_v=4).strategy.share
        0.25
    """
    first, second = jax.random.split(key)
    scorer = Palm(probe=turboquant.mse(first, dim=dim, bits=2, fused=False), rate=jnp.float32(rate))
    return tiered.pipeline(second, dim=dim, bits_k=bits_k, bits_v=bits_v, share=share, scorer=scorer, block=block)


EXAMPLES = (
    lambda: Palm(probe=turboquant.mse(jax.random.key(1), dim=64, bits=2, fused=False), rate=jnp.float32(0.1)),
    lambda: pipeline(jax.random.key(0), dim=64, bits_k=4, bits_v=4, block=4),
)
