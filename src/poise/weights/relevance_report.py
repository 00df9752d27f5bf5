"""The table that says which source task got how many samples, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from poise.errors import InputError
from poise.weights.allocation import efficiency, planner_score, plug_in_score

__all__ = ["RelevanceReport", "TaskRow", "relevance_report"]


@dataclass(frozen=True)
class TaskRow:
    """One source task.

    Attributes:
        task: its name.
        relevance: nu_t.
        samples: n_t.
        risk_share: (nu_t^2/n_t) / sum nu^2/n: its part of the predicted risk.
        reduced_cost: 1 - |w_t'y|, or NaN for p = 2.
        reason: in words.
    """

    task: str
    relevance: float
    samples: int
    risk_share: float
    reduced_cost: float
    reason: str


@dataclass(frozen=True)
class RelevanceReport:
    """All tasks, the most relevant first; `print` shows the table.

    Attributes:
        rows: one a task.
        plug_in: sum nu^2/n.
        planner: R(n), the same for the best nu.
        uniform: R(n) of the uniform allocation of as many samples.
        efficiency: |nu1|_1^2/(N R(n)), in (0, 1], for these heads.
    """

    rows: tuple[TaskRow, ...]
    plug_in: float
    planner: float
    uniform: float
    efficiency: float

    @property
    def ratio_to_uniform(self) -> float:
        """The predicted risk over that of uniform sampling; below 1 is a gain."""
        return self.planner / self.uniform

    def top(self, rows: int = 10) -> str:
        """Return the table's first rows as text."""
        shown = self.rows[:rows]
        width = max(4, *(len(row.task) for row in shown))
        lines = [f"{'task':<{width}} {'relevance':>9} {'samples':>8} {'of risk':>8}  why"]
        lines += [
            f"{r.task:<{width}} {r.relevance:>9.3f} {r.samples:>8d} {r.risk_share:>8.1%}  {r.reason}" for r in shown
        ]
        if len(self.rows) > len(shown):
            rest = self.rows[rows:]
            lines.append(f"{len(rest)} more tasks with {sum(r.samples for r in rest)} samples")
        lines.append(
            f"predicted risk {self.ratio_to_uniform:.2f} of that of uniform sampling; efficiency {self.efficiency:.2f}"
        )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.top(len(self.rows))


def relevance_report(
    relevance: Tensor,
    counts: Tensor,
    heads: Tensor,
    target: Tensor,
    reduced_costs: NDArray[np.float64] | None = None,
    names: Sequence[str] | None = None,
    floor: int = 0,
) -> RelevanceReport:
    """Make the table.

    Args:
        relevance: nu, float (T,).
        counts: n, (T,).
        heads: W, float (K, T).
        target: w, float (K,).
        reduced_costs: 1 - |w_t'y|, (T,), where a linear program or a LASSO gave nu.
        names: of the tasks; their numbers by default.
        floor: the least samples of every task.

    Raises:
        InputError: lengths that do not fit.
    """
    tasks = len(relevance)
    names = [str(t) for t in range(tasks)] if names is None else list(names)
    if len(counts) != tasks or len(names) != tasks:
        raise InputError(
            f"A report needs one count and one name for each of {tasks} tasks; got {len(counts)}, {len(names)}."
        )
    nu, n = relevance.double(), counts.double()
    parts = torch.where(nu == 0, 0.0, nu**2 / n)
    whole = float(parts.sum())
    shares = torch.nan_to_num(parts / whole, nan=1.0) if whole else torch.zeros_like(parts)
    # Where the first estimate is wrong about the target (lam > 0), what the heads explain of it is what counts.
    explained = (
        heads.double() @ torch.linalg.lstsq(heads.double(), target.double()[:, None], driver="gelsd").solution[:, 0]
    )
    planner = planner_score(heads, explained, counts)
    even = planner_score(heads, explained, torch.full((tasks,), float(n.sum()) / tasks))
    order = sorted(range(tasks), key=lambda t: (-abs(float(nu[t])), -int(counts[t])))
    least = max(floor, int(counts.min()))  # what every task has, whatever it says
    rows = tuple(
        TaskRow(
            names[t],
            float(nu[t]),
            int(counts[t]),
            float(shares[t]),
            float("nan") if reduced_costs is None else float(reduced_costs[t]),
            _reason(float(nu[t]), int(counts[t]), None if reduced_costs is None else float(reduced_costs[t]), least),
        )
        for t in order
    )
    return RelevanceReport(rows, plug_in_score(nu, counts), planner, even, efficiency(heads, explained, counts))


def _reason(nu: float, samples: int, reduced_cost: float | None, floor: int) -> str:
    if nu:
        return "in the mix: its price is met" if reduced_cost is not None else "its part of the least-norm mix"
    kept = " (floor)" if floor and samples <= floor else ""
    if reduced_cost is None:
        return f"not chosen{kept}"
    if reduced_cost < 1e-7:
        return f"as good as one in the mix, not needed{kept}"
    if reduced_cost >= 1 - 1e-12:
        return f"says nothing about the target{kept}"
    if samples > floor:
        return f"out by the last estimate: would enter with a head {1 / (1 - reduced_cost):.2f} times as large"
    return f"out: would enter with a head {1 / (1 - reduced_cost):.2f} times as large{kept}"
