"""Self-rewarding rounds on a model of words: what is ranked, paired, labelled, trained and kept."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from poise.errors import CheckpointError, InputError
from poise.frozen import FrozenModel
from poise.readouts import SampleTokens
from poise.recipes import self_reward
from poise.recipes.self_reward import (
    ExternalReward,
    ImplicitReward,
    JudgeReward,
    answer_logps,
    self_rewarding_rounds,
)
from poise.tasks.words import PAD, WordModel, WordReadout, encode, sample, token_logps
from poise.weights.consistency import rank_consistency

PROMPTS = {"prompt_ids": torch.cat([encode(["a", "b", "c", "d", "e", "f"], end=False)])}
OPTIONS = {"solver": "adam", "lr": 1e-2, "batch_size": 4, "device": "cpu"}
SAMPLES = 4


def answer(model: nn.Module, prompts: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    words = sample(model, len(prompts["prompt_ids"]), generator, prompts=prompts["prompt_ids"])
    return {"response_ids": words.ids, "response_mask": words.mask}


def length(batch: Mapping[str, Tensor]) -> Tensor:
    return (batch["response_ids"] < PAD - 1).sum(1).float()


def models() -> tuple[WordModel, WordModel]:
    """M0 and M1, small and without training."""
    return WordModel(8, 16, 1, seed=0), WordModel(8, 16, 1, seed=1)


def rounds(**options):
    base, policy = models()
    ranker = options.pop("ranker", ImplicitReward(WordReadout))
    defaults = {"prompts": PROMPTS, "base": base, "samples": SAMPLES, "rounds": 2, "readout": WordReadout, **OPTIONS}
    return self_rewarding_rounds(policy, answer, ranker, **{**defaults, **options})


def answers(model: nn.Module) -> dict[str, Tensor]:
    return answer(model, {"prompt_ids": PROMPTS["prompt_ids"].repeat(2, 1)}, torch.Generator().manual_seed(0))


def pairs_of(folder: Path, number: int) -> dict[str, Tensor]:
    found = self_reward._load(folder, "ranked", number)
    assert found is not None
    return found["pairs"]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# ---- rankers --------------------------------------------------------------------------------------------------------


def test_the_implicit_reward_is_the_summed_log_ratio_and_without_a_base_the_mean() -> None:
    base, policy = models()
    batch = answers(policy)
    ids, mask = batch["response_ids"], batch["response_mask"]
    with torch.no_grad():
        ours, theirs = token_logps(policy, ids, mask), token_logps(base, ids, mask)
    ranker = ImplicitReward(WordReadout, batch_size=5)
    torch.testing.assert_close(ranker(policy, FrozenModel(base), batch), (ours - theirs).sum(1))
    torch.testing.assert_close(ranker(policy, None, batch), ours.sum(1) / mask.sum(1))
    alone = ImplicitReward(WordReadout, reference=False, reduction="sum")
    torch.testing.assert_close(alone(policy, FrozenModel(base), batch), ours.sum(1))


def test_scores_carry_no_gradient_and_leave_the_mode_as_it_was() -> None:
    _, policy = models()
    policy.train()
    assert not answer_logps(policy, WordReadout(), answers(policy)).requires_grad
    assert policy.training


def test_an_answer_of_no_tokens_has_no_score() -> None:
    _, policy = models()
    batch = answers(policy)
    batch["response_mask"][3] = False
    assert ImplicitReward(WordReadout)(policy, None, batch).isnan().nonzero().flatten().tolist() == [3]


# ---- what the pairs are ---------------------------------------------------------------------------------------------


def test_pairs_are_best_and_worst_with_the_rankers_log_probabilities_and_each_prompts_own_rate(tmp_path: Path) -> None:
    base, policy = models()
    report = rounds(rounds=1, consistency="dynamic", folder=tmp_path)
    pairs, rates = pairs_of(tmp_path, 1), report.rounds[0].rates
    ranker = ImplicitReward(WordReadout)
    sides = {}
    for side in ("chosen", "rejected"):
        batch = {f"response_{k}": pairs[f"{side}_{k}"] for k in ("ids", "mask")}
        sides[side] = ranker(policy, FrozenModel(base), batch)
        logps = answer_logps(policy, WordReadout(), batch)
        torch.testing.assert_close(pairs[f"reference_{side}_logps"], logps)
    assert (sides["chosen"] > sides["rejected"]).all()
    assert torch.equal(pairs["preference_label"], rates[pairs["index"]])
    assert report.rounds[0].consistency == pytest.approx(float(rates.nanmean()))


def test_the_predecessor_of_round_one_is_the_base_without_reference_and_then_the_model_before(monkeypatch) -> None:
    calls = []

    class Recording(ImplicitReward):
        def __call__(self, model, base, batch):
            calls.append((copy.deepcopy(model), None if base is None else copy.deepcopy(base.module)))
            return super().__call__(model, base, batch)

    base, policy = models()
    rounds(ranker=Recording(WordReadout))
    (now1, ref1), (before1, none), (_, ref2), (before2, ref3) = calls
    assert same(now1, policy)
    assert same(before1, base)
    assert none is None
    assert same(before2, policy)
    assert all(same(r, base) for r in (ref1, ref2, ref3))


def test_a_prompt_without_scores_does_not_shift_the_rates_of_those_behind_it(tmp_path: Path) -> None:
    lost = torch.zeros(6 * SAMPLES, dtype=torch.bool)
    lost[SAMPLES : 2 * SAMPLES] = True  # all answers to the second prompt
    seen: list[Tensor] = []

    class Lossy(ImplicitReward):
        def __call__(self, model, base, batch):
            scores = super().__call__(model, base, batch).masked_fill(lost, torch.nan)
            seen.append(scores.view(-1, SAMPLES))
            return scores

    rounds(ranker=Lossy(WordReadout), rounds=1, consistency="dynamic", folder=tmp_path)
    pairs = pairs_of(tmp_path, 1)
    assert 1 not in pairs["index"]
    wanted = rank_consistency(seen[0].nan_to_num(), seen[1].nan_to_num())[pairs["index"]]
    torch.testing.assert_close(pairs["preference_label"], wanted)


@pytest.mark.parametrize(("consistency", "label"), [(1.0, 1.0), (0.7, 0.7)])
def test_a_number_is_the_label_of_every_pair(tmp_path: Path, consistency: float, label: float) -> None:
    rounds(rounds=1, consistency=consistency, folder=tmp_path)
    torch.testing.assert_close(pairs_of(tmp_path, 1)["preference_label"].unique(), torch.tensor([label]))


def test_the_average_is_one_label_for_all_pairs(tmp_path: Path) -> None:
    report = rounds(rounds=1, folder=tmp_path)
    labels = pairs_of(tmp_path, 1)["preference_label"]
    assert labels.unique().tolist() == pytest.approx([report.rounds[0].consistency])


def test_srlm_is_dpo_bit_for_bit() -> None:
    assert same(rounds(consistency=1.0).model, rounds(consistency=1.0, objective="dpo(beta=0.1)").model)


def test_pairs_of_a_low_rate_can_be_left_out() -> None:
    every, some = rounds(rounds=1).rounds[0], rounds(rounds=1, minimum=0.5).rounds[0]
    assert some.pairs == int((every.rates >= 0.5).sum())
    assert some.pairs + some.left_out == 6


def test_tied_rankings_have_no_rate_and_half_a_label_where_that_is_asked() -> None:
    calls = iter(range(10))

    def judge(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return torch.zeros(len(batch["response_ids"])) if next(calls) % 2 else torch.arange(24.0) % SAMPLES

    first = rounds(ranker=JudgeReward(judge), rounds=1, consistency="dynamic", undefined="half").rounds[0]
    assert (first.pairs, first.label) == (6, 0.5)
    with pytest.raises(InputError, match="Round 1 has no pair"):
        rounds(ranker=JudgeReward(judge), rounds=1, consistency="dynamic")


def test_an_oracle_makes_no_wrong_pair_and_agrees_with_itself() -> None:
    report = rounds(ranker=ExternalReward(length), consistency=1.0, oracle=length, rounds=1).rounds[0]
    assert (report.noise, report.ranking_accuracy, report.consistency) == (0.0, 1.0, 1.0)
    assert "noise 0.000" in str(report)


def test_the_report_counts_wrong_pairs_and_right_orders_by_the_oracle() -> None:
    worst_first = ExternalReward(lambda batch: -length(batch))
    report = rounds(ranker=worst_first, consistency=1.0, oracle=length, rounds=1).rounds[0]
    assert (report.noise, report.ranking_accuracy) == (1.0, 0.0)


# ---- the loop -------------------------------------------------------------------------------------------------------


def test_m1_is_tuned_on_the_seed_data_and_other_terms_may_stand_beside_the_pairs() -> None:
    base, _ = models()
    ids = encode(["able", "bad", "cab"])
    seen = {"response_ids": ids, "response_mask": ids < PAD}
    report = self_rewarding_rounds(
        copy.deepcopy(base), answer, ImplicitReward(WordReadout), prompts=[PROMPTS, PROMPTS], seed_data=seen,
        seed_options={"steps": 2, "device": "cpu"}, samples=SAMPLES, rounds=2, readout=WordReadout, evaluate=lambda m: {"x": 1.0},
        objective="soft_dpo(beta=0.1) + 0.2*sft + 0.1*sft.on('anchor')", streams={"anchor": seen}, **OPTIONS,
    )  # fmt: skip
    assert report.start == {"x": 1.0}
    assert [r.metrics for r in report.rounds] == [{"x": 1.0}] * 2


def test_a_stopped_run_goes_on_bit_for_bit_and_every_model_is_kept(tmp_path: Path) -> None:
    whole = rounds(folder=tmp_path / "whole", oracle=length)
    stop = tmp_path / "stopped"

    class Stop(Exception):
        pass

    class Once:
        def on_step_end(self, state) -> None:
            if state.step == 1:
                raise Stop

    rounds(rounds=1, folder=stop, oracle=length)
    with pytest.raises(Stop):
        rounds(folder=stop, oracle=length, callbacks=[Once()], checkpoint_steps=1)
    asked = []

    def counted(model, prompts, generator):
        asked.append(1)
        return answer(model, prompts, generator)

    base, policy = models()
    again = self_rewarding_rounds(
        policy, counted, ImplicitReward(WordReadout), prompts=PROMPTS, base=base, samples=SAMPLES, rounds=2, readout=WordReadout,
        folder=stop, oracle=length, **OPTIONS,
    )  # fmt: skip
    assert not asked  # the answers of round 2 were kept
    assert same(whole.model, again.model)
    assert str(whole) == str(again)
    m0, m1 = models()
    assert same(whole.load(0), m0)
    assert same(whole.load(1), m1)
    assert same(whole.load(3), again.model)
    with pytest.raises(CheckpointError, match="M9 is not kept"):
        whole.load(9)


def test_a_folder_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    rounds(rounds=1, folder=tmp_path, identity="one")
    with pytest.raises(CheckpointError, match="identity differ"):
        rounds(rounds=1, folder=tmp_path, identity="another")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 1}, "at least 2 answers"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"consistency": 1.5}, "a label in"),
        ({"consistency": "always"}, "consistency is 'average'"),
        ({"undefined": "skip"}, "undefined is"),
        ({"minimum": 2.0}, "minimum is a rate"),
        ({"objective": "dpo"}, "reads no 'preference_label'"),
        ({"prompts": [PROMPTS]}, "need 2 sets of prompts"),
        ({"ranker": None, "base": None}, "there is no M0"),
        ({"ranker": ExternalReward(lambda batch: torch.zeros(3))}, r"must return float \[24\]"),
    ],
)
def test_what_does_not_fit_is_said(options, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rounds(**options)


def test_a_ranker_of_another_reduction_does_not_exist() -> None:
    with pytest.raises(InputError, match="reduction is"):
        ImplicitReward(WordReadout, reduction="max")


def test_a_transformers_model_rewards_itself_with_the_readout_that_is_the_default() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra 'lm')")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=12, bos_token_id=0, eos_token_id=1, pad_token_id=2, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base, policy = transformers.LlamaForCausalLM(config), transformers.LlamaForCausalLM(config)
    before = copy.deepcopy(policy)
    asked = torch.randint(3, 12, (6, 3), generator=torch.Generator().manual_seed(0))
    report = self_rewarding_rounds(
        policy, SampleTokens(max_new_tokens=5, eos=1, pad=2), base=base, rounds=2, samples=3, **OPTIONS,
        prompts={"prompt_ids": asked, "prompt_mask": torch.ones_like(asked, dtype=torch.bool)},
    )  # fmt: skip
    assert all(0 <= each.consistency <= 1 for each in report.rounds)
    assert not same(before, report.model)
