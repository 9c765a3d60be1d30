"""Chunked attention beside a dense one in float64: every mask, ragged shapes, gradients, and memory as compiled."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant.chunked_attention import chunked_attention

EPS = float(np.finfo(np.float32).eps)
BATCH, QUERIES, KEYS, HEADS, KV_HEADS, DIM = 2, 21, 37, 4, 2, 8


def dense(q, k, v, *, causal=False, offset=0, sliding_window=None, prefix=None, q_mask=None, kv_mask=None,
          segments=None, mask=None, bias=None, scale=None, soft_cap=None):  # fmt: skip
    """All at once, in the dtype of the arguments; written without regard to memory or speed."""
    (batch, queries, heads, dim), keys = q.shape, k.shape[1]
    position = np.arange(queries)[None, :] + np.broadcast_to(offset, (batch,))[:, None]
    seen = np.ones((batch, heads, queries, keys), bool)
    for b in range(batch):
        for i in range(queries):
            for j in range(keys):
                p = position[b, i]
                before = j <= p or (prefix is not None and j < np.broadcast_to(prefix, (batch,))[b])
                seen[b, :, i, j] = (
                    (before or not causal)
                    and (sliding_window is None or abs(p - j) < sliding_window)
                    and (q_mask is None or q_mask[b, i])
                    and (kv_mask is None or kv_mask[b, j])
                    and (segments is None or segments[0][b, i] == segments[1][b, j])
                )
    if mask is not None:
        seen &= np.broadcast_to(mask, seen.shape)
    if isinstance(bias, np.ndarray):
        seen &= bias > -np.inf
    k, v = (x.repeat(heads // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (dim**-0.5 if scale is None else scale)
    scores = scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)
    scores = scores if bias is None else scores + bias
    scores = jnp.where(seen, scores, -1e30)
    some = seen.any(-1)
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(scores - peak), 0.0)
    total = jnp.where(some, weights.sum(-1), 1.0)
    lse = jnp.where(some, jnp.log(total) + peak[..., 0], -np.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", weights / total[..., None], v), jnp.swapaxes(lse, 1, 2)


def oracle(*arrays, **masks):
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in arrays]
        masks = {name: wider(x) for name, x in masks.items()}
        return tuple(np.asarray(x) for x in dense(*wide, **masks))


def wider(x):
    return np.asarray(x, np.float64) if getattr(x, "dtype", None) in ("float32", "bfloat16") else x


def tolerance(q, k, v, scale=None, bias=None):
    """Of out and lse: a score's rounding, dim sums and a few more, goes into every weight twice; then a sum of keys."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    factor = q.shape[-1] ** -0.5 if scale is None else abs(float(scale))
    largest = factor * np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max()
    largest += 0 if bias is None else np.abs(bias[np.isfinite(bias)]).max(initial=0.0)
    score = (q.shape[-1] + 8) * EPS * largest
    return (2 * score + (k.shape[1] + 8) * EPS) * np.abs(v).max(), 2 * score + (k.shape[1] + 8) * EPS


def same(got, expected, bound):
    hidden = np.isinf(expected[1])
    return (
        np.array_equal(np.isneginf(got[1]), hidden)
        and np.abs(got[0] - expected[0]).max(initial=0) <= bound[0]
        and np.abs(np.where(hidden, 0, got[1]) - np.where(hidden, 0, expected[1])).max(initial=0) <= bound[1]
    )


def arrays(rng, queries=QUERIES, keys=KEYS, batch=BATCH, heads=HEADS, kv_heads=KV_HEADS, dim=DIM, width=DIM):
    shapes = (batch, queries, heads, dim), (batch, keys, kv_heads, dim), (batch, keys, kv_heads, width)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def everything(rng, batch=BATCH, heads=HEADS, queries=QUERIES, keys=KEYS):
    """One of each kind of mask, weak enough that together they leave something to see."""
    cuts = np.sort(rng.integers(0, 3, (batch, keys)), axis=1)
    bias = rng.normal(size=(1, heads, queries, 1)) + rng.normal(size=(1, heads, queries, keys))
    bias = np.where(rng.random(bias.shape) < 0.1, -np.inf, bias)
    return {
        "causal": True,
        "offset": rng.integers(0, keys, batch),
        "sliding_window": int(rng.integers(1, keys + 1)),
        "prefix": rng.integers(0, keys, batch),
        "q_mask": rng.random((batch, queries)) < 0.9,
        "kv_mask": rng.random((batch, keys)) < 0.8,
        "segments": (rng.integers(0, 3, (batch, queries)), cuts),
        "mask": rng.random((batch, 1, queries, keys)) < 0.8,
        "bias": np.float32(bias),
        "soft_cap": np.float32(2.0),
        "scale": np.float32(0.7),
    }


def in_jax(masks):
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray | np.generic) else x, masks)


NEEDS = {"prefix": ("causal",), "offset": ("causal",)}


@pytest.mark.parametrize("kind", ["nothing", *everything(np.random.default_rng(0))])
def test_each_mask_alone_and_its_absence_is_noticed(kind):
    rng = np.random.default_rng(7)
    q, k, v = arrays(rng)
    all_masks = everything(rng)
    chosen = () if kind == "nothing" else (kind, *NEEDS.get(kind, ()))
    masks = {name: all_masks[name] for name in chosen}
    got = chunked_attention(q, k, v, **in_jax(masks), q_chunk=8, kv_chunk=16)
    bound = tolerance(q, k, v, masks.get("scale"), masks.get("bias"))
    assert same(got, oracle(q, k, v, **masks), bound)
    if kind == "nothing":
        assert not same(got, oracle(q, v, k), bound)
    else:
        assert not same(got, oracle(q, k, v, **{name: masks[name] for name in NEEDS.get(kind, ())}), bound)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1), queries=st.integers(1, 40), keys=st.integers(1, 40), q_chunk=st.integers(1, 41),
    kv_chunk=st.integers(1, 41), batch=st.integers(1, 3), kv_heads=st.integers(1, 2), group=st.integers(1, 3),
    dim=st.integers(1, 9), width=st.integers(1, 9),
    names=st.sets(st.sampled_from(sorted(everything(np.random.default_rng(0))))),
)  # fmt: skip
def test_ragged_shapes_and_any_masks(seed, queries, keys, q_chunk, kv_chunk, batch, kv_heads, group, dim, width, names):
    rng = np.random.default_rng(seed)
    heads = kv_heads * group
    q, k, v = arrays(rng, queries, keys, batch, heads, kv_heads, dim, width)
    masks = everything(rng, batch, heads, queries, keys)
    masks = {name: masks[name] for name in sorted(names)}
    got = chunked_attention(q, k, v, **in_jax(masks), q_chunk=q_chunk, kv_chunk=kv_chunk)
    assert same(got, oracle(q, k, v, **masks), tolerance(q, k, v, masks.get("scale"), masks.get("bias")))


SMOOTH = ("bias", "scale", "soft_cap")


def gradients(f, q, k, v, masks, weight, lse_weight):
    """Of a weighted sum of outputs and of the log-sum-exp of rows that see something."""

    def loss(q, k, v, smooth):
        out, lse = f(q, k, v, **{**masks, **smooth})
        seen = jnp.isfinite(lse)
        return jnp.sum(out * weight) + jnp.sum(jnp.where(seen, lse, 0.0) * lse_weight)

    smooth = {name: jnp.asarray(masks[name]) for name in SMOOTH if name in masks}
    return jax.grad(loss, argnums=(0, 1, 2, 3))(q, k, v, smooth)


@functools.cache
def gradient_case(bias_shape=None):
    rng = np.random.default_rng(11)
    q, k, v = arrays(rng)
    masks = everything(rng)
    masks["sliding_window"] = 30
    masks["prefix"] = np.array([9, 20])
    if bias_shape is not None:
        masks["bias"] = np.float32(rng.normal(size=bias_shape))
    weight, lse_weight = rng.normal(size=q.shape), rng.normal(size=q.shape[:3])
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in (q, k, v)]
        wide_masks = {name: wider(x) for name, x in masks.items()}
        expected = jax.tree.map(np.asarray, gradients(dense, *wide, wide_masks, weight, lse_weight))
    weights = (jnp.asarray(weight, jnp.float32), jnp.asarray(lse_weight, jnp.float32))
    chunks = functools.partial(chunked_attention, q_chunk=8, kv_chunk=16)
    return chunks, q, k, v, in_jax(masks), *weights, expected


def close(got, expected):
    """Within what float32 sums of KEYS * QUERIES terms may lose, relative to the largest entry."""
    return all(
        np.abs(g - e).max() <= 4 * (KEYS + QUERIES + DIM) * EPS * max(np.abs(e).max(), 1.0)
        for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    )


@pytest.mark.parametrize("bias_shape", [None, (1, 1, 1, KEYS)], ids=str)
def test_gradients_under_all_masks_together(bias_shape):
    chunks, q, k, v, masks, weight, lse_weight, expected = gradient_case(bias_shape)
    got = gradients(chunks, q, k, v, masks, weight, lse_weight)
    assert close(got, expected)
    if bias_shape is None:
        for part in range(3):  # each is needed: another operand, or another sign, is noticed
            wrong = list(got)
            wrong[part] = -got[part]
            assert not close(wrong, expected)
        assert not close(gradients(chunks, q, k, v, masks, weight, 0 * lse_weight), expected)
        assert not np.asarray(got[3]["bias"])[np.isinf(masks["bias"])].any()


def test_padding_may_hold_anything_forwards_and_backwards():
    rng = np.random.default_rng(3)
    q, k, v = arrays(rng)
    q_mask, kv_mask = jnp.arange(QUERIES) < 15, jnp.arange(KEYS) < 30
    q_mask, kv_mask = (jnp.broadcast_to(x, (BATCH, x.size)) for x in (q_mask, kv_mask))
    q_bad, k_bad, v_bad = (
        jnp.where(m[:, :, None, None], x, jnp.nan) for m, x in ((q_mask, q), (kv_mask, k), (kv_mask, v))
    )

    def run(q, k, v):
        masks = {"q_mask": q_mask, "kv_mask": kv_mask, "scale": jnp.float32(0.3)}
        weight = jnp.ones_like(q)
        call = functools.partial(chunked_attention, q_chunk=8, kv_chunk=16)
        return call(q, k, v, **masks), gradients(call, q, k, v, masks, weight, jnp.ones(q.shape[:3]))

    for clean, dirty in zip(jax.tree.leaves(run(q, k, v)), jax.tree.leaves(run(q_bad, k_bad, v_bad)), strict=True):
        assert np.array_equal(clean, dirty)
    assert np.isnan(chunked_attention(q_bad, k_bad, v_bad)[0]).any()


def test_hidden_chunks_are_not_visited():
    """NaN in a visited value would spoil the sum even at weight 0."""
    q, k, v = arrays(np.random.default_rng(4), queries=32, keys=96)
    v = v.at[:, 32:].set(jnp.nan)
    run = functools.partial(chunked_attention, q, k, q_chunk=16, kv_chunk=16)
    assert np.isfinite(run(v, causal=True)[0]).all()
    assert np.isnan(run(v, causal=True, offset=1)[0]).any()
    early = v.at[:, :64].set(jnp.nan).at[:, 64:].set(1.0)
    assert np.isfinite(run(early, causal=True, offset=70, sliding_window=7)[0]).all()
    assert np.isnan(run(early, causal=True, offset=70, sliding_window=8)[0]).any()
    assert np.isfinite(run(v, sliding_window=2**31 - 1, causal=True)[0]).all()


def test_bfloat16_and_transformations():
    rng = np.random.default_rng(5)
    q, k, v = (x.astype(jnp.bfloat16) for x in arrays(rng))
    out, lse = chunked_attention(q, k, v, causal=True, offset=16, q_chunk=8, kv_chunk=16)
    assert out.dtype == jnp.bfloat16
    assert lse.dtype == jnp.float32
    expected = oracle(q, k, v, causal=True, offset=16)
    # Weights are rounded to bfloat16 before they meet values, and the output after.
    bound = 2.0**-8 * np.abs(np.asarray(v, np.float64)).max() * 2
    assert np.abs(np.asarray(out, np.float64) - expected[0]).max() < bound
    assert np.abs(np.asarray(out, np.float64) - oracle(q, k, v, causal=True)[0]).max() > bound
    one = functools.partial(chunked_attention, causal=True, q_chunk=8, kv_chunk=16)
    mapped = jax.vmap(one)(*(jnp.stack([x, 2 * x]) for x in (q, k, v)))
    assert np.array_equal(mapped[0][0], one(q, k, v)[0])
    traces = []

    @jax.jit
    def scaled(scale, cap):
        traces.append(1)
        return one(q, k, v, scale=scale, soft_cap=cap)[0]

    scaled(jnp.float32(0.1), jnp.float32(1.0))
    scaled(jnp.float32(0.2), jnp.float32(2.0))
    assert len(traces) == 1


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_attend(queries, keys):
    out, lse = chunked_attention(*arrays(np.random.default_rng(0), queries, keys), causal=True)
    assert out.shape == (BATCH, queries, HEADS, DIM)
    assert not out.any()
    assert np.isneginf(lse).all()


@pytest.fixture
def without_type_checker():
    """The package's own messages, as users meet them: the type checker of the test run stands in front of them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("without_type_checker")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (2, 37, 3, 8), "v": (2, 37, 3, 8)}, r"heads of q must be a multiple of the 3 of k, got 4"),
        ({"k": (2, 36, 2, 8)}, r"q, k and v do not fit each other"),
        ({"q_chunk": 0}, r"q_chunk must be at least 1, got 0"),
        ({"kv_chunk": -1}, r"kv_chunk must be at least 1, got -1"),
        ({"sliding_window": 0}, r"sliding_window must be at least 1, got 0"),
        ({"soft_cap": -1.0}, r"soft_cap must be positive, got -1.0"),
        ({"bias": (2, 4, 21, 36)}, r"bias must have shape \[2, 4, 21, 37\], or 1 in place of any"),
        ({"q_mask": (2, 37)}, r"q_mask must have shape \[2, 21\], got \[2, 37\]"),
        ({"kv_mask": (1, 37)}, r"kv_mask must have shape \[2, 37\], got \[1, 37\]"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_wrong_arguments_are_refused(change, message):
    parts = dict(zip("qkv", arrays(np.random.default_rng(0)), strict=True))
    change = {name: jnp.zeros(x) if isinstance(x, tuple) else x for name, x in change.items()}
    with pytest.raises(ValueError, match=message):
        chunked_attention(**{**parts, **change})


@pytest.mark.usefixtures("without_type_checker")
def test_mixed_dtypes_are_refused():
    q, k, v = arrays(np.random.default_rng(0))
    with pytest.raises(TypeError, match="one dtype, got float32, bfloat16 and float32"):
        chunked_attention(q, k.astype(jnp.bfloat16), v)


def compiled(tokens, *, backward):
    q, kv = (jax.ShapeDtypeStruct((1, tokens, heads, 64), jnp.float32) for heads in (8, 2))

    def forward(q, k, v):
        return chunked_attention(q, k, v, causal=True)[0]

    f = jax.grad(lambda *x: jnp.sum(forward(*x) ** 2), argnums=(0, 1, 2)) if backward else forward
    return jax.jit(f).lower(q, kv, kv).compile().memory_analysis()


SCORES = 256 * 512 * 8 * 4  # bytes of a chunk of queries against a chunk of keys, for all heads


def test_memory_of_the_forward_pass_does_not_grow_with_length():
    short, long = (compiled(tokens, backward=False).temp_size_in_bytes for tokens in (2048, 8192))
    assert long == short
    assert SCORES <= long < 4 * SCORES
    q, kv = (jax.ShapeDtypeStruct((1, 8192, heads, 64), jnp.float32) for heads in (8, 2))
    whole = jax.jit(jax.nn.dot_product_attention).lower(q, kv, kv).compile().memory_analysis()
    assert whole.temp_size_in_bytes >= 8192 * 8192 * 8 * 4


def test_memory_of_the_backward_pass_grows_by_what_it_must_remember():
    short, long = (compiled(tokens, backward=True).temp_size_in_bytes for tokens in (2048, 8192))
    output_and_lse = 8 * (64 + 1) * 4
    assert long - short <= 1.1 * (8192 - 2048) * output_and_lse
    assert short < 8 * SCORES + 2048 * output_and_lse
