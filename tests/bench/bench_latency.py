"""What a short decode attention is made of: the kernels of one call and the gaps between them, beside cuDNN's.

    python tests/bench/bench_latency.py [--rows 1] [--tokens 4096] [--bits K4V4,K2V2]
    ncu --clock-control none -k decode --section ... python tests/bench/bench_latency.py --once [--rows 32]

32 heads, 8 kv heads of 128. Times come from JAX's profiler over a loop of calls, each of which waits for the one
before; `--once` calls each kernel once and leaves profiling to another profiler.
"""

import argparse

import device_profile
import jax
import jax.numpy as jnp
from jax import lax

from jaxquant import _stopwatch, attention, attention_benchmark

CALLS = 64


def main() -> None:
    """Print a profile for each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--bits", default="K4V4,K2V2")
    parser.add_argument("--once", action="store_true", help="for other profilers")
    arguments = parser.parse_args()
    shape = attention_benchmark.Shape(batch=arguments.rows, tokens=arguments.tokens, heads=32, kv_heads=8, dim=128)
    q = jax.random.normal(jax.random.key(1), (arguments.rows, 32, 128), jnp.bfloat16)
    base = jax.random.normal(jax.random.key(0), (2**20,), jnp.bfloat16)
    k = _stopwatch.tiled(base, (arguments.rows, arguments.tokens, 8, 128))

    def packed(q, held):
        return attention.decode_attention(q, held, 0, implementation="cuda")[0]

    def cudnn(q, held):
        return jax.nn.dot_product_attention(q[:, None], *held, implementation="cudnn")[:, 0]

    calls = {"cudnn": (cudnn, (k, k[:, ::-1]))}
    for bits in arguments.bits.split(","):
        calls[bits] = (
            packed,
            attention_benchmark.filled(
                shape, attention_benchmark.scalars(attention_benchmark.widths(bits), shape.dim), layers=1
            ),
        )
    for name, (attend, held) in calls.items():
        if arguments.once:
            jax.block_until_ready(jax.jit(attend)(q, held))
            continue

        def step(q, held, attend=attend):
            return _stopwatch.chained(q, attend(q, held))

        @jax.jit
        def run(q, held, step=step):
            return lax.fori_loop(0, CALLS, lambda _, q: step(q, held), q)

        jax.block_until_ready(run(q, held))
        print(
            f"{name}, {arguments.tokens:,} tokens: {1e6 * _stopwatch.median(step, q, held):.1f} us without the profiler"
        )
        device_profile.profile(lambda run=run, held=held: run(q, held)).show(CALLS)


if __name__ == "__main__":
    main()
