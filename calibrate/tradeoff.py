"""What a calibration loses on a row of text, layer by layer and beside other methods: the numbers behind the pictures.

One row, without a cache, is enough to draw and too little to quote; `jaxquant eval` measures through the cache.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxquant.calibrate import make, rank, sensitivity
from jaxquant.calibrate.files import Calibration
from jaxquant.calibrate.make import Candidates
from jaxquant.calibrate.measured import Measured
from jaxquant.methods import turboquant
from jaxquant.models.loading import Model
from jaxquant.protocols import Quantizer

BITS = (2.0, 2.5, 3.0, 4.0)
_TURBOQUANT = ((2, 2), (3, 2), (4, 4))
_CHANNELS = (4,)
_KEPT = (0.25,)  # share of the directions that takes 4 bits a coordinate in float16


class Point(NamedTuple):
    """One method at one budget."""

    method: str
    bits: float
    perplexity: float
    kl: float


class Losses(NamedTuple):
    """KL divergence with one layer's keys, or values, compressed at a time, in nats a token, [layers, 2]."""

    predicted: Float[np.ndarray, "layers 2"]
    measured: Float[np.ndarray, "layers 2"]


def losses(model: Model, seen: Measured, made: Calibration, row: Int[np.ndarray, " tokens"]) -> Losses:
    """Predict from the information what each layer loses, and measure it."""
    predicted = [
        [
            sensitivity.predicted(quantizer, samples[layer], information[layer])
            for quantizer, samples, information in (
                (made.keys[layer], seen.statistics.key_samples, seen.fisher.keys),
                (made.values[layer], seen.statistics.value_samples, seen.fisher.values),
            )
        ]
        for layer in range(len(made.keys))
    ]
    return Losses(np.array(predicted), sensitivity.measured(model.decoder, row[None], made.keys, made.values))


def points(
    model: Model,
    seen: Measured,
    found: Candidates,
    row: Int[np.ndarray, " tokens"],
    *,
    progress: Callable[[str, int, int], object] = make.silent,
) -> list[Point]:
    """Score methods at a few budgets, the uncompressed cache of 16 bits first.

    Args:
        model: that was calibrated.
        seen: what was measured of it.
        found: what keys and values could be coded with.
        row: of text that was not calibrated on.
        progress: called with a description, what is done and what there is to do.
    """
    a, statistics = model.architecture, seen.statistics
    methods: list[tuple[str, Sequence[Quantizer], Sequence[Quantizer]]] = []
    for bits in BITS:
        made = make.choose(model, seen, found, bits=bits)
        methods.append(("calibrated", made.keys, made.values))
    for k, v in _TURBOQUANT:
        pair = turboquant.kv(jax.random.key(0), dim=a.dim, bits_k=k, bits_v=v, fused=False)
        methods.append(("TurboQuant", [pair[0]] * a.layers, [pair[1]] * a.layers))
    for bits in _CHANNELS:
        keys, values = (rank.channels(statistics, half, bits=bits) for half in rank.HALVES)
        methods.append(("integers a channel", keys, values))
    for share in _KEPT:
        keys, values = (rank.delete(statistics, half, rank=round(share * a.dim)) for half in rank.HALVES)
        methods.append(("directions deleted", keys, values))
    none, whole = np.zeros((a.layers, 2), bool), np.ones((a.layers, 2), bool)
    nll, exact = sensitivity.scored(model.decoder, row, *methods[0][1:], none)
    out = [Point("uncompressed", 16.0, math.exp(nll), 0.0)]
    for number, (name, keys, values) in enumerate(methods):
        nll, changed = sensitivity.scored(model.decoder, row, keys, values, whole)
        bits = float(np.mean([_bits(half, a.kv_heads) for half in (*keys, *values)]))
        out.append(Point(name, bits, math.exp(nll), sensitivity.divergence(exact, changed)))
        progress("methods side by side", number + 1, len(methods))
    return out


def _bits(quantizer: Quantizer, heads: int) -> float:
    """Give the bits of a coordinate, everything that is held for a vector included."""
    code = jax.eval_shape(quantizer.quantize, jax.ShapeDtypeStruct((heads, 1, quantizer.dim), jnp.float32))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(code))
    return 8 * held / (heads * quantizer.dim)
