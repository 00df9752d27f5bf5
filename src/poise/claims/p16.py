"""Claim 16: a supervised term is the adversary that keeps preference learning from running to rare answers (RPO).

Two parts, both on problems so small that the game behind RPO is solved exactly.

Collapse: three answers, reference (0.49, 0.49, 0.02), true rewards (1, 0, -5); the data prefer a to b 20 times, b to a 5
times, and the bad rare answer c to b twice: c is never beaten. DPO runs 1,000 gradient steps on the logits, RPO is at its
optimum, for five strengths of the adversary.

Even coverage: 30 answers with normal rewards, 60 to 200 comparisons of random pairs by the true rewards, twenty problems.
Nothing is rare there, and caution costs reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from poise.claims import Claim, Finding, Progress
from poise.formula import parse
from poise.insight.coverage import preference_coverage
from poise.quantities import derive
from poise.terms.preference.rpo import FinitePreferences, adversarial_policy

BETA, STEPS, RATE = 0.1, 1000, 5.0
ETAS = (0.005, 0.05, 0.2, 1.0, 5.0)
REWARDS = (1.0, 0.0, -5.0)
ARMS, PROBLEMS, COMPARISONS, EVEN_ETA = 30, 20, (60, 200), 0.2


@dataclass(frozen=True)
class Collapse:
    """True rewards where one answer is rare, bad and never beaten.

    Attributes:
        reference: of the reference policy.
        best: the highest that DPO passes on its way.
        last: of DPO after the last step.
        bad: DPO's mass on the bad answer then.
        rpo: of RPO by eta.
        gap: largest difference between the two orders of play over the etas.
        coverage: coefficients of DPO's last policy and of RPO's best one.
    """

    reference: float
    best: float
    last: float
    bad: float
    rpo: dict[float, float]
    gap: float
    coverage: tuple[float, float]

    @property
    def safe(self) -> list[float]:
        """The etas at which RPO is at least as good as the reference."""
        return [eta for eta, reward in self.rpo.items() if reward >= self.reference]


@dataclass(frozen=True)
class Even:
    """True rewards where all answers are compared alike; the reference has 0 by construction, up to chance."""

    dpo: float
    rpo: float
    reference: float


def run(*, full: bool = False, seed: int = 0, progress: Progress | None = None) -> Finding:
    """Let DPO and RPO meet a rare answer, then evenly covered ones (`full`: five times as many problems)."""
    collapse = _collapse()
    evens = []
    count = PROBLEMS * (5 if full else 1)
    for i in range(count):
        if progress is not None:
            progress(i / count, f"even coverage, problem {i + 1} of {count}")
        evens.append(_even(derive(seed, "even", i)))
    return _judge(collapse, evens)


def _judge(collapse: Collapse, evens: Sequence[Even]) -> Finding:
    collapses = collapse.last < collapse.reference - 1
    agrees = collapse.gap < 1e-6
    holds = collapses and bool(collapse.safe) and agrees
    curve = ", ".join(f"{eta:g}: {reward:.3f}" for eta, reward in collapse.rpo.items())
    dpo, rpo = fmean(e.dpo for e in evens), fmean(e.rpo for e in evens)
    measured = (
        f"true reward {collapse.reference:.2f} of the reference; DPO {collapse.best:.3f} early, {collapse.last:.2f} at the end "
        f"with {collapse.bad:.0%} on the bad answer; RPO by eta {curve}; both orders of play differ by {collapse.gap:.0e}; "
        f"coverage coefficient {collapse.coverage[0]:.1f} of DPO, {collapse.coverage[1]:.2g} of RPO; evenly covered {ARMS} answers: "
        f"DPO {dpo:.2f}, RPO {rpo:.2f} (paper, Zephyr-7b: RPO beats the reference on 83.75 % of MT-Bench, DPO's chosen "
        "likelihood falls and RPO's hardly)"
    )
    reasons = []
    if not collapses:
        reasons.append("DPO did not fall clearly below the reference")
    if not collapse.safe:
        reasons.append("no eta kept the reward of the reference")
    if not agrees:
        reasons.append("the two orders of play disagree")
    if rpo < dpo:
        reasons.append(
            f"where all answers are covered alike, the guard costs {dpo - rpo:.2f} of reward at eta = {EVEN_ETA}"
        )
    figures = {
        "reference": collapse.reference,
        "DPO early": collapse.best,
        "DPO": collapse.last,
        "DPO mass on the bad answer": collapse.bad,
        **{f"RPO eta {eta:g}": reward for eta, reward in collapse.rpo.items()},
        "gap of the game": collapse.gap,
        "coverage of DPO": collapse.coverage[0],
        "coverage of RPO": collapse.coverage[1],
        "even coverage/DPO": dpo,
        "even coverage/RPO": rpo,
        "even coverage/reference": fmean(e.reference for e in evens),
    }
    return Finding("holds" if holds else "fails", measured, "; ".join(reasons), figures)


def _collapse() -> Collapse:
    wins = torch.zeros(3, 3)
    wins[0, 1], wins[1, 0], wins[2, 1] = 20, 5, 2
    data = FinitePreferences(wins, torch.tensor([0.49, 0.49, 0.02], dtype=torch.float64))
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    path = _dpo(data)
    earned = path @ rewards
    solutions = {eta: adversarial_policy(data, eta, BETA) for eta in ETAS}
    rpo = {eta: float(found.policy @ rewards) for eta, found in solutions.items()}
    best = solutions[max(rpo, key=lambda eta: rpo[eta])].policy
    return Collapse(
        reference=float(data.reference.double() @ rewards),
        best=float(earned.max()),
        last=float(earned[-1]),
        bad=float(path[-1, 2]),
        rpo=rpo,
        gap=max(abs(found.gap) for found in solutions.values()),
        coverage=(preference_coverage(path[-1], wins).coefficient, preference_coverage(best, wins).coefficient),
    )


def _even(seed: int) -> Even:
    g = torch.Generator().manual_seed(seed)
    rewards = torch.randn(ARMS, generator=g, dtype=torch.float64)
    count = int(torch.randint(COMPARISONS[0], COMPARISONS[1] + 1, (), generator=g))
    first = torch.randint(ARMS, (count,), generator=g)
    second = (first + torch.randint(1, ARMS, (count,), generator=g)) % ARMS
    won = torch.rand(count, generator=g, dtype=torch.float64) < torch.sigmoid(rewards[first] - rewards[second])
    wins = torch.zeros(ARMS, ARMS)
    wins.index_put_(
        (torch.where(won, first, second), torch.where(won, second, first)), torch.ones(count), accumulate=True
    )
    data = FinitePreferences(wins, torch.full((ARMS,), 1 / ARMS))
    return Even(
        dpo=float(_dpo(data)[-1] @ rewards),
        rpo=float(adversarial_policy(data, EVEN_ETA, BETA).policy @ rewards),
        reference=float(rewards.mean()),
    )


def _dpo(data: FinitePreferences) -> Tensor:
    """Gradient descent on the logits: the policies after every step, float64 [steps + 1, K]."""
    objective = parse(f"dpo(beta={BETA})")
    preferred, other = (data.wins > 0).nonzero(as_tuple=True)
    log_reference = data.reference.double().log()
    fixed = {
        "reference_chosen_logps": log_reference[preferred],
        "reference_rejected_logps": log_reference[other],
        "sample_weight": data.shares[preferred, other],
    }
    logits = log_reference.clone().requires_grad_()
    path = [logits.detach().softmax(-1)]
    for _ in range(STEPS):
        log_p = logits.log_softmax(-1)
        loss = objective(fixed, chosen_logps=log_p[preferred], rejected_logps=log_p[other])
        with torch.no_grad():
            logits -= RATE * torch.autograd.grad(loss, logits)[0]
        path.append(logits.detach().softmax(-1))
    return torch.stack(path)


CLAIM = Claim(
    number=16,
    statement=(
        "Adding the likelihood of the chosen answers to DPO is playing against the worst reward that fits the data; it keeps "
        "the policy from overoptimising, where DPO does (Zephyr-7b: 83.75 % of MT-Bench won against the reference)."
    ),
    expected=(
        "There is a range of eta where RPO is at least as good as the reference (0.39) while DPO ends near -3.8, and both orders "
        "of the game give one value; where coverage is even, RPO pays for its caution (0.63 against 1.17 in a reference study)."
    ),
    falsified="DPO does not collapse, no eta avoids the collapse, or the value of the game depends on who moves first.",
    run=run,
)
