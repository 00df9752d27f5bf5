"""The trace of a normaliser, and noises beside a model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import poise
from poise.errors import InputError
from poise.insight import NormalizerReport, NormalizerTrace, noise_report
from poise.parts.noise import GaussianNoise, KDENoise
from poise.readouts import Unnormalized


class Location(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return -0.5 * (x - self.theta).square().sum(-1)


@pytest.mark.parametrize("formula", ["unnormalized_nll(gamma=0.3)", "nce"])
def test_a_run_is_traced_and_ends_at_the_normaliser(formula: str) -> None:
    x = torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
    trace = NormalizerTrace(every=2)
    poise.fit(
        Location(), formula, {"input": x}, readout=Unnormalized(GaussianNoise.fit(x, scale=1.3)), lr=0.1, steps=150, batch_size=100,
        device="cpu", callbacks=[trace],
    )  # fmt: skip
    report = trace.report()
    assert report.steps == tuple(range(2, 151, 2))
    assert report.log_normalizer[-1] == pytest.approx(0.5 * math.log(2 * math.pi), abs=0.15)
    if formula != "nce":
        assert report.drawn == 100
        assert report.ess[-1] > 50
        assert not report.warnings()
    assert len(report.text().splitlines()) == 4
    again = NormalizerTrace(every=2)
    again.load_state_dict(trace.state_dict())
    assert again.report() == report


def test_what_looks_wrong_is_said() -> None:
    steps = tuple(range(10))
    poor = NormalizerReport(steps, (0.0,) * 10, (1.2,) * 10, (1.0,) * 10, 100)
    assert "effective sample size of the noise is 1.2" in poor.warnings()[0]
    lagging = NormalizerReport(steps, tuple(float(2 * s) for s in steps), (3.0,) * 10, (3.5,) * 10, 100)
    assert [w.split()[0] for w in lagging.warnings()] == ["only", "g/u", "g/u", "log"]


def test_a_wider_noise_that_covers_the_model_beats_a_narrow_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 2)

    def unit(z: Tensor) -> Tensor:
        return -0.5 * z.square().sum(-1)

    rows = noise_report(
        unit,
        {
            "kde": KDENoise.fit(x),
            "narrow": GaussianNoise(torch.zeros(2), 0.4),
            "far": GaussianNoise(torch.full((2,), 3.0), 1.0),
        },
    )
    assert rows[0].name == "kde"
    assert rows[0].log_normalizer == pytest.approx(math.log(2 * math.pi), abs=5 * rows[0].error)


def test_an_objective_without_a_normaliser_is_named() -> None:
    with pytest.raises(InputError, match="NormalizerTrace: one term with a normaliser"):
        poise.fit(
            nn.Linear(2, 2),
            "cross_entropy",
            (torch.randn(8, 2), torch.zeros(8).long()),
            steps=1,
            callbacks=[NormalizerTrace()],
        )
    with pytest.raises(InputError, match="nothing is recorded"):
        NormalizerTrace().report()
    with pytest.raises(InputError, match="every is a number of steps"):
        NormalizerTrace(every=0)
