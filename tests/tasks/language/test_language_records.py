"""Reading records: every layout, every way in which a row or a file can be broken."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poise.errors import InputError
from poise.tasks.language.records import Records, make_records, read_records, write_jsonl

PAIR = {"prompt": "Name a colour.", "chosen": " Red.", "rejected": " Seven."}
_HH = "shared/data/hh-rlhf/harmless-base-test.jsonl.gz"
HH = next((folder / _HH for folder in Path(__file__).parents if (folder / _HH).is_file()), None)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def write(path: Path, rows: list[Any]) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def only(rows: list[dict[str, Any]]) -> Any:
    records = make_records(rows)
    assert len(records) == 1
    return records[0]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_json_lines_are_read_plain_and_zipped(tmp_path: Path, name: str) -> None:
    records = read_records(write(tmp_path / name, [PAIR, "", PAIR]))
    assert (records.kind, records.sides) == ("pairs", ("chosen", "rejected"))
    assert [r.line for r in records] == [1, 3]
    assert records[0].prompt == "Name a colour."
    assert records[0].answers == {"chosen": " Red.", "rejected": " Seven."}
    assert records.note == "Read as pairs of a chosen and a rejected answer, with a prompt of their own."


def test_a_json_list_is_read_with_the_line_of_each_item(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([PAIR, PAIR], indent=1), encoding="utf-8")
    assert [r.line for r in read_records(path)] == [2, 7]
    path.write_text('[{"text": "one"},\n{"text": "two"},\n{"text": ', encoding="utf-8")
    assert [b.line for b in read_records(path, skip_bad=True).bad] == [3]
    with pytest.raises(InputError, match=r"a\.json, line 3: the JSON list breaks here"):
        read_records(path)


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode())
    assert len(read_records(path)) == 1


def test_parquet_holds_strings_and_messages(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")], "score_chosen": 2.0}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    record = read_records(tmp_path / "a.parquet")[0]
    assert record.prompt == [user("a")]
    assert record.answers == {"chosen": [assistant("b")], "rejected": [assistant("c")]}
    assert record.extra == {"chosen_score": 2.0}


def test_a_folder_of_datasets_is_read_whole_and_by_part(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list([PAIR, {**PAIR, "chosen": " Blue."}])
    one.select([1, 0]).save_to_disk(str(tmp_path / "one"))
    assert [r.answers["chosen"] for r in read_records(tmp_path / "one")] == [" Blue.", " Red."]
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(str(tmp_path / "two"))
    assert len(read_records(tmp_path / "two")) == 2
    assert len(read_records(tmp_path / "two", part="test")) == 1
    with pytest.raises(InputError, match="no part 'dev'; it has train, test"):
        read_records(tmp_path / "two", part="dev")
    with pytest.raises(InputError, match="without parts"):
        read_records(tmp_path / "one", part="test")


def test_the_prompt_of_whole_dialogues_ends_at_the_last_turn_both_share() -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Name a colour\n\nAssistant:"
    record = only([{"chosen": f"{start} Red, I think.", "rejected": f"{start} Red? No."}])
    assert record.prompt == start
    assert record.answers == {"chosen": " Red, I think.", "rejected": " Red? No."}


def test_dialogues_that_part_early_have_the_rest_as_their_answers() -> None:
    record = only(
        [
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Yes.\n\nHuman: Bye\n\nAssistant: Bye.",
                "rejected": "\n\nHuman: Hi\n\nAssistant: No.",
            }
        ]
    )
    assert record.prompt == "\n\nHuman: Hi\n\nAssistant:"
    assert record.answers["chosen"] == " Yes.\n\nHuman: Bye\n\nAssistant: Bye."


@pytest.mark.parametrize(
    ("row", "prompt", "chosen"),
    [
        # The prompt is implicit in both lists.
        (
            {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
            [user("q")],
            [assistant("a")],
        ),
        # A list beside the answers alone.
        (
            {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
            [user("q")],
            [assistant("a")],
        ),
        # A string beside whole lists, which repeat it.
        (
            {"prompt": "q", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
            [user("q")],
            [assistant("a")],
        ),
        # A string beside lists of answers, and a list beside strings.
        ({"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]}, [user("q")], [assistant("a")]),
        ({"prompt": [user("q")], "chosen": "a", "rejected": "b"}, [user("q")], [assistant("a")]),
        # The rejected conversation goes on where the chosen one parts: the shared answer belongs to the prompt.
        (
            {
                "chosen": [user("q"), assistant("s"), user("r"), assistant("a")],
                "rejected": [user("q"), assistant("s"), user("r"), assistant("b")],
            },
            [user("q"), assistant("s"), user("r")],
            [assistant("a")],
        ),
        # They part at a turn of the user: back to the answer before it.
        (
            {
                "chosen": [user("q"), assistant("s"), user("r"), assistant("a")],
                "rejected": [user("q"), assistant("s"), user("t"), assistant("b")],
            },
            [user("q")],
            [assistant("s"), user("r"), assistant("a")],
        ),
    ],
)
def test_chat_messages_in_every_layout(row: dict[str, Any], prompt: Any, chosen: Any) -> None:
    record = only([row])
    assert record.prompt == prompt
    assert record.answers["chosen"] == chosen


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "q", "response": "a", "score": 1}, "scored"),
        ({"prompt": "q", "completion": "a", "reward": 0.5}, "scored"),
        ({"prompt": "q", "completion": "a", "label": True}, "labelled"),
        ({"prompt": "q", "response": "a", "label": 0}, "labelled"),
        ({"prompt": "q", "response": "a"}, "answers"),
        ({"messages": [user("q"), assistant("a")]}, "answers"),
        ({"text": "a"}, "texts"),
        ({"prompt": "q"}, "prompts"),
        ({"prompt": [user("q")]}, "prompts"),
    ],
)
def test_the_kind_follows_from_the_fields_and_is_said_in_words(row: dict[str, Any], kind: str) -> None:
    records = make_records([{**row, "topic": "x"}])
    assert records.kind == kind
    assert records.note.startswith("Read as ")
    assert records[0].extra == {"topic": "x"}
    if kind == "labelled":
        assert isinstance(records[0].label, bool)
    if kind == "scored":
        assert isinstance(records[0].score, float)


def test_other_names_of_fields_can_be_given(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "q", "better": "a", "worse": "b"}])
    names = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    assert read_records(path, fields=names)[0].answers == {"chosen": "a", "rejected": "b"}


def test_a_kind_can_be_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [PAIR])
    assert read_records(path, kind="prompts").sides == ()
    with pytest.raises(InputError, match="Did you mean 'pairs'"):
        read_records(path, kind="pair")


BAD: list[tuple[Any, str]] = [
    ({"prompt": "q", "chosen": "a"}, "the field 'rejected' is missing"),
    ({"prompt": "q", "chosen": "a", "rejected": 5}, "'rejected' must be text, and it is a int"),
    ({"prompt": "q", "chosen": "a", "rejected": None}, "'rejected' must be text, and it is missing"),
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen equals rejected"),
    ({"prompt": "q", "chosen": " \n", "rejected": "a"}, "the chosen answer is empty"),
    ({"prompt": "q", "chosen": "a", "rejected": []}, "'rejected' must be a list of messages.*without anything"),
    ({"prompt": "q", "chosen": "a", "rejected": [assistant("b")]}, "different types"),
    (
        {"prompt": "q", "chosen": [assistant("a")], "rejected": [{"role": "assistant"}]},
        "message 1 of 'rejected' must have text",
    ),
    ({"prompt": "q", "chosen": [assistant("a")], "rejected": [{"content": "b"}]}, "message 1 of 'rejected' must be"),
    ({"chosen": "Hello.", "rejected": "Bye."}, "the dialogues do not both begin"),
    ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "share no first message"),
    ('{"prompt": "q", "chosen": "a", "rejected": "\\ud800"}', "half a surrogate pair"),
    ('{"prompt": "q", "chosen"', "not a whole JSON object"),
    ("[1, 2]", "a JSON object was expected, and this is a list"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_pair_is_named_by_file_and_line_or_counted(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "a.jsonl", [PAIR, "", row, PAIR])
    with pytest.raises(InputError, match=rf"a\.jsonl, line 3: .*{message}.*--skip-bad") as caught:
        read_records(path)
    assert "\n" not in str(caught.value)
    records = read_records(path, skip_bad=True)
    assert len(records) == 2
    assert [bad.line for bad in records.bad] == [3]
    assert records.bad_in_words().startswith("1 bad record was left out: ")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "response": "a", "score": float("nan")}, "the score is nan"),
        ({"prompt": "q", "response": "a", "score": float("inf")}, "the score is inf"),
        ({"prompt": "q", "response": "a", "score": "5"}, "the score must be a number, and it is a str"),
        ({"prompt": "q", "response": "a", "score": True}, "the score must be a number, and it is a bool"),
        ({"prompt": "q", "response": "a", "label": "yes"}, "the label must be true or false"),
        ({"prompt": "q", "response": "a", "label": 2}, "the label must be true or false"),
        ({"messages": [user("q")]}, "do not end with an answer"),
        ({"text": ""}, "the response answer is empty"),
        ({"question": "q"}, "the fields are 'question'; expected prompt/chosen/rejected"),
    ],
)
def test_bad_rows_of_the_other_kinds(row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_records([row])


def test_text_that_is_not_utf8_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(PAIR).encode() + b'\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(InputError, match="line 2: not UTF-8 at byte 15 of the line"):
        read_records(path)
    assert len(read_records(path, skip_bad=True)) == 1
    path.write_bytes(json.dumps(PAIR).encode("utf-16"))
    with pytest.raises(InputError, match="not UTF-8: it begins with a UTF-16 mark"):
        read_records(path, skip_bad=True)


def test_a_truncated_gzip_file_is_named_and_what_stands_before_can_be_used(tmp_path: Path) -> None:
    rows = [{**PAIR, "prompt": f"{number * 7919 % 10007:x}" * 9} for number in range(3000)]
    path = write(tmp_path / "a.jsonl.gz", rows)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InputError, match="the gzip file ends or breaks here"):
        read_records(path)
    records = read_records(path, skip_bad=True)
    assert 0 < len(records) < 3000
    assert len(records.bad) == 1
    path.write_bytes(b"not gzip at all")
    with pytest.raises(InputError, match="not a whole gzip file"):
        read_records(path, skip_bad=True)


@pytest.mark.parametrize("content", ["", "\n \n", "[]"])
def test_an_empty_file_is_refused_even_when_bad_rows_are_skipped(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"is empty|holds no record"):
        read_records(path, skip_bad=True)


def test_a_file_without_one_good_row_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{**PAIR, "rejected": ""}] * 3)
    with pytest.raises(
        InputError, match=r"no record that can be used. All 3 are bad; the first, .*line 1: the rejected"
    ):
        read_records(path, skip_bad=True)


def test_wrong_paths_and_formats_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", [PAIR])
    with pytest.raises(InputError, match=r"does not exist. Did you mean 'pairs.jsonl'"):
        read_records(tmp_path / "pair.jsonl")
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match=r"unknown format\. Poise reads JSON lines"):
        read_records(tmp_path / "a.txt")
    with pytest.raises(InputError, match=r"state\.json is missing"):
        read_records(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="not a whole Parquet file"):
        read_records(tmp_path / "a.parquet")


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.fixed_dictionaries({"prompt": words, "response": words, "score": st.floats(-9, 9)}), min_size=1)
)
def test_what_is_written_reads_as_the_same_records(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    rows = [{**row, "response": row["response"] + "."} for row in rows]
    records = make_records(rows)
    write_jsonl(records, tmp_path / "a.jsonl")
    again = read_records(tmp_path / "a.jsonl")
    assert again.items == records.items
    assert again.content == records.content


def test_limits_and_groups_keep_order_and_prompts() -> None:
    records = make_records([{"prompt": f"q{number % 3}", "response": f"a{number}"} for number in range(9)])
    assert records.groups().tolist() == [0, 1, 2] * 3
    few = records.limit(4)
    assert isinstance(few, Records)
    assert [r.line for r in few] == sorted(r.line for r in few)
    assert few.items == records.limit(4).items
    assert records.limit(None) is records
    assert records[2:4].items == records.items[2:4]
    with pytest.raises(InputError, match="at least 1"):
        records.limit(0)


@pytest.mark.skipif(HH is None, reason=f"../{_HH} is not here")
def test_real_dialogues_are_read_whole() -> None:
    assert HH is not None
    records = read_records(HH, skip_bad=True)
    # Four of the 2,312 have an empty chosen answer.
    assert (len(records), len(records.bad)) == (2308, 4)
    assert all(str(record.prompt).endswith("\n\nAssistant:") for record in records)
    assert all(set(record.answers) == {"chosen", "rejected"} for record in records)
