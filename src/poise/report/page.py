"""Turn a `Summary` into what the page shows: sentences, rows and figures, in the order in which a reader asks for them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from poise.report import figures, palette, wording
from poise.report.alignment import CURVES, alignment_of
from poise.report.constraints import CONSTRAINT_CURVES, constraints_of
from poise.report.embed import figure_text
from poise.report.figures import Figure, Line, Point, Row
from poise.report.policies import policies_of, stands_here

if TYPE_CHECKING:
    from poise.studies.intervals import Estimate
    from poise.studies.summary import Difference, FailedRun, FormulaSummary, Metric, Summary, TermEffect


@dataclass(frozen=True)
class Key:
    """A formula's letter, colour and text, as the page repeats them."""

    index: int
    letter: str
    colour: str
    text: str


@dataclass(frozen=True)
class Mention:
    """A formula named in a sentence; only its first mention is written out."""

    key: Key
    first: bool


@dataclass(frozen=True)
class Failure:
    """Runs of one formula that failed in the same way."""

    key: Key
    role: str
    error: str
    runs: tuple[FailedRun, ...]

    @property
    def seeds(self) -> list[int]:
        """The seeds that are hit."""
        return sorted({run.seed for run in self.runs})


@dataclass(frozen=True)
class Chart:
    """A figure with everything around it.

    `says` is the figure in words, for who cannot see it; `keys` become its legend buttons.
    """

    id: str
    figure: Figure
    says: str
    keys: tuple[Key, ...]
    title: str = ""
    code: str = ""
    height: int = 300


@dataclass(frozen=True)
class Whisker:
    """Positions in percent of a small drawn interval in a table cell."""

    mean: float
    low: float | None
    high: float | None
    zero: float | None = None


@dataclass(frozen=True)
class Cell:
    """An estimate as a table shows it."""

    mean: str
    interval: str
    reason: str
    whisker: Whisker | None = None


@dataclass(frozen=True)
class ResultRow:
    """One formula, one metric."""

    key: Key
    value: Cell
    difference: Cell | None
    p: str
    verdict: str
    seeds: int
    failed: int


@dataclass(frozen=True)
class MetricTable:
    """All formulas on one metric."""

    metric: Metric
    rows: tuple[ResultRow, ...]


@dataclass(frozen=True)
class EffectRow:
    """What one term bought."""

    key: Key
    label: str
    without: str
    effect: Cell
    p: str
    verdict: str
    sentence: str


@dataclass(frozen=True)
class TermPanel:
    """One term: its value over time and its weight over time."""

    label: str
    value: Chart | None
    weight: Chart | None
    inactive: tuple[str, ...]

    @property
    def charts(self) -> tuple[Chart, ...]:
        """The charts that there are."""
        return tuple(chart for chart in (self.value, self.weight) if chart is not None)

    @property
    def keys(self) -> tuple[Key, ...]:
        """The formulas of both charts."""
        return tuple(dict.fromkeys(key for chart in self.charts for key in chart.keys))


@dataclass(frozen=True)
class CurveNumbers:
    """A curve's figures for the table under it."""

    key: Key
    first: str
    best: str
    last: str


@dataclass(frozen=True)
class CurveSection:
    """A learning curve with its table of numbers."""

    chart: Chart
    numbers: tuple[CurveNumbers, ...]
    averaged: int


@dataclass(frozen=True)
class Fact:
    """A name and its value in the table of how it was measured."""

    name: str
    value: str


FORMULAS_DRAWN = 24
"""More lines than this in one figure tell nobody anything; the tables hold all formulas."""
ROWS_DRAWN = 40
SEEDS_LISTED = 500
TRIALS_LISTED = 1000

VERDICTS = {
    "better": "better",
    "worse": "worse",
    "undecided": "not decided",
    "no interval": "no interval",
}


class Page:
    """Everything that the template reads; built once from a summary and free of HTML."""

    def __init__(self, summary: Summary) -> None:
        self.summary = summary
        self.metric = summary.primary
        self.keys = tuple(
            Key(entry.index, palette.letter(entry.index), f"series-{entry.index % palette.COLOURS}", entry.text)
            for entry in summary.formulas
        )
        self._key = {key.index: key for key in self.keys}
        self.level = f"{100 * summary.level:g} %"
        self.drawn = self._drawn()
        self.charts: list[Chart] = []
        self.answer = _Answer(summary, self._key)
        self.results = self._metric_table(self.metric)
        self.other_metrics = tuple(self._metric_table(metric) for metric in summary.metrics[1:])
        self.between = tuple(entry for entry in summary.between if 0 not in (entry.formula, entry.baseline))
        self.forests = self._forests("difference", self._difference_rows)
        self.effects = {metric.name: self._effect_rows(metric) for metric in summary.metrics}
        self.effect_forests = self._forests("bought", self._term_rows)
        self.quality_curves = self._quality_curves()
        self.loss_curve = self._curve("loss", "loss", "Training loss", Scale.plain())
        self.terms = self._term_panels()
        self.other_curves = self._other_curves()
        self.alignment = alignment_of(self)
        self.constraints = constraints_of(self)
        self.policies = policies_of(self)
        self.cost_chart = self._cost_chart()
        self.trial_charts = self._trial_charts()
        self.data_facts = self._data_facts()
        self.settings = [Fact(name.replace("_", " "), value) for name, value in summary.settings.items()]
        self.versions = [Fact(name, value) for name, value in summary.versions.items()]
        self.machine = [Fact(name.replace("_", " "), value) for name, value in summary.machine.items()]
        self.warnings = list(dict.fromkeys([*summary.warnings, *summary.task.warnings]))
        self.notes = list(dict.fromkeys([*summary.notes, *summary.task.notes]))

    # --- what a large study leaves out of its figures -----------------------------------------------------------------

    def _drawn(self) -> frozenset[int]:
        """Return the formulas that figures draw: all, or the baseline, the recommended one and the best of the others."""
        formulas = self.summary.formulas
        if len(formulas) <= FORMULAS_DRAWN:
            return frozenset(entry.index for entry in formulas)
        sign = -1.0 if self.metric.direction == "max" else 1.0

        def rank(entry: FormulaSummary) -> tuple[bool, float]:
            found = entry.metrics.get(self.metric.name)
            known = found is not None and math.isfinite(found.mean)
            return entry.index not in (
                0,
                self.summary.recommendation.formula,
            ), sign * found.mean if found and known else math.inf

        return frozenset(entry.index for entry in sorted(formulas, key=rank)[:FORMULAS_DRAWN])

    def _rows_drawn(self, rows: list[Row]) -> list[Row]:
        """Return the rows of a forest, or where there are too many the ones furthest from zero for their interval."""
        if len(rows) <= ROWS_DRAWN:
            return rows

        def weight(row: Row) -> float:
            found = row.estimate
            if not math.isfinite(found.mean) or found.lower is None:
                return 0.0
            return abs(found.mean) / max(found.mean - found.lower, 1e-300)

        kept = {id(row) for row in sorted(rows, key=weight, reverse=True)[:ROWS_DRAWN]}
        return [row for row in rows if id(row) in kept]

    @property
    def cuts(self) -> list[str]:
        """What figures and lists leave out, in words; empty for a study of usual size."""
        said = []
        formulas, seeds, trials = len(self.summary.formulas), len(self.summary.seeds), len(self.summary.trials)
        if formulas > FORMULAS_DRAWN:
            said.append(
                f"Curves and costs draw {len(self.drawn)} of the {formulas} formulas: the baseline and the best ones on "
                f"{self.metric.title}. The tables of results hold all."
            )
        effects = sum(entry.metric == self.metric.name for entry in self.summary.term_effects)
        if max(formulas - 1, effects) > ROWS_DRAWN:
            said.append(f"Figures of differences draw the {ROWS_DRAWN} that stand out most from their intervals.")
        if seeds > figures.DOTS:
            said.append(f"Of {seeds:,} seeds, {figures.DOTS} from the lowest to the highest are drawn as dots.")
        if seeds > SEEDS_LISTED:
            said.append(f"The list of single runs has the first {SEEDS_LISTED} seeds.")
        if trials > TRIALS_LISTED:
            said.append(f"The list of trials has the best of each formula and seed, {TRIALS_LISTED:,} in all.")
        return [*said, "Every number is in study.sqlite: poise.studies.Study.open(folder) returns it."] if said else []

    # --- keys and small cells -----------------------------------------------------------------------------------------

    def key(self, index: int) -> Key:
        """Return the key of a formula."""
        return self._key[index]

    @cached_property
    def _named(self) -> tuple[re.Pattern[str], dict[str, Key]] | None:
        longest_first = sorted((key for key in self.keys if key.text), key=lambda key: -len(key.text))
        if not longest_first:
            return None
        names = "|".join(re.escape(key.text) for key in longest_first)
        # A formula inside a longer word or sum is not that formula.
        pattern = re.compile(rf"(?<![\w*])(?<![*+-] )({names})(?!\w| ?[*+-])")
        return pattern, {key.text: key for key in reversed(longest_first)}

    def marked(self, text: str) -> list[str | Mention]:
        """Split a sentence at the formulas it names, so that they can be shown with letter and colour."""
        if self._named is None:
            return [text]
        pattern, by_text = self._named
        parts: list[str | Mention] = []
        met: set[str] = set()
        for place, part in enumerate(pattern.split(text)):
            if place % 2:
                parts.append(Mention(by_text[part], part not in met))
                met.add(part)
            elif part:
                parts.append(part)
        return parts

    def _cell(self, estimate: Estimate, mean: str, interval: str, whisker: Whisker | None) -> Cell:
        return Cell(mean, interval, "" if interval else estimate.reason or "no interval", whisker)

    def _metric_table(self, metric: Metric) -> MetricTable:
        estimates = [entry.metrics.get(metric.name) for entry in self.summary.formulas]
        against = {
            entry.formula: entry
            for entry in self.summary.differences
            if entry.metric == metric.name and entry.baseline == self.summary.formulas[0].index
        }
        frame = _extent([e for e in estimates if e is not None])
        rows = []
        for formula, estimate in zip(self.summary.formulas, estimates, strict=True):
            if estimate is None:
                value = Cell("–", "", "no run finished")
            else:
                value = self._cell(
                    estimate,
                    wording.value(metric, estimate.mean),
                    wording.interval(metric, estimate),
                    _whisker(estimate, frame),
                )
            entry = against.get(formula.index)
            rows.append(
                ResultRow(
                    key=self.key(formula.index),
                    value=value,
                    difference=None if entry is None else self._difference_cell(entry.estimate, metric),
                    p="" if entry is None else wording.p_value(entry.p_holm),
                    verdict="" if entry is None else _verdict(entry),
                    seeds=len(formula.seeds),
                    failed=len(formula.failed_seeds),
                )
            )
        return MetricTable(metric, tuple(rows))

    def _difference_cell(self, estimate: Estimate, metric: Metric) -> Cell:
        # The unit stands beside the mean; repeating it would make the column twice as wide.
        interval = wording.difference_interval(metric, estimate).removesuffix(" points")
        return self._cell(estimate, wording.difference(metric, estimate.mean), interval, None)

    def difference_text(self, entry: Difference | TermEffect) -> Cell:
        """Return a difference as a table cell."""
        return self._difference_cell(entry.estimate, self.summary.metric(entry.metric))

    def cautious_rows(self) -> list[dict[str, Any]]:
        """Return both intervals of every difference that has the corrected resampled one."""
        rows = []
        for entry in self.summary.differences:
            if entry.resampled is None or not entry.resampled.has_interval:
                continue
            metric = self.summary.metric(entry.metric)
            rows.append(
                {
                    "key": self.key(entry.formula),
                    "baseline": self.key(entry.baseline),
                    "metric": metric.title,
                    "mean": wording.difference(metric, entry.estimate.mean),
                    "interval": wording.difference_interval(metric, entry.estimate).removesuffix(" points"),
                    "cautious": wording.difference_interval(metric, entry.resampled).removesuffix(" points"),
                    "holds": entry.resampled.excludes_zero(),
                }
            )
        return rows

    def p_text(self, p: float | None) -> str:
        """Return a p-value as text."""
        return wording.p_value(p)

    # --- figures ------------------------------------------------------------------------------------------------------

    def _chart(self, chart: Chart) -> Chart:
        self.charts.append(chart)
        return chart

    def _keys_of(self, indices: Sequence[int]) -> tuple[Key, ...]:
        return tuple(key for key in self.keys if key.index in set(indices))

    def _forests(self, prefix: str, rows_of: Callable[[Metric], list[Row]]) -> tuple[Chart, ...]:
        charts: list[Chart] = []
        for metric in self.summary.metrics:
            rows = self._rows_drawn(rows_of(metric))
            if not rows:
                continue
            said = [
                f"{row.hover}: {wording.difference(metric, row.estimate.mean)}, interval "
                f"{wording.difference_interval(metric, row.estimate) or 'not available'}"
                for row in rows
            ]
            charts.append(
                self._chart(
                    Chart(
                        id=f"{prefix}-{len(charts)}",
                        figure=figures.forest(rows, metric),
                        says=f"Differences in {metric.title}. " + "; ".join(said) + ".",
                        keys=self._keys_of([row.formula for row in rows]),
                        title=metric.title,
                        height=96 + (62 if len(rows) <= 20 else 34) * len(rows),
                    )
                )
            )
        return tuple(charts)

    def _difference_rows(self, metric: Metric) -> list[Row]:
        return [
            Row(
                formula=entry.formula,
                label=f"<b>{palette.letter(entry.formula)}</b> − {palette.letter(entry.baseline)}",
                hover=f"{palette.letter(entry.formula)} − {palette.letter(entry.baseline)}: {self.key(entry.formula).text}",
                estimate=entry.estimate,
                per_seed=entry.per_seed,
            )
            for entry in self.summary.differences
            if entry.metric == metric.name
        ]

    def _term_rows(self, metric: Metric) -> list[Row]:
        return [
            Row(
                formula=entry.formula,
                label=f"{figure_text(entry.label, 20)}<br>in <b>{palette.letter(entry.formula)}</b>",
                hover=f"{entry.label} in {palette.letter(entry.formula)}",
                estimate=entry.estimate,
                per_seed=entry.per_seed,
            )
            for entry in self.summary.term_effects
            if entry.metric == metric.name
        ]

    def _effect_rows(self, metric: Metric) -> tuple[EffectRow, ...]:
        return tuple(
            EffectRow(
                key=self.key(entry.formula),
                label=entry.label,
                without=entry.without,
                effect=self._difference_cell(entry.estimate, metric),
                p=wording.p_value(entry.p_holm),
                verdict={"better": "helps", "worse": "harms"}.get(_verdict(entry), VERDICTS[_verdict(entry)]),
                sentence=entry.sentence,
            )
            for entry in self.summary.term_effects
            if entry.metric == metric.name
        )

    def curve(
        self,
        id: str,
        name: str,
        title: str,
        *,
        height: int,
        across: str = "training step",
        zero: bool = False,
        decades: bool = False,
    ) -> CurveSection | None:
        """Return a curve that is drawn as it is, for a section of its own.

        Args:
            zero: draw a line at 0.
            decades: let values over several decades have a logarithmic axis.
        """
        # With a direction, so that an axis of nats stays linear.
        scale = Scale.plain() if decades else Scale(1.0, "", ".4g", "min")
        return self._curve(id, name, title, scale, height, across, zero)

    def put(self, chart: Chart) -> Chart:
        """Put a whole chart on the page, for a section of its own."""
        return self._chart(chart)

    def add_chart(self, id: str, figure: Figure, says: str, formulas: Sequence[int]) -> Chart:
        """Put a figure on the page, for a section of its own."""
        return self._chart(Chart(id=id, figure=figure, says=says, keys=self._keys_of(formulas), height=320))

    def _curve(
        self,
        id: str,
        name: str,
        title: str,
        scale: Scale,
        height: int = 320,
        across: str = "training step",
        zero: bool = False,
    ) -> CurveSection | None:
        """Return a curve of all formulas that recorded it, with the numbers below it."""
        lines = [
            Line.of(formula.index, formula.text, formula.curves[name], scale.factor)
            for formula in self.summary.formulas
            if formula.index in self.drawn and name in formula.curves and formula.curves[name].steps
        ]
        lines = [line for line in lines if line.end() is not None]
        if not lines:
            return None
        numbers = []
        for line in lines:
            values = [value for value in line.mean if value is not None]
            best = max(values) if scale.direction == "max" else min(values)
            numbers.append(
                CurveNumbers(self.key(line.formula), scale.text(values[0]), scale.text(best), scale.text(values[-1]))
            )
        says = "; ".join(f"{row.key.letter} starts at {row.first} and ends at {row.last}" for row in numbers)
        logarithmic = scale.direction == "" and figures.wants_logarithm(lines)
        chart = self._chart(
            Chart(
                id=id,
                figure=figures.curves(
                    lines,
                    unit=scale.unit,
                    decimals=scale.decimals,
                    logarithmic=logarithmic,
                    pixels=height,
                    across=across,
                    zero=zero,
                ),
                says=f"{title}, by {across}: {says}.",
                keys=self._keys_of([line.formula for line in lines]),
                title=title,
                height=height,
            )
        )
        return CurveSection(chart, tuple(numbers), max(line.averaged for line in lines))

    def _quality_curves(self) -> tuple[CurveSection, ...]:
        """Return the validation curves, the primary metric first."""
        sections: list[CurveSection] = []
        for metric in self.summary.metrics:
            section = self._curve(
                f"valid-{len(sections)}", f"valid/{metric.name}", f"Validation {metric.title}", Scale.of(metric)
            )
            if section is not None:
                sections.append(section)
        return tuple(sections)

    def _other_curves(self) -> tuple[CurveSection, ...]:
        """Return what was recorded besides: the gradient's norm, what callbacks wrote."""
        shown = {"loss", *CURVES, *(f"valid/{metric.name}" for metric in self.summary.metrics)}
        names = dict.fromkeys(
            name
            for formula in self.summary.formulas
            for name in sorted(formula.curves)
            if name not in shown
            and not name.startswith(("term/", "weight/", "active/", *CONSTRAINT_CURVES))
            and not stands_here(name)
        )
        sections: list[CurveSection] = []
        for name in names:
            section = self._curve(f"other-{len(sections)}", name, name, Scale.plain(), height=250)
            if section is not None:
                sections.append(section)
        return tuple(sections)

    def _term_panels(self) -> tuple[TermPanel, ...]:
        labels = dict.fromkeys(
            label for formula in self.summary.formulas for label in (*formula.terms, *formula.curves_of("term"))
        )
        panels = []
        for place, label in enumerate(labels):
            value = self._curve(f"term-{place}", f"term/{label}", f"Value of {label}", Scale.plain(), height=250)
            weight = self._curve(f"weight-{place}", f"weight/{label}", f"Weight of {label}", Scale.plain(), height=250)
            if value is None and weight is None:
                continue
            panels.append(
                TermPanel(
                    label,
                    value.chart if value else None,
                    weight.chart if weight else None,
                    tuple(self._inactivity(label)),
                )
            )
        return tuple(panels)

    def _inactivity(self, label: str) -> list[str]:
        said = []
        for formula in self.summary.formulas:
            curve = formula.curves_of("active").get(label)
            values = [value for value in curve.mean if value is not None] if curve else []
            if values and (share := math.fsum(values) / len(values)) < 0.9995:
                said.append(f"{self.key(formula.index).letter}: acted in {100 * share:.1f} % of the recorded steps")
        return said

    def _cost_chart(self) -> Chart | None:
        points = [
            Point(
                formula.index,
                formula.text,
                formula.cost.seconds,
                formula.metrics[self.metric.name],
                tuple(
                    (run.seconds, run.metrics[self.metric.name])
                    for run in figures.spread(formula.seeds, figures.DOTS)
                    if self.metric.name in run.metrics and math.isfinite(run.metrics[self.metric.name])
                ),
            )
            for formula in self.summary.formulas
            if formula.index in self.drawn and formula.seeds and self.metric.name in formula.metrics
        ]
        if not points:
            return None
        said = [
            f"{palette.letter(point.formula)} takes {wording.seconds(point.cost.mean)} and reaches "
            f"{wording.value(self.metric, point.quality.mean)}"
            for point in points
        ]
        return self._chart(
            Chart(
                id="cost",
                figure=figures.cost_quality(points, self.metric),
                says=f"Seconds per run against test {self.metric.title}: " + "; ".join(said) + ".",
                keys=self._keys_of([point.formula for point in points]),
                height=320,
            )
        )

    def _trial_charts(self) -> tuple[Chart, ...]:
        rows = [row for row in self.summary.trials if row.formula in self.drawn]
        if len(rows) > figures.TRIALS:
            chosen = [row for row in rows if row.selected]
            rest = [row for row in rows if not row.selected]
            rows = [*figures.spread(rest, max(figures.TRIALS - len(chosen), 2)), *chosen]
        parameters = dict.fromkeys(name for row in rows for name in ("lr", *row.weights))
        charts: list[Chart] = []
        for parameter in parameters:
            figure = figures.trials(rows, parameter, self.metric)
            if not figure["data"]:
                continue
            title = "Learning rate" if parameter == "lr" else "Weight of"
            charts.append(
                self._chart(
                    Chart(
                        id=f"trial-{len(charts)}",
                        figure=figure,
                        says=f"Every tried {'learning rate' if parameter == 'lr' else f'weight of {parameter}'} against "
                        f"the validation {self.metric.title} it reached; the numbers are in the table of trials.",
                        keys=self._keys_of([trace["meta"]["formula"] for trace in figure["data"]]),
                        title=title,
                        code="" if parameter == "lr" else parameter,
                        height=270,
                    )
                )
            )
        return tuple(charts)

    # --- tables -------------------------------------------------------------------------------------------------------

    def cost_rows(self) -> list[dict[str, Any]]:
        """Return the table of costs."""
        rows = []
        for formula in self.summary.formulas:
            cost = formula.cost
            rows.append(
                {
                    "key": self.key(formula.index),
                    "seconds": wording.seconds(cost.seconds.mean),
                    "seconds_interval": _range(cost.seconds, wording.seconds),
                    "memory": wording.size(cost.peak_memory_bytes.mean),
                    "rate": wording.rounded(cost.steps_per_second.mean),
                    "tuning": wording.seconds(cost.tuning_seconds) if cost.tuning_seconds else "–",
                }
            )
        return rows

    @property
    def trial_keys(self) -> tuple[Key, ...]:
        """The formulas in the figures of the search."""
        return self._keys_of([key.index for chart in self.trial_charts for key in chart.keys])

    def selected_rows(self) -> list[dict[str, Any]]:
        """Return what the search chose: one row a formula and parameter, one value a seed."""
        rows = []
        for formula in self.summary.formulas:
            for name, chosen in formula.selected.items():
                rows.append(
                    {
                        "key": self.key(formula.index),
                        "name": "learning rate" if name == "lr" else name,
                        "is_weight": name != "lr",
                        "values": [wording.rounded(chosen.get(seed)) for seed in self.summary.seeds],
                    }
                )
        return rows

    def trial_rows(self) -> list[dict[str, Any]]:
        """Return every trial, best first within formula and seed."""

        def order(row: Any) -> tuple[Any, ...]:
            score = row.score if row.score is not None and math.isfinite(row.score) else None
            worst = math.inf if score is None else -score if self.metric.direction == "max" else score
            return (row.formula, row.seed, -row.rung, worst, row.trial)

        return [
            {
                "key": self.key(row.formula),
                "seed": row.seed,
                "trial": row.trial,
                "round": row.rung + 1,
                "budget": wording.count(row.epochs, "epoch")
                if row.epochs is not None
                else wording.count(row.steps, "step")
                if row.steps is not None
                else "–",
                "lr": wording.rounded(row.lr),
                "weights": [(name, wording.rounded(value)) for name, value in row.weights.items()],
                "score": "failed" if row.score is None else wording.value(self.metric, row.score),
                "selected": row.selected,
            }
            for row in self._listed(sorted(self.summary.trials, key=order))
        ]

    @staticmethod
    def _listed(rows: list[Any]) -> list[Any]:
        """Return the best trials of each formula and seed, at most so many that the list can still be read; chosen ones always."""
        if len(rows) <= TRIALS_LISTED:
            return rows
        groups: dict[tuple[int, int], int] = {}
        each = max(1, TRIALS_LISTED // len({(row.formula, row.seed) for row in rows}))
        kept = []
        for row in rows:
            place = groups[row.formula, row.seed] = groups.get((row.formula, row.seed), 0) + 1
            if place <= each or row.selected:
                kept.append(row)
        return kept

    def failures(self) -> list[Failure]:
        """Return the failed runs, those of one formula that failed in the same way together."""
        groups: dict[tuple[int, str, str], list[FailedRun]] = {}
        for run in self.summary.failed:
            groups.setdefault((run.formula, run.role, run.error), []).append(run)
        return [Failure(self.key(formula), role, error, tuple(runs)) for (formula, role, error), runs in groups.items()]

    def failed_text(self) -> str:
        """Say how many runs failed; trials of a search are named as such."""
        noun = "trial" if all(run.role == "trial" for run in self.summary.failed) else "run"
        return wording.count(len(self.summary.failed), noun)

    def seed_rows(self) -> list[dict[str, Any]]:
        """Return the primary metric of every run: one row a seed, one column a formula."""
        found = {
            formula.index: {run.seed: run.metrics.get(self.metric.name) for run in formula.seeds}
            for formula in self.summary.formulas
        }
        return [
            {
                "seed": seed,
                "values": [
                    "failed"
                    if seed in formula.failed_seeds
                    else wording.value(self.metric, found[formula.index].get(seed))
                    for formula in self.summary.formulas
                ],
            }
            for seed in self.summary.seeds[:SEEDS_LISTED]
        ]

    def _data_facts(self) -> list[Fact]:
        task = self.summary.task
        facts = [Fact("name", task.name)]
        if task.source != task.name:
            facts.append(Fact("source", task.source))
        facts.append(Fact("kind", task.target_type))
        facts.append(Fact("examples", f"{task.examples:,}"))
        if task.sizes:
            facts.append(Fact("split", ", ".join(f"{name} {size:,}" for name, size in task.sizes.items())))
        if task.input_shape:
            facts.append(Fact("input shape", " × ".join(str(size) for size in task.input_shape)))
        if task.classes:
            shown = ", ".join(task.classes[:20])
            more = len(task.classes) - 20
            facts.append(Fact("classes", f"{len(task.classes)}: {shown}" + (f" and {more} more" if more > 0 else "")))
        facts.append(Fact("fingerprint", task.fingerprint[:16]))
        return facts

    def themes(self) -> dict[str, Any]:
        """Return colours and plotly templates of both themes, for the page's script."""
        return {
            name: {"tones": tones, "template": palette.plotly_template(name)} for name, tones in palette.THEMES.items()
        }


@dataclass(frozen=True)
class Scale:
    """The unit in which a curve is drawn, and how its values are written."""

    factor: float
    unit: str
    decimals: str
    direction: str

    @classmethod
    def of(cls, metric: Metric) -> Scale:
        """Shares are drawn in percent."""
        return cls(100.0, " %", ".1f", metric.direction) if metric.percent else cls(1.0, "", ".4g", metric.direction)

    @classmethod
    def plain(cls) -> Scale:
        """Losses, terms and weights are drawn as they are."""
        return cls(1.0, "", ".4g", "")

    def text(self, value: float) -> str:
        """Write a value that is already in this unit."""
        return f"{value:{self.decimals}}{self.unit}"


class _Answer:
    """The finding that opens the page.

    It speaks of a winner only where the summary recommends a formula and the paired difference to the baseline has an
    interval that excludes zero, whatever the recommendation calls itself.
    """

    def __init__(self, summary: Summary, keys: dict[int, Key]) -> None:
        found = summary.recommendation
        metric = summary.primary
        self.text = found.text
        self.python = found.python
        self.key = keys.get(found.formula) if found.formula is not None else None
        self.difference: Difference | None = None
        if found.formula is not None:
            self.difference = next(
                (e for e in summary.differences if e.metric == metric.name and e.formula == found.formula), None
            )
        proven = self.difference is not None and self.difference.estimate.excludes_zero()
        self.kind = found.kind if found.kind != "better" or proven else "no interval"
        self.headline = {
            "better": "A clear difference",
            "keep": "Keep the baseline",
            "undecided": "Not decided",
            "no interval": "No interval, no winner",
            "single": "One formula, measured",
            "failed": "The study failed",
        }[self.kind]
        self.shown = self.difference if self.kind == "better" else None
        self.amount = ""
        self.interval = ""
        self.whisker: Whisker | None = None
        if self.shown is not None:
            estimate = self.shown.estimate
            self.amount = wording.difference(metric, estimate.mean)
            self.interval = wording.difference_interval(metric, estimate)
            low, high = _extent([estimate], through_zero=True)
            self.whisker = _whisker(estimate, (low, high), zero=True)


def _verdict(entry: Difference | TermEffect) -> str:
    """Return the verdict, and never one that its interval does not carry."""
    if entry.verdict in ("better", "worse") and not entry.estimate.excludes_zero():
        return "undecided" if entry.estimate.has_interval else "no interval"
    return entry.verdict


def _range(estimate: Estimate, text: Callable[[float | None], str]) -> str:
    if estimate.lower is None or estimate.upper is None:
        return ""
    return f"{text(max(estimate.lower, 0.0))} to {text(estimate.upper)}"


def _extent(estimates: Sequence[Estimate], through_zero: bool = False) -> tuple[float, float]:
    """Return the common range of the small intervals of one column."""
    ends = [e for x in estimates for e in (x.mean, x.lower, x.upper) if e is not None and math.isfinite(e)]
    if through_zero:
        ends.append(0.0)
    if not ends:
        return 0.0, 1.0
    low, high = min(ends), max(ends)
    room = 0.06 * (high - low) or 0.5
    return low - room, high + room


def _whisker(estimate: Estimate, frame: tuple[float, float], zero: bool = False) -> Whisker | None:
    if not math.isfinite(estimate.mean):
        return None

    def place(value: float) -> float:
        return round(100 * (value - frame[0]) / (frame[1] - frame[0]), 2)

    return Whisker(
        place(estimate.mean),
        None if estimate.lower is None else place(estimate.lower),
        None if estimate.upper is None else place(estimate.upper),
        place(0.0) if zero else None,
    )
