"""How an unfolded solver learns its steps: generation by generation, by what is known of the signals.

    supervised   1/B sum ||x_t - x||^2 / n                 needs the true signals
    objective    1/B sum f(x_t; y) / n                     needs measurements alone
    both         w supervised / s_0 + (1 - w) objective / f_0,   each by its value before training, so that w is a share

Generation t trains layers 1 to t by the loss at layer t, from where generation t - 1 ended; training all layers at once from the start
leaves most of them without a gradient worth the name.

Source: arXiv:2509.01331; incremental training: Ito, Takabe and Wadayama (2019).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from poise.errors import CheckpointError, InputError, NonFiniteError, nearest
from poise.quantities import derive

if TYPE_CHECKING:
    from poise.solvers.unfolded import Unfolded

__all__ = ["Generation", "Incremental", "UnfoldedTraining", "train_unfolded"]

LOSSES = ("supervised", "objective")


class Measured(Protocol):
    """One batch: an operator, measurements `y [batch, m]`, and where they are known signals `x [batch, n]`.

    `labelled [batch]` marks the signals that may be looked at; None is all of them.
    """

    @property
    def operator(self) -> Any: ...

    @property
    def y(self) -> Tensor: ...

    @property
    def x(self) -> Tensor | None: ...

    @property
    def labelled(self) -> Tensor | None: ...


Sampler = Callable[[int, torch.Generator], Measured]
"""`sampler(batch size, generator) -> Measured`, such as those of `poise.data.sparse_signals`."""


@dataclass(frozen=True)
class Incremental:
    """How many batches each generation trains on, and how.

    Args:
        batches: of a generation, at least 1.
        batch_size: signals of a batch.
        lr: Adam's, in the units of the steps (1/L).
        matrix_lr: Adam's for learned matrices.
        first: layers of the first generation; T trains all of them at once.
        decay: the share of `lr` that is left at the end of each generation; it falls geometrically and starts anew, so that new layers
            move far and old ones settle.
        reset: forget Adam's moments between generations. Carried, they count the updates of all layers together, so that a new layer moves
            a few times faster than an old one at first.
        least: steps stay at `least / L` or above.
    """

    batches: int = 40
    batch_size: int = 200
    lr: float = 0.1
    matrix_lr: float = 1e-3
    first: int = 1
    decay: float = 0.1
    reset: bool = False
    least: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("batches", "batch_size", "first"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"Incremental: {name} must be an integer of at least 1, and it is {value!r}.")
        if not 0 < self.decay <= 1:
            raise InputError(f"Incremental: decay is a share in (0, 1], and it is {self.decay}.")
        for name in ("lr", "matrix_lr", "least"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"Incremental: {name} must be finite and above 0, and it is {value}.")


@dataclass(frozen=True)
class Generation:
    """What one generation ended with: layers trained, the mean loss of its batches, and the steps in units of 1/L."""

    layers: int
    loss: float
    steps: tuple[float, ...]


class UnfoldedTraining:
    """Training of an unfolded solver that can stop after any batch and go on exactly.

    Args:
        model: what is trained, in place.
        sampler: draws batches; equal seeds give equal batches whatever the loss, so that contestants are compared in pairs.
        loss: "supervised", "objective", a share w of the supervised loss in [0, 1], or weights by name.
        schedule: of the generations.
        discount: None charges the last layer of a generation alone; a number in (0, 1] charges layer s of t by `discount^(t - s)`, for
            estimates at any time.
        seed: of the batches.

    Raises:
        InputError: a loss that does not exist, weights that are negative or all 0, an empty schedule.
    """

    def __init__(
        self,
        model: Unfolded,
        sampler: Sampler,
        loss: str | float | Mapping[str, float] = "objective",
        schedule: Incremental | None = None,
        *,
        discount: float | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.sampler, self.seed = model, sampler, seed
        self.schedule = schedule or Incremental()
        self.weights = _weights(loss)
        if discount is not None and not 0 < discount <= 1:
            raise InputError(f"train_unfolded: discount is None or in (0, 1], and it is {discount}.")
        if self.schedule.first > model.layers:
            raise InputError(
                f"train_unfolded: the first generation has {self.schedule.first} layers, and the model {model.layers}."
            )
        self.discount = discount
        self.layers, self.batch = self.schedule.first, 0
        self.history: list[Generation] = []
        self._running: list[float] = []
        self.scales: dict[str, float] | None = None
        self.optimizer = self._optimizer()

    @property
    def done(self) -> bool:
        """Whether every generation is trained."""
        return self.layers > self.model.layers

    def run(self, after: Callable[[Generation], None] | None = None) -> UnfoldedTraining:
        """Train until the end; `after` is called at the end of every generation."""
        while not self.done:
            before = len(self.history)
            self.advance()
            if after is not None and len(self.history) > before:
                after(self.history[-1])
        return self

    def advance(self) -> float:
        """Train on one batch and return its loss."""
        t = self.layers
        batch = self._draw("train", t, self.batch)
        if self.scales is None:
            self.scales = self._first_values()
        loss = self._loss(batch, t)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteError(
                f"train_unfolded: the loss of generation {t} is {value} at batch {self.batch}: a step grew too large. Lower lr "
                f"({self.schedule.lr:g}) or train more batches a generation."
            )
        self._set_rates()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.model.clamp_(self.schedule.least)
        self._running.append(value)
        self.batch += 1
        if self.batch == self.schedule.batches:
            self._close_generation()
        return value

    def _set_rates(self) -> None:
        """Let the rates fall through the generation, as a function of the batch alone."""
        left = self.schedule.decay ** (self.batch / max(self.schedule.batches - 1, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = left * group["rate"]

    def _close_generation(self) -> None:
        steps = tuple(float(a) for a in self.model.steps[: self.layers])
        self.history.append(Generation(self.layers, sum(self._running) / len(self._running), steps))
        self.layers, self.batch, self._running = self.layers + 1, 0, []
        if self.schedule.reset:
            self.optimizer = self._optimizer()

    # ---- losses --------------------------------------------------------------------------------------------------------

    def _loss(self, batch: Measured, layers: int) -> Tensor:
        assert self.scales is not None
        if self.discount is None:
            outputs = [self.model(batch.operator, batch.y, layers=layers)]
            shares = [1.0]
        else:
            outputs = list(self.model(batch.operator, batch.y, layers=layers, trace=True)[1])
            shares = [self.discount ** (layers - 1 - s) for s in range(layers)]
        total = torch.zeros((), dtype=batch.y.real.dtype, device=batch.y.device)
        for name, weight in self.weights.items():
            for x, share in zip(outputs, shares, strict=True):
                total = total + weight / self.scales[name] * share / sum(shares) * self._value(name, batch, x)
        return total

    def _value(self, name: str, batch: Measured, x: Tensor) -> Tensor:
        if name == "objective":
            return self.model.objective(batch.operator, batch.y, x).mean() / x.shape[-1]
        if batch.x is None:
            raise InputError(
                "train_unfolded: the supervised loss needs the true signals, and the batches have none (x is None). Take "
                "loss='objective', which needs measurements alone."
            )
        if batch.x.shape != x.shape:
            raise InputError(
                f"train_unfolded: signals must be {list(x.shape)}, and the batch has {list(batch.x.shape)}."
            )
        error = (x - batch.x).abs().square().mean(-1)
        if batch.labelled is None:
            return error.mean()
        # a batch without a labelled signal says nothing, and costs nothing
        return torch.where(batch.labelled, error, 0.0).sum() / batch.labelled.sum().clamp_min(1)

    def _first_values(self) -> dict[str, float]:
        """Return what each loss is before training where several are added, else 1: a factor changes nothing for Adam."""
        if len(self.weights) == 1:
            return dict.fromkeys(self.weights, 1.0)
        batch = self._draw("scales", 0, 0)
        with torch.no_grad():
            x = self.model(batch.operator, batch.y)
            return {name: max(float(self._value(name, batch, x)), 1e-12) for name in self.weights}

    def _draw(self, *place: int | str) -> Measured:
        return self.sampler(self.schedule.batch_size, torch.Generator().manual_seed(derive(self.seed, *place)))

    # ---- state -----------------------------------------------------------------------------------------------------------

    def _optimizer(self) -> torch.optim.Adam:
        matrices = {id(p) for p in (*self.model.encode, *self.model.carry)}
        named = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in named if id(p) not in matrices], "lr": self.schedule.lr, "rate": self.schedule.lr},
            {
                "params": [p for p in named if id(p) in matrices],
                "lr": self.schedule.matrix_lr,
                "rate": self.schedule.matrix_lr,
            },
        ]
        groups = [group for group in groups if group["params"]]
        if not groups:
            raise InputError("train_unfolded: the model has nothing to learn.")
        return torch.optim.Adam(groups)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs: steps, generation, batch, optimiser; batches follow from the seed."""
        return {
            "model": {k: v.clone() for k, v in self.model.state_dict().items()}, "optimizer": self.optimizer.state_dict(),
            "layers": self.layers, "batch": self.batch, "seed": self.seed, "scales": self.scales, "running": list(self._running),
            "history": [asdict(g) for g in self.history], "schedule": asdict(self.schedule),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back.

        Raises:
            CheckpointError: it is of another seed or schedule, so it could not go on exactly.
        """
        if state["seed"] != self.seed or state["schedule"] != asdict(self.schedule):
            raise CheckpointError(
                f"train_unfolded: the state is of seed {state['seed']} and {Incremental(**state['schedule'])}, and this training of seed "
                f"{self.seed} and {self.schedule}."
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.layers, self.batch = state["layers"], state["batch"]
        self.scales, self._running = state["scales"], list(state["running"])
        self.history = [Generation(g["layers"], g["loss"], tuple(g["steps"])) for g in state["history"]]


def train_unfolded(
    model: Unfolded,
    sampler: Sampler,
    loss: str | float | Mapping[str, float] = "objective",
    schedule: Incremental | None = None,
    *,
    discount: float | None = None,
    seed: int = 0,
    after: Callable[[Generation], None] | None = None,
) -> UnfoldedTraining:
    """Train the steps of an unfolded solver, in place, and return the finished training with its history.

    The arguments are those of `UnfoldedTraining`; `after` is called at the end of every generation.

    >>> from poise.data.sparse_signals import BernoulliGaussian
    >>> from poise.solvers import Unfolded
    >>> model = Unfolded("ista", layers=2, weight=0.1)
    >>> done = train_unfolded(model, BernoulliGaussian(10, 20), "objective", Incremental(batches=5, batch_size=20))
    >>> [g.layers for g in done.history]
    [1, 2]
    """
    return UnfoldedTraining(model, sampler, loss, schedule, discount=discount, seed=seed).run(after)


def _weights(loss: str | float | Mapping[str, float]) -> dict[str, float]:
    if isinstance(loss, str):
        loss = {loss: 1.0}
    elif isinstance(loss, int | float):
        if not 0 <= loss <= 1:
            raise InputError(f"train_unfolded: loss={loss} is the share of the supervised loss, so it lies in [0, 1].")
        loss = {"supervised": float(loss), "objective": 1.0 - float(loss)}
    for name, weight in loss.items():
        if name not in LOSSES:
            raise InputError(
                f"train_unfolded: losses are {' and '.join(LOSSES)}, and {name!r} is none.{nearest(name, LOSSES)}"
            )
        if not (math.isfinite(weight) and weight >= 0):
            raise InputError(f"train_unfolded: the weight of {name} must be finite and at least 0, and it is {weight}.")
    kept = {name: float(weight) for name, weight in loss.items() if weight > 0}
    if not kept:
        raise InputError("train_unfolded: every weight is 0, so there is nothing to train by.")
    return kept
