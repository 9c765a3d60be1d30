"""What one setting of a model's cache saves and costs: the reports behind `jaxquant compare` and `eval`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxquant import evaluate, needles, token_files
from jaxquant.trial import Trial

Progress = Callable[[str, int, int], object]


def compare(
    trial: Trial, prompt: str, *, max_tokens: int, text: Path | None, rows: int, seq_len: int, progress: Progress
) -> dict[str, Any]:
    """Continue a prompt with and without compression, and score held-out text over both caches.

    The baseline holds 16 bits a number. Pass keys are hidden in the same text and asked for.

    Args:
        trial: the model and the setting.
        prompt: text to continue.
        max_tokens: new tokens at most.
        text: file to score; None for the held-out text in the package.
        rows: rows of it to score.
        seq_len: tokens of a row.
        progress: called with a description, what is done and what there is to do.
    """
    generated = {}
    for i, name in enumerate(("baseline", "compressed")):
        progress("generating", i, 2)
        generated[name] = trial.generate(prompt, compressed=bool(i), max_tokens=max_tokens)
    progress("generating", 2, 2)
    words = token_files.text(text)
    ids = np.array(trial.model.tokenizer.encode(words, special=False))
    chosen = evaluate.rows(ids, start=0, count=rows, length=seq_len)
    scored = _score(trial, chosen, "bfloat16", 256, 8, "scoring text", progress)
    hidden = needles.hide(
        np.random.default_rng(0),
        words,
        trial.model.tokenizer,
        count=rows,
        length=seq_len + 1,
        keys=min(100, max(1, seq_len // 128)),
    )
    found = _retrieve(trial, hidden, "bfloat16", 256, 8, progress)
    return _report(trial.setting, scored, found, generated)


def measure(
    trial: Trial,
    tokens: str | None,
    *,
    start: int,
    rows: int,
    seq_len: int,
    needle_file: str | None,
    needle_rows: int,
    chunk: int,
    batch: int,
    progress: Progress,
) -> dict[str, Any]:
    """Score rows of tokens, and rows with pass keys, over a cache of the model's own dtype and the compressed one.

    Args:
        trial: the model and the setting.
        tokens: `FILE[:NAME]` of token ids or text; None for the held-out text in the package.
        start: first token.
        rows: rows to score.
        seq_len: tokens that a row predicts.
        needle_file: `FILE:NAME` of rows with questions, or None.
        needle_rows: rows of it.
        chunk: tokens of a prefill step.
        batch: rows at a time.
        progress: called with a description, what is done and what there is to do.

    Raises:
        ValueError: a file does not hold such rows, or too few tokens.
    """
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    ids = token_files.row(trial.model, tokens)
    chosen = evaluate.rows(ids, start=start, count=rows, length=seq_len)
    scored = _score(trial, chosen, dtype, chunk, batch, "scoring text", progress)
    found = None
    if needle_file is not None:
        hidden = token_files.rows(trial.model, needle_file)[:needle_rows]
        found = _retrieve(trial, hidden, dtype, chunk, batch, progress)
    return _report(trial.setting, scored, found, {"baseline": {}, "compressed": {}})


def _score(
    trial: Trial, tokens: np.ndarray, dtype: str, chunk: int, batch: int, description: str, progress: Progress
) -> tuple[evaluate.Scores, float, float]:
    capacity = tokens.shape[1] - 1
    scores = evaluate.compare(
        trial.model.decoder,
        tokens,
        lambda rows: trial.baseline(rows, capacity, dtype),
        lambda rows: trial.cache(rows, capacity),
        batch=batch,
        chunk=chunk,
        progress=lambda done, total: progress(description, done, total),
    )
    held = trial.baseline(1, capacity, dtype).bytes_per_token, trial.cache(1, capacity).bytes_per_token
    return scores, *held


def _retrieve(
    trial: Trial, rows: np.ndarray, dtype: str, chunk: int, batch: int, progress: Progress
) -> tuple[float, float]:
    marked = needles.answers(rows, trial.model.tokenizer)
    scores, *_ = _score(trial, rows, dtype, chunk, batch, "asking for pass keys", progress)
    return scores.retrieval(marked)


def _report(
    setting: str,
    scored: tuple[evaluate.Scores, float, float],
    found: tuple[float, float] | None,
    generated: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    scores, *held = scored
    perplexities = scores.baseline_perplexity, scores.compressed_perplexity
    report: dict[str, Any] = {"setting": setting, "scored_tokens": scores.kl.size}
    for i, name in enumerate(("baseline", "compressed")):
        report[name] = {**generated[name], "perplexity": perplexities[i], "bytes_per_token": held[i]}
        if found is not None:
            report[name]["needle_accuracy"] = found[i]
    report["compressed"] |= {"kl": float(scores.kl.mean()), "top1": float(scores.agreement.mean())}
    return report
