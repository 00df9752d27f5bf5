"""The claim of paper 42: how it judges, and that its study runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from poise.claims.p42 import CLAIM, OTHERS, RATES, VARIANTS, WORD_RATES, Digits, Stage, WordRates, _judge


def stage(sft: float, kl: float, dpo: float) -> Stage:
    spread = torch.tensor([-0.01, 0.0, 0.01])
    return Stage(sft + spread, kl + spread, dpo + spread, spread + 0.7, spread + 0.9)


AFTER_SFT, WAY, AFTER_DPO = (0.73, 0.73, 0.84, 0.84, 0.82), (1.3, 1.1, 0.6, 0.2, 0.04), (0.78, 0.79, 0.82, 0.76, 0.72)
SEEN = Digits(
    reference=0.82,
    rates={rate: stage(*row) for rate, *row in zip(RATES, AFTER_SFT, WAY, AFTER_DPO, strict=True)},
    variants={(name, rate): stage(0.8, 0.5, 0.79) for name in VARIANTS for rate in OTHERS},
    at_equal_loss=(0.3, 0.4),
    joint=0.7,
)
WORDS = WordRates(
    kl=dict(zip(WORD_RATES, (4.0, 3.0, 2.0, 1.0), strict=True)), sft=dict.fromkeys(WORD_RATES, 3.5),
    dpo=dict(zip(WORD_RATES, (4.1, 4.2, 4.3, 4.2), strict=True)), values=(0.0, 0.3, 0.0),
)  # fmt: skip


def test_the_claim_holds_where_a_smaller_rate_and_a_divergence_do_better() -> None:
    finding = _judge(SEEN, WORDS)
    assert finding.verdict == "holds"
    assert "6 points of win rate" in finding.measured
    assert "on words 0.001 is best" in finding.reason
    assert "V(s) does not order" in finding.reason
    assert finding.figures["sft/0.001/dpo"] == pytest.approx(0.82)


def test_a_tie_and_a_joint_run_that_works_are_said() -> None:
    rates = {**SEEN.rates, RATES[0]: replace(SEEN.rates[RATES[0]], dpo=torch.tensor([0.80, 0.86, 0.79]))}
    assert "a tie" in _judge(replace(SEEN, rates=rates, joint=0.9), WORDS).reason
    assert "do not fail here" in _judge(replace(SEEN, joint=0.9), WORDS).reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rates": {**SEEN.rates, RATES[0]: stage(0.73, 1.3, 0.9)}}, "no smaller rate is better"),
        ({"rates": {**SEEN.rates, RATES[0]: stage(0.9, 1.3, 0.7)}}, "the highest rate is best after SFT"),
        ({"rates": {**SEEN.rates, RATES[0]: stage(0.73, 0.3, 0.7)}}, "does not grow with the rate"),
        ({"at_equal_loss": (0.5, 0.4)}, "does not travel less"),
    ],
)
def test_each_part_can_contradict_it(changes: dict[str, object], reason: str) -> None:
    finding = _judge(replace(SEEN, **changes), WORDS)
    assert finding.verdict == "fails"
    assert reason in finding.reason


@pytest.mark.slow
def test_the_study_runs() -> None:
    finding = CLAIM.run()
    assert finding.figures["sft/0.0003/sft"] > finding.figures["sft/0.01/sft"]
    assert finding.figures["KL at equal loss/chi2"] < finding.figures["KL at equal loss/sft"]
