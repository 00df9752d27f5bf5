"""Policy gradients with a clipped ratio, for samples that may be stale: PPO, GRPO, RLOO."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from poise.errors import InputError
from poise.objective import Objective, Term, Value
from poise.terms.policy_gradient.scored import BASELINES, NEEDS_GROUP, Baseline, Rewarded, advantages, one_of, reward_of
from poise.terms.policy_gradient.tokens import (
    AGGREGATES,
    Aggregate,
    aggregate_tokens,
    check_length,
    counted,
    token_mean_of,
    tokens_of,
)

Level = Literal["token", "sequence", "sequence_mean"]
LEVELS = ("token", "sequence", "sequence_mean")


class _Clipped(Rewarded):
    """What the losses with a clipped ratio share; a method says its advantage.

    -min(rho A, clip(rho, 1 - low, 1 + high) A),    rho = pi / behaviour
    """

    formula = ""
    clip: float | None
    clip_high: float | None
    level: Level = "token"
    aggregate: Aggregate = "sequence_mean"
    max_length: int | None = None

    def _advantage(self, reward: Tensor, group: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _check(self) -> None:
        one_of(self.formula, "level", self.level, LEVELS)
        one_of(self.formula, "aggregate", self.aggregate, AGGREGATES)
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"{self.formula}: clip must be positive, or None on fresh samples; it is {self.clip}.")
        if self.clip_high is not None and not self.clip_high > 0:
            raise InputError(f"{self.formula}: clip_high must be positive, and it is {self.clip_high}.")
        check_length(self.formula, self.aggregate, self.max_length)

    def readings(self) -> tuple[str, ...]:
        """Without a clip there is no ratio, and nothing is asked about the sampler."""
        return ("behaviour_logps",) if self.clip is None else ()

    def requirements(self) -> tuple[str, ...]:
        """The ratio needs what the sampler thought of its answers."""
        return () if self.clip is None else ("behaviour_logps",)

    def forward(
        self,
        response_logps: Tensor,
        reward: Tensor,
        group: Tensor | None = None,
        response_mask: Tensor | None = None,
        behaviour_logps: Tensor | None = None,
    ) -> Value:
        advantage = self._advantage(reward.detach(), group).to(response_logps.dtype)
        logps, mask = tokens_of(self.formula, response_logps, response_mask, self.aggregate)
        if self.clip is None:
            behaviour = logps.detach()
        else:
            why = "stale or offline samples need the log-probabilities that their sampler gave them; clip=None is for fresh ones."
            behaviour = self._require(behaviour_logps, "behaviour_logps", why).detach()
            behaviour = behaviour[:, None] if behaviour.ndim == 1 else behaviour
            if behaviour.shape != logps.shape:
                behaviour, logps = behaviour.sum(-1, keepdim=True), torch.where(mask, logps, 0.0).sum(-1, keepdim=True)
                mask = mask.any(-1, keepdim=True)
        ratio = self._ratio(torch.where(mask, logps - behaviour, 0.0), mask)
        values, clipped = self._clipped(ratio, advantage[:, None])
        extras = {"advantage": advantage, "ratio": token_mean_of(ratio, mask), "clipped": token_mean_of(clipped, mask)}
        return Value(aggregate_tokens(values, mask, self.aggregate, self.max_length), extras=extras)

    def _ratio(self, difference: Tensor, mask: Tensor) -> Tensor:
        """Return rho of each token, [batch, time]; a ratio of the whole answer stands at each of its tokens."""
        if self.level == "token":
            return difference.exp()
        total = difference.sum(-1, keepdim=True)
        if self.level == "sequence_mean":
            total = total / mask.sum(-1, keepdim=True).clamp(min=1)
        return total.exp().expand_as(difference)

    def _clipped(self, ratio: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values, and where the clip took the gradient away."""
        if self.clip is None:
            return -ratio * advantage, torch.zeros_like(ratio)
        high = self.clip if self.clip_high is None else self.clip_high
        bounded = ratio.clamp(1 - self.clip, 1 + high)
        values = -torch.minimum(ratio * advantage, bounded * advantage)
        clipped = ((ratio < 1 - self.clip) & (advantage < 0)) | ((ratio > 1 + high) & (advantage > 0))
        return values, clipped.to(ratio.dtype)

    @property
    def count(self) -> Callable[..., Tensor] | None:  # type: ignore[override]
        """Count answer tokens where the mean runs over tokens, and answers otherwise."""
        return self._count_tokens if self.aggregate == "token_mean" else None

    def _count_tokens(self, response_mask: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        return counted(response_mask, sample_weight)


class PPOClip(_Clipped):
    """Proximal policy optimisation without a critic: the clipped ratio on samples that may be stale.

    -min(rho A, clip(rho, 1 - clip, 1 + clip) A),    rho = pi / behaviour

    The gradient is that of the value. At ratio 1 (fresh samples) it is the gradient of `reinforce` with the same
    baseline and `aggregate="sequence_sum"`; where the clip acts, there is none.

    Args:
        clip: how far the ratio may go below (and above) 1; None takes the samples for fresh.
        clip_high: how far above, where it differs.
        level: "token": a ratio for each token; "sequence": of the whole answer; "sequence_mean": its geometric mean
            over tokens (GSPO).
        aggregate: how tokens become one number, see the top of this file; `max_length` goes with "dr_grpo".
        baseline: as in `reinforce`, "running" excepted.
        reward: a sum of reward terms; None reads the column `reward`.

    Reads: `response_logps` and `behaviour_logps` float [batch, time] or [batch]; `reward` float [batch]; `response_mask`
        bool [batch, time] (needed per token); `group` where the baseline is of a group.
    Returns: float [batch], or [batch, time] for "token_mean"; publishes `advantage`, `ratio` and `clipped` (shares of the
        tokens) [batch].

    >>> objective = 1.0 * PPOClip(baseline=None)
    >>> new, old = torch.tensor([-1.0]), torch.tensor([-2.0])                    # the ratio e is clipped to 1.2
    >>> objective(response_logps=new, behaviour_logps=old, reward=torch.tensor([1.0]))
    tensor(-1.2000)

    Source: Schulman et al., arXiv:1707.06347, eq. 7; arXiv:2404.14367.
    """

    formula = "ppo_clip"
    equation: ClassVar[str] = "-min(rho A, clip(rho) A),  rho = pi / behaviour"
    source: ClassVar[str] = "arXiv:1707.06347, eq. 7"
    bounded_below = False

    def __init__(
        self,
        clip: float | None = 0.2,
        clip_high: float | None = None,
        level: Level = "token",
        aggregate: Aggregate = "sequence_sum",
        max_length: int | None = None,
        baseline: Baseline | None = "whitened",
        reward: Objective | Term | None = None,
    ) -> None:
        super().__init__()
        self.clip, self.clip_high, self.level = clip, clip_high, level
        self.aggregate, self.max_length, self.baseline = aggregate, max_length, baseline
        self._check()
        one_of("ppo_clip", "baseline", baseline, tuple(b for b in BASELINES if b != "running"))
        self.reward = reward_of("ppo_clip", reward)

    @property
    def couples(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the advantages of a batch share."""
        return {None: (), "whitened": ("reward",)}.get(self.baseline, ("group",))

    @property
    def scale_free_reward(self) -> bool:
        """Whitening divides a factor out again."""
        return self.baseline in ("whitened", "whitened_group")

    def readings(self) -> tuple[str, ...]:
        """Groups are read where the baseline is of a group."""
        return super().readings() + (() if self.baseline in NEEDS_GROUP else ("group",))

    def requirements(self) -> tuple[str, ...]:
        """See `readings`."""
        return super().requirements() + (("group",) if self.baseline in NEEDS_GROUP else ())

    def _advantage(self, reward: Tensor, group: Tensor | None) -> Tensor:
        if self.baseline in NEEDS_GROUP:
            group = self._require(group, "group", "the baseline is of a group.")
        return advantages(reward, group if self.baseline in NEEDS_GROUP else None, self.baseline)


class GRPO(_Clipped):
    """Group-relative policy optimisation: the group is the baseline, and its spread the scale.

    -min(rho A, clip(rho, 1 - clip, 1 + clip_high) A),    A = (R - mean of the group) / (std of the group + 1e-4)

    The gradient is that of the value; a group whose rewards are equal has none. The hold on the reference is a term of
    its own, `+ 0.04*sampled_kl(estimator="k3")` with the same `aggregate`, so that its weight is seen and its value
    reported. The division by the deviation favours prompts that are nearly always or nearly never answered well;
    `scale_rewards="none"` with `aggregate="dr_grpo"` is the variant without that bias.

    Args:
        clip, clip_high: how far the ratio may go below and above 1; `clip=None` takes the samples for fresh.
        scale_rewards: "group", "batch" (deviation of the whole batch) or "none".
        level, aggregate, max_length: as in `ppo_clip`; the published loss is "token" with "sequence_mean".
        reward: a sum of reward terms; None reads the column `reward`.

    Reads: `response_logps` and `behaviour_logps` float [batch, time] or [batch]; `reward` float [batch]; `group` int64
        [batch]; `response_mask` bool [batch, time] (needed per token).
    Returns: float [batch], or [batch, time] for "token_mean"; publishes `advantage`, `ratio` and `clipped` [batch].

    >>> objective = 1.0 * GRPO(clip=None)
    >>> reward, group = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
    >>> objective(response_logps=torch.tensor([-1.0, -2.0]), reward=reward, group=group)       # ratio 1, advantages cancel
    tensor(0.)

    Source: Shao et al., arXiv:2402.03300, eq. 3; Liu et al., arXiv:2503.20783 (dr_grpo); Yu et al., arXiv:2503.14476
    (DAPO); Zheng et al., arXiv:2507.18071 (GSPO).
    """

    formula = "grpo"
    equation: ClassVar[str] = "-min(rho A, clip(rho) A),  A = (R - mean) / std of the group"
    source: ClassVar[str] = "arXiv:2402.03300, eq. 3"
    bounded_below = False

    def __init__(
        self,
        clip: float | None = 0.2,
        clip_high: float | None = None,
        scale_rewards: Literal["group", "batch", "none"] = "group",
        level: Level = "token",
        aggregate: Aggregate = "sequence_mean",
        max_length: int | None = None,
        reward: Objective | Term | None = None,
    ) -> None:
        super().__init__()
        self.clip, self.clip_high, self.scale_rewards, self.level = clip, clip_high, scale_rewards, level
        self.aggregate, self.max_length = aggregate, max_length
        self._check()
        one_of("grpo", "scale_rewards", scale_rewards, ("group", "batch", "none"))
        self.reward = reward_of("grpo", reward)

    @property
    def couples(self) -> tuple[str, ...]:  # type: ignore[override]
        """A deviation of the batch couples more than groups."""
        return ("reward",) if self.scale_rewards == "batch" else ("group",)

    @property
    def scale_free_reward(self) -> bool:
        """The division by the deviation takes a factor out again."""
        return self.scale_rewards != "none"

    def requirements(self) -> tuple[str, ...]:
        """The group is the baseline."""
        return (*super().requirements(), "group")

    def _advantage(self, reward: Tensor, group: Tensor | None) -> Tensor:
        group = self._require(group, "group", "the group is the baseline.")
        if self.scale_rewards == "group":
            return advantages(reward, group, "whitened_group", eps=1e-4, correction=1)
        advantage = advantages(reward, group, "group")
        if self.scale_rewards == "none":
            return advantage
        return advantage / (reward.std() + 1e-4 if len(reward) > 1 else 1.0)


class RLOO(_Clipped):
    """The policy gradient of whole answers with the mean of a group's other answers as baseline.

    -min(rho A, clip(rho) A),    A = R - mean of the others,    rho = pi / behaviour of the whole answer

    At ratio 1 its gradient is that of `reinforce(baseline="leave_one_out")`: unbiased, and without the factor 1 - 1/n
    that the mean of the group brings. Its authors put the hold on the reference into the reward:
    `rloo(reward=score - 0.05*sampled_kl(estimator="k1", aggregate="sequence_sum"))`.

    Args:
        clip, clip_high: how far the ratio may go below and above 1; `clip=None` takes the samples for fresh.
        whiten: bring the advantages of the batch to mean 0 and deviation 1.
        reward: a sum of reward terms; None reads the column `reward`.

    Reads: `response_logps` and `behaviour_logps` float [batch, time] or [batch]; `reward` float [batch]; `group` int64
        [batch]; if offered, `response_mask`.
    Returns: float [batch]; publishes `advantage`, `ratio` and `clipped` [batch].

    >>> objective = 1.0 * RLOO(clip=None)
    >>> logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    >>> loss = objective(response_logps=logps, reward=torch.tensor([1.0, 0.0]), group=torch.tensor([0, 0]))
    >>> torch.autograd.grad(loss, logps)[0]
    tensor([-0.5000,  0.5000])

    Source: Kool et al. 2019; Ahmadian et al., arXiv:2402.14740.
    """

    formula = "rloo"
    equation: ClassVar[str] = "-min(rho A, clip(rho) A),  A = R - mean of the group's others"
    source: ClassVar[str] = "arXiv:2402.14740"
    bounded_below = False
    level = "sequence"
    aggregate = "sequence_mean"

    def __init__(
        self,
        clip: float | None = 0.2,
        clip_high: float | None = None,
        whiten: bool = False,
        reward: Objective | Term | None = None,
    ) -> None:
        super().__init__()
        self.clip, self.clip_high, self.whiten = clip, clip_high, whiten
        self._check()
        self.reward = reward_of("rloo", reward)

    @property
    def couples(self) -> tuple[str, ...]:  # type: ignore[override]
        """Whitening couples the whole batch."""
        return ("reward",) if self.whiten else ("group",)

    @property
    def scale_free_reward(self) -> bool:
        """Whitening divides a factor out again."""
        return self.whiten

    def requirements(self) -> tuple[str, ...]:
        """The others of the group are the baseline."""
        return (*super().requirements(), "group")

    def _advantage(self, reward: Tensor, group: Tensor | None) -> Tensor:
        group = self._require(group, "group", "the others of the group are the baseline.")
        advantage = advantages(reward, group, "leave_one_out")
        return advantages(advantage, None, "whitened", eps=1e-4, correction=1) if self.whiten else advantage
