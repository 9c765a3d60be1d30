"""From bases and samples to quantizers: codebooks of every width for every coordinate, then the use of a budget."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxquant.calibrate import allocation, levels
from jaxquant.calibrate.bases import Basis
from jaxquant.mixed import STEPS, Mixed

Progress = Callable[[int, int], object]
Rule = Literal["least_squares", "preserve", "none"]

_NEVER = 1e30  # a loss that no budget accepts

CHOICES = (0, 1, 2, 3, 4, 5, 6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """What keys, or values, could be coded with, before anything is decided about bits.

    Attributes:
        basis: [layers, kv_heads, ...].
        mean: [layers, kv_heads, dim].
        levels: for each choice of bits, [layers, kv_heads, dim, 2**bits].
        losses: of each choice, [choices, layers, kv_heads, dim]: cost of the error that is left in each coordinate.
        choices: of bits.
        weights: for the choice of gains, [layers, kv_heads, dim].
        rule: of `Mixed`.
    """

    basis: Basis
    mean: Float[np.ndarray, "layers kv_heads dim"]
    levels: tuple[np.ndarray, ...]
    losses: Float[np.ndarray, "choices layers kv_heads dim"]
    choices: tuple[int, ...]
    weights: Float[np.ndarray, "layers kv_heads dim"]
    rule: Rule


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
        For each half, the bits of every group of coordinates in every layer.

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
                    lost = np.where(np.array(fitted.choices) > 0, lost, _NEVER)
                losses.append(lost)
                costs.append([bits * group // 8 * len(members) for bits in fitted.choices])
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
    index = np.searchsorted(fitted.choices, each)
    kept = np.take_along_axis(fitted.losses.sum(axis=2), index[None], axis=0)
    return float(kept.sum() / 2)


def build(fitted: Fitted, bits: Int[np.ndarray, "layers groups"]) -> tuple[Mixed, ...]:
    """Make the quantizer of every layer, coordinates in falling order of bits."""
    layers, _, dim = fitted.mean.shape
    each = np.repeat(bits, dim // bits.shape[1], axis=1)
    out = []
    for layer in range(layers):
        order = np.argsort(-each[layer], kind="stable")
        order = order[each[layer][order] > 0]
        if not len(order):
            raise ValueError(f"layer {layer} has no coordinate with a bit: the budget is too small")
        widths = tuple((int(b), int(np.sum(each[layer] == b))) for b in sorted(set(each[layer]) - {0}, reverse=True))
        tables, first = [], 0
        for width, count in widths:
            rows = order[first : first + count]
            tables.append(fitted.levels[fitted.choices.index(width)][layer][:, rows])
            first += count
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
                widths=widths, dim=dim, rule=fitted.rule,
            )
        )  # fmt: skip
    return tuple(out)
