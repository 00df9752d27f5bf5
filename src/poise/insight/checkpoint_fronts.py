"""Which training run got where, when several objectives count: the Pareto set of all checkpoints, and who owns it.

report = pareto_paths({"fixed": points, "influence": others}, steps=range(0, 300, 5))
print(report)
report.front                 # the points to draw, each with its run and step
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from poise.errors import InputError
from poise.metrics.pareto import hypervolume, nondominated

__all__ = ["FrontCheckpoint", "ParetoPaths", "RunPath", "pareto_paths"]


@dataclass(frozen=True)
class FrontCheckpoint:
    """A checkpoint that no checkpoint of any run dominates."""

    run: str
    step: int
    point: tuple[float, ...]


@dataclass(frozen=True)
class RunPath:
    """One run among others.

    Attributes:
        volume: what its checkpoints dominate above the reference.
        last: its last point.
        optimal: how many of its checkpoints are in the Pareto set of all runs.
        first_step, mean_step: step of the first of them, and their mean; None where there is none.
        dominated: share of its checkpoints that a checkpoint of another run dominates.
    """

    volume: float
    last: tuple[float, ...]
    optimal: int
    first_step: int | None
    mean_step: float | None
    dominated: float


@dataclass(frozen=True)
class ParetoPaths:
    """Runs on one set of objectives.

    Attributes:
        runs: by name.
        front: the Pareto set of all checkpoints, ordered by step.
        coverage: by (run, other), the share of the other's checkpoints that one of this run's dominates.
        points: every run's checkpoints, float64 [checkpoints, m], to be drawn.
        steps: of the checkpoints.
    """

    runs: Mapping[str, RunPath]
    front: tuple[FrontCheckpoint, ...]
    coverage: Mapping[tuple[str, str], float]
    points: Mapping[str, Tensor]
    steps: tuple[int, ...]

    def __str__(self) -> str:
        wide = max(len(name) for name in self.runs)
        lines = [f"{'run':<{wide}}  volume     optimal  first step  dominated"]
        for name, r in sorted(self.runs.items(), key=lambda item: -item[1].volume):
            first = "never" if r.first_step is None else str(r.first_step)
            lines.append(f"{name:<{wide}}  {r.volume:<9.4g}  {r.optimal:<7}  {first:<10}  {r.dominated:.0%}")
        return "\n".join(lines)


def pareto_paths(
    paths: Mapping[str, Tensor], steps: Sequence[int] | None = None, reference: Sequence[float] | Tensor | None = None
) -> ParetoPaths:
    """Compare the paths of runs through objective space.

    Args:
        paths: by run, the objectives at every checkpoint, [checkpoints, m], all to be maximised.
        steps: of the checkpoints; 0, 1, 2, ... by default.
        reference: where volumes begin; the first checkpoint of the first run by default, which is the initial model.

    Raises:
        InputError: no run, or paths of different forms.

    >>> report = pareto_paths({"a": torch.tensor([[0.0, 0.0], [1.0, 2.0]]), "b": torch.tensor([[0.0, 0.0], [1.0, 1.0]])})
    >>> report.runs["a"].volume, report.coverage["a", "b"], report.front[0].run
    (2.0, 1.0, 'a')

    Source: arXiv:2509.11452, section on steps to Pareto-optimal points; Zitzler and Thiele 1999 (coverage).
    """
    points = {name: torch.as_tensor(path).detach().double().cpu() for name, path in paths.items()}
    forms = {tuple(p.shape) for p in points.values()}
    if len(forms) != 1 or len(next(iter(forms))) != 2 or not min(next(iter(forms))):
        raise InputError(f"pareto_paths needs runs of one form [checkpoints, m], and they are {sorted(forms)}.")
    count = next(iter(forms))[0]
    at = tuple(range(count)) if steps is None else tuple(steps)
    if len(at) != count:
        raise InputError(f"pareto_paths: {count} checkpoints need as many steps, and there are {len(at)}.")
    low = next(iter(points.values()))[0] if reference is None else torch.as_tensor(reference).double()
    kept = dict(zip(points, nondominated(torch.cat(list(points.values()))).view(-1, count), strict=True))
    coverage = {(a, b): _coverage(points[a], points[b]) for a in points for b in points if a != b}
    runs = {}
    for name, path in points.items():
        optimal = [step for step, k in zip(at, kept[name].tolist(), strict=True) if k]
        others = [p for other, p in points.items() if other != name]
        runs[name] = RunPath(
            hypervolume(path, low),
            tuple(path[-1].tolist()),
            len(optimal),
            min(optimal, default=None),
            fmean(optimal) if optimal else None,
            _coverage(torch.cat(others), path) if others else 0.0,
        )
    front = [
        FrontCheckpoint(name, step, tuple(point))
        for name, path in points.items()
        for step, point, k in zip(at, path.tolist(), kept[name].tolist(), strict=True)
        if k
    ]
    return ParetoPaths(runs, tuple(sorted(front, key=lambda c: (c.step, c.run))), coverage, points, at)


def _coverage(a: Tensor, b: Tensor) -> float:
    """Return the share of points b that some point of a dominates."""
    over = (a[:, None] >= b).all(2) & (a[:, None] > b).any(2)
    return float(over.any(0).double().mean())
