"""The cache against a list of tokens that remembers which of them lost their exact copy."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from jaxquant import cache, quantizers
from jaxquant.methods import turboquant
from jaxquant.protocols import pytree

DIM, HEADS, BATCH, LAYERS, CAPACITY, CHUNK = 16, 2, 2, 3, 24, 6
POOL = 6 * CHUNK  # more than fits
SPECS = {
    "plain": {},
    "window": {"window": 5},
    "all": {"sinks": 3, "window": 5, "exact_layers": (0, -1)},
    "window beyond capacity": {"sinks": 1, "window": CAPACITY + 3},
}


@functools.cache
def pair():
    return turboquant.kv(jax.random.key(7), dim=DIM, bits_k=4, bits_v=3)


def empty(spec="all", *, batch=BATCH, capacity=CAPACITY, dtype=jnp.float32):
    keys, values = pair()
    return cache.init(
        keys, values, layers=LAYERS, batch=batch, kv_heads=HEADS, capacity=capacity, dtype=dtype, **SPECS[spec]
    )


@functools.cache
def pool():
    """Tokens of every row, [batch, tokens, heads, dim], and what their codes decode to."""
    rng = np.random.default_rng(0)
    exact = [jnp.asarray(rng.normal(size=(BATCH, POOL, HEADS, DIM)), jnp.float32) for _ in range(2)]
    coded = [quantizers.dequantize(q, quantizers.quantize(q, x)) for q, x in zip(pair(), exact, strict=True)]
    return [np.asarray(x) for x in exact], [np.asarray(x) for x in coded]


class Row:
    """One sequence: tokens by their place in the pool, and whether their exact copy is still there."""

    def __init__(self, spec, layer):
        self.sinks, self.window = spec.get("sinks", 0), spec.get("window", 0)
        self.exact_layer = layer in {i % LAYERS for i in spec.get("exact_layers", ())}
        self.tokens, self.lost = [], []

    def copy(self):
        other = object.__new__(Row)
        other.__dict__ = {**self.__dict__, "tokens": self.tokens[:], "lost": self.lost[:]}
        return other

    def append(self, token):
        if len(self.tokens) < CAPACITY:
            self.tokens.append(token)
            self.lost.append(False)
            for p in range(max(0, len(self.tokens) - self.window)):
                self.lost[p] = True

    def crop(self, length):
        del self.tokens[length:], self.lost[length:]

    def view(self, which):
        exact, coded = pool()[0][which], pool()[1][which]
        out = np.zeros((CAPACITY, HEADS, DIM), np.float32)
        for p, (row, i) in enumerate(self.tokens):
            read_exactly = self.exact_layer or p < self.sinks or not self.lost[p]
            out[p] = (exact if read_exactly else coded)[row, i]
        return out


def assert_holds(held, layer, rows):
    """Rounding alone: a decoded vector is a float32 sum of dim products."""
    result = cache.materialize(held, layer)
    for which in range(2):
        expected = np.stack([row.view(which) for row in rows])
        np.testing.assert_allclose(result[which], expected, rtol=0, atol=4 * DIM * np.finfo(np.float32).eps)
    assert held.length[layer].tolist() == [len(row.tokens) for row in rows]


def chunk(i):
    return [jnp.asarray(x[:, i * CHUNK : (i + 1) * CHUNK]) for x in pool()[0]]


masks = st.lists(
    st.lists(st.booleans(), min_size=BATCH * CHUNK, max_size=BATCH * CHUNK).map(
        lambda bits: np.array(bits).reshape(BATCH, CHUNK)
    )
    | st.just(np.ones((BATCH, CHUNK), bool)),
    min_size=1,
    max_size=POOL // CHUNK,
)


@settings(max_examples=25, deadline=None)
@given(masks, st.sampled_from(["all", "plain", "window beyond capacity"]), st.integers(0, LAYERS - 1))
def test_any_cut_of_the_input_gives_the_same_bits(masks, name, layer):
    """Cuts are masks over chunks of one size; the same tokens come once more in one append, without padding between."""
    held, rows = empty(name), [Row(SPECS[name], layer) for _ in range(BATCH)]
    order = [[] for _ in range(BATCH)]
    for i, mask in enumerate(masks):
        held = cache.append(held, jnp.int32(layer), *chunk(i), mask=jnp.asarray(mask))
        for row, j in zip(*np.nonzero(mask), strict=True):
            order[row].append(i * CHUNK + j)
            rows[row].append((row, i * CHUNK + j))
    assert_holds(held, layer, rows)

    index = np.zeros((BATCH, POOL), int)
    for row, tokens in enumerate(order):
        index[row, : len(tokens)] = tokens
    k, v = (jnp.asarray(np.take_along_axis(x, index[:, :, None, None], axis=1)) for x in pool()[0])
    counts = np.array([[len(tokens)] for tokens in order])
    once = cache.append(empty(name), jnp.int32(layer), k, v, mask=jnp.asarray(np.arange(POOL) < counts))
    chex.assert_trees_all_equal(held, once)
    for other in set(range(LAYERS)) - {layer}:
        assert not np.asarray(held.length[other]).any()


padding = st.integers(0, CHUNK).map(lambda count: np.arange(CHUNK) < count) | st.lists(
    st.booleans(), min_size=CHUNK, max_size=CHUNK
).map(np.array)  # at the end of the row, or anywhere

operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, POOL // CHUNK - 1), padding, padding),
        st.tuples(st.just("crop"), st.integers(0, CAPACITY), st.integers(0, CAPACITY)),
        st.tuples(st.just("reorder"), st.integers(0, 1), st.integers(0, 1)),
        st.tuples(st.just("fork"), st.integers(0, 2 * BATCH - 1), st.integers(0, 2 * BATCH - 1)),
    ),
    min_size=2,
    max_size=8,
)


@settings(max_examples=40, deadline=None)
@given(operations)
def test_append_crop_and_reorder_in_any_order(operations):
    """In the compressed layer and an exact one of the same cache."""
    held = empty("all")
    rows = {layer: [Row(SPECS["all"], layer) for _ in range(BATCH)] for layer in (1, 2)}
    for name, *arguments in operations:
        match name:
            case "append":
                i, *mask = arguments
                for layer in rows:
                    held = cache.append(held, layer, *chunk(i), mask=jnp.asarray(mask))
                    for row, j in zip(*np.nonzero(mask), strict=True):
                        rows[layer][row].append((row, i * CHUNK + j))
            case "crop":
                held = cache.crop(held, jnp.asarray(arguments))
                for layer in rows:
                    for row, length in zip(rows[layer], arguments, strict=True):
                        row.crop(length)
            case "fork":
                held = cache.reorder(cache.fork(held, copies=2), jnp.asarray(arguments))
                rows = {layer: [mine[i // 2].copy() for i in arguments] for layer, mine in rows.items()}
            case "reorder":
                held = cache.reorder(held, jnp.asarray(arguments))
                rows = {layer: [mine[i].copy() for i in arguments] for layer, mine in rows.items()}
    for layer, mine in rows.items():
        assert_holds(held, layer, mine)


def filled(name="all", **kwargs):
    held = empty(name, **kwargs)
    for layer in range(LAYERS):
        held = cache.append(held, layer, *chunk(layer))
        held = cache.append(held, layer, *chunk(5))
    return held


def test_the_model_of_a_row_tells_wrong_caches_apart():
    held = filled()
    rows = [Row(SPECS["all"], 1) for _ in range(BATCH)]
    for row, model in enumerate(rows):
        for j in [*range(CHUNK, 2 * CHUNK), *range(5 * CHUNK, 6 * CHUNK)]:
            model.append((row, j))
    assert_holds(held, 1, rows)
    wrong = {
        "other layer": (held, 0, rows),
        "other rows": (cache.reorder(held, jnp.array([1, 0])), 1, rows),
        "one fewer": (cache.crop(held, 11), 1, rows),
        "keys for values": (
            dataclasses.replace(
                held,
                stacks=tuple(dataclasses.replace(s, keys=s.values, values=s.keys) for s in held.stacks),
            ),
            1,
            rows,
        ),
    }
    for case in wrong.values():
        with pytest.raises(AssertionError):
            assert_holds(*case)
    rows[0].lost[8] = not rows[0].lost[8]
    with pytest.raises(AssertionError):
        assert_holds(held, 1, rows)


def test_a_traced_layer_equals_a_static_one_also_in_scan():
    ks, vs = (jnp.stack([jnp.asarray(x[:, i * CHUNK : (i + 1) * CHUNK]) for i in range(LAYERS)]) for x in pool()[0])

    @jax.jit
    def scanned(held, ks, vs):
        def body(held, layer):
            return cache.append(held, layer[0], layer[1], layer[2]), None

        return jax.lax.scan(body, held, (jnp.arange(LAYERS), ks, vs))[0]

    looped = empty()
    for layer in range(LAYERS):
        looped = cache.append(looped, layer, ks[layer], vs[layer])
    chex.assert_trees_all_equal(scanned(empty(), ks, vs), looped)
    for layer in range(LAYERS):
        chex.assert_trees_all_equal(cache.materialize(looped, jnp.int32(layer)), cache.materialize(looped, layer))
    chex.assert_trees_all_equal(cache.materialize(looped, -1), cache.materialize(looped, LAYERS - 1))


def test_vmap_over_caches():
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), empty(), filled())
    k, v = chunk(3)
    mapped = jax.jit(jax.vmap(lambda held: cache.append(held, 1, k, v)))(stacked)
    for i, alone in enumerate((empty(), filled())):
        chex.assert_trees_all_equal(jax.tree.map(lambda leaf, i=i: leaf[i], mapped), cache.append(alone, 1, k, v))


@pytest.mark.parametrize(
    "change",
    [
        lambda held, k, v: cache.append(held, 1, k, v),
        lambda held, k, v: cache.append(held, jnp.int32(1), k, v),
        lambda held, k, v: cache.crop(held, 3),
        lambda held, k, v: cache.reorder(held, jnp.array([1, 0])),
    ],
    ids=["append", "append to a traced layer", "crop", "reorder"],
)
@pytest.mark.parametrize("spec", ["all", "plain"])
@pytest.mark.parametrize("check", [True, False], ids=["checked", "unchecked"])
def test_shard_map_over_kv_heads(change, spec, check):
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    mesh = Mesh(np.array(jax.devices()[:2]), ("heads",))
    held = cache.append(empty(spec), 1, *chunk(2))
    by_head, whole = PartitionSpec(None, None, "heads"), PartitionSpec()

    def place(path, _):
        names = {getattr(entry, "name", None) for entry in path}
        return by_head if "stacks" in names and "quantizer" not in names else whole

    specs = jax.tree_util.tree_map_with_path(place, held)
    k, v = chunk(3)

    def step(held, k, v):
        assert held.kv_heads == 1
        return change(held, k, v)

    sharded = jax.shard_map(step, mesh=mesh, in_specs=(specs, by_head, by_head), out_specs=specs, check_vma=check)
    got = jax.jit(sharded)(held, k, v)
    chex.assert_trees_all_equal(jax.device_get(got), jax.device_get(change(held, k, v)))


def test_one_trace_for_other_numbers():
    traces = []

    @jax.jit
    def step(held, k, v, mask, rows, length):
        traces.append(None)
        held = cache.append(held, 1, k, v, mask=mask)
        return cache.crop(cache.reorder(held, rows), length)

    full = jnp.ones((BATCH, CHUNK), bool)
    step(empty(), *chunk(0), full, jnp.array([0, 1]), jnp.array([9, 9]))
    other = dataclasses.replace(
        filled(), stacks=jax.tree.map(lambda leaf: leaf + jnp.ones((), leaf.dtype), filled().stacks)
    )
    step(other, *chunk(1), ~full, jnp.array([1, 1]), jnp.array([0, 30]))
    assert len(traces) == 1
    jax.eval_shape(step, empty("window"), *chunk(0), full, jnp.array([0, 1]), jnp.array([9, 9]))
    assert len(traces) == 2


def pointers(tree):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree) if leaf.nbytes > 1 << 16]


@pytest.mark.parametrize("way", ["static layer", "scan"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["plain", "all"])
def test_a_donated_cache_is_updated_in_place(name, way, dtype):
    held = empty(name, capacity=8192, dtype=dtype)
    k, v = chunk(0)

    def once(held, k, v):
        return cache.append(held, 1, k, v)

    def through(held, k, v):
        return jax.lax.scan(lambda c, layer: (cache.append(c, layer, k, v), None), held, jnp.arange(LAYERS))[0]

    step = once if way == "static layer" else through
    compiled = jax.jit(step, donate_argnums=0).lower(held, k, v).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == held.nbytes
    assert memory.temp_size_in_bytes < held.nbytes / 20
    before = pointers(held)
    assert before
    assert pointers(compiled(held, k, v)) == before


def test_without_donation_nothing_is_in_place():
    held = empty("window", capacity=8192)
    after = cache.append(held, 1, *chunk(0))
    assert not set(pointers(held)) & set(pointers(after))


def test_donation_leaves_the_callers_quantizers_alone():
    keys, _ = pair()
    held = cache.init(keys, keys, layers=1, batch=BATCH, kv_heads=HEADS, capacity=CAPACITY)
    step = jax.jit(lambda held, k, v: cache.append(held, 0, k, v), donate_argnums=0)
    k, v = chunk(0)
    assert step(held, k, v).length.tolist() == [[CHUNK, CHUNK]]
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(keys))
    assert any(leaf.is_deleted() for leaf in jax.tree.leaves(held))


def held_per_token(held):
    """Everything that is not a quantizer's number or a length, for each token and kv head."""
    quantizers_ = [store.quantizer for stack in held.stacks for store in (stack.keys, stack.values)]
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(held))
    other = sum(leaf.nbytes for leaf in jax.tree.leaves((quantizers_, held.length, held.exact_from)))
    return (total - other) / (held.layers * held.batch * held.kv_heads * held.capacity)


@pytest.mark.parametrize(("bits_k", "bits_v", "expected"), [(4, 2, 100), (2, 2, 68), (3, 3, 100), (8, 8, 260)])
def test_bytes_per_token_are_those_of_the_buffers(bits_k, bits_v, expected):
    """128 (bits_k + bits_v) / 8 of codes and two float16 scales; 512 in 16 bit."""
    keys, values = turboquant.kv(jax.random.key(0), dim=128, bits_k=bits_k, bits_v=bits_v)
    held = cache.init(keys, values, layers=2, batch=1, kv_heads=4, capacity=64)
    after = cache.append(held, 0, jnp.ones((1, 3, 4, 128)), jnp.ones((1, 3, 4, 128)))
    for each in (held, after):
        assert held_per_token(each) == each.bytes_per_token == expected
        assert each.nbytes == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(each))
    exact = cache.init(*[quantizers.Exact(dim=128)] * 2, layers=2, batch=1, kv_heads=4, capacity=64)
    assert held_per_token(exact) == exact.bytes_per_token == 512


@pytree
class Hoarder:
    """A quantizer that keeps a 16-bit copy beside its code, as some caches do."""

    honest: quantizers.Scalar

    @property
    def dim(self):
        return self.honest.dim

    def quantize(self, x):
        code = self.honest.quantize(x)
        return code, quantizers.dequantize(self.honest, code).astype(jnp.bfloat16)

    def expand(self, code):
        return self.honest.project(code[1].astype(jnp.float32))

    def restore(self, y):
        return self.honest.restore(y)

    def project(self, q):
        return self.honest.project(q)


def test_a_hidden_copy_is_counted():
    keys, values = turboquant.kv(jax.random.key(0), dim=128, bits_k=4, bits_v=2)
    held = cache.init(Hoarder(honest=keys), values, layers=1, batch=1, kv_heads=2, capacity=16)
    assert held_per_token(held) == held.bytes_per_token == 100 + 256


def test_sinks_window_and_exact_layers_are_counted():
    held = empty(dtype=jnp.bfloat16)
    code = DIM // 2 + DIM * 3 // 8 + 4
    exact = 4 * DIM
    compressed = (CAPACITY - 3) * code + (3 + 5) * exact
    assert held_per_token(held) == held.bytes_per_token == (compressed + 2 * CAPACITY * exact) / (LAYERS * CAPACITY)
    assert held.places == ((1, 0), (0, 0), (1, 1))


def test_exact_tokens_are_rounded_to_the_caches_dtype():
    held = cache.append(empty(dtype=jnp.bfloat16), 1, *chunk(0))
    k, _ = cache.materialize(held, 1)
    want = chunk(0)[0].astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(k[:, :CHUNK], want)
    assert k.dtype == jnp.float32


def test_bfloat16_tokens_are_taken():
    k, v = (x.astype(jnp.bfloat16) for x in chunk(0))
    got = cache.append(empty(), 1, k, v)
    chex.assert_trees_all_equal(got, cache.append(empty(), 1, k.astype(jnp.float32), v.astype(jnp.float32)))


def test_an_empty_chunk_and_one_of_padding_change_nothing():
    held = filled()
    k, v = chunk(0)
    chex.assert_trees_all_equal(cache.append(held, 1, k[:, :0], v[:, :0]), held)
    chex.assert_trees_all_equal(cache.append(held, 1, k, v, mask=jnp.zeros((BATCH, CHUNK), bool)), held)


def test_fork_repeats_rows_and_reorder_clamps():
    held = filled()
    forked = cache.fork(held, copies=2)
    assert forked.batch == 4
    for layer in range(LAYERS):
        for got, want in zip(cache.materialize(forked, layer), cache.materialize(held, layer), strict=True):
            np.testing.assert_array_equal(got, np.repeat(want, 2, axis=0))
    chex.assert_trees_all_equal(cache.reorder(held, jnp.array([7, 0])), cache.reorder(held, jnp.array([1, 0])))


def test_crop_takes_one_length_for_all_rows_and_never_lengthens():
    held = filled()
    assert cache.crop(held, 4).length.tolist() == [[4, 4]] * LAYERS
    assert cache.crop(held, 99).length.tolist() == held.length.tolist()
    assert cache.crop(held, -1).length.tolist() == [[0, 0]] * LAYERS


def test_sizes_are_told():
    held = empty()
    assert (held.layers, held.batch, held.kv_heads, held.dim, held.capacity) == (LAYERS, BATCH, HEADS, DIM, CAPACITY)
    all_exact = cache.init(*pair(), layers=2, batch=1, kv_heads=1, capacity=9, sinks=2, window=3, exact_layers=(0, 1))
    assert (all_exact.capacity, len(all_exact.stacks)) == (9, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"kv_heads": -1}, "kv_heads must be at least 1, got -1"),
        ({"capacity": 0}, "capacity must be at least 1, got 0"),
        ({"sinks": 24}, "sinks must be from 0 to capacity - 1 = 23, got 24"),
        ({"sinks": -1}, "sinks must be from 0 to capacity - 1 = 23, got -1"),
        ({"window": -1}, "window must not be negative, got -1"),
        ({"exact_layers": (0, 3, -4)}, r"exact_layers must be from -3 to 2, got \[3, -4\]"),
        ({"values": quantizers.Exact(dim=32)}, "keys and values must have the same dim, got 16 and 32"),
    ],
)
def test_wrong_sizes_are_named(change, message):
    keys, values = pair()
    arguments = {"keys": keys, "values": values, "layers": 3, "batch": 2, "kv_heads": 2, "capacity": 24, **change}
    with pytest.raises(ValueError, match=message):
        cache.init(arguments.pop("keys"), arguments.pop("values"), **arguments)


@pytest.fixture
def without_type_checker():
    """The package's own messages, as users meet them: the type checker of the test run stands in front of them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("without_type_checker")
def test_wrong_appends_are_named():
    k, v = chunk(0)
    shape = r"\[batch, new, kv_heads, dim\] = \[2, 6, 2, 16\]"
    for bad in (v[:1], v[:, :2], v[:, :, :1], v[..., :8]):
        with pytest.raises(ValueError, match=f"v must have shape {shape}, got "):
            cache.append(empty(), 0, k, bad)
    with pytest.raises(ValueError, match=r"k must have shape .*, got \[1, 6, 2, 16\]"):
        cache.append(empty(), 0, k[:1], v[:1])
    with pytest.raises(ValueError, match=r"mask must have shape \[batch, new\] = \[2, 6\], got \[2, 3\]"):
        cache.append(empty(), 0, k, v, mask=jnp.ones((2, 3), bool))
    for layer in (3, -4):
        with pytest.raises(ValueError, match=f"layer must be from -3 to 2, got {layer}"):
            cache.append(empty(), layer, k, v)
        with pytest.raises(ValueError, match=f"layer must be from -3 to 2, got {layer}"):
            cache.materialize(empty(), layer)
