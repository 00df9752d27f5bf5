"""How many samples each source task gives, and what an allocation is worth.

With heads W (K, T), a target head w and counts n (T,), the variance that sampling leaves in the target is

    sum_t nu_t^2 / n_t              for a chosen nu with W nu = w                  the plug-in score
    R(n) = w' (W diag(n) W')^-1 w   for the best such nu                           the planner's score

R is the criterion of a c-optimal design. Over all n with sum N its least value is |nu1|_1^2 / N, reached at n ~ |nu1| (Elfving),
so `|nu1|_1^2 / (N R(n))` in (0, 1] says how efficient any allocation is.

Sources: arXiv:2306.02556; Elfving, Ann. Math. Statist. 23 (1952). The planner's view, costs and rounding are this library's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from poise.errors import InputError
from poise.weights.basis_pursuit import basis_pursuit

__all__ = [
    "RiskBound",
    "efficiency",
    "largest_remainder",
    "optimal_counts",
    "planner_score",
    "plug_in_score",
    "risk_bound",
    "water_fill",
]

Array = NDArray[np.float64]


def plug_in_score(relevance: Tensor, counts: Tensor) -> float:
    """Return `sum_t nu_t^2 / n_t`; infinite where a task with nu_t != 0 has no samples.

    Args:
        relevance: nu, float (T,).
        counts: n, (T,).

    >>> plug_in_score(torch.tensor([1.0, -1.0, 0.0]), torch.tensor([5, 5, 0]))
    0.4
    """
    nu, n = _array(relevance), _array(counts)
    used = nu != 0
    with np.errstate(divide="ignore"):
        return float((nu[used] ** 2 / n[used]).sum())


def planner_score(heads: Tensor, target: Tensor, counts: Tensor) -> float:
    """Return `R(n) = w' (W diag(n) W')^-1 w`; infinite where the sampled heads do not span w.

    Args:
        heads: W, float (K, T).
        target: w, float (K,).
        counts: n, (T,), not negative.

    >>> planner_score(torch.eye(2), torch.tensor([1.0, 0.0]), torch.tensor([10, 0]))
    0.1
    """
    # R(n) is the least sum nu^2/n, the squared least norm of mu = nu/sqrt(n) under (W sqrt(n)) mu = w.
    scaled = _array(heads) * np.sqrt(_array(counts))
    goal = _array(target)
    mu = np.linalg.lstsq(scaled, goal, rcond=1e-12)[0]
    if np.linalg.norm(scaled @ mu - goal) > 1e-8 * max(float(np.linalg.norm(goal)), 1e-300):
        return float("inf")
    return float(mu @ mu)


def efficiency(heads: Tensor, target: Tensor, counts: Tensor) -> float:
    """Return `|nu1|_1^2 / (N R(n))` in [0, 1]: the best allocation of as many samples over this one.

    Raises:
        InputError: the heads do not span the target.

    >>> round(efficiency(torch.eye(2), torch.tensor([1.0, 0.0]), torch.tensor([5, 5])), 6)
    0.5
    """
    least = float(np.abs(basis_pursuit(_array(heads), _array(target)).coefficients).sum()) ** 2
    score = planner_score(heads, target, counts)
    return min(1.0, least / (float(counts.sum()) * score)) if np.isfinite(score) else 0.0


@dataclass(frozen=True)
class RiskBound:
    """What an allocation is predicted to leave as excess risk on the target.

    Attributes:
        bound: the theorem's order, `noise^2 (K (d + T) sum nu^2/n + K/n_target)`, without its constants and logarithms.
        expected: the leading term for two-stage least squares and isotropic inputs, `noise^2 ((d - K) R(n) + K/n_target)`.
        ratio_to_uniform: R(n) over R of the uniform allocation of as many samples; below 1 is better than uniform.
        efficiency: `|nu1|_1^2 / (N R(n))`.
    """

    bound: float
    expected: float
    ratio_to_uniform: float
    efficiency: float


def risk_bound(
    heads: Tensor,
    target: Tensor,
    counts: Tensor,
    *,
    noise: float,
    features: int,
    target_samples: int,
    relevance: Tensor | None = None,
) -> RiskBound:
    """Predict the excess risk of an allocation before anything is drawn.

    Args:
        heads: W, float (K, T), for an orthonormal (or whitened) representation.
        target: w, float (K,).
        counts: n, (T,).
        noise: standard deviation of the labels.
        features: d, the dimension of the inputs.
        target_samples: n of the target task.
        relevance: nu of the theorem's bound; the best one for `counts` where it is not given.
    """
    rank, tasks = heads.shape
    score = planner_score(heads, target, counts)
    plug_in = score if relevance is None else plug_in_score(relevance, counts)
    last = rank / target_samples
    even = planner_score(heads, target, torch.full((tasks,), float(counts.sum()) / tasks))
    return RiskBound(
        noise**2 * (rank * (features + tasks) * plug_in + last),
        noise**2 * (max(features - rank, 0) * score + last),
        score / even if np.isfinite(even) else float("nan"),
        efficiency(heads, target, counts),
    )


def optimal_counts(
    heads: Tensor,
    target: Tensor,
    budget: float,
    floor: Tensor | float = 0.0,
    cap: Tensor | None = None,
    rounds: int = 500,
) -> Tensor:
    """Minimise R(n) over `sum n = budget, floor <= n <= cap` by turns, float64 (T,).

    `sum nu^2/n` is convex in (nu, n) together, so the best nu for n and the best n for nu in turns lead to the optimum. Without
    floors and caps that is n ~ |nu1|; a floor that is there anyway is used as well as it can be.
    """
    w, goal = _array(heads), _array(target)
    low, high = _limits(w.shape[1], floor, cap)
    n = water_fill(np.ones(w.shape[1]), budget, low, high)
    for _ in range(rounds):
        root = np.sqrt(n)
        nu = root * np.linalg.lstsq(w * root, goal, rcond=1e-12)[0]
        new = water_fill(np.abs(nu), budget, low, high)
        moved = float(np.abs(new - n).max())
        n = new
        if moved < 1e-9 * budget:
            break
    return torch.from_numpy(n)


def water_fill(shares: Array, budget: float, floor: Array, cap: Array, costs: Array | None = None) -> Array:
    """Return `n = clip(beta * shares, floor, cap)` with `sum costs * n = budget`.

    Where every task with a share is at its cap, the rest goes to the others in equal parts.

    Args:
        shares, floor, cap: float64 (T,), not negative; caps may be infinite.
        budget: to be spent; between the cost of the floors and that of the caps, which the caller checks.
        costs: of one sample, float64 (T,), positive; 1 by default.
    """
    c = np.ones(len(shares)) if costs is None else costs
    full = np.where(shares > 0, cap, floor)
    if np.isfinite(full).all() and float(c @ full) < budget:
        return water_fill((shares == 0).astype(np.float64), budget, full, cap, costs)
    low, high = 0.0, 1.0

    def spent(beta: float) -> float:
        return float(c @ np.clip(beta * shares, floor, cap))

    while spent(high) < budget:
        high *= 2.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if spent(middle) < budget else (low, middle)
    n = np.clip(high * shares, floor, cap)
    free = (n > floor) & (n < cap)
    if free.any():  # the last digits, exactly
        beta = (budget - float(c[~free] @ n[~free])) / float(c[free] @ shares[free])
        n[free] = np.clip(beta * shares[free], floor[free], cap[free])
    return n


def largest_remainder(amounts: Array, budget: int) -> NDArray[np.int64]:
    """Round to whole numbers of the given sum: down, and the largest remainders up.

    Args:
        amounts: float64 (T,), of sum `budget` up to rounding.
        budget: the sum.

    >>> largest_remainder(np.array([2.5, 1.3, 1.2]), 5).tolist()
    [3, 1, 1]
    """
    whole = np.floor(amounts + 1e-9)
    missing = budget - int(whole.sum())
    # of equal remainders the first, so that the same call gives the same counts
    first = np.argsort(-(amounts - whole), kind="stable")[:missing]
    whole[first] += 1
    return whole.astype(np.int64)


def _limits(tasks: int, floor: Tensor | float, cap: Tensor | None) -> tuple[Array, Array]:
    low = np.broadcast_to(_array(torch.as_tensor(floor)), (tasks,)).copy()
    high = np.full(tasks, np.inf) if cap is None else _array(cap)
    if (high < low).any():
        raise InputError(
            f"A cap below the floor: task {int((high < low).argmax())} cannot give as many samples as it must."
        )
    return low, high


def _array(values: Tensor) -> Array:
    return np.asarray(values.detach().to(device="cpu", dtype=torch.float64).numpy())
