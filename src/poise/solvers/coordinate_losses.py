"""What coordinate methods ask of a smooth function: bounds of its curvature, and a state whose gradient follows a block's move.

    f(x + U_b d)  <=  f(x) + <grad_b, d> + 1/2 d' H_b d          H_b bounds every Hessian of the block;  L_b = lambda_max(H_b)

    LinearModel      sum_i s_i f(a_i' x; y_i)       in `linear_model`: least squares, logistic, Huber, multinomial
    QuadraticGraph   1/2 x' H x - b' x              in `quadratic_graph`: label propagation

A function answers for bounds, which do not change; `at(x)` starts a `State` that holds x, value and gradient and moves with every block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["CoordinateSmooth", "State", "block_lipschitz", "power_iteration"]


class State(Protocol):
    """Where a run stands.

    Attributes:
        x: float [size].
        touched: gradient entries computed or changed so far.
        work: multiplications so far.
    """

    x: Tensor
    touched: int
    work: int

    @property
    def gradient(self) -> Tensor:
        """The gradient [size]."""
        ...

    def gradient_of(self, block: Tensor) -> Tensor:
        """Return the gradient on a block."""
        ...

    def value(self) -> float:
        """Return f(x)."""
        ...

    @property
    def rounding(self) -> float:
        """The size below which `change` is noise."""
        ...

    def change(self, block: Tensor, d: Tensor) -> float:
        """Return `f(x + U_b d) - f(x)`."""
        ...

    def hessian(self, block: Tensor) -> Tensor:
        """Return the Hessian on a block at x."""
        ...

    def move(self, block: Tensor, d: Tensor) -> None:
        """Go to `x + U_b d`."""
        ...

    def refresh(self) -> float:
        """Compute anew what moves have updated, and return how far it had drifted, relative to its size."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return what has drifted from a fresh start at x, so that a resumed run goes on to the bit."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take it back."""
        ...


class CoordinateSmooth(Protocol):
    """A smooth function of one vector with coordinate bounds.

    Attributes:
        size: coordinates.
        quadratic: its Hessian is its bound everywhere.
        lipschitz: L_i >= 0, [size].
    """

    size: int
    quadratic: bool

    @property
    def lipschitz(self) -> Tensor:
        """The coordinate constants."""
        ...

    def bound(self, block: Tensor) -> Tensor:
        """Return H_b."""
        ...

    def bound_times(self, block: Tensor, d: Tensor) -> Tensor:
        """Return `H U_b d`, [size]."""
        ...

    @property
    def row_sums(self) -> Tensor:
        """`sum_j |H_ij|`, [size]."""
        ...

    @property
    def largest(self) -> float:
        """The largest eigenvalue of H, from below within 1e-3."""
        ...

    def at(self, x: Tensor) -> State:
        """Start at x."""
        ...


def block_lipschitz(smooth: CoordinateSmooth, block: Tensor) -> float:
    """Return `L_b`, the largest eigenvalue of `H_b`."""
    if len(block) == 1:
        return float(smooth.lipschitz[block[0]])
    return float(torch.linalg.eigvalsh(smooth.bound(block))[-1])


def power_iteration(times: Callable[[Tensor], Tensor], like: Tensor, iterations: int = 200) -> float:
    """Return the largest eigenvalue of a positive semidefinite map of vectors like `like`, from below."""
    v = torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like)
    size = 0.0
    for _ in range(iterations):
        norm = float(v.norm())
        if norm == 0:
            return 0.0
        v = times(v / norm)
        before, size = size, float(v.norm())
        if abs(size - before) <= 1e-5 * size:
            break
    return size
