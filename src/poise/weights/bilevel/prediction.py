"""Where the lower level will be at the next theta, from where it went before: a warm start, never a result.

    x(theta + d) ~ x(theta) + sum_i c_i dx_i,      c = argmin norm(d - sum_i c_i dtheta_i)

The last moves of theta that were accepted, and what the lower solution and q did at each, are a secant model of both. Where the solution
is affine in theta it is exact as soon as the moves span the space. A wrong prediction costs iterations and nothing else, since what is
accepted is certified afterwards. It holds `size` copies of x and of q.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from poise.errors import InputError
from poise.weights.bilevel.levels import Tensors

__all__ = ["Prediction"]

LEAST = 1e-3
"""Directions of theta that are shorter than this part of the longest carry more error than news."""


class Prediction:
    """A secant model of the lower solution and of q.

    Args:
        size: how many moves are remembered; 0 predicts no change.

    >>> model = Prediction(2)
    >>> model.remember((torch.tensor([2.0]),), (torch.tensor([6.0]),), (torch.tensor([1.0]),))
    >>> model.x((torch.zeros(1),), (torch.tensor([1.0]),))
    (tensor([3.]),)
    """

    def __init__(self, size: int) -> None:
        if size < 0:
            raise InputError(f"The number of moves that are remembered must be >= 0; it is {size}.")
        self.size = size
        self._moves: list[tuple[Tensors, Tensors, Tensors | None]] = []

    def remember(self, theta: Tensors, x: Tensors, q: Tensors | None) -> None:
        """Keep one move of theta, and those of x and q that came with it; q may still be unknown, until `complete`."""
        if self.size:
            self._moves = [*self._moves[1 - self.size :], (theta, x, q)] if self.size > 1 else [(theta, x, q)]

    def complete(self, q: Tensors) -> None:
        """Say how q has moved in the last move."""
        if self._moves and self._moves[-1][2] is None:
            self._moves[-1] = (*self._moves[-1][:2], q)

    def x(self, x: Tensors, theta: Tensors) -> Tensors:
        """Return x moved along with a move of theta."""
        return _moved(x, [m[1] for m in self._moves], self._coefficients([m[0] for m in self._moves], theta))

    def q(self, q: Tensors, theta: Tensors) -> Tensors:
        """Return q moved along with a move of theta."""
        known = [m for m in self._moves if m[2] is not None]
        return _moved(q, [m[2] for m in known if m[2] is not None], self._coefficients([m[0] for m in known], theta))

    def _coefficients(self, moves: list[Tensors], move: Tensors) -> list[float]:
        if not moves:
            return []
        rows = torch.stack([_flat(m) for m in moves])
        gram, side = rows @ rows.T, rows @ _flat(move)
        values, vectors = torch.linalg.eigh(gram)
        inverse = torch.where(values > LEAST**2 * values[-1], 1 / values, 0.0)
        return [float(c) for c in vectors @ (inverse * (vectors.T @ side))]

    def state_dict(self) -> dict[str, Any]:
        """Return the moves."""
        return {"moves": [[_cloned(part) for part in move] for move in self._moves]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._moves = [(tuple(t), tuple(x), None if q is None else tuple(q)) for t, x, q in state["moves"]]


def _moved(start: Tensors, moves: list[Tensors], coefficients: list[float]) -> Tensors:
    found = tuple(t.clone() for t in start)
    for move, c in zip(moves, coefficients, strict=True):
        for t, m in zip(found, move, strict=True):
            t.add_(m, alpha=c)
    return found


def _flat(tensors: Tensors) -> Tensor:
    return torch.cat([t.flatten() for t in tensors]).double().cpu()


def _cloned(tensors: Tensors | None) -> list[Tensor] | None:
    return None if tensors is None else [t.clone() for t in tensors]
