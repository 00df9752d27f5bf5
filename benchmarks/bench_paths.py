"""What a path of l1 or group penalties costs: against scikit-learn, celer and skglm, at one duality gap, compilation left out.

Every side must bring the gap of every point below the same part of the objective at 0. The gap is computed here from the coefficients, and
not what a solver says of itself: a peer's own tolerance falls tenfold until it is reached, and only the run that reaches it is timed.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Ratio, one_thread
from poise.composite import Composite
from poise.datafits import LeastSquares, Logistic
from poise.penalties import L1, GroupLasso
from poise.solvers import CoordinateDescent

CLOCK = time.process_time
TOL = 1e-6
SAGA_POINTS = 3


@dataclass
class Path:
    """A path to be followed: examples, targets (numbers, or labels -1 and 1), falling weights, and inputs of a group."""

    x: Any
    y: Any
    logistic: bool
    points: int
    smallest: float
    group: int = 1

    @cached_property
    def weights(self) -> Any:
        slope = self.x.T @ (self.y / (2 if self.logistic else 1)) / len(self.y)
        return self._reach(slope).max() * np.geomspace(1, self.smallest, self.points + 1)[1:]

    def head(self, points: int) -> Path:
        """Return the first points alone."""
        first = Path(self.x, self.y, self.logistic, points, self.smallest, self.group)
        first.__dict__["weights"] = self.weights[:points]
        return first

    def _reach(self, v: Any) -> Any:
        return np.linalg.norm(v.reshape(-1, self.group), axis=1) / self.group**0.5

    def gap(self, coefficients: Any) -> float:
        """Return the largest duality gap of the path, over the objective at 0; coefficients are [inputs, points]."""
        from scipy.special import xlogy

        worst, n = 0.0, len(self.y)
        for weight, w in zip(self.weights, coefficients.T, strict=True):
            z = self.x @ w
            charge = weight * self.group**0.5 * np.linalg.norm(w.reshape(-1, self.group), axis=1).sum()
            if self.logistic:
                margin = self.y * z
                q = np.exp(-np.logaddexp(0, margin))
                scale = min(1.0, weight / self._reach(self.x.T @ (q * self.y) / n).max())
                q = scale * q
                gap = np.logaddexp(0, -margin).mean() + charge + (xlogy(q, q) + xlogy(1 - q, 1 - q)).mean()
                base = np.log(2)
            else:
                r = self.y - z
                scale = min(1.0, weight / self._reach(self.x.T @ r / n).max())
                gap = 0.5 * (r @ r) / n + charge - scale * (r @ self.y) / n + 0.5 * scale**2 * (r @ r) / n
                base = 0.5 * (self.y @ self.y) / n
            worst = max(worst, gap / base)
        return float(worst)


Follow = Callable[[Path, float], Any]


def run(quick: bool) -> list[Ratio]:
    """Ratios of CPU seconds on one thread."""
    n, p, points = (1000, 5000, 8) if quick else (10_000, 50_000, 30)
    found: list[Ratio] = []
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _compile()
        for density in (0.02,) if quick else (0.002, 0.02):
            x, signal = _sparse(n, p, density)
            found.append(_lasso(Path(x, signal, False, points, 0.05), density))
            found.append(_logistic(Path(x, np.sign(signal), True, points, 0.1), density))
            found.append(_saga(Path(x, np.sign(signal), True, SAGA_POINTS, 0.3), density))
        found += [_groups(_correlated(logistic, quick)) for logistic in (False, True)]
    return found


def _compile() -> None:
    """Run our loops once, so that what follows finds them compiled."""
    x, signal = _sparse(60, 40, 0.2)
    for logistic in (False, True):
        for design in (x, np.asfortranarray(x.toarray())):
            for group in (1, 5):
                _ours(Path(design, np.sign(signal) if logistic else signal, logistic, 2, 0.5, group), 1e-4)


def _sparse(n: int, p: int, density: float) -> tuple[Any, Any]:
    import scipy.sparse

    rng = np.random.default_rng(0)
    x = scipy.sparse.random(n, p, density, format="csc", random_state=rng, data_rvs=rng.standard_normal)
    x.indices, x.indptr = x.indices.astype(np.int32), x.indptr.astype(np.int32)
    w = np.zeros(p)
    w[rng.choice(p, p // 100 + 1, replace=False)] = rng.standard_normal(p // 100 + 1)
    z = x @ w
    return x, z + 0.3 * z.std() * rng.standard_normal(n)


def _correlated(logistic: bool, quick: bool) -> Path:
    """Groups of ten inputs that resemble each other, of which fifty matter."""
    n, groups, size = (300, 100, 10) if quick else (1000, 500, 10)
    rng = np.random.default_rng(0)
    x = 0.8 * np.repeat(rng.standard_normal((n, groups)), size, axis=1) + 0.6 * rng.standard_normal((n, groups * size))
    w = np.zeros((groups, size))
    w[rng.choice(groups, groups // 10, replace=False)] = rng.standard_normal((groups // 10, size))
    z = x @ w.ravel()
    y = z + 0.3 * z.std() * rng.standard_normal(n)
    return Path(np.asfortranarray(x), np.sign(y) if logistic else y, logistic, 10, 0.1, size)


# ---- sides -----------------------------------------------------------------------------------------------------------


def _ours(path: Path, tol: float) -> Any:
    fit, y = (Logistic(), (path.y + 1) / 2) if path.logistic else (LeastSquares(), path.y)
    penalty = L1() if path.group == 1 else GroupLasso(path.group)
    problem = Composite(path.x if not isinstance(path.x, np.ndarray) else torch.from_numpy(path.x), y, fit, penalty)
    found = CoordinateDescent(tol=tol).path(problem, list(path.weights))
    return np.stack([solution.coef.numpy() for solution in found], 1)


def _scikit_learn_lasso(path: Path, tol: float) -> Any:
    from sklearn.linear_model import lasso_path

    return lasso_path(path.x, path.y, alphas=path.weights, tol=tol, max_iter=10**5)[1]


def _celer(path: Path, tol: float) -> Any:
    from celer import celer_path

    options: dict[str, Any] = {"tol": tol, "prune": True, "max_iter": 100}
    if path.logistic:
        return celer_path(path.x, path.y, "logreg", alphas=path.weights * len(path.y), use_PN=True, **options)[1]
    if path.group == 1:
        return celer_path(path.x, path.y, "lasso", alphas=path.weights, **options)[1]
    roots = np.full(path.x.shape[1] // path.group, path.group**0.5)
    return celer_path(path.x, path.y, "grouplasso", alphas=path.weights, groups=path.group, weights=roots, **options)[1]


def _skglm_lasso(path: Path, tol: float) -> Any:
    from skglm.datafits import Quadratic
    from skglm.penalties import L1 as Absolute
    from skglm.solvers import AndersonCD
    from skglm.utils.jit_compilation import compiled_clone

    solver = AndersonCD(tol=tol * path.weights[0], fit_intercept=False)
    fit, penalty = compiled_clone(Quadratic()), compiled_clone(Absolute(1.0))
    return solver.path(path.x, path.y, fit, penalty, alphas=path.weights)[1]


def _skglm_logistic(path: Path, tol: float) -> Any:
    from skglm.datafits import Logistic as Fit
    from skglm.penalties import L1 as Absolute
    from skglm.solvers import ProxNewton
    from skglm.utils.jit_compilation import compiled_clone

    solver = ProxNewton(tol=tol * path.weights[0], fit_intercept=False)
    fit, w, found = compiled_clone(Fit()), np.zeros(path.x.shape[1]), []
    for weight in path.weights:
        w = solver.solve(path.x, path.y, fit, compiled_clone(Absolute(weight)), w.copy(), path.x @ w)[0]
        found.append(w)
    return np.stack(found, 1)


def _skglm_groups(path: Path, tol: float) -> Any:
    from skglm.datafits import LogisticGroup, QuadraticGroup
    from skglm.penalties import WeightedGroupL2
    from skglm.solvers import GroupBCD, GroupProxNewton
    from skglm.utils.jit_compilation import compiled_clone

    p = path.x.shape[1]
    indices, ptr = np.arange(p, dtype=np.int32), np.arange(0, p + 1, path.group, dtype=np.int32)
    roots = np.full(p // path.group, path.group**0.5)
    solver = (GroupProxNewton if path.logistic else GroupBCD)(tol=tol * path.weights[0], fit_intercept=False)
    fit = compiled_clone((LogisticGroup if path.logistic else QuadraticGroup)(ptr, indices))
    w, found = np.zeros(p), []
    for weight in path.weights:
        penalty = compiled_clone(WeightedGroupL2(weight, roots, ptr, indices))
        w = solver.solve(path.x, path.y, fit, penalty, w.copy(), path.x @ w)[0]
        found.append(w)
    return np.stack(found, 1)


def _liblinear(path: Path, tol: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    found = []
    for weight in path.weights:
        model = LogisticRegression(
            penalty="l1",
            C=1 / (len(path.y) * weight),
            solver="liblinear",
            tol=tol,
            fit_intercept=False,
            max_iter=10_000,
        )
        found.append(model.fit(path.x, path.y).coef_[0])
    return np.stack(found, 1)


# ---- comparisons -----------------------------------------------------------------------------------------------------


def _reached(path: Path, follow: Follow, tol: float, most: float = np.inf) -> tuple[float, float]:
    """Return seconds and gap of the first run, with tolerances falling tenfold, that reaches the gap; or of the last.

    A side that is slower than `most` seconds before it reaches the gap cannot be the fastest, and is not asked again.
    """
    while True:
        began = CLOCK()
        coefficients = follow(path, tol)
        seconds, gap = CLOCK() - began, path.gap(coefficients)
        if gap <= TOL * 1.01 or seconds > most or tol <= 1e-9:
            return seconds, gap
        tol /= 10


def _against(name: str, path: Path, peers: dict[str, tuple[Follow, float]], goal: float, size: str) -> Ratio:
    for follow, _ in peers.values():  # a peer's loops are compiled on these very types before the clock runs
        follow(path.head(2), 1e-4)
    ours = min((_reached(path, _ours, TOL) for _ in range(2)), key=lambda found: found[0])
    most = 5 * ours[0] if len(peers) > 1 else np.inf
    theirs = {peer: _reached(path, follow, tol, most) for peer, (follow, tol) in peers.items()}
    met = {peer: found for peer, found in theirs.items() if found[1] <= TOL * 1.01}
    fastest = min(met or theirs, key=lambda peer: theirs[peer][0])
    told = ", ".join(f"{peer} {seconds:.2f} s (gap {gap:.0e})" for peer, (seconds, gap) in theirs.items())
    detail = f"{size}, {path.points} weights to {path.smallest}: poise {ours[0]:.2f} s (gap {ours[1]:.0e}); {told}"
    return Ratio(f"{name}, poise / {fastest}", ours[0] / theirs[fastest][0], goal, "lower", detail)


def _size(path: Path, density: float) -> str:
    n, p = path.x.shape
    return f"{n:,} x {p:,}, density {density}"


def _lasso(path: Path, density: float) -> Ratio:
    peers = {"scikit-learn": (_scikit_learn_lasso, TOL), "celer": (_celer, TOL), "skglm": (_skglm_lasso, 1e-4)}
    return _against(f"lasso path, density {density}", path, peers, 1.5, _size(path, density))


def _logistic(path: Path, density: float) -> Ratio:
    peers = {"scikit-learn": (_liblinear, 1e-3), "celer": (_celer, TOL), "skglm": (_skglm_logistic, 1e-4)}
    return _against(f"logistic l1 path, density {density}", path, peers, 1.5, _size(path, density))


def _groups(path: Path) -> Ratio:
    name = "logistic groups" if path.logistic else "group lasso"
    n, p = path.x.shape
    size = f"{n:,} x {p:,} dense, groups of {path.group}"
    return _against(f"{name} path", path, {"skglm": (_skglm_groups, 1e-4)}, 1.0, size)


def _saga(path: Path, density: float, patience: float = 30.0) -> Ratio:
    """Saga runs on in short stretches until the gap is reached, or until it has taken `patience` times as long."""
    from sklearn.linear_model import LogisticRegression

    seconds, _ = _reached(path, _ours, TOL)
    taken, found, late = 0.0, [], False
    model = LogisticRegression(
        penalty="l1", solver="saga", tol=0.0, fit_intercept=False, warm_start=True, max_iter=20, random_state=0
    )
    for weight in path.weights:
        model.set_params(C=1 / (len(path.y) * weight))
        here = Path(path.x, path.y, True, 1, 1.0)
        here.__dict__["weights"] = np.array([weight])
        while True:
            began = CLOCK()
            model.fit(path.x, path.y)
            taken += CLOCK() - began
            gap = here.gap(model.coef_.T)
            late = taken > patience * seconds
            if gap <= TOL or late:
                break
        found.append(gap)
        if late:
            break
    told = f"stopped at point {len(found)} with gap {found[-1]:.0e}" if late else "reached"
    detail = f"{_size(path, density)}, {path.points} weights to {path.smallest}: saga {taken:.1f} s ({told}), poise {seconds:.2f} s"
    return Ratio(f"logistic l1 path, density {density}, saga / poise", taken / seconds, 5.0, "higher", detail)
