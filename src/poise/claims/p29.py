"""Claim 29: preferences that held-out unlabelled data guide adapt a classifier to a new domain (ParetoDA).

5,000 MNIST digits with labels, scikit-learn's digits without, a tenth of which is held out: a real shift between two hand-writing
collections. MLP 64-128-64-10, 64 + 64 examples a step, 300 steps of SGD (0.05, momentum 0.9, weight decay 1e-3). The
reversal warms up over 10 steps, the authors' share of a run (1,000 of 30,000).

The judged branch is dominance, the one that the authors' released code always runs. Every weight acts on what the three objectives
share, which here includes the head; `--full` also leaves the head to the labels, as the authors do, and runs the ablations, CDAN and
MDD, a grid of fixed weights and other balancers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from poise.claims import Claim, Finding, Progress
from poise.data.domain_pairs import DomainPairs
from poise.objective import Objective, Term, Value
from poise.quantities import derive
from poise.readouts import DomainFeatures
from poise.solvers.torch_optimizers import SGD
from poise.tasks.digit_domains import DigitDomains, load_digit_domains
from poise.terms.domain import (
    ConditionalDomainAdversarial,
    DomainAdversarial,
    MarginDisparity,
    MutualInformation,
    SourceClassification,
    TargetClassification,
    reverse_gradient,
)
from poise.training import fit
from poise.weights.pareto import EPO, MGDA, Balancer, FixedPreference, GuidedPareto, PCGrad

CLASSES, WIDTH, BATCH, STEPS, SEEDS = 10, 64, 64, 300, 5
HIDDEN = (128,)
BAD = (10.0, 0.1)
"""Units of the alignment and the target objective that nobody would choose."""


class Watched(Balancer):
    """Another balancer, scaled to weights of sum m, and a count of the steps in which some objective rises to first order."""

    def __init__(self, inner: Balancer) -> None:
        super().__init__()
        self.inner = inner
        self.rising: list[bool] = []

    def weigh(self, gram: Tensor, values: Tensor) -> Tensor:
        found = self.inner.weigh(gram, values)
        w: Tensor = found * len(found) / found.sum()
        descent = gram @ w
        self.rising.append(bool((descent < -1e-9 * descent.abs().max()).any()))
        return w


class AlignmentInUnits(DomainAdversarial):
    """An alignment whose value, and whose gradient on the features, are `factor` times as large; its discriminator learns as before."""

    factor = 1.0

    def forward(self, features: Tensor, domain: Tensor, step: int) -> Value:
        out = super().forward(reverse_gradient(features, -self.factor), domain, step)
        return Value(self.factor * out.values, out.values)


class TargetInUnits(TargetClassification):
    """A target objective whose value, and whose gradient on the model, are `factor` times as large; the rest learns as before."""

    factor = 1.0

    def forward(
        self,
        logits: Tensor,
        domain: Tensor,
        features: Tensor | None = None,
        target: Tensor | None = None,
        frozen_head_logits: Tensor | None = None,
    ) -> Value:
        logits = logits if frozen_head_logits is None else frozen_head_logits
        out = super().forward(reverse_gradient(logits, -self.factor), domain, features, target)
        return Value(self.factor * out.values, out.values if out.surrogate is None else out.surrogate)


@dataclass(frozen=True)
class Method:
    """How one run weighs its objectives.

    Args:
        name: in the table.
        policy: makes the policy from the guide, or None.
        terms: 1 for the source alone, 2 with alignment, 3 with target classification.
        units: factors of the alignment and the target objective.
        refine: of target classification.
        guide: "held out", or "train" for the rows that are trained on.
        free_head: objectives on target rows move the head too.
        alignment: "dann", "cdan" or "mdd".
    """

    name: str
    policy: Callable[[Any], Any] | None = None
    terms: int = 3
    units: tuple[float, float] = (1.0, 1.0)
    refine: Any = "bayes"
    guide: str = "held out"
    free_head: bool = True
    alignment: str = "dann"


def guided(upper: Any, **options: Any) -> GuidedPareto:
    return GuidedPareto(upper=upper, valid_batch=BATCH, **options)


def watched(upper: Any, make: Callable[[], Balancer]) -> Watched:
    return Watched(make())


DOMINANCE, BALANCE, UNIFORM, DANN = "guided, dominance", "guided, balance (auto)", "equal weights", "DANN"
BAD_FIXED, BAD_GUIDED = "equal weights, bad scales", "guided, dominance, loss-normalised, bad scales"
METHODS = (
    Method("source only", terms=1),
    Method(DANN, terms=2),
    Method(UNIFORM, partial(watched, make=FixedPreference)),
    Method(DOMINANCE, partial(guided, branch="dominance")),
    Method(BALANCE, guided),
    Method(BAD_FIXED, units=BAD),
    Method(BAD_GUIDED, partial(guided, branch="dominance", normalize="loss"), units=BAD),
)
MORE = (
    *(
        Method(f"{alignment.upper()}, {name}", policy, terms, alignment=alignment)
        for alignment in ("cdan", "mdd")
        for name, policy, terms in (
            ("alone", None, 2),
            ("equal weights", partial(watched, make=FixedPreference), 3),
            ("guided, dominance", partial(guided, branch="dominance"), 3),
        )
    ),
    Method("MGDA", partial(watched, make=MGDA)),
    Method("PCGrad", partial(watched, make=PCGrad)),
    Method("EPO, equal values", partial(watched, make=EPO)),
    *(
        Method(f"fixed 1 : {a:g} : {b:g}", partial(watched, make=partial(FixedPreference, (1, a, b))))
        for a in (0.3, 1.0, 3.0)
        for b in (0.3, 1.0, 3.0)
        if (a, b) != (1.0, 1.0)
    ),
    Method("dominance, no target objective", partial(guided, branch="dominance"), terms=2),
    Method("dominance, no refining", partial(guided, branch="dominance"), refine="none"),
    Method("dominance, refined as in the code", partial(guided, branch="dominance"), refine="code"),
    Method("dominance, guided by training rows", partial(guided, branch="dominance"), guide="train"),
    Method("dominance, S and D added as in the code", partial(guided, branch="dominance", added=("S", "D"))),
    Method("equal weights, head from labels", partial(watched, make=FixedPreference), free_head=False),
    Method("dominance, head from labels", partial(guided, branch="dominance"), free_head=False),
    Method("balance, head from labels", guided, free_head=False),
    Method("guided, balance, loss-normalised, bad scales", partial(guided, normalize="loss"), units=BAD),
    Method("dominance, l2-normalised, bad scales", partial(guided, branch="dominance", normalize="l2"), units=BAD),
    Method("dominance, loss-normalised", partial(guided, branch="dominance", normalize="loss")),
)


@dataclass
class Outcome:
    """Target accuracy in percent, share of steps with a rising objective, and mean preferences, where they are known."""

    accuracy: float
    rising: float = math.nan
    alpha: tuple[float, ...] = field(default=())


def run(*, full: bool = False, seed: int = 0, progress: Progress | None = None) -> Finding:
    """Compare guided preferences with fixed weights on five seeds (`full`: also the ablations, a grid and other balancers)."""
    data = load_digit_domains()
    methods = (*METHODS, *MORE) if full else METHODS
    jobs = [(m, seed + i) for i in range(SEEDS) for m in methods]
    found: dict[str, list[Outcome]] = {}
    for done, (method, each) in enumerate(jobs):
        if progress is not None:
            progress(done / len(jobs), f"{method.name}, seed {each}")
        found.setdefault(method.name, []).append(_train(method, data, each))
    return _judge(found)


def _judge(found: Mapping[str, Sequence[Outcome]]) -> Finding:
    ours, plain, dann = (_accuracies(found[name]) for name in (DOMINANCE, UNIFORM, DANN))
    gain = fmean(ours) - fmean(dann)
    difference = [a - b for a, b in zip(ours, plain, strict=True)]
    error = stdev(difference) / math.sqrt(len(difference))
    rising = [fmean(o.rising for o in found[name]) for name in (UNIFORM, DOMINANCE)]
    bad = [fmean(_accuracies(found[name])) for name in (BAD_FIXED, BAD_GUIDED)]
    reasons = []
    if fmean(difference) < -error and rising[1] >= rising[0]:
        reasons.append("guided weights are worse than equal ones and let an objective rise as often")
    if gain < 3:
        reasons.append(f"they gain {gain:.1f} points over DANN, and three were asked for")
    if fmean(difference) < -error:
        reasons.append("they are worse than equal weights by more than a standard error")
    if bad[1] <= bad[0]:
        reasons.append("under bad scales they are not better than fixed weights")
    verdict = "fails" if reasons else "holds"
    rows = "; ".join(f"{name} {_spread(_accuracies(rows))}" for name, rows in found.items())
    alpha = _alpha(found[DOMINANCE])
    measured = (
        f"target accuracy, %: {rows}. Dominance - equal weights {fmean(difference):+.1f} ({error:.1f} s.e.); some objective rises in "
        f"{rising[0]:.0%} -> {rising[1]:.0%} of the steps; mean preferences {alpha} (reference study: source only 54.7, DANN 66.2, equal "
        "69.9, balance 69.8, dominance 71.2, preferences .53/.26/.21; the paper's tables on VisDA and Office could not be confirmed)"
    )
    balance = found[BALANCE]
    often, reached = fmean(o.rising for o in balance), fmean(_accuracies(balance))
    reasons.append(
        f"balance, which the paper's rule takes while its guide is not satisfied, reaches {reached:.1f} %, and some objective rises in "
        f"{often:.0%} of its steps, since it bounds losses instead of excluding them"
    )
    figures = {f"{name}/accuracy": fmean(_accuracies(rows)) for name, rows in found.items()}
    figures |= {
        f"{name}/rising": fmean(o.rising for o in rows)
        for name, rows in found.items()
        if not math.isnan(rows[0].rising)
    }
    return Finding(verdict, measured, "; ".join(reasons), figures)  # type: ignore[arg-type]


def _train(method: Method, data: DigitDomains, seed: int) -> Outcome:
    """One run; every method begins with the same weights and sees the same batches."""
    pairs = DomainPairs((data.source, data.source_target), data.target, BATCH, seed=seed)
    target = TargetInUnits(CLASSES, WIDTH, HIDDEN, method.refine, shifted=True, seed=seed)
    target.factor = method.units[1]
    objective = _objective(method, target, seed)
    guide = target if method.terms == 3 else MutualInformation(shifted=True)
    policy = None if method.policy is None else method.policy(guide)
    rows = pairs.target.data["input"]
    shown = pairs.guide if method.guide == "held out" else {"input": rows, "domain": torch.full((len(rows),), -1)}
    result = fit(
        _mlp(seed),
        objective,
        pairs,
        valid={**shown, "target": torch.full((len(shown["input"]),), -1)},
        evaluate=lambda model: {},
        readout=DomainFeatures(target_trains_head=method.free_head),
        solver=SGD(lr=0.05, momentum=0.9, weight_decay=1e-3),
        policy=policy,
        steps=STEPS,
        device="cpu",
        seed=seed,
        log_every=STEPS,
        validate_every=STEPS,
        on_nonfinite="skip",
    )
    accuracy = 100 * float((result.predict(data.target).argmax(-1) == data.target_target).float().mean())
    if isinstance(policy, Watched):
        return Outcome(accuracy, fmean(policy.rising))
    if isinstance(policy, GuidedPareto):
        summary = policy.summary()
        return Outcome(accuracy, summary.any_rising, summary.alpha)
    return Outcome(accuracy)


def _objective(method: Method, target: TargetClassification, seed: int) -> Objective:
    terms = [SourceClassification().named("S"), _alignment(method, seed).named("D"), target.named("T")]
    objective: Objective = sum(terms[1 : method.terms], terms[0])
    return objective


def _alignment(method: Method, seed: int) -> Term:
    warmup = STEPS / 30
    if method.alignment == "cdan":
        return ConditionalDomainAdversarial(WIDTH, CLASSES, HIDDEN, warmup=warmup, seed=seed)
    if method.alignment == "mdd":
        return MarginDisparity(WIDTH, CLASSES, HIDDEN, warmup=warmup, seed=seed)
    dann = AlignmentInUnits(WIDTH, HIDDEN, warmup=warmup, seed=seed)
    dann.factor = method.units[0]
    return dann


def _mlp(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "weights"))
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))


def _accuracies(rows: Sequence[Outcome]) -> list[float]:
    return [row.accuracy for row in rows]


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.1f}±{stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def _alpha(rows: Sequence[Outcome]) -> str:
    means = (fmean(column) for column in zip(*(row.alpha for row in rows), strict=True))
    return "/".join(f"{a:.2f}".removeprefix("0") for a in means)


CLAIM = Claim(
    number=29,
    statement=(
        "Weights of source, alignment and target objectives that a small linear program sets at every step, guided by a label-free "
        "objective on held-out target data, adapt better than fixed ones (improves DANN, CDAN and MDD on VisDA-2017, Office-31 and "
        "Office-Home; figures unconfirmed)."
    ),
    expected=(
        "Three points or more over DANN and no worse than equal weights (reference study: 66.2 -> 71.2 %, equal weights 69.9 %), no "
        "step in which an objective rises, and, normalised, better than fixed weights where the scales are bad."
    ),
    falsified=(
        "Guided weights are worse than equal weights by more than a standard error over five seeds and do not lower the share of steps in "
        "which some objective rises to first order. Short of that, the claim also fails where the expected gains are missed."
    ),
    run=run,
)
