"""One expensive gradient in the space of the outputs, many cheap steps of the parameters: target-based surrogates (SSO).

    z = f(theta_t),  G_i = dl_i/dz_i                                   one call of the oracle
    g_t(theta) = l(z) + 1/n sum_i <G_i, f_i(theta) - z_i> + 1/(eta n) D(f(theta), z) + r(theta)
    theta_{t+1} = `inner_steps` steps on g_t                           none

`z` and `G` are constants. `D` is half the squared distance (or another divergence), so `g_t` is least squares to the targets
`z - eta G`. Its first gradient is that of the objective; for `eta <= 1/L`, `L` the smoothness of a row's loss in its output, it lies
above the objective everywhere, so steps that lower it lower the objective, whatever the model is.

    poise.fit(model, "cross_entropy + 0.01*l2", data, solver=TargetSurrogate(inner_steps=20))
    TargetSurrogate(eta=1.0).step(OracleProblem(policy, states, expert))           an oracle of the user's own

Source: arXiv:2302.02607.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from poise.coefficient import value_of
from poise.errors import IncompatibleError, InputError, PoiseWarning, nearest
from poise.objective import Objective
from poise.problem import Certificate, Problem, Step
from poise.quantities import derive
from poise.solvers.inner_solvers import GradientDescent, InnerLBFGS, inner_solver
from poise.solvers.target_divergence import DIVERGENCES, KL, Divergence, Eta, Euclidean, Newton, Softmax, divergence_at
from poise.solvers.target_eta import TargetStep
from poise.solvers.target_split import (
    Linearisation,
    OracleProblem,
    ProblemSplit,
    Split,
    TargetGrad,
    TargetLoss,
    as_columns,
    as_parts,
)

__all__ = ["SMOOTHNESS", "OracleProblem", "OuterStep", "Surrogate", "TargetSurrogate", "smoothness_of"]

SMOOTHNESS: Mapping[str, float] = {
    "squared_error": 1.0, "least_squares": 1.0, "huber": 1.0, "cross_entropy": 0.5, "label_smoothing": 0.5,
}  # fmt: skip
"""`L` of a row's loss in its output. A logistic loss of one margin has 1/4."""


@dataclass(frozen=True)
class OuterStep:
    """One outer step.

    Attributes:
        value: the objective where the oracle was asked; NaN where an oracle says no loss.
        surrogate: the surrogate at the end of the inner steps; NaN where nobody looked (`check=True` looks).
        reached: the objective there; NaN without `check`.
        eta: step in the space of outputs; NaN where every output had its own.
        gradient_norm: of the objective, before; NaN where nobody needed it.
        inner_steps, forwards, backwards: cheap steps, and passes of the model that they took beside the oracle's own.
        oracle_calls: of the whole run so far.
    """

    value: float
    surrogate: float
    reached: float
    eta: float
    gradient_norm: float
    inner_steps: int
    forwards: int
    backwards: int
    oracle_calls: int

    @property
    def surrogate_drop(self) -> float:
        """By how much the inner steps lowered the surrogate."""
        return self.value - self.surrogate

    @property
    def bounded(self) -> bool | None:
        """Whether the surrogate lay above the objective at the end; None where nobody looked."""
        if math.isnan(self.reached) or math.isnan(self.surrogate):
            return None
        return self.reached <= self.surrogate + 1e-6 * max(1.0, abs(self.surrogate))


class Surrogate:
    """`g_t` as a function of the parameters where they are.

    Args:
        split: the model.
        at: what the oracle said.
        eta, linear: step and linear term in the space of outputs.
        divergence: from `at.z`.
        anchor: what more is charged, 0-dim; it must be 0 with gradient 0 at the start.
    """

    def __init__(
        self,
        split: Split,
        at: Linearisation,
        eta: Eta,
        linear: list[Tensor],
        divergence: Divergence,
        anchor: Callable[[], Tensor] | None = None,
    ) -> None:
        self.split, self.at, self.eta, self.linear = split, at, eta, linear
        self.divergence, self.anchor = divergence, anchor
        self.parameters = list(split.parameters.values())
        # An oracle without a loss has a surrogate up to a constant.
        self.base = 0.0 if math.isnan(at.value) else at.value
        self.start_value = self.base + at.others
        self.forwards = self.backwards = 0
        self._graph: Tensor | None = None

    def start_gradient(self) -> list[Tensor]:
        """Return the gradient at the start: the objective's, which is known, unless the linear term is another."""
        if self.linear is self.at.g:
            return self.at.gradient
        self.evaluate()
        return self.gradient()

    def evaluate(self) -> float:
        """Return `g_t` where the parameters are; one forward pass."""
        with torch.enable_grad():
            self._graph = self(self.split.outputs())
        self.forwards += 1
        return float(self._graph.detach())

    def __call__(self, f: list[Tensor]) -> Tensor:
        """Return the value at outputs `f`, 0-dim with its graph; what is charged beside them is taken where the parameters are."""
        inner = self.divergence.value(f, self.eta)
        for a, z, g in zip(f, self.at.z, self.linear, strict=True):
            inner = inner + (g * (a - z)).sum()
        total = self.base + inner / self.at.rows
        rest = self.split.others()
        if rest is not None:
            total = total + rest
        return total if self.anchor is None else total + self.anchor()

    def gradient(self) -> list[Tensor]:
        """Return the gradient of the evaluation before; one backward pass."""
        assert self._graph is not None
        found = torch.autograd.grad(self._graph, self.parameters, allow_unused=True)
        self._graph = None
        self.backwards += 1
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)]

    def solve(self) -> None:
        raise IncompatibleError(
            "target_surrogate: inner='exact' is the closed form of one linear layer on a plain readout, and this model is another one. Use "
            "inner='lbfgs'."
        )


class LinearSurrogate(Surrogate):
    """`g_t` of one linear layer, on the Gram matrix of its inputs: a step costs O(width^2 outputs) whatever the number of rows.

    With `W` `[outputs, width]` and `S = 1/n G'X`:  g_t = l + <S, W - W_t> + 1/(2 eta n) tr((W - W_t) X'X (W - W_t)') + r(W).
    """

    def __init__(
        self, design: Design, split: Split, at: Linearisation, eta: Eta, linear: list[Tensor], divergence: Divergence
    ) -> None:
        super().__init__(split, at, eta, linear, divergence)
        assert isinstance(eta, float)
        self.design, self.step = design, eta
        self.start = as_columns([p.detach() for p in self.parameters]).clone()
        self.slope = linear[0].reshape(at.rows, -1).T @ design.x / at.rows
        self._at: tuple[Tensor, Tensor | None] | None = None

    def evaluate(self) -> float:
        moved = as_columns([p.detach() for p in self.parameters]) - self.start
        curved = moved @ self.design.gram / (self.step * self.at.rows)
        with torch.enable_grad():
            rest = self.split.others()
        self._at = self.slope + curved, rest
        value = self.base + float((moved * (self.slope + curved / 2)).sum())
        return value if rest is None else value + float(rest.detach())

    def gradient(self) -> list[Tensor]:
        assert self._at is not None
        columns, rest = self._at
        parts = as_parts(columns, self.parameters)
        if rest is None or not rest.requires_grad:
            return [part.contiguous() for part in parts]
        found = torch.autograd.grad(rest, self.parameters, allow_unused=True)
        return [part.clone() if g is None else part + g for part, g in zip(parts, found, strict=True)]


class Design:
    """The inputs `X` of a linear layer, with what is made of them once: Gram matrix and singular value decomposition."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self._gram: Tensor | None = None
        self._svd: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def known(self) -> bool:
        """Whether the Gram matrix is there already."""
        return self._gram is not None

    @property
    def gram(self) -> Tensor:
        """`X'X`."""
        if self._gram is None:
            self._gram = self.x.T @ self.x
        return self._gram

    def least_squares(self, target: Tensor) -> Tensor:
        """Return `X^+ target`, of least norm where `X` has not full rank."""
        if self._svd is None:
            u, s, v = torch.linalg.svd(self.x, full_matrices=False)
            kept = s > max(self.x.shape) * torch.finfo(s.dtype).eps * s.max()
            self._svd = u[:, kept], s[kept], v[kept]
        u, s, v = self._svd
        return v.T @ ((u.T @ target) / s[:, None])


class ExactSurrogate(Surrogate):
    """`g_t` of one linear layer, minimised in closed form: `theta - eta X^+ G` for the squared distance, without `r`."""

    def __init__(self, design: Design, *args: Any) -> None:
        super().__init__(*args)
        self.design = design

    def solve(self) -> None:
        x, n = self.design.x, self.at.rows
        g = self.linear[0].reshape(n, -1)
        start = as_columns([p.detach() for p in self.parameters])
        diagonal = self.split.damping()
        if isinstance(self.divergence, Euclidean) and isinstance(self.eta, float):
            if diagonal is None:
                moved = -self.eta * self.design.least_squares(g).T
            else:
                moved = self._damped(g, start, diagonal)
        elif isinstance(self.divergence, Newton) and isinstance(self.eta, float):
            moved = self._weighted(x, g, start, diagonal, self.divergence.h[0] / self.eta)
        else:
            raise IncompatibleError(
                f"target_surrogate: inner='exact' has a closed form for the euclidean and the newton divergence with one eta, and the "
                f"divergence is {self.divergence.name!r}. Use inner='lbfgs'."
            )
        with torch.no_grad():
            for p, part in zip(self.parameters, as_parts(start + moved, self.parameters), strict=True):
                p.copy_(part)

    def _damped(self, g: Tensor, start: Tensor, diagonal: Tensor) -> Tensor:
        """`(X'X / (eta n) + D_c) d_c = -(X'G_c / n + D_c w_c)` for every output `c`."""
        n, eta = self.at.rows, self.eta
        assert isinstance(eta, float)
        right = -(g.T @ self.design.x / n + diagonal * start)
        systems = self.design.gram / (eta * n) + torch.diag_embed(diagonal)
        return torch.stack([_semidefinite(a, b) for a, b in zip(systems, right, strict=True)])

    def _weighted(self, x: Tensor, g: Tensor, start: Tensor, diagonal: Tensor | None, h: Tensor) -> Tensor:
        """`(1/n sum_i h_i (x) x_i x_i' + D) d = -(1/n sum_i G_i (x) x_i + D w)`: one step of iteratively reweighted least squares."""
        (n, d), classes = x.shape, g.shape[1]
        if classes * d > 5000:
            raise InputError(
                f"target_surrogate: inner='exact' with divergence='newton' solves {classes} x {d} equations, and 5,000 is the most. Use "
                "inner='lbfgs'."
            )
        right = -(g.T @ x) / n
        matrix = x.new_zeros(classes, d, classes, d)
        for a in range(classes):
            for b in range(classes):
                matrix[a, :, b] = x.T @ (x * h[:, a, b, None]) / n
        whole = matrix.reshape(classes * d, classes * d)
        if diagonal is not None:
            right = right - diagonal * start
            whole.diagonal().add_(diagonal.flatten())
        return _semidefinite(whole, right.flatten()).view(classes, d)


def _semidefinite(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve a symmetric positive semidefinite system; of least norm where it is singular."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not int(failed):
        diagonal = factor.diagonal()
        if float(diagonal.min()) > 1e2 * math.sqrt(torch.finfo(matrix.dtype).eps) * float(diagonal.max()):
            solved: Tensor = torch.cholesky_solve(right[:, None], factor)[:, 0]
            return solved
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > len(values) * torch.finfo(values.dtype).eps * values.max()
    least: Tensor = vectors[:, kept] @ ((vectors[:, kept].T @ right) / values[kept])
    return least


class TargetSurrogate:
    """Minimise surrogates in the space of the model's outputs, one call of the oracle each.

    Args:
        inner_steps: `m`, cheap steps on every surrogate. One is plain descent.
        eta: step in the space of outputs, in units of a row's own loss: a number, "armijo", "constant", "stochastic" (eta0/sqrt(t)),
            "exponential", "adagrad_norm", "adagrad", "adam", or a function of the step (from 1).
        eta0: the first step of a rule.
        total_steps: of the run, for "exponential".
        divergence: "euclidean", "newton" (the loss's Hessian in the outputs), "kl" (outputs are distributions), "softmax" (logits), or
            a function `(f, z) -> one value a row`.
        inner: "gd" (searched steps), "lbfgs", "exact" (one linear layer), the name or class of an optimiser, or a function
            `parameters -> optimiser`.
        inner_lr, inner_options: its step and further options.
        reset: begin every surrogate with a new inner state.
        smoothness: `L` of a row's loss; known for squared and cross-entropy losses.
        monotone: insist on `eta <= 1/L`, so that the surrogate lies above the objective.
        check: look at surrogate and objective after the inner steps (a forward pass more), and warn where the former is lower.
        anchor: weight of staying where the outputs were on `replay` rows of the past, >= 0; against forgetting on small batches.
        replay: rows that are kept for it.
        gram: run the inner steps of a linear layer on its Gram matrix: "auto" (where that costs less), True or False.
        target_grad, target_loss: an oracle in place of the terms that read the output: `(z, batch) -> G`, and its loss.
        tol: gradient norm at which inner steps end.
        c, backtrack, growth: of the search for eta.
        lr: the same as eta0, under the name by which a study gives every solver its step size.

    Attributes:
        oracle_calls, oracle_rows: gradients in the outputs that were asked for.
        value_calls: losses in the outputs, of the searches.
        cheap_steps, forwards, backwards: inner steps and the passes that they took.
        trace: the last 1,000 outer steps as `OuterStep`.

    Raises:
        InputError: an argument is out of range.

    >>> TargetSurrogate(inner_steps=20, eta=2.0)
    target_surrogate(inner_steps=20, eta=2.0, divergence='euclidean', inner='gd')

    Source:
        arXiv:2302.02607, algorithms 1 and 2. Their code leaves the factor 1/2 out, so that its step is half the nominal one, and calls
        1/eta `eta`. Chosen here: the inner step goes on from one surrogate to the next unless `reset`.
    """

    name = "target_surrogate"

    def __init__(
        self,
        inner_steps: int = 10,
        eta: float | str | Callable[[int], float] = "armijo",
        eta0: float = 1.0,
        total_steps: int | None = None,
        divergence: str | Callable[[Tensor, Tensor], Tensor] = "euclidean",
        inner: Any = "gd",
        inner_lr: float | None = None,
        inner_options: Mapping[str, Any] | None = None,
        reset: bool = False,
        smoothness: float | None = None,
        monotone: bool = False,
        check: bool = False,
        anchor: float = 0.0,
        replay: int = 1024,
        gram: str | bool = "auto",
        target_grad: TargetGrad | None = None,
        target_loss: TargetLoss | None = None,
        tol: float = 1e-6,
        c: float = 0.5,
        backtrack: float = 0.9,
        growth: float = 1.8,
        lr: float | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            known = [n for n in inspect.signature(type(self)).parameters if n != "unknown"]
            option = next(iter(unknown))
            raise InputError(
                f"target_surrogate has no option {option!r}."
                + (nearest(option, known) or f" It has: {', '.join(known)}.")
            )
        if inner_steps < 1 or replay < 1:
            raise InputError(
                f"target_surrogate: inner_steps and replay must be at least 1; they are {inner_steps} and {replay}."
            )
        if isinstance(divergence, str) and divergence not in DIVERGENCES:
            divergence_at(divergence, [], None)  # type: ignore[arg-type]
        if smoothness is not None and not (math.isfinite(smoothness) and smoothness > 0):
            raise InputError(f"target_surrogate: smoothness must be finite and above 0, and it is {smoothness}.")
        if not (math.isfinite(anchor) and anchor >= 0):
            raise InputError(f"target_surrogate: anchor must be finite and at least 0, and it is {anchor}.")
        if gram not in ("auto", True, False):
            raise InputError(f"target_surrogate: gram is 'auto', True or False, and it is {gram!r}.")
        self.inner_steps, self.divergence, self.smoothness = inner_steps, divergence, smoothness
        self.monotone, self.check, self.anchor, self.replay, self.gram = monotone, check, float(anchor), replay, gram
        self.target_grad, self.target_loss, self.tol = target_grad, target_loss, tol
        self.rule = TargetStep(eta, eta0 if lr is None else lr, total_steps, c, backtrack, growth)
        self.inner = inner_solver(inner, inner_lr, inner_options, reset, tol)
        self.exact = isinstance(inner, str) and inner.lower() == "exact"
        self._text = f"inner={inner!r}" if isinstance(inner, str) else "inner=<function>"
        searching = self.rule.rule == "armijo" or monotone
        self.needs = frozenset({"potential"}) if searching and target_grad is None else frozenset()
        self.oracle_calls = self.oracle_rows = self.value_calls = 0
        self.cheap_steps = self.forwards = self.backwards = 0
        self.trace: deque[OuterStep] = deque(maxlen=1000)
        self._memory: dict[str, Tensor] = {}
        self._design: tuple[Any, Design] | None = None
        self._looked = False

    def bind(self, model: nn.Module, objective: Objective) -> None:
        """Take hold of the model's parameters."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            raise InputError("target_surrogate: nothing is trained: no parameter of the model requires a gradient.")
        self.inner.bind(parameters)
        self._looked = False

    # ---- one step ----------------------------------------------------------------------------------------------------

    def step(self, problem: Problem | OracleProblem, accept: Callable[[Step], bool] | None = None) -> Step:
        """Ask the oracle once, and make `inner_steps` steps on its surrogate.

        Raises:
            IncompatibleError: the objective cannot be split at the output, the model's outputs differ when asked twice, or the inner
                solver or the divergence does not fit the model.
            InputError: the oracle's answer has another form than the outputs, or `eta > 1/L` where monotone steps are asked for.
        """
        split = self._split(problem)
        at = split.begin()
        self.oracle_calls += 1
        self.oracle_rows += at.rows
        report = split.report
        if accept is not None and not accept(report):
            report.skipped = True
            return report
        self._take(split, at)
        return report

    def _split(self, problem: Problem | OracleProblem) -> Split:
        if isinstance(problem, OracleProblem):
            return problem
        if problem.has_table or problem._prepared is not None:
            raise IncompatibleError(
                "target_surrogate takes gradients in the outputs, and a policy has weighed gradients of the parameters in this step. Use "
                "'adamw' with a balancer, or weights that go by values."
            )
        split = ProblemSplit(problem, self.target_grad, self.target_loss)
        if isinstance(self.inner, GradientDescent | InnerLBFGS):
            for label in split.beside:
                if "potential" not in problem.objective.terms[label].capabilities:  # type: ignore[operator]
                    raise IncompatibleError(
                        f"target_surrogate searches its inner steps by values, and the gradient of {label!r} is not that of its value. Use "
                        "inner='sgd' or inner='adam'."
                    )
        return split

    def _take(self, split: Split, at: Linearisation, norm: float = math.nan) -> None:
        if not self._looked:
            self._look_twice(split, at)
        divergence = divergence_at(self.divergence, at.z, split)
        if self.monotone:
            self._bound_eta(split)
        eta, linear = self.rule.choose(at, divergence, split, self._index(split))
        self.value_calls += self.rule.trials + (1 if self.rule.trials else 0)
        surrogate = self._surrogate(split, at, eta, linear, divergence)
        run = self.inner.run(surrogate, self.inner_steps)
        self.cheap_steps += run.steps
        ended, reached = self._ends(split, surrogate, run.value)
        self.forwards += surrogate.forwards
        self.backwards += surrogate.backwards
        self.trace.append(
            OuterStep(
                at.value + at.others, ended, reached, eta if isinstance(eta, float) else math.nan, norm, run.steps,
                surrogate.forwards, surrogate.backwards, self.oracle_calls,
            )
        )  # fmt: skip
        if self.anchor:
            self._remember(split)

    def _look_twice(self, split: Split, at: Linearisation) -> None:
        """Compare the outputs with those of another pass at the same parameters."""
        with torch.no_grad():
            again = split.outputs()
        self.forwards += 1
        scale = max(1.0, *(float(z.abs().max()) for z in at.z if z.numel()))
        apart = max(float((a - z).abs().max()) for a, z in zip(again, at.z, strict=True))
        if not apart <= 1e-6 * scale * (1 if at.z[0].dtype == torch.float64 else 10):
            model = split.problem.model if isinstance(split, ProblemSplit) else split.model
            named = [
                n
                for n, layer in model.named_modules()
                if "rop" in type(layer).__name__ or "Norm" in type(layer).__name__
            ]
            raise IncompatibleError(
                f"target_surrogate: the outputs differ by {apart:.2g} between two passes at the same parameters: there is no function for "
                "inner steps to lower. Masks of PyTorch's dropout and batch statistics stay fixed within a step; what moves draws from "
                f"another generator or keeps state that is no buffer{'; look at ' + ', '.join(named[:5]) if named else ''}."
            )
        self._looked = True

    def _bound_eta(self, split: Split) -> None:
        found = self.smoothness
        if found is None and isinstance(split, ProblemSplit) and self.target_grad is None:
            found = smoothness_of(split.problem, split.readers) if self.divergence == "euclidean" else None
            if self.divergence == "softmax":
                found = _relative(split)
        if found is None:
            raise InputError(
                "target_surrogate: monotone=True needs the smoothness of a row's loss in its output, which is known for squared and "
                "cross-entropy losses alone. Say it: smoothness=..."
            )
        most = 1 / (found * (split.heaviest if isinstance(split, ProblemSplit) else 1.0))
        if self.rule.rule == "armijo":
            low, high = self.rule.bounds
            self.rule.bounds = (min(low, most), min(high, most))
        elif self.rule.rule == "constant" and self.rule.eta0 > most * (1 + 1e-9):
            raise InputError(
                f"target_surrogate: monotone=True holds for eta <= 1/L = {most:.4g}, and eta is {self.rule.eta0:.4g}. Lower eta, or leave "
                "monotone out."
            )
        elif self.rule.rule not in ("constant", "armijo"):
            raise InputError("target_surrogate: monotone=True goes with eta='armijo' or a number.")

    def _index(self, split: Split) -> list[Tensor] | None:
        if self.rule.rule not in ("adagrad", "adam"):
            return None
        if isinstance(split, ProblemSplit):
            batches: list[Mapping[str, Any]] = split.replay()
        else:
            batches = [getattr(split, "batch", {})]
        found = [batch.get("index") for batch in batches]
        return None if any(i is None for i in found) else [i for i in found if i is not None]

    def _surrogate(
        self, split: Split, at: Linearisation, eta: Eta, linear: list[Tensor], divergence: Divergence
    ) -> Surrogate:
        anchor = self._anchor_at(split, eta) if self.anchor and self._memory else None
        if self.exact:
            design = self._designed(split)
            if design is None:
                return Surrogate(split, at, eta, linear, divergence)  # whose `solve` refuses
            if anchor is not None:
                raise IncompatibleError("target_surrogate: inner='exact' takes no anchor. Use inner='lbfgs'.")
            return ExactSurrogate(design, split, at, eta, linear, divergence)
        fits = self.gram is not False and anchor is None and isinstance(eta, float) and self.divergence == "euclidean"
        if fits:
            design = self._designed(split)
            if design is not None and self._pays(design, at):
                return LinearSurrogate(design, split, at, eta, linear, divergence)
        return Surrogate(split, at, eta, linear, divergence, anchor)

    def _designed(self, split: Split) -> Design | None:
        """Return the inputs of a linear layer, and what was made of them if they are those of the step before."""
        source = (
            split.problem.batches[0]
            if isinstance(split, ProblemSplit)
            else {"main": {"input": getattr(split, "input", None)}}
        )
        x = next(iter(source.values())).get("input")
        key = (x.data_ptr(), x.shape, x.dtype, x._version) if isinstance(x, Tensor) else None
        if self._design is not None and key is not None and self._design[0][1:] == key:
            return self._design[1]
        found = split.design()
        if found is None:
            return None
        # The inputs themselves are held too: their address cannot be another tensor's then.
        self._design = (x, *key) if key is not None else (x,), Design(found)
        return self._design[1]

    def _pays(self, design: Design, at: Linearisation) -> bool:
        """Whether `inner_steps` on the Gram matrix cost less than on the rows, the making of it included."""
        if self.gram is True:
            return True
        n, d = design.x.shape
        outputs = at.z[0].numel() // at.rows
        made = 0 if design.known else n * d * d
        return d <= 4096 and made + self.inner_steps * d * d * outputs < 3 * self.inner_steps * n * d * outputs

    def _ends(self, split: Split, surrogate: Surrogate, value: float | None) -> tuple[float, float]:
        """Return surrogate and objective after the inner steps, as far as they are known or asked for."""
        if not self.check:
            return math.nan if value is None else value, math.nan
        with torch.no_grad():
            f = split.outputs()
            ended = float(surrogate(f))
            rest = split.others()
            reached = split.target_value(f) + (0.0 if rest is None else float(rest))
        surrogate.forwards += 1
        self.value_calls += 1
        if reached > ended + 1e-6 * max(1.0, abs(ended)):
            warnings.warn(
                f"target_surrogate: the objective is {reached:.6g} where its surrogate is {ended:.6g}, so eta is above 1/L. Lower eta.",
                PoiseWarning,
                stacklevel=4,
            )
        return ended, reached

    # ---- replay ------------------------------------------------------------------------------------------------------

    def _anchor_at(self, split: Split, eta: Eta) -> Callable[[], Tensor]:
        """Charge `anchor / (eta k) D(f, z)` on k rows of the past, with z their outputs where the parameters are now."""
        have = len(next(iter(self._memory.values())))
        generator = torch.Generator().manual_seed(derive(self.rule.t, "replay"))
        chosen = torch.randperm(have, generator=generator)[: max(1, have // 2)]
        rows = {name: v[chosen.to(v.device)] for name, v in self._memory.items()}
        with torch.no_grad():
            z = [split.outputs_of(rows)]
        self.forwards += 1
        kinds: Mapping[Any, Any] = {"kl": KL, "softmax": Softmax}
        divergence: Divergence = kinds.get(self.divergence, Euclidean)(z)
        number = eta if isinstance(eta, float) else self.rule.eta0
        return lambda: self.anchor / len(chosen) * divergence.value([split.outputs_of(rows)], number)

    def _remember(self, split: Split) -> None:
        for rows in split.replay():
            tensors = {n: v.detach() for n, v in rows.items() if isinstance(v, Tensor) and v.ndim}
            if self._memory:
                tensors = {n: torch.cat([self._memory[n], v]) for n, v in tensors.items() if n in self._memory}
            self._memory = {n: v[-self.replay :] for n, v in tensors.items()}

    # ---- one problem -------------------------------------------------------------------------------------------------

    def minimize(
        self, problem: Problem | OracleProblem, tolerance: float = 1e-6, iterations: int = 1000
    ) -> Certificate:
        """Repeat outer steps on one problem until the gradient's norm is within `tolerance`.

        Args:
            tolerance: Euclidean norm of the objective's gradient that is asked for.
            iterations: calls of the oracle at most.
        """
        if not isinstance(problem, OracleProblem):
            problem.reports()
        self.inner.bind(list(self._split(problem).parameters.values()))
        history: list[float] = []
        for done in range(iterations + 1):
            split = self._split(problem.fresh())
            at = split.begin()
            self.oracle_calls += 1
            self.oracle_rows += at.rows
            history.append(at.value + at.others)
            residual = at.norm
            if residual <= tolerance or done == iterations or not math.isfinite(residual):
                break
            self._take(split, at, residual)
        reached = residual <= tolerance
        status = "converged" if reached else f"stopped after {done} outer steps with gradient norm {residual:.3g}"
        if not reached:
            warnings.warn(f"target_surrogate: {status}; {tolerance:.3g} was asked for.", PoiseWarning, stacklevel=2)
        return Certificate(history[-1], residual, tolerance, "gradient norm", done, status, history=tuple(history))

    # ---- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return eta, its sums, the inner solver's state, the counters and the replay."""
        return {
            "rule": self.rule.state_dict(), "inner": self.inner.state_dict(), "replay": dict(self._memory),
            "counters": [self.oracle_calls, self.oracle_rows, self.value_calls, self.cheap_steps, self.forwards, self.backwards],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.rule.load_state_dict(state["rule"])
        self.inner.load_state_dict(state["inner"])
        self._memory = {n: v.clone() for n, v in state["replay"].items()}
        counters = [int(c) for c in state["counters"]]
        self.oracle_calls, self.oracle_rows, self.value_calls, self.cheap_steps, self.forwards, self.backwards = (
            counters
        )

    def __repr__(self) -> str:
        rule = self.rule.eta0 if self.rule.rule == "constant" else self.rule.rule
        eta = repr(rule) if isinstance(rule, str | float) else "<function>"
        kind = repr(self.divergence) if isinstance(self.divergence, str) else "<function>"
        return f"target_surrogate(inner_steps={self.inner_steps}, eta={eta}, divergence={kind}, {self._text})"


def smoothness_of(problem: Problem, labels: tuple[str, ...]) -> float | None:
    """Return the sum of weight times `L` over some terms; None where a term's is not known or a weight is negative."""
    total = 0.0
    for entry in problem.objective._entries:
        if entry.label not in labels or entry.auxiliary:
            continue
        known = SMOOTHNESS.get(entry.term.formula)
        weight = float(torch.as_tensor(value_of(entry.weight, problem.objective.clock)).max())
        if known is None or weight < 0:
            return None
        total += weight * known
    return total or None


def _relative(split: ProblemSplit) -> float | None:
    """Return the smoothness relative to the log-sum-exp: the weights of the cross-entropies; None where another term reads the output."""
    total = 0.0
    for entry in split.problem.objective._entries:
        if entry.label in split.readers and not entry.auxiliary:
            weight = float(torch.as_tensor(value_of(entry.weight, split.problem.objective.clock)).max())
            if entry.term.formula not in ("cross_entropy", "label_smoothing") or weight < 0:
                return None
            total += weight
    return total or None
