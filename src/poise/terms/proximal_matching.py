"""Charge a denoiser for missing the clean example, but not for how far: its minimiser is the mode instead of the mean."""

from __future__ import annotations

import math
import warnings
from typing import ClassVar

import torch
from torch import Tensor

from poise.coefficient import Clock, Coefficient, Number
from poise.errors import InputError, PoiseWarning
from poise.objective import Term, Value

__all__ = ["ProximalMatching"]

_CLOCKS = ((), ("step",), ("step", "steps"), ("step", "steps_per_epoch"), ("step", "steps", "steps_per_epoch"))


class ProximalMatching(Term):
    """Proximal matching: one minus a Gaussian bump of the distance from the clean example.

    m_gamma(u) = 1 - exp(-u^2 / gamma^2),   u = ||prediction - target||

    As gamma falls to 0 the minimiser over all denoisers tends to `argmax_x p(x | y)`, which is the proximal operator of `-sigma^2 log p`;
    squared error gives the posterior mean and absolute error (per number) the median, and neither is that. For large gamma,
    `gamma^2 m -> u^2`. The theory's normaliser `(pi gamma^2)^(-n/2)` is left out: it only scales the loss.

    The gradient `2 (f - x) exp(-u^2/gamma^2) / gamma^2` vanishes where `u >> gamma`. So pretrain with `absolute_error`, start with gamma at
    the residual of a plain denoiser (`sigma sqrt(n)` or below), and go down a ladder.

    Args:
        gamma: width of the bump, positive, in units of u: a number, or a schedule such as `gamma_ladder(8, 1, stages=4)`.
        reduce_dims: "all" takes the norm over all numbers of an example; "none" takes m of each number alone and their mean.

    Reads: `prediction` and `target`, float [batch] or [batch, ...] of one shape.
    Returns: float [batch], in [0, 1].
    Publishes: `distance` [batch], u; and `gamma`, 0-dim.

    Raises:
        InputError: gamma is not positive.

    Example:
        >>> ProximalMatching(gamma=1.0)(torch.tensor([1.0]), torch.tensor([0.0])).values
        tensor([0.6321])

    Source: arXiv:2310.14344, section 3.1.
    """

    formula = "proximal_matching"
    equation: ClassVar[str] = "1 - exp(-||prediction - target||^2 / gamma^2)"
    source: ClassVar[str] = "arXiv:2310.14344, section 3.1"
    expects: ClassVar[dict[str, str]] = {"prediction": "float [batch, ...]", "target": "float [batch, ...]"}

    def __init__(self, gamma: float | Coefficient = 0.1, reduce_dims: str = "all") -> None:
        super().__init__()
        if isinstance(gamma, Number) and not (gamma > 0 and math.isfinite(gamma)):
            raise InputError(f"proximal_matching: gamma must be positive, and it is {gamma}.")
        if not isinstance(gamma, Number | Coefficient):
            raise InputError(f"proximal_matching: gamma is a number or a schedule, and it is {gamma!r}.")
        if reduce_dims not in ("all", "none"):
            raise InputError(f"proximal_matching: reduce_dims is 'all' or 'none', and it is {reduce_dims!r}.")
        self.gamma, self.reduce_dims = gamma, reduce_dims
        self._clock = _readings(gamma)
        self._checked: float | None = None

    def readings(self) -> tuple[str, ...]:
        """Return what of the clock this gamma does not depend on."""
        return tuple(name for name in _CLOCKS[-1] if name not in self._clock)

    def requirements(self) -> tuple[str, ...]:
        """Return what of the clock it does depend on."""
        return self._clock

    def forward(
        self,
        prediction: Tensor,
        target: Tensor,
        step: int | None = None,
        steps: int | None = None,
        steps_per_epoch: int | None = None,
    ) -> Value:
        if prediction.shape != target.shape:
            raise InputError(
                f"proximal_matching: prediction and target have one shape; they are {list(prediction.shape)} and {list(target.shape)}."
            )
        gamma = self._at(Clock(step or 0, steps, steps_per_epoch))
        square = (prediction - target).reshape(len(target), -1).square()
        u2 = square.sum(1)
        if self.reduce_dims == "all":
            values = -torch.expm1(-u2 / gamma**2)
        else:
            values = -torch.expm1(-square / gamma**2).mean(1)
        self._warn_once(values, gamma)
        return Value(values, extras={"distance": u2.detach().sqrt(), "gamma": values.new_tensor(gamma)})

    def _at(self, clock: Clock) -> float:
        """Return gamma now."""
        if isinstance(self.gamma, Number):
            return float(self.gamma)
        gamma = float(self.gamma.value(clock))
        if not gamma > 0:
            raise InputError(
                f"proximal_matching: gamma must be positive, and {self.gamma} gives {gamma} at step {clock.step}."
            )
        return gamma

    def _warn_once(self, values: Tensor, gamma: float) -> None:
        """Say where every example is so far off that no gradient is left; looked at once for each gamma."""
        if self._checked == gamma:
            return
        self._checked = gamma
        if values.numel() and bool((values.detach() >= 1.0).all()):
            warnings.warn(
                f"proximal_matching: with gamma={gamma:g} every example of this batch is so far from its target that the loss is 1 and its "
                "gradient 0. Train with absolute_error first, or start with a gamma near the residual.",
                PoiseWarning,
                stacklevel=3,
            )


def _readings(gamma: float | Coefficient) -> tuple[str, ...]:
    """Return the readings of the clock that a schedule asks for."""
    if isinstance(gamma, Number):
        return ()
    for names in _CLOCKS[1:]:
        try:
            gamma.value(Clock(**dict.fromkeys(names, 1)))
        except InputError:
            continue
        return names
    raise InputError(f"proximal_matching: gamma must be a number or a schedule of the run's clock, and it is {gamma}.")
