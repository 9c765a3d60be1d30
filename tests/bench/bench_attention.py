"""Decode attention over codes against the fastest over bfloat16, and what it should reach on an H200.

    python tests/bench/bench_attention.py [--implementation cuda,pallas] [--peers ejkernel] [--json FILE]

What `jaxquant benchmark attention` measures, with the default shapes; further shapes with other heads and dims; and,
on an H200, one line for each target. With `--peers ejkernel`, ejkernel's attention over its own codes stands in the
table too, where it can be imported. Exit status 1 where a target is missed or an error reaches 1e-3.
"""

import argparse
import json
import sys
from pathlib import Path

import jax

from jaxquant import _stopwatch, attention_benchmark

TARGETS = {  # times the fastest bfloat16, for 32 heads, 8 kv heads of 128
    (32, 131_072): {"K4V4": 3.2, "K4V2": 4.0, "K2V2": 5.8, "K3V3": 3.3},
    (8, 32_768): {"K4V4": 2.9, "K4V2": 3.3, "K2V2": 4.6, "K3V3": 2.8},
    (1, 131_072): {"K4V4": 2.4, "K4V2": 2.7, "K2V2": 3.2, "K3V3": 2.2},
    (1, 4_096): {"K4V4": 1.0, "K4V2": 1.0, "K2V2": 1.0, "K3V3": 1.0},
}
BITS = [(4, 4), (4, 2), (2, 2), (3, 3)]
OTHERS = [  # sixteen queries a kv head; small and large vectors
    {"heads": 128, "kv_heads": 8, "dim": 128},
    {"heads": 32, "kv_heads": 8, "dim": 64},
    {"heads": 16, "kv_heads": 4, "dim": 256},
]


def main() -> int:
    """Print a line for each measurement and for each target."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--implementation", default="xla", help="names with commas")
    parser.add_argument("--json", type=Path, help="file for everything measured")
    parser.add_argument("--plot", type=Path, help="file for a chart of the default shapes")
    parser.add_argument("--peers", choices=["ejkernel"], help="attention over codes by others")
    parser.add_argument("--quick", action="store_true", help="the default shapes only")
    arguments = parser.parse_args()
    names = arguments.implementation.split(",")
    device = jax.devices()[0].device_kind
    bandwidth = _stopwatch.read_bandwidth()
    print(f"{device}, jax {jax.__version__}: reads {bandwidth / 1e9:,.0f} GB/s", flush=True)

    rows = []
    pair = [(8, 32_768)] if jax.default_backend() == "gpu" else [(1, 1_024)]
    shapes = attention_benchmark.shapes()
    for kind in [] if arguments.quick else OTHERS:
        shapes += attention_benchmark.shapes(pair, **kind)
    for shape in shapes:
        print(f"\n{shape}")
        ejkernel = arguments.peers == "ejkernel"
        for row in attention_benchmark.measure(shape, BITS, names, bandwidth, ejkernel=ejkernel):
            rows.append(row | {"heads": shape.heads, "kv_heads": shape.kv_heads, "dim": shape.dim})
            print(f"{row['bits']:<6}{row['implementation']:<16}", end="")
            if "failed" in row:
                print(row["failed"], flush=True)
                continue
            print(f"{row['ms']:>10.4f} ms{row['share']:>8.0%} of bandwidth", end="")
            if "error" in row:
                speedup = f"{row['speedup']:.2f}" if row["speedup"] else "?"
                print(f"{speedup:>8} x the fastest bf16   error {row['error']:.1e}", end="")
            print(flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"device": device, "read_bandwidth": bandwidth, "results": rows}) + "\n")
    standard = [row for row in rows if (row["heads"], row["kv_heads"], row["dim"]) == (32, 8, 128)]
    if arguments.plot is not None:
        attention_benchmark.plot(standard, str(arguments.plot))

    ours = [row for row in standard if not row["implementation"].startswith("ejkernel")]
    missed = [row for row in rows if row["implementation"] in names and row.get("error", 0.0) >= 1e-3]
    if "H200" in device:
        print("\nbest implementation against the targets")
        for (batch, tokens), each in TARGETS.items():
            for bits, target in each.items():
                at = [row for row in ours if (row["batch"], row["tokens"], row["bits"]) == (batch, tokens, bits)]
                best = max((row.get("speedup") or 0.0 for row in at), default=0.0)
                verdict = "ok" if best >= target else "MISSED"
                print(f"{batch:>3} x {tokens:<8,} {bits}: {best:5.2f} of {target:.1f} {verdict}")
                missed += [bits] if best < target else []
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
