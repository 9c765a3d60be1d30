"""What `jaxquant report` measures: settings of one model's cache, and the text that they are measured on."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int

from jaxquant import catalogue, evaluate, models, needles, token_files
from jaxquant import compression as compressions
from jaxquant.calibrate import files, text
from jaxquant.pipeline import Pipeline
from jaxquant.protocols import Quantizer
from jaxquant.trial import Trial


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A setting to measure.

    Attributes:
        name: method and bits.
        method: alone.
        bits: such as K4V2, or empty where they follow from something else.
        trial: the model with this setting.
    """

    name: str
    method: str
    bits: str
    trial: Trial

    def nbytes(self, *, batch: int, tokens: int) -> int:
        """Count the bytes of its cache without making it."""
        if self.trial.prepared is not None:
            return self.trial.prepared.nbytes(batch=batch, capacity=max(tokens, self.trial.sinks + 1))
        shapes = jax.eval_shape(lambda: self.trial.cache(batch, max(tokens, self.trial.sinks + 1)))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """What the settings are measured on.

    Attributes:
        source: where it is from.
        rows: of token ids, one more than are predicted.
        asking: rows with pass keys, as long; None where none are asked for.
        marked: their answers among the predicted tokens.
    """

    source: str
    rows: Int[np.ndarray, "rows tokens"]
    asking: Int[np.ndarray, "asking tokens"] | None
    marked: Bool[np.ndarray, "asking predicted"] | None


def candidates(
    model: models.Model,
    methods: Sequence[str],
    bits: Sequence[tuple[int, int]],
    *,
    sinks: int,
    window: int,
    seed: int,
    calibrations: Iterable[Path] = (),
    own: Trial | None = None,
) -> list[Candidate]:
    """Build every method at every pair of bits, and what calibrations of the model and its own folder say.

    Args:
        model: to compress the cache of.
        methods: names that `catalogue.find` knows.
        bits: of keys and of values.
        sinks: first tokens of a row that stay exact.
        window: newest tokens of a row that stay exact.
        seed: of what is random.
        calibrations: files of this model.
        own: what the model's folder says of its cache, with sinks and window of its own.

    Raises:
        ValueError: there is no such method, it does not go with the bits, a calibration is of another model, or there
            is nothing to measure.
    """
    found: dict[str, Candidate] = {}
    statistics = None

    def add(name: str, label: str, compression: Any) -> None:
        whole = f"{name} {label}".strip()
        trial = Trial(model=model, compression=compression, sinks=sinks, window=window, setting=whole)
        found[whole] = Candidate(name=whole, method=name, bits=label, trial=trial)

    for name in dict.fromkeys(methods):
        method = catalogue.find(name)
        if isinstance(method, Pipeline | Quantizer):
            add(name, "", method if isinstance(method, Pipeline) else (method, method))
            continue
        if catalogue.wanted(method) and statistics is None:
            statistics = compressions.sampled(model)
        for bits_k, bits_v in bits:
            key, label = jax.random.key(seed), f"K{bits_k}V{bits_v}"
            try:
                built = compressions.build(model, method, key, bits_k=bits_k, bits_v=bits_v, measured=statistics)
            except ValueError as error:
                raise ValueError(f"{name} {label}: {error}") from None
            add(name, label, built)
    for path in calibrations:
        made = files.read(path)
        made.check(model)
        add("calibrated", f"{made.bits:.2f} bits, {path.name}", (made.keys, made.values))
    if own is not None:
        label = f"{own.sinks} sinks, window {own.window}"
        found[f"converted {label}"] = Candidate(name=f"converted {label}", method="converted", bits=label, trial=own)
    if not found:
        raise ValueError("there is nothing to measure: name at least one method, or a calibration")
    return list(found.values())


def gather(
    model: models.Model,
    tokens: str | None,
    *,
    start: int,
    rows: int,
    length: int,
    needle_file: str | None,
    needle_rows: int,
    seed: int,
) -> Text:
    """Cut rows from a text, and hide pass keys in others, or read rows with pass keys from a file.

    Args:
        model: whose token ids they are.
        tokens: `FILE[:NAME]` of token ids or text; None for the held-out text in the package.
        start: first token.
        rows: of the text.
        length: tokens that a row predicts.
        needle_file: `FILE:NAME` of rows with pass keys; None hides them in the text.
        needle_rows: rows with pass keys; 0 for none.
        seed: of pass keys and their places.

    Raises:
        ValueError: the text is too short, of another vocabulary, or longer than the model's positions.
    """
    a = model.architecture
    if length > a.max_positions:
        raise ValueError(f"--seq-len must be at most the model's {a.max_positions} positions, got {length}")
    ids = token_files.row(model, tokens)
    chosen = evaluate.rows(ids, start=start, count=rows, length=length)
    asking = None
    if needle_rows and needle_file is not None:
        asking = token_files.rows(model, needle_file)[:needle_rows]
    elif needle_rows:
        asking = text.rows(
            np.random.default_rng(seed), ids, model.tokenizer, count=needle_rows, length=length + 1, retrieval=1.0,
            start=start,
        )  # fmt: skip
    marked = None if asking is None else needles.answers(asking, model.tokenizer)
    return Text(source=tokens or "held-out text in the package", rows=chosen, asking=asking, marked=marked)
