"""Numbers from predictions: classification, calibration, ranking, Pareto fronts, unlearning."""

from __future__ import annotations

FALLING = ("loss", "nll", "rmse", "mae", "mse", "error", "ece", "brier", "aurc", "kl", "bias")
"""Words in the names of metrics of which less is better."""


def rises(metric: str) -> bool:
    """Whether more of a metric is better, by its name.

    >>> rises("accuracy"), rises("valid/nll")
    (True, False)
    """
    return not any(word in metric for word in FALLING)
