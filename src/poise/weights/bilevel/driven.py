"""Bilevel methods that move the model themselves, as policies of a run: MAID, HOAG, BO-REP and the penalty method.

    formula = "squared_error + auto(policy='bilevel', method='maid')*l2(biases=True)"
    fit(nn.Linear(6, 1), formula, train, valid, batch_size=len(train), steps=50)

One step of the run is one outer step of the method. It solves, or moves, the lower level on the training objective, judges by the
validation objective, moves the logarithms of the weights, and leaves the model where the lower level stands: the run's own solver finds
no gradient then. MAID and HOAG need the whole of the training data in every step, since their accuracies are those of one fixed
lower problem; BO-REP and the penalty method take the step's batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from poise.coefficient import leaves_of
from poise.errors import IncompatibleError, InputError
from poise.weights.bilevel.levels import Levels, Tensors
from poise.weights.owned import OwnedWeight

if TYPE_CHECKING:
    from poise.problem import Problem, Signals

WHOLE = ("maid", "hoag")
"""Methods that need the whole of the training data in every step."""
METHODS = (*WHOLE, "bo_rep", "penalty")


class DrivenBilevel(nn.Module):
    """A bilevel method as a policy.

    Args:
        method: "maid", "hoag", "bo_rep" or "penalty".
        upper: the validation objective, as a formula; None for the formula's terms on data at fixed weights.
        valid_batch: validation rows of one step; None for all, which "maid" and "hoag" need.
        options: of the method: see `MAID`, `HOAG`, `BOREP` and `PenaltyBilevel`. `strong_convexity` of MAID is by default the sum of the
            weights in front of `l2(biases=True)`, which bounds the curvature from below where the model is linear and its loss
            convex. `inner_lr` of the others is by default the run's learning rate, and their `lr` 0.1 in the logarithm of a weight.

    Raises:
        IncompatibleError: several micro-batches or processes; a step of "maid" or "hoag" that is not the whole of the data.
        InputError: an option that the method does not take, or what the method itself refuses: no strong convexity, negative curvature, a
            weight that nothing depends on.

    >>> DrivenBilevel("penalty", inner_steps=5).method
    'penalty'
    """

    needs: ClassVar[frozenset[str]] = frozenset({"validation"})
    balances: ClassVar[bool] = False

    def __init__(
        self, method: str = "maid", *, upper: str | None = None, valid_batch: int | None = None, **options: Any
    ) -> None:
        super().__init__()
        if method not in METHODS:
            raise InputError(f"bilevel: method is one of {', '.join(METHODS)}, and it is {method!r}.")
        self.method, self.upper, self.valid_batch, self.options = method, upper, valid_batch, options
        self.names: tuple[str, ...] = ()
        self._start: dict[str, float] = {}
        self._ranges: dict[str, tuple[float, float]] = {}
        self._made: Any = None
        self._saved: dict[str, Any] | None = None
        self._held: tuple[Problem, Problem] | None = None
        self._level = math.nan
        self._said: dict[str, float] = {}

    def bind(self, starts: Mapping[str, float], ranges: Mapping[str, tuple[float, float]]) -> None:
        """Take the weights' first values and their ranges."""
        self.names, self._start, self._ranges = tuple(starts), dict(starts), dict(ranges)

    # ---- a step ------------------------------------------------------------------------------------------------------

    def weights(self, signals: Signals) -> Mapping[str, float | Tensor]:
        """Make an outer step, put the model where the lower level stands, and return the weights."""
        problem, validation = signals.problem, signals.validation
        assert validation is not None
        self._refuse_parts(problem)
        if self.method in WHOLE:
            self._hold(problem, validation)
        if self._made is None:
            self._make(problem, validation, signals.lr)
        before = self._theta.clone()
        report = self._made.step() if self.method in WHOLE else self._made.step(problem, validation)
        self._put(problem)
        problem.settle()
        weights = dict(zip(self.names, self._theta.exp().tolist(), strict=True))
        self._say(report, problem, before)
        return weights

    def advance(self, signals: Signals) -> None:
        """Nothing moves after the step."""

    def report(self) -> Mapping[str, float]:
        """What the method saw last: the validation objective, the hypergradient's norm and, where it knows it, the bound of its error."""
        return self._said

    @property
    def _theta(self) -> Tensor:
        theta: Tensor = self._made.theta[0]
        return theta

    def _say(self, report: Any, problem: Problem, before: Tensor) -> None:
        value = getattr(report, "value", None)
        size = getattr(report, "norm", None)
        self._said = {
            "validation_objective": float(report.upper if value is None else value),
            "training_objective": float(problem.step.value),
            "hypergradient_norm": float(report.gradient_norm if size is None else size),
        }
        for name in ("omega", "residual", "gap", "eps", "alpha"):
            found = getattr(report, name, None)
            if found is not None:
                self._said["hypergradient_error" if name == "omega" else name] = float(found)

    # ---- the two levels ----------------------------------------------------------------------------------------------

    def _make(self, problem: Problem, validation: Problem, lr: float) -> None:
        names = [n for n in problem.parameters if not n.startswith("objective.")]
        owned = {
            leaf.name: leaf
            for entry in problem.objective._entries
            for leaf in leaves_of(entry.weight)
            if isinstance(leaf, OwnedWeight) and leaf.name in self.names
        }

        def at(problem: Problem, x: Tensors, theta: Tensors) -> Tensor:
            kept = {name: weight.current for name, weight in owned.items()}
            for name, value in zip(self.names, theta[0].exp(), strict=True):
                owned[name].current = value
            try:
                return problem._evaluate(dict(zip(names, x, strict=True)), None)
            finally:
                for name, weight in owned.items():
                    weight.current = kept[name]

        levels = Levels(
            lambda x, theta, batch: at(self._whole(0) if batch is None else batch, x, theta),
            lambda x, theta, batch: at(self._whole(1) if batch is None else batch, x, theta),
            self.names,
        )
        x = tuple(problem.parameters[n].detach().clone() for n in names)
        theta = (torch.tensor([self._start[n] for n in self.names], dtype=torch.float64).log(),)
        self._made = self._maker(problem, lr)(levels=levels, theta=theta, x=x)
        self._places = names
        if self._saved is not None:
            self._made.load_state_dict(self._saved)
            self._saved = None

    def _maker(self, problem: Problem, lr: float) -> Callable[..., Any]:
        options = dict(self.options)
        low = min((math.log(self._ranges[n][0]) for n in self.names if n in self._ranges), default=-12.0)
        high = max((math.log(self._ranges[n][1]) for n in self.names if n in self._ranges), default=12.0)
        if self.method == "maid":
            from poise.weights.bilevel.maid import MAID as maker

            options.setdefault("bounds", (low, high))
            if options.get("strong_convexity") is None:
                options["strong_convexity"] = self._strong_convexity(problem)
            if options["strong_convexity"] is None:
                raise InputError(
                    "maid needs a lower bound of the curvature of the training objective, since its certificates stand on it, and no term "
                    "gives one. Add auto*l2(biases=True), whose weight is the bound where the model is linear and its loss convex, or say "
                    'it: method="maid(strong_convexity=0.1)".'
                )
        elif self.method == "hoag":
            from poise.weights.bilevel.hoag import HOAG as maker  # type: ignore[assignment]

            options.setdefault("bounds", (low, high))
        else:
            from poise.operators import Box

            options.setdefault("lr", 0.1)
            options.setdefault("inner_lr", lr)
            options.setdefault("upper_set", Box(low, high))
            if self.method == "bo_rep":
                from poise.weights.bilevel.bo_rep import BOREP as maker  # type: ignore[assignment]
            else:
                from poise.weights.bilevel.penalty import PenaltyBilevel as maker  # type: ignore[assignment]

        def make(**given: Any) -> Any:
            try:
                return maker(**given, **options)
            except TypeError as error:
                raise InputError(f"{self.method}: {error}.") from None

        return make

    def _strong_convexity(self, problem: Problem) -> Callable[[Tensors], Tensor] | None:
        """Return the sum of the weights in front of squared norms of all parameters, as a function of theta; None where there is none."""
        fixed, places = 0.0, []
        for entry in problem.objective._entries:
            share = getattr(entry.term, "strong_convexity", 0.0)
            if not share:
                continue
            if isinstance(entry.weight, int | float):
                fixed += share * entry.weight
            elif isinstance(entry.weight, OwnedWeight) and entry.weight.name in self.names:
                places.append((self.names.index(entry.weight.name), share))
        if not places and not fixed:
            return None
        return lambda theta: sum((share * theta[0][i].exp() for i, share in places), theta[0].new_tensor(fixed))

    def _put(self, problem: Problem) -> None:
        """Leave the model where the lower level stands, and say what its terms are worth there."""
        with torch.no_grad():
            for name, value in zip(self._places, self._made.x, strict=True):
                problem.parameters[name].copy_(value)
        problem.reports()

    # ---- the whole of the data ---------------------------------------------------------------------------------------

    def _whole(self, level: int) -> Problem:
        assert self._held is not None
        return self._held[level]

    def _hold(self, problem: Problem, validation: Problem) -> None:
        """Keep the step's data as the one lower problem, and see that every step has the same."""
        data = problem.batches[0]
        if any("index" in stream for stream in data.values()):
            # The order of rows changes sums in their last digits, and a run that resumes is to give the same numbers.
            ordered = {
                name: {
                    k: v[stream["index"].argsort()] if isinstance(v, Tensor) and v.ndim else v
                    for k, v in stream.items()
                }
                for name, stream in data.items()
            }
            problem.batches = [ordered]
        level = float(problem.fresh().value())
        if self._held is not None and not math.isclose(level, self._at(self._held[0]), rel_tol=1e-4, abs_tol=1e-6):
            raise IncompatibleError(
                f"{self.method} needs deterministic lower evaluations, and a step of this run has other data than the step before: give "
                "batch_size= the number of training examples, and no augmentation."
            )
        if self._held is None:
            self._held = problem.fresh(), validation

    def _at(self, held: Problem) -> float:
        return float(held.value())

    def _refuse_parts(self, problem: Problem) -> None:
        from poise import processes

        if len(problem.batches) > 1 or processes.size() > 1:
            raise IncompatibleError(f"{self.method} needs one micro-batch and one process: use accumulate=1.")

    # ---- state -------------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """The method's own state."""
        return {"made": self._saved if self._made is None else self._made.state_dict(), "said": self._said}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take it back; the method itself is made at the first step."""
        self._said = dict(state["said"])
        if self._made is None:
            self._saved = state["made"]
        elif state["made"] is not None:
            self._made.load_state_dict(state["made"])


def maid(**options: Any) -> DrivenBilevel:
    """Solve the training objective just accurately enough for sure steps of the weights: strongly convex problems, full batch."""
    return DrivenBilevel("maid", **options)


def hoag(**options: Any) -> DrivenBilevel:
    """Solve the training objective to accuracies from a schedule, and step by an approximate gradient: smooth problems, full batch."""
    return DrivenBilevel("hoag", **options)


def bo_rep(**options: Any) -> DrivenBilevel:
    """Move weights by steps of fixed length, the model frozen between refreshes: for recurrent networks, whose gradients explode."""
    return DrivenBilevel("bo_rep", **options)


def penalty(**options: Any) -> DrivenBilevel:
    """Descend on both levels as one weighted sum, with first derivatives alone: large models, constraints, several minima."""
    return DrivenBilevel("penalty", **options)
