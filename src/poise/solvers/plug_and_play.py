"""Plug and play: solve an inverse problem with a denoiser in the place of a regulariser's proximal operator.

    min_x  1/2 ||A x - v||^2 + lambda R(x)

    pgd    x <- f(x - eta A'(A x - v))                                          lambda = 1 / eta        eta < 1 / ||A'A||
    admm   x <- argmin s ||A x - v||^2 + rho/2 ||z - u - x||^2,                 lambda = rho / (2 s)    rho > 2 s ||A'A||
           u <- u + x - z,   z <- f(x + u)

Where f is the proximal operator of R (a `LearnedProx`), this is the exact objective, and it is known at every iterate without inverting f:
R(f(y)) = <y, f> - 1/2 ||f||^2 - psi(y), since y is what f was just applied to. Within the bounds on the right both methods converge to
fixed points, also for nonconvex R, and the objective of pgd falls at every iteration. A penalty with `prox(point, step)` and `value` is
taken at its own weight. Any other denoiser runs too; nothing is known of its objective then.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from poise.errors import InputError, PoiseWarning
from poise.linear_maps import LinearMap
from poise.problem import Certificate

__all__ = ["PlugAndPlay", "plug_and_play"]

_CG_TOLERANCE, _CG_ITERATIONS = 1e-5, 30


@dataclass(frozen=True)
class PlugAndPlay:
    """What was reconstructed, and how the iteration went.

    Attributes:
        x: float [batch, ...].
        certificate: objective, largest relative fixed-point residual of an example, and why it ended.
        objective: 1/2 ||A x - v||^2 + weight R(x), float64 [iterations, batch], up to a constant; None where R is not known.
        data_fit: 1/2 ||A x - v||^2, float64 [iterations, batch].
        residuals: ||x_new - x|| / ||x||, float64 [iterations, batch]; with admm the larger of that of z and of ||x - z|| / ||z||.
        psnr: decibels beside the reference, float64 [iterations, batch], or None.
        weight: lambda, what R is multiplied with.
        method: "pgd" or "admm".
        exact: whether f is known to be the proximal operator of R, and the iteration to be that of the objective.
    """

    x: Tensor
    certificate: Certificate
    objective: Tensor | None
    data_fit: Tensor
    residuals: Tensor
    psnr: Tensor | None
    weight: float
    method: str
    exact: bool

    def rises(self, tolerance: float | None = None) -> int:
        """Return how often the objective of an example rose by more than a share of its range; 0 for pgd within its bound.

        Args:
            tolerance: that share; for rounding, 1e-6 in float64 and 1e-3 in lower precision where nothing is said.
        """
        if tolerance is None:
            tolerance = 1e-6 if self.x.dtype == torch.float64 else 1e-3
        if self.objective is None:
            raise InputError(
                "The objective is not known: this denoiser is no proximal operator of a known regulariser."
            )
        span = (self.objective.amax(0) - self.objective.amin(0)).clamp_min(torch.finfo(torch.float64).tiny)
        return int((self.objective.diff(dim=0) > tolerance * span).sum())


class _Prox(Protocol):
    """f with what is known of R."""

    weight: float
    exact: bool

    def __call__(self, y: Tensor) -> Tensor: ...

    def value(self, y: Tensor, x: Tensor) -> Tensor | None: ...


class _Learned:
    """A learned proximal operator: R through the known inverse."""

    exact = True

    def __init__(self, prox: Any, weight: float, condition: Tensor | None) -> None:
        self.prox, self.weight = prox, weight
        self.more = {} if condition is None else {"condition": condition}

    def __call__(self, y: Tensor) -> Tensor:
        found: Tensor = self.prox(y, **self.more)
        return found

    def value(self, y: Tensor, x: Tensor) -> Tensor | None:
        found: Tensor = self.prox.regularizer_of_output(y, x, **self.more)
        return found


class _Penalty:
    """A penalty with a weight of its own: its proximal map at the step that the method implies."""

    exact = True

    def __init__(self, penalty: Any, weight: float, step: float) -> None:
        self.penalty, self.weight, self.step = penalty, weight, step

    def __call__(self, y: Tensor) -> Tensor:
        found: Tensor = self.penalty.prox(y, self.step)
        return found

    def value(self, y: Tensor, x: Tensor) -> Tensor | None:
        return torch.stack([torch.as_tensor(self.penalty.value(row)) for row in x])


class _Denoiser:
    """Any map from image to image: nothing is known of R."""

    exact = False

    def __init__(self, denoiser: Callable[..., Tensor], weight: float, condition: Tensor | None) -> None:
        self.denoiser, self.weight = denoiser, weight
        self.more = {} if condition is None else {"condition": condition}

    def __call__(self, y: Tensor) -> Tensor:
        return self.denoiser(y, **self.more)

    def value(self, y: Tensor, x: Tensor) -> Tensor | None:
        return None


def plug_and_play(
    A: LinearMap,
    v: Tensor,
    prox: Any,
    method: str = "pgd",
    *,
    step: float | None = None,
    rho: float | None = None,
    scale: float = 0.5,
    weight: float | None = None,
    iterations: int = 100,
    tolerance: float | None = None,
    start: Tensor | None = None,
    bounds: tuple[float, float] | None = None,
    order: str = "xuz",
    condition: Tensor | None = None,
    reference: Tensor | None = None,
    trace: bool = True,
    guarantee: bool = True,
) -> PlugAndPlay:
    """Reconstruct x from v = A x + noise with a denoiser as the prior.

    Args:
        A: a map of `poise.linear_maps`, or one of your own with `adjoint` and `norm_squared`.
        v: measurements [batch, ...].
        prox: a `LearnedProx`; a penalty with `prox(point, step)` and `value(x)`; or any denoiser.
        method: "pgd" or "admm".
        step: eta of pgd; 0.9 / ||A'A|| where nothing is said.
        rho: of admm; 1.1 times its bound where nothing is said.
        scale: s of admm: what the squared data misfit is multiplied with.
        weight: lambda of a penalty. A learned operator has its strength within, and lambda follows from step or rho.
        iterations: at most so many.
        tolerance: end where every example's relative fixed-point residual is within it; None makes all iterations.
        start: first x; A'v where nothing is said.
        bounds: smallest and largest value: a further constraint of admm, a cut after each step of pgd (no longer the exact objective).
        order: of admm: "xuz" as in the paper's code, or "xzu" as in textbooks.
        condition: handed to the denoiser, such as its noise level.
        reference: the true x, for PSNR (values in [0, 1]).
        trace: whether objective and data fit are recorded.
        guarantee: warn where step or rho lies outside of what converges in theory.

    Raises:
        InputError: an argument does not fit.

    Warns:
        PoiseWarning: `tolerance` is missed; or a step beyond the theory.

    >>> from poise.linear_maps import Mask
    >>> from poise.wavelets import WaveletL1
    >>> A = Mask(torch.ones(1, 4, 4))
    >>> result = plug_and_play(A, torch.ones(2, 1, 4, 4), WaveletL1(1), weight=0.1, iterations=20)
    >>> result.certificate.iterations, bool(result.rises())
    (20, False)

    Source: arXiv:2310.14344, section 4 and appendix.
    """
    A.check(v)
    _check(method, order, iterations, scale, step, rho, bounds)
    bound = A.norm_squared
    eta = 0.9 / bound if step is None else step
    strength = 1.1 * 2 * scale * bound if rho is None else rho
    if guarantee:
        _check_theory(method, eta, strength, scale, bound)
    known = _known(prox, weight, condition, 1 / eta if method == "pgd" else strength / (2 * scale))
    x = (A.adjoint(v) if start is None else start).detach().clone()
    run = _Run(A, v, known, iterations, tolerance, reference, trace)
    with torch.no_grad():
        if method == "pgd":
            _pgd(run, x, eta, bounds)
        else:
            _admm(run, x, strength, scale, bounds, order)
    return run.result(method, exact=known.exact and (method == "admm" or bounds is None))


class _Run:
    """What both methods record."""

    def __init__(
        self,
        A: LinearMap,
        v: Tensor,
        prox: _Prox,
        iterations: int,
        tolerance: float | None,
        reference: Tensor | None,
        trace: bool,
    ) -> None:
        self.A, self.v, self.prox = A, v, prox
        self.iterations, self.tolerance, self.reference, self.trace = iterations, tolerance, reference, trace
        self.x = v
        self.values: list[Tensor] = []
        self.fits: list[Tensor] = []
        self.residuals: list[Tensor] = []
        self.psnr: list[Tensor] = []

    def record(self, x: Tensor, y: Tensor, misfit: Tensor | None, residual: Tensor) -> bool:
        """Keep the figures of x = f(y) and say whether the run is over."""
        self.x = x
        self.residuals.append(residual)
        if self.trace:
            away = self.A(x) - self.v if misfit is None else misfit
            fit = 0.5 * away.flatten(1).double().square().sum(1)
            self.fits.append(fit)
            value = self.prox.value(y, x)
            if value is not None:
                self.values.append(fit + self.prox.weight * value.double())
        if self.reference is not None:
            error = (x - self.reference).flatten(1).double().square().mean(1)
            self.psnr.append(-10.0 * error.log10())
        return self.tolerance is not None and bool((residual <= self.tolerance).all())

    def result(self, method: str, exact: bool) -> PlugAndPlay:
        residuals = torch.stack(self.residuals)
        last = float(residuals[-1].max())
        made = len(residuals)
        wanted = float("inf") if self.tolerance is None else self.tolerance
        if self.tolerance is None:
            status = f"made {made} iterations; no tolerance was asked for"
        elif last <= wanted:
            status = "converged"
        else:
            status = f"stopped after {made} iterations with a relative fixed-point residual of {last:.3g}"
            warnings.warn(
                f"plug_and_play {status}, where {wanted:g} was asked for. Give more iterations, or a smaller step.",
                PoiseWarning,
                stacklevel=3,
            )
        if not exact:
            status += "; the objective is not that of a known regulariser"
        fits = torch.stack(self.fits) if self.fits else residuals.new_zeros(0, len(self.v))
        objective = torch.stack(self.values) if self.values else None
        curve = objective if objective is not None else fits
        history = tuple(curve.sum(1).tolist())
        certificate = Certificate(
            history[-1] if history else float("nan"), last, wanted, "largest relative fixed-point residual", made, status, history=history
        )  # fmt: skip
        psnr = torch.stack(self.psnr) if self.psnr else None
        return PlugAndPlay(self.x, certificate, objective, fits, residuals, psnr, self.prox.weight, method, exact)


def _pgd(run: _Run, x: Tensor, eta: float, bounds: tuple[float, float] | None) -> None:
    """x <- f(x - eta A'(A x - v))."""
    misfit = run.A(x) - run.v
    for _ in range(run.iterations):
        y = x - eta * run.A.adjoint(misfit)
        fresh = run.prox(y)
        if bounds is not None:
            fresh = fresh.clamp(*bounds)
        misfit = run.A(fresh) - run.v
        done = run.record(fresh, y, misfit, _relative(fresh - x, x))
        x = fresh
        if done:
            break


def _admm(run: _Run, x: Tensor, rho: float, scale: float, bounds: tuple[float, float] | None, order: str) -> None:
    """x from the data, z from the prior, u the multiplier; w and its multiplier where values are bounded."""
    z, u = x.clone(), torch.zeros_like(x)
    w, uw = x if bounds is None else x.clamp(*bounds), torch.zeros_like(x)
    weight = rho if bounds is None else 2 * rho
    back = 2 * scale * run.A.adjoint(run.v)
    inner = _CG_TOLERANCE if run.tolerance is None else min(_CG_TOLERANCE, 0.1 * run.tolerance)
    for _ in range(run.iterations):
        pull = z - u if bounds is None else z - u + w - uw
        x = _solve(run.A, back + rho * pull, 2 * scale, weight, x, inner)
        if order == "xuz":
            u = u + x - z
            y = x + u
            fresh = run.prox(y)
        else:
            y = x + u
            fresh = run.prox(y)
            u = u + x - fresh
        if bounds is not None:
            uw = uw + x - w
            w = (x + uw).clamp(*bounds)
        apart = torch.maximum(_relative(fresh - z, z), _relative(x - fresh, fresh))
        z = fresh
        if run.record(z, y, None, apart):
            break


def _solve(A: LinearMap, right: Tensor, factor: float, weight: float, start: Tensor, tolerance: float) -> Tensor:
    """Solve (factor A'A + weight I) x = right: as the map says, or by conjugate gradients, all examples side by side."""
    exact = A.solve(right, factor, weight)
    if exact is not None:
        return exact

    def times(x: Tensor) -> Tensor:
        return factor * A.normal(x) + weight * x

    x = start
    r = right - times(x)
    p, square = r, _dot(r, r)
    wanted = tolerance**2 * _dot(right, right)
    # What was asked of the whole has to be within reach of its parts.
    for _ in range(_CG_ITERATIONS if tolerance == _CG_TOLERANCE else 10 * _CG_ITERATIONS):
        active = square > wanted
        if not bool(active.any()):
            break
        moved = times(p)
        share = torch.where(active, square / _dot(p, moved).clamp_min(1e-300), 0.0)
        x, r = x + _spread(share, x) * p, r - _spread(share, x) * moved
        fresh = _dot(r, r)
        p = r + _spread(fresh / square.clamp_min(1e-300), r) * p
        square = fresh
    return x


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def _spread(number: Tensor, like: Tensor) -> Tensor:
    return number.view(-1, *[1] * (like.dim() - 1))


def _relative(change: Tensor, x: Tensor) -> Tensor:
    """Return `||change|| / ||x||` of each example, float64 [batch]."""
    moved, length = (torch.linalg.vector_norm(t.flatten(1).double(), dim=1) for t in (change, x))
    share: Tensor = moved / length.clamp_min(torch.finfo(torch.float32).tiny)
    return share


def _known(prox: Any, weight: float | None, condition: Tensor | None, implied: float) -> _Prox:
    """Return f with what is known of its regulariser."""
    if hasattr(prox, "prox") and hasattr(prox, "value"):
        if weight is None or not weight > 0:
            raise InputError(f"plug_and_play: a penalty needs weight > 0, what it is multiplied with; it is {weight}.")
        # pgd takes the map at eta * lambda, admm at lambda * 2 s / rho: both are lambda / (what a learned operator implies).
        return _Penalty(prox, weight, weight / implied)
    if weight is not None:
        raise InputError(
            "plug_and_play: weight belongs to a penalty. The strength of a denoiser is its own; how much it counts beside the data is "
            "set by step (lambda = 1 / step) or by rho and scale (lambda = rho / (2 scale))."
        )
    if hasattr(prox, "regularizer_of_output"):
        check = getattr(prox, "check", None)
        if check is not None:
            check()
        return _Learned(prox, implied, condition)
    if not callable(prox):
        raise InputError(
            f"plug_and_play: prox is a LearnedProx, a penalty or a denoiser, and it is a {type(prox).__name__}."
        )
    return _Denoiser(prox, implied, condition)


def _check(
    method: str, order: str, iterations: int, scale: float, step: float | None, rho: float | None, bounds: tuple[float, float] | None
) -> None:  # fmt: skip
    if method not in ("pgd", "admm"):
        raise InputError(f"plug_and_play: method is 'pgd' or 'admm', and it is {method!r}.")
    if order not in ("xuz", "xzu"):
        raise InputError(f"plug_and_play: order is 'xuz' or 'xzu', and it is {order!r}.")
    if iterations < 1:
        raise InputError(f"plug_and_play: at least one iteration is needed, and iterations is {iterations}.")
    for name, number in (("scale", scale), ("step", step), ("rho", rho)):
        if number is not None and not number > 0:
            raise InputError(f"plug_and_play: {name} must be positive, and it is {number}.")
    if bounds is not None and not bounds[0] < bounds[1]:
        raise InputError(f"plug_and_play: bounds are (smallest, largest), and they are {bounds}.")


def _check_theory(method: str, eta: float, rho: float, scale: float, bound: float) -> None:
    if method == "pgd" and eta * bound >= 1:
        warnings.warn(
            f"plug_and_play: step = {eta:.3g} is not below 1 / ||A'A|| = {1 / bound:.3g}, so convergence is not guaranteed. "
            "Take a smaller step, or guarantee=False to leave it at that.",
            PoiseWarning,
            stacklevel=3,
        )
    if method == "admm" and rho <= 2 * scale * bound:
        warnings.warn(
            f"plug_and_play: rho = {rho:.3g} is not above 2 scale ||A'A|| = {2 * scale * bound:.3g}, so convergence is not "
            "guaranteed. Take a larger rho, or guarantee=False to leave it at that.",
            PoiseWarning,
            stacklevel=3,
        )
