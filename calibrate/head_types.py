"""Codebooks that the heads of one type share, where they serve better than a codebook for every coordinate.

Heads are sorted into types by the shape of what they store, whatever its scale. One codebook for each type and width is
searched on samples of all its heads: by Lloyd's iteration, by soft memberships that harden (`search.fuzzy`) and by
evolution (`search.evolve`). Each search, and each head's choice between its type's codebook and its own, is judged on
samples that it was not fitted to; the codebooks that there were before stay where they are not beaten.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxquant.calibrate import fit, levels, search
from jaxquant.calibrate.fit import Fitted

_POOL = 4000  # samples of a type that searches see, and as many to judge them by
_ROUNDS = 20
_QUANTILES = np.linspace(0.02, 0.98, 25)


class Shared(NamedTuple):
    """Fitted codebooks, and what became of the search.

    Attributes:
        fitted: with the codebooks of types where they won.
        types: of the heads.
        won: whether the codebook of its type won, for each choice of bits and head.
        searches: how often each search gave the best codebook of a type.
    """

    fitted: Fitted
    types: Int[np.ndarray, "layers kv_heads"]
    won: np.ndarray
    searches: dict[str, int]


def share(
    generator: np.random.Generator,
    fitted: Fitted,
    samples: Float[np.ndarray, "layers kv_heads samples dim"],
    *,
    types: int = 4,
    most: int = 4,
) -> Shared:
    """Search codebooks for types of heads, and take them where they serve better on samples they have not seen.

    Args:
        generator: of the searches.
        fitted: of keys or values; its bases stay.
        samples: that it was fitted to.
        types: of heads, 1 to the number of heads.
        most: widest codes, in bits, that are searched.

    Raises:
        ValueError: `types` is out of range.
    """
    count, heads, _ = fitted.mean.shape
    if not 1 <= types <= count * heads:
        raise ValueError(f"types must be from 1 to the {count * heads} heads, got {types}")
    parts = [fit.scaled(fitted, samples, layer, head) for layer in range(count) for head in range(heads)]
    spread = [np.sqrt(np.average(y**2, axis=0, weights=gain**2)) for y, gain in parts]
    shapes = np.array(
        [np.quantile(y / np.maximum(s, 1e-30), _QUANTILES) for (y, _), s in zip(parts, spread, strict=True)]
    )
    kinds = group(generator, shapes, types)
    widths = [bits for bits in fitted.choices if 0 < bits <= most]
    tables = [table.copy() for table in fitted.levels]
    losses = fitted.losses.copy()
    won = np.zeros((len(fitted.choices), count, heads), bool)
    searches: dict[str, int] = {"Lloyd": 0, "fuzzy": 0, "evolution": 0}
    for kind in range(types):
        members = np.flatnonzero(kinds == kind)
        if not len(members):
            continue
        pool = [_pool(generator, [(parts[i], spread[i]) for i in members], half) for half in (0, 1)]
        for bits in widths:
            name, book = _search(generator, pool[0], pool[1], bits)
            searches[name] += 1
            for i in members:
                (y, gain), layer, head = parts[i], i // heads, i % heads
                own, _ = levels.fit(y[::2], gain[::2] ** 2, [bits])[0]
                unseen, cost = y[1::2], gain[1::2] ** 2 / np.sum(gain[1::2] ** 2)
                worth = fitted.basis.worth[layer, head]
                shared = spread[i][:, None] * book
                mine, theirs = (cost @ _squares(unseen, table) @ worth for table in (own, shared))
                if theirs < mine:
                    at = fitted.choices.index(bits)
                    tables[at][layer, head] = shared
                    losses[at, layer, head] = (cost @ _squares(unseen, shared)) * np.mean(gain**2) * worth
                    won[at, layer, head] = True
    new = dataclasses.replace(fitted, levels=tuple(tables), losses=losses)
    return Shared(new, kinds.reshape(count, heads), won, searches)


def group(
    generator: np.random.Generator, shapes: Float[np.ndarray, "heads size"], types: int
) -> Int[np.ndarray, " heads"]:
    """Sort rows into types by Lloyd's iteration from starts that lie far apart.

    Example:
        >>> kinds = group(np.random.default_rng(0), np.array([[0.0], [5.0], [0.1], [5.1]]), 2)
        >>> bool(kinds[0] == kinds[2] != kinds[1] == kinds[3])
        True
    """
    centres = shapes[[generator.integers(len(shapes))]]
    while len(centres) < types:
        away = ((shapes[:, None] - centres) ** 2).sum(-1).min(axis=1)
        centres = np.concatenate([centres, shapes[[np.argmax(away)]]])
    kinds = np.zeros(len(shapes), np.int64)
    for _ in range(_ROUNDS):
        kinds = np.argmin(((shapes[:, None] - centres) ** 2).sum(-1), axis=1)
        for kind in set(kinds.tolist()):
            centres[kind] = shapes[kinds == kind].mean(axis=0)
    return kinds


def _pool(generator: np.random.Generator, heads: list, half: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw scaled samples and their weights from the even, or the odd, samples of heads."""
    x, weights = [], []
    for (y, gain), spread in heads:
        part = (y / np.maximum(spread, 1e-30))[half::2]
        rows = generator.integers(0, len(part), -(-_POOL // len(heads)))
        columns = generator.integers(0, part.shape[1], len(rows))
        x.append(part[rows, columns])
        weights.append(gain[half::2][rows] ** 2)
    return np.concatenate(x), np.concatenate(weights)


def _search(
    generator: np.random.Generator,
    seen: tuple[np.ndarray, np.ndarray],
    unseen: tuple[np.ndarray, np.ndarray],
    bits: int,
) -> tuple[str, np.ndarray]:
    """Search a codebook on some samples, and choose by others."""
    x, weights = seen
    start = levels.fit(x[:, None], weights, [bits])[0][0][0]

    def error(table: np.ndarray) -> float:
        return float(weights @ _squares(x[:, None], table[None])[:, 0] / weights.sum())

    found = {
        "Lloyd": start,
        "fuzzy": search.fuzzy(x, weights, start, rounds=_ROUNDS)[0],
        "evolution": search.evolve(generator, error, start, sigma=0.02, generations=_ROUNDS)[0],
    }
    cost = {name: float(unseen[1] @ _squares(unseen[0][:, None], table[None])[:, 0]) for name, table in found.items()}
    best = min(cost, key=cost.__getitem__)
    return best, found[best]


def _squares(y: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Square what is left of samples [samples, coordinates] beside levels [coordinates, levels]."""
    out = np.empty_like(y)
    for i, row in enumerate(np.broadcast_to(table, (y.shape[1], table.shape[-1]))):
        out[:, i] = (y[:, i] - row[np.searchsorted((row[1:] + row[:-1]) / 2, y[:, i])]) ** 2
    return out
