"""Attention over the packed cache against a dense oracle in float64, for every way of filling the cache."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import _attention, attention, cache, quantizers
from jaxquant._kernels import xla
from jaxquant.methods import turboquant

DIM, HEADS, KV_HEADS, CAPACITY = 16, 4, 2, 64


def pair(bits_k=4, bits_v=2):
    return turboquant.kv(jax.random.key(7), dim=DIM, bits_k=bits_k, bits_v=bits_v)


def empty(*, batch=2, sinks=0, window=0, layers=2, quantizers_=None, dtype=jnp.float32, **kwargs):
    k, v = quantizers_ or pair()
    return cache.init(
        k,
        v,
        layers=layers,
        batch=batch,
        kv_heads=KV_HEADS,
        capacity=CAPACITY,
        sinks=sinks,
        window=window,
        dtype=dtype,
        **kwargs,
    )


def tokens(seed, batch=2, new=40):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(batch, new, HEADS, DIM)).astype(np.float32) * 2
    k, v = (rng.normal(size=(batch, new, KV_HEADS, DIM)).astype(np.float32) for _ in range(2))
    return jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)


def coded(quantizer, x):
    return np.asarray(quantizers.dequantize(quantizer, quantizers.quantize(quantizer, x)), np.float64)


def oracle(
    q, k, v, *, keys, values, sinks=0, window=0, scale=None, soft_cap=None, sliding_window=None, visible=None, cuts=None
):
    """Dense causal attention of one row in float64: each query reads exact or coded tokens by their distance.

    With `cuts`, the lengths of chunks, tokens are exact from `window` before the query's own chunk on.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k_coded, v_coded = coded(keys, k.astype(np.float32)), coded(values, v.astype(np.float32))
    new, heads, dim = q.shape
    out, lse = np.zeros((new, heads, dim)), np.full((new, heads), -np.inf)
    for p in range(new):
        seen = np.arange(p + 1)
        if sliding_window is not None:
            seen = seen[seen > p - sliding_window]
        if visible is not None:
            seen = seen[visible[seen]]
        if not len(seen):
            continue
        exact = seen < sinks
        if cuts is None:
            exact |= seen > p - window
        else:
            begins = np.cumsum((0, *cuts))
            exact |= seen >= begins[begins <= p][-1] - window
        exact = exact[:, None, None]
        kk, vv = np.where(exact, k[seen], k_coded[seen]), np.where(exact, v[seen], v_coded[seen])
        for h in range(heads):
            g = h // (heads // k.shape[1])
            s = kk[:, g] @ q[p, h] * (dim**-0.5 if scale is None else scale)
            s = s if soft_cap is None else soft_cap * np.tanh(s / soft_cap)
            top = s.max()
            w = np.exp(s - top)
            out[p, h], lse[p, h] = w @ vv[:, g] / w.sum(), top + np.log(w.sum())
    return out, lse


def assert_same(result, expected):
    """Float32 sums of CAPACITY terms against float64."""
    for got, want in zip(result, expected, strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=64 * np.finfo(np.float32).eps * 8)


CASES = {
    "plain": {},
    "sinks": {"sinks": 3},
    "window": {"window": 8},
    "both": {"sinks": 3, "window": 8},
    "sliding": {"sliding_window": 5},
    "sliding over window": {"sinks": 2, "window": 8, "sliding_window": 11},
    "cap and scale": {"soft_cap": 2.0, "scale": 0.7, "window": 4},
}


@pytest.fixture(params=CASES, ids=list(CASES))
def case(request):
    return CASES[request.param]


def split(case):
    held = {name: case[name] for name in ("sinks", "window") if name in case}
    return held, {name: value for name, value in case.items() if name not in held}


@pytest.mark.parametrize("cuts", [(40,), (17, 23), (1, 6, 6, 6, 6, 6, 9)], ids=["one", "two", "seven"])
def test_prefill_equals_oracle_for_any_chunking(case, cuts):
    held, rule = split(case)
    c = empty(**held)
    q, k, v = tokens(0)
    outs = []
    for start, stop in zip(np.cumsum((0, *cuts))[:-1], np.cumsum(cuts), strict=True):
        out, lse, c = attention.prefill_attention(q[:, start:stop], k[:, start:stop], v[:, start:stop], c, 1, **rule)
        outs.append((out, lse))
    out, lse = (np.concatenate(part, axis=1) for part in zip(*outs, strict=True))
    keys, values = pair()
    for row in range(2):
        expected = oracle(q[row], k[row], v[row], keys=keys, values=values, **case)
        assert_same((out[row], lse[row]), expected)
        with pytest.raises(AssertionError):
            assert_same((out[row], lse[row]), oracle(q[row], k[row], k[row], keys=keys, values=values, **case))
        with pytest.raises(AssertionError):
            assert_same((out[row], lse[row]), oracle(q[row], k[row], v[row], keys=values, values=values, **case))
    assert c.length.tolist() == [[0, 0], [40, 40]]


@pytest.mark.parametrize("cuts", [(40,), (17, 23), (1, 6, 6, 6, 6, 6, 9)], ids=["one", "two", "seven"])
def test_exact_chunks_equal_oracle(case, cuts, monkeypatch):
    monkeypatch.setattr(_attention, "_QUERY_CHUNK", 16)
    monkeypatch.setattr(xla, "BLOCK", 16)
    held, rule = split(case)
    c, ordinary = empty(**held), empty(**held)
    q, k, v = tokens(0)
    outs = []
    for start, stop in zip(np.cumsum((0, *cuts))[:-1], np.cumsum(cuts), strict=True):
        given = q[:, start:stop], k[:, start:stop], v[:, start:stop]
        out, lse, c = attention.prefill_attention(*given, c, 1, chunk="exact", **rule)
        _, _, ordinary = attention.prefill_attention(*given, ordinary, 1, **rule)
        outs.append((out, lse))
    out, lse = (np.concatenate(part, axis=1) for part in zip(*outs, strict=True))
    keys, values = pair()
    for row in range(2):
        assert_same((out[row], lse[row]), oracle(q[row], k[row], v[row], keys=keys, values=values, cuts=cuts, **case))
        other = oracle(q[row], k[row], v[row], keys=keys, values=values, cuts=(20, 20), **case)
        with pytest.raises(AssertionError):
            assert_same((out[row], lse[row]), other)
    chex.assert_trees_all_equal(c, ordinary)


@pytest.mark.parametrize("window", [0, 4])
def test_exact_chunks_skip_padding_that_is_not_a_number(window):
    q, k, v = tokens(3, new=12)
    mask = jnp.arange(12) % 3 != jnp.arange(2)[:, None]
    bad = jnp.where(mask[..., None, None], k, jnp.nan)
    out, lse, _ = attention.prefill_attention(q, bad, v, empty(window=window), 0, mask=mask, chunk="exact")
    for row in range(2):
        kept = np.flatnonzero(mask[row])
        alone = [x[row : row + 1, kept] for x in (q, k, v)]
        one = empty(window=window, batch=1)
        want, want_lse, _ = attention.prefill_attention(*alone, one, 0, chunk="exact")
        assert_same((out[row, kept], lse[row, kept]), (want[0], want_lse[0]))
        with pytest.raises(AssertionError):
            assert_same((out[row, kept], lse[row, kept]), (want[0, ::-1], want_lse[0]))


def test_decode_equals_prefill_token_by_token(case):
    held, rule = split(case)
    q, k, v = tokens(1, new=12)
    expected, expected_lse, full = attention.prefill_attention(q, k, v, empty(**held), 0, **rule)
    c = empty(**held)
    for t in range(12):
        c = cache.append(c, 0, k[:, t : t + 1], v[:, t : t + 1])
        out, lse = attention.decode_attention(q[:, t], c, 0, **rule)
        np.testing.assert_allclose(out, expected[:, t], atol=2e-5)
        np.testing.assert_allclose(lse, expected_lse[:, t], atol=2e-5)
    chex.assert_trees_all_equal(c, full)


@pytest.mark.parametrize("side", ["left", "right", "scattered"])
def test_padded_rows_equal_unpadded_rows(case, side):
    held, rule = split(case)
    q, k, v = tokens(2)
    counts = [40, 23]
    mask = np.zeros((2, 40), bool)
    rng = np.random.default_rng(3)
    for row, count in enumerate(counts):
        where = {
            "left": np.arange(40 - count, 40),
            "right": np.arange(count),
            "scattered": np.sort(rng.permutation(40)[:count]),
        }
        mask[row, where[side]] = True
    out, lse, c = attention.prefill_attention(q, k, v, empty(**held), 0, mask=jnp.asarray(mask), **rule)
    assert c.length.tolist() == [counts, [0, 0]]
    keys, values = pair()
    for row in range(2):
        m = mask[row]
        expected = oracle(q[row, m], k[row, m], v[row, m], keys=keys, values=values, **case)
        assert_same((out[row, m], lse[row, m]), expected)
        assert not np.asarray(out[row, ~m]).any()
        assert np.isneginf(np.asarray(lse[row, ~m])).all()
        alone = {**held, "batch": 1}
        _, _, lonely = attention.prefill_attention(
            q[row : row + 1, m], k[row : row + 1, m], v[row : row + 1, m], empty(**alone), 0, **rule
        )
        mine = cache.reorder(c, jnp.array([row]))
        for got, want in zip(cache.materialize(mine, 0), cache.materialize(lonely, 0), strict=True):
            np.testing.assert_array_equal(got, want)


def test_reorder_and_crop_continue_as_if_never_longer():
    held = {"sinks": 3, "window": 8}
    q, k, v = tokens(4)
    _, _, c = attention.prefill_attention(q[:, :20], k[:, :20], v[:, :20], empty(**held), 0)
    _, _, long = attention.prefill_attention(q[:, 20:26], k[:, 20:26], v[:, 20:26], c, 0)
    swapped = cache.reorder(long, jnp.array([1, 0, 1]))
    out, _, _ = attention.prefill_attention(*(x[jnp.array([1, 0, 1]), 26:] for x in (q, k, v)), swapped, 0)
    expected, _, _ = attention.prefill_attention(q[:, 26:], k[:, 26:], v[:, 26:], long, 0)
    np.testing.assert_allclose(out, expected[jnp.array([1, 0, 1])], atol=2e-5)

    # Cropped by 6 of a window of 8, positions 18 and 19 are still exact and 12 to 17 are read from codes.
    cropped = cache.crop(long, 20)
    out, _, _ = attention.prefill_attention(q[:, 30:31], k[:, 30:31], v[:, 30:31], cropped, 0)
    keys, values = pair()
    for row in range(2):
        kk = np.concatenate([k[row, :20], k[row, 30:31]]).astype(np.float64)
        vv = np.concatenate([v[row, :20], v[row, 30:31]]).astype(np.float64)
        kk[3:18], vv[3:18] = coded(keys, k[row, 3:18]), coded(values, v[row, 3:18])
        exact = quantizers.Exact(dim=DIM, dtype="float32")
        qq = np.zeros((21, HEADS, DIM))
        qq[20] = q[row, 30]
        expected, _ = oracle(qq, kk, vv, keys=exact, values=exact)
        np.testing.assert_allclose(out[row, 0], expected[20], atol=2e-5)


def test_crop_with_no_window_equals_never_appended():
    q, k, v = tokens(5)
    _, _, c = attention.prefill_attention(q[:, :20], k[:, :20], v[:, :20], empty(sinks=2), 0)
    longer = cache.append(c, 0, k[:, 20:], v[:, 20:])
    ours = attention.prefill_attention(q[:, 30:], k[:, 30:], v[:, 30:], cache.crop(longer, 20), 0)
    theirs = attention.prefill_attention(q[:, 30:], k[:, 30:], v[:, 30:], c, 0)
    np.testing.assert_array_equal(ours[0], theirs[0])
    for got, want in zip(cache.materialize(ours[2], 0), cache.materialize(theirs[2], 0), strict=True):
        np.testing.assert_array_equal(got, want)


def test_decode_after_crop_reads_from_codes_what_left_the_window():
    q, k, v = tokens(6)
    c = cache.append(empty(sinks=2, window=8), 0, k[:, :30], v[:, :30])
    c = cache.crop(c, 25)  # the window now holds positions 22 to 24 and, beside them, tokens that are gone
    coded = cache.append(empty(sinks=2), 0, k[:, :25], v[:, :25])
    for got, want in zip(cache.materialize(c, 0), cache.materialize(coded, 0), strict=True):
        np.testing.assert_allclose(got[:, :22], want[:, :22], atol=1e-6)
        assert np.abs(got[:, 22:25] - want[:, 22:25]).max() > 1e-3
    out, lse = attention.decode_attention(q[:, 0], c, 0)
    kk, vv = (np.repeat(np.asarray(x, np.float64)[:, :25], 2, axis=2) for x in cache.materialize(c, 0))
    scores = np.einsum("bhd,bthd->bht", np.asarray(q[:, 0], np.float64), kk) * k.shape[-1] ** -0.5
    weights = np.exp(scores)
    np.testing.assert_allclose(lse, np.log(weights.sum(axis=-1)), atol=1e-5)
    want = np.einsum("bht,bthd->bhd", weights / weights.sum(axis=-1, keepdims=True), vv)
    np.testing.assert_allclose(out, want, atol=1e-5)


def test_ragged_rows_decode_like_lonely_rows():
    q, k, v = tokens(6)
    c = empty(sinks=3, window=8)
    c = cache.append(c, 0, k, v, mask=jnp.arange(40) < jnp.array([[40], [5]]))
    out, lse = attention.decode_attention(q[:, 0], c, 0)
    for row, count in enumerate((40, 5)):
        alone = cache.append(empty(sinks=3, window=8, batch=1), 0, k[row : row + 1, :count], v[row : row + 1, :count])
        want, want_lse = attention.decode_attention(q[row : row + 1, 0], alone, 0)
        np.testing.assert_allclose(out[row], want[0], atol=1e-6)
        np.testing.assert_allclose(lse[row], want_lse[0], atol=1e-6)


def test_empty_row_gives_zero_and_minus_infinity():
    out, lse = attention.decode_attention(tokens(0)[0][:, 0], empty(sinks=2, window=4), 0)
    assert not np.asarray(out).any()
    assert np.isneginf(np.asarray(lse)).all()


def test_visible_hides_positions_everywhere():
    q, k, v = tokens(8)
    rng = np.random.default_rng(9)
    visible = rng.random((2, CAPACITY)) < 0.6
    out, lse, c = attention.prefill_attention(q, k, v, empty(sinks=3, window=8), 0, visible=jnp.asarray(visible))
    last, last_lse = attention.decode_attention(q[:, -1], c, 0, visible=jnp.asarray(visible))
    keys, values = pair()
    for row in range(2):
        expected = oracle(q[row], k[row], v[row], keys=keys, values=values, sinks=3, window=8, visible=visible[row])
        assert_same((out[row], lse[row]), expected)
        assert_same((last[row], last_lse[row]), (expected[0][-1], expected[1][-1]))


def test_long_prefill_is_scored_in_chunks(monkeypatch):
    q, k, v = tokens(10)
    expected = attention.prefill_attention(q, k, v, empty(sinks=3, window=8), 0)
    monkeypatch.setattr(_attention, "_QUERY_CHUNK", 16)
    monkeypatch.setattr("jaxquant._kernels.xla.BLOCK", 24)
    jax.clear_caches()
    out, lse, _ = attention.prefill_attention(q, k, v, empty(sinks=3, window=8), 0)
    np.testing.assert_allclose(out, expected[0], atol=2e-5)
    np.testing.assert_allclose(lse, expected[1], atol=2e-5)
    jax.clear_caches()


def test_merge_equals_one_softmax():
    q, k, v = tokens(11)
    c = empty()
    whole = cache.append(c, 0, k, v)
    early, late = (
        jnp.broadcast_to(part, (2, CAPACITY)) for part in (jnp.arange(CAPACITY) < 13, jnp.arange(CAPACITY) >= 13)
    )
    parts = [attention.decode_attention(q[:, 0], whole, 0, visible=part) for part in (early, late)]
    got, want = attention.merge(*parts), attention.decode_attention(q[:, 0], whole, 0)
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    np.testing.assert_allclose(got[1], want[1], atol=1e-5)


def test_residual_quantizer_attends_through_its_sketch():
    keys = turboquant.prod(jax.random.key(0), dim=DIM, bits=3)
    values = turboquant.mse(jax.random.key(1), dim=DIM, bits=4)
    q, k, v = tokens(12)
    out, lse, _ = attention.prefill_attention(q, k, v, empty(quantizers_=(keys, values)), 0)
    for row in range(2):
        assert_same((out[row], lse[row]), oracle(q[row], k[row], v[row], keys=keys, values=values))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_bad_element_does_not_reach_other_tokens(poison):
    """Neither padding nor a later token may touch a row's output, window or not, coded or exact."""
    q, k, v = tokens(13, new=12)
    bad_k, bad_v = k.at[:, 11].set(poison), v.at[:, 11].set(poison)
    exact = quantizers.Exact(dim=DIM, dtype="float32")
    for held in ({}, {"window": 4}, {"sinks": 2, "window": 4}, {"quantizers_": (exact, exact)}):
        clean, _, _ = attention.prefill_attention(q[:, :11], k[:, :11], v[:, :11], empty(**held), 0)
        late, _, _ = attention.prefill_attention(q, bad_k, bad_v, empty(**held), 0)
        np.testing.assert_allclose(late[:, :11], clean, atol=2e-5)
        mask = jnp.arange(12) < 11
        padded, _, _ = attention.prefill_attention(
            q, bad_k, bad_v, empty(**held), 0, mask=jnp.broadcast_to(mask, (2, 12))
        )
        np.testing.assert_allclose(padded[:, :11], clean, atol=2e-5)


def test_an_empty_chunk_changes_nothing():
    q, k, v = tokens(0, new=4)
    _, _, c = attention.prefill_attention(q, k, v, empty(sinks=1, window=2), 0)
    out, lse, after = attention.prefill_attention(q[:, :0], k[:, :0], v[:, :0], c, 0)
    assert out.shape == (2, 0, HEADS, DIM)
    assert lse.shape == (2, 0, HEADS)
    chex.assert_trees_all_equal(after, c)


def test_bfloat16_queries_give_bfloat16_outputs_that_merge():
    q, k, v = (x.astype(jnp.bfloat16) for x in tokens(14))
    c = cache.append(empty(window=4, dtype=jnp.bfloat16), 0, k, v)
    out, lse = attention.decode_attention(q[:, 0], c, 0)
    wide, _ = attention.decode_attention(q[:, 0].astype(jnp.float32), c, 0)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(out, wide.astype(jnp.bfloat16))
    merged, _ = attention.merge((out, lse), (out, lse))
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_allclose(merged.astype(jnp.float32), out.astype(jnp.float32), rtol=2**-7)


@pytest.mark.parametrize("window", [2**31 - 1, jnp.int32(2**31 - 1), 2**40])
def test_a_sliding_window_beyond_every_row_hides_nothing(window):
    """Models whose layers differ pass the largest integer to those that see everything."""
    q, k, v = tokens(3, new=12)
    c = cache.append(empty(sinks=4), 0, k, v, mask=jnp.arange(12) < jnp.array([[12], [2]]))
    given = (q, k, v, c, 0)
    near = attention.decode_attention(q[:, 0], c, 0, sliding_window=5)[1]
    for attend in (lambda **rule: attention.decode_attention(q[:, 0], c, 0, **rule)[:2],
                   lambda **rule: attention.prefill_attention(*given, **rule)[:2]):  # fmt: skip
        got, want = attend(sliding_window=window), attend()
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])
    assert np.abs(near[0] - attention.decode_attention(q[:, 0], c, 0)[1][0]).max() > 1e-3


def test_crop_takes_one_number_or_one_a_row():
    with pytest.raises(ValueError, match=r"length must be one number or 2, one a row, got shape \[3\]"):
        cache.crop(empty(), jnp.array([1, 2, 3]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((2, 3, DIM))}, "multiple of kv_heads = 2, got 3"),
        ({"q": jnp.zeros((1, HEADS, DIM))}, r"q must have shape \[2, 'heads', 16\], got \[1, 4, 16\]"),
        ({"layer": 5}, "layer must be from -2 to 1, got 5"),
        ({"sliding_window": 0}, "sliding_window must be at least 1, got 0"),
        ({"soft_cap": 0.0}, "soft_cap must be positive, got 0.0"),
        ({"visible": jnp.ones((2, 3), bool)}, r"visible must have shape \[batch, capacity\] = \[2, 64\], got \[2, 3\]"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"q": jnp.zeros((2, HEADS, DIM)), "layer": 0, **change}
    with pytest.raises(ValueError, match=message):
        attention.decode_attention(arguments.pop("q"), empty(), arguments.pop("layer"), **arguments)
