"""Ring prefill over four simulated devices: what one device gives, with nothing but codes on the wire."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxquant import attention, cache, quantizers, ring, sharding
from jaxquant.methods import turboquant

DIM, HEADS, KV_HEADS, BATCH, NEW, DEVICES = 16, 8, 4, 2, 64, 4


def laid(**axes):
    sizes = (2, DEVICES) if axes else (DEVICES,)
    types = (jax.sharding.AxisType.Auto,) * len(sizes)
    mesh = jax.make_mesh(sizes, ("x", "y")[-len(sizes) :], axis_types=types)
    return sharding.Layout(mesh, **axes, tokens="y", page=8)


def prompt(new=NEW):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(BATCH, new, h, DIM)), jnp.float32) for h in (HEADS, KV_HEADS, KV_HEADS))


def both(layout, how, *, layers=2, layer=1, pair=None):
    keys, values = pair or turboquant.kv(jax.random.key(7), dim=DIM, bits_k=4, bits_v=2)
    sizes = {"layers": layers, "batch": BATCH, "kv_heads": KV_HEADS, "capacity": 2 * NEW}
    q, k, v = prompt()
    want = attention.prefill_attention(q, k, v, cache.init(keys, values, **sizes), layer, **how)
    held = sharding.init(layout, keys, values, **sizes)
    order = ring.order(layout, held, NEW)
    rows = NamedSharding(layout.mesh, PartitionSpec(layout.batch, layout.tokens, layout.kv_heads))
    shards = [jax.device_put(x[:, order], rows) for x in (q, k, v)]
    return want, ring.prefill_attention(layout, *shards, held, layer, **how), order


@pytest.mark.parametrize("axes", [{}, {"kv_heads": "x"}, {"batch": "x"}], ids=["tokens", "and heads", "and rows"])
@pytest.mark.parametrize("how", [{}, {"sliding_window": 20, "soft_cap": 4.0, "scale": 0.3}], ids=["plain", "rule"])
def test_a_ring_gives_what_one_device_gives(axes, how):
    layout = laid(**axes)
    (out, lse, one), (ring_out, ring_lse, many), order = both(layout, how)
    np.testing.assert_allclose(ring_out, out[:, order], atol=2e-5)
    np.testing.assert_allclose(ring_lse, lse[:, order], atol=2e-5)
    assert np.abs(np.asarray(ring_out) - np.asarray(out)).max() > 0.1  # the order matters
    assert many.length.tolist() == one.length.tolist()
    for got, want in zip(cache.materialize(sharding.joined(many), 1), cache.materialize(one, 1), strict=True):
        np.testing.assert_allclose(got[:, :NEW], want[:, :NEW], atol=1e-6)


def test_decoding_goes_on_over_the_cache_that_a_ring_filled():
    layout = laid()
    (_, _, one), (_, _, many), _ = both(layout, {})
    q, k, v = (x[:, :1] for x in prompt())
    one, many = cache.append(one, 1, k, v), sharding.append(layout, many, 1, k, v)
    want, got = attention.decode_attention(q[:, 0], one, 1), sharding.decode_attention(layout, q[:, 0], many, 1)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def test_every_layer_has_its_own_quantizer_and_stack():
    pairs = [turboquant.kv(jax.random.key(i), dim=DIM, bits_k=bits, bits_v=2) for i, bits in enumerate((4, 4, 3))]
    for layer in (1, 2):
        (out, _, _), (ring_out, _, _), order = both(
            laid(), {}, layers=3, layer=layer, pair=tuple(zip(*pairs, strict=True))
        )
        np.testing.assert_allclose(ring_out, out[:, order], atol=2e-5)


def test_codes_travel_and_nothing_else():
    layout = laid()
    keys, values = turboquant.kv(jax.random.key(7), dim=DIM, bits_k=4, bits_v=2)
    held = sharding.init(layout, keys, values, layers=1, batch=BATCH, kv_heads=KV_HEADS, capacity=NEW)
    q, k, v = prompt()
    run = jax.jit(lambda *args: ring.prefill_attention(layout, *args, held, 0))
    rows = NamedSharding(layout.mesh, PartitionSpec(None, "y"))
    text = run.lower(*(jax.device_put(x, rows) for x in (q, k, v))).compile().as_text()
    sent = re.findall(r"= (\w+)\[([\d,]*)\]\S* collective-permute(?:-start)?\(", text)
    sizes = {"u8": 1, "f16": 2, "u16": 2, "bf16": 2}
    hop = sum(sizes[dtype] * np.prod([int(n) for n in shape.split(",")]) for dtype, shape in sent)
    assert hop == NEW // DEVICES * BATCH * KV_HEADS * ((DIM * 4 + DIM * 2) // 8 + 2 + 2)
    assert not re.search(r"all-(gather|reduce|to-all)|reduce-scatter", text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"new": 40}, "a multiple of page x devices = 32 tokens, at most 128, got 40"),
        ({"sinks": 4}, "no sinks and no window"),
        ({"layout": "heads"}, "an axis for tokens"),
    ],
)
def test_errors_say_what_is_allowed(change, message):
    layout = laid()
    if "layout" in change:
        types = (jax.sharding.AxisType.Auto,)
        layout = sharding.Layout(jax.make_mesh((DEVICES,), ("x",), axis_types=types), kv_heads="x")
    exact = quantizers.Exact(dim=DIM)
    held = sharding.init(
        layout, exact, exact, layers=1, batch=BATCH, kv_heads=KV_HEADS, capacity=2 * NEW, sinks=change.get("sinks", 0)
    )
    with pytest.raises(ValueError, match=message):
        ring.prefill_attention(layout, *prompt(change.get("new", NEW)), held, 0)
