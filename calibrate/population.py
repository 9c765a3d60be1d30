"""Search settings for several objectives at once: a population whose best members approach the Pareto front.

What may be searched is a tree of `Choice` and `Range`; a member of the population is a point of the unit cube, which
`settle` turns into a tree of numbers. Every point is a valid setting, so nothing ever has to be repaired or refused.
Objectives are one JAX function of a setting; it is mapped over the population with `vmap`, and all generations run
in one compiled loop.

References:
    K. Deb, A. Pratap, S. Agarwal, T. Meyarivan, "A fast and elitist multiobjective genetic algorithm: NSGA-II", IEEE
    Trans. Evol. Comput. 6 (2002), s. III; K. Deb, R. B. Agrawal, "Simulated binary crossover for continuous search
    space", Complex Systems 9 (1995) (crossover); the polynomial mutation of the same authors.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from jaxquant._pytree import pytree, static

Objectives = Callable[[PyTree[Any]], Float[Array, " objectives"]]


@pytree
class Choice:
    """One of some numbers, such as bits, for each place of a shape."""

    values: Array
    shape: tuple[int, ...] = static(default=())

    def settle(self, place: Float[Array, "*shape"]) -> Array:
        """Turn places in [0, 1] into numbers."""
        count = self.values.shape[0]
        return self.values[jnp.minimum((place * count).astype(jnp.int32), count - 1)]


@pytree
class Range:
    """A number from `low` to `high`, for each place of a shape."""

    low: float | Float[Array, ""]
    high: float | Float[Array, ""]
    shape: tuple[int, ...] = static(default=())

    def settle(self, place: Float[Array, "*shape"]) -> Array:
        """Turn places in [0, 1] into numbers."""
        return self.low + (self.high - self.low) * place


class Front(NamedTuple):
    """What a search found.

    Attributes:
        settings: of every member, stacked on a leading axis.
        objectives: of every member.
        best: whether no other member is as good in every objective and better in one.
    """

    settings: PyTree[Any]
    objectives: Float[Array, "members objectives"]
    best: Bool[Array, " members"]


def evolve(
    key: PRNGKeyArray,
    space: PyTree[Any],
    objectives: Objectives,
    *,
    members: int = 64,
    generations: int = 100,
    spread: float = 15.0,
) -> Front:
    """Minimize several objectives.

    Args:
        key: of the first population, of matings and of mutations.
        space: tree of `Choice` and `Range`.
        objectives: of a setting, all to be minimized; a setting with a NaN is worse than any other.
        members: of the population, an even number.
        generations: to run.
        spread: of children around their parents; larger is closer.

    Raises:
        ValueError: `members` is odd or less than 4, or `space` is empty.

    Example:
        >>> space = {"x": Range(low=-1.0, high=3.0)}
        >>> found = evolve(jax.random.key(0), space, lambda s: jnp.stack([s["x"] ** 2, (s["x"] - 2) ** 2]))
        >>> inside = found.settings["x"][found.best]
        >>> bool((inside > -0.1).all() and (inside < 2.1).all())
        True
    """
    if members < 4 or members % 2:
        raise ValueError(f"members must be even and at least 4, got {members}")
    if not jax.tree.leaves(space, is_leaf=_is_gene):
        raise ValueError("space has no Choice and no Range")
    return _evolve(key, space, jnp.float32(spread), objectives, members, generations)


@functools.partial(jax.jit, static_argnames=("objectives", "members", "generations"))
def _evolve(
    key: PRNGKeyArray, space: PyTree[Any], spread: Array, objectives: Objectives, members: int, generations: int
) -> Front:
    first, rest = jax.random.split(key)
    genes = sum(_size(gene) for gene in jax.tree.leaves(space, is_leaf=_is_gene))

    def judge(places: Array) -> Array:
        values = jax.vmap(lambda place: objectives(settle(space, place)))(places).astype(jnp.float32)
        return jnp.where(jnp.any(jnp.isnan(values), axis=1, keepdims=True), jnp.inf, values)

    def generation(state: tuple[Array, Array], key: PRNGKeyArray) -> tuple[tuple[Array, Array], None]:
        places, values = state
        mate, cross, mutate = jax.random.split(key, 3)
        parents = places[_tournament(mate, values)]
        children = _mutated(mutate, _crossed(cross, parents, spread), spread)
        places, values = jnp.concatenate([places, children]), jnp.concatenate([values, judge(children)])
        kept = _order(values)[:members]
        return (places[kept], values[kept]), None

    places = jax.random.uniform(first, (members, genes))
    (places, values), _ = lax.scan(generation, (places, judge(places)), jax.random.split(rest, generations))
    settings = jax.vmap(functools.partial(settle, space))(places)
    return Front(settings, values, ranks(values) == 0)


def settle(space: PyTree[Any], place: Float[Array, " genes"]) -> PyTree[Any]:
    """Turn a point of the unit cube into a setting.

    Example:
        >>> space = {"bits": Choice(values=jnp.array([2, 3, 4])), "clip": Range(low=0.5, high=1.0)}
        >>> settle(space, jnp.array([0.9, 0.5]))
        {'bits': Array(4, dtype=int32), 'clip': Array(0.75, dtype=float32)}
    """
    genes, structure = jax.tree.flatten(space, is_leaf=_is_gene)
    settled, first = [], 0
    for gene in genes:
        settled.append(gene.settle(place[first : first + _size(gene)].reshape(gene.shape)))
        first += _size(gene)
    return jax.tree.unflatten(structure, settled)


def ranks(values: Float[Array, "members objectives"]) -> Int[Array, " members"]:
    """Rank members: 0 where nobody dominates them, 1 where only members of rank 0 do, and so on.

    Example:
        >>> ranks(jnp.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [2.0, 2.0]]))
        Array([0, 0, 1, 2], dtype=int32)
    """
    beaten = _dominates(values[:, None], values[None])  # [by, member]

    def peel(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        rank, left, number = state
        front = left & ~jnp.any(beaten & left[:, None], axis=0)
        return jnp.where(front, number, rank), left & ~front, number + 1

    start = jnp.zeros(len(values), jnp.int32), jnp.ones(len(values), bool), jnp.int32(0)
    return lax.while_loop(lambda state: jnp.any(state[1]), peel, start)[0]


def crowding(values: Float[Array, "members objectives"], rank: Int[Array, " members"]) -> Float[Array, " members"]:
    """Give the distance between each member's neighbours of its rank, summed over objectives; infinite at the ends.

    Example:
        >>> crowding(jnp.array([[0.0, 4.0], [1.0, 2.0], [4.0, 0.0]]), jnp.zeros(3, int))
        Array([inf,  2., inf], dtype=float32)
    """
    total = jnp.zeros(len(values))
    for column in values.T:
        order = jnp.lexsort((column, rank))
        sorted_, ranked = column[order], rank[order]
        edge = jnp.ones(1, bool)
        apart = ranked[1:] != ranked[:-1]
        ends = jnp.concatenate([edge, apart]) | jnp.concatenate([apart, edge])
        gap = jnp.concatenate([sorted_[1:], sorted_[-1:]]) - jnp.concatenate([sorted_[:1], sorted_[:-1]])
        finite = jnp.where(jnp.isfinite(column), column, 0.0)
        span = jnp.maximum(jnp.max(finite) - jnp.min(finite), jnp.finfo(jnp.float32).tiny)
        total = total.at[order].add(jnp.where(ends | ~jnp.isfinite(gap), jnp.inf, gap / span))
    return total


def _dominates(a: Array, b: Array) -> Array:
    return jnp.all(a <= b, axis=-1) & jnp.any(a < b, axis=-1)


def _order(values: Float[Array, "members objectives"]) -> Int[Array, " members"]:
    """Sort members: lower ranks first, less crowded ones first within a rank."""
    rank = ranks(values)
    return jnp.lexsort((-crowding(values, rank), rank))


def _tournament(key: PRNGKeyArray, values: Float[Array, "members objectives"]) -> Int[Array, " members"]:
    """Draw pairs, and take the better of each."""
    members = len(values)
    standing = jnp.zeros(members, jnp.int32).at[_order(values)].set(jnp.arange(members, dtype=jnp.int32))
    pairs = jax.random.randint(key, (2, members), 0, members)
    return jnp.where(standing[pairs[0]] <= standing[pairs[1]], pairs[0], pairs[1])


def _crossed(key: PRNGKeyArray, parents: Float[Array, "members genes"], spread: Array) -> Float[Array, "members genes"]:
    """Mate neighbours: children lie around their parents as if single bits had been exchanged."""
    how, which, swap = jax.random.split(key, 3)
    a, b = parents[::2], parents[1::2]
    u = jax.random.uniform(how, a.shape)
    power = 1 / (spread + 1)
    beta = jnp.where(u <= 0.5, (2 * u) ** power, (2 * (1 - u)) ** -power)
    beta = jnp.where(jax.random.bernoulli(which, 0.5, a.shape), beta, 1.0)
    first, second = ((1 + sign * beta) / 2 * a + (1 - sign * beta) / 2 * b for sign in (1, -1))
    exchanged = jax.random.bernoulli(swap, 0.5, a.shape)
    both = jnp.stack([jnp.where(exchanged, second, first), jnp.where(exchanged, first, second)], axis=1)
    return jnp.clip(both.reshape(parents.shape), 0.0, 1.0)


def _mutated(key: PRNGKeyArray, places: Float[Array, "members genes"], spread: Array) -> Float[Array, "members genes"]:
    """Move about one gene of each child; now and then, to anywhere, so that a choice can reach every other."""
    how, which, where, far = jax.random.split(key, 4)
    u = jax.random.uniform(how, places.shape)
    power = 1 / (spread + 1)
    step = jnp.where(u < 0.5, (2 * u) ** power - 1, 1 - (2 * (1 - u)) ** power)
    moved = jnp.clip(places + step, 0.0, 1.0)
    anywhere = jax.random.bernoulli(far, 0.25, places.shape)
    moved = jnp.where(anywhere, jax.random.uniform(where, places.shape), moved)
    return jnp.where(jax.random.bernoulli(which, 1 / places.shape[1], places.shape), moved, places)


def _is_gene(node: Any) -> bool:
    return isinstance(node, Choice | Range)


def _size(gene: Choice | Range) -> int:
    size = 1
    for axis in gene.shape:
        size *= axis
    return size
