"""Maximum likelihood by a short Markov chain: the usual way to train an energy, and what compositional optimisation is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from poise.errors import InputError
from poise.objective import Term, Value

__all__ = ["ShortRunLangevin", "langevin_chain"]


class ShortRunLangevin(Term):
    """Push log p~ up at the data and down where a short Langevin chain ends that began at the noise.

    mean_j log p~(x'_j) - log p~(x),   x' <- x' + (step/2) grad log p~(x') + sqrt(step) temperature e,   e ~ N(0, 1)

    The gradient is that of the likelihood if the chain has mixed; a short one has not, and its bias is the price. A step costs `steps`
    passes forward and backward more. The value is a difference of energies and no likelihood.

    Args:
        steps: moves of the chain, >= 1.
        step: size of a move, > 0, in squared units of the input.
        temperature: scale of the chain's noise; 1 samples p, and images are often trained with far less.
        clip: largest Euclidean norm of a gradient in the input, or None.

    Reads: `log_density` float [batch]; `drawn` float [drawn, ...], where chains begin; `log_density_of`, log p~ as a function of points.
        `poise.readouts.Unnormalized(noise)` offers all three.
    Returns: float [batch], nats; publishes `negatives` [drawn, ...], where the chains ended.

    Raises:
        InputError: an argument out of range.

    Source: Nijkamp et al., arXiv:1904.09770.
    """

    formula = "short_run_langevin"
    equation: ClassVar[str] = "mean_j log p~(x'_j) - log p~(x),  x' by Langevin steps from noise"
    source: ClassVar[str] = "arXiv:1904.09770"
    expects: ClassVar[dict[str, str]] = {
        "log_density": "float [batch]",
        "drawn": "float [drawn, ...]",
        "log_density_of": "callable",
    }
    capabilities = frozenset({"per_example"})
    stochastic = True
    bounded_below = False

    def __init__(self, steps: int = 20, step: float = 0.1, temperature: float = 1.0, clip: float | None = None) -> None:
        super().__init__()
        if steps < 1:
            raise InputError(f"short_run_langevin: steps is a number of moves, at least 1; got {steps}.")
        if not step > 0 or not temperature >= 0:
            raise InputError(
                f"short_run_langevin: step must be positive and temperature at least 0; got {step} and {temperature}."
            )
        if clip is not None and not clip > 0:
            raise InputError(f"short_run_langevin: clip is a largest norm, positive or None; got {clip}.")
        self.steps, self.step, self.temperature, self.clip = steps, step, temperature, clip

    def forward(self, log_density: Tensor, drawn: Tensor, log_density_of: Callable[[Tensor], Tensor]) -> Value:
        x = langevin_chain(log_density_of, drawn, self.steps, self.step, self.temperature, self.clip)
        return Value(log_density_of(x).mean() - log_density, extras={"negatives": x})


def langevin_chain(
    log_density: Callable[[Tensor], Tensor],
    start: Tensor,
    steps: int = 20,
    step: float = 0.1,
    temperature: float = 1.0,
    clip: float | None = None,
) -> Tensor:
    """Return where unadjusted Langevin chains end, detached; draws from PyTorch's default generator.

    Args:
        log_density: maps points [n, ...] to log p~ [n], differentiable in the points.
        start: where the chains begin, [n, ...].
        steps, step, temperature, clip: as in `ShortRunLangevin`.

    >>> langevin_chain(lambda x: -0.5 * (x - 3).square().sum(-1), torch.zeros(1, 1), steps=200, temperature=0.0)
    tensor([[2.9999]])
    """
    x = start.detach()
    for _ in range(steps):
        with torch.enable_grad():
            at = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(log_density(at).sum(), at)
        if clip is not None:
            norm = slope.flatten(1).norm(dim=1).clamp(min=1e-12)
            slope = slope * (clip / norm).clamp(max=1).view(-1, *[1] * (slope.ndim - 1))
        x = x + 0.5 * step * slope
        if temperature:
            x = x + math.sqrt(step) * temperature * torch.randn_like(x)
    return x.detach()
