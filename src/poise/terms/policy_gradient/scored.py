"""What terms on scored answers share: the reward, which may be a sum of its own, and the advantages made of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from poise.errors import InputError, QuantityError
from poise.objective import Objective, Summand, Term
from poise.terms.groups import Groups

Baseline = Literal["leave_one_out", "group", "whitened", "whitened_group", "running"]
BASELINES = ("leave_one_out", "group", "whitened", "whitened_group", "running", None)
NEEDS_GROUP = ("leave_one_out", "group", "whitened_group")


def advantages(
    reward: Tensor, group: Tensor | None, baseline: str | None, eps: float = 1e-12, correction: int = 0
) -> Tensor:
    """Return A = R - baseline, or whitened, float [batch].

    A group (or batch) whose rewards are all equal has A = 0 exactly: the rounding of its mean, divided by a deviation
    that is rounding too, would be of size one.

    Args:
        reward: float [batch].
        group: int64 [batch], where the baseline is of a group.
        baseline: "leave_one_out" (mean of the others of the group), "group" (mean of the group), "whitened"
            ((R - mean) / (std + eps) over the batch), "whitened_group" (over the group), or None (A = R).
        eps: added to the standard deviation.
        correction: 0 divides the variance by n, 1 by n - 1.
    """
    if baseline is None:
        return reward
    if group is None:
        groups = Groups(torch.zeros(len(reward), dtype=torch.int64, device=reward.device))
    else:
        groups = Groups(group)
    centred = reward - groups.mean(reward)
    centred = torch.where(groups.extreme(reward, "amax") == groups.extreme(reward, "amin"), 0.0, centred)
    if baseline == "leave_one_out":
        size = groups.size(reward)
        return centred * size / (size - 1).clamp(min=1)
    if baseline == "group":
        return centred
    return centred / (groups.std(reward, correction) + eps)


def reward_of(formula: str, reward: Objective | Term | None) -> Objective | None:
    """Check an objective that makes the reward: each of its terms gives a number for an answer and remembers nothing."""
    if reward is None:
        return None
    if isinstance(reward, Term):
        reward = Objective([Summand(reward)])
    if not isinstance(reward, Objective) or not reward.labels:
        raise InputError(f"{formula}: reward is a sum of reward terms, such as score, and it is {reward!r}.")
    if reward.parts or any(stream is not None for stream in reward.streams):
        raise InputError(f"{formula}: a reward reads the stream of its term, so it has no .on('stream') and no 'with'.")
    for label, term in reward.terms.items():
        if getattr(term, "advance", None) is not None or getattr(term, "stochastic", False):
            raise InputError(f"{formula}: {label} has a memory or draws random numbers, so it cannot be a reward.")
    return reward


def one_of(formula: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{formula}: {name} is one of {', '.join(map(repr, allowed))}, and it is {value!r}.")


def positive(formula: str, name: str, value: float | None) -> None:
    if value is not None and not 0 < value < float("inf"):
        raise InputError(f"{formula}: {name} must be positive, and it is {value}.")


class Rewarded(Term):
    """A term on scored answers, whose reward is a column of the batch or an objective of its own."""

    formula = ""
    reward: Objective | None
    capabilities = frozenset({"potential", "deterministic"})

    @property
    def scale_free_reward(self) -> bool:
        """Whether a positive factor on the reward changes nothing (but for the guard against a deviation of 0)."""
        return False

    def composes(self) -> Mapping[str, Objective]:
        """The reward, where it is a sum of reward terms."""
        return {} if self.reward is None else {"reward": self.reward}

    def _require(self, value: Tensor | None, name: str, why: str) -> Tensor:
        if value is None:
            raise QuantityError(f"{self.formula} reads {name!r}, and it was not offered: {why}")
        return value


class Score(Term):
    """A column of the batch as a reward, to be summed with others: `grpo(reward=score + 0.1*score.on(reward="brevity"))`.

    R

    Reads: `reward` float [batch], or another column by `.on(reward="name")`. Returns: float [batch].

    >>> Score()(torch.tensor([0.5]))
    tensor([0.5000])
    """

    formula = "score"
    equation: ClassVar[str] = "R"
    bounded_below = False

    def forward(self, reward: Tensor) -> Tensor:
        return reward
