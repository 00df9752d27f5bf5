"""The active search: it finds what matters, keeps its budget, resumes, and says what is wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from poise.errors import InputError, StateError
from poise.search import (
    ActiveMultiTask,
    LinearMultiTask,
    NeuralMultiTask,
    gradient_similarity,
    oracle_counts,
    proportional_counts,
    target_only,
    uniform_counts,
)
from poise.weights import LassoRelevance, SourceWeights

D, RANK, TASKS = 10, 3, 12


class World:
    """Weak sources, two strong ones at the end, and a target between these."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        g = self.generator
        self.basis = torch.linalg.qr(torch.randn(D, RANK, generator=g, dtype=torch.float64)).Q
        self.heads = 0.4 * torch.randn(RANK, TASKS, generator=g, dtype=torch.float64)
        self.heads[:, -2:] *= 6
        self.goal = self.heads[:, -2:].mean(1)
        self.target = self._samples(self.goal, 200)
        self.asked: list[tuple[int, int]] = []

    def draw(self, task: int, n: int) -> tuple[Tensor, Tensor]:
        self.asked.append((task, n))
        return self._samples(self.heads[:, task], n)

    def error(self, trainer: LinearMultiTask, head: Tensor) -> float:
        assert trainer.basis is not None
        return float((trainer.basis @ head - self.basis @ self.goal).square().sum())

    def _samples(self, head: Tensor, n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, D, generator=self.generator, dtype=torch.float64)
        return x, x @ self.basis @ head + torch.randn(n, generator=self.generator, dtype=torch.float64)


def search(world: World, **options: object) -> ActiveMultiTask:
    options = {"relevance": LassoRelevance(floor=5), "budget": 2400, **options}
    budget = options.pop("budget")
    return ActiveMultiTask(
        LinearMultiTask(D, RANK, TASKS),
        world.draw,
        budget,
        target=world.target,
        measure=world.error,
        generator=world.generator,
        **options,
    )


def test_the_budget_goes_to_the_sources_that_matter() -> None:
    world = World()
    result = search(world).run()
    assert int(result.counts.sum()) == 2400 == sum(n for _, n in world.asked)
    assert int(result.counts[-2:].sum()) > 1500
    assert [r.samples for r in result.rounds] == [720, 2400]
    assert result.rounds[0].tasks_used == TASKS
    assert result.rounds[1].tasks_used <= RANK + 1
    assert result.curve()[1][1] < result.curve()[0][1]
    assert result.samples_to_reach(result.curve()[1][1]) == 2400
    assert result.samples_to_reach(0.0) is None
    assert result.report.rows[0].task in ("10", "11")


def test_it_is_better_than_passive_sampling_on_most_seeds() -> None:
    wins = 0
    for seed in range(10):
        active = search(World(seed)).run().rounds[-1].error
        passive = search(World(seed), epochs=1).run().rounds[-1].error
        wins += active < passive
    assert wins >= 8


def test_budgets_grow_by_a_constant_factor() -> None:
    assert search(World(), epochs=3, exploration=0.25).schedule() == [600, 1200, 2400]
    assert search(World(), epochs=1).schedule() == [2400]


def test_a_search_that_is_stopped_and_resumed_is_the_same_search() -> None:
    whole = search(World(), epochs=3).run()
    first = search(World(), epochs=3)
    first.step()
    state = copy.deepcopy(first.state_dict())
    first.run()  # what happens after saving does not matter
    second = search(World(), epochs=3)
    second.load_state_dict(state)
    again = second.run()
    assert torch.equal(again.counts, whole.counts)
    assert torch.equal(again.head, whole.head)
    assert again.rounds[1:] == whole.rounds[1:]
    with pytest.raises(StateError, match="has run its 3 epochs"):
        second.step()


def test_what_runs_out_is_redistributed() -> None:
    available = torch.full((TASKS,), 500)
    result = search(World(), available=available).run()
    assert bool((result.counts <= available).all())
    assert int(result.counts.sum()) == 2400


def test_money_is_counted_where_samples_have_a_price() -> None:
    costs = torch.ones(TASKS, dtype=torch.float64)
    costs[-1] = 4.0
    result = search(World(), relevance=LassoRelevance(floor=5, costs=costs)).run()
    assert 2400 - 4 <= result.rounds[-1].cost <= 2400
    assert float((result.counts * costs).sum()) == pytest.approx(result.rounds[-1].cost)
    opening = torch.full((TASKS,), 20.0)
    result = search(World(), relevance=LassoRelevance(floor=5, opening=opening)).run()
    assert result.rounds[-1].cost == pytest.approx(2400, abs=1)


def test_the_search_goes_with_a_neural_representation() -> None:
    world = World()
    encoder = nn.Sequential(nn.Linear(D, RANK))
    trainer = NeuralMultiTask(encoder, RANK, TASKS, loss="squared", steps=150, lr=0.03)
    result = ActiveMultiTask(trainer, world.draw, 2400, target=world.target, relevance=LassoRelevance(floor=5)).run()
    assert int(result.counts.sum()) == 2400
    assert {row.task for row in result.report.rows[:2]} == {"10", "11"}
    # whitened: the representation has mean 0 and covariance 1, with a constant behind it
    pooled = torch.cat([x for parts in trainer.samples for x, _ in parts])
    z = trainer.represent(pooled)
    torch.testing.assert_close(torch.cov(z[:, :-1].T), torch.eye(RANK, dtype=torch.float64), atol=1e-3, rtol=0)
    assert bool((z[:, -1] == 1).all())
    x, y = world.target[0].float(), world.target[1]
    before = trainer.predict(x, result.head)
    assert float((before - y).square().mean()) < 1.5
    tuned = trainer.fine_tune(x, y, steps=1, lr=1e-9)
    torch.testing.assert_close(tuned(x)[:, 0].detach().double(), before, atol=1e-4, rtol=1e-4)
    twin = NeuralMultiTask(copy.deepcopy(encoder), RANK, TASKS, loss="squared", steps=150, lr=0.03)
    twin.load_state_dict(trainer.state_dict())
    torch.testing.assert_close(twin.predict(x, result.head), before)


def test_logistic_heads_learn_classes() -> None:
    world = World()
    trainer = NeuralMultiTask(nn.Linear(D, RANK), RANK, 2, steps=150, lr=0.03)
    for task in (0, 1):
        x, y = world.draw(10 + task, 300)
        trainer.add(task, x, y.sign())
    trainer.fit()
    x, y = world.draw(10, 500)
    assert float((trainer.predict(x, trainer.heads()[:, 0]).sign() == y.sign()).double().mean()) > 0.75
    with pytest.raises(InputError, match="targets -1 and 1"):
        trainer.add(0, x, y)


def test_the_shares_of_a_search_weigh_a_run_over_its_sources() -> None:
    result = search(World()).run()
    shares = SourceWeights([f"s{t}" for t in range(TASKS)], result.counts).weights()
    assert sum(shares.values()) == pytest.approx(1)
    assert max(shares, key=shares.__getitem__) in ("s10", "s11")


def test_baselines_share_out_what_they_say() -> None:
    world = World()
    assert uniform_counts(7, 100).sum() == 100
    assert uniform_counts(7, 100).max() == 15
    assert proportional_counts([1, 1, 2], 40, floor=12).tolist() == [12, 12, 16]
    counts = oracle_counts(world.heads, world.goal, 2400, floor=5)
    assert int(counts.sum()) == 2400
    assert int(counts[:-2].max()) <= 600
    x, y = world.target
    torch.testing.assert_close(target_only(x, y), torch.linalg.lstsq(x, y[:, None]).solution[:, 0])
    even = gradient_similarity(torch.tensor([[-1.0, 0.0]]), torch.tensor([1.0, 0.0]))
    assert even.tolist() == [1.0]


def test_gradients_find_a_source_that_agrees() -> None:
    world = World()
    gradients = world.heads.T @ world.basis.T  # of the squared error at 0, where x has covariance 1
    shares = gradient_similarity(gradients, world.basis @ world.goal)
    assert float(shares.sum()) == pytest.approx(1)
    assert int((shares > 0).sum()) > RANK


def test_what_does_not_fit_is_refused() -> None:
    world = World()
    with pytest.raises(InputError, match="5 samples of each of 12 sources cost 60"):
        search(world, budget=59)
    with pytest.raises(InputError, match="exploration in"):
        search(world, exploration=0.0)
    with pytest.raises(InputError, match="2 names were given for 12"):
        search(world, names=["a", "b"])
    with pytest.raises(StateError, match="not drawn anything"):
        search(world).result()
    with pytest.raises(InputError, match="Sizes must be finite"):
        proportional_counts([0, 0], 10)
    with pytest.raises(InputError, match="loss is"):
        NeuralMultiTask(nn.Linear(2, 2), 2, 2, loss="hinge")
    short = search(world)
    short.draw = lambda task, n: world._samples(world.goal, n - 1)
    with pytest.raises(InputError, match="Give `available`"):
        short.run()
    other = ActiveMultiTask(LinearMultiTask(D, RANK, 2), world.draw, 100, target=world.target)
    with pytest.raises(InputError, match="over 12 sources, and this one has 2"):
        other.load_state_dict(search(world).state_dict())
