"""Preferences that are held with a probability: soft labels for pairs."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from poise.errors import InputError, QuantityError
from poise.objective import Value
from poise.terms.preference.margin import PairedTerm, require_positive

__all__ = ["SoftPreference"]


class SoftPreference(PairedTerm):
    """Prefer the chosen answer with a probability: DPO with a soft label, one for all pairs or one for each.

    -C log sigma(z) - (1 - C) log sigma(-z),   z = beta margin of the log-ratios

    The gradient in z is sigma(z) - C, so the margin settles at z* = log(C/(1 - C)): infinite for C = 1, which is `dpo`
    bit for bit; 0 for C = 1/2; and below 1/2 the label is turned round. C is data: it carries no gradient.

    Args:
        beta: as in `dpo`.
        label: C in [0, 1]; None reads `preference_label` float [batch], one C for each pair.

    Reads: what `dpo` reads, and `preference_label` float [batch] in [0, 1] where no label is given.
    Returns and publishes: see `PairedTerm`; nats. `weight` is C - sigma(z), which is negative past z*.

    Raises:
        InputError: an argument out of range.
        QuantityError: a `preference_label` outside [0, 1] (seen on the CPU alone, where looking costs no wait).

    Example:
        >>> sums = [torch.tensor([x]) for x in (-42.0, -45.0, -40.0, -38.0)]
        >>> SoftPreference(beta=0.1)(*sums, preference_label=torch.tensor([0.8])).values
        tensor([0.5741])

    Source: Wang et al., arXiv:2410.12735, eq. 7; Raibows/CREAM.
    """

    formula = "soft_dpo"
    equation: ClassVar[str] = "-C log sigma(z) - (1 - C) log sigma(-z),  z = beta margin of log-ratios"
    source: ClassVar[str] = "arXiv:2410.12735"
    expects: ClassVar[dict[str, str]] = {"preference_label": "float [batch]"}

    def __init__(self, beta: float = 0.1, label: float | None = None) -> None:
        super().__init__()
        require_positive("soft_dpo", beta=beta)
        if label is not None and not 0 <= label <= 1:
            raise InputError(f"soft_dpo: label is a probability, in [0, 1], and it is {label}.")
        self.beta = beta
        self.label = label

    def readings(self) -> tuple[str, ...]:
        """The labels of the pairs, where one label holds for all."""
        return () if self.label is None else ("preference_label",)

    def requirements(self) -> tuple[str, ...]:
        """The labels of the pairs, where none holds for all."""
        return ("preference_label",) if self.label is None else ()

    def forward(  # type: ignore[override]
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
        chosen_mask: Tensor | None = None,
        rejected_mask: Tensor | None = None,
        preference_label: Tensor | None = None,
    ) -> Value:
        pair = self.pair(
            (chosen_logps, reference_chosen_logps, chosen_mask),
            (rejected_logps, reference_rejected_logps, rejected_mask),
        )
        z = self.margin(pair)
        c = self._probability(preference_label, z)
        value = self.published(pair, -c * F.logsigmoid(z) - (1 - c) * F.logsigmoid(-z))
        value.extras["weight"] = (c - torch.sigmoid(z)).detach()
        return value

    def _probability(self, labels: Tensor | None, like: Tensor) -> Tensor | float:
        if self.label is not None:
            return self.label
        if labels is None:
            raise QuantityError("soft_dpo reads 'preference_label' float [batch], and it was not offered.")
        if (
            labels.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and not ((labels >= 0) & (labels <= 1)).all()
        ):
            raise QuantityError("soft_dpo reads 'preference_label' as probabilities in [0, 1], and some are not.")
        return labels.detach().to(like.dtype)
