"""What dynamic reward weighting costs: hypervolumes beside moocore, and influence weights beside the backward passes they need.

moocore computes hypervolumes in C. Both sides get the same points; compiling our loops (once a machine) is not in the time.
The influence step is compared with the same step under fixed weights from the same table of gradients, so what remains is the
rule itself: the Gram matrix, the mirror step, and the weighted sum.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.harness import Paired, Ratio, one_thread, paired
from poise.formula import parse
from poise.metrics.pareto import hypervolume, hypervolume_contributions, hypervolume_improvement
from poise.problem import Problem, Signals
from poise.readouts.supervised import Classification
from poise.readouts.tokens import TokenReadout
from poise.solvers.torch_optimizers import SGD
from poise.tasks.digit_addition import REWARD_NAMES, addition_prompts, answer, score_additions
from poise.tasks.words import WordModel
from poise.weights.pareto import GradientInfluence


def run(quick: bool) -> list[Ratio]:
    """Ratios to moocore for 1000 points of three objectives, and the overhead of influence weights."""
    with one_thread():
        return [*_volumes(quick), _language(quick), _influence(quick), _copies()]


def _volumes(quick: bool) -> list[Ratio]:
    try:
        import moocore
    except ImportError:
        return []
    repeats = 10 if quick else 60
    front = np.abs(np.random.default_rng(0).normal(size=(1000, 3)))
    front /= np.linalg.norm(front, axis=1, keepdims=True)
    cloud = np.random.default_rng(1).random((1000, 3))
    many = np.random.default_rng(2).random((100, 5))
    low, point = [0.0, 0.0, 0.0], np.array([0.7, 0.7, 0.3])

    def added() -> float:
        whole = moocore.hypervolume(np.vstack([front, point]), ref=low, maximise=True)
        return float(whole - moocore.hypervolume(front, ref=low, maximise=True))

    cases: list[tuple[str, float | None, Callable[[], Any], Callable[[], Any]]] = [
        (
            "contributions of 1000 points, 3 objectives", 2.0,
            lambda: hypervolume_contributions(front, low),
            lambda: moocore.hv_contributions(front, ref=low, maximise=True),
        ),
        ("what one more point adds to 1000, 3 objectives", 2.0, lambda: hypervolume_improvement(point, front, low), added),
        (
            "volume of 1000 points on a front, 3 objectives", 2.0,
            lambda: hypervolume(front, low), lambda: moocore.hypervolume(front, ref=low, maximise=True),
        ),
        (
            "volume of 1000 points in a cloud, 3 objectives", None,
            lambda: hypervolume(cloud, low), lambda: moocore.hypervolume(cloud, ref=low, maximise=True),
        ),
        (
            "volume of 100 points, 5 objectives", None,
            lambda: hypervolume(many, np.zeros(5)), lambda: moocore.hypervolume(many, ref=np.zeros(5), maximise=True),
        ),
    ]  # fmt: skip
    result = []
    for name, goal, ours, theirs in cases:
        np.testing.assert_allclose(np.asarray(ours()), np.asarray(theirs()), rtol=1e-8, atol=1e-12)
        timing = paired(ours, theirs, repeats)
        detail = (
            f"moocore {moocore.__version__}: {timing.first * 1e6:.0f} against {timing.second * 1e6:.0f} microseconds"
        )
        result.append(Ratio(f"{name} / moocore", timing.ratio, goal, "lower", detail))
    return result


def _problem(width: int, batch: int) -> tuple[nn.Module, Callable[[], Problem]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 64, generator=generator)
    y = torch.randint(10, (batch,), generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    objective = parse("cross_entropy + confidence_penalty + focal")
    return model, lambda: Problem(model, objective, [{"main": {"input": x, "target": y}}], Classification())


def _language(quick: bool) -> Ratio:
    """A step of RLOO on three rewards: 128 answers of the additions model, gradients, weights, update."""
    model, prompts = WordModel(hidden=128), addition_prompts()
    objective = parse(" + ".join(f"rloo(reward=score.on(reward='{n}')).named('{n}')" for n in REWARD_NAMES))
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(16).repeat_interleave(8)

    def make() -> Problem:
        asked = {name: column[rows] for name, column in prompts.items()}
        batch = {**asked, **answer(model, asked, generator), "group": rows}
        return Problem(model, objective, [{"main": {**batch, **score_additions(batch)}}], TokenReadout())

    timing = _race(model, make, 4 if quick else 40)
    detail = f"two GRU layers of 128, 128 answers: {timing.first * 1e3:.1f} against {timing.second * 1e3:.1f} ms of CPU a step"
    return Ratio(
        "RLOO step under influence weights / from the same gradients under fixed weights",
        timing.ratio,
        1.05,
        "lower",
        detail,
    )


def _influence(quick: bool) -> Ratio:
    """The same for three terms on a batch that is given, where nothing but the passes stands beside the rule."""
    model, make = _problem(512, 512)
    timing = _race(model, make, 10 if quick else 80)
    detail = f"MLP 64-512-512-10, batch 512, three terms: {timing.first * 1e3:.2f} against {timing.second * 1e3:.2f} ms of CPU a step"
    return Ratio(
        "step under influence weights / from the same gradients under fixed weights",
        timing.ratio,
        1.05,
        "lower",
        detail,
    )


def _race(model: nn.Module, make: Callable[[], Problem], repeats: int) -> Paired:
    """Time a step under influence weights against the same step under fixed ones, both from per-term gradients."""
    labels = make().objective.labels
    rows = {label: {label: 1.0} for label in labels}
    solver = SGD(lr=1e-6)
    solver.bind(model, make().objective)
    policy = GradientInfluence(mu=1e-5)
    weights: dict[str, Any] = dict.fromkeys(labels, 1 / 3)

    def fixed() -> None:
        problem = make()
        problem.table(rows)
        problem.weigh(weights, own=True)
        solver.step(problem)

    def influenced() -> None:
        problem = make()
        signals = Signals(labels, rows, problem, lr=1e-6)
        problem.weigh(policy.weights(signals), own=True)
        solver.step(problem)
        policy.advance(signals)

    return paired(influenced, fixed, repeats, clock=time.process_time)


def _copies() -> Ratio:
    """Bytes of the gradients that are held, in copies of the model for each objective."""
    model, make = _problem(512, 512)
    problem = make()
    table = problem.table({label: {label: 1.0} for label in problem.objective.labels})
    held = sum(g.numel() * g.element_size() for row in table.rows for g in row.values())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    detail = f"{held / 2**20:.1f} MiB for {len(table.rows)} objectives and a model of {size / 2**20:.1f} MiB"
    return Ratio(
        "gradients held / copies of the model, one for each objective",
        held / size / len(table.rows),
        1.0,
        "lower",
        detail,
    )
