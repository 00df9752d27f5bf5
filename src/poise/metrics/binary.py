"""Numbers from the scores of a two-class problem: rates, F-score, area under the ROC curve, Youden's threshold.

sensitivity = TP / (TP + FN)     specificity = TN / (TN + FP)     precision = TP / (TP + FP)
F = (1 + b^2) precision sensitivity / (b^2 precision + sensitivity)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.errors import InputError

__all__ = ["BinaryReport", "area_under_roc", "binary_report", "youden_threshold"]


@dataclass(frozen=True)
class BinaryReport:
    """What a threshold makes of scores.

    Attributes:
        accuracy, sensitivity, specificity, precision, f_score: in [0, 1]; a ratio 0/0 counts as 0.
        area: under the ROC curve, of all thresholds together.
        threshold: scores at or above it count as positive.
    """

    accuracy: float
    sensitivity: float
    specificity: float
    precision: float
    f_score: float
    area: float
    threshold: float


def binary_report(scores: Tensor, target: Tensor, threshold: float = 0.5, beta: float = 1.0) -> BinaryReport:
    """Return the rates of a threshold.

    Args:
        scores: float [n], larger for the positive class.
        target: [n], 0 or 1.
        threshold: scores at or above it count as positive.
        beta: weight of sensitivity in the F-score.

    Raises:
        InputError: shapes differ, a target is not 0 or 1, one class is absent, or a score is not a number.

    >>> report = binary_report(torch.tensor([0.9, 0.6, 0.4, 0.1]), torch.tensor([1, 0, 1, 0]))
    >>> report.sensitivity, report.specificity, report.area
    (0.5, 0.5, 0.75)
    """
    truth = _checked(scores, target)
    positive = scores >= threshold
    tp, fp = int((positive & truth).sum()), int((positive & ~truth).sum())
    fn, tn = int((~positive & truth).sum()), int((~positive & ~truth).sum())
    sensitivity, precision = tp / (tp + fn), tp / max(tp + fp, 1)
    below = beta**2 * precision + sensitivity
    f_score = (1 + beta**2) * precision * sensitivity / below if below else 0.0
    return BinaryReport(
        (tp + tn) / len(truth), sensitivity, tn / (tn + fp), precision, f_score, area_under_roc(scores, target), float(threshold)
    )  # fmt: skip


def area_under_roc(scores: Tensor, target: Tensor) -> float:
    """Return the chance that a positive scores above a negative, ties counting one half.

    >>> area_under_roc(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([0, 0, 1, 1]))
    0.875
    """
    truth = _checked(scores, target)
    _, place, count = torch.unique(scores, return_inverse=True, return_counts=True)
    # A tied score has the mean of the ranks that it spans.
    rank = (count.cumsum(0).double() - (count.double() - 1) / 2)[place]
    positives = int(truth.sum())
    above = float(rank[truth].sum()) - positives * (positives + 1) / 2
    return above / (positives * (len(truth) - positives))


def youden_threshold(scores: Tensor, target: Tensor, weights: Tensor | None = None) -> float:
    """Return the score whose threshold has the largest sensitivity + specificity - 1; the highest among equals.

    Args:
        scores: float [n].
        target: [n], 0 or 1.
        weights: [n] of the examples; ones where it is None.

    >>> round(youden_threshold(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1])), 2)
    0.8

    Source: Youden (1950).
    """
    truth = _checked(scores, target)
    weights = torch.ones(len(truth), dtype=torch.float64) if weights is None else weights.double().to(truth.device)
    values, place = torch.unique(scores, return_inverse=True)
    mass = torch.zeros(2, len(values), dtype=torch.float64, device=scores.device)
    mass[0].index_add_(0, place, weights * ~truth)
    mass[1].index_add_(0, place, weights * truth)
    # At threshold v everything from v upwards counts as positive.
    rates = mass.flip(1).cumsum(1).flip(1) / mass.sum(1, keepdim=True)
    gain = rates[1] - rates[0]
    best = int((gain >= gain.max() - 1e-12).nonzero()[-1])
    return float(values[best])


def _checked(scores: Tensor, target: Tensor) -> Tensor:
    if scores.ndim != 1 or scores.shape != target.shape or not scores.is_floating_point():
        raise InputError(
            f"A binary metric needs scores float [n] and a target [n], got {scores.dtype} {list(scores.shape)} and {list(target.shape)}."
        )
    if bool(torch.isnan(scores).any()):
        raise InputError("A binary metric needs scores that are numbers, and one is NaN.")
    truth = target == 1
    if not bool((truth | (target == 0)).all()) or not 0 < int(truth.sum()) < len(truth):
        raise InputError(
            f"A binary metric needs targets 0 and 1, both of them, and they are {torch.unique(target).tolist()[:5]}."
        )
    return truth
