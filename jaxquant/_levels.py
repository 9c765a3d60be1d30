"""Levels of least mean squared error for the coordinates of a rotated vector, in float64, and the integrals they need.

The density is that of the unit normal, or of the coordinates of sqrt(dim) times a uniform point on the unit sphere.
"""

import functools
import math
import statistics
from typing import NamedTuple

import numpy as np


class Cells(NamedTuple):
    """Moments of the density over each cell, and the density at the inner boundaries."""

    mass: np.ndarray
    first: np.ndarray
    second: np.ndarray
    density: np.ndarray


@functools.cache
def best(bits: int, dim: int | None) -> np.ndarray:
    """Find the root of the distortion's gradient by Newton's method on its tridiagonal Jacobian.

    The start is the asymptotically optimal companding grid: quantiles of the density to the power 1/3 (for a normal
    density, a normal of variance 3), shrunk to fit the support.
    """
    count = 2**bits
    quantile = statistics.NormalDist(sigma=math.sqrt(3)).inv_cdf
    levels = np.array([quantile((i + 0.5) / count) for i in range(count)])
    if dim is not None:
        levels *= min(1.0, 0.98 * math.sqrt(dim) / np.abs(levels[-1]))
    for _ in range(200):
        inner = (levels[1:] + levels[:-1]) / 2
        cells = moments(inner, dim)
        gradient = levels * cells.mass - cells.first
        slope = cells.density * np.diff(levels) / 4
        change = _newton_step(cells.mass - np.append(slope, 0) - np.append(0, slope), -slope, gradient)
        proposal = levels - change
        descends = np.all(np.diff(proposal) > 0)
        if not descends or (dim is not None and abs(proposal[-1]) >= math.sqrt(dim)):
            proposal, change = cells.first / cells.mass, np.inf  # a Lloyd step always descends
        levels = (proposal - proposal[::-1]) / 2
        if np.max(np.abs(change)) < 1e-9:  # rounding in the outermost cell moves its level by up to 1e-10
            break
    return levels


@functools.cache
def equidistant(bits: int, dim: int | None) -> np.ndarray:
    """Find the step where the distortion stops falling, by bisection of its derivative."""
    unit = np.arange(2**bits) - (2**bits - 1) / 2
    low, high, step = 0.0, 4.0, 2.0
    edge = math.inf if dim is None else 0.999 * math.sqrt(dim)
    for _ in range(60):
        step = (low + high) / 2
        cells = moments(np.clip((unit[1:] + unit[:-1]) / 2 * step, -edge, edge), dim)
        rising = np.sum(unit * (step * unit * cells.mass - cells.first)) > 0
        low, high = (low, step) if rising else (step, high)
    return unit * step


def _newton_step(diagonal: np.ndarray, off: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """Solve a symmetric tridiagonal system by elimination; NaN unless its matrix is positive definite."""
    pivots, right = diagonal.tolist(), gradient.tolist()
    below = off.tolist()
    for i, beside in enumerate(below):
        if pivots[i] <= 0:
            break
        factor = beside / pivots[i]
        pivots[i + 1] -= factor * beside
        right[i + 1] -= factor * right[i]
    if min(pivots) <= 0:
        return np.full_like(gradient, np.nan)
    step = [right[-1] / pivots[-1]]
    for pivot, beside, value in zip(pivots[-2::-1], below[::-1], right[-2::-1], strict=True):
        step.append((value - beside * step[-1]) / pivot)
    return np.array(step[::-1])


def moments(inner: np.ndarray, dim: int | None) -> Cells:
    """Integrate over the cells between thresholds, for the unit normal, or the sphere marginal of some dimension."""
    return _normal(inner) if dim is None else _sphere(inner, dim)


def _normal(inner: np.ndarray) -> Cells:
    density = np.exp(-(inner**2) / 2) / math.sqrt(2 * math.pi)
    edge = np.concatenate([[0.0], density, [0.0]])
    moment = np.concatenate([[0.0], inner * density, [0.0]])
    # The tail on the nearer side of zero, so that outer cells keep their relative precision.
    upper = np.array([math.erfc(abs(t) / math.sqrt(2)) / 2 for t in inner])
    below = np.concatenate([[0.0], np.where(inner < 0, upper, 1 - upper), [1.0]])
    above = np.concatenate([[1.0], np.where(inner < 0, 1 - upper, upper), [0.0]])
    right = np.concatenate([[False], inner >= 0])
    mass = np.where(right, above[:-1] - above[1:], below[1:] - below[:-1])
    return Cells(mass, edge[:-1] - edge[1:], mass + moment[:-1] - moment[1:], density)


def _sphere(inner: np.ndarray, dim: int) -> Cells:
    """Integrate over angles: with t = sqrt(dim) sin(a), the density is proportional to cos(a)**(dim - 2) da."""
    root = math.sqrt(dim)
    norm = math.exp(math.lgamma(dim / 2) - math.lgamma((dim - 1) / 2)) / math.sqrt(math.pi)
    angle = np.concatenate([[-math.pi / 2], np.arcsin(inner / root), [math.pi / 2]])
    panels = 48
    edges = angle[:-1, None] + np.diff(angle)[:, None] * np.linspace(0, 1, panels + 1)
    node, weight = np.polynomial.legendre.leggauss(12)
    half = np.diff(edges, axis=1)[..., None] / 2
    points = (edges[:, :-1, None] + edges[:, 1:, None]) / 2 + half * node
    mass = norm * np.sum(np.cos(points) ** (dim - 2) * half * weight, axis=(1, 2))
    density = norm / root * (1 - inner**2 / dim) ** ((dim - 3) / 2)
    # The other moments in closed form, by parts: d(cos(a)**(dim - 1)) = -(dim - 1) cos(a)**(dim - 2) sin(a) da.
    edge = norm * root * np.cos(angle) ** (dim - 1)
    moment = norm * np.sin(angle) * np.cos(angle) ** (dim - 1)
    return Cells(mass, (edge[:-1] - edge[1:]) / (dim - 1), mass + moment[:-1] - moment[1:], density)
