"""Caches saved and loaded: the same bits afterwards, parts that equal slices, and files that lie."""

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxquant import _descriptions, _snapshot_reader, attention, cache, rotations, snapshot
from jaxquant.cache import KVCache
from jaxquant.codecs import qatc, v3
from jaxquant.codecs.errors import CodecError, CorruptError, LimitError, UnsupportedError
from jaxquant.methods import turboquant
from jaxquant.models.architecture import from_config
from jaxquant.models.decoder import Decoder
from jaxquant.protocols import pytree, static
from jaxquant.quantizers import Exact, Quantized, Scalar

DIM, KV_HEADS, HEADS, CAPACITY, LAYERS = 16, 2, 4, 64, 3


def pair(name: str):
    match name:
        case "packed":
            return turboquant.kv(jax.random.key(7), dim=DIM, bits_k=4, bits_v=3)
        case "sketched":
            return (turboquant.prod(jax.random.key(1), dim=DIM, bits=3),) * 2
        case "rotor":
            return (turboquant.mse(jax.random.key(1), dim=DIM, bits=3, rotation="rotor", scale="preserve"),) * 2
        case "haar":
            return (turboquant.mse(jax.random.key(1), dim=DIM, bits=8, rotation="haar", scale_dtype="float32"),) * 2
        case "exact":
            return Exact(dim=DIM), Exact(dim=DIM)
        case _:
            raise KeyError(name)


def tokens(seed: int, batch: int, new: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = (batch, HEADS, DIM), (batch, new, KV_HEADS, DIM), (batch, new, KV_HEADS, DIM)
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    return q, k, v


def filled(
    name: str = "packed", *, batch: int = 2, sinks: int = 4, window: int = 8, new: int = 40, **kwargs
) -> KVCache:
    """A cache of ragged rows: the second row of layer i lacks 7 + i tokens, some of them on the left."""
    made = cache.init(
        *pair(name),
        layers=LAYERS,
        batch=batch,
        kv_heads=KV_HEADS,
        capacity=CAPACITY,
        sinks=sinks,
        window=window,
        **kwargs,
    )
    for layer in range(LAYERS):
        _, k, v = tokens(layer, batch, new)
        mask = np.ones((batch, new), bool)
        mask[1:, : 7 + layer] = False
        made = cache.append(made, layer, k, v, mask=jnp.asarray(mask))
    return made


def stored(held: KVCache, **kwargs) -> bytes:
    file = io.BytesIO()
    snapshot.save(file, held, **kwargs)
    return file.getvalue()


def identical(a: KVCache, b: KVCache) -> bool:
    """Whether two caches hold the same bits in the same structure."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(
        x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in pairs
    )


def decoded(held: KVCache) -> list[np.ndarray]:
    """What attention says for each layer, before and after one more token."""
    found = []
    for layer in range(held.layers):
        q, k, v = tokens(99 + layer, held.batch, 1)
        found += attention.decode_attention(q, held, layer)
        held = cache.append(held, layer, k, v)
        found += attention.decode_attention(q, held, layer)
    return [np.asarray(x) for x in found]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


CASES = {
    "packed": {},
    "no sinks, no window": {"sinks": 0, "window": 0},
    "window wider than the rows": {"window": 50},
    "sinks longer than the rows": {"sinks": 45},
    "exact": {"name": "exact", "sinks": 0, "window": 0},
    "exact layers": {"exact_layers": (0, -1)},
    "sketched": {"name": "sketched"},
    "rotor": {"name": "rotor"},
    "haar": {"name": "haar"},
    "float32": {"dtype": jnp.float32},
    "full": {"new": CAPACITY + 5},
    "one row": {"batch": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_loaded_is_what_was_saved(case: str, tmp_path: Path):
    held = filled(**CASES[case])
    snapshot.save(tmp_path / "x.qatc", held)
    again = snapshot.load(tmp_path / "x.qatc")
    assert identical(again, held)
    assert again.capacity == held.capacity


@pytest.mark.parametrize("case", ["packed", "exact", "exact layers", "sketched"])
def test_attention_over_what_is_loaded_gives_the_same_bits(case: str):
    held = filled(**CASES[case])
    assert same(decoded(snapshot.load(stored(held))), decoded(held))


def test_identical_and_same_can_fail():
    held, other = filled(), filled(window=7)
    assert not identical(held, other)
    assert not identical(held, cache.crop(held, 39))
    assert not same(decoded(held), decoded(cache.crop(held, 20)))


def test_an_empty_cache():
    held = cache.init(*pair("packed"), layers=2, batch=1, kv_heads=2, capacity=9, window=3)
    assert identical(snapshot.load(stored(held)), held)


def test_only_held_tokens_are_written():
    few, many = (len(stored(filled(new=new))) for new in (12, 60))
    assert few < 0.6 * many
    big = cache.init(*pair("exact"), layers=1, batch=1, kv_heads=2, capacity=1 << 20)
    assert len(stored(big)) < 4000


def test_what_was_cropped_is_not_written():
    held, length = filled("exact", sinks=2, window=8), jnp.array([11, 5])
    short = cache.crop(held, length)
    again = snapshot.load(stored(short))
    for store in (again.stacks[0].keys, again.stacks[0].values):
        assert not np.asarray(store.codes.codes[:, 0, :, 11 - 2 :]).any()
        assert not np.asarray(store.codes.codes[:, 1, :, 5 - 2 :]).any()
        assert np.asarray(store.codes.codes[:, 0, :, : 11 - 2]).any()
    assert same(decoded(again), decoded(short))
    for layer in range(LAYERS):
        assert same(*([np.asarray(x) for x in cache.materialize(c, layer)] for c in (again, short)))


@pytest.mark.parametrize("case", ["packed", "exact layers", "exact"])
def test_parts_equal_slices(case: str):
    held = filled(**CASES[case])
    data = stored(held)
    with v3.open(data) as reader:
        assert reader.tensors["stack0/keys/codes"].axis == 3
    for layers, rows in (([1, 2], None), ([2], [1]), ([-1, 0], [1, 0]), (None, [1])):
        part = snapshot.load(data, layers=layers, rows=rows)
        row_list, layer_list = rows or [0, 1], layers or range(LAYERS)
        expected = cache.reorder(held, jnp.asarray(row_list))
        for place, layer in enumerate(layer_list):
            assert same(*([np.asarray(x) for x in cache.materialize(*at)] for at in ((part, place), (expected, layer))))
        assert np.array_equal(part.length, np.asarray(held.length)[np.ix_(layer_list, row_list)])
    front = snapshot.load(data, tokens=17)
    assert same(decoded(front), decoded(cache.crop(held, 17)))
    assert front.capacity == held.capacity


def test_a_part_fetches_less_than_the_whole():
    held = cache.init(*pair("exact"), layers=8, batch=1, kv_heads=2, capacity=20_000, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (1, 20_000, 2, DIM))
    for layer in range(8):
        held = cache.append(held, layer, x, -x)
    data, fetched = stored(held, profile="fast"), []

    def read(offset: int, length: int) -> bytes:
        fetched.append(length)
        return data[offset : offset + length]

    part = snapshot.load(read, size=len(data), layers=[3])
    assert same(*([np.asarray(y) for y in cache.materialize(c, i)] for c, i in ((part, 0), (held, 3))))
    assert sum(fetched) < 0.2 * len(data)


def test_a_decoder_continues_with_the_same_logits(tmp_path: Path):
    sizes = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": DIM,
    }
    decoder = Decoder(from_config({"model_type": "llama", **sizes}), rngs=nnx.Rngs(0))
    graph, state = nnx.split(decoder)
    step = jax.jit(lambda ids, held: nnx.merge(graph, state)(ids, held))
    prompt = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 24)))
    held = decoder.init_cache(*pair("packed"), batch=2, capacity=40, sinks=2, window=4, exact_layers=(0,))
    _, held = step(prompt, held)
    assert held is not None
    snapshot.save(tmp_path / "x", held, metadata={"prompt": "abc"})
    again = snapshot.load(tmp_path / "x")
    logits = None
    for token in range(5):
        ids = jnp.full((2, 1), token)
        (expected, held), (logits, again) = step(ids, held), step(ids, again)
        assert np.asarray(logits).tobytes() == np.asarray(expected).tobytes()
    assert logits is not None
    assert not np.array_equal(logits, step(jnp.full((2, 1), 1), again)[0])
    with qatc.open(tmp_path / "x") as reader:
        assert reader.metadata["prompt"] == "abc"


def forged(data: bytes, change: Callable[[dict], None], tensors: Callable[[dict], None] = lambda _: None) -> bytes:
    """Change what a snapshot says of itself, checksums made right."""
    with v3.open(data) as reader:
        held = {name: reader.read(name) for name in reader.names}
        axes = {name: tensor.axis for name, tensor in reader.tensors.items()}
        record = json.loads(reader.metadata[_snapshot_reader.KEY])
    change(record)
    tensors(held)
    return v3.encode(held, metadata={_snapshot_reader.KEY: json.dumps(record)}, axis=axes)


def half(record: dict) -> dict:
    return record["stacks"][0]["keys"]


def renamed(name: str) -> Callable[[dict], None]:
    return lambda record: half(record)["quantizer"].update({"class": name})


LIES = {
    "another module": (renamed("os:system"), UnsupportedError, "only a caller can allow"),
    "a module of jaxquant that does things": (renamed("jaxquant.__main__:main"), UnsupportedError, "only a caller"),
    "a folder": (renamed("jaxquant.methods:turboquant"), UnsupportedError, "only a caller can allow"),
    "a module that is not there": (renamed("jaxquant.methods.nothing:X"), UnsupportedError, "does not have"),
    "a function": (renamed("jaxquant.quantizers:quantize"), UnsupportedError, "does not have"),
    "an imported module": (renamed("jaxquant.quantizers:jax"), UnsupportedError, "does not have"),
    "an imported class": (renamed("jaxquant.quantizers:Any"), UnsupportedError, "does not have"),
    "a class that is no quantizer": (
        lambda r: half(r).update(quantizer={"class": "jaxquant.rotations:Identity", "fields": {"dim": 16}}),
        CorruptError,
        "no quantizer",
    ),
    "other fields": (lambda r: half(r)["quantizer"]["fields"].pop("bits"), UnsupportedError, "has the fields"),
    "other bits": (lambda r: half(r)["quantizer"]["fields"].update(bits=5), CorruptError, "must be uint8"),
    "bits too few for the codebook": (
        lambda r: half(r)["quantizer"]["fields"].update(bits=2),
        CorruptError,
        "not work",
    ),
    "bits of another kind": (lambda r: half(r)["quantizer"]["fields"].update(bits="4"), CorruptError, "not work"),
    "no bits": (lambda r: half(r)["quantizer"]["fields"].update(bits=None), CorruptError, "not work"),
    "an array that is missing": (lambda r: half(r).update(quantizer={"array": "x"}), CorruptError, "no tensor"),
    "an array that is no quantizer's": (
        lambda r: half(r)["quantizer"]["fields"].update(codebook={"array": "stack0/keys/codes"}),
        CorruptError,
        "not work",
    ),
    "no description": (lambda r: half(r).update(quantizer=[1, 2]), CorruptError, "describes no array"),
    "deep nonsense": (
        lambda r: half(r).update(quantizer=json.loads('{"items":[' * 300 + "0" + "]}" * 300)),
        CorruptError,
        "recursion|describes no array",
    ),
    "another version": (lambda r: r.update(version=2), UnsupportedError, "version"),
    "no stacks": (lambda r: r.update(stacks=[]), CorruptError, "do not fit"),
    "stacks of another kind": (lambda r: r.update(stacks=[[], []]), CorruptError, "do not fill"),
    "places twice": (lambda r: r["places"].__setitem__(0, [0, 1]), CorruptError, "do not fill"),
    "places outside": (lambda r: r["places"].__setitem__(0, [0, 9]), CorruptError, "do not fill"),
    "places of another kind": (lambda r: r["places"].__setitem__(0, [0, True]), CorruptError, "do not fit"),
    "negative sinks": (lambda r: half(r).update(sinks=-1), CorruptError, "sinks"),
    "sinks beyond capacity": (lambda r: half(r).update(sinks=CAPACITY), CorruptError, "leave none"),
    "other sinks": (lambda r: half(r).update(sinks=3), CorruptError, "must be uint8"),
    "a huge capacity": (lambda r: r.update(capacity=(1 << 31) - 1), LimitError, "decoded bytes"),
    "a small capacity": (lambda r: r.update(capacity=39), CorruptError, "outside of 0 to the capacity"),
    "a float capacity": (lambda r: r.update(capacity=64.0), CorruptError, "capacity"),
    "a huge window": (lambda r: half(r).update(window=(1 << 31) - 1), CorruptError, "must be"),
    "other heads": (lambda r: r.update(kv_heads=1), CorruptError, "must be"),
    "a dtype of another kind": (lambda r: half(r).update(dtype="object"), CorruptError, "not described"),
    "another dtype": (lambda r: half(r).update(dtype="float32"), CorruptError, "must be float32"),
}


@pytest.fixture(scope="module")
def honest() -> bytes:
    return stored(filled())


def test_without_a_lie_a_forgery_loads(honest: bytes):
    assert identical(snapshot.load(forged(honest, lambda _: None)), filled())


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused(lie: str, honest: bytes):
    change, error, match = LIES[lie]
    with pytest.raises(error, match=match):
        snapshot.load(forged(honest, change), limits=qatc.Limits(decoded_bytes=1 << 26))


@pytest.mark.parametrize(
    ("name", "values", "match"),
    [
        ("length", np.full((3, 2), 65, np.int32), "outside of 0 to the capacity"),
        ("length", np.full((3, 2), -1, np.int32), "outside of 0 to the capacity"),
        ("length", np.full((3, 2), 41, np.int32), "must be"),
        ("length", np.full((3, 2), 40, np.int64), "no int32 tensor"),
        ("length", np.full((2, 2), 40, np.int32), "do not fit"),
        ("exact_from", np.zeros((3, 1), np.int32), "do not fit"),
        ("stack0/keys/codes", np.zeros((3, 2, 2, 36, 9), np.uint8), "must be"),
        ("stack0/keys/scales", np.zeros((3, 2, 2, 36), np.float32), "must be"),
        ("stack0/keys/quantizer/rotation/signs", np.ones((5000, DIM), np.int8), "too large"),
        ("stack0/keys/quantizer/rotation/signs", np.ones((3, 32), np.int8), "must be|differ in dim"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name: str, values: np.ndarray, match: str, honest: bytes):
    with pytest.raises(CorruptError, match=match):
        snapshot.load(forged(honest, lambda _: None, lambda held: held.update({name: values})))


def test_damage_is_found(honest: bytes):
    for cut in range(0, len(honest), 97):
        with pytest.raises(CodecError):
            snapshot.load(honest[:cut])
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(honest), 60):
        damaged = bytearray(honest)
        damaged[place] ^= 1 << rng.integers(8)
        with pytest.raises(CodecError):
            snapshot.load(bytes(damaged))


def test_other_files_are_no_snapshots():
    with pytest.raises(UnsupportedError, match="no snapshot"):
        snapshot.load(v3.encode(np.zeros(3)))
    with pytest.raises(UnsupportedError, match="version 2"):
        snapshot.load(qatc.encode(np.zeros(3, np.float32), chunk=2))
    with pytest.raises(CorruptError, match="not valid JSON"):
        snapshot.load(v3.encode({}, metadata={_snapshot_reader.KEY: "[" * 100_000}))


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"layers": [3]}, IndexError, "layers must be from -3 to 2"),
        ({"rows": [-3]}, IndexError, "rows must be from -2 to 1"),
        ({"layers": []}, ValueError, "layers must not be empty"),
        ({"tokens": -1}, ValueError, "tokens must not be negative"),
    ],
)
def test_parts_that_are_not_there(kwargs: dict, error: type[Exception], match: str, honest: bytes):
    with pytest.raises(error, match=match):
        snapshot.load(honest, **kwargs)


@pytree
class Halved:
    """A quantizer from outside of jaxquant, with every kind of field."""

    inner: Scalar
    parts: tuple
    factor: float
    sizes: tuple = static()

    @property
    def dim(self) -> int:
        return self.inner.dim

    def quantize(self, x: jax.Array, /) -> Quantized:
        return self.inner.quantize(x * self.factor)

    def expand(self, code: Quantized, /) -> jax.Array:
        return self.inner.expand(code) / self.factor

    def restore(self, y: jax.Array, /) -> jax.Array:
        return self.inner.restore(y)

    def project(self, q: jax.Array, /) -> jax.Array:
        return self.inner.project(q)


def halved(**kwargs) -> KVCache:
    inner = turboquant.mse(jax.random.key(0), dim=DIM, bits=4)
    made = Halved(
        inner=inner, parts=(jnp.arange(3), rotations.Identity(dim=2), None), factor=0.1, sizes=(1, ("a", 2.5))
    )
    made = dataclasses.replace(made, **kwargs)
    return cache.init(made, Exact(dim=DIM), layers=1, batch=1, kv_heads=2, capacity=8)


def test_classes_from_outside_need_the_callers_word():
    _, k, v = tokens(0, 1, 5)
    held = cache.append(halved(), 0, k, v)
    data = stored(held)
    with pytest.raises(UnsupportedError, match=r"Halved.*only a caller can allow"):
        snapshot.load(data)
    again = snapshot.load(data, classes=[Halved])
    assert identical(again, held)
    quantizer = again.stacks[0].keys.quantizer
    assert isinstance(quantizer, Halved)
    assert (quantizer.sizes, quantizer.factor) == ((1, ("a", 2.5)), 0.1)


@pytest.mark.parametrize("kwargs", [{"parts": [1]}, {"parts": ("a", {1})}, {"sizes": ({1},)}, {"sizes": ([1],)}])
def test_what_no_file_can_hold_is_refused_when_saving(kwargs: dict, tmp_path: Path):
    with pytest.raises(TypeError, match="which a file cannot hold"):
        snapshot.save(tmp_path / "x", halved(**kwargs))
    assert not list(tmp_path.iterdir())


def test_the_description_has_its_own_key():
    with pytest.raises(ValueError, match="must not have the key"):
        stored(filled(), metadata={_snapshot_reader.KEY: ""})


def test_descriptions_come_back():
    arrays: dict[str, np.ndarray] = {}
    for kind in ("packed", "sketched", "rotor", "haar", "exact"):
        quantizer = pair(kind)[0]
        node = json.loads(json.dumps(_descriptions.describe(quantizer, kind, arrays)))
        again = _descriptions.rebuild(node, lambda name: jnp.asarray(arrays[name]), {})
        assert jax.tree.structure(again) == jax.tree.structure(quantizer)
