"""Does the Fisher information know which layers lose most? Predicted beside measured KL divergence, layer by layer.

python tests/bench/bench_fisher.py --model DIR --tokens FILE:held_out [--bits 3] [--json]

One layer's keys, or values, are coded with TurboQuant at a time. Information and statistics are of rows from
`--calibrate-from` on, the divergence of rows from `--start` on. Beside it, what the error of keys or values alone, or
the trace of the information alone, would rank.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np

from jaxquant import evaluate, models, token_files
from jaxquant.calibrate import fisher, sensitivity, statistics
from jaxquant.methods import turboquant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokens")
    parser.add_argument("--calibrate-from", type=int, default=100_000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--scored-rows", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    model = models.load(options.model)
    ids = token_files.read(model, options.tokens)
    length = options.seq_len
    text = evaluate.rows(ids, start=options.calibrate_from, count=options.rows, length=length - 1)
    scored = evaluate.rows(ids, start=options.start, count=options.scored_rows, length=length - 1)
    found = statistics.collect(model.decoder, text)
    information = fisher.collect(jax.random.key(0), model.decoder, text)
    quantizer = turboquant.mse(jax.random.key(0), dim=model.architecture.dim, bits=options.bits, scale="preserve")
    each = [quantizer] * model.architecture.layers
    measured = sensitivity.measured(model.decoder, scored, each, each)
    predicted = np.zeros_like(measured)
    for layer in range(model.architecture.layers):
        for half, (samples, metric) in enumerate(
            ((found.key_samples, information.keys), (found.value_samples, information.values))
        ):
            predicted[layer, half] = sensitivity.predicted(quantizer, samples[layer], metric[layer])
    traces = np.stack([np.trace(x, axis1=2, axis2=3).sum(1) for x in (information.keys, information.values)], axis=1)
    energy = [np.trace(x, axis1=2, axis2=3).sum(1) for x in (found.key_moments, found.value_moments)]
    ranks = {
        name: [spearman(guess[:, half], measured[:, half]) for half in (0, 1)] + [spearman(guess, measured)]
        for name, guess in (
            ("Fisher prediction", predicted), ("trace of the information", traces), ("energy", np.stack(energy, axis=1))
        )
    }  # fmt: skip
    if options.json:
        report = {"bits": options.bits, "predicted": predicted.tolist(), "measured": measured.tolist(), "ranks": ranks}
        print(json.dumps(report, indent=2))
        return
    print("| layer | keys: predicted | measured | values: predicted | measured |\n|---|---|---|---|---|")
    for layer, (guess, truth) in enumerate(zip(predicted, measured, strict=True)):
        print(f"| {layer} | {guess[0]:.2e} | {truth[0]:.2e} | {guess[1]:.2e} | {truth[1]:.2e} |")
    print("\n| rank correlation with the measured loss (Spearman) | keys | values | both |\n|---|---|---|---|")
    for name, (keys, values, both) in ranks.items():
        print(f"| {name} | {keys:.2f} | {values:.2f} | {both:.2f} |")


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Correlate ranks."""
    ranks = [np.argsort(np.argsort(x.reshape(-1))) for x in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


if __name__ == "__main__":
    main()
