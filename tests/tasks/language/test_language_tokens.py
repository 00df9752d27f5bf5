"""Tokens, masks and padding, worked out by hand; and what must hold for any records."""

from __future__ import annotations

import pickle
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_by_hand import letters, merging, spaced

from poise.errors import InputError
from poise.streams import Stream
from poise.tasks.language.records import Records, make_records, read_records
from poise.tasks.language.tokens import (
    TokenizedAnswers,
    TokenizedPairs,
    TokenizedPrompts,
    TokenizedRecords,
    pad,
    tokenize,
)

pytest.importorskip("transformers")

_HH = "shared/data/hh-rlhf/harmless-base-test.jsonl.gz"
HH = next((folder / _HH for folder in Path(__file__).parents if (folder / _HH).is_file()), None)
B, E, P, U, A = 28, 29, 30, 31, 32  # the special tokens of `letters`
F, T = False, True


def pair(prompt: Any, chosen: Any, rejected: Any, **extra: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **extra}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def ids(data: TokenizedRecords, index: int = 0, side: str = "chosen") -> list[int]:
    return data[index][f"{side}_ids"].tolist()


def batch_of(data: TokenizedRecords) -> dict[str, list[Any]]:
    return {name: value.tolist() for name, value in data.collate([data[at] for at in range(len(data))]).items()}


TWO = make_records([pair("ab", "cd", "e"), pair("a", "bcd", "bc")])


def test_padding_on_the_right_by_hand() -> None:
    data = tokenize(TWO, letters(pad="<p>"))
    assert isinstance(data, TokenizedPairs)
    assert batch_of(data) == {
        "chosen_ids": [[0, 1, 2, 3, E], [0, 1, 2, 3, E]],
        "chosen_attention": [[T] * 5, [T] * 5],
        "chosen_mask": [[F, F, T, T, T], [F, T, T, T, T]],
        "chosen_positions": [[-1, -1, 0, 1, 2], [-1, 0, 1, 2, 3]],
        "rejected_ids": [[0, 1, 4, E], [0, 1, 2, E]],
        "rejected_attention": [[T] * 4, [T] * 4],
        "rejected_mask": [[F, F, T, T], [F, T, T, T]],
        "rejected_positions": [[-1, -1, 0, 1], [-1, 0, 1, 2]],
    }


@pytest.mark.parametrize("mark", ["<p>", None])
def test_padding_on_either_side_of_answers_of_different_lengths(mark: str | None) -> None:
    records = make_records([{"prompt": "a", "response": "bcd"}, {"prompt": "a", "response": "b"}])
    filler = P if mark else E  # Without a pad token EOS fills, and only the attention tells it from an end.
    right = batch_of(tokenize(records, letters(pad=mark)))
    assert right == {
        "response_ids": [[0, 1, 2, 3, E], [0, 1, E, filler, filler]],
        "response_attention": [[T] * 5, [T, T, T, F, F]],
        "response_mask": [[F, T, T, T, T], [F, T, T, F, F]],
        "response_positions": [[-1, 0, 1, 2, 3], [-1, 0, 1, -1, -1]],
    }
    left = batch_of(tokenize(records, letters(pad=mark), padding="left"))
    assert left["response_ids"] == [[0, 1, 2, 3, E], [filler, filler, 0, 1, E]]
    assert left["response_attention"] == [[T] * 5, [F, F, T, T, T]]
    assert left["response_mask"] == [[F, T, T, T, T], [F, F, F, T, T]]
    assert left["response_positions"] == [[-1, 0, 1, 2, 3], [-1, -1, -1, 0, 1]]


def test_bos_comes_once_whether_the_text_brings_it_or_not() -> None:
    tokenizer = letters(bos="<b>")
    data = tokenize(
        make_records([pair("ab", "c", "d"), pair("<b>ab", "c", "d"), pair("<b><b>ab", "c", "d")]), tokenizer
    )
    assert [ids(data, at) for at in range(3)] == [[B, 0, 1, 2, E]] * 3
    assert data.prompt(0).tolist() == [B, 0, 1]


def test_a_text_without_a_prompt_has_a_token_to_come_from() -> None:
    text = make_records([{"text": "ab"}])
    item = tokenize(text, letters(bos="<b>"))[0]
    assert item["response_ids"].tolist() == [B, 0, 1, E]
    assert item["response_mask"].tolist() == [F, T, T, T]
    assert tokenize(text, letters())[0]["response_ids"].tolist() == [E, 0, 1, E]


@pytest.mark.parametrize("ending", ["", "<e>", "<e><e>", "<e>\n", "<e> \n<e>"])
def test_an_answer_ends_with_eos_once(ending: str) -> None:
    item = tokenize(make_records([{"prompt": "a", "response": "bc" + ending}]), letters())[0]
    assert item["response_ids"].tolist() == [0, 1, 2, E]
    assert item["response_mask"].tolist() == [F, T, T, T]


def test_no_token_holds_a_part_of_the_prompt_and_a_part_of_the_answer() -> None:
    tokenizer = merging()
    assert tokenizer("a" + "b").input_ids == [5]
    assert tokenizer(": " + "c").input_ids == [4, 6]
    data = tokenize(make_records([pair("a", "b", "c"), pair("a: ", "c", "b"), pair("a:", " c", "ab")]), tokenizer)
    assert [(ids(data, at), ids(data, at, "rejected")) for at in range(3)] == [
        ([0, 1, 7], [0, 2, 7]),  # "b" alone, and no "ab"
        ([0, 4, 3, 2, 7], [0, 4, 3, 1, 7]),
        ([0, 4, 6, 7], [0, 4, 5, 7]),  # within an answer merges stay
    ]
    assert all(item["chosen_mask"].tolist().index(True) == len(data.prompt(at)) for at, item in enumerate(data))


def test_an_answer_tokenised_for_itself_gains_no_space() -> None:
    tokenizer = spaced()
    assert tokenizer("b").input_ids == [4]  # with the space
    data = tokenize(make_records([pair("a", "b", " b")]), tokenizer)
    assert ids(data) == [3, 2, 6]
    assert ids(data, side="rejected") == [3, 4, 6]


def test_chat_messages_go_through_the_template() -> None:
    data = tokenize(make_records([pair([user("ab")], [assistant("c")], [assistant("d")])]), letters())
    # "<u>ab<e>\n<a>" is the prompt, "c<e>\n" is the answer, whose line end the template writes after the end.
    assert ids(data) == [U, 0, 1, E, 27, A, 2, E]
    assert data[0]["chosen_mask"].tolist() == [F] * 6 + [T, T]
    prompts = tokenize(make_records([{"prompt": [user("ab")]}]), letters())
    assert isinstance(prompts, TokenizedPrompts)
    assert prompts[0]["prompt_ids"].tolist() == [U, 0, 1, E, 27, A]


def test_turns_of_the_user_within_an_answer_are_read_and_not_learnt() -> None:
    long = [user("q"), assistant("xy"), user("r"), assistant("z")]
    item = tokenize(make_records([{"chosen": long, "rejected": [user("q"), assistant("y")]}]), letters())[0]
    assert item["chosen_ids"].tolist() == [U, 16, E, 27, A, 23, 24, E, 27, U, 17, E, 27, A, 25, E]
    assert item["chosen_mask"].tolist() == [F] * 5 + [T, T, T] + [F] * 6 + [T, T]
    assert item["chosen_positions"].tolist() == [-1] * 5 + [0, 1, 2] + [-1] * 6 + [3, 4]


def test_a_template_that_is_missing_or_refuses_is_named() -> None:
    chat = make_records([pair([user("ab")], [assistant("c")], [assistant("d")])])
    with pytest.raises(InputError, match=r"has no chat template\. Give a model whose"):
        tokenize(chat, letters(template=False))
    refusing = letters()
    refusing.chat_template = "{{ raise_exception('no system turn') }}"
    with pytest.raises(
        InputError, match=r"rows, row 1: the chat template of .* refuses these messages \(no system turn\)"
    ):
        tokenize(chat, refusing)
    changing = letters()
    changing.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(InputError, match="so the two have no boundary"):
        tokenize(chat, changing)


def test_a_tokenizer_without_eos_is_refused() -> None:
    with pytest.raises(InputError, match="has no EOS token"):
        tokenize(TWO, letters(eos=None))


@pytest.mark.parametrize(
    ("options", "expected", "mask"),
    [
        # prompt "abcdef", answer "ghij" and EOS: eleven tokens.
        ({"max_length": 11}, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, E], [F] * 6 + [T] * 5),
        # The prompt gives way first, from the left ...
        ({"max_length": 9}, [2, 3, 4, 5, 6, 7, 8, 9, E], [F] * 4 + [T] * 5),
        # ... down to half of the length; then the answer is cut from the right and has no end.
        ({"max_length": 6}, [3, 4, 5, 6, 7, 8], [F] * 3 + [T] * 3),
        ({"max_length": 2}, [5, 6], [F, T]),
        # A length of the prompt's own holds in any case, and then the answer gives way.
        ({"max_prompt_length": 2}, [4, 5, 6, 7, 8, 9, E], [F] * 2 + [T] * 5),
        ({"max_length": 8, "max_prompt_length": 5}, [1, 2, 3, 4, 5, 6, 7, 8], [F] * 5 + [T] * 3),
    ],
)
def test_truncation_by_hand(options: dict[str, int], expected: list[int], mask: list[bool]) -> None:
    data = tokenize(make_records([{"prompt": "abcdef", "response": "ghij"}]), letters(), **options)
    assert data[0]["response_ids"].tolist() == expected
    assert data[0]["response_mask"].tolist() == mask
    assert data.lengths.tolist() == [len(expected)]


def test_truncation_keeps_bos_and_gives_both_answers_one_prompt() -> None:
    data = tokenize(make_records([pair("abcdef", "ghij", "g")]), letters(bos="<b>"), max_length=9)
    assert ids(data) == [B, 3, 4, 5, 6, 7, 8, 9, E]
    assert ids(data, side="rejected") == [B, 3, 4, 5, 6, E]
    assert data.note == "1 of 1 prompts were cut from the left, 0 of 2 answers from the right."
    assert tokenize(TWO, letters()).note == "Nothing was cut."


BAD = [
    (pair("abcd", "e", "f"), {"max_length": 4, "max_prompt_length": 4}, "the chosen answer is empty after truncation"),
    (pair("a", "bcde", "bcdf"), {"max_length": 4}, "the same tokens after truncation to max_length=4; raise it"),
    (pair("a", "b?", "b!"), {}, "chosen and rejected are the same tokens"),
    (
        pair("a", "b", "c", chosen_spans=[[0, 5]]),
        {},
        "range 1 of chosen_spans is 0 to 5, and the answer has 1 characters",
    ),
    (pair("a", "b", "c", chosen_spans=[[0]]), {}, r"range 1 of chosen_spans must be \[start, end, number\]"),
    (pair("a", "b", "c", chosen_spans={}), {}, "chosen_spans must be a list of ranges, and it is a dict"),
    (pair("a", "b", "c", chosen_spans=[[0, 1, 0]]), {}, "a number from 1"),
    (pair("a", "b", "c", chosen_spans=[[0.0, 1]]), {}, "whole numbers of characters"),
    (pair("a", "b", "c", chosen_token_reward=[[0, 1, float("nan")]]), {}, "it must be finite"),
    (pair([assistant("a")], [assistant("b")], [assistant("c")]), {}, "the prompt ends with a turn of the assistant"),
]


@pytest.mark.parametrize(("row", "options", "message"), BAD)
def test_a_bad_record_is_named_by_its_place_or_counted(row: Any, options: dict[str, int], message: str) -> None:
    good = (
        pair([user("a")], [assistant("b")], [assistant("c")])
        if isinstance(row["prompt"], list)
        else pair("a", "b", "c")
    )
    if isinstance(row["prompt"], list):
        options = {**options, "max_length": 99}
    records = make_records([good, row])
    with pytest.raises(InputError, match=f"rows, row 2: .*{message}.*--skip-bad"):
        tokenize(records, letters(), **options)
    data = tokenize(records, letters(), **options, skip_bad=True)
    assert len(data) == len(data.records) == 1
    assert [bad.line for bad in data.bad] == [2]
    with pytest.raises(InputError, match=r"no record can be used\. The first, rows, row 1"):
        tokenize(make_records([row]), letters(), **options, skip_bad=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"max_prompt_length": 0}, "max_prompt_length must be at least 1"),
        ({"padding": "middle"}, "padding must be 'right' or 'left'"),
        ({"columns": ["group"]}, "rows, row 1: the column 'group' must hold a finite number, and it holds None"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tokenize(TWO, letters(), **options)


def test_spans_weights_and_rewards_reach_the_tokens_that_they_cover() -> None:
    row = pair("a", "abab c", "c", chosen_spans=[[1, 3], [4, 6]], chosen_token_weight=[[0, 2, 3.0]])
    item = tokenize(make_records([row, pair("a", "b", "c", chosen_token_weight=[])]), merging())
    # "a" + "ab", "ab", " c", EOS: the first span touches both "ab", the second the " c".
    assert ids(item) == [0, 5, 5, 6, 7]
    assert item[0]["chosen_spans"].tolist() == [0, 1, 1, 2, 0]
    assert item[0]["chosen_token_weight"].tolist() == [0.0, 3.0, 1.0, 1.0, 1.0]
    assert "rejected_spans" not in item[0]
    batch = batch_of(item)
    assert batch["chosen_spans"] == [[0, 1, 1, 2, 0], [0, 0, 0, 0, 0]]
    assert batch["chosen_token_weight"][1] == [0.0, 1.0, 1.0, 0.0, 0.0]


def test_spans_of_chat_answers_count_from_the_content() -> None:
    row = pair([user("ab")], [assistant("xyz")], [assistant("d")], chosen_spans=[[1, 3, 7]])
    item = tokenize(make_records([row]), letters())[0]
    assert item["chosen_spans"].tolist() == [0] * 6 + [0, 7, 7, 0]


def test_labels_scores_and_named_columns_are_stacked() -> None:
    labelled = tokenize(
        make_records([{"prompt": "a", "response": "b", "label": at == 0} for at in range(2)]), letters()
    )
    assert isinstance(labelled, TokenizedAnswers)
    assert batch_of(labelled)["label"] == [True, False]
    rows = [{"prompt": "a", "response": "b", "score": 0.5, "group": at, "length": 2.5} for at in range(2)]
    found = batch_of(tokenize(make_records(rows), letters(), columns=["length"]))
    assert (found["score"], found["reward"], found["group"], found["length"]) == (
        [0.5] * 2,
        [0.5] * 2,
        [0, 1],
        [2.5] * 2,
    )


def test_the_fingerprint_changes_with_whatever_changes_the_tensors() -> None:
    prints = {
        tokenize(TWO, letters()).fingerprint,
        tokenize(TWO, letters(bos="<b>")).fingerprint,
        tokenize(TWO, letters(), max_length=4).fingerprint,
        tokenize(TWO, letters(), padding="left").fingerprint,
        tokenize(TWO.select([0]), letters()).fingerprint,
    }
    assert len(prints) == 5
    assert tokenize(TWO, letters()).fingerprint in prints


def test_a_stream_draws_padded_batches() -> None:
    data = pickle.loads(pickle.dumps(tokenize(TWO, letters())))
    stream = Stream(data, 2, shuffle=False).prepare("main", 0, torch.device("cpu"))
    (batch,) = next(stream.iterate(0))
    assert batch["chosen_ids"].shape == (2, 5)
    assert batch["index"].tolist() == [0, 1]


def test_records_by_the_few_give_the_same_tokens_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    records = make_records([pair("abc"[: at % 3], "de"[: 1 + at % 2] + "xyz"[at % 3], "f") for at in range(7)])
    whole = batch_of(tokenize(records, letters()))
    monkeypatch.setattr("poise.tasks.language.tokens._AT_A_TIME", 2)
    assert batch_of(tokenize(records, letters())) == whole


def test_a_slow_tokenizer_cannot_place_spans() -> None:
    class Slow:
        is_fast = False

        def __init__(self) -> None:
            self.inner = letters()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __call__(self, *arguments: Any, **options: Any) -> Any:
            return self.inner(*arguments, **options)

    assert ids(tokenize(TWO, Slow())) == [0, 1, 2, 3, E]
    with pytest.raises(InputError, match="Use a fast tokenizer"):
        tokenize(make_records([pair("a", "b", "c", chosen_spans=[[0, 1]])]), Slow())


words = st.text(string.ascii_lowercase, min_size=1, max_size=12)
rows = st.lists(st.fixed_dictionaries({"prompt": words, "response": words}), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(rows=rows, padding=st.sampled_from(["right", "left"]), length=st.none() | st.integers(2, 20))
def test_any_batch_holds_each_item_once_and_nothing_else(rows: Any, padding: str, length: int | None) -> None:
    data = tokenize(make_records(rows), TOKENIZER, padding=padding, max_length=length)
    batch = data.collate([data[at] for at in range(len(data))])
    assert batch["response_ids"].shape[1] == data.lengths.max()
    for row, (attention, item) in enumerate(zip(batch["response_attention"], data, strict=True)):
        for name in ("ids", "mask", "positions"):
            assert torch.equal(batch[f"response_{name}"][row][attention], item[f"response_{name}"])
        outside = ~batch["response_mask"][row]
        assert not bool((batch["response_mask"][row] & ~attention).any())
        assert bool((batch["response_positions"][row][outside] == -1).all())
        assert not bool(item["response_mask"][0])  # a first token has no probability
        own = item["response_ids"][item["response_mask"]]
        whole = [ord(letter) - ord("a") for letter in rows[row]["response"]] + [E]
        assert own.tolist() == whole[: len(own)]
        assert len(own) >= 1


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=5),
    padding=st.sampled_from(["right", "left"]),
    fill=st.integers(0, 9),
)
def test_padding_is_where_it_should_be(lengths: list[int], padding: str, fill: int) -> None:
    items = [{"x_ids": torch.arange(length), "n": torch.tensor(length)} for length in lengths]
    batch = pad(items, fill, padding)
    assert batch["n"].tolist() == lengths
    for row, length in enumerate(lengths):
        real = batch["x_attention"][row]
        assert int(real.sum()) == length
        assert bool((batch["x_ids"][row][~real] == fill).all())
        edge = real[:length] if padding == "right" else real[len(real) - length :]
        assert bool(edge.all())


TOKENIZER = letters()


@pytest.mark.skipif(HH is None, reason=f"../{_HH} is not here")
def test_real_dialogues_fit_and_none_is_lost() -> None:
    assert HH is not None
    records: Records = read_records(HH, skip_bad=True)
    tokenizer = letters()
    whole = tokenize(records.limit(80), tokenizer)
    cut = tokenize(records.limit(80), tokenizer, max_length=128, skip_bad=True)
    assert len(whole) == 80
    assert int(cut.lengths.max()) <= 128
    assert all(bool(item["chosen_mask"].any()) and not bool(item["chosen_mask"][0]) for item in cut)
    # Of one letter a token, the letters of the answer are its tokens, and EOS one more.
    assert [int(item["chosen_mask"].sum()) for item in whole] == [len(r.answers["chosen"]) + 1 for r in whole.records]
