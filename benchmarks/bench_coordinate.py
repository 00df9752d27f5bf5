"""What forests and greedy blocks cost: against SciPy's sparse solver, scikit-learn's, celer's and skglm's coordinate descent.

All sides of a lasso reach the same duality gap, which is measured after the run and not what a solver says of itself.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Ratio, one_thread, paired
from poise.composite import Composite
from poise.data.coordinate_problems import ill_scaled_regression
from poise.datafits import LeastSquares
from poise.penalties import L1, GroupLasso, Scaled
from poise.solvers import BlockCoordinate, forest_solve

CLOCK = time.process_time
GAP = 1e-6


def run(quick: bool) -> list[Ratio]:
    """Ratios of CPU seconds on one thread."""
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [*_forest(quick), *_lasso(quick, 0.1, 400), *_lasso(quick, 0.03, 700), *_groups(quick)]


# ---- forests -----------------------------------------------------------------------------------------------------------


def _forest(quick: bool) -> list[Ratio]:
    import scipy
    from scipy import sparse
    from scipy.sparse.linalg import splu, spsolve

    n = 20_000 if quick else 100_000
    random = np.random.default_rng(0)
    name = random.permutation(n)
    kept = np.arange(1, n)[random.random(n - 1) > 0.05]
    parents = (random.random(len(kept)) * kept).astype(np.int64)
    weights = random.standard_normal(len(kept))
    ends = np.r_[name[kept], name[parents]], np.r_[name[parents], name[kept]]
    edges = sparse.csr_matrix((np.r_[weights, weights], ends), shape=(n, n))
    h = (edges + sparse.diags(np.asarray(abs(edges).sum(1)).ravel() + 0.1)).tocsr()
    columns, b = h.tocsc(), torch.from_numpy(random.standard_normal(n))
    factored, right = splu(columns), b.numpy()
    repeats = 7 if quick else 25
    whole = paired(lambda: spsolve(columns, right), lambda: forest_solve(h, b), repeats, 2, CLOCK)
    bare = paired(lambda: forest_solve(h, b), lambda: factored.solve(right), repeats, 2, CLOCK)
    off = float(np.abs(forest_solve(h, b).numpy() - factored.solve(right)).max())
    detail = f"{n:,} nodes, random numbering; SciPy {scipy.__version__}; answers differ by {off:.0e}; "
    return [
        Ratio(
            "a forest, spsolve / forest_solve",
            whole.ratio,
            20.0,
            "higher",
            detail + f"{whole.first * 1e3:.1f} against {whole.second * 1e3:.1f} ms",
        ),
        Ratio(
            "a forest, forest_solve / solve of a ready factor",
            bare.ratio,
            1.2,
            "lower",
            detail + f"{bare.first * 1e3:.1f} against {bare.second * 1e3:.1f} ms",
        ),
    ]


# ---- ill-scaled lasso --------------------------------------------------------------------------------------------------


def _lasso(quick: bool, share: float, block: int) -> list[Ratio]:
    """Blocks hold the support, 175 weights at a tenth and 570 at 0.03, with room."""
    import celer
    import skglm
    import sklearn

    n, inputs, block = (400, 800, 100) if quick else (1000, 10_000, block)
    a, y = ill_scaled_regression(n, inputs, seed=0)
    # columns one after the other in memory, for all sides
    a = a.T.contiguous().T
    level = share * float((a.T @ y).abs().max()) / n
    problem = Composite(a, y, LeastSquares(), Scaled(L1(), level))
    columns, targets = np.asfortranarray(a.numpy()), y.numpy()
    found: dict[str, torch.Tensor] = {}

    def ours() -> None:
        solver = BlockCoordinate("gs_q", "projected_newton", block, tol=GAP)
        found["ours"] = solver.minimize(Composite(a, y, LeastSquares(), Scaled(L1(), level))).coef

    rivals: dict[str, tuple[str, Callable[[float], Any]]] = {
        "scikit-learn": (sklearn.__version__, lambda tol: _scikit_learn(level, tol)),
        "celer": (celer.__version__, lambda tol: celer.Lasso(alpha=level, fit_intercept=False, tol=tol, max_iter=100)),
        "skglm": (skglm.__version__, lambda tol: skglm.Lasso(alpha=level, fit_intercept=False, tol=tol, max_iter=100)),
    }
    rows = []
    for name, (version, make) in rivals.items():
        tol = _tolerance(problem, make, columns, targets, level)

        def theirs(make: Callable[[float], Any] = make, tol: float = tol, name: str = name) -> None:
            found[name] = torch.from_numpy(make(tol).fit(columns, targets).coef_)

        timing = paired(theirs, ours, 3 if quick else 5, 1, CLOCK)
        gaps = {side: problem.gap(found[side], torch.zeros(())) / problem.scale for side in (name, "ours")}
        detail = (
            f"{n:,} x {inputs:,}, l1 at {share:g} of its largest: {name} {version} {timing.first:.2f} s, gap "
            f"{gaps[name]:.0e} of f_0; blocks of {block} "
            f"{timing.second:.2f} s, gap {gaps['ours']:.0e}"
        )
        rows.append(
            Ratio(
                f"ill-scaled lasso at {share:g}, {name} / greedy blocks",
                timing.ratio,
                3.0 if name == "scikit-learn" else None,
                "higher",
                detail,
            )
        )
    return rows


def _scikit_learn(level: float, tol: float) -> Any:
    from sklearn.linear_model import Lasso

    return Lasso(alpha=level, fit_intercept=False, tol=tol, max_iter=100_000)


def _tolerance(problem: Composite, make: Callable[[float], Any], x: Any, y: Any, level: float) -> float:
    """Return the largest tolerance of a peer, by decades, at which its answer has the gap that is asked for."""
    start = level if type(make(1.0)).__module__.startswith("skglm") else 1e-4
    for decade in range(12):
        tol: float = start * 10.0**-decade
        w = torch.from_numpy(make(tol).fit(x, y).coef_)
        if problem.gap(w, torch.zeros(())) <= GAP * problem.scale:
            return tol
    return tol


# ---- ill-scaled groups -------------------------------------------------------------------------------------------------


def _groups(quick: bool) -> list[Ratio]:
    import skglm
    from skglm.datafits import QuadraticGroup
    from skglm.penalties import WeightedGroupL2
    from skglm.solvers import GroupBCD
    from skglm.utils.data import grp_converter

    n, inputs, size = (200, 300, 5) if quick else (400, 800, 5)
    a, y = ill_scaled_regression(n, inputs, seed=0)
    # by size, so that a group's constant is not set by one input
    a = a[:, a.square().sum(0).argsort()]
    problem = Composite(a, y, LeastSquares(), Scaled(GroupLasso(size), 1.0))
    level = 0.1 * problem.largest_weight()
    problem = Composite(a, y, LeastSquares(), Scaled(GroupLasso(size), level))
    columns, targets = np.asfortranarray(a.numpy()), y.numpy()
    indices, ptr = grp_converter(size, inputs)
    weights = np.full(inputs // size, float(size) ** 0.5)
    found: dict[str, torch.Tensor] = {}

    def theirs(tol: float) -> None:
        datafit, penalty = QuadraticGroup(ptr, indices), WeightedGroupL2(level, weights, ptr, indices)
        datafit.initialize(columns, targets)
        solver = GroupBCD(max_iter=1000, max_epochs=100_000, tol=tol)
        found["skglm"] = torch.from_numpy(solver.solve(columns, targets, datafit, penalty)[0])

    tol = level
    for _ in range(12):
        theirs(tol)
        if problem.gap(found["skglm"], torch.zeros(())) <= GAP * problem.scale:
            break
        tol /= 10.0

    def ours() -> None:
        solver = BlockCoordinate("gs_q", "lipschitz", partition="groups", tol=GAP, iterations=200_000)
        found["ours"] = solver.minimize(Composite(a, y, LeastSquares(), Scaled(GroupLasso(size), level))).coef

    timing = paired(ours, lambda: theirs(tol), 1 if quick else 3, 1, CLOCK)
    gaps = {side: problem.gap(found[side], torch.zeros(())) / problem.scale for side in found}
    detail = (
        f"{n} x {inputs}, groups of {size}: greedy blocks {timing.first:.2f} s, gap {gaps['ours']:.0e} of f_0; skglm "
        f"{skglm.__version__} GroupBCD "
        f"{timing.second:.3f} s, gap {gaps['skglm']:.0e}"
    )
    return [Ratio("ill-scaled group lasso, greedy blocks / skglm", timing.ratio, None, "lower", detail)]
