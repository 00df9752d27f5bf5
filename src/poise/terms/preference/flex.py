"""DPO with a scale of its own for each side."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from poise.terms.preference.margin import Pair, PairedTerm, require_at_least_zero, require_positive

__all__ = ["FlexDPO"]


class FlexDPO(PairedTerm):
    """Push the rejected answer down less than the chosen one up: DPO with a beta for each side.

    -log sigma(beta+ log pi/pi_ref (chosen) - beta- log pi/pi_ref (rejected))

    In probabilities the gradient of the rejected answer exceeds that of the chosen one by pi(chosen)/pi(rejected), without
    limit as the rejected one dies; a smaller beta- multiplies that ratio by beta-/beta+. beta- = 0 raises the chosen
    answer alone; equal betas are `dpo`.

    Args:
        beta_chosen: beta+, positive.
        beta_rejected: beta-, at least 0.

    Reads, returns and publishes: see `PairedTerm`; nats.

    Source: Yan et al., arXiv:2406.07327, Flex-DPO (the paper states it in words; this is its common reading).
    """

    formula = "flex_dpo"
    equation: ClassVar[str] = "-log sigma(beta+ log pi/pi_ref(chosen) - beta- log pi/pi_ref(rejected))"
    source: ClassVar[str] = "arXiv:2406.07327"

    def __init__(self, beta_chosen: float = 0.1, beta_rejected: float = 0.08) -> None:
        super().__init__()
        require_positive("flex_dpo", beta_chosen=beta_chosen)
        require_at_least_zero("flex_dpo", beta_rejected=beta_rejected)
        self.beta_chosen = beta_chosen
        self.beta_rejected = beta_rejected

    def rewards(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """beta+ and beta- times the log-ratios."""
        return self.beta_chosen * pair.chosen, self.beta_rejected * pair.rejected
