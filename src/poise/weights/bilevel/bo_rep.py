"""Upper steps of fixed length, and a lower variable that is accurate and almost frozen: BO-REP, for upper losses of unbounded smoothness.

    refinement       x_0 <- many steps on lower(., theta_0), before the first outer step
    for k = 0, 1, ...
        every `period` steps (not at 0):   x <- P_ball(x - inner_lr * lower'(x)), inner_steps times, from where x stood
        q <- q - system_lr * (H q - d upper/dx)                                   one product with the lower Hessian
        h = d upper/d theta - J' q,    m <- momentum m + (1 - momentum) h
        theta <- theta - lr * m / ||m||                                            the norm of all upper variables jointly

Where the gradient of the upper objective changes the faster the larger it is, as that of recurrent networks does, a step of fixed length
is safe where a step in proportion to the gradient is not. Between two refreshes x stands still, so that its noise is independent of the
fresh samples that move theta. The price of an outer step is one graph of the lower gradient and two products on it.

Near an optimum a step of fixed length goes round it at a distance of about lr: let lr fall (`lr=lambda k: 0.1 / (1 + k) ** 0.5`).

Source: arXiv:2401.09587, algorithm 1. Defaults of its code: momentum 0.9, period 2, 3 inner steps, system_lr 1e-2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal
from warnings import warn

import torch
from torch import Tensor

from poise.errors import InputError, NonFiniteError, PoiseWarning
from poise.operators import ConvexSet
from poise.weights.bilevel.hypergradient import ImplicitHypergradient
from poise.weights.bilevel.levels import Levels, Linearised, Tensors, dot, norm, shifted
from poise.weights.bilevel.method import (
    BilevelMethod,
    Outer,
    rate_at,
    refuse_first_order,
    turn,
    twice_differentiable,
    zeros_like,
)
from poise.weights.bilevel.projected import project

Scaling = Literal["normalized", "clipped", "plain"]
GROWTH = 100.0
"""A residual of so many times the right side is a linear system that diverges: at the start, with q = 0, it is 1."""


class BOREP(BilevelMethod):
    """Bilevel descent with initialisation refinement, periodic lower updates and normalised momentum.

    Args:
        levels, x, theta, lower_set, upper_set: see `BilevelMethod`.
        lr: length of an outer step; or a function of the step.
        inner_lr: of the lower variable; or a function of the step.
        momentum: in [0, 1).
        inner_steps: N, lower steps of a refresh.
        period: I, outer steps between refreshes.
        system_lr: nu, of the linear system; below 2 over the largest curvature of the lower objective.
        system: "sgd", one such step; or "cg" or "neumann", so many iterations from the last q.
        system_steps: steps or iterations for each outer step.
        scaling: "normalized"; "clipped" divides by max(1, ||m|| / clip); "plain" leaves m as it is.
        clip: the norm from which "clipped" clips.
        refine_steps: of the refinement, made at the first step on its lower batches; 0 leaves it to `refine`, which takes its own.
        radius: of the ball that a refresh may not leave, in the norm of all lower variables jointly; None for none.
        averaging: whether a refresh and a refinement return the average of their iterates.
        single_loop: one lower step at every outer step, beside the other two, instead of refreshes (SLIP).
        check_stability: whether the first step estimates the largest curvature by 20 products and warns where q cannot converge.

    State: x, theta, q, the momentum m, steps.

    Raises:
        InputError: an argument out of range, and what `BilevelMethod` refuses.
        IncompatibleError: the lower objective has no second derivative.
        NonFiniteError: the linear system diverges.

    >>> two = Levels(lambda x, t, _: (x[0] - t[0]).square().sum() / 2, lambda x, t, _: (x[0] - 1).square().sum() / 2)
    >>> method = BOREP(two, [torch.zeros(1)], [torch.zeros(1)], lr=0.05, inner_lr=0.5, system_lr=0.5)
    >>> method.refine(steps=5).run(20).theta[0].abs() < 1.1
    tensor([True])
    """

    moving: ClassVar[tuple[str, ...]] = ("x", "theta", "q", "m")

    def __init__(
        self,
        levels: Levels,
        x: Sequence[Tensor],
        theta: Sequence[Tensor],
        *,
        lr: float | Callable[[int], float],
        inner_lr: float | Callable[[int], float],
        momentum: float = 0.9,
        inner_steps: int = 3,
        period: int = 2,
        system_lr: float = 1e-2,
        system: Literal["sgd", "cg", "neumann"] = "sgd",
        system_steps: int = 1,
        scaling: Scaling = "normalized",
        clip: float = 1.0,
        refine_steps: int = 0,
        radius: float | None = None,
        averaging: bool = False,
        single_loop: bool = False,
        check_stability: bool = True,
        lower_set: ConvexSet | Sequence[ConvexSet | None] | None = None,
        upper_set: ConvexSet | Sequence[ConvexSet | None] | None = None,
    ) -> None:
        super().__init__(levels, x, theta, lower_set=lower_set, upper_set=upper_set)
        self.lr, self.inner_lr, self.momentum = lr, inner_lr, momentum
        self.inner_steps, self.period, self.radius, self.averaging = inner_steps, period, radius, averaging
        self.system_lr, self.system, self.system_steps = system_lr, system, system_steps
        self.refine_steps = refine_steps
        self.scaling, self.clip, self.single_loop, self.check_stability = scaling, clip, single_loop, check_stability
        self._check_arguments()
        self.q: Tensors = zeros_like(self.x)
        self.m: Tensors = zeros_like(self.theta)

    # ---- the lower variable ------------------------------------------------------------------------------------------

    def refine(
        self,
        batches: Callable[[int], Any] | None = None,
        *,
        steps: int = 200,
        tol: float | None = None,
        epochs: int = 1,
    ) -> BOREP:
        """Solve the lower level at the present theta, before the first outer step.

        Args:
            batches: `batches(i)` gives the lower batch of step i; None gives None.
            steps: of the first epoch.
            tol: stop when the gradient of a step has at most this norm.
            epochs: each has twice the steps and half the inner_lr of the last, within a ball smaller by sqrt(2), as epoch-SGD of the
                theory; 1 is the constant step of the authors' code.
        """
        place, lr, radius = 0, rate_at(self.inner_lr, self.steps), self.radius
        for epoch in range(epochs):
            length = steps * 2**epoch
            taken = [None] * length if batches is None else [batches(place + i) for i in range(length)]
            self.x = self._descended(taken, length, lr / 2**epoch, radius, tol)
            place += length
            radius = None if radius is None else radius / 2**0.5
        return self

    def _descended(
        self, lower_batch: Any, steps: int, lr: float, radius: float | None, tol: float | None = None
    ) -> Tensors:
        """Return x after gradient steps in the ball around where it stands, or the average of them."""
        center, x, total = self.x, self.x, zeros_like(self.x)
        for i in range(steps):
            gradient = self.levels.lower_gradient(x, self.theta, turn(lower_batch, i))
            if tol is not None and float(norm(gradient)) <= tol:
                return x
            x = project(self.lower_sets, shifted(x, -lr, gradient))
            if radius is not None:
                x = within(x, center, radius)
            if self.averaging:
                total = shifted(total, 1.0, x)
        return tuple(t / steps for t in total) if self.averaging else x

    # ---- one outer step ----------------------------------------------------------------------------------------------

    def _step(self, lower_batch: Any, upper_batch: Any) -> Outer:
        inner_lr = rate_at(self.inner_lr, self.steps)
        due = self.steps % self.period == 0
        if self.refine_steps and self.steps == 0:
            self.refine(lambda i: turn(lower_batch, i), steps=self.refine_steps)
        if due and self.steps and not self.single_loop:
            self.x = self._descended(lower_batch, self.inner_steps, inner_lr, self.radius)
        batch = turn(lower_batch, -1)
        try:
            second = self.levels.linearise(self.x, self.theta, batch)
            if self.steps == 0:
                refuse_first_order(second, type(self).__name__)
                if self.check_stability and self.system != "cg":
                    self._check_stability(second)
            upper, residual, relative, h = self._estimate(second, batch, upper_batch)
        except RuntimeError as error:
            if "deriv" in str(error) or "backward" in str(error):
                raise twice_differentiable(str(error).splitlines()[0], type(self).__name__) from error
            raise
        if due and not float(relative) <= GROWTH:
            raise NonFiniteError(
                f"{type(self).__name__}: the linear system for q diverges: its residual is {float(relative):.3g} times its right side "
                f"after {self.steps + 1} outer steps. Use a smaller system_lr than {self.system_lr}, or system='cg'."
            )
        if self.single_loop:
            self.x = project(self.lower_sets, shifted(self.x, -inner_lr, second.gradient))
        self.m = shifted(tuple(self.momentum * t for t in self.m), 1 - self.momentum, h)
        self._move_theta()
        return Outer(upper, norm(h), residual=residual)

    def _estimate(self, second: Linearised, batch: Any, upper_batch: Any) -> tuple[Tensor, Tensor, Tensor, Tensors]:
        """Move q, and return the upper objective, the residual of the system (absolute, and relative), and h."""
        if self.system != "sgd":
            step = self.system_lr if self.system == "neumann" else None
            implicit = ImplicitHypergradient(self.levels, self.system, 0.0, self.system_steps, step=step, check=False)
            implicit.q = self.q if self.steps else None
            found = implicit(self.x, self.theta, batch, upper_batch, derivatives=second)
            assert found.q is not None
            self.q = found.q
            size = norm(found.upper_gradient)
            absolute = size.new_tensor(found.residual)
            return found.value, absolute, absolute / size.clamp_min(torch.finfo(size.dtype).tiny), found.gradient
        upper, b, direct = self.levels.upper_gradients(self.x, self.theta, upper_batch)
        residual = b
        for _ in range(self.system_steps):
            residual = shifted(second.hessian_product(self.q), -1.0, b)
            self.q = shifted(self.q, -self.system_lr, residual)
        absolute, size = norm(residual), norm(b)
        relative = absolute / size.clamp_min(torch.finfo(size.dtype).tiny)
        return upper, absolute, relative, shifted(direct, -1.0, second.mixed_product(self.q))

    def _move_theta(self) -> None:
        lr, length = rate_at(self.lr, self.steps), norm(self.m)
        if self.scaling == "normalized":
            share = lr / (length + 1e-10)
        elif self.scaling == "clipped":
            share = lr / (length / self.clip).clamp_min(1.0)
        else:
            share = length.new_tensor(lr)
        self.theta = project(self.upper_sets, shifted(self.theta, -share, self.m))

    # ---- what is checked ---------------------------------------------------------------------------------------------

    def _check_stability(self, second: Linearised) -> None:
        largest = curvature(second, self.x)
        if self.system_lr * largest >= 2:
            warn(
                f"{type(self).__name__}: system_lr = {self.system_lr:g} is too large for the lower objective, whose largest curvature is "
                f"about {largest:.3g}: q diverges. Stay below {2 / largest:.3g}.",
                PoiseWarning,
                stacklevel=5,
            )

    def _check_arguments(self) -> None:
        own = type(self).__name__
        positive: dict[str, Any] = {
            "lr": self.lr,
            "inner_lr": self.inner_lr,
            "inner_steps": self.inner_steps,
            "system_lr": self.system_lr,
            "system_steps": self.system_steps,
            "clip": self.clip,
            "radius": self.radius,
        }
        for name, value in positive.items():
            if value is not None and not callable(value) and not value > 0:
                raise InputError(f"{own}: {name} must be positive, and it is {value}.")
        if self.refine_steps < 0:
            raise InputError(f"{own}: refine_steps is at least 0, and it is {self.refine_steps}.")
        if self.period < 1:
            raise InputError(f"{own}: period is at least 1 outer step, and it is {self.period}.")
        if not 0 <= self.momentum < 1:
            raise InputError(f"{own}: momentum lies in [0, 1), and it is {self.momentum}.")
        for name, value, known in (
            ("scaling", self.scaling, ("normalized", "clipped", "plain")),
            ("system", self.system, ("sgd", "cg", "neumann")),
        ):
            if value not in known:
                raise InputError(f"{own}: {name} is one of {', '.join(known)}, and it is {value!r}.")


def within(x: Tensors, center: Tensors, radius: float) -> Tensors:
    """Return x projected onto the ball around `center` in the joint norm of all tensors."""
    away = shifted(x, -1.0, center)
    return shifted(center, radius / norm(away).clamp_min(radius), away)


def curvature(second: Linearised, like: Tensors, iterations: int = 20) -> float:
    """Return the largest absolute eigenvalue of the lower Hessian by power iteration, from below."""
    generator = torch.Generator().manual_seed(0)
    v: Tensors = tuple(torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in like)
    largest = 0.0
    for _ in range(iterations):
        size = norm(v)
        if not float(size) > 0:
            break
        v = second.hessian_product(tuple(t / size for t in v))
        largest = max(largest, float(norm(v)))
    return largest


# ---- how rough is the upper level? ------------------------------------------------------------------------------------


def smoothness_probe(
    gradient: Callable[[Tensors], Tensors], path: Sequence[Tensors], reach: float = 1e-2, seed: int = 0
) -> Tensor:
    """Return local smoothness beside the gradient's norm along a path: float [points, 2].

        row = ( ||F'(theta)||,  ||F'(theta + d) - F'(theta)|| / ||d|| ),    d random of length `reach`

    A second column that grows with the first says that no constant bounds it: the case for steps of fixed length. `L0 + L1 ||F'||` is
    fitted by `torch.linalg.lstsq` on the two columns, see `relaxed_smoothness`.

    Args:
        gradient: the hypergradient as a function of theta, such as `lambda t: implicit(solve(t), t).gradient`.
        path: the points.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for theta in path:
        d: Tensors = tuple(torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in theta)
        here, there = gradient(theta), gradient(shifted(theta, reach / norm(d), d))
        rows.append(torch.stack([norm(here), norm(shifted(there, -1.0, here)) / reach]))
    return torch.stack(rows)


def relaxed_smoothness(probe: Tensor) -> tuple[float, float]:
    """Return (L0, L1) of `ratio = L0 + L1 ||F'||`, fitted to a probe by least squares.

    >>> relaxed_smoothness(torch.tensor([[0.0, 1.0], [1.0, 3.0], [2.0, 5.0]], dtype=torch.float64))
    (1.0, 2.0)
    """
    norms, ratios = probe.double().unbind(1)
    centred = norms - norms.mean()
    slope = float(dot((centred,), (ratios,)) / dot((centred,), (centred,)))
    return round(float(ratios.mean()) - slope * float(norms.mean()), 12), round(slope, 12)
