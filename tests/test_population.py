"""The population search: its parts against brute force, its fronts against problems whose Pareto set is known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant import codebooks
from jaxquant.calibrate import allocation, population
from jaxquant.calibrate.population import Choice, Range


def dominated(values):
    """Say for each row whether another one is as good everywhere and better somewhere."""
    return np.array([any((a <= b).all() and (a < b).any() for a in values) for b in values])


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)), min_size=12, max_size=12))
def test_ranks_are_those_of_peeling_by_hand(rows):
    values = np.array(rows, np.float32)
    expected, left, number = np.full(len(values), -1), np.ones(len(values), bool), 0
    while left.any():
        index = np.flatnonzero(left)
        front = index[~dominated(values[index])]
        expected[front], number = number, number + 1
        left[front] = False
    np.testing.assert_array_equal(population.ranks(jnp.asarray(values)), expected)


def test_crowding_is_measured_within_a_rank():
    values = jnp.array([[0.0, 4.0], [1.0, 2.0], [4.0, 0.0], [9.0, 9.0], [8.0, 10.0], [10.0, 8.0]])
    rank = population.ranks(values)
    np.testing.assert_array_equal(rank, [0, 0, 0, 1, 1, 1])
    # Spans are 10 and 10: (4 - 0) / 10 + (4 - 0) / 10, and (10 - 8) / 10 twice.
    np.testing.assert_allclose(population.crowding(values, rank), [np.inf, 0.8, np.inf, 0.4, np.inf, np.inf], rtol=1e-6)


def zdt1(s):
    """Two objectives; the front is f2 = 1 - sqrt(f1), where all but the first number are 0."""
    g = 1 + 9 * jnp.mean(s["x"][1:])
    return jnp.stack([s["x"][0], g * (1 - jnp.sqrt(s["x"][0] / g))])


def test_a_convex_front_is_found_and_covered():
    found = population.evolve(
        jax.random.key(0), {"x": Range(low=0.0, high=1.0, shape=(10,))}, zdt1, members=60, generations=250
    )
    f1, f2 = np.asarray(found.objectives[found.best]).T
    assert found.best.sum() > 50
    assert np.abs(f2 - (1 - np.sqrt(f1))).max() < 0.02
    assert f1.min() < 0.01
    assert f1.max() > 0.98
    assert np.diff(np.sort(f1)).max() < 0.08
    short = population.evolve(
        jax.random.key(0), {"x": Range(low=0.0, high=1.0, shape=(10,))}, zdt1, members=60, generations=5
    )
    worse = np.asarray(short.objectives[short.best])
    assert np.abs(worse[:, 1] - (1 - np.sqrt(worse[:, 0]))).max() > 0.02


def test_a_front_of_three_objectives_is_a_sphere():
    def dtlz2(s):
        radius = 1 + jnp.sum((s["rest"] - 0.5) ** 2)
        a, b = s["angles"] * jnp.pi / 2
        point = jnp.stack([jnp.cos(a) * jnp.cos(b), jnp.cos(a) * jnp.sin(b), jnp.sin(a)])
        return radius * jnp.maximum(point, 0.0)  # the cosine of pi / 2 is a little negative in float32

    space = {"angles": Range(low=0.0, high=1.0, shape=(2,)), "rest": Range(low=-1.0, high=2.0, shape=(4,))}
    found = population.evolve(jax.random.key(1), space, dtlz2, members=100, generations=150)
    away = np.abs(np.linalg.norm(found.objectives[found.best], axis=1) - 1)
    assert found.best.sum() > 80
    assert away.mean() < 0.01
    assert away.max() < 0.1


def bits_problem():
    """Quality, bytes and time of a cache: bits of keys and values in three layers that matter differently."""
    bits = np.arange(1, 5)
    error = np.array([codebooks.distortion(codebooks.lloyd_max(int(b))) for b in bits])
    worth = np.array([[8.0, 1.0], [3.0, 2.0], [1.0, 0.5]])
    table, weights = jnp.asarray(error, jnp.float32), jnp.asarray(worth, jnp.float32)

    def objectives(s):
        size = jnp.sum(s["bits"] * 16 + 2).astype(jnp.float32)
        time = jnp.sum(jnp.where(s["bits"] == 3, 1.5, 1.0))  # a width that takes two planes is read more slowly
        return jnp.stack([jnp.sum(weights * table[s["bits"] - 1]), size, time])

    return {"bits": Choice(values=jnp.asarray(bits), shape=(3, 2))}, objectives, error, worth


def test_every_member_of_a_discrete_front_is_on_it_and_most_of_it_is_found():
    space, objectives, _, _ = bits_problem()
    found = population.evolve(jax.random.key(0), space, objectives, members=400, generations=120)
    every = jnp.asarray(list(itertools.product(range(1, 5), repeat=6)), jnp.int32).reshape(-1, 3, 2)
    values = np.asarray(jax.vmap(lambda bits: objectives({"bits": bits}))(every)).round(4)
    front = {tuple(row) for row in values[np.asarray(population.ranks(jnp.asarray(values)) == 0)]}
    assert 20 < len(front) < 400
    mine = {tuple(row) for row in np.asarray(found.objectives[found.best]).round(4)}
    assert mine <= front
    assert len(mine) >= 0.95 * len(front)


def test_best_is_whom_nobody_beats():
    space = {"x": Range(low=0.0, high=1.0, shape=(5,))}
    found = population.evolve(jax.random.key(0), space, zdt1, members=40, generations=1)
    values = np.asarray(found.objectives)
    beaten = [any((other <= one).all() and (other < one).any() for other in values) for one in values]
    assert 0 < sum(beaten) < 40
    np.testing.assert_array_equal(found.best, np.logical_not(beaten))


def test_no_budget_is_used_better_by_exact_allocation():
    space, objectives, error, worth = bits_problem()
    found = population.evolve(jax.random.key(3), space, objectives, members=400, generations=120)
    losses = worth.reshape(-1, 1) * error
    costs = np.tile(np.arange(1, 5) * 16, (6, 1))
    values = np.asarray(found.objectives, np.float64)
    for budget in (10, 14, 18):
        chosen = allocation.exact(losses, costs, budget * 16)
        best = losses[np.arange(6), chosen].sum()
        within = values[values[:, 1] <= budget * 16 + 12, 0].min()
        assert best - 1e-4 < within < best + 1e-4


def test_settings_are_valid_by_construction_and_a_sweep_does_not_retrace():
    space = {"bits": Choice(values=jnp.array([2, 3, 4]), shape=(5,)), "clip": (Range(low=0.5, high=1.0),)}
    for place in (jnp.zeros(6), jnp.ones(6), jnp.full(6, 1 / 3), jnp.full(6, 1 - 2**-24)):
        settled = population.settle(space, place)
        assert set(np.asarray(settled["bits"]).tolist()) <= {2, 3, 4}
        assert 0.5 <= float(settled["clip"][0]) <= 1.0
    uniform = jax.random.uniform(jax.random.key(0), (3000, 6))
    drawn = np.asarray(jax.vmap(lambda place: population.settle(space, place))(uniform)["bits"])
    assert np.abs(np.bincount(drawn.ravel())[2:] / drawn.size - 1 / 3).max() < 4 * (2 / 9 / drawn.size) ** 0.5

    traces = []

    def objectives(s):
        traces.append(1)
        return jnp.stack([s["x"], 1 - s["x"]])

    def search(high):
        space = {"x": Range(low=jnp.float32(0), high=jnp.float32(high))}
        population.evolve(jax.random.key(0), space, objectives, members=4, generations=2)
        return len(traces)

    assert search(1.0) == search(2.0)


def test_objectives_that_fail_are_never_best():
    found = population.evolve(
        jax.random.key(0), {"x": Range(low=0.0, high=1.0)},
        lambda s: jnp.stack([jnp.where(s["x"] > 0.5, jnp.nan, s["x"]), 1 - s["x"]]), members=40, generations=40,
    )  # fmt: skip
    assert (np.asarray(found.settings["x"])[np.asarray(found.best)] <= 0.5).all()


def test_wrong_arguments_are_refused():
    space = {"x": Range(low=0.0, high=1.0)}
    for members in (2, 7):
        with pytest.raises(ValueError, match="members must be even"):
            population.evolve(jax.random.key(0), space, zdt1, members=members)
    with pytest.raises(ValueError, match="no Choice"):
        population.evolve(jax.random.key(0), {}, zdt1)


def test_parents_are_the_better_of_two_and_mutations_go_both_ways():
    line = jnp.stack([jnp.arange(300.0)] * 2, axis=1)
    parents = population._tournament(jax.random.key(0), line)
    assert abs(np.asarray(parents).mean() - 100) < 5 * 300 / 18**0.5 / 300**0.5  # the lower of two uniform numbers
    middle = jnp.full((2000, 4), 0.5)
    moved = np.asarray(population._mutated(jax.random.key(1), middle, jnp.float32(15)) - middle)
    assert abs((moved[moved != 0] > 0).mean() - 0.5) < 5 * 0.5 / (moved != 0).sum() ** 0.5


def test_children_lie_around_both_parents():
    parents = jnp.stack([jnp.full(300, 0.3), jnp.full(300, 0.7)])
    children = np.asarray(population._crossed(jax.random.key(2), parents, jnp.float32(15)))
    np.testing.assert_allclose(children.sum(axis=0), 1.0, rtol=1e-6)
    as_parents = np.isclose(children[0], 0.3, atol=1e-6) | np.isclose(children[0], 0.7, atol=1e-6)
    for share in (as_parents.mean(), (children[0] < 0.5).mean()):  # bred, and exchanged, with probability 1/2
        assert abs(share - 0.5) < 5 * 0.5 / 300**0.5
    near = {
        spread: np.abs(np.asarray(population._crossed(jax.random.key(2), parents, jnp.float32(spread)))[0] - 0.5)
        for spread in (2, 50)
    }
    assert np.ptp(near[2]) > 2 * np.ptp(near[50])
