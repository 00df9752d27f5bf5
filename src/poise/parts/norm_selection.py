"""How many of the largest features have the norm that is asked for: found exactly, without sorting a row.

    s_i = (a_i |d_i|)^2 in falling order,   c_k = sqrt(s_1 + ... + s_k),   k = argmin_k |c_k - t|

On a CPU one compiled pass files each entry of a row by its exponent and leading bits, with the sum of what a drawer holds. The sums say in
which drawer c_k crosses t; only that one is sorted. Elsewhere the largest entries are taken, as many as it needs. The paper's code
sorts every row whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poise.errors import InputError

__all__ = ["keep_by_norm", "norm_mask"]

_DRAWERS, _BITS = 2048, 20
_FIRST = 128
Loop = Callable[..., None]


def keep_by_norm(
    activations: Tensor,
    norms: Tensor | None,
    target: Tensor,
    *,
    nearest: bool = True,
    max_k: int | None = None,
    guard: float = float("inf"),
) -> tuple[Tensor, Tensor]:
    """Keep the k largest entries of each row, k such that their norm is the target's; without gradient.

    Args:
        activations: float [batch, features]; entries below 0 count as 0.
        norms: float [features], the decoder rows' lengths, by which entries are scaled for the choice; None for 1.
        target: float [batch], the norms that are asked for, at least 0.
        nearest: the k whose c_k is nearest to the target, the smaller of two; else the first whose c_k is not below it.
        max_k: most entries of a row.
        guard: what stands in place of c at k = features; infinite, so that never all features are the nearest choice. The paper's code
            has 1e4, which targets of several thousand reach.

    Returns:
        `(features, k)`: float [batch, features], 0 where nothing is kept, and int64 [batch]. Of equal entries the first is kept.

    Raises:
        InputError: an entry or a target is not finite (looked at on the CPU alone), or there are fewer than two features.

    >>> keep_by_norm(torch.tensor([[3.0, 0.5, 4.0]]), None, torch.tensor([5.0]))
    (tensor([[3., 0., 4.]]), tensor([2]))
    """
    if activations.ndim != 2 or activations.shape[1] < 2:
        raise InputError(
            f"top_afa: activations are float [batch, features] of two features at least, and they are {list(activations.shape)}."
        )
    most = activations.shape[1] if max_k is None else min(max_k, activations.shape[1])
    exact = activations.detach()
    if exact.dtype not in (torch.float32, torch.float64):
        exact = exact.float()
    scale = None if norms is None else norms.detach().to(exact.dtype)
    wanted = target.detach().to(torch.float64 if exact.device.type == "cpu" else exact.dtype)
    loop = _loop() if exact.device.type == "cpu" else None
    if loop is None:
        mask, k = _by_largest(exact, scale, wanted, nearest, most, guard)
        return torch.where(mask, activations.detach(), 0.0), k
    features = torch.empty(exact.shape, dtype=exact.dtype)
    k = torch.empty(len(exact), dtype=torch.int64)
    _run(loop, exact.contiguous(), scale, wanted, nearest, most, guard, features, k)
    _refuse_infinite(k)
    return features.to(activations.dtype), k


def norm_mask(activations: Tensor, norms: Tensor | None, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Mark what `keep_by_norm` keeps: bool [batch, features], and k int64 [batch].

    >>> norm_mask(torch.tensor([[3.0, 0.5, 4.0]]), None, torch.tensor([5.0]))
    (tensor([[ True, False,  True]]), tensor([2]))
    """
    features, k = keep_by_norm(activations, norms, target, **options)
    return features > 0, k


def _refuse_infinite(k: Tensor) -> None:
    if len(k) and int(k.min()) < 0:
        row = int((k < 0).nonzero()[0])
        raise InputError(
            f"top_afa: row {row} of the batch has activations or a norm that are not finite. Look at the data, lower the learning rate, or "
            "clip the gradient."
        )


# ---- the compiled pass ----------------------------------------------------------------------------------------------


def _run(
    loop: Loop, exact: Tensor, scale: Tensor | None, wanted: Tensor, nearest: bool, most: int, guard: float,
    features: Tensor, k: Tensor,
) -> None:  # fmt: skip
    scale = torch.ones(exact.shape[1], dtype=exact.dtype) if scale is None else scale.contiguous()
    arrays = exact.numpy(), wanted.numpy(), features.numpy(), k.numpy()

    def rows(start: int, stop: int) -> None:
        a, t, f, n = (array[start:stop] for array in arrays)
        loop(a, scale.numpy(), t, nearest, most, guard, f, n)

    threads = min(torch.get_num_threads(), os.cpu_count() or 1, len(exact) // 64)
    if threads <= 1:
        rows(0, len(exact))
        return
    cuts = [len(exact) * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(rows, cuts[:-1], cuts[1:]))


@lru_cache(maxsize=1)
def _loop() -> Loop | None:
    """Return the compiled pass, or None where numba is absent; PyTorch's own operations then do the work."""
    try:
        import numba
    except ImportError:  # numba lags behind new Python versions
        return None

    def compiled(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(nogil=True, cache=True)(function)
        except RuntimeError:  # the folder of the package is read-only
            return numba.njit(nogil=True)(function)

    return _with(compiled)


def _with(compiled: Callable[[Callable[..., Any]], Any]) -> Loop:
    """Return the pass over rows; what it calls is compiled before it."""
    file, gather, crossing, choose = (compiled(f) for f in (_file, _gather, _crossing, _choose))
    drawer_of, keep = compiled(_drawer_of), compiled(_keep)

    def loop(a: Any, scale: Any, t: Any, nearest: bool, most: int, guard: float, kept: Any, k: Any) -> None:
        h = a.shape[1]
        s, held = np.empty(h, a.dtype), np.empty(h, a.dtype)
        low = np.empty(h, np.float32)
        bits = low.view(np.int32)
        sums, counts = np.zeros((_DRAWERS, 2)), np.zeros(_DRAWERS, np.int64)
        for row in range(a.shape[0]):
            total = file(a[row], scale, s, low, bits, sums)
            if not (np.isfinite(total) and np.isfinite(t[row])):
                k[row] = -1
                continue
            above, count, reached = gather(t[row] * t[row], s, bits, sums, held)
            m, before, after = crossing(t[row] * t[row], reached, above, count, held)
            if m == 0:
                before = max(after - s.min(), 0.0)
            chosen = min(choose(m, before, after, t[row], above, h, nearest, guard), most)
            k[row] = chosen
            if not (above < chosen <= above + count or (m == 0 and chosen >= above)):
                above, count = drawer_of(chosen, s, bits, counts, held)
            keep(chosen - above, count, s, held, a[row], kept[row])

    done: Loop = compiled(loop)
    return done


def _file(a: Any, scale: Any, s: Any, low: Any, bits: Any, sums: Any) -> float:
    """Fill s and the sums of the drawers of one row, two sets in turns; return the sum of all."""
    for i in range(len(a)):
        x = a[i] * scale[i]
        if x <= 0:
            x = x * 0
        s[i] = x * x
        low[i] = s[i]
    sums[:] = 0.0
    # In turns, as an addition waits for the one before it in the same place. Drawer 0 holds what is 0.
    for i in range(0, len(a) - 1, 2):
        sums[(bits[i] >> _BITS) & (_DRAWERS - 1), 0] += s[i]
        sums[(bits[i + 1] >> _BITS) & (_DRAWERS - 1), 1] += s[i + 1]
    if len(a) % 2:
        sums[(bits[-1] >> _BITS) & (_DRAWERS - 1), 0] += s[-1]
    total = 0.0
    for key in range(_DRAWERS):
        total += sums[key, 0] + sums[key, 1]
    return total


def _gather(squared: float, s: Any, bits: Any, sums: Any, held: Any) -> tuple[int, int, float]:
    """Find the drawer in which the sum reaches `squared`; return the entries above it, its own and the sum above it.

    Drawer 0 means that the sum of all stays below; the entries above it are then those above 0.
    """
    key, reached = _DRAWERS - 1, 0.0
    while key > 0 and reached + sums[key, 0] + sums[key, 1] < squared:
        reached += sums[key, 0] + sums[key, 1]
        key -= 1
    while key > 0 and sums[key, 0] + sums[key, 1] == 0:  # a target of 0 is reached by the first entry
        key -= 1
    edge, above, count = (key + 1) << _BITS, 0, 0
    for i in range(len(s)):
        above += bits[i] >= edge
    if key > 0:
        for i in range(len(s)):
            if bits[i] >> _BITS == key:
                held[count] = s[i]
                count += 1
        held[:count].sort()
    return above, count, reached


def _crossing(squared: float, reached: float, above: int, count: int, held: Any) -> tuple[int, float, float]:
    """Return the first m with s_1 + ... + s_m >= squared, and that sum at m - 1 and at m; m = 0 where none has."""
    before = reached
    for n in range(count):
        after = before + held[count - 1 - n]
        # A sum in another order may differ in rounding: the drawer's last entry crosses in any case.
        if after >= squared or n == count - 1:
            return above + n + 1, before, after
        before = after
    return 0, before, before


def _choose(m: int, before: float, after: float, t: float, positive: int, h: int, nearest: bool, guard: float) -> int:
    """Return k from where the norm crosses the target: the crossing itself, or the nearer side of it.

    Where none crosses, c is largest at the last entry above 0.
    """
    if not nearest:
        if m == 0 and after >= t * t:  # nothing is above 0, and nothing is asked for
            return 1
        return m if 0 < m < h else h
    lower, upper = t - before**0.5, abs(after**0.5 - t)
    if m == 0 or m == h:
        k, distance = max(1, min(positive, h - 1)), lower
    elif m > 1 and lower <= upper:
        k, distance = m - 1, lower
    else:
        k, distance = m, upper
    return h if abs(guard - t) < distance else k


def _drawer_of(k: int, s: Any, bits: Any, counts: Any, held: Any) -> tuple[int, int]:
    """Find the drawer of the k-th largest entry; return the entries above it and its own, none where fewer are above 0."""
    counts[:] = 0
    for i in range(len(s)):
        counts[(bits[i] >> _BITS) & (_DRAWERS - 1)] += 1
    key, above, count = _DRAWERS - 1, 0, 0
    while key > 0 and above + counts[key] < k:
        above += counts[key]
        key -= 1
    if key > 0:
        for i in range(len(s)):
            if bits[i] >> _BITS == key:
                held[count] = s[i]
                count += 1
        held[:count].sort()
    return above, count


def _keep(left: int, count: int, s: Any, held: Any, a: Any, kept: Any) -> None:
    """Keep what lies above a drawer and the `left` largest entries in it, of equal ones the first; all above 0 where it is empty."""
    least = held[count - left] if count else s[0] * 0
    for i in range(len(s)):
        kept[i] = a[i] if s[i] > least else 0.0
    equal, n = 0, count - left
    while count and n < count and held[n] == least:
        equal += 1
        n += 1
    for i in range(len(s)):
        if equal == 0:
            break
        if s[i] == least:
            kept[i] = a[i]
            equal -= 1


# ---- PyTorch alone --------------------------------------------------------------------------------------------------


def _by_largest(
    a: Tensor, scale: Tensor | None, t: Tensor, nearest: bool, most: int, guard: float
) -> tuple[Tensor, Tensor]:
    """As the compiled pass: the largest entries of each row, twice as many until every row's norm has crossed its target."""
    s = a.clamp_min(0)
    s = (s if scale is None else s * scale).square()
    h = a.shape[1]
    size = min(_FIRST, h)
    while True:
        values, index = s.topk(size, dim=1)
        c = values.to(t.dtype).cumsum(1).sqrt()
        if size == h or bool(((c[:, -1] >= t) | (values[:, -1] == 0)).all()):
            break
        size = min(2 * size, h)
    if size == h:
        c[:, -1] = guard
    below = c < t[:, None]
    if nearest:
        k = (c - t[:, None]).abs().argmin(1) + 1
        if size < h:
            k = torch.where((guard - t).abs() < (c - t[:, None]).abs().amin(1), h, k)
    else:
        k = torch.where(below.all(1), h, below.sum(1) + 1)
    k = k.clamp_max(most)
    if a.device.type == "cpu":
        _refuse_infinite(torch.where(torch.isfinite(s.sum(1)) & torch.isfinite(t), k, -1))
    kept = torch.arange(size, device=a.device) < k[:, None]
    mask = torch.zeros_like(a, dtype=torch.bool).scatter_(1, index, kept & (values > 0))
    return (torch.where((k == h)[:, None], s > 0, mask), k) if size < h else (mask, k)
