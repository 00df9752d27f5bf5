"""What a constraint costs: a step beside the same sum under a fixed weight, and beside the same constrained step in cooper-optim.

Both sides run the same model from the same start on one thread, in turns: forward, backward, step, and the multiplier's move. What is
timed is the processor's time.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from benchmarks.harness import Paired, Ratio, one_thread, paired
from poise.formula import parse

WIDTHS, BATCH = (784, 256, 256, 10), 128
BOUND, RATE = 40.0, 1e-5
RULES = {
    "dual ascent": "lr=1e-5",
    "damped": "lr=1e-5, damping=1e-3",
    "augmented, growing": "lr=1e-5, method='augmented', rho=1e-3, growth=2",
}


def run(quick: bool) -> list[Ratio]:
    """Ratios of step times: each rule over a fixed weight, and dual ascent over the peer's."""
    with one_thread():
        return [*(_over_fixed(name, arguments, quick) for name, arguments in RULES.items()), *_over_peer(quick)]


def _over_fixed(name: str, arguments: str, quick: bool) -> Ratio:
    timing = _race(
        _step(f"cross_entropy + constraint(l2, upper={BOUND:g}, {arguments})"), _step("cross_entropy + 0.01*l2"), quick
    )
    return Ratio(f"step under a constraint, {name} / under a fixed weight", timing.ratio, None, "lower", _said(timing))


def _over_peer(quick: bool) -> list[Ratio]:
    try:
        peer = _peer_step()
    except ImportError:
        return []
    timing = _race(_step(f"cross_entropy + constraint(l2, upper={BOUND:g}, lr={RATE})"), peer, quick)
    version = importlib.metadata.version("cooper-optim")
    return [
        Ratio(
            "step under dual ascent / the same in cooper",
            timing.ratio,
            1.0,
            "lower",
            f"{_said(timing)}; cooper-optim {version}",
        )
    ]


def _step(formula: str) -> Callable[[], None]:
    model, x, y = _model(), *_batch()
    objective, optimizer = parse(formula), torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    objective.follow(optimizer)

    def step() -> None:
        optimizer.zero_grad()
        objective(logits=model(x), target=y, parameters=dict(model.named_parameters())).backward()
        optimizer.step()

    return step


def _peer_step() -> Callable[[], None]:
    import cooper

    model, x, y = _model(), *_batch()
    matrices = [p for p in model.parameters() if p.ndim > 1]

    class Bounded(cooper.ConstrainedMinimizationProblem):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            multiplier = cooper.multipliers.DenseMultiplier(num_constraints=1)
            self.size = cooper.Constraint(cooper.ConstraintType.INEQUALITY, multiplier=multiplier)

        def compute_cmp_state(self) -> cooper.CMPState:
            size = 0.5 * sum(p.square().sum() for p in matrices) - BOUND
            state = cooper.ConstraintState(violation=size.view(1))
            return cooper.CMPState(loss=functional.cross_entropy(model(x), y), observed_constraints={self.size: state})

    problem = Bounded()
    optimizer = cooper.optim.SimultaneousOptimizer(
        cmp=problem,
        primal_optimizers=torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9),
        dual_optimizers=torch.optim.SGD(problem.dual_parameters(), lr=RATE, maximize=True),
    )
    return lambda: optimizer.roll()


def _model() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, WIDTHS[0], generator=generator), torch.randint(
        0, WIDTHS[-1], (BATCH,), generator=generator
    )


def _race(one: Callable[[], None], other: Callable[[], None], quick: bool) -> Paired:
    def block(step: Callable[[], None]) -> Callable[[], None]:
        def several() -> None:
            for _ in range(5 if quick else 20):
                step()

        return several

    return paired(block(one), block(other), repeats=4 if quick else 40, clock=time.process_time)


def _said(timing: Paired) -> str:
    each = 20 if timing.repeats > 4 else 5
    sizes = "-".join(map(str, WIDTHS))
    return f"MLP {sizes}, batch {BATCH}: {1e3 * timing.first / each:.2f} ms against {1e3 * timing.second / each:.2f} ms"
