"""Learn from answers that were scored: likelihood of the good ones, policy gradients, and clipped ratios.

A batch holds answers y to prompts, a reward R for each, and the number of the prompt that each answers (`group`). With
`log pi(y) = sum_t log pi(y_t | y_<t)`, no division by the length:

    best_of_n          -log pi(best)  [+ c log pi(worst)]             likelihood of the best answer of a group
    reward_weighted    -log pi(y) exp(R / T)                          likelihood, good answers weigh more
    reinforce          -A log pi(y)                                   A = R - baseline: losers are pushed down
    rloo               -min(rho A, clip(rho) A)                       rho = pi / behaviour of the answer, A leave-one-out
    ppo_clip           the same, token by token, on samples that may be stale
    grpo               the same with A = (R - mean) / std of the group

Only `log pi` carries a gradient: rewards, references and the sampler's own log-probabilities are constants. The first
two are mode-covering (they can only raise probabilities), the others push losers down.

The reward may be a sum of its own, written where it is used:

    grpo(reward=score + 0.1*score.on(reward="brevity").named("brevity")) + 0.04*sampled_kl(estimator="k3")

Public implementations of the clipped losses differ in how tokens become one number; `aggregate` names the ways:

    sequence_mean    mean over an answer's tokens, then over answers            (GRPO as published)
    token_mean       one mean over all answer tokens of the batch               (DAPO; "bnpo" elsewhere)
    dr_grpo          sum over an answer's tokens / max_length, then over answers: long answers are not favoured
    sequence_sum     sum over an answer's tokens, then the mean over answers    (the policy gradient itself)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from poise.errors import InputError, QuantityError
from poise.objective import Objective, Summand, Term, Value
from poise.terms.groups import Groups
from poise.terms.sequences import sequence_sum

__all__ = [
    "GRPO",
    "RLOO",
    "BestOfN",
    "PPOClip",
    "Reinforce",
    "RewardWeighted",
    "SampledKL",
    "Score",
]

Negative = Literal["worst", "mean", "sum"]
Baseline = Literal["leave_one_out", "group", "whitened", "whitened_group", "running"]
Level = Literal["token", "sequence", "sequence_mean"]
Aggregate = Literal["sequence_mean", "token_mean", "dr_grpo", "sequence_sum"]
AGGREGATES = ("sequence_mean", "token_mean", "dr_grpo", "sequence_sum")
LEVELS = ("token", "sequence", "sequence_mean")
BASELINES = ("leave_one_out", "group", "whitened", "whitened_group", "running", None)
_NEEDS_GROUP = ("leave_one_out", "group", "whitened_group")


# ---- what the terms share -------------------------------------------------------------------------------------------


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


def _reward_of(formula: str, reward: Objective | Term | None) -> Objective | None:
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


def _one_of(formula: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{formula}: {name} is one of {', '.join(map(repr, allowed))}, and it is {value!r}.")


def _positive(formula: str, name: str, value: float | None) -> None:
    if value is not None and not 0 < value < float("inf"):
        raise InputError(f"{formula}: {name} must be positive, and it is {value}.")


class _Rewarded(Term):
    """A term on scored answers, whose reward is a column of the batch or an objective of its own."""

    formula = ""
    reward: Objective | None
    capabilities = frozenset({"potential", "deterministic"})

    def composes(self) -> Mapping[str, Objective]:
        """The reward, where it is a sum of reward terms."""
        return {} if self.reward is None else {"reward": self.reward}

    def _require(self, value: Tensor | None, name: str, why: str) -> Tensor:
        if value is None:
            raise QuantityError(f"{self.formula} reads {name!r}, and it was not offered: {why}")
        return value


# ---- likelihood of good answers -------------------------------------------------------------------------------------


class BestOfN(_Rewarded):
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
        _one_of("best_of_n", "negative", negative, ("worst", "mean", "sum", None))
        if not 0 <= coefficient < float("inf"):
            raise InputError(f"best_of_n: coefficient must be at least 0, and it is {coefficient}.")
        self.negative = negative
        self.coefficient = coefficient
        self.constrained = constrained
        self.reward = _reward_of("best_of_n", reward)

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


class RewardWeighted(_Rewarded):
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
        _positive("reward_weighted", "temperature", temperature)
        _one_of("reward_weighted", "normalise", normalise, ("group", "batch", None))
        _positive("reward_weighted", "max_weight", max_weight)
        self.temperature = temperature
        self.normalise = normalise
        self.max_weight = max_weight
        self.reward = _reward_of("reward_weighted", reward)

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


# ---- policy gradients -----------------------------------------------------------------------------------------------


class Reinforce(_Rewarded):
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
        _one_of("reinforce", "baseline", baseline, BASELINES)
        if not 0 <= momentum < 1:
            raise InputError(f"reinforce: momentum must lie in [0, 1), and it is {momentum}.")
        self.baseline = baseline
        self.negative = negative
        self.momentum = momentum
        self.reward = _reward_of("reinforce", reward)
        if baseline == "running":
            for name in ("mean", "square", "visits"):
                self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    @property
    def couples(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the advantages of a batch share."""
        if not self.negative or self.baseline == "whitened":
            return ("reward",)
        return ("group",) if self.baseline in _NEEDS_GROUP else ()

    def readings(self) -> tuple[str, ...]:
        """Groups are read where the baseline is of a group."""
        return () if self.baseline in _NEEDS_GROUP else ("group",)

    def requirements(self) -> tuple[str, ...]:
        """See `readings`."""
        return ("group",) if self.baseline in _NEEDS_GROUP else ()

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
        if self.baseline in _NEEDS_GROUP:
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


class _Clipped(_Rewarded):
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
        _one_of(self.formula, "level", self.level, LEVELS)
        _one_of(self.formula, "aggregate", self.aggregate, AGGREGATES)
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"{self.formula}: clip must be positive, or None on fresh samples; it is {self.clip}.")
        if self.clip_high is not None and not self.clip_high > 0:
            raise InputError(f"{self.formula}: clip_high must be positive, and it is {self.clip_high}.")
        _check_length(self.formula, self.aggregate, self.max_length)

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
        logps, mask = _tokens(self.formula, response_logps, response_mask, self.aggregate)
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
        extras = {"advantage": advantage, "ratio": _mean(ratio, mask), "clipped": _mean(clipped, mask)}
        return Value(_aggregate(values, mask, self.aggregate, self.max_length), extras=extras)

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
        return _counted(response_mask, sample_weight)


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
        _one_of("ppo_clip", "baseline", baseline, tuple(b for b in BASELINES if b != "running"))
        self.reward = _reward_of("ppo_clip", reward)

    @property
    def couples(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the advantages of a batch share."""
        return {None: (), "whitened": ("reward",)}.get(self.baseline, ("group",))

    def readings(self) -> tuple[str, ...]:
        """Groups are read where the baseline is of a group."""
        return super().readings() + (() if self.baseline in _NEEDS_GROUP else ("group",))

    def requirements(self) -> tuple[str, ...]:
        """See `readings`."""
        return super().requirements() + (("group",) if self.baseline in _NEEDS_GROUP else ())

    def _advantage(self, reward: Tensor, group: Tensor | None) -> Tensor:
        if self.baseline in _NEEDS_GROUP:
            group = self._require(group, "group", "the baseline is of a group.")
        return advantages(reward, group if self.baseline in _NEEDS_GROUP else None, self.baseline)


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
        _one_of("grpo", "scale_rewards", scale_rewards, ("group", "batch", "none"))
        self.reward = _reward_of("grpo", reward)

    @property
    def couples(self) -> tuple[str, ...]:  # type: ignore[override]
        """A deviation of the batch couples more than groups."""
        return ("reward",) if self.scale_rewards == "batch" else ("group",)

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
        self.reward = _reward_of("rloo", reward)

    @property
    def couples(self) -> tuple[str, ...]:  # type: ignore[override]
        """Whitening couples the whole batch."""
        return ("reward",) if self.whiten else ("group",)

    def requirements(self) -> tuple[str, ...]:
        """The others of the group are the baseline."""
        return (*super().requirements(), "group")

    def _advantage(self, reward: Tensor, group: Tensor | None) -> Tensor:
        group = self._require(group, "group", "the others of the group are the baseline.")
        advantage = advantages(reward, group, "leave_one_out")
        return advantages(advantage, None, "whitened", eps=1e-4, correction=1) if self.whiten else advantage


# ---- beside them ----------------------------------------------------------------------------------------------------


class SampledKL(Term):
    """The divergence KL(policy || reference), estimated from the sampled tokens alone.

    u = log pi - log pi_ref of a token;    k1 = u,    k2 = u^2 / 2,    k3 = exp(-u) - 1 + u

    On fresh samples k1 and k3 have the mean KL(pi || pi_ref), k2 nearly. As a loss they pull differently, because the
    samples are taken for fixed: k1 has no gradient in the mean (E grad log pi = 0: use it within a reward, where it is
    unbiased), k2 has that of KL(pi || pi_ref), and k3, which public trainers use, that of KL(pi_ref || pi). Exact
    divergences over the vocabulary are `token_kl`.

    Args:
        estimator: "k1", "k2" or "k3".
        aggregate: how tokens become one number, as in `grpo`; `max_length` goes with "dr_grpo".

    Reads: `response_logps` and `reference_response_logps` float [batch, time] or [batch]; `response_mask` bool [batch, time]
        (needed per token).
    Returns: float [batch], or [batch, time] for "token_mean"; nats, >= 0 but for k1.

    >>> SampledKL("k2")(torch.tensor([-1.0]), torch.tensor([-3.0]))
    tensor([2.])

    Source: Schulman, "Approximating KL divergence" (2020); arXiv:2402.03300, eq. 4 (k3).
    """

    formula = "sampled_kl"
    equation: ClassVar[str] = "k3 = exp(-u) - 1 + u,  u = log pi - log pi_ref"
    source: ClassVar[str] = "Schulman 2020; arXiv:2402.03300, eq. 4"

    def __init__(
        self,
        estimator: Literal["k1", "k2", "k3"] = "k3",
        aggregate: Aggregate = "sequence_mean",
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        _one_of("sampled_kl", "estimator", estimator, ("k1", "k2", "k3"))
        _one_of("sampled_kl", "aggregate", aggregate, AGGREGATES)
        _check_length("sampled_kl", aggregate, max_length)
        self.estimator, self.aggregate, self.max_length = estimator, aggregate, max_length

    def forward(
        self, response_logps: Tensor, reference_response_logps: Tensor, response_mask: Tensor | None = None
    ) -> Tensor:
        logps, mask = _tokens("sampled_kl", response_logps, response_mask, self.aggregate)
        reference = reference_response_logps.detach()
        reference = reference[:, None] if reference.ndim == 1 else reference
        u = torch.where(mask, logps - reference, 0.0)
        k = {"k1": lambda: u, "k2": lambda: u.square() / 2, "k3": lambda: torch.expm1(-u) + u}[self.estimator]()
        return _aggregate(k, mask, self.aggregate, self.max_length)

    @property
    def count(self) -> Callable[..., Tensor] | None:  # type: ignore[override]
        """Count answer tokens where the mean runs over tokens, and answers otherwise."""
        return self._count_tokens if self.aggregate == "token_mean" else None

    def _count_tokens(self, response_mask: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        return _counted(response_mask, sample_weight)


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


# ---- tokens to numbers ----------------------------------------------------------------------------------------------


def _check_length(formula: str, aggregate: str, max_length: int | None) -> None:
    if (aggregate == "dr_grpo") != (max_length is not None):
        raise InputError(
            f"{formula}: aggregate='dr_grpo' divides by max_length, and only it does; got aggregate={aggregate!r} with "
            f"max_length={max_length}."
        )
    _positive(formula, "max_length", max_length)


def _tokens(formula: str, logps: Tensor, mask: Tensor | None, aggregate: str) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and mask, both [batch, time]; a sum over an answer is an answer of one token."""
    if logps.ndim == 1:
        if aggregate == "token_mean" and mask is not None and mask.shape[1] > 1:
            raise QuantityError(
                f"{formula}: a mean over tokens needs a log-probability for each, float [batch, time], and sums over the "
                f"answers were offered, float [{len(logps)}]."
            )
        return logps[:, None], torch.ones_like(logps[:, None], dtype=torch.bool)
    if mask is None:
        if logps.shape[1] > 1:
            raise QuantityError(
                f"{formula} reads 'response_mask' with log-probabilities for each token, and it was not offered."
            )
        mask = torch.ones_like(logps, dtype=torch.bool)
    return logps, mask


def _aggregate(values: Tensor, mask: Tensor, aggregate: str, max_length: int | None) -> Tensor:
    """Reduce [batch, time] to [batch]; "token_mean" is left to the objective, which counts tokens."""
    values = torch.where(mask, values, 0.0)
    if aggregate == "token_mean":
        return values
    total = values.sum(-1)
    if aggregate == "sequence_mean":
        return total / mask.sum(-1).clamp(min=1)
    return total if aggregate == "sequence_sum" else total / (max_length or 1)


def _counted(mask: Tensor, sample_weight: Tensor | None) -> Tensor:
    return mask.float() if sample_weight is None else mask * sample_weight[:, None]


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)
