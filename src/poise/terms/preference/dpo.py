"""Direct preference optimisation, and what it becomes where labels may be wrong."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from poise.errors import InputError
from poise.objective import Objective, Summand
from poise.terms.preference.margin import (
    Pair,
    PairedTerm,
    require_at_least_zero,
    require_one_of,
    require_positive,
)

__all__ = ["CDPO", "DPO", "DPOP", "RobustDPO"]

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


class DPO(PairedTerm):
    """Prefer the chosen answer by the margin of the implicit rewards (direct preference optimisation).

    -(1 - e) log sigma(z) - e log sigma(-z),   z = beta [log pi/pi_ref (chosen) - log pi/pi_ref (rejected)]

    Log-probabilities are summed over the answer; nothing is divided by lengths unless `length_normalized` says so. `e` is
    the label smoothing: the share of labels that are taken to be wrong (conservative DPO; the margin then settles at
    z* = log((1 - e)/e)).

    Args:
        beta: strength of the hold on the reference, positive: the policy moves less as it rises.
        reference_free: take the reference as uniform and read none.
        label_smoothing: e, in [0, 0.5).
        divergence: what holds the policy at the reference. "reverse_kl" is DPO; the others put f'(u), u = pi/pi_ref, in
            the place of log u (f-DPO): "forward_kl" 1 - 1/u, "js" log(2u/(1 + u)), "alpha" (u^(a - 1) - 1)/(a - 1).
        alpha: a of the "alpha" divergence, not 1.
        length_normalized: divide each log-ratio by the length of its answer; beta is then about a length larger.

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
        length_normalized: bool = False,
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
        self.length_normalized = self.lengths = length_normalized

    def loss(self, pair: Pair) -> Tensor:
        return smoothed(self.margin(pair), self.label_smoothing)

    def rewards(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """beta f'(pi/pi_ref) of both answers."""
        pair = pair.map(self._slope)
        if self.length_normalized:
            pair = pair.per_token
        return self.beta * pair.chosen, self.beta * pair.rejected

    def _slope(self, ratio: Tensor) -> Tensor:
        """f'(u) of the divergence at log u = ratio, without its constant."""
        if self.divergence == "reverse_kl":
            return ratio
        if self.divergence == "forward_kl":
            return -torch.expm1(-ratio)
        if self.divergence == "js":
            return math.log(2) + F.logsigmoid(ratio)
        power = self.alpha - 1
        # u^(a-1) leaves float32 at exp(88); far before, the log-sigmoid around it is flat.
        return torch.expm1((power * ratio).clamp(max=80.0)) / power


def CDPO(beta: float = 0.1, label_smoothing: float = 0.1) -> Objective:
    """Take a share of the labels to be wrong: conservative DPO, which is dpo with label smoothing.

    Example:
        >>> str(CDPO(label_smoothing=0.2))
        'dpo(label_smoothing=0.2)'

    Source: Mitchell, "A note on DPO with noisy preferences" (2023).
    """
    require_positive("cdpo", beta=beta)
    require_label_smoothing("cdpo", label_smoothing)
    return Objective([Summand(DPO(beta=beta, label_smoothing=label_smoothing))])


class RobustDPO(PairedTerm):
    """Undo the bias that wrong labels bring: DPO whose mean over flipped labels is that of clean ones.

    [-(1 - e) log sigma(z) + e log sigma(-z)] / (1 - 2e)

    The sign of the second part is the opposite of label smoothing's: the expectation over labels flipped with
    probability `e` equals DPO on clean labels. The value falls without end as z grows.

    Args:
        beta: as in `dpo`.
        label_smoothing: e, the rate of flipped labels, in [0, 0.5).

    Reads, returns and publishes: see `PairedTerm`; nats.

    Source: Chowdhury et al., arXiv:2403.00409, eq. 10.
    """

    formula = "robust_dpo"
    equation: ClassVar[str] = "[-(1 - e) log sigma(z) + e log sigma(-z)] / (1 - 2e),  z = beta margin of log-ratios"
    source: ClassVar[str] = "arXiv:2403.00409"
    bounded_below = False

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.1) -> None:
        super().__init__()
        require_positive("robust_dpo", beta=beta)
        require_label_smoothing("robust_dpo", label_smoothing)
        self.beta = beta
        self.label_smoothing = label_smoothing

    def loss(self, pair: Pair) -> Tensor:
        z, e = self.margin(pair), self.label_smoothing
        return (-(1 - e) * F.logsigmoid(z) + e * F.logsigmoid(-z)) / (1 - 2 * e)


class DPOP(PairedTerm):
    """Keep the chosen answer at least as likely as under the reference while preferring it (DPO-Positive).

    -log sigma(beta [D(chosen) - D(rejected) - l max(0, -D(chosen))]),   D = log pi - log pi_ref

    The penalty stands inside the logarithm and is scaled by beta.

    Args:
        beta: as in `dpo`.
        penalty: l, at least 0; 0 is `dpo`. The paper has 5 to 500.

    Reads, returns and publishes: see `PairedTerm`; the margin is that of the rewards, without the penalty.

    Source: Pal et al., arXiv:2402.13228, eq. 3.
    """

    formula = "dpop"
    equation: ClassVar[str] = "-log sigma(beta (D(chosen) - D(rejected) - l max(0, -D(chosen))))"
    source: ClassVar[str] = "arXiv:2402.13228"

    def __init__(self, beta: float = 0.1, penalty: float = 50.0) -> None:
        super().__init__()
        require_positive("dpop", beta=beta)
        require_at_least_zero("dpop", penalty=penalty)
        self.beta = beta
        self.penalty = penalty

    def loss(self, pair: Pair) -> Tensor:
        return -F.logsigmoid(self.margin(pair) - self.beta * self.penalty * torch.relu(-pair.chosen))


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
