"""Does the Fisher information know which layers lose most? Predicted beside measured KL divergence, layer by layer.

python tests/bench/bench_fisher.py --model DIR --tokens FILE:held_out [--bits 2 3 4] [--json]

One layer's keys, or values, are coded with TurboQuant at a time. Information and statistics are of rows from
`--calibrate-from` on, the divergence of rows from `--start` on. Beside the information at temperature 1 and at the
temperature that calibration uses, what statistics of attention, the error of keys or values alone, or the trace of the
information alone, would rank.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np

from jaxquant import evaluate, models, token_files
from jaxquant.calibrate import fisher, sensitivity, statistics
from jaxquant.methods import turboquant

TEMPERATURES = (1.0, 3.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokens")
    parser.add_argument("--calibrate-from", type=int, default=100_000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--scored-rows", type=int, default=6)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")

    model = models.load(options.model, dtype="float32")
    dim, layers = model.architecture.dim, model.architecture.layers
    ids = token_files.read(model, options.tokens)
    length = options.seq_len
    text = evaluate.rows(ids, start=options.calibrate_from, count=options.rows, length=length - 1)
    scored = evaluate.rows(ids, start=options.start, count=options.scored_rows, length=length - 1)
    found = statistics.collect(model.decoder, text)
    metrics = {
        f"Fisher information, temperature {t:g}": fisher.collect(jax.random.key(0), model.decoder, text, temperature=t)
        for t in TEMPERATURES
    }
    metrics = {name: (one.keys, one.values) for name, one in metrics.items()}
    metrics["error of the layer's output"] = (found.weighted_queries, found.weighted_outputs)
    identity = np.broadcast_to(np.eye(dim), found.key_moments.shape)
    metrics["error of keys or values"] = (identity, identity)
    reports = []
    for bits in options.bits:
        quantizer = turboquant.mse(jax.random.key(0), dim=dim, bits=bits, scale="preserve", fused=False)
        measured = sensitivity.measured(model.decoder, scored, [quantizer] * layers, [quantizer] * layers)
        guesses = {
            name: np.array([
                [sensitivity.predicted(quantizer, samples[layer], metric[layer])
                 for samples, metric in zip((found.key_samples, found.value_samples), pair, strict=True)]
                for layer in range(layers)
            ])
            for name, pair in metrics.items()
        }  # fmt: skip
        pair = metrics[f"Fisher information, temperature {TEMPERATURES[0]:g}"]
        guesses["trace of the information"] = np.stack([np.trace(x, axis1=2, axis2=3).sum(1) for x in pair], axis=1)
        ranks = {
            name: [spearman(guess[:, half], measured[:, half]) for half in (0, 1)] + [spearman(guess, measured)]
            for name, guess in guesses.items()
        }
        predicted = next(iter(guesses.values()))
        reports.append({"bits": bits, "predicted": predicted.tolist(), "measured": measured.tolist(), "ranks": ranks})
    if options.json:
        print(json.dumps({"device": jax.devices()[0].device_kind, "rows": reports}, indent=2))
        return
    for report in reports:
        print(f"\n{report['bits']} bits\n\n| layer | keys: predicted | measured | values: predicted | measured |")
        print("|---|---|---|---|---|")
        for layer, (guess, truth) in enumerate(zip(report["predicted"], report["measured"], strict=True)):
            print(f"| {layer} | {guess[0]:.2e} | {truth[0]:.2e} | {guess[1]:.2e} | {truth[1]:.2e} |")
        print("\n| rank correlation with the measured loss (Spearman) | keys | values | both |\n|---|---|---|---|")
        for name, (keys, values, both) in report["ranks"].items():
            print(f"| {name} | {keys:.2f} | {values:.2f} | {both:.2f} |")


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Correlate ranks."""
    ranks = [np.argsort(np.argsort(x.reshape(-1))) for x in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


if __name__ == "__main__":
    main()
