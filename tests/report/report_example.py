"""Summaries to draw: made of seeded random numbers, shaped like those of real studies."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from poise.studies.intervals import Estimate, holm, t_interval, t_test
from poise.studies.summary import (
    Cost,
    Curve,
    Difference,
    FailedRun,
    FormulaSummary,
    Metric,
    Recommendation,
    SeedResult,
    Summary,
    TaskSummary,
    TermEffect,
    TrialRow,
    Verdict,
)

ACCURACY = Metric("accuracy", "accuracy", "max", percent=True)
NLL = Metric("nll", "negative log-likelihood", "min")
RMSE = Metric("rmse", "root mean squared error", "min")
PYTHON = 'import math\n\nmessage = "less < more & <b>"\nprint(math.sqrt(16), message)\n'


def curve(name: str, steps: Sequence[int], rows: dict[int, list[float]]) -> Curve:
    """Aggregate one list a seed into a curve."""
    estimates = [t_interval([row[i] for row in rows.values()]) for i in range(len(steps))]
    return Curve(
        name,
        tuple(steps),
        tuple(e.mean for e in estimates),
        tuple(e.lower for e in estimates),
        tuple(e.upper for e in estimates),
        {seed: tuple(row) for seed, row in rows.items()},
    )


def verdict(metric: Metric, estimate: Estimate, p: float | None) -> Verdict:
    """Judge a difference as the studies do."""
    if p is None or not estimate.has_interval:
        return "no interval"
    if not estimate.excludes_zero() or p > 0.05:
        return "undecided"
    return "better" if metric.better(estimate.mean) else "worse"


def make_summary(
    formulas: Sequence[tuple[str, tuple[str, ...]]] = (
        ("cross_entropy", ("cross_entropy",)),
        ("cross_entropy + 3*early_learning", ("cross_entropy", "early_learning")),
    ),
    *,
    seeds: int = 5,
    steps: int = 600,
    metrics: tuple[Metric, ...] = (ACCURACY, NLL),
    gains: Sequence[float] = (0.0, 0.11, 0.05, 0.12, -0.04, 0.01, 0.03),
    tuned: bool = False,
    failed: bool = False,
    label: Callable[[str], str] = lambda text: text,
    title: str = "digits with 40 % wrong labels: which objective withstands them?",
) -> Summary:
    """Build a summary of simulated runs; `label` may replace every text that a user could have written."""
    draw = random.Random(7)
    numbers = range(seeds)
    luck = [draw.gauss(0, 0.012) for _ in numbers]
    entries = []
    finals: list[dict[str, dict[int, float]]] = []
    for index, (text, terms) in enumerate(formulas):
        top = 0.77 + gains[index % len(gains)]
        grid = list(range(0, steps + 1, max(steps // 30, 1)))
        loss_grid = list(range(0, steps, max(steps // 300, 1)))
        span = steps / 5
        accuracy = {
            s: [
                top * (1 - math.exp(-(g + 8) / span))
                + luck[s]
                + draw.gauss(0, 0.006)
                - (0.10 * g / steps if index == 0 else 0)
                for g in grid
            ]
            for s in numbers
        }
        final = {s: accuracy[s][-1] + draw.gauss(0, 0.004) for s in numbers}
        scores = {metrics[0].name: final}
        for other in metrics[1:]:
            scores[other.name] = {s: 2.2 * (1.02 - final[s]) + draw.gauss(0, 0.02) for s in numbers}
        finals.append(scores)
        curves = {"loss": curve("loss", loss_grid, {
            s: [2.3 * math.exp(-g / span / 2) + 0.3 + 0.1 * index + draw.gauss(0, 0.06) for g in loss_grid] for s in numbers
        })}  # fmt: skip
        curves["gradient_norm"] = curve("gradient_norm", loss_grid, {
            s: [1 / (1 + g / span) + abs(draw.gauss(0, 0.03)) for g in loss_grid] for s in numbers
        })  # fmt: skip
        curves[f"valid/{metrics[0].name}"] = curve("valid", grid, accuracy)
        for other in metrics[1:]:
            curves[f"valid/{other.name}"] = curve("valid", grid, {
                s: [2.2 * (1.02 - value) + draw.gauss(0, 0.03) for value in accuracy[s]] for s in numbers
            })  # fmt: skip
        for place, term in enumerate(terms):
            sign = -1 if place else 1
            curves[f"term/{label(term)}"] = curve("term", loss_grid, {
                s: [sign * ((2.2 if sign > 0 else 0.6) * math.exp(-sign * g / span / 3) * (1 if sign > 0 else 0.3) + draw.gauss(0, 0.02))
                    for g in loss_grid] for s in numbers
            })  # fmt: skip
            weight = 3.0 if place else 1.0
            curves[f"weight/{label(term)}"] = curve("weight", loss_grid, {
                s: [weight * min(1, 2 * g / steps) if place == 2 else weight for g in loss_grid] for s in numbers
            })  # fmt: skip
            curves[f"active/{label(term)}"] = curve("active", loss_grid, {
                s: [0.0 if place == 2 and g < steps / 10 else 1.0 for g in loss_grid] for s in numbers
            })  # fmt: skip
        seconds = {s: 2.1 + 0.25 * len(terms) + draw.gauss(0, 0.08) for s in numbers}
        lost = (seeds - 1,) if failed and index == 1 else ()
        kept = [s for s in numbers if s not in lost]
        entries.append(
            FormulaSummary(
                index=index,
                text=label(text),
                terms=tuple(label(term) for term in terms),
                seeds=tuple(
                    SeedResult(
                        seed=s,
                        run=f"{index:02d}{s:02d}" + "0" * 12,
                        formula=label(text),
                        lr=0.1,
                        weights={label(term): 1.0 for term in terms},
                        metrics={name: values[s] for name, values in scores.items()},
                        seconds=seconds[s],
                    )
                    for s in kept
                ),
                failed_seeds=lost,
                metrics={name: t_interval([values[s] for s in kept]) for name, values in scores.items()},
                valid_metrics={name: t_interval([values[s] for s in kept]) for name, values in scores.items()},
                curves=curves,
                cost=Cost(
                    t_interval([seconds[s] for s in kept]),
                    t_interval([2.4e8 + 1e6 * s for s in kept]),
                    t_interval([steps / seconds[s] for s in kept]),
                    tuning_seconds=41.0 if tuned else 0.0,
                ),
                selected={
                    "lr": {s: 10 ** draw.uniform(-2, -0.5) for s in numbers},
                    label(terms[-1]): {s: 10 ** draw.uniform(-1, 1) for s in numbers},
                }
                if tuned
                else {},
            )
        )
    differences = []
    for metric in metrics:
        group = []
        for index in range(1, len(formulas)):
            per_seed = {
                seed.seed: finals[index][metric.name][seed.seed] - finals[0][metric.name][seed.seed]
                for seed in entries[index].seeds
            }
            group.append((index, per_seed, t_interval(list(per_seed.values())), t_test(list(per_seed.values()))))
        for (index, per_seed, estimate, p), adjusted in zip(group, holm([p for *_, p in group]), strict=True):
            differences.append(
                Difference(
                    formula=index,
                    baseline=0,
                    metric=metric.name,
                    estimate=estimate,
                    resampled=t_interval(list(per_seed.values()), variance_factor=1 / 5 + 1 / 3) if seeds > 1 else None,
                    p=p,
                    p_holm=adjusted,
                    per_seed=per_seed,
                    verdict=verdict(metric, estimate, adjusted),
                    sentence=f"{label(formulas[index][0])} differs by {metric.difference_text(estimate.mean)}.",
                )
            )
    effects = []
    for index, (_, terms) in enumerate(formulas):
        for place, term in enumerate(terms if len(terms) > 1 else ()):
            for metric in metrics:
                sign = 1 if metric.direction == "max" else -1
                size = 0.62 if place == 0 else max(gains[index % len(gains)], 0.004) + 0.08
                values = {s.seed: sign * (size + draw.gauss(0, 0.012)) for s in entries[index].seeds}
                estimate, p = t_interval(list(values.values())), t_test(list(values.values()))
                effects.append(
                    TermEffect(
                        formula=index,
                        label=label(term),
                        without=label(" + ".join(t for t in terms if t != term)),
                        metric=metric.name,
                        estimate=estimate,
                        p=p,
                        p_holm=p,
                        per_seed=values,
                        verdict=verdict(metric, estimate, p),
                        sentence=f"{label(term)} bought {metric.difference_text(estimate.mean)}.",
                    )
                )
    trials = [
        TrialRow(
            formula=index,
            seed=s,
            trial=t,
            rung=rung,
            epochs=4 if rung == 0 else 12,
            steps=None,
            lr=10 ** draw.uniform(-3, 0),
            weights={label(terms[-1]): 10 ** draw.uniform(-2, 1)} if index else {},
            score=None if t == 5 else 0.7 + 0.02 * rung + draw.gauss(0, 0.04),
            selected=rung == 1 and t == 0,
            run=f"{index}{s}{t}{rung}",
        )
        for index, (_, terms) in enumerate(formulas)
        for s in numbers
        for rung, kept_trials in enumerate((8, 3))
        for t in range(kept_trials)
        if tuned
    ]
    winner = max(range(1, len(formulas)), key=lambda i: differences[i - 1].estimate.mean, default=None)
    if winner is None:
        found = Recommendation("single", 0, f"{label(formulas[0][0])} was measured alone.", PYTHON)
    elif differences[winner - 1].verdict == "better":
        gain = differences[winner - 1].estimate
        said = "" if gain.lower is None or gain.upper is None else f"{100 * gain.lower:.1f} to {100 * gain.upper:.1f}"
        found = Recommendation(
            "better",
            winner,
            f"Use {label(formulas[winner][0])}. Its test accuracy is {100 * gain.mean:.1f} points higher than that of "
            f"{label(formulas[0][0])} (95 % interval {said} points, {seeds} seeds).",
            PYTHON,
        )
    else:
        kind = "undecided" if seeds > 1 else "no interval"
        found = Recommendation(kind, None, "This study cannot tell the formulas apart.", PYTHON)  # type: ignore[arg-type]
    return Summary(
        title=label(title),
        task=TaskSummary(
            name=label("digits"),
            source=label("digits"),
            target_type="classification",
            examples=1797,
            sizes={"train": 1078, "valid": 359, "test": 360},
            input_shape=(64,),
            classes=tuple(label(str(digit)) for digit in range(10)),
            fingerprint="9f2b" * 16,
            primary=metrics[0].name,
            direction=metrics[0].direction,
            notes=(
                label("40 % of the training and validation labels were replaced at random; the test labels are true."),
            ),
            warnings=(
                label(
                    "The column 'id' looks like a row number; it was kept. Drop it if it should not be learned from."
                ),
            )
            if failed
            else (),
        ),
        settings={
            "model": "mlp (64-256-256-10)",
            "solver": "sgd, momentum 0.9",
            "learning_rate": "0.1, cosine",
            "epochs": "60",
            "batch_size": "128",
            "threads": "1",
            "label noise": label("40 % symmetric"),
            label("setting"): label("value"),
        },
        seeds=tuple(numbers),
        formulas=tuple(entries),
        metrics=metrics,
        differences=tuple(differences),
        between=(),
        term_effects=tuple(effects),
        trials=tuple(trials),
        failed=(
            FailedRun(
                run="00ab" * 4,
                formula=1,
                text=label(formulas[1][0]),
                seed=seeds - 1,
                role="final",
                error=label("The term 'early_learning' became NaN at step 212."),
                detail=label("Traceback (most recent call last):\n  ...\nNonFiniteError: early_learning"),
            ),
        )
        if failed
        else (),
        recommendation=found,
        notes=(label("The weights are as written; nothing was tuned."),),
        warnings=(),
        runs_done=len(formulas) * seeds + len(effects) * seeds // max(len(metrics), 1),
        runs_planned=len(formulas) * seeds + len(effects) * seeds // max(len(metrics), 1),
        seconds=sum(run.seconds for entry in entries for run in entry.seeds),
        versions={"poise": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "numpy": "2.3.1"},
        machine={"platform": "Linux x86_64", "processor": "2 cores", "memory": "8.2 GB"},
        created="2026-11-22T18:30:12Z",
    )


WAYS = (
    ("cross_entropy + 0.001*l2 + 0.1*mixup", ("cross_entropy", "l2", "mixup")),
    ("cross_entropy + 0.01*l2 + mixup", ("cross_entropy", "l2", "mixup")),
    ("cross_entropy + auto*l2 + auto*mixup", ("cross_entropy", "l2", "mixup")),
    (
        "cross_entropy + auto(policy='bilevel')*l2 + auto(policy='bilevel')*mixup",
        ("cross_entropy", "l2", "mixup"),
    ),
    ("cross_entropy + constraint(l2, upper=20)", ("cross_entropy", "l2")),
)


def make_policy_summary(
    *,
    seeds: int = 3,
    steps: int = 400,
    label: Callable[[str], str] = lambda text: text,
    parts: frozenset[str] = frozenset(),
) -> Summary:
    """Build a summary with a grid (A, B), a search (C), a policy that writes every curve (D) and a constraint (E).

    `parts` names the kinds of curves that are there; all of them where it is empty.
    """
    made = make_summary(WAYS, seeds=seeds, steps=steps, label=label, tuned=True, gains=(0.05, 0.08, 0.09, 0.1, 0.06))
    formulas = []
    for entry in made.formulas:
        curves = dict(entry.curves)
        if entry.index == 3:
            curves |= {
                n: c for n, c in policy_curves(seeds, steps, label).items() if not parts or n.split("/")[1] in parts
            }
        if entry.index in (3, 4):
            curves |= constraint_curves(seeds, steps, label("l2"), entry.index == 4)
        tuning = 41.0 if entry.index == 2 else 0.0
        formulas.append(
            replace(
                entry,
                curves=curves,
                cost=replace(entry.cost, tuning_seconds=tuning),
                selected=entry.selected if entry.index == 2 else {},
            )
        )
    trials = tuple(row for row in made.trials if row.formula == 2)
    return replace(made, formulas=tuple(formulas), trials=trials)


def policy_curves(seeds: int, steps: int, label: Callable[[str], str]) -> dict[str, Curve]:
    """Return the curves of one policy over two weights."""
    draw = random.Random(3)
    grid, numbers = list(range(0, steps + 1, max(steps // 40, 1))), range(seeds)

    def over(function: Callable[[float], float], noise: float, name: str) -> Curve:
        return curve(name, grid, {s: [function(g / steps) + draw.gauss(0, noise) for g in grid] for s in numbers})

    def rising(level: float) -> Callable[[float], float]:
        return lambda t: level * (1 - math.exp(-4 * t)) + 0.02

    shapes: dict[str, tuple[Callable[[float], float], float]] = {
        f"policy/weight/{label('l2')}": (rising(0.4), 0.01),
        f"policy/weight/{label('mixup')}": (rising(1.1), 0.03),
        f"policy/gradient_norm/{label('cross_entropy')}": (lambda t: 0.2 + 2 * math.exp(-3 * t), 0.05),
        f"policy/gradient_norm/{label('l2')}": (lambda t: 0.4 + 0.5 * t, 0.02),
        f"policy/gradient_norm/{label('mixup')}": (lambda t: 0.3 + math.exp(-2 * t), 0.05),
        f"policy/hypergradient/{label('l2')}": (lambda t: -0.5 * math.exp(-4 * t), 0.02),
        f"policy/hypergradient/{label('mixup')}": (lambda t: -0.2 * math.exp(-3 * t) + 0.02, 0.02),
        f"policy/cosine/{label('cross_entropy')},{label('l2')}": (lambda t: 0.3 - 0.8 * t, 0.05),
        f"policy/cosine/{label('cross_entropy')},{label('mixup')}": (lambda t: 0.6 - 0.2 * t, 0.05),
        "policy/training_objective": (lambda t: 0.2 + 2 * math.exp(-4 * t), 0.03),
        "policy/validation_objective": (lambda t: 0.5 + 1.8 * math.exp(-4 * t) + 0.1 * t, 0.03),
        "policy/hypervolume": (rising(2.0), 0.02),
    }
    found = {name: over(function, noise, name) for name, (function, noise) in shapes.items()}
    found["policy/hypergradient_error"] = curve(
        "error", grid, {s: [10 ** (-4 * g / steps + draw.gauss(0, 0.1)) for g in grid] for s in numbers}
    )
    points = list(range(9))
    found[f"policy/front/{label('cross_entropy')}"] = curve(
        "x", points, {s: [0.3 + 0.1 * p + draw.gauss(0, 0.01) for p in points] for s in numbers}
    )
    found[f"policy/front/{label('l2')}"] = curve(
        "y", points, {s: [2 / (1 + p) + draw.gauss(0, 0.03) for p in points] for s in numbers}
    )
    found["policy/front_chosen"] = curve(
        "chosen", points, {s: [float(p == 2 + s % 2) for p in points] for s in numbers}
    )
    return found


def constraint_curves(seeds: int, steps: int, label: str, lost: bool) -> dict[str, Curve]:
    """Return the curves of one constraint; the last seed does not hold it where it is `lost`."""
    draw = random.Random(4)
    grid, numbers = list(range(0, steps + 1, max(steps // 40, 1))), range(seeds)
    left = {s: 3.0 if lost and s == seeds - 1 else 0.0 for s in numbers}
    violation = {
        s: [left[s] + 20 * math.exp(-6 * g / steps) * math.cos(14 * g / steps) + draw.gauss(0, 0.1) for g in grid]
        for s in numbers
    }
    multiplier = {s: [0.02 * (1 - math.exp(-5 * g / steps)) + 1e-5 * left[s] * g for g in grid] for s in numbers}
    return {
        f"constraint/{label}/violation": curve("violation", grid, violation),
        f"constraint/{label}/multiplier": curve("multiplier", grid, multiplier),
        f"constraint/{label}/feasible": curve("feasible", [steps], {s: [float(not left[s])] for s in numbers}),
        f"constraint/{label}/final_violation": curve("final", [steps], {s: [left[s]] for s in numbers}),
    }
