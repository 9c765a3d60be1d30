"""Caches over pipes and sockets: the same bits in another process, and streams that lie, end early or never end."""

import importlib.util
import io
import json
import os
import socket
import struct
import threading
from typing import Any

import jax
import jax.numpy as jnp
import model_folders
import numpy as np
import pytest
from typer.testing import CliRunner

from jaxquant import _continuation, attention, cache, cli, models, quantizers
from jaxquant.cache import KVCache
from jaxquant.codecs import v3
from jaxquant.codecs.errors import CodecError, CorruptError, LimitError, UnsupportedError
from jaxquant.codecs.limits import Limits
from jaxquant.interop import migration, migration_peer, migration_trial
from jaxquant.methods import turboquant

DIM, KV_HEADS, LAYERS = 16, 2, 2


def filled(*, exact=False, new=20, batch=2, capacity=32) -> KVCache:
    whole = quantizers.Exact(dim=DIM)
    keys, values = (whole, whole) if exact else turboquant.kv(jax.random.key(0), dim=DIM, bits_k=4, bits_v=2)
    kept = {} if exact else {"sinks": 2, "window": 5}
    held = cache.init(keys, values, layers=LAYERS, batch=batch, kv_heads=KV_HEADS, capacity=capacity, **kept)
    rng = np.random.default_rng(0)
    for layer in range(LAYERS):
        k, v = (jnp.asarray(rng.normal(size=(batch, new, KV_HEADS, DIM)), jnp.float32) for _ in range(2))
        held = cache.append(held, layer, k, v)
    return held


def message(held: KVCache, **kwargs) -> bytes:
    stream = io.BytesIO()
    sent = migration.send(stream, held, **kwargs)
    assert sent == len(stream.getvalue())
    return stream.getvalue()


def identical(a: KVCache, b: KVCache) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs
    )


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("profile", ["fast", "balanced", "small"])
def test_what_arrives_is_what_was_sent(exact, profile):
    held = filled(exact=exact)
    arrived = migration.receive(io.BytesIO(message(held, profile=profile, metadata={"token": "7"})))
    assert identical(arrived.cache, held)
    assert arrived.metadata == {"token": "7"}
    assert not identical(arrived.cache, filled(exact=exact, new=19))


def test_numbers_of_16_bits_keep_nan_and_signed_zero():
    held = filled(exact=True)
    bits = np.array(held.stacks[0].keys.codes.codes)
    bits[0, 0, 0, :4, 0] = [0x7FA5, 0xFFFF, 0x8000, 0x7F80]
    store = held.stacks[0].keys
    odd = cache.KVCache(
        stacks=(type(held.stacks[0])(keys=type(store)(
            quantizer=store.quantizer, codes=quantizers.Quantized(codes=jnp.asarray(bits)), sinks=store.sinks,
            window=store.window), values=held.stacks[0].values),),
        length=held.length, exact_from=held.exact_from, places=held.places,
    )  # fmt: skip
    assert identical(migration.receive(io.BytesIO(message(odd))).cache, odd)


def test_messages_follow_each_other_through_a_pipe():
    """A pipe holds less than a message: sender and receiver run at the same time, and reads come up short."""
    first, second = filled(), filled(exact=True, new=30)
    end, start = os.pipe()

    def sender():
        with open(start, "wb", buffering=0) as stream:
            for held in (first, second):
                migration.send(stream, held)

    thread = threading.Thread(target=sender)
    thread.start()
    with open(end, "rb", buffering=0) as stream:
        found = [migration.receive(stream).cache for _ in range(2)]
        thread.join()
        with pytest.raises(CorruptError, match="ends 5 bytes early"):
            migration.receive(stream)
    assert identical(found[0], first)
    assert identical(found[1], second)


class Trickle(io.BytesIO):
    """Takes few bytes at a time, as sockets and pipes without a buffer may."""

    def write(self, data, /):
        return super().write(bytes(data[:100]))


def test_a_stream_that_takes_few_bytes_at_a_time_gets_all_of_them():
    stream = Trickle()
    sent = migration.send(stream, filled())
    assert stream.getvalue() == message(filled())
    assert sent == len(stream.getvalue()) > 1000


def test_large_tensors_travel_in_several_frames(monkeypatch):
    monkeypatch.setattr(migration, "_FULL", 100)
    monkeypatch.setattr(migration, "_MOST", 64)
    data = message(filled())
    assert struct.unpack_from("<I", data, 5) == (64,)
    assert identical(migration.receive(io.BytesIO(data)).cache, filled())


def test_streams_that_end_early_or_are_damaged_are_refused():
    data = message(filled())
    for cut in [0, 3, 5, 7, *range(9, len(data), 211), len(data) - 1]:
        with pytest.raises(CorruptError):
            migration.receive(io.BytesIO(data[:cut]))
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(data), 60):
        damaged = bytearray(data)
        damaged[place] ^= 1 << rng.integers(8)
        with pytest.raises(CodecError):
            migration.receive(io.BytesIO(bytes(damaged)))


class Endless:
    """A sender that never stops, and counts what was read."""

    def __init__(self, start: bytes, length: int):
        self.start, self.length, self.asked = start, length, 0

    def read(self, size: int, /) -> bytes:
        self.asked += size
        if self.start:
            part, self.start = self.start[:size], self.start[size:]
            return part
        return struct.pack("<I", self.length)[:size] if size == 4 else bytes(size)


def test_what_is_promised_is_not_allocated():
    endless = Endless(migration.MAGIC, 1 << 16)
    with pytest.raises(LimitError, match="encoded bytes, limit 1000000"):
        migration.receive(endless, limits=Limits(encoded_bytes=1_000_000))
    assert endless.asked < 1_100_000
    liar = Endless(migration.MAGIC, (1 << 32) - 1)
    with pytest.raises(CorruptError, match="a frame of 4294967295 bytes"):
        migration.receive(liar)
    assert liar.asked < 100
    with pytest.raises(UnsupportedError, match="not with a cache"):
        migration.receive(io.BytesIO(b"GET / HTTP/1.1"))
    with pytest.raises(LimitError, match="exceed the limit of 1000"):
        migration.receive(io.BytesIO(message(filled())), limits=Limits(decoded_bytes=1000))
    other = v3.encode(np.zeros(3))
    with pytest.raises(UnsupportedError, match="no snapshot"):
        migration.receive(io.BytesIO(migration.MAGIC + struct.pack("<I", len(other)) + other + bytes(4)))


PROMPT = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folders.write_folder(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def ours(folder):
    return _continuation.JaxModel(models.load(folder).decoder)


def prompt() -> np.ndarray:
    return np.random.default_rng(0).integers(4, 40, PROMPT)


def started(ours, bits_v=2):
    keys, values = turboquant.kv(jax.random.key(0), dim=DIM, bits_k=4, bits_v=bits_v)
    sizes = {"layers": LAYERS, "batch": 1, "kv_heads": KV_HEADS, "capacity": 64}
    return ours.prefill(cache.init(keys, values, **sizes, window=4), prompt())


def between(ours, engine):
    """Migrate to a thread instead of a process, where a fault can be planted."""
    near, far = socket.socketpair()

    def serve():
        with far, far.makefile("rwb") as stream:
            migration_peer.serve(stream, engine)

    thread = threading.Thread(target=serve)
    thread.start()
    with near, near.makefile("rwb") as stream:
        report = migration_trial._between_alike(ours, migration_trial.Peer(stream), *started(ours), (2, 4))
        near.shutdown(socket.SHUT_WR)
    thread.join()
    return report


CHECKS = ("same_tokens", "same_logits", "same_tokens_back", "same_logits_back")


def test_faults_in_a_migration_are_seen(ours):
    def keep(held, capacity=0):
        return held

    report = between(ours, (ours.step, keep, keep))
    assert all(all(report[check].values()) for check in CHECKS)

    def swapped(held, capacity=0):
        stack = held.stacks[0]
        sink = jnp.flip(held.stacks[0].values.window, axis=3)
        values = type(stack.values)(
            quantizer=stack.values.quantizer, codes=stack.values.codes, sinks=stack.values.sinks, window=sink
        )
        stacks = (type(stack)(keys=stack.keys, values=values),)
        return cache.KVCache(stacks=stacks, length=held.length, exact_from=held.exact_from, places=held.places)

    there = between(ours, (ours.step, swapped, keep))
    assert not any(there["same_logits"].values())
    back = between(ours, (ours.step, keep, swapped))
    assert all(back["same_logits"].values())
    assert not any(back["same_logits_back"].values())
    shorter = between(ours, (ours.step, lambda held: cache.crop(held, PROMPT - 1), keep))
    assert not any(shorter["same_logits"].values())


def layers_of(held: Any) -> Any:
    return held.layers


TORCH = importlib.util.find_spec("torch") is not None and importlib.util.find_spec("transformers") is not None


def test_two_processes_agree_and_the_command_says_so(folder, tmp_path):
    """With PyTorch too, where it is installed."""
    np.save(tmp_path / "ids.npy", prompt())
    source = ["--model", str(folder), "--tokens", str(tmp_path / "ids.npy")]
    arguments = ["migrate", *source, "--prompt-tokens", "40", "--length", "3", "--length", "5", "--json"]
    result = CliRunner().invoke(cli.app, [*arguments, "--torch" if TORCH else "--no-torch"])
    if result.exception is not None:
        raise result.exception
    report = json.loads(result.stdout)
    names = {"JAX to JAX, 16 bit", "JAX to JAX, K4/V4", "JAX to JAX, K4/V2"}
    names |= {"PyTorch to JAX, 16 bit", "JAX to PyTorch, 16 bit"} if TORCH else set()
    assert report["migrations"].keys() == names
    for name, row in report["migrations"].items():
        assert all(same for check in CHECKS for same in row.get(check, {}).values()), (name, row)
        assert ("same_logits_back" in row) == ("to JAX" in name)
    assert report["raw_bytes"] == 2 * LAYERS * KV_HEADS * PROMPT * DIM * 2
    packed = [report["transferred"][f"packed {bits}, whole message"] for bits in ("K4/V2", "K4/V4")]
    assert packed[0] < packed[1]


def test_the_command_refuses_what_does_not_fit():
    for arguments, match in (
        (["--length", "0"], "--length must be at least 1"),
        (["--prompt-tokens", "100000000"], "one row of 100000000 token ids"),
        (["--prompt-tokens", "9000"], "positions"),
    ):
        result = CliRunner().invoke(cli.app, ["migrate", *arguments])
        assert isinstance(result.exception, ValueError)
        assert match in str(result.exception)


class TestTorch:
    """Uncompressed caches of transformers, where it is installed."""

    @pytest.fixture(autouse=True)
    def _torch(self):
        pytest.importorskip("torch")
        pytest.importorskip("transformers")

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_bits_survive_the_way_there_and_back(self, dtype):
        import torch
        from transformers import DynamicCache

        from jaxquant.interop import dynamic_cache

        old, kind = DynamicCache(), getattr(torch, dtype)
        generator = torch.Generator().manual_seed(0)
        for layer in range(LAYERS):
            old.update(*(torch.randn(2, KV_HEADS, 7, DIM, generator=generator).to(kind) for _ in range(2)), layer)
        held = dynamic_cache.from_transformers(old, capacity=9)
        assert held.length.tolist() == [[7, 7]] * LAYERS
        new, mask = dynamic_cache.to_transformers(held, dtype=kind)
        assert mask.all()
        for mine, theirs in zip(layers_of(old), layers_of(new), strict=True):
            assert torch.equal(mine.keys, theirs.keys)
            assert torch.equal(mine.values, theirs.values)
            assert not torch.equal(mine.keys, theirs.values)
        arrived = migration.receive(io.BytesIO(message(held))).cache
        assert identical(arrived, held)

    def test_padding_is_left_out_and_put_back_on_the_left(self):
        import torch
        from transformers import DynamicCache

        from jaxquant.interop import dynamic_cache

        old = DynamicCache()
        old.update(*(torch.randn(2, KV_HEADS, 6, DIM) for _ in range(2)), 0)
        mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
        held = dynamic_cache.from_transformers(old, capacity=8, mask=mask)
        assert held.length.tolist() == [[6, 4]]
        q = jnp.ones((2, KV_HEADS, DIM))
        out, _ = attention.decode_attention(q, held, 0)
        k, v = (x[1, :, 2:].numpy() for x in (layers_of(old)[0].keys, layers_of(old)[0].values))
        weights = np.exp(k.sum(-1) * DIM**-0.5)
        expected = np.einsum("ht,htd->hd", weights / weights.sum(-1, keepdims=True), v)
        np.testing.assert_allclose(out[1], expected, rtol=0, atol=1e-5)
        new, back = dynamic_cache.to_transformers(held, dtype=torch.float32)
        assert torch.equal(back, mask)
        assert torch.equal(layers_of(new)[0].keys[1, :, 2:], layers_of(old)[0].keys[1, :, 2:])
        assert not layers_of(new)[0].keys[1, :, :2].any()

    def test_what_cannot_be_copied_is_refused(self):
        import torch
        from transformers import DynamicCache

        from jaxquant.interop import dynamic_cache

        ragged, whole = DynamicCache(), DynamicCache()
        for layer in range(2):
            ragged.update(*(torch.ones(1, 1, 3 + layer, DIM) for _ in range(2)), layer)
        whole.update(*(torch.ones(1, 1, 3, DIM) for _ in range(2)), 0)
        for call, match in (
            (lambda: dynamic_cache.from_transformers(DynamicCache(), capacity=4), "must hold tokens"),
            (lambda: dynamic_cache.from_transformers(ragged, capacity=8), "same tokens in every layer"),
            (lambda: dynamic_cache.from_transformers(whole, capacity=2), "at least the cache's 3 tokens"),
            (lambda: dynamic_cache.from_transformers(whole, capacity=4, mask=torch.ones(1, 4)), "mask must be"),
            (lambda: dynamic_cache.from_transformers(whole, capacity=4, dtype=torch.float64), "dtype must be"),
        ):
            with pytest.raises(ValueError, match=match):
                call()
        held = filled(exact=True)
        uneven = cache.append(held, 0, jnp.ones((2, 1, KV_HEADS, DIM)), jnp.ones((2, 1, KV_HEADS, DIM)))
        with pytest.raises(ValueError, match="same tokens in every layer"):
            dynamic_cache.to_transformers(uneven, dtype=torch.float32)
