"""Weights from gradient influence: the closed form, its invariances, its bounds, and its state."""

from __future__ import annotations

import copy
import math
import pickle
from types import SimpleNamespace

import pytest
import torch

from poise.errors import CheckpointError, InputError, NonFiniteError
from poise.weights.gradient_table import GradientTable
from poise.weights.pareto import GradientInfluence


def gram(m: int = 3, seed: int = 0, dimensions: int = 7) -> torch.Tensor:
    g = torch.randn(m, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return g @ g.T


def signals(table: GradientTable, lr: float = 0.1) -> SimpleNamespace:
    return SimpleNamespace(
        gradients=table, lr=lr, names=table.labels, rows={name: {name: 1.0} for name in table.labels}
    )


def table(seed: int = 0, dtype: torch.dtype = torch.float64) -> GradientTable:
    generator = torch.Generator().manual_seed(seed)
    rows = [
        {
            "body.weight": torch.randn(4, 3, generator=generator).to(dtype),
            "head.bias": torch.randn(5, generator=generator).to(dtype),
        }
        for _ in range(3)
    ]
    return GradientTable(("accuracy", "length", "format"), torch.zeros(3), rows)


# ---- the rule -----------------------------------------------------------------------------------------------------------


def test_one_update_is_the_closed_form() -> None:
    g, w = gram(), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    found = GradientInfluence(mu=2.0, initial={"a": 0.5, "b": 0.3, "c": 0.2}).update(g, lr=0.1)
    raised = w * torch.exp(0.1 * g.sum(1) / 2.0)
    torch.testing.assert_close(found, raised / raised.sum(), rtol=1e-13, atol=0)


def test_the_update_maximises_first_order_gain_less_the_divergence() -> None:
    g, w = gram(seed=1), torch.full((3,), 1 / 3, dtype=torch.float64)
    found = GradientInfluence(mu=5.0, lr=1.0).update(g)

    def gain(v: torch.Tensor) -> torch.Tensor:
        return v @ g.sum(1) - 5.0 * (v * (v / w).log()).sum()

    others = torch.distributions.Dirichlet(torch.ones(3, dtype=torch.float64)).sample((2000,))
    assert float(gain(found)) >= max(float(gain(v)) for v in others)
    slope = g.sum(1) - 5.0 * ((found / w).log() + 1)
    assert float(slope.max() - slope.min()) < 1e-9  # the same for all: stationary on the simplex


def test_orthogonal_gradients_of_equal_norm_move_nothing() -> None:
    influence = GradientInfluence(mu=0.01, initial={"a": 0.7, "b": 0.2, "c": 0.1}, lr=1.0)
    torch.testing.assert_close(
        influence.update(4 * torch.eye(3)), torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), rtol=1e-14, atol=0
    )


def test_a_rotation_of_the_parameters_and_the_sign_of_all_gradients_change_nothing() -> None:
    g = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    plain = GradientInfluence(mu=1.0, lr=0.1).update(g @ g.T)
    for other in (g @ rotation, -g):
        torch.testing.assert_close(GradientInfluence(mu=1.0, lr=0.1).update(other @ other.T), plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [1e6, -1e6, 1e12])
def test_weights_add_up_to_one_and_stay_positive_under_extreme_influences(size: float) -> None:
    influence = GradientInfluence(mu=1.0, lr=1.0)
    extreme = torch.diag(torch.tensor([size, 0.0, -size / 2], dtype=torch.float64))
    for _ in range(3):
        w = influence.update(extreme)
        assert float(w.sum()) == pytest.approx(1.0, abs=1e-12)
        assert bool((w > 0).all())
        assert bool(torch.isfinite(influence.log_weights).all())


def test_a_weight_of_zero_stays_zero() -> None:
    influence = GradientInfluence(mu=1.0, lr=1.0, initial={"a": 0.0, "b": 0.5, "c": 0.5})
    for _ in range(3):
        w = influence.update(torch.diag(torch.tensor([1e3, 1.0, 0.0])))
    assert w[0] == 0.0
    assert float(w.sum()) == pytest.approx(1.0, abs=1e-12)


def test_without_its_own_norm_only_agreement_with_others_counts() -> None:
    g = gram(seed=2)
    influence = GradientInfluence(mu=1.0, lr=0.1, self_term=False)
    torch.testing.assert_close(influence.influence(g), g.sum(1) - g.diagonal())
    assert influence.update(torch.diag(torch.tensor([9.0, 1.0, 4.0]))).tolist() == pytest.approx([1 / 3] * 3)


def test_clipped_gradients_are_those_whose_norm_was_cut_one_by_one() -> None:
    g = 3 * torch.randn(3, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    g[1] *= 0.01
    cut = g * (1.0 / g.norm(dim=1, keepdim=True)).clamp(max=1.0)
    found = GradientInfluence(clip=1.0).influence(g @ g.T)
    torch.testing.assert_close(found, cut @ cut.sum(0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("floor", [0.01, 0.1, 0.3])
def test_a_floor_holds_and_is_the_nearest_point_above_it(floor: float) -> None:
    free, held = GradientInfluence(mu=1.0, lr=1.0), GradientInfluence(mu=1.0, lr=1.0, floor=floor)
    g = torch.diag(torch.tensor([3.0, 1.0, -2.0]))
    w, v = free.update(g), held.update(g)
    assert float(v.min()) >= floor * (1 - 1e-12)
    assert float(v.sum()) == pytest.approx(1.0, abs=1e-12)
    others = torch.distributions.Dirichlet(torch.ones(3, dtype=torch.float64)).sample((2000,)) * (1 - 3 * floor) + floor
    divergence = (others * (others / w).log()).sum(1)
    assert float((v * (v / w).log()).sum()) <= float(divergence.min()) + 1e-12
    for _ in range(50):
        v = held.update(g)
    assert v.tolist() == pytest.approx([1 - 2 * floor, floor, floor], abs=1e-9)
    assert held.update(-10 * g)[2] > floor  # and what was held down can rise again


def test_influences_are_averaged_over_steps_before_an_update() -> None:
    influence = GradientInfluence(mu=1.0, lr=0.1, every=3)
    grams = [gram(seed=s) for s in range(3)]
    held = [influence.update(g) for g in grams]
    assert held[0].tolist() == held[1].tolist() == pytest.approx([1 / 3] * 3)
    once = GradientInfluence(mu=1.0, lr=0.1).update(sum(grams) / 3)  # type: ignore[operator]
    torch.testing.assert_close(held[2], once, rtol=1e-13, atol=0)


# ---- as a policy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_table_gives_the_weights_that_flat_gradients_give(dtype: torch.dtype) -> None:
    rows = table(dtype=dtype)
    flat = torch.stack([torch.cat([g.flatten() for g in row.values()]) for row in rows.rows]).double()
    found = GradientInfluence(mu=1.0).weights(signals(rows))
    expected = torch.softmax(0.1 * (flat @ flat.sum(0)), 0)
    torch.testing.assert_close(
        torch.tensor(list(found.values()), dtype=torch.float64),
        expected,
        rtol=1e-5 if dtype == torch.float32 else 1e-12,
        atol=0,
    )
    assert list(found) == ["accuracy", "length", "format"]


@pytest.mark.parametrize("params", ["head.*", ["head.*", "nothing"], lambda name: name.startswith("head")])
def test_only_chosen_parameters_are_compared(params: object) -> None:
    rows = table()
    flat = torch.stack([row["head.bias"] for row in rows.rows])
    found = GradientInfluence(mu=1.0, params=params).weights(signals(rows))  # type: ignore[arg-type]
    torch.testing.assert_close(
        torch.tensor(list(found.values()), dtype=torch.float64), torch.softmax(0.1 * (flat @ flat.sum(0)), 0)
    )
    with pytest.raises(
        InputError, match=r"chooses none of the parameters that the terms share: body\.weight, head\.bias"
    ):
        GradientInfluence(params="tail").weights(signals(rows))


def test_asking_moves_nothing_and_advancing_keeps_the_weights_of_the_step() -> None:
    policy = GradientInfluence(mu=1.0)
    first = policy.weights(signals(table()))
    assert policy.weights(signals(table())) == first
    assert not len(policy.log_weights)  # a step that is skipped leaves no trace
    policy.advance(signals(table()))
    assert policy.current.tolist() == pytest.approx(list(first.values()))
    assert policy.report() == pytest.approx(
        {f"influence/{n}": float(i) for n, i in zip(first, policy.influence(table().gram), strict=True)}
    )
    assert policy.weights(signals(table())) != first


def test_the_learning_rate_of_the_step_counts_unless_one_is_given() -> None:
    slow, fast = GradientInfluence(mu=1.0), GradientInfluence(mu=1.0, lr=1.0)
    assert slow.weights(signals(table(), lr=1.0)) == fast.weights(signals(table(), lr=1e-9))


def test_a_resumed_policy_goes_on_bit_for_bit() -> None:
    one = GradientInfluence(mu=1.0, every=2, floor=0.01)
    for seed in range(5):
        one.weights(signals(table(seed)))
        one.advance(signals(table(seed)))
    one.weights(signals(table(9)))  # waits, and is never saved
    loaded = GradientInfluence(mu=1.0, every=2, floor=0.01)
    loaded.load_state_dict(one.state_dict())
    others = [loaded, copy.deepcopy(one), pickle.loads(pickle.dumps(one))]
    assert all(other._next is None for other in others)

    def path(policy: GradientInfluence) -> list[dict[str, float]]:
        found = []
        for seed in range(5, 12):
            found.append(dict(policy.weights(signals(table(seed)))))
            policy.advance(signals(table(seed)))
        return found

    expected = path(one)
    assert all(path(other) == expected for other in others)


def test_bad_input_is_refused_with_words() -> None:
    for arguments, message in (
        ({"mu": 0.0}, "mu must be positive"),
        ({"lr": "adam"}, "'solver' or a positive number"),
        ({"lr": -1.0}, "'solver' or a positive number"),
        ({"every": 0}, "every must be at least 1"),
        ({"floor": 0.5}, "floor must lie in"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"initial": {"a": 0.6, "b": 0.6}}, "must add up to 1"),
        ({"initial": {"a": 0.0, "b": 0.0}}, "all weights are 0"),
        ({"initial": {"a": math.nan, "b": 0.6}}, "at least 0 and finite"),
    ):
        with pytest.raises(InputError, match=message):
            GradientInfluence(**arguments)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"floor must be below 0\.333"):
        GradientInfluence(floor=0.4).update(gram())
    with pytest.raises(InputError, match="initial has weights for a, b, and the terms are accuracy, length, format"):
        GradientInfluence(initial={"a": 0.5, "b": 0.5}).weights(signals(table()))
    with pytest.raises(NonFiniteError, match="must be finite"):
        GradientInfluence().update(torch.full((2, 2), math.nan))
    policy = GradientInfluence()
    policy.update(gram(), labels=("a", "b", "c"))
    with pytest.raises(InputError, match="weights are of a, b, c, and the gradients of x, y, z"):
        policy.update(gram(), labels=("x", "y", "z"))
    other = GradientInfluence()
    other.update(gram(2), labels=("x", "y"))
    with pytest.raises(CheckpointError, match="has weights of x, y, and these are a, b, c"):
        policy.load_state_dict(other.state_dict())
    rows = table()
    rows.rows[1]["head.bias"][0] = math.inf  # type: ignore[index]
    with pytest.raises(NonFiniteError, match="gradient of length is not finite"):
        GradientInfluence().weights(signals(rows))


def test_long_gradients_have_the_inner_products_of_short_ones() -> None:
    rows = [
        {"p": torch.randn(20_000, generator=torch.Generator().manual_seed(s), dtype=torch.float64)} for s in range(3)
    ]
    flat = torch.stack([row["p"] for row in rows])
    torch.testing.assert_close(GradientTable(("a", "b", "c"), torch.zeros(3), rows).gram, flat @ flat.T)
