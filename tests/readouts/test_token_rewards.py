"""Token rewards: contrast of two prompts, alignment, cache, other sources, and their way into the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import poise
from poise.errors import InputError, QuantityError
from poise.frozen import FrozenModel
from poise.readouts import token_rewards
from poise.readouts.token_rewards import (
    BETTER,
    WORSE,
    TokenRewarded,
    contrastive_token_rewards,
    implied_token_rewards,
    template_hash,
    token_reward_column,
    with_token_rewards,
)

transformers = pytest.importorskip("transformers", reason="needs the extra lm")
VOCABULARY = 34
GOOD, BAD = "good {prompt} {answer} so ", "bad {prompt} so "
PROMPTS = ["ab", "cde", "f"]
ANSWERS = [torch.tensor([0, 1, 2, 29]), torch.tensor([7, 29]), torch.tensor([3, 3, 3, 3, 3, 29])]


def letters() -> Any:
    """One token a letter: "a" is 0; space 26, `<e>` 29, `<p>` 30."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    special = ["\n", "<b>", "<e>", "<p>", "<u>", "<a>", "<s>"]
    vocabulary = [chr(ord("a") + place) for place in range(26)] + [" ", *special]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(vocabulary)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<e>", pad_token="<p>", additional_special_tokens=["<u>", "<a>"]
    )


def model(seed: int = 0) -> nn.Module:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.5, **shape)
        return transformers.LlamaForCausalLM(config)


def rewards(*templates: str, **options) -> list[Tensor]:
    return contrastive_token_rewards(model(), letters(), PROMPTS, ANSWERS, *(templates or (GOOD, BAD)), **options)


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


# ---- the contrast ---------------------------------------------------------------------------------------------------


def test_a_reward_is_the_squashed_difference_of_log_probabilities_behind_the_two_prompts() -> None:
    network, tokenizer = model(), letters()
    for prompt, answer, found in zip(PROMPTS, ANSWERS, rewards(), strict=True):
        text = tokenizer.decode(answer, skip_special_tokens=True)
        sides = []
        for template in (GOOD, BAD):
            begun = tokenizer(template.replace("{prompt}", prompt).replace("{answer}", text)).input_ids
            ids = torch.tensor([*begun, *answer.tolist()])
            with torch.no_grad():
                logps = network(ids[None]).logits[0].log_softmax(-1)
            sides.append(logps[len(begun) - 1 : -1].gather(1, answer[:, None])[:, 0])
        torch.testing.assert_close(found, torch.sigmoid(sides[0] - sides[1]) - 0.5, rtol=1e-4, atol=1e-5)


def test_rewards_lie_within_one_half_and_clip_cuts_them() -> None:
    found = torch.cat(rewards())
    assert found.dtype == torch.float32
    assert found.abs().max() < 0.5
    assert found.abs().max() > 0.01
    cut = torch.cat(rewards(clip=0.01))
    torch.testing.assert_close(cut, found.clamp(-0.01, 0.01))


def test_swapping_the_prompts_negates_and_equal_prompts_give_zero() -> None:
    assert_same(rewards(BAD, GOOD), [-r for r in rewards(GOOD, BAD)])
    assert all((r == 0).all() for r in rewards(GOOD, GOOD, batch_size=100))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_how_many_are_scored_at_once_changes_nothing(batch_size: int) -> None:
    assert_same(rewards(batch_size=batch_size), rewards())


def test_texts_are_scored_as_their_tokens_with_the_end_of_sequence() -> None:
    texts = ["abc", "h", "ddddd"]
    assert_same(contrastive_token_rewards(model(), letters(), PROMPTS, texts, GOOD, BAD), rewards())


def test_braces_in_an_answer_are_not_filled_in_again() -> None:
    tokenizer = letters()
    ids = token_rewards._prompt_ids(tokenizer, "{answer} {prompt}", "xy", "{prompt}", chat=False)
    assert ids[-3:] == tokenizer(" xy").input_ids
    assert len(ids) == len("{prompt} xy")


def test_a_long_prompt_loses_tokens_from_its_left_and_the_answer_none() -> None:
    cut = rewards(max_length=8)
    assert [len(r) for r in cut] == [len(a) for a in ANSWERS]
    assert_same(rewards(max_length=8), cut)
    with pytest.raises(InputError, match="leaves no room"):
        rewards(max_length=6)


def test_a_chat_template_is_used_where_there_is_one() -> None:
    tokenizer = letters()
    tokenizer.chat_template = (
        "{% for m in messages %}<u>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    ids = token_rewards._prompt_ids(tokenizer, GOOD, "ab", "c", chat=True)
    assert tokenizer.decode(ids).replace(" ", "") == "<u>goodabcso<a>"


def test_the_default_templates_hold_question_and_answer_before_the_instruction() -> None:
    shared = len(BETTER) - len(BETTER[BETTER.index("Revise") :])
    assert BETTER[:shared] == WORSE[:shared]
    assert "{prompt}" in BETTER[:shared]
    assert "{answer}" in BETTER[:shared]
    assert template_hash(BETTER, WORSE) != template_hash(WORSE, BETTER)


def test_the_model_keeps_its_mode_and_gets_no_gradient() -> None:
    network = model().train()
    found = contrastive_token_rewards(network, letters(), PROMPTS, ANSWERS, GOOD, BAD)
    assert network.training
    assert not found[0].requires_grad


def test_tokens_that_are_not_the_answers_are_refused() -> None:
    batch = {"response_ids": torch.tensor([[5, 0, 1]]), "response_mask": torch.tensor([[False, True, True]])}
    with pytest.raises(QuantityError, match="not those of the answer"):
        list(token_rewards._on_answers(torch.zeros(1, 3), batch, [torch.tensor([0, 2])]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ["a"]}, "1 prompts, 3 answers"),
        ({"clip": 0.7}, "clip is"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"better_template": ""}, "prompt of no tokens"),
        ({"answers": [torch.zeros(0, dtype=torch.int64), *ANSWERS[1:]]}, "at least one token, and answer 0"),
    ],
)
def test_what_does_not_fit_is_said(change, message: str) -> None:
    given = {"prompts": PROMPTS, "answers": ANSWERS, "better_template": GOOD, "worse_template": BAD}
    with pytest.raises(InputError, match=message):
        contrastive_token_rewards(model(), letters(), **{**given, **change})


# ---- the cache ------------------------------------------------------------------------------------------------------


def test_the_same_rewards_are_computed_once_and_any_change_computes_them_anew(tmp_path: Path, monkeypatch) -> None:
    safetensors = pytest.importorskip("safetensors")
    runs = []
    score = token_rewards._score
    monkeypatch.setattr(token_rewards, "_score", lambda *a: runs.append(1) or score(*a))
    first, again = rewards(cache=tmp_path), rewards(cache=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(runs) == 1
    (file,) = tmp_path.iterdir()
    with safetensors.safe_open(file, "pt") as stored:
        assert stored.metadata()["templates"] == template_hash(GOOD, BAD)
    rewards(BAD, GOOD, cache=tmp_path)
    rewards(clip=0.3, cache=tmp_path)
    contrastive_token_rewards(model(1), letters(), PROMPTS, ANSWERS, GOOD, BAD, cache=tmp_path)
    assert len(runs) == len(list(tmp_path.iterdir())) == 4


def test_a_cached_file_of_other_answers_is_refused(tmp_path: Path) -> None:
    rewards(cache=tmp_path)
    (file,) = tmp_path.iterdir()
    token_rewards._write(file, [torch.zeros(3)], "x")
    with pytest.raises(InputError, match="delete it"):
        rewards(cache=tmp_path)


# ---- other sources, and the data ------------------------------------------------------------------------------------


def pairs() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    data: dict[str, Tensor] = {}
    for side in ("chosen", "rejected"):
        data[f"{side}_ids"] = torch.randint(0, 26, (6, 7), generator=g)
        data[f"{side}_mask"] = torch.zeros(6, 7, dtype=torch.bool)
        for row, length in enumerate(torch.randint(1, 5, (6,), generator=g).tolist()):
            data[f"{side}_mask"][row, 3 : 3 + length] = True
    return data


def test_implied_rewards_are_the_log_ratios_of_each_token() -> None:
    data, policy, reference = pairs(), model(0), FrozenModel(model(1))
    raw = implied_token_rewards(policy, reference, data, "rejected", beta=0.3, squash=False, batch_size=4)
    with torch.no_grad():
        ids = data["rejected_ids"]
        ours, theirs = (
            m(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
            for m in (policy, reference.module)
        )
    for row, found in enumerate(raw):
        mask = data["rejected_mask"][row, 1:]
        torch.testing.assert_close(found, 0.3 * (ours - theirs)[row, mask], rtol=1e-4, atol=1e-5)
    squashed = implied_token_rewards(policy, reference, data, "rejected", beta=0.3)
    assert_same(squashed, [torch.sigmoid(r) - 0.5 for r in raw])


def test_rewards_stand_where_their_tokens_do_and_a_wrong_number_of_them_is_refused() -> None:
    mask = pairs()["chosen_mask"]
    own = [torch.rand(int(n)) for n in mask.sum(1)]
    column = token_reward_column(own, mask)
    assert torch.equal(column[mask], torch.cat(own))
    assert (column[~mask] == 0).all()
    with pytest.raises(InputError, match="Answer 2 has"):
        token_reward_column([*own[:2], torch.rand(9), *own[3:]], mask)
    with pytest.raises(InputError, match="answer 1 is NaN"):
        token_reward_column([own[0], own[1] * torch.nan, *own[2:]], mask)
    with pytest.raises(InputError, match="rewards of 5 answers, and 6"):
        token_reward_column(own[:5], mask)


class Items:
    """A data set of ragged items."""

    def __init__(self, data: dict[str, Tensor]) -> None:
        self.data = data

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {k: v[index] for k, v in self.data.items()}

    def collate(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {k: torch.stack([item[k] for item in items]) for k in items[0]}


def test_t_reg_trains_on_tensors_and_on_a_data_set_alike() -> None:
    data = pairs()
    given = {s: [0.4 * torch.rand(int(n)) for n in data[f"{s}_mask"].sum(1)] for s in ("chosen", "rejected")}
    weights = []
    for made in (with_token_rewards(data, **given), with_token_rewards(Items(data), **given)):
        trained = model()
        run = poise.fit(
            trained, "t_reg(alpha=0.5, beta=0.5)", made, solver="adamw", lr=1e-3, steps=4, batch_size=3, device="cpu"
        )
        assert run.history["term/token_reward_regularizer"]
        weights.append(torch.cat([p.detach().flatten() for p in trained.parameters()]))
    torch.testing.assert_close(*weights)


def test_a_data_set_with_other_numbers_of_rewards_is_refused() -> None:
    data = Items(pairs())
    with pytest.raises(InputError, match="rewards of 2 chosen answers"):
        TokenRewarded(data, {"chosen": [torch.zeros(1)] * 2})
    with pytest.raises(InputError, match="Answer 0 has"):
        TokenRewarded(data, {"chosen": [torch.zeros(99)] * 6})[0]
