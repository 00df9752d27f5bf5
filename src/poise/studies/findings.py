"""From finished runs to a `Summary`: the statistics of a study, nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from poise.studies.curves import ArrayCurves
from poise.studies.intervals import LEVEL, Estimate, holm, t_interval, t_quantile, t_test
from poise.studies.plan import Plan, Track
from poise.studies.recommendation import difference_sentence, recommend, term_sentence
from poise.studies.spec import RunRecord, RunSpec
from poise.studies.summary import (
    Cost,
    Curve,
    Difference,
    FailedRun,
    FormulaSummary,
    Metric,
    SeedResult,
    Summary,
    TaskSummary,
    TermEffect,
    Verdict,
)

# Beyond this many seeds a curve keeps its mean and band only; nobody reads a hundred lines in one figure.
_SEEDS_DRAWN = 20
# Nor do hundreds of formulas keep a line a seed; curves of a few points (what held at the end) always do.
_LINES_KEPT = 400
_FEW_POINTS = 8

# Remarks about splits differ from seed to seed by a number; a few of them say it.
_REMARKS_SHOWN = 5

# Title, better direction, written in percent, lowest and highest value there is.
_METRICS: dict[str, tuple[str, Literal["max", "min"], bool, float, float]] = {
    "accuracy": ("accuracy", "max", True, 0.0, 1.0),
    "macro_f1": ("macro F1", "max", True, 0.0, 1.0),
    "nll": ("negative log-likelihood", "min", False, 0.0, math.inf),
    "ece": ("calibration error", "min", True, 0.0, 1.0),
    "preference_accuracy": ("preference accuracy", "max", True, 0.0, 1.0),
    "label_accuracy": ("label accuracy", "max", True, 0.0, 1.0),
    "margin": ("margin over the start, nats", "max", False, -math.inf, math.inf),
    "chosen_shift": ("log-probability of chosen over the start, nats", "max", False, -math.inf, math.inf),
    "kl": ("KL from the start, nats a token", "min", False, 0.0, math.inf),
    "length_bias": ("length bias, |correlation|", "min", False, 0.0, 1.0),
    "reward": ("true reward of sampled answers", "max", False, -math.inf, math.inf),
    "rmse": ("root mean squared error", "min", False, 0.0, math.inf),
    "mae": ("mean absolute error", "min", False, 0.0, math.inf),
    "r2": ("R²", "max", False, -math.inf, 1.0),
}
_UNKNOWN: tuple[Literal["max", "min"], bool, float, float] = ("max", False, -math.inf, math.inf)

CurveReader = Callable[[Collection[str]], Iterable[tuple[str, ArrayCurves]]]


def summarize(plan: Plan, task: TaskSummary, curves: CurveReader | None = None) -> Summary:
    """Summarise what is finished so far.

    Args:
        plan: the plan, fed with the finished runs.
        task: the data in words.
        curves: gives the curves of runs by id (`Store.curves`); None leaves them out.

    Returns:
        The summary; of a study that still runs, over the seeds that are there.

    >>> summary = summarize(plan, task, store.curves)          # doctest: +SKIP
    """
    metrics = _metrics(plan, task)
    tracks: list[list[Track]] = [[] for _ in plan.formulas]
    for track in plan.tracks:
        tracks[track.formula].append(track)
    formulas = tuple(_formula(plan, index, found, metrics, curves) for index, found in enumerate(tracks))
    used = _used(plan)
    sizes = next((dict(record.sizes) for record in used if record.sizes), dict(task.sizes))
    share = sizes["test"] / sizes["train"] if sizes.get("test") and sizes.get("train") else None
    differences = _differences(formulas, metrics, [(index, 0) for index in range(1, len(formulas))], share)
    primary = metrics[0]
    best = _best(differences, primary)
    others = [(best, index) for index in range(1, len(formulas)) if index != best] if best is not None else []
    between = _differences(formulas, (primary,), others, share)
    done = [record for record in used if record.status == "done"]
    return Summary(
        title=_title(plan, task),
        task=replace(task, sizes=sizes),
        settings=_settings(plan),
        seeds=plan.config.seeds,
        formulas=formulas,
        metrics=metrics,
        differences=differences,
        between=between,
        term_effects=_term_effects(plan, formulas, metrics, tracks),
        trials=tuple(row for track in plan.tracks for row in track.trials),
        failed=_failed(plan),
        recommendation=recommend(formulas, primary, differences, between, best, plan, task),
        notes=_notes(plan),
        warnings=_warnings(plan, done),
        runs_done=plan.done,
        runs_planned=plan.planned,
        seconds=math.fsum(record.seconds for record in done),
        versions=done[-1].versions if done else {},
        machine=done[-1].machine if done else {},
        created=max((record.started for record in done), default=""),
    )


def _metrics(plan: Plan, task: TaskSummary) -> tuple[Metric, ...]:
    names = [task.primary]
    for track in plan.tracks:
        record = _record(plan, track.final)
        if record is not None:
            names += [name.removeprefix("test/") for name in record.metrics if name.startswith("test/")]
            break
    return tuple(_metric(name, task) for name in dict.fromkeys(names))


def _metric(name: str, task: TaskSummary) -> Metric:
    title, direction, percent, _, _ = _METRICS.get(name, (name.replace("_", " "), *_UNKNOWN))
    return Metric(name, title, task.direction if name == task.primary else direction, percent)


def _record(plan: Plan, spec: RunSpec | None) -> RunRecord | None:
    """Return the record of a run that finished well."""
    record = plan.records.get(spec.id) if spec is not None else None
    return record if record is not None and record.status == "done" else None


def _used(plan: Plan) -> list[RunRecord]:
    """Return the records of this study, in the order of its tracks; the store may hold those of others too."""
    found: dict[str, RunRecord] = {}
    for track in plan.tracks:
        wanted = [spec.id for spec in (track.final, *track.reduced.values()) if spec is not None]
        for run in [row.run for row in track.trials] + wanted:
            if run in plan.records:
                found[run] = plan.records[run]
    return list(found.values())


def _formula(
    plan: Plan, index: int, tracks: Sequence[Track], metrics: tuple[Metric, ...], curves: CurveReader | None
) -> FormulaSummary:
    finals = {track.seed: record for track in tracks if (record := _record(plan, track.final)) is not None}
    trials = {row.run for track in tracks for row in track.trials}
    return FormulaSummary(
        index=index,
        text=str(plan.formulas[index]),
        terms=tuple(plan.formulas[index].labels),
        seeds=tuple(_seed_result(track, finals[track.seed]) for track in tracks if track.seed in finals),
        failed_seeds=tuple(track.seed for track in tracks if _has_failed(plan, track)),
        metrics={m.name: _level(m.name, _values(finals.values(), f"test/{m.name}")) for m in metrics},
        valid_metrics={m.name: _level(m.name, _values(finals.values(), f"valid/{m.name}")) for m in metrics},
        curves=_curves({record.id: seed for seed, record in finals.items()}, curves, len(plan.tracks) <= _LINES_KEPT)
        if curves
        else {},
        cost=Cost(
            seconds=t_interval([record.seconds for record in finals.values()]).within(0.0, math.inf),
            peak_memory_bytes=t_interval([float(record.peak_memory_bytes) for record in finals.values()]).within(
                0.0, math.inf
            ),
            steps_per_second=t_interval([record.steps_per_second for record in finals.values()]).within(0.0, math.inf),
            tuning_seconds=math.fsum(plan.records[run].seconds for run in trials if run in plan.records),
        ),
        selected=_selected(plan, tracks),
    )


def _level(name: str, values: list[float]) -> Estimate:
    *_, low, high = _METRICS.get(name, (name, *_UNKNOWN))
    return t_interval(values).within(low, high)


def _values(records: Iterable[RunRecord], name: str) -> list[float]:
    return [record.metrics[name] for record in records if name in record.metrics]


def _seed_result(track: Track, record: RunRecord) -> SeedResult:
    metrics = {name.removeprefix("test/"): value for name, value in record.metrics.items() if name.startswith("test/")}
    spec = record.spec
    return SeedResult(
        track.seed, record.id, spec.formula, spec.lr, dict(track.weights), metrics, record.seconds, record.details
    )


def _has_failed(plan: Plan, track: Track) -> bool:
    record = plan.records.get(track.final.id) if track.final is not None else None
    return bool(track.failure) or (record is not None and record.status == "failed")


def _selected(plan: Plan, tracks: Sequence[Track]) -> dict[str, dict[int, float]]:
    if not plan.trials:
        return {}
    chosen: dict[str, dict[int, float]] = {"lr": {}}
    for track in tracks:
        if track.final is not None:
            chosen["lr"][track.seed] = track.final.lr
            for name, value in track.weights.items():
                chosen.setdefault(name, {})[track.seed] = value
    return chosen


def _curves(seeds: Mapping[str, int], read: CurveReader, lines: bool) -> dict[str, Curve]:
    """Average the curves of one formula over its seeds; with `lines` also keep one line a seed, where they are few."""
    gathered: dict[str, dict[int, tuple[npt.NDArray[Any], npt.NDArray[Any]]]] = {}
    for run, curves in read(list(seeds)):
        for name, curve in curves.items():
            gathered.setdefault(name, {})[seeds[run]] = curve
    return {name: _curve(name, dict(sorted(by_seed.items())), lines) for name, by_seed in gathered.items()}


def _curve(name: str, by_seed: Mapping[int, tuple[npt.NDArray[Any], npt.NDArray[Any]]], lines: bool = True) -> Curve:
    grids = [steps for steps, _ in by_seed.values()]
    same = all(grid is grids[0] or np.array_equal(grid, grids[0]) for grid in grids)
    if same:
        steps, table = grids[0], np.stack([values for _, values in by_seed.values()]).astype(np.float64)
    else:
        steps = np.unique(np.concatenate(grids))
        table = np.full((len(by_seed), len(steps)), np.nan)
        for row, (grid, values) in enumerate(by_seed.values()):
            table[row, np.searchsorted(steps, grid)] = values
    # An infinite loss has no place on an axis; it counts as not recorded.
    table[~np.isfinite(table)] = np.nan
    count = np.sum(~np.isnan(table), axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.nansum(table, axis=0) / np.where(count > 0, count, np.nan)
        variance = np.nansum((table - mean) ** 2, axis=0) / np.where(count > 1, count - 1, np.nan)
        sizes, place = np.unique(count, return_inverse=True)
        quantiles = [t_quantile((1 + LEVEL) / 2, int(n) - 1) if n > 1 else np.nan for n in sizes]
        half = np.array(quantiles)[place] * np.sqrt(variance / count)
    return Curve(
        name=name,
        steps=tuple(steps.tolist()),
        mean=_plain(mean),
        lower=_plain(mean - half),
        upper=_plain(mean + half),
        per_seed={seed: _plain(row) for seed, row in zip(by_seed, table, strict=True)}
        if len(by_seed) <= _SEEDS_DRAWN and (lines or len(steps) <= _FEW_POINTS)
        else {},
    )


def _plain(values: npt.NDArray[Any]) -> tuple[float | None, ...]:
    if not np.isnan(values).any():
        return tuple(values.tolist())
    return tuple(None if math.isnan(value) else value for value in values.tolist())


def _paired(one: Mapping[int, float], other: Mapping[int, float]) -> dict[int, float]:
    return {seed: one[seed] - other[seed] for seed in one if seed in other}


def _by_seed(formula: FormulaSummary, metric: str) -> dict[int, float]:
    return {result.seed: result.metrics[metric] for result in formula.seeds if metric in result.metrics}


def _differences(
    formulas: tuple[FormulaSummary, ...],
    metrics: tuple[Metric, ...],
    pairs: Collection[tuple[int, int]],
    share: float | None,
) -> tuple[Difference, ...]:
    """Compare pairs (formula, baseline), each metric a family of its own for Holm's correction.

    `share` is the ratio of test to training examples, for the corrected resampled interval.
    """
    found: list[Difference] = []
    for metric in metrics:
        rows = []
        for formula, baseline in pairs:
            per_seed = _paired(_by_seed(formulas[formula], metric.name), _by_seed(formulas[baseline], metric.name))
            values = list(per_seed.values())
            rows.append((formula, baseline, per_seed, t_interval(values), t_test(values)))
        for row, adjusted in zip(rows, holm([row[4] for row in rows]), strict=True):
            formula, baseline, per_seed, estimate, p = row
            verdict = _verdict(metric, estimate, adjusted)
            sentence = difference_sentence(metric, formulas[formula].text, formulas[baseline].text, estimate, verdict)
            resampled = None
            if share is not None and estimate.has_interval:
                resampled = t_interval(list(per_seed.values()), variance_factor=1 / estimate.n + share)
            found.append(
                Difference(
                    formula, baseline, metric.name, estimate, resampled, p, adjusted, per_seed, verdict, sentence
                )
            )
    return tuple(found)


def _verdict(metric: Metric, estimate: Estimate, p_holm: float | None) -> Verdict:
    if not estimate.has_interval or p_holm is None:
        return "no interval"
    if not estimate.excludes_zero() or p_holm > 1 - estimate.level:
        return "undecided"
    return "better" if metric.better(estimate.mean) else "worse"


def _best(differences: Iterable[Difference], primary: Metric) -> int | None:
    """Return the formula that is better than the baseline by most, if any is."""
    better = [d for d in differences if d.metric == primary.name and d.verdict == "better"]
    return max(better, key=lambda d: abs(d.estimate.mean)).formula if better else None


def _term_effects(
    plan: Plan, formulas: tuple[FormulaSummary, ...], metrics: tuple[Metric, ...], of: Sequence[Sequence[Track]]
) -> tuple[TermEffect, ...]:
    found: list[TermEffect] = []
    texts: dict[tuple[int, str], str] = {}
    for metric in metrics:
        rows = []
        for formula in formulas:
            tracks = [track for track in of[formula.index] if track.reduced]
            if len(formula.terms) < 2 or not tracks:
                continue
            full = _by_seed(formula, metric.name)
            for label in tracks[0].reduced:
                reduced = {}
                for track in tracks:
                    record = _record(plan, track.reduced[label])
                    if record is not None and f"test/{metric.name}" in record.metrics:
                        reduced[track.seed] = record.metrics[f"test/{metric.name}"]
                per_seed = _paired(full, reduced)
                if (formula.index, label) not in texts:
                    texts[formula.index, label] = str(plan.formulas[formula.index].without(label))
                without = texts[formula.index, label]
                values = list(per_seed.values())
                rows.append((formula.index, label, without, per_seed, t_interval(values), t_test(values)))
        for row, adjusted in zip(rows, holm([row[5] for row in rows]), strict=True):
            index, label, without, per_seed, estimate, p = row
            verdict = _verdict(metric, estimate, adjusted)
            sentence = term_sentence(metric, label, estimate, verdict)
            found.append(
                TermEffect(index, label, without, metric.name, estimate, p, adjusted, per_seed, verdict, sentence)
            )
    return tuple(found)


def _failed(plan: Plan) -> tuple[FailedRun, ...]:
    found: dict[str, FailedRun] = {}
    for track in plan.tracks:
        specs = [spec for spec in (track.final, *track.reduced.values()) if spec is not None]
        for run in [spec.id for spec in specs] + [row.run for row in track.trials]:
            record = plan.records.get(run)
            if record is not None and record.status == "failed":
                role, formula, seed = plan.roles[run]
                text = record.spec.formula
                found.setdefault(run, FailedRun(run, formula, text, seed, role, record.error, record.detail))
    return tuple(found.values())


def _title(plan: Plan, task: TaskSummary) -> str:
    count, noise = len(plan.formulas), plan.config.data.label_noise
    data = f"{task.name} with {100 * noise:g} % label noise" if noise else task.name
    return f"{count} formulas on {data}" if count > 1 else f"{plan.formulas[0]} on {data}"


def _settings(plan: Plan) -> dict[str, str]:
    training, engine = plan.config.training, plan.config.engine
    options = "".join(f", {name}={value}" for name, value in (training.solver_options or {}).items())
    budget = f"{training.epochs} epochs" if training.epochs else f"{training.steps} steps"
    settings = {
        "model": training.model,
        "solver": f"{training.solver}(lr={training.lr:g}{options})",
        "schedule": training.schedule or "constant",
        "budget": budget,
        "batch size": str(training.batch_size),
        "precision": training.precision,
        "device": training.device,
        "threads per run": str(engine.threads),
        "measured model": "after the last step" if training.select == "last" else "best on the validation split",
        "split": " / ".join(f"{100 * share:g} %" for share in plan.config.data.split),
    }
    if plan.config.data.label_noise:
        settings["label noise"] = f"{100 * plan.config.data.label_noise:g} % {plan.config.data.noise}"
    if plan.trials:
        settings["trials per formula and seed"] = str(plan.trials)
    return settings


def _notes(plan: Plan) -> tuple[str, ...]:
    notes = [
        "All formulas share seeds, splits, start of the model, order of the batches and budget; differences are "
        "paired by "
        "seed. Intervals are 95 % Student t intervals over the seeds; p-values are adjusted by Holm's method.",
        "Each seed draws the split anew from the same data, so an interval describes this data set. The wider "
        "corrected "
        "resampled interval (Nadeau and Bengio, 2003) allows for the overlap of the training sets.",
    ]
    if plan.trials:
        how = "asked for" if plan.config.tuning.trials else "the default where a weight is auto"
        notes.append(
            f"Weights marked auto and the learning rate were searched: {plan.trials} trials for every formula on "
            f"every seed "
            f"({how}), Sobol points on log scales, successive halving on the validation split. The test split was "
            "measured once, by the final run."
        )
        if any(not formula.searched for formula in plan.formulas):
            notes.append("A formula without an auto weight used its trials for the learning rate alone.")
    if plan.config.leave_one_out and any(len(formula.labels) > 1 for formula in plan.formulas):
        notes.append("What a term bought is measured without it, the other weights and the learning rate as they were.")
    return tuple(notes)


def _what_intervals_mean(plan: Plan) -> str:
    if plan.config.data.time is not None:
        return (
            "The split follows time and is the same for every seed, so an interval describes the starts of the models and "
            "the orders of the batches, not new data."
        )
    return (
        "Each seed draws the split anew from the same data, so an interval describes this data set. The wider corrected "
        "resampled interval (Nadeau and Bengio, 2003) allows for the overlap of the training sets."
    )


def _warnings(plan: Plan, done: list[RunRecord]) -> tuple[str, ...]:
    warnings = []
    if len(plan.config.seeds) == 1:
        warnings.append("One seed gives no interval. Give at least 3 seeds, better 5, before you believe a difference.")
    for name in ("torch", "poise"):
        versions = sorted({record.versions[name] for record in done if name in record.versions})
        if len(versions) > 1:
            warnings.append(f"The runs were made with different versions of {name}: {', '.join(versions)}.")
    warnings += [
        f"{plan.formulas[track.formula]} has no result on seed {track.seed}. {track.failure}"
        for track in plan.tracks
        if track.failure
    ]
    remarks = [remark for record in done for remark in record.warnings]
    warnings += list(dict.fromkeys(remarks))[:_REMARKS_SHOWN]
    if plan.done < plan.planned:
        warnings.append(
            f"The study is not complete: {plan.done} of {plan.planned} runs. Call it again and it continues."
        )
    return tuple(warnings)
