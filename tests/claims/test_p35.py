"""The claim of paper 35: how it judges, and that its study runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from poise.claims.p35 import CLAIM, DISTANCES, METHODS, Landscape, Measured, exact_descent, judge


def good() -> Measured:
    landscape = {r: Landscape(6, 10 * 3**r, 10 ** (-r * r / 20)) for r in DISTANCES}
    nll = {(t, m): [1.0 + 0.1 * (m == "NCE") + 0.01 * i for i in range(5)] for t in ("moons", "rings") for m in METHODS}
    few = {
        (p, n): [2.0 + 0.05 * (n == "gamma 1")] * 5 for p in ("kernel", "Gaussian") for n in ("gamma 0.1", "gamma 1")
    }
    return Measured(
        landscape,
        {"MECO": [0.01] * 3, "NCE": [0.01] * 3},
        {"MECO": [50] * 3, "NCE": [100] * 3},
        nll,
        {"MECO": [0.9] * 3, "NCE": [0.9] * 3},
        few,
    )


def worse(few: bool = False, toy: bool = False, **changes: Any) -> Measured:
    found = replace(good(), **changes)
    if few:
        found = replace(found, few={**found.few, ("kernel", "gamma 1"): [1.9] * 5})
    return replace(found, nll={**found.nll, ("rings", "NCE"): [0.9] * 5}) if toy else found


@pytest.mark.parametrize(
    ("found", "word"),
    [
        (good(), ""),
        (worse(landscape={**good().landscape, 8: Landscape(40, 10**6, 1e-4)}), "more than 30 steps"),
        (worse(landscape={**good().landscape, 8: Landscape(6, 60, 1e-4)}), "not exponentially flat"),
        (worse(errors={"MECO": [0.06], "NCE": [0.01]}), "6.0% from exact"),
        (worse(arrivals={"MECO": [100], "NCE": [100]}), "no slower"),
        (worse(toy=True), "on rings NCE"),
        (worse(detection={"MECO": [0.88], "NCE": [0.9]}), "detects foreign digits worse"),
        (worse(few=True), "with 16 points of kernel noise"),
    ],
)
def test_each_look_can_contradict_the_claim(found: Measured, word: str) -> None:
    finding = judge(found)
    assert finding.verdict == ("fails" if word else "holds")
    assert word in finding.reason


def test_exact_gradients_have_the_landscapes_that_the_paper_derives() -> None:
    near, far = exact_descent(2), exact_descent(6)
    assert near.nll <= 30
    assert far.nll <= 30
    assert far.nce > 10 * near.nce
    assert far.curvature < 0.1 * near.curvature


@pytest.mark.slow
def test_the_study_runs() -> None:
    finding = CLAIM.run()
    assert finding.verdict in ("holds", "fails")
    assert finding.figures["steps nll/8"] <= 30
