"""Numbers and findings as people read them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from poise.studies.intervals import Estimate
    from poise.studies.summary import Metric


def interval(metric: Metric, estimate: Estimate) -> str:
    """Write the interval of a metric: `90.4 to 92.0 %`; empty where there is none."""
    if estimate.lower is None or estimate.upper is None:
        return ""
    low, high = metric.text(estimate.lower), metric.text(estimate.upper)
    return f"{low.removesuffix(' %')} to {high}" if metric.percent else f"{low} to {high}"


def difference_interval(metric: Metric, estimate: Estimate) -> str:
    """Write the interval of a difference: `+7.1 to +9.5 points`; empty where there is none."""
    if estimate.lower is None or estimate.upper is None:
        return ""
    low, high = metric.difference_text(estimate.lower), metric.difference_text(estimate.upper)
    return f"{low.removesuffix(' points')} to {high}"


def value(metric: Metric, number: float | None) -> str:
    """Write a metric's value, and a dash where it is missing or not a number."""
    return metric.text(number if number is not None and math.isfinite(number) else None)


def difference(metric: Metric, number: float | None) -> str:
    """Write a difference with its sign, and a dash where it is missing or not a number."""
    return metric.difference_text(number if number is not None and math.isfinite(number) else None)


def p_value(p: float | None) -> str:
    """Write a p-value: `0.032`, `< 0.001`, or a dash.

    >>> p_value(0.0321), p_value(1e-9), p_value(None)
    ('0.032', '< 0.001', '–')
    """
    if p is None or not math.isfinite(p):
        return "–"
    if p < 0.001:
        return "< 0.001"
    return f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def seconds(number: float | None) -> str:
    """Write a duration: `85 ms`, `3.2 s`, `2 min 10 s`, `1 h 05 min`.

    >>> seconds(0.085), seconds(3.21), seconds(130), seconds(3900)
    ('85 ms', '3.2 s', '2 min 10 s', '1 h 05 min')
    """
    if number is None or not math.isfinite(number):
        return "–"
    if number < 1:
        return f"{1000 * number:.0f} ms"
    if number < 60:
        return f"{number:.1f} s"
    minutes, rest = divmod(round(number), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def size(number: float | None) -> str:
    """Write a memory size in decimal units.

    >>> size(1_500_000), size(2.5e9)
    ('1.5 MB', '2.50 GB')
    """
    if number is None or not math.isfinite(number):
        return "–"
    if number < 1e9:
        return f"{number / 1e6:.3g} MB"
    return f"{number / 1e9:.2f} GB"


def count(number: int, noun: str, plural: str = "") -> str:
    """Write a count with its noun.

    >>> count(1, "seed"), count(1500, "step")
    ('1 seed', '1,500 steps')
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def rounded(number: float | None) -> str:
    """Write a weight, a learning rate or a rate with three significant digits.

    >>> rounded(0.088762), rounded(251.4)
    ('0.0888', '251')
    """
    return (
        "–"
        if number is None or not math.isfinite(number)
        else f"{number:.3g}"
        if abs(number) < 1000
        else f"{number:,.0f}"
    )
