"""Aligned phrases, tags, spoiled clips and harvested mistakes."""

from __future__ import annotations

import difflib
import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.data.spans import (
    align_spans,
    choice_match,
    exact_match,
    harvest,
    masked_pair,
    parse_tags,
    perturb_frames,
    with_spans,
)
from poise.errors import InputError

TEXTS = st.lists(st.sampled_from(["a", "bb", "ccc", "d", "."]), min_size=1, max_size=9).map(" ".join)


@settings(max_examples=200, deadline=None)
@given(TEXTS, TEXTS)
def test_outside_the_phrases_both_answers_are_equal(chosen: str, rejected: str) -> None:
    if chosen == rejected:
        return
    spans = align_spans(chosen, rejected)

    def outside(text: str, ranges: list[list[int]]) -> str:
        for start, end, _ in reversed(ranges):
            text = text[:start] + "*" + text[end:]
        return text

    assert outside(chosen, spans["chosen_spans"]) == outside(rejected, spans["rejected_spans"])
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        found = spans[f"{side}_spans"]
        assert [n for *_, n in found] == list(range(1, len(found) + 1))
        assert all(0 <= i < j <= len(text) for i, j, _ in found)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(found))


@settings(max_examples=100, deadline=None)
@given(TEXTS, TEXTS)
def test_the_common_part_is_at_least_as_long_as_difflib_finds(chosen: str, rejected: str) -> None:
    from poise.data.spans import _gaps

    a, b = chosen.split(), rejected.split()
    kept = len(a) - sum(j - i for i, j, _, _ in _gaps(a, b))
    assert kept == len(b) - sum(l - k for _, _, k, l in _gaps(a, b))
    blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    assert kept >= sum(block.size for block in blocks)


def test_an_addition_takes_its_neighbour_along() -> None:
    assert align_spans("a cat", "a small cat") == {"chosen_spans": [[0, 1, 1]], "rejected_spans": [[0, 7, 1]]}
    assert align_spans("the cat sat", "cat sat") == {"chosen_spans": [[0, 7, 1]], "rejected_spans": [[0, 3, 1]]}
    assert align_spans("left", "right") == {"chosen_spans": [[0, 4, 1]], "rejected_spans": [[0, 5, 1]]}


def test_near_phrases_join_where_that_is_asked_for() -> None:
    two = align_spans("a red fast car", "a blue fast bus")
    one = align_spans("a red fast car", "a blue fast bus", join=1)
    assert [len(s["chosen_spans"]) for s in (two, one)] == [2, 1]
    assert one == {"chosen_spans": [[2, 14, 1]], "rejected_spans": [[2, 15, 1]]}


def test_words_of_ones_own_and_an_aligner_of_ones_own_are_taken() -> None:
    letters = align_spans("猫が好き", "犬が好き", words=lambda text: [(i, i + 1) for i in range(len(text))])
    assert letters["chosen_spans"] == [[0, 1, 1]]
    whole = with_spans(
        [{"chosen": "yes", "rejected": "no"}], lambda a, b: {"chosen_spans": [[0, len(a)]], "rejected_spans": []}
    )
    assert whole[0]["chosen_spans"] == [[0, 3]]


def test_tags_come_out_and_a_row_of_the_authors_becomes_a_pair() -> None:
    assert parse_tags("<MASK>a</MASK> b <MASK>c d</MASK>") == ("a b c d", [[0, 1, 1], [4, 7, 2]])
    row = {
        "question": "What?",
        "answer": "a cat",
        "pred": "a dog",
        "answer_masked": "a <MASK>cat</MASK>",
        "pred_masked": "a <MASK>dog</MASK>",
        "video": "7.mp4",
    }
    assert masked_pair(row) == {
        "prompt": "What?",
        "chosen": "a cat",
        "rejected": "a dog",
        "chosen_spans": [[2, 5, 1]],
        "rejected_spans": [[2, 5, 1]],
        "video": "7.mp4",
    }


def test_records_and_tokenize_accept_the_spans() -> None:
    pytest.importorskip("transformers", reason="needs the extra lm")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from poise.tasks.language import make_records, tokenize

    row = {"prompt": "Say it.", "chosen": " It was a red car.", "rejected": " It was a blue car."}
    records = make_records(with_spans([row]))
    words = {w: i for i, w in enumerate(["<e>", "Say", "it", ".", "It", "was", "a", "red", "blue", "car"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<e>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    item = tokenize(records, tokenizer)[0]
    for side, word in (("chosen", "red"), ("rejected", "blue")):
        marked = item[f"{side}_ids"][item[f"{side}_spans"] > 0]
        assert tokenizer.decode(marked).strip() == word
        assert set(item[f"{side}_spans"].tolist()) == {0, 1}


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.sampled_from(["global", "local", None]), st.integers(2, 6), st.integers(0, 99))
def test_a_spoiled_clip_keeps_its_length_and_its_windows(
    time: int, shuffle: str | None, window: int, seed: int
) -> None:
    clip = torch.arange(1, time + 1)
    g = torch.Generator().manual_seed(seed)
    found = perturb_frames(clip, (0.25, 0.5), shuffle, window, g)  # type: ignore[arg-type]
    blank = int((found == 0).sum())
    assert max(1, round(0.25 * time)) <= blank <= max(1, round(0.5 * time))
    kept = [(place, int(v)) for place, v in enumerate(found) if v]
    assert len({v for _, v in kept}) == len(kept)
    if shuffle is None:
        assert all(v == place + 1 for place, v in kept)
    if shuffle == "local":
        assert all((v - 1) // window == place // window for place, v in kept)
    assert torch.equal(found, perturb_frames(clip, (0.25, 0.5), shuffle, window, torch.Generator().manual_seed(seed)))  # type: ignore[arg-type]
    assert torch.equal(clip, torch.arange(1, time + 1))


def test_frames_of_any_shape_are_spoiled_whole() -> None:
    clip = torch.rand(8, 3, 4) + 1
    found = perturb_frames(clip, (0.5, 0.5), None)
    assert sorted(found.flatten(1).eq(0).all(1).tolist()) == [False] * 4 + [True] * 4


def test_wrong_answers_are_kept_and_every_other_is_counted_by_rule() -> None:
    rows = [{"question": f"q{i}", "answer": "a three", "clip": i} for i in range(6)]
    rows.append(dict(rows[0]))
    found = harvest(rows, ["a nine", "A three!", "", "I'm sorry", "a " * 20, "a two", "a nine"])
    assert [p["rejected"] for p in found.pairs] == ["a nine", "a two"]
    assert found.pairs[1] == {"prompt": "q5", "chosen": "a three", "rejected": "a two", "clip": 5}
    assert found.dropped == {"empty": 1, "right": 1, "refusal": 1, "length": 1, "repeated": 1}
    assert exact_match("Yes.", "yes")
    assert not exact_match("no", "yes")
    assert choice_match("B. the dog", "(b)")
    assert not choice_match("B", "C")
    assert choice_match("left", "Left")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: align_spans("same", "same"), "are the same words"),
        (lambda: align_spans("", "b"), "the chosen answer has no words"),
        (lambda: align_spans("a", "b", join=-1), "join must be at least 0"),
        (lambda: parse_tags("a <MASK>b"), "never closed"),
        (lambda: parse_tags("a b</MASK>"), "</MASK> without <MASK>"),
        (lambda: parse_tags("<MASK>a <MASK>b</MASK>"), "<MASK> within a phrase"),
        (lambda: parse_tags("<MASK></MASK>"), "encloses nothing"),
        (lambda: masked_pair({"question": "?"}), "has no answer_masked and no pred_masked"),
        (
            lambda: masked_pair({"question": "?", "answer_masked": "<MASK>a</MASK>", "pred_masked": "a"}),
            "the answer has 1 phrases and the prediction 0",
        ),
        (lambda: perturb_frames(torch.ones(4), (0.5, 0.2)), "mask is \\(least, most\\)"),
        (lambda: perturb_frames(torch.ones(4), shuffle="all"), "shuffle is 'global', 'local' or None"),  # type: ignore[arg-type]
        (lambda: perturb_frames(torch.ones(4), window=1), "at least 2 frames"),
        (lambda: perturb_frames(torch.ones(0)), "one frame at least"),
        (lambda: harvest([{}], ["a"]), "row 0 needs 'question' and 'answer'"),
        (lambda: harvest([], ["a"]), "one prediction each"),
        (lambda: harvest([], [], length_ratio=0.5), "length_ratio must be at least 1"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()  # type: ignore[operator]


def test_long_answers_are_aligned_within_a_second() -> None:
    r = random.Random(0)
    words = [r.choice("abcdefgh") for _ in range(300)]
    other = [w if r.random() < 0.9 else "z" for w in words]
    assert align_spans(" ".join(words), " ".join(other))["chosen_spans"]
