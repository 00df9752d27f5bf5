"""What guided preferences cost: the program beside general solvers, and the backward passes of a step.

The peers solve the very same program: CVXPY with its parameters replaced from step to step and its default solver, as the authors'
own code does with CVXOPT, and SciPy's HiGHS set out anew. Ours includes everything from the Gram matrix to the weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import Ratio, one_thread, paired
from poise.objective import Objective
from poise.policy import Policies
from poise.problem import Problem, Signals
from poise.readouts import DomainFeatures
from poise.terms import DomainAdversarial, SourceClassification, TargetClassification
from poise.weights.pareto import GuidedPareto
from poise.weights.pareto.guided import least_descent

CLASSES, WIDTH, BATCH = 10, 64, 64
Case = tuple[Tensor, Tensor]


def run(quick: bool) -> list[Ratio]:
    """Seconds and ratios of the program, and passes and seconds of a table of three objectives and a guide."""
    with one_thread():
        return [*_program(quick), *_table(quick)]


def _program(quick: bool) -> list[Ratio]:
    cases = [_case(seed) for seed in range(50)]
    ours = _over(cases, _weigh_balance)
    result = []
    alone = min(_seconds(ours, blocks=3 if quick else 40))
    detail = "balance, from the Gram matrix of 3 gradients and their products with the guide, m = 3"
    result.append(Ratio("milliseconds to the weights of three objectives", 1e3 * alone, 0.3, "lower", detail))
    for m in (5, 6, 10):
        many = [_case(seed, m) for seed in range(20)]
        cost = min(_seconds(_over(many, _weigh_balance), blocks=3 if quick else 20))
        way = "all vertices" if m <= 5 else "HiGHS"
        result.append(Ratio(f"milliseconds to the weights of {m} objectives", 1e3 * cost, detail=way))
    for name, make, goal in (("CVXPY", _cvxpy, 20.0), ("SciPy's linprog", _linprog, None)):
        try:
            peer, version = make()
        except ImportError:
            continue
        largest = max(_difference(case, peer) for case in cases)
        timing = paired(_over(cases[:5], peer), _over(cases[:5], _weigh_balance), repeats=3 if quick else 30)
        detail = (
            f"{version}: {timing.first / 5 * 1e3:.2f} against {timing.second / 5 * 1e3:.3f} ms; "
            f"the values differ by {largest:.1e} at most"
        )
        result.append(Ratio(f"{name} / ours, weights of three objectives", timing.ratio, goal, "higher", detail))
    return result


def _table(quick: bool) -> list[Ratio]:
    torch.manual_seed(0)
    width = 512 if quick else 1024
    model = nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, WIDTH), nn.ReLU(),
        nn.Linear(WIDTH, CLASSES),
    )  # fmt: skip
    target = TargetClassification(CLASSES, WIDTH, (64,), shifted=True)
    objective = SourceClassification() + DomainAdversarial(WIDTH, (64,)) + target
    domain = torch.where(torch.arange(2 * BATCH) < BATCH, 0, -1)
    batch = {
        "input": torch.randn(2 * BATCH, 64), "domain": domain, "target": torch.where(domain >= 0, torch.arange(2 * BATCH) % 10, -1),
    }  # fmt: skip
    held_out = {name: v[domain < 0] for name, v in batch.items()}
    policies = Policies(objective, GuidedPareto())
    policies.bind()

    def problem(of: Objective, data: dict[str, Tensor]) -> Problem:
        return Problem(model, of, [{"main": data}], DomainFeatures(target_trains_head=True))

    def guided() -> None:
        step = problem(policies.objective, batch)
        policies.set(step, partial(Signals, validation=lambda: problem(1 * target, held_out)))
        step.gradient()

    def plain() -> None:
        problem(objective, batch).gradient()

    passes = _backward_passes(guided)
    timing = paired(guided, plain, repeats=5 if quick else 60)
    detail = f"MLP 64-{width}-{width}-64-10, {BATCH} + {BATCH} rows: {timing.first * 1e3:.1f} against {timing.second * 1e3:.1f} ms"
    return [
        Ratio(
            "backward passes of three objectives and a guide",
            passes,
            4.0,
            "lower",
            "one for each objective, one for the guide",
        ),
        Ratio("gradients and weights of a guided step / one plain gradient", timing.ratio, detail=detail),
    ]


def _backward_passes(call: Callable[[], None]) -> int:
    """Count the calls of `torch.autograd.grad` in a call."""
    counted, real = 0, torch.autograd.grad

    def grad(*args: object, **kwargs: object) -> object:
        nonlocal counted
        counted += 1
        return real(*args, **kwargs)  # type: ignore[arg-type]

    torch.autograd.grad = grad  # type: ignore[assignment]
    try:
        call()
    finally:
        torch.autograd.grad = real
    return counted


def _case(seed: int, m: int = 3) -> Case:
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(m, 2 * m, generator=generator, dtype=torch.float64)
    return g @ g.T, g @ torch.randn(2 * m, generator=generator, dtype=torch.float64)


def _weigh_balance(gram: Tensor, guide: Tensor) -> Tensor:
    return _POLICY.choose(gram, guide, 1.0).alpha


_POLICY = GuidedPareto(branch="balance")


def _over(cases: list[Case], solve: Callable[[Tensor, Tensor], object]) -> Callable[[], None]:
    def all_of_them() -> None:
        for gram, guide in cases:
            solve(gram, guide)

    all_of_them.count = len(cases)  # type: ignore[attr-defined]
    return all_of_them


def _seconds(call: Callable[[], None], blocks: int) -> list[float]:
    """Seconds of one solution in each block."""
    call()
    found = []
    for _ in range(blocks):
        begun = time.perf_counter()
        call()
        found.append((time.perf_counter() - begun) / call.count)  # type: ignore[attr-defined]
    return found


def _difference(case: Case, peer: Callable[[Tensor, Tensor], Tensor]) -> float:
    gram, guide = case
    return abs(float(guide @ peer(gram, guide)) - float(guide @ _weigh_balance(gram, guide)))


def _cvxpy() -> tuple[Callable[[Tensor, Tensor], Tensor], str]:
    import cvxpy

    a = cvxpy.Variable(3, nonneg=True)
    gram, value, least = cvxpy.Parameter((3, 3)), cvxpy.Parameter(3), cvxpy.Parameter(3)
    program = cvxpy.Problem(cvxpy.Maximize(value @ a), [cvxpy.sum(a) == 1, gram @ a >= least])

    def solve(matrix: Tensor, guide: Tensor) -> Tensor:
        gram.value, value.value = matrix.numpy(), guide.numpy()
        # A constraint that is not there is one that always holds.
        least.value = np.maximum(least_descent(guide.numpy()), -1e3)
        program.solve()
        return torch.as_tensor(a.value)

    return solve, f"CVXPY {cvxpy.__version__}"


def _linprog() -> tuple[Callable[[Tensor, Tensor], Tensor], str]:
    import scipy
    from scipy.optimize import linprog

    def solve(gram: Tensor, guide: Tensor) -> Tensor:
        least = least_descent(guide.numpy())
        held = np.isfinite(least)
        rows = gram.numpy()[held]
        found = linprog(-guide.numpy(), -rows, -least[held], np.ones((1, 3)), [1.0], bounds=(0, None))
        return torch.as_tensor(found.x)

    return solve, f"SciPy {scipy.__version__}"
