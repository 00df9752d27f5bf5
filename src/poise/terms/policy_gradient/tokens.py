"""How the tokens of an answer become one number; public implementations differ, and `aggregate` names the ways."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from poise.errors import InputError, QuantityError
from poise.terms.policy_gradient.scored import positive

Aggregate = Literal["sequence_mean", "token_mean", "dr_grpo", "sequence_sum"]
AGGREGATES = ("sequence_mean", "token_mean", "dr_grpo", "sequence_sum")


def check_length(formula: str, aggregate: str, max_length: int | None) -> None:
    if (aggregate == "dr_grpo") != (max_length is not None):
        raise InputError(
            f"{formula}: aggregate='dr_grpo' divides by max_length, and only it does; got aggregate={aggregate!r} with "
            f"max_length={max_length}."
        )
    positive(formula, "max_length", max_length)


def tokens_of(formula: str, logps: Tensor, mask: Tensor | None, aggregate: str) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and mask, both [batch, time]; a sum over an answer is an answer of one token."""
    if logps.ndim == 1:
        if aggregate == "token_mean" and mask is not None and mask.shape[1] > 1:
            raise QuantityError(
                f"{formula}: a mean over tokens needs a log-probability for each, float [batch, time], and sums over the "
                f"answers were offered, float [{len(logps)}]."
            )
        return logps[:, None], torch.ones_like(logps[:, None], dtype=torch.bool)
    if mask is None:
        if logps.shape[1] > 1:
            raise QuantityError(
                f"{formula} reads 'response_mask' with log-probabilities for each token, and it was not offered."
            )
        mask = torch.ones_like(logps, dtype=torch.bool)
    return logps, mask


def aggregate_tokens(values: Tensor, mask: Tensor, aggregate: str, max_length: int | None) -> Tensor:
    """Reduce [batch, time] to [batch]; "token_mean" is left to the objective, which counts tokens."""
    values = torch.where(mask, values, 0.0)
    if aggregate == "token_mean":
        return values
    total = values.sum(-1)
    if aggregate == "sequence_mean":
        return total / mask.sum(-1).clamp(min=1)
    return total if aggregate == "sequence_sum" else total / (max_length or 1)


def counted(mask: Tensor, sample_weight: Tensor | None) -> Tensor:
    return mask.float() if sample_weight is None else mask * sample_weight[:, None]


def token_mean_of(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)
