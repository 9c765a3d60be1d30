"""Calibration on a tiny random decoder: every sum against NumPy in float64, every optimum against brute force."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import DIM, HEADS, KV_HEADS, LAYERS, VOCABULARY

from jaxquant import codebooks, quantizers
from jaxquant.calibrate import allocation, bases, fisher, fit, levels, search, sensitivity, statistics, text
from jaxquant.methods import turboquant
from jaxquant.models import causal


@pytest.fixture(scope="module")
def decoder():
    return tiny_llama.decoder()


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, VOCABULARY, (5, 24))


@pytest.fixture(scope="module")
def gradients(decoder, tokens):
    """Gradients with respect to the keys and values of the first row, labels from the text."""
    zeros = jnp.zeros((LAYERS, tokens.shape[1], KV_HEADS, DIM))
    return jax.jit(jax.grad(lambda changes: text_loss(decoder, tokens[0], changes)))((zeros, zeros))


def text_loss(decoder, row, changes):
    row = jnp.asarray(row, jnp.int32)
    return fisher.loss(decoder, row, jnp.append(row[1:], -1), jax.random.key(0), 1.0, changes)


def attended(decoder, tokens):
    """Queries, keys and values that attention reads, [rows, layers, heads, tokens, dim], in float64."""

    @jax.jit
    def run(row):
        seen = []

        def tap(layer, q, k, v):
            seen.append([jnp.swapaxes(x[0], 0, 1) for x in (q, k, v)])
            return q, k, v

        decoder.hidden(row[None], tap=tap)
        return [jnp.stack([layer[i] for layer in seen]) for i in range(3)]

    rows = [run(jnp.asarray(row)) for row in tokens]
    return [np.stack([np.asarray(row[i], np.float64) for row in rows]) for i in range(3)]


def close(found, expected, rtol=2e-5):
    np.testing.assert_allclose(found, expected, rtol=0, atol=rtol * np.abs(expected).max())


def test_statistics_equal_numpy(decoder, tokens):
    found = statistics.collect(decoder, tokens, batch=1, samples=40)
    q, k, v = attended(decoder, tokens)
    group = HEADS // KV_HEADS
    outer = lambda x: np.einsum("rlhtd,rlhte->lhde", x, x)  # noqa: E731
    close(found.keys, k.sum((0, 3)))
    close(found.value_moments, outer(v))
    close(found.key_moments, outer(k))
    grouped = q.reshape(*q.shape[:2], KV_HEADS, group, *q.shape[3:])
    close(found.query_moments, np.einsum("rlhgtd,rlhgte->lhde", grouped, grouped))
    scores = np.einsum("rlhgqd,rlhtd->rlhgqt", grouped, k) * DIM**-0.5
    scores = np.where(np.tril(np.ones((24, 24), bool)), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    close(found.importance, (p**2).sum((0, 3, 4, 5)))
    close(found.weighted_values, np.einsum("rlht,rlhtd,rlhte->lhde", (p**2).sum((3, 4)), v, v))
    close(found.attention, p.sum((0, 3, 4))[..., :16])
    kernels = [np.asarray(layer.self_attn.o_proj.kernel[...], np.float64) for layer in decoder.layers]
    output = np.stack(kernels).reshape(LAYERS, KV_HEADS, group, DIM, 32)
    out = np.einsum("rlhgqt,rlhtd->rlhgqd", p, v)
    apart = np.einsum("rlhgqtd,lhgdn->rlhgqtn", v[:, :, :, None, None] - out[..., None, :], output)
    importance = np.einsum("rlhgqt,rlhgqtn->rlhgq", p**2, apart**2) / DIM
    close(found.weighted_queries, np.einsum("rlhgq,rlhgqd,rlhgqe->lhde", importance, grouped, grouped), 1e-4)
    close(found.key_covariance[1, 0], np.cov(k[:, 1, 0].reshape(-1, DIM).T, bias=True))
    for wrong in (outer(v), found.key_moments[:, ::-1]):
        with pytest.raises(AssertionError):
            close(wrong, outer(k))
    mass = (p**2).sum((0, 4, 5))
    gram = np.einsum("lhgdn,lhgen->lhgde", output, output)
    close(found.weighted_outputs, np.einsum("lhg,lhgde->lhde", mass, gram))
    with pytest.raises(AssertionError):
        close(found.weighted_outputs, np.einsum("lhg,lhgde->lhde", mass[:, :, ::-1], gram))
    assert found.key_samples.shape == (LAYERS, KV_HEADS, 5 * 8, DIM)
    queries = np.moveaxis(grouped[..., 1::3, :], (0, 4), (2, 3))
    close(found.query_samples, queries.reshape(LAYERS, KV_HEADS, -1, group, DIM))
    close(found.key_samples, np.moveaxis(k[:, :, :, 1::3], 0, 2).reshape(LAYERS, KV_HEADS, -1, DIM))


def test_statistics_do_not_depend_on_batches_and_add_up(decoder, tokens):
    whole = statistics.collect(decoder, tokens, batch=5, samples=40)
    for batch in (1, 2):
        jax.tree.map(
            np.testing.assert_array_equal,
            vars(statistics.collect(decoder, tokens, batch=batch, samples=40)),
            vars(whole),
        )
    done = []
    part = statistics.collect(decoder, tokens[:2], batch=1, progress=lambda *at: done.append(at), samples=16)
    more = statistics.collect(decoder, tokens[2:], batch=2, start=part, samples=24)
    jax.tree.map(np.testing.assert_array_equal, vars(more), vars(whole))
    assert done == [(1, 2), (2, 2)]
    with pytest.raises(AssertionError):
        jax.tree.map(np.testing.assert_array_equal, vars(part), vars(whole))


def test_information_does_not_depend_on_how_rows_are_split(decoder, tokens):
    whole = fisher.collect(jax.random.key(0), decoder, tokens[:3])
    parts = [fisher.collect(jax.random.key(0), decoder, tokens[row : row + 1], first=row) for row in range(3)]
    close((parts[0] + parts[1] + parts[2]).keys, whole.keys, 1e-6)
    again = [fisher.collect(jax.random.key(0), decoder, tokens[row : row + 1]) for row in range(3)]
    with pytest.raises(AssertionError):
        close((again[0] + again[1] + again[2]).keys, whole.keys, 1e-6)


def test_information_of_longer_text_weighs_more():
    one, three = (np.full((1, 1, 2, 2), x) for x in (1.0, 3.0))
    joined = fisher.Fisher(keys=one, values=three, tokens=10) + fisher.Fisher(keys=three, values=one, tokens=30)
    assert joined.tokens == 40
    np.testing.assert_allclose((joined.keys, joined.values), (2.5 * one, 1.5 * one))


def test_gradients_equal_finite_differences(decoder, tokens, gradients):
    shape = gradients[0].shape
    value = jax.jit(lambda changes: text_loss(decoder, tokens[0], changes))
    for half in range(2):
        direction = jax.random.normal(jax.random.key(half + 1), shape)
        direction /= jnp.linalg.norm(direction)

        def along(size, half=half, direction=direction):
            changes = [jnp.zeros(shape), jnp.zeros(shape)]
            changes[half] = size * direction
            return float(value(tuple(changes)))

        step = 0.05
        slope = (8 * (along(step) - along(-step)) - (along(2 * step) - along(-2 * step))) / (12 * step)
        size = float(jnp.linalg.norm(gradients[half]))
        rounding = 4 * float(np.finfo(np.float32).eps) * along(0.0) / step  # of the two differences
        assert abs(float(jnp.vdot(gradients[half], direction)) - slope) < rounding + 1e-3 * size
        assert abs(float(jnp.vdot(gradients[1 - half], direction)) - slope) > rounding + 1e-3 * size


def test_information_is_the_second_moment_of_gradients(decoder, tokens, gradients):
    found = fisher.collect(jax.random.key(0), decoder, tokens[:1], labels="text")
    for half, other, gradient in zip((found.keys, found.values), (found.values, found.keys), gradients, strict=True):
        expected = np.einsum("lthd,lthe->lhde", gradient, gradient) / tokens.shape[1]
        close(half, expected)
        with pytest.raises(AssertionError):
            close(other, expected)


def test_information_is_the_curvature_of_kl(decoder, tokens):
    """E[e^T F e] / 2 over independent errors e is what they add to the KL divergence."""
    row = jnp.asarray(tokens[0], jnp.int32)
    information = fisher.collect(jax.random.key(3), decoder, np.repeat(tokens[:1], 400, axis=0))
    size = 0.02

    @jax.jit
    def logits(key, size):
        noise = size * jax.random.normal(key, (LAYERS, tokens.shape[1], KV_HEADS, DIM))
        return decoder(row[None], tap=lambda layer, q, k, v: (q, k, v + noise[layer]))[0][0]

    def divergence(key):
        changed = jax.nn.log_softmax(logits(key, jnp.float32(size)))
        return np.mean(np.sum(np.exp(exact) * (exact - changed), axis=-1))

    exact = np.asarray(jax.nn.log_softmax(logits(jax.random.key(4), jnp.float32(0))))
    measured = np.mean([divergence(key) for key in jax.random.split(jax.random.key(4), 200)])
    predicted = [size**2 * float(np.trace(half.sum((0, 1)))) / 2 for half in (information.values, information.keys)]
    assert predicted[0] == pytest.approx(measured, rel=0.1)
    assert predicted[1] != pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("window", [None, 5])
def test_attention_in_blocks_is_attention(monkeypatch, window):
    """With padding on either side, and a last block that is not full."""
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 21, heads, DIM)) for i, heads in enumerate((4, 2, 2)))
    mask = jnp.ones((2, 21), bool).at[0, :4].set(False).at[1, 17:].set(False)

    def run(x, mask=mask):
        out = causal.causal_attention(x, k, v, mask=mask, scale=0.25, window=window)
        return jnp.sum(jnp.where(mask[..., None, None], out, 0.0) * v.repeat(2, axis=2)), out

    monkeypatch.setattr(causal, "_QUERIES", 8)
    gradient, blocks = jax.jit(jax.grad(run, has_aux=True))(q)
    monkeypatch.setattr(causal, "_QUERIES", 64)
    wanted, whole = jax.jit(jax.grad(run, has_aux=True))(q + 0)
    jax.clear_caches()
    close(np.where(mask[..., None, None], blocks, 0), np.where(mask[..., None, None], whole, 0))
    close(gradient, wanted)
    _, other = run(q, jnp.ones((2, 21), bool))
    with pytest.raises(AssertionError):
        close(other, whole)


def test_the_memory_of_a_gradient_grows_with_the_tokens_and_not_with_their_square(decoder):
    def held(tokens):
        row = jnp.zeros((tokens,), jnp.int32)
        zeros = jnp.zeros((LAYERS, tokens, KV_HEADS, DIM))
        gradient = jax.jit(jax.grad(lambda changes: text_loss(decoder, row, changes)))
        return gradient.lower((zeros, zeros)).compile().memory_analysis().temp_size_in_bytes

    scores = LAYERS * HEADS * 4 * 4096**2
    assert held(4096) < 0.5 * scores
    assert held(4096) < 8 * held(1024), "4 times is linear, 16 times the square"


def random_covariance(generator, dim=8):
    x = generator.normal(size=(dim, dim)) * generator.random(dim) ** 2
    return x @ x.T + 1e-3 * np.eye(dim)


def test_a_metric_weighs_what_its_reference_weighs():
    generator = np.random.default_rng(7)
    covariance, metric, reference = (np.stack([random_covariance(generator) for _ in range(3)]) for _ in range(3))
    reference *= np.array([1e-3, 1.0, 1e3])[:, None, None]
    found = bases.like(metric, reference, covariance)
    np.testing.assert_allclose(
        np.trace(found @ covariance, axis1=1, axis2=2), np.trace(reference @ covariance, axis1=1, axis2=2)
    )
    np.testing.assert_allclose(found / found[:, :1, :1], metric / metric[:, :1, :1])


def test_the_basis_diagonalizes_both_and_no_other_spends_less():
    generator = np.random.default_rng(0)
    covariance, metric = random_covariance(generator), random_covariance(generator)
    basis = bases.karhunen_loeve(covariance, metric)
    np.testing.assert_allclose(basis.analysis @ covariance @ basis.analysis.T, np.eye(8), atol=1e-6)
    np.testing.assert_allclose(basis.synthesis @ metric @ basis.synthesis.T, np.diag(basis.worth), atol=1e-6)
    np.testing.assert_allclose(basis.synthesis.T @ basis.analysis, np.eye(8), atol=1e-8)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(basis.analysis.T @ covariance @ basis.analysis, np.eye(8), atol=1e-6)
    assert (np.diff(basis.worth) <= 0).all()
    best = np.sum(np.log(basis.worth))  # of the high-rate loss at equal rate, up to constants
    for _ in range(20):
        turn = np.linalg.qr(generator.normal(size=(8, 8)))[0]
        inverse = np.linalg.inv(turn @ basis.analysis)
        other = np.log(np.diag(turn @ turn.T)) + np.log(np.diag(inverse.T @ metric @ inverse))
        assert np.sum(other) > best
    with pytest.raises(ValueError, match="metric must be finite and positive"):
        bases.karhunen_loeve(covariance, np.full((8, 8), np.nan))
    with pytest.raises(ValueError, match="share must be from 0 to 1"):
        bases.shrunk(metric, 1.5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(2, 4))
def test_exact_allocation_equals_brute_force(seed, items, choices):
    generator = np.random.default_rng(seed)
    losses, costs = generator.random((items, choices)), np.sort(generator.integers(0, 6, (items, choices)), axis=1)
    budget = int(costs[:, 0].sum() + generator.integers(0, 12))
    chosen = allocation.exact(losses, costs, budget)
    index = np.arange(items)
    spent, loss = costs[index, chosen].sum(), losses[index, chosen].sum()
    every = [
        losses[index, list(c)].sum() for c in itertools.product(range(choices), repeat=items)
        if costs[index, list(c)].sum() <= budget
    ]  # fmt: skip
    assert spent <= budget
    assert loss == pytest.approx(min(every))
    cheap = allocation.greedy(losses, costs, budget)
    assert costs[index, cheap].sum() <= budget
    assert losses[index, cheap].sum() >= loss - 1e-12


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(2, 5))
def test_greedy_allocation_is_exact_where_returns_diminish(seed, items, choices):
    generator = np.random.default_rng(seed)
    gains = -np.sort(-generator.random((items, choices - 1)), axis=1)
    losses = np.pad(np.cumsum(gains[:, ::-1], axis=1)[:, ::-1], ((0, 0), (0, 1)))
    costs = np.tile(np.arange(choices), (items, 1))
    budget = int(generator.integers(0, items * (choices - 1) + 1))
    index = np.arange(items)
    best, cheap = (losses[index, solve(losses, costs, budget)].sum() for solve in (allocation.exact, allocation.greedy))
    assert cheap == pytest.approx(best)
    assert cheap == pytest.approx(losses[:, 0].sum() - np.sort(gains.reshape(-1))[::-1][:budget].sum())


def test_allocation_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="budget must be at least 2"):
        allocation.exact(np.zeros((1, 2)), np.array([[2, 3]]), 1)
    with pytest.raises(ValueError, match="whole numbers from 0"):
        allocation.greedy(np.zeros((1, 2)), np.array([[-1, 1]]), 1)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_fitted_levels_reach_the_theory_and_use_their_weights(bits):
    generator = np.random.default_rng(bits)
    samples = generator.normal(size=(20_000, 2)) * [1.0, 3.0]
    ((found, error),) = levels.fit(samples, np.ones(20_000), [bits])
    theory = codebooks.distortion(codebooks.lloyd_max(bits))
    np.testing.assert_allclose(error, theory * np.array([1.0, 9.0]), rtol=0.03)
    np.testing.assert_allclose(found[1], 3 * levels.normal(bits), atol=0.35)
    # Weights that turn the unit normal into one of variance 1/4.
    weights = np.exp(-1.5 * samples[:, 0] ** 2)
    ((_, weighted),) = levels.fit(samples[:, :1], weights, [bits])
    np.testing.assert_allclose(weighted, theory / 4, rtol=0.05)
    assert abs(weighted[0] / error[0] - 1) > 0.5


def test_searches_reach_lloyd_max_and_never_lose_to_their_start():
    best = np.asarray(codebooks.lloyd_max(2).centroids, np.float64)
    least = codebooks.distortion(codebooks.lloyd_max(2))

    def exact(x):
        return codebooks.distortion(codebooks.Codebook(centroids=jnp.asarray(x, jnp.float32)))

    generator = np.random.default_rng(0)
    poor = np.array([-2.5, -0.2, 0.9, 1.2])
    found, error = search.evolve(generator, exact, poor, sigma=0.3)
    assert error == pytest.approx(least, rel=1e-3)
    assert exact(poor) > 1.2 * least
    np.testing.assert_allclose(found, best, atol=0.05)
    kept, error = search.evolve(generator, exact, best, generations=5)
    assert error <= least * (1 + 1e-9)
    assert exact(kept) == pytest.approx(error)

    samples, weights = generator.normal(size=4000), np.ones(4000)
    _, error = search.fuzzy(samples, weights, poor)
    assert error == pytest.approx(least, rel=0.06)
    start = levels.fit(samples[:, None], weights, [2])[0][0][0]
    floor = float(np.mean(np.min((samples[:, None] - start) ** 2, axis=1)))
    assert search.fuzzy(samples, weights, start)[1] <= floor * (1 + 1e-9)
    assert search.fuzzy(samples, weights, start, rounds=1, fuzziness=8.0)[0].tolist() == start.tolist()


@pytest.fixture(scope="module")
def measured(decoder, tokens):
    found = statistics.collect(decoder, tokens, batch=1)
    return found, fisher.collect(jax.random.key(0), decoder, tokens)


def halves(found, information, **kwargs):
    out = []
    for half in ("key", "value"):
        metric = bases.shrunk(getattr(information, half + "s"), 0.1)
        basis = bases.karhunen_loeve(bases.shrunk(getattr(found, f"{half}_covariance"), 0.01), metric)
        mean = getattr(found, half + "s") / found.tokens
        out.append(fit.fit(basis, mean, getattr(found, f"{half}_samples"), **kwargs))
    return out


def test_a_budget_is_spent_and_buys_less_loss(measured):
    found, information = measured
    fitted = halves(found, information)
    last = math.inf
    for budget in (1.5, 2.5, 4.0):
        bits = fit.allocate(fitted, budget=budget, layer_groups=[[0], [1]])
        built = [fit.build(half, b) for half, b in zip(fitted, bits, strict=True)]
        spent = np.mean([8 * q.bytes_per_vector / DIM for half in built for q in half])
        assert budget - 8 * 8 / (2 * LAYERS * DIM) <= spent <= budget
        loss = sum(
            sensitivity.predicted(q, getattr(found, f"{name}_samples")[layer], getattr(information, name + "s")[layer])
            for name, half in zip(("key", "value"), built, strict=True) for layer, q in enumerate(half)
        )  # fmt: skip
        assert loss < last
        last = loss
        greedy = fit.allocate(fitted, budget=budget, layer_groups=[[0], [1]], method="greedy")
        exact, cheap = (sum(map(fit.loss, fitted, choice)) for choice in (bits, greedy))
        assert exact <= cheap * (1 + 1e-12)
        assert np.mean(greedy) <= budget
    shared = fit.allocate(fitted, budget=2.5, layer_groups=[[0, 1]])
    assert all((half[0] == half[1]).all() for half in shared)
    with pytest.raises(ValueError, match="layer_groups must hold each of 2 layers once"):
        fit.allocate(fitted, budget=2.5, layer_groups=[[0]])
    with pytest.raises(ValueError, match="group must be a multiple of 8"):
        fit.allocate(fitted, budget=2.5, group=5, layer_groups=[[0, 1]])


def test_without_a_gain_the_loss_of_a_choice_is_what_its_codes_lose(measured):
    found, information = measured
    fitted = halves(found, information, rule="none")
    bits = fit.allocate(fitted, budget=2.5, layer_groups=[[0], [1]])
    assert np.mean(bits) == 2.5, "no byte of it is for gains"
    for name, half, choice in zip(("key", "value"), fitted, bits, strict=True):
        lost = {"right": 0.0, "wrong": 0.0}
        for layer, quantizer in enumerate(fit.build(half, choice)):
            assert 8 * quantizer.bytes_per_vector == 8 * choice[layer].sum()
            samples = getattr(found, f"{name}_samples")[layer]
            for at, where in (("right", layer), ("wrong", 1 - layer)):
                metric = bases.shrunk(getattr(information, name + "s")[where], 0.1)
                lost[at] += sensitivity.predicted(quantizer, samples, metric)
        assert lost["right"] == pytest.approx(fit.loss(half, choice), rel=1e-3)
        assert lost["wrong"] != pytest.approx(fit.loss(half, choice), rel=1e-3)


def test_calibrated_codes_lose_less_than_oblivious_ones(measured):
    found, information = measured
    fitted = halves(found, information)
    bits = fit.allocate(fitted, budget=2.5, layer_groups=[[0], [1]])
    built = [fit.build(half, b) for half, b in zip(fitted, bits, strict=True)]
    plain = turboquant.kv(jax.random.key(0), dim=DIM, bits_k=2, bits_v=2)
    ours, theirs = (
        sum(
            sensitivity.predicted(q, getattr(found, f"{name}_samples")[layer], getattr(information, name + "s")[layer])
            for layer in range(LAYERS) for q, name in ((pair[0][layer], "key"), (pair[1][layer], "value"))
        )
        for pair in (built, ([plain[0]] * LAYERS, [plain[1]] * LAYERS))
    )  # fmt: skip
    assert 8 * quantizers.quantize(plain[0], jnp.ones(DIM)).nbytes / DIM > 2.5
    assert ours < 0.6 * theirs


def test_the_measured_loss_is_of_the_layer_that_was_compressed(decoder, tokens):
    exact = quantizers.Exact(dim=DIM, dtype="float32")
    coarse = turboquant.mse(jax.random.key(0), dim=DIM, bits=2)
    found = sensitivity.measured(decoder, tokens[:2], [exact, coarse], [exact, exact])
    assert found[1, 0] > 1e-6
    assert np.abs(np.delete(found.reshape(-1), 2)).max() < 1e-6 * max(1.0, found[1, 0] / 1e-6)


class Characters:
    """One token a character."""

    def encode(self, text, *, special=True):
        return [ord(letter) for letter in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_calibration_text_has_its_share_of_questions():
    ids = Characters().encode("x = 1; y = 2\n" * 3000)
    rows = text.rows(np.random.default_rng(0), ids, Characters(), count=8, length=1024, retrieval=0.25, keys=2)
    asking = ["Answer:" in Characters().decode(row) for row in rows]
    assert asking == [False] * 6 + [True] * 2
    assert rows[:6].reshape(-1).tolist() == ids[: 6 * 1024]
    with pytest.raises(ValueError, match="retrieval must be a share"):
        text.rows(np.random.default_rng(0), ids, Characters(), count=8, length=1024, retrieval=2.0)
