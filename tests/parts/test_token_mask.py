"""The mask network on hidden states, and its report."""

from __future__ import annotations

import pytest
import torch

from poise.errors import QuantityError
from poise.operators import rescaled
from poise.parts.token_mask import TokenMask, mask_report

STATES = torch.randn(3, 2, 7, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.arange(7) < torch.tensor([[7], [3]])


@pytest.mark.parametrize("kind", ["all", "last", "mlp", "random", "binary"])
@pytest.mark.parametrize("activation", ["relu", "rescale", None])
def test_masks_are_at_least_0_and_0_outside_the_answer(kind: str, activation: str | None) -> None:
    m = TokenMask(3, 8, activation, kind)(STATES, MASK)  # type: ignore[arg-type]
    assert m.shape == MASK.shape
    assert (m >= 0).all()
    assert (m[~MASK] == 0).all()
    if activation == "rescale" or kind in ("random", "binary"):
        assert m.max() <= 1 / 0.99  # dropout scales what it keeps


def test_all_layers_are_the_formula_written_out() -> None:
    network = TokenMask(3, 8, dropout=0.0).double()
    states = STATES.double()
    total = torch.zeros(2, 7, dtype=torch.float64)
    for layer in range(3):
        x = torch.nn.functional.layer_norm(states[layer], (8,), network.norm.weight, network.norm.bias)
        total += network.mixer[layer] * torch.relu(x @ network.weight[layer] + network.bias[layer])
    torch.testing.assert_close(network(states), torch.relu(total))
    assert (network.mixer >= 0).all()


def test_the_two_layer_network_is_linear_between() -> None:
    network = TokenMask(1, 8, kind="mlp", dropout=0.0)
    x = torch.nn.functional.layer_norm(STATES[0], (8,))
    hidden = x @ network.first[0].T + network.first_bias[0]
    torch.testing.assert_close(network(STATES[:1]), torch.relu(hidden @ network.weight[0] + network.bias[0]))


def test_a_binary_mask_gives_no_gradient_and_random_masks_have_no_parameters() -> None:
    assert not TokenMask(3, 8, kind="binary")(STATES).requires_grad
    assert not list(TokenMask(3, 8, kind="random").parameters())


def test_weights_begin_by_the_seed_alone() -> None:
    before = torch.get_rng_state()
    one, two, other = TokenMask(3, 8), TokenMask(3, 8), TokenMask(3, 8, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.weight, two.weight)
    assert not torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("kind", ["all", "last", "mlp", "binary"])
def test_a_dead_start_is_drawn_again(kind: str) -> None:
    network = TokenMask(3, 8, kind=kind)  # type: ignore[arg-type]
    assert not network.revive(STATES) or kind == "last"
    with torch.no_grad():
        network.bias.fill_(-100.0)
    assert (network(STATES) == 0).all()
    assert network.revive(STATES)
    assert (network.eval()(STATES) > 0).any()
    with pytest.raises(QuantityError, match="all give 0"):
        network.revive(STATES, torch.zeros(2, 7, dtype=torch.bool))


def test_rescaled_values_reach_both_ends_and_constants_are_one() -> None:
    x = torch.tensor([[2.0, 5.0, 3.0, 100.0], [4.0, 4.0, 4.0, 0.0], [7.0, 1.0, 2.0, 3.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    found = rescaled(x, mask)
    torch.testing.assert_close(found[0], torch.tensor([0, 1, 1 / 3, 0]))
    assert found[1].tolist() == [1, 1, 1, 0]
    assert found[2].tolist() == [1, 0, 0, 0]


def test_the_report_counts_zeros_and_says_when_a_mask_is_dead() -> None:
    values = torch.tensor([[0.0, 1.0, 3.0, 9.0], [0.0, 0.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    report = mask_report(values, mask, bins=3)
    assert (report.sparsity, report.mean, report.l1) == pytest.approx((0.6, 0.8, 2.0))
    assert report.counts == (3, 1, 1)
    assert report.edges == pytest.approx((0, 1, 2, 3))
    assert "DEAD" in str(mask_report(torch.zeros(1, 2), torch.ones(1, 2).bool()))
    with pytest.raises(QuantityError, match="no answer token"):
        mask_report(values, torch.zeros_like(mask))
