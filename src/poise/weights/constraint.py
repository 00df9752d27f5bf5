"""Constraints: a weight that rises while the constraint is violated.

    minimise f   subject to   g <= upper,   g >= lower   or   g = equal

With the violation `v = g - upper`, `lower - g` or `g - equal`, measured in every step, four rules set the weight of `g`:

    dual ascent             multiplier <- max(0, multiplier + lr*v)                          weight = multiplier
    with damping            multiplier <- max(0, multiplier + lr*v + damping*(e - e_before))  weight = multiplier
                            where e = smoothing*e_before + (1 - smoothing)*v
    augmented Lagrangian    multiplier <- max(0, multiplier + lr*v)                          weight = max(0, multiplier + rho*v)
    proxy                   as any of these, the weight on a term that can be differentiated, `v` of another that need not be

An equality has no `max`. At a solution every rule stands still, and `(x, multiplier)` is a KKT point.

**Which step's violation.** The weight of a step is set by the violation of the step before. So it is one number for the whole
step: the same for every micro-batch and process without a second pass, the same in a line search or a closure that evaluates
twice, and the step minimises `f + weight*g`, whose gradient is the gradient of its value. The price is the lag: the quadratic
term of the augmented Lagrangian `rho/2 max(0, v + multiplier/rho)^2` is stable for `step size * rho * |grad g|^2 < 1`, half of
what it would be at the current value.

Sources: Arrow, Hurwicz and Uzawa (1958); Hestenes (1969) and Powell (1969) for the augmented Lagrangian; Stooke et al.,
arXiv:2007.03964, and Sohrabi et al., arXiv:2406.04558, Algorithm 1, for the damped step; Cotter et al., arXiv:1804.06500, for proxies.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from poise.coefficient import Clock, Coefficient, Number, leaves_of, text, value_of
from poise.errors import InputError
from poise.objective import Objective, Summand, Term

METHODS = ("dual", "augmented")
_ENOUGH = 0.75
"""A window's violation that has fallen to this share of the last window's needs no larger penalty."""
_MOST = 1000.0
"""How far the penalty may grow, in multiples of its first value."""
_DEFAULTS: dict[str, Any] = {
    "lr": 0.05, "initial": 0.0, "method": "dual", "damping": 0.0, "smoothing": 0.0, "rho": 1.0, "growth": 1.0, "every": 50,
    "largest": None, "tolerance": None,
}  # fmt: skip


class Constraint(nn.Module):
    """A dual variable: the multiplier of one constraint.

    Args:
        upper: the value that may not be exceeded; or
        lower: the value that may not be fallen short of; or
        equal: the value to hold. Exactly one of the three.
        lr: step of the dual ascent, per unit of violation; positive.
        initial: the multiplier at first, >= 0 (any sign for `equal`).
        method: "dual" or "augmented".
        damping: proportional gain of the dual step, >= 0; it answers a change of the violation at once, so that the multiplier
            overshoots less. For "dual".
        smoothing: share of the moving average of the violation that the damping looks at, in [0, 1).
        rho: the penalty of "augmented", positive.
        growth: factor >= 1 by which `rho` grows after `every` steps over which the violation kept its sign, stayed above the
            tolerance and did not fall to three quarters of that of the steps before; at most 1000-fold in all. 1 keeps it.
        every: steps between two looks at the growth, >= 1.
        largest: what the multiplier and the weight may reach, positive; by default there is no end, and a bound that cannot be
            met drives them up until the steps of training are too long.
        tolerance: violation that is taken for feasible, >= 0; by default 1 % of the bound, or 0.01 for a bound of 0.

    Buffers, float64 and 0-dim: `multiplier`; `violation` (the last one measured, signed; positive is infeasible); `margin` (by how
    much training holds the bound more strictly than it was written, see `TightenOnValidation`); and what the rule needs.

    Raises:
        InputError: not exactly one bound, or an argument out of its range.
    """

    formula: ClassVar[str] = "constraint"
    multiplier: Tensor
    violation: Tensor
    margin: Tensor
    smoothed: Tensor
    rho: Tensor
    window: Tensor

    def __init__(
        self,
        upper: float | None = None,
        lower: float | None = None,
        lr: float = 0.05,
        initial: float = 0.0,
        *,
        equal: float | None = None,
        method: str = "dual",
        damping: float = 0.0,
        smoothing: float = 0.0,
        rho: float = 1.0,
        growth: float = 1.0,
        every: int = 50,
        largest: float | None = None,
        tolerance: float | None = None,
    ) -> None:
        super().__init__()
        bounds = {k: v for k, v in (("upper", upper), ("lower", lower), ("equal", equal)) if v is not None}
        if len(bounds) != 1:
            raise InputError("constraint: give exactly one of 'upper', 'lower' and 'equal'.")
        ((self.kind, self.bound),) = bounds.items()
        if not math.isfinite(self.bound):
            raise InputError(f"constraint: {self.kind} must be a finite number, and it is {self.bound}.")
        self.given: dict[str, Any] = {
            "lr": lr, "initial": initial, "method": method, "damping": damping, "smoothing": smoothing, "rho": rho,
            "growth": growth, "every": every, "largest": largest, "tolerance": tolerance,
        }  # fmt: skip
        self._check()
        self.lr, self.initial, self.method, self.damping, self.smoothing = lr, initial, method, damping, smoothing
        self.growth, self.every, self.largest = growth, every, largest
        self.tolerance = tolerance if tolerance is not None else 0.01 * (abs(self.bound) or 1.0)
        self._state("multiplier", initial)
        self._state("violation", 0.0)
        self._state("margin", 0.0)
        if damping:
            self._state("smoothed", 0.0)
        if method == "augmented":
            self._state("rho", rho)
        if method == "augmented" and growth > 1:
            # The sum of the violations of this window, the sum of their sizes, their number, and the size of the last window's mean.
            self.register_buffer("window", torch.tensor([0.0, 0.0, 0.0, math.inf], dtype=torch.float64))

    def _state(self, name: str, value: float) -> None:
        self.register_buffer(name, torch.tensor(float(value), dtype=torch.float64))

    def _check(self) -> None:
        given = self.given
        if given["method"] not in METHODS:
            raise InputError(f"constraint: method is 'dual' or 'augmented', and it is {given['method']!r}.")
        ranges: dict[str, tuple[bool, str]] = {
            "lr": (given["lr"] > 0, "positive"),
            "initial": (given["initial"] >= 0 or self.kind == "equal", ">= 0"),
            "damping": (given["damping"] >= 0, ">= 0"),
            "smoothing": (0 <= given["smoothing"] < 1, "in [0, 1)"),
            "rho": (given["rho"] > 0, "positive"),
            "growth": (given["growth"] >= 1, ">= 1"),
            "every": (given["every"] >= 1, ">= 1"),
            "largest": (given["largest"] is None or given["largest"] > 0, "positive"),
            "tolerance": (given["tolerance"] is None or given["tolerance"] >= 0, ">= 0"),
        }
        for name, (holds, wanted) in ranges.items():
            if not holds or (given[name] is not None and name != "method" and not math.isfinite(given[name])):
                raise InputError(f"constraint: {name} must be {wanted} and finite, and it is {given[name]}.")
        other = {"dual": ("rho", "growth", "every"), "augmented": ("damping", "smoothing")}[given["method"]]
        for name in other:
            if given[name] != _DEFAULTS[name]:
                fitting = "augmented" if given["method"] == "dual" else "dual"
                raise InputError(
                    f"constraint: {name} belongs to method='{fitting}', and the method is '{given['method']}'. Leave it out, "
                    f"or write method='{fitting}'."
                )
        if given["smoothing"] and not given["damping"]:
            raise InputError(
                "constraint: smoothing is that of the damping, and damping is 0. Give damping=..., or leave it out."
            )

    @property
    def sign(self) -> float:
        """1 for an upper bound and an equality, -1 for a lower bound."""
        return -1.0 if self.kind == "lower" else 1.0

    @property
    def weight(self) -> Tensor:
        """What stands before the constrained term in this step, 0-dim float64."""
        price = self.multiplier + self.rho * self.violation if self.method == "augmented" else self.multiplier
        return self.sign * self._clamped(price)

    def advance(self, measured: Tensor | float) -> None:
        """Move the multiplier by the violation of the value that was measured in this step; one that is not finite moves nothing."""
        value = torch.as_tensor(measured, dtype=torch.float64, device=self.multiplier.device).detach()
        violation = self.sign * (value - self.bound) + self.margin
        finite = torch.isfinite(violation)
        step = self.lr * torch.where(finite, violation, 0.0)
        self.violation = torch.where(finite, violation, self.violation)
        if self.damping:
            moved = torch.where(finite, (1 - self.smoothing) * (self.violation - self.smoothed), 0.0)
            step, self.smoothed = step + self.damping * moved, self.smoothed + moved
        if "window" in self._buffers:
            self._grow(finite.double())
        self.multiplier = self._clamped(self.multiplier + step)

    def _clamped(self, price: Tensor) -> Tensor:
        price = price if self.kind == "equal" else price.clamp_min(0.0)
        return price if self.largest is None else price.clamp(-self.largest, self.largest)

    def _grow(self, one: Tensor) -> None:
        """Let the penalty grow where a window of steps brought too little; without waiting for the device."""
        # A constraint with room to spare is settled as soon as its multiplier is 0: Bertsekas (1982), section 2.2.
        left = self.violation if self.kind == "equal" else torch.maximum(self.violation, -self.multiplier / self.rho)
        total, sizes, count, before = self.window + one * torch.stack(
            [left, self.violation.abs(), one, torch.zeros_like(one)]
        )
        full = count >= self.every
        now = total.abs() / count
        # Where the sign changes the primal steps overshoot, and a larger penalty would make that worse.
        steady = total.abs() > 0.9 * sizes
        stuck = full & steady & (now > self.tolerance) & (now > _ENOUGH * before)
        self.rho = torch.where(stuck, (self.rho * self.growth).clamp_max(_MOST * self.given["rho"]), self.rho)
        zero = torch.zeros_like(total)
        self.window = torch.where(
            full, torch.stack([zero, zero, zero, now]), torch.stack([total, sizes, count, before])
        )

    def arguments(self) -> str:
        """Print the arguments as a formula has them."""
        rest = [
            f"{name}={value!r}" if isinstance(value, str) else f"{name}={text(value)}"
            for name, value in self.given.items()
            if value != _DEFAULTS[name]
        ]
        return ", ".join([f"{self.kind}={text(self.bound)}", *rest])

    def _apply(self, fn: Any, recurse: bool = True) -> Constraint:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            moved = self._buffers[name]
            assert buffer is not None
            assert moved is not None
            # To another device, and to no other dtype: a multiplier rounded on the way would not be the one that was saved.
            setattr(self, name, buffer.to(moved.device))
        return self


class Multiplier(Protocol):
    """What moves a weight by the value that its terms had: a `Constraint`, or a controller."""

    formula: ClassVar[str]

    @property
    def weight(self) -> Tensor: ...

    def advance(self, measured: Tensor | float) -> None: ...

    def arguments(self) -> str: ...


class PricedWeight(Coefficient):
    """The weight of one term under a multiplier: `weight * inner`."""

    inner: Number | Coefficient

    @property
    def owner(self) -> Multiplier:
        """The multiplier that sets this weight."""
        raise NotImplementedError

    def value(self, clock: Clock) -> float | Tensor:
        return self.owner.weight.float() * value_of(self.inner, clock)

    def leaves(self) -> Iterator[Coefficient]:
        yield self
        yield from leaves_of(self.inner)

    def replace(self, table: dict[Coefficient, Number | Coefficient]) -> Coefficient:
        inner = self.inner.replace(table) if isinstance(self.inner, Coefficient) else self.inner
        return replace(self, inner=inner)  # type: ignore[type-var]

    def __str__(self) -> str:
        return f"<multiplier of {self.owner.arguments()}>"


@dataclass(frozen=True, repr=False, eq=False)
class DualWeight(PricedWeight):
    """The weight of a term whose value moves the multiplier."""

    module: Multiplier
    inner: Number | Coefficient = 1

    @property
    def owner(self) -> Multiplier:
        return self.module


class MeasuredWeight(DualWeight):
    """The weight of a term that is measured and not charged: 0, while its value moves the multiplier."""

    def value(self, clock: Clock) -> float | Tensor:
        return 0.0

    def __str__(self) -> str:
        return f"0, measured for {self.owner.arguments()}"


@dataclass(frozen=True, repr=False, eq=False)
class ProxyWeight(PricedWeight):
    """The weight of a term that is charged in place of one that is measured; its own value moves nothing."""

    # Not `module`: by that name an objective finds the terms whose values move a multiplier.
    of: Multiplier
    inner: Number | Coefficient = 1

    @property
    def owner(self) -> Multiplier:
        return self.of


def constraint(
    constrained: Term | Objective,
    upper: float | None = None,
    lower: float | None = None,
    lr: float = 0.05,
    initial: float = 0.0,
    *,
    equal: float | None = None,
    method: str = "dual",
    damping: float = 0.0,
    smoothing: float = 0.0,
    rho: float = 1.0,
    growth: float = 1.0,
    every: int = 50,
    largest: float | None = None,
    tolerance: float | None = None,
    measured: Term | Objective | None = None,
) -> Objective:
    """Return a term or a sum of terms as a constraint: `cross_entropy + constraint(kl, upper=0.5)`.

    Args:
        constrained: what is bounded; a sum is bounded as a whole.
        measured: what the bound speaks of where that is not `constrained` itself: a term or a sum that is evaluated without a
            gradient and need not have one (`constraint(cross_entropy.on("rare"), measured=error_rate.on("rare"), upper=0.1)`).
        upper, lower, equal, lr, initial, method, damping, smoothing, rho, growth, every, largest, tolerance: see `Constraint`.

    Raises:
        InputError: not exactly one bound, an argument out of its range, or a constraint within a constraint.

    >>> from poise.terms import CrossEntropy, L2
    >>> str(CrossEntropy() + constraint(L2(), upper=50, method="augmented"))
    "cross_entropy + constraint(l2, upper=50, method='augmented')"
    """
    module = Constraint(
        upper, lower, lr, initial, equal=equal, method=method, damping=damping, smoothing=smoothing, rho=rho, growth=growth,
        every=every, largest=largest, tolerance=tolerance,
    )  # fmt: skip
    charged = _summands(constrained)
    if not charged:
        # A weight that is the number 0 removes its term, and with all its terms a constraint.
        return Objective()
    if measured is None:
        return Objective(replace(s, weight=DualWeight(module, s.weight)) for s in charged)
    seen = [replace(s, term=_without_gradient(s.term)) for s in _summands(measured)]
    if not seen:
        raise InputError("constraint: measured has no term; a weight that is the number 0 removes its term.")
    return Objective(
        [
            *(replace(s, weight=ProxyWeight(module, s.weight)) for s in charged),
            *(replace(s, weight=MeasuredWeight(module, s.weight)) for s in seen),
        ]
    )


def _summands(given: Term | Objective) -> tuple[Summand, ...]:
    summands = given.summands if isinstance(given, Objective) else (Summand(given),)
    if any(isinstance(leaf, PricedWeight) for s in summands for leaf in leaves_of(s.weight)):
        raise InputError("constraint: a constraint cannot be constrained again.")
    return summands


def _without_gradient(term: Term) -> Term:
    """Return a copy of the term, everything in it shared, that is evaluated without a graph: it is looked at only."""
    kind = type(term)
    if kind not in _LOOKING:
        _LOOKING[kind] = torch.no_grad()(kind.forward)
    twin = copy.copy(term)
    twin.__dict__["forward"] = MethodType(_LOOKING[kind], twin)
    return twin


_LOOKING: dict[Any, Callable[..., Any]] = {}
"""The `forward` of a class of terms without a gradient, by the class."""
