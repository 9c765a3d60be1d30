"""Methods against what theory or literature says of them: errors, biases and variances, never first runs."""

import inspect
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import catalogue, codebooks, quantizers, rotations
from jaxquant.methods import (
    copresheaf,
    fp8,
    fraqtl,
    kvquant,
    nestquant,
    oscar,
    polarquant,
    qjl,
    rotorquant,
    trellis,
    turboquant,
    uniform,
)
from jaxquant.pipeline import Pipeline


def decoded(quantizer, x):
    return np.asarray(quantizers.dequantize(quantizer, quantizers.quantize(quantizer, x)), np.float64)


def relative_error(quantizer, x):
    y = np.asarray(x, np.float64)
    return np.sum((decoded(quantizer, x) - y) ** 2, axis=-1) / np.sum(y**2, axis=-1)


# Uniform integers: a step of width w leaves w**2 / 12.


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("kind", [uniform.asymmetric, uniform.symmetric])
def test_uniform_integers_leave_a_twelfth_of_the_squared_step(bits, kind):
    x = jax.random.uniform(jax.random.key(0), (50, 4096), minval=-1.0, maxval=1.0)
    quantizer = kind(dim=4096, bits=bits)
    step = np.asarray(quantizers.quantize(quantizer, x).scales, np.float64)
    levels = 2**bits - 1 if kind is uniform.asymmetric else 2**bits - 2
    np.testing.assert_allclose(step, 2 / levels, rtol=4e-3)  # float16, and the range of a sample
    error = np.mean((decoded(quantizer, x) - np.asarray(x)) ** 2)
    np.testing.assert_allclose(error, np.mean(step**2) / 12, rtol=0.01)
    assert abs(error / (np.mean(step**2) / 11) - 1) > 0.02


def test_uniform_codes_are_against_the_stored_range_and_clip_cuts_it():
    x = jnp.asarray([[1000.0, 1000.3, 1000.9, 1001.0]])
    step = 1 / 15
    assert np.abs(decoded(uniform.asymmetric(dim=4, bits=4), x) - np.asarray(x)).max() <= step * 0.51
    y = jnp.asarray([[-1.0, -0.5, 0.5, 1.0]])
    np.testing.assert_allclose(
        decoded(uniform.asymmetric(dim=4, bits=8, clip=0.5), y), [[-0.5, -0.5, 0.5, 0.5]], rtol=1e-3
    )
    np.testing.assert_allclose(
        decoded(uniform.symmetric(dim=4, bits=8, clip=0.5), y), [[-0.5, -0.5, 0.5, 0.5]], rtol=1e-3
    )


# 8-bit floats: between 2**k and 2**(k+1) numbers of m bits of mantissa are 2**(k-m) apart.


@pytest.mark.parametrize(("dtype", "mantissa"), [("float8_e4m3fn", 3), ("float8_e5m2", 2)])
def test_floats_have_the_spacing_of_their_binade(dtype, mantissa):
    quantizer = fp8.Float8(dim=8192, dtype=dtype, scale_dtype="float32")
    top = float(jnp.finfo(dtype).max)
    x = jax.random.uniform(jax.random.key(1), (8192,), minval=32.0, maxval=64.0).at[0].set(top)
    error = np.mean((decoded(quantizer, x)[1:] - np.asarray(x, np.float64)[1:]) ** 2)
    np.testing.assert_allclose(error, (32 / 2**mantissa) ** 2 / 12, rtol=0.05)


# QJL: E <S q, sign(S k)> kappa |k| = <q, k>; with independent normal rows the variance of one draw of m rows is
# (pi / 2 |q|^2 |k|^2 - <q, k>^2) / m.


@pytest.mark.parametrize("rows", ["gaussian", "orthogonal"])
def test_sketches_are_unbiased_and_as_precise_as_the_lemma_says(rows):
    dim, bits, draws = 32, 2, 600
    q, k = jax.random.normal(jax.random.key(2), (2, dim))
    k = 0.6 * q + 0.8 * k

    def estimate(key):
        sketch = qjl.signs(key, dim=dim, bits=bits, rows=rows)
        return sketch.project(q) @ sketch.expand(sketch.quantize(k))

    found = np.asarray(jax.lax.map(estimate, jax.random.split(jax.random.key(3), draws), batch_size=50), np.float64)
    true = float(q @ k)
    lemma = (math.pi / 2 * float(q @ q) * float(k @ k) - true**2) / (dim * bits)
    # Of a sample's mean and variance: 4 standard errors, and half precision of the norm.
    assert abs(found.mean() - true) < 4 * (lemma / draws) ** 0.5 + abs(true) * 2**-11
    if rows == "gaussian":
        assert abs(found.var() / lemma - 1) < 4 * (2 / draws) ** 0.5
    else:
        assert found.var() < 0.75 * lemma
    assert abs(found.mean() / 1.25 - true) > 4 * (lemma / draws) ** 0.5


# PolarQuant: the squared error is 2 (1 - c_1 c_2 ...) of the squared length, c_l = E cos(angle - level).


def expected_cosine(number, levels):
    """Integrate over the density of lemma 2, with the nearest level, on a fine grid."""
    top = 2 * math.pi if number == 1 else math.pi / 2
    points = (np.arange(100_000) + 0.5) / 100_000 * top - (math.pi if number == 1 else 0)
    density = np.ones_like(points) if number == 1 else np.sin(2 * points) ** (2 ** (number - 1) - 1)
    apart = np.abs(points[:, None] - np.asarray(levels, np.float64))
    apart = np.minimum(apart, 2 * math.pi - apart) if number == 1 else apart
    return np.sum(density * np.cos(apart.min(axis=1))) / np.sum(density)


@pytest.mark.parametrize("quantizer", [
    polarquant.paper(jax.random.key(0), dim=128), polarquant.polar(jax.random.key(0), dim=64, bits=2),
], ids=["paper", "2 bits"])  # fmt: skip
def test_polar_error_is_the_product_of_expected_cosines(quantizer):
    x = jax.random.normal(jax.random.key(4), (4000, quantizer.dim))
    cosines = [expected_cosine(i + 1, levels) for i, levels in enumerate(quantizer.angles)]
    expected = 2 * (1 - math.prod(cosines))
    found = relative_error(quantizer, x)
    # Blocks weigh in by their length, which angles are independent of; float16 radii add 2**-23.
    assert abs(found.mean() - expected) < 4 * found.std() / len(found) ** 0.5 + 1e-6
    assert abs(found.mean() - 2 * (1 - math.prod(cosines[:-1]))) > 4 * found.std() / len(found) ** 0.5
    y = decoded(quantizer, x)
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=2e-3)


def test_polar_levels_are_a_maximum_and_symmetric():
    for number, bits in ((2, 3), (3, 2), (5, 1)):
        levels, cosine = polarquant.levels(number, bits)
        np.testing.assert_allclose(levels + levels[::-1], math.pi / 2, atol=1e-6)
        np.testing.assert_allclose(expected_cosine(number, levels), cosine, rtol=1e-6)
        for i in range(len(levels)):
            for step in (-0.02, 0.02):
                assert expected_cosine(number, np.sort(levels + step * (np.arange(len(levels)) == i))) < cosine


@pytest.mark.parametrize("shift", [-0.7, 0.7])
def test_levels_of_the_circle_may_be_anywhere_on_it(shift):
    """Around the seam, the nearest level is the first one again."""
    usual = polarquant.build(jax.random.key(0), dim=2, widths=(2,))
    quantizer = polarquant.Polar(rotation=usual.rotation, angles=(usual.angles[0] + shift,), widths=(2,))
    angles = jnp.linspace(-3.1, 3.1, 200)
    y = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    found = quantizer.project(quantizers.dequantize(quantizer, quantizers.quantize(quantizer, quantizer.restore(y))))
    assert np.sum(np.asarray(found * y), axis=-1).min() > math.cos(math.pi / 4) - 2e-3


def test_the_papers_setting_costs_what_the_paper_says():
    code = quantizers.quantize(polarquant.paper(jax.random.key(0), dim=128), jnp.ones(128))
    assert code.nbytes * 8 / 128 == 3.875
    for dim, bits in itertools.product((64, 96, 128), (2, 3, 4)):
        size = polarquant._size(dim, polarquant.shared_out(dim, bits))
        assert dim * bits / 8 - 1 <= size <= dim * bits / 8
    code = quantizers.quantize(polarquant.polar(jax.random.key(0), dim=96, bits=3), jnp.ones(96))
    assert code.codes.nbytes == polarquant._size(96, polarquant.shared_out(96, 3))


# E8: determinant 1, 240 shortest points of squared length 2, second moment 929/12960 a coordinate.


def test_e8_is_e8():
    generator = nestquant._GENERATOR
    assert abs(np.linalg.det(generator)) == pytest.approx(1)
    whole = [p for p in itertools.product((-1, 0, 1), repeat=8) if sum(map(abs, p)) == 2]
    half = [p for p in itertools.product((-0.5, 0.5), repeat=8) if sum(p) % 2 == 0]
    shortest = np.array(whole + half)
    assert len(shortest) == 240
    np.testing.assert_array_equal(nestquant.nearest(jnp.asarray(shortest, jnp.float32)), shortest)
    inside = shortest @ np.linalg.inv(generator)
    np.testing.assert_allclose(inside, np.round(inside), atol=1e-12)


def test_e8_has_the_second_moment_of_conway_and_sloane():
    x = jax.random.uniform(jax.random.key(5), (400_000, 8), maxval=4.0)
    point = nestquant.nearest(x)
    each = np.sum((np.asarray(x, np.float64) - np.asarray(point)) ** 2, axis=-1) / 8
    expected = 929 / 12960
    assert abs(each.mean() - expected) < 4 * each.std() / len(each) ** 0.5
    assert 1 / 12 - expected > 40 * each.std() / len(each) ** 0.5  # a cube's
    assert each.max() <= 1 / 8 + 1e-6  # the covering radius is 1
    other = (
        x
        + jnp.asarray(np.round(np.random.default_rng(0).normal(size=(100, 1, 8))) @ nestquant._GENERATOR, jnp.float32)[
            0
        ]
    )
    np.testing.assert_allclose(nestquant.nearest(other) - point, np.broadcast_to(other[0] - x[0], x.shape), atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_voronoi_codes_hold_every_point_of_their_cell_and_beat_scalars_at_their_rate(bits):
    codes = jax.random.randint(jax.random.key(6), (2000, 8), 0, 2**bits)
    points = nestquant._leader(codes, bits)
    np.testing.assert_array_equal(nestquant._coordinates(points, bits), codes)
    np.testing.assert_array_equal(nestquant.nearest(points), points)
    assert np.linalg.norm(points, axis=-1).max() <= 2**bits + 1e-6
    quantizer = nestquant.lattice(jax.random.key(7), dim=128, bits=bits)
    error = relative_error(quantizer, jax.random.normal(jax.random.key(8), (2000, 128))).mean()
    rate = bits + 0.25
    below, above = (codebooks.distortion(codebooks.lloyd_max(b)) for b in (bits, bits + 1))
    scalar = below * (above / below) ** 0.25  # at the same rate
    assert 4.0**-rate < error < 0.97 * scalar


# KVQuant: what is kept apart is right to half precision, whatever it is; channels are centred and scaled.


def test_outliers_are_kept_to_half_precision():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(1, 1, 1000, 64)) + 20 * (np.arange(64) == 7)
    keys, values = kvquant.fit(
        jax.random.key(0), bits_k=3, bits_v=3, key_samples=x, value_samples=x,
        query_moments=np.eye(64)[None, None], outliers=2,
    )  # fmt: skip
    y = x[0, :, :50].astype(np.float32)
    y[0, :, 11] += 500 * np.where(np.arange(50) % 2, 1, -1)
    for quantizer in (keys[0], values[0]):
        found = decoded(quantizer, jnp.asarray(y)[None])[0]
        assert np.abs(found[0, :, 11] - y[0, :, 11]).max() < 500 * 2**-9
        assert np.mean((found - y)[..., np.arange(64) != 11] ** 2) < 3 * codebooks.distortion(codebooks.lloyd_max(3))
        code = quantizers.quantize(quantizer, jnp.asarray(y)[None])
        assert code.nbytes / 50 == 24 + 2 * 3 + (4 if quantizer.middle is None else 0)
    plain = kvquant.fit(
        jax.random.key(0), bits_k=3, bits_v=3, key_samples=x, value_samples=x,
        query_moments=np.eye(64)[None, None], outliers=0,
    )[0][0]  # fmt: skip
    assert np.abs(decoded(plain, jnp.asarray(y)[None])[0, 0, :, 11] - y[0, :, 11]).min() > 100


def test_channel_ranges_remove_means_and_scales():
    generator = np.random.default_rng(1)
    scales, means = np.exp(generator.normal(size=64) * 1.5), generator.normal(size=64) * 30
    x = generator.normal(size=(1, 2, 2000, 64)) * scales + means
    keys, _ = kvquant.fit(
        jax.random.key(0), bits_k=3, bits_v=3, key_samples=x, value_samples=x,
        query_moments=np.broadcast_to(np.diag(1 / scales**2), (1, 2, 64, 64)), outliers=0,
    )  # fmt: skip
    found = decoded(keys[0], jnp.asarray(x[0, :, :200], jnp.float32)[None])[0]
    error = np.mean(((found - x[0, :, :200]) / scales) ** 2)
    best = codebooks.distortion(codebooks.lloyd_max(3))
    assert best * 0.95 < error < best * 1.1


# Fitted codebooks recover Lloyd-Max on normal samples, and a head of another kind gets another book.


def test_fitted_levels_are_lloyd_max_on_normal_samples():
    x = np.random.default_rng(2).normal(size=400_000)
    for bits in (1, 2, 3):
        found = codebooks.fitted(x, np.ones_like(x), bits=bits)
        best = codebooks.distortion(codebooks.lloyd_max(bits))
        assert best * (1 - 1e-6) <= codebooks.distortion(found) < best * 1.0005
    doubled = codebooks.fitted(np.append(x, 9.0), np.append(np.ones_like(x), 1e6), bits=1)
    np.testing.assert_allclose(doubled.centroids[1], 9.0, atol=0.1)
    with pytest.raises(ValueError, match="positive sum"):
        codebooks.fitted(x, np.zeros_like(x), bits=2)


def test_heads_of_one_kind_share_a_codebook():
    generator = np.random.default_rng(3)
    x = generator.normal(size=(2, 2, 400, 64))
    x[0, 1] = np.sign(x[0, 1])  # without a rotation, two levels would hold it all
    x[1, 0] = np.sign(x[1, 0])
    book = copresheaf._types(np.quantile(x.reshape(4, -1), copresheaf._QUANTILES, axis=1).T, 2)
    assert book[0] == book[3] != book[1] == book[2]
    z = generator.normal(size=(5, 2, 30_000))  # with two kinds, even the farthest is right
    each = np.stack([z[0], np.sign(z[1]), np.exp(z[2]), -np.exp(z[3]), z[4] ** 3]).reshape(10, -1)
    kinds = copresheaf._types(np.quantile(each, copresheaf._QUANTILES, axis=1).T, 5)
    assert (kinds[::2] == kinds[1::2]).all()
    assert len(set(kinds)) == 5
    keys, _ = copresheaf.fit(jax.random.key(0), bits_k=3, bits_v=3, key_samples=x, value_samples=x, types=1)
    np.testing.assert_array_equal(keys[0].levels, keys[1].levels)
    error = relative_error(keys[0], jnp.asarray(x[0], jnp.float32)[None]).mean()
    assert abs(error / codebooks.distortion(codebooks.lloyd_max(3), dim=64) - 1) < 0.1


def test_levels_are_those_of_a_head_and_of_its_long_vectors():
    generator = np.random.default_rng(6)
    signs, normal = np.sign(generator.normal(size=(900, 64))), generator.normal(size=(900, 64))

    def fitted(y, types):
        """Give the upper of two levels of each head, for vectors that are y behind the rotation."""
        x = np.asarray(turn.unrotate(jnp.asarray(y, jnp.float32)), np.float64)
        keys, _ = copresheaf.fit(jax.random.key(0), bits_k=1, bits_v=1, key_samples=x, value_samples=x, types=types)
        return np.array([layer.levels[..., 1] for layer in keys])

    turn = rotations.hadamard(jax.random.split(jax.random.key(0))[0], 64)
    half = (2 / np.pi) ** 0.5  # the mean of a half of the normal density
    heads = np.array([[normal, signs], [normal, normal]])
    np.testing.assert_allclose(fitted(heads, 2), [[half, 1], [half, half]], atol=0.02)
    for long, short, level in ((normal, signs, half), (signs, normal, 1)):
        both = np.concatenate([100 * long[:100], short])[None, None]
        np.testing.assert_allclose(fitted(both, 1), level, atol=0.02)


# What scales keep: the length of keys, and of values below 3 bits the inner product with themselves.


@pytest.mark.parametrize("module", [turboquant, trellis, nestquant, rotorquant, copresheaf], ids=lambda m: m.__name__)
@pytest.mark.parametrize("bits", [2, 3])
def test_scales_keep_what_those_of_turboquant_keep(module, bits):
    x = jax.random.normal(jax.random.key(11), (1, 1, 200, 64)) * 3
    given = {"bits_k": 2, "bits_v": bits}
    if hasattr(module, "fit"):
        samples = {name: np.asarray(x) for name in ("key_samples", "value_samples")}
        pair = [half[0] for half in module.fit(jax.random.key(12), **given, **samples)]
    else:
        pair = module.kv(jax.random.key(12), dim=64, **given)
    exact = np.asarray(x, np.float64)
    square, rounding = np.sum(exact**2, axis=-1), 2.0**-10  # of float16, and of float32 sums
    for half, unbiased in zip(pair, (False, bits < 3), strict=True):
        y = decoded(half, x)
        length, along = np.sum(y * y, axis=-1) / square, np.sum(y * exact, axis=-1) / square
        kept, other = (along, length) if unbiased else (length, along)
        np.testing.assert_allclose(kept, 1, atol=2 * rounding)
        assert np.abs(other - 1).mean() > 5 * rounding  # both cannot be right: 3 bits leave 4**-3 of error at least


# OSCAR: second moments of queries have equal diagonals behind its rotation.


def test_oscar_spreads_what_queries_read():
    generator = np.random.default_rng(4)
    a = generator.normal(size=(64, 64)) * np.exp(generator.normal(size=64) * 2)
    moments = a @ a.T
    rotation = oscar.spread(jax.random.key(0), moments)
    matrix = np.asarray(rotation.matrix, np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(64), atol=1e-5)
    diagonal = np.diag(matrix @ moments @ matrix.T)
    np.testing.assert_allclose(diagonal, np.trace(moments) / 64, rtol=1e-4)
    usual = np.asarray(turboquant.mse(jax.random.key(0), dim=64, bits=2).rotation.rotate(jnp.eye(64))).T
    assert np.ptp(np.diag(usual @ moments @ usual.T)) > 0.5 * np.trace(moments) / 64


def test_oscar_hears_every_head_alike_and_tells_keys_from_values():
    generator = np.random.default_rng(5)
    a = generator.normal(size=(2, 1, 2, 64, 64)) * np.exp(generator.normal(size=64) * 2)
    moments = a @ np.swapaxes(a, -1, -2)
    moments[:, :, 1] *= 1e4  # a head that shouts
    keys, values = oscar.fit(
        jax.random.key(0), bits_k=3, bits_v=2, query_moments=moments[0], weighted_values=moments[1]
    )
    for (quantizer,), own, other in ((keys, moments[0], moments[1]), (values, moments[1], moments[0])):
        matrix = np.asarray(quantizer.rotation.matrix, np.float64)
        heads = [(each / np.trace(each, axis1=1, axis2=2)[:, None, None]).sum(axis=0) for each in (own[0], other[0])]
        mine, theirs = (np.diag(matrix @ each @ matrix.T) for each in heads)
        np.testing.assert_allclose(mine, 2 / 64, rtol=1e-3)
        assert np.ptp(theirs) > 0.1 / 64
    assert (keys[0].bits, values[0].bits) == (3, 2)
    np.testing.assert_allclose((keys[0].clip, values[0].clip), (0.96, 0.92), rtol=1e-6)  # the paper's


# fraQtl: each part of the eigen-coordinates leaves the error of its own bits, each head has a basis of its own.


def turboquant_error(bits, dim):
    """Give the squared error that TurboQuant leaves of normal vectors of unit length."""
    usual = turboquant.mse(jax.random.key(1), dim=dim, bits=bits, scale=turboquant.scales(bits)[1])
    return relative_error(usual, jax.random.normal(jax.random.key(2), (2000, dim))).mean()


@pytest.mark.parametrize(("bits", "share"), [(2, 2), (4, 2), (2, 4), (3, 4)])
def test_fraqtl_leaves_the_error_of_each_part(bits, share):
    generator = np.random.default_rng(6)
    turn, count = np.linalg.qr(generator.normal(size=(128, 128)))[0], 128 // share
    spectrum = np.repeat([1.0, 1 / 16], [count, 128 - count])
    x = (generator.normal(size=(2000, 128)) * spectrum**0.5) @ turn.T
    quantizer = fraqtl.split(jax.random.key(0), (turn * spectrum) @ turn.T, bits=bits, share=share)
    error = np.mean(np.sum((decoded(quantizer, jnp.asarray(x, jnp.float32)) - x) ** 2, axis=-1))
    parts = [(bits + share - 1, count, spectrum[:count]), (bits - 1, 128 - count, spectrum[count:])]
    expected = sum(turboquant_error(b, n) * energy.sum() for b, n, energy in parts)
    np.testing.assert_allclose(error, expected, rtol=0.02)
    swapped = fraqtl.split(jax.random.key(0), -(turn * spectrum) @ turn.T, bits=bits, share=share)
    other = np.mean(np.sum((decoded(swapped, jnp.asarray(x, jnp.float32)) - x) ** 2, axis=-1))
    assert other > 2 * expected
    assert quantizers.quantize(quantizer, jnp.ones(128)).nbytes == 128 * bits // 8 + 4


def test_fraqtl_gives_every_head_a_basis_and_tells_keys_from_values():
    generator = np.random.default_rng(7)
    a = generator.normal(size=(2, 2, 3, 64, 64)) * np.exp(generator.normal(size=64))
    moments = a @ np.swapaxes(a, -1, -2)
    arguments = {"bits_k": 3, "bits_v": 2, "weighted_values": moments[1]}
    keys, values = fraqtl.fit(jax.random.key(0), **arguments)
    both = fraqtl.fit_both(jax.random.key(0), key_moments=moments[0], **arguments)
    assert (len(keys), len(values), keys[0].bits, keys[0].scale) == (2, 2, 3, "preserve")
    for half, own, bits, scales in zip(both, moments, (3, 2), ({"preserve"}, {"preserve", "unbiased"}), strict=True):
        for layer, quantizer in enumerate(half):
            assert (quantizer.first.bits, quantizer.others.bits) == (bits + 1, bits - 1)
            assert {quantizer.first.scale, quantizer.others.scale} == scales
            rows = np.asarray(quantizer.basis, np.float64)
            turned = rows @ own[layer] @ np.swapaxes(rows, -1, -2)
            energy = np.diagonal(turned, axis1=-2, axis2=-1)
            assert (np.diff(energy) <= 0).all()
            largest = energy[:, 0, None, None]
            assert (np.abs(turned - energy[..., None] * np.eye(64)) < 1e-4 * largest).all()
            assert (np.abs(rows @ own[layer, ::-1] @ np.swapaxes(rows, -1, -2) - turned) > 1e-2 * largest).any()
    for mine, theirs in zip(values, both[1], strict=True):
        np.testing.assert_array_equal(mine.basis, theirs.basis)


# RotorQuant: as good as TurboQuant on normal vectors, several times worse where channels stick out.


def test_rotors_cannot_spread_an_outlier():
    x = jax.random.normal(jax.random.key(9), (500, 128))
    spiked = x.at[:, 5].add(30.0)
    rotor = rotorquant.rotor(jax.random.key(10), dim=128, bits=4)
    usual = turboquant.mse(jax.random.key(10), dim=128, bits=4, scale="preserve", rotation="haar")
    assert relative_error(rotor, x).mean() < 1.1 * relative_error(usual, x).mean()
    assert relative_error(rotor, spiked).mean() > 10 * relative_error(usual, spiked).mean()


# The catalogue.


def test_the_catalogue_reads_what_files_say():
    found = catalogue.entries()
    assert found["polarquant"].source.startswith("I. Han, P. Kacham")
    assert "2502.02617" in found["polarquant"].source
    assert "\n" not in found["kvquant"].differs
    assert set(found["uniform"].builders) == {"", "symmetric", "Hadamard"}
    assert catalogue.wanted(kvquant.fit) == ["key_samples", "value_samples", "query_moments"]
    assert catalogue.wanted(turboquant.kv) == []


def test_costs_are_counted_from_the_storage():
    for builder, per_vector in {turboquant.kv: 66, uniform.kv: 68, uniform.symmetric_kv: 66}.items():
        assert catalogue.cost(builder).bytes_per_token == 2 * per_vector
    assert catalogue.cost(fp8.kv)[:2] == (8, 260.0)
    dense = catalogue.cost(lambda key, *, dim, bits_k, bits_v: (
        turboquant.mse(key, dim=dim, bits=bits_k, rotation="haar"),) * 2)  # fmt: skip
    assert dense.encode > 2 * 128  # a product with a matrix of 128 rows is 256 operations a coordinate
    assert catalogue.cost(uniform.kv).encode < 40


def built(builder, bits_k, bits_v):
    """Build for random data, and give the quantizers of keys and of values."""
    random = np.random.default_rng(0)
    given = {"dim": 64} if "dim" in inspect.signature(builder).parameters else {}
    for name in catalogue.wanted(builder):
        x = random.normal(size=(1, 1, 256, 64))
        given[name] = x if "samples" in name else np.einsum("lhsd,lhse->lhde", x, x)
    made = builder(jax.random.key(0), bits_k=bits_k, bits_v=bits_v, **given)
    if isinstance(made, Pipeline):
        return made.keys, made.values
    return tuple(half[0] if isinstance(half, tuple) else half for half in made)


# fp8 has 8 bits alone
@pytest.mark.parametrize(
    "name", [name for name, entry in catalogue.entries().items() if entry.builders and name != "fp8"]
)
def test_bits_of_keys_go_to_keys_and_those_of_values_to_values(name):
    def sizes(builder, *bits):
        x = jax.ShapeDtypeStruct((1, 1, 64, 64), jnp.float32)
        codes = [jax.eval_shape(quantizer.quantize, x) for quantizer in built(builder, *bits)]
        return [sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(code)) for code in codes]

    for builder in catalogue.entries()[name].builders.values():
        same, more_keys, more_values = (sizes(builder, *bits) for bits in ((3, 3), (4, 3), (3, 4)))
        assert more_keys[0] > same[0] == more_values[0]
        assert more_values[1] > same[1] == more_keys[1]
