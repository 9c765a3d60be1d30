"""A cache with its oldest codes in host memory gives what one cache gives."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import emulate
from model_folders import write_folder

from jaxquant import attention, cache, models, offload, quantizers
from jaxquant._kernels import cuda, nvrtc
from jaxquant.methods import turboquant

BATCH, HEADS, KV_HEADS, DIM = 2, 4, 2, 16
SIZES = {"layers": 2, "batch": BATCH, "kv_heads": KV_HEADS, "dtype": jnp.float32}
KEEP = {
    "plain": ({}, {}),
    "sinks and window": ({"sinks": 3, "window": 8}, {"soft_cap": 3.0}),
    "sliding": ({"window": 4}, {"sliding_window": 30, "scale": 0.3}),
}


def pair():
    return turboquant.kv(jax.random.key(0), dim=DIM, bits_k=4, bits_v=2)


@pytest.mark.parametrize(("keep", "how"), KEEP.values(), ids=list(KEEP))
def test_spilling_changes_nothing_that_attention_sees(keep, how):
    rng = np.random.default_rng(0)
    sizes = SIZES | {"layers": 1}
    whole = cache.init(*pair(), capacity=200, **sizes, **keep)
    held = offload.init(*pair(), capacity=200, hot=64, segment=16, **sizes, **keep)
    spills = 0
    for new in (30, 1, 30, 30, 1):
        while held.room() < new:
            held, spills = offload.spill(held), spills + 1
        q, k, v = (jnp.asarray(rng.normal(size=(BATCH, new, h, DIM)), jnp.float32) for h in (HEADS, 2, 2))
        mask = jnp.arange(new) < jnp.array([new, max(1, new - 3)])[:, None]
        want, lse, whole = attention.prefill_attention(q, k, v, whole, 0, mask=mask, **how)
        got, got_lse, held = held.attend(q, k, v, 0, mask=mask, **how)
        np.testing.assert_allclose(got, want, atol=1e-5)
        np.testing.assert_allclose(np.asarray(got_lse)[mask], np.asarray(lse)[mask], atol=1e-5)
        assert held.length.tolist() == whole.length.tolist()
    assert spills >= 2
    wrong = dataclasses.replace(held, cold=jax.tree.map(lambda leaf: jnp.flip(leaf, axis=2), held.cold))
    assert np.abs(np.asarray(wrong.attend(q, k, v, 0, mask=mask, **how)[0]) - np.asarray(want)).max() > 1e-3


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")
def test_segments_are_read_by_the_kernel_where_there_is_one(monkeypatch):
    keys, values = turboquant.kv(jax.random.key(0), dim=64, bits_k=4, bits_v=2, fused=True)
    held = offload.init(keys, values, capacity=200, hot=96, segment=32, **SIZES)
    whole = cache.init(keys, values, capacity=200, **SIZES)
    rng = np.random.default_rng(0)
    mask = jnp.arange(90) < jnp.array([90, 50])[:, None]
    q, k, v = (jnp.asarray(rng.normal(size=(BATCH, 90, h, 64)), jnp.float32) for h in (HEADS, 2, 2))
    for layer in range(2):
        _, _, held = held.attend(q, k, v + layer, layer, mask=mask)
        whole = cache.append(whole, layer, k, v + layer, mask=mask)
    held = offload.spill(offload.spill(held))
    assert held.spilled.tolist() == [2, 1]
    whole = cache.append(whole, 1, k[:, :1], v[:, :1])
    want, want_lse = attention.decode_attention(q[:, 0], whole, 1, soft_cap=9.0)

    slots, coded = [], cuda.coded
    monkeypatch.setattr(cuda, "coded", lambda stack, *rest: slots.append(stack.slots) or coded(stack, *rest))
    offload._cold.clear_cache()
    with emulate.installed():
        monkeypatch.setattr(nvrtc, "available", lambda: True)  # `installed` asks whether there is a GPU
        got, lse, _ = held.attend(q[:, :1], k[:, :1], v[:, :1], 1, soft_cap=9.0)
        jax.block_until_ready(got)
    offload._cold.clear_cache()
    assert slots == [96, 32]
    np.testing.assert_allclose(got[:, 0], want, rtol=0, atol=5e-4)  # queries have 16 bits
    np.testing.assert_allclose(lse[:, 0], want_lse, rtol=0, atol=5e-4)
    assert float(jnp.max(jnp.abs(want[0] - want[1]))) > 1e-2


def test_rows_spill_when_they_can():
    held = offload.init(*pair(), capacity=200, hot=64, segment=16, **SIZES)
    x = jnp.ones((BATCH, 40, KV_HEADS, DIM))
    for layer in range(2):
        mask = jnp.arange(40) < jnp.array([40, 10])[:, None]
        _, _, held = held.attend(jnp.ones((BATCH, 40, HEADS, DIM)), x, x, layer, mask=mask)
    held = offload.spill(held)
    assert held.spilled.tolist() == [1, 0]
    assert held.hot.length.tolist() == [[24, 10]] * 2
    assert held.length.tolist() == [[40, 10]] * 2


def test_cold_codes_are_in_host_memory_and_packed():
    held = offload.init(*pair(), capacity=1000, hot=64, segment=16, **SIZES)
    x = jnp.ones((BATCH, 40, KV_HEADS, DIM))
    for layer in range(2):
        _, _, held = held.attend(jnp.ones((BATCH, 40, HEADS, DIM)), x, x, layer)
    held = offload.spill(held)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(held.cold)} == {"pinned_host"}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(held.hot)} == {"device"}
    segments = -(-(1000 - 64) // 16) + 1
    assert held.host_nbytes == segments * 16 * 2 * BATCH * KV_HEADS * ((4 + 2) * DIM // 8 + 4)
    assert held.capacity == 64 + (segments - 1) * 16


def test_a_full_host_keeps_its_codes():
    held = offload.init(*pair(), capacity=80, hot=64, segment=16, **SIZES)
    x = jnp.ones((BATCH, 60, KV_HEADS, DIM))
    for layer in range(2):
        _, _, held = held.attend(jnp.ones((BATCH, 60, HEADS, DIM)), x, x, layer)
    once = offload.spill(held)
    kept = jax.tree.map(np.array, once.cold)
    twice = offload.spill(once)
    assert twice.spilled.tolist() == [1, 1]
    assert twice.length.tolist() == [[60, 60]] * 2
    for leaf, old in zip(jax.tree.leaves(twice.cold), jax.tree.leaves(kept), strict=True):
        np.testing.assert_array_equal(np.asarray(leaf)[:, :1], old[:, :1])


def test_a_decoder_generates_over_it(tmp_path):
    model = models.load(write_folder(tmp_path, "llama"), dtype="float32")
    decoder = model.decoder
    prompt = [list(range(30)), list(range(5, 22))]
    sizes = {"layers": 2, "batch": 2, "kv_heads": 2, "dtype": "float32"}
    held = offload.init(*pair(), capacity=128, hot=40, segment=8, **sizes)
    whole = decoder.init_cache(*pair(), batch=2, capacity=128, dtype="float32")
    tokens = models.generate(None, decoder, whole, prompt, max_tokens=20, chunk=32).tokens
    first = models.generate(None, decoder, held, prompt, max_tokens=5, chunk=32)
    held, out = first.cache, first.tokens
    for _ in range(3):
        held = offload.spill(held)
        more = models.generate(None, decoder, held, [row[-1:] for row in out], max_tokens=5, chunk=2)
        held, out = more.cache, [row + new for row, new in zip(out, more.tokens, strict=True)]
    assert int(held.spilled.min()) > 0
    assert out == tokens


def test_errors_name_the_argument():
    make = {"capacity": 100, "hot": 64, "segment": 16, **SIZES}
    for change, message in (
        ({"segment": 0}, "segment must be a positive multiple of the window of 0, got 0"),
        ({"segment": 16, "window": 6}, "multiple of the window of 6, got 16"),
        ({"hot": 8}, "hot must be from sinks \\+ window \\+ segment = 16 to capacity = 100, got 8"),
        ({"hot": 101}, "got 101"),
    ):
        with pytest.raises(ValueError, match=message):
            offload.init(*pair(), **make | change)
    exact = quantizers.Exact(dim=DIM)
    with pytest.raises(ValueError, match="one form in all layers"):
        offload.init([exact, pair()[0]], [exact, pair()[1]], **make)
    held = offload.init(*pair(), **make, sinks=2)
    x = jnp.ones((BATCH, 1, KV_HEADS, DIM))
    with pytest.raises(ValueError, match="sliding_window cannot be had together with sinks"):
        held.attend(jnp.ones((BATCH, 1, HEADS, DIM)), x, x, 0, sliding_window=4)
