"""Solve one formula of a linear model on a task: at its weight, along a path of weights, and measured on held-out rows."""

from __future__ import annotations

import csv
import json
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from poise.coefficient import Number
from poise.composite import Composite, Solution
from poise.datafits import Logistic
from poise.errors import IncompatibleError, InputError, PoiseWarning
from poise.formula import parse
from poise.objective import Objective
from poise.solving import PathPoint, minimize, solve_path
from poise.spreadsheet import harmless
from poise.structure import composite_of

if TYPE_CHECKING:
    from poise.tasks import Split, Task

__all__ = ["PathRow", "SolutionSummary", "solve_task"]


@dataclass(frozen=True)
class PathRow:
    """One point of the path.

    Attributes:
        factor: what multiplies the penalties of the formula.
        weight: of the penalty, where there is one alone; else the factor.
        value: the objective there. residual, converged: its certificate.
        support: inputs that are used. size: the norm of every input's weights (their value, where there is one output).
        metrics: on the validation rows.
    """

    factor: float
    weight: float
    value: float
    residual: float
    converged: bool
    support: int
    size: tuple[float, ...]
    metrics: dict[str, float]


@dataclass(frozen=True)
class SolutionSummary:
    """What solving found, as plain data.

    Attributes:
        formula, task, examples, sizes: what was solved. primary: the metric that the path is about; direction: "max" or "min".
        solver, reason, seconds: how. certificate: value, residual, tolerance, measure, iterations, status.
        inputs: names. outputs: names of classes, or one.
        coef: weights [outputs][inputs] of standardised inputs. intercept: by output.
        metrics: by part, "train", "valid" and "test".
        varied: what the path varies, in words. path: from the largest weight down. best: the place of the best validation metric.
        notes, warnings: in words.
    """

    formula: str
    task: str
    examples: int
    sizes: dict[str, int]
    primary: str
    direction: str
    solver: str
    reason: str
    seconds: float
    certificate: dict[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    coef: tuple[tuple[float, ...], ...]
    intercept: tuple[float, ...]
    metrics: dict[str, dict[str, float]]
    varied: str = ""
    path: tuple[PathRow, ...] = ()
    best: int | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = field(default=())

    @property
    def used(self) -> list[int]:
        """The inputs that any output uses, the largest first."""
        sizes = [math.sqrt(math.fsum(row[j] ** 2 for row in self.coef)) for j in range(len(self.inputs))]
        return [j for j in sorted(range(len(sizes)), key=lambda j: -sizes[j]) if sizes[j] > 0]

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write `solution.json`, `weights.csv` and, with a path, `path.csv`.

        Raises:
            InputError: the folder cannot be made or written.
        """
        place = Path(folder)
        try:
            place.mkdir(parents=True, exist_ok=True)
            written = [place / "solution.json", place / "weights.csv"]
            written[0].write_text(json.dumps(_finite(asdict(self)), indent=1), encoding="utf-8")
            rows = [("input", "output", "weight")]
            for output, line, b in zip(self.outputs, self.coef, self.intercept, strict=True):
                rows += [(name, output, repr(value)) for name, value in zip(self.inputs, line, strict=True)]
                rows.append(("(intercept)", output, repr(b)))
            _write_csv(written[1], rows)
            if self.path:
                written.append(place / "path.csv")
                names = list(self.path[0].metrics)
                head = (
                    "weight",
                    "factor",
                    "value",
                    "residual",
                    "converged",
                    "inputs used",
                    *(f"valid {n}" for n in names),
                )
                _write_csv(
                    written[2],
                    [head]
                    + [
                        tuple(
                            map(
                                str,
                                (p.weight, p.factor, p.value, p.residual, p.converged, p.support, *p.metrics.values()),
                            )
                        )
                        for p in self.path
                    ],
                )
        except OSError as error:
            raise InputError(
                f"The solution cannot be written to {place}: {error.strerror or error}. Give another folder."
            ) from error
        return written


def _write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([[harmless(cell) for cell in row] for row in rows])


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def solve_task(
    task: Task,
    formula: str,
    *,
    seed: int = 0,
    intercept: bool = True,
    solver: str | None = None,
    tol: float = 1e-8,
    iterations: int | None = None,
    points: int = 30,
    smallest: float = 1e-3,
    progress: Callable[[float], None] | None = None,
) -> SolutionSummary:
    """Solve a formula on the training rows of one split, and measure it on the others.

    Args:
        task: data.
        formula: one fit and penalties, with numbers for weights.
        seed: of the split.
        intercept, solver, tol, iterations: see `poise.solve`.
        points: of the path; 0 for none.
        smallest: last weight of the path, as a share of the first.
        progress: is told the share that is done.

    Raises:
        IncompatibleError: the formula is not that of a linear model, or its fit is not for such targets.
    """
    objective = parse(formula)
    split = task.split(seed)
    x = split.train["input"].flatten(1).double()
    classes = None if task.classes is None else len(task.classes)
    _check_fit(objective, task)
    problem = composite_of(objective, x, split.train["target"], intercept, split.train.get("sample_weight"), classes)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", PoiseWarning)
        found = minimize(problem, solver=solver, tol=tol, iterations=iterations)
    metrics = {name: _measure(split, problem, found, part) for name, part in split._parts().items()}
    scaled = "standardised on the training rows" if task.layout is not None else "as the data give them"
    notes = [*task.notes, f"Inputs are {scaled}, and so the weights are for such inputs."]
    path: list[PathRow] = []
    varied, scale = _varied(objective)
    if points:
        try:
            # every point of the path carries its own verdict
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PoiseWarning)
                path = _path(split, problem, points, smallest, scale, solver, progress)
        except IncompatibleError as reason:
            notes.append(f"No path: {reason}")
    best = None
    if path:
        sign = 1.0 if task.direction == "max" else -1.0
        best = max(range(len(path)), key=lambda i: (sign * path[i].metrics[task.primary], -path[i].support))
    certificate = asdict(found.certificate)
    certificate.pop("support")
    w, b = (found.coef, found.intercept) if found.coef.ndim > 1 else (found.coef[None], found.intercept[None])
    return SolutionSummary(
        formula=str(objective),
        task=task.name,
        examples=task.examples,
        sizes=split.sizes,
        primary=task.primary,
        direction=task.direction,
        solver=found.solver,
        reason=found.reason,
        seconds=found.seconds,
        certificate=certificate,
        inputs=_names(task, x.shape[1]),
        outputs=_outputs(task, len(w)),
        coef=tuple(tuple(row) for row in w.tolist()),
        intercept=tuple(b.tolist()),
        metrics=metrics,
        varied=varied,
        path=tuple(path),
        best=best,
        notes=tuple(notes),
        warnings=(
            *task.warnings,
            *split.warnings,
            *(str(w.message) for w in said if issubclass(w.category, PoiseWarning)),
        ),
    )


def _check_fit(objective: Objective, task: Task) -> None:
    """Refuse a fit of numbers for classes, and of classes for numbers."""
    for entry in objective._entries:
        if hasattr(entry.term, "datafit") and (task.classes is not None) != (entry.term.formula == "cross_entropy"):
            fits = "cross_entropy" if task.classes is not None else "least_squares or huber"
            raise IncompatibleError(
                f"{task.name} is a {task.target_type}, which {entry.label!r} does not fit. Use {fits}."
            )


def _path(
    split: Split, problem: Composite, points: int, smallest: float, scale: float, solver: str | None, progress: Any
) -> list[PathRow]:
    rows: list[PathRow] = []

    def each(point: PathPoint) -> None:
        found = point.solution
        size = found.coef if found.coef.ndim == 1 else found.coef.norm(dim=0)
        rows.append(
            PathRow(
                factor=point.factor,
                weight=point.factor * scale,
                value=found.certificate.value,
                residual=found.certificate.residual,
                converged=found.certificate.converged,
                support=point.support,
                size=tuple(size.tolist()),
                metrics=_measure(split, problem, found, split.valid),
            )
        )
        if progress is not None:
            progress(len(rows) / points)

    solve_path(problem, points, smallest=smallest, solver=solver, each=each)
    return rows


def _varied(objective: Objective) -> tuple[str, float]:
    """Return what a path varies, in words, and the weight that is called 1."""
    penalties = [e for e in objective._entries if not hasattr(e.term, "datafit")]
    if len(penalties) == 1 and isinstance(penalties[0].weight, Number):
        return f"weight of {penalties[0].label}", float(penalties[0].weight)
    return "factor of all penalties", 1.0


def _measure(split: Split, problem: Composite, found: Solution, part: dict[str, Tensor]) -> dict[str, float]:
    z = found.predict(part["input"].flatten(1).double())
    if isinstance(problem.datafit, Logistic):
        z = torch.stack([torch.zeros_like(z), z], 1)
    return split.metrics(z.float(), part["target"])


def _names(task: Task, inputs: int) -> tuple[str, ...]:
    if task.layout is not None and len(task.layout.names) == inputs:
        return tuple(task.layout.names)
    if task.image_shape is not None and math.prod(task.image_shape) == inputs and task.image_shape[0] == 1:
        width = task.image_shape[2]
        return tuple(f"row {j // width}, column {j % width}" for j in range(inputs))
    return tuple(f"input {j}" for j in range(inputs))


def _outputs(task: Task, rows: int) -> tuple[str, ...]:
    if task.classes is None:
        return tuple("target" if rows == 1 else f"target {i}" for i in range(rows))
    return tuple(task.classes) if rows == len(task.classes) else (f"{task.classes[1]} against {task.classes[0]}",)
