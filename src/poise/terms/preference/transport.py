"""Preferences between distributions: the chosen rewards should dominate the rejected ones, rank by rank."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from poise.objective import Value
from poise.terms.preference.dpo import require_label_smoothing, smoothed
from poise.terms.preference.margin import PairedTerm, require_positive, sequence_sum

__all__ = ["AOT"]


class AOT(PairedTerm):
    """Make rewards dominate by rank within the batch instead of pair by pair (alignment via optimal transport).

    paired:    d_i = sort(log pi(chosen)/pi(rejected))_i - sort(log pi_ref(chosen)/pi_ref(rejected))_i
    unpaired:  d_i = sort(log pi/pi_ref (chosen))_i - sort(log pi/pi_ref (rejected))_i
    value      -(1 - e) log sigma(beta d_i) - e log sigma(-beta d_i)

    Sorting is the transport between two samples on the line. It couples the examples of a batch: the value of row i is
    that of rank i, and a larger batch means another objective.

    Args:
        beta: as in `dpo`.
        label_smoothing: e, in [0, 0.5).
        unpaired: compare chosen with rejected answers that need not belong together.

    Reads and publishes: see `PairedTerm`; margin and rewards are those of the pairs.

    Source: Melnyk et al., arXiv:2406.05882; TRL 1.16, "aot" and "aot_unpaired".
    """

    formula = "aot"
    equation: ClassVar[str] = "-log sigma(beta (sort(x)_i - sort(y)_i)),  x, y log-ratios of the batch"
    source: ClassVar[str] = "arXiv:2406.05882"
    capabilities = frozenset({"potential", "deterministic"})
    couples = ("chosen_logps", "rejected_logps", "reference_chosen_logps", "reference_rejected_logps")

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0, unpaired: bool = False) -> None:
        super().__init__()
        require_positive("aot", beta=beta)
        require_label_smoothing("aot", label_smoothing)
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.unpaired = unpaired

    def forward(  # type: ignore[override]
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
        chosen_mask: Tensor | None = None,
        rejected_mask: Tensor | None = None,
    ) -> Value:
        pair = self.pair(
            (chosen_logps, reference_chosen_logps, chosen_mask),
            (rejected_logps, reference_rejected_logps, rejected_mask),
        )
        if self.unpaired:
            upper, lower = pair.chosen, pair.rejected
        else:
            masks = chosen_mask, rejected_mask
            upper = sequence_sum(chosen_logps, masks[0]) - sequence_sum(rejected_logps, masks[1])
            lower = sequence_sum(reference_chosen_logps, masks[0]) - sequence_sum(reference_rejected_logps, masks[1])
            lower = lower.detach()
        d = upper.sort(dim=0).values - lower.sort(dim=0).values
        return self.published(pair, smoothed(self.beta * d, self.label_smoothing))
