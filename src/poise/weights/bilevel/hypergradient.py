"""The gradient of the upper objective through the lower minimum, in every form that the bilevel methods use.

    F(theta) = upper(x*(theta), theta),    grad F = d upper/d theta - J' q,    H q = d upper/dx

    ImplicitHypergradient(levels)                              q by conjugate gradients, to an absolute residual
    ImplicitHypergradient(levels, solver="neumann")            q by the Neumann series
    ImplicitHypergradient(levels, solver="lu")                 q by factorising the whole Hessian: small x
    ImplicitHypergradient(levels, solver="one_step", step=s)   q = s * d upper/dx: H is taken for the identity over s (T1-T2)
    ImplicitHypergradient(..., products="differences")         H q and J' q from two lower gradients each, no second derivative
    UnrolledHypergradient(levels, steps=K, lr=s)               reverse mode through K gradient steps from x
    UnrolledHypergradient(..., truncate=T)                     through the last T of them

The implicit form needs x at the lower minimum; its error there is bounded by the distance to it. Unrolling needs no minimum, and
differentiates what was really computed, at the memory of the steps that it goes back through.

Source: arXiv:1602.02355 (implicit, inexact), arXiv:1511.06727 (T1-T2), arXiv:1806.09055 (differences), arXiv:1810.10667 (truncated),
arXiv:1911.02590 (Neumann).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from poise.errors import InputError, PoiseWarning
from poise.weights.bilevel.levels import Counters, Levels, Tensors, detached, norm, shifted
from poise.weights.bilevel.linear_systems import Solution, conjugate_gradient, dense, neumann

__all__ = ["Differences", "Hypergradient", "ImplicitHypergradient", "UnrolledHypergradient"]

Solver = Literal["cg", "neumann", "lu", "one_step"]
Products = Literal["exact", "differences"]


@dataclass(frozen=True)
class Hypergradient:
    """A gradient in theta, and what is known about it.

    Attributes:
        gradient: of the form of theta.
        value: the upper objective at `x`, 0-dim.
        x: where it was taken: the given point, or the end of the unrolled steps.
        upper_gradient: d upper/dx there, of the form of x.
        direct: d upper/d theta there, of the form of theta, which is part of `gradient`.
        cost: what this call evaluated.
        q: the solution of H q = d upper/dx, of the form of x; None where none is formed.
        residual: absolute, `norm(H q - d upper/dx)`; NaN where it is not measured. With samples the joint norm.
        residuals: the same for each sample.
        iterations: of the method that found q, or steps that were unrolled.
        damping: what stood on the diagonal of H; 0 where nothing did.
        converged: whether the residual is within the tolerance.
        status: how it ended, in words.
    """

    gradient: Tensors
    value: Tensor
    x: Tensors
    upper_gradient: Tensors
    direct: Tensors
    cost: Counters
    q: Tensors | None = None
    residual: float = float("nan")
    residuals: Tensor | None = None
    iterations: int = 0
    damping: float = 0.0
    converged: bool = True
    status: str = "converged"


class SecondDerivatives(Protocol):
    """Products with the second derivatives of the lower objective: `Linearised`, or `Differences`."""

    def hessian_product(self, vector: Tensors) -> Tensors: ...

    def mixed_product(self, vector: Tensors) -> Tensors: ...


class Differences:
    """Products with second derivatives from central differences of gradients: `(grad(x + h v) - grad(x - h v)) / 2h`.

    Args:
        levels, x, theta, batch: the point.
        width: length of `h v` relative to `1 + norm(x)`; by default the cube root of machine epsilon, which balances the error of
            the difference, `h^2`, with that of rounding, `epsilon / h`.
    """

    def __init__(
        self, levels: Levels, x: Tensors, theta: Tensors, batch: Any = None, width: float | None = None
    ) -> None:
        self._levels, self._x, self._theta, self._batch = levels, detached(x), detached(theta), batch
        relative = torch.finfo(x[0].dtype).eps ** (1 / 3) if width is None else width
        self._length = relative * (1 + float(norm(self._x)))

    def hessian_product(self, vector: Tensors) -> Tensors:
        """Return H v, at the price of two lower gradients."""
        return self._difference(vector, self._levels.lower_gradient)

    def mixed_product(self, vector: Tensors) -> Tensors:
        """Return J' v, at the price of two lower gradients in theta."""
        return self._difference(vector, self._levels.lower_gradient_of_theta)

    def _difference(self, vector: Tensors, gradient: Any) -> Tensors:
        size = float(norm(vector))
        if size == 0:
            return tuple(torch.zeros_like(g) for g in gradient(self._x, self._theta, self._batch))
        h = self._length / size
        ahead = gradient(shifted(self._x, h, vector), self._theta, self._batch)
        behind = gradient(shifted(self._x, -h, vector), self._theta, self._batch)
        return tuple((a - b) / (2 * h) for a, b in zip(ahead, behind, strict=True))


class ImplicitHypergradient:
    """The hypergradient by the implicit function theorem: `d upper/d theta - J' q` with `H q = d upper/dx`.

    Args:
        levels: the two levels.
        solver: `"cg"`, `"neumann"`, `"lu"`, or `"one_step"`.
        tolerance: of the residual `norm(H q - d upper/dx)`. Absolute, not relative to the right side: the error of the
            hypergradient is at most `norm(J) / mu` times it.
        iterations: at most so many products for q; with `"neumann"` and warm starts off, the number of terms.
        warm_start: begin at the last q.
        damping: added to the diagonal of H.
        step: of the Neumann series (1 over the largest curvature where it is not given) and of one step (to be given).
        products: `"exact"`, by a second backward pass, or `"differences"`, by differences of gradients.
        samples: whether every tensor of x has a leading dimension of independent lower problems, so that H is block diagonal.
        check: whether the first call looks for entries of theta that nothing depends on.

    State: the last q, with `state_dict` and `load_state_dict`.

    Raises:
        InputError: an unknown solver, a tolerance or damping below 0, a lower problem that is not strongly convex at x, or an
            entry of theta that nothing depends on.

    >>> two = Levels(lambda x, t, _: (x[0] - t[0]).square().sum() / 2, lambda x, t, _: x[0].square().sum() / 2)
    >>> ImplicitHypergradient(two)((torch.ones(2),), (torch.ones(2),)).gradient
    (tensor([1., 1.]),)
    """

    def __init__(
        self,
        levels: Levels,
        solver: Solver = "cg",
        tolerance: float = 1e-10,
        iterations: int | None = None,
        warm_start: bool = True,
        damping: float = 0.0,
        step: float | None = None,
        products: Products = "exact",
        samples: bool = False,
        check: bool = True,
    ) -> None:
        if solver not in ("cg", "neumann", "lu", "one_step"):
            raise InputError(f"solver must be 'cg', 'neumann', 'lu' or 'one_step'; it is {solver!r}.")
        if products not in ("exact", "differences"):
            raise InputError(f"products must be 'exact' or 'differences'; it is {products!r}.")
        if tolerance < 0 or damping < 0:
            raise InputError(f"tolerance and damping must be >= 0; they are {tolerance} and {damping}.")
        if iterations is not None and iterations < 1:
            raise InputError(f"iterations must be at least 1; it is {iterations}.")
        if step is not None and step <= 0:
            raise InputError(f"step must be positive; it is {step}.")
        if solver == "one_step" and step is None:
            raise InputError(
                "solver='one_step' needs step=..., the learning rate of the lower step that it goes back through."
            )
        self.levels, self.solver, self.tolerance, self.iterations = levels, solver, tolerance, iterations
        self.warm_start, self.damping, self.step, self.products = warm_start, damping, step, products
        self.samples = samples
        self.q: Tensors | None = None
        self._unchecked = check

    def __call__(
        self,
        x: Tensors,
        theta: Tensors,
        lower_batch: Any = None,
        upper_batch: Any = None,
        *,
        tolerance: float | Tensor | None = None,
        derivatives: SecondDerivatives | None = None,
    ) -> Hypergradient:
        """Return the hypergradient at a lower minimum x.

        Args:
            x, theta: the point.
            lower_batch, upper_batch: what the levels are given as `batch`.
            tolerance: in place of the one of the constructor; one number, or one for each sample.
            derivatives: of the lower objective at this point, where they exist already.
        """
        before = self.levels.counters.copy()
        if self._unchecked:
            check_dependence(self.levels, x, theta, lower_batch, upper_batch)
            self._unchecked = False
        value, b, direct = self.levels.upper_gradients(x, theta, upper_batch)
        if derivatives is None:
            kind = self.levels.linearise if self.products == "exact" else self._differences
            derivatives = kind(x, theta, lower_batch)
        found = self._solve(derivatives, b, self.tolerance if tolerance is None else tolerance)
        q = unpacked(found.q, b, self.samples)
        self.q = q if self.warm_start else None
        return Hypergradient(
            gradient=shifted(direct, -1, derivatives.mixed_product(q)),
            value=value,
            x=detached(x),
            upper_gradient=b,
            direct=direct,
            cost=self.levels.counters.since(before),
            q=q,
            residual=float(torch.linalg.vector_norm(found.residual)),
            residuals=found.residual,
            iterations=found.iterations,
            damping=found.damping,
            converged=found.converged,
            status=found.status,
        )

    def _solve(self, derivatives: SecondDerivatives, b: Tensors, tolerance: float | Tensor) -> Solution:
        rows = packed(b, self.samples)
        if self.solver == "one_step":
            unknown = torch.full_like(rows[:, 0], float("nan"))
            return Solution(float(self.step or 0) * rows, unknown, 0, True, 0.0, "one step, its residual not measured")

        def product(vectors: Tensor) -> Tensor:
            return packed(derivatives.hessian_product(unpacked(vectors, b, self.samples)), self.samples)

        start = None if self.q is None else packed(self.q, self.samples)
        if start is not None and start.shape != rows.shape:
            raise InputError(
                f"x has changed its form: q was {tuple(start.shape)}, and now {tuple(rows.shape)} is needed."
            )
        if self.solver == "lu":
            found = dense(product, rows, tolerance, self.damping)
        elif self.solver == "cg":
            found = conjugate_gradient(product, rows, start, tolerance, self.iterations, self.damping)
        else:
            found = neumann(product, rows, start, tolerance, self.iterations, self.damping, self.step)
        if found.damping > self.damping:
            warnings.warn(f"ImplicitHypergradient: {found.status}.", PoiseWarning, stacklevel=3)
        return found

    def _differences(self, x: Tensors, theta: Tensors, batch: Any) -> Differences:
        return Differences(self.levels, x, theta, batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the last q, and whether theta has been looked at."""
        return {"q": None if self.q is None else [t.clone() for t in self.q], "unchecked": self._unchecked}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.q = None if state["q"] is None else tuple(t.clone() for t in state["q"])
        self._unchecked = state["unchecked"]


class UnrolledHypergradient:
    """The hypergradient by reverse mode through K gradient steps with momentum from a given x, which does not depend on theta.

        v <- momentum v + d lower/dx,    x <- x - lr v,    K times;    F = upper(x_K, theta)

    Args:
        levels: the two levels.
        steps: K.
        lr: step size of the lower level.
        momentum: 0 is plain gradient descent.
        truncate: go back through the last so many steps only; all by default. The error falls like (1 - lr mu)^truncate.
        keep_graphs: keep the graph of every step that is gone back through (fast), or its point alone, and take the gradient again
            (the memory of `truncate` copies of x).
        check: whether the first call looks for entries of theta that nothing depends on.

    Raises:
        InputError: a size below 1, lr not positive, steps that diverge, or an entry of theta that nothing depends on.
    """

    def __init__(
        self,
        levels: Levels,
        steps: int,
        lr: float,
        momentum: float = 0.0,
        truncate: int | None = None,
        keep_graphs: bool = True,
        check: bool = True,
    ) -> None:
        if steps < 1 or (truncate is not None and not 1 <= truncate <= steps):
            raise InputError(
                f"steps must be at least 1 and truncate between 1 and steps; they are {steps} and {truncate}."
            )
        if lr <= 0 or not 0 <= momentum < 1:
            raise InputError(f"lr must be positive and momentum in [0, 1); they are {lr} and {momentum}.")
        self.levels, self.steps, self.lr, self.momentum = levels, steps, lr, momentum
        self.truncate = steps if truncate is None else truncate
        self.keep_graphs = keep_graphs
        self._unchecked = check

    def __call__(self, x: Tensors, theta: Tensors, lower_batch: Any = None, upper_batch: Any = None) -> Hypergradient:
        """Return the hypergradient of the value after K steps from x; `.x` is where they end."""
        before = self.levels.counters.copy()
        if self._unchecked:
            check_dependence(self.levels, x, theta, lower_batch, upper_batch)
            self._unchecked = False
        end, tape = self._forward(x, theta, lower_batch)
        value, b, direct = self.levels.upper_gradients(end, theta, upper_batch)
        gradient = self._backward(tape, b, direct, theta, lower_batch)
        return Hypergradient(
            gradient=gradient,
            value=value,
            x=end,
            upper_gradient=b,
            direct=direct,
            cost=self.levels.counters.since(before),
            iterations=self.steps,
            status=f"unrolled {self.steps} steps, back through {self.truncate}",
        )

    def _forward(self, x: Tensors, theta: Tensors, batch: Any) -> tuple[Tensors, list[Any]]:
        """Return the last point, and what stands for each step that is gone back through: its derivatives, or its point."""
        tape: list[Any] = []
        point = detached(x)
        velocity = tuple(torch.zeros_like(t) for t in point)
        for k in range(self.steps):
            if k < self.steps - self.truncate:
                slope = self.levels.lower_gradient(point, theta, batch)
            elif self.keep_graphs:
                tape.append(self.levels.linearise(point, theta, batch))
                slope = tape[-1].gradient
            else:
                tape.append(point)
                slope = self.levels.lower_gradient(point, theta, batch)
            velocity = shifted(slope, self.momentum, velocity)
            point = shifted(point, -self.lr, velocity)
        if not all(bool(t.isfinite().all()) for t in point):
            raise InputError(
                f"The {self.steps} lower steps diverge: x is not finite after them. Give a smaller lr than {self.lr:.3g}."
            )
        return point, tape

    def _backward(self, tape: list[Any], b: Tensors, direct: Tensors, theta: Tensors, batch: Any) -> Tensors:
        """Carry d F/dx back through x <- x - lr v, v <- momentum v + slope(x), freeing each step as it goes."""
        adjoint, velocity_adjoint, gradient = b, tuple(torch.zeros_like(t) for t in b), direct
        while tape:
            step = tape.pop()
            derivatives = step if self.keep_graphs else self.levels.linearise(step, theta, batch)
            velocity_adjoint = shifted(velocity_adjoint, -self.lr, adjoint)
            from_x, from_theta = derivatives.both_products(velocity_adjoint)
            gradient = shifted(gradient, 1, from_theta)
            adjoint = shifted(adjoint, 1, from_x)
            velocity_adjoint = tuple(self.momentum * w for w in velocity_adjoint)
        return gradient


def check_dependence(
    levels: Levels, x: Tensors, theta: Tensors, lower_batch: Any = None, upper_batch: Any = None
) -> None:
    """Raise where neither level depends on an entry of theta, naming it.

    A random vector is carried through J' at a point beside x: an entry that gives exactly 0 there, and on which the upper objective
    does not depend either, changes nothing. Beside x, since at x itself a term may rest by chance (an `l2` at 0).

    Raises:
        InputError: such an entry.
    """
    generator = torch.Generator().manual_seed(0)

    def random(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

    beside = tuple(t.detach() + 1e-3 * (1 + t.detach().abs()) * random(t) for t in x)
    derivatives = levels.linearise(beside, theta, lower_batch)
    found = derivatives.mixed_product(tuple(random(t) for t in x))
    idle = [(i, (g == 0).flatten()) for i, g in enumerate(found)]
    whole = len(levels.names) == len(theta) or len(levels.names) != sum(t.numel() for t in theta)
    if not any(bool(z.all() if whole else z.any()) for _, z in idle):
        return
    _, _, direct = levels.upper_gradients(beside, theta, upper_batch)
    idle = [(i, z & (d == 0).flatten()) for (i, z), d in zip(idle, direct, strict=True)]
    named = _idle_names(idle, levels.names, whole)
    if named:
        raise InputError(
            f"Nothing depends on {', '.join(named)}: the hypergradient is identically 0 there, so no value of it can be learned. "
            "Remove it, or let the lower or the upper objective read it."
        )


def _idle_names(idle: list[tuple[int, Tensor]], names: tuple[str, ...], whole: bool) -> list[str]:
    if whole:
        labels = names if len(names) == len(idle) else [f"theta[{i}]" for i in range(len(idle))]
        return [labels[i] for i, zero in idle if bool(zero.all())]
    flat = torch.cat([zero for _, zero in idle]).tolist()
    return [name for name, zero in zip(names, flat, strict=True) if zero]


def packed(tensors: Tensors, samples: bool) -> Tensor:
    """Return tensors as the rows of one matrix, [samples, d]; one row without samples."""
    rows = len(tensors[0]) if samples else 1
    if len(tensors) == 1:
        return tensors[0].reshape(rows, -1)
    return torch.cat([t.reshape(rows, -1) for t in tensors], dim=1)


def unpacked(rows: Tensor, like: Tensors, samples: bool) -> Tensors:
    """Return the rows of a matrix in the form of `like`."""
    if len(like) == 1:
        return (rows.reshape(like[0].shape),)
    count = len(like[0]) if samples else 1
    parts = torch.split(rows, [t.numel() // count for t in like], dim=1)
    return tuple(part.reshape(t.shape) for part, t in zip(parts, like, strict=True))
