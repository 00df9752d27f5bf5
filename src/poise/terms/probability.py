"""Losses on probabilities themselves rather than on their logarithms."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from poise.objective import Term

__all__ = ["Brier"]


class Brier(Term):
    """Half the squared distance of the predicted probabilities from the label: `1/2 sum_k (p_k - y_k)^2`.

    The Brier score with the factor one half of all squared losses, a proper scoring rule: its expectation is least at the
    true probabilities. It lies in [0, 1], so that one wrong label costs little: confident mistakes hardly pull. It is
    the label's side of `alpha*brier + (1-alpha)*distillation(loss="mse_prob")`, in the same units.
    `torch.nn.functional.mse_loss`, which averages over classes, is `2 / classes` times as large.

    Reads:
        logits: float `[batch, classes]`.
        target: int64 `[batch]`, or probabilities float `[batch, classes]`.

    Returns: `[batch]`, in [0, 1].

    >>> import torch
    >>> Brier()(torch.zeros(1, 2), torch.tensor([0]))
    tensor([0.2500])

    Source: Brier (1950); as the ground-truth side of distillation, arXiv:2102.13088, section 5.
    """

    formula = "brier"
    equation = "1/2 sum_k (softmax(logits)_k - y_k)^2"
    source = "Brier (1950); arXiv:2102.13088, sec. 5"
    expects = {"logits": "float [batch, classes]", "target": "int64 [batch] | float [batch, classes]"}

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        p = logits.float().softmax(-1) if logits.dtype.itemsize < 4 else logits.softmax(-1)
        y = target if target.is_floating_point() else F.one_hot(target, logits.shape[-1])
        return 0.5 * (p - y).square().sum(-1)
