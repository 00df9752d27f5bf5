"""What gradient-normalised Newton steps cost: against scikit-learn's Newton, torch's L-BFGS, and the rank-one path against the dense one.

Both sides reach the same gradient norm, which is measured after the run and not what a solver says of itself.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import poise
from benchmarks.harness import Ratio, one_thread, paired
from poise import Problem
from poise.objective import Term
from poise.readouts import Regression
from poise.solvers import GradientNormalizedNewton
from poise.solvers.curvature import Dense, RankOne
from poise.tasks.smooth_functions import LogSumExp

CLOCK = time.process_time
SIZES = ((100, 20, 0.1, 100.0), (500, 200, 0.5, 10.0))
"""Terms, unknowns, smoothing, largest over least column; in the second torch's L-BFGS ends a little above 1e-8, by its values' rounding."""


class _Logistic(Term):
    """Logistic loss of a margin, labels -1 and 1."""

    formula = "logistic_margin"

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return functional.softplus(-prediction * target)


def run(quick: bool) -> list[Ratio]:
    """Ratios of CPU seconds on one thread."""
    with one_thread():
        rivals = [_against_lbfgs(*sizes, repeats=3 if quick else 7) for sizes in SIZES]
        return [_against_scikit_learn(quick), *rivals, _rank_one(quick)]


def _against_scikit_learn(quick: bool) -> Ratio:
    import sklearn
    from sklearn.linear_model import LogisticRegression

    n, d, l2 = (2000, 40, 1e-4) if quick else (20_000, 200, 1e-4)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    w = torch.randn(d, generator=generator, dtype=torch.float64) / d**0.5
    y = torch.where(torch.rand(n, generator=generator) < torch.sigmoid(3 * x @ w), 1.0, -1.0).double()
    inputs, labels = x.numpy(), y.numpy()
    models: dict[str, Any] = {}

    def ours() -> None:
        model = nn.Linear(d, 1, dtype=torch.float64)
        for p in model.parameters():
            nn.init.zeros_(p)
        problem = Problem(
            model, 1.0 * _Logistic() + l2 * poise.parse("l2"), [{"main": {"input": x, "target": y}}], Regression()
        )
        models["certificate"] = GradientNormalizedNewton(tol=1e-8).minimize(problem)
        models["ours"] = np.append(model.weight.detach().numpy()[0], float(model.bias.detach()))

    def theirs() -> None:
        peer = LogisticRegression(C=1 / (n * l2), solver="newton-cholesky", tol=1e-8, max_iter=100).fit(inputs, labels)
        models["theirs"] = np.append(peer.coef_[0], peer.intercept_[0])
        models["iterations"] = int(peer.n_iter_[0])

    timing = paired(ours, theirs, repeats=3 if quick else 7, warmup=1, clock=CLOCK)
    norms = [_logistic_norm(inputs, labels, models[side], l2) for side in ("ours", "theirs")]
    detail = (
        f"n = {n:,}, d = {d}, float64, CPU: {timing.first:.3f} against {timing.second:.3f} s (scikit-learn {sklearn.__version__}); "
        f"{models['certificate'].iterations} against {models['iterations']} steps, gradient norms {norms[0]:.1e} and {norms[1]:.1e}"
    )
    return Ratio("logistic regression, newton / newton-cholesky", timing.ratio, 1.3, "lower", detail)


def _logistic_norm(x: Any, y: Any, w: Any, l2: float) -> float:
    residual = -y / (1 + np.exp(y * (x @ w[:-1] + w[-1]))) / len(y)
    return float(np.linalg.norm(np.append(x.T @ residual + l2 * w[:-1], residual.sum())))


class _Reached(Exception):
    """L-BFGS stops by the largest entry of the gradient; this stops it by the norm that is asked for."""


def _against_lbfgs(n: int, d: int, mu: float, spread: float, repeats: int) -> Ratio:
    generator = torch.Generator().manual_seed(0)
    # The Hessian's condition is the square of the spread of the columns' sizes, times that of the soft maximum.
    sizes = torch.logspace(0, -math.log10(spread), d, dtype=torch.float64)
    a = (2 * torch.rand(n, d, generator=generator, dtype=torch.float64) - 1) * sizes
    b = 2 * torch.rand(n, generator=generator, dtype=torch.float64) - 1
    a = a - LogSumExp(a, b, mu).value_and_gradient(torch.zeros(d, dtype=torch.float64))[1]
    f, start = LogSumExp(a, b, mu), torch.ones(d, dtype=torch.float64)
    norms: dict[str, float] = {}
    evaluations = [0]

    def ours() -> None:
        norms["ours"] = GradientNormalizedNewton(tol=1e-8).minimize_function(f, start)[1].residual

    def theirs() -> None:
        x = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [x], max_iter=4000, max_eval=5000, tolerance_grad=0.0, tolerance_change=0.0, line_search_fn="strong_wolfe"
        )
        evaluations[0] = 0

        def closure() -> float:
            evaluations[0] += 1
            value, x.grad = f.value_and_gradient(x.detach())
            norms["theirs"] = float(x.grad.norm())
            if norms["theirs"] <= 1e-8:
                raise _Reached
            return value

        with contextlib.suppress(_Reached):
            optimizer.step(closure)

    timing = paired(theirs, ours, repeats=repeats, warmup=1, clock=CLOCK)
    reached = "" if norms["theirs"] <= 1e-8 else ", which is not 1e-8"
    detail = (
        f"{n} terms, {d} unknowns, mu = {mu}, columns 1 to 1/{spread:.0f}: L-BFGS {timing.first:.3f} s, {evaluations[0]:,} evaluations "
        f"(torch {torch.__version__.partition('+')[0]}, strong Wolfe, history 100), newton {timing.second:.3f} s; gradient norms "
        f"{norms['theirs']:.1e}{reached}, and {norms['ours']:.1e}"
    )
    return Ratio(f"log-sum-exp, L-BFGS / newton, {d} unknowns", timing.ratio, 3.0, "higher", detail)


def _rank_one(quick: bool) -> Ratio:
    d = 300 if quick else 2000
    v = torch.randn(d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, matrix = RankOne(0.5, v), torch.outer(v, v) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timing = paired(lambda: Dense(matrix).solve(0.3, v), lambda: one.solve(0.3, v), repeats=3, warmup=1)
    detail = f"d = {d}, float64: {timing.first * 1e3:.1f} against {timing.second * 1e3:.4f} ms"
    return Ratio("one solve, dense / rank-one", timing.ratio, 20.0, "higher", detail)
