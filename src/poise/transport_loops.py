"""The loops of sparse transport that PyTorch cannot fuse: one pass over the cost, a column's few candidates kept on the way.

An entry can carry mass only if it is within `gamma b_j` of its column's largest, so a column needs no sort: a short list of
candidates is kept in order. The functions stand here as they are written; `compile_with` gives them to a compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

_SHORT = 64


def compile_with(compiled: Callable[[Callable[..., Any]], Callable[..., Any]]) -> dict[str, Callable[..., None]]:
    """Return the two oracles, compiled; what they call is compiled before them."""
    pick = compiled(_pick)
    threshold = compiled(_threshold)

    def semi_dual(
        cost: Any, a: Any, b: Any, gamma: float, k: int, alpha: Any, which: Any, hint: Any, value: Any, gradient: Any
    ) -> None:
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
                count = pick(alpha[row], cost[problem, j], 0.0, room, low, k, top, index)
                if count == 0:  # the potentials have left the range of numbers
                    total = -np.inf
                    break
                hint[problem, j] = index[0]
                theta, count = threshold(top, count, room)
                for r in range(count):
                    t = (top[r] - theta) / gamma
                    total -= top[r] * t - 0.5 * gamma * t * t
                    gradient[row, index[r]] -= t
            value[row] = total

    def dual(
        cost: Any, a: Any, b: Any, gamma: float, k: int, both: Any, which: Any, hint: Any, value: Any, gradient: Any
    ) -> None:
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
                count = pick(both[row, :m], cost[problem, j], both[row, m + j], np.inf, 0.0, k, top, index)
                for r in range(count):
                    t = top[r] / gamma
                    total -= 0.5 * gamma * t * t
                    gradient[row, index[r]] -= t
                    gradient[row, m + j] -= t
            value[row] = total

    return {"semi_dual": compiled(semi_dual), "dual": compiled(dual)}


def _pick(alpha: Any, cost: Any, shift: float, room: float, least: float, k: int, top: Any, index: Any) -> int:
    """Keep the k largest of `alpha + shift - cost` above `least` and within `room` of the largest, falling; return how many."""
    m = len(alpha)
    count = 0
    if k <= _SHORT:
        low = least
        for i in range(m):
            s = alpha[i] + shift - cost[i]
            if s > low:
                place = count if count < k else k - 1
                while place > 0 and top[place - 1] < s:
                    top[place] = top[place - 1]
                    index[place] = index[place - 1]
                    place -= 1
                top[place] = s
                index[place] = i
                if count < k:
                    count += 1
                low = max(least, top[0] - room)
                if count == k:
                    low = max(low, top[k - 1])
        return count
    largest = -np.inf
    for i in range(m):
        largest = max(largest, alpha[i] + shift - cost[i])
    low = max(least, largest - room)
    for i in range(m):
        s = alpha[i] + shift - cost[i]
        if s > low:
            top[count] = s
            index[count] = i
            count += 1
    order = np.argsort(-top[:count], kind="mergesort")
    values, places = top[:count].copy(), index[:count].copy()
    count = min(count, k)
    for r in range(count):
        top[r] = values[order[r]]
        index[r] = places[order[r]]
    return count


def _threshold(top: Any, count: int, room: float) -> tuple[float, int]:
    """Return theta with `sum max(top - theta, 0) = room` for falling values, and how many are above it."""
    total, theta, kept = 0.0, top[0] - room, 1
    for r in range(count):
        total += top[r]
        level = (total - room) / (r + 1)
        if top[r] <= level:
            break
        theta, kept = level, r + 1
    return theta, kept
