"""From bases and samples to quantizers: codebooks of every width for every coordinate, then the use of a budget."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxquant import trellis
from jaxquant.calibrate import allocation, levels
from jaxquant.calibrate.bases import Basis
from jaxquant.mixed import STEPS, Mixed

Progress = Callable[[int, int], object]
Rule = Literal["least_squares", "preserve", "none"]

_NEVER = 1e30  # a loss that no budget accepts
_RINGS = 4  # bits of a ring, over the memory of its trellis, from which it is used

CHOICES = (0, 1, 2, 3, 4, 5, 6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """What keys, or values, could be coded with, before anything is decided about bits.

    Attributes:
        basis: [layers, kv_heads, ...].
        mean: [layers, kv_heads, dim].
        levels: for each choice of bits, [layers, kv_heads, dim, 2**bits]; without levels where the trellis codes.
        losses: of each choice, [choices, layers, kv_heads, dim]: cost of the error that is left in each coordinate.
        choices: of bits, negative where the trellis codes them, in rising order of what they cost.
        weights: for the choice of gains, [layers, kv_heads, dim].
        rule: of `Mixed`.
        states: of the trellis, if any choice is its.
    """

    basis: Basis
    mean: Float[np.ndarray, "layers kv_heads dim"]
    levels: tuple[np.ndarray, ...]
    losses: Float[np.ndarray, "choices layers kv_heads dim"]
    choices: tuple[int, ...]
    weights: Float[np.ndarray, "layers kv_heads dim"]
    rule: Rule
    states: int = 0


def fit(
    basis: Basis,
    mean: Float[np.ndarray, "layers kv_heads dim"],
    samples: Float[np.ndarray, "layers kv_heads samples dim"],
    *,
    rule: Rule = "least_squares",
    choices: Sequence[int] = CHOICES,
    progress: Progress | None = None,
) -> Fitted:
    """Fit codebooks to samples. The gain weighs each coordinate by the root of its worth.

    Args:
        basis: of every layer and head.
        mean: subtracted before analysis.
        samples: vectors.
        rule: of the gain; with "none", levels are for the coordinates themselves.
        choices: of bits, 0 among them, in rising order.
        progress: called with the layers done and all layers.
    """
    layers, heads, dim = mean.shape
    weights = np.sqrt(basis.worth)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    tables = [np.zeros((layers, heads, dim, 2**bits)) for bits in choices]
    losses = np.zeros((len(choices), layers, heads, dim))
    fitted = Fitted(
        basis=basis, mean=mean, levels=tuple(tables), losses=losses, choices=tuple(choices), weights=weights, rule=rule
    )  # its arrays are filled now
    for layer in range(layers):
        for head in range(heads):
            y, gain = scaled(fitted, samples, layer, head)
            for i, (table, error) in enumerate(levels.fit(y, gain**2, choices)):
                tables[i][layer, head] = table
                losses[i, layer, head] = error * np.mean(gain**2) * basis.worth[layer, head]
        if progress is not None:
            progress(layer + 1, layers)
    return fitted


def scaled(
    fitted: Fitted, samples: Float[np.ndarray, "layers kv_heads samples dim"], layer: int, head: int
) -> tuple[Float[np.ndarray, "samples dim"], Float[np.ndarray, " samples"]]:
    """Give what levels are fitted to: one head's coordinates over their gain, and the gain."""
    y = (np.asarray(samples[layer, head], np.float64) - fitted.mean[layer, head]) @ fitted.basis.analysis[layer, head].T
    if fitted.rule == "none":
        return y, np.ones(len(y))
    gain = np.sqrt(np.maximum(y**2 @ fitted.weights[layer, head], 1e-30))
    gain = np.exp2(np.clip(np.round(STEPS * np.log2(gain)), -128, 127) / STEPS)
    return y / gain[:, None], gain


def with_trellis(
    fitted: Fitted,
    samples: Float[np.ndarray, "layers kv_heads samples dim"],
    *,
    states: int,
    most: int = 512,
    progress: Progress | None = None,
) -> Fitted:
    """Add a trellis code of every width to what coordinates can be coded with, and what it loses on samples.

    Args:
        fitted: without a trellis.
        samples: vectors.
        states: of the trellis.
        most: samples of each head that are coded.
        progress: called with the layers done and all layers.
    """
    layers, heads, dim = fitted.mean.shape
    widths = range(1, trellis.most_bits(states) + 1)
    lost = np.zeros((len(widths), layers, heads, dim))
    for layer in range(layers):
        parts = [scaled(fitted, samples[..., :: -(-samples.shape[2] // most), :], layer, head) for head in range(heads)]
        y = jnp.asarray([part[0] for part in parts], jnp.float32)
        gain = np.array([part[1] for part in parts])
        for place, bits in enumerate(widths):
            error = np.asarray(_missed(trellis.code((((bits,), dim),), states=states), y)) * gain[..., None] ** 2
            lost[place, layer] = error.mean(axis=1) * fitted.basis.worth[layer]
        if progress is not None:
            progress(layer + 1, layers)
    choices = (*fitted.choices, *(-bits for bits in widths))
    order = sorted(range(len(choices)), key=lambda place: abs(choices[place]))
    tables = (*fitted.levels, *(np.zeros((layers, heads, dim, 0)) for _ in widths))
    return dataclasses.replace(
        fitted,
        choices=tuple(choices[place] for place in order),
        levels=tuple(tables[place] for place in order),
        losses=np.concatenate([fitted.losses, lost])[order],
        states=states,
    )


@jax.jit
def _missed(code: trellis.Code, y: Float[Array, "heads samples dim"]) -> Float[Array, "heads samples dim"]:
    return (trellis.decode(code, trellis.encode(code, y)) - y) ** 2


def allocate(
    halves: Sequence[Fitted],
    *,
    budget: float,
    group: int = 8,
    layer_groups: Sequence[Sequence[int]],
    method: Literal["exact", "greedy"] = "exact",
) -> list[Int[np.ndarray, "layers groups"]]:
    """Share bytes out over keys and values, layers and groups of coordinates.

    Args:
        halves: what can be coded, keys and values; the losses of all must be in one unit.
        budget: mean bits per coordinate over all layers and halves, gains included.
        group: coordinates that share a width, a multiple of 8.
        layer_groups: layers that share one template.
        method: of `allocation`.

    Returns:
        For each half, the choice of every group of coordinates in every layer.

    Raises:
        ValueError: a size does not fit, or the budget cannot hold the gains.
    """
    layers, _, dim = halves[0].mean.shape
    if group < 8 or group % 8 or dim % group:
        raise ValueError(f"group must be a multiple of 8 that divides {dim}, got {group}")
    if sorted(layer for members in layer_groups for layer in members) != list(range(layers)):
        raise ValueError(f"layer_groups must hold each of {layers} layers once, got {layer_groups}")
    losses, costs, places = [], [], []
    for half, fitted in enumerate(halves):
        grouped = fitted.losses.sum(axis=2).reshape(len(fitted.choices), layers, dim // group, group).sum(axis=-1)
        for number, members in enumerate(layer_groups):
            for index in range(dim // group):
                lost = grouped[:, list(members), index].sum(axis=1)
                if not index:  # a layer codes something
                    lost = np.where(np.array(fitted.choices) != 0, lost, _NEVER)
                losses.append(lost)
                costs.append([abs(bits) * group // 8 * len(members) for bits in fitted.choices])
                places.append((half, number, index))
    held = sum(layers for fitted in halves if fitted.rule != "none")
    room = round(budget * dim * layers * len(halves)) // 8 - held
    if room < 0:
        raise ValueError(f"budget of {budget} bits does not hold one byte of gain a vector")
    solve = {"exact": allocation.exact, "greedy": allocation.greedy}[method]
    chosen = solve(np.array(losses), np.array(costs), room)
    out = [np.zeros((layers, dim // group), np.int64) for _ in halves]
    for (half, number, index), choice in zip(places, chosen, strict=True):
        out[half][list(layer_groups[number]), index] = halves[half].choices[choice]
    return out


def loss(fitted: Fitted, bits: Int[np.ndarray, "layers groups"]) -> float:
    """Predict the loss: KL divergence, in nats a token, if the metric was the Fisher information at temperature 1."""
    each = np.repeat(bits, fitted.mean.shape[-1] // bits.shape[1], axis=1)
    index = np.vectorize(fitted.choices.index)(each)
    kept = np.take_along_axis(fitted.losses.sum(axis=2), index[None], axis=0)
    return float(kept.sum() / 2)


def build(fitted: Fitted, bits: Int[np.ndarray, "layers groups"]) -> tuple[Mixed, ...]:
    """Make the quantizer of every layer, coordinates in falling order of bits, those of the trellis last."""
    dim = fitted.mean.shape[-1]
    every = np.repeat(bits, dim // bits.shape[1], axis=1)
    out = []
    for layer, each in enumerate(every):
        least = _RINGS * (fitted.states.bit_length() - 1)
        if -each[each < 0].sum() < least:  # too few for the trellis to be worth it
            each = np.abs(each)
        order = np.argsort(np.where(each > 0, -each, 100 + each), kind="stable")
        order = order[each[order] != 0]
        if not len(order):
            raise ValueError(f"layer {layer} has no coordinate with a bit: the budget is too small")
        runs = [(int(choice), int(np.sum(each == choice))) for choice in dict.fromkeys(each[order].tolist())]
        tables, first = [], 0
        for width, count in runs:
            if width > 0:
                tables.append(fitted.levels[fitted.choices.index(width)][layer][:, order[first : first + count]])
            first += count
        ring = tuple(((-width,), count) for width, count in runs if width < 0)
        weights = fitted.weights[layer][:, order]
        parts = {
            "mean": fitted.mean[layer],
            "analysis": fitted.basis.analysis[layer][:, order],
            "synthesis": fitted.basis.synthesis[layer][:, order],
            "weights": weights / weights.sum(axis=-1, keepdims=True),
        }
        out.append(
            Mixed(
                **{name: jnp.asarray(part, jnp.float32) for name, part in parts.items()},
                levels=tuple(jnp.asarray(table, jnp.float32) for table in tables),
                widths=tuple((width, count) for width, count in runs if width > 0), dim=dim, rule=fitted.rule,
                code=trellis.code(ring, states=fitted.states) if ring else None,
            )
        )  # fmt: skip
    return tuple(out)
