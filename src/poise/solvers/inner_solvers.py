"""Minimise a surrogate over the parameters, in a given number of cheap steps.

    gd       gradient descent; every step is searched (Armijo)
    NAME     an optimiser of `torch.optim` by name ("sgd", "adam", "adagrad", ...), a class, or a function parameters -> optimiser
    lbfgs    torch's L-BFGS with a strong Wolfe search
    exact    the closed form of a linear model

They move the parameters in place and begin with a gradient that is there already, since the surrogate's first gradient is that of the
objective, which the oracle gave.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from poise.errors import InputError, nearest
from poise.solvers.torch_optimizers import _NAMES, TorchOptimizer

__all__ = [
    "Exact",
    "GradientDescent",
    "Inner",
    "InnerLBFGS",
    "InnerOptimizer",
    "InnerRun",
    "SearchedStep",
    "inner_solver",
]


class Smooth(Protocol):
    """What an inner solver sees of a surrogate."""

    parameters: list[nn.Parameter]
    start_value: float

    def start_gradient(self) -> list[Tensor]:
        """Return the gradient where the surrogate was made."""
        ...

    def evaluate(self) -> float:
        """Return the value where the parameters are."""
        ...

    def gradient(self) -> list[Tensor]:
        """Return the gradient of the evaluation before."""
        ...

    def solve(self) -> None:
        """Move the parameters to the minimum, where a closed form exists."""
        ...


@dataclass
class InnerRun:
    """What an inner solver did: steps made, and the surrogate's value at the end where it is known without another forward pass."""

    steps: int
    value: float | None
    stopped: str = ""


class Inner(Protocol):
    """Minimises a surrogate from where the parameters are."""

    def bind(self, parameters: Sequence[Tensor]) -> None: ...

    def run(self, surrogate: Smooth, steps: int) -> InnerRun: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class SearchedStep:
    """A step size that is searched by Armijo's rule: the largest `a` of a geometric grid with `f(x - a g) <= f(x) - c a |g|^2`.

    Args:
        first: the step that is tried first of all.
        c, backtrack, growth: sufficient decrease, ratio of the grid, and factor between a step and the first trial of the next search.
        floor: smallest step.

    A parabola through value, slope and trial says how far down the grid to go, so that a quadratic costs two trials.
    """

    def __init__(
        self, first: float = 10.0, c: float = 0.5, backtrack: float = 0.9, growth: float = 1.8, floor: float = 1e-12
    ) -> None:
        if not (first > 0 and 0 < c < 1 and 0 < backtrack < 1 and growth >= 1):
            raise InputError(
                f"A searched step needs a first step above 0, 0 < c < 1, 0 < backtrack < 1 and growth >= 1; they are {first}, {c}, "
                f"{backtrack} and {growth}."
            )
        self.first, self.c, self.backtrack, self.growth, self.floor = first, c, backtrack, growth, floor
        self.size = first
        self.trials = 0

    def search(
        self,
        evaluate: Callable[[], float],
        parameters: Sequence[Tensor],
        gradient: Sequence[Tensor],
        value: float,
        square: float,
        noise: float,
    ) -> float | None:
        """Move the parameters along minus the gradient; return the value there, or None where no step decreases it and nothing moved."""
        before = [p.detach().clone() for p in parameters]
        self.trials = 0
        for _ in range(100):
            _place(parameters, before, gradient, -self.size)
            self.trials += 1
            trial = evaluate()
            if math.isfinite(trial) and trial <= value - self.c * self.size * square + noise:
                return trial
            self.size *= self.backtrack ** self._notches(value, trial, square)
            if self.size < self.floor:
                break
        _place(parameters, before, gradient, 0.0)
        self.size = max(self.size, self.floor)
        return None

    def _notches(self, value: float, trial: float, square: float) -> int:
        """Return how many grid points the parabola rules out; 1 at least."""
        rise = trial - value + self.size * square
        if not (math.isfinite(rise) and rise > 0):
            return 20 if not math.isfinite(trial) else 1
        # f(x - a g) = f - a s + k a^2 with k a^2 = rise; Armijo holds up to a = (1 - c) s / k.
        largest = (1 - self.c) * self.size**2 * square / rise
        if not 0 < largest < self.size:
            return 1
        return max(1, math.ceil(math.log(largest / self.size) / math.log(self.backtrack) - 1e-9))


class GradientDescent:
    """Gradient descent with a searched step.

    Args:
        step: see `SearchedStep`; it grows by `growth` between outer steps and by one notch of the grid between inner ones.
        reset: begin every outer step with the first step again, as the authors do.
        tol: gradient norm at which the inner steps end.
    """

    def __init__(self, step: SearchedStep, reset: bool = False, tol: float = 1e-6) -> None:
        self.search, self.reset, self.tol = step, reset, tol
        self._begun = False

    def bind(self, parameters: Sequence[Tensor]) -> None:
        """Nothing is held but the step."""

    def run(self, surrogate: Smooth, steps: int) -> InnerRun:
        search = self.search
        search.size = search.first if self.reset or not self._begun else search.growth * search.size
        self._begun = True
        value, g = surrogate.start_value, surrogate.start_gradient()
        for k in range(steps):
            square = float(sum(float(part.double().square().sum()) for part in g))
            if math.sqrt(square) <= self.tol:
                return InnerRun(k, value, "gradient")
            noise = 4 * torch.finfo(g[0].dtype).eps * abs(value)
            if k:
                search.size /= search.backtrack
            found = search.search(surrogate.evaluate, surrogate.parameters, g, value, square, noise)
            if found is None:
                return InnerRun(k, value, "no step decreases the surrogate")
            value = found
            if k + 1 < steps:
                g = surrogate.gradient()
        return InnerRun(steps, value)

    def state_dict(self) -> dict[str, Any]:
        return {"size": self.search.size, "begun": self._begun}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.search.size, self._begun = float(state["size"]), bool(state["begun"])


class InnerOptimizer:
    """An optimiser of PyTorch, whose state goes on from one surrogate to the next.

    Args:
        make: `parameters -> optimiser`.
        reset: begin with a new one in every outer step.
    """

    def __init__(self, make: Callable[[Sequence[Tensor]], torch.optim.Optimizer], reset: bool = False) -> None:
        self.make, self.reset = make, reset
        self.optimizer: torch.optim.Optimizer | None = None

    def bind(self, parameters: Sequence[Tensor]) -> None:
        self.optimizer = self.make(list(parameters))

    def _held(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        held = self.optimizer
        same = held is not None and [id(p) for group in held.param_groups for p in group["params"]] == [
            id(p) for p in parameters
        ]
        if self.reset or not same:
            self.bind(parameters)
        assert self.optimizer is not None
        return self.optimizer

    def run(self, surrogate: Smooth, steps: int) -> InnerRun:
        optimizer = self._held(surrogate.parameters)
        g = surrogate.start_gradient()
        for k in range(steps):
            if k:
                surrogate.evaluate()
                g = surrogate.gradient()
            for p, part in zip(surrogate.parameters, g, strict=True):
                p.grad = part
            optimizer.step()
        for p in surrogate.parameters:
            p.grad = None
        return InnerRun(steps, None)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.optimizer is None else {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "optimizer" in state:
            if self.optimizer is None:
                raise InputError(
                    "The solver is not bound to a model yet: call bind(model, objective) before load_state_dict."
                )
            self.optimizer.load_state_dict(state["optimizer"])


class InnerLBFGS:
    """Torch's L-BFGS, new for every surrogate: its curvature pairs are those of one function."""

    def __init__(self, tol: float = 1e-6, history: int = 20) -> None:
        self.tol, self.history = tol, history

    def bind(self, parameters: Sequence[Tensor]) -> None:
        """Nothing is held between surrogates."""

    def run(self, surrogate: Smooth, steps: int) -> InnerRun:
        parameters = list(surrogate.parameters)
        optimizer = torch.optim.LBFGS(
            parameters, max_iter=steps, history_size=self.history, tolerance_grad=self.tol, tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )  # fmt: skip
        fresh = True

        def closure() -> float:
            nonlocal fresh
            value = surrogate.start_value if fresh else surrogate.evaluate()
            g = surrogate.start_gradient() if fresh else surrogate.gradient()
            fresh = False
            for p, part in zip(parameters, g, strict=True):
                p.grad = part
            return value

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        for p in parameters:
            p.grad = None
        made = int(optimizer.state[parameters[0]].get("n_iter", 0))
        return InnerRun(made, None)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to take back."""


class Exact:
    """The closed form of a linear model."""

    def bind(self, parameters: Sequence[Tensor]) -> None:
        """Nothing is held."""

    def run(self, surrogate: Smooth, steps: int) -> InnerRun:
        surrogate.solve()
        return InnerRun(1, None)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to take back."""


def inner_solver(
    inner: Any,
    lr: float | None = None,
    options: Mapping[str, Any] | None = None,
    reset: bool = False,
    tol: float = 1e-6,
) -> Inner:
    """Return an inner solver: "gd", "lbfgs", "exact", an optimiser's name or class, or a function `parameters -> optimiser`.

    Args:
        lr: its step; of "gd" the first that is tried, 10 where nothing is said.
        options: its further options.

    Raises:
        InputError: it is not known, or takes no such option.
    """
    given = dict(options or {})
    if isinstance(inner, str):
        name = {"gd-armijo": "gd", "l-bfgs": "lbfgs"}.get(inner.lower(), inner.lower())
        if name == "gd":
            return GradientDescent(SearchedStep(**({} if lr is None else {"first": lr}), **given), reset, tol)
        if name in ("lbfgs", "exact") and lr is not None:
            raise InputError(f"target_surrogate: inner={name!r} finds its own step, so inner_lr={lr} would be ignored.")
        if name == "lbfgs":
            return InnerLBFGS(tol, **given)
        if name == "exact":
            return Exact()
        if name not in _NAMES:
            known = ["gd", "exact", *_NAMES]
            raise InputError(
                f"target_surrogate: there is no inner solver {inner!r}."
                + (nearest(name, known) or f" There are: {', '.join(known)}; or a function parameters -> optimiser.")
            )
    if isinstance(inner, str | type):
        if lr is not None:
            given["lr"] = lr
        prepared = TorchOptimizer(inner, **given)
        return InnerOptimizer(lambda parameters: prepared.maker(list(parameters), **prepared.options), reset)
    if not callable(inner) or given or lr is not None:
        raise InputError(
            "target_surrogate: inner is a name, a class of torch.optim, or a function parameters -> optimiser, which takes no further "
            f"options; it is {inner!r}."
        )
    return InnerOptimizer(inner, reset)


def _place(parameters: Sequence[Tensor], at: Sequence[Tensor], direction: Sequence[Tensor], step: float) -> None:
    with torch.no_grad():
        for p, x, d in zip(parameters, at, direction, strict=True):
            torch.add(x, d, alpha=step, out=p.data) if step else p.data.copy_(x)
