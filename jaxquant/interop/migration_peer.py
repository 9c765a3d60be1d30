"""The other process of `migration_trial`: it takes caches over a socket, continues them, and sends them back.

    python -m jaxquant.interop.migration_peer PORT jax|torch DTYPE [FOLDER]

Each message that comes is a cache with the token to continue with and the lengths to report. What goes back is one line
of JSON with the first token as soon as it is there, one with tokens and hashes, and the cache after the last of them.
With torch, the model runs in PyTorch in float32, on `transformers`' own cache held in 16 bits.
"""

import io
import json
import socket
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxquant import _continuation, models
from jaxquant.cache import KVCache
from jaxquant.interop import migration


def main(port: int, kind: str, dtype: str, folder: str | None) -> None:
    """Serve one connection to its end."""
    with socket.create_connection(("127.0.0.1", port)) as connection, connection.makefile("rwb") as stream:
        serve(stream, _jax(folder, dtype) if kind == "jax" else _torch(folder))


Step = Callable[[Any, int], tuple[np.ndarray, Any]]
Engine = tuple[Step, Callable[[KVCache], Any], Callable[[Any, int], KVCache]]
"""Feeds one token; turns a cache that came into a state, and a state of some capacity into a cache that goes."""


def serve(stream: io.BufferedRWPair, engine: Engine) -> None:
    """Continue every cache that comes until the stream ends."""
    step, taken, given = engine
    _line(stream, {"ready": True})
    while stream.peek(1):
        arrived = migration.receive(stream)
        token, lengths = int(arrived.metadata["token"]), json.loads(arrived.metadata["lengths"])
        start = taken(arrived.cache)
        logits, _ = step(start, token)
        _line(stream, {"first": int(logits.argmax())})
        done = _continuation.greedy(step, start, token, lengths)
        _line(stream, {"tokens": done.tokens, "digests": done.digests})
        migration.send(stream, given(done.state, arrived.cache.capacity))


def _jax(folder: str | None, dtype: str) -> Engine:
    model = _continuation.JaxModel(models.load(folder, dtype=dtype).decoder)
    return model.step, lambda cache: cache, lambda cache, capacity: cache


def _torch(folder: str | None) -> Engine:
    from jaxquant.interop import torch_decoder

    model = torch_decoder.TorchModel(folder)
    return model.step, model.take, model.give


def _line(stream: io.BufferedRWPair, record: dict[str, Any]) -> None:
    stream.write(json.dumps(record).encode() + b"\n")
    stream.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] if len(sys.argv) > 4 else None)
