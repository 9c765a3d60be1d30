"""Caches over eight simulated devices: the same results as on one, and what devices tell each other, from the HLO."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxquant import attention, cache, mixed, sharding
from jaxquant._spread import Spread
from jaxquant.methods import turboquant

DIM, HEADS, KV_HEADS, BATCH, CAPACITY, LAYERS = 16, 8, 4, 4, 70, 2
KEEP = {"plain": {}, "sinks and window": {"sinks": 3, "window": 5}}
AXES = {
    "heads": {"kv_heads": "x"},
    "rows": {"batch": "x"},
    "rows and heads": {"batch": "x", "kv_heads": "y"},
    "tokens": {"tokens": "x"},
    "heads and tokens": {"kv_heads": "x", "tokens": "y"},
}


def laid(axes):
    sizes = (2, 2) if "y" in axes.values() else (4,)
    types = (jax.sharding.AxisType.Auto,) * len(sizes)
    return sharding.Layout(jax.make_mesh(sizes, ("x", "y")[: len(sizes)], axis_types=types), **axes, page=8)


@pytest.fixture(params=["rows and heads", "heads and tokens"])
def layout(request):
    return laid(AXES[request.param])


@pytest.fixture(params=KEEP, ids=list(KEEP))
def keep(request):
    return KEEP[request.param]


def quantizers():
    return turboquant.kv(jax.random.key(7), dim=DIM, bits_k=4, bits_v=2)


def empty(layout=None, **keep):
    sizes = {"layers": LAYERS, "batch": BATCH, "kv_heads": KV_HEADS, "capacity": CAPACITY, **keep}
    return cache.init(*quantizers(), **sizes) if layout is None else sharding.init(layout, *quantizers(), **sizes)


def tokens(seed, new):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(BATCH, new, HEADS, DIM)).astype(np.float32)
    k, v = (rng.normal(size=(BATCH, new, KV_HEADS, DIM)).astype(np.float32) for _ in range(2))
    return jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)


def collectives(function, *args):
    """Name the collectives of the compiled program, with the shapes of their results."""
    text = jax.jit(function).lower(*args).compile().as_text()
    pattern = r"= (\S+) (all-\w+|reduce-scatter|collective-\w+|send|recv)(?:-start)?\("
    return [(kind, shape.partition("{")[0]) for shape, kind in re.findall(pattern, text)]


def assert_close(got, want):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=0, atol=2e-5)


def filled(layout, keep):
    """Fill both caches with the same ragged rows, by a chunk with padding."""
    _, k, v = tokens(0, 45)
    mask = jnp.arange(45) >= jnp.array([0, 3, 44, 20])[:, None]
    one, many = empty(**keep), empty(layout, **keep)
    for layer in range(LAYERS):
        one = cache.append(one, layer, k + layer, v, mask=mask)
        many = sharding.append(layout, many, jnp.int32(layer) if layer else layer, k + layer, v, mask=mask)
    return one, many


def test_everything_equals_one_device(layout, keep):
    one, many = filled(layout, keep)
    for layer in range(LAYERS):
        got, want = cache.materialize(sharding.joined(many), layer), cache.materialize(one, layer)
        held = min(x.shape[1] for x in (*got, *want))
        chex.assert_trees_all_equal([x[:, :held] for x in got], [x[:, :held] for x in want])
    q, k, v = tokens(1, 9)
    for rule, chunk in [({}, "exact"), ({"soft_cap": 1.5, "scale": 0.4, "sliding_window": 11}, "codes")]:
        got = sharding.decode_attention(layout, q[:, 0], many, 1, **rule)
        assert_close(got, attention.decode_attention(q[:, 0], one, 1, **rule))
        with pytest.raises(AssertionError):
            assert_close(got, [x[::-1] for x in got])
        got = sharding.prefill_attention(layout, q, k, v, many, 0, chunk=chunk, **rule)
        want = attention.prefill_attention(q, k, v, one, 0, chunk=chunk, **rule)
        assert_close(got[:2], want[:2])
        held = cache.materialize(sharding.joined(got[2]), 0)[0]
        assert_close(held[:, : one.capacity], cache.materialize(want[2], 0)[0])
    visible = np.arange(many.capacity) % 3 != 1
    seen = [jnp.broadcast_to(visible[: held.capacity], (BATCH, held.capacity)) for held in (many, one)]
    got = sharding.decode_attention(layout, q[:, 0], many, 0, visible=seen[0])
    assert_close(got, attention.decode_attention(q[:, 0], one, 0, visible=seen[1]))


def test_cropped_and_reordered_caches_go_on(layout):
    one, many = filled(layout, KEEP["sinks and window"])
    rows, kept = jnp.array([2, 0, 0, 3]), jnp.array([9, 30, 7, 40])
    one, many = (cache.reorder(cache.crop(held, kept), rows) for held in (one, many))
    many = jax.device_put(many, sharding.shardings(layout, many))
    q, k, v = tokens(3, 1)
    got = sharding.decode_attention(layout, q[:, 0], sharding.append(layout, many, 0, k, v), 0)
    assert_close(got, attention.decode_attention(q[:, 0], cache.append(one, 0, k, v), 0))


@pytest.mark.parametrize("name", AXES)
def test_a_cache_goes_from_one_layout_to_another(name, tmp_path):
    from jaxquant.interop import orbax

    one, many = filled(laid(AXES["heads and tokens"]), KEEP["sinks and window"])
    orbax.save(tmp_path / "cache", sharding.joined(many))
    layout = laid(AXES[name])
    moved = sharding.dealt(layout, orbax.restore(tmp_path / "cache"))
    for leaf, wanted in zip(jax.tree.leaves(moved), jax.tree.leaves(sharding.shardings(layout, moved)), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
    q, k, v = tokens(3, 1)
    got = sharding.decode_attention(layout, q[:, 0], sharding.append(layout, moved, 0, k, v), 0)
    assert_close(got, attention.decode_attention(q[:, 0], cache.append(one, 0, k, v), 0))
    if layout.tokens is not None:
        with pytest.raises(ValueError, match="dealt out already"):
            sharding.dealt(layout, moved)


@pytest.mark.parametrize("second", ["Explicit", "Auto"])
def test_axes_of_a_mesh_may_be_explicit(second):
    types = (jax.sharding.AxisType.Explicit, jax.sharding.AxisType[second])
    layout = sharding.Layout(jax.make_mesh((2, 2), ("x", "y"), axis_types=types), kv_heads="x", tokens="y", page=8)
    one, many = filled(layout, KEEP["sinks and window"])
    q, _, _ = tokens(1, 1)
    want = attention.decode_attention(q[:, 0], one, 1)
    assert_close(sharding.decode_attention(layout, q[:, 0], many, 1), want)
    many = sharding.joined(many)
    got, want = (np.asarray(cache.materialize(held, 1)[0])[:, : one.capacity] for held in (many, one))
    np.testing.assert_array_equal(got, want)
    assert not np.array_equal(got, want[::-1])


def test_a_full_cache_drops_tokens_alike(layout):
    q, k, v = tokens(4, 100)
    keep = KEEP["sinks and window"] | {"capacity": 67}
    one, many = empty(**keep), empty(layout, **keep)
    assert one.capacity == many.capacity
    one, many = cache.append(one, 0, k, v), sharding.append(layout, many, 0, k, v)
    assert many.length.tolist() == one.length.tolist()
    assert_close(sharding.decode_attention(layout, q[:, 0], many, 0), attention.decode_attention(q[:, 0], one, 0))


def test_devices_hold_their_share_and_no_more(layout):
    many = empty(layout, sinks=3, window=5)
    codes = many.stacks[0].keys.codes.codes
    devices = layout.mesh.size
    assert {shard.data.nbytes for shard in codes.addressable_shards} == {codes.nbytes // devices}
    assert all(
        leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
        for leaf, wanted in zip(jax.tree.leaves(many), jax.tree.leaves(sharding.shardings(layout, many)), strict=True)
    )


@pytest.mark.parametrize("name", AXES)
def test_rows_and_heads_need_no_communication_and_tokens_one_exchange(name):
    layout = laid(AXES[name])
    many = empty(layout, sinks=3, window=5)
    q, k, v = (jax.device_put(x, NamedSharding(layout.mesh, layout.chunk)) for x in tokens(0, 1))
    assert collectives(lambda c, k, v: sharding.append(layout, c, 1, k, v), many, k, v) == []
    step = jax.device_put(q[:, 0], NamedSharding(layout.mesh, layout.queries))
    attend = collectives(lambda c, q: sharding.decode_attention(layout, q, c, 1, implementation="xla"), many, step)
    prefill = collectives(lambda c, q, k, v: sharding.prefill_attention(layout, q, k, v, c, 1), many, q, k, v)
    crop = collectives(lambda c: cache.crop(c, 3), many)
    assert crop == []
    if layout.batch is None:
        assert collectives(lambda c: cache.reorder(c, jnp.array([2, 0, 0, 3])), many) == []
    if layout.tokens is None:
        assert attend == prefill == []
    else:
        sharing = layout.devices(layout.tokens)
        heads = KV_HEADS // layout.devices(layout.kv_heads)
        joined = f"f32[{sharing},{BATCH},{heads},{HEADS // KV_HEADS},{DIM + 1}]"
        assert [kind for kind, _ in attend] == [kind for kind, _ in prefill] == ["all-gather"]
        assert {size(shape) for _, shape in attend + prefill} == {size(joined)}


def size(shape):
    return int(np.prod([int(n) for n in re.findall(r"\d+", shape.partition("[")[2])]))


def test_a_donated_step_writes_in_place(layout):
    many = empty(layout, capacity=1024)
    _, k, v = tokens(0, 1)
    step = jax.jit(lambda c, k, v: sharding.append(layout, c, 0, k, v), donate_argnums=0)
    memory = step.lower(many, k, v).compile().memory_analysis()
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(many) for shard in leaf.addressable_shards[:1])
    assert memory.alias_size_in_bytes >= 0.9 * held
    assert memory.temp_size_in_bytes < 0.1 * held


def test_a_callers_own_shard_map_may_use_the_cache(layout):
    one, many = filled(layout, {})
    q, k, v = tokens(5, 1)
    own = sharding.specs(layout, many)

    def step(c, q, k, v):
        c = cache.append(c, 0, k, v)
        return attention.decode_attention(q[:, 0], c, 0)[0], c

    mapped = jax.shard_map(
        step, mesh=layout.mesh, in_specs=(own, *[layout.chunk] * 3), out_specs=(layout.queries, own), check_vma=False
    )
    got, many = jax.jit(mapped)(many, q, k, v)
    one = cache.append(one, 0, k, v)
    assert_close(got, attention.decode_attention(q[:, 0], one, 0)[0])
    assert many.length.tolist() == one.length.tolist()


def per_head(seed):
    """Make a quantizer with numbers of its own for every kv head."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(KV_HEADS, DIM, DIM)))[0].astype(np.float32)
    levels = np.sort(2 * rng.normal(size=(KV_HEADS, DIM, 4)), axis=-1).astype(np.float32)
    return mixed.Mixed(
        mean=jnp.asarray(rng.normal(size=(KV_HEADS, DIM)), jnp.float32),
        analysis=jnp.asarray(basis),
        synthesis=jnp.asarray(basis),
        weights=jnp.full((KV_HEADS, DIM), 1 / DIM),
        levels=(jnp.asarray(levels),),
        widths=((2, DIM),),
        dim=DIM,
    )


@pytest.mark.parametrize("apiece", [False, True], ids=["one for all layers", "one a layer"])
def test_quantizers_of_each_head_are_sharded_with_their_heads(layout, apiece):
    given = [[per_head(10 * half + i) for i in range(LAYERS)] if apiece else per_head(half) for half in range(2)]
    sizes = {"layers": LAYERS, "batch": BATCH, "kv_heads": KV_HEADS, "capacity": CAPACITY}
    one, many = cache.init(*given, **sizes), sharding.init(layout, *given, **sizes)
    assert len(one.stacks) == 1
    q, k, v = tokens(0, 20)
    want = ()
    for layer in range(LAYERS):
        one, many = cache.append(one, layer, k, v), sharding.append(layout, many, layer, k, v)
        want = attention.decode_attention(q[:, 0], one, layer)
        assert_close(sharding.decode_attention(layout, q[:, 0], many, layer), want)
    with pytest.raises(AssertionError):
        assert_close(sharding.decode_attention(layout, q[:, 0], many, 0), [x[:, ::-1] for x in want])


@pytest.mark.parametrize("page", [1, 4, 8])
@pytest.mark.parametrize("devices", [1, 2, 3])
def test_every_token_has_one_place(page, devices):
    spread = Spread(axis="x", devices=devices, page=page, slots=page * devices * 5)
    order = spread.order()
    assert sorted(order) == list(range(spread.slots))
    device, slot = (jnp.asarray(x, jnp.int32) for x in np.divmod(order, spread.slots // devices))
    token = jnp.arange(spread.slots, dtype=jnp.int32)
    np.testing.assert_array_equal(jax.vmap(spread.token)(slot, device), token)
    np.testing.assert_array_equal(jax.vmap(spread.before)(token, device), slot)
    np.testing.assert_array_equal(jax.vmap(spread.before)(token + 1, device), slot + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": "z"}, r"kv_heads must be an axis of the mesh, one of \('x',\), got 'z'"),
        ({"kv_heads": "x", "tokens": "x"}, "must go along different axes"),
        ({"tokens": "x", "page": 0}, "page must be at least 1, got 0"),
    ],
)
def test_wrong_layouts_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        sharding.Layout(jax.make_mesh((4,), ("x",)), **change)


def test_sizes_that_do_not_divide_are_named():
    layout = sharding.Layout(jax.make_mesh((4,), ("x",)), kv_heads="x")
    with pytest.raises(ValueError, match="kv_heads must be a multiple of the 4 devices that share it, got 6"):
        sharding.init(layout, *quantizers(), layers=1, batch=1, kv_heads=6, capacity=8)
    layout = dataclasses.replace(layout, kv_heads=None, tokens="x")
    dealt = sharding.init(layout, *quantizers(), layers=1, batch=1, kv_heads=1, capacity=8)
    with pytest.raises(ValueError, match=r"sharding\.joined"):
        cache.materialize(dealt, 0)
    assert sharding.specs(layout, dealt).stacks[0].keys.codes.codes == PartitionSpec(None, None, None, "x")
    with pytest.raises(ValueError, match="exact_layers and sinks"):
        sharding.init(layout, *quantizers(), layers=2, batch=1, kv_heads=1, capacity=8, sinks=2, exact_layers=[0])
