"""Score tokens by Fisher information: how much the model's predictions would change with an error of key and value.

A code that stores a norm errs in proportion to the vector, about x_j^2 in channel j. With F the mean squared gradient
of the log-likelihood with respect to each channel of keys and values, from calibration, a token scores the predicted
divergence up to a constant,

    score = sum_j F_key[j] k_j^2 + F_value[j] v_j^2,

with F for each layer and kv head. `Proxy` is what tqai calls fisher, to compare with: it knows no gradients.

References:
    J. Martens, "New insights and perspectives on the natural gradient method", arXiv:1412.1193, section 5 (the Fisher
    matrix as the curvature of the divergence). Squared gradients of activations as weights of quantization errors: C.
    Hooper et al., "KVQuant: Towards 10 million context length LLM inference with KV cache quantization",
    arXiv:2401.18079, section 3.3. Scoring tokens by it is in neither paper.

Differs from tqai's `fisher_static`, which averages gradients of projection weights over a layer: this is the
information of the activations themselves, for each channel.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxquant._pytree import pytree
from jaxquant.methods import tiered
from jaxquant.pipeline import Pipeline
from jaxquant.protocols import Context


@pytree
class Information:
    """Fisher information of each channel times the squared activation.

    Attributes:
        keys: information of keys, a row for each layer.
        values: likewise of values.
    """

    keys: Float[Array, "layers kv_heads dim"]
    values: Float[Array, "layers kv_heads dim"]

    def init(self, batch: int, kv_heads: int, dim: int, /) -> None:
        """Hold nothing."""

    def score(
        self, state: Any, x: Float[Array, "batch kv_heads tokens dim"], ctx: Context, /
    ) -> tuple[Any, Float[Array, "batch kv_heads tokens"]]:
        """Weigh keys, and values where there are any."""
        score = jnp.einsum("hd,bhtd->bht", self.keys[ctx.layer], x.astype(jnp.float32) ** 2, precision="highest")
        if ctx.values is not None:
            squares = ctx.values.astype(jnp.float32) ** 2
            score += jnp.einsum("hd,bhtd->bht", self.values[ctx.layer], squares, precision="highest")
        return state, score


@pytree
class Proxy:
    """The score that tqai calls fisher: log(1 + mean square) / 3, at most 1, of a moving average over tokens.

    Attributes:
        decay: of the average.
    """

    decay: float | Float[Array, ""] = 0.9

    def init(self, batch: int, kv_heads: int, dim: int, /) -> Float[Array, "batch kv_heads 2"]:
        """Start without an average: a sum of weights, and a weighted sum."""
        return jnp.zeros((batch, kv_heads, 2), jnp.float32)

    def score(
        self,
        state: Float[Array, "batch kv_heads 2"],
        x: Float[Array, "batch kv_heads tokens dim"],
        ctx: Context,
        /,
    ) -> tuple[Float[Array, "batch kv_heads 2"], Float[Array, "batch kv_heads tokens"]]:
        """Average the mean squares up to each token."""
        square = jnp.mean(x.astype(jnp.float32) ** 2, axis=-1)
        decay = jnp.asarray(self.decay, jnp.float32)

        def one(past: Array, token: Array) -> tuple[Array, Array]:
            new = decay * past + (1 - decay) * jnp.stack([jnp.ones_like(token), token], axis=-1)
            return new, new[..., 1] / new[..., 0]

        state, mean = jax.lax.scan(one, state, jnp.moveaxis(square, 2, 0))
        return state, jnp.minimum(jnp.log1p(jnp.moveaxis(mean, 0, 2)), 3.0) / 3.0


def information(
    keys: Float[Array, "layers kv_heads dim dim"], values: Float[Array, "layers kv_heads dim dim"]
) -> Information:
    """Take the diagonals of second moments of gradients, as `jaxquant.calibrate.fisher.collect` gives them.

    Example:
        >>> identity = jnp.broadcast_to(jnp.eye(4), (1, 2, 4, 4))
        >>> information(identity, identity).keys.shape
        (1, 2, 4)
    """
    diagonals = (jnp.diagonal(jnp.asarray(x, jnp.float32), axis1=-2, axis2=-1) for x in (keys, values))
    return Information(**dict(zip(("keys", "values"), diagonals, strict=True)))


def pipeline(
    key: PRNGKeyArray,
    *,
    dim: int,
    bits_k: int,
    bits_v: int,
    share: float = 0.25,
    scorer: Information | Proxy | None = None,
    block: int = 32,
) -> Pipeline:
    """Build a pipeline that gives tokens of much information their lower bits.

    Args:
        key: of the rotations.
        dim: of the vectors.
        bits_k: a coordinate of keys in the upper tier.
        bits_v: a coordinate of values in the upper tier.
        share: of the capacity that the upper tier has room for.
        scorer: from `information`; without a calibration, None takes `Proxy`.
        block: tokens that are judged together.

    Example:
        >>> type(pipeline(jax.random.key(0), dim=64, bits_k=4, bits_v=4).scorer).__name__
        'Proxy'
    """
    scorer = Proxy(decay=jnp.float32(0.9)) if scorer is None else scorer
    return tiered.pipeline(key, dim=dim, bits_k=bits_k, bits_v=bits_v, share=share, scorer=scorer, block=block)


EXAMPLES = (
    lambda: Information(keys=jnp.ones((1, 2, 64)), values=jnp.ones((1, 2, 64))),
    lambda: Proxy(decay=jnp.float32(0.8)),
    lambda: pipeline(jax.random.key(0), dim=64, bits_k=4, bits_v=4, block=4),
)
