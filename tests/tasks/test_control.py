"""Environments of control and their experts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from poise.errors import InputError, MissingDependencyError
from poise.recipes.imitation import rollout
from poise.tasks import control
from poise.tasks.control import CartPole, MujocoEnvironment, mujoco_expert


def test_an_upright_pole_at_rest_stays_and_a_leaning_one_falls() -> None:
    cart = CartPole()
    still = torch.zeros(1, 4, dtype=torch.float64)
    assert torch.equal(cart.moved(still, torch.zeros(1, 1)), still)
    leaning = torch.tensor([[0.0, 0.0, 0.1, 0.0]], dtype=torch.float64)
    after = cart.moved(leaning, torch.zeros(1, 1))
    # g sin(a) / (l (4/3 - m cos(a)^2 / M)) radian a second squared, without a push.
    expected = 9.8 * math.sin(0.1) / (0.5 * (4 / 3 - 0.1 * math.cos(0.1) ** 2 / 1.1))
    assert float(after[0, 3]) == pytest.approx(0.02 * expected)


def test_a_push_to_the_right_moves_the_cart_right_and_bends_the_pole_left() -> None:
    after = CartPole().moved(torch.zeros(2, 4, dtype=torch.float64), torch.tensor([[1.0], [5.0]]))
    assert float(after[0, 1]) > 0 > float(after[0, 3])
    assert torch.equal(after[0], after[1])  # actions are cut to [-1, 1]


def test_the_regulator_keeps_the_pole_up_and_nobody_does_not() -> None:
    cart = CartPole(rows=50)
    assert rollout(cart.expert, cart, 0, 200)[1] > 190
    assert rollout(lambda s: torch.zeros(len(s), 1), cart, 0, 200)[1] < 60


def test_the_regulator_is_stable_for_the_linearised_dynamics() -> None:
    cart = CartPole()
    state = torch.full((1, 4), 1e-4, dtype=torch.float64)
    for _ in range(1000):
        state = cart.moved(state, cart.expert(state))
    assert float(state.abs().max()) < 1e-8


def test_a_seed_gives_the_same_episodes_and_an_ended_copy_begins_again() -> None:
    a, b = CartPole(rows=3, horizon=4), CartPole(rows=3, horizon=4)
    first: list[Tensor] = []
    for cart in (a, b):
        states = [cart.restart(5)]
        ends = []
        for _ in range(4):
            state, reward, ended = cart.step(cart.expert(states[-1]))
            states.append(state)
            ends.append(ended)
        assert torch.equal(reward, torch.ones(3))
        assert bool(ends[-1].all())
        assert not bool(torch.stack(ends[:-1]).any())
        first.append(torch.stack(states))
    assert torch.equal(first[0], first[1])
    assert float(first[0][-1, :, 0].abs().max()) <= 1.0


def test_bad_sizes_and_unknown_tasks_are_refused() -> None:
    with pytest.raises(InputError, match="at least 1"):
        CartPole(rows=0)
    with pytest.raises(InputError, match="Did you mean 'Hopper-v5'"):
        mujoco_expert("Hopper-v4")


def test_a_task_of_mujoco_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(control.importlib, "import_module", absent)
    with pytest.raises(MissingDependencyError, match=r"poise\[rl\]"):
        MujocoEnvironment("Hopper-v5")


def test_mujoco_runs_behind_the_same_words() -> None:
    pytest.importorskip("gymnasium", reason="gymnasium is not installed")
    pytest.importorskip("mujoco", reason="mujoco is not installed")
    hopper, expert = MujocoEnvironment("Hopper-v5", rows=2, horizon=30), mujoco_expert("Hopper-v5")
    state = hopper.restart(0)
    assert torch.equal(state, MujocoEnvironment("Hopper-v5", rows=2, horizon=30).restart(0))
    assert state.shape == (2, hopper.observations) == (2, 11)
    assert expert(state).shape == (2, hopper.actions) == (2, 3)
    for t in range(30):
        state, reward, ended = hopper.step(expert(state))
        assert bool(ended.all()) == (t == 29)
    assert reward.shape == (2,)
    with pytest.raises(InputError, match="gymnasium has no task"):
        MujocoEnvironment("Hoper-v5")


@pytest.mark.slow
def test_the_hopper_expert_earns_what_it_was_stored_with() -> None:
    pytest.importorskip("mujoco", reason="mujoco is not installed")
    expert = mujoco_expert("Hopper-v5")
    assert rollout(expert, MujocoEnvironment("Hopper-v5", rows=5), 1, 1000)[1] > 0.9 * expert.trained
