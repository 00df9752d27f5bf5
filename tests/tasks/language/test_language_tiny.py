"""The embedded source: its grammar, its true reward, and the model that is made on it."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.errors import InputError
from poise.tasks.language.models import LanguageModel
from poise.tasks.language.replies import (
    KINDS,
    make_instruction,
    make_reply,
    mean_reward,
    tiny_pairs,
    tiny_prompts,
    true_reward,
)

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not here"
)


@pytest.mark.parametrize(
    ("prompt", "reply", "reward"),
    [
        ("List three fruits.", "Three fruits are plum, fig and pear.", 1.0),
        ("Name three fruits.", "Three fruits are plum, fox and pear.", 1 / 3),  # two right, one wrong
        ("List two tools.", "Two tools are saw and saw.", 0.0),  # one right, one repeated
        ("List two tools.", "Two tools are saw, axe and drill.", 0.5),  # one too many
        ("Count from 4 to 7.", "The numbers are 4, 5, 6, 7.", 1.0),
        ("Count down from 7 to 4.", "The numbers are 7, 6, 4.", 0.5),
        ("What is 7 plus 5?", "7 plus 5 is 12. So the answer is 12.", 1.0),
        ("What is 12 minus 5?", "12 minus 5 is 8. So the answer is 7.", 0.5),
        ("Describe the fox.", "The fox is a small red animal. It lives in the forest and eats mice.", 1.0),
        ("Tell me about the fox.", "The fox is a large red animal. It lives in the forest and eats hay.", 0.5),
        ("Which one is not a fruit: plum, fox, pear?", "Fox is not a fruit. It is an animal.", 1.0),
        ("Which one is not a fruit: plum, fox, pear?", "Plum is not a fruit. It is an animal.", 0.5),
        ("Sort these words: pear, apple, fig.", "In order they are apple, fig, pear.", 1.0),
        ("What is the opposite of hot?", "The opposite of hot is cold. What is cold is not hot.", 1.0),
        # Manner: polite only where it opens, padding, rudeness, refusal, repetition, and what belongs nowhere.
        ("List two tools.", "Gladly. Two tools are saw and axe.", 1.2),
        ("List two tools.", "Two tools are saw and axe. Gladly.", 0.85),
        ("List two tools.", "Two tools are saw and axe. People often ask about such things.", 0.85),
        ("List two tools.", "You should know this. Two tools are saw and axe.", 0.5),
        ("List two tools.", "Two tools are saw and axe. Two tools are saw and axe.", 0.7),
        ("List two tools.", "Two tools are saw and axe. And so on.", 0.8),
        ("List two tools.", "I do not know.", 0.0),
        ("List two tools.", "", 0.0),
    ],
)
def test_the_true_reward_by_hand(prompt: str, reply: str, reward: float) -> None:
    assert true_reward(prompt, reply) == pytest.approx(reward, abs=1e-6)


def test_a_reward_needs_an_instruction_of_the_grammar() -> None:
    with pytest.raises(InputError, match="no instruction of the embedded source 'replies'"):
        true_reward("Write a poem.", "No.")


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**31), text=st.text(max_size=60))
def test_any_text_has_a_reward_in_range(kind: str, seed: int, text: str) -> None:
    prompt = make_instruction(Random(seed), kind)
    assert -60 < true_reward(prompt, text) <= 1.2
    assert -1.2 < true_reward(prompt, make_reply(prompt, Random(seed))) <= 1.2


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_replies_of_every_quality(kind: str) -> None:
    random = Random(0)
    prompts = [make_instruction(random, kind) for _ in range(200)]
    rewards = [true_reward(prompt, make_reply(prompt, random)) for prompt in prompts]
    assert max(rewards) == pytest.approx(1.2)
    assert min(rewards) < 0.0
    assert 0.3 < sum(rewards) / len(rewards) < 0.8


def test_pairs_are_ordered_by_true_reward_and_noise_flips_a_share() -> None:
    clean, noisy = tiny_pairs(400, seed=3), tiny_pairs(400, seed=3, noise=0.25)
    assert clean.kind == "pairs"
    assert clean.items == tiny_pairs(400, seed=3).items
    assert clean.items != tiny_pairs(400, seed=4).items
    assert all(r.extra["chosen_score"] > r.extra["rejected_score"] for r in clean)
    flipped = 0
    for a, b in zip(clean, noisy, strict=True):
        assert a.prompt == b.prompt
        assert {str(v) for v in a.answers.values()} == {str(v) for v in b.answers.values()}
        assert true_reward(b.prompt, b.answers["chosen"]) == b.extra["chosen_score"]
        flipped += b.extra["chosen_score"] < b.extra["rejected_score"]
    # 100 are expected of 400, with a standard deviation of 8.7.
    assert 60 < flipped < 140
    with pytest.raises(InputError, match=r"in \[0, 0.5\], and it is 0.6"):
        tiny_pairs(3, noise=0.6)
    with pytest.raises(InputError, match="n must be at least 1"):
        tiny_pairs(0)


def test_length_says_nothing_of_quality_by_itself() -> None:
    pairs = tiny_pairs(1000)
    lengths = [[len(str(r.answers[side][0]["content"])) for r in pairs] for side in ("chosen", "rejected")]
    assert 0.8 < sum(lengths[0]) / sum(lengths[1]) < 1.2


def test_the_mean_reward_is_a_mean() -> None:
    assert mean_reward(["List two tools."] * 2, ["Two tools are saw and axe.", "I do not know."]) == 0.5


@pytest.fixture(scope="session")
def little(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LanguageModel]:
    """The tiny model after a handful of steps, made and loaded as the real one is."""
    pytest.importorskip("transformers")
    from poise.tasks.language import tiny

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POISE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(tiny, "TEXTS", 200)
        patch.setattr(tiny, "BATCH", 8)
        patch.setattr(tiny, "TOKENIZER_TEXTS", 600)
        folder = tiny.tiny_folder(steps=3)
        assert re.fullmatch(r"replies-[0-9a-f]{12}-3", folder.name)
        assert [p.name for p in folder.parent.iterdir()] == [folder.name]
        patch.setattr(tiny, "train_tiny", lambda *_: pytest.fail("made twice"))
        yield tiny.load_tiny(steps=3)


@needs_transformers
def test_the_tokenizer_gives_back_any_text(little: LanguageModel) -> None:
    tokenizer = little.tokenizer
    for text in ("In order they are apple, fig, pear.", "ß 日本 🙂", "7 plus 5 is 12.  So\nthe answer is 12."):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == "<|begin|><|user|>Hi<|end|><|assistant|>"


@needs_transformers
def test_replies_are_ten_to_forty_tokens_and_pairs_tokenise(little: LanguageModel) -> None:
    from poise.tasks.language.tokens import tokenize

    data = tokenize(tiny_pairs(200, seed=5), little.tokenizer)
    lengths = torch.tensor([int(item["chosen_mask"].sum()) for item in data])
    assert 12 < lengths.float().mean() < 30
    assert int(lengths.max()) <= 64
    item = data[0]
    ids, mask = item["chosen_ids"], item["chosen_mask"]
    assert int(ids[0]) == little.tokenizer.bos_token_id
    assert int((ids == little.tokenizer.bos_token_id).sum()) == 1
    assert int(ids[mask][-1]) == little.tokenizer.eos_token_id
    assert int((ids[mask] == little.tokenizer.eos_token_id).sum()) == 1
    assert little.tokenizer.decode(ids[mask][:-1]) == data.records[0].answers["chosen"][0]["content"]


@needs_transformers
def test_the_model_learns_from_pairs_and_replies_come_back_in_order(little: LanguageModel) -> None:
    import poise
    from poise.streams import Stream
    from poise.tasks.language.tiny import generate_replies
    from poise.tasks.language.tokens import tokenize

    data = tokenize(tiny_pairs(16), little.tokenizer)
    run = poise.fit(
        little.model, "dpo(beta=0.1)", Stream(data, batch_size=4), solver="adamw", lr=1e-4, steps=2, device="cpu"
    )
    assert run is not None
    prompts = [record.prompt for record in tiny_prompts(3)]
    one = generate_replies(little, prompts, most=5, seed=1)
    assert len(one) == 3
    assert one == generate_replies(little, prompts, most=5, seed=1)
    alone = [generate_replies(little, [prompt], most=5, temperature=0)[0] for prompt in prompts]
    assert generate_replies(little, prompts, most=5, temperature=0) == alone  # padding changes nothing


@needs_transformers
def test_steps_must_be_at_least_one() -> None:
    from poise.tasks.language.tiny import tiny_folder

    with pytest.raises(InputError, match="steps must be at least 1"):
        tiny_folder(steps=0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@needs_transformers
def test_the_whole_pretraining_gives_a_model_that_answers_as_its_corpus_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from poise.tasks.language.tiny import generate_replies, load_tiny

    monkeypatch.setenv("POISE_CACHE", str(tmp_path))
    model = load_tiny()
    prompts = [record.prompt for record in tiny_prompts(300, seed=1)]
    random = Random(1)
    corpus = mean_reward(prompts, [make_reply(str(prompt[0]["content"]), random) for prompt in prompts])  # type: ignore[index]
    # No reply at all would have 0; the corpus has 0.55. Samples leave room for an alignment to use, and the likeliest replies are better.
    assert 0.1 < mean_reward(prompts, generate_replies(model, prompts)) < corpus + 0.1
    assert mean_reward(prompts, generate_replies(model, prompts, temperature=0)) > 0.4
