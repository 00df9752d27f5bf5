"""The readout of unnormalised models: one pass, the same draws for a step, and clear errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import poise
from poise.errors import IncompatibleError, InputError
from poise.metrics.density import heldout_nll, importance_log_normalizer
from poise.metrics.two_samples import FrechetDistance
from poise.parts.noise import GaussianNoise, KDENoise
from poise.problem import Problem
from poise.readouts import Unnormalized
from poise.terms.short_run_langevin import langevin_chain


class Counted(nn.Module):
    """log p~ by a network that counts its passes and points."""

    def __init__(self, column: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
        self.column = column
        self.passes = self.points = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes, self.points = self.passes + 1, self.points + len(x)
        out: Tensor = self.layers(x)
        return out if self.column else out.squeeze(-1)


X = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))


def problem(formula: str, model: nn.Module, **options: Any) -> Problem:
    readout = Unnormalized(GaussianNoise(torch.zeros(2), 1.0), **options)
    return Problem(model, poise.parse(formula), [{"main": {"input": X}}], readout, key=(0, 3))


@pytest.mark.parametrize(
    ("formula", "passes", "points"),
    [
        ("unnormalized_nll", 1, 48),
        ("nce", 1, 48),
        ("unnormalized_nll + nce + 0.1*energy_l2", 1, 48),
        ("short_run_langevin(steps=20)", 22, 16 + 21 * 32),
    ],
)
def test_a_step_costs_the_passes_that_it_says(formula: str, passes: int, points: int) -> None:
    model = Counted()
    problem(formula, model, ratio=2.0).gradient()
    assert (model.passes, model.points) == (passes, points)


def test_the_noise_of_a_step_is_drawn_once_and_anew_for_the_next() -> None:
    model = Counted()
    one = problem("unnormalized_nll", model)
    assert torch.equal(one.value(), one.value())
    other = problem("unnormalized_nll", model)
    other.key = (0, 4)
    assert not torch.equal(other.value(), one.value())


def test_an_energy_is_minus_a_log_density() -> None:
    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * x.square().sum(-1)

    found = problem("unnormalized_nll", Square(), n_noise=5, energy=True).value()
    # The noise is the model, so the likelihood is exact.
    torch.testing.assert_close(found, 0.5 * X.square().sum(-1).mean() + math.log(2 * math.pi))


def test_a_column_is_named_with_the_cure() -> None:
    with pytest.raises(IncompatibleError, match=r"one number for each point.*\[32, 1\].*squeeze\(-1\)"):
        problem("unnormalized_nll", Counted(column=True)).gradient()


def test_noise_that_does_not_fit_is_named() -> None:
    class Silent:
        def sample(self, n: int) -> Tensor:
            return torch.zeros(n, 2)

    with pytest.raises(InputError, match="Silent has no log_prob"):
        Unnormalized(Silent())
    with pytest.raises(InputError, match="n_noise"):
        Unnormalized(GaussianNoise(torch.zeros(2), 1.0), n_noise=0)
    with pytest.raises(InputError, match="ratio"):
        Unnormalized(GaussianNoise(torch.zeros(2), 1.0), ratio=0.0)
    wrong = Problem(
        Counted(), poise.parse("nce"), [{"main": {"input": X}}], Unnormalized(GaussianNoise(torch.zeros(3), 1.0))
    )
    with pytest.raises(IncompatibleError, match=r"form of the data.*\[1, 2\].*\[16, 3\]"):
        wrong.gradient()

    class Unsummed(GaussianNoise):
        def log_prob(self, x: Tensor) -> Tensor:
            return -0.5 * x.square()

    unsummed = Problem(
        Counted(), poise.parse("nce"), [{"main": {"input": X}}], Unnormalized(Unsummed(torch.zeros(2), 1.0))
    )
    with pytest.raises(IncompatibleError, match="as_noise"):
        unsummed.gradient()


def test_a_chain_samples_a_gaussian() -> None:
    torch.manual_seed(0)
    x = langevin_chain(lambda p: -0.5 * (p - 2).square().sum(-1), torch.zeros(4000, 1), steps=200, step=0.05)
    assert float(x.mean()) == pytest.approx(2, abs=0.06)
    assert float(x.std()) == pytest.approx(1, abs=0.05)
    short = langevin_chain(lambda p: -500 * p.square().sum(-1), torch.ones(1, 1), steps=1, temperature=0.0, clip=2.0)
    assert float(short) == pytest.approx(0.9)


@pytest.mark.parametrize("argument", ["steps=0", "step=0.0", "temperature=-1.0", "clip=0.0"])
def test_arguments_of_the_chain_out_of_range_are_named(argument: str) -> None:
    with pytest.raises(poise.errors.FormulaError, match="short_run_langevin: "):
        poise.parse(f"short_run_langevin({argument})")


@pytest.mark.parametrize(
    "formula", ["unnormalized_nll(gamma=0.3)", "nce", "short_run_langevin(step=0.2) + 0.001*energy_l2"]
)
def test_every_way_learns_real_digits(formula: str) -> None:
    """Densities of 8 x 8 digits in ten principal directions: images that were held out are likelier than under the noise."""
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().data, dtype=torch.float32)
    centred = images - images.mean(0)
    x = centred @ torch.linalg.svd(centred, full_matrices=False)[2][:10].T
    x = x / x.std()
    torch.manual_seed(0)

    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(10, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

        def forward(self, points: Tensor) -> Tensor:
            out: Tensor = self.layers(points).squeeze(-1)
            return out

    model = Energy()
    noise = KDENoise.fit(x[:1500], scale=2.0)
    poise.fit(
        model,
        formula,
        {"input": x[:1500]},
        readout=Unnormalized(noise),
        solver="adam",
        lr=3e-3,
        steps=200,
        device="cpu",
    )
    # Better than the noise itself, which knows the training images.
    nll = heldout_nll(model, x[1500:], importance_log_normalizer(model, noise, 20_000))
    assert nll < -float(noise.log_prob(x[1500:]).mean()) - 0.5


def test_images_keep_their_form_from_noise_to_samples() -> None:
    """A convolutional energy of 8 x 8 digits, data with added noise, chains and the Fréchet distance of what they find."""
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().images, dtype=torch.float32)[:600, None] / 16

    class Convolutional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                nn.Conv2d(1, 8, 3, stride=2), nn.SiLU(), nn.Flatten(), nn.Linear(72, 1, bias=False)
            )

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layers(x).squeeze(-1)
            return out - x.square().flatten(1).sum(-1) / 2

    model, noise = Convolutional(), KDENoise.fit(images[:500], bandwidth=0.3)
    poise.fit(
        model, "unnormalized_nll + 0.001*energy_l2", {"input": images[:500]}, readout=Unnormalized(noise), solver="adam", lr=3e-3,
        steps=30, device="cpu",
    )  # fmt: skip
    start = noise.sample(50)
    found = langevin_chain(model, start, steps=30, step=0.01, temperature=0.1)
    assert found.shape == start.shape == (50, 1, 8, 8)
    distance = FrechetDistance(lambda x: x.flatten(1)[:, 8:24], images[500:])
    assert distance(found) < distance(start)
