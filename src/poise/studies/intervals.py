"""Student t intervals, paired differences and Holm's correction: all the statistics that a study states.

A study repeats every formula on the same seeds, and a seed fixes both the split and the start of the model. So two
formulas are compared seed by seed, and the interval is that of the mean of the paired differences,

    mean(d) ± t(0.975, n - 1) * sd(d) / sqrt(n).

With one seed, or with differences that are equal on every seed, the spread cannot be estimated. Then there is no
interval, and the estimate says why; nothing here ever invents one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its confidence interval, or with the reason why there is none.

    `lower` and `upper` are None together, and exactly then `reason` is not empty. `n` counts the seeds that entered.
    """

    mean: float
    lower: float | None
    upper: float | None
    sd: float | None
    n: int
    reason: str = ""
    level: float = LEVEL

    @property
    def has_interval(self) -> bool:
        """Whether an interval exists."""
        return self.lower is not None and self.upper is not None

    def within(self, low: float, high: float) -> Estimate:
        """Return the estimate with its interval cut to the range that the quantity cannot leave, such as 0..1 for shares.

        What lies outside cannot be the true value, so the cut interval covers it exactly as often.
        """
        if self.lower is None or self.upper is None:
            return self
        return replace(self, lower=min(max(self.lower, low), high), upper=max(min(self.upper, high), low))

    def excludes_zero(self) -> bool:
        """Whether the interval exists and lies on one side of zero."""
        return self.lower is not None and self.upper is not None and (self.lower > 0 or self.upper < 0)


def t_interval(values: Sequence[float], *, level: float = LEVEL, variance_factor: float | None = None) -> Estimate:
    """Estimate a mean with its Student t interval.

        mean ± t((1 + level)/2, n - 1) * sd * sqrt(variance_factor),      variance_factor = 1/n by default

    Args:
        values: one finite number a seed; NaN and infinite values leave the estimate without an interval.
        level: confidence level, 0 < level < 1.
        variance_factor: what multiplies the variance. `1/n + test/train` gives the corrected resampled interval of
            Nadeau and Bengio (Machine Learning 52, 2003), which allows for training sets that overlap between seeds.

    Returns:
        The estimate; `lower` and `upper` are None where `n < 2`, where a value is not finite, or where all values are
        equal and not zero.

    >>> round(t_interval([1.0, 2.0, 3.0]).upper, 4)
    4.4841

    Source: Student, Biometrika 6 (1908).
    """
    n = len(values)
    if n == 0:
        return Estimate(math.nan, None, None, None, 0, "no run finished", level)
    if not all(math.isfinite(value) for value in values):
        return Estimate(math.nan, None, None, None, n, "a value is not finite", level)
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, None, None, 1, "one seed gives no interval", level)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    # Equal values leave a rounding residue in sd; it says nothing about the spread.
    if sd <= 1e-12 * max(1.0, abs(mean)):
        if all(value == 0.0 for value in values):
            return Estimate(0.0, 0.0, 0.0, 0.0, n, "", level)
        return Estimate(
            mean, None, None, 0.0, n, "the value is the same on every seed, so its spread cannot be estimated", level
        )
    half = t_quantile((1 + level) / 2, n - 1) * sd * math.sqrt(1 / n if variance_factor is None else variance_factor)
    return Estimate(mean, mean - half, mean + half, sd, n, "", level)


def t_test(values: Sequence[float]) -> float | None:
    """Return the two-sided p-value of `mean(values) = 0`, or None where there is no interval.

        p = 2 * P(T_{n-1} > |mean| * sqrt(n) / sd)

    Args:
        values: paired differences, one a seed.

    >>> round(t_test([1.0, 2.0, 3.0]), 4)
    0.0742
    """
    estimate = t_interval(values)
    if not estimate.has_interval or estimate.sd is None:
        return None
    if estimate.sd == 0.0:
        return 1.0
    statistic = abs(estimate.mean) * math.sqrt(estimate.n) / estimate.sd
    from scipy.special import stdtr

    return float(2 * stdtr(estimate.n - 1, -statistic))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p-values for being many by Holm's step-down method.

        p̃_(i) = max_{j <= i} min(1, (m - j + 1) * p_(j))      with p_(1) <= ... <= p_(m)

    Args:
        p_values: p-values in [0, 1]; None stands for a comparison without a test and is not counted in `m`.

    Returns:
        The adjusted values in the same order, None where None came.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]

    Source: Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    known = sorted((p, position) for position, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    running = 0.0
    for rank, (p, position) in enumerate(known):
        running = max(running, min(1.0, (len(known) - rank) * p))
        adjusted[position] = running
    return adjusted


def t_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's t distribution with `degrees` degrees of freedom.

    >>> round(t_quantile(0.975, 4), 3)
    2.776
    """
    # scipy.special is the small part of SciPy that scipy.stats.t rests on; importing scipy.stats takes half a second.
    from scipy.special import stdtrit

    return float(stdtrit(degrees, probability))
