"""Calibrated caches beside TurboQuant at equal bytes: perplexity on two texts, KL divergence, agreement and pass keys.

python tests/bench/bench_calibration.py --model DIR --tokens FILE:held_out --other FILE:wikitext2_test \
    --needles FILE:needles [--json]

Calibrates on `--rows` rows of `--tokens` from `--calibrate-from` on, half of them with pass keys that the library hides
itself, and scores rows from `--start` on, which must not overlap. Bits are of everything that is held: codes, gains,
scales, sinks and window.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

from jaxquant import models, token_files, trial
from jaxquant.calibrate import make
from jaxquant.methods import turboquant

COLUMNS = ("bits", "perplexity", "%", "KL, nats", "same top token", "pass keys", "other text, %", "KL", "top token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokens")
    parser.add_argument("--other")
    parser.add_argument("--needles")
    parser.add_argument("--calibrate-on", help="other text than --tokens")
    parser.add_argument("--calibrate-from", type=int, default=100_000)
    parser.add_argument("--calibration-rows", type=int, default=6)
    parser.add_argument("--calibration-len", type=int, default=4096)
    parser.add_argument("--retrieval", type=float, default=0.5)
    parser.add_argument("--layer-groups", type=int)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--bits", type=float, nargs="*", default=[3.0, 2.5, 2.25, 2.0])
    parser.add_argument("--turboquant", nargs="*", default=["44", "43", "33", "42", "32", "22"], metavar="KV")
    parser.add_argument("--sinks", type=int, default=0)
    parser.add_argument("--window", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--other-rows", type=int, default=6)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--needle-rows", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    model = models.load(options.model)
    dim = model.architecture.dim
    began = time.perf_counter()
    settings = []
    if options.bits:
        source = options.calibrate_on or options.tokens
        measured = make.measure(
            model, token_files.read(model, source),
            start=0 if options.calibrate_on else options.calibrate_from, rows=options.calibration_rows,
            seq_len=options.calibration_len, retrieval=options.retrieval, seed=options.seed,
            progress=lambda *done: print(*done, f"{time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True),
        )  # fmt: skip
        found = make.candidates(measured)
        print(f"calibrated in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        for bits in options.bits:
            made = make.choose(
                model, measured, found, bits=bits, group=options.group, layer_groups=options.layer_groups
            )
            settings.append((f"calibrated {bits}", made.keys, made.values))
            print(bits, [half.widths for half in (*made.keys, *made.values)], file=sys.stderr, flush=True)
    for k, v in options.turboquant:
        pair = turboquant.kv(jax.random.key(options.seed), dim=dim, bits_k=int(k), bits_v=int(v))
        settings.append((f"TurboQuant K{k}/V{v}", *pair))

    reports = []
    for name, keys, values in settings:
        chosen = trial.Trial(
            model=model, compression=(keys, values), sinks=options.sinks, window=options.window, setting=name
        )
        common = {"seq_len": options.seq_len, "chunk": 256, "batch": 8, "progress": lambda *_: None}
        report = chosen.measure(
            options.tokens, start=options.start, rows=options.rows, needle_file=options.needles,
            needle_rows=options.needle_rows, **common,
        )  # fmt: skip
        report["bits"] = 8 * report["compressed"]["bytes_per_token"] / (2 * dim)
        if options.other:
            report["other"] = chosen.measure(
                options.other, start=0, rows=options.other_rows, needle_file=None, needle_rows=1, **common
            )
        reports.append(report)
        print(name, row(report), file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps(reports, indent=2))
        return
    base = reports[0]["baseline"]
    other = reports[0].get("other", {}).get("baseline", {"perplexity": np.nan})["perplexity"]
    print(
        f"baseline perplexity {base['perplexity']:.3f}, other text {other:.3f}, "
        f"pass keys {base.get('needle_accuracy', np.nan):.1%}; {options.sinks} sinks, window {options.window}\n"
    )
    print("| | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    for report in reports:
        print(f"| {report['setting']} | {row(report)} |")


def row(report: dict) -> str:
    """Format one row of the table."""
    base, got = report["baseline"], report["compressed"]
    cells = [
        f"{report['bits']:.3f}", f"{got['perplexity']:.3f}", f"{got['perplexity'] / base['perplexity'] - 1:+.2%}",
        f"{got['kl']:.4f}", f"{got['top1']:.1%}",
        f"{got['needle_accuracy']:.1%}" if "needle_accuracy" in got else "",
    ]  # fmt: skip
    if "other" in report:
        base, got = report["other"]["baseline"], report["other"]["compressed"]
        cells += [f"{got['perplexity'] / base['perplexity'] - 1:+.2%}", f"{got['kl']:.4f}", f"{got['top1']:.1%}"]
    return " | ".join(cells)


if __name__ == "__main__":
    main()
