"""Streams whose batches the trained model writes: what they draw, what they cost, and that a resumed run equals a whole one."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

import poise
from poise.errors import CheckpointError, InputError, NonFiniteError, QuantityError, StateError
from poise.readouts.on_policy import Choices, OnPolicy, collect, pairs_from_rewards
from poise.streams import Stream
from poise.tasks.bandit_arms import BanditArms, TabularAgent, draw_arms

CPU = torch.device("cpu")
BANDIT = BanditArms("far")


def agent(cells: int = 4) -> TabularAgent:
    return TabularAgent(BANDIT.reference, cells=cells)


def stream(prompts: int = 4, seed: int = 0, accumulate: int = 1, **options) -> OnPolicy:
    made = OnPolicy(prompts, draw_arms, BANDIT.score, **{"samples": 3, "batch_size": 4, **options})
    made.prepare("main", seed, CPU, accumulate)
    made.attach(agent(prompts))
    return made


def steps(source: Stream, number: int, start: int = 0) -> list[dict[str, torch.Tensor]]:
    return [micros[0] for micros in islice(source.iterate(start), number)]


def train(on: OnPolicy, formula: str = "rloo", **options) -> poise.Run:
    model = options.pop("model", agent())
    return poise.fit(
        model,
        formula,
        {"main": on},
        readout=Choices(poise.FrozenModel(agent())),
        solver="sgd",
        lr=1.0,
        device="cpu",
        **options,
    )


# ---- batches --------------------------------------------------------------------------------------------------------


def test_a_round_has_the_answers_of_each_prompt_together_with_their_rewards() -> None:
    (batch,) = steps(stream(shuffle=False), 1)
    assert batch["group"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert batch["index"].tolist() == batch["group"].tolist() == batch["input"].tolist()
    torch.testing.assert_close(batch["reward"], BANDIT.rewards[batch["response_ids"][:, 0]].float())
    torch.testing.assert_close(
        batch["behaviour_logps"], BANDIT.reference.log()[batch["response_ids"]].float(), rtol=1e-5, atol=1e-6
    )


def test_samples_are_a_function_of_seed_name_and_round() -> None:
    first, again = steps(stream(), 3), steps(stream(), 3)
    assert all(torch.equal(a["response_ids"], b["response_ids"]) for a, b in zip(first, again, strict=True))
    assert torch.equal(steps(stream(), 1, start=2)[0]["response_ids"], first[2]["response_ids"])
    assert not torch.equal(first[0]["response_ids"], first[1]["response_ids"])
    assert not torch.equal(steps(stream(seed=1), 1)[0]["response_ids"], first[0]["response_ids"])


def test_reused_samples_stay_with_what_their_sampler_thought_of_them() -> None:
    on = stream(reuse=3)
    first, second, third, fourth = steps(on, 4)
    assert torch.equal(first["response_ids"], third["response_ids"])
    assert torch.equal(first["behaviour_logps"], second["behaviour_logps"])
    assert not torch.equal(third["response_ids"], fourth["response_ids"])
    assert (on.queries, on.gradient_steps) == (24, 4)


def test_the_samples_of_a_round_come_from_the_model_at_its_beginning() -> None:
    on = stream(reuse=2)
    model = on.model
    draw = on.iterate(0)
    next(draw)
    with torch.no_grad():
        model.w[:, 70] = 100.0
    assert not bool((next(draw)[0]["response_ids"] == 70).all())
    assert bool((next(draw)[0]["response_ids"] == 70).all())


def test_arms_are_drawn_as_often_as_the_model_says() -> None:
    model = agent(1)
    drawn = draw_arms(model, {"input": torch.zeros(200_000, dtype=torch.int64)}, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn["response_ids"][:, 0], minlength=100) / 200_000
    assert float((share - BANDIT.reference).abs().max()) < 0.003


def test_sampling_leaves_the_mode_and_the_default_random_numbers_alone() -> None:
    on = stream()
    on.model.train()
    before = torch.get_rng_state()
    steps(on, 2)
    assert on.model.training
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("accumulate", [2, 3, 6])
def test_micro_batches_never_divide_a_group(accumulate: int) -> None:
    whole = steps(stream(), 1)[0]
    micros = next(stream(accumulate=accumulate).iterate(0))
    assert len(micros) == accumulate
    counted = [m for m in micros if "sample_weight" not in m]
    assert torch.equal(torch.cat([m["response_ids"] for m in counted]), whole["response_ids"])
    seen = [set(m["group"].tolist()) for m in micros]
    assert sum(len(s) for s in seen) == len(set().union(*seen))


@pytest.mark.parametrize("formula", ["rloo", "best_of_n", "grpo", "reinforce"])
def test_accumulation_gives_the_run_of_one_big_batch(formula: str) -> None:
    whole = train(OnPolicy(4, draw_arms, BANDIT.score, samples=3), formula, steps=4).model
    parts = train(OnPolicy(4, draw_arms, BANDIT.score, samples=3), formula, steps=4, accumulate=3).model
    torch.testing.assert_close(parts.w, whole.w, rtol=1e-4, atol=1e-6)


# ---- offline and mixed ----------------------------------------------------------------------------------------------


def test_offline_answers_are_taken_whole_and_for_their_own_prompt() -> None:
    data = collect(agent(), 4, draw_arms, BANDIT.score, samples=3, groups=5)
    on = stream(on_policy=0.0, offline=data)
    groups = {
        (int(i), *g.flatten().tolist()) for i, g in zip(data["index"][::3], data["response_ids"].split(3), strict=True)
    }
    seen = set()
    for batch in steps(on, 60):
        drawn = {
            (int(i), *g.flatten().tolist())
            for i, g in zip(batch["input"][::3], batch["response_ids"].split(3), strict=True)
        }
        assert drawn <= groups
        seen |= drawn
    assert seen == groups  # 60 rounds of one of five groups for each prompt
    assert on.queries == len(data["reward"]) == 60


def test_a_mixed_round_has_its_share_of_fresh_answers() -> None:
    data = collect(agent(), 4, draw_arms, BANDIT.score, samples=3, groups=1)
    data["response_ids"] = torch.full_like(data["response_ids"], 99)
    on = stream(on_policy=0.5, offline=data)
    (batch,) = steps(on, 1)
    assert int((batch["response_ids"] == 99).all(1).sum()) == 6
    assert batch["group"].unique().tolist() == [0, 1, 2, 3]
    assert on.queries == 12 + 6


def test_answers_of_different_lengths_are_joined_by_padding() -> None:
    def long(model, prompts, generator):
        rows = len(prompts["input"])
        return {
            "response_ids": torch.ones(rows, 5, dtype=torch.int64),
            "response_mask": torch.ones(rows, 5, dtype=torch.bool),
        }

    data = collect(agent(), 4, draw_arms, BANDIT.score, samples=3)
    on = OnPolicy(4, long, lambda b: torch.zeros(len(b["input"])), samples=3, on_policy=0.5, offline=data)
    on.prepare("main", 0, CPU).attach(agent())
    (batch,) = steps(on, 1)
    assert batch["response_mask"].sum(1).tolist() == [5] * 6 + [1] * 6
    assert "behaviour_logps" not in batch  # only one side has them


def test_a_ratio_on_offline_data_without_their_samplers_log_probabilities_is_refused() -> None:
    data = collect(agent(), 4, draw_arms, BANDIT.score, samples=3)
    del data["behaviour_logps"]
    on = OnPolicy(4, draw_arms, BANDIT.score, samples=3, on_policy=0.0, offline=data)
    with pytest.raises(QuantityError, match="behaviour_logps"):
        train(on, "ppo_clip", steps=1)


# ---- pairs ----------------------------------------------------------------------------------------------------------


def test_pairs_are_all_pairs_of_unequal_rewards_above_the_threshold() -> None:
    rewards = torch.tensor([[0.0, 1.0, 0.4], [0.5, 0.5, 0.5]])
    pairs = pairs_from_rewards(rewards)
    found = list(zip(pairs.prompt.tolist(), pairs.winner.tolist(), pairs.loser.tolist(), strict=True))
    assert sorted(found) == [(0, 1, 0), (0, 1, 2), (0, 2, 0)]
    assert pairs.tied == 1
    assert len(pairs_from_rewards(rewards, threshold=0.5)) == 2


def test_pairs_of_one_answer_are_refused() -> None:
    with pytest.raises(InputError, match="at least two answers to each prompt"):
        pairs_from_rewards(torch.zeros(3, 1))
    with pytest.raises(InputError, match="samples is 1"):
        stream(samples=1, pairs=0.0)


def test_a_round_of_pairs_prefers_the_better_answer() -> None:
    (batch,) = steps(stream(pairs=0.0), 1)
    assert bool((batch["chosen_score"] > batch["rejected_score"]).all())
    assert not any(name.startswith("response_") or name == "reward" for name in batch)
    assert batch["chosen_ids"].shape == batch["rejected_ids"].shape == (len(batch["input"]), 1)


def test_a_round_without_a_pair_teaches_nothing_and_is_counted() -> None:
    on = OnPolicy(4, draw_arms, lambda b: torch.ones(len(b["input"])), samples=3, pairs=0.0)
    model = train(on, "dpo", steps=3).model
    assert float(model.w.detach().abs().max()) == 0.0
    assert on.tied == 12


def test_dpo_on_fresh_pairs_learns_the_bandit() -> None:
    on = OnPolicy({"input": torch.arange(4).repeat_interleave(8)}, draw_arms, BANDIT.score, samples=4, pairs=0.01)
    model = agent()
    poise.fit(
        model, "dpo(beta=0.1)", {"main": on}, readout=Choices(poise.FrozenModel(agent())), solver="sgd", lr=4.0, steps=250,
        device="cpu",
    )  # fmt: skip
    assert (
        sum(r.reward for r in BANDIT.report(model, 4)) / 4 > 0.5
    )  # from 0.04; pairs closer than 0.01 would settle it on an arm at the edge


# ---- budget ---------------------------------------------------------------------------------------------------------


def test_the_budget_counts_rewards_and_ends_the_run() -> None:
    on = stream(budget=40, reuse=2)
    assert on.limit == 6  # three rounds of 12 rewards, two steps each
    run = train(OnPolicy(4, draw_arms, BANDIT.score, samples=3, reuse=2, budget=40))
    assert run.steps == 6
    with pytest.raises(InputError, match="asks for 7 steps, and a stream's budget ends after 6"):
        train(OnPolicy(4, draw_arms, BANDIT.score, samples=3, reuse=2, budget=40), steps=7)
    with pytest.raises(InputError, match="does not pay for one round"):
        stream(budget=5)


def test_an_uneven_last_round_of_an_epoch_costs_what_it_has() -> None:
    on = stream(prompts=5, budget=27)  # rounds of 4 and 1 prompts: 12 + 3 rewards
    assert on.limit == 3
    assert len(steps(on, 3)) == 3
    assert on.queries == 27


# ---- resuming -------------------------------------------------------------------------------------------------------


class StopAt:
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, state) -> None:
        if state.step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [3, 4, 5])  # within a round of three and between two
def test_a_run_that_is_stopped_goes_on_bit_for_bit(tmp_path: Path, stop: int) -> None:
    def make() -> OnPolicy:
        data = collect(agent(), 4, draw_arms, BANDIT.score, samples=3, groups=2)
        return OnPolicy(4, draw_arms, BANDIT.score, samples=3, reuse=3, on_policy=0.5, offline=data, batch_size=2)

    whole_stream, resumed_stream = make(), make()
    whole = train(whole_stream, "ppo_clip", steps=9, seed=5).model
    settings = {"steps": 9, "seed": 5, "checkpoint": tmp_path, "checkpoint_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        train(make(), "ppo_clip", callbacks=[StopAt(stop)], **settings)
    resumed = train(resumed_stream, "ppo_clip", **settings).model
    assert torch.equal(resumed.w, whole.w)
    assert (resumed_stream.queries, resumed_stream.gradient_steps) == (
        whole_stream.queries,
        whole_stream.gradient_steps,
    )


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    settings = {"steps": 4, "checkpoint": tmp_path, "checkpoint_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        train(OnPolicy(4, draw_arms, BANDIT.score, samples=3), callbacks=[StopAt(2)], **settings)
    with pytest.raises(CheckpointError, match="'reuse': 2"):
        train(OnPolicy(4, draw_arms, BANDIT.score, samples=3, reuse=2), **settings)


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples must be at least 1"),
        ({"reuse": 0}, "reuse must be at least 1"),
        ({"on_policy": 1.5}, "on_policy is a share"),
        ({"on_policy": 0.5}, "give offline=collect"),
        ({"pairs": -1.0}, "pairs is the gap"),
        ({"on_policy": 0.5, "offline": {"reward": torch.zeros(3)}}, "lack index"),
        (
            {"on_policy": 0.5, "offline": {"reward": torch.zeros(3), "index": torch.zeros(3).long()}},
            "no answers to prompt 1",
        ),
        ({"on_policy": 0.5, "offline": {"reward": torch.zeros(3), "index": torch.arange(3)}}, "3 consecutive rows"),
    ],
)
def test_an_argument_out_of_range_is_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        stream(**options)


def test_a_reward_that_is_not_a_number_is_named() -> None:
    on = stream()
    on.score = lambda b: torch.where(b["group" if "group" in b else "input"] == 1, torch.nan, 0.0)
    with pytest.raises(NonFiniteError, match="score gave a reward that is not finite for 3 of 12 answers"):
        steps(on, 1)


def test_what_generate_and_score_return_must_fit() -> None:
    on = stream()
    on.score = lambda b: torch.zeros(5)
    with pytest.raises(InputError, match=r"'reward' as float \[12\]"):
        steps(on, 1)
    on.generate = lambda model, prompts, generator: {"ids": torch.zeros(12)}
    with pytest.raises(InputError, match="must return 'response_ids'"):
        steps(on, 1)
    on.generate = lambda model, prompts, generator: {"response_ids": torch.zeros(5, 1)}
    with pytest.raises(InputError, match="was given 12 prompts"):
        steps(on, 1)


def test_a_stream_without_a_model_says_so() -> None:
    on = OnPolicy(4, draw_arms, BANDIT.score).prepare("main", 0, CPU)
    with pytest.raises(StateError, match="attach"):
        steps(on, 1)


def test_several_scores_make_a_reward_inside_the_objective() -> None:
    def score(batch):
        return {"peak": BANDIT.score(batch), "small": -batch["response_ids"][:, 0] / 100}

    on = OnPolicy(4, draw_arms, score, samples=4)
    formula = "rloo(reward=score.on(reward='peak') + 0.1*score.on(reward='small').named('small'))"
    assert train(on, formula, steps=3).steps == 3


# ---- language models ------------------------------------------------------------------------------------------------


def test_tokens_are_sampled_from_the_model_that_scores_them() -> None:
    transformers = pytest.importorskip("transformers")
    from poise.readouts.on_policy import SampleTokens

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=6, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    prompts = {
        "prompt_ids": torch.tensor([[2, 3, 4], [5, 0, 0], [0, 3, 2]]).repeat_interleave(300, 0),
        "prompt_mask": torch.tensor([[1, 1, 1], [1, 0, 0], [0, 1, 1]]).repeat_interleave(300, 0),
    }
    sample = SampleTokens(max_new_tokens=4, eos=1, pad=0)
    with torch.no_grad():
        out = sample(model, prompts, torch.Generator().manual_seed(3))
        again = sample(model, prompts, torch.Generator().manual_seed(3))
        next_token = model(torch.tensor([[5]])).logits[0, -1].softmax(-1)
    assert torch.equal(out["response_ids"], again["response_ids"])
    assert out["response_ids"][0, :3].tolist() == [2, 3, 4]
    assert out["response_ids"][300, 0] == 5
    assert out["response_ids"][600, :2].tolist() == [3, 2]
    assert out["response_mask"][300].nonzero()[0] == 1  # the answer begins behind the prompt of one token
    drawn = torch.bincount(out["response_ids"][300:600, 1], minlength=6) / 300
    assert float((drawn - next_token).abs().max()) < 0.1
    row = 650
    length = int(out["response_mask"][row].nonzero().max()) + 1
    ids = out["response_ids"][row, :length]
    with torch.no_grad():
        alone = model(ids[None]).logits[0].log_softmax(-1)[:-1].gather(-1, ids[1:, None]).squeeze(-1)
    torch.testing.assert_close(out["behaviour_logps"][row, 2:length], alone[1:], rtol=1e-4, atol=1e-5)
    ends = out["response_ids"] == 1
    assert int((ends & out["response_mask"]).sum(1).max()) <= 1


def test_a_language_model_learns_from_its_own_samples() -> None:
    """A reward for one token: the model's share of it rises, through the language readout, with reuse and the hold on the reference."""
    transformers = pytest.importorskip("transformers")
    from poise.readouts.language import Language
    from poise.readouts.on_policy import SampleTokens

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=6, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    prompts = {"prompt_ids": torch.tensor([[2, 3], [5, 0]]), "prompt_mask": torch.tensor([[1, 1], [1, 0]])}

    def score(batch):
        inside = batch["response_mask"]
        return ((batch["response_ids"] == 4) & inside).sum(1) / inside.sum(1)

    stream = OnPolicy(prompts, SampleTokens(max_new_tokens=4, eos=1, pad=0), score, samples=16, reuse=2)
    earned = []

    class Watch:
        def on_step_end(self, state) -> None:
            earned.append(float(stream.held["reward"].mean()))

    poise.fit(
        model, "grpo + 0.01*sampled_kl", {"main": stream}, readout=Language(poise.FrozenModel(model)), solver="adamw", lr=1e-2,
        steps=40, device="cpu", callbacks=[Watch()],
    )  # fmt: skip
    assert sum(earned[-4:]) / 4 > sum(earned[:4]) / 4 + 0.3
