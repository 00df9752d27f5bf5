"""What a study found, as plain data: everything that the report draws and the command line prints.

`summarize` is a pure function from finished runs to a `Summary`. The dataclasses hold only numbers, texts, tuples and
dictionaries, so a summary can be written as JSON (`Summary.to_dict`) and drawn without PyTorch.

Two rules hold everywhere. A difference is always paired by seed and always stands beside its interval; where no
interval exists, the estimate carries the reason and no winner is named. Metrics are stored in their natural unit
(accuracy in 0..1); `Metric.text` and `Metric.difference_text` write them for people (accuracy in percent, differences
in points).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from poise.studies.intervals import LEVEL, Estimate

Verdict = Literal["better", "worse", "undecided", "no interval"]


@dataclass(frozen=True)
class Metric:
    """A metric's name, its direction, and how people write it."""

    name: str
    title: str
    direction: Literal["max", "min"]
    percent: bool = False

    def text(self, value: float | None) -> str:
        """Write a value: `91.2 %` for shares, `0.312` otherwise."""
        if value is None:
            return "–"
        return f"{100 * value:.1f} %" if self.percent else f"{value:.4g}"

    def difference_text(self, value: float | None) -> str:
        """Write a difference with its sign: `+12.1 points` for shares, `-0.031` otherwise."""
        if value is None:
            return "–"
        return f"{100 * value:+.1f} points" if self.percent else f"{value:+.4g}"

    def better(self, difference: float) -> bool:
        """Whether a difference (this minus that) means that this is better."""
        return difference > 0 if self.direction == "max" else difference < 0


@dataclass(frozen=True)
class Curve:
    """One recorded quantity over the training steps of one formula: mean over seeds with a t band.

    `lower` and `upper` hold None at steps with fewer than two seeds. `per_seed[seed]` has the length of `steps`, None
    where that seed recorded nothing at the step.
    """

    name: str
    steps: tuple[int, ...]
    mean: tuple[float | None, ...]
    lower: tuple[float | None, ...]
    upper: tuple[float | None, ...]
    per_seed: dict[int, tuple[float | None, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """What the final runs of one formula cost, and what tuning it cost in total."""

    seconds: Estimate
    peak_memory_bytes: Estimate
    steps_per_second: Estimate
    tuning_seconds: float = 0.0


@dataclass(frozen=True)
class SeedResult:
    """The final run of one formula on one seed, with the weights and the learning rate that it used, and what its task adds."""

    seed: int
    run: str
    formula: str
    lr: float
    weights: dict[str, float]
    metrics: dict[str, float]
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ConstraintFinding:
    """Whether one constraint of a formula held at the end of its runs.

    Attributes:
        label: the constrained term.
        seeds: runs that say so, and `feasible` how many of them held it.
        violation: mean over the runs, signed; positive is infeasible (for an equality, either sign).
    """

    label: str
    seeds: int
    feasible: int
    violation: float

    @property
    def sentence(self) -> str:
        """The finding in words: `l2: feasible`, `l2: not feasible on 2 of 5 seeds, mean violation 0.31`."""
        if self.feasible == self.seeds:
            return f"{self.label}: feasible"
        lost = self.seeds - self.feasible
        where = f" on {lost} of {self.seeds} seeds" if self.seeds > 1 else ""
        mean = "mean violation" if self.seeds > 1 else "violation"
        return f"{self.label}: not feasible{where}, {mean} {self.violation:.3g}"


@dataclass(frozen=True)
class FormulaSummary:
    """One compared formula: its metrics, its curves and its cost.

    Attributes:
        index: place in the study, 0 for the baseline.
        text: the formula as the user wrote it, in canonical form (`auto` still in it).
        terms: labels of the terms.
        seeds: the finished runs, one a seed, in the order of the seeds.
        failed_seeds: seeds whose run failed.
        metrics: test metrics by name (`accuracy`); `valid_metrics`: the same on the validation split.
        curves: every recorded curve by its name (`loss`, `term/...`, `weight/...`, `active/...`, `valid/...`,
            `train/...`).
        selected: per `auto` weight and for `lr`, the value chosen on each seed (only where tuned).
    """

    index: int
    text: str
    terms: tuple[str, ...]
    seeds: tuple[SeedResult, ...]
    failed_seeds: tuple[int, ...]
    metrics: dict[str, Estimate]
    valid_metrics: dict[str, Estimate]
    curves: dict[str, Curve]
    cost: Cost
    selected: dict[str, dict[int, float]] = field(default_factory=dict)

    def curves_of(self, kind: str) -> dict[str, Curve]:
        """Return the curves `kind/...` by the rest of their name: `curves_of("weight")["l2"]`."""
        return {name.split("/", 1)[1]: curve for name, curve in self.curves.items() if name.startswith(f"{kind}/")}

    @property
    def constraints(self) -> tuple[ConstraintFinding, ...]:
        """Whether the constraints of the formula held; empty where it has none or where curves were left out."""
        found = []
        for name, curve in self.curves_of("constraint").items():
            label, _, kind = name.rpartition("/")
            last = self.curves.get(f"constraint/{label}/final_violation")
            if kind == "feasible" and last is not None and curve.mean and last.mean:
                # A run writes one point, at its own last step, so points of several steps are runs of several lengths.
                rows = [value for row in curve.per_seed.values() for value in row if value is not None]
                share = [value for value in rows or curve.mean if value is not None]
                sizes = [v for row in last.per_seed.values() or [last.mean] for v in row if v is not None]
                seeds = len(rows) or len(self.seeds)
                if not share or not sizes or not seeds:
                    continue
                held = round(seeds * math.fsum(share) / len(share))
                found.append(ConstraintFinding(label, seeds, held, math.fsum(sizes) / len(sizes)))
        return tuple(found)


@dataclass(frozen=True)
class Difference:
    """The paired difference `formula - baseline` of one metric.

    Attributes:
        formula, baseline: indices into `Summary.formulas`.
        metric: name of the test metric.
        estimate: mean difference over the shared seeds, with its t interval.
        resampled: the same with the corrected resampled interval of Nadeau and Bengio (2003), which allows for the
            overlap of training sets between seeds; None where there is no interval.
        p, p_holm: two-sided p-value, plain and Holm-adjusted over the comparisons of this metric; None without an
            interval.
        per_seed: the difference on each shared seed.
        verdict: `better` or `worse` only where the interval excludes zero and `p_holm <= 1 - level`.
        sentence: the finding in words.
    """

    formula: int
    baseline: int
    metric: str
    estimate: Estimate
    resampled: Estimate | None
    p: float | None
    p_holm: float | None
    per_seed: dict[int, float]
    verdict: Verdict
    sentence: str


@dataclass(frozen=True)
class TermEffect:
    """What one term bought: the paired difference `formula - formula without the term`, other weights as they are.

    `without` is the reduced formula as text; `p_holm` is adjusted over all terms of all formulas for this metric.
    """

    formula: int
    label: str
    without: str
    metric: str
    estimate: Estimate
    p: float | None
    p_holm: float | None
    per_seed: dict[int, float]
    verdict: Verdict
    sentence: str


@dataclass(frozen=True)
class TrialRow:
    """One trial of the search over `auto` weights and the learning rate.

    `rung` counts the rounds of successive halving from 0; `score` is the primary metric on the validation split at
    the end of the rung (None if failed); `selected` marks the trial whose values the final run took.
    """

    formula: int
    seed: int
    trial: int
    rung: int
    epochs: int | None
    steps: int | None
    lr: float
    weights: dict[str, float]
    score: float | None
    selected: bool
    run: str


@dataclass(frozen=True)
class FailedRun:
    """A run that failed: which one, why in one sentence, and the full traceback."""

    run: str
    formula: int
    text: str
    seed: int
    role: Literal["final", "without a term", "trial"]
    error: str
    detail: str = ""


@dataclass(frozen=True)
class TaskSummary:
    """The data of the study in words and numbers."""

    name: str
    source: str
    target_type: str
    examples: int
    sizes: dict[str, int]
    input_shape: tuple[int, ...]
    classes: tuple[str, ...]
    fingerprint: str
    primary: str
    direction: Literal["max", "min"]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recommendation:
    """What to do, in words derived from the intervals, and the Python lines that do it.

    `formula` is the index of the recommended formula, None where nothing may be recommended.
    """

    kind: Literal["better", "keep", "undecided", "no interval", "single", "failed"]
    formula: int | None
    text: str
    python: str


@dataclass(frozen=True)
class Summary:
    """Everything that a study found.

    Attributes:
        title: one line that names data and question.
        task: the data.
        settings: how every run was trained (`model`, `solver`, `lr`, `epochs`, ...), for a table.
        seeds: the seeds asked for.
        formulas: one entry a formula, in the order given; the first is the baseline.
        metrics: the test metrics, primary first.
        differences: every formula after the first against the first, for every metric.
        between: the best formula against each other one (primary metric only), so that "best" has its intervals too.
        term_effects: leave-one-term-out, for every metric.
        trials: the search's table; empty without tuning.
        failed: runs that failed.
        recommendation: what to do.
        notes, warnings: statements a reader should see (the task's own are in `task`).
        runs_done, runs_planned: how far the study is; a running study can be summarised too.
        seconds: seconds of training of all finished runs together.
        versions, machine: what it was made with (`python`, `torch`, ...; `platform`, `cores`, ...).
        created: UTC time of the newest run, ISO 8601; empty without runs.
        level: confidence level of every interval.
    """

    title: str
    task: TaskSummary
    settings: dict[str, str]
    seeds: tuple[int, ...]
    formulas: tuple[FormulaSummary, ...]
    metrics: tuple[Metric, ...]
    differences: tuple[Difference, ...]
    between: tuple[Difference, ...]
    term_effects: tuple[TermEffect, ...]
    trials: tuple[TrialRow, ...]
    failed: tuple[FailedRun, ...]
    recommendation: Recommendation
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    runs_done: int
    runs_planned: int
    seconds: float
    versions: dict[str, str]
    machine: dict[str, str]
    created: str
    level: float = LEVEL

    @property
    def primary(self) -> Metric:
        """The metric that the recommendation rests on."""
        return self.metrics[0]

    def metric(self, name: str) -> Metric:
        """Return a metric by its name."""
        return next(metric for metric in self.metrics if metric.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Return nested dictionaries and lists, ready for `json.dumps`."""
        return dataclasses.asdict(self)
