"""Minimise functions of expectations: an average of gradients on top of the terms' averages of means.

    u_t = (1 - gamma) u_{t-1} + gamma g_t          the inner average, in the term (`unnormalized_nll`, `function_of_means`)
    v_t = (1 - beta) v_{t-1} + beta G_t            the average of gradients, here; G_t is taken with u_t
    theta <- theta - eta v_t                       or any optimiser of PyTorch that is fed with v_t

With `variance_reduction` both averages follow the parameters without lag (STORM), at the price of the gradient at the last parameters:

    v_t = (1 - beta) (v_{t-1} - G_t(theta_{t-1}, u_{t-1})) + G_t(theta_t, u_t)

With stages, eta, gamma and beta fall together from stage to stage, and stages grow longer: the schedule under which the rate is
1/(mu^2 epsilon) for objectives of the Polyak-Lojasiewicz kind. Source: arXiv:2306.07485; STORM, arXiv:1905.10018.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import InputError
from poise.inner_average import averages_of
from poise.objective import Objective
from poise.problem import OWN, Certificate, ModelView, Problem, Step
from poise.quantities import Quantities
from poise.solvers.torch_optimizers import TorchOptimizer

__all__ = ["Compositional", "stage_of"]

PREVIOUS = "previous_"
"""Prefix of quantities at the parameters of the step before."""


def stage_of(step: int, first: int, growth: float) -> int:
    """Return the stage of a step, from 0; stage k has round(first * growth^k) steps, at least 1.

    >>> [stage_of(t, 2, 2.0) for t in range(8)]
    [0, 0, 1, 1, 1, 1, 2, 2]
    """
    stage, end = 0, max(1, first)
    while step >= end:
        stage += 1
        end += max(1, round(first * growth**stage))
    return stage


class Compositional(TorchOptimizer):
    """Stochastic compositional optimisation over an optimiser of PyTorch; by name `"compositional(grad_momentum=0.1)"`.

    Args:
        inner_momentum: gamma of every term of the objective that keeps an inner average; None leaves each its own.
        grad_momentum: beta, the share of the new gradient in the average, in (0, 1]; 1 averages nothing.
        optimizer: what is fed with the average: a name or a class; its own momentum is off for SGD.
        variance_reduction: STORM instead of plain averages of gradients. Three passes through the model a step instead of one; terms read
            `previous_...` quantities where they say `variance_reduction=True` themselves.
        stage_steps: steps of the first stage; None has no stages.
        stage_factor: what a stage multiplies eta, gamma and beta by, in (0, 1].
        stage_growth: how much longer each stage is than the one before, >= 1.
        clip: largest Euclidean norm of a gradient before it enters the average; None leaves it.
        options: the optimiser's own, such as `lr`.

    Raises:
        InputError: an argument out of range, or an optimiser that evaluates several times a step.

    >>> Compositional(grad_momentum=0.1, lr=0.05)
    compositional(sgd(lr=0.05, momentum=0.0), grad_momentum=0.1)

    Source: Jiang et al., arXiv:2306.07485, algorithms 1 and 2.
    """

    def __init__(
        self,
        inner_momentum: float | None = None,
        grad_momentum: float = 0.1,
        optimizer: str | type[torch.optim.Optimizer] = "sgd",
        *,
        variance_reduction: bool = False,
        stage_steps: int | None = None,
        stage_factor: float = 0.5,
        stage_growth: float = 2.0,
        clip: float | None = None,
        **options: Any,
    ) -> None:
        if isinstance(optimizer, torch.optim.Optimizer):
            raise InputError("compositional: optimizer is a name or a class; it is made when the model is known.")
        for name, share in (("inner_momentum", inner_momentum), ("grad_momentum", grad_momentum)):
            if share is not None and not 0 < share <= 1:
                raise InputError(
                    f"compositional: {name} is the share of the new batch in an average, in (0, 1]; got {share}."
                )
        if stage_steps is not None and stage_steps < 1:
            raise InputError(f"compositional: stage_steps is a number of steps, at least 1; got {stage_steps}.")
        if not 0 < stage_factor <= 1 or not stage_growth >= 1:
            raise InputError(
                f"compositional: stage_factor lies in (0, 1] and stage_growth is at least 1; got {stage_factor} and {stage_growth}."
            )
        if optimizer in ("sgd", "SGD", torch.optim.SGD):
            options.setdefault("momentum", 0.0)
        super().__init__(optimizer, clip=clip, **options)
        if self.closure:
            raise InputError(
                f"compositional: {self.name} evaluates several times a step, and an average needs one gradient a step. Use 'sgd' or 'adam'."
            )
        self.inner_momentum, self.grad_momentum = inner_momentum, grad_momentum
        self.variance_reduction = variance_reduction
        self.stage_steps, self.stage_factor, self.stage_growth = stage_steps, stage_factor, stage_growth
        self.steps = 0
        self.averaged: dict[str, Tensor] = {}
        """v by parameter name."""
        self.before: dict[str, Tensor] = {}
        """The parameters of the step before by name, where variance is reduced."""

    @property
    def factor(self) -> float:
        """What the stage of the next step multiplies eta, gamma and beta by."""
        if self.stage_steps is None:
            return 1.0
        return float(self.stage_factor ** stage_of(self.steps, self.stage_steps, self.stage_growth))

    def bind(self, model: nn.Module, objective: Objective) -> None:
        """Make the optimiser, and hand gamma to the terms that keep an inner average."""
        super().bind(model, objective)
        self.steps, self.averaged, self.before = 0, {}, {}
        if self.inner_momentum is not None:
            for average in averages_of(objective):
                average.gamma = self.inner_momentum

    def step(self, problem: Problem, accept: Callable[[Step], bool] | None = None) -> Step:
        """Make one step; see `Solver.step`."""
        optimizer, factor = self._bound(), self.factor
        averages = averages_of(problem.objective)
        for average in averages:
            average.factor = factor
        gradient, moved = self._gradients(problem, min(1.0, self.grad_momentum * factor))
        problem.step.gradient_norm = None if self.clip is None else _norm(gradient)
        for name, parameter in problem.parameters.items():
            parameter.grad = moved.get(name)
        if accept is not None and not accept(problem.step):
            problem.step.skipped = True
        else:
            if self.variance_reduction:
                self.before = {n: p.detach().clone() for n, p in problem.parameters.items()}
            self.averaged, self.steps = moved, self.steps + 1
            with _scaled(optimizer, factor):
                optimizer.step()
        for parameter in problem.parameters.values():
            parameter.grad = None
        return problem.step

    def _gradients(self, problem: Problem, beta: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the gradient of this step, and the average that the optimiser is fed with."""
        if self.variance_reduction:
            # It stays with the problem, so that whoever looks at the step again finds the same quantities.
            problem.readout = _with_previous(problem.readout, self.before)
        gradient = self._clipped(problem.gradient())
        correction: Mapping[str, Tensor] = {}
        if self.variance_reduction and self.averaged and beta < 1:
            correction = self._at_last_parameters(problem)
        moved = {}
        for name, g in gradient.items():
            v = self.averaged.get(name)
            if v is None or beta == 1:
                moved[name] = g
            elif name in correction:
                moved[name] = (1 - beta) * (v - correction[name]) + g
            else:
                moved[name] = torch.lerp(v, g, beta)
        return gradient, moved

    def _at_last_parameters(self, problem: Problem) -> dict[str, Tensor]:
        """Return G_t(theta_{t-1}, u_{t-1}): the gradient of this step's batch where the parameters and averages were before."""
        readout, problem.readout = problem.readout, _with_previous(problem.readout, {})
        averages = averages_of(problem.objective)
        for average in averages:
            average.held = True
        try:
            with _swapped(problem.parameters, self.before):
                return self._clipped(problem.gradient(at=problem_point(self.before)))
        finally:
            problem.readout = readout
            for average in averages:
                average.held = False

    def _clipped(self, gradient: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.clip is None:
            return gradient
        scale = (self.clip / (_norm(gradient) + 1e-6)).clamp(max=1.0)
        return {name: g * scale for name, g in gradient.items()}

    def minimize(self, problem: Problem, tolerance: float = 1e-6, iterations: int = 1000) -> Certificate:
        """Repeat steps on one problem, its terms' averages moving along, until the gradient's norm is within `tolerance`.

        Args:
            tolerance: Euclidean norm of the gradient that is asked for.
            iterations: steps at most.
        """
        if self.optimizer is None:
            self.bind(problem.model, problem.objective)
        history: list[float] = []
        for done in range(iterations + 1):
            again = problem.fresh()
            residual = float(_norm(again.gradient()))
            history.append(float(again.latest_value))
            if residual <= tolerance or done == iterations:
                break
            again = problem.fresh()
            again.record = True
            self.step(again)
            problem.objective.advance()
        reached = residual <= tolerance
        status = "converged" if reached else f"stopped after {iterations} iterations with gradient norm {residual:.3g}"
        return Certificate(history[-1], residual, tolerance, "gradient norm", done, status, history=tuple(history))

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": super().state_dict(),
            "steps": self.steps,
            "averaged": self.averaged,
            "before": self.before,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state["optimizer"])
        self.steps = state["steps"]
        self.averaged, self.before = ({n: v.clone() for n, v in state[key].items()} for key in ("averaged", "before"))

    def __repr__(self) -> str:
        own = [f"grad_momentum={self.grad_momentum}"]
        own += [f"inner_momentum={self.inner_momentum}"] if self.inner_momentum is not None else []
        own += ["variance_reduction=True"] if self.variance_reduction else []
        if self.stage_steps is not None:
            own += [
                f"stage_steps={self.stage_steps}, stage_factor={self.stage_factor}, stage_growth={self.stage_growth}"
            ]
        return f"compositional({super().__repr__()}, {', '.join(own)})"


def problem_point(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the model's parameters of a point, without the objective's own."""
    return {name: value for name, value in parameters.items() if not name.startswith(OWN)}


def _with_previous(readout: Any, before: Mapping[str, Tensor]) -> Any:
    if isinstance(readout, Mapping):
        return {stream: _with_previous(each, before) for stream, each in readout.items()}
    return _Previous(readout.readout if isinstance(readout, _Previous) else readout, before)


class _Previous:
    """A readout that also offers quantities at the parameters of the step before, on the same draws, as `previous_...`.

    Args:
        readout: the run's own.
        before: those parameters by name; where there are none (the first step, or an evaluation there), both are the same.
    """

    def __init__(self, readout: Any, before: Mapping[str, Tensor]) -> None:
        self.readout, self.before = readout, problem_point(before)
        self.output = readout.output

    def __call__(self, model: ModelView, batch: Quantities, reads: frozenset[str]) -> Quantities:
        asked = [name for name in reads if name.startswith(PREVIOUS) and name not in batch]
        batch = self.readout(model, batch, reads | {name.removeprefix(PREVIOUS) for name in asked})
        if not asked:
            return batch
        earlier = batch if not self.before else self._earlier(model, batch, asked)
        for name in asked:
            batch.offer(name, lambda name=name: earlier[name.removeprefix(PREVIOUS)].detach())  # type: ignore[misc]
        return batch

    def _earlier(self, model: ModelView, batch: Quantities, asked: list[str]) -> Quantities:
        with torch.no_grad():
            # The same key draws the same noise and the same dropout masks.
            given = {name: batch[name] for name in batch.given}
            fresh = Quantities(given, key=batch.key, device=batch.device)
            at = {**dict(model.module.named_parameters()), **dict(model.at or {}), **self.before}
            at |= {name: b.clone() for name, b in model.module.named_buffers()}
            view = ModelView(model.module, at, model.autocast)
            found: Quantities = self.readout(view, fresh, frozenset(name.removeprefix(PREVIOUS) for name in asked))
            return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.readout, name)


@contextmanager
def _swapped(parameters: Mapping[str, nn.Parameter], before: Mapping[str, Tensor]) -> Iterator[None]:
    """Put the objective's own parameters, which no evaluation replaces by name, back to the step before for a while."""
    own = {name: p for name, p in parameters.items() if name.startswith(OWN) and name in before}
    kept = {name: p.detach().clone() for name, p in own.items()}
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(before[name])
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(kept[name])


@contextmanager
def _scaled(optimizer: torch.optim.Optimizer, factor: float) -> Iterator[None]:
    """Multiply the learning rates for one step, so that a schedule of their own stays what it is."""
    if factor == 1:
        yield
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * factor
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def _norm(gradient: Mapping[str, Tensor]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradient.values()]))
    return norm
