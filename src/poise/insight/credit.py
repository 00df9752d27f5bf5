"""Where a model's reward falls within an answer: implied and given token rewards side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.errors import InputError

__all__ = ["TokenCredit", "attribution", "token_credit"]

BINS = 20


@dataclass(frozen=True)
class TokenCredit:
    """Token rewards in numbers.

    Attributes:
        answers, tokens: how many.
        total: mean over answers of the sum of rewards.
        negative: share of tokens with a reward below 0.
        histogram: int64 [20], counts in equal bins from -0.5 to 0.5, what lies beyond in the outermost.
        correlation: of the rewards with the implied ones over all tokens, NaN where none were given or one side is constant.
        auc: probability that a token that truly matters has the larger reward than one that does not; NaN without labels.
    """

    answers: int
    tokens: int
    total: float
    negative: float
    histogram: Tensor
    correlation: float = math.nan
    auc: float = math.nan

    def __str__(self) -> str:
        known = {"correlation with the implied rewards": self.correlation, "AUC": self.auc}
        more = "".join(f", {name} {value:.3f}" for name, value in known.items() if not math.isnan(value))
        return f"{self.tokens} tokens of {self.answers} answers: sum {self.total:+.3f} an answer, {self.negative:.0%} negative{more}"


def token_credit(
    rewards: Sequence[Tensor], implied: Sequence[Tensor] | None = None, labels: Sequence[Tensor] | None = None
) -> TokenCredit:
    """Describe token rewards; compare them with implied ones before and after training, and with the truth where it is known.

    Args:
        rewards: float [tokens] for each answer.
        implied: the same of what a policy implies, beta log pi/pi_ref; see `implied_token_rewards`.
        labels: bool [tokens] for each answer: which tokens truly matter.

    Raises:
        InputError: no token, or other numbers of tokens.

    >>> token_credit([torch.tensor([0.4, -0.1])], labels=[torch.tensor([True, False])]).auc
    1.0
    """
    if not sum(len(r) for r in rewards):
        raise InputError("token_credit needs at least one token.")
    for name, other in (("implied", implied), ("labels", labels)):
        if other is not None and [len(x) for x in other] != [len(r) for r in rewards]:
            raise InputError(f"token_credit: {name} must have a number for each token of each answer.")
    joined = torch.cat([r.double().cpu() for r in rewards])
    places = ((joined + 0.5) * BINS).floor().long().clamp(0, BINS - 1)
    return TokenCredit(
        answers=len(rewards),
        tokens=len(joined),
        total=float(joined.sum()) / len(rewards),
        negative=float((joined < 0).double().mean()),
        histogram=torch.bincount(places, minlength=BINS),
        correlation=math.nan if implied is None else _pearson(joined, torch.cat([x.double().cpu() for x in implied])),
        auc=math.nan if labels is None else _auc(joined, torch.cat([x.cpu().bool() for x in labels])),
    )


def attribution(tokens: Sequence[str], rewards: Tensor) -> str:
    """Write an answer with its rewards, for reading.

    >>> attribution(["a", "cat"], torch.tensor([0.0, 0.25]))
    'a[+0.00] cat[+0.25]'

    Raises:
        InputError: not a reward for each token.
    """
    if len(tokens) != len(rewards):
        raise InputError(f"attribution: {len(tokens)} tokens and {len(rewards)} rewards.")
    return " ".join(f"{token}[{reward:+.2f}]" for token, reward in zip(tokens, rewards.tolist(), strict=True))


def _pearson(x: Tensor, y: Tensor) -> float:
    if float(x.std()) == 0 or float(y.std()) == 0:
        return math.nan
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def _auc(scores: Tensor, labels: Tensor) -> float:
    """The Mann-Whitney statistic, ties half right."""
    positive, negative = int(labels.sum()), int((~labels).sum())
    if not positive or not negative:
        return math.nan
    _, inverse, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0).double() - (counts - 1) / 2)[inverse]
    return (float(ranks[labels].sum()) - positive * (positive + 1) / 2) / (positive * negative)
