"""An objective split at the model's outputs ("targets"): what a surrogate in the space of the outputs is made of.

    h(theta) = l(f(theta)) + r(theta)        z = f(theta_t),  G = n dl/dz   (n rows; the gradient of a row's own loss)

`ProblemSplit` splits a problem of Poise: the terms that read the output are `l`, all others are `r`. `OracleProblem` is a model on an
input together with a function that says `G`: an expert, a simulator, an adversary. Both keep data, dropout masks and batch statistics
fixed, so that `f` is a function of the parameters alone, and neither calls the oracle more often than it is asked to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from poise import processes
from poise.errors import IncompatibleError, InputError
from poise.problem import OWN, Problem, Step, _add
from poise.quantities import Quantities, derive, describe, random_numbers
from poise.structure import PLAIN_READOUTS

__all__ = ["Linearisation", "OracleProblem", "ProblemSplit", "Split", "TargetGrad", "TargetLoss"]

TargetGrad = Callable[[Tensor, Mapping[str, Any]], Tensor]
"""`(z, batch) -> G`, of the outputs' shape: the derivative of every row's own loss in its output."""
TargetLoss = Callable[[Tensor, Mapping[str, Any]], Tensor]
"""`(z, batch) -> loss`, 0-dim and a mean over rows, or one value a row."""


@dataclass
class Linearisation:
    """What one call of the oracle gives.

    Attributes:
        value: `l(z)`, NaN where an oracle says no loss.
        others: `r` there.
        z, g: outputs and rows' gradients, one tensor a micro-batch; no gradient reaches them.
        gradient: of `h` by parameter, which is that of the surrogate too.
        rows: `n`.
    """

    value: float
    others: float
    z: list[Tensor]
    g: list[Tensor]
    gradient: list[Tensor]
    rows: int

    @property
    def norm(self) -> float:
        """Euclidean norm of the gradient."""
        squares = [g.double().square().sum() for g in self.gradient]
        return float(torch.stack(squares).sum().sqrt())


def linear_layer(model: nn.Module) -> nn.Linear | None:
    """Return the one linear layer of which a model consists, flattening of its input aside; else None."""
    layers = list(model) if isinstance(model, nn.Sequential) else [model]
    plain = all(type(layer) is nn.Flatten for layer in layers[:-1])
    last = layers[-1] if layers else None
    return last if plain and type(last) is nn.Linear else None


def _design(layer: nn.Linear, x: Any) -> Tensor | None:
    if not isinstance(x, Tensor) or x.ndim < 2 or x.dtype != layer.weight.dtype:
        return None
    x = x.flatten(1) if x.ndim > 2 else x
    if x.shape[1] != layer.in_features or not layer.weight.requires_grad:
        return None
    bias: Tensor | None = layer.bias
    if bias is not None and not bias.requires_grad:
        return None
    design: Tensor = x if bias is None else torch.cat([x, x.new_ones(len(x), 1)], 1)
    return design


class _Watched:
    """A readout that keeps the quantities that it offered, so that the outputs of an evaluation can be had."""

    def __init__(self, readout: Any) -> None:
        self._readout, self.kept = readout, []  # type: ignore[var-annotated]

    def __call__(self, model: Any, batch: Quantities, reads: frozenset[str]) -> Quantities:
        quantities: Quantities = self._readout(model, batch, reads)
        self.kept.append(quantities)
        return quantities

    def __getattr__(self, name: str) -> Any:
        return getattr(self._readout, name)


class ProblemSplit:
    """A problem of Poise, split at the readout's output.

    Args:
        problem: one step.
        target_grad: says `G` in place of the terms that read the output; they are still evaluated, for reports.
        target_loss: the value that belongs to it.

    Raises:
        IncompatibleError: no term reads the output, one reads the parameters beside it, or the objective has parameters of its own.
    """

    def __init__(
        self, problem: Problem, target_grad: TargetGrad | None = None, target_loss: TargetLoss | None = None
    ) -> None:
        self.problem, self.target_grad, self.target_loss = problem, target_grad, target_loss
        self.output = problem._output
        self.parameters = problem.parameters
        self.report = problem.step
        self._check()

    def _check(self) -> None:
        own = [name for name in self.parameters if name.startswith(OWN)]
        if own:
            raise IncompatibleError(
                f"target_surrogate trains the model's parameters, and the objective has its own: {', '.join(own[:5])}. Use 'adamw'."
            )
        if not self.parameters:
            raise InputError("target_surrogate: nothing is trained: no parameter of the model requires a gradient.")
        if processes.size() > 1:
            raise IncompatibleError(
                "target_surrogate runs its inner steps in one process. Use one process, or 'adamw'."
            )
        if not self.readers:
            raise IncompatibleError(
                f"target_surrogate needs a term that reads the model's output {self.output!r}, and none of "
                f"{', '.join(self.problem.objective.labels)} does, so there is nothing to make a surrogate of. Use 'adamw'."
            )
        for entry in self.problem.objective._entries:
            beside = sorted({"parameters", "model"} & {r.name for r in entry.forward_reads})
            if entry.label in self.readers and beside:
                raise IncompatibleError(
                    f"target_surrogate: {entry.label!r} reads {beside[0]!r} beside the output, so its gradient does not pass the outputs "
                    "alone. Use 'adamw', or write it as two terms."
                )
        if self.target_grad is not None and len(self.problem.batches) > 1:
            raise IncompatibleError("target_surrogate asks target_grad about one batch at a time: use accumulate=1.")

    @cached_property
    def readers(self) -> tuple[str, ...]:
        """Labels of the terms that read the output."""
        entries = self.problem.objective._entries
        return tuple(e.label for e in entries if any(r.name == self.output for r in e.forward_reads))

    @cached_property
    def beside(self) -> tuple[str, ...]:
        """Labels of the terms that do not, and act."""
        return tuple(
            e.label for e in self.problem.objective._entries if e.label not in self.readers and not e.auxiliary
        )

    @property
    def heaviest(self) -> float:
        """By how much the heaviest row counts for more than the mean row: 1 where the data bring no `sample_weight`."""
        weights = [batch[self._main].get("sample_weight") for batch in self.problem.batches]
        if any(w is None for w in weights):
            return 1.0
        every = torch.cat([w.double().flatten() for w in weights if w is not None])
        return float(every.max() / every.mean())

    def begin(self) -> Linearisation:
        """Ask the oracle where the parameters are."""
        problem, points = self.problem, list(self.parameters.values())
        watched, before = self._watch()
        made = Linearisation(0.0, 0.0, [], [], [], 0)
        gradient: list[Tensor | None] = [None] * len(points)

        def take(total: Tensor, parts: Mapping[str, Any]) -> None:
            z = watched.kept[-1][self.output]
            if not z.requires_grad:
                raise IncompatibleError("target_surrogate: the model's output does not depend on what is trained.")
            loss, rest = total, None
            if self.beside:
                loss = problem.objective._total({n: p for n, p in parts.items() if n in self.readers})
                rest = problem.objective._total({n: p for n, p in parts.items() if n in self.beside})
                made.others += float(rest.detach())
            if rest is None and self.target_grad is None and loss.requires_grad:
                share, found = _through(z, loss, points)
            else:
                share = self._share(z, loss, number=len(made.z))
                roots, seeds = [z], [share]
                if rest is not None and rest.requires_grad:
                    roots, seeds = [z, rest], [share, torch.ones_like(rest)]
                found = torch.autograd.grad(roots, points, seeds, allow_unused=True)
            _add(gradient, found)
            made.value += float(loss.detach())
            made.z.append(z.detach())
            made.g.append(share)

        try:
            with torch.enable_grad():
                problem._evaluate(None, None, take)
        finally:
            problem.readout = before
        made.gradient = [torch.zeros_like(p) if g is None else g for p, g in zip(points, gradient, strict=True)]
        made.rows = sum(self._rows(z) for z in made.z)
        made.g = [made.rows * g for g in made.g]
        if self.target_grad is not None:
            made.value = float("nan") if self.target_loss is None else self.target_value(made.z)
        return made

    def _watch(self) -> tuple[_Watched, Any]:
        """Put a watch on the main stream's readout; return it, and what stood there."""
        before = self.problem.readout
        if not isinstance(before, Mapping):
            watched = _Watched(before)
            if len(self.problem.batches[0]) == 1:
                self.problem.readout = watched
                return watched, before
            before_by_stream: Mapping[str, Any] = dict.fromkeys(self.problem.batches[0], before)
        else:
            before_by_stream = before
        name = self._main
        watched = _Watched(before_by_stream[name])
        self.problem.readout = {**before_by_stream, name: watched}
        return watched, before

    @property
    def _main(self) -> str:
        batch = self.problem.batches[0]
        return "main" if "main" in batch else next(iter(batch))

    def _share(self, z: Tensor, loss: Tensor, number: int) -> Tensor:
        """Return `dl/dz`, of the mean."""
        if self.target_grad is not None:
            given = self.target_grad(z.detach(), self.problem.batches[number][self._main])
            return checked_gradient(given, z) / self._rows(z)
        if not loss.requires_grad:
            return torch.zeros_like(z)
        (found,) = torch.autograd.grad(loss, z, retain_graph=True, allow_unused=True)
        return torch.zeros_like(z) if found is None else found.detach()

    def _rows(self, z: Tensor) -> int:
        return z.numel() // z.shape[-1] if self.output == "logits" else len(z)

    def outputs(self) -> list[Tensor]:
        """Return `f(theta)` where the parameters are, with its graph where gradients are enabled."""
        return self.problem.outputs()

    def others(self) -> Tensor | None:
        """Return `r(theta)`, or None where there is none."""
        return self.problem._evaluate(None, self.beside) if self.beside else None

    def target_value(self, z: list[Tensor]) -> float:
        """Return `l(z)`."""
        if self.target_loss is not None:
            return float(_mean(self.target_loss(z[0], self.problem.batches[0][self._main])))
        if self.target_grad is not None:
            raise no_loss()
        with torch.no_grad():
            return float(self.problem.loss_of(z))

    def target_hessian(self, z: list[Tensor]) -> list[Tensor]:
        """Return the second derivative of every row's loss in its output, `[rows, width, width]` a micro-batch."""
        rows = sum(self._rows(part) for part in z)
        if self.target_loss is not None:
            loss, batch = self.target_loss, self.problem.batches[0][self._main]
            return blocks(lambda leaves: _mean(loss(leaves[0], batch)), z, [self._rows(part) for part in z], rows)
        if self.target_grad is not None:
            raise no_loss()
        return blocks(self.problem.loss_of, z, [self._rows(part) for part in z], rows)

    def design(self) -> Tensor | None:
        """Return `X` where `f = X theta`: one linear layer's inputs, a column of ones for its bias; else None."""
        problem, layer = self.problem, linear_layer(self.problem.model)
        if layer is None or len(problem.batches) != 1 or len(problem.batches[0]) != 1:
            return None
        if f"{type(problem.readout).__module__}.{type(problem.readout).__name__}" not in PLAIN_READOUTS:
            return None
        x = problem.batches[0][self._main].get("input")
        return _design(layer, x.to(layer.weight.device) if isinstance(x, Tensor) else x)

    def damping(self) -> Tensor | None:
        """Return the diagonal of `r`'s Hessian as `[outputs, width of X]`; None where there is no `r`."""
        if not self.beside:
            return None
        terms = self.problem.objective.terms
        for label in self.beside:
            if getattr(terms[label], "formula", "") != "l2":
                raise IncompatibleError(
                    f"target_surrogate: inner='exact' has a closed form beside 'l2' alone, and the objective charges {label!r} too. "
                    "Use inner='lbfgs'."
                )
        # `1/2 sum w^2` has the gradient `w`: at ones it says who is charged, and how much.
        ones = {name: torch.ones_like(p) for name, p in self.parameters.items()}
        found = self.problem.gradient(at=ones, terms=list(self.beside))
        return as_columns([found.get(n, torch.zeros_like(p)) for n, p in self.parameters.items()])

    def replay(self) -> list[Mapping[str, Any]]:
        """Return the rows of this step as another step can take them back."""
        return [batch[self._main] for batch in self.problem.batches]

    def outputs_of(self, rows: Mapping[str, Any]) -> Tensor:
        """Return the outputs for replayed rows."""
        problem = self.problem
        again = Problem(
            problem.model, problem.objective, [{self._main: rows}], problem.readout, key=(*problem.key[:1], problem.key[1] + (1 << 40)),
            device=problem.device, autocast=problem.autocast, record=False, named=problem.named,
        )  # fmt: skip
        again.step.evaluations = 1  # so that batch statistics move in copies
        return again.outputs()[0]


class OracleProblem:
    """A model on an input, and an oracle that says how every output should move.

    Args:
        model: any module; `model(input)` are the outputs, `[rows, ...]`.
        input: what the model is given.
        target_grad: `(z, batch) -> G`, of the outputs' shape: the derivative of every row's loss in its output. It need not be
            differentiable, and is called once a step.
        batch: what the oracle is told beside the outputs.
        target_loss: the loss, where it is known; rules that search for a step need it.
        target_hessian: `(z, batch) -> [rows, width, width]`, for the Newton divergence; else `target_loss` is differentiated.
        regulariser: `() -> 0-dim`, charged on the parameters beside the oracle's loss.
        seed: of dropout masks; they stay the same within a step.

    Every solver of the library takes it where it takes a problem: `TorchOptimizer("adam").step(OracleProblem(...))`.

    >>> model = nn.Linear(2, 1)
    >>> problem = OracleProblem(model, torch.ones(3, 2), lambda z, batch: z - 1)
    >>> sorted(problem.gradient())
    ['bias', 'weight']
    """

    def __init__(
        self,
        model: nn.Module,
        input: Any,
        target_grad: TargetGrad,
        batch: Mapping[str, Any] | None = None,
        *,
        target_loss: TargetLoss | None = None,
        target_hessian: TargetLoss | None = None,
        regulariser: Callable[[], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.input = model, input
        self.target_grad, self.target_loss, self.hessian = target_grad, target_loss, target_hessian
        self.batch: Mapping[str, Any] = {"input": input} if batch is None else batch
        self.regulariser, self.seed = regulariser, seed
        self.parameters: dict[str, nn.Parameter] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise InputError("target_surrogate: nothing is trained: no parameter of the model requires a gradient.")
        self.report = self.step = Step(torch.zeros(()), evaluations=0)
        self.latest_value = self.step.value
        self.calls = 0

    def fresh(self) -> OracleProblem:
        """Return the same once more, with nothing evaluated yet."""
        return OracleProblem(
            self.model, self.input, self.target_grad, self.batch, target_loss=self.target_loss, target_hessian=self.hessian,
            regulariser=self.regulariser, seed=self.seed,
        )  # fmt: skip

    def _run(self, input: Any) -> Tensor:
        with random_numbers(derive(self.seed, "target")):
            buffers = {n: b.clone() for n, b in self.model.named_buffers()} if self.step.evaluations else {}
            out = torch.func.functional_call(self.model, buffers, (input,)) if buffers else self.model(input)
        if not isinstance(out, Tensor) or out.ndim < 1:
            raise IncompatibleError(f"The model must return a tensor [rows, ...], and it returned {describe(out)}.")
        return out

    def begin(self) -> Linearisation:
        """Ask the oracle where the parameters are."""
        with torch.enable_grad():
            z = self._run(self.input)
            if not z.requires_grad:
                raise IncompatibleError("target_surrogate: the model's output does not depend on what is trained.")
            rest = self.others()
            rows, kept = len(z), z.detach()
            g = checked_gradient(self.target_grad(kept, self.batch), z)
            self.calls += 1
            roots, seeds = [z], [g / rows]
            if rest is not None and rest.requires_grad:
                roots, seeds = [z, rest], [g / rows, torch.ones_like(rest)]
            found = torch.autograd.grad(roots, list(self.parameters.values()), seeds, allow_unused=True)
        gradient = [
            torch.zeros_like(p) if f is None else f for p, f in zip(self.parameters.values(), found, strict=True)
        ]
        value = float("nan") if self.target_loss is None else self.target_value([kept])
        others = 0.0 if rest is None else float(rest.detach())
        if not self.step.evaluations:
            # Without a loss there is no value to report; 0 says nothing, and NaN would stop a run.
            self.step.value = torch.as_tensor((0.0 if self.target_loss is None else value) + others)
        self.step.evaluations += 1
        return Linearisation(value, others, [kept], [g], gradient, rows)

    def gradient(self) -> dict[str, Tensor]:
        """Return the gradient by parameter name: one call of the oracle."""
        begun = self.begin()
        self.latest_value = self.step.value
        return dict(zip(self.parameters, begun.gradient, strict=True))

    def value(self) -> Tensor:
        """Return loss and regulariser where the parameters are; the oracle is not asked."""
        with torch.no_grad():
            rest = self.others()
            found = torch.as_tensor(self.target_value(self.outputs()) + (0.0 if rest is None else float(rest)))
        self.step.evaluations += 1
        return found

    def outputs(self) -> list[Tensor]:
        """Return `f(theta)` where the parameters are, with its graph where gradients are enabled."""
        return [self._run(self.input)]

    def others(self) -> Tensor | None:
        """Return `r(theta)`, or None where there is none."""
        return None if self.regulariser is None else self.regulariser()

    def target_value(self, z: list[Tensor]) -> float:
        """Return `l(z)`."""
        if self.target_loss is None:
            raise no_loss()
        with torch.no_grad():
            return float(_mean(self.target_loss(z[0], self.batch)))

    def target_hessian(self, z: list[Tensor]) -> list[Tensor]:
        """Return the second derivative of every row's loss in its output, `[rows, width, width]` a micro-batch."""
        if self.hessian is not None:
            return [self.hessian(z[0], self.batch)]
        if self.target_loss is None:
            raise no_loss()
        loss = self.target_loss
        return blocks(lambda leaves: _mean(loss(leaves[0], self.batch)), z, [len(z[0])], len(z[0]))

    def design(self) -> Tensor | None:
        """Return `X` where `f = X theta`: one linear layer's inputs, a column of ones for its bias; else None."""
        layer = linear_layer(self.model)
        return None if layer is None else _design(layer, self.input)

    def damping(self) -> Tensor | None:
        """Return the diagonal of `r`'s Hessian as `[outputs, width of X]`; None where there is no `r`."""
        if self.regulariser is None:
            return None
        raise IncompatibleError(
            "target_surrogate: inner='exact' has no closed form beside a regulariser that it does not know. Use inner='lbfgs'."
        )

    def replay(self) -> list[Mapping[str, Any]]:
        """Return the rows of this step as another step can take them back."""
        return [{"input": self.input}]

    def outputs_of(self, rows: Mapping[str, Any]) -> Tensor:
        """Return the outputs for replayed rows."""
        return self._run(rows["input"])


def _through(z: Tensor, loss: Tensor, points: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor | None]]:
    """Return the gradients in the outputs and in the parameters, where all of the loss passes the outputs: one backward pass."""
    seen: list[Tensor] = []
    handle = z.register_hook(seen.append)  # type: ignore[no-untyped-call]
    found = torch.autograd.grad(loss, points, allow_unused=True)
    handle.remove()
    return (seen[0].detach() if seen else torch.zeros_like(z)), found


Split = ProblemSplit | OracleProblem
"""What a surrogate is made of."""


def checked_gradient(given: Any, z: Tensor) -> Tensor:
    """Return what an oracle answered, where it has the form of the outputs.

    Raises:
        InputError: it has another form, or is not finite.
    """
    if not isinstance(given, Tensor) or given.shape != z.shape:
        raise InputError(
            f"target_grad must return one number for each output, float {list(z.shape)}, and it returned {describe(given)}. Return the "
            "derivative of every row's own loss, not of their mean."
        )
    if not bool(torch.isfinite(given).all()):
        raise InputError(
            "target_grad returned infinite or NaN entries; return 0 for rows about which nothing is known."
        )
    return given.detach().to(z)


def no_loss() -> IncompatibleError:
    return IncompatibleError(
        "target_surrogate: this choice needs the loss in the outputs, and the oracle says gradients alone. Give target_loss=..., or use a "
        "fixed eta with divergence='euclidean'."
    )


def _mean(loss: Tensor) -> Tensor:
    return loss.mean() if loss.ndim else loss


def blocks(loss: Callable[[list[Tensor]], Tensor], z: list[Tensor], sizes: list[int], rows: int) -> list[Tensor]:
    """Return the second derivative of `rows * loss` in every row's output, `[rows, width, width]` a part.

    Raises:
        InputError: the outputs are too wide for dense blocks.
    """
    width = z[0].numel() // sizes[0]
    if width > 256:
        raise InputError(
            f"target_surrogate: divergence='newton' keeps width x width numbers a row, and the outputs are {width} wide; 256 is the most. "
            "Use 'euclidean'."
        )
    leaves = [part.detach().requires_grad_() for part in z]
    with torch.enable_grad():
        firsts = torch.autograd.grad(rows * loss(leaves), leaves, create_graph=True)
        found: list[list[Tensor]] = [[] for _ in leaves]
        for c in range(width):
            curved = [f.reshape(n, width)[:, c].sum() for f, n in zip(firsts, sizes, strict=True)]
            for i, (value, leaf) in enumerate(zip(curved, leaves, strict=True)):
                second = (
                    torch.autograd.grad(value, leaf, retain_graph=True, allow_unused=True)[0]
                    if value.requires_grad
                    else None
                )
                found[i].append(torch.zeros_like(leaf) if second is None else second)
    return [
        torch.stack([s.reshape(n, width) for s in parts], 1).detach() for parts, n in zip(found, sizes, strict=True)
    ]


def as_columns(parts: Sequence[Tensor]) -> Tensor:
    """Return a linear layer's weight `[outputs, inputs]` and bias `[outputs]` as one matrix, the bias as last column."""
    return parts[0] if len(parts) == 1 else torch.cat([parts[0], parts[1][:, None]], 1)


def as_parts(columns: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return what `as_columns` joined."""
    return [columns] if len(like) == 1 else [columns[:, :-1], columns[:, -1]]
