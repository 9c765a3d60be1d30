"""Which coordinates get how many bits: the least loss under a budget of bytes.

An item is a group of coordinates and a choice its width. `exact` is a dynamic programme over the budget; `greedy` buys
the best bargain until the money is gone, and is the same where returns diminish and the last purchase fits.
"""

import numpy as np
from jaxtyping import Float, Int


def exact(
    losses: Float[np.ndarray, "items choices"], costs: Int[np.ndarray, "items choices"], budget: int
) -> Int[np.ndarray, " items"]:
    """Choose one of the choices of every item, for the least sum of losses.

    Args:
        losses: of every choice.
        costs: of every choice, in units such as bytes.
        budget: most that may be spent.

    Raises:
        ValueError: the shapes differ, a cost is negative, or the cheapest choices cost more than the budget.

    Example:
        >>> exact(np.array([[9.0, 2.0, 1.0], [9.0, 5.0, 0.0]]), np.array([[0, 1, 2], [0, 1, 2]]), 3)
        array([1, 2])
    """
    losses, costs, budget = _checked(losses, costs, budget)
    items, choices = losses.shape
    best = np.full(budget + 1, np.inf)
    best[0] = 0.0
    taken = np.zeros((items, budget + 1), np.uint8 if choices < 256 else np.int64)
    for item in range(items):
        after = np.full(budget + 1, np.inf)
        for choice in range(choices):
            cost = costs[item, choice]
            if cost > budget:
                continue
            reached = best[: budget + 1 - cost] + losses[item, choice]
            better = reached < after[cost:]
            after[cost:][better] = reached[better]
            taken[item, cost:][better] = choice
        best = after
    left = int(np.argmin(best))
    chosen = np.zeros(items, np.int64)
    for item in range(items - 1, -1, -1):
        chosen[item] = taken[item, left]
        left -= int(costs[item, chosen[item]])
    return chosen


def greedy(
    losses: Float[np.ndarray, "items choices"], costs: Int[np.ndarray, "items choices"], budget: int
) -> Int[np.ndarray, " items"]:
    """Start from the cheapest choices and take the step of the largest gain a unit of cost while one fits.

    Choices must come in rising order of cost.

    Example:
        >>> greedy(np.array([[9.0, 2.0, 1.0], [9.0, 5.0, 0.0]]), np.array([[0, 1, 2], [0, 1, 2]]), 3)
        array([1, 2])
    """
    losses, costs, budget = _checked(losses, costs, budget)
    items = np.arange(len(losses))
    chosen = np.zeros(len(losses), np.int64)
    left = budget - costs[:, 0].sum()
    while True:
        price = costs - costs[items, chosen][:, None]
        gain = losses[items, chosen][:, None] - losses
        rate = np.where((price > 0) & (price <= left) & (gain > 0), gain / np.maximum(price, 1), -np.inf)
        item, choice = np.unravel_index(np.argmax(rate), rate.shape)
        if rate[item, choice] == -np.inf:
            return chosen
        left -= price[item, choice]
        chosen[item] = choice


def _checked(losses: np.ndarray, costs: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray, int]:
    if losses.shape != costs.shape or losses.ndim != 2 or not losses.size:
        raise ValueError(f"losses and costs must be [items, choices], got {losses.shape} and {costs.shape}")
    if not np.issubdtype(costs.dtype, np.integer) or costs.min() < 0:
        raise ValueError(f"costs must be whole numbers from 0, got {costs.dtype} from {costs.min()}")
    least = int(costs.min(axis=1).sum())
    if least > budget:
        raise ValueError(f"budget must be at least {least}, what the cheapest choices cost, got {budget}")
    return losses, costs, int(budget)
