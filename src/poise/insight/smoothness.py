"""How far one gradient and one Hessian can be trusted: gradient-normalised smoothness.

    gamma(x) = max { gamma : |grad f(x + h) - grad f(x) - H h| <= |grad f(x)| |h| / gamma  for all |h| <= gamma }

It measures the error of the Taylor model and of an approximate Hessian by one length, the radius within which a step may be taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise.errors import InputError, NonFiniteError
from poise.problem import Problem
from poise.quantities import derive
from poise.solvers.curvature import Curvature, as_curvature
from poise.solvers.newton import Smooth, as_smooth

__all__ = ["SmoothnessEstimate", "gradient_normalized_smoothness", "smoothness_profile"]

_LARGEST = 1e12


@dataclass(frozen=True)
class SmoothnessEstimate:
    """What was found at one point.

    Attributes:
        gamma: the largest radius at which no sampled direction broke the inequality; infinite where the model is exact. An upper
            estimate: a direction that was not sampled may break it earlier.
        gradient_norm: there.
        direction: the unit direction that bounds gamma, or None where none does.
        gradients: evaluations that it took.
    """

    gamma: float
    gradient_norm: float
    direction: Tensor | None
    gradients: int


def gradient_normalized_smoothness(
    function: Smooth | Problem | Callable[[Tensor], Tensor],
    x: Tensor,
    hessian: Any = "exact",
    directions: int = 256,
    *,
    admissible: bool = False,
    seed: int = 0,
) -> SmoothnessEstimate:
    """Estimate the gradient-normalised smoothness at a point, from above, over sampled directions.

    Args:
        function: a problem, a `Smooth`, or a function of a tensor [d].
        x: the point, float [d].
        hessian: the approximation, as `GradientNormalizedNewton` takes it.
        directions: sampled; the gradient, its opposite and the coordinates (as far as they go) come first.
        admissible: only steps with `<g, h> + <H h, h> <= 0`, among which every regularised step is.
        seed: of the directions.

    Raises:
        InputError: `directions` is below 1, or the gradient is 0, where gamma is not defined.
        NonFiniteError: value or gradient are not finite at `x`.

    >>> x = torch.tensor([3.0], dtype=torch.float64)                        # f = x^3 / 6: gamma = sqrt(2 f')
    >>> round(gradient_normalized_smoothness(lambda x: x.pow(3).sum() / 6, x).gamma, 6)
    3.0

    Source:
        arXiv:2506.13710, definition of gamma. The exact set of admissible directions is not certain; `admissible` is that of its text.
    """
    if directions < 1:
        raise InputError(f"gradient_normalized_smoothness: directions must be at least 1, but it is {directions}.")
    smooth = as_smooth(function)
    x = x.detach()
    value, g = smooth.value_and_gradient(x)
    norm = float(torch.linalg.vector_norm(g))
    if not (math.isfinite(value) and math.isfinite(norm)):
        raise NonFiniteError(f"gradient_normalized_smoothness: the value is {value} and the gradient's norm {norm}.")
    if norm == 0:
        raise InputError(
            "gradient_normalized_smoothness: the gradient is 0 here, so gamma is not defined; take another point."
        )
    model = _Model(smooth, x, g, as_curvature(smooth.curvature(x, hessian, value, g)), admissible)
    gamma, tightest = _LARGEST, None
    for u in _directions(g, directions, seed):
        found = model.radius(u, gamma)
        if found < gamma:
            gamma, tightest = found, u
    return SmoothnessEstimate(math.inf if tightest is None else gamma, norm, tightest, model.gradients)


def smoothness_profile(
    function: Smooth | Problem | Callable[[Tensor], Tensor],
    path: Sequence[Tensor],
    hessian: Any = "exact",
    directions: int = 64,
) -> list[SmoothnessEstimate]:
    """Estimate gamma at every point of a path, such as a solver's iterates."""
    return [gradient_normalized_smoothness(function, x, hessian, directions) for x in path]


class _Model:
    """The error of the model around one point."""

    def __init__(self, smooth: Smooth, x: Tensor, g: Tensor, curvature: Curvature, admissible: bool) -> None:
        self.smooth, self.x, self.g, self.curvature, self.admissible = smooth, x, g, curvature, admissible
        self.norm = float(torch.linalg.vector_norm(g))
        self.gradients = 1

    def radius(self, u: Tensor, most: float) -> float:
        """Return the largest gamma <= most with `error(t u) <= |g| t / gamma` for the lengths t <= gamma that are looked at."""
        curved = self.curvature.product(u)
        bend, slope = float(u.dot(curved)), float(u.dot(self.g))
        reach = math.inf
        if self.admissible:
            reach = -slope / bend if bend > 0 else (math.inf if slope <= 0 else 0.0)
        # Up in factors of two from a small length, then bisection: the first length that breaks the inequality is the one that counts.
        worst, low = 0.0, 0.0
        t = min(1e-6 * max(1.0, float(torch.linalg.vector_norm(self.x))), most)
        while True:
            rate = self._rate(u, curved, t) if t <= reach else 0.0
            if max(worst, rate) * t > self.norm:
                return self._bisect(u, curved, low, t, worst, reach)
            worst, low = max(worst, rate), t
            if t >= most:
                return most
            # Beyond the reach the error no longer grows, and gamma is bounded by what it was: |g| / worst.
            if t > reach:
                return min(most, self.norm / worst) if worst > 0 else most
            t = min(2 * t, most)

    def _bisect(self, u: Tensor, curved: Tensor, low: float, high: float, worst: float, reach: float) -> float:
        for _ in range(40):
            if high - low <= 1e-9 * high:
                break
            middle = (low + high) / 2
            rate = self._rate(u, curved, middle) if middle <= reach else 0.0
            if max(worst, rate) * middle > self.norm:
                high = middle
            else:
                worst, low = max(worst, rate), middle
        return low

    def _rate(self, u: Tensor, curved: Tensor, t: float) -> float:
        """`|grad f(x + t u) - g - t H u| / t`, less what rounding explains."""
        self.gradients += 1
        _, there = self.smooth.value_and_gradient(self.x + t * u)
        error = float(torch.linalg.vector_norm(there - self.g - t * curved))
        if not math.isfinite(error):
            return math.inf
        sizes = self.norm + float(torch.linalg.vector_norm(there)) + t * float(torch.linalg.vector_norm(curved))
        rounding = 64 * torch.finfo(self.x.dtype).eps * sizes
        return 0.0 if error <= rounding else error / t


def _directions(g: Tensor, count: int, seed: int) -> list[Tensor]:
    """Unit directions: along the gradient, both ways; coordinates; then random ones."""
    unit = g / torch.linalg.vector_norm(g)
    found = [-unit, unit]
    for i in range(min(len(g), max(0, count - 2) // 4)):
        e = torch.zeros_like(g)
        e[i] = 1.0
        found += [e, -e]
    generator = torch.Generator().manual_seed(derive(seed, "smoothness"))
    while len(found) < count:
        u = torch.randn(len(g), generator=generator, dtype=torch.float64).to(g)
        found.append(u / torch.linalg.vector_norm(u))
    return found[:count]
