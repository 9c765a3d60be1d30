"""Save a packed cache with Orbax, and restore it on other devices: from one to four, split by rows and heads.

python examples/orbax_cache.py
"""

import os
import tempfile

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import jax
import numpy as np
from jax.sharding import Mesh

from jaxquant import attention, cache, sharding
from jaxquant.interop import orbax
from jaxquant.methods import turboquant


def main() -> None:
    """Fill a cache, move it, and attend over both."""
    keys, values = turboquant.kv(jax.random.key(0), dim=64, bits_k=4, bits_v=2)
    held = cache.init(keys, values, layers=2, batch=2, kv_heads=2, capacity=256, sinks=4, window=32)
    k, v, q = (jax.random.normal(jax.random.key(i), (2, 200, 2 * (1 + i // 3), 64)) for i in (1, 2, 3))
    for layer in range(2):
        held = cache.append(held, layer, k, v)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
    with tempfile.TemporaryDirectory() as folder:
        orbax.save(f"{folder}/cache", held)
        moved = orbax.restore(
            f"{folder}/cache",
            shardings=lambda empty: sharding.shardings(sharding.Layout(mesh, batch="data", kv_heads="model"), empty),
        )
    codes = moved.stacks[0].keys.codes.codes
    print(
        f"codes of the keys: {codes.nbytes:,} bytes, {codes.addressable_shards[0].data.nbytes:,} on each of 4 devices"
    )
    one, four = (attention.decode_attention(q[:, -1], each, 1)[0] for each in (held, moved))
    print(f"attention differs by {np.abs(np.asarray(one) - np.asarray(four)).max():.1e}")
    assert all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(jax.tree.leaves(held), jax.tree.leaves(moved), strict=True)
    )


if __name__ == "__main__":
    main()
