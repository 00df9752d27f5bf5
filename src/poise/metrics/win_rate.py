"""How often one side's answers beat the other's, with and without the advantage of length."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.errors import InputError

__all__ = ["WinRate", "win_rate"]


@dataclass(frozen=True)
class WinRate:
    """Shares of pairs that were won, a tie being half.

    Attributes:
        raw: as it is.
        controlled: what it would be between answers of one length, by the fitted model.
        pairs: how many.
    """

    raw: float
    controlled: float
    pairs: int

    def __str__(self) -> str:
        return f"win rate {self.raw:.1%}, length-controlled {self.controlled:.1%} ({self.pairs} pairs)"


def win_rate(wins: Tensor, lengths: Tensor, other_lengths: Tensor, penalty: float = 1e-3) -> WinRate:
    """Return the win rate, and the same with the effect of length taken out by a logistic regression.

    P(win) = sigma(a + b tanh((length - other length)/s)), s the standard deviation of the differences; controlled = sigma(a)

    Args:
        wins: float [pairs], 1 won, 0 lost, 0.5 a tie.
        lengths, other_lengths: [pairs], tokens of the two answers.
        penalty: on b squared, so that a perfect separation stays finite.

    Raises:
        InputError: shapes that differ, no pair, or wins outside [0, 1].

    >>> win_rate(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([3, 3, 3]), torch.tensor([3, 3, 3])).controlled
    0.6666666666666667

    Source: Dubois et al., arXiv:2404.04475, in its simplest form.
    """
    if wins.ndim != 1 or not len(wins) or wins.shape != lengths.shape or wins.shape != other_lengths.shape:
        raise InputError(
            f"win_rate needs three tensors [pairs] with at least one pair, and they are {list(wins.shape)}, {list(lengths.shape)} and "
            f"{list(other_lengths.shape)}."
        )
    y = wins.double()
    if not bool(((y >= 0) & (y <= 1)).all()):
        raise InputError("win_rate: wins lie in [0, 1], and some do not.")
    raw = float(y.mean())
    gap = (lengths - other_lengths).double()
    spread = float(gap.std(correction=0))
    if spread == 0 and float(gap[0]) == 0:
        return WinRate(raw, raw, len(y))
    x = torch.stack([torch.ones_like(y), torch.tanh(gap / (spread or 1.0))], 1)
    weights, ridge = torch.zeros(2, dtype=torch.float64), torch.diag(torch.tensor([1e-9, penalty]).double())
    for _ in range(50):  # Newton's steps on a convex function of two numbers
        p = torch.sigmoid(x @ weights)
        gradient = x.T @ (p - y) / len(y) + ridge @ weights
        curvature = (x * (p * (1 - p))[:, None]).T @ x / len(y) + ridge + 1e-12 * torch.eye(2, dtype=torch.float64)
        step = torch.linalg.solve(curvature, gradient)
        weights = weights - step.clamp(-2, 2)
        if float(step.abs().max()) < 1e-10:
            break
    return WinRate(raw, float(torch.sigmoid(weights[0])), len(y))
