"""The mlx-lm cache against a list of tokens, its codes against those of JAX, and whole models."""

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interop_oracle import Oracle, pair

mx = pytest.importorskip("mlx.core", reason="needs the extra jaxquant[mlx]")
pytest.importorskip("mlx_lm", reason="needs the extra jaxquant[mlx]")

from mlx_lm.generate import generate_step, speculative_generate_step  # noqa: E402
from mlx_lm.models import cache as mlx_caches  # noqa: E402
from mlx_lm.models import gemma3_text, llama  # noqa: E402

from jaxquant import quantizers  # noqa: E402
from jaxquant.interop import _mlx_codes  # noqa: E402
from jaxquant.interop.mlx import CompressedKVCache, make_prompt_cache  # noqa: E402
from jaxquant.methods import turboquant  # noqa: E402

DIM, HEADS, BATCH, SLIDING = 16, 2, 2, 6
EPS = np.finfo(np.float32).eps


def tokens(seed, count, *, batch=BATCH):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(batch, HEADS, count, DIM)).astype(np.float32) for _ in range(2)]


def assert_reads(found, expected):
    """Rounding alone: a decoded vector is a float32 sum of dim products, of float32 factors."""
    bound = 8 * DIM * EPS * max(1, np.abs(expected).max(initial=0))
    np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=bound)


SPECS = {
    "plain": {},
    "sinks and window": {"sinks": 3, "window": 4},
    "sliding": {"sliding_window": 5},
    "sliding, all": {"sliding_window": 6, "sinks": 2, "window": 3},
    "padded": {"sinks": 3, "padding": (4, 1)},
    "padded, sliding": {"sinks": 4, "window": 1, "sliding_window": 5, "padding": (3, 0)},
}

operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 9)),
        st.tuples(st.just("append"), st.just(1)),
        st.tuples(st.just("trim"), st.integers(0, 30)),
        st.tuples(st.just("filter"), st.lists(st.integers(0, 9), min_size=1, max_size=3)),
        st.tuples(st.just("fork"), st.integers(0, 3)),
        st.tuples(st.just("save"), st.none()),
    ),
    min_size=2,
    max_size=9,
)


@settings(max_examples=60, deadline=None)
@given(operations, st.sampled_from(sorted(SPECS)))
def test_any_sequence_of_operations(operations, name):
    spec = SPECS[name]
    cache = CompressedKVCache(*pair(), **spec)
    kept = {part: spec.get(part, 0) for part in ("sinks", "window")}
    padding = spec.get("padding", (0,) * BATCH)
    oracles = [Oracle(q, sliding=spec.get("sliding_window"), padding=padding, **kept) for q in pair()]
    batch = BATCH
    steps: list[tuple[str, Any]] = [("append", 3), *operations, ("append", 1)]
    for seed, (verb, argument) in enumerate(steps):
        length = oracles[0].length
        match verb:
            case "append":
                new = tokens(seed, argument, batch=batch)
                found = cache.update_and_fetch(*map(mx.array, new))
                for x, oracle, added in zip(found, oracles, new, strict=True):
                    assert_reads(x, oracle.append(added))
            case "trim":
                end = max(0, length - argument)
                if end in (0, length) or oracles[0].oldest <= 0:
                    assert cache.trim(argument) == length - end
                    for oracle in oracles:
                        oracle.crop(end)
                else:
                    assert not cache.is_trimmable()
                    with pytest.raises(ValueError, match="slid out of the window"):
                        cache.trim(argument)
            case "filter":
                rows = [i % batch for i in argument]
                cache.filter(mx.array(rows) if argument[0] % 2 else rows)
                batch = len(rows)
                for oracle in oracles:
                    oracle.take(rows)
            case "fork":
                other = copy.deepcopy(cache)
                other.update_and_fetch(*map(mx.array, tokens(seed, argument, batch=batch)))
            case "save":
                other = CompressedKVCache(*pair(), **{**spec, "padding": cache.padding})
                other.state = copy.deepcopy(cache.state)
                cache = other
        assert cache.size() == oracles[0].length
        offsets = np.broadcast_to(np.array(cache.offset), (batch,))
        assert (offsets == oracles[0].length - np.asarray(oracles[0].padding)).all()


@pytest.mark.parametrize(
    ("dim", "bits", "rule"),
    [(20, bits, quantizers.ScaleRule.__args__[bits % 4]) for bits in range(1, 9)]
    + [(128, 4, "preserve"), (128, 2, "unbiased")],
)
def test_the_same_codes_as_jax(dim, bits, rule):
    """All but coordinates nearer to a threshold than rounding: at most one in ten thousand."""
    rng = np.random.default_rng(bits)
    x = rng.standard_normal((2, 2, 64, dim)).astype(np.float32) * np.logspace(-3, 3, 64, dtype=np.float32)[:, None]
    q = turboquant.mse(jax.random.key(1), dim=dim, bits=bits, scale=rule, fused=False)
    coder = _mlx_codes.coder(q)
    expected = quantizers.quantize(q, jnp.asarray(x))
    codes, scales = coder.quantize(mx.array(x))
    assert np.mean(np.array(codes) != np.asarray(expected.codes)) <= 1e-4
    ratio = np.array(scales.astype(mx.float32)) / np.asarray(expected.scales, np.float32)
    assert np.quantile(np.abs(ratio - 1), 0.99) <= 2**-10
    read = coder.dequantize((mx.array(np.asarray(expected.codes)), mx.array(np.asarray(expected.scales))), mx.array(x))
    restored = np.asarray(quantizers.dequantize(q, expected))
    assert (np.abs(np.array(read) - restored) <= 8 * dim * EPS * np.abs(restored).max(axis=-1, keepdims=True)).all()


def test_numbers_that_are_none():
    x = np.zeros((1, 1, 5, DIM), np.float32)
    x[0, 0, 1, 3], x[0, 0, 2, 4], x[0, 0, 3] = np.nan, np.inf, 3e38
    for q in (*pair(), turboquant.mse(jax.random.key(0), dim=DIM, bits=3, scale_dtype="bfloat16", fused=False)):
        expected = quantizers.quantize(q, jnp.asarray(x))
        codes, scales = _mlx_codes.coder(q).quantize(mx.array(x))
        np.testing.assert_array_equal(np.array(codes), np.asarray(expected.codes))
        found = np.array(scales.astype(mx.float32))
        np.testing.assert_allclose(found, np.asarray(expected.scales.astype(jnp.float32)), rtol=2**-7)


def test_memory_is_the_packed_bytes():
    """By MLX's own count of its memory, beside what mlx-lm's cache takes for the same tokens."""
    k, v = turboquant.kv(jax.random.key(0), dim=128, bits_k=4, bits_v=2, fused=False)

    def grown(cache):
        mx.eval(mx.zeros(1))
        before = mx.get_active_memory()
        for seed in range(8):
            x = mx.random.normal((2, 4, 256, 128), key=mx.random.key(seed)).astype(mx.bfloat16)
            cache.update_and_fetch(x, x)
            mx.eval(cache.state)
            del x
        mx.synchronize()
        return mx.get_active_memory() - before

    ours, theirs = CompressedKVCache(k, v), mlx_caches.KVCache()
    codes = 2 * 4 * 2048 * (64 + 32 + 4)
    assert ours.nbytes == 0
    held = grown(ours)
    assert ours.nbytes == codes
    assert codes <= held <= codes + 4096 * 4
    assert grown(theirs) >= 2 * 4 * 2048 * 512
    assert ours.trim(2000) == 2000
    assert ours.nbytes == 2 * 4 * 48 * 100


def build(name, seed=0):
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4,
        "num_key_value_heads": HEADS, "head_dim": DIM, "vocab_size": 64,
    }  # fmt: skip
    if name == "llama":
        model = llama.Model(llama.ModelArgs(model_type="llama", rms_norm_eps=1e-5, **sizes))
    else:
        model = gemma3_text.Model(
            gemma3_text.ModelArgs(
                model_type="gemma3_text", sliding_window=SLIDING, sliding_window_pattern=2, query_pre_attn_scalar=DIM,
                **sizes,
            )
        )  # fmt: skip
    mx.random.seed(seed)
    weights = [(path, 0.25 * mx.random.normal(x.shape)) for path, x in mx_leaves(model)]
    model.load_weights(weights, strict=False)
    return model


def mx_leaves(model):
    from mlx.utils import tree_flatten

    return tree_flatten(model.parameters())


class Reference(CompressedKVCache):
    """The masks of the cache under test over what `Oracle` reads."""

    def update_and_fetch(self, keys, values):
        if not hasattr(self, "oracles"):
            kept = {"sinks": self.sinks, "window": self.window, "sliding": self.sliding_window}
            padding = self.padding or [0] * keys.shape[0]
            self.oracles = [Oracle(q, padding=padding, **kept) for q in pair()]
        return tuple(
            mx.array(oracle.append(np.array(x.astype(mx.float32))).astype(np.float32)).astype(x.dtype)
            for oracle, x in zip(self.oracles, (keys, values), strict=True)
        )

    def size(self):
        return self.oracles[0].length if hasattr(self, "oracles") else 0

    state = property(lambda self: [], lambda self, held: None)  # pyright: ignore


def reference(model, **kept):
    ours = make_prompt_cache(model, *pair(), **kept)
    return [Reference(*pair(), **kept, sliding_window=layer.sliding_window) for layer in ours]


def logits(model, ids, held, cuts=()):
    parts = [
        model(ids[:, first:last], cache=held) for first, last in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True)
    ]
    return np.array(mx.concatenate(parts, axis=1))


def prompt(length=17, rows=1, seed=0):
    return mx.array(np.random.default_rng(seed).integers(1, 64, (rows, length)))


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("cuts", [(), (9,), (4, 5, 6, 7, 16)])
@pytest.mark.parametrize("kept", [{}, {"sinks": 2, "window": 5}], ids=["codes alone", "sinks and window"])
def test_chunks(name, cuts, kept):
    model, ids = build(name), prompt()
    found = logits(model, ids, make_prompt_cache(model, *pair(), **kept), cuts)
    assert_close(found, logits(model, ids, reference(model, **kept), cuts))
    exact = logits(model, ids, mlx_caches.make_prompt_cache(model), cuts)
    assert np.abs(found - exact).max() > 0.02 * np.abs(exact).max(), "nothing was compressed"
    same = quantizers.Exact(dim=DIM, dtype="float32")
    assert_close(logits(model, ids, make_prompt_cache(model, same, same), cuts), exact)  # the masks are mlx-lm's


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_left_padding(name):
    """Ragged rows, in chunks: every row as if it were the only one."""
    model, lengths, width = build(name), (17, 3, 9), 17
    rows = [prompt(length, seed=length) for length in lengths]
    ids = mx.concatenate([mx.pad(own, [(0, 0), (width - own.shape[1], 0)]) for own in rows])
    kept, cuts = {"sinks": 2, "window": 4}, (6, 12)
    padding = [width - length for length in lengths]
    found = logits(model, ids, make_prompt_cache(model, *pair(), **kept, padding=padding), cuts)
    for row, gap in enumerate(padding):
        own_cuts = tuple(cut - gap for cut in cuts if cut > gap)
        assert_close(found[row, gap:], logits(model, rows[row], reference(model, **kept), own_cuts)[0])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_generation(name):
    """mlx-lm's own loop, over chunks of 4 prompt tokens."""
    model, ids = build(name), prompt()[0]

    def generated(held):
        steps = generate_step(ids, model, max_tokens=12, prompt_cache=held, prefill_step_size=4)
        return [int(token) for token, _ in steps]

    ours = make_prompt_cache(model, *pair(), sinks=1, window=3)
    assert generated(ours) == generated(reference(model, sinks=1, window=3))
    assert ours[-1].size() >= 17 + 11
    plain = mlx_caches.make_prompt_cache(model)
    assert len(generated(plain)) == 12


def test_speculative_generation():
    """A draft that is often wrong: rejected tokens are trimmed, and the rest is what generation without it gives."""
    model, draft = build("llama"), build("llama", seed=1)
    ids = prompt()[0]
    held = [*make_prompt_cache(model, *pair()), *make_prompt_cache(draft, *pair())]
    steps = speculative_generate_step(ids, model, draft, num_draft_tokens=3, max_tokens=12, prompt_cache=held)
    drafted = [(int(token), bool(taken)) for token, _, taken in steps]
    plain = generate_step(ids, model, max_tokens=12, prompt_cache=make_prompt_cache(model, *pair()))
    assert [token for token, _ in drafted] == [int(token) for token, _ in plain]
    assert not all(taken for _, taken in drafted)


def test_exact_layers_and_a_quantizer_for_each():
    model = build("llama")
    k, v = pair()
    held = make_prompt_cache(model, [k, v], [v, k], exact_layers=[-1])
    assert type(held[1]) is mlx_caches.KVCache
    new = tokens(0, 5)
    for x, added, q in zip(held[0].update_and_fetch(*map(mx.array, new)), new, (k, v), strict=True):
        assert_reads(x, Oracle(q, padding=(0, 0)).append(added))


def test_wrong_arguments():
    k, v = pair()
    model = build("llama")
    with pytest.raises(ValueError, match="sinks must be at least 0, got -1"):
        CompressedKVCache(k, v, sinks=-1)
    with pytest.raises(ValueError, match="sliding_window must be at least 1, got 0"):
        CompressedKVCache(k, v, sliding_window=0)
    with pytest.raises(ValueError, match="padding must be"):
        CompressedKVCache(k, v, padding=[-1])
    with pytest.raises(TypeError, match="got Residual"):
        CompressedKVCache(turboquant.prod(jax.random.key(0), dim=DIM, bits=4), v)
    with pytest.raises(ValueError, match="values must hold one quantizer for each of 2 layers, got 3"):
        make_prompt_cache(model, k, [v] * 3)
    with pytest.raises(ValueError, match=r"exact_layers must be from -2 to 1, got \[5\]"):
        make_prompt_cache(model, k, v, exact_layers=[5])
    x = mx.zeros((BATCH, HEADS, 3, DIM))
    with pytest.raises(ValueError, match="values of the model have dim 8, and their quantizer 16"):
        CompressedKVCache(k, v).update_and_fetch(x, x[..., :8])
    with pytest.raises(ValueError, match="padding has 1 rows, and the model's batch 2"):
        CompressedKVCache(k, v, padding=[1]).update_and_fetch(x, x)
    cache = CompressedKVCache(k, v)
    cache.update_and_fetch(x, x)
    for bad in (x.astype(mx.float16), x[:1], x[:, :1], x[0]):
        with pytest.raises(ValueError, match=r"values must be \[2, 2, new, 16\]"):
            cache.update_and_fetch(x, bad)
    with pytest.raises(ValueError, match="n must not be negative"):
        cache.trim(-1)
    assert cache.size() == 3
