"""The algebra: terms, their weighted sum, and how that sum becomes one number.

A `Term` reads named quantities and returns unreduced values. An `Objective` is a weighted sum of terms; it alone
reduces, as `sum(values * count) / sum(count)`, so that micro-batches, uneven tokens, padding and processes give the
number that one big batch would give:

    objective = CrossEntropy() + 3 * EarlyLearning()
    loss = objective(logits=logits, target=target, index=index)          # a 0-dim tensor for any loop
    report = objective.evaluate(logits=logits, target=target, index=index)
    report.terms["early_learning"].value

`forward` is pure. What has a memory moves in `advance`, once per optimiser step; `objective.follow(optimizer)` sees to
that in a loop of your own, and `poise.fit` does it by itself.
"""

from __future__ import annotations

import copy
import inspect
import math
import numbers
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from poise import processes
from poise.coefficient import Clock, Coefficient, Number, leaves_of, multiply, text, value_of
from poise.errors import InputError, QuantityError, StateError, nearest
from poise.quantities import CATALOGUE, CLOCK, Quantities, Streams, check, derive, describe, random_numbers

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(@[A-Za-z_][A-Za-z0-9_]*)?(#[0-9]+)?\Z")


@dataclass(slots=True)
class Value:
    """What a term returns when it has more to say than its values.

    Args:
        values: float `[batch]`, `[batch, time]`, or 0-dim for a penalty.
        surrogate: same shape; the gradient comes from it and the value from `values`.
        extras: by-products by name; another term reads `<label>.<name>`. Detached unless listed in `differentiable_extras`.
        active: False where the term could not act on this batch; it is then reported as inactive and charges nothing.
    """

    values: Tensor
    surrogate: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)
    active: bool = True


@dataclass(frozen=True)
class DataInfo:
    """What a term may know about a stream before the first step.

    Args:
        examples: rows of the data set; positions in `index` lie in `[0, examples)`.
        classes: classes of the target, or None.
        device: where memories live.
    """

    examples: int
    classes: int | None = None
    device: torch.device | None = None


@dataclass(frozen=True)
class _Parameter:
    """A parameter of `forward`, `count` or `advance`, and whether it may be absent."""

    name: str
    optional: bool


_SIGNATURES: dict[Any, tuple[_Parameter, ...]] = {}


def _parameters_of(function: Callable[..., Any]) -> tuple[_Parameter, ...]:
    plain = getattr(function, "__func__", function)
    if plain not in _SIGNATURES:
        found = list(inspect.signature(plain).parameters.values())[1:]
        for p in found:
            if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY):
                raise InputError(
                    f"{plain.__qualname__}: every parameter names one quantity that the term reads, so {p} cannot be read. "
                    "Name each quantity."
                )
        _SIGNATURES[plain] = tuple(_Parameter(p.name, p.default is not p.empty) for p in found)
    return _SIGNATURES[plain]


_DEFINED: dict[str, type[Term]] = {}
"""Terms that users define with a `formula` name; `poise.terms` lists the built-in ones."""


class Term(nn.Module):
    """One thing that an objective charges for.

    Write `forward`: its parameter names are the quantities that it reads (a default makes one optional), and it returns
    values of shape `[batch]`, `[batch, time]` (then `count` is needed) or 0-dim, or a `Value`. It never sees weights, loop or optimiser.

        class Confidence(Term):
            '''Charge the largest logit.'''

            formula = "confidence"

            def forward(self, logits):
                return logits.amax(-1)

    Class attributes:
        formula: the name in formulas; the class name in snake case where nothing is said. Saying it makes the name known to `poise.parse`.
        equation, source: one line each for `poise explain`.
        expects: forms of the quantities where they differ from the catalogue, such as `{"target": "int64 [batch]"}`.
        capabilities: what solvers and policies may count on: "per_example", "potential" (its gradient is the gradient of
            its value), "deterministic", "scale_free".
        couples: quantities that examples of a batch share; the term then does not decompose over examples.
        stochastic: draws random numbers in `forward` (or calls the model); it is then run under derived ones.
        bounded_below: False where the value may fall without end or a negative weight makes sense.
    """

    formula: ClassVar[str] = ""
    equation: ClassVar[str] = ""
    source: ClassVar[str] = ""
    expects: ClassVar[Mapping[str, str]] = {}
    capabilities: ClassVar[frozenset[str]] = frozenset({"per_example", "potential", "deterministic"})
    couples: ClassVar[tuple[str, ...]] = ()
    differentiable_extras: ClassVar[tuple[str, ...]] = ()
    stochastic: ClassVar[bool] = False
    bounded_below: ClassVar[bool] = True
    __array_ufunc__ = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "formula" not in cls.__dict__:
            cls.formula = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()
        elif not cls.__module__.startswith("poise."):
            _DEFINED[cls.formula] = cls

    # What a term may define beside `forward`. They are absent here so that their signatures are the term's own.
    count: Callable[..., Tensor] | None = None
    advance: Callable[..., None] | None = None

    def bind(self, info: DataInfo) -> None:
        """Size memories before the first step. A term without memories has nothing to do."""

    def player(self, parameter: str) -> str:
        """Return "min" or "max": whether a parameter of the term's own descends on the objective or ascends."""
        return "min"

    def readings(self) -> tuple[str, ...]:
        """Return the quantities that this configuration does not read although `forward` names them (none by default)."""
        return ()

    def requirements(self) -> tuple[str, ...]:
        """Return the quantities that this configuration needs although `forward` gives them a default (none by default)."""
        return ()

    def composes(self) -> Mapping[str, Objective]:
        """Return the quantities that an objective of the term's own makes, by the parameter that receives them (none by default).

        `forward` gets the weighted sum of that objective's unreduced values, detached: the reward of `grpo(reward=a + 0.1*b)`.
        The attribute that holds the objective has the parameter's name.
        """
        return {}

    @property
    def reads(self) -> tuple[str, ...]:
        """The quantities that this term needs."""
        skipped, needed, made = self.readings(), self.requirements(), self.composes()
        own = [
            p.name
            for p in _parameters_of(self.forward)
            if (not p.optional or p.name in needed) and p.name not in {*skipped, *made}
        ]
        return tuple(dict.fromkeys([*own, *(q for objective in made.values() for q in objective.reads)]))

    def on(self, stream: str | None = None, **renames: str) -> Objective:
        """Bind the term to a stream, or rename what it reads: `term.on("anchor", logits="student_logits")`."""
        return Objective([Summand(self)]).on(stream, **renames)

    def named(self, name: str) -> Objective:
        """Give the term another name in reports and in saved state."""
        return Objective([Summand(self)]).named(name)

    def __add__(self, other: Any) -> Objective:
        return Objective([Summand(self)]).__add__(other)

    def __radd__(self, other: Any) -> Objective:
        return Objective([Summand(self)]).__radd__(other)

    def __sub__(self, other: Any) -> Objective:
        return Objective([Summand(self)]).__sub__(other)

    def __mul__(self, weight: Any) -> Objective:
        return Objective([Summand(self)]).__mul__(weight)

    __rmul__ = __mul__

    def __neg__(self) -> Objective:
        return Objective([Summand(self)]) * -1

    def __str__(self) -> str:
        from poise.formula import term_text

        return term_text(self)


@dataclass(frozen=True, eq=False)
class Summand:
    """A weighted term of an objective, and where it reads."""

    term: Term
    weight: Number | Coefficient = 1
    stream: str | None = None
    renames: tuple[tuple[str, str], ...] = ()
    name: str | None = None
    auxiliary: bool = False

    @property
    def own_label(self) -> str:
        return self.name or self.term.formula + (f"@{self.stream}" if self.stream else "")

    @property
    def place(self) -> tuple[Any, ...]:
        return (id(self.term), self.stream, self.renames, self.name, self.auxiliary)


@dataclass(frozen=True)
class TermReport:
    """What one term was worth in one evaluation.

    Attributes:
        value: the reduced value, 0-dim and detached.
        weight: its weight then.
        active: False where it did not act.
        values: the unreduced values, detached, or None where it did not act.
    """

    value: Tensor
    weight: float | Tensor
    active: bool
    values: Tensor | None


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of an objective: the total, which carries the gradient, and every term by its label."""

    total: Tensor
    terms: dict[str, TermReport]


@dataclass(slots=True)
class _Part:
    """One term's contribution to one micro-batch."""

    reduced: Tensor
    weight: float | Tensor
    values: Tensor | None
    active: bool


class _Reading(NamedTuple):
    """A quantity that a summand reads: for which parameter, and whether the clock or another term may have to give it."""

    parameter: str
    name: str
    optional: bool
    inside: bool


class _Entry:
    """A summand with everything that can be known before the first batch, so that a step does little."""

    def __init__(self, label: str, summand: Summand) -> None:
        term = summand.term
        renames = dict(summand.renames)
        skipped = term.readings()
        self.label, self.summand, self.term = label, summand, term
        self.stream, self.weight, self.auxiliary = summand.stream, summand.weight, summand.auxiliary
        self.forward_reads = self._plan(term.forward, renames, skipped)
        self.count_reads = self._plan(term.count, renames, skipped) if term.count is not None else None
        # Padding rows are left out before `advance`, so it has no use for `sample_weight`, which only some processes may have.
        skipped = (*skipped, "sample_weight")
        self.advance_reads = self._plan(term.advance, renames, skipped) if term.advance is not None else ()
        self.composes = term.composes()
        self.stochastic = term.stochastic or any(r.parameter == "model" for r in self.forward_reads)
        self.expects = {
            p.name: term.expects.get(p.name, CATALOGUE.get(p.name, ("", ""))[0]) for p in _parameters_of(term.forward)
        }
        self.checked: set[Any] = set()
        self.forms: list[Any] = []  # of the last evaluation, most often those of the next
        # Only a term that reads what another publishes can close a circle.
        self.crosses = any("." in r.name for r in self.forward_reads)
        # Most terms: a number for a weight, and every example counts once.
        self.plain = isinstance(summand.weight, Number) and not summand.auxiliary and self.count_reads is None

    @property
    def outside(self) -> Iterator[tuple[str, bool]]:
        """Every quantity that the term reads from its stream, and whether it may be absent."""
        for reading in (*self.forward_reads, *(self.count_reads or ()), *self.advance_reads):
            if reading.parameter not in self.composes:
                yield reading.name, reading.optional
        for objective in self.composes.values():
            for entry in objective._entries:
                yield from entry.outside

    def _plan(
        self, function: Callable[..., Any], renames: dict[str, str], skipped: tuple[str, ...]
    ) -> tuple[_Reading, ...]:
        found = _parameters_of(function)
        if function == self.term.forward:
            known = {p.name for p in found}
            for name in renames:
                if name not in known:
                    raise InputError(
                        f"{self.label}.on({name}=...): the term does not read {name!r}; it reads {', '.join(sorted(known))}."
                        + nearest(name, known)
                    )
        needed = self.term.requirements()
        return tuple(
            _Reading(p.name, name, p.optional and p.name not in needed, "." in name or name in CLOCK)
            for p, name in ((p, renames.get(p.name, p.name)) for p in found)
            if p.name not in skipped
        )


def _do_nothing() -> None:
    """Nobody is followed yet."""


@dataclass(slots=True)
class _Live:
    """What changes at every step, outside `nn.Module`, whose assignments are slow.

    Only the clock is saved and copied; the rest belongs to the running step and to the optimiser that is followed.
    """

    clock: Clock = field(default_factory=Clock)
    pending: dict[Any, dict[str, Any]] = field(default_factory=dict)
    followed: bool = False
    steps_seen: int = 0
    unfollow: Callable[[], None] = _do_nothing


class Objective(nn.Module):
    """A weighted sum of terms.

    Build it from terms with `+` and `*`, or from text with `poise.parse`. Terms are shared, not copied, between the
    objectives that are built from them; a weight that is the number 0 removes its term.

    Args:
        summands: the weighted terms, in the order of the formula.
        parts: pieces of the model that the objective is to be minimised with, as text ("compand(learn=True)"); `poise.fit`
            puts them into the model before the first step.

    >>> from poise.terms import CrossEntropy, L2
    >>> str(CrossEntropy() + 0.01 * L2())
    'cross_entropy + 0.01*l2'
    """

    __array_ufunc__ = None

    def __init__(self, summands: Iterable[Summand] = (), parts: Iterable[str] = ()) -> None:
        super().__init__()
        self.parts = tuple(dict.fromkeys(parts))
        merged: dict[tuple[Any, ...], Summand] = {}
        for summand in summands:
            before = merged.get(summand.place)
            if before is None:
                merged[summand.place] = summand
            elif not summand.auxiliary:
                merged[summand.place] = replace(before, weight=before.weight + summand.weight)
        self.summands = tuple(s for s in merged.values() if not (isinstance(s.weight, Number) and s.weight == 0))
        self._entries = tuple(_Entry(label, s) for label, s in zip(self._label(), self.summands, strict=True))
        self.terms = nn.ModuleDict({entry.label: entry.term for entry in self._entries})
        self.coefficients = nn.ModuleDict()
        for entry in self._entries:
            for leaf in leaves_of(entry.weight):
                module = getattr(leaf, "module", None)
                if module is not None and all(module is not m for m in self.coefficients.values()):
                    self.coefficients[entry.label] = module
        self._live = _Live()
        self._plans: dict[str | None, frozenset[str]] = {}
        self.seed = 0
        self._stateful = any(
            e.advance_reads
            or e.stochastic
            or any(leaf.moves for leaf in leaves_of(e.weight))
            or any(objective.stateful for objective in e.composes.values())
            for e in self._entries
        )
        self._plain = all(e.plain for e in self._entries)
        self._recorded = tuple(e for e in self._entries if e.advance_reads)
        self._duals = tuple(
            e for e in self._entries if any(getattr(x, "module", None) is not None for x in leaves_of(e.weight))
        )

    def _label(self) -> list[str]:
        """Name every summand: its own name, numbered where several share one."""
        own = [s.own_label for s in self.summands]
        for name in own:
            if not _NAME.match(name):
                raise InputError(f"{name!r} cannot name a term: use letters, digits and underscores.")
        seen: dict[str, int] = {}
        labels = []
        for name in own:
            seen[name] = seen.get(name, 0) + 1
            labels.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
        return labels

    @property
    def clock(self) -> Clock:
        """Where the run stands."""
        return self._live.clock

    @clock.setter
    def clock(self, clock: Clock) -> None:
        self._live.clock = clock

    # ---- what it is -------------------------------------------------------------------------------------------------

    @property
    def labels(self) -> tuple[str, ...]:
        """The terms' names in reports, in the order of the formula."""
        return tuple(e.label for e in self._entries)

    @property
    def reads(self) -> tuple[str, ...]:
        """The quantities that the objective needs, without the clock and without what its own terms publish."""
        return tuple(
            sorted({q for e in self._entries for q, optional in e.outside if not optional and self._is_outside(q)})
        )

    def plan(self, stream: str | None = None) -> frozenset[str]:
        """Return the quantities that terms on `stream` read or may read: what a readout is told to prepare."""
        if stream in self._plans:
            return self._plans[stream]
        reads: set[str] = set()
        for e in self._entries:
            if e.stream == stream:
                reads.update(q for q, _ in e.outside if self._is_outside(q))
        self._plans[stream] = frozenset(reads)
        return self._plans[stream]

    def _is_outside(self, quantity: str) -> bool:
        return quantity not in CLOCK and quantity.rpartition(".")[0] not in self.terms

    @property
    def streams(self) -> tuple[str | None, ...]:
        """The streams that terms are bound to; None for terms that read the main one."""
        return tuple(dict.fromkeys(e.stream for e in self._entries))

    @property
    def stateful(self) -> bool:
        """Whether anything moves with the optimiser's steps: a memory, a schedule, a multiplier, random numbers."""
        return self._stateful

    @property
    def autos(self) -> dict[str, Any]:
        """The weights that are still `auto`, by name; an unnamed one is called after its term."""
        from poise.weights.auto import Auto

        own = {
            leaf.name or e.label: leaf for e in self._entries for leaf in leaves_of(e.weight) if isinstance(leaf, Auto)
        }
        for e in self._entries:
            for objective in e.composes.values():
                own.update(objective.autos)
        return own

    @property
    def auto_leaves(self) -> dict[str, list[Any]]:
        """Every mention of an `auto` weight by its name; two mentions of one name are one weight."""
        from poise.weights.auto import Auto

        found: dict[str, list[Any]] = {}
        for e in self._entries:
            for leaf in leaves_of(e.weight):
                if isinstance(leaf, Auto):
                    found.setdefault(leaf.name or e.label, []).append(leaf)
            for objective in e.composes.values():
                for name, leaves in objective.auto_leaves.items():
                    found.setdefault(name, []).extend(leaves)
        return found

    @property
    def searched(self) -> dict[str, Any]:
        """The weights that are to be searched over runs; the other `auto` weights are moved within one."""
        return {name: auto for name, auto in self.autos.items() if auto.policy == "search"}

    def resolve(self, weights: Mapping[str, Number | Coefficient]) -> Objective:
        """Return the objective with `auto` weights replaced by name.

        Raises:
            InputError: a name that no `auto` weight has.
        """
        from poise.weights.auto import Auto

        autos = self.autos
        for name in weights:
            if name not in autos:
                raise InputError(
                    f"No weight is called {name!r}; these are 'auto': {', '.join(autos) or 'none'}."
                    + nearest(name, autos)
                )
        result = []
        for e in self._entries:
            table: dict[Coefficient, Number | Coefficient] = {
                leaf: weights[leaf.name or e.label]
                for leaf in leaves_of(e.weight)
                if isinstance(leaf, Auto) and (leaf.name or e.label) in weights
            }
            weight = e.weight.replace(table) if isinstance(e.weight, Coefficient) else e.weight
            result.append(replace(e.summand, weight=weight, term=_resolved(e.term, weights)))
        return self._like(result)

    def without(self, label: str) -> Objective:
        """Return the objective without one term, the other weights as they are.

        Raises:
            InputError: no term has that label.
        """
        if label not in self.labels:
            raise InputError(
                f"The objective has no term {label!r}; it has {', '.join(self.labels)}." + nearest(label, self.labels)
            )
        return self._like([e.summand for e in self._entries if e.label != label])

    def equals(self, other: Objective) -> bool:
        """Whether both have the same terms, arguments, weights and bindings, in the same order; state does not matter."""
        return str(self) == str(other) and [type(s.term) for s in self.summands] == [
            type(s.term) for s in other.summands
        ]

    def _like(self, summands: Iterable[Summand]) -> Objective:
        result = Objective(summands, self.parts)
        result.clock, result.seed = self.clock, self.seed
        return result

    def check_weights(self) -> None:
        """Raise where a negative number stands before a term that it would let fall without end.

        Raises:
            InputError: for instance `cross_entropy - 0.1*l2`, which pays for large parameters.
        """
        for e in self._entries:
            if isinstance(e.weight, Number) and e.weight < 0 and e.term.bounded_below and not e.auxiliary:
                raise InputError(
                    f"The weight of {e.label!r} is {text(e.weight)}: a negative weight rewards what the term charges for, so the "
                    "objective has no minimum. Use a positive weight."
                )

    # ---- algebra ----------------------------------------------------------------------------------------------------

    def __add__(self, other: Any) -> Objective:
        if isinstance(other, Number) and other == 0:
            return self
        if isinstance(other, Term):
            other = Objective([Summand(other)])
        if not isinstance(other, Objective):
            return NotImplemented
        result = Objective([*self.summands, *other.summands], [*self.parts, *other.parts])
        result.clock, result.seed = self.clock, self.seed
        return result

    def __radd__(self, other: Any) -> Objective:
        if isinstance(other, Number) and other == 0:
            return self
        return Objective([Summand(other)]) + self if isinstance(other, Term) else NotImplemented

    def __sub__(self, other: Any) -> Objective:
        return self.__add__((-1) * other)

    def __mul__(self, weight: Any) -> Objective:
        if isinstance(weight, Tensor):
            weight = TensorWeight(weight)
        elif isinstance(weight, bool):
            weight = int(weight)
        elif not isinstance(weight, Number) and isinstance(weight, numbers.Real):
            weight = float(weight)  # a NumPy scalar
        if not isinstance(weight, Number | Coefficient):
            return NotImplemented
        if isinstance(weight, Number) and not math.isfinite(weight):
            raise InputError(f"A weight must be a finite number, and this one is {weight}.")
        return self._like(s if s.auxiliary else replace(s, weight=multiply(weight, s.weight)) for s in self.summands)

    __rmul__ = __mul__

    def __neg__(self) -> Objective:
        return self * -1

    def on(self, stream: str | None = None, **renames: str) -> Objective:
        """Bind every term to a stream, or rename what the terms read."""
        if stream is not None and not _NAME.match(stream):
            raise InputError(f"{stream!r} cannot name a stream: use letters, digits and underscores.")
        return self._like(
            replace(s, stream=stream or s.stream, renames=tuple(sorted({**dict(s.renames), **renames}.items())))
            for s in self.summands
        )

    def named(self, name: str) -> Objective:
        """Give the one term of this objective another name in reports and in saved state."""
        if len(self.summands) != 1:
            raise InputError(f".named({name!r}) names one term, and this objective has {len(self.summands)}: {self}.")
        if not name or "." in name or hasattr(nn.ModuleDict, name):
            raise InputError(f".named({name!r}): a name is a word without dots that PyTorch does not use itself.")
        return self._like([replace(self.summands[0], name=name)])

    def __str__(self) -> str:
        from poise.formula import objective_text

        return objective_text(self)

    def __repr__(self) -> str:
        return f"Objective({str(self)!r})"

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def forward(self, quantities: Mapping[str, Any] | None = None, /, **eager: Any) -> Tensor:
        """Return the weighted sum, reduced: a 0-dim tensor.

        Args:
            quantities: values by name (a dict or `Quantities`), or `Streams` of them; or give them as keywords.

        Raises:
            QuantityError: a term reads what is missing or ill-shaped.
            StateError: a stateful objective is stepped repeatedly and nobody advances it.
        """
        state = _State(self, _sources(quantities, eager))
        parts: Mapping[str, _Part] = {}
        total = self._mean(state) if self._plain else None
        if total is None:
            parts = self._parts(state)
            total = self._total(parts)
        if self._stateful and self.training and torch.is_grad_enabled():
            self._await_advance(state, parts, total)
        return total

    def evaluate(self, quantities: Mapping[str, Any] | None = None, /, **eager: Any) -> Evaluation:
        """Return the total together with every term's value, weight and activity; records nothing."""
        parts = self._evaluate(_sources(quantities, eager))
        return Evaluation(
            self._total(parts),
            {
                label: TermReport(
                    p.reduced.detach(), _detached(p.weight), p.active, None if p.values is None else p.values.detach()
                )
                for label, p in parts.items()
            },
        )

    def _mean(self, state: _State) -> Tensor | None:
        """Return the total where every term is plain and every example counts once, else None.

        The mean of the weighted sum is the weighted sum of the means, in one reduction instead of one for each term.
        """
        summed: Tensor | None = None
        for entry in self._entries:
            source = state.sources.get(entry.stream)
            if source is None or "sample_weight" in source:
                return None
            value = state.value(entry)
            values = value.values
            if values.ndim != 1 or value.surrogate is not None or not value.active:
                return None
            if summed is None:
                summed = values if entry.weight == 1 else entry.weight * values
            elif values.shape == summed.shape and values.device == summed.device:
                summed = torch.add(summed, values, alpha=entry.weight)  # type: ignore[arg-type]
            else:
                return None
        return None if summed is None else summed.mean()

    def _total(self, parts: Mapping[str, _Part]) -> Tensor:
        total: Tensor | None = None
        for part in parts.values():
            if part.active:
                weighted = (
                    part.reduced if isinstance(part.weight, Number) and part.weight == 1 else part.weight * part.reduced
                )
                total = weighted if total is None else total + weighted
        if total is None:
            device = next((p.reduced.device for p in parts.values()), None)
            return torch.zeros((), device=device, requires_grad=torch.is_grad_enabled())
        return total

    def _evaluate(
        self,
        sources: Mapping[str | None, Mapping[str, Any]],
        denominators: Mapping[str, tuple[float | Tensor, int]] | None = None,
        only: frozenset[str] | None = None,
    ) -> dict[str, _Part]:
        """Evaluate every term on the sources of one micro-batch.

        Args:
            denominators: by label, the sum of counts over all micro-batches and processes, and the number of evaluations.
            only: labels to evaluate; the others are left out.
        """
        return self._parts(_State(self, sources), denominators, only)

    def _parts(
        self,
        state: _State,
        denominators: Mapping[str, tuple[float | Tensor, int]] | None = None,
        only: frozenset[str] | None = None,
    ) -> dict[str, _Part]:
        return {
            e.label: self._part(e, state, None if denominators is None else denominators[e.label])
            for e in self._entries
            if only is None or e.label in only
        }

    def _part(self, entry: _Entry, state: _State, denominator: tuple[float | Tensor, int] | None) -> _Part:
        source = state.sources.get(entry.stream)
        weight: float | Tensor = 1.0 if entry.auxiliary else value_of(entry.weight, self._live.clock)
        if source is None:
            return _Part(torch.zeros(()), weight, None, active=False)
        value = state.value(entry)
        values, surrogate = value.values, value.surrogate
        if not value.active:
            return _Part(values.new_zeros(()), weight, None, active=False)
        if isinstance(weight, Tensor) and weight.ndim:
            values = values * weight
            surrogate = None if surrogate is None else surrogate * weight
            weight = 1.0
        count = self._count(entry, state, source, values)
        reduced = _reduce(values, count, denominator)
        if surrogate is not None:
            gradient = _reduce(surrogate, count, denominator)
            reduced = gradient + (reduced - gradient).detach()
        if entry.auxiliary:
            reduced = reduced - reduced.detach()
        return _Part(reduced, weight, value.values, active=True)

    def _count(self, entry: _Entry, state: _State, source: Mapping[str, Any], values: Tensor) -> Tensor | None:
        if values.ndim == 0:
            return None
        if entry.count_reads is not None:
            return entry.term.count(**state.arguments(entry, entry.count_reads, source))  # type: ignore[misc]
        if values.ndim > 1:
            raise QuantityError(
                f"{entry.label} returned values {describe(values)}: values of shape [batch, time] need a method "
                "count(...) that says, from data alone, which positions count."
            )
        return source.get("sample_weight")

    def counts(self, batches: Mapping[str | None, Mapping[str, Any]]) -> dict[str, float | Tensor]:
        """Return each term's sum of counts on one micro-batch, from data alone: what a loop adds up before the first forward.

        Args:
            batches: the data of the micro-batch by stream (None for the main one), without anything that a model computes.
        """
        state = _State(self, batches)
        result: dict[str, float | Tensor] = {}
        for e in self._entries:
            source = state.source(e)
            if source is None:
                result[e.label] = 0.0
            elif e.count_reads is not None:
                count = e.term.count(**state.arguments(e, e.count_reads, source))  # type: ignore[misc]
                result[e.label] = count.sum()
            elif "sample_weight" in source:
                result[e.label] = source["sample_weight"].sum()
            else:
                result[e.label] = float(next((len(v) for v in source.values() if isinstance(v, Tensor) and v.ndim), 1))
        return result

    # ---- what moves -------------------------------------------------------------------------------------------------

    def bind(
        self,
        info: DataInfo | Mapping[str, DataInfo] | None = None,
        *,
        examples: int | None = None,
        classes: int | None = None,
        device: torch.device | None = None,
        steps: int | None = None,
        steps_per_epoch: int | None = None,
    ) -> Objective:
        """Size memories and tell schedules how long the run is, before the first step.

        Args:
            info: about the main stream, or about each stream by name; or say `examples` and `classes` here.
            steps, steps_per_epoch: lengths in optimiser steps.

        Returns: the objective itself.
        """
        if info is None and examples is not None:
            info = DataInfo(examples, classes, device)
        table: Mapping[str, DataInfo] = {} if info is None else info if isinstance(info, Mapping) else {"main": info}
        for e in self._entries:
            known = table.get(e.stream or "main")
            if known is not None:
                e.term.bind(known)
        clock = self.clock
        self.clock = Clock(clock.step, steps or clock.steps, steps_per_epoch or clock.steps_per_epoch)
        return self

    def follow(self, optimizer: Any) -> Objective:
        """Advance after every step of `optimizer`, in a loop of your own; a step that is skipped does not advance.

        An optimiser that was followed before is followed no longer.

        Args:
            optimizer: a `torch.optim.Optimizer`, or a wrapper that keeps one in `.optimizer` (Accelerate).

        Returns: the objective itself.
        """
        inner = getattr(optimizer, "optimizer", optimizer)
        zero, live = type(inner).zero_grad, self._live

        def zero_grad(*args: Any, **kwargs: Any) -> None:
            if live.pending:
                self._forget_used()
            zero(inner, *args, **kwargs)

        self._live.unfollow()
        inner.zero_grad = zero_grad
        hook = inner.register_step_post_hook(lambda *_: self.advance())

        def unfollow() -> None:
            hook.remove()
            inner.__dict__.pop("zero_grad", None)

        self._live.unfollow, self._live.followed = unfollow, True
        return self

    def advance(self) -> None:
        """Move memories, multipliers and the clock by one optimiser step, on what the last step's forwards recorded.

        Every process must call it; what the terms read is concatenated over micro-batches and processes first.
        """
        live = self._live
        waiting, live.pending, live.steps_seen = list(live.pending.values()), {}, 0
        # As torch.no_grad(), which makes two objects more.
        with torch.set_grad_enabled(False):
            for entry in self._recorded:
                self._advance_term(entry, [w["reads"][entry.label] for w in waiting if entry.label in w["reads"]])
            if self._duals:
                self._advance_duals(waiting)
        clock = live.clock
        live.clock = Clock(clock.step + 1, clock.steps, clock.steps_per_epoch)

    def _advance_term(self, entry: _Entry, records: list[dict[str, Any]]) -> None:
        everywhere = processes.size() > 1
        if not records:
            if everywhere:
                raise StateError(f"{entry.label}: this process has no record of the step, and the others wait for it.")
            return
        joined: dict[str, Any] = {} if everywhere or len(records) > 1 else records[0]
        for name, first in records[0].items() if not joined else ():
            if isinstance(first, Tensor) and first.ndim:
                rows = torch.cat([record[name] for record in records]) if len(records) > 1 else first
                joined[name] = processes.gather_rows(rows) if everywhere else rows
            else:
                joined[name] = first
        entry.term.advance(**joined)  # type: ignore[misc]

    def _advance_duals(self, waiting: list[dict[str, Any]]) -> None:
        measured: dict[int, Any] = {}
        modules: dict[int, Any] = {}
        for entry in self._duals:
            pairs = [w["values"][entry.label] for w in waiting if entry.label in w["values"]]
            total = sum((n for n, _ in pairs), start=torch.zeros(()))
            count = sum((c for _, c in pairs), start=torch.zeros(()))
            both = processes.sum_across(torch.stack([torch.as_tensor(total).float(), torch.as_tensor(count).float()]))
            for leaf in leaves_of(entry.weight):
                module = getattr(leaf, "module", None)
                if module is not None and both[1] > 0:
                    inner = value_of(leaf.inner, self.clock)  # type: ignore[attr-defined]
                    modules[id(module)] = module
                    measured[id(module)] = measured.get(id(module), 0.0) + inner * both[0] / both[1]
        for key, module in modules.items():
            module.advance(measured[key])

    def _await_advance(self, state: _State, parts: Mapping[str, _Part], total: Tensor) -> None:
        """Keep what `advance` will read, the first time that these data are evaluated in this step."""
        live = self._live
        if not live.followed:
            self._watch()
        held = _data(state.sources)
        key = _addresses(held)
        if key not in live.pending:
            waiting = self._waiting(state, parts, None, held)
            if live.followed and total.requires_grad:
                # A gradient that is kept says, without a hook in Python, whether backward came by.
                total.retain_grad()
                waiting["total"] = total
            live.pending[key] = waiting

    def record(
        self,
        key: Any,
        sources: Mapping[str | None, Mapping[str, Any]],
        parts: Mapping[str, Any],
        denominators: Mapping[str, tuple[float | Tensor, int]] | None = None,
    ) -> None:
        """Keep what `advance` will read of one micro-batch, unless `key` was kept already in this step."""
        if key not in self._live.pending:
            self._live.pending[key] = self._waiting(_State(self, sources), parts, denominators)

    def _waiting(
        self,
        state: _State,
        parts: Mapping[str, Any],
        denominators: Mapping[str, tuple[float | Tensor, int]] | None,
        held: Sequence[Tensor] = (),
    ) -> dict[str, Any]:
        """Return what `advance` will read.

        Args:
            held: tensors whose addresses are the key; they are kept so that the addresses are not used again within the step.
        """
        reads, values = {}, {}
        for entry in self._recorded:
            source = state.sources.get(entry.stream)
            if source is not None and (entry.label not in parts or parts[entry.label].active):
                arguments = state.arguments(entry, entry.advance_reads, source)
                reads[entry.label] = _counting_rows(arguments, source.get("sample_weight"))
        for entry in self._duals:
            part = parts.get(entry.label)
            if part is not None and part.active:
                share = torch.ones(()) if denominators is None else _share_of(denominators[entry.label])
                values[entry.label] = (part.reduced.detach(), share)
        return {"reads": reads, "values": values, "total": None, "held": held}

    def discard(self) -> None:
        """Forget what waits for `advance`: the step was skipped."""
        self._live.pending = {}

    def _forget_used(self) -> None:
        self._live.pending = {
            k: w for k, w in self._live.pending.items() if w["total"] is None or w["total"].grad is None
        }

    def _watch(self) -> None:
        if not _COUNTER.installed:
            register_optimizer_step_post_hook(_COUNTER.count)
            _COUNTER.installed = True
        if not self._live.pending:
            self._live.steps_seen = _COUNTER.steps
        elif _COUNTER.steps - self._live.steps_seen >= 2:
            raise StateError(
                f"The objective {self} has state that moves with the optimiser (memories, schedules, multipliers or random "
                "numbers), an optimiser has made several steps, and nobody has advanced it. Call objective.follow(optimizer) once "
                "before the loop, or objective.advance() after every step."
            )

    def waits(self) -> bool:
        """Whether something waits for `advance`."""
        return bool(self._live.pending)

    # ---- state ------------------------------------------------------------------------------------------------------

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the terms' own parameters as optimiser groups; a group that ascends has `maximize=True`."""
        groups: dict[str, list[nn.Parameter]] = {"min": [], "max": []}
        seen: set[int] = set()
        for entry in self._entries:
            for name, parameter in entry.term.named_parameters():
                if id(parameter) not in seen and parameter.requires_grad:
                    seen.add(id(parameter))
                    groups[entry.term.player(name)].append(parameter)
        return [{"params": p, "player": k, "maximize": k == "max"} for k, p in groups.items() if p]

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "step": self.clock.step,
            "steps": self.clock.steps,
            "steps_per_epoch": self.clock.steps_per_epoch,
            "seed": self.seed,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.clock = Clock(state["step"], state["steps"], state["steps_per_epoch"])
        self.seed = state["seed"]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.state_dict`; keys come from the terms' names.

        Raises:
            StateError: two terms of one name have state, so that the keys would depend on their order.
        """
        for entry in self._entries:
            if "#" in entry.label and (
                any(True for _ in entry.term.buffers()) or any(True for _ in entry.term.parameters())
            ):
                own = entry.summand.own_label
                raise StateError(
                    f"Two terms are called {own!r} and they have state; name them apart before saving: "
                    f"{entry.term}.named('another_name')."
                )
        return super().state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_live"] = _Live(self._live.clock)
        return state


class TensorWeight(Coefficient):
    """A weight that is a tensor: 0-dim, per example `[batch]` or per token `[batch, time]`; detached."""

    moves = False

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()

    def value(self, clock: Clock) -> Tensor:
        return self.tensor

    def __str__(self) -> str:
        return f"<{describe(self.tensor)}>"


class _State:
    """The sources of one evaluation, and the terms that are evaluated already."""

    __slots__ = ("checks", "composed", "done", "objective", "running", "sources")

    def __init__(self, objective: Objective, sources: Mapping[str | None, Mapping[str, Any]]) -> None:
        self.objective, self.sources = objective, sources
        self.done: dict[str, Value] = {}
        self.composed: dict[tuple[str, str], Tensor] = {}
        self.running: list[str] = []
        self.checks = not torch.compiler.is_compiling()

    def source(self, entry: _Entry) -> Mapping[str, Any] | None:
        return self.sources.get(entry.stream)

    def value(self, entry: _Entry) -> Value:
        found = self.done.get(entry.label)
        if found is not None:
            return found
        if not entry.crosses:
            found = self.done[entry.label] = self._run(entry)
            return found
        if entry.label in self.running:
            raise QuantityError(f"Terms read each other in a circle: {' -> '.join([*self.running, entry.label])}.")
        self.running.append(entry.label)
        found = self.done[entry.label] = self._run(entry)
        self.running.pop()
        return found

    def _run(self, entry: _Entry) -> Value:
        source = self.sources[entry.stream]
        arguments = self.arguments(entry, entry.forward_reads, source)
        if entry.auxiliary:
            arguments = {k: v.detach() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        if self.checks:
            self._check(entry, arguments)
        if entry.stochastic:
            device = getattr(source, "device", None)
            with random_numbers(derive(*self._key(source), entry.label), device):
                out = entry.term(**arguments)
        else:
            out = entry.term(**arguments)
        if isinstance(out, Tensor):
            return Value(out)
        if not isinstance(out, Value):
            raise QuantityError(f"{entry.label} must return a tensor or a Value, and it returned {describe(out)}.")
        return out

    def _key(self, source: Mapping[str, Any]) -> tuple[int, ...]:
        key: tuple[int, ...] | None = getattr(source, "key", None)
        if key is not None:
            return key
        pending = self.objective._live.pending
        identity = _addresses(_data(self.sources))
        micro = list(pending).index(identity) if identity in pending else len(pending)
        return (self.objective.seed, self.objective.clock.step, micro, processes.rank())

    def arguments(self, entry: _Entry, reads: tuple[_Reading, ...], source: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        for parameter, name, optional, inside in reads:
            if parameter in entry.composes:
                found[parameter] = self._composed(entry, parameter, source)
            elif name in source:
                found[parameter] = source[name]
            elif inside:
                found[parameter] = self._inside(entry, name)
            elif not optional:
                raise self._missing(entry, parameter, name, source)
        return found

    def _composed(self, entry: _Entry, parameter: str, source: Mapping[str, Any]) -> Tensor:
        """Return what an objective of the term's own makes: the weighted sum of its unreduced values, detached."""
        key = (entry.label, parameter)
        if key not in self.composed:
            objective = entry.composes[parameter]
            state = _State(objective, {None: source, "main": source})
            total: Tensor | None = None
            for inner in objective._entries:
                values = state.value(inner).values.detach()
                weighted = value_of(inner.weight, self.objective.clock) * values
                if total is not None and total.shape != weighted.shape:
                    raise QuantityError(
                        f"{entry.label}: the terms of its {parameter} give values of different forms: {inner.label} gives "
                        f"{describe(values)}, and those before it {describe(total)}."
                    )
                total = weighted if total is None else total + weighted
            assert total is not None
            self.composed[key] = total
        return self.composed[key]

    def _inside(self, entry: _Entry, name: str) -> Any:
        """Return a reading of the clock, or what another term publishes."""
        if name in CLOCK:
            clock = self.objective.clock
            return getattr(clock, name) if name in ("step", "epoch", "epochs", "progress") else clock.require(name)
        label, _, extra = name.rpartition(".")
        other = next((e for e in self.objective._entries if e.label == label), None)
        if other is None or self.source(other) is None:
            raise QuantityError(f"{entry.label} reads {name!r}, and no active term is called {label!r}.")
        value = self.value(other)
        if extra not in value.extras:
            raise QuantityError(
                f"{entry.label} reads {name!r}, and {label} publishes {', '.join(value.extras) or 'nothing'}."
                + nearest(extra, value.extras)
            )
        published = value.extras[extra]
        return published if extra in other.term.differentiable_extras else published.detach()

    def _missing(self, entry: _Entry, parameter: str, name: str, source: Mapping[str, Any]) -> QuantityError:
        offered = sorted(source)
        expected = entry.expects.get(parameter, "")
        return QuantityError(
            f"{entry.label} reads {name!r}{f' as {expected}' if expected else ''}, and it is not among the quantities that are "
            f"offered: {', '.join(offered) or 'none'}." + nearest(name, offered)
        )

    def _check(self, entry: _Entry, arguments: dict[str, Any]) -> None:
        forms = [(v.dtype, v.shape) if isinstance(v, Tensor) else type(v) for v in arguments.values()]
        if forms == entry.forms:
            return
        signature = tuple(forms)
        if signature in entry.checked:
            entry.forms = forms
            return
        sizes: dict[str, int] = {}
        for name, value in arguments.items():
            if entry.expects[name]:
                check(entry.label, name, value, entry.expects[name], sizes)
        if len(entry.checked) > 1000:
            entry.checked.clear()  # sequences of every length: checking again is cheaper than remembering all
        entry.checked.add(signature)
        entry.forms = forms


def _sources(quantities: Mapping[str, Any] | None, eager: dict[str, Any]) -> dict[str | None, Mapping[str, Any]]:
    """Return the quantities by stream; None is the main one."""
    if quantities is None:
        return {None: eager, "main": eager}
    if isinstance(quantities, Streams):
        main = quantities.get("main", next(iter(quantities.values()), {}))
        return {None: main, **dict(quantities.items())}
    joined = {**quantities, **eager} if eager else quantities
    return {None: joined, "main": joined}


def _reduce(values: Tensor, count: Tensor | None, denominator: tuple[float | Tensor, int] | None) -> Tensor:
    """Return `sum(values * count) / sum(count)`, the sums running over all micro-batches and processes."""
    if values.ndim == 0:
        return values if denominator is None or denominator[1] == 1 else values / denominator[1]
    if count is None:
        if denominator is None or denominator[0] == values.numel():
            return values.mean()
        return values.sum() / denominator[0]
    # Where nothing counts, the value must not matter: 0 times an infinite one would be NaN.
    weighted = torch.where(count == 0, 0.0, values) * count
    total = count.sum() if denominator is None else denominator[0]
    if isinstance(total, Tensor):
        return weighted.sum() / torch.where(total > 0, total, 1.0)
    return weighted.sum() / (total or 1.0)


def _resolved(term: Term, weights: Mapping[str, Number | Coefficient]) -> Term:
    """Return the term, or a copy of it in which the `auto` weights of its own objectives are replaced."""
    changed = {}
    for name, objective in term.composes().items():
        known = {k: v for k, v in weights.items() if k in objective.autos}
        if known:
            changed[name] = objective.resolve(known)
    if not changed:
        return term
    # A flat copy: what the term holds is shared, as terms are, but for the objectives that differ.
    twin = copy.copy(term)
    twin.__dict__["_modules"] = {**term._modules, **changed}
    return twin


def _share_of(denominator: tuple[float | Tensor, int]) -> Tensor:
    # With global denominators the parts add up to the value; without them each part is a mean of its own.
    return torch.ones(()) / denominator[1]


def _addresses(data: Sequence[Tensor]) -> tuple[Any, ...]:
    """Recognise a micro-batch by the addresses of its data, so that a repeated closure is not taken for another one."""
    return tuple([(v.data_ptr(), v.shape) for v in data])


def _data(sources: Mapping[str | None, Mapping[str, Any]]) -> list[Tensor]:
    """Return the tensors of the sources that nothing is differentiated by; None is another name of one of the streams.

    What a readout offers lazily is left out: looking at it would compute it.
    """
    return [
        v
        for stream, source in sources.items()
        if stream is not None
        for v in ([source[name] for name in source.given] if isinstance(source, Quantities) else source.values())
        if isinstance(v, Tensor) and not v.requires_grad
    ]


def _counting_rows(arguments: dict[str, Any], weight: Tensor | None) -> dict[str, Any]:
    """Detach what `advance` will read, and leave out the padding rows, which count nothing."""
    for name, v in arguments.items():
        if isinstance(v, Tensor) and v.requires_grad:
            arguments[name] = v.detach()
    if weight is None or bool((weight > 0).all()):
        return arguments
    rows = weight > 0
    return {k: v[rows] if isinstance(v, Tensor) and v.ndim and len(v) == len(rows) else v for k, v in arguments.items()}


def _detached(weight: float | Tensor) -> float | Tensor:
    return weight.detach() if isinstance(weight, Tensor) else weight


@dataclass
class _StepCounter:
    """How many optimiser steps this process has seen, of any optimiser."""

    steps: int = 0
    installed: bool = False

    def count(self, *_: Any) -> None:
        self.steps += 1


_COUNTER = _StepCounter()


def replace_weights(
    objective: Objective, change: Callable[[str, Number | Coefficient], Number | Coefficient]
) -> Objective:
    """Return the objective with the weight of every term changed: `change(label, weight)`."""
    return objective._like(
        e.summand if e.auxiliary else replace(e.summand, weight=change(e.label, e.weight)) for e in objective._entries
    )


def auxiliary(term: Term | Objective) -> Objective:
    """Train a term's own parameters on detached inputs, outside the trade-off: it adds 0 to the value, and no weight reaches it.

    >>> str(auxiliary(L2()))
    'auxiliary(l2)'
    """
    objective = term if isinstance(term, Objective) else Objective([Summand(term)])
    return Objective(replace(s, auxiliary=True, weight=1) for s in objective.summands)


def iterate_terms(objective: Objective) -> Iterator[tuple[str, Term]]:
    """Give every term once, with its first label."""
    seen: set[int] = set()
    for label, term in objective.terms.items():
        if id(term) not in seen and isinstance(term, Term):
            seen.add(id(term))
            yield label, term


__all__ = [
    "DataInfo",
    "Evaluation",
    "Objective",
    "Summand",
    "Term",
    "TermReport",
    "Value",
    "auxiliary",
]
