"""Records as tokens: a map-style data set whose items are ragged, and the collation that pads them.

Of every answer, `chosen`, `rejected` or `response`, an item holds the whole sequence of prompt and answer:

    <side>_ids        int64   [time]   tokens of the prompt and of the answer, which ends with EOS unless it was cut
    <side>_mask       bool    [time]   True on the tokens of the answer, EOS included
    <side>_positions  int64   [time]   place within the answer, from 0; -1 outside
    <side>_attention  bool    [time]   True but on padding; made by `collate`
    <side>_spans, <side>_token_weight, <side>_token_reward    where records carry them

`poise.tasks.language.encoding` says how text becomes tokens.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from poise.errors import InputError
from poise.tasks.language.encoding import Encoded, Encoder, Rendered
from poise.tasks.language.files import BadRow, Unusable
from poise.tasks.language.records import Record, Records

Item = dict[str, Tensor]

# Raise it when the same records, tokenizer and options give other tensors than before.
_FORMAT = 1
_RANGES = {"spans": (torch.int64, 0.0), "token_weight": (torch.float32, 1.0), "token_reward": (torch.float32, 0.0)}
"""What records may say of ranges of characters: the type, and the value of the tokens of the answer that no range covers."""
_AT_A_TIME = 1_024
_COLUMNS = ("chosen_score", "rejected_score", "group")


class Ragged(Sequence[Tensor]):
    """Rows of different lengths, one behind the other in one tensor; grows by `append` until it is first read."""

    _CODES: ClassVar = {torch.int32: "i", torch.int64: "q", torch.float32: "f", torch.bool: "b"}

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.offsets: list[int] = [0]
        self._growing = array(self._CODES[dtype])

    @classmethod
    def of(cls, values: Tensor, lengths: Tensor) -> Ragged:
        """Cut one tensor into rows of these lengths.

        Raises:
            ValueError: they do not add up.
        """
        if int(lengths.sum()) != len(values):
            raise ValueError(f"{len(values)} values are no rows of {int(lengths.sum())} in all")
        made = cls(values.dtype)
        made.offsets = [0, *lengths.cumsum(0).tolist()]
        made.__dict__["values"] = values
        return made

    def append(self, row: Sequence[float]) -> None:
        """Put a row behind the others."""
        self._growing.extend(row)  # type: ignore[arg-type]
        self.offsets.append(len(self._growing))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: Any) -> Any:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @cached_property
    def values(self) -> Tensor:
        """All rows behind one another."""
        if not self._growing:
            return torch.empty(0, dtype=self.dtype)
        kind = torch.int8 if self.dtype is torch.bool else self.dtype
        return torch.frombuffer(self._growing, dtype=kind).to(self.dtype)

    @property
    def lengths(self) -> Tensor:
        """The length of each row, int64."""
        return torch.tensor(self.offsets).diff()


@dataclass(frozen=True, slots=True)
class _Answer:
    """One answer, cut: its tokens, which of them the model has to give, and what ranges say of them."""

    ids: list[int]
    own: list[bool]
    ranges: dict[str, list[float]]


@dataclass(frozen=True)
class Options:
    """How records become tokens; see `tokenize`."""

    max_length: int | None = None
    max_prompt_length: int | None = None
    padding: str = "right"
    columns: tuple[str, ...] = ()


class TokenizedRecords(Dataset[Item]):
    """Records of any kind as tokens, stored as int32 behind one another; `tokenize` makes them.

    Attributes:
        records: the records behind the items, in the same order.
        sides: the names of the answers.
        bad: rows that were left out, while reading or while tokenising.
        cut: whether anything was cut. note: what, in words.
        fingerprint: sha256 over records, tokenizer and options; equal where the tensors are equal.
        pad_id: the id that padding holds.
    """

    kinds: ClassVar[tuple[str, ...]] = ()

    def __init__(self, records: Records, encoder: Encoder, options: Options, skip_bad: bool) -> None:
        if records.kind not in self.kinds:
            raise InputError(
                f"{type(self).__name__} holds {' or '.join(self.kinds)}, and these records are {records.kind}."
            )
        self.sides, self.options = records.sides, options
        self.pad_id, self.padding = encoder.pad, options.padding
        made = _Made(records, encoder, options, skip_bad)
        self.records, self.bad, self.note = made.records, made.records.bad, made.note()
        self.cut = bool(made.cut_prompts or made.cut_answers)
        self._prompts, self._ids, self._ranges = made.prompts, made.ids, made.ranges
        # Most answers are the model's own from end to end, and nothing has to be kept of that.
        self._own = {side: own for side, own in made.own.items() if not bool(own.values.all())}
        self._reference: dict[str, Ragged] = {}
        self._scalars = _scalars(self.records, options.columns)
        self.fingerprint = _fingerprint(self.records, encoder, options)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Item:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        index = index % len(self)
        prompt = self._prompts[index]
        item: Item = {} if self.sides else {"prompt_ids": prompt.long()}
        for side in self.sides:
            item.update(self._side(side, index, prompt))
        item.update({name: values[index] for name, values in self._scalars.items()})
        return item

    def _side(self, side: str, index: int, prompt: Tensor) -> Item:
        answer = self._ids[side][index]
        own = self._own[side][index] if side in self._own else torch.ones(len(answer), dtype=torch.bool)
        mask = torch.cat([torch.zeros(len(prompt), dtype=torch.bool), own])
        item = {
            f"{side}_ids": torch.cat([prompt, answer]).long(),
            f"{side}_mask": mask,
            f"{side}_positions": (mask.cumsum(0) - 1).masked_fill(~mask, -1),
        }
        if side in self._reference:
            values = self._reference[side][index]
            item[f"reference_{side}_logps"] = torch.cat([values.new_zeros(len(prompt)), values])
        for name in _RANGES:
            if f"{side}_{name}" in self._ranges:
                values = self._ranges[f"{side}_{name}"][index]
                item[f"{side}_{name}"] = torch.cat([values.new_zeros(len(prompt)), values * own])
        return item

    def answer_lengths(self, side: str) -> Tensor:
        """Return the tokens of each answer, int64, its end included."""
        return self._ids[side].lengths

    def with_reference(self, logps: Mapping[str, Ragged]) -> TokenizedRecords:
        """Return the data with the reference's log-probability of each answer's tokens as `reference_<side>_logps`."""
        made = copy.copy(self)
        made._reference = dict(logps)
        return made

    def collate(self, items: Sequence[Item]) -> Item:
        """Pad items to the longest of each side, as `padding` says.

        Args:
            items: of this data set.
        Returns:
            `[batch, time]` tensors of each side with `<side>_attention`, and `[batch]` tensors of what is one number an item.
        """
        return pad(items, self.pad_id, self.padding)

    def batches_by_length(self, batch: int, device: torch.device) -> Iterator[tuple[Tensor, Item]]:
        """Give all items once, those of like length together: their positions int64, and the padded batch on a device.

        Less padding than in their own order, and the same numbers.
        """
        for rows in torch.split(self.lengths.argsort(stable=True), batch):
            items = self.collate([self[int(row)] for row in rows])
            yield rows, {name: values.to(device) for name, values in items.items()}

    @property
    def lengths(self) -> Tensor:
        """Tokens of the longest side of each item, int64: what a batch of similar lengths is made by."""
        if not self.sides:
            return self._prompts.lengths
        return self._prompts.lengths + torch.stack([self._ids[side].lengths for side in self.sides]).amax(0)

    def prompt(self, index: int) -> Tensor:
        """The tokens after which the model would answer, int64 `[time]`."""
        return self._prompts[index].long()  # type: ignore[no-any-return]


class TokenizedPairs(TokenizedRecords):
    """Pairs of a chosen and a rejected answer to one prompt."""

    kinds = ("pairs",)


class TokenizedAnswers(TokenizedRecords):
    """Prompts with one answer each: texts, answers to learn from, scored (`score`, `reward`) or labelled (`label`) ones."""

    kinds = ("answers", "texts", "scored", "labelled")


class TokenizedPrompts(TokenizedRecords):
    """Prompts alone: `prompt_ids`, and `prompt_attention` once they are collated. Pad them left to generate from them."""

    kinds = ("prompts",)


def tokenize(
    records: Records,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    padding: str = "right",
    columns: Sequence[str] = (),
    skip_bad: bool = False,
) -> TokenizedRecords:
    """Tokenise records.

    A prompt is cut from the left (BOS stays), an answer from the right. Where the whole is longer than `max_length`, the prompt gives way
    first, down to `max_prompt_length`, or to half of `max_length` where that is not given; then the answer is cut, and has no EOS any more.
    The two answers of a pair keep the same prompt.

    Args:
        records: of `read_records` or `make_records`.
        tokenizer: of the model that will read them.
        max_length: most tokens of prompt and answer together, at least 2.
        max_prompt_length: most tokens of a prompt, at least 1; it holds also where the whole would fit.
        padding: "right" or "left".
        columns: extra fields of the records, numbers, that become columns, as `group`, `chosen_score` and `rejected_score` do unasked.
        skip_bad: leave out records that cannot be used, and list them in `bad`.
    Returns:
        `TokenizedPairs`, `TokenizedAnswers` or `TokenizedPrompts`.
    Raises:
        InputError: a tokenizer without EOS, chat messages without a template, a bad argument; without `skip_bad` the first record, with
            file and line, of which an answer is empty after truncation, chosen equals rejected, or a span is wrong.

        >>> data = tokenize(records, tokenizer, max_length=512)  # doctest: +SKIP
        >>> batch = data.collate([data[0], data[1]])             # doctest: +SKIP
    """
    if max_length is not None and max_length < 2:
        raise InputError(f"max_length must be at least 2, one token to read and one to give, and it is {max_length}.")
    if max_prompt_length is not None and max_prompt_length < 1:
        raise InputError(f"max_prompt_length must be at least 1, and it is {max_prompt_length}.")
    if padding not in ("right", "left"):
        raise InputError(f"padding must be 'right' or 'left', and it is {padding!r}.")
    options = Options(max_length, max_prompt_length, padding, tuple(columns))
    made = next(k for k in (TokenizedPairs, TokenizedAnswers, TokenizedPrompts) if records.kind in k.kinds)
    return made(records, Encoder(tokenizer), options, skip_bad)


def pad(items: Sequence[Item], pad_id: int, padding: str = "right") -> Item:
    """Pad ragged items to the longest, name by name.

    Args:
        items: dictionaries of equal names; `[time]` tensors are padded, `[]` tensors stacked.
        pad_id: what `*_ids` are padded with; positions with -1, all others with 0.
        padding: on which side.
    Returns:
        Tensors `[batch, time]` and `[batch]`, and for every `<side>_ids` an `<side>_attention` that is False on padding.

        >>> pad([{"a_ids": torch.tensor([5, 6])}, {"a_ids": torch.tensor([7])}], pad_id=0)["a_attention"]
        tensor([[ True,  True],
                [ True, False]])
    """
    batch: Item = {}
    for name, first in items[0].items():
        rows = [item[name] for item in items]
        if first.ndim == 0:
            batch[name] = torch.stack(rows)
            continue
        fill = pad_id if name.endswith("_ids") else -1 if name.endswith("_positions") else 0
        batch[name] = _padded(rows, fill, padding)
        if name.endswith("_ids"):
            ones = [torch.ones(len(row), dtype=torch.bool) for row in rows]
            batch[name.removesuffix("ids") + "attention"] = _padded(ones, 0, padding)
    return batch


def _padded(rows: Sequence[Tensor], fill: int, padding: str) -> Tensor:
    longest = max(len(row) for row in rows)
    result = rows[0].new_full((len(rows), longest), fill)
    for number, row in enumerate(rows):
        if padding == "right":
            result[number, : len(row)] = row
        else:
            result[number, longest - len(row) :] = row
    return result


class _Made:
    """Prompts and answers of all records as lists of tokens, cut, without the records that cannot be used."""

    def __init__(self, records: Records, encoder: Encoder, options: Options, skip_bad: bool) -> None:
        self.source, self.skip_bad, self.bad = records, skip_bad, list(records.bad)
        self.encoder, self.options = encoder, options
        self.names = {
            side: [name for name in _RANGES if any(f"{side}_{name}" in record.extra for record in records)]
            for side in records.sides
        }
        self.cut_prompts = self.cut_answers = 0
        self.prompts = Ragged(torch.int32)
        self.ids = {side: Ragged(torch.int32) for side in records.sides}
        self.own = {side: Ragged(torch.bool) for side in records.sides}
        self.ranges = {
            f"{side}_{name}": Ragged(_RANGES[name][0]) for side in records.sides for name in self.names[side]
        }
        kept: list[Record] = []
        # Lists of tokens take ten times the memory of what is kept of them, so only a few records have them at a time.
        for start in range(0, len(records), _AT_A_TIME):
            for record, prompt, rendered, encoded in self._encoded(records.items[start : start + _AT_A_TIME]):
                with _Skip(self, record.line):
                    self._keep(record, prompt, rendered, encoded)
                    kept.append(record)
        if not kept:
            first = f" The first, {records.place(self.bad[0].line)}: {self.bad[0].reason}." if self.bad else ""
            raise InputError(f"{records.source}: no record can be used.{first}")
        self.records = replace(records, items=tuple(kept), bad=tuple(self.bad))

    def _keep(self, record: Record, prompt: list[int], rendered: list[Rendered], encoded: list[Encoded]) -> None:
        start = _cut_prompt(prompt, max((len(e.ids) for e in encoded), default=0), self.encoder.first, self.options)
        answers = [
            self._answer(record, side, len(start), text, tokens)
            for side, text, tokens in zip(self.source.sides, rendered, encoded, strict=True)
        ]
        _check_differ(answers, encoded, self.options)
        self.cut_prompts += len(start) < len(prompt)
        self.cut_answers += sum(len(a.ids) < len(e.ids) for a, e in zip(answers, encoded, strict=True))
        self.prompts.append(start)
        for side, answer in zip(self.source.sides, answers, strict=True):
            self.ids[side].append(answer.ids)
            self.own[side].append(answer.own)
            for name, values in answer.ranges.items():
                self.ranges[f"{side}_{name}"].append(values)

    def _encoded(self, records: Sequence[Record]) -> Iterator[tuple[Record, list[int], list[Rendered], list[Encoded]]]:
        """Give records with their prompts and answers as tokens; the tokenizer is given many texts at a time."""
        usable: list[tuple[Record, str, list[Rendered]]] = []
        for record in records:
            with _Skip(self, record.line):
                rendered = [self.encoder.render(record.prompt, record.answers[side]) for side in self.source.sides]
                prompt = rendered[0].prompt if rendered else self.encoder.render_prompt(record.prompt)
                usable.append((record, prompt, rendered))
        chat = any(not isinstance(record.prompt, str) for record, _, _ in usable)
        prompts = self.encoder.prompts([prompt for _, prompt, _ in usable], chat=chat)
        flat = [one for _, _, rendered in usable for one in rendered]
        answers = iter(self.encoder.answers(flat, offsets=any(self.names.values())))
        for record, prompt, rendered in usable:
            yield record, prompts[prompt], rendered, [next(answers) for _ in rendered]

    def _answer(self, record: Record, side: str, prompt: int, text: Rendered, tokens: Encoded) -> _Answer:
        if len(tokens.ids) < 2:
            raise Unusable(f"the {side} answer has no token but EOS")
        most = len(tokens.ids) if self.options.max_length is None else max(self.options.max_length - prompt, 0)
        ids = tokens.ids[:most]
        places = (tokens.offsets or [])[:most]
        own = [True] * len(ids)
        if text.own is not None:
            own = [any(a < end and start < b for a, b in text.own) for start, end in places]
            if len(ids) == len(tokens.ids):
                own[-1] = True
        if not any(own):
            raise Unusable(
                f"the {side} answer is empty after truncation: the prompt takes {prompt} of the "
                f"{self.options.max_length} tokens of max_length; raise max_length or lower max_prompt_length"
            )
        ranges = {
            name: _on_tokens(record.extra.get(f"{side}_{name}", []), f"{side}_{name}", name, text, places)
            for name in self.names[side]
        }
        return _Answer(ids, own, ranges)

    def note(self) -> str:
        """Say how much was cut."""
        if not self.cut_prompts and not self.cut_answers:
            return "Nothing was cut."
        answers = sum(len(rows) for rows in self.ids.values())
        return (
            f"{self.cut_prompts} of {len(self.prompts)} prompts were cut from the left, {self.cut_answers} of {answers} answers from the "
            "right."
        )


class _Skip:
    """Turn an unusable record into an error with file and line, or into an entry of the list of bad ones."""

    def __init__(self, made: _Made, line: int) -> None:
        self.made, self.line = made, line

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> bool:
        if not isinstance(error, Unusable):
            return False
        if not self.made.skip_bad:
            raise InputError(
                f"{self.made.source.place(self.line)}: {error}. Correct it, or pass skip_bad=True (--skip-bad) to leave bad records out "
                "and have them counted."
            ) from error
        self.made.bad.append(BadRow(self.line, str(error)))
        return True


def _cut_prompt(prompt: list[int], answer: int, first: int, options: Options) -> list[int]:
    """Cut a prompt from the left so that it fits with the longest of its answers, and keep what it began with."""
    room = len(prompt) if options.max_prompt_length is None else min(len(prompt), options.max_prompt_length)
    if options.max_length is not None:
        least = options.max_length // 2 if options.max_prompt_length is None else room
        room = min(room, max(options.max_length - answer, least))
    if room == len(prompt):
        return prompt
    return [first, *prompt[len(prompt) - room + 1 :]] if prompt[0] == first else prompt[-room:]


def _check_differ(answers: Sequence[_Answer], encoded: Sequence[Encoded], options: Options) -> None:
    if len(answers) == 2 and answers[0].ids == answers[1].ids:
        cut = encoded[0].ids != encoded[1].ids
        raise Unusable(
            "chosen and rejected are the same tokens"
            + (f" after truncation to max_length={options.max_length}; raise it" if cut else "")
        )


def _on_tokens(ranges: Any, field: str, name: str, text: Rendered, places: Sequence[tuple[int, int]]) -> list[float]:
    """Bring ranges of characters of an answer to its tokens; a token belongs to the last range that it shares a character with."""
    values = [_RANGES[name][1]] * len(places)
    if not isinstance(ranges, list):
        raise Unusable(f"{field} must be a list of ranges, and it is a {type(ranges).__name__}")
    if ranges and text.shift < 0:
        raise Unusable(f"{field} cannot be placed: the chat template does not write the answer as it is")
    for number, entry in enumerate(ranges, start=1):
        start, end, value = _range(entry, field, number, counted=name == "spans", most=len(text.answer) - text.shift)
        start, end = start + text.shift, end + text.shift
        for at, (a, b) in enumerate(places):
            if a < end and start < b:
                values[at] = value
    return [int(value) for value in values] if name == "spans" else values


def _range(entry: Any, field: str, number: int, counted: bool, most: int) -> tuple[int, int, float]:
    """Read [start, end, value]; a span may leave its number out, then it is its place in the list."""
    if not isinstance(entry, list | tuple) or len(entry) not in ((2, 3) if counted else (3,)):
        raise Unusable(f"range {number} of {field} must be [start, end, {'number' if counted else 'value'}]")
    start, end, value = (*entry, number)[:3]
    if any(isinstance(v, bool) or not isinstance(v, int) for v in (start, end)) or not isinstance(value, int | float):
        raise Unusable(f"range {number} of {field} must hold whole numbers of characters, and it is {list(entry)}")
    if not 0 <= start < end <= most:
        raise Unusable(f"range {number} of {field} is {start} to {end}, and the answer has {most} characters")
    if not math.isfinite(value) or (counted and (value < 1 or value != int(value))):
        raise Unusable(
            f"range {number} of {field} has the value {value}; {'a number from 1' if counted else 'it must be finite'}"
        )
    return start, end, float(value)


def _scalars(records: Records, columns: Sequence[str]) -> Mapping[str, Tensor]:
    found: dict[str, Tensor] = {}
    if records.kind == "labelled":
        found["label"] = torch.tensor([bool(record.label) for record in records])
    if records.kind == "scored":
        # A score is what the catalogue of quantities calls a reward.
        found["score"] = torch.tensor([record.score for record in records], dtype=torch.float32)
        found["reward"] = found["score"]
    of_themselves = [name for name in _COLUMNS if all(name in record.extra for record in records)]
    for name in dict.fromkeys([*columns, *of_themselves]):
        found[name] = _column(records, name)
    return found


def _column(records: Records, name: str) -> Tensor:
    values = []
    for record in records:
        value = record.extra.get(name)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(
                f"{records.place(record.line)}: the column {name!r} must hold a finite number, and it holds {value!r}."
            )
        values.append(value)
    whole = all(isinstance(value, int) for value in values)
    return torch.tensor(values, dtype=torch.int64 if whole else torch.float32)


def _fingerprint(records: Records, encoder: Encoder, options: Options) -> str:
    state = [_FORMAT, records.content, encoder.fingerprint(), vars(options)]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
