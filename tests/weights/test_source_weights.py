"""Sources in one run: weights and rates of n_t / sum n."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import poise
from poise.errors import InputError
from poise.objective import Streams
from poise.terms import SquaredError
from poise.weights import SourceRelevance, SourceWeights
from poise.weights.source_weights import relevance_of_gradients


def sources() -> dict[str, tuple[Tensor, Tensor]]:
    """Three sources of one input, whose targets disagree."""
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    return {name: (x, (i + 1) * x.sum(1)) for i, name in enumerate("abc")}


def fitted(objective: object, train: object, steps: int = 400, **options: object) -> Tensor:
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False)
    poise.fit(model, objective, train, steps=steps, lr=0.2, batch_size=64, **options)
    return model.weight.detach()[0]


def test_weights_are_shares_of_samples() -> None:
    assert SourceWeights("abc", torch.tensor([600, 300, 100])).weights() == {"a": 0.6, "b": 0.3, "c": 0.1}
    assert SourceWeights(["x", "y"]).weights() == {"x": 0.5, "y": 0.5}


def test_a_fit_weighs_its_sources_by_their_shares() -> None:
    # the inputs are the same, so the answer is the mean of 1, 2 and 3 by the shares
    weights = SourceWeights("abc", [1, 2, 1])
    torch.testing.assert_close(fitted(weights.objective(SquaredError()), sources()), torch.full((3,), 2.0))
    weights.update([3, 1, 0])
    objective = weights.objective(SquaredError())
    assert objective.labels == ("a", "b")
    torch.testing.assert_close(fitted(objective, sources()), torch.full((3,), 1.25))


def test_rates_sum_to_the_batch_and_give_the_same_gradient_on_average() -> None:
    weights = SourceWeights("abc", [3, 1, 0])
    assert weights.rates(64) == {"a": 48, "b": 16}
    assert SourceWeights("abc", [1, 1, 1]).rates(10) == {"a": 4, "b": 3, "c": 3}
    streams = weights.streams(sources(), 64)
    assert {name: stream.batch_size for name, stream in streams.items()} == {"a": 48, "b": 16}
    found = fitted(weights.at_rates(SquaredError(), 64), streams)
    torch.testing.assert_close(
        found, torch.full((3,), 1.25), atol=0.15, rtol=0
    )  # batches differ, so it only hovers there


def test_a_step_at_rates_counts_every_example_the_same() -> None:
    weights = SourceWeights("ab", [3, 1])
    data = {name: value for name, value in sources().items() if name in "ab"}
    x, pooled = data["a"][0], torch.cat([data["a"][1][:48], data["b"][1][:16]])
    prediction = {"a": x[:48].sum(1), "b": x[:16].sum(1)}
    objective = weights.at_rates(SquaredError(), 64)
    parts = objective.evaluate(
        Streams({name: {"prediction": p, "target": data[name][1][: len(p)]} for name, p in prediction.items()})
    )
    expected = 0.5 * (torch.cat([prediction["a"], prediction["b"]]) - pooled).square().mean()
    torch.testing.assert_close(sum(t.weight * t.value for t in parts.terms.values()), expected)


def test_it_is_a_policy_without_parameters_whose_state_is_its_shares() -> None:
    weights = SourceWeights("ab", [3, 1])
    assert not list(weights.parameters())
    assert weights.needs == frozenset()
    weights.advance()
    twin = SourceWeights("ab")
    twin.load_state_dict(weights.state_dict())
    for other in (twin, copy.deepcopy(weights), weights.to(torch.float32)):
        assert other.weights() == {"a": 0.75, "b": 0.25}
        assert other.shares.dtype == torch.float64


def test_as_a_policy_it_gives_the_run_its_shares() -> None:
    weights = SourceWeights("abc", [3, 1, 0])
    objective = weights.objective(SquaredError(), owned=True)
    assert set(objective.autos) == {"a", "b", "c"}
    found = fitted(objective, sources(), policy=weights)
    torch.testing.assert_close(found, torch.full((3,), 1.25))
    with pytest.raises(InputError, match="sets the weights of x, y, and the run has a, b, c"):
        fitted(objective, sources(), policy=SourceWeights("xy"))


def test_relevance_of_gradients_moves_the_shares_to_the_sources_that_resemble_the_target() -> None:
    policy = SourceRelevance("abc", "squared_error", every=5)
    x, y = sources()["c"]
    found = fitted(policy.objective(SquaredError(), owned=True), sources(), policy=policy, valid=(x, y))
    assert policy.weights()["c"] > 0.9
    assert float(policy.shares.sum()) == pytest.approx(1)
    assert float(policy.shares.min()) >= 0.01 - 1e-9
    assert float((found - 3).abs().max()) < 0.2


def test_relevance_of_gradients_equals_least_squares_with_signs() -> None:
    from scipy.optimize import nnls

    g = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    goal = torch.randn(20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    nu = relevance_of_gradients(g.T @ g, g.T @ goal)
    torch.testing.assert_close(nu, torch.from_numpy(nnls(g.numpy(), goal.numpy())[0]), atol=1e-7, rtol=1e-6)
    assert not relevance_of_gradients(g.T @ g, -torch.ones(6, dtype=torch.float64)).any()


def test_relevance_of_gradients_needs_validation_data_and_sensible_arguments() -> None:
    policy = SourceRelevance("abc", "squared_error")
    with pytest.raises(InputError, match="validation"):
        fitted(policy.objective(SquaredError(), owned=True), sources(), policy=policy)
    with pytest.raises(InputError, match="every >= 1"):
        SourceRelevance("abc", "squared_error", every=0)


def test_what_is_no_share_is_refused() -> None:
    with pytest.raises(InputError, match="must differ"):
        SourceWeights(["a", "a"])
    for counts in ([1.0], [-1.0, 2.0], [0.0, 0.0], [float("nan"), 1.0]):
        with pytest.raises(InputError, match="one count a source"):
            SourceWeights("ab", counts)
    with pytest.raises(InputError, match="no data for b"):
        SourceWeights("ab").streams({"a": sources()["a"]}, 8)
    with pytest.raises(InputError, match="the sources a, b, and these are x, y"):
        SourceWeights("xy").load_state_dict(SourceWeights("ab").state_dict())
