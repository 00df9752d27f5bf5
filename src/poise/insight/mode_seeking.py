"""What on-policy sampling and a negative gradient buy, in flows that can be computed and in data that can be measured.

A softmax p over bins follows a divergence to the target q with the learning rate eta on its logits z:

    KL(q || p)    dz_x = eta (q_x - p_x)                                   mode-covering: at most eta a step
    KL(p || q)    dz_x = eta p_x [log(q_x / p_x) + KL(p || q)]             mode-seeking: no bound, but scaled by p_x

Likelihood on filtered samples follows the first, on-policy policy gradients and contrastive losses the second. The second
empties heavy bins fast and lifts bins that have next to nothing slowly, so it is not always the faster one: it is where
mass lies on the wrong bins, and it is not where the reward is flat.

    flow_steps(q, start, "reverse", rewards, share=0.9)     # how long until 90 % of the target's reward
    mode_seeking(before, after, target)                     # which of the two a step looked like
    recommend(reference_rewards=..., preferred_rewards=...) # offline data enough? on-policy? a negative gradient?

Source: arXiv:2404.14367, section 6; the identities are re-derived.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from poise.errors import InputError

__all__ = [
    "ModeSeeking",
    "PreferenceStatistics",
    "Recommendation",
    "flow",
    "flow_steps",
    "forward_kl_step",
    "mode_seeking",
    "preference_statistics",
    "recommend",
    "tilted",
]

Direction = Literal["forward", "reverse"]


# ---- exact flows ----------------------------------------------------------------------------------------------------


def tilted(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Return what a hold of strength beta on the reference aims at: q_x proportional to reference_x exp(R_x / beta), [bins]."""
    if not beta > 0:
        raise InputError(f"beta must be positive, and it is {beta}.")
    return (reference.log() + rewards / beta).softmax(-1)


def forward_kl_step(logits: Tensor, target: Tensor, eta: float = 1.0) -> Tensor:
    """Return the step of the logits down KL(q || p): eta (q - p), [..., bins]."""
    return eta * (target - logits.softmax(-1))


def reverse_kl_step(logits: Tensor, target: Tensor, eta: float = 1.0) -> Tensor:
    """Return the step of the logits down KL(p || q): eta p [log(q / p) + KL(p || q)], [..., bins]."""
    log_p = logits.log_softmax(-1)
    p, gap = log_p.exp(), target.log() - log_p
    return eta * p * (gap - (p * gap).sum(-1, keepdim=True))


_STEPS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"forward": forward_kl_step, "reverse": reverse_kl_step}


def _step_of(direction: str) -> Callable[[Tensor, Tensor, float], Tensor]:
    if direction not in _STEPS:
        raise InputError(f"direction is 'forward' or 'reverse', and it is {direction!r}.")
    return _STEPS[direction]


def flow(target: Tensor, start: Tensor, direction: Direction, steps: int, eta: float = 1.0) -> Tensor:
    """Return the probabilities on the way from `start` down a divergence to `target`: [steps + 1, bins].

    Args:
        target, start: probabilities float [bins], none of them 0.
        direction: "forward" KL(target || p), or "reverse" KL(p || target).
        steps, eta: how many, and the learning rate on the logits.
    """
    step, logits = _step_of(direction), start.log()
    path = [logits.softmax(-1)]
    for _ in range(steps):
        logits = logits + step(logits, target, eta)
        path.append(logits.softmax(-1))
    return torch.stack(path)


def flow_steps(
    target: Tensor,
    start: Tensor,
    direction: Direction,
    rewards: Tensor,
    share: float = 0.9,
    eta: float = 1.0,
    most: int = 10_000,
) -> int | None:
    """Count the steps of the flow until E R reaches a share of the target's, or return None where `most` are not enough.

    >>> start, rewards = torch.tensor([0.9, 0.1]), torch.tensor([0.0, 1.0])
    >>> target = tilted(start, rewards, beta=0.2)
    >>> flow_steps(target, start, "forward", rewards), flow_steps(target, start, "reverse", rewards)
    (5, 4)
    """
    step, logits = _step_of(direction), start.log()
    goal = share * float((target * rewards).sum())
    for done in range(most + 1):
        if float((logits.softmax(-1) * rewards).sum()) >= goal:
            return done
        logits = logits + step(logits, target, eta)
    return None


@dataclass(frozen=True)
class ModeSeeking:
    """Which divergence a change of a distribution looks like.

    Attributes:
        reverse, forward: cosine between the change of the logits and the step down KL(p || q), and down KL(q || p), in [-1, 1].
        score: share of the change that only the reverse step explains, in [0, 1]: 1 mode-seeking, 0 mode-covering, 1/2 either.
        moved: total variation between before and after, in [0, 1].
    """

    reverse: float
    forward: float
    score: float
    moved: float

    def __str__(self) -> str:
        kind = "mode-seeking" if self.score > 0.6 else "mode-covering" if self.score < 0.4 else "in between"
        return f"{kind}: along KL(p||q) {self.reverse:.2f}, along KL(q||p) {self.forward:.2f}; {self.moved:.1%} of the mass moved"


def mode_seeking(before: Tensor, after: Tensor, target: Tensor) -> ModeSeeking:
    """Measure which of the two flows to `target` a change from `before` to `after` follows.

    The change of the logits (up to a constant) is regressed on the two unit steps; the score is the reverse step's share of
    the two coefficients, each cut at 0.

    Args:
        before, after, target: probabilities float [bins], none of them 0.

    Raises:
        InputError: nothing changed, or a probability is 0.
    """
    if min(float(x.min()) for x in (before, after, target)) <= 0:
        raise InputError("mode_seeking compares logits, so no probability may be 0.")
    change = _unit(after.log() - before.log())
    if change is None:
        raise InputError("Nothing changed between before and after, so there is no direction to measure.")
    steps = [_unit(step(before.log(), target, 1.0)) for step in (reverse_kl_step, forward_kl_step)]
    if any(step is None for step in steps):
        raise InputError("The distribution was at its target already, so there is no direction to compare with.")
    basis = torch.stack([step for step in steps if step is not None], dim=1)
    shares = torch.linalg.lstsq(basis, change[:, None]).solution.flatten().clamp(min=0)
    total = float(shares.sum())
    reverse, forward = ((basis * change[:, None]).sum(0)).tolist()
    return ModeSeeking(
        reverse, forward, float(shares[0]) / total if total else 0.5, 0.5 * float((after - before).abs().sum())
    )


def _unit(logits: Tensor) -> Tensor | None:
    centred = (logits - logits.mean()).double()
    length = centred.norm()
    return None if float(length) < 1e-12 else centred / length


# ---- winners and losers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreferenceStatistics:
    """Where the likelihood of better and worse answers stands; means over prompts that have both, in nats.

    Attributes:
        reward: mean reward of all answers.
        winners, losers: mean log pi of the best and of the worst answer to each prompt.
        winners_gain, losers_gain: the same relative to the reference, NaN without one.
        margin: winners_gain - losers_gain (or winners - losers without a reference).
    """

    reward: float
    winners: float
    losers: float
    winners_gain: float
    losers_gain: float
    margin: float

    @property
    def both_fall(self) -> bool:
        """Whether winners and losers both lost likelihood while the margin grew: what offline contrastive losses do."""
        return self.winners_gain < 0 and self.losers_gain < 0 and self.margin > 0


def preference_statistics(logps: Tensor, rewards: Tensor, reference: Tensor | None = None) -> PreferenceStatistics:
    """Say what became of winners and losers.

    Args:
        logps: log pi of whole answers, float [prompts, answers].
        rewards: the same shape.
        reference: log-probabilities under the reference, the same shape, or None.

    Raises:
        InputError: the shapes differ, or no prompt has answers of different rewards.
    """
    if logps.ndim != 2 or logps.shape != rewards.shape or (reference is not None and reference.shape != logps.shape):
        raise InputError(
            f"logps, rewards and reference are float [prompts, answers] alike; got {list(logps.shape)} first."
        )
    apart = rewards.amax(1) > rewards.amin(1)
    if not bool(apart.any()):
        raise InputError("No prompt has answers of different rewards, so there are neither winners nor losers.")
    best, worst = rewards[apart].argmax(1, keepdim=True), rewards[apart].argmin(1, keepdim=True)

    def means(x: Tensor) -> tuple[float, float]:
        return float(x[apart].gather(1, best).mean()), float(x[apart].gather(1, worst).mean())

    winners, losers = means(logps)
    gains = (float("nan"), float("nan")) if reference is None else means(logps - reference)
    margin = winners - losers if reference is None else gains[0] - gains[1]
    return PreferenceStatistics(float(rewards.mean()), winners, losers, *gains, margin)


# ---- what to do -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recommendation:
    """What the data say about sampling and objective.

    Attributes:
        coverage: share of the reference's samples that are as good as what is preferred.
        found: chance that a group of `samples` answers of the reference holds such a one.
        overlap: share of the preferred answers that are as likely under the reference as its own answers are; None where no
            log-probabilities were given.
        on_policy, negative_gradient: whether they are needed.
        reason: why, in words.
    """

    coverage: float | None
    found: float | None
    overlap: float | None
    on_policy: bool
    negative_gradient: bool
    reason: str

    @property
    def answer(self) -> str:
        """One line: what to do."""
        if not self.on_policy:
            return "offline data are enough"
        return "sample on-policy" + (", with a negative gradient" if self.negative_gradient else "")

    def __str__(self) -> str:
        return f"{self.answer}: {self.reason}"


def recommend(
    *,
    reference_rewards: Tensor | None = None,
    preferred_rewards: Tensor | None = None,
    reference_logps: Tensor | None = None,
    preferred_logps: Tensor | None = None,
    probabilities: Tensor | None = None,
    samples: int = 8,
    quantile: float = 0.1,
    enough: float = 0.5,
) -> Recommendation:
    """Say whether offline data are enough, or on-policy sampling and a negative gradient are needed.

    coverage = P_ref(R >= the `quantile` of the preferred answers' rewards),    found = 1 - (1 - coverage)^samples
    overlap  = share of preferred answers with log pi_ref at or above the `quantile` of the reference's own answers

    Offline data are enough where found (and the overlap) reach `enough`: the reference then shows what is wanted in most
    groups. Below it, what is wanted lies where the reference has next to no mass: likelihood of the best of its samples
    moves there slowly, on-policy sampling moves the samples themselves, and pushing losers down frees the mass.
    `negative_gradient` is answered for coverage below a half of what on-policy sampling is asked for.

    Args:
        reference_rewards: rewards of the reference's answers, float [n]; or of every bin, with `probabilities`.
        preferred_rewards: rewards of what is wanted (chosen answers, a target's samples), float [m]; by default the rewards
            above nine tenths of the largest one seen.
        reference_logps, preferred_logps: log pi_ref of whole answers of the reference [n] and of the chosen ones [m]: what a
            set of preferences has without rewards. Compare answers of like length.
        probabilities: the reference itself, float [bins], where it is finite.
        samples: answers to a prompt, N.
        quantile, enough: see above.

    Raises:
        InputError: neither rewards nor log-probabilities of both sides.

    >>> print(recommend(reference_rewards=torch.tensor([0.0, 0.1, 0.0, 0.2]), preferred_rewards=torch.tensor([0.9])).answer)
    sample on-policy, with a negative gradient
    """
    coverage = _coverage(reference_rewards, preferred_rewards, probabilities, quantile)
    found = None if coverage is None else 1 - (1 - coverage) ** samples
    overlap = _overlap(reference_logps, preferred_logps, quantile)
    measured = [x for x in (found, overlap) if x is not None]
    if not measured:
        raise InputError(
            "recommend needs reference_rewards, or reference_logps with preferred_logps: nothing can be said of coverage without."
        )
    least = min(measured)
    on_policy = least < enough
    words = []
    if found is not None:
        words.append(
            f"{coverage:.1%} of the reference's answers are as good as what is preferred, so {found:.0%} of groups of {samples} hold one"
        )
    if overlap is not None:
        words.append(f"{overlap:.0%} of the preferred answers are as likely under the reference as its own")
    return Recommendation(coverage, found, overlap, on_policy, on_policy and least < 0.8 * enough, "; ".join(words))


def _coverage(
    rewards: Tensor | None, preferred: Tensor | None, probabilities: Tensor | None, quantile: float
) -> float | None:
    if rewards is None:
        return None
    level = 0.9 * rewards.max() if preferred is None else preferred.double().quantile(quantile)
    good = (rewards >= level).double()
    if probabilities is None:
        return float(good.mean())
    if probabilities.shape != rewards.shape:
        raise InputError(
            f"probabilities are of the bins of reference_rewards, {list(rewards.shape)}; got {list(probabilities.shape)}."
        )
    return float((good * probabilities).sum())


def _overlap(reference: Tensor | None, preferred: Tensor | None, quantile: float) -> float | None:
    if reference is None or preferred is None:
        return None
    return float((preferred >= reference.double().quantile(quantile)).double().mean())
