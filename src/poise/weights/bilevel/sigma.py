"""How the weight of the upper objective falls: schedules of sigma in `lower + sigma * upper`.

    ConstantSigma      sigma_k = start
    ReciprocalSigma    sigma_k = max(least, start / (1 + rate k))
    PowerSigma         1/sigma_{k+1} = 1/sigma_k + rate (k + 1)^-exponent
    AdaptiveSigma      sigma_{k+1} = factor sigma_k once ||gradient|| <= threshold sigma_k: no sooner than stationarity allows

A penalised gradient is off by the order of sigma, so that there is nothing to gain from a smaller sigma while its gradient is larger
than that: the adaptive schedule is the one that needs no length of a run. Source: arXiv:2309.01753, section 4; arXiv:2301.10945
(power).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from poise.errors import InputError


@dataclass(frozen=True)
class SigmaSchedule:
    """What every schedule has: where sigma begins, and how small it may become.

    Args:
        start: positive.
        least: >= 0; a schedule that reaches it stays there. Below about 1e-3 in float32 and 1e-6 in float64 the difference of two lower
            gradients, divided by sigma, is mostly rounding.
    """

    start: float = 1.0
    least: float = 0.0

    def __post_init__(self) -> None:
        if not (self.start > 0 and math.isfinite(self.start)) or self.least < 0:
            raise InputError(
                f"sigma must begin positive and end at 0 or above, and it goes from {self.start} to {self.least}."
            )

    def after(self, sigma: float, step: int, gradient_norm: float) -> float:
        """Return sigma after outer step `step` (from 0), which saw a hypergradient of this norm."""
        return self._at_least(self._next(sigma, step, gradient_norm))

    @property
    def looks(self) -> bool:
        """Whether the schedule needs the norm of the gradient, which waits for the device."""
        return False

    def _at_least(self, sigma: float) -> float:
        return max(self.least, sigma)

    def _next(self, sigma: float, step: int, gradient_norm: float) -> float:
        raise NotImplementedError(f"{type(self).__name__} must say its next sigma")


@dataclass(frozen=True)
class ConstantSigma(SigmaSchedule):
    """The same sigma throughout."""

    def _next(self, sigma: float, step: int, gradient_norm: float) -> float:
        return self.start


@dataclass(frozen=True)
class ReciprocalSigma(SigmaSchedule):
    """`max(least, start / (1 + rate k))`.

    >>> ReciprocalSigma(rate=1.0).after(1.0, step=0, gradient_norm=0.0)
    0.5
    """

    rate: float = 0.02

    def _next(self, sigma: float, step: int, gradient_norm: float) -> float:
        return self.start / (1 + self.rate * (step + 1))


@dataclass(frozen=True)
class PowerSigma(SigmaSchedule):
    """`1/sigma_{k+1} = 1/sigma_k + rate (k + 1)^-exponent`, the schedule of F2SA: `1/sigma` grows like `k^(1 - exponent)`."""

    rate: float = 0.1
    exponent: float = 6 / 7

    def _next(self, sigma: float, step: int, gradient_norm: float) -> float:
        return float(1 / (1 / sigma + self.rate * (step + 1) ** -self.exponent))


@dataclass(frozen=True)
class AdaptiveSigma(SigmaSchedule):
    """Multiply sigma by `factor` whenever the hypergradient's norm is at most `threshold * sigma`.

    >>> AdaptiveSigma(threshold=2.0).after(1.0, step=7, gradient_norm=1.9)
    0.5
    """

    threshold: float = 1.0
    factor: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.factor < 1 or not self.threshold > 0:
            raise InputError(
                f"AdaptiveSigma: factor lies in (0, 1) and threshold is positive; they are {self.factor} and {self.threshold}."
            )

    @property
    def looks(self) -> bool:
        return True

    def _next(self, sigma: float, step: int, gradient_norm: float) -> float:
        return sigma * self.factor if gradient_norm <= self.threshold * sigma else sigma


def schedule_of(sigma: SigmaSchedule | float) -> SigmaSchedule:
    """Return a schedule; a number is a constant one."""
    return sigma if isinstance(sigma, SigmaSchedule) else ConstantSigma(float(sigma))
