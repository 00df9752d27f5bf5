"""Whether a policy reached the posterior of its reward, or collapsed: measured with samples, and read off a formula.

    report = collapse_report(policy, posterior, n=2000, prior=prior)     # E[r], KL both ways, entropy, log Z, ELBO gap, diversity
    frontier(posterior, prior, betas=[0.05, 0.2, 1.0])                   # the best reward for each divergence from the prior
    explain_target("expected_reward + 0.1*reference_kl")                 # which distribution does this aim at?

J/beta = E[r]/beta - KL(pi || pi0) never exceeds log Z; what is missing is KL(pi || pi*). Source: arXiv:2205.11275.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from poise.coefficient import value_of
from poise.errors import InputError
from poise.formula import parse
from poise.objective import Objective, Summand, Term
from poise.terms.posterior import LogZ, Posterior, estimate_divergences, estimate_log_z
from poise.terms.sequences import sequence_sum

__all__ = [
    "CollapseReport",
    "FrontierPoint",
    "Sampler",
    "TargetExplanation",
    "collapse_report",
    "distinct_n",
    "explain_target",
    "frontier",
    "self_bleu",
]


class Sampler(Protocol):
    """A distribution that can be drawn from and scored."""

    def sample(self, n: int) -> tuple[Any, Tensor]:
        """Return `n` samples and their log-probabilities float `[n]` under the distribution that was drawn from."""
        ...

    def logps(self, samples: Any) -> Tensor:
        """Return log-probabilities float `[n]` of any samples."""
        ...


@dataclass(frozen=True)
class CollapseReport:
    """A policy beside its prior and its target. Divergences and entropies in nats; `print` it.

    Attributes:
        reward, prior_reward: E[r] under the policy and the prior.
        kl_prior: KL(pi || pi0), the mean of log pi - log pi0.
        forward_kl, reverse_kl, total_variation: of target and policy: KL(pi* || pi), KL(pi || pi*), and their distance.
        entropy, prior_entropy: `-E[log p]` of each one's own samples.
        log_z, log_z_error: with its standard error.
        elbo: J/beta = E[r]/beta - KL(pi || pi0); `elbo_gap` is log Z less that.
        ess: effective sample size of the weights P/q, of `proposal_samples`.
        distinct, prior_distinct: share of the samples that are different.
        distinct_n: share of n-grams that are different, by n; `self_bleu` is 1 where all samples are alike. Both only with `text`.
    """

    samples: int
    reward: float
    prior_reward: float
    kl_prior: float
    forward_kl: float
    reverse_kl: float
    total_variation: float
    entropy: float
    prior_entropy: float
    log_z: float
    log_z_error: float
    elbo: float
    ess: float
    proposal_samples: int
    distinct: float
    prior_distinct: float
    distinct_n: dict[int, float] = field(default_factory=dict)
    self_bleu: float = math.nan

    @property
    def elbo_gap(self) -> float:
        """`log Z - J/beta`, which is KL(pi || pi*): 0 where the target is reached."""
        return self.log_z - self.elbo

    @property
    def collapsed(self) -> bool:
        """Whether a tenth or less of the prior's diversity is left."""
        return self.distinct <= 0.1 * self.prior_distinct

    def __str__(self) -> str:
        lines = [
            f"reward        {self.reward:.3f} (prior {self.prior_reward:.3f})",
            f"from prior    KL {self.kl_prior:.3f}",
            f"from target   KL(pi*||pi) {self.forward_kl:.3f}, KL(pi||pi*) {self.reverse_kl:.3f}, "
            f"total variation {self.total_variation:.3f}",
            f"evidence      log Z {self.log_z:.3f} +- {self.log_z_error:.3f}, bound {self.elbo:.3f}, gap {self.elbo_gap:.3f}",
            f"weights       effective sample size {self.ess:.0f} of {self.proposal_samples}",
            f"diversity     entropy {self.entropy:.2f} (prior {self.prior_entropy:.2f}), distinct {self.distinct:.1%} "
            f"(prior {self.prior_distinct:.1%})",
        ]
        if self.distinct_n:
            grams = ", ".join(f"{n}-grams {share:.1%}" for n, share in self.distinct_n.items())
            lines.append(f"              distinct {grams}; self-BLEU {self.self_bleu:.3f}")
        if self.ess < 0.01 * self.proposal_samples:
            lines.append("The weights rest on few samples: read the figures about the target as rough.")
        if self.collapsed:
            lines.append("The policy has collapsed: at most a tenth of the prior's different samples are left.")
        return "\n".join(lines)


@torch.no_grad()
def collapse_report(
    policy: Sampler,
    posterior: Posterior,
    n: int = 1000,
    prior: Sampler | None = None,
    text: Callable[[Any], Sequence[Sequence[Hashable]]] | None = None,
) -> CollapseReport:
    """Measure how far a policy is from its prior and its target, and how diverse it is.

    The normaliser and the divergences of the target are estimated with n samples of the policy and n of the prior, weighed as
    samples of their mixture, so that no weight exceeds twice exp(r/beta) and the estimate sharpens as the policy approaches.
    The samples are those of one prompt, or of none: each prompt has a normaliser of its own.

    Args:
        policy: what was trained.
        posterior: its target; needs a reward.
        n: samples of each.
        prior: by default only the policy's samples are used, which cannot see what it has forgotten.
        text: turns samples into sequences of tokens (strings will do), for n-grams and self-BLEU.

    Raises:
        InputError: the posterior has no reward, or every weight is 0.
    """
    if posterior.reward is None:
        raise InputError("collapse_report: the posterior needs a reward.")
    samples, policy_logps = policy.sample(n)
    policy_logps, reward = sequence_sum(policy_logps).double(), posterior.reward(samples).double()
    prior_logps = posterior.prior_logps(samples, None if posterior.prior else _scored(prior, samples)).double()
    log_score = prior_logps + torch.as_tensor(posterior.log_factor(samples)).double()
    kl_prior = float((policy_logps - prior_logps).mean())
    prior_reward = prior_entropy = prior_distinct = math.nan
    scores, policies, proposals = log_score, policy_logps, policy_logps
    if prior is not None:
        others, other_prior = prior.sample(n)
        other_prior, other_policy = sequence_sum(other_prior).double(), policy.logps(others).double()
        prior_reward = float(posterior.reward(others).double().mean())
        prior_entropy, prior_distinct = float(-other_prior.mean()), _distinct(others)
        scores = torch.cat([scores, other_prior + torch.as_tensor(posterior.log_factor(others)).double()])
        policies = torch.cat([policies, other_policy])
        proposals = torch.logaddexp(policies, torch.cat([prior_logps, other_prior])) - math.log(2)
    log_z: LogZ = estimate_log_z(scores - proposals)
    found = estimate_divergences(policies, scores, proposals, log_z.value)
    elbo = float((log_score - policy_logps).mean())
    sequences = None if text is None else text(samples)
    return CollapseReport(
        samples=n,
        reward=float(reward.mean()),
        prior_reward=prior_reward,
        kl_prior=kl_prior,
        forward_kl=found.forward_kl,
        reverse_kl=log_z.value - elbo,
        total_variation=found.total_variation,
        entropy=float(-policy_logps.mean()),
        prior_entropy=prior_entropy,
        log_z=log_z.value,
        log_z_error=log_z.standard_error,
        elbo=elbo,
        ess=log_z.ess,
        proposal_samples=log_z.samples,
        distinct=_distinct(samples),
        prior_distinct=prior_distinct,
        distinct_n={} if sequences is None else {k: distinct_n(sequences, k) for k in (1, 2, 3)},
        self_bleu=math.nan if sequences is None else self_bleu(sequences),
    )


def _scored(prior: Sampler | None, samples: Any) -> Tensor | None:
    return None if prior is None else prior.logps(samples)


def _distinct(samples: Any) -> float:
    """Share of different rows of a tensor, or of different items."""
    if isinstance(samples, Tensor):
        return len(torch.unique(samples, dim=0)) / len(samples)
    return len(set(samples)) / len(samples)


def distinct_n(sequences: Sequence[Sequence[Hashable]], n: int) -> float:
    """Return the share of different n-grams among all n-grams; 0 where no sequence is that long.

    >>> distinct_n(["abab", "ab"], 2)
    0.5

    Source: Li et al., arXiv:1510.03055.
    """
    grams = [tuple(s[i : i + n]) for s in sequences for i in range(len(s) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(sequences: Sequence[Sequence[Hashable]], order: int = 3, most: int = 300) -> float:
    """Return the mean BLEU of each sequence against all others: 1 where all are alike, near 0 where nothing repeats.

    Args:
        sequences: of tokens; strings are sequences of letters.
        order: longest n-gram; a sequence shorter than that is judged by those it has.
        most: sequences that are looked at, the first ones.

    Source: Zhu et al., arXiv:1802.01886 (Texygen); BLEU: Papineni et al. (2002).
    """
    sequences = [s for s in sequences[:most] if len(s)]
    if len(sequences) < 2:
        return math.nan
    lengths = Counter(len(s) for s in sequences)
    logs: list[list[float]] = [[] for _ in sequences]
    for n in range(1, order + 1):
        counts = [Counter(tuple(s[i : i + n]) for i in range(len(s) - n + 1)) for s in sequences]
        largest = _two_largest(counts)
        for place, count in enumerate(counts):
            total = sum(count.values())
            if total:
                # The most that any other sequence has of a gram: the second largest where this one has the largest.
                hits = sum(
                    min(c, largest[g][1] if largest[g][0] == c and largest[g][2] == 1 else largest[g][0])
                    for g, c in count.items()
                )
                logs[place].append(math.log(hits / total) if hits else -math.inf)
    scores = [
        math.exp(sum(found) / len(found)) * _brevity(len(s), lengths)
        for s, found in zip(sequences, logs, strict=True)
        if found
    ]
    return sum(scores) / len(scores)


def _two_largest(counts: Sequence[Counter[Any]]) -> dict[Any, tuple[int, int, int]]:
    """For each gram: its largest count in a sequence, the next smaller one, and how many sequences have the largest."""
    found: dict[Any, tuple[int, int, int]] = {}
    for count in counts:
        for gram, c in count.items():
            first, second, ties = found.get(gram, (0, 0, 0))
            if c > first:
                found[gram] = (c, first, 1)
            elif c == first:
                found[gram] = (first, second, ties + 1)
            else:
                found[gram] = (first, max(second, c), ties)
    return found


def _brevity(length: int, lengths: Counter[int]) -> float:
    """BLEU's penalty for being shorter than the nearest other sequence."""
    others = [size for size, times in lengths.items() if times > (size == length)]
    nearest = min(others, key=lambda size: (abs(size - length), size))
    return 1.0 if length >= nearest else math.exp(1 - nearest / length)


# ---- the frontier -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FrontierPoint:
    """The exact posterior of one beta: no policy with this KL from the prior has more reward."""

    beta: float
    reward: float
    kl: float
    log_z: float
    ess: float


@torch.no_grad()
def frontier(posterior: Posterior, prior: Sampler, betas: Sequence[float], n: int = 20_000) -> list[FrontierPoint]:
    """Return E[r] and KL(pi_beta || pi0) of the posterior over a grid of beta, from one set of weighted prior samples.

        w ~ exp(r/beta),   E_beta[r] = sum w r,   KL = E_beta[r]/beta - log Z

    A posterior with features or a constraint has them at every beta, as part of the prior.

    Args:
        posterior: with a reward.
        prior: draws from pi0.
        betas: temperatures, positive.
        n: samples of the prior.

    Raises:
        InputError: the posterior has no reward, or a beta is not positive.
    """
    if posterior.reward is None:
        raise InputError("frontier: the posterior needs a reward.")
    if min(betas) <= 0:
        raise InputError(f"frontier: every beta must be positive, and the least is {min(betas)}.")
    samples, _ = prior.sample(n)
    reward = posterior.reward(samples).double()
    rest = torch.as_tensor(posterior.log_factor(samples)).double() - reward / posterior.beta
    base = rest - rest.logsumexp(0)
    points = []
    for beta in betas:
        log_weight = base + reward / beta
        log_z = float(log_weight.logsumexp(0))
        weight = (log_weight - log_z).exp()
        mean = float(weight @ reward)
        points.append(FrontierPoint(beta, mean, mean / beta - log_z, log_z, float(1 / weight.square().sum())))
    return points


# ---- what a formula aims at ---------------------------------------------------------------------------------------------

_REWARDS = ("expected_reward", "reinforce", "rloo", "ppo_clip")
_TARGETED = ("forward_kl", "total_variation", "jensen_shannon")


@dataclass(frozen=True)
class TargetExplanation:
    """What an objective aims at.

    Attributes:
        regularised_reward: whether it is `E[r] - beta KL(pi || pi0)` up to a factor.
        beta: its temperature now, or None.
        target: the distribution at the optimum, in words.
        warnings: what a reader should know.
    """

    regularised_reward: bool
    beta: float | None
    target: str
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        kind = "reward - beta*KL" if self.regularised_reward else "not reward - beta*KL"
        return "\n".join([f"{kind}; target: {self.target}", *(f"warning: {w}" for w in self.warnings)])


def explain_target(objective: Objective | Term | str, quantities: Mapping[str, Any] | None = None) -> TargetExplanation:
    """Say whether an objective is "reward minus beta KL", which distribution is its optimum, and what is wrong with it.

    Args:
        objective: an objective, a term or a formula. Weights are read as they are now.
        quantities: a batch; then a reward that carries a gradient is noticed.

    >>> print(explain_target("expected_reward + 0.1*reference_kl"))
    reward - beta*KL; target: pi0(x) exp(r(x)/0.1) / Z
    """
    if isinstance(objective, str):
        objective = parse(objective)
    if isinstance(objective, Term):
        objective = Objective([Summand(objective)])
    reward, kl, targeted, others = 0.0, 0.0, list[tuple[str, float]](), list[str]()
    warnings: list[str] = []
    for label, summand in zip(objective.labels, objective.summands, strict=True):
        term: Any = summand.term
        weight = float(torch.as_tensor(value_of(summand.weight, objective.clock)).float().mean())
        if term.formula in _REWARDS:
            held, said = _within_reward(label, term)
            reward, kl = reward + weight, kl + weight * held
            warnings += said
        elif term.formula == "reference_kl":
            kl += weight
            warnings += _about_estimator(label, term)
        elif term.formula == "reverse_kl":
            reward, kl = reward + weight / term.beta, kl + weight
        elif term.formula in _TARGETED:
            targeted.append((label, term.beta))
        else:
            others.append(label)
            warnings += _about_penalty(label, term)
    given = None if quantities is None or "reward" not in quantities else quantities["reward"]
    if isinstance(given, Tensor) and given.requires_grad:
        warnings.append(
            "The reward carries a gradient, so it depends on theta, and this is not reinforcement learning. "
            "Detach it, or use gradient='pathwise' where you mean that."
        )
    return _conclude(reward, kl, targeted, others, warnings)


def _about_estimator(label: str, term: Any) -> list[str]:
    if term.gradient == "unbiased" or term.estimator == "k2":
        return []
    what = (
        "has expectation 0, so nothing holds the policy"
        if term.estimator == "k1"
        else "is that of KL(pi0 || pi), the other direction"
    )
    return [f"{label} differentiates {term.estimator}, and that gradient {what}; use gradient='unbiased'."]


def _within_reward(label: str, term: Any) -> tuple[float, list[str]]:
    """Return beta of a KL that stands within the reward, `rloo(reward=score - 0.05*sampled_kl(...))`, and what is wrong with it."""
    inside = getattr(term, "reward", None)
    if not isinstance(inside, Objective):
        return 0.0, []
    held, said = 0.0, list[str]()
    for name, summand in zip(inside.labels, inside.summands, strict=True):
        part: Any = summand.term
        if part.formula == "sampled_kl":
            held -= float(torch.as_tensor(value_of(summand.weight, inside.clock)).float().mean())
            if (part.estimator, part.aggregate) != ("k1", "sequence_sum"):
                said.append(
                    f"{name} within the reward of {label} is {part.estimator} by {part.aggregate}; only k1 by 'sequence_sum' gives the KL "
                    "of whole responses without bias."
                )
    return held, said


def _about_penalty(label: str, term: Any) -> list[str]:
    """Penalties that resemble the KL of whole responses and are not: divided by the length, or of each token alone."""
    if term.formula == "length_normalized_kl":
        return [
            f"{label} divides the log-ratio by the length, so the optimum is not pi0 exp(r/beta)/Z and favours long responses; "
            "use reference_kl."
        ]
    if term.formula == "grpo":
        return [f"{label} divides by the deviation of each prompt's rewards, so every prompt has a beta of its own."]
    if term.formula in ("sampled_kl", "token_kl"):
        return [
            f"{label} holds each token of the given samples and does not count what a token does to those after it, so its gradient is not "
            "that of the KL of whole responses; for the target pi0 exp(r/beta)/Z use reference_kl."
        ]
    return []


def _conclude(
    reward: float, kl: float, targeted: list[tuple[str, float]], others: list[str], warnings: list[str]
) -> TargetExplanation:
    if not targeted and not others and reward > 0:
        if kl <= 0:
            warnings.append(
                "beta is 0: plain reward maximisation collapses onto the best response whatever the prior; add beta*reference_kl."
            )
            return TargetExplanation(True, 0.0, "a point mass on argmax r", tuple(warnings))
        beta = kl / reward
        return TargetExplanation(True, beta, f"pi0(x) exp(r(x)/{beta:g}) / Z", tuple(warnings))
    if not targeted and not others and kl > 0:
        return TargetExplanation(False, None, "the prior pi0", tuple(warnings))
    if targeted and not others and reward == 0 and kl == 0:
        betas = sorted({beta for _, beta in targeted})
        target = f"pi0(x) exp(r(x)/{betas[0]:g}) / Z" if len(betas) == 1 else "between posteriors of different beta"
        names = ", ".join(label for label, _ in targeted)
        warnings.append(
            f"{names}: no reward free of theta has this expectation under the policy, so it is inference but not reinforcement learning."
        )
        return TargetExplanation(False, betas[0] if len(betas) == 1 else None, target, tuple(warnings))
    mixed = ", ".join([*(label for label, _ in targeted), *others]) or "nothing"
    return TargetExplanation(
        False, None, f"no closed form: {mixed} stand beside or instead of reward and KL", tuple(warnings)
    )
