"""From rows of whatever layout to records: a prompt and its answers.

Layouts, told apart by the fields of the first rows:

    prompt, chosen, rejected            pairs: strings, or lists of chat messages
    chosen, rejected                    pairs without a prompt: whole dialogues "Human: ... Assistant: ...", or whole lists of messages; the
                                        prompt is what both begin with
    prompt, response, score             scored: one answer and what it earned
    prompt, response, label             labelled: one answer, wanted or not
    prompt, response | messages         answers: for supervised fine-tuning
    text                                texts: no prompt at all
    prompt                              prompts: to be answered

`completion` is read as `response`, and `reward` as `score`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poise.errors import InputError, nearest
from poise.tasks.language.files import BadRow, Row, Unusable, place, read_rows

Message = dict[str, Any]
Text = str | list[Message]

SIDES = {
    "pairs": ("chosen", "rejected"),
    "scored": ("response",),
    "labelled": ("response",),
    "answers": ("response",),
    "texts": ("response",),
    "prompts": (),
}
"""Kinds of records, each with the sides that its answers are called by."""

_TURN = "\nAssistant:"
_SYNONYMS = {
    "completion": "response",
    "reward": "score",
    "score_chosen": "chosen_score",
    "score_rejected": "rejected_score",
}
_READ = {
    "pairs": {"prompt", "chosen", "rejected", "messages"},
    "scored": {"prompt", "response", "messages", "score"},
    "labelled": {"prompt", "response", "messages", "label"},
    "answers": {"prompt", "response", "messages"},
    "texts": {"text"},
    "prompts": {"prompt"},
}
_EXPECTED = (
    "prompt/chosen/rejected, chosen/rejected (whole dialogues), prompt/response/score, prompt/response/label, prompt/response, "
    "messages, text, or prompt"
)


@dataclass(frozen=True, slots=True)
class Record:
    """A prompt and its answers.

    Attributes:
        line: where it stood.
        prompt: a string, or chat messages; "" where a text has none.
        answers: by side: `chosen` and `rejected`, or `response`, or none; of the type of the prompt.
        label: whether the answer is wanted.
        score: what the answer earned.
        extra: fields that the layout does not know, as they were: spans, a reference answer, the type of the query.
    """

    line: int
    prompt: Text
    answers: dict[str, Text]
    label: bool | None = None
    score: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Records(Sequence[Record]):
    """Records of one kind from one source.

    Attributes:
        source: the file, the folder, or the name of what made them.
        kind: a key of `SIDES`.
        items: the records.
        note: how the layout was recognised, in words.
        bad: rows that were left out (`skip_bad`), each with its place and reason.
    """

    source: str
    kind: str
    items: tuple[Record, ...]
    note: str = ""
    bad: tuple[BadRow, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        return self.select(range(len(self))[index]) if isinstance(index, slice) else self.items[index]

    @property
    def sides(self) -> tuple[str, ...]:
        """The names of the answers: `("chosen", "rejected")`, `("response",)` or `()`."""
        return SIDES[self.kind]

    @property
    def content(self) -> str:
        """sha256 over kind and records, wherever they came from."""
        digest = hashlib.sha256(self.kind.encode())
        for record in self.items:
            row = [record.prompt, record.answers, record.label, record.score, record.extra]
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def place(self, line: int) -> str:
        """Say where a record stood: `pairs.jsonl, line 7`."""
        return place(self.source, line)

    def select(self, indices: Sequence[int] | Tensor) -> Records:
        """Return the records at these positions, in this order."""
        rows = indices.tolist() if isinstance(indices, Tensor) else indices
        return replace(self, items=tuple(self.items[int(row)] for row in rows))

    def limit(self, most: int | None) -> Records:
        """Return at most this many records, drawn at random, always the same ones, in their order."""
        if most is None or most >= len(self):
            return self
        if most < 1:
            raise InputError(f"limit must be at least 1, and it is {most}.")
        return self.select(torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:most].sort().values)

    def groups(self) -> Tensor:
        """Number the prompts, int64 `[records]`: records of one prompt share a number, so that a split can keep them together."""
        numbers: dict[str, int] = {}
        keys = (json.dumps(record.prompt, sort_keys=True) for record in self.items)
        return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys], dtype=torch.int64)

    def bad_in_words(self, most: int = 5) -> str:
        """List the rows that were left out, at most `most` of them by line."""
        if not self.bad:
            return ""
        shown = "; ".join(f"{self.place(bad.line)}: {bad.reason}" for bad in self.bad[:most])
        more = f"; and {len(self.bad) - most} more" if len(self.bad) > most else ""
        counted = "1 bad record was" if len(self.bad) == 1 else f"{len(self.bad)} bad records were"
        return f"{counted} left out: {shown}{more}."


def read_records(
    path: str | os.PathLike[str],
    *,
    part: str | None = None,
    kind: str | None = None,
    fields: Mapping[str, str] | None = None,
    skip_bad: bool = False,
) -> Records:
    """Read preference pairs, scored or labelled answers, texts or prompts.

    Args:
        path: JSON lines or a JSON list (also .gz), Parquet, or a folder that `datasets` saved.
        part: the split of such a folder; None takes "train".
        kind: a key of `SIDES`; None infers it from the fields, and `note` says how.
        fields: other names of the fields in the file, `{"prompt": "question", "chosen": "better"}`.
        skip_bad: leave bad records out and list them in `bad`, instead of raising at the first.
    Returns:
        The records.
    Raises:
        InputError: no such file, an unknown format or layout, nothing that can be used; without `skip_bad` the first bad record,
            with file and line: a field is missing, empty or of the wrong type, chosen equals rejected, a score is not a number.

        >>> records = read_records("pairs.jsonl", skip_bad=True)  # doctest: +SKIP
        >>> records.note, records[0].answers["chosen"]            # doctest: +SKIP
    """
    if kind is not None and kind not in SIDES:
        raise InputError(f"kind must be one of {', '.join(SIDES)}, and it is {kind!r}.{nearest(kind, SIDES)}")
    renamed = {theirs: ours for ours, theirs in (fields or {}).items()}
    renamed = {**{k: v for k, v in _SYNONYMS.items() if v not in renamed.values()}, **renamed}
    rows = read_rows(path, part)
    return _records(os.fspath(path), rows, kind, renamed, skip_bad)


def make_records(rows: Sequence[Mapping[str, Any]], *, source: str = "rows", kind: str | None = None) -> Records:
    """Make records of dictionaries in memory, by the same rules as `read_records`.

    >>> make_records([{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}]).kind
    'pairs'
    """
    numbered = (Row(line, dict(row)) for line, row in enumerate(rows, start=1))
    return _records(source, numbered, kind, _SYNONYMS, skip_bad=False)


def _records(
    source: str, rows: Iterator[Row | BadRow], kind: str | None, renamed: Mapping[str, str], skip_bad: bool
) -> Records:
    good: list[Record] = []
    bad: list[BadRow] = []
    note, asked = "", kind
    for row in rows:
        try:
            if isinstance(row, BadRow):
                raise Unusable(row.reason)
            named = {renamed.get(name, name): value for name, value in row.fields.items()}
            if kind is None:
                kind = _kind(named)
            good.append(_record(row.line, kind, named))
            note = note or _note(kind, named, asked is not None)
        except Unusable as reason:
            if not skip_bad:
                raise InputError(f"{place(source, row.line)}: {reason}.{_hint(isinstance(row, BadRow))}") from reason
            bad.append(BadRow(row.line, str(reason)))
    if not good or kind is None:
        reasons = f" All {len(bad)} are bad; the first, {place(source, bad[0].line)}: {bad[0].reason}." if bad else ""
        raise InputError(f"{source} holds no record that can be used.{reasons} Expected fields: {_EXPECTED}.")
    return Records(source, kind, tuple(good), note, tuple(bad))


def _hint(broken: bool) -> str:
    return " Correct it, or pass skip_bad=True (--skip-bad) to leave bad records out" + (
        "." if broken else " and have them counted."
    )


def _kind(row: Mapping[str, Any]) -> str:
    if "chosen" in row and "rejected" in row:
        return "pairs"
    if "chosen" in row or "rejected" in row:
        absent = "rejected" if "chosen" in row else "chosen"
        raise Unusable(f"the field {absent!r} is missing; a pair needs both")
    if "prompt" in row and "response" in row:
        return "scored" if "score" in row else "labelled" if "label" in row else "answers"
    if "messages" in row:
        return "answers"
    if "text" in row:
        return "texts"
    if "prompt" in row:
        return "prompts"
    raise Unusable(f"the fields are {', '.join(map(repr, row)) or 'none'}; expected {_EXPECTED}")


def _note(kind: str, row: Mapping[str, Any], asked: bool) -> str:
    chat = (
        " as chat messages"
        if any(isinstance(row.get(f), list) for f in ("prompt", "chosen", "response", "messages"))
        else ""
    )
    if kind == "pairs":
        where = "a prompt of their own" if "prompt" in row else "the prompt that both dialogues begin with"
        what = f"pairs of a chosen and a rejected answer{chat}, with {where}"
    else:
        what = {
            "scored": f"answers{chat}, each with a score",
            "labelled": f"answers{chat}, each labelled wanted or not",
            "answers": f"answers{chat} to learn from",
            "texts": "plain texts to learn from",
            "prompts": f"prompts{chat} alone",
        }[kind]
    return f"Read as {what}{', as asked for' if asked else ''}."


def _record(line: int, kind: str, row: dict[str, Any]) -> Record:
    extra = {name: value for name, value in row.items() if name not in _READ[kind]}
    if kind == "pairs":
        prompt, answers = _pair(row)
    elif kind == "texts":
        prompt, answers = "", {"response": _string(row, "text")}
    elif kind == "prompts":
        return Record(line, _text(row, "prompt"), {}, extra=extra)
    elif "messages" in row and "response" not in row:
        prompt, answers = _conversation(_messages(row["messages"], "messages"))
    else:
        prompt, answers = _alike(_text(row, "prompt"), {"response": _text(row, "response")})
    for side, answer in answers.items():
        if not _words(answer).strip():
            raise Unusable(f"the {side} answer is empty")
    label = _label(row) if kind == "labelled" else None
    score = _number(row, "score") if kind == "scored" else None
    return Record(line, prompt, answers, label, score, extra)


def _pair(row: Mapping[str, Any]) -> tuple[Text, dict[str, Text]]:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise Unusable("chosen and rejected are of different types: one is a string, one a list of messages")
    if chosen == rejected:
        raise Unusable("chosen equals rejected, so there is nothing to prefer")
    if isinstance(chosen, list) and isinstance(rejected, list):
        own = _text(row, "prompt") if "prompt" in row else None
        whole = _shared_messages(chosen, rejected)
        # Layouts with a prompt beside whole conversations repeat it as their first message.
        if whole and (own is None or isinstance(own, str) or own == whole):
            return whole, {"chosen": chosen[len(whole) :], "rejected": rejected[len(whole) :]}
        if own is None:
            raise Unusable("chosen and rejected share no first message, and there is no prompt")
        return _alike(own, {"chosen": chosen, "rejected": rejected})
    if "prompt" in row:
        return _alike(_text(row, "prompt"), {"chosen": chosen, "rejected": rejected})
    assert isinstance(chosen, str)
    assert isinstance(rejected, str)
    prompt = _shared_dialogue(chosen, rejected)
    return prompt, {"chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}


def _shared_dialogue(chosen: str, rejected: str) -> str:
    """What both dialogues begin with, up to the last turn of the assistant that lies in it whole."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = chosen[: next((at for at, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))]
    end = shared.rfind(_TURN)
    if end < 0 and shared.startswith(_TURN.lstrip()):
        return _TURN.lstrip()
    if end < 0:
        raise Unusable(
            "there is no prompt, and the dialogues do not both begin with the same 'Human: ...' up to an 'Assistant:' turn"
        )
    return shared[: end + len(_TURN)]


def _shared_messages(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """The messages that both begin with, up to the last one before a turn of the assistant in each."""
    count = 0
    while count < min(len(chosen), len(rejected)) and chosen[count] == rejected[count]:
        count += 1
    # Where one conversation is the beginning of the other, or they part after a turn of the user, step back to an answer in both.
    while count and not (
        count < min(len(chosen), len(rejected)) and chosen[count]["role"] == rejected[count]["role"] == "assistant"
    ):
        count -= 1
    return chosen[:count]


def _conversation(messages: list[Message]) -> tuple[Text, dict[str, Text]]:
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise Unusable("the messages do not end with an answer of the assistant to something before it")
    return messages[:-1], {"response": messages[-1:]}


def _alike(prompt: Text, answers: dict[str, Text]) -> tuple[Text, dict[str, Text]]:
    """Bring prompt and answers to one type: where either is chat, both are."""
    if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers.values()):
        return prompt, answers
    turn = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return turn, {
        side: [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        for side, answer in answers.items()
    }


def _text(row: Mapping[str, Any], name: str) -> Text:
    value = row.get(name)
    if isinstance(value, list):
        return _messages(value, name)
    return _string(row, name)


def _string(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        raise Unusable(f"the field {name!r} is missing; the row has {', '.join(map(repr, row)) or 'none'}")
    value = row[name]
    if not isinstance(value, str):
        raise Unusable(f"the field {name!r} must be text, and it is {_described(value)}")
    return _checked(value, name)


def _checked(value: str, name: str) -> str:
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise Unusable(f"the field {name!r} holds half a surrogate pair at character {error.start}") from None
    return value


def _messages(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise Unusable(f"the field {name!r} must be a list of messages, and it is {_described(value)}")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Unusable(f"message {number} of {name!r} must be {{'role': ..., 'content': ...}}")
        content = message.get("content")
        if not isinstance(content, str):
            raise Unusable(
                f"message {number} of {name!r} must have text as its content, and it is {_described(content)}"
            )
        _checked(content, name)
    return value


def _label(row: Mapping[str, Any]) -> bool:
    value = row.get("label")
    if isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1)):
        return bool(value)
    raise Unusable(f"the label must be true or false, and it is {_described(value)}")


def _number(row: Mapping[str, Any], name: str) -> float:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unusable(f"the {name} must be a number, and it is {_described(value)}")
    if not math.isfinite(value):
        raise Unusable(f"the {name} is {value}; it must be finite")
    return float(value)


def _words(text: Text) -> str:
    return (
        text
        if isinstance(text, str)
        else "".join(message["content"] for message in text if message["role"] == "assistant")
    )


def _described(value: Any) -> str:
    return (
        "missing" if value is None else f"a {type(value).__name__}" + (" without anything in it" if value == [] else "")
    )


def write_jsonl(records: Records, path: str | os.PathLike[str]) -> None:
    """Write records as JSON lines that `read_records` reads as the same records.

    >>> write_jsonl(records, "pairs.jsonl")  # doctest: +SKIP
    """
    with Path(path).open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            row: dict[str, Any] = {"prompt": record.prompt, **record.answers, **record.extra}
            if records.kind == "texts":
                row = {"text": record.answers["response"], **record.extra}
            row |= {"label": record.label} if record.label is not None else {}
            row |= {"score": record.score} if record.score is not None else {}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
