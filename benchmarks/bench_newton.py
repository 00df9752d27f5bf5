"""What gradient-normalised Newton steps cost: against scikit-learn's Newton, torch's L-BFGS, and the rank-one path against the dense one.

Both sides reach the same gradient norm, which is measured after the run and not what a solver says of itself.
"""

from __future__ import annotations

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


class _Logistic(Term):
    """Logistic loss of a margin, labels -1 and 1."""

    formula = "logistic_margin"

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return functional.softplus(-prediction * target)


def run(quick: bool) -> list[Ratio]:
    """Ratios of CPU seconds on one thread."""
    with one_thread():
        return [
            _against_scikit_learn(quick), *(_against_lbfgs(quick, mu) for mu in (0.1, 0.02)), _rank_one(quick),
        ]  # fmt: skip


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


def _against_lbfgs(quick: bool, mu: float) -> Ratio:
    n, d = (100, 20) if quick else (500, 200)
    generator = torch.Generator().manual_seed(0)
    # Columns of sizes from 1 to 1/100: the Hessian's condition is their square.
    scales = torch.logspace(0, -2, d, dtype=torch.float64)
    a = (2 * torch.rand(n, d, generator=generator, dtype=torch.float64) - 1) * scales
    b = 2 * torch.rand(n, generator=generator, dtype=torch.float64) - 1
    a = a - LogSumExp(a, b, mu).value_and_gradient(torch.zeros(d, dtype=torch.float64))[1]
    f, start = LogSumExp(a, b, mu), torch.ones(d, dtype=torch.float64)
    found: dict[str, Tensor] = {}
    evaluations = [0]

    def ours() -> None:
        found["ours"] = GradientNormalizedNewton(tol=1e-8).minimize_function(f, start)[0]

    def theirs() -> None:
        x = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [x], max_iter=20_000, max_eval=40_000, tolerance_grad=1e-8 / d**0.5, tolerance_change=0.0, history_size=20,
            line_search_fn="strong_wolfe",
        )  # fmt: skip
        evaluations[0] = 0

        def closure() -> float:
            evaluations[0] += 1
            value, x.grad = f.value_and_gradient(x.detach())
            return value

        optimizer.step(closure)
        found["theirs"] = x.detach()

    timing = paired(theirs, ours, repeats=2 if quick else 3, warmup=0 if not quick else 1, clock=CLOCK)
    norms = {side: float(f.value_and_gradient(x)[1].norm()) for side, x in found.items()}
    detail = (
        f"{n} terms, {d} unknowns, columns of sizes 1 to 1/100, CPU: L-BFGS {timing.first:.3f} s, "
        f"{evaluations[0]:,} evaluations (torch {torch.__version__.partition('+')[0]}, history 20), newton {timing.second:.3f} s; "
        f"gradient norms {norms['theirs']:.1e} and {norms['ours']:.1e}"
    )
    return Ratio(f"log-sum-exp to 1e-8, L-BFGS / newton, mu = {mu}", timing.ratio, 3.0, "higher", detail)


def _rank_one(quick: bool) -> Ratio:
    d = 300 if quick else 2000
    v = torch.randn(d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, matrix = RankOne(0.5, v), torch.outer(v, v) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timing = paired(lambda: Dense(matrix).solve(0.3, v), lambda: one.solve(0.3, v), repeats=3, warmup=1)
    detail = f"d = {d}, float64: {timing.first * 1e3:.1f} against {timing.second * 1e3:.4f} ms"
    return Ratio("one solve, dense / rank-one", timing.ratio, 20.0, "higher", detail)
