"""Noises: densities integrate to one, samples follow them, and what does not fit is named."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from poise.errors import InputError
from poise.parts.noise import (
    BoxNoise,
    EnumerationNoise,
    FlowNoise,
    FullGaussianNoise,
    GaussianNoise,
    GridNoise,
    KDENoise,
    MixedNoise,
    MixtureNoise,
    as_noise,
)


def cloud(dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 2, generator=g).to(dtype)
    return torch.stack([x[:, 0], 0.5 * x[:, 0] + 0.5 * x[:, 1]], 1) + torch.tensor([1.0, -1.0], dtype=dtype)


FITS: dict[str, Callable[[Tensor], Any]] = {
    "gaussian": lambda x: GaussianNoise.fit(x, scale=1.2),
    "full": lambda x: FullGaussianNoise.fit(x, scale=1.1),
    "kde": lambda x: KDENoise.fit(x, most=50),
    "mixture": lambda x: MixtureNoise.fit(x, components=3),
    "box": lambda x: BoxNoise.fit(x),
    "mixed": lambda x: MixedNoise([KDENoise.fit(x, most=20), GaussianNoise.fit(x, scale=2.0)], (0.9, 0.1)),
    "torch": lambda x: as_noise(torch.distributions.Laplace(x.mean(0), x.std(0))),
}


@pytest.mark.parametrize("name", FITS)
def test_the_density_integrates_to_one_and_has_the_samples_moments(name: str) -> None:
    torch.manual_seed(0)
    noise = FITS[name](cloud())
    grid = GridNoise(torch.tensor([-12.0, -12.0]).double(), torch.tensor([12.0, 12.0]).double(), 400)
    p = (noise.log_prob(grid.points) + grid.log_volume).exp()
    # The box has edges within cells.
    assert float(p.sum()) == pytest.approx(1.0, abs=0.03 if name == "box" else 0.005)
    z = noise.sample(20_000)
    mean = (p[:, None] * grid.points).sum(0) / p.sum()
    spread = ((p[:, None] * (grid.points - mean) ** 2).sum(0) / p.sum()).sqrt()
    torch.testing.assert_close(z.mean(0), mean, atol=0.05, rtol=0.02)
    torch.testing.assert_close(z.std(0), spread, atol=0.03, rtol=0.03)
    assert bool(torch.isfinite(noise.log_prob(z)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [n for n in FITS if n != "mixture"])
def test_both_precisions_and_images_keep_their_form(name: str, dtype: torch.dtype) -> None:
    images = torch.rand(40, 1, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    noise = FITS[name](images)
    z = noise.sample(7)
    assert z.shape == (7, 1, 3, 3)
    assert z.dtype == dtype
    assert noise.log_prob(z).shape == (7,)


def test_the_full_covariance_is_that_of_pytorch() -> None:
    x = cloud()
    noise = FullGaussianNoise.fit(x, shrinkage=0.0)
    plain = torch.distributions.MultivariateNormal(x.mean(0), torch.cov(x.T))
    torch.testing.assert_close(noise.log_prob(x), plain.log_prob(x))


def test_a_kernel_on_every_example_is_the_density_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    x = cloud()[:, :1]
    noise = KDENoise.fit(x, most=1000)
    plain = stats.gaussian_kde(x.T.numpy(), bw_method="scott")
    torch.testing.assert_close(noise.log_prob(x), torch.as_tensor(plain.logpdf(x.T.numpy())), atol=1e-8, rtol=1e-8)


def test_a_number_that_never_changes_gets_a_floor() -> None:
    x = torch.cat([cloud(), torch.zeros(300, 1).double()], 1)
    for make in (GaussianNoise.fit, KDENoise.fit, BoxNoise.fit):
        noise = make(x)
        assert bool(torch.isfinite(noise.log_prob(noise.sample(5))).all())


def test_a_grid_draws_every_cell_once_and_a_finite_space_every_point() -> None:
    grid = GridNoise(torch.zeros(2), torch.tensor([2.0, 3.0]), 10)
    assert grid.sample(3).shape == (100, 2)
    torch.testing.assert_close(grid.log_prob(grid.points[:2]), torch.full((2,), -math.log(6.0)))
    space = EnumerationNoise(torch.arange(4.0)[:, None])
    torch.testing.assert_close(space.log_prob(space.sample(1)).exp(), torch.full((4,), 0.25))


def test_noise_moves_and_survives_a_copy() -> None:
    noise = FITS["mixed"](cloud())
    other = copy.deepcopy(noise)
    other.load_state_dict(noise.state_dict())
    x = cloud()[:5]
    assert torch.equal(other.log_prob(x), noise.log_prob(x))
    assert noise.float().sample(3).dtype == torch.float32


def test_a_flow_may_return_points_with_their_density() -> None:
    class Flow:
        def sample(self, n: int) -> tuple[Tensor, Tensor]:
            z = torch.randn(n, 2)
            return z, self.log_prob(z)

        def log_prob(self, x: Tensor) -> Tensor:
            return -0.5 * x.square().sum(1) - math.log(2 * math.pi)

    noise = as_noise(Flow())
    assert noise.sample(3).shape == (3, 2)
    assert repr(noise) == "FlowNoise(Flow)"


@pytest.mark.peer
def test_a_flow_of_normflows_serves_as_it_is() -> None:
    nf = pytest.importorskip("normflows")
    torch.manual_seed(0)
    base = nf.distributions.DiagGaussian(2, trainable=False)
    flow = nf.NormalizingFlow(base, [nf.flows.Planar((2,)) for _ in range(2)])
    noise = as_noise(flow)
    z = noise.sample(5)
    assert z.shape == (5, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianNoise(torch.zeros(2), 0.0), "GaussianNoise: standard deviations are positive"),
        (lambda: FullGaussianNoise(torch.zeros(2), torch.zeros(2, 2)), "not positive definite"),
        (lambda: BoxNoise(torch.ones(2), torch.zeros(2)), "BoxNoise: low and high"),
        (lambda: KDENoise(torch.zeros(3, 2), -1.0), "KDENoise: standard deviations"),
        (lambda: MixtureNoise(torch.zeros(3, 2), 1.0, torch.tensor([1.0, 0.0, 1.0])), "weights are positive"),
        (lambda: MixedNoise([]), "MixedNoise: one positive weight"),
        (lambda: FlowNoise(object()), "has no sample"),
        (lambda: GaussianNoise.fit(torch.zeros(1, 2)), "at least two examples"),
        (lambda: KDENoise.fit(torch.full((3, 2), torch.nan)), "not finite"),
        (lambda: GridNoise(torch.zeros(4), torch.ones(4)), "d at most 3"),
        (lambda: GaussianNoise(torch.zeros(2), 1.0).log_prob(torch.zeros(3, 4)), r"form \[2\], and these have \[4\]"),
    ],
)
def test_what_does_not_fit_is_named(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
