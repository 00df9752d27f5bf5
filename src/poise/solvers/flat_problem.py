"""A problem as a function of one vector, with the curvature that a Newton method asks for.

    exact             Hessian of everything
    gauss_newton      J' H J of the terms that read the output, J its Jacobian and H their Hessian in it
    expected_fisher   J' F J, F that of the distribution which the output parametrises
    fisher            1/n sum_i g_i g_i' over the examples' gradients: the Fisher matrix of arXiv:2506.13710
    rank_one          (1 - 2/p) g g' / f: the part of the Hessian of f = |u|^p / p that needs no Jacobian
    zero              nothing

A term that does not read the output (`l2`) adds its exact Hessian to all but the last two. Where the model is one linear layer the
matrix is `X' S X` with `S` in the outputs: one product of matrices instead of one backward pass for every parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from poise.coefficient import value_of
from poise.errors import IncompatibleError, InputError
from poise.problem import OWN, Problem
from poise.solvers.curvature import PREFER_DENSE, Curvature, Dense, MatrixFree, RankOne, Zero, as_curvature, check_size
from poise.structure import PLAIN_READOUTS

KINDS = ("exact", "gauss_newton", "expected_fisher", "fisher", "rank_one", "zero")
_CORNERED = frozenset({"l1", "absolute_error", "mask_l1", "error_rate"})
Provider = Callable[[Problem, Mapping[str, Tensor]], Any]


class FlatProblem:
    """Value, gradient and curvature of a problem as functions of its flattened parameters.

    Args:
        problem: the step.
        power: `p` of the rank-one kind.
        backend: "auto", "cholesky", "cg" or "rank_one".

    Raises:
        IncompatibleError: a term has corners or no second derivative, or the objective has parameters of its own.
    """

    def __init__(self, problem: Problem, power: float = 4.0, backend: str = "auto") -> None:
        own = [name for name in problem.parameters if name.startswith(OWN)]
        if own:
            raise IncompatibleError(
                f"newton trains the model's parameters, and the objective has its own: {', '.join(own[:5])}. Use 'adamw' or 'lbfgs'."
            )
        check_terms(problem)
        self.problem, self.power, self.backend = problem, power, backend
        self.parameters = problem.parameters
        if not self.parameters:
            raise InputError("newton: nothing is trained: no parameter of the model requires a gradient.")
        self.sizes = [p.numel() for p in self.parameters.values()]
        self.dimension = sum(self.sizes)

    @property
    def start(self) -> Tensor:
        """The parameters as they are, [d]."""
        return torch.cat([p.detach().flatten() for p in self.parameters.values()])

    def named(self, x: Tensor) -> dict[str, Tensor]:
        """Return a vector by parameter name."""
        parts: tuple[Tensor, ...] = torch.split(x, self.sizes)
        return {n: part.view_as(p) for (n, p), part in zip(self.parameters.items(), parts, strict=True)}

    def flat(self, named: Mapping[str, Tensor]) -> Tensor:
        """Return what is given by name as one vector; what is absent is 0."""
        return torch.cat(
            [named[n].flatten() if n in named else torch.zeros_like(p).flatten() for n, p in self.parameters.items()]
        )

    def write(self, x: Tensor) -> None:
        """Move the model's parameters there."""
        with torch.no_grad():
            for name, part in self.named(x).items():
                self.parameters[name].copy_(part)

    def value_and_gradient(self, x: Tensor | None) -> tuple[float, Tensor]:
        """Return the objective and its gradient at `x`, or where the model is."""
        g = self.flat(self.problem.gradient(at=None if x is None else self.named(x)))
        return float(self.problem.latest_value), g.detach()

    # ---- curvature ---------------------------------------------------------------------------------------------------

    def curvature(self, x: Tensor, kind: str | Provider, value: float, gradient: Tensor) -> Curvature:
        """Return the curvature at `x`, where value and gradient are known."""
        if kind == "zero":
            return Zero()
        if kind == "rank_one":
            if not value > 0:
                raise InputError(
                    f"newton: hessian='rank_one' is for objectives |u|^p / p, which are positive, and the value is {value:.3g}."
                )
            return RankOne((1 - 2 / self.power) / value, gradient)
        if not isinstance(kind, str):
            return as_curvature(
                kind(self.problem, self.named(x)), getattr(kind, "__name__", "the Hessian approximation")
            )
        dense = self.backend == "cholesky" or (self.backend == "auto" and self.dimension <= PREFER_DENSE)
        name = f"the {kind.replace('_', '-')} Hessian of {self.problem.objective}"
        # Gauss-Newton of a term that is not convex in the output may bend down, as the exact Hessian may.
        semidefinite = kind in ("fisher", "expected_fisher") and not self._others
        if dense:
            check_size(self.dimension)
            return Dense(self._matrix(x, kind), name, semidefinite)
        return MatrixFree(self._product(x, kind), name=name, semidefinite=semidefinite)

    def _matrix(self, x: Tensor, kind: str) -> Tensor:
        if self._design is not None and (kind != "exact" or self._separable):
            return self._add_others(x, self._linear_matrix(x, kind))
        identity = torch.eye(self.dimension, dtype=x.dtype, device=x.device)
        matrix = _columns(self._product(x, kind), identity)
        return (matrix + matrix.T) / 2

    def _product(self, x: Tensor, kind: str) -> Callable[[Tensor], Tensor]:
        at = self.named(x)
        if self._design is not None and (kind != "exact" or self._separable):
            return self._linear_product(x, kind)
        if kind == "exact":
            return self._differentiated(at, None)
        others = self._differentiated(at, self._others) if self._others else None
        if kind == "fisher":
            inner = self._fisher_product(at)
        else:
            asked = "fisher" if kind == "expected_fisher" else kind

            def inner(h: Tensor) -> Tensor:
                return self.flat(self.problem.product(self.named(h), asked, at))

        return inner if others is None else lambda h: inner(h) + others(h)

    def _differentiated(self, at: Mapping[str, Tensor], terms: list[str] | None) -> Callable[[Tensor], Tensor]:
        """Return the Hessian of some terms as a function of a vector."""
        point = {n: p.detach().requires_grad_() for n, p in at.items()}
        g = self.flat(self.problem.gradient(at=point, terms=terms, create_graph=True))

        def product(h: Tensor) -> Tensor:
            if not g.requires_grad:
                return torch.zeros_like(h)
            try:
                found = torch.autograd.grad(g, list(point.values()), h, retain_graph=True, allow_unused=True)
            except RuntimeError as error:
                raise IncompatibleError(
                    f"{self.problem.objective} cannot be differentiated twice ({error}). Use hessian='gauss_newton' or 'fisher'."
                ) from None
            return self.flat({n: f for n, f in zip(point, found, strict=True) if f is not None})

        return product

    def _fisher_product(self, at: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        """`h -> n/W J' (r <r, J h>)` with `r_i` the derivative in output `i` and `W` the weight of the terms that read it."""
        r, factor = self._residuals(at)
        point = {n: p.detach() for n, p in at.items()}

        def outputs(parameters: dict[str, Tensor]) -> Tensor:
            return self.problem.outputs(at=parameters)[0]

        back: Any = torch.func.vjp(outputs, point)

        def product(h: Tensor) -> Tensor:
            pair: Any = torch.func.jvp(outputs, (point,), (self.named(h),))
            along = (r * pair[1]).flatten(1).sum(1) if r.ndim > 1 else r * pair[1]
            weighed = r * along.view(-1, *[1] * (r.ndim - 1))
            return factor * self.flat(back[1](weighed)[0])

        return product

    def _residuals(self, at: Mapping[str, Tensor]) -> tuple[Tensor, float]:
        """Return the derivative of the terms in every output, and the factor `n/W` of their Fisher matrix."""
        leaf = self.problem.outputs(at=at)[0].detach().requires_grad_()
        with torch.enable_grad():
            (r,) = torch.autograd.grad(self.problem.loss_of([leaf], at), leaf)
        clock = self.problem.objective.clock
        entries = [e for e in self.problem.objective._entries if e.label in self._readers and not e.auxiliary]
        weight = sum(float(torch.as_tensor(value_of(e.weight, clock), dtype=torch.float64).mean()) for e in entries)
        if not weight > 0:
            raise InputError(
                f"newton: hessian='fisher' needs terms of positive weight, and {', '.join(self._readers)} weigh {weight:.3g} together."
            )
        return r, len(r) / weight

    # ---- terms -------------------------------------------------------------------------------------------------------

    @cached_property
    def _readers(self) -> list[str]:
        """Labels of the terms that read the model's output."""
        output = self.problem._output
        return [e.label for e in self.problem.objective._entries if any(r.name == output for r in e.forward_reads)]

    @cached_property
    def _others(self) -> list[str]:
        """Labels of the terms that do not, and act."""
        return [e.label for e in self.problem.objective._entries if e.label not in self._readers and not e.auxiliary]

    @cached_property
    def _separable(self) -> bool:
        """Whether every output's part of the loss depends on that output alone, and on the parameters through it alone."""
        for entry in self.problem.objective._entries:
            if entry.label in self._readers:
                beside = {"parameters", "model"} & {r.name for r in entry.forward_reads}
                if beside or entry.term.couples or "per_example" not in entry.term.capabilities or entry.crosses:
                    return False
        return True

    def _add_others(self, x: Tensor, matrix: Tensor) -> Tensor:
        if not self._others:
            return matrix
        identity = torch.eye(self.dimension, dtype=x.dtype, device=x.device)
        return matrix + _columns(self._differentiated(self.named(x), self._others), identity)

    # ---- one linear layer --------------------------------------------------------------------------------------------

    @cached_property
    def _design(self) -> Tensor | None:
        """The inputs `[n, d]`, with a column of ones where there is a bias, if the output is linear in all parameters; else None."""
        model, problem = self.problem.model, self.problem
        layer = model[0] if isinstance(model, nn.Sequential) and len(model) == 1 else model
        if type(layer) is not nn.Linear or len(problem.batches) != 1 or not self._separable:
            return None
        if f"{type(problem.readout).__module__}.{type(problem.readout).__name__}" not in PLAIN_READOUTS:
            return None
        batch = problem.batches[0]
        x = batch.get("main", next(iter(batch.values()))).get("input")
        whole = sum(p.numel() for p in layer.parameters()) == self.dimension
        if len(batch) != 1 or not isinstance(x, Tensor) or x.ndim != 2 or not whole or x.dtype != layer.weight.dtype:
            return None
        x = x.to(layer.weight.device)
        return x if layer.bias is None else torch.cat([x, x.new_ones(len(x), 1)], 1)

    def _linear_product(self, x: Tensor, kind: str) -> Callable[[Tensor], Tensor]:
        """`h -> X' S X h`, and what the other terms add."""
        design, at = self._design, self.named(x)
        assert design is not None
        s = self._output_curvature(at, kind)
        others = self._differentiated(at, self._others) if self._others else None
        classes, width = s.shape[-1], design.shape[1]
        order = self._order(classes, width)
        back = torch.argsort(order)

        def product(h: Tensor) -> Tensor:
            moved = design @ h[back].view(classes, width).T
            curved = (s @ moved[:, :, None])[:, :, 0]
            found = (curved.T @ design).flatten()[order]
            return found if others is None else found + others(h)

        return product

    def _order(self, classes: int, width: int) -> Tensor:
        """Where the parameters stand among the columns of every class: a bias comes after all rows of the weight."""
        order = torch.arange(classes * width, device=self.start.device).view(classes, width)
        if len(self.sizes) == 1:
            return order.flatten()
        return torch.cat([order[:, :-1].flatten(), order[:, -1]])

    def _linear_matrix(self, x: Tensor, kind: str) -> Tensor:
        """`X' S X`, with `S` `[n, classes, classes]` the curvature in the outputs."""
        design = self._design
        assert design is not None
        s = self._output_curvature(self.named(x), kind)
        classes, width = s.shape[-1], design.shape[1]
        if classes == 1:
            return _gram(design, s[:, 0, 0])
        whole = design.new_empty(classes, width, classes, width)
        for a in range(classes):
            for b in range(a, classes):
                whole[a, :, b] = _gram(design, s[:, a, b]) if a == b else design.T @ (design * s[:, a, b, None])
                whole[b, :, a] = whole[a, :, b].T
        order = self._order(classes, width)
        return whole.reshape(classes * width, classes * width)[order][:, order]

    def _output_curvature(self, at: Mapping[str, Tensor], kind: str) -> Tensor:
        if kind == "fisher":
            r, factor = self._residuals(at)
            r = r.view(len(r), -1)
            return factor * r[:, :, None] * r[:, None, :]
        output = self.problem.outputs(at=at)[0].detach()
        if kind == "expected_fisher":
            if self.problem._output == "logits":
                p = output.softmax(-1)
                return (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / len(p)
            width = output[0].numel()
            return torch.eye(width, dtype=output.dtype, device=output.device).expand(len(output), -1, -1) / len(output)
        leaf = output.requires_grad_()
        with torch.enable_grad():
            (g,) = torch.autograd.grad(self.problem.loss_of([leaf], at), leaf, create_graph=True)
            g = g.view(len(g), -1)
            if not g.requires_grad:
                return g.new_zeros(*g.shape, g.shape[1])
            rows = [torch.autograd.grad(g[:, c].sum(), leaf, retain_graph=True)[0] for c in range(g.shape[1])]
        return torch.stack([row.view(len(row), -1) for row in rows], 1)


def check_terms(problem: Problem) -> None:
    """Refuse, by name, a term that has no curvature to offer.

    Raises:
        IncompatibleError: with the term and what to use.
    """
    for label, term in problem.objective.terms.items():
        formula = getattr(term, "formula", "")
        if formula in _CORNERED or getattr(term, "smooth", True) is False:
            raise IncompatibleError(
                f"newton needs smooth terms, and {label!r} has corners, where there is no curvature. Use a proximal or coordinate solver, "
                "or a smooth term such as 'l2' or 'huber' in its place."
            )
        lacking = frozenset({"potential", "deterministic"}) - term.capabilities  # type: ignore[operator]
        if lacking:
            raise IncompatibleError(
                f"newton needs terms that are {', '.join(sorted(lacking))}, and {label!r} is not. Use 'sgd' or 'adamw'."
            )


def _columns(product: Callable[[Tensor], Tensor], identity: Tensor) -> Tensor:
    """Return a matrix by its products with unit vectors: many at once where the graph can be mapped over, else one by one."""
    # What a product holds for one vector it holds for each of those that go at once.
    size = 64
    try:
        return torch.cat([torch.func.vmap(product)(part) for part in torch.split(identity, size)])
    except (RuntimeError, ValueError):
        return torch.stack([product(e) for e in identity])


def _gram(x: Tensor, s: Tensor) -> Tensor:
    """`X' diag(s) X`; where `s` is not negative half the work, as the square of one factor."""
    if x.device.type != "cpu" or not bool((s >= 0).all()):
        return x.T @ (x * s[:, None])
    root = (x * s.sqrt()[:, None]).numpy()
    return torch.from_numpy(root.T @ root)
