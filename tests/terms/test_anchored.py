"""The soft form of half fine-tuning: a quadratic anchor on the part that is not free."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import poise
from poise.errors import InputError
from poise.terms import AnchoredPenalty


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def test_the_value_is_half_the_squared_distance_and_the_gradient_the_distance_where_it_is_not_free() -> None:
    start, model = net().double(), net().double()
    mask = {"0.weight": True, "0.bias": False, "2.weight": torch.tensor([[True], [False]])}
    value = AnchoredPenalty(start, mask)(parameters(model))
    value.backward()
    moved = {n: (p - parameters(start)[n]).detach() for n, p in model.named_parameters()}
    expected = moved["0.bias"].square().sum() + moved["2.weight"][1].square().sum() + moved["2.bias"].square().sum()
    torch.testing.assert_close(value, 0.5 * expected)
    assert model[0].weight.grad is None  # type: ignore[index]
    torch.testing.assert_close(model[2].weight.grad, moved["2.weight"] * torch.tensor([[0.0], [1.0]]))  # type: ignore[index]
    torch.testing.assert_close(model[2].bias.grad, moved["2.bias"])  # type: ignore[index]


def minimum(h: Tensor, c: Tensor, start: Tensor, frozen: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """The least of 1/2 (x-c)'H(x-c) + weight/2 |(x-start) frozen|^2: where, and the value."""
    d = weight * frozen.double().diag()
    x = torch.linalg.solve(h + d, h @ c + d @ start)
    return x, 0.5 * (x - c) @ h @ (x - c) + 0.5 * weight * ((x - start) * frozen).square().sum()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_anchored_minimum_rises_with_the_weight_and_converges_to_the_masked_one(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(6, 6, generator=g, dtype=torch.float64)
    h = root @ root.T + torch.eye(6, dtype=torch.float64)
    c, start = (torch.randn(6, generator=g, dtype=torch.float64) for _ in range(2))
    frozen = torch.tensor([True, False, True, False, True, False])
    term = AnchoredPenalty({"x": start}, {"x": ~frozen})
    values = []
    for weight in (0.0, 0.1, 1.0, 10.0, 1e3, 1e8):
        x, value = minimum(h, c, start, frozen, weight)
        x.requires_grad_()
        total = 0.5 * (x - c) @ h @ (x - c) + weight * term({"x": x})
        (gradient,) = torch.autograd.grad(total, x)
        # The closed form is stationary for the term itself; 1e-6 of the largest coefficient is rounding.
        assert float(gradient.abs().max()) < 1e-6 * max(1.0, weight)
        torch.testing.assert_close(total.detach(), value)
        values.append(float(value))
    assert all(a <= b + 1e-9 for a, b in pairwise(values))
    # The masked problem: the frozen half stays, the rest is minimised.
    free = ~frozen
    y = start.clone()
    y[free] = c[free] - torch.linalg.solve(h[free][:, free], h[free][:, frozen] @ (start - c)[frozen])
    torch.testing.assert_close(x.detach(), y, rtol=1e-5, atol=1e-5)
    masked = float(0.5 * (y - c) @ h @ (y - c))
    assert values[-1] == pytest.approx(masked, rel=1e-5)
    assert values[-1] <= masked + 1e-9


def test_it_is_a_formula_whose_reference_is_where_training_began() -> None:
    model, x = net(), torch.randn(40, 3)
    start = copy.deepcopy(model)
    batch = {"input": x, "target": (x[:, 0] > 0).long()}
    poise.fit(model, "cross_entropy + 1000*anchored", batch, steps=30, lr=1e-4)
    near = sum(float((a - b).detach().norm()) for a, b in zip(model.parameters(), start.parameters(), strict=True))
    poise.fit(free := copy.deepcopy(start), "cross_entropy", batch, steps=30, lr=1e-4)
    far = sum(float((a - b).detach().norm()) for a, b in zip(free.parameters(), start.parameters(), strict=True))
    assert near < far
    text = "cross_entropy + 0.1*anchored(ratio=0.5, level='model')"
    assert str(poise.parse(text)) == text
    poise.fit(net(), text, batch, steps=2)


def test_the_reference_is_no_parameter_and_survives_saving_copying_and_casting() -> None:
    model = net()
    term = AnchoredPenalty()
    assert float(term(parameters(model))) == 0
    assert not list(term.parameters())
    with torch.no_grad():
        model[0].weight += 1.0  # type: ignore[index]
    value = float(term(parameters(model)).detach())
    assert value == pytest.approx(6.0, rel=1e-5)
    fresh = AnchoredPenalty()
    fresh.load_state_dict(term.state_dict())
    for other in (fresh, copy.deepcopy(term), copy.deepcopy(term).double()):
        assert float(other(parameters(model)).detach()) == value
    # A reference that was given is the user's to give again, and the objective's state stays small.
    given_again = AnchoredPenalty(net())
    assert given_again.state_dict()["_extra_state"] == {"reference": None}
    with torch.no_grad():
        reference = net()
        held = AnchoredPenalty(reference)
        reference[0].weight.zero_()  # type: ignore[index]
    assert held.reference is not None
    assert bool(held.reference["0.weight"].any())


def test_a_resumed_run_keeps_the_reference_of_its_beginning(tmp_path: Any) -> None:
    x = torch.randn(32, 3)
    batch = {"input": x, "target": (x[:, 0] > 0).long()}
    torch.manual_seed(0)
    start = net()

    def run(steps: int, folder: Any) -> nn.Module:
        class Stop:
            def on_step_end(self, state: Any) -> None:
                if state.step == steps:
                    state.stop = "enough"

        model = copy.deepcopy(start)
        poise.fit(
            model, "cross_entropy + 0.5*anchored", batch, steps=12, batch_size=8, callbacks=[Stop()], checkpoint=folder
        )
        return model

    whole = run(12, None)
    run(7, tmp_path)
    from poise import checkpoint

    saved = checkpoint.load_newest(tmp_path)
    assert saved is not None
    saved["fields"]["stop"] = None
    checkpoint.save(tmp_path, 7, saved)
    resumed = run(12, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_bad_input_says_what_is_expected() -> None:
    with pytest.raises(InputError, match="give a mask or a ratio, not both"):
        AnchoredPenalty(mask={}, ratio=0.5)
    with pytest.raises(InputError, match=r"ratio must be in \(0, 1\)"):
        AnchoredPenalty(ratio=1.5)
    with pytest.raises(InputError, match="the reference has none of the trained parameters"):
        AnchoredPenalty({"other": torch.zeros(1)})(parameters(net()))
    with pytest.raises(InputError, match=r"0\.weight is \(4, 3\), and in the reference it is \(2, 3\)"):
        AnchoredPenalty(nn.Sequential(nn.Linear(3, 2)))(parameters(net()))
