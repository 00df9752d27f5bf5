"""Terms of sparse autoencoders: values, gradients, and what they read."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import poise
from poise.errors import IncompatibleError, InputError, QuantityError
from poise.parts import SparseAutoencoder
from poise.problem import Problem
from poise.quantities import Quantities
from poise.readouts import Autoencoding
from poise.terms import DeadFeatures, FeatureL0, FeatureL1, NormMatching, Reconstruction

G = torch.Generator().manual_seed(0)


def test_each_term_is_its_formula() -> None:
    f = torch.rand(5, 12, generator=G, dtype=torch.float64)
    x, y = torch.randn(2, 5, 4, generator=G, dtype=torch.float64)
    b = torch.randn(4, generator=G, dtype=torch.float64)
    torch.testing.assert_close(Reconstruction()(y, x), ((y - x) ** 2).mean(1))
    torch.testing.assert_close(NormMatching()(f, x), (f.norm(dim=1) - x.norm(dim=1)) ** 2)
    torch.testing.assert_close(NormMatching(centred=True)(f, x, b), (f.norm(dim=1) - (x - b).norm(dim=1)) ** 2)
    torch.testing.assert_close(FeatureL1()(f), f.sum(1))
    torch.testing.assert_close(FeatureL0()((f > 0.5).double()), (f > 0.5).sum(1).double())


@pytest.mark.parametrize("term", [NormMatching(), FeatureL1(), Reconstruction()])
def test_gradients_are_those_of_the_values(term: poise.Term) -> None:
    one = torch.rand(3, 6, generator=G, dtype=torch.float64, requires_grad=True)
    other = torch.rand(3, 6, generator=G, dtype=torch.float64)
    reads = (one,) if isinstance(term, FeatureL1) else (one, other)
    assert torch.autograd.gradcheck(lambda f: term(f, *reads[1:]), (one,))


def test_at_no_features_the_subgradient_is_0() -> None:
    f = torch.zeros(2, 6, requires_grad=True)
    value = NormMatching()(f, torch.ones(2, 4))
    assert value.tolist() == [4, 4]
    (gradient,) = torch.autograd.grad(value.sum(), f)
    assert torch.equal(gradient, torch.zeros(2, 6))


def test_dead_features_alone_explain_the_residual() -> None:
    z = torch.randn(5, 8, generator=G, dtype=torch.float64, requires_grad=True)
    decoder = torch.randn(8, 4, generator=G, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 4, generator=G, dtype=torch.float64)
    y = torch.randn(5, 4, generator=G, dtype=torch.float64, requires_grad=True)
    inactive = torch.tensor([0, 5, 4, 9, 5, 0, 0, 7])
    dead = torch.tensor([1, 3, 4, 7])
    value = DeadFeatures(after=5)(z, y, x, decoder, inactive)
    few = z.detach()[:, dead].relu()
    torch.testing.assert_close(value.values, (few @ decoder[dead] - (x - y)).square().mean(1))
    assert float(value.extras["dead"]) == 4
    by_z, by_decoder, by_y = torch.autograd.grad(value.values.sum(), (z, decoder, y), allow_unused=True)
    assert by_y is None  # the residual is held
    live = torch.tensor([0, 2, 5, 6])
    assert not bool(by_z[:, live].any())
    assert not bool(by_decoder[live].any())
    moving = DeadFeatures(after=5, detach=False)(z, y, x, decoder, inactive).values
    torch.testing.assert_close(moving, value.values)
    assert bool(torch.autograd.grad(moving.sum(), y)[0].any())
    one = DeadFeatures(after=5, top=1)(z, y, x, decoder, inactive).values
    best = few.max(1)
    torch.testing.assert_close(one, (best.values[:, None] * decoder[dead[best.indices]] - (x - y)).square().mean(1))
    none = DeadFeatures(after=10)(z, y, x, decoder, inactive)
    assert not none.active


def test_a_dead_feature_has_a_gradient_again() -> None:
    sae = SparseAutoencoder(4, 12, "top_k(k=2)").double()
    sae.inactive.fill_(9)
    x = torch.randn(30, 4, generator=G, dtype=torch.float64)
    batches = [{"main": {"input": x}}]
    plain, helped = (
        Problem(sae, poise.parse(text), batches, Autoencoding()).gradient()["decoder"]
        for text in ("reconstruction", "reconstruction + 0.03125*dead_features")
    )
    never = ~(sae.eval()(x).features > 0).any(0)
    assert not bool(plain[never].any())
    assert bool(helped.abs().sum(1).gt(0).all())


def test_the_readout_runs_the_model_once_and_at_any_parameters() -> None:
    sae = SparseAutoencoder(4, 12, "jump_relu(threshold=0.1)").double()
    objective = poise.parse(
        "reconstruction + 0.1*norm_matching(centred=True) + 0.01*feature_l0 + 0.01*feature_l1 + dead_features(after=1)"
    )
    calls: list[int] = []
    sae.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(9, 4, generator=G, dtype=torch.float64)
    problem = Problem(sae, objective, [{"main": {"input": x}}], Autoencoding())
    value = problem.value()
    assert len(calls) == 1
    moved = {name: p.detach() + 0.1 for name, p in sae.named_parameters()}
    elsewhere = problem.value(at=moved)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            p.copy_(moved[name])
    again = Problem(sae, objective, [{"main": {"input": x}}], Autoencoding(), record=False).value()
    torch.testing.assert_close(elsewhere, again)
    assert float(value) != float(elsewhere)


@pytest.mark.parametrize("kind", ["top_afa", "top_k(k=3)", "relu"])
def test_two_small_batches_give_the_gradient_of_one_big_batch(kind: str) -> None:
    sae = SparseAutoencoder(4, 12, kind).double()
    x = torch.randn(9, 4, generator=G, dtype=torch.float64)
    objective = poise.parse("reconstruction + 0.1*norm_matching + 0.01*feature_l1")
    whole = Problem(sae, objective, [{"main": {"input": x}}], Autoencoding()).gradient()
    parts = Problem(sae, objective, [{"main": {"input": x[:2]}}, {"main": {"input": x[2:]}}], Autoencoding()).gradient()
    for name, g in whole.items():
        torch.testing.assert_close(g, parts[name], rtol=1e-10, atol=1e-12)


def test_formulas_are_read_back() -> None:
    text = (
        "reconstruction + 0.03125*norm_matching(centred=True) + 0.03125*dead_features(after=3, top=64) + 0.1*feature_l1"
    )
    assert str(poise.parse(text)) == text


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="dead_features: after"):
        DeadFeatures(after=0)
    with pytest.raises(InputError, match="dead_features: top"):
        DeadFeatures(top=1.5)  # type: ignore[arg-type]
    with pytest.raises(QuantityError, match="norm_matching"):
        poise.parse("norm_matching")(features=torch.ones(3, 4), signal=torch.ones(2, 4))
    with pytest.raises(IncompatibleError, match="SparseAutoencoder"):
        poise.fit(nn.Linear(3, 3), "reconstruction", {"input": torch.ones(4, 3)}, readout=Autoencoding(), steps=1)
    batch = Autoencoding()(
        poise.problem.ModelView(SparseAutoencoder(3, 8, "top_k(k=2)")), Quantities({"input": torch.ones(2, 3)}), frozenset()
    )  # fmt: skip
    assert batch["decoder"].shape == (8, 3)
