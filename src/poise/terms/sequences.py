"""What terms on answers of several tokens share: the sum over an answer."""

from __future__ import annotations

import torch
from torch import Tensor

from poise.errors import QuantityError

__all__ = ["sequence_sum"]


def sequence_sum(logps: Tensor, mask: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """Sum over the tokens of each answer, sum_t w_t x_t; what is summed already stays as it is.

    Args:
        logps: float [batch, time], or sums float [batch].
        mask: bool [batch, time], True on answer tokens; without it, everything outside the answer is 0 already.
        weight: float [batch, time].

    Returns: float [batch].

    Raises:
        QuantityError: weights for tokens that are summed already.

    >>> sequence_sum(torch.tensor([[-1.0, -2.0, -4.0]]), torch.tensor([[False, True, True]]))
    tensor([-6.])
    """
    if logps.ndim == 1:
        if weight is not None:
            raise QuantityError(
                "A weight for each token needs a log-probability for each token, float [batch, time], and sums over "
                f"the answers were offered, float [{len(logps)}]."
            )
        return logps
    if mask is not None:
        logps = torch.where(mask, logps, 0.0)
    if weight is not None:
        logps = logps * weight
    return logps.sum(-1)
