"""Normalisers by three ways agree, and the two-sample distances have their closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from poise.errors import InputError
from poise.metrics.density import (
    ais_log_normalizer,
    auroc,
    heldout_nll,
    importance_log_normalizer,
    quadrature_kl,
    quadrature_log_normalizer,
)
from poise.metrics.two_samples import FrechetDistance, frechet_distance, mmd
from poise.parts.noise import GaussianNoise


def two_hills(x: Tensor) -> Tensor:
    """log p~ of two Gaussians of width 0.5 at -2 and 2, times e^3: log Z = 3 + log(2 * 2 pi * 0.25)."""
    hills = torch.stack([-2 * (x - c).square().sum(-1) for c in (-2.0, 2.0)])
    return torch.logsumexp(hills, 0) + 3


EXACT = 3 + math.log(2 * 2 * math.pi * 0.25)


def test_quadrature_importance_and_annealing_find_the_same_normaliser() -> None:
    torch.manual_seed(0)
    low, high = torch.full((2,), -6.0), torch.full((2,), 6.0)
    noise = GaussianNoise(torch.zeros(2), 2.5)
    assert quadrature_log_normalizer(two_hills, low, high).value == pytest.approx(EXACT, abs=1e-5)
    importance = importance_log_normalizer(two_hills, noise, 50_000)
    assert importance.value == pytest.approx(EXACT, abs=5 * importance.error)
    annealed = ais_log_normalizer(two_hills, noise, chains=256, temperatures=60)
    assert annealed.value == pytest.approx(EXACT, abs=max(0.1, 5 * annealed.error))
    assert annealed.accepted is not None
    assert annealed.accepted > 0.4


def test_annealing_finds_what_plain_importance_sampling_misses() -> None:
    torch.manual_seed(0)

    def narrow(x: Tensor) -> Tensor:
        return -0.5 * ((x - 1.0) / 0.15).square().sum(-1)

    noise, exact = GaussianNoise(torch.zeros(6), 1.0), 6 * (0.5 * math.log(2 * math.pi) + math.log(0.15))
    plain = importance_log_normalizer(narrow, noise, 2000)
    annealed = ais_log_normalizer(narrow, noise, chains=128, temperatures=250)
    assert abs(annealed.value - exact) < 0.5 < abs(plain.value - exact)
    assert annealed.ess > 5 * plain.ess


def test_a_heldout_likelihood_is_the_mean_energy_and_the_normaliser() -> None:
    x = torch.tensor([[0.0], [2.0]])
    found = quadrature_log_normalizer(lambda z: -0.5 * z[:, 0] ** 2, torch.full((1,), -9.0), torch.full((1,), 9.0))
    assert heldout_nll(lambda z: -0.5 * z[:, 0] ** 2, x, found) == pytest.approx(
        1 + 0.5 * math.log(2 * math.pi), abs=1e-5
    )


def test_a_divergence_on_a_grid_does_not_see_constants() -> None:
    low, high = torch.full((1,), -9.0), torch.full((1,), 9.0)
    assert quadrature_kl(two_hills_1d, lambda x: two_hills_1d(x) + 7, low, high) == pytest.approx(0, abs=1e-9)


def two_hills_1d(x: Tensor) -> Tensor:
    return torch.logsumexp(torch.stack([-2 * (x[:, 0] - c) ** 2 for c in (-2.0, 2.0)]), 0)


def test_the_area_under_the_curve_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    g = torch.Generator().manual_seed(0)
    inside, outside = (torch.randn(n, generator=g) + s for n, s in ((40, 1.0), (30, 0.0)))
    inside = (inside * 4).round()  # with ties
    outside = (outside * 4).round()
    truth = torch.cat([torch.ones(40), torch.zeros(30)])
    assert auroc(inside, outside) == pytest.approx(metrics.roc_auc_score(truth, torch.cat([inside, outside])))
    with pytest.raises(InputError, match="at least one score"):
        auroc(inside, outside[:0])
    with pytest.raises(InputError, match="NaN"):
        auroc(inside, torch.tensor([math.nan]))


def test_the_kernel_distance_is_the_sum_over_pairs() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 2, generator=g).double(), torch.randn(7, 2, generator=g).double()

    def k(a: Tensor, b: Tensor) -> float:
        return math.exp(-float((a - b).square().sum()) / 2)

    own = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / 20
    own += sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / 42
    assert mmd(x, y, (1.0,)) == pytest.approx(own - 2 * sum(k(a, b) for a in x for b in y) / 35)
    far = mmd(x, y + 3)
    assert far > mmd(x, y)
    with pytest.raises(InputError, match="mmd: two samples"):
        mmd(x, y[:, :1])


def test_the_frechet_distance_of_gaussians_is_its_closed_form() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=g).double()
    y = torch.randn(200, 4, generator=g).double() @ torch.randn(4, 4, generator=g).double() + 1
    one, other = torch.cov(x.T).numpy(), torch.cov(y.T).numpy()
    plain = float((x.mean(0) - y.mean(0)).square().sum())
    plain += float((one + other - 2 * linalg.sqrtm(one @ other).real).trace())
    assert frechet_distance(x, y) == pytest.approx(plain, rel=1e-8)
    assert FrechetDistance(lambda v: v, x)(y) == pytest.approx(plain, rel=1e-8)
    with pytest.raises(InputError, match="frechet_distance: two samples"):
        frechet_distance(x, y[:1])
