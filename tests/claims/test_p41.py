"""The claim of paper 41: how it judges, and that its study runs."""

from __future__ import annotations

import pytest
import torch

from poise.claims.p41 import CLAIM, POSTERIOR, OnImages, OnTheLine, judge, measure_line, on_images, on_the_line


def line(matching: float = 0.08, absolute: float = 0.17, squared: float = 0.22) -> dict[str, OnTheLine]:
    values = {"squared error": squared, "absolute error": absolute, "proximal matching": matching}
    return {name: OnTheLine([v], [POSTERIOR[name]], [v]) for name, v in values.items()}


def images(gain: float = 1.0, rises: int = 0, last: float = 3.0) -> dict[str, OnImages]:
    found = OnImages({"matched": [25.0 + gain], "total variation": [25.0]}, [rises], [[0.0, 1.0, last]], [1e-4])
    return {"digits": found, "photographs": OnImages(dict(found.psnr), [0], [[0.0, 1.0]], [1e-4])}


@pytest.mark.parametrize(
    ("on_line", "on_image", "verdict"),
    [
        (line(), images(), "holds"),
        (line(matching=0.18), images(), "fails"),
        (line(matching=0.12), images(), "fails"),
        (line(absolute=0.3), images(), "fails"),
        (line(), images(gain=-0.1), "fails"),
        (line(), images(rises=1), "fails"),
        (line(), images(last=0.5), "fails"),
    ],
)
def test_each_look_can_contradict_the_claim(
    on_line: dict[str, OnTheLine], on_image: dict[str, OnImages], verdict: str
) -> None:
    finding = judge(on_line, on_image)
    assert finding.verdict == verdict
    assert bool(finding.reason) == (verdict == "fails")


def test_soft_thresholding_itself_is_at_distance_zero() -> None:
    found = OnTheLine()
    measure_line(lambda y: y.sign() * (y.abs() - 1).clamp_min(0), found)
    assert found.rmse == [0]
    assert found.at_two == [1]


def test_the_posterior_figures_are_integrals() -> None:
    # p(x | y = 2) for a Laplace prior (b = 1) and unit noise, on a grid.
    x = torch.linspace(-30, 30, 600_001, dtype=torch.float64)
    p = torch.exp(-x.abs() - 0.5 * (2 - x) ** 2)
    p = p / p.sum()
    assert float((p * x).sum()) == pytest.approx(POSTERIOR["squared error"], abs=1e-3)
    assert float(x[(p.cumsum(0) >= 0.5).int().argmax()]) == pytest.approx(POSTERIOR["absolute error"], abs=1e-3)
    assert float(x[p.argmax()]) == pytest.approx(POSTERIOR["proximal matching"], abs=1e-3)


def test_the_pieces_of_the_study_run() -> None:
    lines = {name: OnTheLine() for name in POSTERIOR}
    on_the_line(0, 5, lines)
    assert all(len(each.rmse) == len(each.prior) == 1 for each in lines.values())


@pytest.mark.slow
def test_images_of_the_study_run() -> None:
    found = OnImages()
    on_images("digits", 0, 4, found, more=True, judged=4)
    assert found.rises == [0]
    assert {"matched", "squared error", "total variation", "DnCNN", "gradient step", "blurred"} == set(found.psnr)


@pytest.mark.slow
def test_the_study_runs() -> None:
    finding = CLAIM.run()
    assert finding.verdict in ("holds", "fails")
