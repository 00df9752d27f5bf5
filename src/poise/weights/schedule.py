"""Schedules: weights that are pure functions of the run's clock.

Every schedule moves from `start` to `end` over a span of the run and stays there. The span is `steps` optimiser steps,
or `epochs` passes, or the whole run where neither is given; `after` shifts its beginning, in the same unit (a share of
the run for the whole run). With t in [0, 1] the share of the span that is over:

    linear(start, end)        start + (end - start) * t
    cosine(start, end)        end + (start - end) * (1 + cos(pi t)) / 2
    exponential(start, end)   start * (end / start) ** t
    rampup(end)               end * exp(-5 (1 - t)^2)                      (Laine and Aila, arXiv:1610.02242)
    piecewise((at, value), ...)  the value of the last `at` that is reached
    gamma_ladder(start, stop)    the same length on each of a few values, halving for instance (arXiv:2310.14344)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from poise.coefficient import Clock, Coefficient, text
from poise.errors import InputError


def _arguments(schedule: Any, positional: int) -> str:
    shown: list[str] = []
    for position, field in enumerate(fields(schedule)):
        value = getattr(schedule, field.name)
        if position < positional:
            shown.append(text(value))
        elif value != field.default:
            shown.append(f"{field.name}={value!r}" if isinstance(value, str) else f"{field.name}={text(value)}")
    return ", ".join(shown)


def _share(clock: Clock, steps: int | None, epochs: float | None, after: float) -> float:
    """Return the share of the span that is over, in [0, 1]."""
    if steps is not None:
        over, span = clock.step - after, float(steps)
    elif epochs is not None:
        over, span = clock.step / clock.require("steps_per_epoch") - after, float(epochs)
    else:
        over, span = clock.progress - after, 1.0 - after
    return min(1.0, max(0.0, over / span))


def _check_numbers(schedule: Any) -> None:
    """Refuse, by name, an argument that is neither a finite number nor left out."""
    for field in fields(schedule):
        value = getattr(schedule, field.name)
        if isinstance(value, float | int) and not math.isfinite(value):
            raise InputError(f"{type(schedule).__name__}: {field.name} must be finite, and it is {value}.")
        if not isinstance(value, float | int | str | None) or (
            isinstance(value, str) and not isinstance(field.default, str)
        ):
            raise InputError(f"{type(schedule).__name__}: {field.name} must be a number, and it is {value!r}.")


def _check_span(name: str, steps: int | None, epochs: float | None, after: float) -> None:
    if steps is not None and epochs is not None:
        raise InputError(f"{name}: give its length in steps or in epochs, not in both.")
    length = steps if steps is not None else epochs
    if length is not None and length <= 0:
        raise InputError(f"{name}: its length must be positive, and it is {length}.")
    if after < 0 or (length is None and after >= 1):
        raise InputError(
            f"{name}: 'after' must lie in [0, 1) of the run, or be a number of steps or epochs >= 0; it is {after}."
        )


@dataclass(frozen=True, repr=False)
class _Path(Coefficient):
    """A path from `start` to `end` over a span of the run; subclasses say where it is at share `t` of the span."""

    start: float
    end: float
    steps: int | None = None
    epochs: float | None = None
    after: float = 0

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check_span(type(self).__name__, self.steps, self.epochs, self.after)

    def at(self, t: float) -> float:
        """Return the weight at share `t` in [0, 1] of the span."""
        raise NotImplementedError(f"{type(self).__name__} must say where its path is")

    def value(self, clock: Clock) -> float:
        return self.at(_share(clock, self.steps, self.epochs, self.after))

    def __str__(self) -> str:
        return f"{type(self).__name__}({_arguments(self, 2)})"


class linear(_Path):
    """A straight line from `start` to `end`: `start + (end - start) * t`.

    Args:
        start, end: the weight before and after the span.
        steps: length of the span in optimiser steps; or
        epochs: its length in passes over the main stream; or neither for the whole run.
        after: where the span begins, in the same unit.

    >>> linear(0, 1, steps=500).value(Clock(step=250))
    0.5
    """

    def at(self, t: float) -> float:
        return self.start + (self.end - self.start) * t


class cosine(_Path):
    """Half a cosine from `start` to `end`: `end + (start - end) * (1 + cos(pi t)) / 2`. Arguments as `linear`."""

    def at(self, t: float) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * t)) / 2


class exponential(_Path):
    """A geometric path from `start` to `end`, both positive: `start * (end / start) ** t`. Arguments as `linear`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start <= 0 or self.end <= 0:
            raise InputError(f"exponential: both ends must be positive, and they are {self.start} and {self.end}.")

    def at(self, t: float) -> float:
        return float(self.start * (self.end / self.start) ** t)


@dataclass(frozen=True, repr=False)
class rampup(Coefficient):
    """The ramp of temporal ensembling, `end * exp(-5 (1 - t)^2)`: almost 0 at first, `end` after the span.

    Arguments as `linear`, without a start. Source: Laine and Aila, arXiv:1610.02242.
    """

    end: float
    steps: int | None = None
    epochs: float | None = None
    after: float = 0

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check_span("rampup", self.steps, self.epochs, self.after)

    def value(self, clock: Clock) -> float:
        t = _share(clock, self.steps, self.epochs, self.after)
        return self.end * math.exp(-5 * (1 - t) ** 2)

    def __str__(self) -> str:
        return f"rampup({_arguments(self, 1)})"


class piecewise(Coefficient):
    """Constant pieces: the value of the last `(at, value)` whose `at` is reached, in steps.

    >>> piecewise((0, 1.0), (100, 0.1)).value(Clock(step=100))
    0.1
    """

    def __init__(self, *pieces: tuple[int, float]) -> None:
        starts = [at for at, _ in pieces]
        if not pieces or starts[0] != 0 or starts != sorted(set(starts)):
            raise InputError(f"piecewise: pieces are (step, value) with rising steps from 0, and these are {pieces}.")
        self.pieces = pieces

    def value(self, clock: Clock) -> float:
        return next(value for at, value in reversed(self.pieces) if at <= clock.step)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, piecewise) and self.pieces == other.pieces

    def __hash__(self) -> int:
        return hash(self.pieces)

    def __str__(self) -> str:
        return f"piecewise({', '.join(f'({text(at)}, {text(value)})' for at, value in self.pieces)})"


@dataclass(frozen=True, repr=False)
class GammaLadder(Coefficient):
    """A value that goes down (or up) a ladder of equal steps: `stages` values from `start` to `stop`, both among them.

    geometric    start (stop / start)^(s / (stages - 1)),  s = 0, ..., stages - 1:   8, 4, 2, 1 for start=8, stop=1, stages=4
    linear       start + (stop - start) s / (stages - 1):                            0.5, 0.4, 0.3, 0.2, 0.1 for five stages

    In a formula it is called `gamma_ladder`, and stands where a term takes a scale (`proximal_matching(gamma=...)`) or before a term.

    Args:
        start, stop: first and last value, positive.
        stages: how many values, at least 2.
        spacing: "geometric" or "linear".
        steps: length of the whole ladder in optimiser steps; or
        epochs: its length in passes over the main stream; or neither for what is left of the run.
        after: where it begins, in the same unit (a share of the run where neither is given). Before that it is `start`.

    Raises:
        InputError: values that are not positive, fewer than two stages, or a wrong span.

    Example:
        >>> ladder = GammaLadder(8, 1, stages=4, steps=400)
        >>> [ladder.value(Clock(step=s)) for s in (0, 99, 100, 399, 1000)]
        [8.0, 8.0, 4.0, 1.0, 1.0]

    Source: arXiv:2310.14344, appendix (halving in four stages on images, steps of 0.1 on the line).
    """

    start: float
    stop: float
    stages: int = 4
    spacing: str = "geometric"
    steps: int | None = None
    epochs: float | None = None
    after: float = 0

    def __post_init__(self) -> None:
        if not (0 < self.start < math.inf and 0 < self.stop < math.inf):
            raise InputError(
                f"gamma_ladder: start and stop must be positive, and they are {self.start} and {self.stop}."
            )
        if isinstance(self.stages, bool) or not isinstance(self.stages, int) or self.stages < 2:
            raise InputError(f"gamma_ladder: stages is an integer of at least 2, and it is {self.stages!r}.")
        if self.spacing not in ("geometric", "linear"):
            raise InputError(f"gamma_ladder: spacing is 'geometric' or 'linear', and it is {self.spacing!r}.")
        _check_span("gamma_ladder", self.steps, self.epochs, self.after)

    @property
    def values(self) -> tuple[float, ...]:
        """The values, first to last."""
        shares = [s / (self.stages - 1) for s in range(self.stages - 1)]
        if self.spacing == "linear":
            inside = [self.start + (self.stop - self.start) * t for t in shares]
        else:
            inside = [self.start * (self.stop / self.start) ** t for t in shares]
        return (*map(float, inside), float(self.stop))

    def stage(self, clock: Clock) -> int:
        """Return the number of the value that holds now, from 0."""
        # A share such as 3 * (1/3) must not fall below the step that it stands for.
        return min(self.stages - 1, int(self.stages * _share(clock, self.steps, self.epochs, self.after) + 1e-9))

    def value(self, clock: Clock) -> float:
        return self.values[self.stage(clock)]

    def __str__(self) -> str:
        return f"gamma_ladder({_arguments(self, 2)})"


SCHEDULES: dict[str, Any] = {
    "linear": linear,
    "cosine": cosine,
    "exponential": exponential,
    "rampup": rampup,
    "piecewise": piecewise,
    "gamma_ladder": GammaLadder,
}
