"""The functions that compress weights: `w = a*g(v/b)` with `g` odd, increasing, and steepest at zero.

One formula, many shapes. `a` sets where large weights stop (`|w| < a*sup|g|`), `b` where the bend begins, and `a/b*g'(0)` how fast small
weights move. Every member gives `g`, its slope and its inverse; the gradient is written out once, for all of them, so that nothing but the
free parameter itself is kept for the backward pass:

    dw/dv = (a/b) g'(v/b)      dw/d(log a) = w      dw/d(log b) = -v dw/dv
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise.errors import InputError, nearest
from poise.parts import arctan_kernel

__all__ = ["CompandingFunction", "compand_value", "companding_function", "function_names"]


@dataclass(frozen=True)
class CompandingFunction:
    """An odd, strictly increasing `g` on the real line, of which `w = a*g(v/b)` is made.

    Args:
        name: what `compand(fn=...)` calls it.
        value: `u -> g(u)`, elementwise on a float tensor of any shape.
        slope: `u -> g'(u) > 0`.
        inverse: `y -> u` with `g(u) = y`, for `|y| < bound`.
        bound: `sup |g|`, `math.inf` where there is none.
        slope_at_zero: `g'(0)`.

    Example:
        >>> cube_root_like = CompandingFunction("asinh", torch.asinh, lambda u: (1 + u * u).rsqrt(), torch.sinh, math.inf, 1.0)
        >>> cube_root_like.value(torch.zeros(1)).item()
        0.0
    """

    name: str
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    bound: float
    slope_at_zero: float

    @property
    def is_identity(self) -> bool:
        """Whether this member switches companding off: then `w = v` bit for bit, whatever `a` and `b` are."""
        return self.name == "identity"


def _arctan_slope(u: Tensor) -> Tensor:
    return 1 / (1 + u * u)


def _tanh_slope(u: Tensor) -> Tensor:
    return 1 - torch.tanh(u).square()


def _softsign(u: Tensor) -> Tensor:
    return u / (1 + u.abs())


def _softsign_slope(u: Tensor) -> Tensor:
    return (1 + u.abs()).square().reciprocal()


def _softsign_inverse(y: Tensor) -> Tensor:
    return y / (1 - y.abs())


def _erf_slope(u: Tensor) -> Tensor:
    return (2 / math.sqrt(math.pi)) * torch.exp(-u * u)


def _mu_law(u: Tensor, mu: float) -> Tensor:
    return u.sign() * torch.log1p(mu * u.abs()) / math.log1p(mu)


def _mu_law_slope(u: Tensor, mu: float) -> Tensor:
    return mu / ((1 + mu * u.abs()) * math.log1p(mu))


def _mu_law_inverse(y: Tensor, mu: float) -> Tensor:
    return y.sign() * torch.expm1(y.abs() * math.log1p(mu)) / mu


def _identity(u: Tensor) -> Tensor:
    return u


_FUNCTIONS: dict[str, CompandingFunction] = {
    "arctan": CompandingFunction("arctan", torch.atan, _arctan_slope, torch.tan, math.pi / 2, 1.0),
    "tanh": CompandingFunction("tanh", torch.tanh, _tanh_slope, torch.atanh, 1.0, 1.0),
    "softsign": CompandingFunction("softsign", _softsign, _softsign_slope, _softsign_inverse, 1.0, 1.0),
    "erf": CompandingFunction("erf", torch.erf, _erf_slope, torch.erfinv, 1.0, 2 / math.sqrt(math.pi)),
    "identity": CompandingFunction("identity", _identity, torch.ones_like, _identity, math.inf, 1.0),
}


def function_names() -> tuple[str, ...]:
    """The names that `compand(fn=...)` knows."""
    return (*_FUNCTIONS, "mu_law")


def companding_function(fn: str | CompandingFunction = "arctan", *, mu: float = 255.0) -> CompandingFunction:
    """Find a companding function by name, or take the user's own.

    | name | `g(u)` | bound | `g'(0)` |
    | --- | --- | --- | --- |
    | `arctan` | `arctan(u)` | pi/2 | 1 |
    | `tanh` | `tanh(u)` | 1 | 1 |
    | `softsign` | `u/(1+abs(u))` | 1 | 1 |
    | `erf` | `erf(u)` | 1 | 2/sqrt(pi) |
    | `mu_law` | `sign(u)*log(1+mu*abs(u))/log(1+mu)` | none | mu/log(1+mu) |
    | `identity` | `u`, and then `w = v` exactly | none | 1 |

    Args:
        fn: one of these names, or a `CompandingFunction`.
        mu: the constant of `mu_law`, above 0; 255 is the telephone standard.

    Returns:
        The function with its slope, inverse, bound and slope at zero.

    Raises:
        InputError: the name is unknown or `mu` is not positive.

    Example:
        >>> companding_function("tanh").bound
        1.0
    """
    if isinstance(fn, CompandingFunction):
        return fn
    if fn == "mu_law":
        if not (math.isfinite(mu) and mu > 0):
            raise InputError(f"compand: mu must be a finite number above 0, but it is {mu}.")
        return CompandingFunction(
            "mu_law",
            functools.partial(_mu_law, mu=mu),
            functools.partial(_mu_law_slope, mu=mu),
            functools.partial(_mu_law_inverse, mu=mu),
            math.inf,
            mu / math.log1p(mu),
        )
    if fn not in _FUNCTIONS:
        raise InputError(
            f"compand: fn={fn!r} is not known; choose one of {', '.join(function_names())}.{nearest(fn, function_names())}"
        )
    return _FUNCTIONS[fn]


def _computing_dtype(v: Tensor) -> torch.dtype:
    """Half precision cannot hold `tan` near its pole, so the curve is evaluated in float32 at least."""
    return torch.float32 if v.dtype in (torch.float16, torch.bfloat16) else v.dtype


def _fused(*tensors: Tensor) -> bool:
    """Whether the one-pass CPU loops apply: plain, dense, large float32 tensors outside any tracing or function transform."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return False
    return arctan_kernel.applies(*tensors)


Log = Tensor | float
"""`log a` or `log b`: a tensor while it is learned or differs between channels, a number when it is fixed."""


def _scales(log_a: Log, log_b: Log, dtype: torch.dtype) -> tuple[Any, Any]:
    if isinstance(log_a, float) and isinstance(log_b, float):
        return math.exp(log_a), math.exp(log_b)
    assert isinstance(log_a, Tensor)
    assert isinstance(log_b, Tensor)
    return log_a.to(dtype).exp(), log_b.to(dtype).exp()


def _single(scale: Any) -> bool:
    return isinstance(scale, float) or scale.numel() == 1


def _forward(v: Tensor, log_a: Log, log_b: Log, function: CompandingFunction) -> Tensor:
    dtype = _computing_dtype(v)
    a, b = _scales(log_a, log_b, dtype)
    if function.name == "arctan" and _single(a) and _single(b) and _fused(v):
        return arctan_kernel.value(v, float(a), float(b))
    w: Tensor = a * function.value(v.to(dtype) / b)
    return w.to(v.dtype)


def _times_slope(gradient: Tensor, v: Tensor, log_a: Log, log_b: Log, function: CompandingFunction) -> Tensor:
    """`gradient * dw/dv`, in the computing dtype."""
    dtype = _computing_dtype(v)
    a, b = _scales(log_a, log_b, dtype)
    if function.name == "arctan" and _single(a) and _single(b) and _fused(gradient, v):
        return arctan_kernel.times_slope(gradient, v, float(a), float(b))
    result: Tensor = gradient.to(dtype) * ((a / b) * function.slope(v.to(dtype) / b))
    return result


def _keep(ctx: Any, v: Tensor, log_a: Log, log_b: Log, function: CompandingFunction, w: Tensor) -> None:
    ctx.function, ctx.logs = function, (log_a, log_b) if isinstance(log_a, float) else None
    curve = () if ctx.logs else (log_a, log_b)
    ctx.learns = ctx.needs_input_grad[1]
    # A learned `a` needs w itself; the layer that uses w keeps the same tensor, so this costs no memory.
    ctx.save_for_backward(v, *curve, *([w] if ctx.learns else []))
    ctx.save_for_forward(v, *curve)


def _kept(ctx: Any) -> tuple[Tensor, Log, Log]:
    saved = ctx.saved_tensors
    return (saved[0], *ctx.logs) if ctx.logs else saved[:3]


def _summed(x: Tensor, y: Tensor, like: Tensor) -> Tensor:
    """`sum x*y` over what `like` is shared by."""
    if like.numel() == 1 and x.dtype == y.dtype and x.dtype in (torch.float32, torch.float64):
        return torch.dot(x.reshape(-1), y.reshape(-1)).to(like.dtype).reshape(like.shape)
    return (x * y).sum_to_size(like.shape).to(like.dtype)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    v, log_a, log_b = _kept(ctx)
    of_v = _times_slope(gradient, v, log_a, log_b, ctx.function)
    of_log_a = of_log_b = None
    if ctx.learns:
        assert isinstance(log_a, Tensor)
        of_log_a = _summed(gradient, ctx.saved_tensors[3], log_a)
    if ctx.needs_input_grad[2]:
        assert isinstance(log_b, Tensor)
        of_log_b = -_summed(of_v, v, log_b)
    return (of_v.to(v.dtype) if ctx.needs_input_grad[0] else None), of_log_a, of_log_b, None


def _along(ctx: Any, of_v: Tensor | None, of_log_a: Tensor | None, of_log_b: Tensor | None) -> Tensor:
    """The derivative along a direction, for forward-mode differentiation."""
    v, log_a, log_b = _kept(ctx)
    direction = torch.zeros_like(v) if of_v is None else of_v
    if of_log_b is not None:
        direction = direction - v * of_log_b
    result = _times_slope(direction, v, log_a, log_b, ctx.function)
    if of_log_a is not None:
        result = result + _forward(v, log_a, log_b, ctx.function) * of_log_a
    return result.to(v.dtype)


class _Compand(torch.autograd.Function):
    """`w = a*g(v/b)` keeping only `v`, `log a`, `log b`: the curve is evaluated again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, log_a: Log, log_b: Log, function: CompandingFunction) -> Tensor:
        w = _forward(v, log_a, log_b, function)
        _keep(ctx, v, log_a, log_b, function, w)
        return w

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _backward(ctx, *gradients)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _along(ctx, *tangents[:3])


class _CompandUnderTransforms(torch.autograd.Function):
    """The same in the form that `torch.func` asks for; PyTorch inspects signatures at every call of it, which costs 20 microseconds."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, log_a: Log, log_b: Log, function: CompandingFunction) -> Tensor:
        return _forward(v, log_a, log_b, function)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        v, log_a, log_b, function = inputs
        _keep(ctx, v, log_a, log_b, function, output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _backward(ctx, *gradients)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _along(ctx, *tangents[:3])


def compand_value(v: Tensor, log_a: Log, log_b: Log, function: CompandingFunction) -> Tensor:
    """`w = a*g(v/b)`, differentiable any number of times in `v`, `log a` and `log b`.

    Args:
        v: the free parameter, float, any shape.
        log_a, log_b: 0-dim, or of a shape that broadcasts to `v`; or both numbers, which are then constants.
        function: which `g`.

    Returns:
        `w`, of the shape and dtype of `v`; half precision is computed in float32.

    Example:
        >>> compand_value(torch.tensor([1.0]), torch.zeros(()), torch.zeros(()), companding_function("arctan"))
        tensor([0.7854])

    Source:
        Cakaj, Mehnert, Yang, arXiv:2306.16993.
    """
    if function.is_identity:
        return v
    if torch.compiler.is_compiling():
        return _forward(
            v, log_a, log_b, function
        )  # the compiler fuses the curve and decides itself what to compute again
    form = _CompandUnderTransforms if torch._C._are_functorch_transforms_active() else _Compand
    result: Tensor = form.apply(v, log_a, log_b, function)  # type: ignore[no-untyped-call]
    return result
