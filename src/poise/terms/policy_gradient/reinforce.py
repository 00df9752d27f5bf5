"""The policy gradient with a baseline."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from poise.errors import InputError
from poise.objective import Objective, Term, Value
from poise.terms.policy_gradient.scored import BASELINES, NEEDS_GROUP, Baseline, Rewarded, advantages, one_of, reward_of
from poise.terms.sequences import sequence_sum


class Reinforce(Rewarded):
    """The policy gradient with a baseline: answers better than it are raised, worse ones pushed down.

    value -R,    gradient of  -A log pi(y),    A = R - baseline

    On fresh samples of the policy this is an unbiased gradient of -E R (scaled, where the advantage is whitened); on
    samples of anybody else it is not, and `ppo_clip` is the term to use. The value is what the gradient belongs to, the
    estimate -R of -E R; -A log pi itself means nothing as a number.

    Args:
        baseline: "leave_one_out" (mean of the group's others: no bias, least variance), "group" (mean of the group:
            the same gradient times 1 - 1/n), "whitened" (mean and deviation of the batch), "whitened_group" (of the
            group; the paper's bandit), "running" (mean and deviation of all batches so far), or None.
        negative: False shifts the advantages by their smallest, so that nothing is pushed down.
        momentum: of the running statistics, in [0, 1).
        reward: a sum of reward terms; None reads the column `reward`.

    Reads: `response_logps` float [batch, time] or [batch]; `reward` float [batch]; if offered, `response_mask`; `group`
        where the baseline is of a group.
    Returns: float [batch]; publishes `advantage` [batch].
    State: with `baseline="running"`, `mean`, `square` and `visits`, which move once a step.

    >>> logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    >>> objective = 1.0 * Reinforce()
    >>> loss = objective(response_logps=logps, reward=torch.tensor([1.0, 0.0]), group=torch.tensor([0, 0]))
    >>> loss, torch.autograd.grad(loss, logps)[0]
    (tensor(-0.5000, grad_fn=<AddBackward0>), tensor([-0.5000,  0.5000]))

    Source: Williams 1992; Kool et al. 2019 (leave-one-out); arXiv:2404.14367.
    """

    formula = "reinforce"
    equation: ClassVar[str] = "-R, with the gradient of -(R - baseline) log pi(y)"
    source: ClassVar[str] = "Williams 1992; arXiv:2404.14367"
    mean: Tensor
    square: Tensor
    visits: Tensor
    # The value is -R, and the gradient that of a surrogate: no line search, no second derivative.
    capabilities = frozenset({"deterministic"})
    bounded_below = False

    def __init__(
        self,
        baseline: Baseline | None = "leave_one_out",
        negative: bool = True,
        momentum: float = 0.9,
        reward: Objective | Term | None = None,
    ) -> None:
        super().__init__()
        one_of("reinforce", "baseline", baseline, BASELINES)
        if not 0 <= momentum < 1:
            raise InputError(f"reinforce: momentum must lie in [0, 1), and it is {momentum}.")
        self.baseline = baseline
        self.negative = negative
        self.momentum = momentum
        self.reward = reward_of("reinforce", reward)
        if baseline == "running":
            for name in ("mean", "square", "visits"):
                self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    @property
    def couples(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the advantages of a batch share."""
        if not self.negative or self.baseline == "whitened":
            return ("reward",)
        return ("group",) if self.baseline in NEEDS_GROUP else ()

    @property
    def scale_free_reward(self) -> bool:
        """Whitening divides a factor out again; running statistics follow it after a while."""
        return self.baseline in ("whitened", "whitened_group")

    def readings(self) -> tuple[str, ...]:
        """Groups are read where the baseline is of a group."""
        return () if self.baseline in NEEDS_GROUP else ("group",)

    def requirements(self) -> tuple[str, ...]:
        """See `readings`."""
        return ("group",) if self.baseline in NEEDS_GROUP else ()

    def forward(
        self,
        response_logps: Tensor,
        reward: Tensor,
        group: Tensor | None = None,
        response_mask: Tensor | None = None,
    ) -> Value:
        reward = reward.detach()
        advantage = self._advantage(reward, group)
        if not self.negative:
            advantage = advantage - advantage.min()
        surrogate = -advantage * sequence_sum(response_logps, response_mask)
        return Value(-reward.to(surrogate.dtype), surrogate, extras={"advantage": advantage})

    def _advantage(self, reward: Tensor, group: Tensor | None) -> Tensor:
        if self.baseline == "running":
            return self._by_running_statistics(reward)
        if self.baseline in NEEDS_GROUP:
            return advantages(reward, self._require(group, "group", "the baseline is of a group."), self.baseline)
        return advantages(reward, None, self.baseline)

    def _by_running_statistics(self, reward: Tensor) -> Tensor:
        first = advantages(reward, None, "whitened")
        held = (1 - self.momentum**self.visits).clamp(min=1e-12)  # statistics start at 0
        mean, square = self.mean / held, self.square / held
        later = (reward - mean) / ((square - mean * mean).clamp(min=0).sqrt() + 1e-12)
        return torch.where(self.visits > 0, later.to(reward.dtype), first)

    @property
    def advance(self) -> Callable[..., None] | None:  # type: ignore[override]
        """Move the running statistics, where there are any."""
        return self._advance if self.baseline == "running" else None

    def _advance(self, reward: Tensor) -> None:
        new = reward.double()
        self.mean.lerp_(new.mean(), 1 - self.momentum)
        self.square.lerp_(new.square().mean(), 1 - self.momentum)
        self.visits += 1
