"""Chunks of a KV cache as bytes: the same bits, any tokens, any method, and bytes that lie."""

import functools
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant import methods, quantizers
from jaxquant.codecs import v3
from jaxquant.codecs.errors import CodecError, CorruptError, LimitError, UnsupportedError
from jaxquant.codecs.limits import Limits
from jaxquant.interop import lmcache
from jaxquant.methods import turboquant
from jaxquant.mixed import Mixed

DTYPES = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}
DIM, HEADS, LAYERS = 16, 2, 3


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(DTYPES[values.dtype.name])


def chunk(tokens=20, *, layers=LAYERS, dtype="float32", seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, layers, tokens, HEADS, DIM)).astype(lmcache._DTYPES[dtype])


@functools.cache
def pair(bits_k=4):
    return turboquant.kv(jax.random.key(bits_k), dim=DIM, bits_k=bits_k, bits_v=3)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_bit_comes_back(data):
    """Any bit pattern, NaN payloads too; no layer, no token, one of each, ragged sizes; any range of tokens."""
    name = data.draw(st.sampled_from(list(DTYPES)))
    shape = (2, *(data.draw(st.integers(low, high)) for low, high in ((0, 3), (0, 37), (1, 3), (1, 17))))
    words = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 1 << 32, shape, np.uint32)
    x = words.astype(DTYPES[name]).view(lmcache._DTYPES[name])
    stored = lmcache.serialize(x, chunk_bytes=data.draw(st.sampled_from([64, 1 << 20])))
    start, stop = sorted(data.draw(st.integers(0, shape[2])) for _ in range(2))
    back = lmcache.deserialize(stored, start=start, stop=stop)
    assert back.dtype == x.dtype
    np.testing.assert_array_equal(bits(back), bits(x[:, :, start:stop]))


def test_nan_payloads_and_signed_zeros_are_bits_like_others():
    words = np.array([0x7FC0, 0x7FA5, 0xFFFF, 0x8000, 0x0001, 0x7F80], np.uint16)
    x = np.tile(words, 2 * 4).reshape(2, 1, 4, 1, 6).view(ml_dtypes.bfloat16)
    assert bits(lmcache.deserialize(lmcache.serialize(jnp.asarray(x)))).tolist() == bits(x).tolist()


def decoded(x, two):
    """Quantize and dequantize each layer and half alone."""
    out = np.empty(x.shape, np.float32)
    for half, quantizer in enumerate(two):
        for layer in range(x.shape[1]):
            one = quantizer[layer] if isinstance(quantizer, list) else quantizer
            vectors = jnp.asarray(np.swapaxes(x[half, layer], 0, 1))
            out[half, layer] = np.swapaxes(quantizers.dequantize(one, quantizers.quantize(one, vectors)), 0, 1)
    return out.astype(x.dtype)


def mixed(seed: int) -> Mixed:
    """A calibrated quantizer, with numbers of its own for every head."""
    rng = np.random.default_rng(seed)
    basis = np.stack([np.linalg.qr(rng.normal(size=(DIM, DIM)))[0] for _ in range(HEADS)])
    levels = [np.sort(rng.normal(size=(HEADS, 8, 2**width)), axis=-1) for width in (4, 2)]
    return Mixed(
        mean=jnp.asarray(rng.normal(size=(HEADS, DIM)), jnp.float32),
        analysis=jnp.asarray(basis, jnp.float32),
        synthesis=jnp.asarray(basis, jnp.float32),
        weights=jnp.full((HEADS, DIM), 1 / DIM),
        levels=tuple(jnp.asarray(table, jnp.float32) for table in levels),
        widths=((4, 8), (2, 8)),
        dim=DIM,
    )


CASES: dict[str, Callable[[], tuple]] = {
    "turboquant": pair,
    "sketched": lambda: (turboquant.prod(jax.random.key(1), dim=DIM, bits=3),) * 2,
    "exact": lambda: (quantizers.Exact(dim=DIM),) * 2,
    "calibrated": lambda: ([mixed(i) for i in range(LAYERS)], mixed(7)),
    "layers of their own": lambda: (
        [pair(4)[0], pair(2)[0], pair(4)[0]],
        [turboquant.mse(jax.random.key(i), dim=DIM, bits=4) for i in range(LAYERS)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_any_method(case):
    two, x = CASES[case](), chunk()
    data = lmcache.serialize(x, keys=two[0], values=two[1])
    back, want = lmcache.deserialize(data), decoded(x, two)
    # Rounding alone, and a product in another order may decide a near tie differently: in one vector of a hundred.
    close = np.isclose(back, want, rtol=0, atol=1e-4).all(-1)
    assert close.mean() > 0.99
    wrong = [back[::-1], back[:, ::-1], np.roll(back, 1, axis=2), back[:, :, :, ::-1]]
    assert all(np.isclose(bad, want, rtol=0, atol=1e-4).all(-1).mean() < 0.6 for bad in wrong)
    if case != "exact":
        assert not np.isclose(back, x, rtol=0, atol=1e-3).all(-1).any(), "the method must be active"
    part = lmcache.deserialize(data, start=7, stop=8)
    np.testing.assert_allclose(part, back[:, :, 7:8], rtol=0, atol=1e-5)


def test_every_method_in_the_package():
    for make in turboquant.EXAMPLES:
        example = make()
        x = np.random.default_rng(1).normal(size=(2, 1, 3, 1, example.dim)).astype(np.float16)
        assert lmcache.deserialize(lmcache.serialize(x, keys=example, values=example)).dtype == np.float16
    assert methods.__path__


@pytest.mark.parametrize("case", ["turboquant", "calibrated"])
def test_quantizers_that_stay_at_home(case):
    (keys, values), x = CASES[case](), chunk(dtype="float16")
    whole = lmcache.serialize(x, keys=keys, values=values)
    data = lmcache.serialize(x, keys=keys, values=values, embed=False)
    assert len(data) < min(len(whole), x.nbytes)
    with v3.open(data) as reader:
        assert not any("quantizer" in name for name in reader.names)
    np.testing.assert_array_equal(
        lmcache.deserialize(data, keys=keys, values=values), lmcache.deserialize(whole), strict=True
    )
    for known in ({}, {"keys": keys}, {"keys": values, "values": keys}, {"keys": keys, "values": pair(2)[0]}):
        with pytest.raises(UnsupportedError, match=r"not in the file: pass (keys|values)="):
            lmcache.deserialize(data, **known)
    others = [pair(4)[0] if case == "calibrated" else mixed(i) for i in range(LAYERS)]
    drawn = turboquant.mse(jax.random.key(99), dim=DIM, bits=4, scale="preserve")  # other signs, in the same form
    alike = [mixed(50 + i) for i in range(LAYERS)] if case == "calibrated" else drawn
    assert jax.tree.structure(alike) == jax.tree.structure(keys)
    for wrong in (others, alike):
        with pytest.raises(UnsupportedError, match="not in the file: pass keys="):
            lmcache.deserialize(data, keys=wrong, values=values)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens_in_codes(tokens):
    keys, values = pair()
    back = lmcache.deserialize(lmcache.serialize(chunk(tokens, dtype="bfloat16"), keys=keys, values=values))
    assert back.shape == (2, LAYERS, tokens, HEADS, DIM)
    assert back.dtype == ml_dtypes.bfloat16


def test_a_token_fetches_little():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 8, 1024, 4, 64)).astype(np.float16)
    keys, values = turboquant.kv(jax.random.key(0), dim=64, bits_k=4, bits_v=2)
    for data in (
        lmcache.serialize(x, chunk_bytes=1 << 16),
        lmcache.serialize(x, keys=keys, values=values, chunk_bytes=1 << 14),
    ):
        fetched = []

        def read(offset: int, length: int, data=data, fetched=fetched) -> bytes:
            fetched.append(length)
            return data[offset : offset + length]

        part = lmcache.deserialize(read, size=len(data), start=500, stop=501)
        np.testing.assert_array_equal(part, lmcache.deserialize(data)[:, :, 500:501])
        assert sum(fetched) < 0.06 * len(data)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: lmcache.serialize(np.zeros((2, 1, 3, 1, 4))), r"got float64\[2, 1, 3, 1, 4\]"),
        (lambda: lmcache.serialize(np.zeros((1, 1, 3, 1, 4), np.float32)), "chunk must be"),
        (lambda: lmcache.serialize(np.zeros((2, 1, 3, 4), np.float32)), "chunk must be"),
        (lambda: lmcache.serialize(np.zeros((2, 1, 3, 0, 4), np.float32)), "chunk must be"),
        (lambda: lmcache.serialize(chunk(), keys=pair()[0]), "both be quantizers"),
        (lambda: lmcache.serialize(chunk(), keys=pair()[0], values=[pair()[1]]), "one quantizer for each of 3 layers"),
        (
            lambda: lmcache.serialize(np.zeros((2, 1, 3, 1, 4), np.float32), keys=pair()[0], values=pair()[1]),
            "vectors of 16, and the chunk's have 4",
        ),
    ],
)
def test_what_is_no_chunk_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_tokens_outside_are_refused():
    data = lmcache.serialize(chunk())
    for start, stop in ((0, 21), (-1, 3), (5, 4)):
        with pytest.raises(IndexError, match="outside of 20"):
            lmcache.deserialize(data, start=start, stop=stop)


@functools.cache
def honest(coded: bool) -> bytes:
    keys, values = pair()
    return lmcache.serialize(chunk(), **({"keys": keys, "values": values} if coded else {}))


def forged(data: bytes, change: Callable[[dict], None], tensors: Callable[[dict], None] = lambda _: None) -> bytes:
    with v3.open(data) as reader:
        held = {name: reader.read(name) for name in reader.names}
        record = json.loads(reader.metadata[lmcache.KEY])
    change(record)
    tensors(held)
    return v3.encode(held, metadata={lmcache.KEY: json.dumps(record)})


LIES = {
    "another version": (lambda r: r.update(version=2), UnsupportedError, "version"),
    "a shape of another kind": (lambda r: r.update(shape="x"), CorruptError, "shape is not"),
    "a negative size": (lambda r: r["shape"].__setitem__(1, -1), CorruptError, "shape is not"),
    "a truth for a size": (lambda r: r["shape"].__setitem__(1, True), CorruptError, "shape is not"),
    "no heads": (lambda r: r["shape"].__setitem__(3, 0), CorruptError, "shape is not"),
    "three halves": (lambda r: r["shape"].__setitem__(0, 3), CorruptError, "shape is not"),
    "another dtype": (lambda r: r.update(dtype="object"), CorruptError, "dtype is not"),
    "huge": (lambda r: r.update(shape=[2, 1 << 20, 1 << 20, 2, 16]), LimitError, "decoded bytes"),
    "huge without tokens": (lambda r: r.update(shape=[2, (1 << 31) - 1, 0, 2, 16]), CorruptError, "for each of"),
    "more tokens": (lambda r: r["shape"].__setitem__(2, 21), CorruptError, "must be"),
    "other heads": (lambda r: r["shape"].__setitem__(3, 1), CorruptError, "must be"),
    "another dim": (lambda r: r["shape"].__setitem__(4, 32), CorruptError, "vectors of 16, not of 32"),
    "a layer twice": (lambda r: r["keys"][0].update(layers=[0, 1, 1]), CorruptError, "for each of 3 layers"),
    "a layer outside": (lambda r: r["keys"][0].update(layers=[0, 1, 3]), CorruptError, "for each of 3 layers"),
    "a layer of another kind": (lambda r: r["keys"][0].update(layers=[0, 1, "2"]), CorruptError, "for each of"),
    "a missing layer": (lambda r: r["keys"][0].update(layers=[0, 1]), CorruptError, "for each of 3 layers"),
    "groups of another kind": (lambda r: r.update(keys=7), CorruptError, "for each of 3 layers"),
    "another class": (
        lambda r: r["keys"][0]["quantizer"].update({"class": "os:system"}),
        UnsupportedError,
        "only a caller can allow",
    ),
    "other bits": (lambda r: r["keys"][0]["quantizer"]["fields"].update(bits=5), CorruptError, "must be uint8"),
    "codes taken for numbers": (lambda r: r.pop("keys"), CorruptError, "'keys' must be float32"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused(lie):
    change, error, match = LIES[lie]
    with pytest.raises(error, match=match):
        lmcache.deserialize(forged(honest(True), change), limits=Limits(decoded_bytes=1 << 24))


def test_tensors_that_do_not_fit_are_refused():
    with pytest.raises(CorruptError, match="must be float32"):
        lmcache.deserialize(forged(honest(False), lambda _: None, lambda t: t.update(keys=t["keys"][:, :2])))
    with pytest.raises(CorruptError, match="must be uint8"):
        lmcache.deserialize(
            forged(honest(True), lambda _: None, lambda t: t.update({"keys/0/codes": t["keys/0/codes"][..., :7]}))
        )
    np.testing.assert_array_equal(lmcache.deserialize(forged(honest(False), lambda _: None)), chunk())


def test_damage_is_found():
    for data in (honest(True), honest(False)):
        for cut in range(0, len(data), len(data) // 40):
            with pytest.raises(CodecError):
                lmcache.deserialize(data[:cut])
        rng = np.random.default_rng(0)
        for place in rng.integers(0, len(data), 40):
            damaged = bytearray(data)
            damaged[place] ^= 1 << rng.integers(8)
            with pytest.raises(CodecError):
                lmcache.deserialize(bytes(damaged))
    with pytest.raises(UnsupportedError, match="no chunk of a KV cache"):
        lmcache.deserialize(v3.encode(np.zeros(3)))
    with pytest.raises(CorruptError, match="not valid JSON"):
        lmcache.deserialize(v3.encode({}, metadata={lmcache.KEY: "[" * 100_000}))
