"""Policies in a run: who owns which weight, what they are told, and how their weights reach the update.

    fit(model, "a + auto(policy='bilevel')*l2", ...)        # made from the formula
    fit(model, "a + auto*l2", ..., policy=OnlineBilevel())   # owns every `auto` that names no policy
    fit(model, "a + b", ..., policy="mgda")                  # balances every term
    fit(model, "a + b", ..., policy=SelfTuning(hypers))      # owns no weight: tunes what the model's layers and the terms read

A loop makes one `Policies` a run: it `bind`s them, `set`s the weights before every update and `advance`s them after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from poise.coefficient import leaves_of, multiply
from poise.errors import InputError
from poise.objective import Objective, replace_weights
from poise.problem import Policy, Problem, Signals
from poise.weights.auto import Auto
from poise.weights.hyperparameter import HyperparameterWeight
from poise.weights.owned import OwnedWeight, rows_of
from poise.weights.policies import find_policy, make_policy


@dataclass
class Owner:
    """A policy and the weights that it owns."""

    policy: Policy
    weights: dict[str, OwnedWeight]
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def balances(self) -> bool:
        """Whether its weights weigh gradients on shared parameters, and a term's own parameters keep weight 1."""
        return bool(getattr(self.policy, "balances", False))


class Policies:
    """The policies of one run.

    Args:
        objective: as it was given, with its `auto` weights.
        policy: a policy, or the name of one, that owns every `auto` weight that names none; with no such weight, a balancer of all
            terms.

    Raises:
        InputError: two policies for one weight, a policy without a weight, or a name that does not exist.
    """

    def __init__(self, objective: Objective, policy: Policy | str | None = None) -> None:
        given = find_policy(policy) if isinstance(policy, str) else policy
        made: dict[tuple[str, str | None], list[str]] = {}
        plain: list[str] = []
        for name, auto in objective.autos.items():
            if auto.policy == "search":
                plain.append(name)
            else:
                made.setdefault((auto.policy, auto.method), []).append(name)
        self._refuse_two_policies(objective)
        autos = objective.autos
        self.owners = [self._owner(make_policy(*key), {n: autos[n] for n in names}) for key, names in made.items()]
        if given is not None and plain:
            self.owners.append(self._owner(given, {n: autos[n] for n in plain}))
        elif given is not None and getattr(given, "tunes_hyperparameters", False):
            self.owners.append(Owner(given, {}))
        elif given is not None:
            self._refuse_needless(objective, given, made)
            self.owners.append(Owner(given, {label: OwnedWeight(label) for label in objective.labels}))
            table = self.owners[-1].weights
            objective = replace_weights(objective, lambda label, weight: multiply(table[label], weight))
        owned = {name: weight for owner in self.owners for name, weight in owner.weights.items() if name in autos}
        self.objective = objective.resolve(owned) if owned else objective
        looking = [type(o.policy).__name__ for o in self.owners if "gradients" in o.policy.needs]
        if len(looking) > 1:
            raise InputError(
                f"{' and '.join(looking)} both make the update from the terms' gradients, and a step has one update. Use one of them."
            )
        self._rows: dict[str, dict[str, float]] = {}
        self._moving = True
        self.metrics: dict[str, float] = {}

    def __bool__(self) -> bool:
        return bool(self.owners)

    @property
    def needs(self) -> frozenset[str]:
        """What the policies together must be told."""
        return frozenset().union(*(owner.policy.needs for owner in self.owners))

    @property
    def upper(self) -> Objective:
        """The validation objective: what a policy says, else the terms that read data and stand at a fixed weight.

        A policy may say the name of a term of the run: that very term then, so that what it has learned is there.
        """
        said = {str(text): text for owner in self.owners if (text := getattr(owner.policy, "upper", None)) is not None}
        if len(said) > 1:
            raise InputError(f"The policies name different validation objectives: {', '.join(said)}. Name one.")
        if said:
            (text,) = said.values()
            from poise.formula import parse

            own = {e.label: e.summand for e in self.objective._entries}
            if isinstance(text, str) and text in own:
                return Objective([replace(own[text], weight=1)])
            return parse(text) if isinstance(text, str) else Objective() + text
        return default_upper(self.objective)

    def bind(self) -> None:
        """Hand every policy its weights and their ranges, before the first step."""
        self._rows = self._find_rows()
        for owner in self.owners:
            bind = getattr(owner.policy, "bind", None)
            if bind is not None:
                bind({name: float(w.current) for name, w in owner.weights.items()}, owner.ranges)

    def set(self, problem: Problem, make: Callable[..., Signals]) -> list[Signals]:
        """Find the weights of this step and put them into the objective.

        Args:
            problem: the step.
            make: makes the signals of one owner from names, rows and weights.
        """
        rows, every = self._find_rows(), []
        for owner in self.owners:
            signals = make(
                tuple(owner.weights), rows, problem, weights={n: w.current for n, w in owner.weights.items()},
                shared=None if owner.balances else "all", on=getattr(owner.policy, "features", None),
            )  # fmt: skip
            every.append(signals)
            for name, weight in owner.policy.weights(signals).items():
                if name not in owner.weights:
                    raise InputError(
                        f"{type(owner.policy).__name__} gave a weight {name!r}; it owns {', '.join(owner.weights) or 'none'}."
                    )
                owner.weights[name].current = checked(name, weight)
            if problem.has_table:
                problem.weigh({n: w.current for n, w in owner.weights.items()}, own=owner.balances)
        problem.reweigh()
        self.metrics = {}
        return every

    def advance(self, every: list[Signals]) -> None:
        """Move the policies' own state, after the update."""
        for owner, signals in zip(self.owners, every, strict=True):
            owner.policy.advance(signals)

    @property
    def current(self) -> dict[str, float]:
        """Every owned weight as it is now; the mean of one that weighs every example."""
        values = {name: w.current for owner in self.owners for name, w in owner.weights.items()}
        return {name: float(w.mean()) if isinstance(w, Tensor) else float(w) for name, w in values.items()}

    def discard(self, every: list[Signals]) -> None:
        """Let the policies put back what they changed for a step that was not taken."""
        for owner, signals in zip(self.owners, every, strict=True):
            getattr(owner.policy, "discard", lambda signals: None)(signals)

    def report(self) -> dict[str, float]:
        """Return the curves of the policies: every weight, and what a policy has to say."""
        found = {f"policy/weight/{name}": weight for name, weight in self.current.items()}
        for owner in self.owners:
            said = getattr(owner.policy, "report", None)
            if said is not None:
                found.update({f"policy/{name}": float(value) for name, value in said().items()})
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        owners = [
            {"policy": o.policy.state_dict(), "weights": {n: w.current for n, w in o.weights.items()}}
            for o in self.owners
        ]
        return {"owners": owners, "metrics": self.metrics}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take it back."""
        self.metrics = dict(saved["metrics"])
        for owner, state in zip(self.owners, saved["owners"], strict=True):
            owner.policy.load_state_dict(state["policy"])
            for name, value in state["weights"].items():
                owner.weights[name].current = value

    def _find_rows(self) -> dict[str, dict[str, float]]:
        if self._moving:
            weights = {e.label: e.weight for e in self.objective._entries}
            # A weight within a reward multiplies no term: policies that know what to do with one find it themselves.
            before = {leaf.name for w in weights.values() for leaf in leaves_of(w) if isinstance(leaf, OwnedWeight)}
            within = {
                n
                for o in self.owners
                for n in o.weights
                if n not in before and getattr(o.policy, "within_rewards", False)
            }
            names = [n for o in self.owners for n in o.weights if n not in within]
            self._rows = rows_of(weights, names, self.objective.clock) | {name: {} for name in within}
            # Only a factor that is a schedule or a multiplier has to be looked at again.
            self._moving = any(
                leaf.moves and not isinstance(leaf, OwnedWeight)
                for weight in weights.values()
                for leaf in leaves_of(weight)
            )
        return self._rows

    @staticmethod
    def _owner(policy: Policy, autos: Mapping[str, Auto]) -> Owner:
        start = getattr(policy, "start", None)
        weights = {
            n: OwnedWeight(n, (a.low * a.high) ** 0.5 if start is None else float(start)) for n, a in autos.items()
        }
        return Owner(policy, weights, {n: (a.low, a.high) for n, a in autos.items()})

    @staticmethod
    def _refuse_two_policies(objective: Objective) -> None:
        for name, found in objective.auto_leaves.items():
            ways = dict.fromkeys((a.policy, a.method) for a in found)
            if len(ways) > 1:
                said = " and ".join(f"{policy}{f' ({method})' if method else ''}" for policy, method in ways)
                raise InputError(f"Two policies for one weight: {name!r} is to be found by {said}. Use one of them.")

    @staticmethod
    def _refuse_needless(
        objective: Objective, policy: Policy, made: Mapping[tuple[str, str | None], list[str]]
    ) -> None:
        if made:
            others = ", ".join(name for names in made.values() for name in names)
            raise InputError(
                f"Two policies for one weight: {type(policy).__name__} would weigh every term, and {others} name a policy of their own. "
                "Leave one of them out."
            )
        if not getattr(policy, "balances", False):
            raise InputError(
                f"{type(policy).__name__} sets the weights that are 'auto', and the formula has none that is free: write auto before a "
                f"term, as in 'cross_entropy + auto*l2'. The formula is {objective}."
            )


def default_upper(objective: Objective) -> Objective:
    """Return what a validation set is judged by where nobody says: the terms on data that no policy weighs."""
    kept = [
        e.summand
        for e in objective._entries
        if not any(isinstance(leaf, OwnedWeight | HyperparameterWeight) for leaf in leaves_of(e.weight))
        and not e.auxiliary
        and set(e.term.reads) - {"parameters", "model"}
    ]
    if not kept:
        raise InputError(
            "The validation objective is not clear: no term on data stands at a fixed weight. Say it, as in "
            "OnlineBilevel(upper='cross_entropy') or method=\"neumann(upper='cross_entropy')\"."
        )
    return Objective(kept)


def checked(name: str, weight: float | Tensor) -> float | Tensor:
    """Refuse a weight that is not finite.

    Raises:
        InputError: it names the weight.
    """
    if isinstance(weight, Tensor):
        if weight.ndim == 0:
            weight = float(weight)
        elif not bool(torch.isfinite(weight).all()):
            raise InputError(f"The policy gave a weight {name!r} that is not finite.")
        else:
            return weight.detach()
    if not abs(weight) < float("inf"):
        raise InputError(f"The policy gave the weight {name!r} the value {weight}.")
    return float(weight)
