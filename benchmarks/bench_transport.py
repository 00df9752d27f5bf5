"""Sparse transport beside POT's semi-dual: seconds to the same marginal error on one large problem and on a batch of small ones.

POT runs to its own end (L-BFGS-B of SciPy, tolerance 1e-9, at most 150 iterations on the large problem, 500 on the small); its
marginal error is then what this solver must reach, on the same problems, by the same measure. POT's debug output is swallowed.
"""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Ratio, one_thread, paired
from poise.solvers import sparse_transport

K, GAMMA = 8, 1.0


def run(quick: bool) -> list[Ratio]:
    """Ratios of POT's time over ours; without POT there is nothing to compare."""
    try:
        import ot
    except ImportError:
        return []
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparse_transport(_costs(2, 8), k=K)
        size = 200 if quick else 1000
        problems = 8 if quick else 64
        return [
            _race(ot, _costs(1, size), 150, 1 if quick else 2, 5.0),
            _race(ot, _costs(problems, 64), 500, 1 if quick else 3, 20.0),
        ]


def _costs(problems: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(problems, size, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    cost = torch.cdist(x, y).square()
    scaled: Tensor = cost / cost.amax((-2, -1), keepdim=True)
    return scaled


def _pot(ot: Any, cost: Tensor, most: int) -> float:
    """Solve one problem after the other, and return the largest marginal error (L1)."""
    m, n = cost.shape[1:]
    a, b = (torch.full((length,), 1 / length, dtype=torch.float64).numpy() for length in (m, n))
    worst = 0.0
    for matrix in cost.numpy():
        with contextlib.redirect_stdout(io.StringIO()):
            plan = ot.smooth.smooth_ot_semi_dual(
                a, b, matrix, GAMMA, reg_type="sparsity_constrained", max_nz=K, stopThr=1e-9, numItermax=most
            )
        worst = max(worst, float(abs(plan.sum(1) - a).sum()))
    return worst


def _race(ot: Any, cost: Tensor, most: int, repeats: int, goal: float) -> Ratio:
    problems, size = cost.shape[0], cost.shape[1]
    error = _pot(ot, cost, most)
    result = sparse_transport(cost, k=K, gamma=GAMMA, tolerance=error, repair=False)
    ours = float(result.marginal_error.max())
    timing = paired(
        lambda: _pot(ot, cost, most),
        lambda: sparse_transport(cost, k=K, gamma=GAMMA, tolerance=error, repair=False),
        repeats=repeats,
        warmup=0,
        clock=time.process_time,
    )
    detail = (
        f"{timing.first:.3g} against {timing.second:.3g} s of CPU; marginal errors {error:.1e} and {ours:.1e}, at most "
        f"{int(result.nonzeros.max())} nonzeros a column, POT {ot.__version__}"
    )
    return Ratio(
        f"POT semi-dual / sparse_transport, {problems} of {size} x {size}, k = {K}",
        timing.ratio,
        goal,
        "higher",
        detail,
    )
