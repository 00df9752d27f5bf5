"""The loops of sparse transport that PyTorch cannot fuse: passes over the cost, whole ascents, and the plan that is read off.

An entry can carry mass only if it is within `gamma b_j` of its column's largest, so a column needs no sort: the few entries of that
window are gathered and cut down to the support, and only where more than k are left are the k largest picked in order.

An ascent keeps a list of each column's candidates: with some slack added to the window, an entry outside can enter only after the
potentials have moved apart by more than the slack, and until then nobody looks at it. Problems are ascended one after the other.

The functions stand here as they are written; `loops()` compiles them when they are first wanted. Compiled functions are globals of
this file, not closures: what closes over a compiled function has another key in every process and is compiled in every process.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

_SHORT = 64
"""Up to so many largest values are kept in order by insertion; more are sorted."""

_WIDTH = 128
"""Candidates that are kept of a column; a column with more is gone through as a whole."""

_MEMORY, _TRIALS = 10, 30
_DECREASE, _SLOPE, _ROUNDING = 1e-4, 0.9, 1e-13
"""Of the line search; those of `poise.ascent`, whose steps these loops take."""


@cache
def loops() -> ModuleType | None:
    """Compile the loops of this file, each when it is first called, and return the file; None where numba is absent."""
    import sys

    try:
        import numba
    except ImportError:
        return None
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
    found = globals()
    for name in _COMPILED:
        if hasattr(found[name], "py_func"):  # another thread came first
            continue
        try:
            found[name] = numba.njit(**options, cache=True)(found[name])
        except RuntimeError:  # the folder of the package cannot be written and there is no other cache
            found[name] = numba.njit(**options)(found[name])
    return sys.modules[__name__]


# ---- one column ------------------------------------------------------------------------------------------------------


def _keep_largest(count: int, k: int, top: Any, index: Any) -> int:
    """Put the k largest of `count` values first, falling, the first of equals first; return how many."""
    if k <= _SHORT:
        kept = 0
        for c in range(count):
            s, i = top[c], index[c]
            if kept == k and s <= top[k - 1]:
                continue
            place = kept if kept < k else k - 1
            while place > 0 and top[place - 1] < s:
                top[place] = top[place - 1]
                index[place] = index[place - 1]
                place -= 1
            top[place] = s
            index[place] = i
            if kept < k:
                kept += 1
        return kept
    order = np.argsort(-top[:count], kind="mergesort")
    values, places = top[:count].copy(), index[:count].copy()
    count = min(count, k)
    for r in range(count):
        top[r] = values[order[r]]
        index[r] = places[order[r]]
    return count


def _share_out(count: int, room: float, k: int, top: Any, index: Any) -> tuple[int, float]:
    """Cut values down to the support of their projection, `sum max(top - theta, 0) = room` with at most k terms.

    Returns how many are left, in front, and theta. Dropping what is below the mean's level again and again ends at the projection
    without a limit; where that has at most k terms it is the projection with the limit too, and else all of the k largest are kept.
    """
    while True:
        total = 0.0
        for c in range(count):
            total += top[c]
        theta = (total - room) / count
        kept = 0
        for c in range(count):  # without a branch, which nobody could predict
            value, place = top[c], index[c]
            top[kept], index[kept] = value, place
            kept += value > theta
        if kept == 0:  # the room is lost in rounding, and all values are one
            return 1, top[0] - room
        if kept == count:
            break
        count = kept
    if count > k:
        count = _keep_largest(count, k, top, index)
        total = 0.0
        for c in range(count):
            total += top[c]
        theta = (total - room) / count
    return count, theta


def _gather(x: Any, cost: Any, low: float, room: float, top: Any, index: Any) -> int:
    """Collect the entries of `x - cost` above `low` and within `room` of the largest; return how many."""
    m = len(x)
    count = 0
    largest = -np.inf
    for i in range(m):
        s = x[i] - cost[i]
        if s > low:
            top[count] = s
            index[count] = i
            count += 1
            if s > largest:
                largest = s
                low = max(low, s - room)
    return _within(count, largest - room, top, index)


def _within(count: int, low: float, top: Any, index: Any) -> int:
    kept = 0
    for c in range(count):
        if top[c] > low:
            top[kept] = top[c]
            index[kept] = index[c]
            kept += 1
    return kept


# ---- value and gradient ----------------------------------------------------------------------------------------------


def semi_dual(
    cost: Any, a: Any, b: Any, gamma: float, k: int, alpha: Any, which: Any, hint: Any, value: Any, gradient: Any
) -> None:
    """Write value [p] and gradient [p, m] of the semi-dual of some problems at alpha [p, m]."""
    m, n = a.shape[1], b.shape[1]
    top, index = np.empty(m), np.empty(m, np.int64)
    for row in range(len(which)):
        problem = which[row]
        total = 0.0
        for i in range(m):
            gradient[row, i] = a[problem, i]
            total += alpha[row, i] * a[problem, i]
        for j in range(n):
            room = gamma * b[problem, j]
            if room <= 0.0:
                continue
            # What led the column last time bounds its largest value from below.
            led = hint[problem, j]
            low = alpha[row, led] - cost[problem, j, led] - room
            count = _gather(alpha[row], cost[problem, j], low, room, top, index)
            if count == 0:  # the potentials have left the range of numbers
                total = -np.inf
                break
            count, theta = _share_out(count, room, k, top, index)
            best, squares = 0, 0.0
            for c in range(count):
                t = (top[c] - theta) / gamma
                squares += t * t
                gradient[row, index[c]] -= t
                if top[c] > top[best]:
                    best = c
            # <top, t> - gamma/2 ||t||^2 with top = theta + gamma t and sum(t) = b_j: nothing large cancels
            total -= theta * b[problem, j] + 0.5 * gamma * squares
            hint[problem, j] = index[best]
        value[row] = total


def dual(
    cost: Any, a: Any, b: Any, gamma: float, k: int, both: Any, which: Any, hint: Any, value: Any, gradient: Any
) -> None:
    """Write value [p] and gradient [p, m + n] of the dual of some problems at (alpha, beta) [p, m + n]."""
    m, n = a.shape[1], b.shape[1]
    top, index = np.empty(m), np.empty(m, np.int64)
    for row in range(len(which)):
        problem = which[row]
        total = 0.0
        for i in range(m):
            gradient[row, i] = a[problem, i]
            total += both[row, i] * a[problem, i]
        for j in range(n):
            gradient[row, m + j] = b[problem, j]
            total += both[row, m + j] * b[problem, j]
            count = 0
            for i in range(m):
                s = both[row, i] + both[row, m + j] - cost[problem, j, i]
                if s > 0.0:
                    top[count] = s
                    index[count] = i
                    count += 1
            if count > k:
                count = _keep_largest(count, k, top, index)
            for c in range(count):
                t = top[c] / gamma
                total -= 0.5 * gamma * t * t
                gradient[row, index[c]] -= t
                gradient[row, m + j] -= t
        value[row] = total


# ---- ascent of the semi-dual -----------------------------------------------------------------------------------------


def _list_candidates(
    cost: Any, b: Any, gamma: float, slack: float, x: Any, theta: Any, lists: Any, costs: Any, ends: Any, top: Any, index: Any
) -> None:  # fmt: skip
    """List every column's entries within its window and `slack`, one column after the other; none where they are too many.

    `theta` is at most the columns' thresholds at x, so an entry further below it than the slack is not looked at twice.
    """
    m, room_left, end = len(x), len(lists), 0
    for j in range(len(b)):
        low, count = theta[j] - slack, 0
        largest = -np.inf
        for i in range(m):
            s = x[i] - cost[j, i]
            if s >= low:
                top[count] = s
                index[count] = i
                count += 1
                if s > largest:
                    largest = s
                    low = max(low, s - gamma * b[j] - slack)
        start = end
        if count <= room_left - end:
            for c in range(count):  # without a branch, which nobody could predict
                lists[end] = index[c]
                costs[end] = cost[j, index[c]]
                end += top[c] >= low
        if end - start > _WIDTH:
            end = start
        ends[j] = end


def _evaluate(
    cost: Any, a: Any, b: Any, gamma: float, k: int, x: Any, gradient: Any,
    reference: Any, before: Any, slack: float, theta: Any, lists: Any, costs: Any, ends: Any, top: Any, index: Any,
) -> tuple[float, float]:  # fmt: skip
    """Write the gradient of the semi-dual of one problem and return its value and the slack.

    `reference` is where the candidates were listed; `theta` holds the columns' thresholds at `before`, where the last evaluation was. A
    threshold falls at most as far as the potential that falls most, so it bounds the next one from below.
    """
    m = len(x)
    least, most, fallen, total = np.inf, -np.inf, np.inf, 0.0
    for i in range(m):
        moved = x[i] - reference[i]
        least, most, fallen = min(least, moved), max(most, moved), min(fallen, x[i] - before[i])
        gradient[i] = a[i]
        total += x[i] * a[i]
        before[i] = x[i]
    if not most - least < np.inf:  # the potentials have left the range of numbers
        theta[:] = -np.inf
        before[:] = reference
        return -np.inf, slack
    for j in range(len(b)):
        theta[j] += fallen - 1e-12 * (abs(theta[j]) + abs(fallen)) if theta[j] > -np.inf else 0.0
    if most - least > slack:
        # Steps grow shorter, so the next ones will stay within what this one needed.
        slack = max(most - least, gamma * b.mean())
        _list_candidates(cost, b, gamma, slack, x, theta, lists, costs, ends, top, index)
        reference[:] = x
    start = 0
    for j in range(len(b)):
        room = gamma * b[j]
        if room <= 0.0:
            start = ends[j]
            continue
        low, count = theta[j], 0
        for c in range(start, ends[j]):
            place = lists[c]
            s = x[place] - costs[c]
            top[count] = s
            index[count] = place
            count += s > low
        start = ends[j]
        if count == 0:  # a column with too many candidates, or a window lost in rounding
            count = _gather(x, cost[j], -np.inf, room, top, index)
        count, level = _share_out(count, room, k, top, index)
        theta[j] = level
        squares = 0.0
        for c in range(count):
            t = (top[c] - level) / gamma
            squares += t * t
            gradient[index[c]] -= t
        total -= level * b[j] + 0.5 * gamma * squares
    return total, slack


def _dot(x: Any, y: Any) -> float:
    total = 0.0
    for i in range(len(x)):
        total += x[i] * y[i]
    return total


def _add(x: Any, factor: float, y: Any) -> None:
    for i in range(len(x)):
        x[i] += factor * y[i]


def _size(x: Any) -> float:
    total = 0.0
    for i in range(len(x)):
        total += abs(x[i])
    return total


def _two_loops(
    gradient: Any, steps: Any, changes: Any, products: Any, held: int, last: int, weights: Any, direction: Any
) -> None:
    """direction = inverse Hessian of the held pairs times the gradient (Nocedal's two loops)."""
    direction[:] = gradient
    if held == 0:
        return
    for back in range(held):
        p = (last - back) % _MEMORY
        weights[back] = _dot(steps[p], direction) / products[p]
        _add(direction, -weights[back], changes[p])
    scale = products[last] / _dot(changes[last], changes[last])
    for i in range(len(direction)):
        direction[i] *= scale
    for back in range(held - 1, -1, -1):
        p = (last - back) % _MEMORY
        _add(direction, weights[back] - _dot(changes[p], direction) / products[p], steps[p])


def ascend(
    cost: Any, a: Any, b: Any, gamma: float, k: int, alpha: Any, tolerance: Any, max_iter: int,
    value: Any, residual: Any, iterations: Any, stalled: Any, history: Any,
) -> None:  # fmt: skip
    """Ascend the semi-dual of problems by L-BFGS, from alpha [p, m] on and in place, until gradients are within their tolerance.

    Steps as `poise.ascent.lbfgs`. `history` [max_iter] receives the changes of the values' sum.
    """
    problems, m = a.shape
    n = b.shape[1]
    top, index = np.empty(m), np.empty(m, np.int64)
    lists, costs = np.empty(n * min(m, _WIDTH), np.int64), np.empty(n * min(m, _WIDTH))
    ends, theta = np.empty(n, np.int64), np.empty(n)
    reference, before, direction, point = np.empty(m), np.empty(m), np.empty(m), np.empty(m)
    tried, gradient, following = np.empty(m), np.empty(m), np.empty(m)
    steps, changes = np.empty((_MEMORY, m)), np.empty((_MEMORY, m))
    products, weights = np.empty(_MEMORY), np.empty(_MEMORY)
    for row in range(problems):
        x = alpha[row]
        reference[:] = x
        before[:] = x
        theta[:] = -np.inf
        slack, scale = 2.0 * gamma * b[row].mean(), 0.0
        _list_candidates(cost[row], b[row], gamma, slack, x, theta, lists, costs, ends, top, index)
        level, slack = _evaluate(
            cost[row],
            a[row],
            b[row],
            gamma,
            k,
            x,
            gradient,
            reference,
            before,
            slack,
            theta,
            lists,
            costs,
            ends,
            top,
            index,
        )
        size = _size(gradient)
        held, last, fresh = 0, -1, True
        for it in range(max_iter):
            if not size > tolerance[row] or stalled[row]:
                break
            iterations[row] += 1
            _two_loops(gradient, steps, changes, products, held, last, weights, direction)
            slope = _dot(direction, gradient)
            if not slope > 0.0:
                direction[:] = gradient
                slope = _dot(gradient, gradient)
                fresh = True
            # Without pairs the last curvature says how far to go, and at first nothing does.
            step = 1.0 if not fresh else (scale if scale > 0.0 else 1.0 / size)
            low, high, best, best_level = 0.0, np.inf, 0.0, level
            # What is added up to the value can be larger than the value.
            rounding = abs(level)
            for i in range(m):
                rounding += abs(x[i]) * a[row, i]
            rounding *= _ROUNDING
            for _ in range(_TRIALS):
                point[:] = x
                _add(point, step, direction)
                now, slack = _evaluate(
                    cost[row],
                    a[row],
                    b[row],
                    gamma,
                    k,
                    point,
                    tried,
                    reference,
                    before,
                    slack,
                    theta,
                    lists,
                    costs,
                    ends,
                    top,
                    index,
                )
                left = _dot(tried, direction)
                rises = now >= level + _DECREASE * step * slope
                # Near the top the ascent drowns in rounding, and the slope alone says that the step is not too long.
                if now >= level - rounding and left >= -(1.0 - 2.0 * _DECREASE) * slope:
                    rises = True
                if rises:
                    best, best_level, low = step, now, step
                    following[:] = tried
                    if left <= _SLOPE * slope:
                        break
                else:
                    high = step
                step = 0.5 * (low + high) if high < np.inf else 2.0 * step
            if best == 0.0:
                # Without a step forget the curvature and try the gradient once; without one there, it is done.
                stalled[row] = fresh
                held, fresh = 0, True
                continue
            fresh = False
            spot = (last + 1) % _MEMORY
            for i in range(m):
                steps[spot, i] = best * direction[i]
                changes[spot, i] = gradient[i] - following[i]
            products[spot] = _dot(steps[spot], changes[spot])
            if products[spot] > 1e-14 * max(_dot(changes[spot], changes[spot]), 1e-300):
                last, held = spot, min(held + 1, _MEMORY)
                scale = products[spot] / _dot(changes[spot], changes[spot])
            _add(x, best, direction)
            history[it] += best_level - level
            level = best_level
            gradient[:] = following
            size = _size(gradient)
        value[row], residual[row] = level, size


# ---- the plan --------------------------------------------------------------------------------------------------------


def read_off(
    cost: Any, a: Any, b: Any, gamma: float, k: int, alpha: Any,
    plan: Any, beta: Any, nonzeros: Any, tie_gap: Any, linear: Any, squares: Any, row_error: Any, column_error: Any,
) -> None:  # fmt: skip
    """Write the plan [p, n, m] (zero before) of potentials alpha [p, m], and what is reported of it.

    beta, nonzeros and tie_gap are [p, n]; linear `<T, C>`, squares `||T||^2` and the L1 errors of the sums are [p].
    """
    problems, m = a.shape
    n = b.shape[1]
    top, index = np.empty(m), np.empty(m, np.int64)
    sums = np.empty(m)
    for row in range(problems):
        sums[:] = 0.0
        linear[row] = squares[row] = column_error[row] = 0.0
        for j in range(n):
            room = gamma * b[row, j]
            tie_gap[row, j], nonzeros[row, j] = np.inf, 0
            count = _gather(alpha[row], cost[row, j], -np.inf, max(room, 0.0), top, index)
            if room <= 0.0 or count == 0:
                largest = -np.inf
                for i in range(m):
                    largest = max(largest, alpha[row, i] - cost[row, j, i])
                beta[row, j] = -largest
                column_error[row] += b[row, j]
                continue
            count, theta = _share_out(count, room, k, top, index)
            beta[row, j] = -theta
            mass, lowest = 0.0, np.inf
            for c in range(count):
                t = (top[c] - theta) / gamma
                plan[row, j, index[c]] = t
                mass += t
                sums[index[c]] += t
                linear[row] += t * cost[row, j, index[c]]
                squares[row] += t * t
                lowest = min(lowest, top[c])
                if t > 0.0:
                    nonzeros[row, j] += 1
            column_error[row] += abs(mass - b[row, j])
            if count >= k and k < m:
                # The largest value of what is left out.
                following = -np.inf
                for i in range(m):
                    if plan[row, j, i] == 0.0:
                        following = max(following, alpha[row, i] - cost[row, j, i])
                tie_gap[row, j] = lowest - following
        row_error[row] = np.abs(sums - a[row]).sum()


_COMPILED = (
    "_keep_largest", "_within", "_share_out", "_gather", "_dot", "_add", "_size", "semi_dual", "dual", "_list_candidates", "_evaluate",
    "_two_loops", "ascend", "read_off",
)  # fmt: skip
