"""Move a cache to another process and back, and report what that costs and whether anything changed.

This process reads a prompt and continues it. It sends the cache to a second process over a socket on loopback, which
continues from there, and its cache comes back and is continued here. Nothing may differ: not a token, and between like
frameworks not a bit of any logit.
"""

import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import zstandard
from jaxtyping import Int

from jaxquant import _continuation, models, quantizers
from jaxquant.cache import KVCache
from jaxquant.codecs import qatc
from jaxquant.interop import migration
from jaxquant.methods import turboquant

Progress = Callable[[str, int, int], object]
LENGTHS = (16, 32, 64, 128)
_WAIT = 600.0  # seconds for the other process to answer


class Peer:
    """The other process."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._line("ready")

    def continued(self, cache: KVCache, token: int, lengths: Sequence[int]) -> tuple[dict[str, Any], KVCache]:
        """Send a cache; return what the other process says, and the cache that comes back."""
        began = time.perf_counter()
        sent = migration.send(self._stream, cache, metadata={"token": str(token), "lengths": json.dumps(lengths)})
        first = self._line("first")
        seconds = time.perf_counter() - began
        record = json.loads(self._stream.readline())
        record |= {"bytes": sent, "first": first, "first_token_seconds": seconds}
        return record, migration.receive(self._stream).cache

    def _line(self, key: str) -> Any:
        line = self._stream.readline()
        if not line:
            raise RuntimeError("the other process ended; what it wrote to stderr says why")
        return json.loads(line)[key]


@contextmanager
def peer(kind: str, dtype: str, folder: Path | None) -> Iterator[Peer]:
    """Start the other process, "jax" or "torch", and connect to it on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(_WAIT)
        command = [sys.executable, "-m", "jaxquant.interop.migration_peer", str(server.getsockname()[1]), kind, dtype]
        environment = {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # both may share a GPU
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        process = subprocess.Popen([*command, *([str(folder)] if folder else [])], env=environment)
        try:
            connection, _ = server.accept()
            connection.settimeout(_WAIT)
            with connection, connection.makefile("rwb") as stream:
                yield Peer(stream)
        finally:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def measure(
    folder: Path | None,
    ids: Int[np.ndarray, " tokens"],
    *,
    bits: Sequence[tuple[int, int]] = ((4, 4), (4, 2)),
    lengths: Sequence[int] = LENGTHS,
    torch: bool | None = None,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Migrate caches of one prompt in every form, and compare.

    Args:
        folder: of the model; None for the one in the package.
        ids: the prompt.
        bits: of keys and values, for each packed cache.
        lengths: of the continuations that are compared.
        torch: whether PyTorch takes part, and the model runs in float32 everywhere; None asks whether it is installed.
        progress: called with a description, what is done and what there is to do.

    Returns:
        `raw_bytes` (keys and values in 16 bits), `transferred` (form to bytes), `migrations` (what was compared, by
        form), `prefill_seconds` and the setting.

    Raises:
        ValueError: the prompt is empty, or too long for the model.
    """
    torch = importlib.util.find_spec("transformers") is not None if torch is None else torch
    model = models.load(folder, dtype="float32" if torch else None)
    dtype = model.decoder.embed_tokens.embedding[...].dtype.name
    longest = len(ids) + 2 * max(lengths) + 2
    if not len(ids) or longest > model.architecture.max_positions:
        most = model.architecture.max_positions
        raise ValueError(f"the prompt must have at least 1 token and need {longest} of at most {most} positions")
    ours = _continuation.JaxModel(model.decoder)
    a = model.architecture

    def empty(keys: quantizers.Quantizer, values: quantizers.Quantizer) -> KVCache:
        return model.decoder.init_cache(keys, values, batch=1, capacity=-(-longest // 64) * 64)

    exact = quantizers.Exact(dim=a.dim)
    forms = {"16 bit": empty(exact, exact)}
    for bits_k, bits_v in bits:
        keys, values = turboquant.kv(jax.random.key(0), dim=a.dim, bits_k=bits_k, bits_v=bits_v)
        forms[f"K{bits_k}/V{bits_v}"] = empty(keys, values)
    report: dict[str, Any] = {
        "prompt_tokens": len(ids),
        "layers": a.layers,
        "kv_heads": a.kv_heads,
        "dim": a.dim,
        "dtype": dtype,
        "device": jax.devices()[0].device_kind,
        "migrations": {},
    }
    started: dict[str, tuple[int, KVCache]] = {}
    for form, cache in forms.items():
        started[form] = ours.prefill(cache, ids)
    began = time.perf_counter()
    ours.prefill(forms["16 bit"], ids)
    report["prefill_seconds"] = time.perf_counter() - began
    steps = len(forms) + 2 * torch
    with peer("jax", dtype, folder) as other:
        for done, form in enumerate(forms):
            progress("migrating", done, steps)
            report["migrations"][f"JAX to JAX, {form}"] = _between_alike(ours, other, *started[form], lengths)
        if torch:
            progress("migrating", len(forms), steps)
            report["migrations"]["PyTorch to JAX, 16 bit"] = _from_torch(other, folder, ids, lengths, longest)
    if torch:
        with peer("torch", dtype, folder) as other:
            progress("migrating", steps - 1, steps)
            report["migrations"]["JAX to PyTorch, 16 bit"] = _to_torch(ours, other, *started["16 bit"], lengths)
    progress("migrating", steps, steps)
    sent = {form: report["migrations"][f"JAX to JAX, {form}"]["bytes"] for form in forms}
    return report | transferred(started["16 bit"][1], sent)


def _between_alike(
    ours: _continuation.JaxModel, other: Peer, token: int, cache: KVCache, lengths: Sequence[int]
) -> dict[str, Any]:
    """Continue a cache here, and there, and here again from what comes back: every bit must be the same."""
    other.continued(cache, token, [1])  # compiles there
    record, back = other.continued(cache, token, lengths)
    here = _continuation.greedy(ours.step, cache, token, lengths)
    on = _continuation.greedy(ours.step, here.state, here.tokens[-1], lengths)
    again = _continuation.greedy(ours.step, back, record["tokens"][-1], lengths)
    return {
        "bytes": record["bytes"],
        "first_token_seconds": record["first_token_seconds"],
        "same_tokens": {n: record["tokens"][: n + 1] == here.tokens[: n + 1] for n in lengths},
        "same_logits": {n: record["digests"][str(n)] == here.digests[n] for n in lengths},
        "same_tokens_back": {n: again.tokens[: n + 1] == on.tokens[: n + 1] for n in lengths},
        "same_logits_back": {n: again.digests[n] == on.digests[n] for n in lengths},
    }


def _to_torch(
    ours: _continuation.JaxModel, other: Peer, token: int, cache: KVCache, lengths: Sequence[int]
) -> dict[str, Any]:
    """Continue a cache here and in PyTorch, and here again from what comes back; their sums differ in rounding."""
    other.continued(cache, token, [1])
    record, back = other.continued(cache, token, lengths)
    here = _continuation.greedy(ours.step, cache, token, lengths)
    on = _continuation.greedy(ours.step, here.state, here.tokens[-1], lengths)
    again = _continuation.greedy(ours.step, back, record["tokens"][-1], lengths)
    return {
        "bytes": record["bytes"],
        "first_token_seconds": record["first_token_seconds"],
        "same_tokens": {n: record["tokens"][: n + 1] == here.tokens[: n + 1] for n in lengths},
        "same_tokens_back": {n: again.tokens[: n + 1] == on.tokens[: n + 1] for n in lengths},
    }


def _from_torch(
    other: Peer, folder: Path | None, ids: Int[np.ndarray, " tokens"], lengths: Sequence[int], capacity: int
) -> dict[str, Any]:
    """Continue a cache of PyTorch here, in JAX there, and here again from what JAX was sent: every bit of the last."""
    from jaxquant.interop.torch_decoder import TorchModel

    ours = TorchModel(folder)
    token, cache = ours.prefill(ids)
    here = _continuation.greedy(ours.step, cache, token, lengths)
    other.continued(ours.give(cache, capacity), token, [1])
    record, _ = other.continued(ours.give(cache, capacity), token, lengths)
    _, back = other.continued(ours.give(cache, capacity), token, [0])
    again = _continuation.greedy(ours.step, ours.take(back), token, lengths)
    return {
        "bytes": record["bytes"],
        "first_token_seconds": record["first_token_seconds"],
        "same_tokens": {n: record["tokens"][: n + 1] == here.tokens[: n + 1] for n in lengths},
        "same_logits_back": {n: again.digests[n] == here.digests[n] for n in lengths},
    }


def transferred(cache: KVCache, sent: dict[str, int]) -> dict[str, Any]:
    """Give the bytes of a cache of 16-bit numbers in every form that it could travel in.

    Args:
        cache: that does not compress, in bfloat16.
        sent: bytes of the messages that were really sent, by form.
    """
    tokens = int(cache.length.max())
    tensors = []
    for stack in cache.stacks:
        for store in (stack.keys, stack.values):
            held = np.asarray(store.codes.codes)[:, :, :, :tokens]
            tensors.append(np.ascontiguousarray(held).view(ml_dtypes.bfloat16))
    raw = b"".join(tensor.view(np.uint8).data for tensor in tensors)
    sizes: dict[str, int] = {"raw, 16 bit": len(raw)}
    if importlib.util.find_spec("lz4") is not None:
        lz4 = importlib.import_module("lz4.frame")
        sizes["lz4"] = len(lz4.compress(raw))
    sizes["zstd -3"] = len(zstandard.ZstdCompressor(level=3).compress(raw))
    sizes["QATC v2, as QATQ decodes it"] = sum(len(qatc.encode(tensor.reshape(-1))) for tensor in tensors)
    for profile in ("fast", "balanced", "small"):
        sizes[f"QATC v3 {profile}, whole message"] = migration.send(io.BytesIO(), cache, profile=profile)
    sizes |= {f"packed {form}, whole message": nbytes for form, nbytes in sent.items() if form != "16 bit"}
    return {"raw_bytes": len(raw), "transferred": sizes}
