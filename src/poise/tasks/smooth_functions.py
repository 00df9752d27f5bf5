"""Smooth test functions of one vector, with their gradients, Hessians and the approximations that second-order methods use.

    LogSumExp           mu log sum_i exp((<a_i, x> - b_i) / mu)
    PowerNorm           1/p |u(x)|^p  with  u(x) = A x - b
    RosenbrockEquations 1/p |u(x)|^p  with  u(x) = (1 - x_1, 10 (x_2 - x_1^2))
    ChebyshevChain      1/p |u(x)|^p  with  u_1 = (1 - x_1) / 2,  u_(i+1) = x_(i+1) - 2 x_i^2 + 1
    Rosenbrock          (a - x_1)^2 + b (x_2 - x_1^2)^2

All but the last are what arXiv:2506.13710 measures on. Give one to `GradientNormalizedNewton.minimize_function`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from poise.errors import InputError

__all__ = ["ChebyshevChain", "LogSumExp", "PowerNorm", "Rosenbrock", "RosenbrockEquations"]


def _unknown(name: str, kind: Any, kinds: str) -> InputError:
    return InputError(f"{name} has no {kind!r} Hessian. It has: {kinds}.")


class LogSumExp:
    """The soft maximum `mu log sum_i exp((<a_i, x> - b_i) / mu)`.

    "gauss_newton" is `1/mu A' diag(pi) A`, `pi` the softmax: the exact Hessian and `1/mu grad f grad f'`.

    Args:
        a: rows [n, d].
        b: [n].
        mu: smoothing, above 0.

    Raises:
        InputError: shapes do not fit, or mu is not above 0.
    """

    def __init__(self, a: Tensor, b: Tensor, mu: float = 1.0) -> None:
        if a.ndim != 2 or b.shape != a.shape[:1] or not mu > 0:
            raise InputError(
                f"LogSumExp needs a [n, d], b [n] and mu > 0, but got {list(a.shape)}, {list(b.shape)} and {mu}."
            )
        self.a, self.b, self.mu = a, b, mu

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        z = torch.addmv(self.b, self.a, x, beta=-1).div_(self.mu)
        return self.mu * float(z.logsumexp(0)), z.softmax(0) @ self.a

    def curvature(self, x: Tensor, kind: Any, value: float, gradient: Tensor) -> Any:
        if kind == "zero":
            return None
        if kind not in ("exact", "gauss_newton"):
            raise _unknown("LogSumExp", kind, "'exact', 'gauss_newton', 'zero'")
        weights = torch.addmv(self.b, self.a, x, beta=-1).div_(self.mu).softmax(0)
        # The exact Hessian is that of rows less their mean. As the square of one factor a BLAS makes it with half the work.
        rows = self.a if kind == "gauss_newton" else self.a - gradient
        root = rows * weights.mul_(1 / self.mu).sqrt_()[:, None]
        return torch.from_numpy(root.numpy().T @ root.numpy()) if root.device.type == "cpu" else root.T @ root


class _Equations:
    """`1/p |u(x)|^p` for a system `u(x) = 0`, from its residuals, Jacobian and second derivatives."""

    def __init__(self, p: float) -> None:
        if not p >= 2:
            raise InputError(f"{type(self).__name__}: p must be at least 2, but it is {p}.")
        self.p = p

    def residuals(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def jacobian(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def bend(self, x: Tensor, u: Tensor) -> Tensor:
        """Return `sum_i u_i Hessian(u_i)`."""
        raise NotImplementedError

    def _power(self, size: float, exponent: float) -> float:
        """Return a power that is 1 for exponent 0 and 0 where the residuals vanish."""
        return 1.0 if exponent == 0 else 0.0 if size == 0 else size**exponent

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        u = self.residuals(x)
        size = float(torch.linalg.vector_norm(u))
        return size**self.p / self.p, self._power(size, self.p - 2) * (self.jacobian(x).T @ u)

    def curvature(self, x: Tensor, kind: Any, value: float, gradient: Tensor) -> Any:
        if kind == "zero":
            return None
        if kind not in ("exact", "gauss_newton", "rank_one"):
            raise _unknown(type(self).__name__, kind, "'exact', 'gauss_newton', 'rank_one', 'zero'")
        u, jacobian = self.residuals(x), self.jacobian(x)
        size, along = float(torch.linalg.vector_norm(u)), jacobian.T @ u
        factor = (self.p - 2) * self._power(size, self.p - 4)
        if size == 0:
            factor = 0.0
        if kind == "rank_one":
            return factor, along
        # |u|^(p-2) J'J + (p-2) |u|^(p-4) (J'u)(J'u)', and for the exact Hessian |u|^(p-2) sum_i u_i Hessian(u_i)
        matrix = self._power(size, self.p - 2) * (jacobian.T @ jacobian) + factor * torch.outer(along, along)
        if kind == "gauss_newton":
            return matrix
        from poise.solvers.curvature import Dense

        return Dense(matrix + self._power(size, self.p - 2) * self.bend(x, u))


class PowerNorm(_Equations):
    """`1/p |A x - b|^p`; its "gauss_newton" Hessian is exact.

    Args:
        a: [n, d].
        b: [n].
        p: at least 2.
    """

    def __init__(self, a: Tensor, b: Tensor, p: float = 4.0) -> None:
        super().__init__(p)
        self.a, self.b = a, b

    def residuals(self, x: Tensor) -> Tensor:
        return torch.addmv(self.b, self.a, x, beta=-1)

    def jacobian(self, x: Tensor) -> Tensor:
        return self.a

    def bend(self, x: Tensor, u: Tensor) -> Tensor:
        return x.new_zeros(len(x), len(x))


class RosenbrockEquations(_Equations):
    """Rosenbrock's function as nonlinear equations: `1/p |(1 - x_1, 10 (x_2 - x_1^2))|^p`; twice its value at p = 2 is Rosenbrock's."""

    def __init__(self, p: float = 2.0) -> None:
        super().__init__(p)

    def residuals(self, x: Tensor) -> Tensor:
        return torch.stack([1 - x[0], 10 * (x[1] - x[0] ** 2)])

    def jacobian(self, x: Tensor) -> Tensor:
        return x.new_tensor([[-1.0, 0.0], [-20 * float(x[0]), 10.0]])

    def bend(self, x: Tensor, u: Tensor) -> Tensor:
        return x.new_tensor([[-20.0 * float(u[1]), 0.0], [0.0, 0.0]])


class ChebyshevChain(_Equations):
    """Nesterov's chain of Chebyshev polynomials: a narrow winding valley from (-1, 1, ..., 1) to (1, ..., 1)."""

    def __init__(self, p: float = 4.0) -> None:
        super().__init__(p)

    def residuals(self, x: Tensor) -> Tensor:
        return torch.cat([(1 - x[:1]) / 2, x[1:] - 2 * x[:-1] ** 2 + 1])

    def jacobian(self, x: Tensor) -> Tensor:
        jacobian = torch.eye(len(x), dtype=x.dtype, device=x.device)
        jacobian[0, 0] = -0.5
        jacobian.diagonal(-1).copy_(-4 * x[:-1])
        return jacobian

    def bend(self, x: Tensor, u: Tensor) -> Tensor:
        return torch.diag(torch.cat([-4 * u[1:], u.new_zeros(1)]))


class Rosenbrock:
    """`(a - x_1)^2 + b (x_2 - x_1^2)^2`, nonconvex, with a minimum of 0 at `(a, a^2)`."""

    def __init__(self, a: float = 1.0, b: float = 100.0) -> None:
        self.a, self.b = a, b

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        first, second = self.a - float(x[0]), float(x[1] - x[0] ** 2)
        gradient = x.new_tensor([-2 * first - 4 * self.b * float(x[0]) * second, 2 * self.b * second])
        return first**2 + self.b * second**2, gradient

    def curvature(self, x: Tensor, kind: Any, value: float, gradient: Tensor) -> Any:
        if kind == "zero":
            return None
        if kind not in ("exact", "gauss_newton"):
            raise _unknown("Rosenbrock", kind, "'exact', 'gauss_newton', 'zero'")
        from poise.solvers.curvature import Dense

        one, b = float(x[0]), self.b
        matrix = x.new_tensor([[2 + 8 * b * one**2, -4 * b * one], [-4 * b * one, 2 * b]])
        if kind == "exact":
            matrix[0, 0] -= 4 * b * float(x[1] - x[0] ** 2)
        return Dense(matrix)
