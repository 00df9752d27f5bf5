"""Sparsity-constrained optimal transport, with what is known about the answer: gap, marginal errors, support and ties.

    result = sparse_transport(cost, a, b, k=8, gamma=1.0)          # at most 8 nonzeros a column; cost [..., m, n]
    result.plan, result.gap, result.row_error, result.ties, result.status

k = 1 has the value of unregularised transport (plus a constant), k = None is the quadratic regulariser, and what lies between
buys smoothness, and so speed, with density. A problem of the batch that misses its certificate says so in `status` and in a warning.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from poise.ascent import Ascent
from poise.errors import InputError, PoiseWarning
from poise.operators import largest
from poise.problem import Certificate
from poise.solvers.transport_baselines import LARGEST, linear_program
from poise.transport import Formulation, Method, Report, Transport, checked, solve

__all__ = ["TransportResult", "sparse_transport"]

_TIE = 1e-3
"""The k-th and the next value tie where they differ by less than this share of the values' window `gamma b_j`."""


@dataclass(frozen=True)
class TransportResult:
    """A batch of solved problems; shapes as the cost's, `lines` the limited side (columns, or rows with axis="row").

    Attributes:
        plan: float [..., m, n].
        alpha, beta: float [..., m] and [..., n], the potentials; gradients of the value in a and b up to a shared constant.
        value: float [...], the (semi-)dual: a lower bound of the cost of every plan within the limit.
        primal: float [...], `<T, C> + sum Omega(t)` of this plan.
        linear: float [...], `<T, C>`.
        row_error, column_error: float [...], L1 distances of the plan's sums from a and b, as a share of the mass.
        nonzeros: int64 [..., lines].
        ties: bool [..., lines], the limit acts and the k-th and the next candidate are equal up to rounding: which of them
            is kept is arbitrary, and the plan read off the potentials can miss its marginals.
        tie_gap: float [..., lines], the difference of these two; infinite where the limit does not act.
        iterations: int64 [...].
        status: one line a problem: "converged" or why not.
        tolerance: that was asked for.
        history: sum of the values over the batch after each iteration.
    """

    plan: Tensor
    alpha: Tensor
    beta: Tensor
    value: Tensor
    primal: Tensor
    linear: Tensor
    row_error: Tensor
    column_error: Tensor
    nonzeros: Tensor
    ties: Tensor
    tie_gap: Tensor
    iterations: Tensor
    status: tuple[str, ...]
    tolerance: float
    history: tuple[float, ...] = ()

    @property
    def gap(self) -> Tensor:
        """`primal - value`: an upper bound of what a better plan could save, where the marginals hold."""
        return self.primal - self.value

    @property
    def marginal_error(self) -> Tensor:
        """The sum of both marginal errors, a share of the mass."""
        return self.row_error + self.column_error

    @property
    def feasible(self) -> Tensor:
        """Whether rows and columns have their sums, up to the tolerance; bool [...]."""
        return self.marginal_error <= max(self.tolerance, 8 * torch.finfo(self.plan.dtype).eps)

    @property
    def converged(self) -> Tensor:
        """Whether each problem met its certificate; bool [...]."""
        met = torch.tensor([s == "converged" for s in self.status])
        return met.reshape(self.value.shape)

    @property
    def support(self) -> Tensor:
        """Indices of the plan's nonzeros, int64 [nonzeros, dimensions]."""
        return self.plan.nonzero()

    def certificate(self, problem: int = 0) -> Certificate:
        """Return what is known about one problem of the batch, counted through its flattened leading dimensions."""
        plan = self.plan.reshape(-1, *self.plan.shape[-2:])[problem]
        pick = {n: getattr(self, n).reshape(-1)[problem] for n in ("value", "gap", "marginal_error", "iterations")}
        read_off = not self.status[problem].startswith("tied")
        return Certificate(
            value=float(pick["value"]),
            residual=float(pick["marginal_error"] if read_off else torch.maximum(pick["gap"], pick["marginal_error"])),
            tolerance=self.tolerance,
            measure="marginal error (L1, share of the mass)" if read_off else "duality gap and marginal error",
            iterations=int(pick["iterations"]),
            status=self.status[problem],
            feasible=bool(self.feasible.reshape(-1)[problem]),
            support=plan.nonzero(),
            history=self.history,
        )


def sparse_transport(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    k: int | None = None,
    gamma: float = 1.0,
    regularizer: Literal["squared", "entropy"] = "squared",
    formulation: Formulation = "semi_dual",
    axis: Literal["column", "row"] = "column",
    method: Method = "lbfgs",
    tolerance: float = 1e-6,
    max_iter: int = 500,
    lr: float = 1e-2,
    warm: TransportResult | None = None,
    repair: bool = True,
) -> TransportResult:
    """Solve `min <T, C> + sum_j Omega(t_j)` over plans with row sums a, column sums b and at most k nonzeros a column.

    `Omega(t) = (gamma/2) ||t||^2` with `||t||_0 <= k`, or `gamma sum t log t` with regularizer="entropy". The concave (semi-)dual is
    maximised and the plan read off: exact column sums and, with "semi_dual", row sums up to `row_error`.

    Where the maximiser ties at the k-th place the plan read off misses its marginals: the problem is not convex, and no
    gradient method changes that. `repair` then keeps the chosen support and solves the smooth problem on it: the plan
    is feasible with at most k nonzeros, and `gap` says what it may have lost. k = 1 is a linear program, and where ascent
    stops at its kinks it is solved as one.

    Args:
        cost: float [..., m, n]; +inf forbids an entry.
        a, b: float [..., m] and [..., n], >= 0, equal sums; None for uniform.
        k: most nonzeros of a column, from 1; None for no limit (quadratic transport).
        gamma: strength, > 0, in units of cost / mass.
        formulation: "semi_dual" (exact column sums) or "dual" (both marginals approximate).
        axis: whether columns or rows are limited.
        method: "lbfgs" (float64), or "adam" with `max_iter` steps of `lr` in the dtype of the cost.
        tolerance: largest marginal error (L1), as a share of the mass; 1e-9 is reachable without ties.
        warm: a result for the same shapes, whose potentials are the start.
        repair: whether to look for a feasible plan at ties.

    Raises:
        InputError: k * n is below the number of rows with mass, masses are negative or differ in sum, NaN in the cost, k < 1, ...

    >>> result = sparse_transport(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), k=1)
    >>> result.plan, result.status
    (tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]]), ('converged',))

    Source: Liu, Puigcerver and Blondel, arXiv:2209.15466.
    """
    for word, given, known in (
        ("formulation", formulation, ("semi_dual", "dual")),
        ("method", method, ("lbfgs", "adam")),
        ("axis", axis, ("column", "row")),
        ("regularizer", regularizer, ("squared", "entropy")),
    ):
        if given not in known:
            raise InputError(f"sparse_transport: {word} is one of {', '.join(known)}, and it is {given!r}.")
    if regularizer == "entropy" and k is not None:
        raise InputError("sparse_transport: the entropy has no limit on nonzeros; leave k out or use 'squared'.")
    if not (tolerance > 0 and max_iter >= 1):
        raise InputError(
            f"sparse_transport: tolerance and max_iter must be positive, and they are {tolerance} and {max_iter}."
        )
    dtype = torch.float64 if method == "lbfgs" else cost.dtype
    problem = checked("sparse_transport", cost, a, b, k, gamma, axis, dtype, regularizer == "entropy")
    start = None if warm is None else _start(problem, warm, formulation, axis)
    ascent = solve(problem, formulation, method, tolerance=tolerance, max_iter=max_iter, lr=lr, start=start)
    parts = _read_off(problem, ascent, formulation, tolerance)
    if repair and k is not None and not bool(parts.met.all()):
        _repair(problem, parts, tolerance, max_iter)
        parts.report = None
    return _result(problem, parts, ascent, cost, axis, tolerance)


@dataclass
class _Parts:
    """What is found, in the layout of the problem: plan [problems, lines, m], nonzeros chosen by the potentials [problems, lines]."""

    plan: Tensor
    alpha: Tensor
    beta: Tensor
    value: Tensor
    met: Tensor
    status: list[str]
    chosen: Tensor
    report: Report | None = None


def _start(problem: Transport, warm: TransportResult, formulation: Formulation, axis: str) -> Tensor:
    alpha, beta = (warm.alpha, warm.beta) if axis == "column" else (warm.beta, warm.alpha)
    shapes = problem.a.shape, problem.b.shape
    if (alpha.numel(), beta.numel()) != (shapes[0].numel(), shapes[1].numel()):
        raise InputError(
            f"sparse_transport: warm has potentials {list(warm.alpha.shape)} and {list(warm.beta.shape)}, "
            "and this cost has another shape."
        )
    alpha, beta = alpha.to(problem.a).reshape(shapes[0]), beta.to(problem.b).reshape(shapes[1])
    return alpha if formulation == "semi_dual" else torch.cat([alpha, beta], -1)


def _read_off(problem: Transport, ascent: Ascent, formulation: Formulation, tolerance: float) -> _Parts:
    m = problem.a.shape[1]
    alpha = ascent.x[:, :m]
    report = problem.report(alpha) if formulation == "semi_dual" else None
    if formulation == "dual":
        beta = ascent.x[:, m:]
        plan = problem.plan(alpha, beta)
    elif report is not None:
        plan, beta = report.plan, report.beta
    else:
        plan = problem.plan(alpha)
        beta = problem.beta(alpha, plan)
    met = ascent.residual <= tolerance * problem.a.sum(-1)
    status = [
        "converged" if ok else ("stalled: no ascent along the last gradient" if stuck else "iteration limit")
        for ok, stuck in zip(met.tolist(), ascent.stalled.tolist(), strict=True)
    ]
    chosen = (plan > 0).sum(-1) if report is None else report.nonzeros
    return _Parts(plan, alpha.clone(), beta.clone(), ascent.value.clone(), met, status, chosen, report)


def _repair(problem: Transport, parts: _Parts, tolerance: float, max_iter: int) -> None:
    """Give the problems that missed their marginals a feasible plan on the support that their potentials choose."""
    left = (~parts.met).nonzero()[:, 0]
    if problem.k == 1:
        _solve_as_linear(problem, parts, left)
        left = (~parts.met).nonzero()[:, 0]
    if not len(left):
        return
    assert problem.k is not None
    supports = [_feasible_support(problem, parts.alpha[row], row) for row in left.tolist()]
    none = torch.zeros_like(problem.cost[0], dtype=torch.bool)
    chosen = torch.stack([none if support is None else support for support in supports])
    cost, a, b = problem.rows(left)
    # The smooth problem on a support: within it, the best plan.
    within = replace(problem, cost=torch.where(chosen, cost, torch.inf), a=a, b=b, k=None)
    rows = torch.tensor([i for i, support in enumerate(supports) if support is not None], device=cost.device)
    if len(rows):
        within = replace(within, cost=within.cost[rows], a=a[rows], b=b[rows])
        ascent = solve(within, tolerance=tolerance, max_iter=max_iter, start=parts.alpha[left[rows]])
        plans, fits = within.plan(ascent.x), ascent.residual <= tolerance * a[rows].sum(-1)
        parts.plan[left[rows[fits]]] = plans[fits]
        for row in left[rows[fits]].tolist():
            _judge_repaired(problem, parts, row, tolerance)
    for row in left.tolist():
        if not parts.status[row].startswith(("converged", "tied")):
            parts.status[row] = (
                f"tied at the k-th place: no feasible plan with at most k = {problem.k} nonzeros was found. "
                "Take a larger k or gamma"
            )


def _judge_repaired(problem: Transport, parts: _Parts, row: int, tolerance: float) -> None:
    primal = float(problem.charge(parts.plan)[row])
    gap = primal - float(parts.value[row])
    parts.met[row] = gap <= tolerance * abs(primal)
    parts.status[row] = (
        "converged"
        if parts.met[row]
        else f"tied at the k-th place: a feasible plan with at most k = {problem.k} nonzeros was found, it may not be the best (see gap)"
    )


def _feasible_support(problem: Transport, alpha: Tensor, row: int) -> Tensor | None:
    """Return at most k entries of each line that hold a plan, by falling value, or None where none was found."""
    assert problem.k is not None
    cost, a, b = problem.cost[row], problem.a[row], problem.b[row]
    s = alpha - cost
    open_entries = cost.isfinite()
    # The chosen entries themselves; else a vertex among twice as many, which on average has less than two nonzeros a line.
    for count in (problem.k, min(2 * problem.k + 2, s.shape[-1])):
        candidates = largest(s, count) & open_entries
        if int(candidates.sum()) > LARGEST:
            return None
        found = linear_program(torch.where(candidates, cost, torch.inf), b, a)
        if found is None:
            continue
        held = found[0] > 0
        if count > problem.k and int(held.sum(-1).max()) > problem.k:
            return None
        finite = s.nan_to_num(neginf=float(s[open_entries].min()))
        support = largest(torch.where(held, torch.inf, finite), problem.k)
        return (candidates if count == problem.k else support) & open_entries
    return None


def _solve_as_linear(problem: Transport, parts: _Parts, left: Tensor) -> None:
    """Solve k = 1 as the linear program that it is: `Omega` is then the constant `gamma b_j^2 / 2`."""
    for row in left.tolist():
        small = int(problem.cost[row].isfinite().sum()) <= LARGEST
        found = linear_program(problem.cost[row], problem.b[row], problem.a[row]) if small else None
        if found is None:
            continue
        plan, beta, alpha = found
        parts.alpha[row], parts.beta[row] = alpha, beta - problem.gamma * problem.b[row]
        parts.value[row] = problem.semi_dual(alpha[None], torch.tensor([row], device=alpha.device))[0][0]
        if int((plan > 0).sum(-1).max()) <= 1:
            parts.plan[row], parts.met[row], parts.status[row] = plan, True, "converged"


def _result(
    problem: Transport, parts: _Parts, ascent: Ascent, cost: Tensor, axis: str, tolerance: float
) -> TransportResult:
    batch, lines = cost.shape[:-2], problem.b.shape[1]
    report = parts.report or _report(problem, parts)
    mass, tie_gap = problem.a.sum(-1), report.tie_gap
    row_error, column_error = report.row_error / mass, report.column_error / mass
    window = (problem.gamma * problem.b).clamp_min(torch.finfo(problem.b.dtype).tiny)
    plan, alpha, beta = parts.plan.mT, parts.alpha, parts.beta
    if axis == "row":
        plan, alpha, beta = parts.plan, beta, alpha
        row_error, column_error = column_error, row_error

    def back(x: Tensor, *shape: int) -> Tensor:
        return (x.to(cost.dtype) if x.is_floating_point() else x).reshape(*batch, *shape)

    result = TransportResult(
        plan=back(plan, *cost.shape[-2:]),
        alpha=back(alpha, cost.shape[-2]),
        beta=back(beta, cost.shape[-1]),
        value=parts.value.reshape(batch),
        primal=report.primal.reshape(batch),
        linear=report.linear.reshape(batch),
        row_error=row_error.reshape(batch),
        column_error=column_error.reshape(batch),
        nonzeros=report.nonzeros.reshape(*batch, lines),
        ties=(tie_gap <= _TIE * window).reshape(*batch, lines),
        tie_gap=tie_gap.reshape(*batch, lines),
        iterations=ascent.iterations.reshape(batch),
        status=tuple(parts.status),
        tolerance=tolerance,
        history=tuple(ascent.history),
    )
    _warn(result)
    return result


def _report(problem: Transport, parts: _Parts) -> Report:
    """Return what the compiled loops report, by PyTorch's operations: of plans that they did not read off."""
    held = parts.plan > 0
    return Report(
        plan=parts.plan,
        beta=parts.beta,
        nonzeros=held.sum(-1),
        tie_gap=_tie_gap(problem, parts),
        linear=torch.where(held, problem.cost * parts.plan, 0.0).sum((-2, -1)),
        primal=problem.charge(parts.plan),
        row_error=(parts.plan.sum(-2) - problem.a).abs().sum(-1),
        column_error=(parts.plan.sum(-1) - problem.b).abs().sum(-1),
    )


def _tie_gap(problem: Transport, parts: _Parts) -> Tensor:
    """Return the k-th less the next value of each line, infinite where the k-th carries no mass."""
    if problem.k is None or problem.k >= problem.cost.shape[-1]:
        return torch.full_like(problem.b, torch.inf)
    falling = (parts.alpha[:, None, :] - problem.cost).topk(problem.k + 1, dim=-1).values
    last, following = falling[..., -2], falling[..., -1]
    acts = parts.chosen >= problem.k
    # -inf less -inf: nothing follows
    return torch.where(acts & following.isfinite(), last - following, torch.inf)


def _warn(result: TransportResult) -> None:
    missed = [(i, s) for i, s in enumerate(result.status) if s != "converged"]
    if missed:
        at, status = missed[0]
        warnings.warn(
            f"sparse_transport: {len(missed)} of {len(result.status)} problems missed their certificate; problem {at}: {status} "
            f"(marginal error {float(result.marginal_error.reshape(-1)[at]):.2g}, gap {float(result.gap.reshape(-1)[at]):.2g}, "
            f"{int(result.ties.reshape(len(result.status), -1)[at].sum())} ties).",
            PoiseWarning,
            stacklevel=4,
        )
