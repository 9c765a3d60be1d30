"""Bases in which a key or value is coded: Karhunen-Loeve in the metric in which errors are paid for.

With errors that cost `e^T M e`, M = L L^T, and covariance C of what is coded, the eigenvectors U of L^T C L give
coordinates that are uncorrelated, cost the same a unit, and are sorted by what they are worth: no linear basis leaves
less weighted error at equal rate, for normal vectors at high rate (reverse water-filling).

References:
    S. Salfati, "Quantization dominates rank reduction for KV-cache compression", arXiv:2604.11501 (the values'
    eigenbasis weighted by attention); "OSCAR", arXiv:2605.17757 (keys rotated by the statistics of queries); T. Berger,
    "Rate distortion theory", 1971 (reverse water-filling).
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


def worst_case(
    queries: Float[np.ndarray, "*heads samples dim"], *, rounds: int = 60
) -> Float[np.ndarray, "*heads dim dim"]:
    """Weigh queries so that none of them pays more than the others: the metric of least largest error.

    In the basis of a metric M, errors at high rate have a covariance proportional to M^-1, so a query q pays
    q^T M^-1 q. Among all M = sum_i w_i q_i q_i^T of one determinant, the weights of the smallest enclosing ellipsoid
    make the largest of these payments least, and equal to dim for every query that has weight (Kiefer and
    Wolfowitz). Titterington's iteration multiplies each weight by its query's payment over dim.

    Args:
        queries: a sample of them, more than dim.
        rounds: of the iteration.

    Returns:
        The metric, its trace that of the mean of q q^T.

    References:
        J. Kiefer, J. Wolfowitz, "The equivalence of two extremum problems", 1960; D. M. Titterington, "Algorithms for
        computing D-optimal designs on a finite design space", 1976.

    Example:
        >>> worst_case(np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])).round(3)
        array([[0.5, 0. ],
               [0. , 0.5]])
    """
    count, dim = queries.shape[-2:]
    weights = np.full(queries.shape[:-1], 1 / count)
    for _ in range(rounds):
        metric = floored("queries", _outer(queries, weights))
        payment = np.einsum("...nd,...dn->...n", queries, np.linalg.solve(metric, np.swapaxes(queries, -1, -2)))
        weights *= payment / dim
        weights /= weights.sum(axis=-1, keepdims=True)
    found, mean = _outer(queries, weights), np.mean(np.sum(queries**2, axis=-1), axis=-1)
    return found * (mean / np.trace(found, axis1=-2, axis2=-1))[..., None, None]


def _outer(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.swapaxes(x * weights[..., None], -1, -2) @ x
