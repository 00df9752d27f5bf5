"""What is tuned and is not a weight: a dropout rate, the strength of an augmentation, a learning rate, a number of holes.

A `Hyperparameter` holds one number in a range. A policy moves an unconstrained variable `h`, and whoever uses the number reads
`r(h)`, which stays in the range wherever `h` goes:

    interval (a, b)      r(h) = a + (b - a) sigmoid(h)          on a log scale  exp(log a + (log b - log a) sigmoid(h))
    half-line (a, inf)   r(h) = a + softplus(h)                 on a log scale  a exp(softplus(h)), and exp(h) where a = 0
    discrete {a..b}      floor(r(h)), r of the interval (a, b + 1)

It is a module, so that a model that uses it saves and copies it; the variable is a buffer, so that no optimiser of the model moves it:

    rate = Hyperparameter("dropout", 0.05, 0, 0.9)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), TunedDropout(rate), nn.Linear(256, 10))
    objective = CrossEntropy() + Hyperparameter("decay", 1e-4, 1e-7, 1, per_example=False, scale="log") * L2()
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from poise.coefficient import Clock, Coefficient
from poise.errors import InputError
from poise.objective import Objective, Summand, Term
from poise.quantities import describe

__all__ = ["Hyperparameter", "HyperparameterWeight", "check_names"]

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*\Z")


class _Live:
    """What changes at every step, outside `nn.Module`, whose assignments are slow."""

    __slots__ = ("current", "used")

    def __init__(self) -> None:
        self.current: Tensor | None = None
        self.used = False


class Hyperparameter(nn.Module):
    """One tuned number, held in its range.

    Args:
        name: letters, digits and underscores; the weight of a term is tuned by a hyperparameter of the term's name.
        start: the value at first, inside the range; one of its values where it is discrete.
        low, high: the range: open, or with both ends where it is discrete. `high` may be infinite.
        discrete: an integer from `low` to `high`.
        per_example: examples of a batch may have values of their own. False for what acts on something that they share: a mask on
            weights, a penalty on parameters, a learning rate.
        scale: "linear" or "log": on which scale the range is walked.

    Buffers: `raw`, float64 0-dim, the unconstrained variable.

    Raises:
        InputError: the range is empty, negative or infinite below, the start lies outside, fewer than two discrete values, or a log
            scale that reaches 0.

    >>> rate = Hyperparameter("dropout", 0.25, 0, 1)
    >>> round(float(rate.raw), 4), round(float(rate), 4)
    (-1.0986, 0.25)

    Source: arXiv:1903.03088, section 4.
    """

    __array_ufunc__ = None
    raw: Tensor

    def __init__(
        self,
        name: str,
        start: float,
        low: float,
        high: float,
        discrete: bool = False,
        per_example: bool = True,
        scale: Literal["linear", "log"] = "linear",
    ) -> None:
        super().__init__()
        self.name, self.start, self.low, self.high = name, float(start), float(low), float(high)
        self.discrete, self.per_example, self.scale = discrete, per_example, scale
        self._check()
        self._top = self.high + 1 if discrete else self.high
        self.register_buffer("raw", self.unconstrain(self.start))
        self._live = _Live()

    @property
    def used(self) -> bool:
        """Whether somebody has read it since a policy said `used = False`."""
        return self._live.used

    @used.setter
    def used(self, value: bool) -> None:
        self._live.used = value

    def _check(self) -> None:
        what = f"Hyperparameter {self.name!r}"
        if not _NAME.match(self.name):
            raise InputError(f"{what}: a name has letters, digits and underscores, and begins with a letter.")
        if self.scale not in ("linear", "log"):
            raise InputError(f"{what}: scale is 'linear' or 'log', and it is {self.scale!r}.")
        if any(map(math.isnan, (self.start, self.low, self.high))):
            raise InputError(f"{what}: start, low and high must be numbers; they are {self._range()}.")
        if math.isinf(self.low):
            raise InputError(
                f"{what}: the range must end below, and it is {self._range()}. Give a finite low; high may be infinite."
            )
        if self.discrete:
            self._check_discrete(what)
        elif not self.low < self.high:
            raise InputError(f"{what}: low must lie below high, and the range is {self._range()}.")
        if self.scale == "log" and (self.low < 0 or (self.low == 0 and math.isfinite(self.high))):
            raise InputError(
                f"{what}: on a log scale the range must be positive, and it is {self._range()}. Give a small positive low, or "
                "scale='linear'."
            )
        inside = self.low <= self.start <= self.high if self.discrete else self.low < self.start < self.high
        if not inside or math.isinf(self.start):
            hint = "" if self.discrete else " The ends themselves are never reached, so start between them."
            raise InputError(f"{what}: the start {self.start:g} lies outside the range {self._range()}.{hint}")

    def _check_discrete(self, what: str) -> None:
        if any(math.isfinite(v) and v != int(v) for v in (self.start, self.low, self.high)):
            raise InputError(
                f"{what}: a discrete range has whole numbers, and start, low, high are {self.start:g}, {self.low:g}, {self.high:g}."
            )
        if self.high < self.low + 1:
            raise InputError(f"{what}: a discrete range needs two values at least, and this one is {self._range()}.")

    def _range(self) -> str:
        return f"[{self.low:g}, {self.high:g}]" if self.discrete else f"({self.low:g}, {self.high:g})"

    # ---- the range ---------------------------------------------------------------------------------------------------

    def relax(self, raw: Tensor) -> Tensor:
        """Return r(h) before the floor, of the shape of `raw`: differentiable for every hyperparameter."""
        bounded = math.isfinite(self.high)
        if self.scale == "log":
            if bounded:
                low = math.log(self.low)
                return torch.exp(low + (math.log(self._top) - low) * torch.sigmoid(raw))
            return torch.exp(raw) if self.low == 0 else self.low * torch.exp(functional.softplus(raw))
        return self.low + ((self._top - self.low) * torch.sigmoid(raw) if bounded else functional.softplus(raw))

    def constrain(self, raw: Tensor) -> Tensor:
        """Return the value r(h), floored where it is discrete (its gradient is 0 then), of the shape of `raw`."""
        value = self.relax(raw)
        # Far out the sigmoid is 1 exactly, and the floor would be one more than the highest value.
        return value.floor().clamp(self.low, self.high) if self.discrete else value

    def unconstrain(self, value: float | Tensor) -> Tensor:
        """Return the variable h of a value, float64: the inverse of r, and the middle of a discrete value's cell.

        Raises:
            InputError: a value outside the range.
        """
        given = torch.as_tensor(value, dtype=torch.float64)
        inside = (
            (given >= self.low) & (given <= self.high) & (given == given.floor())
            if self.discrete
            else (given > self.low) & (given < self.high)
        )
        if not bool(inside.all()):
            kind = "one of the values of" if self.discrete else "inside"
            raise InputError(
                f"Hyperparameter {self.name!r}: a value must be {kind} {self._range()}, and it is {given.tolist()}."
            )
        if self.scale == "log":
            return self._unconstrain_log(given)
        r = given + 0.5 if self.discrete else given
        if math.isfinite(self.high):
            return torch.logit((r - self.low) / (self._top - self.low))
        return _inverse_softplus(r - self.low)

    def _unconstrain_log(self, given: Tensor) -> Tensor:
        r = torch.sqrt(given * (given + 1)) if self.discrete else given
        if math.isfinite(self.high):
            return torch.logit((torch.log(r) - math.log(self.low)) / (math.log(self._top) - math.log(self.low)))
        return torch.log(r) if self.low == 0 else _inverse_softplus(torch.log(r / self.low))

    def cut(self, value: float) -> float:
        """Return the nearest value that lies in the range; a hair inside its ends where they are open."""
        if self.discrete:
            return min(max(float(round(value)), self.low), self.high)
        if self.scale == "log":
            return min(max(value, self.low * (1 + 1e-9), 1e-300), self.high * (1 - 1e-9))
        width = self.high - self.low if math.isfinite(self.high) else max(1.0, abs(self.start))
        return min(max(value, self.low + 1e-9 * width), self.high - (1e-9 * width if math.isfinite(self.high) else 0.0))

    # ---- the value ---------------------------------------------------------------------------------------------------

    @property
    def value(self) -> Tensor:
        """The value r(h) of the variable itself, 0-dim float64."""
        return self.constrain(self.raw)

    def __float__(self) -> float:
        return float(self.value)

    def set(self, value: float) -> None:
        """Put the variable where it gives this value."""
        self.raw.copy_(self.unconstrain(float(value)))

    @torch.no_grad()
    def move(self, raw: Tensor | float) -> None:
        """Put the variable where a policy wants it.

        Raises:
            InputError: it is not finite.
        """
        moved = torch.as_tensor(raw, dtype=torch.float64)
        if not bool(torch.isfinite(moved)):
            raise InputError(
                f"Hyperparameter {self.name!r} would become {float(moved)}. Lower the learning rate of the policy that moves it."
            )
        self.raw.copy_(moved)

    def place(self, current: Tensor | None) -> None:
        """Say which variable is in use until the next call: float [batch], 0-dim, or None for `raw`. With a graph, `read` carries it.

        Raises:
            InputError: one value for each example of what examples share.
        """
        if current is not None and current.ndim and not self.per_example:
            raise InputError(
                f"Hyperparameter {self.name!r} is shared by the examples of a batch (per_example=False), and it was given "
                f"{describe(current)}."
            )
        self._live.current = current

    def read(self, like: Tensor | None = None, axis: int = 0) -> Tensor:
        """Return the value in use, 0-dim or one for each example, shaped to broadcast.

        Args:
            like: a tensor of examples along `axis`; gives dtype, device and the shape. None: float64, [batch] or 0-dim.
            axis: the axis of examples.

        Raises:
            InputError: other examples than those for which values were placed.
        """
        live = self._live
        live.used = True
        value = self.constrain(self.raw if live.current is None else live.current)
        if like is None:
            return value
        value = value.to(like.device, like.dtype if like.is_floating_point() else None)
        if not value.ndim:
            return value
        if like.shape[axis] != len(value):
            raise InputError(
                f"Hyperparameter {self.name!r} has {len(value)} values, one for each example of the step, and it is used on "
                f"{describe(like)} with examples along axis {axis}. Say the axis, or per_example=False."
            )
        return value.view([-1 if i == axis % like.ndim else 1 for i in range(like.ndim)])

    # ---- a weight ----------------------------------------------------------------------------------------------------

    def __mul__(self, term: Term | Objective) -> Objective:
        if isinstance(term, Term):
            term = Objective([Summand(term)])
        return term * HyperparameterWeight(self) if isinstance(term, Objective) else NotImplemented

    __rmul__ = __mul__

    # ---- what is kept ------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # What is placed belongs to the running step, and may hang on a graph.
        return {**self.__dict__, "_live": _Live()}

    def _apply(self, fn: Any, recurse: bool = True) -> Hyperparameter:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.raw = self.raw.double()
        return self

    def extra_repr(self) -> str:
        kind = ", discrete" if self.discrete else ""
        shared = "" if self.per_example else ", shared"
        return f"{self.name}={float(self):g} in {self._range()}{kind}{shared}{', log' if self.scale == 'log' else ''}"


@dataclass(frozen=True, repr=False, eq=False)
class HyperparameterWeight(Coefficient):
    """The weight of a term that is a hyperparameter's value: `Hyperparameter("decay", ...) * L2()`."""

    hyperparameter: Hyperparameter

    def value(self, clock: Clock) -> Tensor:
        return self.hyperparameter.read()

    def __str__(self) -> str:
        return f"<{self.hyperparameter.name}>"


def check_names(hyperparameters: Iterable[Hyperparameter], who: str) -> tuple[Hyperparameter, ...]:
    """Return the hyperparameters as a tuple.

    Raises:
        InputError: there is none, something else is among them, or two have one name.
    """
    given = tuple(hyperparameters)
    if not given:
        raise InputError(f"{who} has no hyperparameter to tune: give Hyperparameter(name, start, low, high) for each.")
    for each in given:
        if not isinstance(each, Hyperparameter):
            raise InputError(f"{who} tunes Hyperparameters, and it was given {describe(each)}.")
    names = [each.name for each in given]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise InputError(f"{who}: two hyperparameters are called {double[0]!r}. Give each a name of its own.")
    return given


def _inverse_softplus(value: Tensor) -> Tensor:
    """Return h with softplus(h) = value > 0: log(exp(value) - 1) without overflow."""
    return value + torch.log(-torch.expm1(-value))
