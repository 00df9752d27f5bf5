"""Claim 16: a supervised term is the adversary that keeps preference learning from running to rare answers (RPO).

Three parts; in the first two the problems are so small that the game behind RPO is solved exactly.

Collapse: three answers, reference (0.49, 0.49, 0.02), true rewards (1, 0, -5); the data prefer a to b 20 times, b to a 5
times, and the bad rare answer c to b twice: c is never beaten. DPO runs 1,000 gradient steps on the logits, RPO is at its
optimum, for five strengths of the adversary.

Even coverage: 30 answers with normal rewards, 60 to 200 comparisons of random pairs by the true rewards, twenty problems.
Nothing is rare there, and caution costs reward.

Words: a GRU over letters that was trained on a dictionary, 500 pairs of its own words with the same first two letters, the one
of more syllables preferred, a fifth of the labels wrong; 150 steps of Adam for DPO and for RPO with eta = 1, five seeds. What is
watched is the log-probability of the chosen words, and the syllables of what the models then write.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from poise.claims import Claim, Finding, Progress
from poise.formula import parse
from poise.insight.coverage import preference_coverage
from poise.quantities import derive
from poise.tasks.words import REWARDS as ATTRIBUTES
from poise.tasks.words import (
    WordModel,
    WordReadout,
    fit_prior,
    load_words,
    preference_pairs,
    prefixes,
    sample,
    sequence_logps,
)
from poise.terms.preference.rpo import FinitePreferences, adversarial_policy
from poise.training import fit

BETA, STEPS, RATE = 0.1, 1000, 5.0
ETAS = (0.005, 0.05, 0.2, 1.0, 5.0)
REWARDS = (1.0, 0.0, -5.0)
ARMS, PROBLEMS, COMPARISONS, EVEN_ETA = 30, 20, (60, 200), 0.2
PAIRS, WORD_STEPS, SEEDS, NOISE, DRAWN = 500, 150, 5, 0.2, 2000
DPO, RPO = f"dpo(beta={BETA})", f"rpo(beta={BETA}, eta=1)"


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


@dataclass(frozen=True)
class Spelled:
    """One run on words.

    Attributes:
        before, after: mean log-probability of the chosen words.
        syllables: mean over 2,000 samples of the trained model.
        real: share of the samples that are in the dictionary.
    """

    before: float
    after: float
    syllables: float
    real: float

    @property
    def kept(self) -> bool:
        """Whether the chosen words lost at most a tenth of their log-probability."""
        return self.after >= self.before - 0.1 * abs(self.before)


def run(*, full: bool = False, seed: int = 0, progress: Progress | None = None) -> Finding:
    """Let DPO and RPO meet a rare answer, evenly covered ones, and words (`full`: five times as many even problems)."""
    collapse = _collapse()
    evens = []
    count = PROBLEMS * (5 if full else 1)
    for i in range(count):
        if progress is not None:
            progress(0.2 * i / count, f"even coverage, problem {i + 1} of {count}")
        evens.append(_even(derive(seed, "even", i)))
    words: dict[str, list[Spelled]] = {DPO: [], RPO: []}
    prior = fit_prior()
    for i in range(SEEDS):
        for formula, rows in words.items():
            if progress is not None:
                progress(0.2 + 0.8 * i / SEEDS, f"words, {formula}, seed {i}")
            rows.append(_words(prior, formula, derive(seed, "words", i)))
    return _judge(collapse, evens, words[DPO], words[RPO])


def _judge(collapse: Collapse, evens: Sequence[Even], plain: Sequence[Spelled], guarded: Sequence[Spelled]) -> Finding:
    collapses = collapse.last < collapse.reference - 1
    agrees = collapse.gap < 1e-6
    fell = fmean(w.before - w.after for w in plain)
    kept = sum(w.kept for w in guarded)
    holds = collapses and bool(collapse.safe) and agrees and fell >= 2 and kept == len(guarded)
    curve = ", ".join(f"{eta:g}: {reward:.3f}" for eta, reward in collapse.rpo.items())
    dpo, rpo = fmean(e.dpo for e in evens), fmean(e.rpo for e in evens)
    measured = (
        f"true reward {collapse.reference:.2f} of the reference; DPO {collapse.best:.3f} early, {collapse.last:.2f} at the end "
        f"with {collapse.bad:.0%} on the bad answer; RPO by eta {curve}; both orders of play differ by {collapse.gap:.0e}; "
        f"coverage coefficient {collapse.coverage[0]:.1f} of DPO, {collapse.coverage[1]:.2g} of RPO; evenly covered {ARMS} answers: "
        f"DPO {dpo:.2f}, RPO {rpo:.2f}; words: log-probability of the chosen {fmean(w.before for w in plain):.1f}, after DPO "
        f"{fmean(w.after for w in plain):.1f}, after RPO {fmean(w.after for w in guarded):.1f}, syllables "
        f"{fmean(w.syllables for w in plain):.2f} and {fmean(w.syllables for w in guarded):.2f} (paper, Zephyr-7b: RPO beats "
        "the reference on 83.75 % of MT-Bench, DPO's chosen "
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
    if fell < 2:
        reasons.append(f"the chosen words lost {fell:.1f} nats under DPO; at least two were expected")
    if kept < len(guarded):
        reasons.append(f"RPO kept the chosen words in {kept} of {len(guarded)} seeds only")
    behind = sum(g.syllables < p.syllables for g, p in zip(guarded, plain, strict=True))
    if behind:
        reasons.append(
            f"expected and not found: the true attribute under RPO is below DPO's in {behind} of {len(guarded)} seeds; "
            f"{fmean(w.real for w in plain):.0%} of what DPO writes are words, and {fmean(w.real for w in guarded):.0%} of what "
            "RPO writes"
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
        "words/chosen before": fmean(w.before for w in plain),
        "words/chosen after DPO": fmean(w.after for w in plain),
        "words/chosen after RPO": fmean(w.after for w in guarded),
        "words/syllables DPO": fmean(w.syllables for w in plain),
        "words/syllables RPO": fmean(w.syllables for w in guarded),
        "words/real DPO": fmean(w.real for w in plain),
        "words/real RPO": fmean(w.real for w in guarded),
        "words/seeds kept": kept,
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


def _words(prior: WordModel, formula: str, seed: int) -> Spelled:
    """Train the prior on pairs of its own words; every formula sees the same pairs in the same order."""
    g = torch.Generator().manual_seed(seed)
    found = preference_pairs(prior, PAIRS, ATTRIBUTES["syllables"], g, noise=NOISE, prompts=prefixes)
    pairs = {k: found[k] for k in ("chosen_ids", "chosen_mask", "rejected_ids", "rejected_mask")}
    trained = fit(
        copy.deepcopy(prior), formula, pairs, readout=WordReadout(reference=prior), solver="adam", lr=1e-3, steps=WORD_STEPS,
        batch_size=64, device="cpu", seed=seed, log_every=WORD_STEPS,
    ).model  # fmt: skip
    assert isinstance(trained, WordModel)

    def likelihood(model: WordModel) -> float:
        with torch.no_grad():
            return float(sequence_logps(model, pairs["chosen_ids"], pairs["chosen_mask"]).mean())

    written = sample(trained, DRAWN, g, prompts=prefixes(DRAWN, g))
    known = set(load_words().text)
    return Spelled(
        before=likelihood(prior),
        after=likelihood(trained),
        syllables=float(ATTRIBUTES["syllables"](written.ids).mean()),
        real=fmean(word in known for word in written.text),
    )


CLAIM = Claim(
    number=16,
    statement=(
        "Adding the likelihood of the chosen answers to DPO is playing against the worst reward that fits the data; it keeps "
        "the policy from overoptimising, where DPO does (Zephyr-7b: 83.75 % of MT-Bench won against the reference)."
    ),
    expected=(
        "There is a range of eta where RPO is at least as good as the reference (0.39) while DPO ends near -3.8, and both orders "
        "of the game give one value; on words RPO keeps the chosen ones within a tenth of their log-probability while DPO loses "
        "several nats, and the true attribute of what it writes is at least DPO's; where coverage is even, RPO pays for its "
        "caution (0.63 against 1.17 in a reference study)."
    ),
    falsified=(
        "DPO does not collapse, no eta avoids the collapse, the value of the game depends on who moves first, or the chosen words "
        "fall under RPO as under DPO."
    ),
    run=run,
)
