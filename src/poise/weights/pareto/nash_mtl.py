"""Weights as the outcome of a bargain: every term gains by the same factor of its own utility."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from poise.errors import InputError
from poise.weights.pareto.geometry import Array, array
from poise.weights.pareto.moving import MovingBalancer

if TYPE_CHECKING:
    from poise.problem import Signals

_RIDGE = 1e-12
_ROUNDS = 500


class NashMTL(MovingBalancer):
    """The Nash bargaining solution between the terms.

    G a = 1/a,  a > 0        the stationary point of  sum_i log <d, g_i>  over a ball of directions d = sum_i a_i g_i

    It is the only minimum of the self-concordant `a'G a/2 - sum_i log a_i`, which damped Newton steps reach to rounding; the released code
    linearises a concave part and stops after 20 rounds. In units of the gradients' lengths the equation has no scale:
    `b_i = a_i |g_i|` solves `C b = 1/b` with the cosines `C`, so scaling a term changes nothing about the direction.

    Args:
        max_norm: largest length of `d`; 0 turns it off.
        update_every: bargain anew in every such step and keep the weights in between; with `max_norm=0` the steps between need no
            gradient of their own for each term.

    Scale: `|d|^2 = sum_i a_i (G a)_i = m`, whatever the gradients, then `d` is shortened to `max_norm`. So the step has a constant length
    (1 by default, `sqrt m` without `max_norm`): choose the learning rate for that.

    When it fails: near a Pareto-stationary point the equation has no solution (weights grow without end) and a ridge of 1e-12 on
    the cosines bounds them; there only `d` has a meaning. A gradient that vanishes cannot bargain: weight 0. Steps whose length
    does not fall with the gradients do not settle without a falling learning rate.

    Buffers: `kept` (the last bargain, f64 [m]) and `steps`.

    Source: arXiv:2202.01017, claim 3.1 and algorithm 1.

    Example:
        >>> NashMTL(max_norm=0).weigh(torch.tensor([[1.0, 0.0], [0.0, 4.0]]), torch.zeros(2))
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """

    formula: ClassVar[str] = "nash_mtl"
    kept: Tensor
    steps: Tensor

    def __init__(self, max_norm: float = 1.0, update_every: int = 1) -> None:
        super().__init__()
        if not 0 <= max_norm < float("inf"):
            raise InputError(f"nash_mtl: max_norm is at least 0 (0 turns it off) and finite, and it is {max_norm}.")
        if update_every < 1:
            raise InputError(f"nash_mtl: update_every is a number of steps, at least 1, and it is {update_every}.")
        self.max_norm, self.update_every = float(max_norm), int(update_every)
        self.keep("kept")
        self.keep("steps", torch.tensor(0, dtype=torch.int64))

    @property
    def due(self) -> bool:
        """Whether this step bargains anew."""
        return not self.kept.numel() or int(self.steps) % self.update_every == 0

    def weigh(self, gram: Tensor, values: Tensor) -> Tensor:
        """Return the weights f64 [m], at least 0."""
        g = array(gram)
        if self.due:
            a = bargain(g)
        else:
            a = array(self.kept)
        length = float(np.sqrt(max(float(a @ g @ a), 0.0)))
        if 0 < self.max_norm < length:
            a = a * (self.max_norm / length)
        return torch.from_numpy(a.copy())

    def weights(self, signals: Signals) -> Mapping[str, float | Tensor]:
        """Return the weights of this step by name; between bargains that are not shortened no gradient is asked for."""
        if not self.due and not self.max_norm:
            return dict(zip(signals.names, self.kept.tolist(), strict=True))
        return super().weights(signals)

    def move(self, gram: Tensor, values: Tensor) -> None:
        """Keep the bargain of this step."""
        if self.due:
            self.kept = torch.from_numpy(bargain(array(gram)))
        self.steps = self.steps + 1

    def advance(self, signals: Signals) -> None:
        """Keep the bargain of this step, after the update."""
        if self.due:
            super().advance(signals)
        else:
            self.steps = self.steps + 1


def bargain(gram: Array) -> Array:
    """Return `a > 0` with `G a = 1/a`; 0 for a row that vanishes."""
    norms = np.sqrt(np.maximum(gram.diagonal(), 0.0))
    live = norms > 0
    found = np.zeros(len(norms))
    if live.any():
        n = norms[live]
        cosines = gram[np.ix_(live, live)] / n / n[:, None]
        found[live] = _reciprocal(cosines) / n
    return found


def _reciprocal(matrix: Array) -> Array:
    """Return `b > 0` with `C b = 1/b`, by Newton's method with the damping of self-concordant functions."""
    m = len(matrix)
    c = matrix + _RIDGE * np.eye(m)
    b = np.full(m, np.sqrt(m / max(float(c.sum()), 1e-8 * m)))
    for _ in range(_ROUNDS):
        gradient = c @ b - 1 / b
        # In relative steps s = db/b the Hessian is diag(b) C diag(b) + I, well conditioned where b is large.
        step = np.linalg.solve(c * b * b[:, None] + np.eye(m), -gradient * b)
        decrement = float(np.sqrt(max(-(gradient * b) @ step, 0.0)))
        b = b * (1 + step / (1 + decrement if decrement > 0.25 else 1.0))
        if decrement < 1e-9:
            break
    return b
