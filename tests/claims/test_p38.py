"""The claim of paper 38: how it judges, and that its study runs."""

from __future__ import annotations

import pytest

from poise.claims.p38 import CLAIM, PLAIN, Study, _judge

ORDER = {"random": 1.0, "cyclic": 0.8, "gs": 0.1, "gsd": 0.05, "gsl": 0.02, "gsq_iht": 0.02, "gsq_niht": 0.01}


def study() -> Study:
    found = Study()
    factor = {("fixed", "lipschitz"): 1.0, ("variable", "lipschitz"): 0.5, ("variable", "hessian"): 0.1}
    for _ in range(3):
        found.left.append({(k, s, r): factor[k, s] * ORDER[r] for k, s, rules in PLAIN for r in rules})
        found.forest.append(100)
        found.general.append(3000)
        found.ended.append({"projected_newton": 10, "two_metric": 12, "lipschitz": None})
        found.identified.append(9)
    found.lattice = 1e-12
    return found


def test_it_holds_where_every_order_is_the_papers() -> None:
    finding = _judge(study())
    assert finding.verdict == "holds"
    assert "too short to leave gsl's block" in finding.reason
    assert finding.figures["blocks/forest/0"] == 100


def test_a_greedy_rule_behind_random_falsifies_it() -> None:
    one = study()
    one.left[1]["variable", "hessian", "gs"] = 2.0
    finding = _judge(one)
    assert finding.verdict == "fails"
    assert "gs (variable blocks, hessian) is not ahead of random and cyclic in 1 seeds" in finding.reason


def test_no_finite_end_slow_forests_or_another_lattice_falsify_it() -> None:
    one = study()
    one.ended[0]["two_metric"] = None
    assert "two_metric did not end within 500 blocks" in _judge(one).reason
    two = study()
    two.general[2] = 300
    assert "forests need only 3.0 times fewer blocks" in _judge(two).reason
    three = study()
    three.lattice = 1e-3
    assert _judge(three).verdict == "fails"
    four = study()
    for ended in four.ended:
        ended["lipschitz"] = 40
    assert "projected gradient steps ended too" in _judge(four).reason


@pytest.mark.slow
def test_the_study_runs_and_the_claim_holds() -> None:
    assert CLAIM.run().verdict == "holds"
