"""What learned steps bought: objective and error layer by layer, under other conditions, and the steps themselves.

Contestants see the same signals, so their differences are paired. The last layer is reported apart from the way there: training charged it
alone, and single layers on the way may raise the objective.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise.errors import InputError, PoiseWarning
from poise.quantities import derive
from poise.solvers.sparse_recovery import plain_model, recover
from poise.solvers.unfolded import Unfolded

__all__ = [
    "ConditionReport", "ConditionRow", "LayerReport", "LayerRow", "StepFigure", "layer_report", "mismatch_report", "plain_solvers",
    "step_figure", "transfer_report",
]  # fmt: skip

Contestant = Unfolded | Callable[[Any, Tensor], Tensor]
"""A model, or `(operator, y) -> every iterate [layers, batch, n]`."""


@dataclass(frozen=True)
class Mean:
    """A mean over signals with the half width of its 95 % interval, and the median.

    Long steps let single signals run away; a mean far above the median tells of them.
    """

    mean: float
    half: float
    median: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.half:.1g}"


@dataclass(frozen=True)
class LayerRow:
    """One layer of one contestant.

    Attributes:
        solver, layer: which; layers count from 1.
        objective: mean with interval.
        excess: objective minus that of the long run of the plain solver, paired; negative where a better local minimum was found.
        error: mean squared error to the true signals, None where nobody knows them.
        nmse: `10 log10(sum ||x_t - x||^2 / sum ||x||^2)` in decibels, or None.
        support: F1 of the entries that are not 0 against the true ones, or None.
        distance: root mean square distance to the long run of the plain solver.
    """

    solver: str
    layer: int
    objective: Mean
    excess: Mean
    error: Mean | None
    nmse: float | None
    support: float | None
    distance: float


@dataclass(frozen=True)
class LayerReport:
    """Rows of every contestant and layer, and what the plain solver ends at."""

    rows: tuple[LayerRow, ...]
    limit: Mean
    limit_error: Mean | None

    def last(self, solver: str) -> LayerRow:
        """Return a contestant's output layer."""
        return [row for row in self.rows if row.solver == solver][-1]

    def path(self, solver: str) -> list[LayerRow]:
        """Return a contestant's layers in order."""
        return [row for row in self.rows if row.solver == solver]

    def __str__(self) -> str:
        lines = [
            f"plain solver at its limit: objective {self.limit}"
            + (f", error {self.limit_error}" if self.limit_error else "")
        ]
        for row in self.rows:
            error = (
                "" if row.error is None else f"  error {row.error} ({row.nmse:.1f} dB)  support F1 {row.support:.3f}"
            )
            lines.append(f"{row.solver:>24}  layer {row.layer:>3}  objective {row.objective}{error}")
        return "\n".join(lines)


@dataclass(frozen=True)
class ConditionRow:
    """The output of one contestant under one condition; `ratio` is its error over that under the first condition."""

    condition: str
    solver: str
    objective: Mean
    error: Mean | None
    ratio: float | None


@dataclass(frozen=True)
class ConditionReport:
    """Rows of every condition and contestant; the first condition is the one that was trained for."""

    rows: tuple[ConditionRow, ...]

    def row(self, condition: str, solver: str) -> ConditionRow:
        """Return one row."""
        return next(r for r in self.rows if r.condition == condition and r.solver == solver)

    def __str__(self) -> str:
        return "\n".join(
            f"{r.condition:>20}  {r.solver:>24}  objective {r.objective}"
            + ("" if r.error is None else f"  error {r.error}  ({r.ratio:.2f} of the first condition)")
            for r in self.rows
        )


@dataclass(frozen=True)
class StepFigure:
    """Learned steps in units of 1/L, layer by layer, with the lines of the plain step and of the stable range.

    Attributes:
        layers: 1 .. T of the deepest contestant.
        steps: by contestant.
        lines: heights of the two lines, by name.
    """

    layers: tuple[int, ...]
    steps: Mapping[str, tuple[float, ...]]
    lines: Mapping[str, float]

    def figure(self) -> Any:
        """Draw it with plotly."""
        import plotly.graph_objects as go

        drawn = go.Figure()
        for name, values in self.steps.items():
            drawn.add_scatter(x=self.layers[: len(values)], y=values, mode="lines+markers", name=name)
        for name, height in self.lines.items():
            drawn.add_hline(y=height, line_dash="dash", annotation_text=name)
        drawn.update_layout(xaxis_title="layer", yaxis_title="step · L")
        return drawn


def step_figure(models: Mapping[str, Unfolded]) -> StepFigure:
    """Return what is drawn of learned steps.

    >>> step_figure({"plain": Unfolded(layers=2)}).steps["plain"]
    (1.0, 1.0)
    """
    if not models:
        raise InputError("step_figure: there is no model to draw.")
    steps = {name: tuple(float(a) for a in model.steps) for name, model in models.items()}
    return StepFigure(tuple(range(1, max(map(len, steps.values())) + 1)), steps, {"1/L": 1.0, "2/L": 2.0})


def plain_solvers(layers: int, weight: float, penalty: Any = None) -> dict[str, Contestant]:
    """Return the untrained contestants: constant steps 1/L and 1.9/L, momentum, and backtracking, each for so many iterations."""

    def solver(**options: Any) -> Contestant:
        def run(operator: Any, y: Tensor) -> Tensor:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PoiseWarning)  # a fixed number of iterations is what is asked for
                result = recover(
                    operator, y, penalty, weight=weight, iterations=layers, tolerance=-1.0, trace=True, **options
                )
            assert result.trace is not None
            return result.trace

        return run

    return {
        "1/L": solver(step="1/L"),
        "1.9/L": solver(step="1.9/L"),
        "FISTA": solver(momentum=True),
        "backtracking": solver(step="backtracking"),
    }


def layer_report(
    contestants: Mapping[str, Contestant],
    batch: Any,
    *,
    weight: float,
    penalty: Any = None,
    limit: int = 2000,
) -> LayerReport:
    """Compare contestants layer by layer on one batch of held-out signals.

    Args:
        contestants: models and untrained solvers by name.
        batch: `operator`, `y` and, where known, `x`.
        weight, penalty: of the objective.
        limit: iterations of the plain solver that stand for its end (with momentum where the penalty is convex).

    Raises:
        InputError: no contestant.
    """
    if not contestants:
        raise InputError("layer_report: there is nobody to compare.")
    form = next((m for m in contestants.values() if isinstance(m, Unfolded)), None)
    penalty = penalty if penalty is not None or form is None else form.penalty
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PoiseWarning)
        end = recover(
            batch.operator,
            batch.y,
            penalty,
            weight=weight,
            iterations=limit,
            momentum=bool(getattr(penalty, "convex", True)),
        )
    rows = []
    for name, contestant in contestants.items():
        for layer, x in enumerate(_trace(contestant, batch), start=1):
            value = _objective(batch, x, penalty, weight)
            rows.append(
                LayerRow(
                    name,
                    layer,
                    _mean(value),
                    _mean(value - end.objective),
                    _error(batch, x),
                    _decibels(batch, x),
                    _support(batch, x),
                    float((x - end.x).abs().square().sum(-1).mean().sqrt()),
                )
            )
    return LayerReport(tuple(rows), _mean(end.objective), _error(batch, end.x))


def mismatch_report(
    contestants: Mapping[str, Contestant],
    sampler: Any,
    changes: Mapping[str, Mapping[str, Any]],
    *,
    weight: float,
    penalty: Any = None,
    size: int = 1000,
    seed: int = 0,
) -> ConditionReport:
    """Compare output layers where the signals are not those of the training.

    Args:
        contestants: models and untrained solvers by name.
        sampler: of the training condition, with `changed(**settings)`.
        changes: settings by the name of the condition, such as `{"p = 12 %": {"p": 0.12}, "10 dB": {"snr": 10.0}}`.
        weight, penalty: of the objective.
        size, seed: of the held-out batch; its random numbers are those of every condition.
    """
    samplers = {"as trained": sampler, **{name: sampler.changed(**settings) for name, settings in changes.items()}}
    return _conditions(contestants, samplers, weight, penalty, size, seed)


def transfer_report(
    model: Unfolded, sampler: Any, others: Mapping[str, Any], *, size: int = 1000, seed: int = 0
) -> ConditionReport:
    """Show what learned steps `alpha L` are worth on other matrices, sizes and noise, beside as many plain and accelerated steps.

    Args:
        model: with learned steps.
        sampler: of the training condition.
        others: samplers by the name of the condition.
        size, seed: of the held-out batch.
    """
    plain = plain_solvers(model.layers, model.weight, model.penalty)
    contestants: dict[str, Contestant] = {"learned": model, "1/L": plain["1/L"], "FISTA": plain["FISTA"]}
    return _conditions(contestants, {"as trained": sampler, **others}, model.weight, model.penalty, size, seed)


def _conditions(
    contestants: Mapping[str, Contestant],
    samplers: Mapping[str, Any],
    weight: float,
    penalty: Any,
    size: int,
    seed: int,
) -> ConditionReport:
    form = next((m for m in contestants.values() if isinstance(m, Unfolded)), None)
    penalty = penalty if penalty is not None or form is None else form.penalty
    rows: list[ConditionRow] = []
    first: dict[str, float] = {}
    for condition, sampler in samplers.items():
        batch = sampler(size, torch.Generator().manual_seed(derive(seed, "held out")))
        for name, contestant in contestants.items():
            x = _trace(contestant, batch)[-1]
            error = _error(batch, x)
            ratio = None
            if error is not None:
                ratio = error.mean / first.setdefault(name, max(error.mean, 1e-30))
            rows.append(ConditionRow(condition, name, _mean(_objective(batch, x, penalty, weight)), error, ratio))
    return ConditionReport(tuple(rows))


def _trace(contestant: Contestant, batch: Any) -> Tensor:
    with torch.no_grad():
        if isinstance(contestant, Unfolded):
            every: Tensor = contestant(batch.operator, batch.y, trace=True)[1]
            return every
        return contestant(batch.operator, batch.y)


def _objective(batch: Any, x: Tensor, penalty: Any, weight: float) -> Tensor:
    return plain_model(penalty, weight).objective(batch.operator, batch.y, x)


def _error(batch: Any, x: Tensor) -> Mean | None:
    return None if batch.x is None else _mean((x - batch.x).abs().square().mean(-1))


def _decibels(batch: Any, x: Tensor) -> float | None:
    if batch.x is None:
        return None
    ratio = float((x - batch.x).abs().square().sum()) / max(float(batch.x.abs().square().sum()), 1e-30)
    return 10 * math.log10(max(ratio, 1e-30))


def _support(batch: Any, x: Tensor) -> float | None:
    if batch.x is None:
        return None
    found, true = x != 0, batch.x != 0
    both = float((found & true).sum())
    return 2 * both / max(float(found.sum() + true.sum()), 1.0)


def _mean(values: Tensor) -> Mean:
    many = len(values)
    spread = float(values.double().std()) / math.sqrt(many) if many > 1 else math.nan
    return Mean(float(values.double().mean()), 1.96 * spread, float(values.median()))
