"""What gradient-normalised Newton steps are compared with, on the same functions and to the same certificate.

    gradient_method(function, x)           x <- x - g/L, L found by doubling and halving; fast=True adds Nesterov's momentum
    cubic_newton(function, x)              minimises the model with M/6 |h|^3, M found likewise
    super_universal_newton(function, x)    lambda = H_k |g|^alpha, accepted where <g+, x - x+> >= |g+|^2 / (4 lambda)

Each returns the point, its certificate, and how many gradients and linear systems it took.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise.errors import InputError, NonFiniteError, PoiseWarning
from poise.problem import Certificate
from poise.solvers.curvature import as_curvature
from poise.solvers.newton import as_smooth

__all__ = ["Rival", "cubic_newton", "gradient_method", "super_universal_newton"]

_SEARCH = 60


@dataclass(frozen=True)
class Rival:
    """What a method found.

    Attributes:
        x: the point.
        certificate: with the gradient's norm as residual.
        gradients, solves: how many it took.
    """

    x: Tensor
    certificate: Certificate
    gradients: int
    solves: int


def gradient_method(
    function: Any,
    start: Tensor,
    tolerance: float = 1e-8,
    iterations: int = 10_000,
    *,
    fast: bool = False,
    l0: float = 1.0,
) -> Rival:
    """Gradient descent whose constant `L` is doubled until `f(x) - f(x+) >= |g|^2 / (2 L)` and halved after each step.

    Args:
        function: as `GradientNormalizedNewton.minimize_function` takes it.
        start: float [d].
        tolerance: norm of the gradient.
        iterations: steps at most.
        fast: Nesterov's accelerated method, for convex functions: L only grows, and momentum that points uphill begins anew.
        l0: the first L, above 0.
    """
    run = _Run("gradient method", function, start, tolerance, iterations)
    smoothness, momentum, y = l0, 1.0, run.x
    value, g = run.value, run.g

    def descend(x: Tensor) -> tuple[Tensor, float, Tensor] | None:
        nonlocal smoothness
        for _ in range(_SEARCH):
            trial, found, h = run.at(x - g / smoothness)
            # Within rounding, values say nothing, and the gradients decide.
            enough = found <= value - float(g.dot(g)) / (2 * smoothness)
            if enough or (abs(found - value) <= run.noise and float(h.norm()) <= float(g.norm())):
                return trial, found, h
            smoothness *= 2
        return None

    while run.goes_on():
        step = descend(y)
        if step is None:
            run.status = "the line search failed"
            break
        before, slope = run.x, g
        run.move(*step)
        y, value, g = run.x, run.value, run.g
        if not fast:
            smoothness /= 2
        elif float(slope.dot(run.x - before)) > 0:
            momentum = 1.0  # it points uphill: begin anew
        else:
            # Momentum needs an L that never falls.
            after = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            y, value, g = run.at(run.x + (momentum - 1) / after * (run.x - before))
            momentum = after
    return run.end()


def cubic_newton(
    function: Any,
    start: Tensor,
    tolerance: float = 1e-8,
    iterations: int = 1000,
    *,
    hessian: Any = "exact",
    m0: float = 1.0,
) -> Rival:
    """Newton's method with cubic regularisation: `h` minimises `<g, h> + 1/2 <H h, h> + M/6 |h|^3`.

    `h = -(H + r I)^-1 g` with `r = M |h| / 2`, one equation in `r`, solved in the eigenvectors of H. `M` doubles until the value lies below
    the model, and halves after each step.
    """
    run = _Run("cubic Newton", function, start, tolerance, iterations)
    m = m0
    while run.goes_on():
        matrix = _matrix(run, hessian)
        values, vectors = torch.linalg.eigh(matrix)
        inside = vectors.T @ run.g
        accepted = False
        for _ in range(_SEARCH):
            r = _secular(values, inside, m)
            h = -vectors @ (inside / (values + r))
            run.solves += 1
            size = float(h.norm())
            model = run.value + float(run.g.dot(h)) + 0.5 * float(h.dot(matrix @ h)) + m / 6 * size**3
            trial, value, g = run.at(run.x + h)
            if value <= model or (abs(value - run.value) <= run.noise and float(g.norm()) <= run.norm):
                accepted = True
                break
            m *= 2
        if not accepted:
            run.status = "no step lay below its model"
            break
        m /= 2
        run.move(trial, value, g)
    return run.end()


def super_universal_newton(
    function: Any,
    start: Tensor,
    tolerance: float = 1e-8,
    iterations: int = 1000,
    *,
    hessian: Any = "exact",
    alpha: float = 2 / 3,
) -> Rival:
    """Newton's method with `lambda = H_k |g|^alpha`; `H_k` times 4 until `<g+, x - x+> >= |g+|^2 / (4 lambda)`, and a quarter after.

    Args:
        function, start, tolerance, iterations: see `gradient_method`.
        hessian: the curvature.
        alpha: power of the gradient's norm, in [0, 1]; two thirds suits all degrees of smoothness, one half Lipschitz Hessians.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"super_universal_newton: alpha must be in [0, 1], but it is {alpha}.")
    run = _Run("super-universal Newton", function, start, tolerance, iterations)
    factor = 1.0
    while run.goes_on():
        curvature = as_curvature(run.smooth.curvature(run.x, hessian, run.value, run.g))
        accepted = False
        for _ in range(_SEARCH):
            shift = max(factor * run.norm**alpha, curvature.floor)
            direction = curvature.solve(shift, run.g)
            run.solves += 1
            if direction is not None:
                trial, value, g = run.at(run.x - direction)
                if float(g.dot(direction)) >= float(g.dot(g)) / (4 * shift):
                    accepted = True
                    break
            factor *= 4
        if not accepted:
            run.status = "no shift was accepted"
            break
        factor /= 4
        run.move(trial, value, g)
    return run.end()


class _Run:
    """Where a method stands, and what it has counted."""

    def __init__(
        self, name: str, function: Any | Callable[[Tensor], Tensor], start: Tensor, tolerance: float, iterations: int
    ) -> None:
        self.name, self.tolerance, self.iterations = name, tolerance, iterations
        self.smooth = as_smooth(function)
        self.gradients = self.solves = 0
        self.status = ""
        self.x, self.value, self.g = self.at(start.detach())
        if not (math.isfinite(self.value) and math.isfinite(self.norm)):
            raise NonFiniteError(f"{name}: the value is {self.value} and the gradient's norm {self.norm} at the start.")
        self.history = [self.value]

    def at(self, x: Tensor) -> tuple[Tensor, float, Tensor]:
        self.gradients += 1
        return x, *self.smooth.value_and_gradient(x)

    @property
    def norm(self) -> float:
        return float(torch.linalg.vector_norm(self.g))

    @property
    def noise(self) -> float:
        return 8 * torch.finfo(self.g.dtype).eps * max(map(abs, (self.history[0], self.value)))

    def goes_on(self) -> bool:
        return self.norm > self.tolerance and len(self.history) <= self.iterations

    def move(self, x: Tensor, value: float, g: Tensor) -> None:
        self.x, self.value, self.g = x, value, g
        self.history.append(value)

    def end(self) -> Rival:
        done = len(self.history) - 1
        if self.norm <= self.tolerance:
            status = "converged"
        else:
            status = self.status or f"stopped after {done} steps with gradient norm {self.norm:.3g}"
            warnings.warn(f"{self.name}: {status}; {self.tolerance:.3g} was asked for.", PoiseWarning, stacklevel=3)
        certificate = Certificate(
            self.value, self.norm, self.tolerance, "gradient norm", done, status, history=tuple(self.history)
        )
        return Rival(self.x, certificate, self.gradients, self.solves)


def _matrix(run: _Run, hessian: Any) -> Tensor:
    curvature = as_curvature(run.smooth.curvature(run.x, hessian, run.value, run.g))
    held = getattr(curvature, "matrix", None)
    if isinstance(held, Tensor):
        return held
    return torch.stack([curvature.product(e) for e in torch.eye(len(run.x), dtype=run.x.dtype, device=run.x.device)])


def _secular(values: Tensor, inside: Tensor, m: float) -> float:
    """Return the `r > -min values` at which `r = m/2 |(values + r)^-1 inside|`: bisection in the logarithm of its excess."""
    least = max(0.0, -float(values[0]))
    top = least + math.sqrt(m / 2 * float(inside.norm())) + 1e-300
    low, high = 0.0, top - least
    for _ in range(200):
        middle = (low + high) / 2
        r = least + middle
        if m / 2 * float((inside / (values + r)).norm()) > r:
            low = middle
        else:
            high = middle
        if high - low <= 1e-14 * (least + high):
            break
    return least + high
