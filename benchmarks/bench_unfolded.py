"""Unfolded solvers beside a hand-written loop, and learned steps beside plain and accelerated ones, in iterations and seconds.

Bernoulli-Gaussian signals, m = 100, n = 200, 8 % nonzeros, noise 0.03, the lasso of weight 0.1, batches of 1,000. A depth is enough
where the mean objective is within 1 % of the least. The depth of the learned solver is that of the shallowest generation within 1 %; its
seconds are those of running it, training is stated beside.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Ratio, one_thread, paired
from poise.data.sparse_signals import BernoulliGaussian
from poise.insight.unfolding import plain_solvers
from poise.solvers import Incremental, Unfolded, lasso_gap, recover, train_unfolded

WEIGHT, LAYERS, NEAR = 0.1, 20, 1.01


def run(quick: bool) -> list[Ratio]:
    """Ratios of speed, iterations and seconds."""
    with one_thread():
        sampler = BernoulliGaussian(100, 200)
        batch = sampler(1000, torch.Generator().manual_seed(1))
        return [
            _loop(batch.operator, batch.y, 5 if quick else 30),
            *_race(sampler, batch.operator, batch.y, quick),
        ]


def by_hand(A: Tensor, y: Tensor, steps: list[float]) -> Tensor:
    """ISTA as one writes it."""
    x = torch.zeros(len(y), A.shape[1])
    for alpha in steps:
        u = x + alpha * ((y - x @ A.T) @ A)
        x = u.sign() * torch.relu(u.abs() - alpha * WEIGHT)
    return x


def momentum_by_hand(A: Tensor, y: Tensor, alpha: float, count: int) -> Tensor:
    """FISTA as one writes it."""
    x = point = torch.zeros(len(y), A.shape[1])
    t = 1.0
    for _ in range(count):
        u = point + alpha * ((y - point @ A.T) @ A)
        fresh = u.sign() * torch.relu(u.abs() - alpha * WEIGHT)
        following = (1 + (1 + 4 * t * t) ** 0.5) / 2
        point, x, t = fresh + (t - 1) / following * (fresh - x), fresh, following
    return x


def _loop(A: Tensor, y: Tensor, repeats: int) -> Ratio:
    model = Unfolded("ista", LAYERS, weight=WEIGHT)
    steps = model.export(A)
    with torch.no_grad():
        torch.testing.assert_close(model(A, y), by_hand(A, y, steps), atol=1e-4, rtol=1e-3)
        timing = paired(lambda: by_hand(A, y, steps), lambda: model(A, y), repeats=repeats, clock=time.process_time)
    detail = f"{timing.first:.3g} against {timing.second:.3g} s of CPU, batch 1,000, m = 100, n = 200, one thread"
    return Ratio(f"hand-written loop / unfolded forward, {LAYERS} layers", timing.ratio, 0.9, "higher", detail)


def _race(sampler: BernoulliGaussian, A: Tensor, y: Tensor, quick: bool) -> list[Ratio]:
    end = recover(A, y, weight=WEIGHT, momentum=True, iterations=3000)
    least = float(end.objective.mean())
    assert float(lasso_gap(A, y, end.x, WEIGHT).mean()) < 1e-3 * least
    model = Unfolded("ista", LAYERS, weight=WEIGHT)
    started = time.process_time()
    training = train_unfolded(model, sampler, "objective", Incremental(batches=10 if quick else 40))
    spent = time.process_time() - started

    def enough(x: Tensor) -> bool:
        return float(model.objective(A, y, x).mean()) <= NEAR * least

    depth = None
    with torch.no_grad():
        for generation in training.history:
            model.set_steps([*generation.steps, *[1.0] * (LAYERS - generation.layers)])
            if enough(model(A, y, layers=generation.layers)):
                depth = generation.layers
                break
    plain = plain_solvers(600, WEIGHT)
    counts = {}
    for name in ("1/L", "FISTA"):
        path: Callable[..., Tensor] = plain[name]  # type: ignore[assignment]
        counts[name] = next((i for i, x in enumerate(path(A, y), start=1) if enough(x)), 600)
    if depth is None:
        return [
            Ratio(
                "learned layers to 1 %, not reached",
                float("inf"),
                0.1,
                "lower",
                f"{LAYERS} layers, training {spent:.3g} s",
            )
        ]
    alpha = 1 / float(torch.linalg.matrix_norm(A, 2)) ** 2
    repeats = 3 if quick else 10
    with torch.no_grad():
        ista = paired(
            lambda: model(A, y, layers=depth),
            lambda: by_hand(A, y, [alpha] * counts["1/L"]),
            repeats,
            clock=time.process_time,
        )
        fista = paired(
            lambda: model(A, y, layers=depth),
            lambda: momentum_by_hand(A, y, alpha, counts["FISTA"]),
            repeats,
            clock=time.process_time,
        )
    said = f"{depth} layers against {counts['1/L']} (1/L) and {counts['FISTA']} (FISTA); training took {spent:.3g} s of CPU"
    return [
        Ratio("iterations to 1 %, learned / constant steps", depth / counts["1/L"], 0.1, "lower", said),
        Ratio("iterations to 1 %, learned / FISTA", depth / counts["FISTA"], 1 / 3, "lower", said),
        Ratio(
            "seconds to 1 %, learned / constant steps",
            ista.ratio,
            0.1,
            "lower",
            f"{ista.first:.3g} against {ista.second:.3g} s",
        ),
        Ratio(
            "seconds to 1 %, learned / FISTA",
            fista.ratio,
            1 / 3,
            "lower",
            f"{fista.first:.3g} against {fista.second:.3g} s",
        ),
    ]
