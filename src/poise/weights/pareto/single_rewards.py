"""Weights inside a reward: the policy gradient of each reward alone, beside the one of their weighted sum.

    grpo(reward=auto('accuracy')*score.on(reward='accuracy') + auto('brevity')*score.on(reward='brevity'))

The update is that of the combined reward, sum_i w_i r_i, as published. What the weights are judged by are the gradients of the same
loss with reward i alone, from the same answers: one forward pass and a backward pass for each. Where advantages are divided by
their deviation the two differ (a sum of normalised advantages is not the normalised advantage of the sum).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from poise.coefficient import Coefficient, Number, leaves_of, value_of
from poise.weights.gradient_table import GradientTable
from poise.weights.owned import OwnedWeight

if TYPE_CHECKING:
    from poise.objective import Objective, Summand, Term
    from poise.problem import Problem

__all__ = ["single_rewards", "table_of_rewards"]


def single_rewards(objective: Objective, names: Sequence[str]) -> tuple[Objective, dict[str, dict[str, float]]]:
    """Return the losses of an objective with one reward each, and for each weight the labels of its losses.

    Args:
        objective: some of its terms have rewards with owned weights of these names.
        names: of the weights.
    """
    from poise.objective import Objective

    found: list[Summand] = []
    rows: dict[str, dict[str, float]] = {name: {} for name in names}
    for entry in objective._entries:
        for name in names:
            changed = {k: _alone(reward, name) for k, reward in entry.term.composes().items() if name in _owned(reward)}
            if changed:
                label = f"alone_{len(found)}"
                found.append(replace(entry.summand, term=_with(entry.term, changed), name=label))
                # Every reward has its share of the weight of the whole loss.
                rows[name][label] = float(value_of(entry.weight, objective.clock))
    probe = Objective(found)
    probe.clock, probe.seed = objective.clock, objective.seed
    return probe, rows


def table_of_rewards(problem: Problem, names: Sequence[str]) -> GradientTable:
    """Return one gradient for each reward of a step, without moving anything of the step itself."""
    from poise.problem import Problem

    objective, rows = single_rewards(problem.objective, names)
    probe = Problem(
        problem.model, objective, problem.batches, problem.readout, key=problem.key, device=problem.device, autocast=problem.autocast,
        record=False,
    )  # fmt: skip
    # Not the first evaluation of the step: batch statistics move in copies.
    probe.step.evaluations = 1
    return probe.table(rows)


def _owned(objective: Objective) -> dict[str, OwnedWeight]:
    return {
        leaf.name: leaf for e in objective._entries for leaf in leaves_of(e.weight) if isinstance(leaf, OwnedWeight)
    }


def _alone(reward: Objective, name: str) -> Objective:
    """Return the summands that a weight multiplies, this weight at 1 and every other at 0."""
    owned = _owned(reward)
    table: dict[Coefficient, Number | Coefficient] = {leaf: 1 if n == name else 0 for n, leaf in owned.items()}
    kept = [
        replace(e.summand, weight=e.weight.replace(table))
        for e in reward._entries
        if isinstance(e.weight, Coefficient) and owned[name] in list(leaves_of(e.weight))
    ]
    return reward._like(kept)


def _with(term: Term, rewards: Mapping[str, Objective]) -> Term:
    """Return a flat copy of a term with other rewards; everything else is shared."""
    twin = copy.copy(term)
    twin.__dict__["_modules"] = {**term._modules, **rewards}
    return twin
