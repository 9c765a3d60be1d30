"""Levels of a scalar codebook for each coordinate, fitted to samples by Lloyd's iteration with weights."""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from jaxquant import codebooks

_ITERATIONS = 40
_SETTLED = 1e-4  # of the error: a smaller step ends the iteration


def fit(
    samples: Float[np.ndarray, "samples coordinates"],
    weights: Float[np.ndarray, " samples"],
    choices: Sequence[int],
) -> list[tuple[Float[np.ndarray, "coordinates levels"], Float[np.ndarray, " coordinates"]]]:
    """Fit levels of least weighted squared error to each coordinate.

    Starts from the optimal levels of a normal density with the samples' mean and variance, and keeps them where
    Lloyd's iteration does not improve on them.

    Args:
        samples: of every coordinate.
        weights: of each sample.
        choices: bits of a code; 0 gives one level, 0.

    Returns:
        For each choice, the levels in increasing order and the weighted mean squared error.

    Example:
        >>> fit(np.array([[-1.0], [-1.0], [3.0], [3.0]]), np.ones(4), [1])
        [(array([[-1.,  3.]]), array([0.]))]
    """
    data = _Sorted(samples, weights / weights.sum())
    return [data.fit(bits) for bits in choices]


@functools.cache
def normal(bits: int) -> Float[np.ndarray, " levels"]:
    """Give the optimal levels of the unit normal, in float64."""
    return np.asarray(codebooks.lloyd_max(bits).centroids, np.float64)


class _Sorted:
    """Samples of every coordinate in increasing order, one coordinate behind the other, with their running sums."""

    def __init__(self, samples: np.ndarray, weights: np.ndarray) -> None:
        self.count, coordinates = samples.shape
        order = np.argsort(samples, axis=0).T
        x, w = np.take_along_axis(samples.T, order, axis=1), weights[order]
        self.apart = (np.arange(coordinates) * (4 * np.abs(x).max() + 1))[:, None]
        self.line = (x + self.apart).reshape(-1)
        self.sums = [np.pad(np.cumsum(part, axis=1), ((0, 0), (1, 0))) for part in (w, w * x, w * x * x)]

    def fit(self, bits: int) -> tuple[np.ndarray, np.ndarray]:
        mean, second = self.sums[1][:, -1], self.sums[2][:, -1]
        if not bits:
            return np.zeros((len(mean), 1)), second.copy()
        deviation = np.sqrt(np.maximum(second - mean**2, 1e-12))
        levels = best = mean[:, None] + deviation[:, None] * normal(bits)
        cells = self._cells(levels)
        before = least = _error(cells, levels)
        for _ in range(_ITERATIONS):
            levels = np.where(cells[0] > 1e-12, cells[1] / np.maximum(cells[0], 1e-12), levels)
            levels = np.sort(levels, axis=1)
            cells = self._cells(levels)
            error = _error(cells, levels)
            better = error < least
            best, least = np.where(better[:, None], levels, best), np.where(better, error, least)
            if (before - error <= _SETTLED * before).all():
                break
            before = error
        return best, np.maximum(least, 0.0)

    def _cells(self, levels: np.ndarray) -> list[np.ndarray]:
        """Sum up weight, weighted samples and their squares in each level's cell."""
        inner = np.searchsorted(self.line, (levels[:, 1:] + levels[:, :-1]) / 2 + self.apart, side="right")
        inner = np.clip(inner - np.arange(len(levels))[:, None] * self.count, 0, self.count)
        ends = np.pad(inner, ((0, 0), (1, 1)), constant_values=((0, 0), (0, self.count)))
        return [np.diff(np.take_along_axis(part, ends, axis=1), axis=1) for part in self.sums]


def _error(cells: list[np.ndarray], levels: np.ndarray) -> np.ndarray:
    return np.sum(cells[2] - 2 * levels * cells[1] + levels**2 * cells[0], axis=1)
