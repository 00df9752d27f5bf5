"""Environments with several rewards: their fronts, their exact returns, and policy gradients that agree with them."""

from __future__ import annotations

import itertools

import pytest
import torch

import poise
from poise.errors import InputError
from poise.formula import parse
from poise.metrics.pareto import front, hypervolume
from poise.readouts.on_policy import OnPolicy
from poise.readouts.tokens import TokenReadout, gathered_logps
from poise.tasks.reward_environments import (
    TREASURE_FRONT,
    SharedBandit,
    Walk,
    deep_sea_treasure,
    measured,
    resource_gathering,
)

ENVIRONMENTS = (SharedBandit(), deep_sea_treasure(), resource_gathering())


def deterministic_front(walk: Walk) -> torch.Tensor:
    """Follow every state breadth first and keep what is not dominated among the returns that reach it."""
    end = len(walk.following) - 1
    reached = {walk.start: torch.zeros(1, len(walk.names), dtype=torch.float64)}
    done = []
    for _ in range(walk.horizon):
        later: dict[int, list[torch.Tensor]] = {}
        for state, returns in reached.items():
            for action in range(walk.following.shape[1]):
                following = int(walk.following[state, action])
                later.setdefault(following, []).append(returns + walk.rewards[state, action])
        reached = {state: front(torch.cat(found)) for state, found in later.items()}
        if end in reached:
            done.append(reached.pop(end))
    return front(torch.cat(done))


def test_the_treasures_that_are_worth_their_way_are_the_known_front() -> None:
    found = deterministic_front(deep_sea_treasure())
    assert sorted(map(tuple, found.tolist())) == [(float(a), float(b)) for a, b in TREASURE_FRONT]
    assert hypervolume(TREASURE_FRONT, (0, -25)) == 1155


def test_the_front_of_the_sea_is_concave_so_no_fixed_weights_choose_its_middle() -> None:
    points = torch.tensor(TREASURE_FRONT, dtype=torch.float64)
    share = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    best = (torch.stack([share, 1 - share], 1) @ points.T).argmax(1)
    assert sorted(set(best.tolist())) == [0, 9]


def test_gathering_trades_safety_and_time_for_what_is_brought_home() -> None:
    found = deterministic_front(resource_gathering())
    ways = [
        (round(gold), round(gem), round(10 * safety), round(20 * time)) for gold, gem, safety, time in found.tolist()
    ]
    assert ways == [
        (0, 1, 0, -10), (1, 0, -2, -8), (1, 0, -1, -10), (1, 0, 0, -12), (1, 1, -2, -12), (1, 1, -1, -14), (1, 1, 0, -18),
    ]  # fmt: skip


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=("bandit", "sea", "gathering"))
def test_sampled_returns_and_log_probabilities_are_those_of_the_policy(environment: Walk | SharedBandit) -> None:
    agent = environment.agent()
    with torch.no_grad():
        for p in agent.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(environment.prompts).repeat_interleave(8000 // environment.prompts)
    drawn = environment.draw(agent, {"input": rows}, generator)
    scored = torch.stack(list(environment.score(drawn).values()), 1).double()
    exact = environment.returns(agent)
    error = scored.std(0) / len(scored) ** 0.5
    assert bool(((scored.mean(0) - exact).abs() < 5 * error + 1e-9).all())
    logps = gathered_logps(agent(drawn["response_ids"]), drawn["response_ids"], drawn["response_mask"])
    torch.testing.assert_close(logps, drawn["behaviour_logps"], rtol=1e-5, atol=1e-5)
    assert set(measured(environment, agent, 2, generator)) == set(environment.names)


def test_policy_gradients_of_one_reward_each_have_the_exact_gradient_as_their_mean() -> None:
    bandit = SharedBandit(contexts=3, actions=4, features=2)
    agent = bandit.agent()
    rows = torch.arange(3).repeat_interleave(20_000)
    drawn = bandit.draw(agent, {"input": rows}, torch.Generator().manual_seed(0))
    quantities = {
        "response_logps": gathered_logps(agent(drawn["response_ids"]), drawn["response_ids"], drawn["response_mask"]),
        "response_mask": drawn["response_mask"],
        "group": rows,
        **bandit.score(drawn),
    }
    exact = torch.autograd.functional.jacobian(
        lambda theta: (
            ((bandit.agent().features @ theta).double().softmax(-1)[..., None] * bandit.rewards).sum(1).mean(0)
        ),
        torch.zeros(2),
    )
    for i, name in enumerate(bandit.names):
        for loss in ("rloo(clip=None, reward=R)", "reinforce(reward=R)"):
            objective = parse(loss.replace("R", f"score.on(reward='{name}')"))
            (found,) = torch.autograd.grad(objective(quantities), agent.theta, retain_graph=True)
            torch.testing.assert_close(-found.double(), exact[i].double(), rtol=0, atol=0.012)


@pytest.mark.parametrize(
    "loss", ["rloo(clip=None, reward=R)", "reinforce(reward=R)", "grpo(clip=None, scale_rewards='none', reward=R)"]
)
def test_the_weighted_sum_of_gradients_is_the_gradient_of_the_weighted_reward_where_advantages_are_linear(
    loss: str,
) -> None:
    weighted, apart = gradients(loss)
    torch.testing.assert_close(weighted, apart, rtol=1e-5, atol=1e-7)


def test_under_division_by_the_deviation_the_two_differ() -> None:
    weighted, apart = gradients("grpo(clip=None, reward=R)")
    assert float((weighted - apart).abs().max()) > 0.01


def gradients(loss: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient under the reward 0.2 a + 0.5 b + 0.3 c, and the sum of the three rewards' own."""
    bandit = SharedBandit()
    agent, rows = bandit.agent(), torch.arange(10).repeat_interleave(8)
    drawn = bandit.draw(agent, {"input": rows}, torch.Generator().manual_seed(0))
    quantities = {
        "response_logps": gathered_logps(agent(drawn["response_ids"]), drawn["response_ids"], drawn["response_mask"]),
        "response_mask": drawn["response_mask"],
        "group": rows,
        **bandit.score(drawn),
    }
    weights = dict(zip(bandit.names, (0.2, 0.5, 0.3), strict=True))
    each = {n: f"score.on(reward='{n}').named('{n}')" for n in weights}
    together = loss.replace("R", " + ".join(f"{w}*{each[n]}" for n, w in weights.items()))
    apart = " + ".join(f"{w}*{loss.replace('R', each[n])}.named('{n}')" for n, w in weights.items())
    found = [torch.autograd.grad(parse(f)(quantities), agent.theta, retain_graph=True)[0] for f in (together, apart)]
    return found[0], found[1]


@pytest.mark.parametrize("loss", ["rloo", "reinforce", "grpo"])
def test_a_policy_learns_the_bandit(loss: str) -> None:
    bandit = SharedBandit()
    agent = bandit.agent()
    stream = OnPolicy(bandit.prompts, bandit.draw, bandit.score, samples=8, batch_size=10)
    before = bandit.returns(agent)
    formula = f"{loss}(reward=0.5*score.on(reward='b').named('b') + 0.5*score.on(reward='c').named('c'))"
    poise.fit(agent, formula, {"main": stream}, readout=TokenReadout(), solver="sgd", lr=0.5, steps=40, device="cpu")
    assert bool((bandit.returns(agent) - before)[1:].sum() > 0.1)


def test_a_share_outside_the_unit_interval_is_refused() -> None:
    with pytest.raises(InputError, match="a share in"):
        SharedBandit(density=(0.5, 1.0))


def test_environments_are_functions_of_their_seed() -> None:
    a, b = SharedBandit(seed=1), SharedBandit(seed=1)
    assert torch.equal(a.rewards, b.rewards)
    assert not torch.equal(a.rewards, SharedBandit(seed=2).rewards)
    for walk, seeds in itertools.product(ENVIRONMENTS[1:], [(0, 1)]):
        one, other = (walk.agent(seed, scale=1.0).table for seed in seeds)  # type: ignore[union-attr, call-arg]
        assert not torch.equal(one, other)
