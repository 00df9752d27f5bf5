"""Direct preference optimisation, and what it becomes where labels may be wrong."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from poise.errors import InputError
from poise.terms.preference.margin import Pair, PairedTerm, require_one_of, require_positive

__all__ = ["DPO"]

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


class DPO(PairedTerm):
    """Prefer the chosen answer by the margin of the implicit rewards (direct preference optimisation).

    -(1 - e) log sigma(z) - e log sigma(-z),   z = beta [log pi/pi_ref (chosen) - log pi/pi_ref (rejected)]

    Log-probabilities are summed over the answer, not divided by its length. `e` is the label smoothing: the share of
    labels that are taken to be wrong (conservative DPO; the margin is then finite, z* = log((1 - e)/e)).

    Args:
        beta: strength of the hold on the reference, positive; the KL of the policy falls as it rises.
        reference_free: take the reference as uniform and read none.
        label_smoothing: e, in [0, 0.5).
        divergence: what holds the policy at the reference. "reverse_kl" is DPO; the others put f'(u), u = pi/pi_ref, in
            the place of log u (f-DPO): "forward_kl" 1 - 1/u, "js" log(2u/(1 + u)), "alpha" (u^(a - 1) - 1)/(a - 1).
        alpha: a of the "alpha" divergence, not 1.

    Reads, returns and publishes: see `PairedTerm`; nats.

    Raises:
        InputError: an argument out of range.

    Example:
        >>> sums = [torch.tensor([x]) for x in (-42.0, -45.0, -40.0, -38.0)]      # chosen, rejected, and the reference's
        >>> DPO(beta=0.1)(*sums).values                                           # -log sigma(0.1 * (-2 + 7))
        tensor([0.4741])

    Source: Rafailov et al., arXiv:2305.18290, eq. 7; Mitchell, cDPO note (2023); Wang et al., arXiv:2309.16240 (f-DPO).
    """

    formula = "dpo"
    equation: ClassVar[str] = "-log sigma(beta (log pi/pi_ref(chosen) - log pi/pi_ref(rejected)))"
    source: ClassVar[str] = "arXiv:2305.18290, eq. 7"

    def __init__(
        self,
        beta: float = 0.1,
        reference_free: bool = False,
        label_smoothing: float = 0.0,
        divergence: Divergence = "reverse_kl",
        alpha: float = 0.5,
    ) -> None:
        super().__init__()
        require_positive("dpo", beta=beta)
        require_label_smoothing("dpo", label_smoothing)
        require_one_of("dpo", "divergence", divergence, ("reverse_kl", "forward_kl", "js", "alpha"))
        if alpha == 1:
            raise InputError("dpo: alpha=1 is the reverse KL; say divergence='reverse_kl'.")
        self.beta = beta
        self.reference_free = reference_free
        self.label_smoothing = label_smoothing
        self.divergence = divergence
        self.alpha = alpha

    def loss(self, pair: Pair) -> Tensor:
        chosen, rejected = self.rewards(pair)
        return smoothed(chosen - rejected, self.label_smoothing)

    def rewards(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """beta f'(pi/pi_ref) of both answers."""
        if self.divergence == "reverse_kl":
            return self.beta * pair.chosen, self.beta * pair.rejected
        return self.beta * self._slope(pair.chosen), self.beta * self._slope(pair.rejected)

    def _slope(self, ratio: Tensor) -> Tensor:
        """f'(u) of the divergence at log u = ratio."""
        if self.divergence == "forward_kl":
            return -torch.expm1(-ratio)
        if self.divergence == "js":
            return math.log(2) + F.logsigmoid(ratio)
        power = self.alpha - 1
        # u^(a-1) leaves float32 at exp(88); far before, the log-sigmoid around it is flat.
        return torch.expm1((power * ratio).clamp(max=80.0)) / power


def smoothed(z: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigma(z) - e log sigma(-z)."""
    if label_smoothing == 0:
        return -F.logsigmoid(z)
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def require_label_smoothing(formula: str, label_smoothing: float) -> None:
    """Raise an `InputError` unless fewer than half of the labels are taken to be wrong."""
    if not 0 <= label_smoothing < 0.5:
        raise InputError(
            f"{formula}: label_smoothing is the share of wrong labels, in [0, 0.5), and it is {label_smoothing}."
        )
