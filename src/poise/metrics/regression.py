"""Numbers from a regression's predictions."""

from __future__ import annotations

import torch
from torch import Tensor

from poise.errors import InputError


def root_mean_squared_error(prediction: Tensor, target: Tensor) -> float:
    """The root of the mean squared error.

        sqrt( mean_i (f_i - y_i)^2 )

    Args:
        prediction: float `[examples]` or `[examples, 1]`.
        target: float `[examples]`.
    Returns:
        A number of at least 0 in the target's unit; summed in float64.
    Raises:
        InputError: where shapes are not as above.

        >>> root_mean_squared_error(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0]))
        1.0
    """
    return float(_residual(prediction, target).square().mean().sqrt())


def mean_absolute_error(prediction: Tensor, target: Tensor) -> float:
    """The mean absolute error.

        mean_i |f_i - y_i|

    Args:
        prediction: float `[examples]` or `[examples, 1]`.
        target: float `[examples]`.
    Returns:
        A number of at least 0 in the target's unit; summed in float64.
    Raises:
        InputError: where shapes are not as above.

        >>> mean_absolute_error(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]))
        2.0
    """
    return float(_residual(prediction, target).abs().mean())


def r_squared(prediction: Tensor, target: Tensor) -> float:
    """The coefficient of determination: the share of the target's variance that the prediction explains.

        R^2 = 1 - sum_i (f_i - y_i)^2 / sum_i (y_i - mean y)^2

    Args:
        prediction: float `[examples]` or `[examples, 1]`.
        target: float `[examples]`.
    Returns:
        At most 1; negative where the prediction is worse than the target's mean. Of a constant target, which has no
        variance to explain: 1 for an exact prediction, 0 otherwise, as
        in scikit-learn.
    Raises:
        InputError: where shapes are not as above.

        >>> r_squared(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
        1.0
    """
    unexplained = float(_residual(prediction, target).square().sum())
    values = target.double()
    total = float((values - values.mean()).square().sum())
    if total == 0:
        return float(unexplained == 0)
    return 1 - unexplained / total


def regression_metrics(prediction: Tensor, target: Tensor) -> dict[str, float]:
    """Root mean squared error, mean absolute error and R^2 by name.

    Args:
        prediction: float `[examples]` or `[examples, 1]`.
        target: float `[examples]`.
    Returns:
        `{"rmse": ..., "mae": ..., "r2": ...}`.
    Raises:
        InputError: where shapes are not as above.

        >>> regression_metrics(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
        {'rmse': 0.0, 'mae': 0.0, 'r2': 1.0}
    """
    return {
        "rmse": root_mean_squared_error(prediction, target),
        "mae": mean_absolute_error(prediction, target),
        "r2": r_squared(prediction, target),
    }


def _residual(prediction: Tensor, target: Tensor) -> Tensor:
    if prediction.ndim == 2 and prediction.shape[-1] == 1:
        prediction = prediction.squeeze(-1)
    if prediction.ndim != 1 or prediction.shape != target.shape or not len(target):
        raise InputError(
            f"A regression metric needs prediction and target of one shape [examples], got {list(prediction.shape)} "
            f"and {list(target.shape)}."
        )
    return prediction.detach().to(torch.float64) - target.to(torch.float64)
