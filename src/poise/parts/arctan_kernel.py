"""`a*arctan(v/b)` and its slope in one pass over the weights, for float32 on the CPU.

PyTorch walks over the tensor once for every operation and spends 2 to 3 ns on each arctangent. Weights are companded at every step, so here
one loop does it all: the argument is folded into [0, 1] by `arctan(x) = pi/2 - arctan(1/x)`, and there `arctan(x)/x` is a polynomial of
degree 8 in `x^2` (Chebyshev fit, error 1.4e-8, below the resolution of float32). The compiler turns the loop into vector instructions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["applies", "times_slope", "value"]

_SMALLEST = 256  # below this the call itself costs more than the loop saves
_MOST_THREADS = 8  # above this PyTorch's threaded loop is faster than this one on a single core


def applies(*tensors: Tensor) -> bool:
    """Whether every tensor is a plain, dense, CPU float32 tensor large enough to gain from the fused loop."""
    for t in tensors:
        if t.numel() < _SMALLEST or t.dtype is not torch.float32 or not t.is_cpu or not t.is_contiguous():
            return False
        if type(t) not in (Tensor, torch.nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(t):
            return False
    return torch.get_num_threads() <= _MOST_THREADS and _loops() is not None


@functools.cache
def _coefficients() -> tuple[np.float32, ...]:
    """Coefficients of `arctan(x)/x` on [0, 1] as a polynomial in `x^2`, lowest power first."""
    from numpy.polynomial import Chebyshev, Polynomial

    def ratio(z: Any) -> Any:
        x = np.sqrt(np.maximum(z, 1e-30))
        return np.arctan(x) / x

    fit = Chebyshev.interpolate(ratio, 8, domain=[0.0, 1.0])
    return tuple(np.float32(c) for c in fit.convert(kind=Polynomial).coef)


@functools.cache
def _loops() -> tuple[Callable[..., Any], ...] | None:
    try:
        import numba
    except ImportError:  # numba lags behind new Python versions; PyTorch's own operations then do the work
        return None
    c0, c1, c2, c3, c4, c5, c6, c7, c8 = _coefficients()
    one, half_pi = np.float32(1), np.float32(math.pi / 2)
    # Every fast-math flag but the two that let the compiler assume away NaN and infinity: those must stay visible.
    flags = {"nsz", "arcp", "contract", "afn", "reassoc"}

    def value_loop(v: Any, inverse_b: Any, a: Any, out: Any) -> None:
        for i in range(v.size):
            x = v[i] * inverse_b
            t = abs(x)
            outside = t > one
            y = one / t if outside else t
            z = y * y
            z2 = z * z
            z4 = z2 * z2
            p = ((c0 + c1 * z) + (c2 + c3 * z) * z2) + ((c4 + c5 * z) + (c6 + c7 * z) * z2 + c8 * z4) * z4
            r = y * p
            r = half_pi - r if outside else r
            out[i] = math.copysign(a * r, x)

    def slope_loop(gradient: Any, v: Any, constant: Any, curvature: Any, out: Any) -> None:
        for i in range(v.size):
            out[i] = gradient[i] / (constant + curvature * v[i] * v[i])

    options: dict[str, Any] = {"fastmath": flags, "error_model": "numpy", "nogil": True}
    try:
        return tuple(numba.njit(**options, cache=True)(loop) for loop in (value_loop, slope_loop))
    except RuntimeError:  # no folder that can be written, so nothing is kept for the next process
        return tuple(numba.njit(**options)(loop) for loop in (value_loop, slope_loop))


def value(v: Tensor, a: float, b: float) -> Tensor:
    """`a*arctan(v/b)` of a tensor for which `applies` holds, within 4e-7 relative of the exact value."""
    loops = _loops()
    assert loops is not None
    out = torch.empty_like(v)
    loops[0](v.detach().numpy().reshape(-1), np.float32(1 / b), np.float32(a), out.numpy().reshape(-1))
    return out


def times_slope(gradient: Tensor, v: Tensor, a: float, b: float) -> Tensor:
    """`gradient * (a/b)/(1+(v/b)^2) = gradient/(b/a + v^2/(a*b))` of tensors for which `applies` holds."""
    loops = _loops()
    assert loops is not None
    out = torch.empty_like(v)
    loops[1](
        gradient.detach().numpy().reshape(-1),
        v.detach().numpy().reshape(-1),
        np.float32(b / a),
        np.float32(1 / (a * b)),
        out.numpy().reshape(-1),
    )
    return out
