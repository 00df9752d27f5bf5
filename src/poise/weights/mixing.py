"""The share of ground truth that a distillation target should keep, in closed form from two runs.

With squared losses, the student of the objective `alpha * fit(labels) + (1 - alpha) * fit(teacher)` depends on the
share `alpha` along a straight line: it is `alpha * f + (1 - alpha) * g`, where `f` is the teacher (`alpha = 1`) and
`g` is the student that saw the teacher only (`alpha = 0`). The best share on validation data is therefore the foot of
the perpendicular from the true targets onto that line. Exact for kernel ridge regression, a cheap estimate for deep
networks: two trainings instead of a grid of ten (arXiv:2102.13088).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from poise.errors import InputError
from poise.operators import project_on_line

if TYPE_CHECKING:
    import numpy.typing as npt

    from poise.objective import Objective, Term

__all__ = ["Mixing", "MixingWeight", "optimal_mixing"]


class Mixing(NamedTuple):
    """The best share of ground truth, what the formula said before clipping, and how to read it.

    `flag` is `"inside"` (the optimum lies in [0, 1]), `"below"` (negative: more regularisation is wanted than one step
    gives), `"above"` (beyond 1: the teacher is already too smooth, distillation hurts) or `"undefined"` (the two
    predictions are equal, so every share gives the same student; then `alpha = raw = 1`).
    """

    alpha: float
    raw: float
    flag: str


def optimal_mixing(
    pred_teacher: Tensor | npt.NDArray[Any],
    pred_student: Tensor | npt.NDArray[Any],
    target: Tensor | npt.NDArray[Any],
    clip: bool = True,
) -> Mixing:
    """Return the share of ground truth whose mixture of two predictions is nearest to the targets.

    `alpha* = <y - g, f - g> / ||f - g||^2`, with `f` the teacher's, `g` the student's predictions and `y` the targets;
    the inner products run over all examples and all outputs, so there is one share for all outputs.

    Args:
        pred_teacher: float `[n]` or `[n, outputs]`, validation predictions of the model fitted to the labels (share 1);
            for classifiers the softmax probabilities.
        pred_student: same shape, of the model fitted to the teacher alone (share 0).
        target: same shape as the predictions, or int64 `[n]` class indices beside predictions `[n, classes]`.
        clip: whether `alpha` is clipped to [0, 1]; `raw` never is.

    Returns:
        `Mixing(alpha, raw, flag)`.

    Raises:
        InputError: shapes differ, a value is not finite, or a class index is out of range.

    >>> optimal_mixing(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0]), torch.tensor([0.5, 1.0]))
    Mixing(alpha=0.75, raw=0.75, flag='inside')

    Source: arXiv:2102.13088, theorem on the optimal share; deep networks, section 5.
    """
    f, g = _prediction(pred_teacher, "pred_teacher"), _prediction(pred_student, "pred_student")
    if f.shape != g.shape:
        raise InputError(
            f"pred_teacher and pred_student must come from the same validation examples: their shapes are "
            f"{list(f.shape)} and {list(g.shape)}."
        )
    share, coincide = project_on_line(_target(target, f), start=g, end=f)
    if coincide:
        return Mixing(1.0, 1.0, "undefined")
    raw = float(share)
    flag = "below" if raw < 0 else "above" if raw > 1 else "inside"
    return Mixing(min(max(raw, 0.0), 1.0) if clip else raw, raw, flag)


@dataclass(frozen=True)
class MixingWeight:
    """The rule that sets `alpha` in `alpha * fit + (1 - alpha) * distillation` from two finished runs.

    Args:
        mixing: the result of `optimal_mixing`; `alpha` is the weight of the ground-truth term.

    >>> from poise.terms import Brier, Distillation
    >>> teacher, student = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.7, 0.3]])
    >>> weight = MixingWeight.from_two_runs(teacher, student, torch.tensor([[0.75, 0.25]]))
    >>> weight.objective(Brier(), Distillation()).labels, round(float(weight), 6)
    (('brier', 'distillation'), 0.25)

    Source: arXiv:2102.13088, section 5.
    """

    mixing: Mixing

    @classmethod
    def from_two_runs(
        cls,
        pred_teacher: Tensor | npt.NDArray[Any],
        pred_student: Tensor | npt.NDArray[Any],
        target: Tensor | npt.NDArray[Any],
        clip: bool = True,
    ) -> MixingWeight:
        """Estimate the share from the validation predictions of a teacher (share 1) and of a student (share 0).

        Arguments, errors and formula are those of `optimal_mixing`.
        """
        return cls(optimal_mixing(pred_teacher, pred_student, target, clip=clip))

    @property
    def ground_truth(self) -> float:
        """The weight `alpha` of the term that fits the labels."""
        return self.mixing.alpha

    @property
    def distillation(self) -> float:
        """The weight `1 - alpha` of the term that fits the teacher."""
        return 1.0 - self.mixing.alpha

    def __float__(self) -> float:
        return self.mixing.alpha

    def objective(self, fit: Term | Objective, distillation: Term | Objective) -> Objective:
        """Return `alpha * fit + (1 - alpha) * distillation`; a share of exactly 0 or 1 removes the other term."""
        return self.ground_truth * fit + self.distillation * distillation


def _prediction(values: Tensor | npt.NDArray[Any], name: str) -> Tensor:
    tensor = torch.as_tensor(values)
    if not tensor.is_floating_point():
        raise InputError(f"{name} must be floating point predictions, got {tensor.dtype}.")
    if tensor.ndim == 0 or tensor.numel() == 0:
        raise InputError(f"{name} must hold at least one example, got shape {list(tensor.shape)}.")
    if not torch.isfinite(tensor).all():
        raise InputError(f"{name} holds infinite or NaN values; the share of ground truth cannot be estimated from it.")
    return tensor.detach()


def _target(target: Tensor | npt.NDArray[Any], prediction: Tensor) -> Tensor:
    y = torch.as_tensor(target).detach().to(prediction.device)
    if not y.is_floating_point() and prediction.ndim == 2 and y.ndim == 1 and len(y) == len(prediction):
        classes = prediction.shape[1]
        if int(y.min()) < 0 or int(y.max()) >= classes:
            raise InputError(
                f"target holds class indices {int(y.min())} to {int(y.max())}; the predictions have {classes} classes."
            )
        return torch.nn.functional.one_hot(y.long(), classes).to(prediction.dtype)
    if y.shape != prediction.shape:
        raise InputError(
            f"target must have the shape of the predictions, {list(prediction.shape)}, or be int64 class indices "
            f"[{len(prediction)}] beside [n, classes] predictions; got {y.dtype} {list(y.shape)}."
        )
    if not torch.isfinite(y.double()).all():
        raise InputError("target holds infinite or NaN values.")
    return y.to(prediction.dtype)
