"""Stochastic gradients whose variance is taken out by a full gradient now and then (SVRG).

    theta <- theta - lr (grad f_B(theta) - grad f_B(snapshot) + grad f(snapshot))

A step costs two gradients of the batch, and a snapshot one of all the data.

Source: Johnson and Zhang (2013); the peer of arXiv:2302.02607.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import InputError, PoiseWarning
from poise.objective import Objective
from poise.problem import Certificate, Problem, Step

__all__ = ["SVRG"]


class SVRG:
    """Variance-reduced gradient descent.

    Args:
        full: `() -> Problem` on all the data; its gradient is taken at every snapshot.
        period: steps between snapshots.
        lr: step size, above 0.

    Attributes:
        oracle_rows: rows' gradients that were asked for: two batches a step, all rows a snapshot.
    """

    name = "svrg"
    needs: frozenset[str] = frozenset()

    def __init__(self, full: Callable[[], Problem], period: int, lr: float = 0.1) -> None:
        if period < 1:
            raise InputError(f"svrg: period must be at least 1, and it is {period}.")
        if not (math.isfinite(lr) and lr > 0):
            raise InputError(f"svrg: lr must be finite and above 0, and it is {lr}.")
        self.full, self.period, self.lr = full, period, lr
        self.t = self.oracle_rows = 0
        self.snapshot: dict[str, Tensor] = {}
        self.mean: dict[str, Tensor] = {}

    def bind(self, model: nn.Module, objective: Objective) -> None:
        """Nothing is held but the snapshot."""

    def step(self, problem: Problem, accept: Callable[[Step], bool] | None = None) -> Step:
        """Make one step; every `period` of them begin with a full gradient."""
        if self.t % self.period == 0:
            whole = self.full()
            self.mean = whole.gradient()
            self.oracle_rows += _rows(whole)
            self.snapshot = {n: p.detach().clone() for n, p in problem.parameters.items()}
        here = problem.gradient()
        report = problem.step
        there = problem.gradient(at=self.snapshot)
        self.oracle_rows += 2 * _rows(problem)
        if accept is not None and not accept(report):
            report.skipped = True
            return report
        self.t += 1
        with torch.no_grad():
            for name, p in problem.parameters.items():
                parts = [here.get(name), there.get(name), self.mean.get(name)]
                g = sum(
                    (s * part for s, part in zip((1, -1, 1), parts, strict=True) if part is not None), torch.zeros(())
                )
                p.sub_(self.lr * g)
        return report

    def minimize(self, problem: Problem, tolerance: float = 1e-6, iterations: int = 1000) -> Certificate:
        """Repeat steps on one problem until the gradient's norm is within `tolerance`."""
        history: list[float] = []
        for done in range(iterations + 1):
            g = problem.fresh().gradient()
            residual = float(torch.cat([v.flatten() for v in g.values()]).norm())
            history.append(float(problem.value()))
            if residual <= tolerance or done == iterations:
                break
            self.step(problem.fresh())
        status = (
            "converged"
            if residual <= tolerance
            else f"stopped after {done} iterations with gradient norm {residual:.3g}"
        )
        if residual > tolerance:
            warnings.warn(f"svrg: {status}; {tolerance:.3g} was asked for.", PoiseWarning, stacklevel=2)
        return Certificate(history[-1], residual, tolerance, "gradient norm", done, status, history=tuple(history))

    def state_dict(self) -> dict[str, Any]:
        return {"t": self.t, "rows": self.oracle_rows, "snapshot": dict(self.snapshot), "mean": dict(self.mean)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.t, self.oracle_rows = int(state["t"]), int(state["rows"])
        self.snapshot = {n: v.clone() for n, v in state["snapshot"].items()}
        self.mean = {n: v.clone() for n, v in state["mean"].items()}

    def __repr__(self) -> str:
        return f"svrg(lr={self.lr}, period={self.period})"


def _rows(problem: Problem) -> int:
    return sum(len(next(iter(next(iter(batch.values())).values()))) for batch in problem.batches)
