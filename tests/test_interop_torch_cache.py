"""`CompressedCache` against a list of tokens, and its codes against those of JAX."""

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interop_oracle import Oracle, pair

torch = pytest.importorskip("torch", reason="needs the extra jaxquant[torch]")
transformers = pytest.importorskip("transformers", reason="needs the extra jaxquant[torch]")

from interop_storage import reachable  # noqa: E402

from jaxquant import quantizers  # noqa: E402
from jaxquant.interop import _torch_codes  # noqa: E402
from jaxquant.interop.torch import CompressedCache  # noqa: E402
from jaxquant.methods import turboquant  # noqa: E402

DIM, HEADS, BATCH, LAYERS = 16, 2, 2, 2
EPS = np.finfo(np.float32).eps


def config(**changes):
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": HEADS, "head_dim": DIM, "max_position_embeddings": 256}
    return transformers.MistralConfig(**{**sizes, **heads, "sliding_window": None, **changes})


def tokens(seed, count, *, batch=BATCH):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(batch, HEADS, count, DIM)).astype(np.float32) for _ in range(2)]


def assert_reads(found, expected):
    """Rounding alone: a decoded vector is a float32 sum of dim products, of float32 factors."""
    np.testing.assert_allclose(
        found.numpy(), expected, rtol=0, atol=8 * DIM * EPS * max(1, np.abs(expected).max(initial=0))
    )


SPECS = {
    "plain": {},
    "window": {"window": 5},
    "sinks and window": {"sinks": 3, "window": 4},
    "sliding": {"sliding": 5},
    "sliding, all": {"sliding": 6, "sinks": 2, "window": 3},
    "padded": {"sinks": 3, "padding": (4, 1)},
    "padded, all": {"sinks": 2, "window": 5, "padding": (0, 7)},
    "padded, sliding": {"sinks": 4, "window": 1, "sliding": 5, "padding": (3, 0)},
}

operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 9)),
        st.tuples(st.just("append"), st.just(1)),
        st.tuples(st.just("crop"), st.integers(0, 30)),
        st.tuples(st.just("keep"), st.integers(1, 30)),
        st.tuples(st.just("reorder"), st.lists(st.integers(0, 9), min_size=1, max_size=3)),
        st.tuples(st.just("select"), st.lists(st.booleans(), min_size=1, max_size=3)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("fork"), st.integers(0, 3)),
        st.tuples(st.just("reset"), st.none()),
    ),
    min_size=2,
    max_size=10,
)


@settings(max_examples=60, deadline=None)
@given(operations, st.sampled_from(sorted(SPECS)), st.booleans())
def test_any_sequence_of_operations(operations, name, record):
    spec = SPECS[name]
    kept = {part: spec.get(part, 0) for part in ("sinks", "window")}
    cache = CompressedCache(
        config(sliding_window=spec.get("sliding"), num_hidden_layers=1), *pair(), **kept, padding=spec.get("padding")
    )
    if record:
        cache.activate_past_recording()

    def fresh():
        padding = spec.get("padding", (0,) * BATCH)
        return [Oracle(q, sliding=spec.get("sliding"), padding=padding, **kept) for q in pair()]

    oracles, batch = fresh(), BATCH
    steps: list[tuple[str, Any]] = [("append", 3), *operations]
    for seed, (verb, argument) in enumerate(steps):
        length = oracles[0].length
        match verb:
            case "append":
                new = tokens(seed, argument, batch=batch)
                sizes = cache.get_mask_sizes(argument, 0)
                found = cache.update(*(torch.from_numpy(x) for x in new), 0)
                for x, expected in zip(found, zip(oracles, new, strict=True), strict=True):
                    expected = expected[0].append(expected[1], record=record)
                    assert_reads(x, expected)
                assert sizes == (found[0].shape[2], oracles[0].length - found[0].shape[2])
            case "crop" | "keep":
                end = max(0, length - argument) if verb == "crop" else min(argument, length)
                if oracles[0].can_crop(end):
                    cache.crop(-argument if verb == "crop" else argument)
                    for oracle in oracles:
                        oracle.crop(end)
                else:
                    with pytest.raises(RuntimeError, match="slid out of the window"):
                        cache.crop(end - length)
            case "reorder" | "select" | "repeat" if not cache.is_initialized:
                cache.reorder_cache(torch.arange(batch))  # nothing is held yet
            case "reorder" | "select" | "repeat":
                if verb == "reorder":
                    rows = [i % batch for i in argument]
                    cache.reorder_cache(torch.tensor(rows))
                elif verb == "select":
                    keep = [argument[i % len(argument)] for i in range(batch)]
                    keep[0] = True
                    rows = [i for i in range(batch) if keep[i]]
                    cache.batch_select_indices(torch.tensor(keep))
                else:
                    rows = [i for i in range(batch) for _ in range(argument)] if batch < 5 else list(range(batch))
                    cache.batch_repeat_interleave(len(rows) // batch)
                for oracle in oracles:
                    oracle.take(rows)
                batch = len(rows)
            case "fork":
                other = copy.deepcopy(cache)
                other.update(*(torch.from_numpy(x) for x in tokens(seed, argument, batch=batch)), 0)
            case "reset":
                cache.reset()
                oracles, batch = fresh(), BATCH
        assert cache.get_seq_length() == oracles[0].length
    # What is held is what the next token reads.
    new = tokens(99, 1, batch=batch)
    for x, oracle, added in zip(cache.update(*(torch.from_numpy(x) for x in new), 0), oracles, new, strict=True):
        assert_reads(x, oracle.append(added, record=record))
    assert cache.nbytes == reachable(cache)


def filled(name="sinks and window", count=12):
    spec = SPECS[name]
    cache = CompressedCache(config(), *pair(), **spec)
    oracles = [Oracle(q, padding=(0,) * BATCH, **spec) for q in pair()]
    new = tokens(0, count)
    found = cache.update(*(torch.from_numpy(x) for x in new), 1)
    return cache, found, [oracle.append(x) for oracle, x in zip(oracles, new, strict=True)], oracles


def test_the_oracle_tells_wrong_reads_apart():
    _, (keys, values), (k, _), _ = filled()
    assert_reads(keys, k)
    wrong = {
        "values": values,
        "other rows": keys.flip(0),
        "other heads": keys.flip(1),
        "other tokens": keys.roll(1, dims=2),
        "all exact": torch.from_numpy(tokens(0, 12)[0]),
    }
    for case in wrong.values():
        with pytest.raises(AssertionError):
            assert_reads(case, k)
    lost = Oracle(pair()[0], sinks=3, window=5, padding=(0,) * BATCH).append(tokens(0, 12)[0])
    with pytest.raises(AssertionError):
        assert_reads(keys, lost)


RULES = quantizers.ScaleRule.__args__


@pytest.mark.parametrize(
    ("dim", "bits", "rule"),
    [(20, bits, RULES[bits % 4]) for bits in range(1, 9)]
    + [(128, 4, rule) for rule in RULES]
    + [(128, 2, "unbiased"), (64, 3, "preserve"), (16, 8, "norm")],
)
def test_the_same_codes_as_jax(dim, bits, rule):
    """All but coordinates nearer to a threshold than rounding: at most one in ten thousand."""
    rng = np.random.default_rng(bits)
    x = rng.standard_normal((2, 2, 64, dim)).astype(np.float32) * np.logspace(-3, 3, 64, dtype=np.float32)[:, None]
    q = turboquant.mse(jax.random.key(1), dim=dim, bits=bits, scale=rule, fused=False)
    coder = _torch_codes.coder(q)
    expected = quantizers.quantize(q, jnp.asarray(x))
    codes, scales = coder.quantize(torch.from_numpy(x))
    assert np.mean(codes.numpy() != np.asarray(expected.codes)) <= 1e-4
    assert not np.array_equal(codes.numpy(), np.asarray(expected.codes)[::-1])
    ratio = scales.float().numpy() / np.asarray(expected.scales, np.float32)
    assert np.quantile(np.abs(ratio - 1), 0.99) <= 2**-10  # a unit in the last place of float16
    stored = tuple(torch.from_numpy(np.array(part)) for part in (expected.codes, expected.scales))
    restored = np.asarray(quantizers.dequantize(q, expected))
    bound = 8 * dim * EPS * np.abs(restored).max(axis=-1, keepdims=True)
    assert (np.abs(coder.dequantize(stored, torch.zeros(1)).numpy() - restored) <= bound).all()


@pytest.mark.parametrize("rotation", ["haar", "rotor", "identity"])
def test_other_rotations(rotation):
    q = turboquant.mse(jax.random.key(1), dim=24, bits=5, rotation=rotation, fused=False)
    x = np.random.default_rng(0).standard_normal((1, 1, 40, 24)).astype(np.float32)
    codes, _ = _torch_codes.coder(q).quantize(torch.from_numpy(x))
    assert np.mean(codes.numpy() != np.asarray(quantizers.quantize(q, jnp.asarray(x)).codes)) <= 1e-3


def test_numbers_that_are_none():
    x = np.zeros((1, 1, 5, DIM), np.float32)
    x[0, 0, 1, 3], x[0, 0, 2, 4], x[0, 0, 3] = np.nan, np.inf, 3e38
    for q in (*pair(), turboquant.mse(jax.random.key(0), dim=DIM, bits=3, scale_dtype="bfloat16", fused=False)):
        expected = quantizers.quantize(q, jnp.asarray(x))
        codes, scales = _torch_codes.coder(q).quantize(torch.from_numpy(x))
        np.testing.assert_array_equal(codes.numpy(), np.asarray(expected.codes))
        np.testing.assert_allclose(scales.float().numpy(), np.asarray(expected.scales.astype(jnp.float32)), rtol=2**-7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_memory_is_the_packed_bytes(dtype):
    cache = CompressedCache(config(), *pair(bits_k=4, bits_v=2))
    tables, keys, values = None, None, None
    for count in (7, 1, 1, 30):
        x = torch.randn(BATCH, HEADS, count, DIM, dtype=getattr(torch, dtype))
        for layer in range(LAYERS):
            keys, values = cache.update(x, -x, layer)
            assert keys.dtype == values.dtype == x.dtype
        tables = tables or cache.nbytes - LAYERS * BATCH * HEADS * 7 * (DIM * 4 // 8 + DIM * 2 // 8 + 4)
    assert cache.nbytes == reachable(cache) == tables + LAYERS * BATCH * HEADS * 39 * (DIM * 6 // 8 + 4)
    assert tables < 2 * (DIM * DIM * 4 + 200)
    del keys, values
    cache.crop(-37)
    assert cache.nbytes == reachable(cache) == tables + LAYERS * BATCH * HEADS * 2 * (DIM * 6 // 8 + 4)


def test_a_sliding_layer_forgets():
    cache = CompressedCache(config(sliding_window=8, num_hidden_layers=1), *pair())
    held = []
    for count, seen in ((40, 40), (1, 8), (3, 10)):  # each of the new tokens sees 7 before it, and itself
        x = torch.randn(1, HEADS, count, DIM)
        assert cache.get_mask_sizes(count, 0)[0] == seen
        assert [part.shape[2] for part in cache.update(x, x, 0)] == [seen, seen]
        held.append(cache.layers[0].nbytes)
    assert held == [HEADS * 7 * (DIM * 6 // 8 + 4)] * 3
    assert cache.is_sliding == [True]
    assert cache.layers[0].get_max_length() == 8


def test_exact_layers_and_a_quantizer_for_each():
    k, v = pair()
    cache = CompressedCache(config(num_hidden_layers=3), [k, k, v], [v, k, v], exact_layers=[-1])
    new = [torch.from_numpy(x) for x in tokens(0, 6)]
    assert all(torch.equal(x, y) for x, y in zip(cache.update(*new, 2), new, strict=True))
    for layer, own in enumerate([(k, v), (k, k)]):
        for x, added, q in zip(cache.update(*new, layer), new, own, strict=True):
            assert_reads(x, Oracle(q, padding=(0, 0)).append(added.numpy()))
    assert cache.nbytes == reachable(cache)
    same = CompressedCache(config(), quantizers.Exact(dim=DIM), quantizers.Exact(dim=DIM))
    assert torch.equal(same.update(*new, 0)[0], new[0].bfloat16().float())


def test_padding_from_an_attention_mask():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    given = CompressedCache(config(), *pair(), sinks=1, padding=mask)
    assert given.layers[0]._given_padding == [2, 0]
    new = [torch.from_numpy(x) for x in tokens(0, 4)]
    found = given.update(*(x.repeat_interleave(3, 0) for x in new), 0)  # as for three beams
    for x, added, q in zip(found, new, pair(), strict=True):
        expected = Oracle(q, sinks=1, padding=(2, 0)).append(added.numpy())
        assert_reads(x, expected.repeat(3, axis=0))
    for wrong in (torch.tensor([[1, 1, 0, 0]]), torch.tensor([[0, 1, 0, 1]]), [-1], []):
        with pytest.raises(ValueError, match="padding must be"):
            CompressedCache(config(), *pair(), padding=wrong)
    with pytest.raises(ValueError, match=r"padding has 2 rows, and the model's batch 3"):
        CompressedCache(config(), *pair(), padding=[1, 2]).update(*[torch.zeros(3, HEADS, 1, DIM)] * 2, 0)


def test_no_memory_of_the_model_is_kept_alive():
    cache = CompressedCache(config(num_hidden_layers=1), *pair(), sinks=2, window=3)
    projection = torch.randn(1, 50, HEADS * DIM * 3)
    k, v = (projection[..., : HEADS * DIM].unflatten(-1, (HEADS, DIM)).transpose(1, 2) for _ in range(2))
    cache.update(k, v, 0)
    assert cache.nbytes == reachable(cache) < projection.nbytes


def test_autocast_changes_no_code():
    x = torch.from_numpy(tokens(0, 30)[0])
    plain, cast = (_torch_codes.coder(pair()[0]) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        code = cast.quantize(x)
        read = cast.dequantize(code, x)
    assert all(torch.equal(a, b) for a, b in zip(code, plain.quantize(x), strict=True))
    assert torch.equal(read, plain.dequantize(code, x))


def test_long_rows_are_decoded_in_blocks(monkeypatch):
    x = torch.from_numpy(tokens(0, 37)[0])
    coder = _torch_codes.coder(pair()[0])
    code = coder.quantize(x)
    whole = coder.dequantize(code, x)
    monkeypatch.setattr(_torch_codes, "_BLOCK", BATCH * HEADS * DIM * 5)
    torch.testing.assert_close(coder.dequantize(code, x), whole, rtol=0, atol=1e-6)


def test_wrong_arguments():
    k, v = pair()
    with pytest.raises(ValueError, match="sinks must not be negative, got -1"):
        CompressedCache(config(), k, v, sinks=-1)
    with pytest.raises(ValueError, match="keys must hold one quantizer for each of 2 layers, got 1"):
        CompressedCache(config(), [k], v)
    with pytest.raises(ValueError, match=r"exact_layers must be from -2 to 1, got \[2\]"):
        CompressedCache(config(), k, v, exact_layers=[0, 2])
    with pytest.raises(TypeError, match="got Residual"):
        CompressedCache(config(), turboquant.prod(jax.random.key(0), dim=DIM, bits=4), v)
    x = torch.zeros(BATCH, HEADS, 3, DIM)
    with pytest.raises(ValueError, match="keys of the model have dim 8, and their quantizer 16"):
        CompressedCache(config(), k, v).update(x[..., :8], x, 0)
    cache = CompressedCache(config(), k, v)
    cache.update(x, x, 0)
    for bad in (x.half(), x[:1], x[:, :1], x[..., :8], x[0]):
        with pytest.raises(ValueError, match=r"value_states must be \[2, 2, new, 16\] in torch.float32 on cpu"):
            cache.update(x, bad, 0)
    assert cache.get_seq_length() == 3


def test_layers_that_cannot_be_compressed_are_named():
    indexed = getattr(transformers, "GlmMoeDsaConfig", None)
    if indexed is None or "indexed_attention" not in getattr(
        transformers.cache_utils, "DYNAMIC_LAYER_TYPE_MAPPING", {}
    ):
        pytest.skip("this transformers has no such layers")
    wanted = config()
    wanted.layer_types = ["full_attention", "indexed_attention"]
    with pytest.raises(NotImplementedError, match="layer 1 needs a DynamicIndexedLayer"):
        CompressedCache(wanted, *pair())
    CompressedCache(wanted, *pair(), exact_layers=[1])
