"""What may stand in front of a term: a number, a schedule, or something that a policy owns.

A coefficient is a small immutable expression. Numbers stay Python numbers; everything else is a `Coefficient`
that gives its value at a point of the run's `Clock` and prints as the formula that makes it:

    0.2                           a number
    linear(0, 1, steps=500)       a schedule: a pure function of the clock
    1 - linear(0, 0.8)            arithmetic on them
    auto                          found by a policy (`weights/`), which owns its value

Multiplying a coefficient with a term or an objective gives an objective; that half of the algebra is in `objective.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor

from poise.errors import InputError

Number = int | float


class Clock(NamedTuple):
    """Where the run stands: optimiser steps done, and the lengths that are known.

    Args:
        step: optimiser steps done so far, from 0.
        steps: optimiser steps of the whole run, or None where nobody said.
        steps_per_epoch: optimiser steps of one pass over the main stream, or None.
    """

    step: int = 0
    steps: int | None = None
    steps_per_epoch: int | None = None

    @property
    def epoch(self) -> int:
        """Passes over the main stream that are complete, from 0."""
        return self.step // (self.steps_per_epoch or self.require("steps_per_epoch"))

    @property
    def epochs(self) -> int:
        """Passes over the main stream that the run makes, the last one perhaps in part."""
        steps = self.steps or self.require("steps")
        return -(-steps // (self.steps_per_epoch or self.require("steps_per_epoch")))

    @property
    def progress(self) -> float:
        """Share of the run that is done, `step / steps`, in [0, 1]."""
        return min(1.0, self.step / self.require("steps"))

    def require(self, field: str) -> int:
        """Return a length of the run, or say how to give it."""
        value = getattr(self, field)
        if value is None:
            raise InputError(
                f"A schedule or a term needs {field!r} of the run, and nobody has said it. "
                f"poise.fit says it by itself; in a loop of your own call objective.bind({field}=...)."
            )
        return int(value)


class Tuned(Protocol):
    """An argument of a term that a policy tunes: a `Hyperparameter`."""

    def read(self, like: Tensor | None = None, axis: int = 0) -> Tensor:
        """Return the value in use, 0-dim or one for each example along `axis` of `like`."""
        ...


class Coefficient:
    """A weight that is not a plain number."""

    __array_ufunc__ = None
    binding: ClassVar[int] = 3
    """How tightly the printed form binds: 1 sum, 2 product, 3 atom."""
    moves: ClassVar[bool] = True
    """Whether the value changes with the optimiser's steps."""

    def value(self, clock: Clock) -> float | Tensor:
        """Return the weight at this point of the run: a number, or a tensor that carries no gradient unless the policy says so."""
        raise NotImplementedError(f"{type(self).__name__} must say its value")

    def leaves(self) -> Iterator[Coefficient]:
        """Give every coefficient of this expression that is not arithmetic."""
        yield self

    def replace(self, table: dict[Coefficient, Number | Coefficient]) -> Number | Coefficient:
        """Return the expression with some leaves replaced."""
        return table.get(self, self)

    def __add__(self, other: Any) -> Any:
        return add(self, other) if isinstance(other, Number | Coefficient) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        return add(other, self) if isinstance(other, Number | Coefficient) else NotImplemented

    def __sub__(self, other: Any) -> Any:
        return add(self, multiply(-1, other)) if isinstance(other, Number | Coefficient) else NotImplemented

    def __rsub__(self, other: Any) -> Any:
        return add(other, multiply(-1, self)) if isinstance(other, Number | Coefficient) else NotImplemented

    def __mul__(self, other: Any) -> Any:
        return multiply(self, other) if isinstance(other, Number | Coefficient) else NotImplemented

    def __rmul__(self, other: Any) -> Any:
        return multiply(other, self) if isinstance(other, Number | Coefficient) else NotImplemented

    def __neg__(self) -> Any:
        return multiply(-1, self)

    def __repr__(self) -> str:
        return str(self)


def add(left: Number | Coefficient, right: Number | Coefficient) -> Number | Coefficient:
    """Return `left + right`, a number where both are numbers."""
    if isinstance(left, Number) and isinstance(right, Number):
        return left + right
    if isinstance(left, Number) and left == 0:
        return right
    if isinstance(right, Number) and right == 0:
        return left
    return Sum(left, right)


def multiply(left: Number | Coefficient, right: Number | Coefficient) -> Number | Coefficient:
    """Return `left * right`, a number where both are numbers or where one is the number 0."""
    if isinstance(left, Number) and isinstance(right, Number):
        return left * right
    if isinstance(right, Number):
        left, right = right, left
    if isinstance(left, Number):
        if left == 0:
            return 0
        if left == 1:
            return right
        if isinstance(right, Product) and isinstance(right.left, Number):
            return multiply(left * right.left, right.right)
    return Product(left, right)


@dataclass(frozen=True, repr=False)
class Sum(Coefficient):
    """`left + right`."""

    left: Number | Coefficient
    right: Number | Coefficient
    binding = 1

    def value(self, clock: Clock) -> float | Tensor:
        return value_of(self.left, clock) + value_of(self.right, clock)

    def leaves(self) -> Iterator[Coefficient]:
        return _leaves(self.left, self.right)

    def replace(self, table: dict[Coefficient, Number | Coefficient]) -> Number | Coefficient:
        return add(_replace(self.left, table), _replace(self.right, table))

    def __str__(self) -> str:
        right = self.right
        if isinstance(right, Product) and isinstance(right.left, Number) and right.left < 0:
            return f"{text(self.left, 1)} - {text(multiply(-1, right), 2)}"
        return (
            f"{text(self.left, 1)} - {text(-right)}" if _negative(right) else f"{text(self.left, 1)} + {text(right, 2)}"
        )


@dataclass(frozen=True, repr=False)
class Product(Coefficient):
    """`left * right`."""

    left: Number | Coefficient
    right: Number | Coefficient
    binding = 2

    def value(self, clock: Clock) -> float | Tensor:
        return value_of(self.left, clock) * value_of(self.right, clock)

    def leaves(self) -> Iterator[Coefficient]:
        return _leaves(self.left, self.right)

    def replace(self, table: dict[Coefficient, Number | Coefficient]) -> Number | Coefficient:
        return multiply(_replace(self.left, table), _replace(self.right, table))

    def __str__(self) -> str:
        return f"{text(self.left, 2)}*{text(self.right, 3)}"


@dataclass(frozen=True, repr=False)
class Time(Coefficient):
    """A reading of the clock as a coefficient: `step`, `epoch` or `progress`."""

    reading: str

    def value(self, clock: Clock) -> float:
        return float(getattr(clock, self.reading))

    def __str__(self) -> str:
        return self.reading


def value_of(coefficient: Number | Coefficient, clock: Clock) -> float | Tensor:
    """Return the value of a number or a coefficient at a point of the run."""
    return coefficient.value(clock) if isinstance(coefficient, Coefficient) else coefficient


def leaves_of(coefficient: Number | Coefficient) -> tuple[Coefficient, ...]:
    """Return every coefficient of an expression that is not arithmetic; nothing for a number."""
    return tuple(coefficient.leaves()) if isinstance(coefficient, Coefficient) else ()


def text(coefficient: Number | Coefficient, binding: int = 1) -> str:
    """Print a coefficient so that `parse` reads it back, with parentheses where `binding` needs them.

    >>> text(0.5), text(3.0), text(1e-05)
    ('0.5', '3', '1e-05')
    """
    if isinstance(coefficient, Coefficient):
        return f"({coefficient})" if coefficient.binding < binding else str(coefficient)
    try:
        number = float(coefficient)
    except OverflowError:
        raise InputError("A weight must be a number below 1e308, and this one has hundreds of digits.") from None
    except (TypeError, ValueError):
        raise InputError(f"A weight must be a number, and this one is a {type(coefficient).__name__}.") from None
    if not math.isfinite(number):
        raise InputError(f"A weight must be a finite number, and this one is {coefficient}.")
    shown = str(int(number)) if number.is_integer() and abs(number) < 1e15 else repr(number)
    return f"({shown})" if number < 0 and binding > 1 else shown


def _negative(coefficient: Number | Coefficient) -> bool:
    return isinstance(coefficient, Number) and coefficient < 0


def _leaves(*parts: Number | Coefficient) -> Iterator[Coefficient]:
    for part in parts:
        if isinstance(part, Coefficient):
            yield from part.leaves()


def _replace(part: Number | Coefficient, table: dict[Coefficient, Number | Coefficient]) -> Number | Coefficient:
    return part.replace(table) if isinstance(part, Coefficient) else part
