"""Searches of codebooks, the worst-case metric, and the peers of calibration, against NumPy and against theory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llama
from tiny_llama import DIM, HEADS, KV_HEADS, LAYERS, VOCABULARY

from jaxquant import quantizers
from jaxquant.calibrate import bases, fit, head_types, rank, refine, statistics


@pytest.fixture(scope="module")
def decoder():
    return tiny_llama.decoder()


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, VOCABULARY, (4, 96))


@pytest.fixture(scope="module")
def found(decoder, tokens):
    seen = statistics.collect(decoder, tokens, batch=4, samples=4 * 96)
    # Random weights give flat attention: sharper queries make errors of keys visible.
    return dataclasses.replace(seen, query_samples=4 * seen.query_samples)


@pytest.fixture(scope="module")
def keys(found):
    basis = bases.karhunen_loeve(bases.shrunk(found.key_covariance, 0.01), bases.shrunk(found.query_moments, 0.1))
    fitted = fit.fit(basis, found.keys / found.tokens, found.key_samples)
    return fit.build(fitted, np.full((LAYERS, DIM // 8), 2))


def test_no_query_pays_more_than_dim_in_the_worst_case_metric():
    generator = np.random.default_rng(0)
    often = generator.normal(size=(1, 2000, 8)) * np.r_[np.ones(7), 0.01]
    rare = np.eye(8)[[7, 7, 7]][None] * 2.0
    queries = np.concatenate([often, rare], axis=1)
    metric = bases.worst_case(queries, rounds=300)[0]
    mean = (queries[0].T @ queries[0]) / queries.shape[1]
    assert np.trace(metric) == pytest.approx(np.trace(mean))

    def worst(m):
        """The largest payment at one rate, so one determinant."""
        m = m / np.linalg.det(m) ** (1 / 8)
        return np.max(np.einsum("nd,de,ne->n", queries[0], np.linalg.inv(m), queries[0]))

    assert worst(metric) < 0.1 * worst(mean)
    for _ in range(20):  # no other metric does better
        turn = generator.normal(size=(8, 8)) * 0.2
        assert worst(metric) < 1.05 * worst((np.eye(8) + turn) @ metric @ (np.eye(8) + turn).T)


def laplacian(generator, layers=2, heads=2, samples=160, dim=8):
    """Heads that all store one distribution at scales of their own, in few samples."""
    scales = generator.uniform(0.5, 2.0, (layers, heads, 1, dim))
    return generator.laplace(size=(layers, heads, samples, dim)) * scales


def fitted_to(samples):
    covariance = np.einsum("lhsd,lhse->lhde", samples, samples) / samples.shape[2]
    eye = np.broadcast_to(np.eye(samples.shape[-1]), covariance.shape)
    basis = bases.karhunen_loeve(covariance * eye, eye)
    return fit.fit(basis, np.zeros(samples.shape[:2] + samples.shape[3:]), samples, rule="none")


def test_heads_of_one_type_learn_from_each_other_and_others_keep_their_own():
    generator = np.random.default_rng(0)
    few = laplacian(generator, samples=64)
    fitted = fitted_to(few)
    shared = head_types.share(generator, fitted, few, types=1)
    at = fitted.choices.index(4)
    assert shared.won[at].mean() > 0.5, "16 levels from 32 samples each: the pool of all heads knows more"
    assert sum(shared.searches.values()) == 4
    fresh = laplacian(np.random.default_rng(0), samples=64)  # the same scales
    fresh = generator.laplace(size=(2, 2, 4000, 8)) * fresh.std(axis=2, keepdims=True) / 2**0.5

    def error(one):
        return sum(
            np.sum((fit.scaled(one, fresh, layer, head)[0][..., None]
                    - one.levels[at][layer, head]).__abs__().min(-1) ** 2 @ one.basis.worth[layer, head])
            for layer in range(2) for head in range(2)
        )  # fmt: skip

    assert error(shared.fitted) < error(fitted)
    for bits in (0, 5, 6):
        np.testing.assert_array_equal(shared.fitted.levels[bits], fitted.levels[bits])

    # Two kinds of heads with plenty of samples: nobody needs a codebook that mixes them.
    many = generator.normal(size=(2, 2, 4000, 8))
    many[:, 1] = np.sign(many[:, 1]) * (1 + 0.05 * np.abs(many[:, 1]))
    own = fitted_to(many)
    mixed = head_types.share(generator, own, many, types=1)
    assert not mixed.won[own.choices.index(1), :, 1].any()
    kinds = head_types.share(generator, own, many, types=2).types
    assert (kinds[:, 0] == kinds[0, 0]).all()
    assert (kinds[:, 1] == 1 - kinds[0, 0]).all()
    with pytest.raises(ValueError, match="types must be from 1 to the 4 heads"):
        head_types.share(generator, own, many, types=5)


def attention_divergence(keys, q, k, scale):
    """In NumPy, for one head: KL of causal attention weights."""
    kept = np.asarray(quantizers.dequantize(keys, quantizers.quantize(keys, jnp.asarray(k))), np.float64)
    total = []
    for token in range(q.shape[1]):
        for head in range(q.shape[0]):
            for query in q[head, token]:
                weights = []
                for x in (k, kept):
                    scores = x[head, : token + 1].astype(np.float64) @ query * scale
                    weights.append(np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum())
                total.append(np.sum(weights[0] * np.log(weights[0] / weights[1])))
    return np.mean(total)


def test_descent_on_attention_lowers_its_loss_on_rows_it_did_not_see(found, keys):
    keys = tuple(dataclasses.replace(half, synthesis=2 * half.synthesis) for half in keys)  # something to mend
    better, losses = refine.attention(keys, found, scale=DIM**-0.5, steps=60, rate=0.01)
    q, k = (np.split(x, 4, axis=2)[3] for x in (found.query_samples, found.key_samples))  # the row held out
    for layer in range(LAYERS):
        for half, expected in ((keys[layer], losses[layer, 0]), (better[layer], losses[layer, 1])):
            measured = attention_divergence(half, q[layer], k[layer], DIM**-0.5)
            assert measured == pytest.approx(expected, rel=1e-3)
    assert (losses[:, 1] <= losses[:, 0]).all()
    assert losses[:, 1].sum() < 0.97 * losses[:, 0].sum()
    assert [half.widths for half in better] == [half.widths for half in keys]
    kept, same = refine.attention(keys, found, scale=DIM**-0.5, steps=3, rate=50.0)
    np.testing.assert_array_equal(same[:, 0], same[:, 1])
    np.testing.assert_array_equal(kept[0].synthesis, keys[0].synthesis)
    with pytest.raises(ValueError, match="at least 2 rows"):
        refine.attention(keys, dataclasses.replace(found, rows=1), scale=1.0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_deletion_costs_3_times_4_to_the_bits_what_rounding_does(bits):
    """Of one direction of the keys, in the divergence of attention weights."""
    generator = np.random.default_rng(bits)
    amplitude, tokens = 0.02, 64
    ratio = []
    for _ in range(300):
        scores = generator.normal(size=tokens)
        along = generator.choice([-amplitude, amplitude], tokens)
        levels = 2 * amplitude / 2**bits
        rounding = generator.uniform(-levels / 2, levels / 2, tokens)
        p = np.exp(scores) / np.exp(scores).sum()
        cost = []
        for error in (along, rounding):
            other = np.exp(scores + error) / np.exp(scores + error).sum()
            cost.append(np.sum(p * np.log(p / other)))
        ratio.append(cost)
    deleted, rounded = np.mean(ratio, axis=0)
    assert deleted / rounded == pytest.approx(3 * 2 ** (2 * bits), rel=0.05)


def test_deleted_directions_are_those_of_least_variance(found):
    for half, covariance, samples in (
        ("keys", found.key_covariance, found.key_samples), ("values", found.value_covariance, found.value_samples)
    ):  # fmt: skip
        quantizer = rank.delete(found, half, rank=6)[1]
        x = jnp.asarray(samples[1])
        code = quantizers.quantize(quantizer, x)
        assert code.nbytes == x.shape[0] * x.shape[1] * 2 * 6
        left = np.asarray(quantizers.dequantize(quantizer, code) - x, np.float64)
        variance = np.linalg.eigvalsh(covariance[1])
        np.testing.assert_allclose((left**2).sum(-1).mean(-1), variance[:, :10].sum(-1), rtol=2e-2)
        q = jax.random.normal(jax.random.key(0), x.shape)
        np.testing.assert_allclose(
            jnp.sum(q * quantizers.dequantize(quantizer, code), -1),
            jnp.sum(quantizer.project(q) * quantizer.expand(code), -1), atol=1e-4,
        )  # fmt: skip
    with pytest.raises(ValueError, match="rank must be from 1 to 16"):
        rank.delete(found, "keys", rank=17)


def test_channels_are_rounded_to_integers_of_their_own_scale(found):
    for half, samples in (("keys", found.key_samples), ("values", found.value_samples)):
        quantizer = rank.channels(found, half, bits=4)[0]
        x = samples[0].astype(np.float64)
        scale = np.abs(x).max(axis=1, keepdims=True) / 7
        code = quantizers.quantize(quantizer, jnp.asarray(samples[0]))
        assert code.nbytes == x.shape[0] * x.shape[1] * DIM // 2
        expected = np.clip(np.round(x / scale), -8, 7) * scale
        np.testing.assert_allclose(quantizers.dequantize(quantizer, code), expected, atol=1e-5)
        assert not np.allclose(np.round(x / scale[:, :, ::-1]) * scale, expected, atol=1e-5)
    with pytest.raises(ValueError, match="bits must be from 2 to 8"):
        rank.channels(found, "keys", bits=1)


def test_directions_set_apart_hold_more_bits(found):
    fitted = rank.eigenbasis(found, "values")
    weighted = np.linalg.eigh(found.weighted_values[0, 0])[1][:, ::-1]
    along = fitted.basis.synthesis[0, 0][0] / np.linalg.norm(fitted.basis.synthesis[0, 0][0])
    assert abs(along @ weighted[:, 0]) == pytest.approx(1.0, abs=1e-6)
    assert abs(along @ np.linalg.eigh(found.value_covariance[0, 0])[1][:, -1]) < 1 - 1e-6
    apart = rank.split(fitted, top=8, above=6, below=3)
    assert [half.widths for half in apart] == [((6, 8), (3, 8))] * LAYERS
    with pytest.raises(ValueError, match="top must be a multiple of 8 from 0 to 16"):
        rank.split(fitted, top=12)


def test_flips_are_of_the_most_attended_token(decoder, tokens, found):
    exact = [quantizers.Exact(dim=DIM, dtype="float32")] * LAYERS
    assert not rank.flips(decoder, tokens[:1], tuple(exact)).any()
    coarse = rank.delete(found, "keys", rank=2)
    flipped = rank.flips(decoder, tokens[:1], coarse)

    q, k = (np.asarray(x, np.float64) for x in seen(decoder, tokens[0]))
    for layer in range(LAYERS):
        x = jnp.asarray(k[layer], jnp.float32)
        kept = np.asarray(quantizers.dequantize(coarse[layer], quantizers.quantize(coarse[layer], x)), np.float64)
        count = 0
        for head in range(HEADS):
            for token in range(q.shape[2]):
                group = head // (HEADS // KV_HEADS)
                best = [np.argmax(x[group, : token + 1] @ q[layer, head, token]) for x in (k[layer], kept)]
                count += best[0] != best[1]
        assert flipped[layer] == pytest.approx(count / (HEADS * q.shape[2]), abs=2.5 / (HEADS * q.shape[2]))
    assert 0.05 < flipped.mean() < 0.95


def seen(decoder, row):
    """Queries and keys of a row, [layers, heads, tokens, dim]."""

    @jax.jit
    def run(row):
        parts = []

        def tap(layer, q, k, v):
            parts.append([jnp.swapaxes(x[0], 0, 1) for x in (q, k)])
            return q, k, v

        decoder.hidden(row[None], tap=tap)
        return [jnp.stack([part[i] for part in parts]) for i in range(2)]

    return run(jnp.asarray(row, jnp.int32))
