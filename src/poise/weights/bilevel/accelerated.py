"""The lower problem by accelerated gradients, to an accuracy that is certified afterwards.

    y <- x - (1/L) grad h(x),    x <- y + beta (y - y_before),    beta = (sqrt L - sqrt mu) / (sqrt L + sqrt mu)

    norm(x - x*) <= norm(grad h(x)) / mu        for every mu-strongly convex h: stop where the right side is small enough

The bound is measured where the gradient was taken, so it holds for the very point that is returned. Independent lower problems
(training pairs) are solved together, each with its own bound and its own stop; the ones that are done leave the batch.

Source: Nesterov (2004), scheme 2.2.19 with constant momentum; arXiv:2308.10098 (the stopping rule).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise.errors import InputError
from poise.weights.bilevel.hypergradient import packed, unpacked
from poise.weights.bilevel.levels import Levels, Tensors, detached

__all__ = ["AcceleratedGradient", "LowerSolution"]

Constant = float | Tensor | Callable[[Tensors], float | Tensor]
"""A number, one for each sample, or a function of theta that gives either."""


@dataclass(frozen=True)
class LowerSolution:
    """A point of the lower level, and how far it is at most from the minimum.

    Attributes:
        x: the point.
        distance: bound of `norm(x - x*)` for each sample, [samples]; [1] without samples.
        iterations: gradients that were taken, those over a part of the samples included.
        converged: whether every distance is within the accuracy that was asked for.
        status: how it ended: "converged", "iteration cap", "accuracy floor" or "not finite".
    """

    x: Tensors
    distance: Tensor
    iterations: int
    converged: bool
    status: str


class AcceleratedGradient:
    """Minimise a strongly convex lower objective to a certified distance.

    Args:
        levels: the two levels; the lower one counts.
        strong_convexity: mu, a lower bound of the curvature: a number, one for each sample, or a function of theta.
        smoothness: L, an upper bound of the curvature, likewise. Where it is not given it is found by power iteration, and raised
            where gradients change faster.
        max_iterations: for one solution.
        samples: whether x has a leading dimension of independent problems. The lower objective is then called with the rows of x
            that are not done, and with their places as `batch` (int64; None while all are there).

    Raises:
        InputError: mu that is not positive, or gradients that change faster than any L: a lower objective that is not smooth.
    """

    def __init__(
        self,
        levels: Levels,
        strong_convexity: Constant,
        smoothness: Constant | None = None,
        max_iterations: int = 2000,
        samples: bool = False,
    ) -> None:
        if max_iterations < 1:
            raise InputError(f"max_iterations must be at least 1; it is {max_iterations}.")
        self.levels, self.strong_convexity, self.smoothness = levels, strong_convexity, smoothness
        self.max_iterations, self.samples = max_iterations, samples
        self.found_smoothness: Tensor | None = None
        self._direction: Tensor | None = None
        self._first_smoothness = 0.0

    def mu(self, theta: Tensors, like: Tensor) -> Tensor:
        """Return the strong convexity of each sample at theta, [samples]."""
        value = constant(self.strong_convexity, theta, like)
        if not bool((value > 0).all()):
            raise InputError(
                f"The strong convexity of the lower objective must be positive; it is {float(value.min()):.3g}. Add a strongly "
                "convex term (l2) to the lower objective and give the least curvature that it has."
            )
        return value

    def __call__(self, x: Tensors, theta: Tensors, accuracy: float, batch: Any = None) -> LowerSolution:
        """Return a point within `accuracy` of the minimum, beginning at x."""
        rows = packed(detached(x), self.samples)
        mu = self.mu(theta, rows)
        smooth = self._smoothness_at(x, theta, batch, rows)
        solved = _Sweep(self, x, theta, batch, rows, mu, torch.maximum(smooth, mu)).run(accuracy * mu)
        if self.smoothness is None:
            self.found_smoothness = solved.smooth
        small = solved.sizes / mu
        return LowerSolution(
            x=unpacked(solved.best, x, self.samples),
            distance=small,
            iterations=solved.iterations,
            converged=bool((small <= accuracy).all()),
            status=solved.status,
        )

    def _smoothness_at(self, x: Tensors, theta: Tensors, batch: Any, rows: Tensor) -> Tensor:
        """L where it is given; else by power iteration, which goes on from the direction of the last call."""
        if self.smoothness is not None:
            return constant(self.smoothness, theta, rows)
        if self._direction is None or self._direction.shape != rows.shape:
            generator = torch.Generator(rows.device).manual_seed(0)
            self._direction = torch.randn(rows.shape, generator=generator, dtype=rows.dtype, device=rows.device)
            times = 15
        else:
            times = 2
        derivatives, v = self.levels.linearise(x, theta, batch), self._direction
        for _ in range(times):
            v = v / _norms(v).clamp_min(torch.finfo(v.dtype).tiny)[:, None]
            v = packed(derivatives.hessian_product(unpacked(v, x, self.samples)), self.samples)
        self._direction = v
        # Power iteration comes from below; what is still missing shows as gradients that change too fast.
        found = 1.05 * _norms(v)
        if not self._first_smoothness:
            self._first_smoothness = float(found.max())
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what was found out about the smoothness."""
        return {
            "smoothness": _clone(self.found_smoothness),
            "direction": _clone(self._direction),
            "first": self._first_smoothness,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.found_smoothness, self._direction = _clone(state["smoothness"]), _clone(state["direction"])
        self._first_smoothness = state["first"]


class _Sweep:
    """One solution: the state of the iteration over the samples that are not done."""

    def __init__(
        self,
        solver: AcceleratedGradient,
        x: Tensors,
        theta: Tensors,
        batch: Any,
        rows: Tensor,
        mu: Tensor,
        smooth: Tensor,
    ) -> None:
        self.solver, self.theta, self.batch, self.form = solver, theta, batch, x
        self.best, self.sizes = rows.clone(), torch.full_like(rows[:, 0], math.inf)
        self.point, self.before = rows, rows
        self.mu, self.smooth = mu, smooth
        self.places: Tensor | None = None  # of the rows that are left; None while all are
        self.iterations, self.status = 0, "iteration cap"
        self.least = self.target = math.inf

    def run(self, target: Tensor) -> _Sweep:
        """Iterate until every gradient is below its target."""
        solver = self.solver
        watch = solver.smoothness is None
        mark, marked = math.inf, 0
        last: tuple[Tensor, Tensor] | None = None
        left, beta, self.target = target, self._momentum(), max(float(target.min()), 1e-300)
        patience = 100 + 20 * math.sqrt(float((self.smooth / self.mu).max()))
        for k in range(solver.max_iterations):
            gradient = self._gradient()
            self.iterations = k + 1
            size = _norms(gradient)
            worst = self._record(size, left)
            if worst <= 1:
                self.status = "converged"
                break
            if math.isnan(worst):
                self.status = "not finite"
                break
            if worst < 0.5 * mark:
                mark, marked = worst, k
            elif k - marked > patience:
                self.status = "accuracy floor"
                break
            if watch and last is not None and self._raise_smoothness(gradient, last):
                beta = self._momentum()
            if watch:
                last = self.point, gradient
            following = self.point - gradient / self._smooth_left()
            self.point, self.before = torch.addcmul(following, beta, following - self.before), following
            if solver.samples and len(size) > 1:
                left, beta, last = self._drop(size, left, beta, last)
        return self

    def _gradient(self) -> Tensor:
        like = self.form if self.places is None else tuple(t[: len(self.point)] for t in self.form)
        batch = self.batch if self.places is None else self.places
        found = self.solver.levels.lower_gradient(unpacked(self.point, like, self.solver.samples), self.theta, batch)
        return packed(found, self.solver.samples)

    def _record(self, size: Tensor, left: Tensor) -> float:
        """Keep the best point of each sample; return the largest of their gradients, relative to what it should be."""
        if not self.solver.samples:
            now = float(size)
            if now < self.least:
                self.best, self.sizes, self.least = self.point, size, now
            return self.least / self.target if math.isfinite(now) else math.nan
        places = self._places()
        better = size < self.sizes[places]
        self.best[places[better]], self.sizes[places[better]] = self.point[better], size[better]
        worst = float((self.sizes[places] / left).max())
        return worst if math.isfinite(float(size.sum())) else math.nan

    def _places(self) -> Tensor:
        return torch.arange(len(self.point), device=self.point.device) if self.places is None else self.places

    def _drop(
        self, size: Tensor, left: Tensor, beta: Tensor, last: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Leave out the samples that are done, once they are half: fewer would not pay for the copy."""
        places = self._places()
        keep = self.sizes[places] > left
        if int(keep.sum()) > len(size) // 2:
            return left, beta, last
        self.places, self.point, self.before = places[keep], self.point[keep], self.before[keep]
        if last is not None:
            last = last[0][keep], last[1][keep]
        return left[keep], beta[keep], last

    def _momentum(self) -> Tensor:
        root, low = self._smooth_left().sqrt(), self._left(self.mu)[:, None].sqrt()
        return (root - low) / (root + low)

    def _smooth_left(self) -> Tensor:
        return self._left(self.smooth)[:, None]

    def _left(self, values: Tensor) -> Tensor:
        return values if self.places is None else values[self.places]

    def _raise_smoothness(self, gradient: Tensor, last: tuple[Tensor, Tensor]) -> bool:
        """Raise L where the gradient has changed faster than it allows."""
        moved, changed = _norms(self.point - last[0]), _norms(gradient - last[1])
        # Below this the difference of two gradients is rounding.
        far = moved > 1e3 * torch.finfo(moved.dtype).eps * (1 + _norms(self.point))
        ratio = torch.where(far, changed / moved, 0.0)
        low = ratio > 1.0001 * self._left(self.smooth)
        if not bool(low.any()):
            return False
        raised = torch.where(low, 1.05 * ratio, self._left(self.smooth))
        if float(raised.max()) > 1e5 * self.solver._first_smoothness:
            raise InputError(
                "The lower objective does not look smooth: its gradient changes by "
                f"{float(raised.max()):.3g} times the distance. Smooth its kinks (sqrt(u^2 + nu^2) in place of |u|)."
            )
        if self.places is None:
            self.smooth = raised
        else:
            self.smooth = self.smooth.clone()
            self.smooth[self.places] = raised
        return True


def constant(value: Constant, theta: Tensors, like: Tensor) -> Tensor:
    """Return a constant as one number for each row of `like`."""
    with torch.no_grad():
        found = value(theta) if callable(value) else value
    return torch.as_tensor(found, dtype=like.dtype, device=like.device).detach().expand(len(like))


def _norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms


def _clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()
