"""Every optimiser of `torch.optim`, and Lion, as a solver, given by name, with its options, or as an object."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from poise.call_text import parse_call
from poise.errors import IncompatibleError, InputError, nearest
from poise.objective import Objective
from poise.parameter_groups import asked_for
from poise.problem import Certificate, Problem, Step
from poise.solvers.projection import follow_requests

_NAMES = {
    "adadelta": "Adadelta",
    "adagrad": "Adagrad",
    "adam": "Adam",
    "adamax": "Adamax",
    "adamw": "AdamW",
    "asgd": "ASGD",
    "lbfgs": "LBFGS",
    "lion": "poise.solvers.lion:Lion",
    "nadam": "NAdam",
    "radam": "RAdam",
    "rmsprop": "RMSprop",
    "rprop": "Rprop",
    "sgd": "SGD",
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.02, "momentum": 0.9},
    # PyTorch's own tolerances stop before a certificate at 1e-6 is reached.
    "lbfgs": {"lr": 1.0, "line_search_fn": "strong_wolfe", "tolerance_grad": 1e-9, "tolerance_change": 1e-14},
}
AT_ONCE = ("block_coordinate", "coordinate", "normal_equations")
"""Solvers of `poise.solve` that have no step of training."""
NAMED = {
    "compositional": "poise.solvers.compositional:Compositional",
    "half_fine_tuning": "poise.solvers.half_fine_tuning:HalfFineTuning",
    "newton": "poise.solvers.newton:GradientNormalizedNewton",
    "proximal": "poise.solvers.proximal:ProximalGradient",
    "sls": "poise.solvers.stochastic_line_search:StochasticLineSearch",
    "target_surrogate": "poise.solvers.target_surrogate:TargetSurrogate",
}
"""Solvers of the library's own that text may name, and where each is defined."""
Groups = Callable[[nn.Module], Iterable[dict[str, Any]]]


class TorchOptimizer:
    """A `torch.optim` optimiser as a solver.

    Modules that say how their weights are projected (`project_()`, as an `ICNN` does) are projected after every step.

    Args:
        optimizer: a name ("sgd", "adamw", "lion", ...), a class, or an object that holds its parameters already.
        clip: largest Euclidean norm of the gradient; a longer one is scaled down to it. None leaves it.
        parameter_groups: makes the optimiser's groups from the model; by default all trained parameters in one, but for those
            whose module asks for a slower or undecayed group (see `poise.parameter_groups`).
        options: the optimiser's own, such as `lr=3e-4, weight_decay=0.01`. Without `lr`, SGD takes 0.02 with momentum 0.9,
            L-BFGS 1.0 with a strong Wolfe line search, the others PyTorch's default.

    Raises:
        InputError: the name, or an option, is not known.

    >>> TorchOptimizer("adamw", lr=1e-3).name
    'adamw'
    """

    def __init__(
        self,
        optimizer: str | type[torch.optim.Optimizer] | torch.optim.Optimizer = "sgd",
        *,
        clip: float | None = None,
        parameter_groups: Groups | None = None,
        **options: Any,
    ) -> None:
        self.clip, self.parameter_groups = clip, parameter_groups
        self.optimizer: torch.optim.Optimizer | None = None
        self.options: dict[str, Any] = {}
        self.requests: Any = None
        if isinstance(optimizer, torch.optim.Optimizer):
            self.optimizer, self.maker = optimizer, type(optimizer)
            if options:
                raise InputError("An optimiser that holds its parameters already takes no further options.")
        elif isinstance(optimizer, str):
            name = optimizer.lower()
            if name not in _NAMES:
                if name in AT_ONCE:
                    raise IncompatibleError(
                        f"{name} solves a linear model at once and makes no steps of training: poise.solve(formula, data, "
                        f"solver={name!r}), or `poise solve`. To train a model with a penalty that has corners use solver='proximal'."
                    )
                raise InputError(
                    f"There is no optimiser {optimizer!r}."
                    + (nearest(name, [*_NAMES, *NAMED]) or f" There are: {', '.join([*_NAMES, *NAMED])}.")
                )
            module, _, attribute = _NAMES[name].rpartition(":")
            self.maker = getattr(importlib.import_module(module or "torch.optim"), attribute)
        else:
            self.maker = optimizer
        self.name = self.maker.__name__.lower()
        if self.optimizer is None:
            self.options = {**_DEFAULTS.get(self.name, {}), **options}
            known = inspect.signature(self.maker).parameters
            for option in self.options:
                if option not in known and not any(p.kind == p.VAR_KEYWORD for p in known.values()):
                    raise InputError(f"{self.maker.__name__} has no option {option!r}." + nearest(option, known))
        # A line search and its curvature pairs compare values with gradients, so each must be that of the other.
        self.closure = issubclass(self.maker, torch.optim.LBFGS)
        self.needs = frozenset({"potential"}) if self.closure else frozenset()

    def bind(self, model: nn.Module, objective: Objective) -> None:
        """Make the optimiser over the model's parameters and the objective's own, and do at its steps what the model asks for."""
        self._make(model, objective)
        if self.requests is not None:  # of a fit before this one
            self.requests.remove()
        self.requests = follow_requests(model, self._bound())

    def _make(self, model: nn.Module, objective: Objective) -> None:
        if self.optimizer is not None:
            held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
            for group in objective.parameter_groups():
                fresh = [p for p in group["params"] if id(p) not in held]
                if fresh:
                    self.optimizer.add_param_group({"params": fresh, "maximize": group["maximize"]})
            return
        if self.parameter_groups is not None:
            groups = list(self.parameter_groups(model))
        else:
            defaults = inspect.signature(self.maker).parameters
            rate, decay = (
                self.options.get(k, getattr(defaults.get(k), "default", 0.0)) for k in ("lr", "weight_decay")
            )
            groups = asked_for(model, rate, decay)
        own = [{"params": g["params"], "maximize": g["maximize"]} for g in objective.parameter_groups()]
        if not any(group["params"] for group in [*groups, *own]):
            raise InputError("Nothing is trained: no parameter of the model requires a gradient.")
        if self.closure:
            groups = [{"params": [p for group in [*groups, *own] for p in group["params"]]}]
            own = []
        try:
            self.optimizer = self.maker([*groups, *own], **self.options)
        except InputError:
            raise
        except (ValueError, TypeError) as error:
            raise InputError(f"{self.maker.__name__}: {error}") from None

    def _bound(self) -> torch.optim.Optimizer:
        if self.optimizer is None:
            raise InputError("The solver is not bound to a model yet: call bind(model, objective).")
        return self.optimizer

    def step(self, problem: Problem, accept: Callable[[Step], bool] | None = None) -> Step:
        """Make one step of the optimiser; see `Solver.step`."""
        optimizer = self._bound()
        norm = self._place(problem)
        problem.step.gradient_norm = norm
        if accept is not None and not accept(problem.step):
            problem.step.skipped = True
        elif self.closure:
            optimizer.step(_Closure(self, problem))
        else:
            optimizer.step()
        # The next gradient is new memory: the old one goes first.
        for parameter in problem.parameters.values():
            parameter.grad = None
        return problem.step

    def _place(self, problem: Problem) -> Tensor | None:
        """Put the gradient of the problem where the optimiser looks for it."""
        gradient = problem.gradient()
        for name, parameter in problem.parameters.items():
            parameter.grad = gradient.get(name)
        if self.clip is None:
            return None
        return nn.utils.clip_grad_norm_([p for p in problem.parameters.values() if p.grad is not None], self.clip)

    def minimize(self, problem: Problem, tolerance: float = 1e-6, iterations: int = 1000) -> Certificate:
        """Repeat steps on one problem until the gradient's norm is within `tolerance`.

        Args:
            tolerance: Euclidean norm of the gradient that is asked for.
            iterations: steps at most.
        """
        if self.optimizer is None:
            self.bind(problem.model, problem.objective)
        history: list[float] = []
        for done in range(iterations + 1):
            gradient = problem.gradient()
            residual = float(
                torch.sqrt(sum((g.double().square().sum() for g in gradient.values()), start=torch.zeros(())))
            )
            history.append(float(problem.latest_value))
            if residual <= tolerance or done == iterations:
                break
            self.step(problem)
        reached = residual <= tolerance
        status = "converged" if reached else f"stopped after {iterations} iterations with gradient norm {residual:.3g}"
        return Certificate(history[-1], residual, tolerance, "gradient norm", done, status, history=tuple(history))

    def state_dict(self) -> dict[str, Any]:
        return self._bound().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._bound().load_state_dict(state)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.options.items())})"


class _Closure:
    """What L-BFGS calls: the first call uses the gradient that is there already."""

    def __init__(self, solver: TorchOptimizer, problem: Problem) -> None:
        self.solver, self.problem, self.fresh = solver, problem, True

    def __call__(self) -> float:
        if self.fresh:
            self.fresh = False
            return float(self.problem.step.value)
        self.solver._place(self.problem)
        return float(self.problem.latest_value)


def parse_solver(text: str) -> tuple[str, dict[str, Any]]:
    """Read a solver's name with its options: `"adamw"`, `"adamw(weight_decay=0.1)"`, `"half_fine_tuning(level='layer')"`.

    Raises:
        FormulaError: there are options, and they are no literals or the name is unknown.
    """
    if "(" not in text:
        return text.strip().lower(), {}
    return parse_call(text, [*_NAMES, *NAMED], "solver", "adamw(weight_decay=0.1)")


def as_solver(solver: Any, **options: Any) -> Any:
    """Return a solver: one as it is, a `torch.optim` optimiser, class or name wrapped, or one of the library's own by name.

    Args:
        solver: where it is text, a name out of `torch.optim` or `NAMED`, alone or with options: `"half_fine_tuning(level='layer')"`.
        options: further options.

    Raises:
        InputError: the name or an option is not known, or an option is given twice.

    >>> as_solver("half_fine_tuning(level='layer')", lr=1e-3)
    half_fine_tuning(adamw(lr=0.001), level='layer', ratio=0.5, redraw='phase', state='reset')
    """
    if hasattr(solver, "step") and hasattr(solver, "needs"):
        return solver
    if not isinstance(solver, str):
        return TorchOptimizer(solver, **options)
    name, said = parse_solver(solver)
    twice = sorted(said.keys() & options.keys())
    if twice:
        raise InputError(f"{solver!r} says {', '.join(twice)}, which is given beside it too: say it once.")
    if name not in NAMED:
        return TorchOptimizer(name if said else solver, **said, **options)
    module, _, attribute = NAMED[name].partition(":")
    return getattr(importlib.import_module(module), attribute)(**said, **options)


def _named(name: str) -> Callable[..., TorchOptimizer]:
    def make(**options: Any) -> TorchOptimizer:
        return TorchOptimizer(name, **options)

    make.__name__ = _NAMES[name]
    make.__doc__ = f"`torch.optim.{_NAMES[name]}` as a solver, without parameters; options as there, and `clip`, `parameter_groups`."
    return make


SGD, Adam, AdamW, LBFGS, RMSprop = (_named(n) for n in ("sgd", "adam", "adamw", "lbfgs", "rmsprop"))
