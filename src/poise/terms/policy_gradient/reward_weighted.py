"""Likelihood of all answers, good ones weigh more."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from poise.objective import Objective, Term, Value
from poise.terms.groups import Groups
from poise.terms.policy_gradient.scored import Rewarded, one_of, positive, reward_of
from poise.terms.sequences import sequence_sum


class RewardWeighted(Rewarded):
    """Likelihood of every answer, weighted by its exponential reward (reward- or advantage-weighted regression).

    -log pi(y) exp(R / T)

    Adding a constant to R only rescales it; for T -> infinity it is supervised learning on all samples. With
    `normalise` the weights have the mean 1 over the group or the batch, so that nothing overflows.

    Args:
        temperature: T, positive, in units of the reward.
        normalise: None, "group" or "batch".
        max_weight: largest weight, or None.
        reward: a sum of reward terms; None reads the column `reward`.

    Reads: `response_logps` float [batch, time] or [batch]; `reward` float [batch]; if offered, `response_mask`; with
        `normalise="group"`, `group`.
    Returns: float [batch]; publishes `weight` [batch].

    >>> RewardWeighted()(torch.tensor([-2.0]), torch.tensor([0.0])).values
    tensor([2.])

    Source: Peters and Schaal 2007; Peng et al., arXiv:1910.00177; arXiv:2404.14367.
    """

    formula = "reward_weighted"
    equation: ClassVar[str] = "-log pi(y) exp(R / T)"
    source: ClassVar[str] = "arXiv:1910.00177; arXiv:2404.14367"

    def __init__(
        self,
        temperature: float = 1.0,
        normalise: Literal["group", "batch"] | None = None,
        max_weight: float | None = None,
        reward: Objective | Term | None = None,
    ) -> None:
        super().__init__()
        positive("reward_weighted", "temperature", temperature)
        one_of("reward_weighted", "normalise", normalise, ("group", "batch", None))
        positive("reward_weighted", "max_weight", max_weight)
        self.temperature = temperature
        self.normalise = normalise
        self.max_weight = max_weight
        self.reward = reward_of("reward_weighted", reward)

    @property
    def couples(self) -> tuple[str, ...]:  # type: ignore[override]
        """Only normalised weights compare answers."""
        return {None: (), "group": ("group",), "batch": ("reward",)}[self.normalise]

    def readings(self) -> tuple[str, ...]:
        """Groups are read where weights are normalised within them."""
        return () if self.normalise == "group" else ("group",)

    def requirements(self) -> tuple[str, ...]:
        """See `readings`."""
        return ("group",) if self.normalise == "group" else ()

    def forward(
        self,
        response_logps: Tensor,
        reward: Tensor,
        group: Tensor | None = None,
        response_mask: Tensor | None = None,
    ) -> Value:
        weight = self._weight(reward.detach() / self.temperature, group)
        if self.max_weight is not None:
            weight = weight.clamp(max=self.max_weight)
        return Value(-sequence_sum(response_logps, response_mask) * weight, extras={"weight": weight})

    def _weight(self, power: Tensor, group: Tensor | None) -> Tensor:
        if self.normalise is None:
            return power.exp()
        if self.normalise == "batch":
            return power.softmax(0) * len(power)
        groups = Groups(self._require(group, "group", "weights are normalised within groups."))
        weight = (power - groups.extreme(power, "amax")).exp()
        return weight / groups.mean(weight)
