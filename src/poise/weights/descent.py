"""Gradient descent on a few numbers within their ranges: how bilevel policies move logarithms of weights, and hyperparameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from poise.errors import InputError


def adam(
    gradient: Tensor, mean: Tensor, square: Tensor, count: int, betas: tuple[float, float], eps: float = 1e-8
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Adam's direction, to be multiplied by a step size and subtracted, and its two moments after this gradient.

        m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,   direction = (m/(1-b1^t)) / (sqrt(v/(1-b2^t)) + eps)

    Args:
        gradient, mean, square: of one shape; the moments before this gradient, 0 at first.
        count: t, which gradient this is, from 1.
        betas: b1 and b2.
        eps: what keeps the quotient finite; tiny for numbers whose gradients may be as small as they like.

    Source: Kingma and Ba, arXiv:1412.6980, algorithm 1.
    """
    first, second = betas
    mean = first * mean + (1 - first) * gradient
    square = second * square + (1 - second) * gradient.square()
    return (mean / (1 - first**count)) / ((square / (1 - second**count)).sqrt() + eps), mean, square


class Descent(nn.Module):
    """Adam on `theta`, clamped to `[low, high]`.

    On `theta = log w` a step is a factor, whatever the weight's unit, and weights stay positive. Adam divides by the gradient's own size,
    so what has a tiny gradient moves as fast as anything else.

    Args:
        lr: length of a step in `theta`; 0.1 changes a weight by a tenth. None: so that half the range takes a fifth of the steps.
        decay: shrink the step linearly to 0 over the run, so that the numbers come to rest.
        betas: averages of the gradient and of its square.

    Buffers, float64 `[m]`: `theta`, `mean`, `square`; `count`, int64. Source: Kingma and Ba, arXiv:1412.6980.
    """

    theta: Tensor
    mean: Tensor
    square: Tensor
    count: Tensor

    def __init__(self, lr: float | None = None, decay: bool = True, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__()
        if lr is not None and not lr > 0:
            raise InputError(f"The step of the weights must be positive, and lr is {lr}.")
        self.lr, self.decay, self.betas = lr, decay, betas
        for name in ("theta", "mean", "square", "low", "high"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def bind(self, theta: Tensor, low: Tensor, high: Tensor) -> None:
        """Take the first values and their ranges, f64 [m]; a start outside is moved to the nearer end."""
        self.low, self.high = low.double(), high.double()
        self.theta = theta.double().clamp(self.low, self.high)
        self.mean, self.square = torch.zeros_like(self.theta), torch.zeros_like(self.theta)

    def step(self, gradient: Tensor, updates: int) -> None:
        """Move down a gradient in `theta`.

        Args:
            gradient: f64 [m].
            updates: how many steps the run makes in all.
        """
        self.count += 1
        done = int(self.count)
        move, self.mean, self.square = adam(gradient, self.mean, self.square, done, self.betas, eps=1e-150)
        length = self._length(updates) * (max(0.0, 1 - (done - 1) / max(1, updates)) if self.decay else 1.0)
        self.theta = (self.theta - length * move).clamp(self.low, self.high)

    def _length(self, updates: int) -> Tensor | float:
        return self.lr if self.lr is not None else 2.5 * (self.high - self.low) / max(25, updates)

    def _apply(self, fn: object, recurse: bool = True) -> Descent:
        return self  # a handful of numbers, which stay on the host in double precision
