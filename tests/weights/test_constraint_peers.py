"""Constraints beside cooper-optim: the same steps where the rules are the same, the same solutions everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_constraint import Ball, Linear, Quadratic, double, solve
from torch import Tensor, nn

from poise.objective import Objective
from poise.weights.constraint import constraint

cooper = pytest.importorskip("cooper", reason="the comparison needs cooper-optim: pip install 'poise[peers]'")
pytestmark = pytest.mark.peer

A, B = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 1.5]], dtype=torch.float64), double(1, 2, -1)
ROW = double(1, 1, 1)


class Peer(cooper.ConstrainedMinimizationProblem):
    """minimise x'Ax/2 - b'x on |x|^2 <= 0.5 and 1'x = 0.4."""

    def __init__(self, x: Tensor, formulation: Any, **arguments: Any) -> None:
        super().__init__()
        self.x = x
        for name, kind in (("ball", cooper.ConstraintType.INEQUALITY), ("sum", cooper.ConstraintType.EQUALITY)):
            multiplier = cooper.multipliers.DenseMultiplier(num_constraints=1).double()
            setattr(
                self,
                name,
                cooper.Constraint(
                    kind, formulation_type=formulation, multiplier=multiplier, **{k: v() for k, v in arguments.items()}
                ),
            )

    def compute_cmp_state(self) -> Any:
        loss = 0.5 * self.x @ A @ self.x - B @ self.x
        ball, total = self.x.square().sum().view(1) - 0.5, (ROW @ self.x).view(1) - 0.4
        return cooper.CMPState(
            loss=loss,
            observed_constraints={
                self.ball: cooper.ConstraintState(violation=ball),
                self.sum: cooper.ConstraintState(violation=total),
            },
        )


def peer(dual: Any, formulation: Any, lr: float, steps: int, **arguments: Any) -> tuple[Tensor, list[float]]:
    x = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    problem = Peer(x, formulation, **arguments)
    optimizer = cooper.optim.SimultaneousOptimizer(
        cmp=problem, primal_optimizers=torch.optim.SGD([x], lr=lr), dual_optimizers=dual(problem.dual_parameters())
    )
    for _ in range(steps):
        optimizer.roll()
    return x.detach(), [float(problem.ball.multiplier.weight), float(problem.sum.multiplier.weight)]


def ours(steps: int, **arguments: Any) -> tuple[Tensor, list[float]]:
    objective = Quadratic(A, B) + Objective()
    objective = objective + constraint(Ball(), upper=0.5, **arguments) + constraint(Linear(ROW), equal=0.4, **arguments)
    x, modules = solve(objective, 3, 0.1, steps)
    return x, [float(m.multiplier) for m in modules]


def sgd(rate: float) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr=rate, maximize=True)


def nupi(rate: float, gain: float, nu: float) -> Any:
    zeros = cooper.optim.nuPIInitType.ZEROS
    return lambda parameters: cooper.optim.nuPI(
        parameters, lr=1.0, Kp=gain, Ki=rate, ema_nu=nu, init_type=zeros, maximize=True
    )


@pytest.mark.parametrize(
    ("arguments", "dual"),
    [
        ({"lr": 0.3}, sgd(0.3)),
        ({"lr": 0.3, "damping": 0.5}, nupi(0.3, 0.5, 0.0)),
        ({"lr": 0.3, "damping": 0.5, "smoothing": 0.7}, nupi(0.3, 0.5, 0.7)),
    ],
    ids=["dual ascent", "PI", "smoothed PI"],
)
def test_every_step_is_that_of_the_peer(arguments: dict[str, float], dual: Any) -> None:
    for steps in (1, 2, 7, 40):
        x, multipliers = ours(steps, **arguments)
        other, theirs = peer(dual, cooper.formulations.Lagrangian, 0.1, steps)
        # Poise measures values in float32 where the objective reduces them, and the differences add up over the steps.
        torch.testing.assert_close(x, other, rtol=1e-5, atol=1e-6)
        assert multipliers == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def test_the_augmented_lagrangian_has_the_solution_of_the_peers() -> None:
    x, multipliers = ours(1200, lr=0.3, method="augmented", rho=1.0)
    penalty = lambda: cooper.penalty_coefficients.DensePenaltyCoefficient(double(1.0))  # noqa: E731
    other, theirs = peer(sgd(0.3), cooper.formulations.AugmentedLagrangian, 0.1, 1200, penalty_coefficient=penalty)
    torch.testing.assert_close(x, other, rtol=1e-5, atol=2e-6)
    assert multipliers == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert float(x.square().sum()) == pytest.approx(0.5, abs=1e-5)
    assert float(ROW @ x) == pytest.approx(0.4, abs=1e-5)
