"""A language task with verifiable rewards: a small model adds two digits, and may be right, brief and well laid out.

    3+4=7          brief
    3+4=[7]        boxed
    3+4=3.4.[7]    worked: both numbers listed, the answer boxed

    prior = fit_addition(seed=0)                       # a `WordModel` that learnt all three ways, wrong in part; seconds
    stream = OnPolicy(addition_prompts(), answer, score_additions, samples=8, batch_size=16)
    poise.fit(prior, "rloo(reward=0.5*score.on(reward='accuracy').named('accuracy') + ...)", {"main": stream}, readout=WordReadout())

The model is that of `poise.tasks.words`, whose letters stand for digits and signs. Rewards, all to be maximised: `accuracy` (the
last number is the sum), `format` (boxed, two numbers listed before), `brevity` (linear in the tokens of the answer). Format
takes eight tokens and brevity wants two: they pull apart, and both meet accuracy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import InputError
from poise.quantities import derive
from poise.streams import Batch
from poise.tasks.words import LETTERS, SYMBOLS, WordModel, WordReadout, answer, decode, encode, mask_of
from poise.training import fit

__all__ = [
    "REWARD_NAMES",
    "RunningConciseness",
    "addition_prompts",
    "additions",
    "answer",
    "fit_addition",
    "measure_additions",
    "read",
    "score_additions",
    "spell",
]

SIGNS = "0123456789+=[]."
_TO_LETTERS = str.maketrans(SIGNS, SYMBOLS[: len(SIGNS)])
_TO_SIGNS = str.maketrans(SYMBOLS[: len(SIGNS)], SIGNS)
_ANSWER = re.compile(r"(\d{1,3})\]?")
_WORKED = re.compile(r"\d\.\d\.\[\d+\]")
PROMPT = 4
"""Letters of a prompt, `3+4=`."""
LONGEST = LETTERS - PROMPT + 1
"""Tokens of an answer at most, its end included."""
REWARD_NAMES = ("accuracy", "brevity", "format")


def spell(texts: list[str], end: bool = True) -> Tensor:
    """Return ids int64 [n, 13] of additions: digits and signs spelt in the letters of `poise.tasks.words`.

    Raises:
        InputError: another sign, or more than 12 of them.
    """
    strange = set("".join(texts)) - set(SIGNS)
    if strange:
        raise InputError(f"additions are written with {SIGNS!r}, and these have {''.join(sorted(strange))!r}.")
    return encode([text.translate(_TO_LETTERS) for text in texts], end)


def read(ids: Tensor) -> list[str]:
    """Return the additions that ids int64 [n, time] spell.

    >>> read(spell(["3+4=[7]"]))
    ['3+4=[7]']
    """
    return [word.translate(_TO_SIGNS) for word in decode(ids)]


def addition_prompts() -> dict[str, Tensor]:
    """Return all 100 sums of two digits: `prompt_ids` int64 [100, 13] and `total` int64 [100]."""
    pairs = [(a, b) for a in range(10) for b in range(10)]
    return {
        "prompt_ids": spell([f"{a}+{b}=" for a, b in pairs], end=False),
        "total": torch.tensor([a + b for a, b in pairs]),
    }


def additions(n: int, seed: int = 0, mistakes: float = 0.4) -> list[str]:
    """Write additions as a mixed corpus would: brief, boxed or worked, and a share of them wrong.

    Args:
        n: how many.
        seed: decides them.
        mistakes: share of wrong sums, in [0, 1].
    """
    random, texts = Random(f"additions, {seed}"), []
    for _ in range(n):
        a, b = random.randrange(10), random.randrange(10)
        total = a + b
        if random.random() < mistakes:
            total = max(0, total + random.choice((-3, -2, -1, 1, 2, 3)))
        shown = random.choices((f"{total}", f"[{total}]", f"{a}.{b}.[{total}]"), (0.35, 0.3, 0.35))[0]
        texts.append(f"{a}+{b}={shown}")
    return texts


def fit_addition(seed: int = 0, *, hidden: int = 64, steps: int = 400) -> WordModel:
    """Return a `WordModel` that has learnt the mixed corpus: right in about half of its answers.

    Args:
        seed: of weights, corpus and order.
        hidden: size of its two layers.
        steps: of Adam on 128 additions each.
    """
    model, ids = WordModel(hidden=hidden, seed=seed), spell(additions(12_000, seed))
    answers = mask_of(ids)
    answers[:, :PROMPT] = False
    fit(
        model, "sft", {"response_ids": ids, "response_mask": answers}, readout=WordReadout(), solver="adam", lr=4e-3, clip=1.0,
        steps=steps, batch_size=128, device="cpu", seed=seed,
    )  # fmt: skip
    return model.eval()


def score_additions(batch: Batch) -> dict[str, Tensor]:
    """Return `accuracy`, `brevity`, `format` and the number of tokens `length` of answers, float [rows].

    brevity = 1 - (length - 2) / 7,  so that one digit and an end are worth 1, and the longest answer 0

    Args:
        batch: `response_ids` and `response_mask` [rows, 13], `total` int64 [rows].

    >>> ids = spell(["3+4=7", "3+4=3.4.[7]"])
    >>> batch = {"response_ids": ids, "response_mask": mask_of(ids), "total": torch.tensor([7, 7])}
    >>> {name: column.tolist() for name, column in score_additions(batch).items() if name != "brevity"}
    {'accuracy': [1.0, 1.0], 'format': [0.0, 1.0], 'length': [2.0, 8.0]}
    """
    shown = [text.partition("=")[2] for text in read(batch["response_ids"])]
    said = [_ANSWER.fullmatch(text.rpartition(".")[2].lstrip("[")) for text in shown]
    right = [
        match is not None and int(match[1]) == total for match, total in zip(said, batch["total"].tolist(), strict=True)
    ]
    mask = batch["response_mask"].clone()
    mask[:, :PROMPT] = False
    length = mask.sum(1).float()
    return {
        "accuracy": torch.tensor(right).float(),
        "brevity": (1 - (length - 2) / (LONGEST - 2)).clamp(0, 1),
        "format": torch.tensor([_WORKED.fullmatch(text) is not None for text in shown]).float(),
        "length": length,
    }


class RunningConciseness:
    """The published brevity: 1 for an answer shorter than the mean of all answers so far, those of its own batch included.

    Args:
        score: gives `length` among its columns; `brevity` is replaced.

    It remembers lengths, so a run that resumes needs its state: hand it to `fit` as a callback.
    """

    def __init__(self, score: Callable[[Batch], Mapping[str, Tensor]] = score_additions) -> None:
        self.score, self.total, self.answers = score, 0.0, 0

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Score answers after their lengths have entered the mean."""
        columns = dict(self.score(batch))
        length = columns["length"]
        self.total, self.answers = self.total + float(length.sum()), self.answers + len(length)
        return {**columns, "brevity": (length < self.total / self.answers).float()}

    def state_dict(self) -> dict[str, Any]:
        """Return the sum of lengths and their number."""
        return {"total": self.total, "answers": self.answers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.total, self.answers = float(state["total"]), int(state["answers"])


def measure_additions(model: nn.Module, seed: int, samples: int = 1) -> dict[str, float]:
    """Return mean scores of sampled answers to all prompts by name: `accuracy`, `brevity`, `format`, `length`.

    Args:
        samples: answers to each prompt.
        seed: decides the answers.
    """
    prompts = {name: column.repeat_interleave(samples, 0) for name, column in addition_prompts().items()}
    generator = torch.Generator().manual_seed(derive(seed, "measure"))
    with torch.no_grad():
        scored = score_additions({**prompts, **answer(model, prompts, generator)})
    return {name: float(column.mean()) for name, column in scored.items()}
