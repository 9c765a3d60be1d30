"""Packed caches in Flax models against a list of tokens attended to one at a time in NumPy."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify

from jaxquant import cache, quantizers
from jaxquant.interop import flax
from jaxquant.methods import turboquant

DIM, HEADS, KV_HEADS, BATCH, LAYERS, CAPACITY, CHUNK, POOL = 16, 4, 2, 2, 2, 24, 5, 30
WIDTH, SINKS, WINDOW = HEADS * DIM, 2, 4


@functools.cache
def pair():
    return turboquant.kv(jax.random.key(7), dim=DIM, bits_k=4, bits_v=3)


def empty(*, kv_heads=KV_HEADS, layers=LAYERS, batch=BATCH, **kwargs):
    kept = {"sinks": SINKS, "window": WINDOW, "dtype": jnp.float32, **kwargs}
    return cache.init(*pair(), layers=layers, batch=batch, kv_heads=kv_heads, capacity=CAPACITY, **kept)


class Parallel(nnx.Module):
    """Attention layers that all read the input, so that each can be checked alone."""

    def __init__(self, count=LAYERS, **kwargs):
        self.layers = nnx.List(
            [
                nnx.MultiHeadAttention(
                    HEADS, WIDTH, num_kv_heads=KV_HEADS, decode=False, rngs=nnx.Rngs(i),
                    bias_init=nnx.initializers.normal(), **kwargs,
                )
                for i in range(count)
            ]
        )  # fmt: skip

    def __call__(self, x, mask=None, is_causal=False):
        return jnp.stack([layer(x, mask=mask, is_causal=is_causal) for layer in self.layers])


def fn(layer: nnx.Module) -> Any:
    return layer.attention_fn


def inputs(seed=0, shape=(BATCH, POOL, WIDTH)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def padded(valid):
    """The mask that a Flax model makes of tokens that are there: causal, and blind to padding."""
    valid = jnp.asarray(valid)
    return nnx.combine_masks(nnx.make_causal_mask(valid), nnx.make_attention_mask(jnp.ones_like(valid), valid))


@nnx.jit(donate_argnums=0)
def step(model, x, mask):
    return model(x, mask)


@nnx.jit
def causal(model, x):
    return model(x, is_causal=True)


class Row:
    """One sequence: places in the pool, and whether the exact copy of each is still there."""

    def __init__(self):
        self.tokens, self.lost = [], []

    def copy(self):
        other = Row()
        other.tokens, other.lost = self.tokens[:], self.lost[:]
        return other

    def append(self, token):
        self.tokens.append(token)
        self.lost.append(False)
        for place in range(max(0, len(self.tokens) - WINDOW)):
            self.lost[place] = True

    def crop(self, length):
        del self.tokens[length:], self.lost[length:]


@functools.cache
def reference():
    return Parallel()


@functools.cache
def projected(layer):
    """Queries, keys, values, and what the codes of the last two decode to, of the whole pool."""
    module = reference().layers[layer]
    q, k, v = (np.asarray(project(inputs())) for project in (module.query, module.key, module.value))
    coded = [
        np.asarray(quantizers.dequantize(z, quantizers.quantize(z, x))) for z, x in zip(pair(), (k, v), strict=True)
    ]
    return q, (k, v), coded


def expected(layer, row):
    """What the newest token of a row says, by plain attention over what is exact and what is not."""
    q, exact, coded = projected(layer)
    read = []
    for which in range(2):
        rows = [(coded if row.lost[p] and p >= SINKS else exact)[which][place] for p, place in enumerate(row.tokens)]
        read.append(np.repeat(np.stack(rows), HEADS // KV_HEADS, axis=1))
    scores = np.einsum("hd,thd->ht", q[row.tokens[-1]], read[0]) * DIM**-0.5
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    out = np.einsum("ht,thd->hd", weights / weights.sum(axis=1, keepdims=True), read[1])
    project = reference().layers[layer].out
    return np.einsum("hd,hdw->w", out, np.asarray(project.kernel[...])) + np.asarray(project.bias[...])


TOLERANCE = 1e-4  # of outputs of order one: float32 sums over CAPACITY tokens and WIDTH coordinates in another order


def feed(model, rows, i, valid):
    """Append chunk `i` of the pool to model and rows, and compare what both say for every token."""
    x = jnp.asarray(inputs()[:, i * CHUNK : (i + 1) * CHUNK])
    out = np.asarray(step(model, x, padded(valid)))
    for b, row in enumerate(rows):
        for t in range(CHUNK):
            if valid[b][t]:
                row.append((b, i * CHUNK + t))
                for layer in range(LAYERS):
                    np.testing.assert_allclose(out[layer, b, t], expected(layer, row), rtol=0, atol=TOLERANCE)


def room(rows, valid):
    return max(len(row.tokens) + sum(mask) for row, mask in zip(rows, valid, strict=True)) <= CAPACITY


operations = st.lists(
    st.one_of(
        st.tuples(
            st.just("append"),
            st.integers(0, POOL // CHUNK - 1),
            st.lists(st.lists(st.booleans(), min_size=CHUNK, max_size=CHUNK), min_size=BATCH, max_size=BATCH),
        ),
        st.tuples(st.just("append"), st.integers(0, POOL // CHUNK - 1), st.just([[True] * CHUNK] * BATCH)),
        st.tuples(st.just("crop"), st.integers(0, CAPACITY), st.integers(0, CAPACITY)),
        st.tuples(st.just("reorder"), st.integers(0, 1), st.integers(0, 1)),
        st.tuples(st.just("fork"), st.integers(0, 3), st.integers(0, 3)),
    ),
    min_size=2,
    max_size=7,
)


@settings(max_examples=12, deadline=None)
@given(operations)
def test_append_crop_reorder_fork_and_padding_in_any_order(operations):
    model = flax.attach(Parallel(), empty())
    rows = [Row() for _ in range(BATCH)]
    for name, *arguments in operations:
        match name:
            case "append":
                if room(rows, arguments[1]):
                    feed(model, rows, *arguments)
            case "crop":
                flax.hold(model, cache.crop(flax.held(model), jnp.asarray(arguments)))
                for row, length in zip(rows, arguments, strict=True):
                    row.crop(length)
            case "reorder":
                flax.hold(model, cache.reorder(flax.held(model), jnp.asarray(arguments)))
                rows = [rows[i].copy() for i in arguments]
            case "fork":
                forked = cache.fork(flax.held(model), copies=2)
                flax.hold(model, cache.reorder(forked, jnp.asarray(arguments)))
                rows = [rows[i // 2].copy() for i in arguments]
    assert flax.held(model).length.tolist() == [[len(row.tokens) for row in rows]] * LAYERS


def test_the_reference_tells_wrong_models_apart():
    every = [[True] * CHUNK] * BATCH
    for damage in ("layers", "rows", "exact", "keys"):
        model, rows = flax.attach(Parallel(), empty()), [Row() for _ in range(BATCH)]
        feed(model, rows, 0, every)
        feed(model, rows, 1, every)
        held = flax.held(model)
        match damage:
            case "layers":
                changed = jax.tree.map(lambda leaf: leaf[::-1] if leaf.shape[:2] == (LAYERS, BATCH) else leaf, held)
            case "rows":
                changed = cache.reorder(held, jnp.array([1, 0]))
            case "exact":
                changed = cache.crop(held, held.length[0])
                rows[0].lost[-1] = True
            case _:
                stack = held.stacks[0]
                changed = cache.KVCache(
                    stacks=(type(stack)(keys=stack.values, values=stack.keys),),
                    length=held.length, exact_from=held.exact_from, places=held.places,
                )  # fmt: skip
        flax.hold(model, changed)
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            feed(model, rows, 2, every)


def test_one_token_at_a_time_says_what_a_chunk_says():
    x, model = jnp.asarray(inputs()[:, :7]), flax.attach(Parallel(), empty())
    whole = causal(model, x)
    model = flax.attach(Parallel(), empty())
    parts = jnp.concatenate([causal(model, x[:, t : t + 1]) for t in range(7)], axis=2)
    np.testing.assert_allclose(parts, whole, rtol=0, atol=TOLERANCE)
    assert np.abs(parts[:, :, :-1] - whole[:, :, 1:]).max() > 100 * TOLERANCE


def test_a_padding_token_alone_is_not_stored_and_says_nothing():
    model = flax.attach(Parallel(1, use_bias=False), empty(layers=1))
    causal(model, jnp.asarray(inputs()[:, :4]))
    out = model(jnp.asarray(inputs()[:, 4:5]), jnp.array([1.0, 0.0]).reshape(2, 1, 1, 1))
    assert flax.held(model).length.tolist() == [[5, 4]]
    assert np.asarray(out[0, 0]).any()
    assert not np.asarray(out[0, 1]).any()


def test_rows_of_padding_may_be_hidden_as_well_as_columns():
    valid, x = np.ones((BATCH, 6)), jnp.asarray(inputs()[:, :6])
    valid[0, 4:] = valid[1, :2] = 0
    columns = padded(valid)
    both = jnp.where(jnp.asarray(valid)[:, None, :, None] > 0, columns, 0)
    model, other = (flax.attach(Parallel(), empty()) for _ in range(2))
    out, same = model(x, columns), other(x, both)
    np.testing.assert_array_equal(out, same)
    assert flax.held(other).length.tolist() == [[4, 4]] * LAYERS
    assert np.abs(out - flax.attach(Parallel(), empty())(x, padded(np.ones((BATCH, 6))))).max() > 100 * TOLERANCE


def test_the_cache_of_flax_is_not_kept_beside():
    def layer(decode):
        return nnx.MultiHeadAttention(HEADS, WIDTH, num_kv_heads=KV_HEADS, decode=decode, rngs=nnx.Rngs(0))

    x = jnp.asarray(inputs()[:, :5])
    decoding = layer(True)
    out, want = (flax.attach(model, empty(layers=1))(x, is_causal=True) for model in (decoding, layer(False)))
    np.testing.assert_array_equal(out, want)
    assert decoding.decode


def test_an_exact_cache_says_what_flax_says_without_one():
    exact = quantizers.Exact(dim=DIM, dtype="float32")
    held = cache.init(exact, exact, layers=LAYERS, batch=BATCH, kv_heads=KV_HEADS, capacity=CAPACITY)
    x, plain = jnp.asarray(inputs()[:, :12]), Parallel()
    want = plain(x, padded(np.ones((BATCH, 12))))
    packed = flax.attach(plain, held)
    got = [causal(packed, part) for part in (x[:, :5], x[:, 5:11], x[:, 11:])]
    np.testing.assert_allclose(jnp.concatenate(got, axis=2), want, rtol=0, atol=TOLERANCE)
    lossy = causal(flax.attach(plain, empty(sinks=0, window=0)), x)
    assert np.abs(lossy - want).max() > 10 * TOLERANCE, "compression must be active"


def test_attach_shares_weights_and_leaves_the_model_alone():
    plain = Parallel()
    packed = flax.attach(plain, empty())
    assert plain.layers[0].attention_fn is nnx.dot_product_attention
    assert packed.layers[1].query.kernel[...] is plain.layers[1].query.kernel[...]
    assert fn(packed.layers[0]).held is fn(packed.layers[1]).held
    again = nnx.clone(packed)
    again(jnp.ones((BATCH, 3, WIDTH)), is_causal=True)
    assert flax.held(again).length.tolist() == [[3, 3], [3, 3]]
    assert flax.held(packed).length.tolist() == [[0, 0], [0, 0]]


def test_a_donated_step_holds_one_cache():
    model = flax.attach(Parallel(), empty())
    before = flax.held(model).stacks[0].keys.codes.codes
    step(model, jnp.ones((BATCH, CHUNK, WIDTH)), None if CHUNK == 1 else padded(np.ones((BATCH, CHUNK))))
    assert before.is_deleted()
    assert flax.held(model).length[0, 0] == CHUNK


def test_layers_are_counted_by_value_and_can_be_named():
    many = Parallel(11)
    packed = flax.attach(many, empty(layers=11))
    assert [fn(packed.layers[i]).layer for i in range(11)] == list(range(11))
    paths = [("layers", 1), ("layers", 0)]
    assert [fn(layer).layer for layer in flax.attach(Parallel(), empty(), paths=paths).layers] == [1, 0]
    some = flax.attach(many, empty(), paths=[("layers", 3), ("layers", 10)])
    assert some.layers[0].attention_fn is nnx.dot_product_attention


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: flax.attach(Parallel(), empty(layers=3)), "cache has 3 layers and the model 2"),
        (lambda: flax.attach(Parallel(), empty(kv_heads=4)), "has 2 kv heads of 16"),
        (lambda: flax.attach(Parallel(), empty(), paths=[("x",), ("y",)]), r"got \('x',\)"),
        (lambda: flax.held(Parallel()), "must have one packed cache"),
        (lambda: flax.hold(flax.attach(Parallel(), empty()), empty(layers=1)), "is for 2 layers of 2 kv heads"),
        (lambda: flax.attach(Parallel(), empty())(jnp.ones((BATCH, 3, WIDTH))), "is causal"),
        (lambda: flax.attach(Parallel(), empty())(jnp.ones((1, 3, WIDTH)), is_causal=True), r"\[batch, new"),
        (
            lambda: flax.attach(Parallel(), empty())(jnp.ones((BATCH, 3, WIDTH)), jnp.ones((BATCH, 1, 3, 3))),
            "mask must be causal",
        ),
        (
            lambda: flax.attach(Parallel(), empty())(jnp.ones((BATCH, 1, WIDTH)), jnp.ones((BATCH, 1, 1, 4))),
            "not over those held",
        ),
        (
            lambda: flax.attach(Parallel(dropout_rate=0.5, deterministic=False), empty())(
                jnp.ones((BATCH, 3, WIDTH)), is_causal=True
            ),
            "deterministic=True",
        ),
        (
            lambda: flax.attach(Parallel(), empty()).layers[0](
                jnp.ones((BATCH, 3, WIDTH)), is_causal=True, sow_weights=True
            ),
            "sow_weights=False",
        ),
        (
            lambda: flax.attach(Parallel(), empty()).layers[0](
                jnp.ones((BATCH, 3, WIDTH)), jnp.ones((BATCH, 5, WIDTH)), is_causal=True
            ),
            "self-attention",
        ),
    ],
)
def test_what_a_packed_cache_cannot_do_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_a_traced_mask_is_checked_on_request():
    graph, state = nnx.split(flax.attach(Parallel(), empty()))
    run = checkify.checkify(jax.jit(lambda state, x, mask: nnx.merge(graph, state, copy=True)(x, mask)))
    x = jnp.ones((BATCH, 3, WIDTH))
    assert run(state, x, padded([[1, 1, 0], [0, 1, 1]]))[0].get() is None
    assert "not causal" in str(run(state, x, jnp.ones((BATCH, 1, 3, 3)))[0].get())


class Linen(linen.Module):
    attention_fn: Callable[..., jax.Array] = linen.dot_product_attention

    @linen.compact
    def __call__(self, x, mask):
        for i in range(2):
            layer = linen.MultiHeadDotProductAttention(
                KV_HEADS, qkv_features=KV_HEADS * DIM, attention_fn=self.attention_fn, name=f"layer{i}"
            )
            x = x + layer(x, mask=mask)
        return x


def test_linen_with_an_exact_cache_says_what_it_says_without_one():
    x = jnp.asarray(inputs(3, (BATCH, 9, 24)))
    valid = np.ones((BATCH, 9))
    valid[1, :3] = 0
    variables = Linen().init(jax.random.key(0), x, padded(valid))
    want = np.asarray(Linen().apply(variables, x, padded(valid)))
    exact = quantizers.Exact(dim=DIM, dtype="float32")
    found = {}
    for name, two in {"exact": (exact, exact), "packed": pair()}.items():
        model = Linen(flax.linen_attention_fn(*two, capacity=CAPACITY))
        started = model.init(jax.random.key(0), x[:, :1], padded(valid[:, :1]))
        held, parts = started["cache"], []
        run = jax.jit(
            lambda held, x, mask, model=model: model.apply({**variables, "cache": held}, x, mask, mutable=["cache"])
        )
        for low, high in ((0, 8), (8, 9)):
            out, changed = run(held, x[:, low:high], padded(valid[:, low:high]))
            held, parts = changed["cache"], [*parts, out]
        caches = jax.tree.leaves(held, is_leaf=lambda node: isinstance(node, cache.KVCache))
        assert [each.length.tolist() for each in caches] == [[[9, 6]], [[9, 6]]]
        found[name] = np.where(valid[..., None] > 0, jnp.concatenate(parts, axis=1) - want, 0)
    assert np.abs(found["exact"]).max() < TOLERANCE
    assert np.abs(found["packed"]).max() > 10 * TOLERANCE, "compression must be active"


def test_linen_refuses_dropout_and_sown_weights():
    attend = flax.linen_attention_fn(*pair(), capacity=CAPACITY)
    x, mask = jnp.ones((BATCH, 3, 24)), padded(np.ones((BATCH, 3)))
    kwargs = {"qkv_features": KV_HEADS * DIM, "attention_fn": attend}
    dropping = linen.MultiHeadDotProductAttention(KV_HEADS, dropout_rate=0.5, deterministic=False, **kwargs)
    with pytest.raises(ValueError, match="deterministic=True"):
        dropping.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x, mask=mask)
    with pytest.raises(ValueError, match="sow_weights=False"):
        linen.MultiHeadDotProductAttention(KV_HEADS, **kwargs).init(jax.random.key(0), x, mask=mask, sow_weights=True)
