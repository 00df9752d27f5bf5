"""Whether the constraints of an objective hold: curves of a run, the finding at its end, and bounds tightened on validation.

A run with constraints records, at every point of its log,

    constraint/<label>/violation      mean over the steps since the last point; positive is infeasible
    constraint/<label>/multiplier     the dual variable

and, once at its end, `constraint/<label>/feasible` (1 or 0) and `constraint/<label>/final_violation`, over the last tenth of the steps:
a multiplier that stands still does so on average, and a single batch says little.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poise.errors import InputError, PoiseWarning, nearest
from poise.objective import Objective
from poise.run import FitState, History
from poise.weights.constraint import Constraint

_TAIL = 0.1
_POINTS = 4
"""Log points that each of two thirds of a run needs before a violation can be said to stand still."""
_RELATIONS = {"upper": "<=", "lower": ">=", "equal": "="}

Curves = Mapping[str, tuple[Sequence[int], Sequence[float]]]


class Feasibility(NamedTuple):
    """What a run found about one constraint.

    Attributes:
        label: the constrained term.
        bound: the bound as it was written, such as "<= 0.5".
        violation: the mean violation over the last tenth of the steps, signed; positive is infeasible.
        tolerance: the violation that is taken for feasible.
        multiplier: the dual variable at the end.
        feasible: whether the violation is within the tolerance.
        hopeless: whether the multiplier grew over the last third of the run while the violation stood still.
    """

    label: str
    bound: str
    violation: float
    tolerance: float
    multiplier: float
    feasible: bool
    hopeless: bool

    @property
    def sentence(self) -> str:
        """The finding in words.

        >>> Feasibility("l2", "<= 2", 0.5, 0.02, 3.0, False, False).sentence
        'l2 <= 2: not feasible: violation 0.5'
        """
        found = "feasible" if self.feasible else f"not feasible: violation {self.violation:.3g}"
        return f"{self.label} {self.bound}: {found}"

    @property
    def warning(self) -> str:
        """What to do where the constraint does not hold; empty where it does."""
        if self.feasible:
            return ""
        if self.hopeless:
            return (
                f"The constraint {self.label} {self.bound} looks infeasible: its multiplier grew to {self.multiplier:.3g} and the "
                f"violation stood still at {self.violation:.3g}. Loosen the bound; if it can be reached, raise the constraint's lr, "
                "so that the multiplier gets there in this run; or end its growth with largest=."
            )
        return (
            f"The constraint {self.label} {self.bound} does not hold at the end of the run: the violation is {self.violation:.3g}, and "
            f"{self.tolerance:.3g} is tolerated. Train longer, or raise the constraint's lr."
        )


def constraints_of(objective: Objective) -> dict[str, Constraint]:
    """Return the constraints of an objective by the label of the first term that they measure."""
    return {label: module for label, module in objective.coefficients.items() if isinstance(module, Constraint)}


def judge_constraints(objective: Objective, history: History | Curves) -> tuple[Feasibility, ...]:
    """Judge every constraint by the curves of a run.

    Args:
        objective: that of the run (`run.objective`).
        history: its curves (`run.history`).

    >>> import poise
    >>> judge_constraints(poise.parse("cross_entropy"), History())
    ()
    """
    curves = history.curves() if isinstance(history, History) else history
    found = []
    for label, module in constraints_of(objective).items():
        steps, violations = curves.get(f"constraint/{label}/violation", ((), ()))
        _, multipliers = curves.get(f"constraint/{label}/multiplier", ((), ()))
        if not steps:
            continue
        # Training may hold a stricter bound; what is judged is the one that was written.
        last = _mean([v for s, v in zip(steps, violations, strict=True) if s > (1 - _TAIL) * steps[-1]]) - float(
            module.margin
        )
        size = abs(last) if module.kind == "equal" else last
        feasible = bool(size <= module.tolerance)
        bound = f"{_RELATIONS[module.kind]} {module.bound:g}"
        found.append(
            Feasibility(
                label,
                bound,
                last,
                module.tolerance,
                float(multipliers[-1]),
                feasible,
                not feasible and _stands_still(violations, multipliers),
            )
        )
    return tuple(found)


def _stands_still(violations: Sequence[float], multipliers: Sequence[float]) -> bool:
    third = len(violations) // 3
    if third < _POINTS:
        return False  # too short a run to tell a bound that cannot be held from one that is not held yet
    before, after = abs(_mean(violations[-2 * third : -third])), abs(_mean(violations[-third:]))
    grown = abs(multipliers[-1]) > 1.05 * abs(multipliers[-third - 1])
    return after > 0.95 * before and grown


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


class ConstraintCurves:
    """A callback of `fit` that records violation and multiplier of every constraint, judges them at the end, and warns by name.

    Args:
        warn: False where whoever runs it says the finding in their own way.
    """

    def __init__(self, warn: bool = True) -> None:
        self.warn = warn
        self._seen: dict[str, list[Tensor]] = {}

    def on_step_end(self, state: FitState) -> None:
        """Keep the step's violation; at a point of the log write the mean of those since the last one."""
        for label, module in constraints_of(state.objective).items():
            self._seen.setdefault(label, []).append(module.violation)
        logged = state.history.steps("loss")[-1:] == [state.step] if "loss" in state.history else False
        if logged and self._seen:
            self._write(state)

    def _write(self, state: FitState) -> None:
        for label, module in constraints_of(state.objective).items():
            name = f"constraint/{label}/violation"
            if name not in state.history or state.history.steps(name)[-1] != state.step:
                state.history.add(name, state.step, float(torch.stack(self._seen[label]).mean()))
                state.history.add(f"constraint/{label}/multiplier", state.step, float(module.multiplier))
        self._seen = {}

    def on_end(self, state: FitState) -> None:
        """Write the finding, and warn where a constraint does not hold."""
        for found in judge_constraints(state.objective, state.history):
            name = f"constraint/{found.label}/feasible"
            if name in state.history:
                continue
            state.history.add(name, state.step, float(found.feasible))
            state.history.add(f"constraint/{found.label}/final_violation", state.step, found.violation)
            if self.warn and found.warning:
                warnings.warn(found.warning, PoiseWarning, stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint between two log points keeps."""
        return {label: torch.stack(values) for label, values in self._seen.items() if values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._seen = {label: list(values) for label, values in state.items()}


def watch(objective: Objective, warn: bool = True) -> list[ConstraintCurves]:
    """Return the callback that records an objective's constraints, or none where it has no constraint."""
    return [ConstraintCurves(warn)] if constraints_of(objective) else []


class TightenOnValidation:
    """A callback of `fit` that holds a bound on validation data by tightening the one that training holds.

        margin <- max(0, margin + rate * (violation on the validation data))        after every validation

    and training holds `g <= upper - margin`. What training meets exactly, new data exceed a little; this finds how much room that
    needs. Source: Cotter et al., arXiv:1807.00028 (the multiplier generalises better where it is moved by data of its own).

    Args:
        label: the constrained term.
        metric: the validation metric that measures the same quantity, in the same units (`valid/<metric>` of the history).
        rate: how fast the margin follows, in (0, 1]; the multiplier needs the steps between several validations to follow it.

    Raises:
        InputError: no constraint has this label, it is an equality, or the metric is not measured.

    >>> callback = TightenOnValidation("error_rate", "error")
    """

    def __init__(self, label: str, metric: str, rate: float = 0.1) -> None:
        if not 0 < rate <= 1:
            raise InputError(f"TightenOnValidation: rate must lie in (0, 1], and it is {rate}.")
        self.label, self.metric, self.rate = label, metric, rate
        self.seen = 0

    def on_begin(self, state: FitState) -> None:
        """Look whether there is something to tighten."""
        known = constraints_of(state.objective)
        if self.label not in known:
            raise InputError(
                f"TightenOnValidation: no constraint is called {self.label!r}; there are: {', '.join(known) or 'none'}."
                + nearest(self.label, known)
            )
        if known[self.label].kind == "equal":
            raise InputError(
                f"TightenOnValidation: {self.label} is held at a value, so no side of it can be tightened."
            )

    def on_step_end(self, state: FitState) -> None:
        """Take a validation that was made within an epoch; it is seen one step later."""
        self._tighten(state)

    def on_epoch_end(self, state: FitState) -> None:
        """Take the validation at the end of the epoch."""
        self._tighten(state)

    def on_end(self, state: FitState) -> None:
        """Say where the metric was never there."""
        if not self.seen:
            offered = ", ".join(k.removeprefix("valid/") for k in state.history if k.startswith("valid/"))
            raise InputError(
                f"TightenOnValidation: no metric is called {self.metric!r}; these are: {offered or 'none'}."
            )

    def _tighten(self, state: FitState) -> None:
        values = state.history.get(f"valid/{self.metric}", [])
        for value in values[self.seen :]:
            module = constraints_of(state.objective)[self.label]
            violation = module.sign * (value - module.bound)
            module.margin = (module.margin + self.rate * violation).clamp_min(0.0)
        self.seen = len(values)

    def state_dict(self) -> dict[str, Any]:
        """Return how many validations were taken."""
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.seen = state["seen"]
