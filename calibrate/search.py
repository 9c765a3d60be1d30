"""Searches for levels beyond Lloyd's iteration; none of them can return something worse than its start.

`evolve` (CMA-ES) and `fuzzy` (annealed fuzzy C-means) minimize the distortion of one codebook.

References:
    N. Hansen, "The CMA evolution strategy: a tutorial", arXiv:1604.00772, figure 7; J. Bezdek, "Pattern recognition
    with fuzzy objective function algorithms", 1981, ch. 3.
"""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float


def evolve(
    generator: np.random.Generator,
    loss: Callable[[Float[np.ndarray, " levels"]], float],
    start: Float[np.ndarray, " levels"],
    *,
    sigma: float = 0.05,
    generations: int = 100,
) -> tuple[Float[np.ndarray, " levels"], float]:
    """Minimize a loss of levels by an evolution strategy with covariance adaptation.

    Args:
        generator: of the mutations.
        loss: to minimize, of sorted levels; exact, or of data that is not the judge's.
        start: first mean, and the incumbent.
        sigma: first standard deviation.
        generations: to run.

    Returns:
        The best levels seen, the start among them, and their loss.

    Example:
        >>> levels, error = evolve(np.random.default_rng(0), lambda x: float(np.sum((x - 1) ** 2)), np.zeros(2))
        >>> error < 1e-3
        True
    """
    n = len(start)
    children = 4 + int(3 * math.log(n))
    parents = children // 2
    weights = np.log(children / 2 + 0.5) - np.log(np.arange(1, parents + 1))
    weights /= weights.sum()
    mass = 1 / np.sum(weights**2)
    slow_c, slow_s = (4 + mass / n) / (n + 4 + 2 * mass / n), (mass + 2) / (n + mass + 5)
    rank_one = 2 / ((n + 1.3) ** 2 + mass)
    rank_mu = min(1 - rank_one, 2 * (mass - 2 + 1 / mass) / ((n + 2) ** 2 + mass))
    damping = 1 + 2 * max(0.0, math.sqrt((mass - 1) / (n + 1)) - 1) + slow_s
    usual = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))
    mean, path, step_path, shape = start.astype(np.float64), np.zeros(n), np.zeros(n), np.eye(n)
    best, least = np.sort(mean), float(loss(np.sort(mean)))
    for generation in range(1, generations + 1):
        values, vectors = np.linalg.eigh(shape)
        root = vectors * np.sqrt(np.maximum(values, 1e-20))
        draws = generator.normal(size=(children, n)) @ root.T
        candidates = np.sort(mean + sigma * draws, axis=1)
        errors = np.array([loss(candidate) for candidate in candidates])
        order = np.argsort(errors)[:parents]
        if errors[order[0]] < least:
            best, least = candidates[order[0]], float(errors[order[0]])
        steps = (candidates[order] - mean) / sigma
        moved = weights @ steps
        mean = mean + sigma * moved
        whitened = vectors @ ((vectors.T @ moved) / np.sqrt(np.maximum(values, 1e-20)))
        step_path = (1 - slow_s) * step_path + math.sqrt(slow_s * (2 - slow_s) * mass) * whitened
        length = np.linalg.norm(step_path)
        calm = length / math.sqrt(1 - (1 - slow_s) ** (2 * generation)) < (1.4 + 2 / (n + 1)) * usual
        path = (1 - slow_c) * path + calm * math.sqrt(slow_c * (2 - slow_c) * mass) * moved
        shape = (1 - rank_one - rank_mu) * shape + rank_one * np.outer(path, path)
        shape += rank_mu * (steps.T * weights) @ steps
        sigma *= math.exp(min(1.0, slow_s / damping * (length / usual - 1)))
    return best, least


def fuzzy(
    samples: Float[np.ndarray, " samples"],
    weights: Float[np.ndarray, " samples"],
    start: Float[np.ndarray, " levels"],
    *,
    fuzziness: float = 2.0,
    rounds: int = 40,
) -> tuple[Float[np.ndarray, " levels"], float]:
    """Fit levels with soft memberships that harden round by round.

    Args:
        samples: to fit.
        weights: of the samples.
        start: first levels, and the incumbent.
        fuzziness: exponent of the memberships in the first round; it falls to 1.05 in the last.
        rounds: to run.

    Returns:
        The best levels by weighted squared error to the nearest level, the start among them, and that error.

    Example:
        >>> fuzzy(np.array([0.0, 0.0, 4.0, 4.0]), np.ones(4), np.array([1.0, 2.0]))[0].round(3)
        array([0., 4.])
    """
    weights = weights / weights.sum()

    def error(levels: np.ndarray) -> float:
        return float(weights @ np.min((samples[:, None] - levels) ** 2, axis=1))

    levels, best, least = start.astype(np.float64), np.sort(start), error(start)
    for exponent in np.geomspace(fuzziness, 1.05, rounds):
        distance = np.maximum((samples[:, None] - levels) ** 2, 1e-20)
        closeness = -np.log(distance) / (exponent - 1)
        share = np.exp(closeness - closeness.max(axis=1, keepdims=True))
        share = (share / share.sum(axis=1, keepdims=True)) ** exponent * weights[:, None]
        total = share.sum(axis=0)
        levels = np.where(total > 1e-12, share.T @ samples / np.maximum(total, 1e-12), levels)
        if (found := error(levels)) < least:
            best, least = np.sort(levels), found
    return best, least
