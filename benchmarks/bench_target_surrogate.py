"""What target-based surrogates cost: one outer step beside one of SGD, twenty inner steps beside one, and the oracle calls they save."""

from __future__ import annotations

import time

import torch
from torch import nn

from benchmarks.harness import Ratio, one_thread, paired
from poise.claims.p52 import oracle_calls
from poise.formula import parse
from poise.problem import Problem
from poise.readouts.supervised import Classification
from poise.solvers import TargetSurrogate, TorchOptimizer

CLOCK = time.process_time


def run(quick: bool) -> list[Ratio]:
    """Ratios of CPU seconds on one thread, and of oracle calls."""
    with one_thread():
        return [_one_step(quick), _gram(quick, known=True), _gram(quick, known=False), _calls()]


def _one_step(quick: bool) -> Ratio:
    """One outer step with one inner step of SGD against a step of SGD: the same gradient, split at the outputs."""
    x, y = torch.randn(128, 64), torch.randint(10, (128,))
    objective = parse("cross_entropy")
    calls = []
    for solver in (
        TargetSurrogate(1, eta=2.0, inner="sgd", inner_lr=0.01, inner_options={"momentum": 0.9}),
        TorchOptimizer("sgd", lr=0.01, momentum=0.9),
    ):
        model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        solver.bind(model, objective)
        problem = Problem(model, objective, [{"main": {"input": x, "target": y}}], Classification())

        def several(solver: TargetSurrogate | TorchOptimizer = solver, problem: Problem = problem) -> None:
            for _ in range(10):
                solver.step(problem.fresh())

        calls.append(several)
    timing = paired(calls[0], calls[1], repeats=10 if quick else 60, warmup=3, clock=CLOCK)
    detail = f"128 rows, 64-256-256-10: {timing.first * 100:.3f} against {timing.second * 100:.3f} ms a step (torch {torch.__version__})"
    return Ratio("one outer step, m = 1 / SGD", timing.ratio, 1.15, "lower", detail)


def _gram(quick: bool, known: bool) -> Ratio:
    """Twenty inner steps of a linear model against one, on a full batch; on new inputs the Gram matrix is made in every outer step."""
    n, d, classes = (5000, 50, 10) if quick else (20_000, 100, 10)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, d, generator=generator), torch.randint(classes, (n,), generator=generator)
    objective = parse("cross_entropy")
    calls = []
    for m in (20, 1):
        model = nn.Linear(d, classes)
        solver = TargetSurrogate(m, eta=2.0, inner="sgd", inner_lr=0.1, inner_options={"momentum": 0.0})
        solver.bind(model, objective)
        problem = Problem(model, objective, [{"main": {"input": x, "target": y}}], Classification())

        def one(solver: TargetSurrogate = solver, problem: Problem = problem) -> None:
            if not known:
                solver._design = None
            solver.step(problem.fresh())

        calls.append(one)
    timing = paired(calls[0], calls[1], repeats=10 if quick else 40, warmup=3, clock=CLOCK)
    detail = f"{n:,} x {d}, {classes} classes, float32: {timing.first * 1e3:.2f} against {timing.second * 1e3:.2f} ms"
    name = "linear model, full batch, m = 20 / m = 1"
    return (
        Ratio(name, timing.ratio, 2.0, "lower", detail)
        if known
        else Ratio(f"{name}, new inputs", timing.ratio, None, "lower", detail)
    )


def _calls() -> Ratio:
    found = oracle_calls()
    detail = f"breast cancer, safe inner steps: {' / '.join(f'{m}: {n}' for m, n in found.items())}"
    return Ratio("oracle calls to equal loss, m = 1 / exact", found["1"] / found["exact"], 2.5, "higher", detail)
