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
    """One solution: the state of the iteration over the samples that are not done.

    `rows`, `point`, `before`, `target`, `mu`, `smooth`, `done` are of the samples that are left, `places` says which they are (None
    while all are). A sample that is done keeps the point at which it was, and leaves when half of the others are done too: earlier
    the copy would not pay.
    """

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
        self.point = self.before = self.measured = rows
        self.best = rows.clone() if solver.samples else rows
        self.sizes = self.now = torch.full_like(rows[:, 0], math.inf)
        self.least, self.changed = math.inf, False
        self.mu, self.left_smooth, self.smooth = mu, smooth, smooth
        self.places: Tensor | None = None
        self.done = torch.zeros_like(mu, dtype=torch.bool)
        self.iterations, self.status = 0, "iteration cap"
        self._pace()

    def run(self, target: Tensor) -> _Sweep:
        """Iterate until every gradient is below its target."""
        watch, record = self.solver.smoothness is None, self._record_rows if self.solver.samples else self._record
        self.target = target
        mark, marked = math.inf, 0
        last: tuple[Tensor, Tensor] | None = None
        patience = 100 + 20 * math.sqrt(float((self.smooth / self.mu).max()))
        for k in range(self.solver.max_iterations):
            gradient = self._gradient()
            self.iterations = k + 1
            worst = record(_norms(gradient))
            if worst <= 1:
                self.status = "converged"
                break
            if not math.isfinite(worst):
                self.status = "not finite"
                break
            if worst < 0.5 * mark:
                mark, marked = worst, k
            elif k - marked > patience:
                self.status = "accuracy floor"
                break
            if watch:
                if last is not None and self._raise_smoothness(gradient, last):
                    self._pace()
                last = self.point, gradient
            following = torch.addcmul(self.point, gradient, self.step, value=-1)
            self.point, self.before = torch.lerp(self.before, following, self.momentum), following
            if self._thinned():
                last = None
        if self.solver.samples:
            self._keep(~self.done)
        return self

    def _gradient(self) -> Tensor:
        form, batch, self.measured = self.form, self.batch, self.point
        if self.places is not None:
            form, batch = tuple(t[: len(self.point)] for t in form), self.places
        found = self.solver.levels.lower_gradient(unpacked(self.point, form, self.solver.samples), self.theta, batch)
        return packed(found, self.solver.samples)

    def _record(self, size: Tensor) -> float:
        """Keep the best point; return its gradient relative to what it should be."""
        now = float(size)
        if now < self.least:
            self.best, self.sizes, self.least = self.point, size, now
        return self.least / max(float(self.target), 1e-300) if math.isfinite(now) else math.inf

    def _record_rows(self, size: Tensor) -> float:
        """Keep the points of the samples that have just come near enough; return the largest gradient of the others."""
        self.now = size
        ratio = (size / self.target).masked_fill_(self.done, 0.0)
        worst, least = float(ratio.max()), float(ratio.masked_fill(self.done, math.inf).min())
        if least <= 1:
            fresh = (ratio <= 1) & ~self.done
            self._keep(fresh)
            self.done = self.done | fresh
            self.changed = True
        return worst

    def _keep(self, which: Tensor) -> None:
        """Write the points of some samples, and the sizes of their gradients, to the result."""
        places = which.nonzero().flatten() if self.places is None else self.places[which]
        self.sizes = self.sizes.clone()
        self.best[places], self.sizes[places] = self.measured[which], self.now[which]

    def _thinned(self) -> bool:
        """Leave out the samples that are done, once they are half."""
        if not self.changed or 2 * int(self.done.sum()) < len(self.done):
            return False
        keep = ~self.done
        all_places = torch.arange(len(keep), device=keep.device) if self.places is None else self.places
        self.places = all_places[keep]
        self.point, self.before, self.target = self.point[keep], self.before[keep], self.target[keep]
        self.mu, self.left_smooth, self.done = self.mu[keep], self.left_smooth[keep], self.done[keep]
        self.measured, self.now = self.measured[keep], self.now[keep]
        self.changed = False
        self._pace()
        return True

    def _pace(self) -> None:
        """Step and momentum of the samples that are left, [samples, 1]."""
        root, low = self.left_smooth.sqrt(), self.mu.sqrt()
        self.step = (1 / self.left_smooth)[:, None]
        self.momentum = (1 + (root - low) / (root + low))[:, None]

    def _raise_smoothness(self, gradient: Tensor, last: tuple[Tensor, Tensor]) -> bool:
        """Raise L where the gradient has changed faster than it allows."""
        moved, changed = _norms(self.point - last[0]), _norms(gradient - last[1])
        # Below this the difference of two gradients is rounding.
        far = moved > 1e3 * torch.finfo(moved.dtype).eps * (1 + _norms(self.point))
        ratio = torch.where(far, changed / moved, 0.0)
        low = ratio > 1.0001 * self.left_smooth
        if not bool(low.any()):
            return False
        self.left_smooth = torch.where(low, 1.05 * ratio, self.left_smooth)
        most = float(self.left_smooth.max())
        if most > 1e5 * self.solver._first_smoothness:
            raise InputError(
                f"The lower objective does not look smooth: its gradient changes by {most:.3g} times the distance. Smooth its kinks "
                "(sqrt(u^2 + nu^2) in place of |u|)."
            )
        if self.places is None:
            self.smooth = self.left_smooth
        else:
            self.smooth = self.smooth.clone()
            self.smooth[self.places] = self.left_smooth
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
