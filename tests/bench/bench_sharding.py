"""How bytes, traffic and time grow with context and devices, over simulated devices or real ones.

    python tests/bench/bench_sharding.py [--contexts 2048 8192 32768] [--devices 1 2 4 8] [--repeats 5] [--json]

One decode step of one layer, 8 kv heads of 128 and 32 query heads, one row, K4/V2, kv heads or tokens over the devices.
Bytes are those of the largest share that a device holds; traffic is what all collectives of the compiled program give
to a device; time is the median step, of that on one device. Devices that are simulated share the processors of this
machine: their time says what the partition costs, not what it gains.
"""

import argparse
import json
import os
import re
import statistics
import time

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import sharding
from jaxquant.methods import turboquant

HEADS, KV_HEADS, DIM = 32, 8, 128
WIDTH = {"f32": 4, "bf16": 2, "f16": 2, "u8": 1, "s32": 4}


def measured(kind: str, devices: int, context: int, repeats: int) -> dict[str, float]:
    """Fill a cache and time decode steps."""
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices])
    layout = sharding.Layout(mesh, **{kind: "x"})
    keys, values = turboquant.kv(jax.random.key(0), dim=DIM, bits_k=4, bits_v=2)
    held = sharding.init(layout, keys, values, layers=1, batch=1, kv_heads=KV_HEADS, capacity=context)
    rng = np.random.default_rng(0)
    for start in range(0, context, 2048):
        new = min(2048, context - start)
        k, v = (jnp.asarray(rng.normal(size=(1, new, KV_HEADS, DIM)), jnp.float32) for _ in range(2))
        held = sharding.append(layout, held, 0, k, v)
    q = jnp.asarray(rng.normal(size=(1, HEADS, DIM)), jnp.float32)
    step = jax.jit(lambda q, held: sharding.decode_attention(layout, q, held, 0)).lower(q, held).compile()
    shares: dict[int, int] = {}
    for leaf in jax.tree.leaves(held.stacks):
        for shard in leaf.addressable_shards:
            shares[shard.device.id] = shares.get(shard.device.id, 0) + shard.data.nbytes
    traffic = 0
    for dtype, shape in re.findall(
        r"= (\w+)\[([\d,]*)\]\S* (?:all-gather|all-reduce|collective-permute)(?:-start)?\(", step.as_text()
    ):
        traffic += WIDTH[dtype] * int(np.prod([int(n) for n in shape.split(",") if n]))
    jax.block_until_ready(step(q, held))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(step(q, held))
        times.append(time.perf_counter() - began)
    return {"bytes": max(shares.values()), "traffic": traffic, "seconds": statistics.median(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for kind in ("kv_heads", "tokens"):
        for context in options.contexts:
            for devices in options.devices:
                found = measured(kind, devices, context, options.repeats)
                rows.append({"axis": kind, "context": context, "devices": devices, **found})
    if options.json:
        print(json.dumps({"device": jax.devices()[0].device_kind, "rows": rows}, indent=1))
        return
    print("| over devices | tokens | devices | bytes a device | traffic, bytes | time, of one device |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        alone = next(
            x["seconds"] for x in rows
            if (x["axis"], x["context"], x["devices"]) == (row["axis"], row["context"], min(options.devices))
        )  # fmt: skip
        print(
            f"| {row['axis']} | {row['context']:,} | {row['devices']} | {row['bytes']:,} | {row['traffic']:,} | "
            f"{row['seconds'] / alone:.2f} |"
        )


if __name__ == "__main__":
    main()
