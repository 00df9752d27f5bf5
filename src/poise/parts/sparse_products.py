"""Products with features of which few are not 0: the work is that of the few, where a dense product would do that of all.

    x' = b + sum_j f_j W_j          gradients: df_j = <dx', W_j> where f_j > 0,   dW_j = sum over the batch of f_j dx'
    z = x E' + c                    gradient:  dE_j = sum over the batch of dz_j x

On a CPU these are compiled loops over the entries that are not 0; PyTorch's own products do the work where many are not, on other devices, and
where a gradient is differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

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


def encode(x: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
    """Return `x W' + c`, float [batch, h], whose gradient by `weight`, float [h, width], costs what of it is not 0."""
    if _plain(x, weight, offset) and not x.requires_grad:
        return _Encode.apply(x, weight, offset)  # type: ignore[no-untyped-call,no-any-return]
    return functional.linear(x, weight, offset)


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
        ctx.save_for_backward(features, weight)
        out = bias.expand(len(features), -1).contiguous()
        _by_rows(_all()[0], features, weight, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # it will be differentiated again
            return gradient @ weight.T, features.T @ gradient, gradient.sum(0)
        gradient = gradient.contiguous()
        by_features, by_weight = torch.empty_like(features), torch.zeros_like(weight)
        _by_rows(_all()[1], features, weight, gradient, by_features)
        _by_columns(features, gradient, by_weight)
        return by_features, by_weight, gradient.sum(0)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return functional.linear(x, weight, offset)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor]:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled() or int(gradient.count_nonzero()) > _MOST * gradient.numel():
            return None, gradient.T @ x, gradient.sum(0)
        by_weight = torch.zeros(gradient.shape[1], x.shape[1], dtype=x.dtype)
        _by_columns(gradient.contiguous(), x.contiguous(), by_weight)
        return None, by_weight, gradient.sum(0)


# ---- loops ----------------------------------------------------------------------------------------------------------


def _add_rows(f: Any, w: Any, out: Any) -> None:
    """out_b += sum_j f_bj w_j"""
    for b in range(f.shape[0]):
        for j in range(f.shape[1]):
            if f[b, j] != 0:
                x, row, to = f[b, j], w[j], out[b]
                for i in range(len(row)):
                    to[i] += x * row[i]


def _dot_rows(f: Any, w: Any, g: Any, out: Any) -> None:
    """out_bj = <g_b, w_j> where f_bj is not 0"""
    for b in range(f.shape[0]):
        for j in range(f.shape[1]):
            x = f[b, j] * 0
            if f[b, j] != 0:
                row, other = w[j], g[b]
                for i in range(len(row)):
                    x += row[i] * other[i]
            out[b, j] = x


def _add_outer(f: Any, g: Any, out: Any, start: int, stop: int) -> None:
    """out_j += sum_b f_bj g_b, in some columns"""
    for b in range(f.shape[0]):
        for j in range(f.shape[1]):
            if f[b, j] != 0:
                x, row, to = f[b, j], g[b, start:stop], out[j, start:stop]
                for i in range(len(row)):
                    to[i] += x * row[i]


@lru_cache(maxsize=1)
def _loops() -> tuple[Callable[..., None], ...] | None:
    """Return the compiled loops, or None where numba is absent."""
    try:
        import numba
    except ImportError:  # numba lags behind new Python versions
        return None
    # A dot product is summed in any order, as the processor likes it.
    options: dict[str, Any] = {"nogil": True, "fastmath": {"contract", "reassoc"}}
    try:
        return tuple(numba.njit(**options, cache=True)(loop) for loop in (_add_rows, _dot_rows, _add_outer))
    except RuntimeError:  # the folder of the package is read-only
        return tuple(numba.njit(**options)(loop) for loop in (_add_rows, _dot_rows, _add_outer))


def _all() -> tuple[Callable[..., None], ...]:
    loops = _loops()
    assert loops is not None
    return loops


def _shares(n: int, least: int) -> list[tuple[int, int]]:
    """Share n out over PyTorch's threads, `least` at least for each."""
    parts = max(1, min(torch.get_num_threads(), n // least))
    return [(n * i // parts, n * (i + 1) // parts) for i in range(parts)]


def _run(shares: list[tuple[int, int]], work: Callable[[int, int], None]) -> None:
    if len(shares) == 1:
        work(*shares[0])
        return
    with ThreadPoolExecutor(len(shares)) as pool:
        list(pool.map(work, *zip(*shares, strict=True)))


def _by_rows(loop: Callable[..., None], features: Tensor, weight: Tensor, *rows: Tensor) -> None:
    """Share the batch out over threads: each writes rows of its own."""
    f, w = features.detach().numpy(), weight.detach().contiguous().numpy()
    others = [r.detach().numpy() for r in rows]
    _run(_shares(len(f), 16), lambda start, stop: loop(f[start:stop], w, *(r[start:stop] for r in others)))


def _by_columns(features: Tensor, rows: Tensor, out: Tensor) -> None:
    """Share the width out over threads: each writes columns of its own."""
    f, g, o = features.detach().numpy(), rows.detach().numpy(), out.numpy()
    loop = _all()[2]
    _run(_shares(g.shape[1], 64), lambda start, stop: loop(f, g, o, start, stop))
