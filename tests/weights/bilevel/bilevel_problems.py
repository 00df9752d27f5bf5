"""Two-level problems whose hypergradient is known in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.weights.bilevel.levels import Levels


@dataclass(frozen=True)
class Ridge:
    """Least squares with a weight exp(theta_j) on the square of each coefficient, judged by least squares on other rows."""

    a: Tensor
    y: Tensor
    a_valid: Tensor
    y_valid: Tensor
    scalar: bool = False

    @property
    def levels(self) -> Levels:
        def lower(x: tuple[Tensor, ...], theta: tuple[Tensor, ...], _: object) -> Tensor:
            return ((self.a @ x[0] - self.y).square().sum() + (theta[0].exp() * x[0].square()).sum()) / 2

        def upper(x: tuple[Tensor, ...], theta: tuple[Tensor, ...], _: object) -> Tensor:
            return (self.a_valid @ x[0] - self.y_valid).square().sum() / 2

        return Levels(lower, upper)

    def hessian(self, theta: Tensor) -> Tensor:
        return self.a.T @ self.a + torch.diag(theta.exp().expand(self.a.shape[1]))

    def solution(self, theta: Tensor) -> Tensor:
        return torch.linalg.solve(self.hessian(theta), self.a.T @ self.y)

    def value(self, theta: Tensor) -> Tensor:
        return (self.a_valid @ self.solution(theta) - self.y_valid).square().sum() / 2

    def hypergradient(self, theta: Tensor) -> Tensor:
        """By automatic differentiation through the closed solution."""
        theta = theta.clone().requires_grad_()
        return torch.autograd.grad(self.value(theta), theta)[0]


def ridge(rows: int = 30, d: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64) -> Ridge:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    truth = draw(d)
    a, b = draw(rows, d), draw(rows, d)
    return Ridge(a, a @ truth + draw(rows), b, b @ truth + draw(rows))


@dataclass(frozen=True)
class Logistic:
    """Two-class logistic regression with a weight exp(theta_j) for each coefficient; its Hessian is known."""

    a: Tensor
    sign: Tensor
    a_valid: Tensor
    sign_valid: Tensor

    @property
    def levels(self) -> Levels:
        def lower(x: tuple[Tensor, ...], theta: tuple[Tensor, ...], _: object) -> Tensor:
            loss = torch.nn.functional.softplus(-self.sign * (self.a @ x[0])).sum()
            return loss + (theta[0].exp() * x[0].square()).sum() / 2

        def upper(x: tuple[Tensor, ...], theta: tuple[Tensor, ...], _: object) -> Tensor:
            return torch.nn.functional.softplus(-self.sign_valid * (self.a_valid @ x[0])).sum()

        return Levels(lower, upper)

    def hessian(self, x: Tensor, theta: Tensor) -> Tensor:
        p = torch.sigmoid(self.sign * (self.a @ x))
        return self.a.T @ ((p * (1 - p))[:, None] * self.a) + torch.diag(theta.exp().expand(len(x)))

    def solution(self, theta: Tensor) -> Tensor:
        """By Newton's method, to rounding."""
        x = torch.zeros(self.a.shape[1], dtype=self.a.dtype)
        for _ in range(50):
            p = torch.sigmoid(-self.sign * (self.a @ x))
            gradient = -self.a.T @ (self.sign * p) + theta.exp() * x
            x = x - torch.linalg.solve(self.hessian(x, theta), gradient)
        return x

    def value(self, theta: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-self.sign_valid * (self.a_valid @ self.solution(theta))).sum()

    def hypergradient(self, theta: Tensor) -> Tensor:
        x = self.solution(theta)
        slope = -self.a_valid.T @ (self.sign_valid * torch.sigmoid(-self.sign_valid * (self.a_valid @ x)))
        return -theta.exp() * x * torch.linalg.solve(self.hessian(x, theta), slope)


def logistic(rows: int = 60, d: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> Logistic:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    truth = draw(d)
    a, b = draw(rows, d), draw(rows, d)
    return Logistic(a, (a @ truth + draw(rows)).sign(), b, (b @ truth + draw(rows)).sign())
