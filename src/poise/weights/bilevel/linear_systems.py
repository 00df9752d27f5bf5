"""Symmetric systems `H q = b` that are known by products alone, each solved with a certificate.

A hypergradient needs one such system at each point. Vectors are rows of a matrix [samples, d]: several independent systems of one
size are solved together, and each stops on its own. A model without samples is one row.

    conjugate_gradient      sqrt(condition) log(1/tolerance) products; finds negative curvature on its way
    neumann                 q <- q + step (b - H q), the partial sums of the Neumann series: condition log(1/tolerance) products
    dense                   the whole matrix by d products, then a factorisation: for small d

A Hessian with a negative eigenvalue is an error, since the lower problem is then not strongly convex there. A singular one has no
inverse: the system is solved again with a damping of sqrt(machine epsilon) times the largest curvature, and the solution says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.errors import InputError

Product = Callable[[Tensor], Tensor]
"""`product(vectors [samples, d]) -> [samples, d]`, row by row the product of one Hessian."""

NOT_CONVEX = (
    "The lower problem is not strongly convex here: its Hessian has curvature {curvature:.3g} along a direction ({method}). The "
    "hypergradient needs a lower minimum that is unique. Add a strongly convex term to the lower objective (l2), solve it further, "
    "or give damping=..."
)


@dataclass(frozen=True)
class Solution:
    """The answer to a system, and what is known about it.

    Attributes:
        q: [samples, d].
        residual: absolute, of the system that was asked for: `norm(H q - b)` of each row, [samples]; NaN where not measured.
        iterations: products that the method used, beyond the one for a start that is not 0.
        converged: whether every residual is within the tolerance.
        damping: what was added to the diagonal; 0 where nothing was.
        status: how it ended, in words.
    """

    q: Tensor
    residual: Tensor
    iterations: int
    converged: bool
    damping: float
    status: str


class _Singular(Exception):
    """A direction of no curvature; carries the largest curvature seen."""

    def __init__(self, largest: float) -> None:
        super().__init__()
        self.largest = largest


def conjugate_gradient(
    product: Product,
    b: Tensor,
    start: Tensor | None = None,
    tolerance: float | Tensor = 1e-10,
    iterations: int | None = None,
    damping: float = 0.0,
) -> Solution:
    """Solve by conjugate gradients; a row stops when its absolute residual is within the tolerance.

    Args:
        product: the Hessian.
        b: [samples, d].
        start: where to begin; 0 by default, which saves one product.
        tolerance: absolute, of `norm(H q - b)`; one number, or one for each row.
        iterations: at most so many; by default `2 d + 20` (d suffice in exact arithmetic).
        damping: added to the diagonal.

    Raises:
        InputError: a direction of negative curvature.
    """
    most = 2 * b.shape[1] + 20 if iterations is None else iterations
    try:
        return _restarted(product, b, start, tolerance, most, damping)
    except _Singular as singular:
        extra = _fallback_damping(singular.largest, b)
        found = _restarted(product, b, None, tolerance, most, damping + extra)
        return _singular(found, damping + extra)


def _restarted(
    product: Product, b: Tensor, start: Tensor | None, tolerance: float | Tensor, most: int, damping: float
) -> Solution:
    """Conjugate gradients; near the rounding level the recursive residual is replaced by the true one and they go on."""
    tolerance = torch.as_tensor(tolerance, dtype=b.dtype, device=b.device)
    q = torch.zeros_like(b) if start is None else start.clone()
    used, largest = 0, 0.0
    residual = b.clone() if start is None else b - product(q) - damping * q
    best = math.inf
    while True:
        k, largest = _sweep(product, q, residual, tolerance, most - used, damping, largest)
        used += k
        size = _norms(residual)
        rounding = torch.finfo(b.dtype).eps * largest * float(_norms(q).max()) * max(k, 1)
        if k == 0 or rounding < 0.1 * float(tolerance.min()):
            break
        residual = b - product(q) - damping * q
        size = _norms(residual)
        if used >= most or bool((size <= tolerance).all()) or float(size.max()) > 0.5 * best:
            break
        best = float(size.max())
    if damping:
        size = _norms(residual + damping * q)  # b - H q of the system without damping
    done = bool((_norms(residual) <= tolerance).all())
    status = "converged" if done else f"stopped after {used} iterations at a residual of {float(size.max()):.3g}"
    return Solution(q, size, used, done, damping, status)


def _sweep(
    product: Product, q: Tensor, r: Tensor, tolerance: Tensor, most: int, damping: float, largest: float
) -> tuple[int, float]:
    """Run conjugate gradients in place on `q` and its residual `r`; return iterations and the largest curvature seen."""
    p, rr = r.clone(), _squares(r)
    for k in range(most):
        active = rr > tolerance.square()
        if not bool(active.any()):
            return k, largest
        hp = product(p)
        if damping:
            hp = hp + damping * p
        curvature, pp = (p * hp).sum(1), _squares(p)
        largest = _checked(curvature[active] / pp[active], largest, b_dtype=r.dtype, method="conjugate gradients")
        alpha = torch.where(active, rr / curvature, 0.0)[:, None]
        q.addcmul_(alpha, p)
        r.addcmul_(alpha, hp, value=-1)
        new = _squares(r)
        beta = torch.where(active, new / rr, 0.0)[:, None]
        p.mul_(beta).add_(r)
        rr = new
    return most, largest


def _checked(curvature: Tensor, largest: float, b_dtype: torch.dtype, method: str) -> float:
    """Raise where a Rayleigh quotient is negative or 0 beyond rounding; return the largest seen."""
    least, most = (float(v) for v in torch.aminmax(curvature))
    largest = max(largest, most, -least)
    eps = torch.finfo(b_dtype).eps
    if math.isnan(least):
        raise InputError("The lower Hessian times a vector is NaN: the lower objective is not finite at this point.")
    if least < -64 * eps * largest:
        raise InputError(NOT_CONVEX.format(curvature=least, method=method))
    if least <= 16 * eps * largest:
        raise _Singular(largest)
    return largest


def neumann(
    product: Product,
    b: Tensor,
    start: Tensor | None = None,
    tolerance: float | Tensor = 1e-10,
    iterations: int | None = None,
    damping: float = 0.0,
    step: float | None = None,
) -> Solution:
    """Sum the Neumann series `step sum_i (I - step H)^i b`, as the iteration `q <- q + step (b - H q)`.

    Args:
        product, b, start, tolerance, damping: as for `conjugate_gradient`.
        iterations: at most so many, 1000 by default; k of them from 0 are the first k terms of the series.
        step: below 2 over the largest eigenvalue; 1 over it, by power iteration, where it is not given.

    Raises:
        InputError: negative curvature, or a residual that grows because the step is too large.
    """
    tolerance = torch.as_tensor(tolerance, dtype=b.dtype, device=b.device)
    most = 1000 if iterations is None else iterations
    if step is None:
        top = largest_eigenvalue(product, b) + damping
        if top <= 0:
            extra = _fallback_damping(0.0, b)
            return _singular(Solution(b / extra, _norms(b), 0, False, 0.0, ""), extra)
        step = 1 / top
    q = torch.zeros_like(b) if start is None else start.clone()
    residual = b.clone() if start is None else b - product(q) - damping * q
    size = first = _norms(residual)
    used = 0
    while used < most and not bool((size <= tolerance).all()):
        hr = product(residual) + damping * residual
        least = float(((residual * hr).sum(1) / _squares(residual).clamp_min(torch.finfo(b.dtype).tiny)).min())
        if least < -64 * torch.finfo(b.dtype).eps / step:
            raise InputError(NOT_CONVEX.format(curvature=least, method="the Neumann series"))
        q.add_(residual, alpha=step)
        residual = residual - step * hr
        size, used = _norms(residual), used + 1
        if not bool((size <= 10 * first + tolerance).all()):
            raise InputError(
                f"The Neumann series diverges: the residual grew from {float(first.max()):.3g} to {float(size.max()):.3g} in "
                f"{used} terms. Give step below 2 over the largest curvature of the lower objective; it is {step:.3g}."
            )
    done = bool((size <= tolerance).all())
    if damping:
        size = _norms(residual + damping * q)
    status = "converged" if done else f"stopped after {used} terms at a residual of {float(size.max()):.3g}"
    return Solution(q, size, used, done, damping, status)


def dense(product: Product, b: Tensor, tolerance: float | Tensor = 1e-10, damping: float = 0.0) -> Solution:
    """Write the Hessian down by d products and solve by LU, with one step of refinement.

    Raises:
        InputError: a negative eigenvalue.
    """
    samples, d = b.shape
    hessian = torch.empty(samples, d, d, dtype=b.dtype, device=b.device)
    basis = torch.zeros_like(b)
    for j in range(d):
        basis[:, j] = 1
        hessian[:, :, j] = product(basis)
        basis[:, j] = 0
    hessian = (hessian + hessian.mT) / 2
    eye = torch.eye(d, dtype=b.dtype, device=b.device)
    extra = _definite(hessian + damping * eye)
    system = hessian + (damping + extra) * eye
    factors, pivots = torch.linalg.lu_factor(system)
    q = torch.linalg.lu_solve(factors, pivots, b[..., None])
    q = q + torch.linalg.lu_solve(factors, pivots, b[..., None] - system @ q)
    size = _norms((hessian @ q)[..., 0] - b)
    tolerance = torch.as_tensor(tolerance, dtype=b.dtype, device=b.device)
    done = bool((_norms((system @ q)[..., 0] - b) <= tolerance).all())
    status = "converged" if done else f"solved to rounding, at a residual of {float(size.max()):.3g}"
    found = Solution(q[..., 0], size, d, done, damping, status)
    return _singular(found, damping + extra) if extra else found


def _definite(matrix: Tensor) -> float:
    """Return the damping that a singular matrix needs, 0 for a positive definite one."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not bool(info.any()):
        diagonal = factor.diagonal(dim1=-2, dim2=-1).square()
        if bool((diagonal.amin(-1) > 16 * torch.finfo(matrix.dtype).eps * diagonal.amax(-1)).all()):
            return 0.0
    eigenvalues = torch.linalg.eigvalsh(matrix)
    largest = float(eigenvalues.abs().max())
    least = float(eigenvalues.min())
    if least < -64 * torch.finfo(matrix.dtype).eps * largest:
        raise InputError(NOT_CONVEX.format(curvature=least, method="its least eigenvalue"))
    return _fallback_damping(largest, matrix)


def largest_eigenvalue(product: Product, like: Tensor, iterations: int = 20) -> float:
    """Return the largest absolute eigenvalue over all rows by power iteration, from below.

    Args:
        product: the Hessian.
        like: [samples, d], for form, type and device.
        iterations: products.
    """
    generator = torch.Generator(like.device).manual_seed(0)
    v = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    top = 0.0
    for _ in range(iterations):
        v = v / _norms(v).clamp_min(torch.finfo(v.dtype).tiny)[:, None]
        v = product(v)
        top = max(top, float(_norms(v).max()))
    return top


def _singular(found: Solution, damping: float) -> Solution:
    status = (
        f"the lower Hessian is singular: solved with a damping of {damping:.3g} on its diagonal, at a residual of "
        f"{float(found.residual.max()):.3g} without it"
    )
    return Solution(found.q, found.residual, found.iterations, False, damping, status)


def _fallback_damping(largest: float, like: Tensor) -> float:
    return math.sqrt(torch.finfo(like.dtype).eps) * (largest if largest > 0 else 1.0)


def _squares(rows: Tensor) -> Tensor:
    return (rows * rows).sum(1)


def _norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms
