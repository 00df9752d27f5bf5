"""Token-level DPO: the margin with the divergences that the two answers cost along the way."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from poise.errors import InputError
from poise.objective import Value
from poise.terms.preference.margin import PairedTerm, require_at_least_zero, require_positive, sequence_sum

__all__ = ["TDPO"]


class TDPO(PairedTerm):
    """Balance the margin by the KL that each answer costs token by token (token-level DPO).

    version 1:  -log sigma(u - beta [K(rejected) - K(chosen)])
    version 2:  -log sigma(u - alpha beta [K(rejected) - sg K(chosen)])

    u = beta margin of the log-ratios,   K(y) = sum_t KL(pi_ref(.|y_<t) || pi(.|y_<t)),   sg cuts the gradient

    The divergence of the rejected answer is lowered. Version 1 raises that of the chosen one, version 2 leaves it alone.

    Args:
        beta: as in `dpo`.
        version: 1 or 2.
        alpha: weight of the divergences in version 2, at least 0; 0 is `dpo`.

    Reads: what `dpo` reads, and `chosen_kl`, `rejected_kl` float [batch, time].
    Returns and publishes: see `PairedTerm`; margin and rewards are DPO's, without the divergences. Also publishes
        `chosen_kl` and `rejected_kl`, float [batch], summed over the answers.

    Source: Zeng et al., arXiv:2404.11999, eq. 12 to 17; Vance0124/Token-level-Direct-Preference-Optimization.
    """

    formula = "tdpo"
    equation: ClassVar[str] = "-log sigma(u - alpha beta (K(rejected) - sg K(chosen))),  K = sum_t KL(pi_ref || pi)"
    source: ClassVar[str] = "arXiv:2404.11999"

    def __init__(self, beta: float = 0.1, version: Literal[1, 2] = 2, alpha: float = 0.5) -> None:
        super().__init__()
        require_positive("tdpo", beta=beta)
        require_at_least_zero("tdpo", alpha=alpha)
        if version not in (1, 2):
            raise InputError(f"tdpo: version is 1 or 2, and it is {version!r}.")
        self.beta = beta
        self.version = version
        self.alpha = alpha
        if version == 2:  # the value moves with the chosen divergence, and the gradient does not
            self.capabilities = frozenset({"per_example", "deterministic"})  # type: ignore[misc]

    def forward(  # type: ignore[override]
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
        chosen_kl: Tensor,
        rejected_kl: Tensor,
        chosen_mask: Tensor | None = None,
        rejected_mask: Tensor | None = None,
    ) -> Value:
        pair = self.pair(
            (chosen_logps, reference_chosen_logps, chosen_mask),
            (rejected_logps, reference_rejected_logps, rejected_mask),
        )
        lost = sequence_sum(chosen_kl, chosen_mask), sequence_sum(rejected_kl, rejected_mask)
        if self.version == 1:
            correction = lost[1] - lost[0]
        else:
            correction = self.alpha * (lost[1] - lost[0].detach())
        value = self.published(pair, -F.logsigmoid(self.margin(pair) - self.beta * correction))
        value.extras.update(chosen_kl=lost[0].detach(), rejected_kl=lost[1].detach())
        return value
