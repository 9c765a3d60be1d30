"""What a method makes for a model: quantizers of keys and values, or a pipeline."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import PRNGKeyArray

from jaxquant import catalogue, evaluate, models, token_files
from jaxquant.calibrate import statistics
from jaxquant.calibrate.statistics import Statistics
from jaxquant.pipeline import Pipeline
from jaxquant.protocols import Quantizer

Compression = Pipeline | tuple[Quantizer | Sequence[Quantizer], Quantizer | Sequence[Quantizer]]

_SAMPLED_ROWS, _SAMPLED_LENGTH = 8, 512


def build(
    model: models.Model,
    method: Callable[..., Any],
    key: PRNGKeyArray,
    *,
    bits_k: int,
    bits_v: int,
    measured: Statistics | None = None,
) -> Compression:
    """Build what a method makes for a model.

    Args:
        model: to compress the cache of.
        method: a function of a key, `bits_k`, `bits_v`, perhaps `dim`, and perhaps of statistics of the model, by the
            names of their attributes; see `catalogue`.
        key: of what is random.
        bits_k: bits per coordinate of keys.
        bits_v: bits per coordinate of values.
        measured: statistics of the model; None collects them, where they are asked for, over the last 4,096 tokens of
            the text in the package.

    Raises:
        ValueError: the method asks for statistics that there are not.
    """
    given: dict[str, Any] = {"bits_k": bits_k, "bits_v": bits_v}
    if "dim" in inspect.signature(method).parameters:
        given["dim"] = model.architecture.dim
    asked = catalogue.wanted(method)
    known = {field.name for field in dataclasses.fields(Statistics)}
    if not known.issuperset(asked):
        raise ValueError(f"{method.__name__} asks for {', '.join(asked)}; there are {', '.join(sorted(known))}")
    if asked:
        measured = sampled(model) if measured is None else measured
        given |= {name: getattr(measured, name) for name in asked}
    return method(key, **given)


def sampled(model: models.Model) -> Statistics:
    """Collect statistics of a model over the last 4,096 tokens of the text in the package."""
    text = token_files.read(model, None)
    start = len(text) - _SAMPLED_ROWS * _SAMPLED_LENGTH
    rows = evaluate.rows(text, start=start, count=_SAMPLED_ROWS, length=_SAMPLED_LENGTH - 1)
    return statistics.collect(model.decoder, rows, samples=1024)
