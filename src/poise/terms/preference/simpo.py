"""Losses without a reference, on mean log-probabilities: SimPO and the odds ratio of ORPO."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from poise.objective import Objective
from poise.terms.preference.margin import Pair, PairedTerm, require_at_least_zero, require_positive
from poise.terms.preference.rpo import SFT

__all__ = ["ORPO", "OddsRatio", "SimPO"]


class SimPO(PairedTerm):
    """Prefer the chosen answer by its mean log-probability, by at least a margin, without a reference.

    -log sigma(beta [log pi(chosen)/|chosen| - log pi(rejected)/|rejected|] - gamma)

    `gamma` stands beside the rewards and is not multiplied by beta; some configurations state gamma/beta instead.

    Args:
        beta: scale of the mean log-probabilities, positive (2 to 10).
        gamma: target margin of the rewards, at least 0.

    Reads: `chosen_logps`, `rejected_logps` float [batch, time] or [batch]; `chosen_mask`, `rejected_mask` bool [batch,
        time]. Returns and publishes: see `PairedTerm`; `margin` leaves gamma out, `weight` is sigma(gamma - margin).

    Example:
        >>> both = torch.ones(1, 2, dtype=torch.bool)
        >>> term = SimPO(beta=2.0, gamma=1.0)
        >>> term(torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -2.0]]), chosen_mask=both, rejected_mask=both).values
        tensor([0.6931])

    Source: Meng et al., arXiv:2405.14734, eq. 6.
    """

    formula = "simpo"
    equation: ClassVar[str] = "-log sigma(beta (log pi(chosen)/|chosen| - log pi(rejected)/|rejected|) - gamma)"
    source: ClassVar[str] = "arXiv:2405.14734, eq. 6"
    reference_free = True
    lengths = True

    def __init__(self, beta: float = 2.0, gamma: float = 1.0) -> None:
        super().__init__()
        require_positive("simpo", beta=beta)
        require_at_least_zero("simpo", gamma=gamma)
        self.beta = beta
        self.gamma = gamma

    def loss(self, pair: Pair) -> Tensor:
        return -F.logsigmoid(self.margin(pair) - self.gamma)

    def rewards(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """beta log pi / length of both answers."""
        return self.beta * pair.per_token.chosen, self.beta * pair.per_token.rejected

    def gradient_weight(self, margin: Tensor) -> Tensor:
        """sigma(gamma - margin)."""
        return torch.sigmoid(self.gamma - margin)


class OddsRatio(PairedTerm):
    """Raise the odds of the chosen answer above those of the rejected one, without a reference: the contrast of ORPO.

    -log sigma(log odds(chosen) - log odds(rejected)),   odds = p/(1 - p),   log p = mean log-probability of the tokens

    Reads: as `simpo`. Returns: float [batch], nats; the published rewards are the log-odds.

    Source: Hong et al., arXiv:2403.07691, eq. 4 and 7.
    """

    formula = "odds_ratio"
    equation: ClassVar[str] = "-log sigma(log odds(chosen) - log odds(rejected)),  odds = p/(1 - p), p per token"
    source: ClassVar[str] = "arXiv:2403.07691, eq. 4 and 7"
    reference_free = True
    lengths = True

    def rewards(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """The log-odds of both answers."""
        return log_odds(pair.per_token.chosen), log_odds(pair.per_token.rejected)


def log_odds(log_p: Tensor) -> Tensor:
    """log p - log(1 - p) from log p < 0, exact at both ends.

    >>> log_odds(torch.tensor([0.5]).log())
    tensor([0.])
    """
    # At p = 1 the odds are infinite; the nearest number below keeps value and gradient finite.
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    return log_p - torch.log(-torch.expm1(log_p))


def ORPO(weight: float = 0.1) -> Objective:
    """Tune on the chosen answer and push the rejected one away by the odds ratio, in one stage: sft + weight*odds_ratio.

    The supervised part is one mean over the chosen tokens. (TRL's includes the tokens of the prompt.)

    Args:
        weight: lambda of the paper, `beta` in TRL; at least 0.

    Example:
        >>> str(ORPO())
        "sft(on='chosen') + 0.1*odds_ratio"

    Source: Hong et al., arXiv:2403.07691, eq. 6.
    """
    require_at_least_zero("orpo", weight=weight)
    return SFT(on="chosen") + weight * OddsRatio()
