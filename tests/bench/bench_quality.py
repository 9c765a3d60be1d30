"""Perplexity, KL divergence, agreement and pass keys of one model over many settings of its cache, as a table.

python tests/bench/bench_quality.py --model DIR --tokens FILE:held_out --needles FILE:needles [--json]
"""

import argparse
import json
import sys
from pathlib import Path

import jax

from jaxquant import comparison, trial
from jaxquant.methods import turboquant

SETTINGS = [(k, v, sinks, window) for sinks, window in ((0, 0), (4, 128)) for k, v in ((4, 4), (4, 2), (3, 2), (2, 2))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokens")
    parser.add_argument("--needles")
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--needle-rows", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rotation", default="hadamard")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--scale-k")
    parser.add_argument("--scale-v")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    def method(key, *, dim, bits_k, bits_v):
        """Build what caches use, with the scales and rotations of the command line in its place."""
        usual = turboquant.kv(key, dim=dim, bits_k=bits_k, bits_v=bits_v)
        scales = (options.scale_k or usual[0].scale, options.scale_v or usual[1].scale)
        return tuple(
            turboquant.mse(part, dim=dim, bits=bits, rotation=options.rotation, rounds=options.rounds, scale=scale)
            for part, bits, scale in zip(jax.random.split(key), (bits_k, bits_v), scales, strict=True)
        )

    reports = []
    for k, v, sinks, window in SETTINGS:
        chosen = trial.Trial.load(
            options.model, method, bits_k=k, bits_v=v, sinks=sinks, window=window, seed=options.seed
        )
        report = comparison.measure(
            chosen, options.tokens, start=0, rows=options.rows, seq_len=options.seq_len, needle_file=options.needles,
            needle_rows=options.needle_rows, chunk=256, batch=8, progress=lambda *_: None,
        )  # fmt: skip
        reports.append({"bits_k": k, "bits_v": v, "sinks": sinks, "window": window, **report})
        print(f"K{k}/V{v} {sinks} {window}", report["compressed"], file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps(reports, indent=2))
        return
    print(f"baseline perplexity {reports[0]['baseline']['perplexity']:.3f}, "
          f"pass-key tokens {reports[0]['baseline'].get('needle_accuracy', float('nan')):.1%}\n")  # fmt: skip
    print("| keys, values | sinks, window | bytes per token | perplexity | KL, nats | same top token | pass keys |")
    print("|---|---|---|---|---|---|---|")
    for report in reports:
        got = report["compressed"]
        found = f"{got['needle_accuracy']:.1%}" if "needle_accuracy" in got else ""
        print(
            f"| K{report['bits_k']}/V{report['bits_v']} | {report['sinks']}, {report['window']} | "
            f"{got['bytes_per_token']:.1f} | {got['perplexity']:.3f} | {got['kl']:.4f} | {got['top1']:.1%} | {found} |"
        )


if __name__ == "__main__":
    main()
