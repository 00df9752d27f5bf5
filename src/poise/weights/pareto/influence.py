"""Weights learnt from gradient influence, by mirror descent on the simplex (dynamic reward weighting, rule B).

    I_i   = <g_i, sum_j g_j>                      how much a step along g_i serves all objectives together
    w_i  <- w_i exp(lr I_i / mu) / Z              computed as softmax(log w + lr I / mu)

It is the maximiser over the simplex of the first-order gain of `sum_j J_j` after a step along `sum_i w_i g_i`, less a hold
on the present weights:

    max_w   lr <sum_i w_i g_i, sum_j g_j> - mu KL(w || w_t)

The sign of the gradients (loss or objective) does not matter, as long as all have the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from poise.errors import CheckpointError, InputError, NonFiniteError
from poise.weights.gradient_table import GradientTable
from poise.weights.pareto.balancer import Balancer, check_gram
from poise.weights.pareto.hypervolume import check_simplex
from poise.weights.pareto.single_rewards import table_of_rewards

if TYPE_CHECKING:
    from poise.problem import Signals

__all__ = ["GradientInfluence"]

Parameters = str | Sequence[str] | Callable[[str], bool]


class GradientInfluence(Balancer):
    """Raise the weights of objectives whose gradients agree with the sum of all: w <- softmax(log w + lr I / mu).

    Args:
        mu: strength of the hold on the present weights, > 0. Only lr/mu matters: published with 1e-5 at lr 1e-6 (ratio 0.1)
            and with ratio 0.01; choose mu as 10 to 100 times the learning rate over the squared size of the gradients.
        lr: "solver" takes the learning rate of the model's optimiser in each step; or a number > 0.
        every: steps whose influences are averaged before one update.
        params: parameters on which gradients are compared: names with * and ? ("layers.1?.*"), several of them, or a function
            of the name; None for all that terms share. Fewer save memory, and the update still moves all.
        self_term: count <g_i, g_i> too, as published; without it only agreement with the others counts.
        floor: smallest weight, in [0, 1/m): the update is then the same maximiser with w >= floor. An objective that is hard
            and sparse has small gradients and otherwise loses its weight, often for good.
        clip: largest norm of each gradient on these parameters before they are compared (published: 1); None leaves them.
        initial: the first weights by name, a point of the simplex; None for equal ones. A weight of 0 stays 0 for ever.

    The weights stand before terms, one policy gradient for each reward, or within the reward of one; then the update is that of the
    combined reward, as published, and each reward's own gradient costs a backward pass more.

    State: `log_weights`, `accumulated`, `steps` (accumulated so far) and `last` (influences), saved as extra state.

    Raises:
        InputError: an argument out of range, no parameter of such a name, or initial weights off the simplex.
        NonFiniteError: an influence that is not finite.

    >>> influence = GradientInfluence(mu=1.0, lr=1.0)
    >>> influence.update(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))                      # orthogonal, equal norms: nothing moves
    tensor([0.5000, 0.5000], dtype=torch.float64)

    Source: arXiv:2509.11452, algorithm 2 and eq. 3; yining610/dynamic-reward-weighting.
    """

    formula: ClassVar[str] = "influence"
    within_rewards: ClassVar[bool] = True

    def __init__(
        self,
        mu: float = 1e-5,
        lr: Literal["solver"] | float = "solver",
        every: int = 1,
        params: Parameters | None = None,
        self_term: bool = True,
        floor: float = 0.0,
        clip: float | None = None,
        initial: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        if not 0 < mu < math.inf:
            raise InputError(f"influence: mu must be positive and finite, and it is {mu}.")
        if (isinstance(lr, str) and lr != "solver") or (not isinstance(lr, str) and not 0 < lr < math.inf):
            raise InputError(f"influence: lr is 'solver' or a positive number, and it is {lr!r}.")
        if every < 1:
            raise InputError(f"influence: every must be at least 1 step, and it is {every}.")
        if not 0 <= floor < 0.5:
            raise InputError(f"influence: floor must lie in [0, 1/m) for m weights, and it is {floor}.")
        if clip is not None and not clip > 0:
            raise InputError(f"influence: clip must be positive, or None, and it is {clip}.")
        self.mu, self.lr, self.every, self.params = mu, lr, every, params
        self.self_term, self.floor, self.clip = self_term, floor, clip
        self.initial = None if initial is None else check_simplex("influence", initial)
        self.log_weights = torch.zeros(0, dtype=torch.float64)
        self.accumulated = torch.zeros(0, dtype=torch.float64)
        self.last = torch.zeros(0, dtype=torch.float64)
        self.steps = 0
        self.labels: tuple[str, ...] = ()
        self._next: _State | None = None

    # ---- the rule -----------------------------------------------------------------------------------------------------

    def influence(self, gram: Tensor) -> Tensor:
        """Return I_i = <g_i, sum_j g_j> of gradients with these inner products, f64 [m].

        Args:
            gram: `<g_i, g_j>`, [m, m].
        """
        gram = gram.detach().double().cpu()
        if self.clip is not None:
            factor = (self.clip / gram.diagonal().clamp_min(0).sqrt()).clamp(max=1.0)
            gram = factor[:, None] * gram * factor
        found = gram.sum(1)
        return found if self.self_term else found - gram.diagonal()

    def update(self, gram: Tensor, lr: float | None = None, labels: Sequence[str] = ()) -> Tensor:
        """Move the weights by one step's Gram matrix and return them, f64 [m]: for a loop of one's own.

        Args:
            gram: [m, m], in the order of the weights.
            lr: learning rate of this step, where `lr="solver"`.
            labels: names of the weights.
        """
        self._next = self._moved(gram, 1.0 if lr is None else lr, tuple(labels))
        self._take()
        return self.current

    @property
    def current(self) -> Tensor:
        """The weights, f64 [m]."""
        return _positive(self.log_weights)

    def _moved(self, gram: Tensor, lr: float, labels: tuple[str, ...]) -> _State:
        m = len(gram)
        log_w, accumulated = self._begin(m, labels)
        influence = self.influence(gram)
        if not bool(torch.isfinite(influence).all()):
            raise NonFiniteError(f"influence: the influences are {influence.tolist()}, and they must be finite.")
        rate = (lr if self.lr == "solver" else float(self.lr)) / self.mu
        accumulated, steps = accumulated + influence, self.steps + 1
        if steps < self.every:
            return log_w, accumulated, steps, labels, influence
        # Less the largest, which cancels in Z: adding a large number to all would round the weights.
        moved = (log_w + rate / steps * (accumulated - accumulated.max())).log_softmax(0)
        return _floored(moved, self.floor), torch.zeros_like(influence), 0, labels, influence

    def _begin(self, m: int, labels: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        if len(self.log_weights):
            if len(self.log_weights) != m or (labels and self.labels and labels != self.labels):
                raise InputError(
                    f"influence: the weights are of {', '.join(self.labels) or len(self.log_weights)}, and the gradients of "
                    f"{', '.join(labels) or m}."
                )
            return self.log_weights, self.accumulated
        if self.floor * m >= 1:
            raise InputError(
                f"influence: {m} weights of at least {self.floor:g} add up to 1 or more; floor must be below {1 / m:g}."
            )
        zero = torch.zeros(m, dtype=torch.float64)
        return self._first(m, labels), zero

    def _first(self, m: int, labels: tuple[str, ...]) -> Tensor:
        if self.initial is None:
            return torch.full((m,), -math.log(m), dtype=torch.float64)
        names = labels or tuple(self.initial)
        missing = [name for name in names if name not in self.initial]
        if missing or len(names) != m or len(self.initial) != m:
            raise InputError(
                f"influence: initial has weights for {', '.join(self.initial)}, and the terms are {', '.join(names)}."
            )
        return torch.tensor([self.initial[name] for name in names], dtype=torch.float64).log()

    def _take(self) -> None:
        if self._next is not None:
            self.log_weights, self.accumulated, self.steps, self.labels, self.last = self._next
            self._next = None

    # ---- as a policy --------------------------------------------------------------------------------------------------

    def weights(self, signals: Signals) -> Mapping[str, float | Tensor]:
        """Return the weights by this step's gradients: they move before the update that uses them."""
        table = self._table(signals)
        gram = self._gram(table)
        check_gram(gram, table.labels)
        self._next = self._moved(gram, signals.lr, table.labels)
        return dict(zip(table.labels, _positive(self._next[0]).tolist(), strict=True))

    def advance(self, signals: Signals) -> None:
        """Keep the weights of the step that has been made."""
        self._take()

    def report(self) -> Mapping[str, float]:
        """Return what drove the weights: the influences of the last step."""
        return {f"influence/{label}": float(i) for label, i in zip(self.labels, self.last, strict=False)}

    def _table(self, signals: Signals) -> GradientTable:
        within = [name for name in signals.names if not signals.rows[name]]
        if not within:
            return signals.gradients
        if len(within) < len(signals.names):
            raise InputError(
                f"influence: {', '.join(within)} stand within a reward, and the other weights before terms; put all in one place."
            )
        return table_of_rewards(signals.problem, signals.names)

    def _gram(self, table: GradientTable) -> Tensor:
        if self.params is None:
            return table.gram
        names = [name for name in table.shared if self._chosen(name)]
        if not names:
            raise InputError(
                f"influence: params={self.params!r} chooses none of the parameters that the terms share: "
                f"{', '.join(table.shared[:8])}{', ...' if len(table.shared) > 8 else ''}."
            )
        return GradientTable(table.labels, table.values, table.rows, names).gram

    def _chosen(self, name: str) -> bool:
        if callable(self.params):
            return bool(self.params(name))
        patterns = (self.params,) if isinstance(self.params, str) else tuple(self.params or ())
        return any(fnmatch(name, pattern) for pattern in patterns)

    # ---- state --------------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """Return weights, accumulator and counter."""
        return {
            "log_weights": self.log_weights.clone(),
            "accumulated": self.accumulated.clone(),
            "last": self.last.clone(),
            "steps": self.steps,
            "labels": list(self.labels),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take them back."""
        labels = tuple(state["labels"])
        if self.labels and labels and labels != self.labels:
            raise CheckpointError(
                f"influence: the checkpoint has weights of {', '.join(labels)}, and these are {', '.join(self.labels)}."
            )
        self.log_weights, self.accumulated = state["log_weights"].clone(), state["accumulated"].clone()
        self.last, self.steps, self.labels = state["last"].clone(), int(state["steps"]), labels
        self._next = None

    def __getstate__(self) -> dict[str, Any]:
        # What waits for `advance` is never copied or pickled.
        return {**self.__dict__, "_next": None}


_State = tuple[Tensor, Tensor, int, tuple[str, ...], Tensor]
"""Log-weights, accumulator, steps accumulated, labels, influences."""


def _positive(log_w: Tensor) -> Tensor:
    """Return weights of sum 1; one that is not 0 for ever stays positive, however small."""
    w = log_w.exp()
    return torch.where(log_w > -math.inf, w.clamp_min(torch.finfo(torch.float64).tiny), w)


def _floored(log_w: Tensor, floor: float) -> Tensor:
    """Return the weights nearest in KL(w || .) with w >= floor: w_i = max(floor, c w_i), c so that they add up to 1.

    A weight of 0 for ever stays out of it.
    """
    alive = log_w > -math.inf
    if floor == 0 or not bool(alive.any()):
        return log_w
    held = torch.zeros_like(alive)
    while True:
        free = alive & ~held
        scaled = log_w - log_w[free].logsumexp(0) + math.log1p(-floor * int(held.sum()))
        low = free & (scaled < math.log(floor))
        if not bool(low.any()):
            return torch.where(held, math.log(floor), torch.where(alive, scaled, log_w))
        held |= low
