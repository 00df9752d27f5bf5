"""Products with features of which few are not 0: the work is that of the few, where a dense product would do that of all.

    x' = b + sum_j f_j W_j          gradients: df_j = <dx', W_j> where f_j > 0,   dW_j = sum over the batch of f_j dx'
    z = (x - b) E' + c              gradient:  dE_j = sum over the batch of dz_j (x - b)

On a CPU these are compiled loops, feature by feature: a row of W or E is read once, and the rows of the batch, which are many times fewer,
stay near the processor. PyTorch's own products do the work where many entries are not 0, on other devices, and where a gradient is
differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["decode", "encode"]

_MOST = 1 / 12
"""Share of entries that are not 0 beyond which a dense product is faster."""


def decode(features: Tensor, weight: Tensor, bias: Tensor, active: Tensor) -> Tensor:
    """Return `f W + b`, float [batch, width].

    The gradient by a feature that is 0 is taken to be 0, as it is behind every choice that masks.

    Args:
        features: float [batch, h], never negative.
        weight: float [h, width].
        bias: float [width].
        active: int64 [batch], how many features of a row may be above 0.
    """
    if _few(active, features) and _plain(features, weight, bias):
        return _Decode.apply(features, weight, bias)  # type: ignore[no-untyped-call,no-any-return]
    return torch.addmm(bias.to(features.dtype), features, weight.to(features.dtype))


def encode(x: Tensor, centre: Tensor, weight: Tensor, offset: Tensor | None) -> Tensor:
    """Return `(x - b) E' + c`, float [batch, h]: the gradient by E costs what of dz is not 0, and that by b a row, not a batch.

    Args:
        x: float [batch, width].
        centre: b, float [width].
        weight: E, float [h, width].
        offset: c, float [h], or None.
    """
    if _plain(x, centre, weight) and not x.requires_grad:
        return _Encode.apply(x, centre, weight, offset)  # type: ignore[no-untyped-call,no-any-return]
    return functional.linear(x - centre, weight, offset)


def _few(active: Tensor, features: Tensor) -> bool:
    return features.device.type == "cpu" and int(active.sum()) <= _MOST * features.numel()


def _plain(*tensors: Tensor) -> bool:
    """Whether compiled loops may read these tensors: one dtype, on the CPU, no transform of `torch.func` around them."""
    kinds = {t.dtype for t in tensors}
    return (
        len(kinds) == 1
        and kinds <= {torch.float32, torch.float64}
        and all(t.device.type == "cpu" for t in tensors)
        and not torch._C._are_functorch_transforms_active()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and _loops() is not None
    )


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        entries = _entries(features, features.numel())
        assert entries is not None
        ctx.save_for_backward(features, weight)
        ctx.entries = entries
        out = bias.expand(len(features), -1).contiguous()
        w, to = weight.numpy(force=True), out.numpy()
        _shared(weight.shape[1], lambda start, stop: _compiled().add(*entries, w, to, start, stop))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # it will be differentiated again
            return gradient @ weight.T, features.T @ gradient, gradient.sum(0)
        g, w = gradient.contiguous().numpy(), weight.numpy(force=True)
        by_features = np.zeros(features.shape, g.dtype)
        _shared(len(weight), lambda start, stop: _compiled().dots(*ctx.entries, w, g, by_features, start, stop))
        return torch.from_numpy(by_features), _outer(ctx.entries, g), gradient.sum(0)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, centre: Tensor, weight: Tensor, offset: Tensor | None) -> Tensor:
        moved = x - centre
        ctx.save_for_backward(x, centre, weight)
        ctx.has_offset = offset is not None
        return functional.linear(moved, weight, offset)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor, Tensor | None]:
        x, centre, weight = ctx.saved_tensors
        moved, summed = x - centre, gradient.sum(0)
        entries = None
        if not torch.is_grad_enabled():
            entries = _entries(gradient, max(0, int(_MOST * gradient.numel())))
        by_weight = gradient.T @ moved if entries is None else _outer(entries, moved.contiguous().numpy())
        return None, -(summed @ weight), by_weight, summed if ctx.has_offset else None


# ---- loops ----------------------------------------------------------------------------------------------------------


class _Entries(NamedTuple):
    """What is not 0 of a matrix [batch, h], column by column: column j has the entries from starts[j] to starts[j + 1]."""

    starts: Any
    rows: Any
    values: Any


def _entries(matrix: Tensor, most: int) -> _Entries | None:
    """Return what is not 0, or None where that is more than `most`."""
    f = matrix.detach().contiguous().numpy()
    # Room that is not written to costs nothing.
    rows, columns, values = np.empty(most, np.int32), np.empty(most, np.int32), np.empty(most, f.dtype)
    count = _compiled().find(f, rows, columns, values)
    if count < 0:
        return None
    starts = np.zeros(f.shape[1] + 1, np.int64)
    by_column = _Entries(starts, np.empty(count, np.int32), np.empty(count, f.dtype))
    _compiled().sort(rows[:count], columns[:count], values[:count], *by_column)
    return by_column


def _outer(entries: _Entries, rows: Any) -> Tensor:
    """Return `sum_b f_bj g_b` for each j, float [h, width]."""
    out = np.empty((len(entries.starts) - 1, rows.shape[1]), rows.dtype)
    _shared(len(out), lambda start, stop: _compiled().outer(*entries, rows, out, start, stop))
    return torch.from_numpy(out)


def _shared(n: int, work: Callable[[int, int], None]) -> None:
    """Share n rows or columns out over PyTorch's threads, each of which writes its own."""
    parts = max(1, min(torch.get_num_threads(), n // 64))
    if parts == 1:
        work(0, n)
        return
    cuts = [n * i // parts for i in range(parts + 1)]
    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(work, cuts[:-1], cuts[1:]))


def _find(f: Any, rows: Any, columns: Any, values: Any) -> int:
    """List what is not 0, row by row; return how many, or -1 where there is no room for more."""
    n, most = 0, len(rows)
    width = f.shape[1]
    for b in range(f.shape[0]):
        for start in range(0, width, 16):
            stop, some = min(start + 16, width), 0
            for j in range(start, stop):
                some += f[b, j] != 0
            if some == 0:
                continue
            if n + some > most:
                return -1
            for j in range(start, stop):
                if f[b, j] != 0:
                    rows[n], columns[n], values[n] = b, j, f[b, j]
                    n += 1
    return n


def _sort(rows: Any, columns: Any, values: Any, starts: Any, to_rows: Any, to_values: Any) -> None:
    """Put entries in the order of their columns."""
    for c in columns:
        starts[c + 1] += 1
    for j in range(1, len(starts)):
        starts[j] += starts[j - 1]
    place = starts[:-1].copy()
    for e in range(len(rows)):
        to = place[columns[e]]
        to_rows[to], to_values[to] = rows[e], values[e]
        place[columns[e]] += 1


def _add(starts: Any, rows: Any, values: Any, w: Any, out: Any, start: int, stop: int) -> None:
    """out_b += f_bj w_j, in some columns"""
    for j in range(len(starts) - 1):
        for e in range(starts[j], starts[j + 1]):
            x, row, to = values[e], w[j, start:stop], out[rows[e], start:stop]
            for i in range(len(row)):
                to[i] += x * row[i]


def _dots(starts: Any, rows: Any, values: Any, w: Any, g: Any, out: Any, start: int, stop: int) -> None:
    """out_bj = <g_b, w_j> where f_bj is not 0, for some j"""
    for j in range(start, stop):
        for e in range(starts[j], starts[j + 1]):
            row, other, x = w[j], g[rows[e]], values[e] * 0
            for i in range(len(row)):
                x += row[i] * other[i]
            out[rows[e], j] = x


def _outer_loop(starts: Any, rows: Any, values: Any, g: Any, out: Any, start: int, stop: int) -> None:
    """out_j = sum_b f_bj g_b, for some j"""
    for j in range(start, stop):
        to = out[j]
        to[:] = 0
        for e in range(starts[j], starts[j + 1]):
            x, row = values[e], g[rows[e]]
            for i in range(len(row)):
                to[i] += x * row[i]


class _Loops(NamedTuple):
    find: Callable[..., int]
    sort: Callable[..., None]
    add: Callable[..., None]
    dots: Callable[..., None]
    outer: Callable[..., None]


@lru_cache(maxsize=1)
def _loops() -> _Loops | None:
    """Return the compiled loops, or None where numba is absent."""
    try:
        import numba
    except ImportError:  # numba lags behind new Python versions
        return None
    # A dot product is summed in any order, as the processor likes it.
    options: dict[str, Any] = {"nogil": True, "fastmath": {"contract", "reassoc"}}
    loops = (_find, _sort, _add, _dots, _outer_loop)
    try:
        return _Loops(*(numba.njit(**options, cache=True)(loop) for loop in loops))
    except RuntimeError:  # the folder of the package is read-only
        return _Loops(*(numba.njit(**options)(loop) for loop in loops))


def _compiled() -> _Loops:
    loops = _loops()
    assert loops is not None
    return loops
