"""Claim 2: reward minus KL is inference of a posterior; plain reward has no such anchor (KL-regularised RL as Bayesian inference).

First the identities, exactly, on three responses. Then a language model of English words (two recurrent layers of 64, see
`poise.tasks.words`), asked for words with a z, q, x or j: 100 steps of Adam on 128 sampled words each, from the same prior, with

    expected_reward                            reward only
    reverse_kl(beta), beta 0.05, 0.2, 1        reward - beta KL
    forward_kl(0.2)                            on its own samples, and on those of a proposal that is refreshed when the policy is nearer
    reverse_kl(0.2) of the output layer alone  a policy of less capacity

Every target is pi0 exp(r/beta)/Z, whose log Z and frontier of reward against KL follow from the share of such words in the prior.
Reward only is also asked for syllables. About 100 seconds on one core, 20 of them for the prior, which is kept; `--full` trains three
times as long.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import torch

from poise.claims import Claim, Finding, Progress
from poise.insight.collapse import CollapseReport, FrontierPoint, collapse_report, frontier
from poise.objective import Objective, Summand, Term
from poise.quantities import derive
from poise.tasks.finite_space import FiniteSpace
from poise.tasks.words import REWARDS, WordModel, Words, WordSampler, decode, fit_prior, sample, sequence_logps
from poise.terms.divergence import ForwardKL, ReverseKL
from poise.terms.posterior import Posterior
from poise.terms.proposal import Proposal
from poise.terms.regularised_reward import ExpectedReward

BETAS = (0.05, 0.2, 1.0)
BETA, BATCH, RATE, HIDDEN = 0.2, 128, 0.005, 64
MEASURED, OF_PRIOR, OF_FRONTIER = 2000, 2000, 100_000
RARE, SYLLABLES = "rare_letters", "syllables"
SLACK = 0.02
"""How far a point may lie above the frontier: two standard errors of a share measured on 2,000 words."""


@dataclass(frozen=True)
class Method:
    """One way to train: its loss, the temperature it is judged at, and what makes it special."""

    name: str
    beta: float
    reward: str = RARE
    head_only: bool = False
    proposal: bool = False

    def term(self) -> Term:
        """Return the loss."""
        if self.name.startswith("reward only"):
            return ExpectedReward()
        if self.name.startswith("forward"):
            return ForwardKL(self.beta, samples="proposal" if self.proposal else "policy")
        return ReverseKL(self.beta)


PLAIN, PLAIN_SYLLABLES = Method("reward only", BETA), Method("reward only, syllables", BETA, reward=SYLLABLES)
REGULARISED = {beta: Method(f"reward - {beta:g} KL", beta) for beta in BETAS}
OWN, REFRESHED = Method("forward KL", BETA), Method("forward KL, proposal", BETA, proposal=True)
HEAD = Method("reward - 0.2 KL, output layer only", BETA, head_only=True)
METHODS = (PLAIN, PLAIN_SYLLABLES, *REGULARISED.values(), OWN, REFRESHED, HEAD)
Reports = dict[str, list[CollapseReport]]
Mean = Callable[[Method, str], float]
"""The mean over seeds of one figure of a method's reports."""


def run(*, full: bool = False, seed: int = 0, progress: Progress | None = None) -> Finding:
    """Check the identities, then train eight ways on three seeds and measure each against its target."""
    identities = _identities()
    if progress is not None:
        progress(0.0, "the prior")
    prior, seeds = fit_prior(seed, hidden=HIDDEN), [seed + i for i in range(3)]
    points = _frontier(prior, seed)
    reports: Reports = {}
    jobs = [(method, each) for each in seeds for method in METHODS]
    for done, (method, each) in enumerate(jobs):
        if progress is not None:
            progress(0.15 + 0.85 * done / len(jobs), f"{method.name}, seed {each}")
        policy = _train(prior, method, each, 300 if full else 100)
        reports.setdefault(method.name, []).append(_measure(policy, prior, method, each))
    return _judge(identities, points, reports)


def _identities() -> dict[str, float]:
    """The worked example: the posterior, and J = beta log Z - beta KL(pi || pi*), by their largest error; and where plain reward ends."""
    beta = 0.5
    space = FiniteSpace([0.5, 0.3, 0.2], [0.0, 1.0, 3.0])
    star, log_z = space.posterior(beta), space.log_z(beta)
    policies = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)
    error = space.regularised_reward(policies, beta) - beta * (log_z - space.kl(policies, star.expand_as(policies)))
    reached = space.minimize(ReverseKL(beta, samples="enumeration"), space.responses_of(), tolerance=1e-10)
    plain = ExpectedReward(samples="enumeration")
    collapsed = space.minimize(plain, space.responses_of(), method="flow", rate=20.0, iterations=400)
    return {
        "identity error": float(error.abs().max()),
        "distance of the optimum from the posterior": float((reached.logps - star).abs().max()),
        "entropy under plain reward": float(space.entropy(collapsed.logps)),
    }


def _train(prior: WordModel, method: Method, seed: int, steps: int) -> WordModel:
    generator = torch.Generator().manual_seed(derive(seed, "samples", method.name))
    policy = copy.deepcopy(prior)
    trained = policy.head.parameters() if method.head_only else policy.parameters()
    parameters = list(trained)
    optimizer = torch.optim.Adam(parameters, lr=RATE)
    objective, reward = Objective([Summand(method.term())]), REWARDS[method.reward]
    proposal = Proposal(policy) if method.proposal else None
    for step in range(steps):
        drawn = sample(policy if proposal is None else proposal.model, BATCH, generator)
        with torch.no_grad():
            reference, earned = sequence_logps(prior, drawn.ids, drawn.mask), reward(drawn.ids)
        if proposal is not None and proposal.is_due(step):
            _refresh(proposal, step, policy, drawn, reference + earned / method.beta)
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - 0.9 * step / steps)
        optimizer.zero_grad()
        objective(
            response_logps=sequence_logps(policy, drawn.ids, drawn.mask),
            reference_response_logps=reference,
            reward=earned,
            behaviour_logps=drawn.logps,
        ).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return policy.eval()


@torch.no_grad()
def _refresh(proposal: Proposal, step: int, policy: WordModel, drawn: Words, log_score: torch.Tensor) -> None:
    proposal.consider(step, policy, sequence_logps(policy, drawn.ids, drawn.mask), drawn.logps, log_score)


def _measure(policy: WordModel, prior: WordModel, method: Method, seed: int) -> CollapseReport:
    draws = [
        WordSampler(model, torch.Generator().manual_seed(derive(seed, "measure", place)))
        for place, model in enumerate((policy, prior))
    ]
    target = Posterior(draws[1].logps, REWARDS[method.reward], method.beta)
    return collapse_report(draws[0], target, MEASURED, prior=draws[1], text=decode)


def _frontier(prior: WordModel, seed: int) -> list[FrontierPoint]:
    draws = WordSampler(prior, torch.Generator().manual_seed(derive(seed, "frontier")))
    grid = [0.02 * 1.25**i for i in range(30)]
    return frontier(Posterior(draws.logps, REWARDS[RARE]), draws, grid, OF_FRONTIER)


def best_reward(points: Sequence[FrontierPoint], kl: float) -> float:
    """Return the largest E[r] at this KL from the prior: the frontier, linear between its points, flat behind its end."""
    ordered = sorted((p.kl, p.reward) for p in points)
    if kl >= ordered[-1][0]:
        return ordered[-1][1]
    for (k0, r0), (k1, r1) in pairwise(ordered):
        if k0 <= kl <= k1:
            return r0 + (r1 - r0) * (kl - k0) / max(k1 - k0, 1e-12)
    return ordered[0][1]


def _judge(identities: dict[str, float], points: Sequence[FrontierPoint], reports: Reports) -> Finding:
    def mean(method: Method, name: str) -> float:
        return fmean(getattr(report, name) for report in reports[method.name])

    def grams(method: Method) -> float:
        return fmean(report.distinct_n[3] for report in reports[method.name])

    middle = REGULARISED[BETA]
    gap, narrow = mean(middle, "elbo_gap"), mean(HEAD, "elbo_gap")
    above = max(
        report.reward - best_reward(points, report.kl_prior)
        for method in REGULARISED.values()
        for report in reports[method.name]
    )
    kept = min(mean(m, "distinct") / mean(m, "prior_distinct") for m in REGULARISED.values())
    worst_gap = max(mean(m, "elbo_gap") for m in REGULARISED.values())
    figures = {
        f"{name}/{what}": fmean(getattr(report, what) for report in rows)
        for name, rows in reports.items()
        for what in ("reward", "kl_prior", "elbo_gap", "forward_kl", "entropy", "distinct", "self_bleu")
    }
    figures.update({f"{name}/distinct 3-grams": fmean(r.distinct_n[3] for r in rows) for name, rows in reports.items()})
    figures.update(identities)
    figures["largest excess over the frontier"] = above
    failures = []
    if identities["identity error"] > 1e-6 or identities["distance of the optimum from the posterior"] > 1e-5:
        failures.append("an identity does not hold")
    if not (identities["entropy under plain reward"] < 0.01 and mean(PLAIN, "elbo_gap") > 3 * worst_gap):
        failures.append(
            "reward alone does not leave the target further behind than every regularised run by three times"
        )
    if grams(PLAIN) > 0.5 * grams(middle) or grams(PLAIN_SYLLABLES) > 0.5 * grams(middle):
        failures.append("reward alone keeps more than half of the different 3-grams of the regularised policy")
    if gap >= narrow:
        failures.append("the gap to the evidence does not shrink with capacity")
    if kept < 0.5:
        failures.append("a regularised policy keeps less than half of the prior's different words")
    if above > SLACK:
        failures.append(f"a point lies {above:.3f} above the exact frontier")
    measured = (
        f"E[r] / KL from prior / gap to log Z: reward only {_triple(mean, PLAIN)}; reward - beta KL at beta 0.05 "
        f"{_triple(mean, REGULARISED[0.05])}, at 0.2 {_triple(mean, middle)}, at 1 {_triple(mean, REGULARISED[1.0])}, output layer only "
        f"{_triple(mean, HEAD)}; KL(pi*||pi) at 0.2: reverse {mean(middle, 'forward_kl'):.2f}, forward {mean(OWN, 'forward_kl'):.2f}, with "
        f"proposal {mean(REFRESHED, 'forward_kl'):.2f}; different 3-grams {grams(PLAIN):.1%} and {grams(PLAIN_SYLLABLES):.1%} under reward "
        f"only, {grams(middle):.1%} at 0.2; identities exact to {identities['identity error']:.0e} (paper: no table; the identities)"
    )
    return Finding("fails" if failures else "holds", measured, "; ".join([*failures, *_remarks(mean)]), figures)


def _triple(mean: Mean, method: Method) -> str:
    values = [mean(method, name) for name in ("reward", "kl_prior", "elbo_gap")]
    return f"{values[0]:.2f} / {values[1]:.2f} / {values[2]:.2f}"


def _remarks(get: Mean) -> list[str]:
    """What was expected beside the verdict and did not show."""
    remarks = []
    falls = [get(m, "prior_entropy") / max(get(m, "entropy"), 1e-9) for m in (PLAIN, PLAIN_SYLLABLES)]
    if min(falls) < 10:
        left = [get(m, "distinct") for m in (PLAIN, PLAIN_SYLLABLES)]
        remarks.append(
            f"under reward only the entropy falls by factors {falls[0]:.1f} (rare letters) and {falls[1]:.1f} (syllables) and not by ten, "
            "and "
            f"{left[0]:.0%} and {left[1]:.0%} of the words are still different: very many words share the largest reward, so the optimum "
            "is no single word, and the collapse shows in repeated 3-grams and in the divergence"
        )
    forward = min(get(OWN, "forward_kl"), get(REFRESHED, "forward_kl"))
    reverse = get(REGULARISED[BETA], "forward_kl")
    if not forward < reverse or math.isnan(forward):
        remarks.append("forward KL does not end with the lowest KL(pi*||pi) at this length of training")
    return remarks


CLAIM = Claim(
    number=2,
    statement=(
        "Maximising reward minus beta KL is variational inference of pi0 exp(r/beta)/Z: J = beta log Z - beta KL(pi || pi*); plain reward "
        "maximisation has a degenerate optimum, and other divergences reach the same target without being RL (no benchmark table)."
    ),
    expected=(
        "Identities exact; reward alone goes far beyond the target and repeats itself, regularised runs end near their targets on or under "
        "the exact frontier and keep most words different, the gap to log Z shrinks with capacity, forward KL has the least KL(pi*||pi)."
    ),
    falsified=(
        "An identity fails; reward alone keeps half of the regularised policy's different 3-grams or stays within three times its gap; the "
        "gap to log Z does not shrink with capacity; a point lies above the frontier; a regularised policy loses half of the words."
    ),
    run=run,
)
