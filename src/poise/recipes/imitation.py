"""Learn a policy from an expert who is asked about the states that the policy itself visits (DAgger).

    found = imitate(policy, cart.expert, cart, TargetSurrogate(inner_steps=50, eta=1.0), rounds=50, samples=100)
    found.queries, found.loss, found.reward                     # curves, one point a round

One round lets the policy act for `samples` states (the expert takes its place with probability `beta`), asks the expert what it would
have done in each, and lets the solver make one step on that answer. The expert is what costs: a solver that gets more out of an answer
needs fewer. Any solver will do: `TargetSurrogate` makes many cheap steps on every answer, "adam" makes one.

Source: arXiv:2302.02607, section 5; Ross, Gordon and Bagnell (2011).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from poise.errors import InputError, nearest
from poise.formula import parse
from poise.quantities import derive
from poise.solvers import as_solver
from poise.solvers.target_split import OracleProblem
from poise.tasks.control import Environment, Expert

__all__ = ["LOSSES", "Imitation", "ImitationLoss", "imitate", "rollout"]


class ImitationLoss(NamedTuple):
    """A loss of the policy's outputs against the expert's answer: its gradient, its value a row, and its smoothness."""

    gradient: Callable[[Tensor, Tensor], Tensor]
    value: Callable[[Tensor, Tensor], Tensor]
    smoothness: float


def _one_hot(z: Tensor, answer: Tensor) -> Tensor:
    return functional.one_hot(answer.long(), z.shape[-1]).to(z.dtype)


LOSSES: Mapping[str, ImitationLoss] = {
    "squared": ImitationLoss(lambda z, a: z - a, lambda z, a: 0.5 * (z - a).square().flatten(1).sum(1), 1.0),
    # Answers 0 and 1; the output is the margin of 1.
    "logistic": ImitationLoss(
        lambda z, a: z.sigmoid() - a,
        lambda z, a: functional.binary_cross_entropy_with_logits(z, a, reduction="none").flatten(1).sum(1),
        0.25,
    ),
    # Answers are class indices.
    "softmax": ImitationLoss(
        lambda z, a: z.softmax(-1) - _one_hot(z, a),
        lambda z, a: functional.cross_entropy(z, a.long(), reduction="none"),
        0.5,
    ),
    # Answers are the advantage of every action, and outputs are probabilities: `-<advantage, p>`, for divergence="kl".
    "policy": ImitationLoss(lambda z, a: -a, lambda z, a: -(a * z).sum(-1), 0.0),
}


@dataclass
class Imitation:
    """What a run of imitation did.

    Attributes:
        queries: states about which the expert had been asked, after every measured round.
        loss: mean loss on states that the policy visits on its own, labelled without being counted.
        reward: mean return of an episode of the policy.
        trained: mean loss on the batch of the round, before the step.
    """

    queries: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    trained: list[float] = field(default_factory=list)

    def queries_to(self, loss: float) -> int | None:
        """Return how many queries it took until the loss was, and stayed for the next measurement, at most that; None if never."""
        for i, value in enumerate(self.loss):
            if value <= loss and (i + 1 == len(self.loss) or self.loss[i + 1] <= loss):
                return self.queries[i]
        return None


def rollout(policy: Expert | nn.Module, environment: Environment, seed: int, steps: int) -> tuple[Tensor, float]:
    """Let a policy act alone; return the states that it visited and the mean return of its first episodes.

    Args:
        steps: of every copy; an episode that has not ended counts with what it earned.
    """
    state = environment.restart(seed)
    visited, earned = [], torch.zeros(environment.rows)
    running = torch.ones(environment.rows, dtype=torch.bool)
    with torch.no_grad():
        for _ in range(steps):
            visited.append(state)
            state, reward, ended = environment.step(policy(state))
            earned += torch.where(running, reward, 0.0)
            running &= ~ended
    return torch.cat(visited), float(earned.mean())


def imitate(
    policy: nn.Module,
    expert: Expert,
    environment: Environment,
    solver: Any,
    *,
    rounds: int = 50,
    samples: int = 100,
    loss: str = "squared",
    act: Callable[[Tensor], Tensor] | None = None,
    enact: Callable[[Tensor], Tensor] | None = None,
    aggregate: bool = False,
    beta: float = 0.0,
    beta_decay: float = 1.0,
    warm: bool = True,
    regulariser: Callable[[], Tensor] | None = None,
    measure_every: int = 1,
    measure: tuple[Environment, int] | None = None,
    seed: int = 0,
) -> Imitation:
    """Train a policy on what an expert says about the states that it visits.

    Args:
        policy: `states -> outputs`; trained in place.
        expert: `states -> answers`, in the form that the loss takes.
        environment: where the policy acts.
        solver: any solver, or the name of one.
        rounds: calls of the expert.
        samples: states of one call; a multiple of the environment's copies.
        loss: "squared" (actions), "logistic", "softmax", or "policy".
        act, enact: `outputs -> actions` and `answers -> actions`; outputs and answers themselves where nothing is said.
        aggregate: take the answers of all rounds into every step, and not those of the last alone.
        beta, beta_decay: probability that the expert acts in the policy's place, and its factor from round to round.
        warm: let the expert act in the first round, as the authors do.
        regulariser: `() -> 0-dim`, charged on the parameters.
        measure_every: rounds between measurements.
        measure: an environment and steps to measure in; by default 10 copies and a fifth of the horizon.
        seed: of everything that is drawn.

    Raises:
        InputError: an argument is out of range.
    """
    if loss not in LOSSES:
        raise InputError(
            f"imitate: there is no loss {loss!r}." + (nearest(loss, LOSSES) or f" There are: {', '.join(LOSSES)}.")
        )
    if samples < environment.rows or samples % environment.rows:
        raise InputError(
            f"imitate: samples must be a multiple of the environment's {environment.rows} copies, and it is {samples}."
        )
    if not (0 <= beta <= 1 and 0 <= beta_decay <= 1):
        raise InputError(f"imitate: beta and beta_decay must lie in [0, 1], and they are {beta} and {beta_decay}.")
    used = LOSSES[loss]
    chosen, shown = act or (lambda outputs: outputs), enact or (lambda answers: answers)
    solver = as_solver(solver)
    solver.bind(policy, parse("squared_error"))
    arena, steps = measure or (environment.another(10), max(1, environment.horizon // 5))
    generator = torch.Generator().manual_seed(derive(seed, "imitation"))
    found, state, asked = Imitation(), environment.restart(derive(seed, "train")), 0
    past: list[tuple[Tensor, Tensor]] = []
    for number in range(rounds):
        share = 1.0 if warm and number == 0 else beta * beta_decay**number
        visited, state = _visit(
            lambda s: chosen(policy(s)), lambda s: shown(expert(s)), environment, state, samples, share, generator
        )
        answers = expert(visited)
        asked += len(visited)
        past = [*past, (visited, answers)] if aggregate else [(visited, answers)]
        problem = _problem(policy, past, used, regulariser, derive(seed, number, "masks"))
        solver.step(problem)
        if number % measure_every == measure_every - 1 or number + 1 == rounds:
            own, earned = rollout(lambda s: chosen(policy(s)), arena, derive(seed, "measure"), steps)
            with torch.no_grad():
                missed = float(used.value(policy(own), expert(own)).mean())
            found.queries.append(asked)
            found.loss.append(missed)
            found.reward.append(earned)
            found.trained.append(float(problem.step.value))
    return found


def _visit(
    policy: Expert,
    expert: Expert,
    environment: Environment,
    state: Tensor,
    samples: int,
    share: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Collect states while the policy acts, or the expert with probability `share`."""
    visited = []
    with torch.no_grad():
        for _ in range(samples // environment.rows):
            visited.append(state)
            action = policy(state)
            if share:
                instead = torch.rand(environment.rows, generator=generator) < share
                action = torch.where(instead[:, None], expert(state), action)
            state, _, _ = environment.step(action)
    return torch.cat(visited), state


def _problem(
    policy: nn.Module,
    answers: list[tuple[Tensor, Tensor]],
    loss: ImitationLoss,
    regulariser: Callable[[], Tensor] | None,
    seed: int,
) -> OracleProblem:
    states, wanted = (torch.cat(parts) for parts in zip(*answers, strict=True))
    return OracleProblem(
        policy, states, lambda z, batch: loss.gradient(z, batch["answer"]), {"answer": wanted, "input": states},
        target_loss=lambda z, batch: loss.value(z, batch["answer"]), regulariser=regulariser, seed=seed,
    )  # fmt: skip
