"""Move a live cache to another process over a socket, and continue there with the same tokens.

python examples/migrate_cache.py
"""

import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxquant import models
from jaxquant.cache import KVCache
from jaxquant.interop import migration
from jaxquant.methods import turboquant

STEPS = 12


def continued(held: KVCache, token: int) -> list[int]:
    """Choose the most probable token, `STEPS` times."""
    graph, state = nnx.split(models.load().decoder)
    step = jax.jit(lambda held, ids: nnx.merge(graph, state)(ids, held))
    tokens = [token]
    for _ in range(STEPS):
        logits, held = step(held, jnp.full((1, 1), tokens[-1], jnp.int32))
        tokens.append(int(np.asarray(logits).argmax()))
    return tokens


def there(port: int) -> None:
    """Take the cache, continue, and send the tokens back."""
    with socket.create_connection(("127.0.0.1", port)) as connection, connection.makefile("rwb") as stream:
        arrived = migration.receive(stream)
        tokens = continued(arrived.cache, int(arrived.metadata["token"]))
        stream.write(" ".join(map(str, tokens)).encode() + b"\n")


def here() -> None:
    """Read a prompt, send the cache, continue here too, and compare."""
    model = models.load()
    keys, values = turboquant.kv(jax.random.key(0), dim=model.architecture.dim, bits_k=4, bits_v=2)
    held = model.decoder.init_cache(keys, values, batch=1, capacity=128, sinks=4, window=32)
    prompt = model.tokenizer.encode("import numpy as np\n\n\ndef main(")
    logits, filled = model.decoder(jnp.asarray(prompt)[None], held)
    assert isinstance(filled, KVCache)
    token = int(np.asarray(logits)[0, -1].argmax())
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = subprocess.Popen([sys.executable, __file__, str(server.getsockname()[1])])
        connection, _ = server.accept()
        with connection, connection.makefile("rwb") as stream:
            sent = migration.send(stream, filled, metadata={"token": str(token)})
            theirs = [int(word) for word in stream.readline().split()]
        assert process.wait() == 0
    ours = continued(filled, token)
    print(f"{len(prompt)} tokens sent in {sent:,} bytes; the other process went on with")
    print(model.tokenizer.decode(theirs))
    assert theirs == ours, (theirs, ours)


if __name__ == "__main__":
    there(int(sys.argv[1])) if len(sys.argv) > 1 else here()
