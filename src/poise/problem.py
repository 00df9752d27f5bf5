"""One frozen step of an objective on its streams, and what a solver may ask of it.

    problem.value()                      the objective, over all micro-batches and processes
    problem.gradient(at=..., terms=...)  its gradient; the one place where gradients of processes meet
    problem.product(vector, kind=...)    Hessian, Gauss-Newton or Fisher times a vector

Asking twice gives the same answer: data, random numbers, memories and batch statistics are those of the step. Nothing is
recorded but the first evaluation at the model's own parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from poise import processes
from poise.coefficient import value_of
from poise.errors import IncompatibleError, InputError
from poise.objective import Objective, _Part
from poise.quantities import Quantities
from poise.weights.feature_table import FeatureTable, features_of
from poise.weights.gradient_table import GradientTable
from poise.weights.owned import without_owned

if TYPE_CHECKING:
    from poise.readouts.supervised import Readout

OWN = "objective."
"""Prefix of the objective's own parameters in gradients, so that they cannot be taken for the model's."""


def named_parameters_of(model: nn.Module, objective: Objective) -> list[tuple[str, nn.Parameter]]:
    """List the model's parameters by name, and the objective's own under the prefix `objective.`."""
    return [*model.named_parameters(), *((OWN + n, p) for n, p in objective.named_parameters())]


class ModelView:
    """The model as terms see it: callable, at the parameters of this evaluation.

    Args:
        module: the trained module.
        at: parameters and buffers that replace the module's own, by name; or None.
        autocast: a context for the forward pass.
    """

    def __init__(
        self,
        module: nn.Module,
        at: Mapping[str, Tensor] | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.module, self.at, self.autocast = module, at, autocast

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        with self.autocast():
            if self.at is None:
                out = self.module(*inputs, **keywords)
            else:
                out = torch.func.functional_call(self.module, dict(self.at), inputs, keywords)
        # Losses are taken in float32 whatever the forward pass computed in.
        return out.float() if isinstance(out, Tensor) and out.dtype in (torch.bfloat16, torch.float16) else out

    def run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Return `function(module, *inputs)` at the parameters of this evaluation: for what a forward pass alone does not give."""
        with self.autocast():
            if self.at is None:
                return function(self.module, *inputs)
            at = {f"module.{name}": value for name, value in self.at.items()}
            return torch.func.functional_call(_Applied(self.module, function), at, inputs)

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """The trained parameters by name, at this evaluation."""
        own: dict[str, Tensor] = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        return own if self.at is None else {name: self.at.get(name, p) for name, p in own.items()}


class _Applied(nn.Module):
    """A function of a module as a module, so that its parameters can be replaced while it runs."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *inputs: Any) -> Any:
        return self.function(self.module, *inputs)


class TermStep(NamedTuple):
    """What one term was worth in one step: value and weight (0-dim tensors or numbers), and whether it acted."""

    value: Tensor
    weight: float | Tensor
    active: bool


@dataclass
class Step:
    """What a solver did in one step.

    Attributes:
        value: the objective before the step, 0-dim.
        terms: every term by its label.
        gradient_norm: Euclidean norm of the gradient, or None where the solver did not need it.
        evaluations: how often the objective was evaluated.
        skipped: the step was not taken.
    """

    value: Tensor
    terms: dict[str, TermStep] = field(default_factory=dict)
    gradient_norm: Tensor | None = None
    evaluations: int = 1
    skipped: bool = False


@dataclass(frozen=True)
class Certificate:
    """What a solver knows about its answer; never a bare tensor.

    Attributes:
        value: the objective there.
        residual: what should be 0 at a solution, in the words of `measure` ("gradient norm", "duality gap", ...).
        tolerance: the residual that was asked for.
        feasible: whether every constraint holds, or None where there is none.
        support: indices that are not 0, where the solution is sparse.
        iterations: how many were made.
        status: "converged" or why not, in words.
        history: the values on the way.
    """

    value: float
    residual: float
    tolerance: float
    measure: str
    iterations: int
    status: str
    feasible: bool | None = None
    support: Tensor | None = None
    history: tuple[float, ...] = ()

    @property
    def converged(self) -> bool:
        """Whether the residual is within the tolerance."""
        return self.residual <= self.tolerance


class Solver(Protocol):
    """How an objective is minimised.

    Attributes:
        needs: capabilities that every term must have; `fit` refuses, by name, a term that lacks one.
    """

    needs: frozenset[str]

    def bind(self, model: nn.Module, objective: Objective) -> None:
        """Take hold of the parameters before the first step."""
        ...

    def step(self, problem: Problem, accept: Callable[[Step], bool] | None = None) -> Step:
        """Make one step; where `accept` says no to what was evaluated, make none and say so."""
        ...

    def minimize(self, problem: Problem) -> Certificate:
        """Minimise one problem to a certificate."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        ...

    # A solver may also define `release()`, which `fit` calls at the end: it gives back what `bind` changed about the parameters.


class Signals:
    """What a policy may look at in one step; nothing is computed before it is read.

    Args:
        names: the weights that the policy owns, in order.
        rows: for every owned weight, the terms it multiplies and their fixed factors.
        problem: the step on the training data.
        weights: the weights of the step before, by name.
        step, steps: optimiser steps done, and of the whole run.
        validation: makes the validation objective on a validation batch, or None where the run has no validation data.
        lr: of the model's optimiser.
        metrics: of a validation that has just been made; empty otherwise.
    """

    def __init__(
        self,
        names: Sequence[str],
        rows: Mapping[str, Mapping[str, float]],
        problem: Problem,
        *,
        weights: Mapping[str, float | Tensor] | None = None,
        step: int = 0,
        steps: int = 0,
        validation: Callable[[], Problem] | None = None,
        lr: float = 1.0,
        metrics: Mapping[str, float] | None = None,
        shared: Sequence[str] | str | None = None,
        on: str | None = None,
    ) -> None:
        self.names, self.rows, self.problem = tuple(names), rows, problem
        self.weights = dict(weights or {})
        self.step, self.steps, self.lr = step, steps, lr
        self.metrics: Mapping[str, float] = dict(metrics or {})
        self.shared, self.on = shared, on
        self._validation = validation

    @cached_property
    def gradients(self) -> GradientTable:
        """One gradient for each weight: one forward pass, a backward pass for each. The update of the step uses them again."""
        return self.problem.table({name: self.rows[name] for name in self.names}, shared=self.shared, on=self.on)

    @cached_property
    def values(self) -> Tensor:
        """What each weight multiplies, reduced, f64 [m]. Free in `advance` and beside `gradients`, else a forward pass more."""
        self.problem.reports()
        terms = self.problem.step.terms
        found = [
            sum((c * terms[label].value for label, c in self.rows[n].items()), torch.zeros(())) for n in self.names
        ]
        return torch.stack([torch.as_tensor(v) for v in found]).double().cpu()

    @cached_property
    def validation(self) -> Problem | None:
        """The validation objective on a validation batch, with the model in evaluation mode; None where there are no such data."""
        return None if self._validation is None else self._validation()


class Policy(Protocol):
    """How weights are set while the model trains.

    Attributes:
        needs: what it must be told: "values", "gradients", "validation", "metrics". A run that cannot tell refuses.

    It may also define `bind(starts, ranges)`, called once with the weights' first values and their ranges by name;
    `report() -> Mapping[str, float]`, drawn in the run's curves; `discard(signals)`, called in place of `advance` where a step was
    skipped; `start`, the weights' first value; `upper`, the validation objective as a formula; `valid_batch`, how many validation
    rows it wants to see; `balances`, whether its weights are for shared parameters alone; and `tunes_hyperparameters`, whether it
    has work to do although no weight is `auto`.
    """

    needs: frozenset[str]

    def weights(self, signals: Signals) -> Mapping[str, float | Tensor]:
        """Return the weights of this step by name: numbers, or tensors `[batch]` that weigh every example."""
        ...

    def advance(self, signals: Signals) -> None:
        """Move the policy's own state after the update, once per optimiser step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Take it back."""
        ...


class Problem:
    """One step of an objective, frozen.

    Args:
        model: the trained module.
        objective: what is minimised.
        batches: the micro-batches of this process; each maps a stream's name ("main" for the only one) to its data.
        readout: offers quantities; or one for each stream by name.
        key: (seed, step), from which random numbers are derived.
        device: where the data are.
        autocast: a context for forward passes.
        record: keep what `advance` needs at the first evaluation.
        named: the parameters of model and objective by name, as `named_parameters_of` lists them, where a loop knows them already.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        batches: Sequence[Mapping[str, Mapping[str, Any]]],
        readout: Readout | Mapping[str, Readout],
        *,
        key: tuple[int, int] = (0, 0),
        device: torch.device | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        record: bool = True,
        named: Sequence[tuple[str, nn.Parameter]] | None = None,
    ) -> None:
        self.model, self.objective, self.batches, self.readout = model, objective, batches, readout
        self.key, self.device, self.autocast, self.record = key, device, autocast, record
        self.named = named
        self.step = Step(torch.zeros(()), evaluations=0)
        self.latest_value = self.step.value
        self._prepared: dict[str, Tensor] | None = None
        self._table: tuple[GradientTable, dict[str, Tensor]] | None = None
        self._alone = len(batches) == 1 and processes.size() == 1
        self._denominators = None if self._alone else self._count()

    def _refuse_couples(self) -> None:
        for label, term in self.objective.terms.items():
            if term.couples == ("group",) and self._groups_are_whole():
                continue
            if term.couples:
                where = "several processes" if processes.size() > 1 else "gradient accumulation"
                raise IncompatibleError(
                    f"{label} compares examples of a batch with each other, so its value under {where} "
                    "is not that of one big batch. Use one process and accumulate=1."
                )

    def _groups_are_whole(self) -> bool:
        """Say whether no group of any stream is shared out over micro-batches or processes."""
        for stream in self.batches[0]:
            parts = [torch.unique(b[stream]["group"]) for b in self.batches if "group" in b.get(stream, {})]
            if parts:
                own = torch.cat(parts)
                every = processes.gather_rows(own) if processes.size() > 1 else own
                if len(every) != len(torch.unique(every)):
                    return False
        return True

    def _count(self) -> dict[str, tuple[float | Tensor, int]]:
        """Return sums of counts over micro-batches and processes, from data alone, and the number of evaluations."""
        self._refuse_couples()
        labels = self.objective.labels
        local = torch.zeros(len(labels) + 1, dtype=torch.float64)
        for batch in self.batches:
            counts = self.objective.counts(
                self._sources({name: self._named(name, data) for name, data in batch.items()})
            )
            local += torch.tensor([*(float(counts[label]) for label in labels), 1.0], dtype=torch.float64)
        total = processes.sum_across(local if self.device is None else local.to(self.device)).tolist()
        return {label: (total[i], int(total[-1])) for i, label in enumerate(labels)}

    def _readout(self, stream: str) -> Readout:
        return self.readout[stream] if isinstance(self.readout, Mapping) else self.readout

    def _named(self, stream: str, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the data under every name by which terms may read them; a readout may know several."""
        also = getattr(self._readout(stream), "also_named", None)
        return data if also is None else also(data)

    def _sources(self, batch: Mapping[str, Mapping[str, Any]]) -> dict[str | None, Mapping[str, Any]]:
        main = batch.get("main", next(iter(batch.values()), {}))
        return {None: main, **dict(batch.items())}

    def _quantities(self, number: int, view: ModelView) -> dict[str | None, Mapping[str, Any]]:
        read: dict[str, Mapping[str, Any]] = {}
        for place, (stream, data) in enumerate(self.batches[number].items()):
            key = (*self.key, number, processes.rank(), place)
            batch = Quantities(data, key=key, device=self.device)
            read[stream] = self._readout(stream)(view, batch, self._plan(stream, place))
        return self._sources(read)

    def _plan(self, stream: str, place: int) -> frozenset[str]:
        plan = self.objective.plan(stream)
        return plan | self.objective.plan(None) if stream == "main" or place == 0 else plan

    def _view(self, at: Mapping[str, Tensor] | None) -> ModelView:
        if at is None and not self.step.evaluations:
            return ModelView(self.model, None, self.autocast)
        # Another evaluation of the same step: whatever the forward pass moves (batch statistics) moves in copies.
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        if at is None and not buffers:
            return ModelView(self.model, None, self.autocast)
        own = dict(self.model.named_parameters())
        given = {name: value for name, value in (at or {}).items() if not name.startswith(OWN)}
        unknown = [name for name in given if name not in own and name not in buffers]
        if unknown:
            raise InputError(f"at= names parameters that the model does not have: {', '.join(unknown[:5])}.")
        return ModelView(self.model, {**own, **buffers, **given}, self.autocast)

    def _evaluate(
        self,
        at: Mapping[str, Tensor] | None,
        terms: Sequence[str] | None,
        then: Callable[[Tensor, Mapping[str, _Part]], None] | None = None,
    ) -> Tensor:
        """Evaluate all micro-batches; hand each one's total and parts to `then`, and return the sum, without gradient if `then` took it."""
        only = None if terms is None else frozenset(terms)
        first = at is None and only is None and not self.step.evaluations
        view = self._view(at)
        self.step.evaluations += 1
        whole: Tensor | None = None
        reports: dict[str, TermStep] = {}
        for number in range(len(self.batches)):
            sources = self._quantities(number, view)
            parts = self.objective._evaluate(sources, self._denominators, only)
            total = self.objective._total(parts)
            if first:
                if self.record and self.objective.stateful:
                    self.objective.record(number, sources, parts, self._denominators)
                for label, part in parts.items():
                    before = reports.get(label)
                    value = part.reduced.detach()
                    reports[label] = TermStep(
                        value if before is None else before.value + value,
                        part.weight.detach() if isinstance(part.weight, Tensor) else part.weight,
                        part.active or (before is not None and before.active),
                    )
            if then is not None:
                then(total, parts)
                total = total.detach()
            whole = total if whole is None else whole + total
        assert whole is not None
        if first:
            self.step.terms = reports
            self.step.value = processes.sum_across(whole.detach())
        return whole

    def value(self, at: Mapping[str, Tensor] | None = None, terms: Sequence[str] | None = None) -> Tensor:
        """Return the objective, 0-dim, over all micro-batches and processes.

        Args:
            at: parameters by name that replace the model's, without touching them.
            terms: labels to which the evaluation is restricted.
        """
        with torch.no_grad():
            return processes.sum_across(self._evaluate(at, terms))

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained: the model's parameters, and the objective's own under the prefix `objective.`."""
        named = named_parameters_of(self.model, self.objective) if self.named is None else self.named
        return {n: p for n, p in named if p.requires_grad}

    # `latest_value` is the objective where the last gradient was taken, for line searches that want both.
    def gradient(
        self, at: Mapping[str, Tensor] | None = None, terms: Sequence[str] | None = None, create_graph: bool = False
    ) -> dict[str, Tensor]:
        """Return the gradient by parameter name, summed over micro-batches and processes.

        A parameter that the objective does not reach, on any process, is absent.

        Args:
            at, terms: see `value`. Parameters of `at` must require gradients.
            create_graph: keep the graph, to differentiate again (one micro-batch and one process only).

        Raises:
            IncompatibleError: `create_graph` with several micro-batches or processes, or with a term that has no second derivative.
        """
        if at is None and terms is None and not create_graph and self._prepared is not None:
            prepared, self._prepared = self._prepared, None
            return prepared
        names = list(self.parameters)
        points: list[Tensor] = [(at or {}).get(n, p) for n, p in self.parameters.items()]
        points = [p if p.requires_grad else p.detach().requires_grad_() for p in points]
        if at is not None:
            at = {**at, **{n: p for n, p in zip(names, points, strict=True) if n in at}}
        if create_graph:
            self._refuse_second_derivatives(terms)
        found: list[Tensor | None] = [None] * len(points)

        def accumulate(total: Tensor, parts: Mapping[str, _Part]) -> None:
            if total.requires_grad:
                _add(found, torch.autograd.grad(total, points, create_graph=create_graph, allow_unused=True))

        with torch.enable_grad():
            whole = self._evaluate(at, terms, accumulate)
        self.latest_value = processes.sum_across(whole)
        if processes.size() > 1:
            found = self._meet(points, found)
        return {n: g for n, g in zip(names, found, strict=True) if g is not None}

    def reports(self) -> None:
        """Evaluate the terms where nothing has been evaluated yet, so that `step.terms` says what they are worth."""
        if not self.step.evaluations:
            self.value()

    def table(
        self,
        rows: Mapping[str, Mapping[str, float]],
        shared: Sequence[str] | str | None = None,
        on: str | None = None,
    ) -> GradientTable:
        """Return one gradient for each row, over micro-batches and processes: one forward pass and a backward pass for each.

        Args:
            rows: by name, the terms' labels and their factors; a term may stand in several rows.
            shared: names of the parameters that are weighed against each other; by default those that two rows reach; "all" for all.
            on: a submodule; then rows are gradients on what it puts out, and what lies below is passed once (`FeatureTable`).

        Raises:
            InputError: a row reaches no shared parameter.
        """
        if on is not None:
            return self._feature_table(rows, on)
        names, points = list(self.parameters), list(self.parameters.values())
        found: list[list[Tensor | None]] = [[None] * len(points) for _ in range(len(rows) + 1)]
        values = [torch.zeros(()) for _ in rows]

        def accumulate(total: Tensor, parts: Mapping[str, _Part]) -> None:
            losses = [_row(parts, factors) for factors in rows.values()]
            # What stands beside the owned weights: the total less their share, at no backward pass where nothing does.
            losses.append(_row(parts, self._fixed(rows)))
            last = max((i for i, loss in enumerate(losses) if loss is not None and loss.requires_grad), default=-1)
            for i, loss in enumerate(losses):
                if loss is None:
                    continue
                if i < len(values):
                    values[i] = values[i].to(loss.device) + loss.detach()
                if loss.requires_grad:
                    _add(found[i], torch.autograd.grad(loss, points, retain_graph=i < last, allow_unused=True))

        with torch.enable_grad():
            self._evaluate(None, None, accumulate)
        if processes.size() > 1:
            found = [self._meet(points, row) for row in found]
            values = [processes.sum_across(value) for value in values]
        gradients = [{n: g for n, g in zip(names, row, strict=True) if g is not None} for row in found]
        table = GradientTable(tuple(rows), torch.stack(values), gradients[:-1], shared)
        self._table = table, gradients[-1]
        return table

    def _feature_table(self, rows: Mapping[str, Mapping[str, float]], on: str) -> GradientTable:
        table = FeatureTable(tuple(rows), self.parameters)
        with features_of(self.model, on) as seen, torch.enable_grad():

            def gather(total: Tensor, parts: Mapping[str, _Part]) -> None:
                table.add([_row(parts, factors) for factors in rows.values()], [*seen], _row(parts, self._fixed(rows)))
                seen.clear()

            self._evaluate(None, None, gather)
        self._table = table, {}
        return table

    @property
    def has_table(self) -> bool:
        """Whether a table of gradients waits to become the update."""
        return self._table is not None

    def _fixed(self, rows: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Return the terms that no row weighs, with their weights, and the fixed part of those that one weighs in part."""
        found: dict[str, float] = {}
        for entry in self.objective._entries:
            owned = [factors for factors in rows.values() if entry.label in factors]
            weight = value_of(without_owned(entry.weight, rows), self.objective.clock)
            if not owned or weight:
                found[entry.label] = float(weight)
        return found

    def weigh(self, weights: Mapping[str, float | Tensor], own: bool) -> None:
        """Make the update of this step from the table of gradients, under weights that have just been found.

        Args:
            weights: by row.
            own: keep what one row alone reaches at weight 1, as a balancer does; False where the weights are the trade-off itself.
        """
        if self._table is None:
            return
        table, rest = self._table
        numbers = torch.tensor([float(weights[label]) for label in table.labels], dtype=torch.float64)
        every = (
            table
            if own or isinstance(table, FeatureTable)
            else GradientTable(table.labels, table.values, table.rows, "all")
        )
        total = every.combine(numbers)
        for name, g in rest.items():
            total[name] = total[name] + g if name in total else g
        self._prepared, self._table = total, None

    def settle(self) -> None:
        """Say that a policy has moved the parameters itself: the solver finds no gradient in this step."""
        self._prepared, self._table = {}, None

    def fresh(self) -> Problem:
        """Return the same step once more, with nothing evaluated yet and nothing recorded."""
        return type(self)(
            self.model, self.objective, self.batches, self.readout, key=self.key, device=self.device, autocast=self.autocast,
            record=False, named=self.named,
        )  # fmt: skip

    def reweigh(self) -> None:
        """Say what the step is worth under weights that have changed since it was evaluated."""
        if not self.step.evaluations:
            return
        value = torch.zeros((), dtype=self.step.value.dtype, device=self.step.value.device)
        for entry in self.objective._entries:
            report = self.step.terms.get(entry.label)
            if report is not None and not entry.auxiliary:
                weight = value_of(entry.weight, self.objective.clock)
                self.step.terms[entry.label] = report._replace(weight=weight)
                if report.active:
                    value = value + weight * report.value
        self.step.value = self.latest_value = processes.sum_across(value)

    def _meet(self, points: Sequence[Tensor], found: list[Tensor | None]) -> list[Tensor | None]:
        """Sum gradients over processes; one that is absent on some processes only is 0 there."""
        device = points[0].device
        reached = processes.sum_across(
            torch.tensor([g is not None for g in found], dtype=torch.int32, device=device)
        ).tolist()
        places = [i for i, n in enumerate(reached) if n]
        filled = [g if (g := found[i]) is not None else torch.zeros_like(points[i]) for i in places]
        result: list[Tensor | None] = [None] * len(found)
        for i, g in zip(places, processes.sum_gradients(filled), strict=True):
            result[i] = g
        return result

    def _refuse_second_derivatives(self, terms: Sequence[str] | None) -> None:
        if not self._alone:
            raise IncompatibleError(
                "Differentiating a gradient again needs one micro-batch and one process: use accumulate=1."
            )
        for label, term in self.objective.terms.items():
            if (terms is None or label in terms) and "potential" not in term.capabilities:  # type: ignore[operator]
                raise IncompatibleError(
                    f"{label} has a gradient that is not the gradient of its value, so it cannot be differentiated twice. "
                    "Restrict the product with terms=[...]."
                )

    def outputs(self, at: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """Return what the readout's output is on each micro-batch: logits or predictions of the main stream."""
        view = self._view(at)
        return [self._quantities(i, view)[None][self._output] for i in range(len(self.batches))]

    @property
    def _output(self) -> str:
        readout = next(iter(self.readout.values())) if isinstance(self.readout, Mapping) else self.readout
        return readout.output

    def loss_of(self, outputs: Sequence[Tensor], at: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the objective as a function of the outputs: the terms that read them, the model's parameters held fixed.

        Args:
            outputs: one tensor a micro-batch, as `outputs()` gives them.
        """
        reading = frozenset(
            e.label for e in self.objective._entries if any(reading.name == self._output for reading in e.forward_reads)
        )
        whole: Tensor | None = None
        for number, output in enumerate(outputs):
            sources = self._quantities(number, self._view(at))
            main = sources[None]
            assert isinstance(main, Quantities)
            main.put(self._output, output)
            parts = self.objective._evaluate(sources, self._denominators, reading)
            total = self.objective._total(parts)
            whole = total if whole is None else whole + total
        assert whole is not None
        return whole

    def product(
        self, vector: Mapping[str, Tensor], kind: str = "hessian", at: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return a curvature matrix times a vector, by parameter name.

        Args:
            vector: by parameter name; absent parameters are 0.
            kind: "hessian" of the objective; "gauss_newton" `J' H J` with `J` the Jacobian of the outputs and `H` the Hessian of the
                terms in the outputs; "fisher" `J' F J` with `F` that of the distribution that the outputs parametrise
                (categorical for logits, unit normal for predictions).
            at: parameters by name that replace the model's.

        Raises:
            InputError: the kind is not known.
            IncompatibleError: a term has no second derivative.
        """
        if kind == "hessian":
            return self.hessian(at)(vector)
        if kind in ("gauss_newton", "fisher"):
            return self._output_product(vector, kind, at)
        raise InputError(f"kind is 'hessian', 'gauss_newton' or 'fisher', and it is {kind!r}.")

    def hessian(self, at: Mapping[str, Tensor] | None = None) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
        """Return the Hessian as a function of a vector: the graph is built once, and every product is one backward pass.

        Args:
            at: parameters by name that replace the model's.

        Raises:
            IncompatibleError: a term has no second derivative, or there are several micro-batches or processes.
        """
        point = {
            n: (at or {}).get(n, p).detach().requires_grad_()
            for n, p in self.parameters.items()
            if not n.startswith(OWN)
        }
        gradient = self.gradient(at=point, create_graph=True)
        curved = {n: g for n, g in gradient.items() if g.requires_grad}

        def product(vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
            pairs = [(g, vector[n]) for n, g in curved.items() if n in vector]
            if not pairs:
                return {n: torch.zeros_like(p) for n, p in point.items()}
            outputs, weights = zip(*pairs, strict=True)
            found = torch.autograd.grad(outputs, list(point.values()), weights, retain_graph=True, allow_unused=True)
            return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(point.items(), found, strict=True)}

        return product

    def _output_product(
        self, vector: Mapping[str, Tensor], kind: str, at: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        self._refuse_second_derivatives(None) if kind == "gauss_newton" else None
        point = {n: (at or {}).get(n, p).detach() for n, p in self.parameters.items() if not n.startswith(OWN)}
        direction = {n: vector[n] if n in vector else torch.zeros_like(p) for n, p in point.items()}

        def outputs(parameters: dict[str, Tensor]) -> Tensor:
            return self.outputs(at=parameters)[0]

        if not self._alone:
            raise IncompatibleError(
                "Gauss-Newton and Fisher products need one micro-batch and one process: use accumulate=1."
            )
        pair: Any = torch.func.jvp(outputs, (point,), (direction,))
        value, moved = pair
        if kind == "gauss_newton":
            curved = self._output_curvature(value.detach(), moved.detach(), at)
        else:
            curved = self._output_fisher(value.detach(), moved.detach())
        both: Any = torch.func.vjp(outputs, point)
        return dict(both[1](curved)[0])

    def _output_curvature(self, output: Tensor, direction: Tensor, at: Mapping[str, Tensor] | None) -> Tensor:
        leaf = output.requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self.loss_of([leaf], at), leaf, create_graph=True)
            if not gradient.requires_grad:
                return torch.zeros_like(direction)
            (curved,) = torch.autograd.grad((gradient * direction).sum(), leaf)
        return curved

    def _output_fisher(self, output: Tensor, direction: Tensor) -> Tensor:
        if self._output == "logits":
            p = output.softmax(-1)
            direction = p * direction - p * (p * direction).sum(-1, keepdim=True)
        return direction / len(output)


def _add(found: list[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
    """Add gradients to those of the micro-batches before."""
    for i, g in enumerate(gradients):
        if g is not None:
            before = found[i]
            found[i] = g if before is None else before + g


def _row(parts: Mapping[str, _Part], factors: Mapping[str, float]) -> Tensor | None:
    """Return the sum of some terms with factors of their own; None where none of them acts."""
    total: Tensor | None = None
    for label, factor in factors.items():
        part = parts.get(label)
        if part is not None and part.active:
            weighted = part.reduced if factor == 1 else factor * part.reduced
            total = weighted if total is None else total + weighted
    return total


class Validation(Problem):
    """The validation objective as a problem: the model in evaluation mode, nothing recorded."""

    def _evaluate(self, *args: Any, **kwargs: Any) -> Tensor:
        before = self.model.training, self.objective.training
        self.model.eval()
        self.objective.eval()
        try:
            return super()._evaluate(*args, **kwargs)
        finally:
            self.model.train(before[0])
            self.objective.train(before[1])
