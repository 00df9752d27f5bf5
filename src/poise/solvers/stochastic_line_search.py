"""Stochastic gradient descent whose step is searched on every batch (SLS).

    theta <- theta - a g,   a the largest of a geometric grid with   f_B(theta - a g) <= f_B(theta) - c a |g|^2

The first trial is the step before times `growth ** (1 / steps_per_epoch)`. A trial costs a forward pass, and no gradient.

Source: Vaswani et al., arXiv:1905.09997, with the constants of arXiv:2302.02607's code.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from poise.errors import InputError, PoiseWarning
from poise.objective import Objective
from poise.problem import Certificate, Problem, Step
from poise.solvers.inner_solvers import SearchedStep

__all__ = ["StochasticLineSearch"]


class StochasticLineSearch:
    """SGD with Armijo's rule on every batch; "sls" by name.

    Args:
        lr: the first step that is tried.
        c, backtrack, growth: sufficient decrease, factor of a trial that failed, growth of the first trial over one epoch.
        steps_per_epoch: of the run; 1 for full batches.

    >>> StochasticLineSearch(lr=1.0)
    sls(lr=1.0, c=0.5)
    """

    name = "sls"
    needs = frozenset({"potential"})

    def __init__(
        self, lr: float = 1.0, c: float = 0.5, backtrack: float = 0.9, growth: float = 1.8, steps_per_epoch: int = 1
    ) -> None:
        if steps_per_epoch < 1:
            raise InputError(f"sls: steps_per_epoch must be at least 1, and it is {steps_per_epoch}.")
        self.lr, self.steps_per_epoch = lr, steps_per_epoch
        self.search = SearchedStep(lr, c, backtrack, growth, floor=1e-6)
        self.begun = False
        self.oracle_calls = self.forwards = 0

    def bind(self, model: nn.Module, objective: Objective) -> None:
        """Nothing is held but the step."""

    def step(self, problem: Problem, accept: Callable[[Step], bool] | None = None) -> Step:
        """Make one step along the gradient of the batch."""
        gradient = problem.gradient()
        self.oracle_calls += 1
        report = problem.step
        square = float(sum(float(g.double().square().sum()) for g in gradient.values()))
        report.gradient_norm = torch.tensor(square).sqrt()
        if accept is not None and not accept(report):
            report.skipped = True
            return report
        if square > 0:
            if self.begun:
                self.search.size *= self.search.growth ** (1 / self.steps_per_epoch)
            self.begun = True
            value = float(problem.latest_value)
            noise = 4 * torch.finfo(next(iter(gradient.values())).dtype).eps * abs(value)
            parameters = [problem.parameters[n] for n in gradient]
            self.search.search(
                lambda: float(problem.value()), parameters, list(gradient.values()), value, square, noise
            )
            self.forwards += self.search.trials
        return report

    def minimize(self, problem: Problem, tolerance: float = 1e-6, iterations: int = 1000) -> Certificate:
        """Repeat steps on one problem until the gradient's norm is within `tolerance`."""
        history: list[float] = []
        done, residual = 0, math.inf

        def more(report: Step) -> bool:
            assert report.gradient_norm is not None
            return done < iterations and float(report.gradient_norm) > tolerance

        while True:
            fresh = problem.fresh()
            report = self.step(fresh, more)
            history.append(float(fresh.latest_value))
            if report.skipped or not report.gradient_norm:
                residual = 0.0 if report.gradient_norm is None else float(report.gradient_norm)
                break
            done += 1
        status = (
            "converged"
            if residual <= tolerance
            else f"stopped after {done} iterations with gradient norm {residual:.3g}"
        )
        if residual > tolerance:
            warnings.warn(f"sls: {status}; {tolerance:.3g} was asked for.", PoiseWarning, stacklevel=2)
        return Certificate(history[-1], residual, tolerance, "gradient norm", done, status, history=tuple(history))

    def state_dict(self) -> dict[str, Any]:
        return {"size": self.search.size, "begun": self.begun, "counters": [self.oracle_calls, self.forwards]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.search.size, self.begun = float(state["size"]), bool(state["begun"])
        self.oracle_calls, self.forwards = (int(c) for c in state["counters"])

    def __repr__(self) -> str:
        return f"sls(lr={self.lr}, c={self.search.c})"
