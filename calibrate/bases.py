"""Bases in which a key or value is coded: Karhunen-Loeve in the metric in which errors are paid for.

With errors that cost `e^T M e`, M = L L^T, and covariance C of what is coded, the eigenvectors U of L^T C L give
coordinates that are uncorrelated, cost the same a unit, and are sorted by what they are worth: no linear basis leaves
less weighted error at equal rate, for normal vectors at high rate (reverse water-filling).

References:
    Salfati, "fraQtl", arXiv:2604.11501 (the values' eigenbasis weighted by attention); "OSCAR", arXiv:2605.17757 (keys
    rotated by the statistics of queries); T. Berger, "Rate distortion theory", 1971 (reverse water-filling).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

_LEAST = 1e-10  # of the mean eigenvalue: below, a metric or covariance is taken for singular


class Basis(NamedTuple):
    """Coordinates of unit variance, in falling order of worth.

    Attributes:
        analysis: y = analysis x for centred x.
        synthesis: x = y synthesis.
        worth: cost of a unit of squared error in each coordinate: its variance in the metric.
    """

    analysis: Float[np.ndarray, "*heads dim dim"]
    synthesis: Float[np.ndarray, "*heads dim dim"]
    worth: Float[np.ndarray, "*heads dim"]


def karhunen_loeve(
    covariance: Float[np.ndarray, "*heads dim dim"], metric: Float[np.ndarray, "*heads dim dim"]
) -> Basis:
    """Diagonalize a covariance in a metric.

    Args:
        covariance: of the vectors.
        metric: symmetric; an error e costs e^T metric e.

    Raises:
        ValueError: the shapes differ, or a matrix is not finite or has no positive eigenvalue.

    Example:
        >>> basis = karhunen_loeve(np.diag([1.0, 4.0]), np.diag([9.0, 1.0]))
        >>> basis.worth
        array([9., 4.])
        >>> np.abs(basis.synthesis)
        array([[1., 0.],
               [0., 2.]])
    """
    if covariance.shape != metric.shape or covariance.shape[-1] != covariance.shape[-2]:
        raise ValueError(f"covariance and metric must be alike and square, got {covariance.shape} and {metric.shape}")
    root = np.linalg.cholesky(floored("metric", metric))
    inside = np.swapaxes(root, -1, -2) @ floored("covariance", covariance) @ root
    worth, vectors = np.linalg.eigh(inside)
    worth, vectors = np.maximum(worth[..., ::-1], np.finfo(np.float64).tiny), vectors[..., ::-1]
    turned = np.swapaxes(vectors, -1, -2) @ np.swapaxes(root, -1, -2)
    analysis = turned / np.sqrt(worth)[..., None]
    synthesis = np.swapaxes(np.linalg.solve(np.swapaxes(root, -1, -2), vectors), -1, -2) * np.sqrt(worth)[..., None]
    return Basis(analysis, synthesis, worth)


def shrunk(matrix: Float[np.ndarray, "*heads dim dim"], share: float) -> Float[np.ndarray, "*heads dim dim"]:
    """Replace a share of a matrix by the multiple of the identity of the same trace.

    What a metric estimated from some text says about directions that the text never asked for is not that they are
    free: with a share of 0.1, a direction costs at least a tenth of the average.

    Raises:
        ValueError: the share is not in 0..1.

    Example:
        >>> shrunk(np.diag([2.0, 0.0]), 0.5)
        array([[1.5, 0. ],
               [0. , 0.5]])
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be from 0 to 1, got {share}")
    dim = matrix.shape[-1]
    mean = np.trace(matrix, axis1=-2, axis2=-1)[..., None, None] / dim
    return (1 - share) * matrix + share * mean * np.eye(dim)


def like(
    metric: Float[np.ndarray, "*heads dim dim"],
    reference: Float[np.ndarray, "*heads dim dim"],
    covariance: Float[np.ndarray, "*heads dim dim"],
) -> Float[np.ndarray, "*heads dim dim"]:
    """Scale a metric so that errors shaped like the vectors cost what they cost in a reference metric.

    Example:
        >>> like(np.diag([1.0, 1.0]), np.diag([4.0, 0.0]), np.eye(2))
        array([[2., 0.],
               [0., 2.]])
    """
    wanted, got = (np.einsum("...ij,...ji->...", m, covariance) for m in (reference, metric))
    return metric * (wanted / got)[..., None, None]


def floored(name: str, matrix: Float[np.ndarray, "*heads dim dim"]) -> Float[np.ndarray, "*heads dim dim"]:
    """Symmetrize a matrix and lift it clear of singularity.

    Raises:
        ValueError: it is not finite, or not positive anywhere.
    """
    matrix = (matrix + np.swapaxes(matrix, -1, -2)) / 2
    mean = np.trace(matrix, axis1=-2, axis2=-1) / matrix.shape[-1]
    if not np.isfinite(matrix).all() or (mean <= 0).any():
        raise ValueError(f"{name} must be finite and positive, got mean eigenvalues of {np.min(mean):.3g} and up")
    return matrix + _LEAST * mean[..., None, None] * np.eye(matrix.shape[-1])
