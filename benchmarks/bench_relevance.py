"""What relevance costs: the homotopy beside linear programming and coordinate descent, and training that reads no sample twice.

Both sides solve the same problem on one thread, in turns; agreement is checked before anything is timed.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from benchmarks.harness import Ratio, one_thread, paired
from poise.claims.p07 import BUDGET, FLOOR, SEEDS, Simulator
from poise.search import LinearMultiTask, oracle_counts
from poise.weights import LassoRelevance
from poise.weights.basis_pursuit import basis_pursuit, lasso


def run(quick: bool) -> list[Ratio]:
    """Ratios to the peers, the cost of a sweep in samples, and the adaptive search against known relevance."""
    with one_thread():
        return [_linear_program(quick), *_coordinate_descent(quick), _samples(quick), *_adaptive(quick)]


def _problem(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.standard_normal((rows, columns)), generator.standard_normal(rows)


def _linear_program(quick: bool) -> Ratio:
    import scipy
    from scipy.optimize import linprog

    rows, columns = (20, 1000) if quick else (50, 10_000)
    w, goal = _problem(rows, columns)

    def ours() -> float:
        return float(np.abs(basis_pursuit(w, goal).coefficients).sum())

    def theirs() -> float:
        # u, v >= 0 are linprog's own bounds
        return float(linprog(np.ones(2 * columns), A_eq=np.hstack([w, -w]), b_eq=goal, method="highs").fun)

    apart = abs(ours() - theirs()) / theirs()
    assert apart < 1e-6, apart
    timing = paired(theirs, ours, repeats=3 if quick else 7, warmup=1, clock=time.process_time)
    detail = (
        f"K={rows}, T={columns}: {timing.second * 1e3:.0f} ms against {timing.first * 1e3:.0f} ms of scipy {scipy.__version__} HiGHS, "
        f"objectives apart by {apart:.1e}"
    )
    return Ratio("nu1 by HiGHS / by the homotopy", timing.ratio, 5.0, "higher", detail)


def _coordinate_descent(quick: bool) -> list[Ratio]:
    rows, columns = (20, 1000) if quick else (50, 10_000)
    w, goal = _problem(rows, columns)
    lam = 0.1 * float(np.abs(goal @ w).max())
    own = lasso(w, goal, lam).coefficients
    result = []
    for name, solve in _peers(w, goal, lam).items():
        theirs = solve()
        scale = _objective(w, goal, lam, own)
        apart = (_objective(w, goal, lam, theirs) - scale) / scale
        assert abs(apart) < 1e-5, (name, apart)
        timing = paired(
            solve, lambda: lasso(w, goal, lam), repeats=3 if quick else 15, warmup=1, clock=time.process_time
        )
        detail = (
            f"K={rows}, T={columns}, lam a tenth of the largest: {timing.second * 1e3:.1f} ms against {timing.first * 1e3:.1f} ms; the "
            f"peer's objective is higher by {apart:.1e}"
        )
        result.append(Ratio(f"LASSO by {name} / by the homotopy", timing.ratio, 1.0, "higher", detail))
    return result


def _peers(w: np.ndarray, goal: np.ndarray, lam: float) -> dict:
    from sklearn.linear_model import Lasso

    alpha = lam / len(goal)
    fortran = np.asfortranarray(w)
    solvers = {
        "scikit-learn": lambda: Lasso(alpha, fit_intercept=False, tol=1e-8, max_iter=100_000).fit(fortran, goal).coef_
    }
    try:
        import celer

        solvers["celer"] = lambda: celer.Lasso(alpha, fit_intercept=False, tol=1e-8).fit(fortran, goal).coef_
    except ImportError:
        pass
    return solvers


def _objective(w: np.ndarray, goal: np.ndarray, lam: float, nu: np.ndarray) -> float:
    return float(0.5 * ((w @ nu - goal) ** 2).sum() + lam * np.abs(nu).sum())


def _samples(quick: bool) -> Ratio:
    """Train on a hundred times as many samples: what was added is summed up, so a fit costs the same."""
    few, many = (50, 500) if quick else (200, 20_000)
    trainers = []
    for number in (few, many):
        world, trainer = Simulator(0), LinearMultiTask(20, 4, 40, sweeps=15, tolerance=0.0)
        for task in range(40):
            for _ in range(number // few):
                trainer.add(task, *world.draw(task, few))
                world.drawn.clear()
        trainers.append(trainer)

    def fresh(trainer: LinearMultiTask) -> None:
        trainer.basis = None
        trainer.fit()

    timing = paired(
        lambda: fresh(trainers[1]), lambda: fresh(trainers[0]), repeats=5 if quick else 31, clock=time.process_time
    )
    detail = f"15 sweeps, d=20, K=4, T=40: {timing.first * 1e3:.1f} ms with {many} samples a task, {timing.second * 1e3:.1f} ms with {few}"
    return Ratio(f"a fit to {many // few} times as many samples / to as they are", timing.ratio, 1.1, "lower", detail)


def _adaptive(quick: bool) -> list[Ratio]:
    seeds = 3 if quick else 2 * SEEDS
    known, two, three = [], [], []
    for seed in range(seeds):
        world = Simulator(seed)
        known.append(world.fixed(oracle_counts(world.heads, world.goal, BUDGET, floor=FLOOR)))
        two.append(world.adaptive(LassoRelevance(floor=FLOOR))[0])
        three.append(world.adaptive(LassoRelevance(floor=FLOOR), 3, 0.2)[0])
    mean = float(torch.tensor(known).mean())
    return [
        Ratio(
            f"excess risk of the adaptive search, {epochs} epochs / of known relevance",
            float(torch.tensor(found).mean()) / mean,
            1.1,
            "lower",
            f"{seeds} seeds: {float(torch.tensor(found).mean()):.4f} against {mean:.4f}",
        )
        for epochs, found in (("two", two), ("three", three))
    ]
