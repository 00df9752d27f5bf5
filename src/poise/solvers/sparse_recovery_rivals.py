"""What learned steps are compared with beside plain and accelerated ones: Chebyshev steps, analytic weights, message passing, and the
exact lasso of coordinate descent."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from poise.errors import InputError
from poise.solvers.signal_operators import as_signal_operator
from poise.solvers.sparse_recovery import Recovery, lasso_gap, status_of, warn_of
from poise.solvers.unfolded_layers import shrink
from poise.solvers.unfolded_pass import rows_of

__all__ = ["alista_weights", "approximate_message_passing", "chebyshev_steps", "coordinate_lasso"]


def chebyshev_steps(smallest: float, largest: float, count: int) -> list[float]:
    """Return `count` steps whose product of `1 - alpha_t z` is the Chebyshev polynomial on [smallest, largest].

        1 / alpha_t = (largest + smallest)/2 + (largest - smallest)/2 cos((2t - 1) pi / (2 count))

    No choice of steps reduces a quadratic with these eigenvalues more. Small and large steps alternate, so that rounding stays small.

    Args:
        smallest, largest: eigenvalues of `A'A` on the signals in question, `0 < smallest < largest`.
        count: of steps, at least 1.

    >>> [round(a, 4) for a in chebyshev_steps(1.0, 3.0, 2)]
    [0.3694, 0.7735]

    Source: Young (1953); as an account of learned steps, Takabe and Wadayama, arXiv:2001.05142.
    """
    if not 0 < smallest < largest:
        raise InputError(f"chebyshev_steps: 0 < smallest < largest must hold, and they are {smallest} and {largest}.")
    if count < 1:
        raise InputError(f"chebyshev_steps: count must be at least 1, and it is {count}.")
    middle, half = (largest + smallest) / 2, (largest - smallest) / 2
    steps = [1 / (middle + half * math.cos((2 * t + 1) * math.pi / (2 * count))) for t in range(count)]
    ordered = []
    for i in range((count + 1) // 2):
        ordered += steps[i : i + 1] + (steps[count - 1 - i : count - i] if count - 1 - i != i else [])
    return ordered


def alista_weights(matrix: Tensor) -> Tensor:
    """Return the analytic matrix of ALISTA: least coherent with A among those with `w_i' a_i = 1`.

        W = argmin ||W'A||_F^2  subject to  w_i' a_i = 1      ->      w_i = G^-1 a_i / (a_i' G^-1 a_i),   G = A A'

    Use it as `Unfolded(..., learn=("step", "threshold"), adjoint=alista_weights(A))`.

    Args:
        matrix: `[m, n]`, of rank m and without a column of zeros.

    Source: Liu, Chen, Wang and Yin, ALISTA, ICLR 2019; the minimiser in closed form.
    """
    gram = matrix @ matrix.mH
    factor, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):
        raise InputError("alista_weights: the rows of the matrix are not independent, so A A' cannot be inverted.")
    solved = torch.cholesky_solve(matrix, factor)
    scale = (matrix.conj() * solved).sum(0).real
    if not bool((scale > 0).all()):
        raise InputError("alista_weights: the matrix has a column of zeros.")
    return solved / scale


def approximate_message_passing(
    operator: Tensor, y: Tensor, kappa: float = 1.4, iterations: int = 30, tolerance: float = 1e-4
) -> Recovery:
    """Recover by approximate message passing, for matrices with independent entries of variance 1/m.

        x <- soft(x + A'z, theta),   theta = kappa ||z|| / sqrt(m)
        z <- y - A x + z ||x||_0 / m

    Its fixed points solve the lasso with `weight = theta (1 - ||x||_0 / m)`; objective and residual are of that lasso. On other matrices it
    may diverge, and says so.

    Args:
        operator: one matrix `[m, n]`.
        y: `[batch, m]` or `[m]`.
        kappa: threshold in standard deviations of the effective noise, > 0.
        iterations: made at most.
        tolerance: of the residual.

    Source: Donoho, Maleki and Montanari, PNAS 2009.
    """
    A = as_signal_operator(operator)
    if A.matrix is None or A.matrix.ndim != 2:
        raise InputError("approximate_message_passing: the operator is one matrix [m, n].")
    if not kappa > 0:
        raise InputError(f"approximate_message_passing: kappa must be above 0, and it is {kappa}.")
    rows, _ = rows_of(A, y, None)
    m = A.shape[0]
    x, z = torch.zeros(len(rows), A.shape[1], dtype=rows.dtype, device=rows.device), rows
    objective = rows.real.new_zeros(len(rows))
    made, residual = 0, rows.real.new_full((len(rows),), math.inf)
    while made < iterations and not bool((residual <= tolerance).all()):
        theta = kappa * torch.linalg.vector_norm(z, dim=-1, keepdim=True) / math.sqrt(m)
        x = shrink(x + A.adjoint(z), theta)
        onsager = (x != 0).sum(-1, keepdim=True) / m
        z = A.residual(x, rows) + z * onsager
        weight = theta * (1 - onsager)
        slope = A.adjoint(A.residual(x, rows))
        residual = torch.where(x == 0, (slope.abs() - weight).clamp_min(0), (slope - weight * torch.sgn(x)).abs()).amax(
            -1
        )
        objective = A.residual(x, rows).abs().square().sum(-1) / 2 + (weight * x.abs()).sum(-1)
        made += 1
    status = status_of(residual, tolerance, made)
    warn_of("approximate_message_passing", status)
    single = y.ndim == 1
    return Recovery(
        x[0] if single else x,
        objective,
        residual,
        tolerance,
        made,
        status,
        measure="distance from the lasso's subdifferential",
    )


def coordinate_lasso(
    operator: Tensor, y: Tensor, weight: float, tolerance: float = 1e-9, iterations: int = 100_000
) -> Recovery:
    """Solve the lasso of every signal by scikit-learn's coordinate descent, the exact optimum for comparison.

    scikit-learn divides the squared error by the number of rows, so its `alpha` is `weight / m`. The residual is the duality gap.

    Args:
        operator: one real matrix `[m, n]`.
        y: `[batch, m]` or `[m]`.
        weight: of the l1 norm, > 0.
        tolerance: of scikit-learn, relative to `||y||^2`.
        iterations: at most.
    """
    from sklearn.linear_model import Lasso

    A = as_signal_operator(operator)
    if A.matrix is None or A.matrix.ndim != 2 or A.matrix.is_complex():
        raise InputError("coordinate_lasso: the operator is one real matrix [m, n].")
    if not weight > 0:
        raise InputError(f"coordinate_lasso: weight must be above 0, and it is {weight}.")
    rows, _ = rows_of(A, y, None)
    matrix, targets = A.matrix.detach().double().cpu().numpy(), rows.detach().double().cpu()
    solver = Lasso(alpha=weight / A.shape[0], fit_intercept=False, tol=tolerance, max_iter=iterations)
    found, most = [], 0
    for target in targets.numpy():
        found.append(torch.from_numpy(solver.fit(matrix, target).coef_.copy()))
        most = max(most, int(solver.n_iter_))
    x = torch.stack(found)
    exact = A.matrix.detach().double().cpu()
    gap = lasso_gap(exact, targets, x, weight).clamp_min(0.0)
    residual = (targets - x @ exact.mT).square().sum(-1) / 2 + weight * x.abs().sum(-1)
    allowed = tolerance * float(targets.square().sum(-1).max()) * 2
    status = status_of(gap, allowed, most)
    warn_of("coordinate_lasso", status)
    x = x.to(rows)
    return Recovery(
        x[0] if y.ndim == 1 else x, residual.to(rows), gap.to(rows), allowed, most, status, measure="duality gap"
    )
