"""Prefill through a flash kernel against a dense oracle in float64, with JAX's own attention in the kernel's place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_attention
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax._src.cudnn import fused_attention_stablehlo

from jaxquant import _attention, attention, cache, quantizers
from jaxquant._kernels import flash
from jaxquant.methods import turboquant

DIM, KV_HEADS, CAPACITY = test_attention.DIM, test_attention.KV_HEADS, test_attention.CAPACITY
KEYS, VALUES = test_attention.pair()


@pytest.fixture
def small(monkeypatch):
    """Blocks that divide neither the past nor the cache, operands not rounded, and NaN where a query sees nothing."""
    monkeypatch.setattr(flash, "BLOCK", 12)
    monkeypatch.setattr(flash, "DTYPE", "float32")
    true = flash.kernel

    def undefined(q, k, v, *, causal, span, lengths):
        query, key = jnp.arange(q.shape[2])[:, None], jnp.arange(k.shape[2])
        seen = (key <= query) & (key > query - (span or 10**6)) if causal else jnp.ones((q.shape[2], k.shape[2]), bool)
        seen = jnp.broadcast_to(seen, (q.shape[0], *seen.shape))
        if lengths is not None:
            seen &= key < lengths[:, None, None]
        some = seen.any(axis=-1)[:, None]
        out, lse = true(q, k, v, causal=causal, span=span, lengths=lengths)
        return jnp.where(some[..., None], out, jnp.nan), jnp.where(some, lse, jnp.nan)

    monkeypatch.setattr(flash, "kernel", undefined)


CASES = {
    **{name: test_attention.CASES[name] for name in ("plain", "sinks", "window", "both", "sliding")},
    "sliding after sinks": {"sinks": 3, "sliding_window": 7},
    "scale": {"scale": 0.7},
    "sliding beyond the cache": {"sliding_window": 10 * CAPACITY},
}
CUTS = (17, 23)  # the first chunk has no past


def run(case, chunk="codes", seed=0):
    held, rule = test_attention.split(case)
    c = test_attention.empty(**held)
    q, k, v = test_attention.tokens(seed)
    outs = []
    for start, stop in zip(np.cumsum((0, *CUTS))[:-1], np.cumsum(CUTS), strict=True):
        given = (x[:, start:stop] for x in (q, k, v))
        out, lse, c = attention.prefill_attention(*given, c, 1, chunk=chunk, implementation="flash", **rule)
        outs.append((out, lse))
    return (q, k, v), tuple(np.concatenate(part, axis=1) for part in zip(*outs, strict=True))


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_codes_equal_oracle(small, case):
    (q, k, v), (out, lse) = run(case)
    for row in range(2):
        expected = test_attention.oracle(q[row], k[row], v[row], keys=KEYS, values=VALUES, **case)
        test_attention.assert_same((out[row], lse[row]), expected)
        swapped = test_attention.oracle(q[row], v[row], k[row], keys=KEYS, values=VALUES, **case)
        with pytest.raises(AssertionError):
            test_attention.assert_same((out[row], lse[row]), swapped)


@pytest.mark.parametrize("name", ["plain", "both", "sliding", "sliding over window", "sliding by one"])
def test_exact_chunks_equal_oracle(small, name):
    case = {**test_attention.CASES, "sliding by one": {"window": 4, "sliding_window": 1}}[name]
    (q, k, v), (out, lse) = run(case, chunk="exact")
    for row in range(2):
        given = {"keys": KEYS, "values": VALUES, **case}
        expected = test_attention.oracle(q[row], k[row], v[row], cuts=CUTS, **given)
        test_attention.assert_same((out[row], lse[row]), expected)


@pytest.mark.parametrize(
    ("held", "chunk"),
    [({}, "codes"), ({"sinks": 3}, "exact"), ({"sinks": 3, "window": 6}, "codes"), ({"window": 6}, "exact")],
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.integers(0, 30), min_size=2, max_size=2),
    dropped=st.integers(0, 4),
    real=st.lists(st.booleans(), min_size=20, max_size=20),
)
def test_ragged_padded_cropped_rows_equal_the_reference(small, held, chunk, counts, dropped, real):
    """Any lengths, padding and crop: a past may be empty, and a row may have no token at all."""
    q, k, v = test_attention.tokens(5)
    c = cache.append(
        test_attention.empty(**held), 0, k[:, :30], v[:, :30], mask=jnp.arange(30) < jnp.array(counts)[:, None]
    )
    c = cache.crop(c, jnp.maximum(c.length[0] - dropped, 0))
    mask = jnp.array(real).reshape(2, 10)
    chunks = (q[:, 30:], jnp.where(mask[..., None, None], k[:, 30:], jnp.nan), v[:, 30:], c, 0)
    got, want = (
        attention.prefill_attention(*chunks, mask=mask, chunk=chunk, implementation=name) for name in ("flash", "xla")
    )
    test_attention.assert_same(got[:2], [np.asarray(x, np.float64) for x in want[:2]])


@pytest.mark.parametrize("heads", [2, 6, 32])
def test_heads_that_share_a_kv_head(small, heads):
    _, k, v = test_attention.tokens(1)
    q = jax.random.normal(jax.random.key(0), (2, 13, heads, DIM))
    c = cache.append(test_attention.empty(), 0, k[:, :27], v[:, :27])
    given = (q, k[:, 27:], v[:, 27:], c, 0)
    got, want = (attention.prefill_attention(*given, implementation=name)[:2] for name in ("flash", "xla"))
    test_attention.assert_same(got, [np.asarray(x, np.float64) for x in want])
    with pytest.raises(AssertionError):
        test_attention.assert_same([got[0][:, :, ::-1]], [np.asarray(want[0], np.float64)])


def test_tokens_that_the_last_blocks_share_count_once(small):
    """A full cache of 64 tokens in blocks of 12: the sixth block begins where the fifth must end."""
    q, k, v = test_attention.tokens(9, new=CAPACITY)
    c = cache.append(test_attention.empty(), 0, k[:, :-4], v[:, :-4], mask=jnp.arange(60) < jnp.array([[60], [57]]))
    chunks = (q[:, -4:], k[:, -4:], v[:, -4:], c, 0)
    got, want = (attention.prefill_attention(*chunks, implementation=name)[:2] for name in ("flash", "xla"))
    test_attention.assert_same(got, [np.asarray(x, np.float64) for x in want])


def lonely(size_q=1.0, size_v=1.0, seed=2):
    """Prefill after a past by both, with queries and values of some size: relative difference, lse difference."""
    keys, values = turboquant.kv(jax.random.key(7), dim=64, bits_k=4, bits_v=4)
    c = cache.init(keys, values, layers=1, batch=1, kv_heads=2, capacity=400, dtype="float32")
    k, v = jax.random.normal(jax.random.key(seed), (2, 1, 400, 2, 64))
    v = v * size_v
    q = jax.random.normal(jax.random.key(seed + 1), (1, 40, 8, 64)) * size_q
    c = cache.append(c, 0, k[:, :360], v[:, :360])
    given = (q, k[:, 360:], v[:, 360:], c, 0)
    got, want = (attention.prefill_attention(*given, implementation=name)[:2] for name in ("flash", "xla"))
    return np.linalg.norm(got[0] - want[0]) / np.linalg.norm(want[0]), np.abs(got[1] - want[1]).max()


@pytest.mark.parametrize(("size_q", "size_v"), [(1.0, 1.0), (1e-3, 300.0), (8.0, 0.1)])
def test_rounding_is_that_of_eleven_bits(size_q, size_v):
    """Each operand is rounded by at most 2**-11 of itself, queries and keys in scores of up to `size_q` * 6."""
    error, lse = lonely(size_q, size_v)
    assert 1e-5 < error < 2**-11 * (2 + 2 * max(size_q, 1.0))
    assert lse < 2**-10 * 6 * size_q


def test_size_of_values_and_queries_costs_no_precision():
    """Without the powers of two these values would be subnormal, and queries overflow, in float16."""
    assert lonely(1.0, 1e-3)[0] < 2**-9
    assert flash._narrow(jnp.array([1e6, -1e6, 1e-9])).tolist() == [65504.0, -65504.0, 0.0]
    x = jnp.array([[[[3e-7, 0.0], [5e-7, 1e-8], [0.0, 0.0], [jnp.nan, 1.0], [1e30, 0.0]]]])
    real = jnp.array([[[True, True, True, True, False]]])
    assert float(flash._typical(x, real)[0, 0, 0, 0]) == 2.0**-21


def test_one_bad_vector_reaches_nobody_else(small):
    q, k, v = test_attention.tokens(13, new=12)
    for poison in (np.nan, np.inf, 1e30):
        bad = (q.at[:, 11].set(poison), k.at[:, 11].set(poison), v.at[:, 11].set(poison))
        for held in ({}, {"sinks": 2, "window": 4}):
            clean = attention.prefill_attention(q, k, v, test_attention.empty(**held), 0, implementation="flash")
            late = attention.prefill_attention(*bad, test_attention.empty(**held), 0, implementation="flash")
            np.testing.assert_allclose(late[0][:, :11], clean[0][:, :11], atol=2e-5)


def test_choice(monkeypatch):
    q, k, v = test_attention.tokens(0, new=4)
    seen = []
    true = flash.attend
    monkeypatch.setattr(flash, "attend", lambda *args, **kwargs: seen.append(1) or true(*args, **kwargs))

    def chosen(dtype, **how):
        jax.clear_caches()
        seen.clear()
        jax.eval_shape(
            lambda q, c: attention.prefill_attention(q, k, v, c, 0, **how), q.astype(dtype), test_attention.empty()
        )
        return bool(seen)

    assert chosen("float32", implementation="flash")
    assert chosen("bfloat16", implementation="flash")
    assert not chosen("bfloat16", implementation="xla")
    monkeypatch.setattr(attention.flash, "missing", lambda: None)
    assert not chosen("bfloat16"), "only where it is asked for"
    jax.clear_caches()


@pytest.mark.parametrize(
    ("held", "how", "message"),
    [
        ({}, {"soft_cap": 2.0}, "`soft_cap` is given"),
        ({}, {"visible": jnp.ones((2, CAPACITY), bool)}, "`visible` is given"),
        ({}, {"sliding_window": jnp.int32(3)}, "`sliding_window` is not known before tracing"),
        ({"window": 4}, {"sliding_window": 3}, "`sliding_window` is given and the cache has an exact window"),
        ({}, {"sliding_window": 33}, "33, more than 8 times the chunk's 4 tokens"),
        ({"quantizers_": (turboquant.prod(jax.random.key(0), dim=DIM, bits=3), VALUES)}, {}, "of 16 and of 32 numbers"),
    ],
)
def test_what_it_cannot_read_has_a_reason(held, how, message):
    q, k, v = test_attention.tokens(0, new=4)
    with pytest.raises(ValueError, match=message):
        attention.prefill_attention(q, k, v, test_attention.empty(**held), 0, implementation="flash", **how)


def test_dims_that_the_kernel_has(monkeypatch):
    exact = quantizers.Exact(dim=256)
    c = cache.init(exact, exact, layers=1, batch=1, kv_heads=1, capacity=8)
    rule = _attention.rule_of(256, None, None, None)
    assert flash.unsupported(c.stacks[0], 4, rule, None, exact=False) is None
    monkeypatch.setattr(flash.nvrtc, "capability", lambda: (8, 0))
    assert "256 numbers are read, not a multiple of 8 up to 128" in str(
        flash.unsupported(c.stacks[0], 4, rule, None, exact=False)
    )


def test_calls_of_cudnn(monkeypatch):
    """Lowered for CUDA: one call over the past, with lengths, and causal ones over the chunk; nothing else attends."""
    monkeypatch.setattr(flash, "missing", lambda: None)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91300)
    jax.clear_caches()
    keys, values = turboquant.kv(jax.random.key(0), dim=64, bits_k=4, bits_v=2)

    def calls(window=0, **how):
        c = cache.init(keys, values, layers=2, batch=2, kv_heads=2, capacity=300, window=window)
        q, k = (jnp.zeros((2, 96, heads, 64), jnp.bfloat16) for heads in (8, 2))

        def prefill(c, q, k):
            return attention.prefill_attention(q, k, k, c, 0, implementation="flash", **how)

        text = jax.jit(prefill).trace(c, q, k).lower(lowering_platforms=("cuda",)).as_text()
        lines = [line for line in text.splitlines() if "@__cudnn$fmhaSoftmax" in line]
        kinds = (line.partition("mask_type")[2].split("22")[2].rstrip("\\") for line in lines)
        spans = (int(line.partition("sliding_window_length")[2].split(":")[1].split(",")[0]) for line in lines)
        assert all("f16" in line and "bf16" not in line for line in lines)
        return sorted(zip(kinds, spans, strict=True))

    assert calls() == [("CAUSAL", 0), ("PADDING", 0)]
    assert calls(window=16) == [("CAUSAL", 0), ("CAUSAL", 16), ("PADDING", 0)]
    assert calls(window=16, chunk="exact") == [("CAUSAL", 0), ("PADDING", 0)]
    assert calls(sliding_window=64) == [("CAUSAL", 64)]
    assert calls(sliding_window=64, chunk="exact") == [("CAUSAL", 64), ("PADDING_CAUSAL", 64)]
    jax.clear_caches()


def test_decoded_tokens_are_bounded():
    """A longer past costs no more temporary memory than its part of the softmax's bookkeeping."""
    keys, values = turboquant.kv(jax.random.key(0), dim=64, bits_k=4, bits_v=4)

    def temporary(capacity):
        c = cache.init(keys, values, layers=1, batch=1, kv_heads=2, capacity=capacity)
        x = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
        run = jax.jit(lambda c, x: attention.prefill_attention(x, x, x, c, 0, implementation="flash"), donate_argnums=0)
        return run.lower(c, x).compile().memory_analysis().temp_size_in_bytes

    once = temporary(flash.BLOCK)
    whole = 2 * 2 * 64 * 2 * flash.BLOCK  # bytes of keys and values in float16
    assert temporary(4 * flash.BLOCK) < once + whole / 8
