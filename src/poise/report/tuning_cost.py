"""What finding the weights cost: policies, which find them in one run, beside random search and a fixed grid at equal budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from poise.report import figures, wording
from poise.report.figures import Line
from poise.studies.intervals import Estimate, t_interval

if TYPE_CHECKING:
    from poise.report.page import Chart, Key, Page
    from poise.studies.summary import Curve, FormulaSummary, TrialRow

__all__ = ["CostRow", "TuningCost", "expected_best", "tuning_cost_of"]


@dataclass(frozen=True)
class CostRow:
    """One way to find the weights.

    Attributes:
        keys: its formulas; a grid has several.
        way: what was done.
        seconds: training of one seed, everything that was tried included.
        relative: the same in single trainings with fixed weights.
        reached, interval: the test metric of what the validation split chose.
    """

    keys: tuple[Key, ...]
    way: str
    seconds: str
    relative: str
    reached: str
    interval: str


@dataclass(frozen=True)
class TuningCost:
    """The figure and its table."""

    chart: Chart | None
    rows: tuple[CostRow, ...]


@dataclass(frozen=True)
class _Way:
    """One way, before it is written out: its cost in seconds a seed, its test metric, and its best validation score by seconds."""

    formulas: tuple[int, ...]
    name: str
    mark: str
    seconds: float
    test: Estimate
    path: tuple[tuple[float, float], ...]


def expected_best(scores: Sequence[float], rising: bool) -> list[float]:
    """Return the mean best of k scores drawn without replacement, for k = 1, ..., n.

        E[best of k] = sum_i s_(i) C(i-1, k-1) / C(n, k)        scores sorted from worst to best

    What a search of k trials reaches on average, without the luck of their order.

    >>> expected_best([1.0, 2.0, 3.0], True)
    [2.0, 2.6666666666666665, 3.0]
    """
    worst_first, n = sorted(scores, reverse=not rising), len(scores)
    return [
        math.fsum(s * math.comb(i, k - 1) for i, s in enumerate(worst_first)) / math.comb(n, k) for k in range(1, n + 1)
    ]


def tuning_cost_of(page: Page) -> TuningCost | None:
    """Return the part, or None where there are no two ways to compare."""
    ways = [*_policies(page), *_searches(page)]
    terms = {_terms(page, way) for way in ways}
    ways += _grids(page, terms)
    # Ways are compared where they look for the weights of the same terms.
    shared = [_terms(page, way) for way in ways]
    ways = [way for way, labels in zip(ways, shared, strict=True) if shared.count(labels) > 1]
    if not ways:
        return None
    plain = _plain_seconds(page, terms)
    metric = page.metric
    rows = tuple(
        CostRow(
            tuple(page.key(index) for index in way.formulas),
            way.name,
            wording.seconds(way.seconds),
            f"{way.seconds / plain:.1f}" if plain else "–",
            wording.value(metric, way.test.mean),
            wording.interval(metric, way.test),
        )
        for way in ways
    )
    return TuningCost(_chart(page, ways), rows)


def _chart(page: Page, ways: Sequence[_Way]) -> Chart | None:
    from poise.report.page import Chart, Key

    drawn = [way for way in ways if way.path]
    if len(drawn) < 2:
        return None
    drawn = _without_beginnings(drawn, _rising(page))
    metric, end = page.metric, max(way.path[-1][0] for way in drawn)
    scale, unit, decimals = (100.0, " %", ".1f") if metric.percent else (1.0, "", ".4g")
    lines, keys = [], []
    for way in drawn:
        key = page.key(way.formulas[0])
        # A way that is done keeps what it has found.
        path = [*way.path, (end, way.path[-1][1])] if way.path[-1][0] < end else way.path
        x, y = tuple(x for x, _ in path), tuple(scale * y for _, y in path)
        nothing = (None,) * len(x)
        lines.append(Line(key.index, way.name, x, y, nothing, nothing, mark=way.mark))
        keys.append(Key(key.index, way.mark or key.letter, key.colour, way.name))
    said = "; ".join(
        f"{way.name} reaches {wording.value(metric, way.path[-1][1])} after {wording.seconds(way.path[-1][0])}"
        for way in drawn
    )
    figure = figures.curves(
        lines, unit=unit, decimals=decimals, across="seconds of training, search included", stepped=True
    )
    return page.put(
        Chart("tuning-cost", figure, f"Best validation {metric.title} so far: {said}.", tuple(keys), height=320)
    )


def _without_beginnings(ways: Sequence[_Way], rising: bool) -> list[_Way]:
    """Leave out where a run had hardly begun: on an axis that begins there, the ways would all look alike."""
    sign = 1.0 if rising else -1.0
    ends = [sign * way.path[-1][1] for way in ways]
    starts = [
        sign * way.path[0][1] for way in ways if way.mark or len(way.path) < 2 or not way.name.startswith("policy")
    ]
    low = min([*ends, *starts])
    floor = low - (max(ends) - low or 0.05 * abs(low))
    kept = [tuple(point for point in way.path if sign * point[1] >= floor) for way in ways]
    return [replace(way, path=path) for way, path in zip(ways, kept, strict=True)]


def _policies(page: Page) -> list[_Way]:
    found = []
    for formula in page.summary.formulas:
        if not _has_policy(formula) or not _measured(page, formula):
            continue
        seconds, curve = formula.cost.seconds.mean, formula.curves.get(f"valid/{page.metric.name}")
        before = _tuning_seconds(page, formula)
        path = []
        if curve is not None and curve.steps and curve.steps[-1]:
            seen = [
                (before + seconds * step / curve.steps[-1], value)
                for step, value in zip(curve.steps, curve.mean, strict=True)
                if value is not None
            ]
            path = list(zip([x for x, _ in seen], _running_best([y for _, y in seen], _rising(page)), strict=True))
        letter = page.key(formula.index).letter
        test = formula.metrics[page.metric.name]
        name = f"policy of {letter}, " + ("one run" if not before else "after its search of the learning rate")
        found.append(_Way((formula.index,), name, "", before + seconds, test, tuple(path)))
    return found


def _searches(page: Page) -> list[_Way]:
    found = []
    for formula in page.summary.formulas:
        rows = [row for row in page.summary.trials if row.formula == formula.index]
        if not _searched(page, formula) or not _measured(page, formula):
            continue
        seeds = sorted({row.seed for row in rows})
        tuning = _tuning_seconds(page, formula)
        each = max(sum(1 for row in rows if row.seed == seed and row.rung == 0) for seed in seeds)
        letter = page.key(formula.index).letter
        found.append(
            _Way(
                (formula.index,),
                f"random search of {letter}, {wording.count(each, 'trial')}",
                "",
                tuning + formula.cost.seconds.mean,
                formula.metrics[page.metric.name],
                _search_path(rows, seeds, tuning, _rising(page)),
            )
        )
    return found


def _search_path(
    rows: Sequence[TrialRow], seeds: Sequence[int], seconds: float, rising: bool
) -> tuple[tuple[float, float], ...]:
    """Return the best score so far by seconds, averaged over the seeds."""
    paths = []
    for seed in seeds:
        tried = sorted((row for row in rows if row.seed == seed), key=lambda row: (row.rung, row.trial))
        budgets = [float(row.epochs or row.steps or 1) for row in tried]
        spent = [seconds * total / math.fsum(budgets) for total in itertools.accumulate(budgets)]
        known = [row.score for row in tried if row.score is not None and math.isfinite(row.score)]
        if known:
            worst = (min if rising else max)(known)
            # A trial that failed has cost its budget and found nothing.
            scores = [row.score if row.score is not None and math.isfinite(row.score) else worst for row in tried]
            alike = len({row.rung for row in tried}) == 1
            paths.append((spent, expected_best(scores, rising) if alike else _running_best(scores, rising)))
    if not paths:
        return ()
    shortest = min(len(spent) for spent, _ in paths)
    return tuple(
        (
            math.fsum(spent[i] for spent, _ in paths) / len(paths),
            math.fsum(best[i] for _, best in paths) / len(paths),
        )
        for i in range(shortest)
    )


def _grids(page: Page, terms: set[tuple[str, ...]]) -> list[_Way]:
    """Return the formulas of fixed weights that have the same terms, as one grid."""
    metric, rising = page.metric, _rising(page)
    found = []
    for labels in sorted(terms):
        grid = [f for f in page.summary.formulas if f.terms == labels and _fixed(page, f) and _measured(page, f)]
        if len(grid) < 2:
            continue
        valid = [_last_by_seed(f.curves.get(f"valid/{metric.name}")) for f in grid]
        seconds = [f.cost.seconds.mean + _tuning_seconds(page, f) for f in grid]
        reached, tests = [], {(f.index, run.seed): run.metrics.get(metric.name) for f in grid for run in f.seeds}
        path: list[list[float]] = []
        for seed in sorted(set.intersection(*(set(by_seed) for by_seed in valid))):
            scores = [by_seed[seed] for by_seed in valid]
            best = (max if rising else min)(range(len(grid)), key=scores.__getitem__)
            if (value := tests.get((grid[best].index, seed))) is not None:
                reached.append(value)
            path.append(expected_best(scores, rising))
        if not reached:
            continue
        each = math.fsum(seconds) / len(seconds)
        test = t_interval(reached).within(0.0, 1.0) if metric.percent else t_interval(reached)
        steps = [((k + 1) * each, math.fsum(row[k] for row in path) / len(path)) for k in range(len(grid))]
        name = f"grid of {len(grid)} fixed weights"
        found.append(_Way(tuple(f.index for f in grid), name, "grid", math.fsum(seconds), test, tuple(steps)))
    return found


def _plain_seconds(page: Page, terms: set[tuple[str, ...]]) -> float:
    """Return what one training with fixed weights takes: of the same terms where there is one, else of the baseline."""
    alike = [f for f in page.summary.formulas if f.terms in terms and _fixed(page, f) and f.seeds]
    tuned = [f for f in page.summary.formulas if _searched(page, f) and f.seeds]
    chosen = alike or tuned or [page.summary.formulas[0]]
    return math.fsum(f.cost.seconds.mean for f in chosen) / len(chosen)


def _terms(page: Page, way: _Way) -> tuple[str, ...]:
    return page.summary.formulas[way.formulas[0]].terms


def _searched(page: Page, formula: FormulaSummary) -> bool:
    """Say whether trials looked for weights, and not for the learning rate alone."""
    return not _has_policy(formula) and any(row.weights for row in page.summary.trials if row.formula == formula.index)


def _fixed(page: Page, formula: FormulaSummary) -> bool:
    """Say whether nothing looked for its weights: no policy, no trial, no multiplier."""
    return not _has_policy(formula) and not _searched(page, formula) and not formula.curves_of("constraint")


def _has_policy(formula: FormulaSummary) -> bool:
    return any(name.startswith("policy/weight/") for name in formula.curves)


def _tuning_seconds(page: Page, formula: FormulaSummary) -> float:
    """Return what the trials of one seed took."""
    seeds = {row.seed for row in page.summary.trials if row.formula == formula.index}
    return formula.cost.tuning_seconds / len(seeds) if seeds else 0.0


def _measured(page: Page, formula: FormulaSummary) -> bool:
    return bool(formula.seeds) and page.metric.name in formula.metrics


def _rising(page: Page) -> bool:
    return page.metric.direction == "max"


def _last_by_seed(curve: Curve | None) -> dict[int, float]:
    if curve is None:
        return {}
    last = {seed: [v for v in row if v is not None] for seed, row in curve.per_seed.items()}
    return {seed: values[-1] for seed, values in last.items() if values}


def _running_best(values: Sequence[float], rising: bool) -> list[float]:
    return list(itertools.accumulate(values, max if rising else min))
