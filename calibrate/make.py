"""Calibrate a model: measure it on text, fit what its keys and values could be coded with, and spend a budget on it."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from jaxquant.calibrate import bases, files, fisher, fit, statistics, text
from jaxquant.calibrate.files import Calibration
from jaxquant.calibrate.fisher import Fisher
from jaxquant.calibrate.fit import Fitted
from jaxquant.calibrate.statistics import Statistics
from jaxquant.models.loading import Model

Progress = Callable[[str, int, int], object]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """A model's statistics and information over some text."""

    statistics: Statistics
    fisher: Fisher
    text: str


class Candidates(NamedTuple):
    """What keys and values could be coded with."""

    keys: Fitted
    values: Fitted


def silent(description: str, done: int, total: int) -> None:
    """Report nothing."""


def measure(
    model: Model,
    tokens: Int[np.ndarray, " tokens"],
    *,
    start: int = 0,
    rows: int = 6,
    seq_len: int | None = None,
    retrieval: float = 0.5,
    temperature: float = 3.0,
    seed: int = 0,
    progress: Progress = silent,
) -> Measured:
    """Run text through a model.

    Args:
        model: to calibrate.
        tokens: one long text.
        start: first token of it that is used.
        rows: of text.
        seq_len: tokens of a row; None takes the model's context, 4096 at most. Shorter rows do not show what keys lose
            over long distances.
        retrieval: share of the rows in which pass keys are hidden and asked for.
        temperature: of the information; see `fisher.collect`.
        seed: of the pass keys and of the labels.
        progress: called with a description, what is done and what there is to do.

    Raises:
        ValueError: the text is too short, or has a token id that the model does not know.
    """
    if tokens.ndim != 1:
        raise ValueError(f"tokens must be one long row of token ids, got an array of shape {list(tokens.shape)}")
    if tokens.max() >= model.architecture.vocabulary:
        raise ValueError(
            f"token id {tokens.max()} is outside the model's vocabulary of {model.architecture.vocabulary}"
        )
    seq_len = min(4096, model.architecture.max_positions) if seq_len is None else seq_len
    chosen = text.rows(
        np.random.default_rng(seed), tokens, model.tokenizer,
        count=rows, length=seq_len, retrieval=retrieval, start=start,
    )  # fmt: skip
    sums = statistics.collect(
        model.decoder, chosen, batch=1, progress=lambda done, total: progress("statistics", done, total)
    )
    information = fisher.collect(
        jax.random.key(seed),
        model.decoder,
        chosen,
        temperature=temperature,
        progress=lambda done, total: progress("information", done, total),
    )
    words = f"{rows} rows of {seq_len} tokens from {start} on, {retrieval:.0%} of them with pass keys"
    return Measured(statistics=sums, fisher=information, text=words)


def candidates(
    measured: Measured,
    *,
    queries: float = 0.5,
    shrinkage: tuple[float, float] = (0.1, 0.02),
    progress: Progress = silent,
) -> Candidates:
    """Fit bases and codebooks of every width.

    Args:
        measured: statistics and information of a model.
        queries: share of the keys' metric that is E[q q^T], at the strength of the information: every query counts in
            it, also those whose answer is so certain that small errors cost nothing.
        shrinkage: of the metrics of keys and of values; see `bases.shrunk`.
        progress: called with a description, what is done and what there is to do.
    """
    found = measured.statistics
    covariances = {"keys": found.key_covariance, "values": found.value_covariance}
    information = measured.fisher.keys
    scores = bases.like(found.query_moments, information, covariances["keys"])
    metrics = {"keys": (1 - queries) * information + queries * scores, "values": measured.fisher.values}
    samples = {"keys": found.key_samples, "values": found.value_samples}
    parts = []
    for name, share in zip(("keys", "values"), shrinkage, strict=True):
        parts.append(
            fit.fit(
                bases.karhunen_loeve(covariances[name], bases.shrunk(metrics[name], share)),
                getattr(found, name) / found.tokens,
                samples[name],
                progress=lambda done, total, name=name: progress(f"codebooks of {name}", done, total),
            )
        )
    return Candidates(*parts)


def choose(
    model: Model,
    measured: Measured,
    found: Candidates,
    *,
    bits: float,
    group: int = 8,
    layer_groups: int | None = None,
) -> Calibration:
    """Spend a budget.

    Args:
        model: that was measured.
        measured: what was measured.
        found: what keys and values could be coded with.
        bits: mean per coordinate of keys and values, gains included.
        group: coordinates that share a width, a multiple of 8.
        layer_groups: runs of neighbouring layers that share one template, and so a stack of the cache; None gives each
            layer its own.

    Raises:
        ValueError: the budget is too small, or a size does not fit.
    """
    layers = model.architecture.layers
    runs = layers if layer_groups is None else layer_groups
    if not 1 <= runs <= layers:
        raise ValueError(f"layer_groups must be from 1 to {layers}, got {runs}")
    shared = [part.tolist() for part in np.array_split(np.arange(layers), runs)]
    allotted = fit.allocate(found, budget=bits, group=group, layer_groups=shared)
    made = [fit.build(half, each) for half, each in zip(found, allotted, strict=True)]
    setting: dict[str, Any] = {
        "bits": bits,
        "group": group,
        "layer_groups": runs,
        "text": measured.text,
        "tokens": measured.statistics.tokens,
        "predicted_kl": sum(map(float, (fit.loss(half, each) for half, each in zip(found, allotted, strict=True)))),
    }
    return Calibration(keys=made[0], values=made[1], fingerprint=files.fingerprint(model), setting=setting)
