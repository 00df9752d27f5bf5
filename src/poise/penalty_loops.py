"""Proximal maps that run along a line, one number after the other. They stand here as they are written; numba compiles them."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
_COMPILED: dict[str, Any] = {}


def taut_strings(rows: Array, step: float) -> Array:
    """Minimise `1/2 sum (u - y)^2 + step sum |u_{j+1} - u_j|` for every row, in time linear in its length as a rule.

    Args:
        rows: float64 [rows, length]. step: > 0.

    Source: Condat, A direct algorithm for 1-D total variation denoising, 2013.
    """
    if "taut" not in _COMPILED:
        import numba

        _COMPILED["taut"] = numba.njit(cache=True, nogil=True)(_taut_string)
    out = np.empty_like(rows)
    for row, line in zip(rows, out, strict=True):
        _COMPILED["taut"](row, step, line)
    return out


def _taut_string(y: Array, step: float, u: Array) -> None:
    """A segment begins at `first` and may have any height from `low` to `high`; `under` and `over` are the string's distances
    from the middle of the tube at these heights, and `last_low`, `last_high` where they touched it last."""
    n = len(y)
    k = first = last_low = last_high = 0
    low, high, under, over = y[0] - step, y[0] + step, step, -step
    while True:
        if k == n - 1:
            if under < 0:
                u[first : last_low + 1] = low
                k = first = last_low = last_low + 1
                low, under, over = y[k], step, y[k] + step - high
            elif over > 0:
                u[first : last_high + 1] = high
                k = first = last_high = last_high + 1
                high, over, under = y[k], -step, y[k] - step - low
            else:
                u[first:] = low + under / (k - first + 1)
                return
        elif y[k + 1] + under < low - step:
            u[first : last_low + 1] = low
            k = first = last_low = last_high = last_low + 1
            low, high, under, over = y[k], y[k] + 2 * step, step, -step
        elif y[k + 1] + over > high + step:
            u[first : last_high + 1] = high
            k = first = last_low = last_high = last_high + 1
            low, high, under, over = y[k] - 2 * step, y[k], step, -step
        else:
            k += 1
            under += y[k] - low
            over += y[k] - high
            if under >= step:
                low += (under - step) / (k - first + 1)
                under, last_low = step, k
            if over <= -step:
                high += (over + step) / (k - first + 1)
                over, last_high = -step, k
