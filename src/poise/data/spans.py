"""Pairs of answers that are mostly equal: which phrases differ, and how a model makes such pairs from its own mistakes.

    row = {"prompt": ..., "chosen": "first a three, then a two", "rejected": "first a three, then a nine"}
    records = make_records([{**row, **align_spans(row["chosen"], row["rejected"])}])     # <side>_spans, which tokenize() reads

Spans are [start, end, number] in characters, the number counted from 1 and the same for a phrase and its counterpart.

Self-alignment, in the order of its steps: `perturb_frames` spoils what the model sees, the model answers (your code), `harvest`
keeps the wrong answers under rules and says what it dropped, `with_spans` marks the phrases.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from poise.errors import InputError

__all__ = [
    "Harvest",
    "align_spans",
    "choice_match",
    "exact_match",
    "harvest",
    "masked_pair",
    "parse_tags",
    "perturb_frames",
    "with_spans",
]

Span = list[int]
Aligner = Callable[[str, str], Mapping[str, list[Span]]]

_WORDS = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
_CHOICE = re.compile(r"\(?\b([A-Za-z])\b[).:]?")


# ---- which phrases differ --------------------------------------------------------------------------------------------


def align_spans(
    chosen: str, rejected: str, *, words: Callable[[str], Sequence[tuple[int, int]]] | None = None, join: int = 0
) -> dict[str, list[Span]]:
    """Find the phrases in which two answers differ: what a longest common subsequence of their words leaves over.

    A phrase stands in both answers. Where one answer only adds words, the equal word before them (or after, at the beginning) goes
    with the phrase on both sides, so that the addition has a counterpart.

    Args:
        chosen, rejected: two different answers.
        words: cuts a text into (start, end); runs of letters and digits, and single other signs, where nothing is said.
        join: two phrases with at most this many equal words between them become one.

    Returns: `chosen_spans` and `rejected_spans`, lists of [start, end, number], as `tokenize` of `poise.tasks.language` reads them.

    Raises:
        InputError: the answers are the same words, one of them has none, or `join` is negative.

    Example:
        >>> align_spans("a red car left", "a blue car arrived late")
        {'chosen_spans': [[2, 5, 1], [10, 14, 2]], 'rejected_spans': [[2, 6, 1], [11, 23, 2]]}
    """
    if join < 0:
        raise InputError(f"align_spans: join must be at least 0, and it is {join}.")
    cut = words or _words
    places = [list(cut(text)) for text in (chosen, rejected)]
    for side, found in zip(("chosen", "rejected"), places, strict=True):
        if not found:
            raise InputError(f"align_spans: the {side} answer has no words.")
    a, b = ([text[i:j] for i, j in found] for text, found in zip((chosen, rejected), places, strict=True))
    if a == b:
        raise InputError(
            "align_spans: chosen and rejected are the same words, so there is no phrase in which they differ."
        )
    phrases = _joined([_grown(gap, len(a), len(b)) for gap in _gaps(a, b)], join)
    spans: dict[str, list[Span]] = {"chosen_spans": [], "rejected_spans": []}
    for number, (i, j, k, l) in enumerate(phrases, start=1):
        spans["chosen_spans"].append([places[0][i][0], places[0][j - 1][1], number])
        spans["rejected_spans"].append([places[1][k][0], places[1][l - 1][1], number])
    return spans


def _words(text: str) -> list[tuple[int, int]]:
    return [match.span() for match in _WORDS.finditer(text)]


def _gaps(a: Sequence[str], b: Sequence[str]) -> list[tuple[int, int, int, int]]:
    """Return what a longest common subsequence leaves over: a[i:j] against b[k:l], in order."""
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    end = 0
    while end < min(len(a), len(b)) - start and a[len(a) - 1 - end] == b[len(b) - 1 - end]:
        end += 1
    rows, columns = a[start : len(a) - end], b[start : len(b) - end]
    # longest[i][j]: length of the longest common subsequence of rows[i:] and columns[j:]
    longest = [[0] * (len(columns) + 1) for _ in range(len(rows) + 1)]
    for i in range(len(rows) - 1, -1, -1):
        below, here = longest[i + 1], longest[i]
        for j in range(len(columns) - 1, -1, -1):
            here[j] = below[j + 1] + 1 if rows[i] == columns[j] else max(below[j], here[j + 1])
    gaps: list[tuple[int, int, int, int]] = []
    i = j = from_i = from_j = 0
    while i < len(rows) and j < len(columns):
        if rows[i] == columns[j]:
            if i > from_i or j > from_j:
                gaps.append((start + from_i, start + i, start + from_j, start + j))
            i, j = i + 1, j + 1
            from_i, from_j = i, j
        elif longest[i + 1][j] >= longest[i][j + 1]:
            i += 1
        else:
            j += 1
    if from_i < len(rows) or from_j < len(columns):
        gaps.append((start + from_i, start + len(rows), start + from_j, start + len(columns)))
    return gaps


def _grown(gap: tuple[int, int, int, int], rows: int, columns: int) -> tuple[int, int, int, int]:
    """Take an equal neighbour into a gap that is empty on one side."""
    i, j, k, l = gap
    if i < j and k < l:
        return gap
    if i > 0 and k > 0:
        return (i - 1, j, k - 1, l)
    return (i, min(j + 1, rows), k, min(l + 1, columns))


def _joined(gaps: list[tuple[int, int, int, int]], join: int) -> list[tuple[int, int, int, int]]:
    """Make one of phrases that overlap or stand within `join` words of each other."""
    found = gaps[:1]
    for i, j, k, l in gaps[1:]:
        before = found[-1]
        between = min(i - before[1], k - before[3])
        if between < 0 or (join and between <= join):
            found[-1] = (before[0], j, before[2], l)
        else:
            found.append((i, j, k, l))
    return found


def parse_tags(text: str, open: str = "<MASK>", close: str = "</MASK>") -> tuple[str, list[Span]]:
    """Take the tags around phrases out of a text, and return the text and the spans, numbered in order.

    Args:
        text: with tags that neither nest nor enclose nothing.
        open, close: the tags.

    Raises:
        InputError: a tag without its partner, a tag within a phrase, a phrase without a character.

    Example:
        >>> parse_tags("a <MASK>red</MASK> car")
        ('a red car', [[2, 5, 1]])
    """
    spans: list[Span] = []
    plain, begun = "", -1
    for piece in re.split(f"({re.escape(open)}|{re.escape(close)})", text):
        if piece == open:
            if begun >= 0:
                raise InputError(
                    f"parse_tags: {open} within a phrase, at character {len(plain)} of the text without tags."
                )
            begun = len(plain)
        elif piece == close:
            if begun < 0:
                raise InputError(
                    f"parse_tags: {close} without {open}, at character {len(plain)} of the text without tags."
                )
            if begun == len(plain):
                raise InputError(
                    f"parse_tags: {open}{close} encloses nothing, at character {begun} of the text without tags."
                )
            spans.append([begun, len(plain), len(spans) + 1])
            begun = -1
        else:
            plain += piece
    if begun >= 0:
        raise InputError(f"parse_tags: {open} at character {begun} of the text without tags is never closed.")
    return plain, spans


def masked_pair(row: Mapping[str, Any]) -> dict[str, Any]:
    """Read a row of the authors' data as a pair: question, answer_masked and pred_masked become prompt, chosen and rejected.

    Args:
        row: `question`, `answer_masked`, `pred_masked` with tags; other fields go along, `answer` and `pred` do not.

    Raises:
        InputError: a field is missing, or the answers have different numbers of phrases, or none.

    Example:
        >>> row = {"question": "?", "answer_masked": "<MASK>red</MASK>", "pred_masked": "<MASK>blue</MASK>"}
        >>> masked_pair(row)["rejected"], masked_pair(row)["rejected_spans"]
        ('blue', [[0, 4, 1]])
    """
    needed = ("question", "answer_masked", "pred_masked")
    missing = [name for name in needed if name not in row]
    if missing:
        raise InputError(f"masked_pair reads {', '.join(needed)}, and the row has no {' and no '.join(missing)}.")
    chosen, chosen_spans = parse_tags(row["answer_masked"])
    rejected, rejected_spans = parse_tags(row["pred_masked"])
    if len(chosen_spans) != len(rejected_spans) or not chosen_spans:
        raise InputError(
            f"masked_pair: the answer has {len(chosen_spans)} phrases and the prediction {len(rejected_spans)}; every phrase needs "
            "its counterpart, and there must be one at least."
        )
    rest = {name: value for name, value in row.items() if name not in (*needed, "answer", "pred")}
    return {
        "prompt": row["question"],
        "chosen": chosen,
        "rejected": rejected,
        "chosen_spans": chosen_spans,
        "rejected_spans": rejected_spans,
        **rest,
    }


def with_spans(rows: Iterable[Mapping[str, Any]], align: Aligner = align_spans) -> list[dict[str, Any]]:
    """Mark the differing phrases of pairs.

    Args:
        rows: each with `chosen` and `rejected`.
        align: returns `chosen_spans` and `rejected_spans` of two texts; one of your own may ask a model.

    Example:
        >>> with_spans([{"prompt": "?", "chosen": "a cat", "rejected": "a dog"}])[0]["chosen_spans"]
        [[2, 5, 1]]
    """
    return [{**row, **align(row["chosen"], row["rejected"])} for row in rows]


# ---- spoiling what the model sees ------------------------------------------------------------------------------------


def perturb_frames(
    frames: Tensor,
    mask: tuple[float, float] | None = (0.25, 0.5),
    shuffle: Literal["global", "local"] | None = "local",
    window: int = 4,
    generator: torch.Generator | None = None,
    fill: float = 0.0,
) -> Tensor:
    """Blank some frames of a clip and put the others into another order.

    Args:
        frames: `[time, ...]`, any type.
        mask: share of the frames to blank, drawn uniformly between these two, at least one frame; None blanks none.
        shuffle: "global" over the whole clip, "local" within windows of `window` frames, None keeps the order. "local" together
            with a mask works best according to the authors.
        window: frames of a window, at least 2 (the authors' size is not published).
        generator: the only source of randomness; PyTorch's own where nothing is said.
        fill: what a blank frame holds.

    Raises:
        InputError: shares outside [0, 1] or in the wrong order, an unknown shuffle, a window below 2, or no frame.

    Example:
        >>> clip = torch.arange(1.0, 9.0)
        >>> int((perturb_frames(clip, mask=(0.25, 0.25), shuffle=None) == 0).sum())
        2
    """
    if mask is not None and not 0 <= mask[0] <= mask[1] <= 1:
        raise InputError(f"perturb_frames: mask is (least, most) share of the frames, within [0, 1], and it is {mask}.")
    if shuffle not in ("global", "local", None):
        raise InputError(f"perturb_frames: shuffle is 'global', 'local' or None, and it is {shuffle!r}.")
    if shuffle == "local" and window < 2:
        raise InputError(f"perturb_frames: a window holds at least 2 frames, and it is {window}.")
    if frames.ndim == 0 or not len(frames):
        raise InputError("perturb_frames: frames is [time, ...] with one frame at least.")
    time = len(frames)
    size = window if shuffle == "local" else time
    order = torch.arange(time)
    if shuffle is not None:
        order = torch.cat([part[torch.randperm(len(part), generator=generator)] for part in torch.split(order, size)])
    found = frames[order.to(frames.device)].clone()
    if mask is not None and mask[1] > 0:
        share = mask[0] + (mask[1] - mask[0]) * float(torch.rand((), generator=generator))
        blank = torch.randperm(time, generator=generator)[: max(1, round(share * time))]
        found[blank.to(frames.device)] = fill
    return found


# ---- keeping the wrong answers ---------------------------------------------------------------------------------------


def exact_match(prediction: str, answer: str) -> bool:
    """Say whether two answers are the same words, whatever their case and punctuation.

    >>> exact_match("Yes.", "yes")
    True
    """
    return _plain(prediction) == _plain(answer)


def choice_match(prediction: str, answer: str) -> bool:
    """Say whether two answers name the same letter of a multiple choice; without a letter they must match exactly.

    >>> choice_match("(B) the dog", "B")
    True
    """
    letters = [_CHOICE.match(text.strip()) for text in (prediction, answer)]
    if letters[0] and letters[1]:
        return letters[0][1].upper() == letters[1][1].upper()
    return exact_match(prediction, answer)


def _plain(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


@dataclass(frozen=True)
class Harvest:
    """Pairs made of a model's own mistakes.

    Attributes:
        pairs: rows with `prompt`, `chosen` and `rejected`, and what else the rows held.
        dropped: how many rows each rule left out, by the rule's name.
    """

    pairs: list[dict[str, Any]]
    dropped: dict[str, int]

    def __str__(self) -> str:
        rules = ", ".join(f"{count} {name}" for name, count in self.dropped.items() if count) or "none"
        return f"{len(self.pairs)} pairs; left out: {rules}"


def harvest(
    rows: Sequence[Mapping[str, Any]],
    predictions: Sequence[str],
    correct: Callable[[str, str], bool] = exact_match,
    *,
    length_ratio: float = 3.0,
    refusals: str | None = r"(?i)^\W*(i'?m sorry|i cannot|i can't|as an ai)",
) -> Harvest:
    """Keep a model's wrong answers beside the true ones.

    A row is left out where the prediction is empty, is right, is a refusal, has more than `length_ratio` times the words of the
    answer or less than a part of that, or repeats a pair that was kept.

    Args:
        rows: each with `question` and `answer`, the true one.
        predictions: what the model said to the spoiled input, one a row.
        correct: judges a prediction; `exact_match`, `choice_match`, or your own (a judge model for open questions).
        length_ratio: at least 1.
        refusals: pattern of predictions that say nothing; None keeps them.

    Raises:
        InputError: not one prediction a row, a row without its fields, or a length ratio below 1.

    Example:
        >>> rows = [{"question": "Which digit?", "answer": "a three"}, {"question": "Which?", "answer": "two"}]
        >>> print(harvest(rows, ["a nine", "Two."]))
        1 pairs; left out: 1 right
    """
    if len(rows) != len(predictions):
        raise InputError(f"harvest: {len(rows)} rows need one prediction each, and there are {len(predictions)}.")
    if length_ratio < 1:
        raise InputError(f"harvest: length_ratio must be at least 1, and it is {length_ratio}.")
    dropped = dict.fromkeys(("empty", "right", "refusal", "length", "repeated"), 0)
    seen: set[tuple[str, str, str]] = set()
    pairs: list[dict[str, Any]] = []
    for number, (row, prediction) in enumerate(zip(rows, predictions, strict=True)):
        if "question" not in row or "answer" not in row:
            raise InputError(
                f"harvest: row {number} needs 'question' and 'answer', and it has {', '.join(row) or 'nothing'}."
            )
        key = (str(row["question"]), str(row["answer"]), prediction)
        reason = _reason(prediction, row["answer"], correct, length_ratio, refusals) or (
            "repeated" if key in seen else ""
        )
        if reason:
            dropped[reason] += 1
            continue
        seen.add(key)
        rest = {name: value for name, value in row.items() if name not in ("question", "answer")}
        pairs.append({"prompt": row["question"], "chosen": row["answer"], "rejected": prediction, **rest})
    return Harvest(pairs, dropped)


def _reason(
    prediction: str, answer: str, correct: Callable[[str, str], bool], length_ratio: float, refusals: str | None
) -> str:
    words, expected = len(_plain(prediction)), max(1, len(_plain(answer)))
    if not words:
        return "empty"
    if correct(prediction, answer):
        return "right"
    if refusals is not None and re.search(refusals, prediction):
        return "refusal"
    return "" if 1 / length_ratio <= words / expected <= length_ratio else "length"
