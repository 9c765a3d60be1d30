"""Rotations against explicit matrices, quaternion products and the moments of Haar measure."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import rotations

EPS = float(np.finfo(np.float32).eps)
DIMS = (64, 80, 96, 112, 128, 160, 192, 256, 576)
KEY = jax.random.key(3)

MAKERS = {
    "haar": rotations.haar,
    "hadamard": lambda key, dim: rotations.hadamard(key, dim, rounds=2),
    "one round": lambda key, dim: rotations.hadamard(key, dim, rounds=1),
    "rotor": rotations.rotor,
    "identity": lambda key, dim: rotations.Identity(dim=dim),
}
CASES = [("haar", dim) for dim in (3, 45, 64, 80, 576)] + [("hadamard", dim) for dim in DIMS]
CASES += [(name, dim) for name in ("one round", "rotor", "identity") for dim in (64, 80, 128)]


@functools.cache
def matrices():
    """Every rotation, applied to the unit vectors there and back: one program for all of them."""

    @jax.jit
    def program(made, units):  # units as an argument: XLA would spend a minute folding products of constants
        there = {case: rotation.rotate(units[case]) for case, rotation in made.items()}
        back = {case: rotation.unrotate(units[case]) for case, rotation in made.items()}
        return there, back

    made = jax.jit(lambda key: {case: MAKERS[case[0]](key, case[1]) for case in CASES})(KEY)
    for (_, dim), rotation in made.items():
        assert rotation.dim == dim
    return jax.tree.map(lambda x: np.asarray(x, np.float64), program(made, {case: jnp.eye(case[1]) for case in CASES}))


def tolerance(dim):
    """Worst case of a float32 sum of dim products of unit rows, twice (there and back)."""
    return 2 * (dim + 2) * EPS


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_orthogonal_and_inverted_to_rounding(case):
    there, back = (table[case] for table in matrices())
    unit = np.eye(case[1])
    atol = tolerance(case[1])
    np.testing.assert_allclose(there @ there.T, unit, rtol=0, atol=atol)
    np.testing.assert_allclose(back, there.T, rtol=0, atol=atol)
    np.testing.assert_allclose(there @ back, unit, rtol=0, atol=atol)
    assert np.abs(there @ there.T * 1.002 - unit).max() > 10 * atol
    if case[0] == "identity":
        np.testing.assert_array_equal(there, unit)
    elif case[1] > 3:
        assert np.abs(there @ there - unit).max() > 0.1, "a reflection would hide a wrong order of its factors"


def sylvester(dim):
    matrix = np.ones((1, 1))
    while len(matrix) < dim:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(dim)


transforms = jax.jit(lambda inputs: [rotations.hadamard_transform(x) for x in inputs])


def test_hadamard_transform_is_sylvesters_matrix_on_powers_of_two():
    dims = (2, 16, 128, 256, 2048)
    result = transforms([np.eye(dim, dtype=np.float32)[:40] for dim in dims])
    for dim, got in zip(dims, result, strict=True):
        want = sylvester(dim)[:40]
        got = np.asarray(got)
        np.testing.assert_allclose(got, want, rtol=4 * EPS * np.log2(dim))
        if dim > 2:
            assert not np.allclose(got, np.roll(want, 1, axis=1))


def test_hadamard_transform_elsewhere_is_sylvesters_matrix_times_hartleys():
    """The transform is part of what stored codes mean, so another symmetric matrix would not do as well."""
    odd = np.arange(3) * np.arange(3)[:, None] * 2 * np.pi / 3
    want = np.kron((np.cos(odd) + np.sin(odd)) / np.sqrt(3), sylvester(4))
    got = np.asarray(rotations.hadamard_transform(jnp.eye(12)))
    np.testing.assert_allclose(got, want, atol=16 * EPS)
    assert not np.allclose(got, np.kron(sylvester(4), (np.cos(odd) + np.sin(odd)) / np.sqrt(3)), atol=1e-3)


def test_hadamard_transform_elsewhere_is_symmetric_and_its_own_inverse():
    dims = (6, 80, 96, 112, 576)
    result = transforms([np.eye(dim, dtype=np.float32) for dim in dims])
    for dim, got in zip(dims, result, strict=True):
        got = np.asarray(got, np.float64)
        np.testing.assert_allclose(got, got.T, atol=tolerance(dim))
        np.testing.assert_allclose(got @ got, np.eye(dim), atol=tolerance(dim))
        # |cos + sin| <= sqrt(2): no entry is far from flat.
        assert np.abs(got).max() <= np.sqrt(2 / dim) + EPS


@pytest.mark.parametrize("dim", [80, 128])
def test_hadamard_applies_its_rounds_in_order(dim):
    made = rotations.hadamard(KEY, dim, rounds=2)
    transform = np.asarray(rotations.hadamard_transform(jnp.eye(dim)), np.float64)
    first, second = np.asarray(made.signs, np.float64)
    want = transform @ np.diag(second) @ transform @ np.diag(first)
    there = matrices()[0]["hadamard", dim].T
    np.testing.assert_allclose(there, want, atol=tolerance(dim))
    swapped = transform @ np.diag(first) @ transform @ np.diag(second)
    assert np.abs(there - swapped).max() > 0.1


def test_second_round_mixes_a_one_hot_vector():
    one = matrices()[0]["one round", 128][5]
    np.testing.assert_allclose(np.abs(one), 128**-0.5, rtol=1e-6)
    two = matrices()[0]["hadamard", 128][5] * 128**0.5
    # Nearly normal: fourth moment 3, and the mean of 128 fourth powers deviates by sqrt(96 / 128).
    assert abs(np.mean(two**4) - 3) < 5 * np.sqrt(96 / 128)
    assert np.mean(two**4) > 1.5


def moments(sample):
    """Normalized deviations of E tr = 0, E tr^2 = 1, E det = 0 (Diaconis and Shahshahani 1994), in CLT units."""
    count = len(sample)
    trace = np.trace(sample, axis1=1, axis2=2)
    det = np.linalg.det(sample)
    return np.sqrt(count) * np.array([trace.mean(), (np.mean(trace**2) - 1) / np.sqrt(2), det.mean()])


def test_haar_has_the_moments_of_haar_measure():
    keys = jax.random.split(KEY, 2000)
    sample = np.asarray(jax.jit(jax.vmap(lambda key: rotations.haar(key, 6).matrix))(keys), np.float64)
    assert np.abs(moments(sample)).max() < 5
    # Q as QR leaves it is not uniform, and neither is one reflected to determinant 1 everywhere.
    raw = np.asarray(jnp.linalg.qr(jax.vmap(lambda key: jax.random.normal(key, (6, 6)))(keys))[0], np.float64)
    assert np.abs(moments(raw)).max() > 20
    proper = sample.copy()
    proper[:, 0] *= np.linalg.det(sample)[:, None]
    assert np.abs(moments(proper)).max() > 20


def test_rotor_is_the_quaternion_product_and_leaves_the_tail():
    made = rotations.rotor(KEY, 128)
    x = np.random.default_rng(0).normal(size=(5, 128)).astype(np.float32)
    got = np.asarray(made.rotate(jnp.asarray(x)))
    np.testing.assert_array_equal(got[:, 126:], x[:, 126:])
    scalar, axis = np.split(np.asarray(made.quaternions, np.float64), [1], axis=-1)
    np.testing.assert_allclose(scalar[:, 0] ** 2 + (axis**2).sum(-1), 1, atol=4 * EPS)
    triples = x[:, :126].reshape(5, 42, 3).astype(np.float64)
    # v' = v + 2 w (u x v) + 2 u x (u x v)
    turn = np.cross(np.broadcast_to(axis, triples.shape), triples)
    want = triples + 2 * scalar * turn + 2 * np.cross(np.broadcast_to(axis, triples.shape), turn)
    np.testing.assert_allclose(got[:, :126].reshape(5, 42, 3), want, atol=40 * EPS)
    lengths = [np.linalg.norm(t, axis=-1) for t in (got[:, :126].reshape(5, 42, 3), triples)]
    np.testing.assert_allclose(*lengths, rtol=20 * EPS)
    assert np.abs(got[:, :126] - x[:, :126]).max() > 0.5


@pytest.mark.parametrize("name", list(MAKERS))
def test_bfloat16_is_computed_in_float32_and_rounded_once(name):
    made = MAKERS[name](KEY, 64)
    x = jax.random.normal(jax.random.key(1), (2, 3, 64)).astype(jnp.bfloat16)
    for turn in (made.rotate, made.unrotate):
        got = turn(x)
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(got, turn(x.astype(jnp.float32)).astype(jnp.bfloat16))


@pytest.mark.parametrize("name", ["haar", "hadamard", "rotor"])
def test_products_are_full_float32_on_every_platform(name):
    """GPUs and TPUs multiply float32 in fewer bits unless told otherwise; a CPU would not show it."""
    made = MAKERS[name](KEY, 96)
    for turn in (made.rotate, made.unrotate):
        lowered = jax.jit(turn).lower(jax.ShapeDtypeStruct((2, 96), jnp.float32)).as_text()
        products = [line for line in lowered.splitlines() if "dot_general" in line]
        assert products
        assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


@pytest.mark.parametrize("name", ["haar", "hadamard", "rotor"])
def test_the_key_decides(name):
    same, again, other = (jax.tree.leaves(MAKERS[name](jax.random.key(seed), 64))[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(same, again)
    assert (np.asarray(same) != np.asarray(other)).mean() > 0.3


def test_what_is_stored():
    """Signs alone for a Hadamard, four numbers a triple for a rotor, the matrix for a dense rotation."""
    sizes = {name: sum(leaf.nbytes for leaf in jax.tree.leaves(MAKERS[name](KEY, 128))) for name in MAKERS}
    assert sizes == {"haar": 4 * 128**2, "hadamard": 2 * 128, "one round": 128, "rotor": 42 * 16, "identity": 0}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rotations.haar(KEY, 0), "dim must be positive, got 0"),
        (lambda: rotations.hadamard(KEY, 45), "dim must be even and positive for a Hadamard rotation, got 45"),
        (lambda: rotations.hadamard(KEY, 0), "dim must be even and positive for a Hadamard rotation, got 0"),
        (lambda: rotations.hadamard(KEY, 64, rounds=0), "rounds must be at least 1, got 0"),
        (lambda: rotations.rotor(KEY, 2), "dim must be at least 3 for a rotor, got 2"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
