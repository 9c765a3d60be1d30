"""What many settings of one model's cache cost and save, measured, and which of them to take.

Every setting is measured over the same text and the same pass keys, through the cache that users get, beside the same
cache of 16 bits. A setting that did not compress is an error here, not a line in a table.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from jaxquant import evaluate
from jaxquant._report_inputs import Candidate, Text
from jaxquant.calibrate import sensitivity
from jaxquant.evaluate import Scores
from jaxquant.pipeline import Pipeline
from jaxquant.protocols import Quantizer

Progress = Callable[[str, int, int], object]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a setting may cost and still be recommended.

    Attributes:
        kl: largest mean KL divergence, in nats a token.
        top1: smallest share of tokens whose most probable one is the same.
        needles: largest share of the tokens of pass keys that may be lost.
    """

    kl: float = 0.05
    top1: float = 0.9
    needles: float = 0.05

    def __post_init__(self):
        """Check the numbers."""
        if not self.kl > 0:
            raise ValueError(f"kl must be positive, got {self.kl}")
        for name in ("top1", "needles"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share from 0 to 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What a setting showed.

    Attributes:
        name: method and bits.
        method: alone.
        bits: such as K4V2, or empty.
        bytes_per_token: of keys and values, for each token and kv head, everything that is held included.
        cache_bytes: of one row of the text.
        perplexity: over the text.
        kl: divergence from the predictions over 16 bits, mean, in nats a token; 0 for 16 bits itself.
        top1: share of tokens whose most probable one is the same as over 16 bits.
        needles: share of the tokens of pass keys that were right.
        missed: the limits that it does not keep, in words.
    """

    name: str
    method: str
    bits: str
    bytes_per_token: float
    cache_bytes: int
    perplexity: float
    kl: float
    top1: float
    needles: float | None
    missed: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What compressing one layer's keys, or values, alone costs.

    Attributes:
        name: of the setting whose quantizers were used.
        keys: KL divergence for each layer, in nats a token.
        values: likewise.
    """

    name: str
    keys: tuple[float, ...]
    values: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """All that was measured.

    Attributes:
        baseline: the cache of 16 bits.
        rows: the settings.
        limits: that the recommendation keeps.
        recommended: name of the setting to take, or None.
        sensitivity: layer by layer, or None where every setting is a pipeline.
        predicted_tokens: of the text.
        answer_tokens: of pass keys.
    """

    baseline: Row
    rows: tuple[Row, ...]
    limits: Limits
    recommended: str | None
    sensitivity: Sensitivity | None
    predicted_tokens: int
    answer_tokens: int


def measure(
    found: Sequence[Candidate], text: Text, limits: Limits, *, chunk: int = 256, batch: int = 8, progress: Progress
) -> Report:
    """Measure every setting, choose one, and measure that layer by layer.

    Args:
        found: settings of one model.
        text: to measure on.
        limits: that a setting must keep to be recommended.
        chunk: tokens of a prefill step.
        batch: rows at a time.
        progress: called with a description, what is done and what there is to do.

    Raises:
        RuntimeError: a setting did not compress.
    """
    baseline, rows = None, []
    parts = 1 if text.asking is None else 2
    for number, candidate in enumerate(found):

        def step(part: int, done: int, total: int, number: int = number) -> None:
            whole = 1000 * parts * len(found)
            progress("measuring", round(1000 * (parts * number + part + done / total)), whole)

        scores = _scores(candidate, text.rows, chunk, batch, lambda *done: step(0, *done))
        right: tuple[float | None, float | None] = None, None
        if text.asking is not None and text.marked is not None:
            asked = _scores(candidate, text.asking, chunk, batch, lambda *done: step(1, *done))
            right = asked.retrieval(text.marked)
        capacity = text.rows.shape[1] - 1
        caches = candidate.trial.baseline(1, capacity), candidate.trial.cache(1, capacity)
        before, after = (
            Row(
                name=name, method=method, bits=bits, bytes_per_token=cache.bytes_per_token, cache_bytes=cache.nbytes,
                perplexity=perplexity, kl=kl, top1=top1, needles=share,
            )
            for name, method, bits, cache, perplexity, kl, top1, share in (
                ("16 bit", "bfloat16", "", caches[0], scores.baseline_perplexity, 0.0, 1.0, right[0]),
                (
                    candidate.name, candidate.method, candidate.bits, caches[1], scores.compressed_perplexity,
                    float(scores.kl.mean()), float(scores.agreement.mean()), right[1],
                ),
            )
        )  # fmt: skip
        if after.kl == 0 or after.bytes_per_token >= before.bytes_per_token:
            raise RuntimeError(f"{after.name}: {after.bytes_per_token} bytes a token, KL {after.kl}: did not compress")
        baseline = before
        rows.append(dataclasses.replace(after, missed=missed(after, before, limits)))
    assert baseline is not None
    chosen = recommended(rows)
    watched = _watched(found, rows, chosen)
    return Report(
        baseline=baseline,
        rows=tuple(rows),
        limits=limits,
        recommended=None if chosen is None else chosen.name,
        sensitivity=None if watched is None else _layers(watched, text.rows[:1, :-1], progress),
        predicted_tokens=text.rows[:, 1:].size,
        answer_tokens=0 if text.marked is None else int(text.marked.sum()),
    )


def missed(row: Row, baseline: Row, limits: Limits) -> tuple[str, ...]:
    """Say which limits a setting does not keep."""
    out = []
    if not (math.isfinite(row.kl) and math.isfinite(row.perplexity)):
        return (f"predictions are not finite: KL {row.kl}, perplexity {row.perplexity}",)
    if row.kl > limits.kl:
        out.append(f"KL {row.kl:.4f} above {limits.kl:g}")
    if row.top1 < limits.top1:
        out.append(f"same top token {row.top1:.1%} below {limits.top1:.1%}")
    if row.needles is not None and baseline.needles is not None and baseline.needles - row.needles > limits.needles:
        out.append(f"pass keys {row.needles:.1%}, more than {limits.needles:.1%} under {baseline.needles:.1%}")
    return tuple(out)


def recommended(rows: Sequence[Row]) -> Row | None:
    """Give the setting of fewest bytes a token that keeps all limits, of equal ones that of least KL; or None."""
    good = [row for row in rows if not row.missed]
    return min(good, key=lambda row: (row.bytes_per_token, row.kl), default=None)


def nearest(rows: Sequence[Row]) -> Row:
    """Give the setting of least KL, which is the one to look at where none keeps the limits."""
    return min(rows, key=lambda row: row.kl if math.isfinite(row.kl) else math.inf)


def _scores(
    candidate: Candidate, rows: Int[np.ndarray, "rows tokens"], chunk: int, batch: int, progress: evaluate.Progress
) -> Scores:
    capacity = rows.shape[1] - 1
    try:
        return evaluate.compare(
            candidate.trial.model.decoder,
            rows,
            lambda count: candidate.trial.baseline(count, capacity),
            lambda count: candidate.trial.cache(count, capacity),
            batch=batch,
            chunk=chunk,
            progress=progress,
        )
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"{candidate.name}: {error}") from None


def _watched(found: Sequence[Candidate], rows: Sequence[Row], chosen: Row | None) -> Candidate | None:
    """Choose whose layers to look at: the recommended setting, or the nearest one, among pairs of quantizers."""
    pairs = {one.name: one for one in found if not isinstance(one.trial.compression, Pipeline)}
    if chosen is not None and chosen.name in pairs:
        return pairs[chosen.name]
    some = [row for row in rows if row.name in pairs]
    return pairs[nearest(some).name] if some else None


def _layers(candidate: Candidate, rows: Int[np.ndarray, "rows tokens"], progress: Progress) -> Sensitivity:
    trial, model = candidate.trial, candidate.trial.model
    halves = trial.compression if trial.prepared is None else trial.prepared.quantizers()
    assert not isinstance(halves, Pipeline)
    keys, values = (
        [half] * model.architecture.layers if isinstance(half, Quantizer) else list(half) for half in halves
    )
    losses = sensitivity.measured(
        model.decoder, rows, keys, values, progress=lambda done, total: progress("layer by layer", done, total)
    )
    return Sensitivity(name=candidate.name, keys=tuple(losses[:, 0].tolist()), values=tuple(losses[:, 1].tolist()))
