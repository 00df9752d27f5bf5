"""How wrong a hypergradient can be that was taken beside the lower minimum, and between what the upper objective then lies.

With `norm(x - x*) <= eps` and `norm(H q - grad g) <= delta`:

    norm(z - grad F) <= omega = c eps + (norm(J) / mu) delta + (L_J L_g / mu) eps^2
    c = L_g norm(J) / mu + L_Hinv norm(grad g) norm(J) + L_J norm(grad g) / mu

    g(x) - norm(grad g) eps - (L_g / 2) eps^2  <=  g(x*)  <=  g(x) + norm(grad g) eps + (L_g / 2) eps^2

where L_g, L_J and L_Hinv say how fast grad g, J and the inverse of H change with x. J and H of a quadratic lower objective do not, and
of a convex upper one the lower bound needs no square. Constants that are not given are measured on the way: running maxima over random
directions of the size of eps, and power iteration for norm(J). What is measured is an estimate from below, not a proof.

Source: arXiv:2308.10098, Theorem 2.1, Lemma 3.5 and Remark 3.6.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from poise.errors import InputError
from poise.weights.bilevel.hypergradient import Hypergradient, packed
from poise.weights.bilevel.levels import Levels, Linearised, Tensors, norm, shifted

__all__ = ["ErrorBound"]


class ErrorBound:
    """The constants of the bound, given or measured.

    Args:
        levels: the two levels.
        upper_lipschitz: L_g.
        jacobian_norm: norm(J).
        jacobian_lipschitz: L_J.
        inverse_lipschitz: L_Hinv.
        convex_upper: whether g is convex in x, so that its lower bound needs no square.
        samples: whether x has a leading dimension of independent problems.

    Each is a number, or None to be measured.

    Raises:
        InputError: a constant below 0.
    """

    def __init__(
        self,
        levels: Levels,
        upper_lipschitz: float | None = None,
        jacobian_norm: float | None = None,
        jacobian_lipschitz: float | None = None,
        inverse_lipschitz: float | None = None,
        convex_upper: bool = True,
        samples: bool = False,
    ) -> None:
        self.given = {
            "upper_lipschitz": upper_lipschitz,
            "jacobian_norm": jacobian_norm,
            "jacobian_lipschitz": jacobian_lipschitz,
            "inverse_lipschitz": inverse_lipschitz,
        }
        for name, value in self.given.items():
            if value is not None and value < 0:
                raise InputError(f"{name} must be >= 0; it is {value}.")
        self.levels, self.convex_upper, self.samples = levels, convex_upper, samples
        self.measured = dict.fromkeys(self.given, 0.0)
        self._theta_direction: Tensors | None = None
        self._x_direction: Tensors | None = None
        self._generator = torch.Generator().manual_seed(0)

    def constant(self, name: str) -> float:
        """Return a constant as it was given, or as it was measured so far."""
        value = self.given[name]
        return self.measured[name] if value is None else value

    def omega(self, eps: float, delta: float, upper_gradient: float, mu: float) -> float:
        """Return the bound of the error of a hypergradient.

        Args:
            eps: of the lower solution, over all samples jointly.
            delta: absolute residual of q.
            upper_gradient: norm(grad g).
            mu: strong convexity.
        """
        jacobian, upper = self.constant("jacobian_norm"), self.constant("upper_lipschitz")
        change, inverse = self.constant("jacobian_lipschitz"), self.constant("inverse_lipschitz")
        c = upper * jacobian / mu + inverse * upper_gradient * jacobian + change * upper_gradient / mu
        return c * eps + jacobian / mu * delta + change * upper / mu * eps**2

    def bracket(self, value: float, gradient: Tensors, distance: Tensor) -> tuple[float, float]:
        """Return bounds of the upper objective at the lower minimum, from below and from above.

        Args:
            value: g(x).
            gradient: grad g(x).
            distance: bound of `norm(x - x*)` for each sample.
        """
        slopes = torch.linalg.vector_norm(packed(gradient, self.samples), dim=1)
        slope = float((slopes * distance).sum())
        square = self.constant("upper_lipschitz") / 2 * float((distance * distance).sum())
        return value - slope - (0.0 if self.convex_upper else square), value + slope + square

    def measure_upper(self, x: Tensors, theta: Tensors, batch: Any = None, times: int = 1) -> None:
        """Measure L_g by power iteration on differences of grad g; a running maximum."""
        if self.given["upper_lipschitz"] is not None:
            return
        length = 1e-4 * (1 + float(norm(x)))
        base = self.levels.upper_gradients(x, theta, batch)[1]
        direction = self._x_direction if self._x_direction is not None else self._random(x)
        for _ in range(times):
            size = float(norm(direction))
            if size == 0:
                direction = self._random(x)
                size = float(norm(direction))
            beside = shifted(x, length / size, direction)
            moved = self.levels.upper_gradients(beside, theta, batch)[1]
            direction = tuple((a - b) / length for a, b in zip(moved, base, strict=True))
            self._raise("upper_lipschitz", float(norm(direction)))
        self._x_direction = direction

    def measure_jacobian(self, theta: Tensors, derivatives: Linearised) -> None:
        """Measure norm(J) at x; not a running maximum, since it goes with the weights in theta."""
        if self.given["jacobian_norm"] is None:
            self.measured["jacobian_norm"] = self._norm_of_jacobian(theta, derivatives)

    def measure_lower(
        self,
        x: Tensors,
        theta: Tensors,
        batch: Any,
        derivatives: Linearised,
        found: Hypergradient,
        eps: float,
        mu: float,
    ) -> None:
        """Measure how J and the inverse of H change over a distance of about eps."""
        wanted = [n for n in ("jacobian_lipschitz", "inverse_lipschitz") if self.given[n] is None]
        if not wanted or found.q is None:
            return
        size = 1 + float(norm(x))
        # Below this a difference is rounding, above it no longer what happens around x.
        length = min(max(eps, torch.finfo(x[0].dtype).eps ** 0.5 * size), 0.1 * size)
        direction = self._random(x)
        beside = shifted(x, length / float(norm(direction)), direction)
        there = self.levels.linearise(beside, theta, batch)
        if "jacobian_lipschitz" in wanted:
            here = shifted(found.direct, -1, found.gradient)  # J' q
            change = norm(shifted(there.mixed_product(found.q), -1, here))
            self._raise("jacobian_lipschitz", float(change) / (length * _positive(norm(found.q))))
        if "inverse_lipschitz" in wanted:
            # (H(x + u)^-1 - H(x)^-1) grad g = -H(x + u)^-1 (H(x + u) - H(x)) q
            change = norm(shifted(there.hessian_product(found.q), -1, derivatives.hessian_product(found.q)))
            self._raise("inverse_lipschitz", float(change) / (mu * length * _positive(norm(found.upper_gradient))))

    def see(self, found: Hypergradient) -> None:
        """Take what a hypergradient shows of norm(J) for nothing: norm(J' q) / norm(q)."""
        if self.given["jacobian_norm"] is None and found.q is not None:
            image = norm(shifted(found.direct, -1, found.gradient))
            self._raise("jacobian_norm", float(image) / _positive(norm(found.q)))

    def _norm_of_jacobian(self, theta: Tensors, derivatives: Linearised) -> float:
        """The largest singular value of J: by power iteration, which goes on from the last direction."""
        if sum(t.numel() for t in theta) == 1:
            return float(norm(derivatives.response_product(tuple(torch.ones_like(t) for t in theta))))
        times, direction = 10, self._random(theta)
        if self._theta_direction is not None:
            # Half of it by chance, so that a direction that becomes the largest later on is found.
            last = self._theta_direction
            times, direction = 2, shifted(last, float(norm(last)) / _positive(norm(direction)), direction)
        top = 0.0
        for _ in range(times):
            size = float(norm(direction))
            if size == 0:
                direction = self._random(theta)
                size = float(norm(direction))
            image = derivatives.response_product(tuple(d / size for d in direction))
            top = max(top, float(norm(image)))
            direction = derivatives.mixed_product(image)
        self._theta_direction = direction
        return max(top, float(norm(direction)) / _positive(torch.tensor(top)))

    def _raise(self, name: str, value: float) -> None:
        self.measured[name] = max(self.measured[name], value)

    def _random(self, like: Tensors) -> Tensors:
        return tuple(torch.randn(t.shape, generator=self._generator, dtype=torch.float64).to(t) for t in like)

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured, the directions of the power iterations, and the state of the generator."""
        return {
            "measured": dict(self.measured),
            "theta_direction": _cloned(self._theta_direction),
            "x_direction": _cloned(self._x_direction),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.measured = dict(state["measured"])
        self._theta_direction, self._x_direction = _cloned(state["theta_direction"]), _cloned(state["x_direction"])
        self._generator.set_state(state["generator"])


def _positive(value: Tensor) -> float:
    return max(float(value), 1e-300)


def _cloned(tensors: Tensors | None) -> Tensors | None:
    return None if tensors is None else tuple(t.clone() for t in tensors)
