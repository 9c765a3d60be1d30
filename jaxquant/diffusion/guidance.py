"""Classifier-free guidance, and attention that runs once for both of its halves.

Guidance evaluates the network with and without the condition, as one batch: the conditional half first. The two halves
attend almost alike for most of the way, so attention can run on the conditional half alone, projections and all, and
its output be given to both: `share`. That is a smaller program, not a masked one. Sharing is for self-attention: of
attention to the condition it would remove the guidance.

References:
    J. Ho, T. Salimans, "Classifier-free diffusion guidance", arXiv:2207.12598, eq. 6.
    Z. Yuan, H. Zhang, P. Lu, X. Ning, L. Zhang, T. Zhao, S. Yan, G. Dai, Y. Wang, "DiTFastAttn: Attention compression
    for diffusion transformer models", arXiv:2406.08552 (attention sharing across CFG).

Differs from the papers: weights are written as `scale`, 1 + w of Ho and Salimans; `Gate` decides while sampling, from
the similarity it last measured, where DiTFastAttn decides once for each step and layer from calibration.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxquant._pytree import pytree

Attend = Callable[[Array], Array]
"""Attention of a layer with its projections: [rows, tokens, hidden] to the same shape."""


def pair(x: Float[Array, "batch ..."]) -> Float[Array, "both ..."]:
    """Repeat a batch for its conditional and its unconditional half.

    Example:
        >>> pair(jnp.array([1.0, 2.0]))
        Array([1., 2., 1., 2.], dtype=float32)
    """
    return jnp.concatenate([x, x])


def guide(both: Float[Array, "both ..."], *, scale: float | Float[Array, ""]) -> Float[Array, "batch ..."]:
    """Join the halves: unconditional + scale (conditional - unconditional).

    Args:
        both: the network's results, conditional half first.
        scale: 0 is unconditional, 1 conditional; more exaggerates the condition.

    Raises:
        ValueError: the batch is odd.

    Example:
        >>> guide(jnp.array([3.0, 1.0]), scale=2.0)
        Array([5.], dtype=float32)
    """
    with_condition, without = _halves(both)
    return without + jnp.asarray(scale, both.dtype) * (with_condition - without)


def share(attend: Attend, x: Float[Array, "both tokens hidden"]) -> Float[Array, "both tokens hidden"]:
    """Attend for the conditional half, and give its output to both.

    Args:
        attend: self-attention of a layer, with its projections.
        x: its input, conditional half first.

    Raises:
        ValueError: the batch is odd.

    Example:
        >>> share(lambda x: 2 * x, jnp.array([[[1.0]], [[5.0]]])).reshape(-1)
        Array([2., 2.], dtype=float32)
    """
    return pair(attend(_halves(x)[0]))


class Shared(NamedTuple):
    """What a gate remembers of one layer.

    Attributes:
        similarity: cosine of the halves' outputs when both were last computed; -1 before that.
        age: steps since then.
    """

    similarity: Float[Array, ""]
    age: Int[Array, ""]


@pytree
class Gate:
    """Share while the halves were alike when last compared, and compare again after `refresh` shared steps.

    The choice is made while the program runs (`lax.cond`), so that the work is really left out; not under `vmap`, which
    runs both branches.

    Attributes:
        threshold: least cosine of the halves' outputs.
        refresh: shared steps in a row, at most.
    """

    threshold: float | Float[Array, ""] = 0.95
    refresh: int | Int[Array, ""] = 4

    def init(self) -> Shared:
        """Start without having compared."""
        return Shared(similarity=jnp.float32(-1), age=jnp.int32(0))

    def shares(self, state: Shared, /) -> Bool[Array, ""]:
        """Say whether the next step is shared."""
        return (state.similarity >= self.threshold) & (state.age < self.refresh)

    def attend(
        self, state: Shared, attend: Attend, x: Float[Array, "both tokens hidden"], /
    ) -> tuple[Shared, Float[Array, "both tokens hidden"]]:
        """Attend for one half or for both."""

        def once() -> tuple[Shared, Array]:
            return Shared(similarity=state.similarity, age=state.age + 1), share(attend, x)

        def twice() -> tuple[Shared, Array]:
            out = attend(x)
            return Shared(similarity=_cosine(*_halves(out)), age=jnp.zeros_like(state.age)), out

        _halves(x)
        return lax.cond(self.shares(state), once, twice)


def _halves(x: Array) -> tuple[Array, Array]:
    if x.shape[0] % 2:
        raise ValueError(f"the batch must hold a conditional and an unconditional half, got {x.shape[0]} rows")
    return x[: x.shape[0] // 2], x[x.shape[0] // 2 :]


def _cosine(x: Array, y: Array) -> Float[Array, ""]:
    x, y = (part.astype(jnp.float32).reshape(-1) for part in (x, y))
    lengths = jnp.linalg.norm(x) * jnp.linalg.norm(y)
    cosine = jnp.dot(x, y, precision="highest") / jnp.where(lengths > 0, lengths, 1.0)
    return jnp.where(lengths > 0, jnp.clip(cosine, -1.0, 1.0), 1.0)
