"""Regularised preference optimisation: the likelihood of good answers as an adversary's answer to overoptimisation.

Preference data do not cover all answers, and a fitted reward is spuriously high on rare ones. Playing against the worst
reward that still fits the data,

    max_pi min_r  eta E[r(x, a ~ pi) - r(x, a' ~ base) - beta KL(pi || pi_ref)] + L_D(r),

has the same solution as

    min_pi  dpo(beta) + eta beta E[-log pi(a' ~ base)],

that is DPO with a supervised term: `rpo` writes this sum out. `adversarial_value` computes the game on finite problems.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from poise.objective import Objective
from poise.terms.preference.dpo import DPO
from poise.terms.preference.margin import (
    REDUCTIONS,
    SIDES,
    Reduction,
    TokenTerm,
    require_at_least_zero,
    require_one_of,
    require_positive,
)

__all__ = ["RPO", "SFT"]


class SFT(TokenTerm):
    """Raise the likelihood of an answer: supervised fine-tuning, the negative log-likelihood of its tokens.

    -log pi(y_t | y_<t)

    Public implementations differ in the reduction, and the same weight means different things under each:

    - "token_mean": one mean over all answer tokens of the batch, so long answers weigh more (TRL's "sft" loss);
    - "sequence_mean": the mean over each answer first, then over answers (OpenRLHF's `nll_loss_coef`);
    - "sum": the sum over each answer, then the mean over answers (the theory of RPO); it grows with length.

    Args:
        on: "response" is the one answer of a stream, which on pairs is the chosen one; "chosen", "rejected".
        reduction: see above.
        token_weight: weigh each token by `<side>_token_weight` float [batch, time]; the count stays the number of tokens.

    Reads: `<side>_logps` float [batch, time], or sums [batch]; `<side>_mask` bool [batch, time] (needed for the means).
    Returns: float [batch, time] for "token_mean", float [batch] otherwise; nats, >= 0.

    Example:
        >>> import torch
        >>> logps = torch.tensor([[0.0, -1.0, -3.0]])
        >>> SFT(reduction="sum")(logps)
        tensor([4.])
        >>> SFT(reduction="sequence_mean")(logps, torch.tensor([[False, True, True]]))
        tensor([2.])
    """

    formula = "sft"
    equation: ClassVar[str] = "-log pi(y_t | y_<t), over the tokens of the answer"
    source: ClassVar[str] = "arXiv:2405.16436"

    def __init__(
        self,
        on: Literal["response", "chosen", "rejected"] = "response",
        reduction: Reduction = "token_mean",
        token_weight: bool = False,
    ) -> None:
        super().__init__()
        require_one_of("sft", "on", on, SIDES)
        require_one_of("sft", "reduction", reduction, REDUCTIONS)
        self.on_ = on
        self.reduction = reduction
        self.token_weight = token_weight

    def forward(
        self,
        response_logps: Tensor | None = None,
        response_mask: Tensor | None = None,
        response_token_weight: Tensor | None = None,
        chosen_logps: Tensor | None = None,
        chosen_mask: Tensor | None = None,
        chosen_token_weight: Tensor | None = None,
        rejected_logps: Tensor | None = None,
        rejected_mask: Tensor | None = None,
        rejected_token_weight: Tensor | None = None,
    ) -> Tensor:
        return -self.reduced(
            response=(response_logps, response_mask, response_token_weight),
            chosen=(chosen_logps, chosen_mask, chosen_token_weight),
            rejected=(rejected_logps, rejected_mask, rejected_token_weight),
        )


def RPO(beta: float = 0.1, eta: float = 0.005, normalize: Reduction = "sum") -> Objective:
    """Guard a preference loss against overoptimisation by the likelihood of the chosen answer: dpo + eta*beta*sft.

    Both terms stay visible: the result prints, and is reported, as their sum.

    Args:
        beta: as in `dpo`; it stands in both parts.
        eta: strength of the adversary, at least 0; 0 is `dpo` alone. The mean over tokens needs about a length more.
        normalize: reduction of the supervised part. The theory, and the authors' first code, have "sum"; "sequence_mean"
            matches their second code (there with a weight c = eta*beta that does not know beta), "token_mean" TRL's.

    Raises:
        InputError: beta is not positive, eta is negative, or there is no such reduction.

    Example:
        >>> str(RPO(beta=0.5, eta=0.2))
        "dpo(beta=0.5) + 0.1*sft(on='chosen', reduction='sum')"

    Source: Liu et al., arXiv:2405.16436; YSLIU627/Regularized-Preference-Optimization.
    """
    require_positive("rpo", beta=beta)
    require_at_least_zero("rpo", eta=eta)
    require_one_of("rpo", "normalize", normalize, REDUCTIONS)
    return DPO(beta=beta) + eta * beta * SFT(on="chosen", reduction=normalize)
