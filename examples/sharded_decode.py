"""Decode over several devices, in one process or in many.

    python examples/sharded_decode.py                                    # four simulated CPU devices
    python examples/sharded_decode.py --processes 2 --process 0 &        # the same over two processes of two devices
    python examples/sharded_decode.py --processes 2 --process 1

On a pod of GPUs or TPUs start one process a host with `--cluster`, which lets JAX find the others. Half of the devices
share the kv heads, and the other half the tokens of each row.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import attention, cache, sharding
from jaxquant.methods import turboquant

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--processes", type=int, default=1)
parser.add_argument("--process", type=int, default=0)
parser.add_argument("--address", default="127.0.0.1:29411", help="of process 0")
parser.add_argument("--cluster", action="store_true", help="use the devices and processes that JAX finds")
arguments = parser.parse_args()

if arguments.cluster:
    jax.distributed.initialize()
else:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4 // arguments.processes)
    if arguments.processes > 1:
        jax.distributed.initialize(arguments.address, arguments.processes, arguments.process)

mesh = jax.make_mesh((2, jax.device_count() // 2), ("heads", "tokens"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
layout = sharding.Layout(mesh, kv_heads="heads", tokens="tokens", page=32)

# fused=False: the same levels on every platform, and no question to the devices before they are connected.
keys, values = turboquant.kv(jax.random.key(0), dim=64, bits_k=4, bits_v=2, fused=False)
sizes: dict[str, Any] = {"layers": 1, "batch": 2, "kv_heads": 4, "capacity": 512}
rng = np.random.default_rng(0)
q, k, v = (rng.normal(size=(2, 300, heads, 64)).astype(np.float32) for heads in (8, 4, 4))


def whole(x: np.ndarray, spec: jax.sharding.PartitionSpec) -> jax.Array:
    """Hand every device its part of an array that all processes have."""
    return jax.make_array_from_callback(x.shape, jax.NamedSharding(mesh, spec), lambda part: x[part])


held = sharding.init(layout, keys, values, **sizes)
step = jax.jit(lambda held, k, v: sharding.append(layout, held, 0, k, v), donate_argnums=0)
held = step(held, whole(k, layout.chunk), whole(v, layout.chunk))
out, _ = sharding.decode_attention(layout, whole(q[:, 0], layout.queries), held, 0, implementation="xla")

alone = cache.append(cache.init(keys, values, **sizes), 0, jnp.asarray(k), jnp.asarray(v), implementation="xla")
wanted, _ = attention.decode_attention(jnp.asarray(q[:, 0]), alone, 0, implementation="xla")
error = max(float(jnp.max(jnp.abs(shard.data - np.asarray(wanted)[shard.index]))) for shard in out.addressable_shards)
codes = held.stacks[0].keys.codes.codes
share = codes.addressable_shards[0].data.nbytes / codes.nbytes
print(
    f"process {jax.process_index()} of {jax.process_count()}: {jax.device_count()} devices, each with {share:.0%} of "
    f"the codes; largest difference to one device {error:.1e}"
)
assert error < 1e-5
