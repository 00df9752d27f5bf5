"""What preference data can vouch for: how far a policy relies on answers that the comparisons say little about."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.errors import InputError

__all__ = ["CoverageReport", "preference_coverage"]


@dataclass(frozen=True)
class CoverageReport:
    """How well the comparisons cover one policy.

    Attributes:
        coefficient: the largest squared error of the policy's advantage over the baseline for one unit of mean squared
            error on the compared pairs; infinite where the policy relies on answers that no comparison connects.
        unseen: mass on answers in no comparison.
        rare: mass on answers in at most `rare_below` comparisons, those unseen included.
        rare_below: the bound.
    """

    coefficient: float
    unseen: float
    rare: float
    rare_below: float

    def __str__(self) -> str:
        return (
            f"coverage coefficient {self.coefficient:.3g}; mass {self.unseen:.1%} on answers that were never compared, "
            f"{self.rare:.1%} on those in at most {self.rare_below:g} comparisons"
        )


def preference_coverage(
    policy: Tensor, wins: Tensor, base: Tensor | None = None, rare_below: float = 2
) -> CoverageReport:
    """Say what comparisons know about a policy over K answers.

    coefficient = sup_e  <pi - base, e>^2 / E_D[(e_i - e_j)^2] = (pi - base)' L^+ (pi - base)

    e is any error of the rewards and L the Laplacian of the graph whose edges are the compared pairs; the bound on what
    RPO loses against pi grows with its root. A policy that stays at the baseline has 0.

    Args:
        policy: probabilities, float [K].
        wins: float [K, K], how often answer i was preferred to answer j.
        base: the baseline distribution, float [K]; None is that of the preferred answers.
        rare_below: an answer in at most so many comparisons is rare.

    Raises:
        InputError: shapes that do not fit, or no comparison.

    Example:
        >>> wins = torch.tensor([[0.0, 20, 0], [5, 0, 0], [0, 2, 0]])
        >>> print(preference_coverage(torch.tensor([0.0, 0.0, 1.0]), wins))
        coverage coefficient 12.2; mass 0.0% on answers that were never compared, 100.0% on those in at most 2 comparisons

    Source: Liu et al., arXiv:2405.16436, Assumption 5.2 (single-policy coverage), with unrestricted rewards.
    """
    k = len(policy)
    if wins.shape != (k, k) or bool((wins < 0).any()) or float(wins.sum()) <= 0:
        raise InputError(f"wins is float [{k}, {k}], >= 0, with at least one comparison; it is {list(wins.shape)}.")
    counts = wins.double() + wins.double().T
    p = policy.double() / policy.double().sum()
    moved = p - (wins.double().sum(1) / wins.double().sum() if base is None else base.double() / base.double().sum())
    edges = counts / wins.double().sum()
    laplacian = edges.sum(1).diag() - edges
    inverse = torch.linalg.pinv(laplacian, hermitian=True)
    reached = laplacian @ inverse @ moved  # what of it the comparisons connect
    seen = counts.sum(1)
    return CoverageReport(
        coefficient=float(moved @ inverse @ moved) if torch.allclose(reached, moved, atol=1e-7) else torch.inf,
        unseen=float(p[seen == 0].sum()),
        rare=float(p[seen <= rare_below].sum()),
        rare_below=rare_below,
    )
