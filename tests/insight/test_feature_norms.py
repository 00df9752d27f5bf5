"""The diagnostics of feature norms, and the quality of an autoencoder."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from poise.errors import IncompatibleError, InputError
from poise.insight import (
    afa_report,
    autoencoder_quality,
    description_length,
    gram_statistics,
    spliced,
    spliced_loss,
)
from poise.parts import SparseAutoencoder

F64 = torch.float64


@given(st.integers(0, 10**6), st.integers(2, 16))
@settings(max_examples=30, deadline=None)
def test_with_orthonormal_atoms_the_norms_agree_and_epsilon_is_0(seed: int, h: int) -> None:
    g = torch.Generator().manual_seed(seed)
    atoms = torch.linalg.qr(torch.randn(16, h, generator=g, dtype=F64)).Q.T
    f = 0.1 + torch.rand(4, h, generator=g, dtype=F64)
    report = afa_report(f @ atoms, f, atoms)
    torch.testing.assert_close(report.z_norm, report.f_norm, rtol=1e-12, atol=0)
    assert float(report.epsilon.max()) < 1e-12
    assert float(report.loss.max()) < 1e-24
    assert report.gram.largest < 1e-12


@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_the_bound_holds_for_any_dictionary(seed: int, h: int, width: int) -> None:
    g = torch.Generator().manual_seed(seed)
    atoms = nn.functional.normalize(torch.randn(h, width, generator=g, dtype=F64), dim=1)
    f = torch.rand(6, h, generator=g, dtype=F64) * (torch.rand(6, h, generator=g) < 0.4)
    f[:, 0] += 0.1
    z = f @ atoms
    epsilon = gram_statistics(atoms).largest
    gap = (z.square().sum(1) - f.square().sum(1)).abs()
    l1, l2 = f.sum(1).square(), f.square().sum(1)
    k = (f > 0).sum(1)
    rounding = 1e-12 * l1
    assert bool((gap <= epsilon * (l1 - l2) + rounding).all())
    assert bool((epsilon * (l1 - l2) <= epsilon * (k - 1) * l2 + rounding).all())
    if float(z.norm(dim=1).min()) > 0:
        report = afa_report(z, f, atoms)
        # so eps_lbo is a lower bound of epsilon
        assert bool((report.epsilon <= epsilon + 1e-12).all())
        assert report.gram.largest >= report.gram.welch - 1e-12


def test_rows_of_any_length_and_the_bias_are_taken_into_account() -> None:
    g = torch.Generator().manual_seed(0)
    decoder, bias = torch.randn(9, 5, generator=g, dtype=F64), torch.randn(5, generator=g, dtype=F64)
    f = torch.rand(7, 9, generator=g, dtype=F64)
    z = torch.randn(7, 5, generator=g, dtype=F64)
    report = afa_report(z, f, decoder, bias)
    rows = decoder.norm(dim=1)
    longer = torch.cat([f * rows, bias.norm().expand(7, 1)], dim=1)
    unit = torch.cat([decoder / rows[:, None], (bias / bias.norm())[None]])
    torch.testing.assert_close(longer @ unit, f @ decoder + bias)
    torch.testing.assert_close(report.f_norm, longer.norm(dim=1))
    gap = (z.norm(dim=1) ** 2 - report.f_norm**2).abs()
    torch.testing.assert_close(report.epsilon, gap / (8 * report.f_norm**2))
    torch.testing.assert_close(report.loss, (z - f @ decoder - bias).square().sum(1) / z.square().sum(1))
    c = torch.rand(9, generator=g, dtype=F64) + 0.5
    other = afa_report(z, f / c, decoder * c[:, None], bias)
    torch.testing.assert_close(other.epsilon, report.epsilon)
    torch.testing.assert_close(other.loss, report.loss)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_between_the_bounds_epsilon_is_within_its_share(share: float) -> None:
    report = afa_report(torch.eye(3), torch.eye(3), torch.eye(3))
    low, high = report.bound(share)
    h = 5
    for slope in (low, high):
        if math.isfinite(slope):
            z = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]], dtype=F64)
            at = afa_report(z, slope * z, torch.eye(h, dtype=F64))
            assert float(at.epsilon) * (h - 1) == pytest.approx(share)
    assert math.isfinite(high) == (share < 1)
    with pytest.raises(InputError, match="above 0"):
        report.bound(0.0)


def test_the_gram_statistics_are_those_of_all_pairs() -> None:
    g = torch.Generator().manual_seed(0)
    decoder = torch.randn(40, 6, generator=g) * (torch.rand(40, 1, generator=g) + 0.5)
    unit = nn.functional.normalize(decoder.double(), dim=1)
    off = (unit @ unit.T)[~torch.eye(40, dtype=torch.bool)]
    found = gram_statistics(decoder)
    assert found.largest == pytest.approx(float(off.abs().max()))
    assert found.mean == pytest.approx(float(off.abs().mean()))
    assert found.signed_mean == pytest.approx(float(off.mean()))
    assert found.pairs == 40 * 39
    some = gram_statistics(decoder, sample=10)
    assert some.pairs == 90
    assert some.largest <= found.largest


def test_the_description_length_is_that_of_the_papers_notebook() -> None:
    # 2048 active features of 12,288 at 7 bits each and their places
    assert float(description_length(torch.tensor([2048]), 12288)[0]) == pytest.approx(2048 * (7 + math.log2(12288)))
    f = torch.tensor([[0.0, 1.0, 2.0, 0.0]])
    assert description_length(f, 4).tolist() == [18]
    with pytest.raises(InputError, match="description_length"):
        description_length(f, 1)


def test_the_plot_shows_every_input_the_line_and_the_bounds() -> None:
    g = torch.Generator().manual_seed(0)
    f = torch.rand(30, 8, generator=g)
    report = afa_report(torch.randn(30, 4, generator=g), f, torch.randn(8, 4, generator=g))
    figure = report.figure("layer 4")
    names = [trace.name for trace in figure.data]
    assert names == ["ε(h−1) ≤ 0.25", "ε(h−1) ≤ 0.5", "ε(h−1) ≤ 1", "|f| = |z|", "inputs"]
    assert list(figure.data[-1].x) == report.points[:, 0].tolist()
    assert figure.to_json()
    epsilon, loss = report.clipped(0.9)
    assert float(epsilon.max()) < float(report.epsilon.max())
    assert float(loss.max()) < float(report.loss.max())
    assert "eps_lbo" in str(report)
    assert 0 <= report.over <= 1
    assert report.description == pytest.approx(float(description_length(f, 8).mean()))


def test_bad_input_is_named() -> None:
    z, f, d = torch.ones(2, 3), torch.ones(2, 4), torch.eye(4, 3) + 0.1
    bad = [
        ({"features": -f}, "row 0 has one below 0"),
        ({"decoder": torch.cat([d[:3], torch.zeros(1, 3)])}, "row 3 of decoder is 0"),
        ({"z": torch.zeros(2, 3)}, "row 0 of z is 0"),
        ({"z": z / 0}, "z has values that are not finite"),
        ({"features": f[:, :3]}, "goes with z"),
        ({"bias": torch.ones(2)}, "goes with z"),
        ({"decoder": d[:1], "features": f[:, :1]}, "divides by h - 1"),
        ({"z": z[0]}, "matrices"),
    ]
    for change, words in bad:
        with pytest.raises(InputError, match=words):
            afa_report(**{"z": z, "features": f, "decoder": d, **change})


# ---- quality --------------------------------------------------------------------------------------------------------


def test_quality_is_what_a_pass_in_evaluation_gives() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    sae = SparseAutoencoder(6, 30, "top_k(k=3)", normalise=True)
    with torch.no_grad():
        out = sae.eval()(x)
    sae.train()
    found = autoencoder_quality(sae, x, batch_size=16)
    assert sae.training
    assert not bool(sae.fired.any())
    assert found.mse == pytest.approx(float((out.reconstruction - out.signal).square().mean()), rel=1e-5)
    spread = (out.signal - out.signal.mean(0)).square().mean()
    assert found.unexplained == pytest.approx(found.mse / float(spread), rel=1e-5)
    on = out.features > 0
    assert found.l0 == pytest.approx(float(on.sum(1).double().mean()))
    assert found.dead == pytest.approx(float((~on.any(0)).double().mean()))
    assert found.bits == pytest.approx(found.l0 * (7 + math.log2(30)))
    with pytest.raises(InputError, match="two at least"):
        autoencoder_quality(sae, x[:1])


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
        return 2 * x, "more"


def test_a_module_is_spliced_and_put_back() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    before = model(x)
    with spliced(model, "0", lambda a: a + 1):
        changed = model(x)
    assert torch.equal(model(x), before)
    torch.testing.assert_close(changed, model[2]((model[0](x) + 1).relu()))
    pair = Pair()
    holder = nn.ModuleDict({"pair": pair})
    with spliced(holder, "pair", torch.zeros_like):
        assert float(pair(x)[0].abs().sum()) == 0
    with pytest.raises(InputError, match="no module 'nought'"), spliced(model, "nought", torch.zeros_like):
        pass
    text = nn.ModuleDict({"text": nn.Identity()})
    with pytest.raises(IncompatibleError, match="gave a str"), spliced(text, "text", torch.zeros_like):
        text["text"]("words")


def test_the_recovered_loss_is_1_for_a_perfect_autoencoder_and_0_for_zeros() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    batches = [(torch.randn(8, 3), torch.randint(2, (8,))) for _ in range(3)]

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    class Fixed(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
            return self.factor * x

    perfect, nothing = (spliced_loss(model, "0", Fixed(c), loss, batches) for c in (1.0, 0.0))
    assert perfect.recovered == 1
    assert nothing.recovered == 0
    assert perfect.whole == pytest.approx(float(torch.stack([loss(model, b) for b in batches]).mean().detach()))
    half = spliced_loss(model, "0", SparseAutoencoder(4, 12, "top_k(k=2)"), loss, batches)
    assert math.isfinite(half.recovered)
    with pytest.raises(InputError, match="no batch"):
        spliced_loss(model, "0", Fixed(1.0), loss, [])
