"""Time the fused quantize-and-append on a GPU, as a share of the read bandwidth measured in the same run.

python tests/bench/bench_encode.py [--rows 32] [--tokens 8192]
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant import cache, quantizers
from jaxquant._kernels import cuda_encode
from jaxquant.methods import turboquant


def seconds(loop, *args, repeats: int) -> float:
    """Give the median seconds of one of `repeats` steps of a jitted loop."""
    jax.block_until_ready(loop(*args, repeats))
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(loop(*args, repeats))
        taken.append((time.perf_counter() - start) / repeats)
    return float(np.median(taken))


@functools.partial(jax.jit, static_argnums=1)
def read(x, repeats):
    """Read an array again and again."""
    return lax.fori_loop(0, repeats, lambda i, total: total + jnp.sum(x + total), jnp.float32(0))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=8192)
    args = parser.parse_args()
    big = jnp.ones(1 << 30, jnp.float32)
    bandwidth = big.nbytes / seconds(read, big, repeats=20)
    del big
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: reads {bandwidth / 1e9:.0f} GB/s")
    x = jax.random.normal(jax.random.key(0), (args.rows, args.tokens, 8, 128), jnp.bfloat16)
    slot = jnp.broadcast_to(jnp.arange(args.tokens, dtype=jnp.int32), (args.rows, args.tokens))
    for name, bits_k, bits_v, which in (
        ("K4", 4, 4, 0),
        ("V2", 4, 2, 1),
        ("V4", 4, 4, 1),
        ("K3", 3, 3, 0),
        ("K2", 2, 2, 0),
    ):
        pair = turboquant.kv(jax.random.key(0), dim=128, bits_k=bits_k, bits_v=bits_v, fused=True)
        made = cache.init(*pair, layers=1, batch=args.rows, kv_heads=8, capacity=args.tokens)
        store = (made.stacks[0].keys, made.stacks[0].values)[which]

        def fused(store, x, slot):
            return cuda_encode.encode(store, 0, x, slot)

        def plain(store, x, slot):
            code = store.quantizer.quantize(jnp.swapaxes(x, 1, 2))
            return jax.tree.map(lambda old, new: new[None].astype(old.dtype), store.codes, code)

        # Beside XLA's, a few rows: the borders between codes lie where sums are rounded.
        few, made_few = store.codes.codes[:, :4].size, jax.jit(plain)(store, x[:4], slot[:4])
        made_all = jax.jit(fused)(store, x, slot)
        apart = [
            int(jnp.sum(a[:, :4] != b))
            for a, b in zip(jax.tree.leaves(made_all), jax.tree.leaves(made_few), strict=True)
        ]
        times = []
        for step in (fused, plain):

            @functools.partial(jax.jit, static_argnums=3)
            def loop(codes, x, slot, repeats, step=step, store=store):
                def body(i, codes):
                    held = type(store)(quantizer=store.quantizer, codes=codes, sinks=store.sinks, window=store.window)
                    # Each step depends on the one before.
                    return (
                        step(held, x + codes.scales[0, 0, 0, 0].astype(x.dtype) * 0, slot)
                        if step is plain
                        else step(held, x, slot + (codes.codes[0, 0, 0, 0, 0] >> 8).astype(jnp.int32))
                    )

                return lax.fori_loop(0, repeats, body, codes)

            times.append(seconds(loop, store.codes, x, slot, repeats=10))
        moved = x.nbytes + sum(leaf.nbytes for leaf in jax.tree.leaves(store.codes))
        print(
            f"{name}: {times[0] * 1e3:.4f} ms, {moved / times[0] / bandwidth:.1%} of the read bandwidth; "
            f"XLA {times[1] / times[0]:.2f} times as long; of 4 rows, {apart[0]} of {few} bytes of codes and "
            f"{apart[1]} of {store.codes.scales[:, :4].size} scales differ",
            flush=True,
        )
    assert isinstance(store.quantizer, quantizers.Scalar)


if __name__ == "__main__":
    main()
