"""Fifty shares times fifty steps of self-distillation from one eigendecomposition, beside refitting every step.

All sides produce the validation error of every step of every share (the second group of rows: the training error). The
peers are scikit-learn's `KernelRidge` and loops as one writes them from the definition: factorise once and solve at every
step, or fit anew at every step.
"""

from __future__ import annotations

import numpy as np
import scipy
import sklearn
import torch
from scipy.linalg import cho_factor, cho_solve
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics.pairwise import rbf_kernel

from benchmarks.harness import Ratio, one_thread, paired, seconds
from poise.solvers.kernel_distillation import SelfDistillationKRR

GAMMA, RIDGE = 0.1, 0.5


def run(quick: bool) -> list[Ratio]:
    """Ratios at n = 1000 training points, 200 validation points, 50 shares and 50 steps, on one thread."""
    with one_thread():
        return _run(quick)


def _run(quick: bool) -> list[Ratio]:
    n, shares, steps = (300, 10, 10) if quick else (1000, 50, 50)
    repeats = 3 if quick else 9
    x, y, new, truth = _data(n)
    alphas = np.linspace(0, 1, shares).tolist()
    refits = shares * steps

    def fit() -> SelfDistillationKRR:
        return SelfDistillationKRR("rbf", RIDGE, gamma=GAMMA).fit(x, y, steps=1)

    def everything() -> torch.Tensor:
        return fit().errors(alphas, steps, new, truth)

    def everything_on_train() -> torch.Tensor:
        return fit().errors(alphas, steps)

    def few_steps() -> torch.Tensor:
        return SelfDistillationKRR("rbf", RIDGE, gamma=GAMMA, decomposition="cholesky").fit(x, y, 0.3, 5).predict(new)

    def eigh_fit() -> object:
        gram = rbf_kernel(x, gamma=GAMMA)
        values, vectors = np.linalg.eigh(gram)
        return rbf_kernel(new, x, gamma=GAMMA) @ (vectors @ ((vectors.T @ y) / (values + RIDGE)))

    def cholesky_fit() -> object:
        return KernelRidge(alpha=RIDGE, kernel="rbf", gamma=GAMMA).fit(x, y).predict(new)

    def loop(on_train: bool = False) -> np.ndarray:
        gram, cross = rbf_kernel(x, gamma=GAMMA), rbf_kernel(new, x, gamma=GAMMA)
        factor = cho_factor(gram + RIDGE * np.eye(n), lower=True)
        errors = np.empty((shares, steps))
        for i, alpha in enumerate(alphas):
            previous = y
            for step in range(steps):
                dual = cho_solve(factor, alpha * y + (1 - alpha) * previous)
                previous = gram @ dual
                errors[i, step] = np.mean((previous - y if on_train else cross @ dual - truth) ** 2)
        return errors

    def some_refits(count: int) -> float:
        previous = y
        started = 0.0
        for _ in range(count):
            model = KernelRidge(alpha=RIDGE, kernel="rbf", gamma=GAMMA)

            def one(model: KernelRidge = model, previous: np.ndarray = previous) -> None:
                model.fit(x, 0.3 * y + 0.7 * previous)

            started += seconds(one) + seconds(lambda model=model: model.predict(new))
            previous = model.predict(x)
        return started / count

    # The sides agree before they are timed.
    np.testing.assert_allclose(everything().numpy(), loop(), rtol=1e-8)
    np.testing.assert_allclose(everything_on_train().numpy(), loop(on_train=True), rtol=1e-8)

    fitted = fit()
    whole = paired(everything, eigh_fit, repeats)
    on_train = paired(everything_on_train, eigh_fit, repeats)
    against_sklearn = paired(everything, cholesky_fit, repeats)
    few = paired(few_steps, cholesky_fit, repeats)
    loop_seconds = min(seconds(loop) for _ in range(1 if quick else 2))
    train_loop_seconds = min(seconds(lambda: loop(on_train=True)) for _ in range(1 if quick else 2))
    refit_seconds = some_refits(5 if quick else 15) * refits
    steps_only = min(seconds(lambda: fitted.errors(alphas, steps, new, truth)) for _ in range(repeats))
    train_only = min(seconds(lambda: fitted.errors(alphas, steps)) for _ in range(repeats))

    sizes = f"n {n}, {shares} shares x {steps} steps"
    against = f"numpy {np.__version__} eigh fit {whole.second:.3f} s"
    loops = f"loop {loop_seconds:.2f} s, scipy {scipy.__version__}"
    refit = (
        f"{refits} refits {refit_seconds:.1f} s (scaled from {5 if quick else 15}), scikit-learn {sklearn.__version__}"
    )
    return [
        Ratio(
            "all validation errors / one kernel ridge fit with eigh", whole.ratio, 1.3, "lower", f"{sizes}; {against}"
        ),
        Ratio("all training errors / one kernel ridge fit with eigh", on_train.ratio, 1.3, "lower", against),
        Ratio("loop with cached Cholesky / all validation errors", loop_seconds / whole.first, None, "higher", loops),
        Ratio(
            "  the same, the one decomposition not counted",
            loop_seconds / steps_only,
            100,
            "higher",
            f"{steps_only:.4f} s",
        ),
        Ratio("loop with cached Cholesky / all training errors", train_loop_seconds / on_train.first, None, "higher"),
        Ratio(
            "  the same, the one decomposition not counted",
            train_loop_seconds / train_only,
            100,
            "higher",
            f"{train_only:.4f} s",
        ),
        Ratio("refits by KernelRidge / all validation errors", refit_seconds / whole.first, None, "higher", refit),
        Ratio("  the same, the one decomposition not counted", refit_seconds / steps_only, 1000, "higher"),
        Ratio("all validation errors / KernelRidge.fit (Cholesky)", against_sklearn.ratio, None, "lower"),
        Ratio("five steps by Cholesky / one KernelRidge.fit", few.ratio, 1.3, "lower", f"{few.first:.3f} s"),
    ]


def _data(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((n + 200, 5))
    y = np.sin(x[:, 0]) + x[:, 1] + 0.3 * generator.standard_normal(n + 200)
    return x[:n], y[:n], x[n:], y[n:]
