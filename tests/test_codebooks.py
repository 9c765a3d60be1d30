"""Codebooks against the literature, closed forms and a plain argmin."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxquant import _levels, codebooks

# Least distortions and outermost levels of the unit normal: Max 1960 table I for 1 to 5 bits, as printed there and
# continued to 8 bits by Newton's method in the literature on optimal scalar quantizers.
GOLDEN = {
    1: ("0.363380", "0.7979"),
    2: ("0.117482", "1.5104"),
    3: ("0.0345478", "2.1519"),
    4: ("0.00950101", "2.7326"),
    5: ("0.00250467", "3.2607"),
    6: ("6.44240e-4", "3.7441"),
    7: ("1.63478e-4", "4.1897"),
    8: ("4.11851e-5", "4.6035"),
}
DIMS = (None, 2, 3, 64, 128, 576)


def half_unit(printed):
    """Half a unit of the last printed digit."""
    mantissa, _, exponent = printed.partition("e")
    return 0.5 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


@pytest.mark.parametrize("bits", GOLDEN)
def test_normal_codebooks_reach_the_least_distortion(bits):
    book = codebooks.lloyd_max(bits)
    error, outermost = GOLDEN[bits]
    assert abs(codebooks.distortion(book) - float(error)) < half_unit(error)
    assert abs(float(book.centroids[-1]) - float(outermost)) < half_unit(outermost)
    for worse in (book.centroids * 1.03, book.centroids + 0.05):
        assert codebooks.distortion(codebooks.Codebook(centroids=worse)) - float(error) > half_unit(error)


@pytest.mark.parametrize("bits", GOLDEN)
def test_sphere_in_three_dimensions_is_uniform(bits):
    """Archimedes: a coordinate of a point on the 2-sphere is uniform on [-sqrt 3, sqrt 3], variance 1."""
    book = codebooks.lloyd_max(bits, dim=3)
    step = 2 * 3**0.5 / 2**bits
    np.testing.assert_allclose(book.centroids, -(3**0.5) + step * (np.arange(2**bits) + 0.5), atol=3e-7)
    np.testing.assert_allclose(codebooks.distortion(book, dim=3), 4.0**-bits, rtol=1e-9)
    assert abs(codebooks.distortion(book) / 4.0**-bits - 1) > 0.05


def test_sphere_in_two_dimensions_is_the_arcsine_law():
    """One bit: the level is E|t| = sqrt(2) 2 / pi, and the distortion 1 - 8 / pi^2."""
    book = codebooks.lloyd_max(1, dim=2)
    np.testing.assert_allclose(book.centroids, np.array([-1, 1]) * 2**1.5 / np.pi, rtol=1e-7)
    np.testing.assert_allclose(codebooks.distortion(book, dim=2), 1 - 8 / np.pi**2, rtol=1e-7)


@pytest.mark.parametrize("bits", GOLDEN)
def test_sphere_approaches_the_normal(bits):
    normal = codebooks.distortion(codebooks.lloyd_max(bits))
    errors = [codebooks.distortion(codebooks.lloyd_max(bits, dim=dim), dim=dim) for dim in (16, 64, 128, 576)]
    gaps = [normal - error for error in errors]
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3] > 0
    # The excess kurtosis of the marginal is -6 / (dim + 2), and so is the gap to first order.
    np.testing.assert_allclose(gaps[3] * (576 + 2), gaps[2] * (128 + 2), rtol=0.06)


def density(t, dim):
    if dim is None:
        return np.exp(-(t**2) / 2)
    return np.maximum(1 - t**2 / dim, 0) ** ((dim - 3) / 2)


@pytest.mark.parametrize("dim", [None, 5, 64, 576])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_distortion_is_the_integral_and_levels_are_the_means_of_their_cells(bits, dim):
    """By a midpoint sum over a fine grid, which knows nothing of how the moments were found."""
    end = 9.0 if dim is None else dim**0.5
    grid = (np.arange(2_000_000) + 0.5) / 1_000_000 * end - end
    weight = density(grid, dim)
    weight /= weight.sum()
    book = codebooks.lloyd_max(bits, dim=dim)
    levels = np.asarray(book.centroids, np.float64)
    cell = np.searchsorted((levels[1:] + levels[:-1]) / 2, grid)
    mass = np.bincount(cell, weight)
    means = np.bincount(cell, weight * grid) / mass
    # The grid misplaces up to one step at each boundary: relative to the mass of the cell that bounds the mean's error.
    np.testing.assert_allclose(means, levels, atol=2e-5)
    assert np.abs(means - levels * 1.001).max() > 2e-5
    error = np.sum(weight * (grid - levels[cell]) ** 2)
    np.testing.assert_allclose(codebooks.distortion(book, dim=dim), error, rtol=2e-6)


@pytest.mark.parametrize("dim", DIMS)
def test_levels_are_odd_symmetric_and_increasing(dim):
    for bits in GOLDEN:
        levels = np.asarray(codebooks.lloyd_max(bits, dim=dim).centroids)
        assert levels.shape == (2**bits,)
        assert levels.dtype == np.float32
        np.testing.assert_array_equal(levels, -levels[::-1])
        assert (np.diff(levels) > 0).all()
        assert dim is None or levels[-1] < dim**0.5


def test_solved_in_well_under_a_second():
    _levels.best.cache_clear()
    start = time.process_time()
    for dim in (None, 128):
        for bits in GOLDEN:
            codebooks.lloyd_max(bits, dim=dim)
    assert time.process_time() - start < 4, "sixteen codebooks"


def random_levels(size):
    return np.sort(np.random.default_rng(size).normal(size=size)).astype(np.float32)


SIZES = (1, 2, 3, 16, 17, 20, 33, 100, 256)
BOOKS = {f"{size} levels": codebooks.Codebook(centroids=jnp.asarray(random_levels(size))) for size in SIZES}
BOOKS |= {f"{bits} bits": codebooks.lloyd_max(bits, dim=128) for bits in GOLDEN}
assign_all = jax.jit(lambda x: {name: codebooks.assign(book, x) for name, book in BOOKS.items()})
COUNT = 64


def assert_nearest(x, codes, book):
    levels = np.asarray(book.centroids, np.float64)
    distance = np.abs(np.clip(x.astype(np.float64), -1e30, 1e30)[:, None] - levels)
    least = distance.min(axis=-1)
    # A boundary is a midpoint rounded to float32.
    slack = np.abs(levels).max() * np.finfo(np.float32).eps
    assert (codes < len(levels)).all()
    chosen = np.take_along_axis(distance, codes[:, None].astype(int), axis=-1)[:, 0]
    far = chosen - least > slack + 1e-9 * least
    assert not far.any(), x[far]


@settings(max_examples=25, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        COUNT,
        elements=st.floats(width=32, allow_nan=False) | st.floats(-6, 6, width=32) | st.sampled_from([np.inf, -np.inf]),
    )
)
def test_assign_is_the_nearest_level(x):
    for name, codes in assign_all(x).items():
        assert codes.dtype == jnp.uint8
        assert_nearest(x, np.asarray(codes), BOOKS[name])


@pytest.mark.parametrize("name", list(BOOKS))
def test_assign_at_the_boundaries(name):
    """The lower level on a tie, the upper one a hair above, and each level is its own code."""
    book = BOOKS[name]
    boundaries, levels = np.asarray(book.boundaries), np.asarray(book.centroids)
    assert boundaries.shape == (len(levels) - 1,)
    above = np.maximum(np.nextafter(boundaries, np.float32(np.inf)), boundaries + np.finfo(np.float32).tiny)
    x = np.concatenate([boundaries, above, levels])
    want = np.concatenate([np.arange(len(boundaries)), np.arange(len(boundaries)) + 1, np.arange(len(levels))])
    np.testing.assert_array_equal(codebooks.assign(book, jnp.asarray(x)), want)


def test_assign_to_the_ends():
    x = jnp.array([jnp.inf, 3e38, -jnp.inf, -3e38, jnp.nan])
    for book in BOOKS.values():
        last = book.centroids.shape[0] - 1
        assert codebooks.assign(book, x).tolist() == [last, last, 0, 0, 0]


def test_assign_never_expands_over_the_levels():
    """No [..., levels] intermediate: at 8 bits it would be 256 times the input."""
    x = jax.ShapeDtypeStruct((4096, 128), jnp.float32)
    memory = jax.jit(codebooks.assign).lower(BOOKS["8 bits"], x).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 4 * x.size * 4
    wide = jax.jit(lambda book, x: jnp.argmin(jnp.abs(x[..., None] - book.centroids), axis=-1))
    naive = wide.lower(BOOKS["8 bits"], jax.ShapeDtypeStruct((64, 128), jnp.float32)).compile().memory_analysis()
    assert naive.temp_size_in_bytes > 0


def test_lookup_gives_the_level():
    for bits in (1, 4, 5, 8):
        book = BOOKS[f"{bits} bits"]
        codes = jnp.arange(2**bits, dtype=jnp.uint8)[::-1].reshape(2, -1)
        np.testing.assert_array_equal(codebooks.lookup(book, codes), book.centroids[::-1].reshape(2, -1))


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_wrong_bits_are_named(bits):
    with pytest.raises(ValueError, match=f"bits must be an integer from 1 to 8, got {bits}"):
        codebooks.lloyd_max(bits)


def test_wrong_dims_are_named():
    for call in (lambda: codebooks.lloyd_max(2, dim=1), lambda: codebooks.distortion(BOOKS["2 bits"], dim=1)):
        with pytest.raises(ValueError, match="dim must be at least 2, got 1"):
            call()


# Best steps and distortions of equidistant levels for the unit normal: Max 1960, table II.
EQUIDISTANT = {1: ("1.596", "0.3634"), 2: ("0.9957", "0.1188"), 3: ("0.5860", "0.03744"), 4: ("0.3352", "0.01154")}


@pytest.mark.parametrize("bits", EQUIDISTANT)
def test_equidistant_levels_are_those_of_max(bits):
    book = codebooks.uniform(bits)
    step, error = EQUIDISTANT[bits]
    steps = np.diff(np.asarray(book.centroids, np.float64))
    assert np.allclose(steps, steps[0], rtol=1e-6)
    assert abs(steps[0] - float(step)) < half_unit(step)
    assert abs(codebooks.distortion(book) - float(error)) < half_unit(error)
    assert book.grid == "uniform"


@pytest.mark.parametrize("dim", [64, 128])
def test_equidistant_levels_on_the_sphere_have_the_best_step(dim):
    book = codebooks.uniform(2, dim=dim)
    best = codebooks.distortion(book, dim=dim)
    for stretch in (0.99, 1.01):
        other = codebooks.Codebook(centroids=book.centroids * stretch)
        assert codebooks.distortion(other, dim=dim) > best * 1.00001


@pytest.mark.parametrize("dim", [None, 64, 128, 256])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_on_the_grid_are_integers_and_cost_little(bits, dim):
    book = codebooks.on_grid(codebooks.lloyd_max(bits, dim=dim))
    levels = np.asarray(book.centroids, np.float64)
    if bits == 4:
        assert book.grid == "signed"
        integers = levels / levels[-1] * 127
    else:
        assert book.grid == "bytes"
        integers = (levels - levels[0]) / (levels[-1] - levels[0]) * 255
    assert np.abs(integers - np.rint(integers)).max() < 1e-3
    least = codebooks.distortion(codebooks.lloyd_max(bits, dim=dim), dim=dim)
    assert codebooks.distortion(book, dim=dim) < least * (1.003 if bits == 4 else 1.001)


def test_levels_that_do_not_mirror_each_other_become_bytes():
    levels = jnp.sort(jax.random.normal(jax.random.key(0), (16,)))
    book = codebooks.on_grid(codebooks.Codebook(centroids=levels))
    assert book.grid == "bytes"
    np.testing.assert_allclose(book.centroids, levels, atol=float(levels[-1] - levels[0]) / 510 * 1.001)


def test_too_many_levels_for_the_grid_are_refused():
    with pytest.raises(ValueError, match="at most 16 levels, got 32"):
        codebooks.on_grid(codebooks.lloyd_max(5))
