"""Bilevel problems of regression: a quadratic one that is known exactly, and 640 weights of a logistic regression on digits.

    task = quadratic(seed=0)
    method = MAID(task.levels, task.theta, task.x, **task.constants)
    method.run(max_outer=150)
    task.measures["gap"](method.x, method.theta)            # F(theta) - min F, by the closed form

Source: arXiv:2308.10098, sections 4.1 and 4.2, at sizes of this library.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from poise.errors import InputError
from poise.quantities import derive
from poise.tasks.bilevel_task import BilevelTask
from poise.weights.bilevel.levels import Levels, Tensors

__all__ = ["logistic_weights", "quadratic"]


def quadratic(seed: int = 0, largest: float = 3.0, rows: int = 200, d: int = 10) -> BilevelTask:
    """Return least squares below and above, with the minimum of F known.

        lower = |A2 x + A3 theta - b2|^2 / 2,    upper = |A1 x - b1|^2 / 2

    The three matrices have orthonormal columns scaled by 1 to `largest`, so that the condition number of the lower Hessian is
    `largest^2`.

    Args:
        seed: of matrices and data.
        largest: singular value of each matrix; the smallest is 1.
        rows, d: size of the matrices.
    """
    if largest < 1 or rows < d or d < 1:
        raise InputError(f"quadratic: largest >= 1 and rows >= d >= 1 are needed; they are {largest}, {rows} and {d}.")
    generator = torch.Generator().manual_seed(derive(seed, "quadratic"))

    def matrix() -> Tensor:
        columns, _ = torch.linalg.qr(torch.randn(rows, d, generator=generator, dtype=torch.float64))
        scaled: Tensor = columns * torch.linspace(1, largest, d, dtype=torch.float64)
        return scaled

    def vector(size: int) -> Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64)

    a1, a2, a3 = matrix(), matrix(), matrix()
    b1 = a1 @ vector(d) + 0.01 * torch.randn(rows, generator=generator, dtype=torch.float64)
    b2 = a2 @ vector(d) + a3 @ vector(d) + 0.01 * torch.randn(rows, generator=generator, dtype=torch.float64)
    hessian = a2.T @ a2
    offset, response = torch.linalg.solve(hessian, a2.T @ b2), torch.linalg.solve(hessian, a2.T @ a3)

    def value(theta: Tensor) -> float:
        return float((a1 @ (offset - response @ theta) - b1).square().sum() / 2)

    best = value(torch.linalg.lstsq(a1 @ response, a1 @ offset - b1).solution)
    return BilevelTask(
        Levels(
            lambda x, theta, _: (a2 @ x[0] + a3 @ theta[0] - b2).square().sum() / 2,
            lambda x, theta, _: (a1 @ x[0] - b1).square().sum() / 2,
        ),
        (torch.ones(d, dtype=torch.float64),),
        (torch.zeros(d, dtype=torch.float64),),
        {
            "strong_convexity": 1.0,
            "smoothness": largest**2,
            "upper_lipschitz": largest**2,
            "jacobian_norm": float(torch.linalg.matrix_norm(a2.T @ a3, 2)),
            "jacobian_lipschitz": 0.0,
            "inverse_lipschitz": 0.0,
        },
        {"value": lambda x, theta: value(theta[0]), "gap": lambda x, theta: value(theta[0]) - best},
    )


def logistic_weights(seed: int = 0, train: int = 800, valid: int = 500, start: float = -4.0) -> BilevelTask:
    """Return multinomial logistic regression on scikit-learn's digits with one log-weight for each of its 640 coefficients.

        lower = mean cross-entropy(train) + sum_ij exp(theta_ij) x_ij^2 / 2,    upper = mean cross-entropy(valid)

    What is left of the 1,797 images is the test set.

    Args:
        seed: of the split.
        train, valid: images of each level.
        start: every log-weight at first.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = torch.from_numpy(data.data) / 16, torch.from_numpy(data.target)
    if not 0 < train < train + valid < len(labels):
        raise InputError(f"logistic_weights: train + valid must leave test images of {len(labels)}.")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(derive(seed, "split")))
    parts = order[:train], order[train : train + valid], order[train + valid :]
    (a, y), (b, z), (c, w) = ((images[p], labels[p]) for p in parts)
    top = float(torch.linalg.matrix_norm(a, 2)) ** 2 / len(a)
    top_valid = float(torch.linalg.matrix_norm(b, 2)) ** 2 / len(b)

    def lower(x: Tensors, theta: Tensors, _: object) -> Tensor:
        return functional.cross_entropy(a @ x[0], y) + (theta[0].exp() * x[0].square()).sum() / 2

    def error(x: Tensors, _: Tensors) -> float:
        return float(((c @ x[0]).argmax(1) != w).double().mean())

    return BilevelTask(
        Levels(lower, lambda x, theta, _: functional.cross_entropy(b @ x[0], z), names=("log-weights",)),
        (torch.full((64, 10), start, dtype=torch.float64),),
        (torch.zeros(64, 10, dtype=torch.float64),),
        {
            "strong_convexity": lambda theta: theta[0].exp().min(),
            # The Hessian of log-sum-exp has eigenvalues up to 1/2.
            "smoothness": lambda theta: top / 2 + theta[0].exp().max(),
            "upper_lipschitz": top_valid / 2,
        },
        {
            "validation loss": lambda x, _: float(functional.cross_entropy(b @ x[0], z)),
            "test loss": lambda x, _: float(functional.cross_entropy(c @ x[0], w)),
            "test error": error,
        },
    )
