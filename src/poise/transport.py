"""Optimal transport with at most k nonzeros a column: the duals, their ascent, and the plan that they give.

    min over T >= 0 of  <T, C> + sum_j Omega(t_j)     T 1 = a,  T' 1 = b,     Omega(t) = (gamma/2) ||t||^2,  ||t||_0 <= k
    dual        max  alpha'a + beta'b - sum_j Omega*(alpha + beta_j - c_j)
    semi-dual   max  alpha'a - sum_j max over t in b_j Delta, ||t||_0 <= k of  (alpha - c_j)'t - (gamma/2) ||t||^2

Both are concave although Omega is not convex. k = None is the quadratic regulariser, `entropic=True` has Omega(t) = gamma sum t log t.
Solver, loss and router share what stands here; `poise.solvers.sparse_transport` adds the certificate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from poise.ascent import Ascent, Oracle, adam, lbfgs
from poise.errors import InputError
from poise.operators import project_sparse_simplex, require_count, topk_conjugate

__all__ = ["Formulation", "Method", "Transport", "solve", "transport_value"]

Formulation = Literal["semi_dual", "dual"]
Method = Literal["lbfgs", "adam"]


@dataclass(frozen=True)
class Report:
    """A plan and what is said of it, counted in the pass that reads it off the potentials.

    Attributes:
        plan: float [problems, n, m].
        beta: float [problems, n], see `Transport.beta`.
        nonzeros: int64 [problems, n].
        tie_gap: float [problems, n], the k-th less the next value of a column; infinite where the limit does not act.
        linear, primal: float [problems], `<T, C>` and `<T, C> + sum Omega(t)`.
        row_error, column_error: float [problems], L1 distances of the sums from a and b.
    """

    plan: Tensor
    beta: Tensor
    nonzeros: Tensor
    tie_gap: Tensor
    linear: Tensor
    primal: Tensor
    row_error: Tensor
    column_error: Tensor


@dataclass(frozen=True)
class Transport:
    """Problems of one shape whose columns are limited: what is given, checked and laid out with columns contiguous.

    Attributes:
        cost: float [problems, n, m], transposed; +inf forbids an entry.
        a, b: float [problems, m] and [problems, n].
        gamma: strength of the regulariser.
        k: most nonzeros of a column; None for no limit.
        entropic: the regulariser is the entropy.
    """

    cost: Tensor
    a: Tensor
    b: Tensor
    gamma: float
    k: int | None
    entropic: bool = False

    def plan(self, alpha: Tensor, beta: Tensor | None = None, which: Tensor | None = None) -> Tensor:
        """Return the plan [problems, n, m] of the semi-dual, or of the dual where beta is given."""
        cost, _, b = self.rows(which)
        s = alpha[:, None, :] - cost
        if beta is not None:
            s = s + beta[..., None]
            if self.entropic:
                return (s / self.gamma - 1.0).exp()
            return _gradient_of_conjugate(s, self.k, self.gamma)
        if self.entropic:
            soft: Tensor = b[..., None] * (s / self.gamma).softmax(-1)
            return soft
        return project_sparse_simplex(s, self.k, self.gamma * b) / self.gamma

    def beta(self, alpha: Tensor, plan: Tensor) -> Tensor:
        """Return the other potential of the semi-dual: minus the multiplier of each column's mass, [problems, n]."""
        s = alpha[:, None, :] - self.cost
        if self.entropic:
            found: Tensor = self.gamma * (self.b.log() - (s / self.gamma).logsumexp(-1) + 1.0)
            return found
        held = plan > 0
        excess = torch.where(held, s - self.gamma * plan, 0.0).sum(-1)
        return torch.where(held.any(-1), -excess / held.sum(-1).clamp_min(1), -s.amax(-1))

    def charge(self, plan: Tensor) -> Tensor:
        """Return what a plan [problems, n, m] costs with its regulariser, [problems]."""
        held = plan > 0
        linear = torch.where(held, self.cost * plan, 0.0).sum((-2, -1))
        if self.entropic:
            linear += self.gamma * torch.special.xlogy(plan, plan).sum((-2, -1))
            return linear
        return linear + 0.5 * self.gamma * plan.square().sum((-2, -1))

    def rows(self, which: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return cost, a and b of some of the problems, uncopied where it is all of them."""
        if which is None or len(which) == len(self.cost):
            return self.cost, self.a, self.b
        return self.cost[which], self.a[which], self.b[which]

    def semi_dual(self, alpha: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Return value and gradient of the semi-dual in alpha."""
        cost, a, b = self.rows(which)
        if self.entropic:
            s = (alpha[:, None, :] - cost) / self.gamma
            conjugate = self.gamma * (b * s.logsumexp(-1) - torch.special.xlogy(b, b))
            plan = b[..., None] * s.softmax(-1)
        else:
            plan = self.plan(alpha, which=which)
            s = torch.where(plan > 0, alpha[:, None, :] - cost, 0.0)
            conjugate = (s * plan - 0.5 * self.gamma * plan.square()).sum(-1)
        return (alpha * a).sum(-1) - conjugate.sum(-1), a - plan.sum(-2)

    def dual(self, both: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Return value and gradient of the dual in (alpha, beta)."""
        _, a, b = self.rows(which)
        alpha, beta = both[:, : a.shape[1]], both[:, a.shape[1] :]
        plan = self.plan(alpha, beta, which)
        if self.entropic:
            conjugate = self.gamma * plan.sum((-2, -1))
        else:
            conjugate = 0.5 * self.gamma * plan.square().sum((-2, -1))
        value = (alpha * a).sum(-1) + (beta * b).sum(-1) - conjugate
        return value, torch.cat([a - plan.sum(-2), b - plan.sum(-1)], -1)

    def report(self, alpha: Tensor) -> Report | None:
        """Read the semi-dual's plan off in one compiled pass, or return None where there are no compiled loops."""
        loops = self.loops()
        if loops is None or alpha.dtype != self.cost.dtype:
            return None
        cost, a, b, k = self.arrays()
        plan, lines = torch.zeros_like(self.cost), [torch.empty_like(self.b) for _ in range(2)]
        nonzeros = torch.empty(self.b.shape, dtype=torch.int64)
        linear, squares, row_error, column_error = totals = [self.b.new_empty(len(self.b)) for _ in range(4)]
        outputs = [t.numpy() for t in (plan, lines[0], nonzeros, lines[1], *totals)]
        loops.read_off(cost, a, b, self.gamma, k, alpha.contiguous().numpy(), *outputs)
        primal = linear + 0.5 * self.gamma * squares
        return Report(plan, lines[0], nonzeros, lines[1], linear, primal, row_error, column_error)

    def loops(self) -> Any:
        """Return the compiled loops where they fit: a squared norm, on a CPU that has numba; else None."""
        return None if self.entropic or self.cost.device.type != "cpu" else _compiled()

    def arrays(self) -> tuple[Any, Any, Any, int]:
        """Return cost, a and b as the loops read them, and the limit as a number."""
        cost, a, b = (t.detach().numpy() for t in (self.cost, self.a, self.b))
        return cost, a, b, self.cost.shape[-1] if self.k is None else min(self.k, self.cost.shape[-1])

    def oracle(self, formulation: Formulation) -> Oracle:
        """Return value and gradient as a function: compiled loops on the CPU, PyTorch elsewhere."""
        plain = self.semi_dual if formulation == "semi_dual" else self.dual
        loops = self.loops()
        if loops is None:
            return plain
        kernel = getattr(loops, formulation)
        cost, a, b, k = self.arrays()
        hint = torch.zeros(b.shape, dtype=torch.int64).numpy()

        def fused(x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
            value, gradient = x.new_empty(len(x)), torch.empty_like(x)
            points, places = x.contiguous().numpy(), which.numpy()
            kernel(cost, a, b, self.gamma, k, points, places, hint, value.numpy(), gradient.numpy())
            return value, gradient

        return fused


def _gradient_of_conjugate(s: Tensor, k: int | None, gamma: float) -> Tensor:
    with torch.enable_grad():
        leaf = s.detach().requires_grad_()
        return torch.autograd.grad(topk_conjugate(leaf, k, gamma).sum(), leaf)[0]


def _compiled() -> Any:
    from poise import transport_loops

    return transport_loops.loops()


def checked(
    name: str,
    cost: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    k: int | None,
    gamma: float,
    axis: Literal["column", "row"] = "column",
    dtype: torch.dtype | None = torch.float64,
    entropic: bool = False,
    feasible: bool = True,
) -> Transport:
    """Check a batch of problems and lay them out with the limited side as columns.

    Args:
        name: what messages begin with.
        cost: float [..., m, n].
        a, b: float [..., m] and [..., n], >= 0 with equal sums; None for uniform masses that sum to 1.
        k, gamma, entropic: of the regulariser.
        axis: which side is limited.
        dtype: in which it is computed; None for that of the cost.
        feasible: whether to refuse more rows with mass than the columns can hold.

    Raises:
        InputError: for whatever does not fit, with the place.
    """
    if cost.dim() < 2 or not cost.is_floating_point() or 0 in cost.shape:
        raise InputError(f"{name}: cost is float [..., m, n] and not empty, and it is {cost.dtype} {list(cost.shape)}.")
    if not (gamma > 0 and gamma < float("inf")):
        raise InputError(f"{name}: gamma must be positive and finite, and it is {gamma}.")
    if k is not None:
        require_count(name, k)
    cost = cost.detach()
    least, most = (float(t) for t in cost.aminmax())  # NaN carries over to both
    if not least > -float("inf"):
        entry = (cost.isnan() | (cost == -torch.inf)).nonzero()[0].tolist()
        raise InputError(
            f"{name}: cost must be finite (+inf forbids an entry), and it is {cost[tuple(entry)].item()} at {entry}."
        )
    m, n = cost.shape[-2:]
    dtype = dtype or cost.dtype
    a, b = _mass(name, "a", a, cost, m, dtype), _mass(name, "b", b, cost, n, dtype)
    sums = a.sum(-1), b.sum(-1)
    # Float32 masses that came from a softmax agree to their own rounding only.
    apart = (sums[0] - sums[1]).abs() > 1e-5 * torch.maximum(*sums)
    if bool(apart.any()):
        place = int(apart.nonzero()[0])
        raise InputError(
            f"{name}: a and b must have equal sums, and they are {sums[0][place].item():g} and {sums[1][place].item():g} "
            f"(problem {place}). Scale one of them."
        )
    if not bool((sums[0] > 0).all()):
        raise InputError(f"{name}: there must be some mass, and the sums of a are {sums[0].tolist()}.")
    b = b * (sums[0] / sums[1])[:, None]
    matrix = cost.reshape(-1, m, n).to(dtype)
    if axis == "row":
        a, b = b, a
    else:
        matrix = matrix.mT
    empty = a == 0
    if bool(empty.any()):  # an entry without mass in its row can hold none
        matrix = matrix.masked_fill(empty[:, None, :], torch.inf)
    matrix = matrix.contiguous()
    _require_room(name, matrix, a, b, k if feasible else None, axis, closed=most == float("inf"))
    return Transport(matrix, a.contiguous(), b.contiguous(), float(gamma), k, entropic)


def _mass(name: str, letter: str, mass: Tensor | None, cost: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    problems = cost.shape[:-2].numel()
    if mass is None:
        return torch.full((problems, length), 1.0 / length, dtype=dtype, device=cost.device)
    if mass.shape[-1:] != (length,) or mass.dim() > cost.dim() - 1:
        raise InputError(f"{name}: {letter} is [..., {length}] for this cost, and it is {list(mass.shape)}.")
    mass = mass.detach().to(cost.device, dtype)
    if not bool(mass.isfinite().all()) or bool((mass < 0).any()):
        worst = mass.min().item() if bool(mass.isfinite().all()) else "not finite"
        raise InputError(f"{name}: {letter} is mass, finite and not negative, and its least entry is {worst}.")
    return mass.expand(*cost.shape[:-2], length).reshape(problems, length)


def _require_room(name: str, cost: Tensor, a: Tensor, b: Tensor, k: int | None, axis: str, closed: bool) -> None:
    sides = ("rows", "columns") if axis == "column" else ("columns", "rows")
    if k is not None:
        needed, places = (a > 0).sum(-1), k * (b > 0).sum(-1)
        full = needed > places
        if bool(full.any()):
            at = int(full.nonzero()[0])
            columns = int(places[at]) // k
            raise InputError(
                f"{name}: infeasible: {int(needed[at])} {sides[0]} have mass, and {columns} {sides[1]} with at most k = {k} "
                f"nonzeros hold {int(places[at])} (problem {at}). Take k >= {-(-int(needed[at]) // max(columns, 1))}."
            )
    if not closed:
        return
    shut = (b > 0) & (cost == torch.inf).all(-1)
    blocked = (a > 0) & ((cost == torch.inf) | (b == 0)[..., None]).all(-2)
    if bool(shut.any()) or bool(blocked.any()):
        raise InputError(f"{name}: infeasible: a row or column has mass, and the cost forbids all of its entries.")


def solve(
    problem: Transport,
    formulation: Formulation = "semi_dual",
    method: Method = "lbfgs",
    *,
    tolerance: float = 1e-6,
    max_iter: int = 500,
    lr: float = 1e-2,
    start: Tensor | None = None,
) -> Ascent:
    """Maximise the semi-dual in alpha [problems, m], or the dual in (alpha, beta) [problems, m + n].

    Args:
        tolerance: largest marginal error (L1), as a share of the mass.
        max_iter: iterations of L-BFGS, or the number of Adam's steps.
        lr: Adam's, in units of the cost.
        start: warm potentials.
    """
    if start is None:
        width = problem.a.shape[1] + (problem.b.shape[1] if formulation == "dual" else 0)
        start = problem.a.new_zeros(len(problem.a), width)
    loops = problem.loops() if method == "lbfgs" and formulation == "semi_dual" else None
    if loops is not None:
        return _ascend(problem, loops, start, tolerance, max_iter)
    oracle = problem.oracle(formulation)
    with torch.no_grad():
        if method == "adam":
            return adam(oracle, start, max_iter, lr)
        return lbfgs(oracle, start, tolerance * problem.a.sum(-1), max_iter)


def _ascend(problem: Transport, loops: Any, start: Tensor, tolerance: float, max_iter: int) -> Ascent:
    """Ascend by L-BFGS in compiled loops, one problem after the other."""
    x = start.detach().to(problem.cost).clone(memory_format=torch.contiguous_format)
    value, residual = torch.empty_like(x[:, 0]), torch.empty_like(x[:, 0])
    iterations = torch.zeros(len(x), dtype=torch.int64)
    stalled, rises = torch.zeros(len(x), dtype=torch.bool), torch.zeros(max_iter, dtype=x.dtype)
    outputs = (t.numpy() for t in (value, residual, iterations, stalled, rises))
    cost, a, b, k = problem.arrays()
    limits = (tolerance * problem.a.sum(-1)).numpy()
    loops.ascend(cost, a, b, problem.gamma, k, x.numpy(), limits, max_iter, *outputs)
    made = int(iterations.max()) if len(x) else 0
    history = (value.sum() - rises.sum() + rises.cumsum(0))[:made].tolist()
    return Ascent(x, value, residual, iterations, stalled, history)


class _Value(torch.autograd.Function):
    """The value as a function of cost and masses; its gradient is the plan and the potentials (Danskin)."""

    @staticmethod
    def forward(
        context: Any, cost: Tensor, a: Tensor, b: Tensor, value: Tensor, plan: Tensor, alpha: Tensor, beta: Tensor
    ) -> Tensor:
        context.save_for_backward(plan, alpha, beta)
        return value

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        plan, alpha, beta = context.saved_tensors
        g = gradients[0]
        return g[..., None, None] * plan, g[..., None] * alpha, g[..., None] * beta, None, None, None, None


def transport_value(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    k: int | None = None,
    gamma: float = 1.0,
    tolerance: float = 1e-6,
    max_iter: int = 500,
    name: str = "transport_value",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the semi-dual's value, differentiable in cost and masses; the plan; and the marginal error of each problem.

    By Danskin's theorem `d value / d C = T`, `d value / d a = alpha`, `d value / d b = beta`, so nothing is unrolled. Potentials
    are defined up to a constant that goes from one to the other; alpha has the mean 0 here.

    Args:
        cost: float [..., m, n].
        a, b: float [..., m] and [..., n]; None for uniform.
        k, gamma, tolerance, max_iter: see `poise.solvers.sparse_transport`.

    Returns:
        value [...], plan [..., m, n] and error [...], the last two detached; the error is a share of the mass (L1).

    Raises:
        InputError: see `sparse_transport`.

    >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True)
    >>> value, plan, _ = transport_value(cost, k=1)
    >>> value.backward(); cost.grad
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])
    """
    batch, (m, n) = cost.shape[:-2], cost.shape[-2:]
    problem = checked(name, cost, a, b, k, gamma)
    ascent = solve(problem, tolerance=tolerance, max_iter=max_iter)
    plan = problem.plan(ascent.x)
    beta = problem.beta(ascent.x, plan)
    carried = problem.a > 0
    centre = torch.where(carried, ascent.x, 0.0).sum(-1, keepdim=True) / carried.sum(-1, keepdim=True)
    alpha, beta = ascent.x - centre, beta + centre

    def back(x: Tensor, *shape: int) -> Tensor:
        return x.to(cost.dtype).reshape(*batch, *shape)

    flow, error = back(plan.mT, m, n), back(ascent.residual / problem.a.sum(-1))
    masses = [
        cost.new_zeros(*batch, length) if mass is None else mass.expand(*batch, length)
        for mass, length in ((a, m), (b, n))
    ]
    value: Tensor = _Value.apply(cost, *masses, back(ascent.value), flow, back(alpha, m), back(beta, n))  # type: ignore[no-untyped-call]
    return value, flow, error
