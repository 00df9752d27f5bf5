"""Constraints: a weight that rises while the constraint is violated.

    minimise f   subject to   g <= upper

is solved by dual ascent on the Lagrangian `f + multiplier * (g - upper)`. After every optimiser step the multiplier
moves by the violation that was measured, and never below 0:

    multiplier <- max(0, multiplier + lr * (g - upper))

so it leaves 0 again as soon as the constraint is violated. Source: Arrow, Hurwicz and Uzawa (1958).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from poise.coefficient import Clock, Coefficient, Number, leaves_of, text, value_of
from poise.errors import InputError
from poise.objective import Objective, Summand, Term


class Constraint(nn.Module):
    """A dual variable: the multiplier of one inequality.

    Args:
        upper: the value that may not be exceeded; or
        lower: the value that may not be fallen short of. Exactly one of them.
        lr: step of the dual ascent, per unit of violation; positive.
        initial: the multiplier at first, >= 0.

    Buffers: `multiplier` and `violation` (the last one measured, signed; positive is infeasible), float64, 0-dim.
    """

    formula: ClassVar[str] = "constraint"
    multiplier: Tensor
    violation: Tensor

    def __init__(
        self, upper: float | None = None, lower: float | None = None, lr: float = 0.05, initial: float = 0.0
    ) -> None:
        super().__init__()
        if (upper is None) == (lower is None):
            raise InputError("constraint: give exactly one of 'upper' and 'lower'.")
        if lr <= 0 or initial < 0:
            raise InputError(f"constraint: lr must be positive and initial >= 0; they are {lr} and {initial}.")
        self.upper, self.lower, self.lr, self.initial = upper, lower, lr, initial
        self.register_buffer("multiplier", torch.tensor(float(initial), dtype=torch.float64))
        self.register_buffer("violation", torch.tensor(0.0, dtype=torch.float64))

    @property
    def sign(self) -> float:
        """1 for an upper bound, -1 for a lower one."""
        return 1.0 if self.upper is not None else -1.0

    def advance(self, measured: Tensor | float) -> None:
        """Move the multiplier by the violation of the value that was measured in this step."""
        bound = self.upper if self.upper is not None else float(self.lower or 0.0)
        value = torch.as_tensor(measured, dtype=torch.float64, device=self.multiplier.device).detach()
        self.violation = self.sign * (value - bound)
        self.multiplier = (self.multiplier + self.lr * self.violation).clamp_min(0.0)

    def arguments(self) -> str:
        """Print the arguments as a formula has them."""
        bound = f"upper={text(self.upper)}" if self.upper is not None else f"lower={text(self.lower or 0)}"
        rest = [f"lr={text(self.lr)}"] if self.lr != 0.05 else []
        rest += [f"initial={text(self.initial)}"] if self.initial else []
        return ", ".join([bound, *rest])

    def _apply(self, fn: Any, recurse: bool = True) -> Constraint:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.multiplier, self.violation = self.multiplier.double(), self.violation.double()
        return self


class Multiplier(Protocol):
    """What moves a weight by the value that its terms had: a `Constraint`, or a controller."""

    formula: ClassVar[str]
    multiplier: Tensor

    @property
    def sign(self) -> float: ...

    def advance(self, measured: Tensor | float) -> None: ...

    def arguments(self) -> str: ...


@dataclass(frozen=True, repr=False, eq=False)
class DualWeight(Coefficient):
    """The weight of one term under a multiplier: `multiplier * inner`."""

    module: Multiplier
    inner: Number | Coefficient = 1

    def value(self, clock: Clock) -> Tensor:
        return (self.module.sign * self.module.multiplier).float() * value_of(self.inner, clock)

    def leaves(self) -> Iterator[Coefficient]:
        yield self
        yield from leaves_of(self.inner)

    def replace(self, table: dict[Coefficient, Number | Coefficient]) -> Coefficient:
        inner = self.inner.replace(table) if isinstance(self.inner, Coefficient) else self.inner
        return DualWeight(self.module, inner)

    def __str__(self) -> str:
        return f"<multiplier of {self.module.arguments()}>"


def constraint(
    constrained: Term | Objective,
    upper: float | None = None,
    lower: float | None = None,
    lr: float = 0.05,
    initial: float = 0.0,
) -> Objective:
    """Return a term or a sum of terms as a constraint: `cross_entropy + constraint(kl, upper=0.5)`.

    Args:
        constrained: what is bounded; a sum is bounded as a whole.
        upper, lower, lr, initial: see `Constraint`.

    Raises:
        InputError: both bounds or none, or a constraint within a constraint.
    """
    objective = constrained if isinstance(constrained, Objective) else Objective([Summand(constrained)])
    if any(isinstance(s.weight, DualWeight) for s in objective.summands):
        raise InputError("constraint: a constraint cannot be constrained again.")
    module = Constraint(upper, lower, lr, initial)
    return Objective(replace(s, weight=DualWeight(module, s.weight)) for s in objective.summands)
