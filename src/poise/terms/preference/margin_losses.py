"""Other functions of the two log-ratios than the logistic loss of their difference."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from poise.errors import InputError
from poise.terms.preference.margin import Pair, PairedTerm, require_positive

__all__ = ["IPO", "APODown", "APOZero", "BCOPair", "DiscoPOP", "EXOPair", "NCAPair", "SLiC", "SPPOHard"]


class IPO(PairedTerm):
    """Bring the margin to a fixed value instead of driving it to infinity (identity preference optimisation).

    (D - 1/(2 beta))^2,   D = log pi/pi_ref (chosen) - log pi/pi_ref (rejected)

    `beta` is the paper's tau: it sets the target 1/(2 beta) and does not multiply D. With sums the same target holds for
    short and long pairs, so that the distance for each token shrinks with length; TRL and the paper's experiments divide
    by the lengths, which is `length_normalized=True`, and their beta is about a length larger for the same total margin.

    Args:
        beta: tau, positive; larger holds the policy nearer to the reference.
        length_normalized: divide each log-ratio by the length of its answer (the default of TRL; not ours).
        reference_free: leave the reference out.

    Reads: see `PairedTerm`; with `length_normalized` also the masks. Returns: float [batch], >= 0.

    Example:
        >>> one = torch.ones(1)
        >>> IPO(beta=0.5)(3 * one, one, one, one).values       # (2 - 1)^2
        tensor([1.])

    Source: Azar et al., arXiv:2310.12036, eq. 17.
    """

    formula = "ipo"
    equation: ClassVar[str] = "(log pi/pi_ref(chosen) - log pi/pi_ref(rejected) - 1/(2 beta))^2"
    source: ClassVar[str] = "arXiv:2310.12036, eq. 17"

    def __init__(self, beta: float = 0.1, length_normalized: bool = False, reference_free: bool = False) -> None:
        super().__init__()
        require_positive("ipo", beta=beta)
        self.beta = beta
        self.length_normalized = self.lengths = length_normalized
        self.reference_free = reference_free

    def loss(self, pair: Pair) -> Tensor:
        if self.length_normalized:
            pair = pair.per_token
        return (pair.chosen - pair.rejected - 1 / (2 * self.beta)).square()


class SPPOHard(PairedTerm):
    """Bring the log-ratio of the chosen answer to 1/(2 beta) and that of the rejected one to -1/(2 beta).

    (D(chosen) - 1/(2 beta))^2 + (D(rejected) + 1/(2 beta))^2,   D = log pi - log pi_ref, summed

    Self-play preference optimisation with winning probabilities 1 and 0; the paper estimates them.

    Args:
        beta: 1/eta of the paper, positive.

    Source: Wu et al., arXiv:2405.00675, eq. 4.7.
    """

    formula = "sppo_hard"
    equation: ClassVar[str] = "(D(chosen) - 1/(2 beta))^2 + (D(rejected) + 1/(2 beta))^2"
    source: ClassVar[str] = "arXiv:2405.00675, eq. 4.7"

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        require_positive("sppo_hard", beta=beta)
        self.beta = beta

    def loss(self, pair: Pair) -> Tensor:
        target = 0.5 / self.beta
        return (pair.chosen - target).square() + (pair.rejected + target).square()


class SLiC(PairedTerm):
    """Ask for a margin between chosen and rejected, and for no more (sequence likelihood calibration).

    max(0, margin - beta [D(chosen) - D(rejected)]),   D = log pi - log pi_ref, or log pi without a reference

    The paper has no reference, beta = 1 and adds a supervised term:
    `slic(beta=1, reference_free=True) + 0.1*sft`. TRL's "hinge" is `slic(beta=0.1)`, with the reference.

    Args:
        beta: scale of the log-ratios, positive.
        margin: what is asked for, positive.
        reference_free: leave the reference out.

    Source: Zhao et al., arXiv:2305.10425, eq. 1 (calibration part).
    """

    formula = "slic"
    equation: ClassVar[str] = "max(0, margin - beta (D(chosen) - D(rejected)))"
    source: ClassVar[str] = "arXiv:2305.10425"

    def __init__(self, beta: float = 0.1, margin: float = 1.0, reference_free: bool = False) -> None:
        super().__init__()
        require_positive("slic", beta=beta, margin=margin)
        self.beta = beta
        self.margin_ = margin
        self.reference_free = reference_free

    def loss(self, pair: Pair) -> Tensor:
        return torch.relu(self.margin_ - self.margin(pair))


class EXOPair(PairedTerm):
    """Fit the policy's preference to a smoothed label by the reverse KL (efficient exact optimisation, for pairs).

    KL(p || q),   p = (sigma(z), sigma(-z)),   q = (1 - e, e),   z = beta margin of the log-ratios

    Args:
        beta: as in `dpo`.
        label_smoothing: e, in (0, 0.5); it cannot be 0, where the divergence is infinite.

    Source: Ji et al., arXiv:2402.00856, eq. 16.
    """

    formula = "exo_pair"
    equation: ClassVar[str] = "sigma(z) log(sigma(z)/(1 - e)) + sigma(-z) log(sigma(-z)/e)"
    source: ClassVar[str] = "arXiv:2402.00856, eq. 16"

    def __init__(self, beta: float = 0.1, label_smoothing: float = 1e-3) -> None:
        super().__init__()
        require_positive("exo_pair", beta=beta)
        if not 0 < label_smoothing < 0.5:
            raise InputError(
                f"exo_pair: label_smoothing must lie in (0, 0.5), and it is {label_smoothing}; at 0 the loss is infinite."
            )
        self.beta = beta
        self.label_smoothing = label_smoothing

    def loss(self, pair: Pair) -> Tensor:
        z, e = self.margin(pair), self.label_smoothing
        return torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-e)) + torch.sigmoid(-z) * (
            F.logsigmoid(-z) - math.log(e)
        )


class DiscoPOP(PairedTerm):
    """The blend of a logistic and an exponential loss that a search by a language model found.

    (1 - s) (-log sigma(z)) + s exp(-z),   s = sigma(z / tau),   z = beta margin of the log-ratios

    Neither convex nor monotone; the gradient flows through s too.

    Args:
        beta: as in `dpo`.
        tau: sharpness of the switch, positive.

    Source: Lu et al., arXiv:2406.08414, eq. 5.
    """

    formula = "discopop"
    equation: ClassVar[str] = "(1 - s)(-log sigma(z)) + s exp(-z),  s = sigma(z / tau)"
    source: ClassVar[str] = "arXiv:2406.08414, eq. 5"

    def __init__(self, beta: float = 0.1, tau: float = 0.05) -> None:
        super().__init__()
        require_positive("discopop", beta=beta, tau=tau)
        self.beta = beta
        self.tau = tau

    def loss(self, pair: Pair) -> Tensor:
        z = self.margin(pair)
        s = torch.sigmoid(z / self.tau)
        # Both factors at once, in the logarithm: where s vanishes exp(-z) may be infinite, and their product is 0.
        return -F.logsigmoid(z) * (1 - s) + torch.exp(F.logsigmoid(z / self.tau) - z)


class NCAPair(PairedTerm):
    """Classify each answer against the reference: raise the chosen, lower both (noise contrastive alignment, for pairs).

    -log sigma(r(chosen)) - 1/2 log sigma(-r(chosen)) - 1/2 log sigma(-r(rejected)),   r = beta log pi/pi_ref

    Rewards are absolute, so that the likelihood of the chosen answer is held as well.

    Args:
        beta: as in `dpo`.

    Source: Chen et al., arXiv:2402.05369, eq. 15.
    """

    formula = "nca_pair"
    equation: ClassVar[str] = "-log sigma(r(chosen)) - (log sigma(-r(chosen)) + log sigma(-r(rejected)))/2"
    source: ClassVar[str] = "arXiv:2402.05369"

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        require_positive("nca_pair", beta=beta)
        self.beta = beta

    def loss(self, pair: Pair) -> Tensor:
        chosen, rejected = self.rewards(pair)
        return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


class BCOPair(PairedTerm):
    """Classify chosen as good and rejected as bad, each by its own reward (binary classifier optimisation).

    -log sigma(r(chosen)) - log sigma(-r(rejected)),   r = beta log pi/pi_ref

    Without the paper's reward shift, a running mean of rewards, as in TRL 1.16.

    Args:
        beta: as in `dpo`.

    Source: Jung et al., arXiv:2404.04656, with delta = 0.
    """

    formula = "bco_pair"
    equation: ClassVar[str] = "-log sigma(r(chosen)) - log sigma(-r(rejected))"
    source: ClassVar[str] = "arXiv:2404.04656, without the reward shift"

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        require_positive("bco_pair", beta=beta)
        self.beta = beta

    def loss(self, pair: Pair) -> Tensor:
        chosen, rejected = self.rewards(pair)
        return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


class APOZero(PairedTerm):
    """Raise the chosen and lower the rejected answer, both against the reference (anchored preference optimisation).

    1 - sigma(r(chosen)) + sigma(r(rejected)),   r = beta log pi/pi_ref

    For chosen answers that are better than the model's own.

    Args:
        beta: as in `dpo`.

    Source: D'Oosterlinck et al., arXiv:2408.06266, eq. 7.
    """

    formula = "apo_zero"
    equation: ClassVar[str] = "1 - sigma(r(chosen)) + sigma(r(rejected))"
    source: ClassVar[str] = "arXiv:2408.06266, eq. 7"

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        require_positive("apo_zero", beta=beta)
        self.beta = beta

    def loss(self, pair: Pair) -> Tensor:
        chosen, rejected = self.rewards(pair)
        return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


class APODown(PairedTerm):
    """Lower both answers, the rejected one more (anchored preference optimisation, for weak chosen answers).

    sigma(r(chosen)) + 1 - sigma(r(chosen) - r(rejected)),   r = beta log pi/pi_ref

    For chosen answers that are worse than the model's own.

    Args:
        beta: as in `dpo`.

    Source: D'Oosterlinck et al., arXiv:2408.06266, eq. 8.
    """

    formula = "apo_down"
    equation: ClassVar[str] = "sigma(r(chosen)) + 1 - sigma(r(chosen) - r(rejected))"
    source: ClassVar[str] = "arXiv:2408.06266, eq. 8"

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        require_positive("apo_down", beta=beta)
        self.beta = beta

    def loss(self, pair: Pair) -> Tensor:
        chosen, _ = self.rewards(pair)
        return torch.sigmoid(chosen) + torch.sigmoid(-self.margin(pair))
