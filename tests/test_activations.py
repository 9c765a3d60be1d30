"""Activations in few bits: what gradients lose is bounded or averages out, and compiled programs hold less."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxquant import activations, protocols, quantizers, stochastic
from jaxquant.methods import turboquant
from jaxquant.stochastic import Stochastic

EPS = float(np.finfo(np.float32).eps)
ROWS, DIM, OUTPUTS, BITS, GROUP = 24, 96, 5, 2, 32


def decoded(quantizer, x):
    return quantizer.restore(quantizer.expand(quantizer.quantize(x)))


def draws(f, count=1500):
    return np.asarray(jax.jit(jax.vmap(f))(jax.random.split(jax.random.key(5), count)), np.float64)


def is_mean(samples, expected):
    """Every mean is within 6 standard errors, and what float32 rounds, of what is expected; and there is noise."""
    error, spread = np.abs(samples.mean(0) - expected), samples.std(0)
    bound = 6 * spread / len(samples) ** 0.5 + 64 * EPS * np.abs(samples).max(0)
    return spread.max() > 0 and bool(np.all(error <= bound))


def test_stochastic_codes_are_unbiased_and_nearest_ones_are_not():
    x = jax.random.normal(jax.random.key(0), (3, DIM)) * jnp.array([[1.0], [1e-3], [50.0]]) + 7.0
    one = functools.partial(Stochastic, dim=DIM, bits=BITS, group=GROUP)
    assert is_mean(draws(lambda key: decoded(one(key=key), x)), np.asarray(x))
    nearest = decoded(one(key=None), x)
    assert not is_mean(draws(lambda key: decoded(one(key=key), nearest)), np.asarray(x))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    x=hnp.arrays(np.float32, (3, 10), elements=st.floats(width=32)), bits=st.sampled_from([1, 2, 8]),
    random=st.booleans(),
)  # fmt: skip
def test_an_error_is_less_than_a_step_for_any_bits_of_input(x, bits, random):
    quantizer = Stochastic(key=jax.random.key(0) if random else None, dim=10, bits=bits, group=4)
    code = jax.tree.map(np.asarray, round_trip(quantizer, jnp.asarray(x)))
    found, steps = code
    assert np.isfinite(found).all()
    clean = np.clip(np.nan_to_num(x.astype(np.float64)), -(2.0**125), 2.0**125)
    steps = np.repeat(steps.astype(np.float64), 4, axis=1)[:, :10]
    most = steps * (1.0 if random else 0.5)
    groups = np.pad(clean, [(0, 0), (0, 2)], mode="edge").reshape(3, 3, 4)
    size = np.repeat(np.abs(groups).max(2), 4, axis=1)[:, :10]
    subnormal = 2.0**-120  # flushed to zero on the way
    assert np.all(np.abs(found - clean) <= most + 4 * EPS * (size + steps * 2**bits) + subnormal)
    ranges = np.repeat(np.ptp(groups, axis=2), 4, axis=1)[:, :10]
    assert np.all(steps <= (ranges + size * 2.0**-7) / (2**bits - 1) * (1 + 2.0**-7) + subnormal)


@jax.jit
def round_trip(quantizer, x):
    code = quantizer.quantize(x)
    return quantizer.restore(quantizer.expand(code)), stochastic._number(code.steps)


def test_codes_hold_what_they_say():
    quantizer = Stochastic(key=jax.random.key(0), dim=100, bits=2, group=32)
    assert isinstance(quantizer, protocols.Quantizer)
    code = quantizers.quantize(quantizer, jnp.ones((7, 100)))
    assert code.nbytes == 7 * (25 + 4 * 2 * 2)
    assert code.nbytes == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(code))
    assert np.array_equal(quantizers.dequantize(quantizer, code), jnp.ones((7, 100)))
    assert stochastic.fold_in(quantizer, 1).key != quantizer.key
    assert stochastic.fold_in(Stochastic(key=None, dim=4, bits=2), 1).key is None


def test_fake_quantization_rounds_forwards_and_not_backwards():
    quantizer = turboquant.mse(jax.random.key(0), dim=DIM, bits=BITS)
    x = jax.random.normal(jax.random.key(1), (4, DIM))
    weight = jax.random.normal(jax.random.key(2), (4, DIM))
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(activations.fake_quantize(quantizer, x) * weight))(x)
    assert np.isclose(value, jnp.sum(quantizers.dequantize(quantizer, quantizers.quantize(quantizer, x)) * weight))
    assert not np.isclose(value, jnp.sum(x * weight), rtol=1e-4)
    assert np.array_equal(gradient, weight)
    half = activations.fake_quantize(quantizer, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16


def linear_gradients(key, x, weight, out):
    quantizer = Stochastic(key=key, dim=DIM, bits=BITS, group=GROUP)
    loss = lambda x, weight: jnp.sum(activations.linear(quantizer, x, weight) * out)  # noqa: E731
    return jax.grad(loss, argnums=(0, 1))(x, weight)


def test_gradients_of_a_linear_map_are_exact_for_its_input_and_unbiased_for_its_matrix():
    x, weight = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(ROWS, DIM), (DIM, OUTPUTS)]))
    out = jax.random.normal(jax.random.key(2), (ROWS, OUTPUTS))
    exact = jax.grad(lambda x, weight: jnp.sum((x @ weight) * out), argnums=(0, 1))(x, weight)
    d_x, d_weight = linear_gradients(jax.random.key(3), x, weight, out)
    rounding = OUTPUTS * EPS * np.abs(out).max() * np.abs(weight).max() * OUTPUTS
    assert np.abs(d_x - exact[0]).max() <= rounding
    assert np.abs(linear_gradients(jax.random.key(3), x, -weight, out)[0] - exact[0]).max() > rounding
    steps = np.repeat(round_trip(Stochastic(key=None, dim=DIM, bits=BITS, group=GROUP), x)[1], GROUP, axis=1)
    bound = np.einsum("td,to->do", np.asarray(steps, np.float64), np.abs(np.asarray(out, np.float64)))
    assert np.all(np.abs(d_weight - exact[1]) <= bound * (1 + 1e-5))
    assert not np.all(np.abs(d_weight + 5 * exact[1]) <= bound)
    samples = draws(lambda key: linear_gradients(key, x, weight, out)[1])
    assert is_mean(samples, np.asarray(exact[1], np.float64))
    assert not is_mean(samples, np.asarray(exact[1] * 1.1, np.float64))


def test_an_activation_function_is_off_by_its_curvature_at_most():
    x = 3 * jax.random.normal(jax.random.key(0), (ROWS, DIM))
    out = jax.random.normal(jax.random.key(1), (ROWS, DIM))
    quantizer = Stochastic(key=jax.random.key(2), dim=DIM, bits=3, group=GROUP)
    exact_gelu = functools.partial(jax.nn.gelu, approximate=False)
    gelu = activations.elementwise(exact_gelu)
    assert np.array_equal(gelu(quantizer, x), exact_gelu(x))
    got = jax.grad(lambda x: jnp.sum(gelu(quantizer, x) * out))(x)
    exact = jax.grad(lambda x: jnp.sum(exact_gelu(x) * out))(x)
    curvature = (2 / np.pi) ** 0.5  # |gelu''| = |2 - x²| phi(x), most at 0
    bound = curvature * np.abs(decoded(quantizer, x) - x) * np.abs(out) + 8 * EPS * np.abs(out)
    assert np.all(np.abs(got - exact) <= bound)
    assert not np.all(np.abs(got + exact) <= bound)
    assert np.abs(got - exact).max() > 0.01


def block(params, x):
    h = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
    return x + jax.nn.gelu(h @ params[0]) @ params[1]


def test_a_checkpoint_is_the_block_at_the_decoded_input():
    params = [0.1 * jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(DIM, 64), (64, DIM)])]
    x, out = (jax.random.normal(jax.random.key(i), (ROWS, DIM)) for i in (2, 3))
    for quantizer in (
        Stochastic(key=jax.random.key(4), dim=DIM, bits=BITS),
        turboquant.mse(jax.random.key(4), dim=DIM, bits=4),
    ):
        packed = activations.checkpoint(block)
        assert np.array_equal(packed(quantizer, params, x), block(params, x))
        got = jax.grad(lambda params, x: jnp.sum(packed(quantizer, params, x) * out), argnums=(0, 1))(params, x)  # noqa: B023
        there = jax.vjp(block, params, decoded(quantizer, x))[1](out)
        here = jax.vjp(block, params, x)[1](out)
        for g, t, h in zip(*map(jax.tree.leaves, (got, there, here)), strict=True):
            assert np.allclose(g, t, rtol=1e-4, atol=1e-5)
            assert not np.allclose(g, h, rtol=1e-2, atol=1e-2)


LAYERS, TOKENS, WIDTH = 8, 256, 128


@functools.cache
def usage(kind, layers=LAYERS):
    """Bytes of temporaries, and floating-point operations, of the gradient of a stack of blocks."""
    params = [jax.ShapeDtypeStruct((layers, *s), jnp.float32) for s in ((WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH))]
    packed = activations.checkpoint(block)

    def net(params, x, key):
        base = Stochastic(key=key, dim=WIDTH, bits=2)

        def step(x, each):
            *params, i = each
            run = {
                "plain": block,
                "checkpoint": jax.checkpoint(block),
                "packed": lambda params, x: packed(stochastic.fold_in(base, i), params, x),
            }[kind]
            return run(params, x), None

        return jnp.sum(jax.lax.scan(step, x, (*params, jnp.arange(layers)))[0] ** 2)

    x, key = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.float32), jax.eval_shape(lambda: jax.random.key(0))
    return jax.jit(jax.grad(net)).lower(params, x, key).compile().memory_analysis().temp_size_in_bytes


def test_memory_of_training_grows_by_packed_bytes_for_every_layer():
    """Eight more layers hold eight more codes, and what jax.checkpoint keeps in float32 is fourteen times as much."""
    grown = {kind: (usage(kind, 2 * LAYERS) - usage(kind)) / LAYERS for kind in ("plain", "checkpoint", "packed")}
    whole = TOKENS * WIDTH * 4
    codes = TOKENS * (WIDTH // 4 + WIDTH // 64 * 4)
    overhead = 64  # a layer's key and counters
    assert codes <= grown["packed"] <= codes + overhead
    assert whole <= grown["checkpoint"] <= whole + overhead
    assert grown["plain"] > 5 * whole
    assert not grown["checkpoint"] <= codes + overhead
    assert usage("packed", 2 * LAYERS) < 0.6 * usage("checkpoint", 2 * LAYERS)


def count(name, jaxpr):
    """How often a primitive runs, calls of the same function counted each time."""
    inner = [getattr(x, "jaxpr", x) for e in jaxpr.eqns for x in e.params.values() if hasattr(x, "eqns")]
    return sum(e.primitive.name == name for e in jaxpr.eqns) + sum(count(name, x) for x in inner)


def test_the_policy_keeps_codes_under_checkpoint():
    """Inside `jax.checkpoint`, with the policy, backward reads codes; without it, it computes inputs once more."""
    quantizer = Stochastic(key=jax.random.key(0), dim=DIM, bits=BITS)
    weights = [jax.random.normal(jax.random.key(i), (DIM, DIM)) * 0.1 for i in range(3)]

    def net(weights, x):
        for weight in weights:
            x = activations.linear(quantizer, x, weight)
        return x

    x = jax.random.normal(jax.random.key(9), (ROWS, DIM))

    def gradient(net):
        return jax.grad(lambda weights: jnp.sum(net(weights, x) ** 2))

    def products(**options):
        return count("dot_general", jax.make_jaxpr(gradient(jax.checkpoint(net, **options)))(weights).jaxpr)

    # Three products forwards, two times three backwards; to find the second and the third input again, two more.
    assert products(policy=activations.SAVE_CODES) == 3 + 6
    assert products() == 3 + 6 + 2
    kept = gradient(jax.checkpoint(net, policy=activations.SAVE_CODES))(weights)
    for a, b in zip(gradient(net)(weights), kept, strict=True):
        assert np.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_new_key_does_not_retrace():
    traces = []

    @jax.jit
    def step(quantizer, x, weight):
        traces.append(1)
        return jax.grad(lambda w: activations.linear(quantizer, x, w).sum())(weight)

    x, weight = jnp.arange(DIM, dtype=jnp.float32)[None] / DIM, jnp.ones((DIM, 2))
    found = [step(Stochastic(key=jax.random.key(i), dim=DIM, bits=1), x, weight) for i in (0, 1)]
    assert len(traces) == 1
    assert not np.array_equal(*found)


@pytest.fixture
def without_type_checker():
    """The package's own messages, as users meet them: the type checker of the test run stands in front of them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("without_type_checker")
@pytest.mark.parametrize("name", ["fake_quantize", "linear", "checkpoint"])
def test_vectors_of_another_length_are_refused(name):
    quantizer, x = Stochastic(key=None, dim=DIM, bits=2), jnp.ones((3, DIM + 1))
    run = {
        "fake_quantize": lambda: activations.fake_quantize(quantizer, x),
        "linear": lambda: activations.linear(quantizer, x, jnp.ones((DIM + 1, 2))),
        "checkpoint": lambda: activations.checkpoint(lambda _, x: x)(quantizer, (), x),
    }[name]
    with pytest.raises(ValueError, match=f"x has shape \\(3, {DIM + 1}\\); its last axis must be the quantizer's dim"):
        run()
