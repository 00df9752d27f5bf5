"""Two levels as one weighted sum: gradients of the value function, and no second derivative anywhere.

    psi(theta) = min over x in argmin lower of upper                                     what is wanted
    psi_sigma(theta) = min over x of { upper + (lower - min lower) / sigma } <= psi       its penalty, within O(sigma)

    gradient of psi_sigma = d upper/d theta (x) + [d lower/d theta (x) - d lower/d theta (z)] / sigma
    x in argmin sigma upper + lower,    z in argmin lower

Any minimisers give the same gradient, also where the lower level has many solutions or constraints, and nothing is differentiated
through them. Value and gradient are within O(sigma) of the truth where the lower objective obeys a proximal error bound
(`error_bound_modulus` measures it, `penalty_sweep` looks whether sigma -> 0 does what it should). Both lower gradients in theta are taken
on one batch: the noise of their difference is then O(1), and O(1/sigma) where it is not.

Source: arXiv:2309.01753, algorithms 1 and 2; the paper's x is `theta` here, and its y is `x`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal
from warnings import warn

import torch
from torch import Tensor

from poise.errors import InputError, PoiseWarning
from poise.operators import ConvexSet
from poise.weights.bilevel.levels import Levels, Tensors, detached, gradients, leaves, norm, shifted
from poise.weights.bilevel.method import BilevelMethod, Outer, turn
from poise.weights.bilevel.projected import project
from poise.weights.bilevel.sigma import ReciprocalSigma, SigmaSchedule, schedule_of

Pair = Literal["auto", "vmap", "stacked", "calls"]
GROWTH, HALVINGS = 1.5, 3
"""`||x - z|| / sigma` that grows by this factor at each of so many halvings of sigma does not stay bounded."""


class PenaltyBilevel(BilevelMethod):
    """Descend on the penalised hyper-objective with first-order gradients alone.

    Double loop, for each outer step k (algorithm 1):

        repeat inner_steps times, or until both projected gradients have norm <= inner_tol * sigma:
            z <- P(z - inner_lr * (lower'(z) + (z - z_k) / prox))
            x <- P(x - inner_lr / (1 + sigma) * (sigma upper'(x) + lower'(x) + (x - x_k) / prox))
        theta <- P(theta - lr * gradient of psi_sigma)

    Single loop (algorithm 2): one such step each, with every gradient replaced by the recursive momentum
    `v_k = F'(w_k; batch) + momentum * (v_{k-1} - F'(w_{k-1}; batch))`, kept for `upper` and `lower` apart.

    Args:
        levels, x, theta, lower_set, upper_set: see `BilevelMethod`.
        lr, inner_lr: steps of theta, and of x and z.
        sigma: a schedule, or a positive number.
        mode: "double" or "single".
        inner_steps: in the double loop, for each proximal point.
        inner_tol: relative to sigma, since an inner error e becomes an error of the order e / sigma; None makes all steps.
        prox: rho of the proximal term, which makes nonconvex inner problems well behaved; None for none.
        prox_steps: proximal points (T_k in the paper) for each outer step.
        momentum: of the single loop; 0 is plain stochastic gradient descent.
        z: where z begins; at x where nothing is said, so that both lie in one basin.
        share_batch: whether both lower gradients see one batch; where not, lower batches are pairs (for x, for z).
        pair: how x and z are evaluated: "vmap" in one vectorised forward; "stacked" likewise by a lower objective that itself takes
            tensors with a leading dimension of 2 and gives [2]; "calls" in two calls, with half the memory; "auto" takes "vmap" on
            an accelerator and "calls" on a CPU, where there is no launch to save.

    State: x, z, theta, sigma, momentum, steps.

    Raises:
        InputError: sigma <= 0, another argument out of range, z of another form than x, and what `BilevelMethod` refuses.

    >>> two = Levels(lambda x, t, _: (x[0] - t[0]).square().sum() / 2, lambda x, t, _: (x[0] - 1).square().sum() / 2)
    >>> method = PenaltyBilevel(two, [torch.zeros(1)], [torch.zeros(1)], lr=0.5, inner_lr=0.5, sigma=0.1)
    >>> round(float(method.run(60).theta[0]), 4)
    1.0
    """

    moving: ClassVar[tuple[str, ...]] = ("x", "theta", "z", "_estimates", "_previous")
    counting: ClassVar[tuple[str, ...]] = ("steps", "sigma", "_marks", "_warned")

    def __init__(
        self,
        levels: Levels,
        x: Sequence[Tensor],
        theta: Sequence[Tensor],
        *,
        lr: float,
        inner_lr: float,
        sigma: SigmaSchedule | float | None = None,
        mode: Literal["double", "single"] = "double",
        inner_steps: int = 10,
        inner_tol: float | None = None,
        prox: float | None = None,
        prox_steps: int = 1,
        momentum: float = 0.9,
        z: Sequence[Tensor] | None = None,
        lower_set: ConvexSet | Sequence[ConvexSet | None] | None = None,
        upper_set: ConvexSet | Sequence[ConvexSet | None] | None = None,
        share_batch: bool = True,
        pair: Pair = "auto",
    ) -> None:
        super().__init__(levels, x, theta, lower_set=lower_set, upper_set=upper_set)
        self.schedule = schedule_of(ReciprocalSigma(least=0.02) if sigma is None else sigma)
        self.lr, self.inner_lr, self.mode = lr, inner_lr, mode
        self.inner_steps, self.inner_tol, self.prox, self.prox_steps = inner_steps, inner_tol, prox, prox_steps
        self.momentum, self.share_batch = momentum, share_batch
        self._check_arguments(pair)
        self.pair: Pair = ("vmap" if self.x[0].device.type != "cpu" else "calls") if pair == "auto" else pair
        self.sigma = self.schedule.start
        self.z: Tensors = self._start_of_z(z)
        self._estimates: Tensors = ()
        self._previous: Tensors = ()
        self._marks: list[float] = []
        self._warned = False
        self._upper: Tensor | None = None

    # ---- one outer step ----------------------------------------------------------------------------------------------

    def _step(self, lower_batch: Any, upper_batch: Any) -> Outer:
        sigma = self.sigma
        if self.mode == "single":
            upper, gradient, residual = self._single(lower_batch, upper_batch)
        else:
            residual = self._inner(lower_batch, upper_batch)
            upper, gradient = self.hypergradient(turn(lower_batch, -1), upper_batch)
            self._upper = None  # belongs to this step's batch
        self.theta = project(self.upper_sets, shifted(self.theta, -self.step_size("theta"), gradient))
        gradient_norm = norm(gradient)
        gap = norm(shifted(self.x, -1.0, self.z)) / sigma
        self.sigma = self.schedule.after(sigma, self.steps, float(gradient_norm) if self.schedule.looks else math.nan)
        if self.sigma < sigma:
            self._mark(gap)
        return Outer(upper, gradient_norm, residual=residual, gap=gap)

    def step_size(self, variable: Literal["theta", "x", "z"]) -> float:
        """Return the step of a variable at this outer step, before the division by 1 + sigma."""
        return self.lr if variable == "theta" else self.inner_lr

    def hypergradient(self, lower_batch: Any = None, upper_batch: Any = None) -> tuple[Tensor, Tensors]:
        """Return the upper objective and the gradient of psi_sigma at the present x, z and theta, both detached."""
        value, direct = self._direct(upper_batch)
        for_x, for_z = self._batches(lower_batch)
        at_x = self.levels.lower_gradient_of_theta(self.x, self.theta, for_x)
        at_z = self.levels.lower_gradient_of_theta(self.z, self.theta, for_z)
        return value, shifted(direct, 1 / self.sigma, shifted(at_x, -1.0, at_z))

    def _direct(self, upper_batch: Any) -> tuple[Tensor, Tensors]:
        """Return the upper objective and its direct gradient: where it reads no theta, the last value that an inner step saw, and 0."""
        if self.direct or self._upper is None:
            return self.levels.upper_gradient_of_theta(self.x, self.theta, upper_batch)
        return self._upper, tuple(torch.zeros_like(t) for t in self.theta)

    # ---- the double loop ---------------------------------------------------------------------------------------------

    def _inner(self, lower_batch: Any, upper_batch: Any) -> Tensor:
        """Move x and z towards their minimisers; return the larger norm of their last projected gradients."""
        residual = self.x[0].new_zeros(())
        for _ in range(self.prox_steps):
            anchors = (self.x, self.z)
            for i in range(self.inner_steps):
                at_x, at_z = self._inner_gradients(turn(lower_batch, i), upper_batch)
                if self.prox is not None:
                    at_x = shifted(at_x, 1 / self.prox, shifted(self.x, -1.0, anchors[0]))
                    at_z = shifted(at_z, 1 / self.prox, shifted(self.z, -1.0, anchors[1]))
                last = i == self.inner_steps - 1
                residual = self._move(at_x, at_z, measure=last or self.inner_tol is not None)
                if self.inner_tol is not None and float(residual) <= self.inner_tol * self.sigma:
                    break
        return residual

    def _inner_gradients(self, lower_batch: Any, upper_batch: Any) -> tuple[Tensors, Tensors]:
        """Return d(sigma upper + lower)/dx at x, and d lower/dx at z."""
        levels, theta, (for_x, for_z) = self.levels, self.theta, self._batches(lower_batch)
        levels.counters.lower_gradients += 2
        levels.counters.upper_gradients += 1
        with torch.enable_grad():
            if self.pair == "calls" or not self.share_batch:
                x, z = leaves(self.x), leaves(self.z)
                upper = levels.upper(x, theta, upper_batch)
                self._upper = upper.detach()
                at_x = gradients(self.sigma * upper + levels.lower(x, theta, for_x), x)
                return at_x, gradients(levels.lower(z, theta, for_z), z)
            both = tuple(torch.stack([a, b]).requires_grad_() for a, b in zip(self.x, self.z, strict=True))
            if self.pair == "vmap":
                values = torch.func.vmap(levels.lower, in_dims=(0, None, None))(both, theta, for_x)
            else:
                values = levels.lower(both, theta, for_x)
            upper = levels.upper(tuple(t[0] for t in both), theta, upper_batch)
            self._upper = upper.detach()
            found = gradients(values.sum() + self.sigma * upper, both)
        return tuple(g[0] for g in found), tuple(g[1] for g in found)

    def _move(self, at_x: Tensors, at_z: Tensors, measure: bool = True) -> Tensor:
        """Step x and z against gradients of `sigma upper + lower` and `lower`; return the larger projected gradient's norm."""
        by_x, by_z = self.step_size("x") / (1 + self.sigma), self.step_size("z")
        x = project(self.lower_sets, shifted(self.x, -by_x, at_x))
        z = project(self.lower_sets, shifted(self.z, -by_z, at_z))
        old_x, old_z, self.x, self.z = self.x, self.z, x, z
        if not measure:
            return x[0].new_zeros(())
        return torch.maximum(norm(shifted(x, -1.0, old_x)) / by_x, norm(shifted(z, -1.0, old_z)) / by_z)

    # ---- the single loop ---------------------------------------------------------------------------------------------

    def _single(self, lower_batch: Any, upper_batch: Any) -> tuple[Tensor, Tensors, Tensor]:
        """Return the upper objective, the estimate of the hypergradient, and the inner residual, having moved x and z."""
        before = (*self.x, *self.z, *self.theta)
        batch, n, m = turn(lower_batch, 0), len(self.x), len(self.theta)
        first = 3 * n  # of the estimates, those of the inner gradients: upper'(x), lower'(x), lower'(z)
        # At the previous point the outer gradients saw the x and z of now and the theta of then.
        last_x, last_z, last_theta = self._previous[:n], self._previous[n : 2 * n], self._previous[2 * n :]
        inner = self._parts_below(self.x, self.z, self.theta, batch, upper_batch)
        if self._estimates and self.momentum:
            then = self._parts_below(last_x, last_z, last_theta, batch, upper_batch)
            inner = self._corrected(inner, self._estimates[:first], then)
        upper_x, lower_x, lower_z = inner[:n], inner[n : 2 * n], inner[2 * n :]
        old_x, old_z = self.x, self.z
        residual = self._move(shifted(lower_x, self.sigma, upper_x), lower_z)
        value, outer = self._parts_above(self.x, self.z, self.theta, batch, upper_batch)
        if self._estimates and self.momentum:
            _, earlier = self._parts_above(old_x, old_z, last_theta, batch, upper_batch)
            outer = self._corrected(outer, self._estimates[first:], earlier)
        self._estimates, self._previous = (*inner, *outer), before
        return value, shifted(outer[:m], 1 / self.sigma, outer[m:]), residual

    def _parts_below(self, x: Tensors, z: Tensors, theta: Tensors, batch: Any, upper_batch: Any) -> Tensors:
        for_x, for_z = self._batches(batch)
        upper_x = self.levels.upper_gradients(x, theta, upper_batch)[1]
        return (*upper_x, *self.levels.lower_gradient(x, theta, for_x), *self.levels.lower_gradient(z, theta, for_z))

    def _parts_above(
        self, x: Tensors, z: Tensors, theta: Tensors, batch: Any, upper_batch: Any
    ) -> tuple[Tensor, Tensors]:
        for_x, for_z = self._batches(batch)
        value, _, direct = self.levels.upper_gradients(x, theta, upper_batch)
        at_x = self.levels.lower_gradient_of_theta(x, theta, for_x)
        return value, (*direct, *shifted(at_x, -1.0, self.levels.lower_gradient_of_theta(z, theta, for_z)))

    def _corrected(self, now: Tensors, estimate: Tensors, then: Tensors) -> Tensors:
        """Return `now + momentum (estimate - then)`: the recursive momentum, whose error shrinks with the way between both points."""
        return shifted(now, self.momentum, shifted(estimate, -1.0, then))

    # ---- what is watched and checked ---------------------------------------------------------------------------------

    def _mark(self, gap: Tensor) -> None:
        """Remember the gap at each halving of sigma, and say when it grows every time: there the penalty is not exact."""
        halvings = math.log2(self.schedule.start / self.sigma)
        if self._warned or halvings < len(self._marks):
            return
        self._marks.append(float(gap))
        recent = self._marks[-HALVINGS - 1 :]
        if len(recent) > HALVINGS and all(b > GROWTH * a > 0 for a, b in itertools.pairwise(recent)):
            self._warned = True
            warn(
                f"penalty not exact here: ||x - z|| / sigma grew from {recent[0]:.3g} to {recent[-1]:.3g} while sigma fell to "
                f"{self.sigma:.3g}, and should stay bounded. Make more inner steps, keep sigma larger (least=...), or look with "
                "penalty_sweep; where the lower level has many solutions, start z at x.",
                PoiseWarning,
                stacklevel=4,
            )

    def _batches(self, lower_batch: Any) -> tuple[Any, Any]:
        return (lower_batch, lower_batch) if self.share_batch or lower_batch is None else lower_batch

    def _start_of_z(self, z: Sequence[Tensor] | None) -> Tensors:
        if z is None:
            return tuple(t.clone() for t in self.x)
        forms = [tuple(t.shape) for t in self.x]
        if [tuple(t.shape) for t in z] != forms:
            raise InputError(
                f"PenaltyBilevel: z must have the shapes of x, {forms}, and has {[tuple(t.shape) for t in z]}."
            )
        return project(self.lower_sets, tuple(t.clone() for t in detached(z)))

    def _check_arguments(self, pair: str) -> None:
        positive: dict[str, float | None] = {
            "lr": self.lr,
            "inner_lr": self.inner_lr,
            "inner_steps": self.inner_steps,
            "inner_tol": self.inner_tol,
            "prox": self.prox,
            "prox_steps": self.prox_steps,
        }
        for name, value in positive.items():
            if value is not None and not value > 0:
                raise InputError(f"PenaltyBilevel: {name} must be positive, and it is {value}.")
        if self.mode not in ("double", "single"):
            raise InputError(f"PenaltyBilevel: mode is 'double' or 'single', and it is {self.mode!r}.")
        if not 0 <= self.momentum < 1:
            raise InputError(f"PenaltyBilevel: momentum lies in [0, 1), and it is {self.momentum}.")
        if pair not in ("auto", "vmap", "stacked", "calls"):
            raise InputError(f"PenaltyBilevel: pair is 'auto', 'vmap', 'stacked' or 'calls', and it is {pair!r}.")
        floor = 1e-6 if self.x[0].dtype == torch.float64 else 1e-3
        end = self.schedule.start if type(self.schedule).__name__ == "ConstantSigma" else self.schedule.least
        if 0 < end < floor:
            warn(
                f"PenaltyBilevel: sigma goes down to {end:g}, where the difference of two gradients in {self.x[0].dtype} divided by "
                f"it is mostly rounding; stay at {floor:g} or above.",
                PoiseWarning,
                stacklevel=3,
            )
