"""Mixed-width transform coding against NumPy in float64, in a cache, and in a snapshot."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import attention, cache, mixed, quantizers, snapshot
from jaxquant.mixed import Mixed

DIM, HEADS = 32, 2
WIDTHS = ((5, 8), (3, 8), (1, 8))


def make(seed=0, *, heads=HEADS, widths=WIDTHS, rule="least_squares", basis=True):
    generator = np.random.default_rng(seed)
    width = sum(count for _, count in widths)
    matrix = generator.normal(size=(heads, DIM, DIM)) + 2 * np.eye(DIM)
    weights = generator.random((heads, width)) + 0.1
    parts = {
        "mean": generator.normal(size=(heads, DIM)),
        "analysis": matrix[:, :width] if basis else None,
        "synthesis": np.swapaxes(np.linalg.inv(matrix), 1, 2)[:, :width] if basis else None,
        "weights": weights / weights.sum(-1, keepdims=True),
        "levels": tuple(np.sort(2 * generator.normal(size=(heads, count, 2**bits)), -1) for bits, count in widths),
    }
    parts = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), parts)
    return Mixed(**parts, widths=widths, dim=DIM, rule=rule)


def vectors(*lead, seed=1):
    return np.random.default_rng(seed).normal(size=(*lead, DIM)).astype(np.float32) * 3


def oracle(quantizer, x):
    """Code and decode one vector of one head in float64, without packing."""
    part = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), quantizer)
    mean = np.asarray(part.mean, np.float64)
    y = (part.analysis @ (x - mean)) if part.analysis is not None else (x - mean)[: part.width]
    tables = [row for table in part.levels for row in table]

    def nearest(gain):
        return np.array([row[np.argmin(np.abs(row - value / gain))] for row, value in zip(tables, y, strict=True)])

    def step(gain):
        return 2.0 ** (np.clip(np.round(16 * np.log2(gain)), -128, 127) / 16)

    gain = 1.0
    if part.rule != "none":
        gain = step(np.sqrt(part.weights @ y**2))
    levels = nearest(gain)
    if part.rule == "least_squares":
        gain = step(max((part.weights * y) @ levels / (part.weights @ levels**2), 1e-30))
    elif part.rule == "preserve":
        gain = step(np.sqrt(part.weights @ y**2 / (part.weights @ levels**2)))
    if part.synthesis is None:
        return mean + np.pad(gain * levels, (0, DIM - part.width))
    return mean + gain * levels @ part.synthesis


@pytest.mark.parametrize("rule", ["least_squares", "preserve", "none"])
@pytest.mark.parametrize("basis", [True, False])
def test_decoding_equals_numpy(rule, basis):
    quantizer = make(rule=rule, basis=basis)
    x = vectors(3, HEADS, 7)
    found = np.asarray(quantizers.dequantize(quantizer, quantizers.quantize(quantizer, jnp.asarray(x))))
    head = [jax.tree.map(lambda leaf, h=h: leaf[h], quantizer) for h in range(HEADS)]
    expected = np.array([[[oracle(head[h], v) for v in x[b, h]] for h in range(HEADS)] for b in range(3)])
    scale = np.abs(expected).max()
    close = np.isclose(found, expected, rtol=0, atol=1e-4 * scale).all(-1)
    assert close.mean() > 0.95, "float32 may decide a near tie differently, not more"
    assert not np.isclose(found[:, ::-1], expected, rtol=0, atol=1e-4 * scale).all(-1).any()
    other = dataclasses.replace(quantizer, mean=quantizer.mean[::-1])
    wrong = np.asarray(quantizers.dequantize(other, quantizers.quantize(quantizer, jnp.asarray(x))))
    assert not np.isclose(wrong, expected, rtol=0, atol=1e-4 * scale).all(-1).any()


@pytest.mark.parametrize("widths", [WIDTHS, ((8, 8),), ((1, 32),), ((6, 8), (4, 8), (2, 16)), ((3, 5),)])
@pytest.mark.parametrize("rule", ["least_squares", "none"])
def test_bytes_are_the_bits_and_one_gain(widths, rule):
    quantizer = make(widths=widths, rule=rule)
    code = quantizers.quantize(quantizer, jnp.asarray(vectors(HEADS, 10)))
    bits = sum(-(-bits * count // 8) * 8 for bits, count in widths)
    assert code.nbytes == HEADS * 10 * (bits // 8 + (rule != "none")) == HEADS * 10 * quantizer.bytes_per_vector
    assert len(jax.tree.leaves(code)) == 1


def test_the_gain_follows_the_length():
    """Ten times the vector is ten times the decoded vector, to the step of the gain, over 13 octaves."""
    quantizer = dataclasses.replace(make(), mean=jnp.zeros((HEADS, DIM)))
    x = jnp.asarray(vectors(HEADS, 5))

    def decoded(factor):
        return np.asarray(quantizers.dequantize(quantizer, quantizers.quantize(quantizer, x * factor))) / factor

    step = 2.0 ** (1 / mixed.STEPS)
    for exponent in (-4, 0, 2):
        error = np.linalg.norm(decoded(2.0**exponent) - decoded(1.0)) / np.linalg.norm(decoded(1.0))
        assert error < step - 1
    without = dataclasses.replace(quantizer, rule="none")
    short, long = (quantizers.dequantize(without, quantizers.quantize(without, x * f)) / f for f in (1.0, 4.0))
    assert np.linalg.norm(short - long) > np.linalg.norm(short) * (step - 1)


def test_project_is_the_transpose_of_restore():
    quantizer = make()
    x, q = jnp.asarray(vectors(HEADS, 6)), jnp.asarray(vectors(HEADS, 6, seed=4))
    expanded = jax.jit(Mixed.expand)(quantizer, quantizers.quantize(quantizer, x))
    left = np.sum(np.asarray(q) * np.asarray(quantizer.restore(expanded)), -1)
    right = np.sum(np.asarray(quantizer.project(q)) * np.asarray(expanded), -1)
    np.testing.assert_allclose(left, right, rtol=0, atol=1e-4 * np.abs(left).max())
    turned = dataclasses.replace(quantizer, synthesis=quantizer.analysis)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(
            left, np.sum(np.asarray(turned.project(q)) * np.asarray(expanded), -1), atol=1e-4 * np.abs(left).max()
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38, 0.0, 1e-38])
def test_bad_elements_stay_finite_and_to_themselves(bad):
    quantizer = make()
    x = vectors(HEADS, 4)
    clean = np.asarray(quantizers.dequantize(quantizer, quantizers.quantize(quantizer, jnp.asarray(x))))
    x[0, 1] = bad
    found = np.asarray(quantizers.dequantize(quantizer, quantizers.quantize(quantizer, jnp.asarray(x))))
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(np.delete(found, 1, 1), np.delete(clean, 1, 1))


def filled(keys, values, **kwargs):
    held = cache.init(keys, values, layers=3, batch=2, kv_heads=HEADS, capacity=24, dtype="float32", **kwargs)
    for layer in range(3):
        k, v = (jnp.asarray(np.swapaxes(vectors(2, HEADS, 20, seed=layer + s), 1, 2)) for s in (10, 20))
        held = cache.append(held, layer, k, v)
    return held


def per_layer(count=3, **kwargs):
    return [make(layer, **kwargs) for layer in range(count)], [make(layer + 50, **kwargs) for layer in range(count)]


def test_layers_of_one_form_share_a_stack_and_keep_their_own_numbers():
    keys, values = per_layer()
    keys[1] = make(1, widths=((4, 16),))
    held = filled(keys, values)
    assert held.places == ((0, 0), (1, 0), (0, 1))
    for layer in range(3):
        for found, quantizer, seed in zip(cache.materialize(held, layer), (keys, values), (10, 20), strict=True):
            x = jnp.asarray(vectors(2, HEADS, 20, seed=layer + seed))
            expected = np.asarray(quantizers.dequantize(quantizer[layer], quantizers.quantize(quantizer[layer], x)))
            found = np.swapaxes(np.asarray(found), 1, 2)[:, :, :20]
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
            other = quantizer[(layer + 2) % 3] if layer != 1 else make(99, widths=quantizer[1].widths)
            wrong = np.asarray(quantizers.dequantize(other, quantizers.quantize(other, x)))
            assert np.abs(found - wrong).max() > 0.1
    tokens = 3 * 2 * HEADS * 24
    codes = sum(
        leaf.nbytes for stack in held.stacks for half in (stack.keys, stack.values)
        for leaf in jax.tree.leaves(half.codes)
    )  # fmt: skip
    assert held.bytes_per_token == codes / tokens
    assert codes == 2 * HEADS * 24 * sum(q.bytes_per_vector for q in (*keys, *values))


@pytest.fixture(scope="module")
def recent():
    return filled(*per_layer(), sinks=2, window=6)


@pytest.mark.parametrize("kept", [{}, None, {"exact_layers": [1]}])
def test_attention_reads_what_materialize_shows(kept, recent):
    held = recent if kept is None else filled(*per_layer(), **kept)
    q = jnp.asarray(vectors(2, 4, seed=3))
    for layer in range(3):
        k, v = (np.repeat(np.asarray(x, np.float64)[:, :20], 2, axis=2) for x in cache.materialize(held, layer))
        scores = np.einsum("bhd,bthd->bht", np.asarray(q), k) * DIM**-0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected = np.einsum("bht,bthd->bhd", weights / weights.sum(-1, keepdims=True), v)
        for index in (layer, jnp.int32(layer)):
            out, _ = attention.decode_attention(q, held, index)
            np.testing.assert_allclose(np.asarray(out), expected, rtol=0, atol=2e-5 * np.abs(v).max())
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(np.asarray(out), expected[:, ::-1], rtol=0, atol=2e-5 * np.abs(v).max())


def test_one_quantizer_for_each_layer_is_asked_for():
    keys, values = per_layer(2)
    with pytest.raises(ValueError, match="keys must hold one quantizer for each of 3 layers, got 2"):
        filled(keys, values)
    with pytest.raises(ValueError, match="same dim, got 32 and 16"):
        filled(*[[make()] * 3, quantizers.Exact(dim=16)])


def test_snapshots_keep_each_layers_numbers(recent, tmp_path):
    snapshot.save(tmp_path / "held", recent)
    again, part = snapshot.load(tmp_path / "held"), snapshot.load(tmp_path / "held", layers=[2, 0])
    for layer in range(3):
        for found, expected in zip(cache.materialize(again, layer), cache.materialize(recent, layer), strict=True):
            np.testing.assert_array_equal(found, expected)
    for place, layer in enumerate((2, 0)):
        for found, expected in zip(cache.materialize(part, place), cache.materialize(recent, layer), strict=True):
            np.testing.assert_array_equal(found, expected)
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(cache.materialize(part, 0)[0], cache.materialize(recent, 0)[0])
