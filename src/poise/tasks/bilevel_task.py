"""A ready bilevel problem: two levels on data, where both begin, and the constants that certificates stand on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from poise.weights.bilevel.levels import Levels, Tensors

__all__ = ["BilevelTask"]


@dataclass(frozen=True)
class BilevelTask:
    """A bilevel problem that any method of `poise.weights.bilevel` can be run on.

    Attributes:
        levels: lower and upper objective, with counters of their own.
        theta, x: where both levels begin.
        constants: what is known of the objectives, under the argument names of `MAID`.
        measures: numbers that a person reads, each `(x, theta) -> float`.

    A method begins as `MAID(task.levels, task.theta, task.x, **task.constants)`.
    """

    levels: Levels
    theta: Tensors
    x: Tensors
    constants: Mapping[str, Any] = field(default_factory=dict)
    measures: Mapping[str, Callable[[Tensors, Tensors], float]] = field(default_factory=dict)
