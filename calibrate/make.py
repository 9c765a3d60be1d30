"""Calibrate a model: measure it on text, fit what its keys and values could be coded with, and spend a budget on it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from jaxquant.calibrate import bases, files, fisher, fit, head_types, measured, refine, statistics, text
from jaxquant.calibrate.files import Calibration
from jaxquant.calibrate.fit import Fitted
from jaxquant.calibrate.measured import Measured
from jaxquant.models.loading import Model

Progress = Callable[[str, int, int], object]
Metric = Literal["information", "worst", "attention"]
Allocation = Literal["exact", "greedy"]


class Candidates(NamedTuple):
    """What keys and values could be coded with."""

    keys: Fitted
    values: Fitted
    setting: dict[str, Any]


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
    samples: int = 4096,
    keep: Path | None = None,
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
        samples: keys and values of each kv head to keep, for the fit of codebooks.
        keep: file that is written after every row. Where it holds the first rows of this very measurement, the rest is
            measured.
        progress: called with a description, what is done and what there is to do.

    Raises:
        ValueError: the text is too short, or has a token id that the model does not know; `keep` is another
            measurement, or damaged.
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
    words = f"{rows} rows of {seq_len} tokens from {start} on, {retrieval:.0%} of them with pass keys"
    name = measured.identity(files.fingerprint(model), chosen, temperature, seed, samples)
    found = Measured.load(keep) if keep is not None and keep.exists() else None
    if found is not None and found.identity != name:
        raise ValueError(f"{keep} holds a measurement of another model, text or setting; give a new file")
    for row in range(0 if found is None else found.statistics.rows, rows):
        one = chosen[row : row + 1]
        sums = statistics.collect(model.decoder, one, batch=1, samples=max(1, samples // rows))
        information = fisher.collect(
            jax.random.key(seed), model.decoder, one, temperature=temperature, first=row
        )  # fmt: skip
        if found is not None:
            sums, information = found.statistics + sums, found.fisher + information
        found = Measured(statistics=sums, fisher=information, text=words, identity=name)
        if keep is not None:
            found.save(keep)
        progress("rows of text", row + 1, rows)
    assert found is not None
    return found


def candidates(
    seen: Measured,
    *,
    metric: Metric = "information",
    queries: float = 0.5,
    shrinkage: tuple[float, float] = (0.1, 0.02),
    types: int = 0,
    states: int = 0,
    seed: int = 0,
    progress: Progress = silent,
) -> Candidates:
    """Fit bases and codebooks of every width.

    Args:
        seen: statistics and information of a model.
        metric: in which errors are counted. "information" is the Fisher information, for keys mixed with E[q q^T];
            "worst" is the same with queries weighted so that none pays more than the others (`bases.worst_case`) in
            place of their mean; "attention" is what errors do to the output of their layer, which takes no gradient.
        queries: share of the keys' metric that comes from queries, at the strength of the information: every query
            counts in it, also those whose answer is so certain that small errors cost nothing.
        shrinkage: of the metrics of keys and of values; see `bases.shrunk`.
        types: of heads for which shared codebooks are searched (`head_types.share`); 0 searches none.
        states: of the trellis that codes coordinates where it leaves less error; 0 leaves all to codebooks.
        seed: of the search.
        progress: called with a description, what is done and what there is to do.

    Raises:
        ValueError: the metric is not one of those.
    """
    if metric not in Metric.__args__:
        raise ValueError(f"metric must be one of {', '.join(Metric.__args__)}, got {metric!r}")
    found = seen.statistics
    covariances = {"keys": found.key_covariance, "values": found.value_covariance}
    costs = {"keys": seen.fisher.keys, "values": seen.fisher.values}
    if metric == "attention":
        costs = {"keys": found.weighted_queries / found.tokens, "values": found.weighted_outputs / found.tokens}
    scores = found.query_moments
    if metric == "worst":
        scores = bases.worst_case(found.query_samples.reshape(*costs["keys"].shape[:2], -1, found.keys.shape[-1]))
    costs["keys"] = (1 - queries) * costs["keys"] + queries * bases.like(scores, costs["keys"], covariances["keys"])
    samples = {"keys": found.key_samples, "values": found.value_samples}
    parts, won = [], {}
    for name, share in zip(("keys", "values"), shrinkage, strict=True):
        fitted = fit.fit(
            bases.karhunen_loeve(covariances[name], bases.shrunk(costs[name], share)),
            getattr(found, name) / found.tokens,
            samples[name],
            progress=lambda done, total, name=name: progress(f"codebooks of {name}", done, total),
        )
        if types:
            fitted, _, taken, _ = head_types.share(np.random.default_rng(seed), fitted, samples[name], types=types)
            won[name] = {bits: float(x.mean()) for bits, x in zip(fitted.choices, taken, strict=True) if x.any()}
        if states:
            fitted = fit.with_trellis(
                fitted, samples[name], states=states,
                progress=lambda done, total, name=name: progress(f"trellis codes of {name}", done, total),
            )  # fmt: skip
        parts.append(fitted)
    setting: dict[str, Any] = {"metric": metric, "queries": queries, "shrinkage": list(shrinkage), "types": types}
    if states:
        setting["states"] = states
    if types:
        setting["shared_codebooks"] = won
    return Candidates(keys=parts[0], values=parts[1], setting=setting)


def choose(
    model: Model,
    seen: Measured,
    found: Candidates,
    *,
    bits: float,
    group: int = 8,
    layer_groups: int | None = None,
    method: Allocation = "exact",
    steps: int = 0,
) -> Calibration:
    """Spend a budget.

    Args:
        model: that was measured.
        seen: what was measured.
        found: what keys and values could be coded with.
        bits: mean per coordinate of keys and values, gains included.
        group: coordinates that share a width, a multiple of 8.
        layer_groups: runs of neighbouring layers that share one template, and so a stack of the cache; None gives each
            layer its own.
        method: "exact" is a dynamic programme, "greedy" buys the best bargain first; see `allocation`.
        steps: of gradient descent on what keys decode to (`refine.attention`); 0 leaves them as fitted.

    Raises:
        ValueError: the budget is too small, or a size does not fit.
    """
    layers = model.architecture.layers
    runs = layers if layer_groups is None else layer_groups
    if not 1 <= runs <= layers:
        raise ValueError(f"layer_groups must be from 1 to {layers}, got {runs}")
    shared = [part.tolist() for part in np.array_split(np.arange(layers), runs)]
    halves = (found.keys, found.values)
    allotted = fit.allocate(halves, budget=bits, group=group, layer_groups=shared, method=method)
    keys, values = (fit.build(half, each) for half, each in zip(halves, allotted, strict=True))
    setting: dict[str, Any] = {
        **found.setting,
        "bits": bits,
        "group": group,
        "layer_groups": runs,
        "text": seen.text,
        "tokens": seen.statistics.tokens,
        "predicted_kl": sum(map(float, (fit.loss(half, each) for half, each in zip(halves, allotted, strict=True)))),
    }
    if steps:
        keys, lost = refine.attention(keys, seen.statistics, scale=model.architecture.scale, steps=steps)
        setting |= {"steps": steps, "attention_kl": [float(x) for x in lost.mean(axis=0)]}
    return Calibration(keys=keys, values=values, fingerprint=files.fingerprint(model), setting=setting)
