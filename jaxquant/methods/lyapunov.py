"""Watch how attention amplifies a small change: the largest finite-time Lyapunov exponent, by Benettin's method.

A perturbation d of unit length is carried from block to block by the derivative of what attention does to the newest
query of each block, o_t = attention(q_t), that of the first query head where several share a kv head, and scaled back
to unit length each time:

    d' = J_t d,    g_t = log |d'|,    d = d' / |d'|,    exponent = mean of g_t.

J_t d is a Jacobian-vector product (`jax.jvp`), taken through the compressed cache, one for each row and kv head. Where
the mean exponent over heads is above `above`, errors grow, and the threshold becomes `growing`, which lets more tokens
have what is scarce; below `below` they die out, and it becomes `dying`. `exponent` does the same for any map.

References:
    G. Benettin, L. Galgani, A. Giorgilli, J.-M. Strelcyn, "Lyapunov characteristic exponents for smooth dynamical
    systems and for Hamiltonian systems: a method for computing all of them", Meccanica 15 (1980), in the form for the
    largest exponent; attention as a step of a dynamical system of states: H. Ramsauer et al., "Hopfield networks is all
    you need", arXiv:2008.02217.

Differs from tqai, whose `lyapunov` monitor is the log of the relative size of a step and perturbs nothing. The
exponent's use for a threshold is in no paper.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxquant._pytree import pytree
from jaxquant.methods import palm
from jaxquant.pipeline import Pipeline
from jaxquant.protocols import Observation

X = TypeVar("X", bound=PyTree)


@pytree
class Perturbation:
    """A unit vector and how it grew.

    Attributes:
        direction: of unit length, for each row and kv head.
        growth: running mean of the log of its growth.
        blocks: seen.
    """

    direction: Float[Array, "batch kv_heads dim"]
    growth: Float[Array, "batch kv_heads"]
    blocks: Float[Array, " batch"]


@pytree
class Lyapunov:
    """Threshold by the exponent.

    Attributes:
        above: exponent above which errors grow.
        below: exponent below which they die out.
        growing: threshold where they grow.
        dying: threshold where they die out.
        memory: blocks that the mean reaches back, at most.
    """

    above: float | Float[Array, ""] = 0.1
    below: float | Float[Array, ""] = -0.1
    growing: float | Float[Array, ""] = 0.3
    dying: float | Float[Array, ""] = 0.6
    memory: float | Float[Array, ""] = 20.0

    def init(self, batch: int, kv_heads: int, dim: int, /) -> Perturbation:
        """Start with the same change in every coordinate."""
        return Perturbation(
            direction=jnp.full((batch, kv_heads, dim), dim**-0.5, jnp.float32),
            growth=jnp.zeros((batch, kv_heads), jnp.float32),
            blocks=jnp.zeros(batch, jnp.float32),
        )

    def observe(
        self, state: Perturbation, seen: Observation, threshold: Float[Array, " batch"], /
    ) -> tuple[Perturbation, Float[Array, " batch"]]:
        """Carry the perturbation on by one block."""
        direction, grown = _scaled(seen.pushforward(state.direction), state.direction)
        blocks = state.blocks + 1.0
        share = 1.0 / jnp.minimum(blocks, self.memory)
        growth = state.growth + share[:, None] * (grown - state.growth)
        exponent = jnp.mean(growth, axis=1)
        steered = jnp.where(
            exponent > self.above, self.growing, jnp.where(exponent < self.below, self.dying, threshold)
        )
        return Perturbation(direction=direction, growth=growth, blocks=blocks), steered


def exponent(step: Callable[[X], X], x: X, direction: X, *, steps: int) -> tuple[Float[Array, ""], X, X]:
    """Measure the largest finite-time exponent of a map along its own orbit.

    Args:
        step: the map.
        x: where the orbit starts.
        direction: of the first perturbation; its length does not matter.
        steps: of the orbit.

    Returns:
        The mean log growth of a step, the end of the orbit, and the perturbation there, of unit length.

    Example:
        >>> rate, *_ = exponent(lambda x: 0.5 * x, jnp.ones(3), jnp.ones(3), steps=4)
        >>> round(float(rate), 4)
        -0.6931
    """
    start = jax.tree.map(lambda part: part / _length(direction), direction)

    def body(carry: tuple[X, X], _: None) -> tuple[tuple[X, X], Array]:
        x, moved = jax.jvp(step, (carry[0],), (carry[1],))
        size = _length(moved)
        return (x, jax.tree.map(lambda part: part / jnp.maximum(size, 1e-30), moved)), jnp.log(jnp.maximum(size, 1e-30))

    (x, direction), growth = lax.scan(body, (x, start), None, length=steps)
    return jnp.mean(growth), x, direction


def _length(tree: PyTree) -> Float[Array, ""]:
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))


def _scaled(moved: Array, before: Array) -> tuple[Array, Array]:
    """Give unit vectors and the log of the lengths; what attention wiped out starts again where it was."""
    size = jnp.linalg.norm(moved, axis=-1)
    some = size > 1e-20
    unit = moved / jnp.where(some, size, 1.0)[..., None]
    return jnp.where(some[..., None], unit, before), jnp.log(jnp.maximum(size, 1e-20))


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
        >>> float(pipeline(jax.random.key(0), dim=64, bits_k=4, bits_v=4).monitor.memory)
        20.0
    """
    base = palm.pipeline(key, dim=dim, bits_k=bits_k, bits_v=bits_v, share=share, block=block)
    numbers = {"above": 0.1, "below": -0.1, "growing": 0.3, "dying": 0.6, "memory": 20.0}
    monitor = Lyapunov(**{name: jnp.float32(number) for name, number in numbers.items()})
    return dataclasses.replace(base, monitor=monitor, threshold=jnp.float32(0.4))


EXAMPLES = (
    lambda: Lyapunov(above=jnp.float32(0.0), below=jnp.float32(-0.2), growing=jnp.float32(0.3), dying=jnp.float32(0.6),
             memory=jnp.float32(4.0)),
    lambda: pipeline(jax.random.key(0), dim=64, bits_k=4, bits_v=4, block=4),
)  # fmt: skip
