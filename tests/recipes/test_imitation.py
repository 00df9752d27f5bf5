"""Learning from an expert who is asked about the states that the policy visits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from poise.errors import InputError
from poise.recipes.imitation import LOSSES, Imitation, imitate
from poise.solvers import StochasticLineSearch, TargetSurrogate, TorchOptimizer
from poise.tasks.control import CartPole


def policy(outputs: int = 1, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, outputs))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_the_gradient_of_a_loss_is_that_of_its_value(name: str) -> None:
    used = LOSSES[name]
    z = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    answer = {"softmax": torch.arange(6) % 3, "logistic": torch.ones(6, 3).double()}.get(
        name, torch.randn(6, 3).double()
    )
    (expected,) = torch.autograd.grad(used.value(z, answer).sum(), z)
    torch.testing.assert_close(used.gradient(z.detach(), answer), expected)
    assert used.value(z, answer).shape == (6,)


def test_the_expert_is_asked_about_every_visited_state_once() -> None:
    cart, asked = CartPole(rows=5), []

    def expert(state: Tensor) -> Tensor:
        asked.append(len(state))
        return cart.expert(state)

    found = imitate(
        policy(), expert, cart, TargetSurrogate(5, eta=1.0), rounds=4, samples=20, warm=False, measure_every=4
    )
    assert found.queries == [80]
    assert asked == [20, 20, 20, 20, 400]  # and the measurement, which is not counted
    assert len(found.loss) == len(found.reward) == len(found.trained) == 1


def test_many_cheap_steps_need_fewer_answers_than_one() -> None:
    cart = CartPole(rows=10)
    ends = []
    for solver in (
        TargetSurrogate(50, eta=1.0),
        TargetSurrogate(1, eta=1.0),
        StochasticLineSearch(),
        TorchOptimizer("adam", lr=1e-2),
    ):
        found = imitate(policy(), cart.expert, cart, solver, rounds=10, samples=100, measure_every=10)
        ends.append(found.loss[-1])
    assert ends[0] < 0.7 * min(ends[1:])


def test_a_run_is_decided_by_its_seed() -> None:
    cart = CartPole(rows=10)
    runs = [
        imitate(policy(), cart.expert, cart, TargetSurrogate(5, eta=1.0), rounds=3, samples=50, beta=0.5, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert runs[0].loss == runs[1].loss != runs[2].loss


def test_aggregation_learns_from_all_answers_and_asks_no_more() -> None:
    cart, rows = CartPole(rows=10), []

    class Counting(TargetSurrogate):
        def step(self, problem, accept=None):  # type: ignore[no-untyped-def]
            rows.append(len(problem.input))
            return super().step(problem, accept)

    found = imitate(policy(), cart.expert, cart, Counting(5, eta=1.0), rounds=3, samples=50, aggregate=True)
    assert rows == [50, 100, 150]
    assert found.queries == [50, 100, 150]


def test_discrete_experts_answer_with_classes() -> None:
    cart = CartPole(rows=10)
    found = imitate(
        policy(2),
        lambda s: (cart.expert(s)[:, 0] > 0).long(),
        cart,
        TargetSurrogate(30, eta=2.0, monotone=True, smoothness=0.5),
        loss="softmax",
        act=lambda z: 2.0 * z.argmax(-1, keepdim=True) - 1,
        enact=lambda a: 2.0 * a[:, None] - 1,
        rounds=10,
        samples=100,
        measure_every=5,
    )
    assert found.loss[-1] < 0.69  # that of a coin
    assert found.reward[-1] > 35


def test_queries_to_a_loss_wait_for_the_next_measurement() -> None:
    found = Imitation(queries=[10, 20, 30, 40], loss=[0.1, 0.5, 0.1, 0.1])
    assert found.queries_to(0.2) == 30
    assert found.queries_to(0.01) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [({"loss": "square"}, "Did you mean 'squared'"), ({"samples": 15}, "multiple"), ({"beta": 2.0}, "beta")],
)
def test_bad_arguments_are_refused(options: dict[str, object], words: str) -> None:
    cart = CartPole(rows=10)
    with pytest.raises(InputError, match=words):
        imitate(policy(), cart.expert, cart, "adam", **options)  # type: ignore[arg-type]
