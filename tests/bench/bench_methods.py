"""Every method at 2, 3 and 4 bits on one model, as a table: perplexity, KL, top-1, pass keys, bytes, cost.

python tests/bench/bench_methods.py --model DIR --tokens FILE:NAME --out rows.json [--json]

Methods are found in jaxquant/methods and in the modules of --also. Rows that --out already has are not measured again,
so an interrupted run goes on where it stopped. Text, pass keys and calibration come from different parts of --tokens.

"KL at these bytes" divides a row's KL by that of TurboQuant at as many bytes per token, between whose rows log KL is
linear in bytes: below 1 is better than TurboQuant, and methods whose side information differs in size can be compared.
Encode and decode are floating-point operations a coordinate, as XLA counts them; --json has times beside them, as
multiples of one product with a dim x dim matrix, which need an idle machine.
"""

import argparse
import importlib
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxquant import benchmark, catalogue, evaluate, models, needles, token_files, trial
from jaxquant.calibrate import statistics
from jaxquant.pipeline import Pipeline

ANCHOR = "turboquant"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokens")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--rows", type=int, default=2, help="rows of text, and as many with pass keys")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--keys", type=int, default=8, help="pass keys of a row")
    parser.add_argument("--calibration-rows", type=int, default=4)
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--also", nargs="+", default=[], help="modules outside of jaxquant.methods")
    parser.add_argument("--out", type=Path, help="file of rows, read first and written after each row")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    model = models.load(options.model)
    held = Text(model, options)
    done = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    work = settings(options)
    for i, (name, builder, bits) in enumerate(work):
        label = f"{name}, {bits} bits, {held.name}"
        if label not in done:
            start = time.perf_counter()
            try:
                done[label] = {"method": name, "bits": bits, **held.measure(builder, bits)}
            except ValueError as error:
                done[label] = {"method": name, "bits": bits, "refused": str(error)}
            done[label]["seconds"] = round(time.perf_counter() - start, 1)
            if options.out:
                options.out.write_text(json.dumps(done, indent=1))
        print(f"[{i + 1}/{len(work)}] {label}: {brief(done[label])}", file=sys.stderr, flush=True)
    rows = []
    for name, builder, bits in work:
        row = done[f"{name}, {bits} bits, {held.name}"]
        if "kl" in row:
            counted = catalogue.cost(builder, dim=model.architecture.dim, bits=bits)
            row |= {"encode_operations": counted.encode, "decode_operations": counted.decode}
        rows.append(row)
    compare(rows)
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        print(table(rows, held.name))


def settings(options: argparse.Namespace) -> list[tuple[str, Callable[..., Any], int]]:
    """List names, builders and bits; TurboQuant's first, and its 1 bit too, since others are compared with it."""
    found = dict(catalogue.entries())
    for name in options.also:
        found[name] = catalogue.read(name, importlib.import_module(name))
    chosen = {
        f"{name}, {variant}" if variant else name: builder
        for name, entry in found.items()
        if options.methods is None or name in {ANCHOR, *options.methods}
        for variant, builder in entry.builders.items()
    }
    names = sorted(chosen, key=lambda name: (name != ANCHOR, name))
    return [(ANCHOR, chosen[ANCHOR], 1), *((name, chosen[name], bits) for name in names for bits in options.bits)]


class Text:
    """Rows of text and of pass keys, and what of a model has to be measured once."""

    def __init__(self, model: models.Model, options: argparse.Namespace) -> None:
        self.model, self.rows, length = model, options.rows, options.seq_len
        self.name = "built-in model" if options.model is None else options.model.name
        ids = token_files.read(model, options.tokens)
        plain = evaluate.rows(ids, start=0, count=options.rows, length=length)
        words = model.tokenizer.decode(ids[plain.size : plain.size + 3 * plain.size].tolist())
        asking = needles.hide(
            np.random.default_rng(0), words, model.tokenizer, count=options.rows, length=length + 1, keys=options.keys
        )
        self.tokens = np.concatenate([plain, asking])
        self.answers = needles.answers(asking, model.tokenizer)
        count = options.calibration_rows
        calibration = evaluate.rows(ids, start=len(ids) - count * length, count=count, length=length - 1)
        self.measured = statistics.collect(model.decoder, calibration, samples=1024)

    def measure(self, builder: Callable[..., Any], bits: int) -> dict[str, Any]:
        """Measure one row of the table."""
        model, capacity = self.model, self.tokens.shape[1] - 1
        built = trial.build(model, builder, jax.random.key(0), bits_k=bits, bits_v=bits, measured=self.measured)
        chosen = trial.Trial(model=model, compression=built, sinks=0, window=0, setting="")
        found = evaluate.compare(
            model.decoder,
            self.tokens,
            lambda rows: chosen.baseline(rows, capacity, "float32"),
            lambda rows: chosen.cache(rows, capacity),
            stepwise=0,
        )
        text = found.kl[: self.rows]
        nll = found.baseline_nll[: self.rows], found.compressed_nll[: self.rows]
        hits = found.baseline_hit[self.rows :][self.answers], found.compressed_hit[self.rows :][self.answers]
        encode, decode = cost(built, model)
        return {
            "bytes_per_token": chosen.cache(1, capacity).bytes_per_token,
            "baseline_perplexity": float(np.exp(nll[0].mean(dtype=np.float64))),
            "perplexity": float(np.exp(nll[1].mean(dtype=np.float64))),
            "kl": float(text.mean()),
            "top1": float(found.agreement[: self.rows].mean()),
            "baseline_pass_keys": float(hits[0].mean()),
            "pass_keys": float(hits[1].mean()),
            "answers": int(self.answers.sum()),
            "encode_time": encode,
            "decode_time": decode,
        }


def cost(built: Any, model: models.Model) -> tuple[float, float]:
    """Time coding and decoding of keys and of values, as multiples of one product with a dim x dim matrix."""
    pair = (built.keys, built.values) if isinstance(built, Pipeline) else built
    a = model.architecture
    x = jax.random.normal(jax.random.key(1), (1, a.kv_heads, 4096, a.dim))
    times = []
    for half in pair:
        quantizer = half[0] if isinstance(half, tuple) else half
        speed = benchmark.speed(quantizer, x)
        times.append((speed.quantize_ratio, speed.dequantize_ratio))
    encode, decode = np.mean(times, axis=0)
    return float(encode), float(decode)


def compare(rows: list[dict[str, Any]]) -> None:
    """Add each row's KL as a multiple of TurboQuant's at the same bytes."""
    anchors = sorted((row["bytes_per_token"], math.log(row["kl"])) for row in rows if row["method"] == ANCHOR)
    sizes, logs = np.array(anchors).T
    for row in rows:
        if "kl" not in row:
            continue
        place = int(np.clip(np.searchsorted(sizes, row["bytes_per_token"]) - 1, 0, len(sizes) - 2))
        slope = (logs[place + 1] - logs[place]) / (sizes[place + 1] - sizes[place])
        usual = logs[place] + slope * (row["bytes_per_token"] - sizes[place])
        row["kl_ratio"] = row["kl"] / math.exp(usual)


def brief(row: dict[str, Any]) -> str:
    if "refused" in row:
        return row["refused"]
    return f"{row['bytes_per_token']:.1f} bytes, perplexity {row['perplexity']:.3f}, KL {row['kl']:.4f}"


def table(rows: list[dict[str, Any]], name: str) -> str:
    measured = [row for row in rows if "kl" in row]
    first = measured[0]
    lines = [
        f"{name}: perplexity {first['baseline_perplexity']:.3f} and {first['baseline_pass_keys']:.1%} of "
        f"{first['answers']} pass-key tokens without compression.",
        "",
        "| bits | method | bytes per token | perplexity | KL, nats | KL at these bytes | same top token | pass keys | "
        "encode | decode |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(measured, key=lambda row: (row["bits"], row["kl_ratio"])):
        lines.append(
            f"| {row['bits']} | {row['method']} | {row['bytes_per_token']:.1f} | {row['perplexity']:.3f} | "
            f"{row['kl']:.4f} | {row['kl_ratio']:.2f} | {row['top1']:.1%} | {row['pass_keys']:.1%} | "
            f"{row['encode_operations']:.0f} | {row['decode_operations']:.0f} |"
        )
    refused = sorted({row["method"] for row in rows if "refused" in row})
    if refused:
        lines += ["", f"Not at these bits: {', '.join(refused)}."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
