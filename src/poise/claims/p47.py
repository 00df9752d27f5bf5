"""Claim 47: what learned steps are trained by decides what they are good at, and under which conditions.

Bernoulli-Gaussian signals (8 % nonzeros, noise 0.03) under a Gaussian matrix; ISTA (l1, weight 0.1) and IHT (l0, weight 0.05)
unfolded into T layers, steps trained generation by generation by the error to the true signals or by the objective alone; both see the
same batches. Judged on 1,000 other signals, after each generation at its last layer, and at the end under other densities and noise.
Beside it, reported and not judged, ISTA at weight 0.3, where the l1 norm shrinks more than is good for recovery.

Sizes: n = 200, m = 100, T = 20, 40 batches of 100 a generation, three seeds, each with a matrix of its own; `full`: batches of 200, ten
seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from statistics import fmean
from typing import Any, Literal

import torch

from poise.claims import Claim, Finding, Progress
from poise.data.sparse_signals import BernoulliGaussian
from poise.insight.unfolding import layer_report, mismatch_report, plain_solvers
from poise.penalties import L0, L1
from poise.quantities import derive
from poise.solvers.unfolded import Incremental, Unfolded, train_unfolded
from poise.studies.intervals import t_interval

Form = Literal["ista", "iht"]
PROBLEMS: tuple[tuple[str, Form, float], ...] = (("ISTA", "ista", 0.1), ("IHT", "iht", 0.05), ("ISTA 0.3", "ista", 0.3))
LOSSES = ("supervised", "objective")
CHANGES = {
    "p 4 %": {"p": 0.04},
    "p 12 %": {"p": 0.12},
    "SNR -10 dB": {"noise": 0.03 * 10**0.5},
    "SNR +10 dB": {"noise": 0.03 / 10**0.5},
}
NEAR, BETTER, SETTLED = 1.01, 3.0, 5


@dataclass
class Outcome:
    """One problem in one seed.

    Attributes:
        objective, error: by contestant: "plain" (T constant steps), "limit" (1,000 steps), "FISTA", and the two losses.
        path: by contestant, the objective at the last layer of a t-layer network, t = 1 .. T.
        changed: error by condition and loss, and "as trained".
        median: of the signals' errors, by contestant, and by condition and loss.
    """

    objective: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    path: dict[str, list[float]] = field(default_factory=dict)
    changed: dict[tuple[str, str], float] = field(default_factory=dict)
    median: dict[str | tuple[str, str], float] = field(default_factory=dict)


@dataclass(frozen=True)
class Size:
    m: int
    n: int
    layers: int
    schedule: Incremental
    seeds: int


SMALL = Size(100, 200, 20, Incremental(batches=40, batch_size=100), 3)
LARGE = Size(100, 200, 20, Incremental(batches=40, batch_size=200), 10)


def run(*, full: bool = False, seed: int = 0, progress: Progress | None = None) -> Finding:
    """Train both forms by both losses on every seed, and judge them on other signals."""
    threads = torch.get_num_threads()
    # Thousands of small products: sharing each of them out costs more than it gains.
    torch.set_num_threads(1)
    size = LARGE if full else SMALL
    outcomes: dict[str, list[Outcome]] = {}
    jobs = list(product(range(size.seeds), PROBLEMS))
    try:
        for done, (each, (name, form, weight)) in enumerate(jobs):
            if progress is not None:
                progress(done / len(jobs), f"{name}, seed {each}")
            outcomes.setdefault(name, []).append(study(form, weight, size, derive(seed, "signals", each)))
    finally:
        torch.set_num_threads(threads)
    return judge(outcomes)


def study(form: Form, weight: float, size: Size, seed: int) -> Outcome:
    """Train one form by both losses on the same batches, and measure."""
    sampler = BernoulliGaussian(size.m, size.n, matrix_seed=derive(seed, "matrix"))
    held = sampler(1000, torch.Generator().manual_seed(derive(seed, "test")))
    penalty = L0() if form == "iht" else L1()
    plain = plain_solvers(size.layers, weight, penalty)
    found = Outcome()
    models: dict[str, Any] = {}
    for loss in LOSSES:
        model = models[loss] = Unfolded(form, size.layers, penalty, weight=weight)
        found.path[loss] = []

        def measure(generation: Any, model: Unfolded = model, path: list[float] = found.path[loss]) -> None:
            with torch.no_grad():
                x = model(held.operator, held.y, layers=generation.layers)
                path.append(float(model.objective(held.operator, held.y, x).mean()))

        train_unfolded(model, sampler, loss, size.schedule, seed=seed, after=measure)
    contestants = {**models, "plain": plain["1/L"], "FISTA": plain["FISTA"]}
    report = layer_report(contestants, held, weight=weight, penalty=penalty, limit=1000)
    for name in contestants:
        last = report.last(name)
        assert last.error is not None
        found.objective[name], found.error[name] = last.objective.mean, last.error.mean
        found.median[name] = last.error.median
    assert report.limit_error is not None
    found.objective["limit"], found.error["limit"] = report.limit.mean, report.limit_error.mean
    found.path["plain"] = [row.objective.mean for row in report.path("plain")]
    for row in mismatch_report(models, sampler, CHANGES, weight=weight, penalty=penalty, seed=seed).rows:
        assert row.error is not None
        found.changed[row.condition, row.solver] = row.error.mean
        found.median[row.condition, row.solver] = row.error.median
    return found


def judge(outcomes: Mapping[str, Sequence[Outcome]]) -> Finding:
    """Judge by six looks, each of which can contradict the claim."""
    ista, iht = outcomes["ISTA"], outcomes["IHT"]
    reasons = []
    above = sum(
        any(
            ours >= plain for ours, plain in list(zip(o.path["objective"], o.path["plain"], strict=True))[SETTLED - 1 :]
        )
        for o in ista
    )
    if above:
        reasons.append(
            f"trained by the objective, ISTA is not below constant steps at every t >= {SETTLED} in {above} of {len(ista)} seeds"
        )
    near = _mean(ista, "objective", "objective") / _mean(ista, "objective", "limit")
    if near > NEAR:
        reasons.append(f"trained by the objective, ISTA ends {100 * (near - 1):.1f} % above its limit; 1 % was allowed")
    if _mean(ista, "objective", "objective") >= _mean(ista, "objective", "supervised"):
        reasons.append("trained by the objective, ISTA ends at a higher objective than trained by the error")
    if _mean(ista, "error", "supervised") >= _mean(ista, "error", "objective"):
        sup, own = (fmean(o.median[loss] for o in ista) for loss in LOSSES)
        reasons.append(
            "trained by the error, ISTA ends at a larger error than trained by the objective, whose steps it could have taken: its "
            f"training has not converged (the median signal: {sup:.5f} against {own:.5f})"
        )
    gains = {loss: _mean(iht, "error", "plain") / _mean(iht, "error", loss) for loss in LOSSES}
    reasons += [
        f"trained by the {loss}, IHT's error is only {gain:.1f} times lower"
        for loss, gain in gains.items()
        if gain < BETTER
    ]
    slips = [fmean(_slip(o, c, "supervised") - _slip(o, c, "objective") for c in CHANGES) for o in iht]
    if fmean(slips) < 0:
        typical = fmean(
            _slip(o, c, "supervised", "median") - _slip(o, c, "objective", "median") for o in iht for c in CHANGES
        )
        reasons.append(
            "away from the training condition, the mean error of IHT trained by the objective rises more than that of IHT trained by the "
            f"error; in the median signal the rises, as logarithms, differ by {typical:+.2f}, supervised minus unsupervised"
        )
    holds = not reasons
    biased = outcomes.get("ISTA 0.3")
    if biased:
        sup, end = _mean(biased, "error", "supervised"), _mean(biased, "error", "limit")
        own = _mean(biased, "error", "objective")
        reasons.append(
            f"at weight 0.3, where the l1 norm shrinks more, ISTA trained by the error has {sup / end:.2f} of the error of its limit, "
            f"trained by the objective {own / end:.2f}"
        )
    figures = (
        _figures(outcomes)
        | {"above its limit": near, "slips": fmean(slips)}
        | {f"gain/{k}": v for k, v in gains.items()}
    )
    return Finding("holds" if holds else "fails", _words(outcomes, slips), "; ".join(reasons), figures)


def _slip(outcome: Outcome, condition: str, loss: str, what: str = "changed") -> float:
    """Return by which factor the error (of the mean or the median signal) rises from the training condition, as a logarithm."""
    errors = getattr(outcome, what)
    return math.log(errors[condition, loss] / errors["as trained", loss])


def _mean(outcomes: Sequence[Outcome], what: str, name: str) -> float:
    return fmean(getattr(o, what)[name] for o in outcomes)


def _words(outcomes: Mapping[str, Sequence[Outcome]], slips: Sequence[float]) -> str:
    rows = []
    for name, found in outcomes.items():
        each = " / ".join(
            f"{_mean(found, 'objective', c):.3f}, {_mean(found, 'error', c):.5f}" for c in ("plain", *LOSSES, "limit")
        )
        rows.append(f"{name} {each}")
    iht = outcomes["IHT"]
    moved = ", ".join(
        f"{c} {fmean(o.changed[c, 'supervised'] for o in iht):.5f} / {fmean(o.changed[c, 'objective'] for o in iht):.5f}"
        for c in CHANGES
    )
    interval = t_interval(list(slips))
    ends = (
        "" if interval.lower is None or interval.upper is None else f" [{interval.lower:+.2f}, {interval.upper:+.2f}]"
    )
    return (
        f"objective, error of constant steps / supervised / unsupervised / 1,000 steps: {'; '.join(rows)}. IHT elsewhere, error "
        f"supervised / unsupervised: {moved}; log of the error's rise, supervised minus unsupervised {fmean(slips):+.2f}{ends} "
        "(paper: supervised ISTA recovers better and misses the l1 optimum, unsupervised ISTA reaches it; both IHT better than plain, "
        "unsupervised IHT generalises)"
    )


def _figures(outcomes: Mapping[str, Sequence[Outcome]]) -> dict[str, float]:
    figures = {}
    for name, found in outcomes.items():
        for what, contestant in product(("objective", "error"), found[0].objective):
            figures[f"{name}/{contestant}/{what}"] = _mean(found, what, contestant)
        for condition, loss in found[0].changed:
            figures[f"{name}/{loss}/{condition}/error"] = fmean(o.changed[condition, loss] for o in found)
            figures[f"{name}/{loss}/{condition}/median error"] = fmean(o.median[condition, loss] for o in found)
    return figures


CLAIM = Claim(
    number=47,
    statement=(
        "Unfolded ISTA trained by the error recovers better but does not minimise the l1 objective; trained by the objective it reaches "
        "plain ISTA's solution in far fewer steps. Unfolded IHT finds better local minima than plain IHT by either loss, and only the one "
        "trained by the objective keeps them when density and noise change."
    ),
    expected=(
        "Trained by the objective, ISTA ends within 1 % of its limit's objective and below the one trained by the error, whose error is "
        "lower; both IHT have at most a third of plain IHT's error; elsewhere the unsupervised IHT loses no more."
    ),
    falsified=(
        "Trained by the objective, a t-layer ISTA is not below t constant steps for every t >= 5; or it ends more than 1 % above the "
        "limit; or either order of objective or error between the two losses is reversed in the mean; or a trained IHT is not three times "
        "better than plain IHT; or over four other conditions the unsupervised IHT's error rises more than the supervised one's."
    ),
    run=run,
)
