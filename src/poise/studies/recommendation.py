"""What a study recommends, in words that follow from the intervals, and the Python lines that do it.

A formula is called better only where its interval against the first formula lies on one side of zero and the
Holm-adjusted p-value agrees. Where nothing can be told apart, the simpler formula is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from poise.studies.intervals import Estimate
from poise.studies.summary import Difference, FormulaSummary, Metric, Recommendation, TaskSummary, Verdict

if TYPE_CHECKING:
    from poise.studies.config import DataConfig, TrainingConfig
    from poise.studies.plan import Plan
    from poise.studies.summary import SeedResult


def difference_sentence(metric: Metric, one: str, other: str, estimate: Estimate, verdict: Verdict) -> str:
    """Say in one sentence how `one` compares with `other`.

    >>> accuracy = Metric("accuracy", "accuracy", "max", percent=True)
    >>> difference_sentence(accuracy, "a + b", "a", Estimate(0.121, 0.102, 0.140, 0.01, 5), "better")
    'a + b is better than a by 12.1 points accuracy (95 % interval 10.2 to 14.0, 5 seeds).'
    """
    if estimate.n == 0:
        return f"{one} and {other} have no seed in common, so they cannot be compared."
    if verdict == "no interval":
        return f"{one} and {other} differ by {_signed(metric, estimate)}, but {estimate.reason}."
    if verdict == "undecided":
        return (
            f"{one} and {other} cannot be told apart: {_signed(metric, estimate)} "
            f"({_interval(metric, estimate, signed=True)})."
        )
    return f"{one} is {verdict} than {other} by {_amount(metric, estimate)}."


def term_sentence(metric: Metric, label: str, estimate: Estimate, verdict: Verdict) -> str:
    """Say in one sentence what a term bought.

    >>> accuracy = Metric("accuracy", "accuracy", "max", percent=True)
    >>> term_sentence(accuracy, "l2", Estimate(0.003, -0.002, 0.008, 0.004, 5), "undecided")
    'l2: no effect can be told apart from zero: +0.3 points accuracy (95 % interval -0.2 to +0.8, 5 seeds).'
    """
    if estimate.n == 0:
        return f"{label}: the runs with and without it have no seed in common."
    if verdict == "no interval":
        return f"{label}: {_signed(metric, estimate)}, but {estimate.reason}."
    if verdict == "undecided":
        return (
            f"{label}: no effect can be told apart from zero: {_signed(metric, estimate)} "
            f"({_interval(metric, estimate, signed=True)})."
        )
    if metric.direction == "min":
        size, change = _size(estimate), "lowered" if verdict == "better" else "raised"
        points = " points" if metric.percent else ""
        return f"{label} {change} {metric.title} by {_number(metric, size.mean)}{points} ({_interval(metric, size)})."
    return f"{label} {'bought' if verdict == 'better' else 'cost'} {_amount(metric, estimate)}."


def recommend(
    formulas: tuple[FormulaSummary, ...],
    primary: Metric,
    differences: tuple[Difference, ...],
    between: tuple[Difference, ...],
    best: int | None,
    plan: Plan,
    task: TaskSummary,
) -> Recommendation:
    """Recommend a formula, or say why none can be recommended.

    Args:
        formulas: the compared formulas.
        primary: the metric that decides.
        differences: each formula against the first; `between`: the best one against each other one.
        best: index of the formula that is better than the first by most, if any is.
        plan, task: for the Python lines.
    """
    mine = [difference for difference in differences if difference.metric == primary.name]
    finished = [formula for formula in formulas if formula.seeds]
    if not finished:
        return Recommendation("failed", None, "No run has finished, so there is nothing to recommend.", "")
    if len(formulas) == 1:
        text = f"{formulas[0].text} reaches {_level(primary, formulas[0])}. There is no other formula to compare with."
        return Recommendation("single", 0, text, python_lines(formulas[0], plan, task))
    if best is not None:
        text = " ".join([_sentence(mine, best), *_against_others(formulas, between), _price(formulas, best)]).strip()
        return Recommendation("better", best, text, python_lines(formulas[best], plan, task))
    told = [difference for difference in mine if difference.verdict != "no interval"]
    if not told:
        reason = _no_interval(plan, mine)
        return Recommendation("no interval", None, reason, python_lines(finished[0], plan, task))
    if len(told) == len(mine) and all(difference.verdict == "worse" for difference in mine):
        text = f"Keep {formulas[0].text}. " + " ".join(difference.sentence for difference in mine)
        return Recommendation("keep", 0, text, python_lines(formulas[0], plan, task))
    worse = {difference.formula for difference in mine if difference.verdict == "worse"}
    simple = min((f for f in finished if f.index not in worse), key=lambda f: (len(f.terms), f.index))
    seeds = max(difference.estimate.n for difference in told)
    text = f"No winner can be told apart with {seeds} seeds; keep the simpler: {simple.text}. " + " ".join(
        difference.sentence for difference in mine
    )
    return Recommendation("undecided", simple.index, text, python_lines(simple, plan, task))


def _sentence(differences: Sequence[Difference], formula: int) -> str:
    return next(difference.sentence for difference in differences if difference.formula == formula)


def _against_others(formulas: tuple[FormulaSummary, ...], between: tuple[Difference, ...]) -> list[str]:
    sentences = []
    for difference in between:
        sentence = difference.sentence
        if difference.verdict == "undecided" and len(formulas[difference.baseline].terms) < len(
            formulas[difference.formula].terms
        ):
            sentence += f" {formulas[difference.baseline].text} is the simpler of the two."
        sentences.append(sentence)
    return sentences


def _price(formulas: tuple[FormulaSummary, ...], best: int) -> str:
    mine, base = formulas[best].cost.seconds.mean, formulas[0].cost.seconds.mean
    # Times of single runs vary by a few per cent; smaller differences are not worth a sentence.
    if not (mine > 0 and base > 0) or abs(mine / base - 1) < 0.1:
        return ""
    return f"It takes {mine / base:.2g} times as long to train ({mine:.3g} s instead of {base:.3g} s a run)."


def _no_interval(plan: Plan, differences: Sequence[Difference]) -> str:
    if len(plan.config.seeds) == 1:
        return "One seed gives no interval, so no formula can be called better. Give at least 3 seeds, better 5."
    reasons = "; ".join(dict.fromkeys(difference.estimate.reason for difference in differences))
    return f"No interval exists ({reasons}), so no formula can be called better."


def _level(metric: Metric, formula: FormulaSummary) -> str:
    estimate = formula.metrics[metric.name]
    text = f"{metric.text(estimate.mean)} {metric.title}"
    if not estimate.has_interval:
        return f"{text} ({estimate.reason})"
    return f"{text} ({_interval(metric, estimate)})"


def _amount(metric: Metric, estimate: Estimate) -> str:
    """Write the size of a decided difference: positive, whichever way it points."""
    estimate = _size(estimate)
    return f"{_number(metric, estimate.mean)}{_unit(metric)} ({_interval(metric, estimate)})"


def _size(estimate: Estimate) -> Estimate:
    """Turn an estimate so that its mean is not negative."""
    if estimate.mean >= 0 or estimate.lower is None or estimate.upper is None:
        return estimate
    return replace(estimate, mean=-estimate.mean, lower=-estimate.upper, upper=-estimate.lower)


def _signed(metric: Metric, estimate: Estimate) -> str:
    return f"{_number(metric, estimate.mean, signed=True)}{_unit(metric)}"


def _unit(metric: Metric) -> str:
    points = " points" if metric.percent else ""
    # "12.1 points accuracy" is something gained; of a loss one says how much there is more or less in it.
    return f"{points} {metric.title}" if metric.direction == "max" else f"{points} in {metric.title}"


def _interval(metric: Metric, estimate: Estimate, *, signed: bool = False) -> str:
    assert estimate.lower is not None
    assert estimate.upper is not None
    lower, upper = (_number(metric, bound, signed=signed) for bound in (estimate.lower, estimate.upper))
    return f"{100 * estimate.level:.0f} % interval {lower} to {upper}, {estimate.n} seeds"


def _number(metric: Metric, value: float, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{100 * value:{sign}.1f}" if metric.percent else f"{value:{sign}.4g}"


def python_lines(formula: FormulaSummary, plan: Plan, task: TaskSummary) -> str:
    """Return Python lines that train the formula as its first finished run was trained, and measure it on the test
    split.

    Args:
        formula: the formula; with a search, the weights and the learning rate of its first finished seed are used.
        plan: for the settings.
        task: for the data.
    """
    result = formula.seeds[0]
    training, data = plan.config.training, plan.config.data
    found = f"  # found on seed {result.seed}" if plan.trials else ""
    if task.target_type not in ("classification", "regression"):
        return _language_lines(plan, result, found)
    lines = [
        "import poise",
        "",
        f"task = poise.load_task({_arguments(repr(data.source), **_given(data))})",
        f"split = task.split(seed={result.seed})",
        f"objective = poise.parse({result.formula!r}){found}",
        "run = poise.fit(",
        f"    task.model({training.model!r}, seed={result.seed}),",
        "    objective,",
        "    split.train,",
        "    split.valid,",
        "    readout=task.readout(),",
        "    metrics=split.metrics,",
        *(f"    {line}" for line in _solver_lines(training, result.lr, found)),
        f"    epochs={training.epochs}," if training.epochs else f"    steps={training.steps},",
        f"    batch_size={training.batch_size},",
        f"    seed={result.seed},",
        f"    device={training.device!r},",
        *([f"    precision={training.precision!r},"] if training.precision != "fp32" else []),
        *(["    deterministic=True,"] if training.deterministic else []),
        *([f"    monitor={task.primary!r},", "    restore_best=True,"] if training.select == "best" else []),
        ")",
        'print(split.metrics(run.predict(split.test["input"]), split.test["target"]))',
    ]
    return "\n".join(lines) + "\n"


def _language_lines(plan: Plan, result: SeedResult, found: str) -> str:
    """Return the lines for texts: the task hands over model, tokens and the measuring of held-out answers."""
    training, data = plan.config.training, plan.config.data
    options = training.model_options() | ({} if training.device == "auto" else {"device": training.device})
    lines = [
        "import poise",
        "",
        f"task = poise.load_task({_arguments(repr(data.source), **_given(data))})",
        f"split = task.split(seed={result.seed})",
        "run = poise.fit(",
        f"    objective=poise.parse({result.formula!r}),{found}",
        f"    **task.arguments({_arguments('split', repr(training.model), seed=result.seed, **options)}),",
        *(f"    {line}" for line in _solver_lines(training, result.lr, found)),
        f"    epochs={training.epochs}," if training.epochs else f"    steps={training.steps},",
        f"    batch_size={training.batch_size},",
        *([f"    accumulate={training.accumulate},"] if training.accumulate > 1 else []),
        f"    seed={result.seed},",
        f"    device={training.device!r},",
        *([f"    precision={training.precision!r},"] if training.precision != "fp32" else []),
        *(["    deterministic=True,"] if training.deterministic else []),
        ")",
        'print(split.measure(run, "test"))',
        'split.save(run, "aligned")  # a folder that plain transformers loads',
    ]
    return "\n".join(lines) + "\n"


def _given(data: DataConfig) -> dict[str, Any]:
    values = data.model_dump(exclude_defaults=True, exclude={"source", "fingerprint"})
    return {name: value for name, value in values.items() if value is not None}


def _solver_lines(training: TrainingConfig, lr: float, found: str) -> list[str]:
    """Return the arguments of `fit` that name the solver, its learning rate and its schedule."""
    from poise.solvers.torch_optimizers import NAMED

    options = dict(training.solver_options or {})
    if not options or (training.solver, options) == ("sgd", {"momentum": 0.9}):
        # `fit` gives SGD its momentum of 0.9 by itself.
        lines = [f"solver={training.solver!r},", f"lr={lr!r},{found}"]
    else:
        maker = "as_solver" if training.solver in NAMED or "(" in str(training.solver) else "TorchOptimizer"
        lines = [f"solver=poise.solvers.{maker}({_arguments(repr(training.solver), lr=lr, **options)}),{found}"]
    schedule = {"constant": None, "cosine": "cosine(1, 0)", "linear": "linear(1, 0)"}.get(
        training.schedule or "constant", training.schedule
    )
    if schedule:
        lines.append(f"lr_schedule=poise.{schedule},")
    return lines


def _arguments(*positional: str, **named: Any) -> str:
    return ", ".join([*positional, *(f"{name}={value!r}" for name, value in named.items())])
