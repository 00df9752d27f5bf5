"""Likelihood of the best answer of a group."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from poise.errors import InputError
from poise.objective import Objective, Term, Value
from poise.terms.groups import Groups
from poise.terms.policy_gradient.scored import Rewarded, one_of, reward_of
from poise.terms.sequences import sequence_sum

Negative = Literal["worst", "mean", "sum"]


class BestOfN(Rewarded):
    """Raise the likelihood of the best answer of each group, and push losers down where asked to.

    -log pi(best)  +  c * log pi(worst)  |  c * mean over losers  |  c * sum over losers

    The best is the first of the largest reward; every other answer of the group is a loser. Without a negative gradient
    it is supervised learning on filtered samples. The push-down is without bound (log pi may fall for ever), so `c` is
    kept well below 1 and training short; `constrained` writes log(pi / pi_ref) in the place of log pi, which moves the
    value and not the gradient.

    Args:
        negative: None, "worst", "mean" or "sum": which losers are pushed down.
        coefficient: c, >= 0.
        constrained: measure against the reference.
        reward: a sum of reward terms; None reads the column `reward`.

    Reads: `response_logps` float [batch, time] or [batch]; `reward` float [batch]; `group` int64 [batch]; if offered,
        `response_mask`; with `constrained`, `reference_response_logps`.
    Returns: float [batch], nats, of which one row a group counts: a mean over groups. Publishes `best` [batch].

    >>> logps, reward = torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0.0, 1.0, 0.5])
    >>> objective = 1.0 * BestOfN(negative="worst", coefficient=0.5)
    >>> objective(response_logps=logps, reward=reward, group=torch.zeros(3, dtype=torch.int64))    # 2 - 0.5 * 1
    tensor(1.5000)

    Source: arXiv:2404.14367; Asap7772/understanding-rlhf, bandit_learner.py (there "average, constrained" is a sum).
    """

    formula = "best_of_n"
    equation: ClassVar[str] = "-log pi(best) + c log pi(losers)"
    source: ClassVar[str] = "arXiv:2404.14367"
    couples = ("group",)
    bounded_below = False

    def __init__(
        self,
        negative: Negative | None = None,
        coefficient: float = 0.1,
        constrained: bool = False,
        reward: Objective | Term | None = None,
    ) -> None:
        super().__init__()
        one_of("best_of_n", "negative", negative, ("worst", "mean", "sum", None))
        if not 0 <= coefficient < float("inf"):
            raise InputError(f"best_of_n: coefficient must be at least 0, and it is {coefficient}.")
        self.negative = negative
        self.coefficient = coefficient
        self.constrained = constrained
        self.reward = reward_of("best_of_n", reward)

    @property
    def scale_free_reward(self) -> bool:
        """The best answer stays the best."""
        return True

    def readings(self) -> tuple[str, ...]:
        """Without `constrained`, no reference."""
        return () if self.constrained else ("reference_response_logps",)

    def requirements(self) -> tuple[str, ...]:
        """With `constrained`, the reference."""
        return ("reference_response_logps",) if self.constrained else ()

    def forward(
        self,
        response_logps: Tensor,
        reward: Tensor,
        group: Tensor,
        response_mask: Tensor | None = None,
        reference_response_logps: Tensor | None = None,
    ) -> Value:
        logp = sequence_sum(response_logps, response_mask)
        if self.constrained:
            reference = self._require(
                reference_response_logps, "reference_response_logps", "constrained=True needs it."
            )
            logp = logp - sequence_sum(reference.detach(), response_mask)
        groups = Groups(group)
        best = groups.best(reward)
        values = -logp
        if self.negative is not None:
            values = values + self.coefficient * self._losers(groups, best, reward, logp)
        return Value(values, extras={"best": best.to(logp.dtype)})

    def _losers(self, groups: Groups, best: Tensor, reward: Tensor, logp: Tensor) -> Tensor:
        """Return the log-probability that is pushed down, of the whole group, at each of its rows."""
        if self.negative == "worst":
            worst = groups.best(torch.where(best, -torch.inf, -reward)) & ~best
            return groups.sum(torch.where(worst, logp, 0.0))
        total = groups.sum(torch.where(best, 0.0, logp))
        return total if self.negative == "sum" else total / (groups.size(logp) - 1).clamp(min=1)

    def count(self, reward: Tensor, group: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """Count the best row of each group."""
        count = Groups(group).best(reward).to(reward.dtype)
        return count if sample_weight is None else count * sample_weight
