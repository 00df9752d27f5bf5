"""Near the average gradient, the direction whose worst term falls fastest."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from poise.errors import InputError
from poise.weights.pareto.balancer import Balancer
from poise.weights.pareto.geometry import Array, rows_of, shortest

_STATIONARY = 1e-8
_ROUNDS = 100


class CAGrad(Balancer):
    """Conflict-averse gradient: within a ball around the average gradient, what serves the worst term best.

    d = argmax min_i <d, g_i>  over  |d - g_0| <= c |g_0|,   g_0 = (1/m) sum_i g_i

    By duality `d = g_0 + (c |g_0|/|g_w|) g_w` with `w = argmin <g_w, g_0> + c |g_0| |g_w|` on the simplex, `g_w = sum_i w_i g_i`.
    The problem in `w` is not quadratic, but `|g_w| = min_t (|g_w|^2/t + t)/2`: for each `t` it is the shortest vector of a
    shifted hull, and on a face the right `t` is known in closed form. The answer is exact after a few faces.

    Args:
        c: radius of the ball in lengths of the average, at least 0. 0 is the average; from 1 on it approaches MGDA.
        rescale: divide by `1 + c^2`, as the released code does, so that steps keep the length of the average.

    Scale: the weights sum to `1 + c |g_0|/|g_w|` (before `rescale`), at least 1.

    When it fails: it stays near the average, so terms of very different scale are not balanced, only the conflict is softened. For
    `c >= 1` it stops at every Pareto-stationary point; for `c < 1` it goes on to a stationary point of the average.

    Source: arXiv:2110.14048, algorithm 1.

    Example:
        >>> CAGrad(c=0.0).weigh(torch.tensor([[1.0, 0.0], [0.0, 4.0]]), torch.zeros(2))
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    formula: ClassVar[str] = "cagrad"

    def __init__(self, c: float = 0.4, rescale: bool = False) -> None:
        super().__init__()
        if not 0 <= c < float("inf"):
            raise InputError(f"cagrad: c is at least 0 and finite, and it is {c}.")
        self.c, self.rescale = float(c), rescale

    def weigh(self, gram: Tensor, values: Tensor) -> Tensor:
        """Return the weights f64 [m], at least 0."""
        rows = rows_of(gram).scaled
        m = len(rows)
        average = rows.mean(0)
        weights = np.full(m, 1 / m)
        radius = self.c * float(np.linalg.norm(average))
        if radius > 0:
            w = _worst(rows, average, radius)
            length = float(np.linalg.norm(w @ rows))
            if length <= _STATIONARY * float(np.sqrt((rows * rows).sum(1).max())):
                # Some combination vanishes and the ball holds 0: no direction serves all terms.
                return torch.zeros(m, dtype=torch.float64)
            weights = weights + radius / length * w
        return torch.from_numpy(weights / (1 + self.c**2) if self.rescale else weights)


def _worst(rows: Array, average: Array, radius: float) -> Array:
    """Return `w = argmin <g_w, g_0> + radius |g_w|` on the simplex.

    At `tau = |g_w|/radius` the condition of the minimum is that of the shortest vector among `g_i + tau g_0`; `|g_w(tau)|/tau` falls.
    """
    tau, low, high = float(np.linalg.norm(average)) / radius, 0.0, float("inf")
    w = shortest(rows + tau * average)
    for _ in range(_ROUNDS):
        length = float(np.linalg.norm(w @ rows))
        if abs(length - radius * tau) <= 1e-13 * radius * tau:
            break
        low, high = (tau, high) if length > radius * tau else (low, tau)
        guess = _on_face(rows, average, radius, tau, w)
        if not low < guess < high:
            guess = 2 * low if high == float("inf") else 0.5 * (low + high)
        if guess in (low, high) or high < 1e-15 * float(np.abs(rows).max()) / radius:
            break
        tau, w = guess, shortest(rows + guess * average)
    return w


def _on_face(rows: Array, average: Array, radius: float, tau: float, w: Array) -> float:
    """Return the `tau` that solves `|g_w(tau)| = radius tau` while the support of `w` stays.

    There `g_w(tau) = p + tau q` with `p` orthogonal to `q`: `q` is minus the average's projection on the face.
    """
    corner, *others = rows[w > 0]
    if not others:
        return float(np.linalg.norm(corner)) / radius
    edges = np.stack(others) - corner
    q = -edges.T @ np.linalg.lstsq(edges.T, average, rcond=None)[0]
    p = w @ rows - tau * q
    room = radius**2 - float(q @ q)
    return float(np.sqrt(p @ p / room)) if room > 0 else float("inf")
