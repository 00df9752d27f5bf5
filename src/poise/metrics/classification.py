"""Numbers from a classifier's logits."""

from __future__ import annotations

import torch
from torch import Tensor

from poise.errors import InputError


def accuracy(logits: Tensor, target: Tensor) -> float:
    """The share of examples whose largest logit is at the target.

        mean_i [argmax_c z_ic = y_i]

    Args:
        logits: float `[examples, classes]`.
        target: int64 `[examples]`, in `0..classes-1`.
    Returns:
        A fraction in `[0, 1]`; among equal logits the first class counts as predicted.
    Raises:
        InputError: where shapes or types are not as above.

        >>> accuracy(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0]))
        0.5
    """
    _check(logits, target)
    return float((logits.argmax(-1) == target).double().mean())


def macro_f1(logits: Tensor, target: Tensor) -> float:
    """The F1 score of each class, averaged over the classes with equal weight.

        F1_c = 2 TP_c / (predicted_c + true_c),      macro F1 = mean of F1_c over classes that occur

    A class that is neither predicted nor true has no F1 and is left out, as in scikit-learn.

    Args:
        logits: float `[examples, classes]`.
        target: int64 `[examples]`, in `0..classes-1`.
    Returns:
        A fraction in `[0, 1]`.
    Raises:
        InputError: where shapes or types are not as above.

        >>> macro_f1(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 1]))
        1.0
    """
    _check(logits, target)
    classes = logits.shape[-1]
    predicted = logits.argmax(-1)
    true_positives = torch.bincount(target[predicted == target], minlength=classes).double()
    occurrences = torch.bincount(predicted, minlength=classes) + torch.bincount(target, minlength=classes)
    occurs = occurrences > 0
    return float((2 * true_positives[occurs] / occurrences[occurs]).mean())


def negative_log_likelihood(logits: Tensor, target: Tensor) -> float:
    """The mean negative log-probability of the target, in nats.

        mean_i -log softmax(z_i)[y_i]

    Args:
        logits: float `[examples, classes]`.
        target: int64 `[examples]`, in `0..classes-1`.
    Returns:
        A number of at least 0; summed in float64, so that many examples do not lose digits.
    Raises:
        InputError: where shapes or types are not as above.

        >>> round(negative_log_likelihood(torch.zeros(1, 2), torch.tensor([1])), 4)
        0.6931
    """
    _check(logits, target)
    values = torch.nn.functional.cross_entropy(logits.detach().float(), target, reduction="none")
    return float(values.double().mean())


def classification_metrics(logits: Tensor, target: Tensor) -> dict[str, float]:
    """Accuracy, macro F1, negative log-likelihood and expected calibration error (10 bins) by name.

    Args:
        logits: float `[examples, classes]`.
        target: int64 `[examples]`, in `0..classes-1`.
    Returns:
        `{"accuracy": ..., "macro_f1": ..., "nll": ..., "ece": ...}`.
    Raises:
        InputError: where shapes or types are not as above.

        >>> sorted(classification_metrics(torch.zeros(1, 2), torch.tensor([0])))
        ['accuracy', 'ece', 'macro_f1', 'nll']
    """
    from poise.metrics.calibration import calibration_error

    _check(logits, target)
    return {
        "accuracy": accuracy(logits, target),
        "macro_f1": macro_f1(logits, target),
        "nll": negative_log_likelihood(logits, target),
        "ece": calibration_error(logits.detach().float().softmax(-1), target),
    }


def _check(logits: Tensor, target: Tensor) -> None:
    if logits.ndim != 2 or not logits.is_floating_point() or not logits.numel():
        raise InputError(
            f"A classification metric needs logits float [examples, classes], got {logits.dtype} {list(logits.shape)}."
        )
    if target.shape != logits.shape[:1] or target.dtype != torch.int64:
        raise InputError(
            f"A classification metric needs a target int64 [{len(logits)}], got {target.dtype} {list(target.shape)}."
        )
    if bool(((target < 0) | (target >= logits.shape[-1])).any()):
        raise InputError(
            f"A classification metric needs targets in 0..{logits.shape[-1] - 1}, got {int(target.min())}..{int(target.max())}."
        )
