"""Learning one task after another: what is learned, what is kept, and how far the weights went.

`scores[i, j]` is the score on task j after phase i (more is better: accuracy, or minus a loss); task j is trained in phase j.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from poise.errors import InputError
from poise.parameter_masks import Matrices

__all__ = [
    "ContinualReport",
    "backward_transfer",
    "continual_report",
    "distance_by_category",
    "forgetting",
    "forward_transfer",
    "learning",
    "overall_performance",
    "retention",
]

Scores = Tensor | Sequence[Sequence[float]]


def overall_performance(scores: Scores) -> float:
    """Return the mean score over all tasks after the last phase, `OP = 1/T sum_j R[T, j]`."""
    return float(_square(scores)[-1].mean())


def backward_transfer(scores: Scores) -> float:
    """Return how earlier tasks changed after they were learned, `BWT = 1/(T-1) sum_{j<T} (R[T, j] - R[j, j])`; 0 for a single task.

    Sums over T - 1 as Lopez-Paz and Ranzato (arXiv:1706.08840) do; some write 1/T.
    """
    r = _square(scores)
    return float((r[-1] - r.diagonal())[:-1].mean()) if len(r) > 1 else 0.0


def forgetting(scores: Scores) -> float:
    """Return how far earlier tasks fell from their best, `1/(T-1) sum_{j<T} (max_i R[i, j] - R[T, j])`."""
    r = _square(scores)
    return float((r.amax(0) - r[-1])[:-1].mean()) if len(r) > 1 else 0.0


def learning(scores: Scores) -> float:
    """Return the mean score on a task just after it was trained, `1/T sum_j R[j, j]`: the plasticity."""
    return float(_square(scores).diagonal().mean())


def forward_transfer(scores: Scores, before: Tensor | Sequence[float]) -> float:
    """Return what earlier phases did for a task before its own, `FWT = 1/(T-1) sum_{j>1} (R[j-1, j] - b[j])`.

    Args:
        before: `b[j]`, the score on each task before the first phase (or of an untrained model, in the original).
    """
    r, b = _square(scores), torch.as_tensor(before, dtype=torch.float64)
    if b.shape != (len(r),):
        raise InputError(
            f"forward_transfer: before must have one score a task ({len(r)}), and its shape is {tuple(b.shape)}."
        )
    return float((r.diagonal(offset=1) - b[1:]).mean()) if len(r) > 1 else 0.0


def retention(before: float, after: float, floor: float = 0.0) -> float:
    """Return the share of a score above `floor` (chance, an untrained model) that is left: `(after - floor) / (before - floor)`.

    >>> retention(0.9, 0.7, floor=0.5)
    0.5
    """
    if before <= floor:
        raise InputError(f"retention: there is nothing to keep: the score before is {before}, and the floor {floor}.")
    return round((after - floor) / (before - floor), 12)


@dataclass(frozen=True)
class ContinualReport:
    """All of it: overall performance, backward and forward transfer, forgetting, learning, and the matrix itself."""

    overall: float
    backward: float
    forward: float | None
    forgetting: float
    learning: float
    scores: Tensor


def continual_report(scores: Scores, before: Tensor | Sequence[float] | None = None) -> ContinualReport:
    """Return every figure of a matrix of scores; forward transfer where the scores before the first phase are known.

    >>> report = continual_report([[0.9, 0.2], [0.6, 0.8]], before=[0.1, 0.1])
    >>> round(report.overall, 3), round(report.backward, 3), round(report.forward, 3)
    (0.7, -0.3, 0.1)
    """
    return ContinualReport(
        overall_performance(scores),
        backward_transfer(scores),
        None if before is None else forward_transfer(scores, before),
        forgetting(scores),
        learning(scores),
        _square(scores),
    )


def distance_by_category(
    model: nn.Module | Mapping[str, Tensor], reference: nn.Module | Mapping[str, Tensor], matrices: Matrices
) -> dict[str, float]:
    """Return `||theta - theta_0||` over the parameters of each category, and over the rest as "always trained"."""
    new, old = (dict(m.named_parameters()) if isinstance(m, nn.Module) else m for m in (model, reference))
    home = {piece.parameter: matrix.category for matrix in matrices for piece in matrix.pieces}
    squares: dict[str, float] = {}
    for name, value in new.items():
        if name in old and value.is_floating_point():
            category = home.get(name, "always trained")
            moved = float((value.detach().double() - old[name].detach().double()).square().sum())
            squares[category] = squares.get(category, 0.0) + moved
    return {category: total**0.5 for category, total in squares.items()}


def _square(scores: Scores) -> Tensor:
    r = torch.as_tensor(scores, dtype=torch.float64)
    if r.ndim != 2 or r.shape[0] != r.shape[1] or not len(r):
        raise InputError(
            f"scores must be float [tasks, tasks], a row for each phase, and the shape is {tuple(r.shape)}."
        )
    return r
