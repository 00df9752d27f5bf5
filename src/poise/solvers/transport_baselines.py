"""What sparse transport is compared with: exact transport by linear programming, and Sinkhorn's entropic transport."""

from __future__ import annotations

import torch
from torch import Tensor

from poise.errors import InputError
from poise.transport import checked

__all__ = ["entropic_transport", "linear_program", "linear_transport"]

LARGEST = 2_000_000
"""Entries of the largest linear program that is tried; beyond, it takes minutes."""


def linear_program(cost: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return a vertex of unregularised transport and its potentials `(plan, alpha, beta)`, or None where it is infeasible.

    Args:
        cost: float [m, n]; +inf forbids an entry.
        a, b: float [m] and [n], of one sum.
    """
    import numpy as np
    from scipy.optimize import linprog
    from scipy.sparse import coo_matrix

    m, n = cost.shape
    if m == n and bool(cost.isfinite().all()) and bool(torch.cat([a, b]).sub(a[0]).abs().max() <= 1e-12 * a[0]):
        return _assignment(cost, a)
    rows, columns = (cost.isfinite()).nonzero(as_tuple=True)
    entries = np.arange(len(rows))
    places = np.concatenate([rows.cpu().numpy(), m + columns.cpu().numpy()])
    sums = coo_matrix((np.ones(2 * len(rows)), (places, np.concatenate([entries, entries]))), (m + n, len(rows)))
    masses = torch.cat([a, b]).double().cpu().numpy()
    # One of the equations follows from the others; leaving it out spares the solver a rounding conflict.
    prices = cost[rows, columns].double().cpu().numpy()
    found = linprog(prices, A_eq=sums.tocsr()[:-1], b_eq=masses[:-1], bounds=(0, None), method="highs-ds")
    if found.status != 0:
        return None
    plan = cost.new_zeros(m, n)
    plan[rows, columns] = torch.as_tensor(found.x, dtype=cost.dtype, device=cost.device)
    potentials = torch.as_tensor(np.append(found.eqlin.marginals, 0.0), dtype=cost.dtype, device=cost.device)
    return plan, potentials[:m], potentials[m:]


def _assignment(cost: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Solve equal masses on both sides as an assignment; its potentials are shortest ways along exchanges of partners."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = (torch.as_tensor(x, device=cost.device) for x in linear_sum_assignment(cost.double().cpu().numpy()))
    plan = torch.zeros_like(cost)
    plan[rows, columns] = a
    # alpha_i - alpha_h <= C[i, partner of h] - C[h, partner of h]
    paired = cost[rows, columns]
    ways = cost[:, columns] - paired
    alpha = ways.amin(-1).clamp_max(0.0)
    for _ in range(len(cost)):
        shorter = torch.minimum(alpha, (ways + alpha).amin(-1))
        if bool((shorter >= alpha - 1e-15 * alpha.abs().max()).all()):
            break
        alpha = shorter
    beta = torch.empty_like(alpha)
    beta[columns] = paired - alpha
    return plan, alpha, beta


def linear_transport(
    cost: Tensor, a: Tensor | None = None, b: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve unregularised transport, `min <T, C>` with row sums a and column sums b, exactly (HiGHS; as an assignment where all masses
    are equal).

    Args:
        cost: float [..., m, n].
        a, b: float [..., m] and [..., n]; None for uniform.

    Returns:
        plan [..., m, n], value [...], and the potentials [..., m] and [..., n].

    Raises:
        InputError: as `sparse_transport`; more than two million entries; or entries that the cost forbids leave no plan.

    >>> linear_transport(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))[1]
    tensor(0.)
    """
    problem = checked("linear_transport", cost, a, b, None, 1.0)
    batch = cost.shape[:-2]
    if (entries := cost.shape[-2] * cost.shape[-1]) > LARGEST:
        raise InputError(
            f"linear_transport: {entries} entries are too many for a linear program here (at most {LARGEST}). "
            "Use sparse_transport with k=2 or more, or entropic_transport."
        )
    solved = [linear_program(*row) for row in zip(problem.cost, problem.b, problem.a, strict=True)]
    if None in solved:
        raise InputError("linear_transport: infeasible: the forbidden entries of the cost leave no plan.")
    plan, beta, alpha = (torch.stack(t) for t in zip(*(s for s in solved if s is not None), strict=True))
    value = torch.where(plan > 0, plan * problem.cost, 0.0).sum((-2, -1))
    return (
        plan.mT.to(cost.dtype).reshape(cost.shape),
        value.to(cost.dtype).reshape(batch),
        alpha.to(cost.dtype).reshape(*batch, -1),
        beta.to(cost.dtype).reshape(*batch, -1),
    )


def entropic_transport(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    gamma: float = 1.0,
    tolerance: float = 1e-6,
    max_iter: int = 1000,
) -> tuple[Tensor, Tensor, int]:
    """Solve transport with `gamma sum t log t` by Sinkhorn's iterations in the log domain: a dense plan.

    alpha_i <- gamma (log a_i - logsumexp_j (beta_j - C_ij) / gamma),  then beta likewise

    Args:
        cost: float [..., m, n].
        a, b: float [..., m] and [..., n]; None for uniform.
        gamma: strength, > 0.
        tolerance: largest marginal error (L1), as a share of the mass.
        max_iter: most rounds.

    Returns:
        plan [..., m, n], marginal error [...] and rounds made.

    Raises:
        InputError: as `sparse_transport`.

    >>> plan, error, _ = entropic_transport(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), gamma=0.5)
    >>> plan
    tensor([[0.4404, 0.0596],
            [0.0596, 0.4404]])

    Source: Cuturi, arXiv:1306.0895.
    """
    problem = checked("entropic_transport", cost, a, b, None, gamma)
    log_kernel = -problem.cost / gamma
    log_a, log_b = problem.a.log(), problem.b.log()
    alpha, beta = torch.zeros_like(log_a), torch.zeros_like(log_b)
    rounds = 0
    plan, error = torch.zeros_like(log_kernel), torch.full_like(log_a[:, 0], torch.inf)
    for rounds in range(1, max_iter + 1):
        rows = log_a - (log_kernel + beta[..., None]).logsumexp(-2)
        alpha = torch.where(log_a.isfinite(), rows, -torch.inf)
        beta = log_b - (log_kernel + alpha[:, None, :]).logsumexp(-1)
        if rounds % 10 and rounds < max_iter:
            continue
        plan = (alpha[:, None, :] + log_kernel + beta[..., None]).exp()
        error = (plan.sum(-2) - problem.a).abs().sum(-1) / problem.a.sum(-1)
        if bool((error <= tolerance).all()):
            break
    return plan.mT.to(cost.dtype).reshape(cost.shape), error.to(cost.dtype).reshape(cost.shape[:-2]), rounds
