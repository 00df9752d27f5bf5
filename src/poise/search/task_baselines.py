"""What an active search is compared with: allocations that do not look at relevance, one that knows it, and gradients.

L2-A-MTRL is `ActiveMultiTask(..., relevance=LassoRelevance(p=2, q=2))`, passive sampling `epochs=1`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from poise.errors import InputError
from poise.weights.allocation import largest_remainder, water_fill
from poise.weights.relevance import LassoRelevance

__all__ = ["gradient_similarity", "oracle_counts", "proportional_counts", "target_only", "uniform_counts"]


def uniform_counts(tasks: int, budget: int) -> Tensor:
    """Share a budget out evenly, int64 (T,).

    >>> uniform_counts(3, 10).tolist()
    [4, 3, 3]
    """
    return proportional_counts(torch.ones(tasks), budget)


def proportional_counts(sizes: Tensor | Sequence[float], budget: int, floor: int = 0) -> Tensor:
    """Share a budget out in proportion to sizes (or any shares that are not negative), int64 (T,) of that sum.

    Raises:
        InputError: sizes that are negative or all 0, or a budget below the floors.

    >>> proportional_counts([3, 1], 8).tolist()
    [6, 2]
    """
    shares = np.asarray(torch.as_tensor(sizes).tolist(), dtype=np.float64)
    if not np.isfinite(shares).all() or (shares < 0).any() or not shares.any():
        raise InputError(f"Sizes must be finite, not negative and not all 0; they are {shares.tolist()[:10]}.")
    if budget < floor * len(shares):
        raise InputError(
            f"The budget is {budget}, and the floors of {len(shares)} tasks alone need {floor * len(shares)}."
        )
    amounts = water_fill(shares, budget, np.full(len(shares), float(floor)), np.full(len(shares), np.inf))
    return torch.from_numpy(largest_remainder(amounts, budget))


def oracle_counts(heads: Tensor, target: Tensor, budget: int, *, floor: int = 0, p: int = 1, q: float = 1.0) -> Tensor:
    """The allocation of somebody who knows the true heads: W (K, T), w (K,); int64 (T,)."""
    relevance = LassoRelevance(lam=0.0, floor=floor, p=p, q=q)
    relevance.fit(heads, target)
    return relevance.allocate(budget)


def target_only(inputs: Tensor, targets: Tensor, ridge: float = 0.0) -> Tensor:
    """Least squares on the target alone, without any source: float64 (d,)."""
    x, y = inputs.double(), targets.double()
    solved: Tensor = torch.linalg.lstsq(
        torch.cat([x, ridge**0.5 * torch.eye(x.shape[1], dtype=x.dtype)]),
        torch.cat([y, y.new_zeros(x.shape[1])])[:, None],
        driver="gelsd",
    ).solution
    return solved[:, 0]


def gradient_similarity(gradients: Tensor, target: Tensor) -> Tensor:
    """Weigh sources by how their gradient agrees with the target's: `max(0, cos(g_t, g))`, of sum 1.

    Args:
        gradients: of every source's loss on shared parameters, float (T, D).
        target: that of the target, float (D,).

    Returns:
        Shares, float64 (T,); even where no source agrees.

    >>> gradient_similarity(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), torch.tensor([1.0, 0.0]))
    tensor([1., 0., 0.], dtype=torch.float64)
    """
    g, goal = gradients.double(), target.double()
    cosines = (g @ goal) / (g.norm(dim=1) * goal.norm()).clamp_min(1e-300)
    shares = cosines.clamp_min(0)
    return shares / shares.sum() if bool(shares.any()) else torch.full_like(shares, 1 / len(shares))
