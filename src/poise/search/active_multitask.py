"""Choose source tasks for a target while sampling them: L1-A-MTRL.

    1. draw from every source
    2. train one representation and a head for each source on all that was drawn
    3. fit the target's head on that representation
    4. nu = argmin 1/2 |W nu - w|^2 + lam |nu|_1
    5. n_t = max(beta |nu_t|, floor), draw what is missing;  2 to 4 again, up to the budget
    6. train once more on everything, fit the target's head, fine-tune

Earlier samples are used again. (The theory draws anew in every epoch, so that its estimates stay independent.)

    search = ActiveMultiTask(LinearMultiTask(20, 4, 40), draw, budget=6000, target=(x, y))
    result = search.run()
    print(result.report)

Source: arXiv:2306.02556, algorithm 1; the growing budgets follow Chen, Jamieson and Du, ICML 2022.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from poise.errors import InputError, StateError
from poise.weights.allocation import largest_remainder, water_fill
from poise.weights.relevance import LassoRelevance
from poise.weights.relevance_report import RelevanceReport

__all__ = ["ActiveMultiTask", "ActiveResult", "Draw", "Round", "Trainer"]

Draw = Callable[[int, int], tuple[Tensor, Tensor]]
"""`draw(task, n)` returns n new samples of a source: inputs [n, ...] and targets [n]."""


class Trainer(Protocol):
    """What trains a representation: `LinearMultiTask`, `NeuralMultiTask`, or yours.

    Attributes:
        tasks: T.
    """

    tasks: int

    def add(self, task: int, inputs: Tensor, targets: Tensor) -> None:
        """Take samples of a source."""
        ...

    def fit(self) -> None:
        """Train on everything that was added."""
        ...

    def heads(self) -> Tensor:
        """Return W (K, T) over a representation in which heads are comparable."""
        ...

    def target_head(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return w (K,) with the representation frozen."""
        ...

    def predict(self, inputs: Tensor, head: Tensor) -> Tensor:
        """Return predictions (n,)."""
        ...

    def noise(self) -> float:
        """Return the standard deviation that the fit leaves in the labels."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed search needs."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        ...


@dataclass(frozen=True)
class Round:
    """One epoch of the search.

    Attributes:
        samples: drawn so far.
        tasks_used: with more samples than the floor (all that were drawn from, in the first epoch).
        cost: of the samples and the openings so far; the samples where nothing has a price.
        error: of the target, as `measure` has it; NaN without.
        noise: what the fit left in the labels.
        relevance: nu that the next draw follows, (T,); empty after the last.
        counts: drawn so far, (T,).
    """

    samples: int
    tasks_used: int
    cost: float
    error: float
    noise: float
    relevance: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class ActiveResult:
    """What a search found.

    Attributes:
        head: w (K,) of the target on the trainer's representation.
        counts: samples of each source, int64 (T,).
        relevance: the last nu, float64 (T,).
        rounds: every epoch: target error against samples, tasks used, cost.
        report: the table: task, relevance, samples, share of the predicted risk, reason.
    """

    head: Tensor
    counts: Tensor
    relevance: Tensor
    rounds: tuple[Round, ...]
    report: RelevanceReport

    def curve(self) -> list[tuple[int, float]]:
        """Return target error against samples in all."""
        return [(r.samples, r.error) for r in self.rounds]

    def samples_to_reach(self, error: float) -> int | None:
        """Return the samples of the first epoch whose target error is at most `error`; None where there is none."""
        return next((r.samples for r in self.rounds if r.error <= error), None)


@dataclass
class _State:
    epoch: int = 0
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    rounds: list[Round] = field(default_factory=list)


class ActiveMultiTask:
    """The active search.

    Args:
        trainer: see `Trainer`; it is trained in place.
        draw: `draw(task, n)` returns n new samples of a source. Where it has `state_dict` and `load_state_dict`, these are saved too.
        budget: samples of all sources in all, or money where `relevance` has costs.
        epochs: how often it draws; 2 are enough in theory, 3 a little better in the simulator, 1 is passive.
        target: (inputs, targets) of the target task.
        relevance: how a draw follows from heads; `LassoRelevance(p=2, q=2)` is L2-A-MTRL.
        exploration: share of the budget that the first epoch spends on all sources alike, in (0, 1]; in between the budgets grow
            by a constant factor. No task gets fewer than the floor.
        available: most samples of each source, (T,).
        names: of the sources, for the report.
        measure: `measure(trainer, head) -> error` on the target, for the curve; it decides nothing.
        generator: the one that `draw` uses, so that its state is saved and resumed too.

    Raises:
        InputError: arguments that do not fit, or a budget below the floors.
    """

    def __init__(
        self,
        trainer: Trainer,
        draw: Draw,
        budget: float,
        epochs: int = 2,
        *,
        target: tuple[Tensor, Tensor],
        relevance: LassoRelevance | None = None,
        exploration: float = 0.3,
        available: Tensor | Sequence[int] | None = None,
        names: Sequence[str] | None = None,
        measure: Callable[[Any, Tensor], float] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.trainer, self.draw, self.budget, self.epochs, self.target = trainer, draw, budget, epochs, target
        self.relevance = LassoRelevance() if relevance is None else relevance
        self.exploration, self.available, self.names = exploration, available, names
        self.measure, self.generator = measure, generator
        if epochs < 1 or not 0 < exploration <= 1:
            raise InputError(
                f"ActiveMultiTask: at least one epoch and exploration in (0, 1]; they are {epochs} and {exploration}."
            )
        if len(target[0]) != len(target[1]) or not len(target[0]):
            raise InputError(
                f"ActiveMultiTask: the target needs as many inputs as targets; it has {len(target[0])} and {len(target[1])}."
            )
        tasks = trainer.tasks
        if names is not None and len(names) != tasks:
            raise InputError(f"ActiveMultiTask: {len(names)} names were given for {tasks} sources.")
        self.state = _State(counts=torch.zeros(tasks, dtype=torch.int64))
        least = self._cost(torch.full((tasks,), self.relevance.floor))
        if budget < least:
            raise InputError(
                f"ActiveMultiTask: the budget is {budget:g}, and {self.relevance.floor} samples of each of {tasks} sources cost "
                f"{least:g}. Raise the budget or lower the floor."
            )

    def run(self) -> ActiveResult:
        """Run the epochs that are left, and return what was found."""
        while self.state.epoch < self.epochs:
            self.step()
        return self.result()

    def step(self) -> Round:
        """Run one epoch: draw, train, look at the target.

        Raises:
            StateError: the search is over.
        """
        state = self.state
        if state.epoch >= self.epochs:
            raise StateError(f"The search has run its {self.epochs} epochs; make a new one to go on.")
        self._draw_up_to(self._wanted())
        self.trainer.fit()
        head = self.trainer.target_head(*self.target)
        state.epoch += 1
        error = math.nan if self.measure is None else float(self.measure(self.trainer, head))
        noise = self.trainer.noise()
        # Known before the next draw, and after the last for the report.
        self.relevance.fit(self.trainer.heads(), head, noise=noise, samples=len(self.target[0]))
        assert self.relevance.relevance is not None
        floor = 0 if state.epoch == 1 else max(self.relevance.floor, int(state.counts.min()))
        state.rounds.append(
            Round(
                int(state.counts.sum()),
                int((state.counts > floor).sum()),
                self._cost(state.counts),
                error,
                noise,
                tuple(self.relevance.relevance.tolist()),
                tuple(state.counts.tolist()),
            )
        )
        return state.rounds[-1]

    def result(self) -> ActiveResult:
        """Return what was found so far.

        Raises:
            StateError: nothing has been drawn yet.
        """
        if not self.state.epoch:
            raise StateError("The search has not drawn anything yet: call run() or step().")
        assert self.relevance.relevance is not None
        return ActiveResult(
            self.trainer.target_head(*self.target),
            self.state.counts.clone(),
            self.relevance.relevance.clone(),
            tuple(self.state.rounds),
            self.relevance.report(self.state.counts, self.names),
        )

    def schedule(self) -> list[float]:
        """Return the budget that is spent after each epoch: the exploration first, then growing by a constant factor."""
        if self.epochs == 1:
            return [self.budget]
        steps = self.epochs - 1
        shares = [self.exploration ** ((steps - e) / steps) for e in range(self.epochs)]
        whole = self.relevance.costs is None
        return [self.budget if s == 1 else (round(s * self.budget) if whole else s * self.budget) for s in shares]

    def _wanted(self) -> Tensor:
        """Return how many samples each source should have after this epoch."""
        budget, state = self.schedule()[self.state.epoch], self.state
        if state.epoch == 0:
            floors = torch.full_like(state.counts, self.relevance.floor)
            return self._even(max(budget, self._cost(floors)))
        spent = self._cost(state.counts)
        return self.relevance.allocate(max(budget, spent), self.available, drawn=state.counts)

    def _even(self, budget: float) -> Tensor:
        """The exploration: the same number from every source, as far as they go."""
        tasks = self.trainer.tasks
        costs = None if self.relevance.costs is None else self.relevance.costs
        floor = np.full(tasks, float(self.relevance.floor))
        cap = np.full(tasks, np.inf) if self.available is None else torch.as_tensor(self.available).double().numpy()
        floor = np.minimum(floor, cap)
        opened = 0.0 if self.relevance.opening is None else float(self.relevance.opening.sum())
        amounts = water_fill(
            np.ones(tasks),
            min(budget - opened, float((cap * (1 if costs is None else costs)).sum())),
            floor,
            cap,
            costs,
        )
        if costs is not None:
            return torch.from_numpy(np.floor(amounts + 1e-9).astype(np.int64))
        return torch.from_numpy(largest_remainder(amounts, round(float(amounts.sum()))))

    def _draw_up_to(self, wanted: Tensor) -> None:
        for task, number in enumerate((wanted - self.state.counts).tolist()):
            if number <= 0:
                continue
            inputs, targets = self.draw(task, number)
            if len(inputs) != number or len(targets) != number:
                raise InputError(
                    f"draw({task}, {number}) returned {len(inputs)} inputs and {len(targets)} targets. Give `available` where a "
                    "source runs out."
                )
            self.trainer.add(task, inputs, targets)
            self.state.counts[task] += number

    def _cost(self, counts: Tensor) -> float:
        costs, opening = self.relevance.costs, self.relevance.opening
        paid = float(counts.sum()) if costs is None else float((counts.double() * torch.from_numpy(costs)).sum())
        if opening is not None:
            paid += float(torch.from_numpy(opening)[counts > 0].sum())
        return paid

    # ---- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, nu, the counts drawn, the trainer and the random numbers: what a resumed search needs."""
        return {
            "epoch": self.state.epoch,
            "counts": self.state.counts.clone(),
            "rounds": [asdict(r) for r in self.state.rounds],
            "relevance": self.relevance.state_dict(),
            "trainer": copy.deepcopy(self.trainer.state_dict()),
            "draw": self.draw.state_dict() if hasattr(self.draw, "state_dict") else None,
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back; the next `step` goes on as the search would have."""
        if len(state["counts"]) != self.trainer.tasks:
            raise InputError(
                f"The state is of a search over {len(state['counts'])} sources, and this one has {self.trainer.tasks}."
            )
        self.state = _State(state["epoch"], state["counts"].clone(), [Round(**r) for r in state["rounds"]])
        self.relevance.load_state_dict(state["relevance"])
        self.trainer.load_state_dict(copy.deepcopy(state["trainer"]))
        if hasattr(self.draw, "load_state_dict") and state["draw"] is not None:
            self.draw.load_state_dict(state["draw"])
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"])
