"""Rewards without preference data: relevance, kept honest by length, repetition and the type of the query (R3).

    reward = r3_reward(encoder)
    reward(queries, responses, references, types)         # float [batch]
    print(reward.last)                                     # what each factor was worth

Relevance alone is won by copying the query, times length by repeating it, times variety by answers that go on; each
factor closes one shortcut, and the reference closes the last where there is one right answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from poise.errors import InputError, QuantityError
from poise.parts.text_counts import TokenTable, words
from poise.parts.text_encoders import Encoder, encode
from poise.terms.reward_algebra import Answers, Branch, Breakdown, Feature, Reward, _Outcome, leaf

__all__ = [
    "CONSTRAINED",
    "OPEN_ENDED",
    "Answers",
    "Breakdown",
    "Feature",
    "LengthIncentive",
    "Relevance",
    "RepetitionPenalty",
    "Reward",
    "Stripping",
    "Toxicity",
    "ngram_uniqueness",
    "r3_reward",
    "relevance_range",
    "words",
]

OPEN_ENDED, CONSTRAINED = "open-ended", "constrained"


def ngram_uniqueness(tokens: Sequence[str], n: int = 3) -> float:
    """Different n-grams over all n-grams; 1 where there are fewer than n tokens.

    Example:
        >>> ngram_uniqueness("a b a b a b".split(), n=2)
        0.4
    """
    count = len(tokens) - n + 1
    if count < 1:
        return 1.0
    return len(set(zip(*(tokens[i:] for i in range(n)), strict=False))) / count


@dataclass(frozen=True)
class Stripping:
    r"""Cut an answer where the model went on to play the next turn or to pad.

    The answer ends before the first role prefix or stop pattern, all taken literally, and loses line breaks and blanks at
    both ends.

    Args:
        roles: prefixes of turns, as the prompt template writes them.
        stops: patterns that end an answer.

    Example:
        >>> Stripping()("Yes.\n\nHuman: and then?")
        'Yes.'

    Source: naver-ai/rethinking-proxy-reward, reward_model.py.
    """

    roles: tuple[str, ...] = ("Human:", "Assistant:")
    stops: tuple[str, ...] = ("\n\n\n\n", "\n\n--", "\n\n____")

    def __post_init__(self) -> None:
        object.__setattr__(self, "_marks", (*self.roles, *self.stops))
        patterns = [re.escape(text) for text in (*self.roles, *self.stops)]
        # `(?!)` matches nowhere.
        object.__setattr__(self, "_pattern", re.compile("|".join(patterns) or "(?!)"))

    def __call__(self, text: str) -> str:
        pattern: re.Pattern[str] = self._pattern  # type: ignore[attr-defined]
        text = text.strip("\n ")
        # Most answers hold none of them, which a search for plain text finds out twice as fast.
        if not any(mark in text for mark in self._marks):  # type: ignore[attr-defined]
            return text
        return pattern.split(text, maxsplit=1)[0].strip("\n ")


STRIPPING = Stripping()


def _tokens(answers: Answers, strip: Callable[[str], str] | None, reader: str) -> TokenTable:
    def compute() -> TokenTable:
        texts = answers.texts("response", reader)
        return TokenTable(texts if strip is None else [strip(text) for text in texts])

    result: TokenTable = answers.once(("tokens", strip), compute)
    return result


@dataclass
class LengthIncentive(Reward):
    """Longer answers are worth more: LI = tokens / per.

    Args:
        per: tokens that are worth 1, > 0.
        strip: cuts the answer before counting; None counts all of it.
        name: in reports.

    Example:
        >>> LengthIncentive()(["the cat sat on the mat. the cat sat on the mat."])
        tensor([0.1400])

    Source: arXiv:2402.03469, section 3.
    """

    per: float = 100
    strip: Callable[[str], str] | None = STRIPPING
    name: str = "length_incentive"

    def __post_init__(self) -> None:
        if not self.per > 0:
            raise InputError(f"length_incentive: per must be positive, and it is {self.per}.")

    @property
    def reads(self) -> tuple[str, ...]:
        return ("response",)

    def evaluate(self, answers: Answers) -> _Outcome:
        return leaf(self, torch.from_numpy(_tokens(answers, self.strip, self.name).counts).double() / self.per)


@dataclass
class RepetitionPenalty(Reward):
    """Answers that repeat themselves are worth less: RP = different n-grams / n-grams, 1 below n tokens.

    Args:
        n: tokens of an n-gram, >= 1.
        strip: cuts the answer before counting; None counts all of it.
        name: in reports.

    Example:
        >>> RepetitionPenalty()(["the cat sat on the mat. the cat sat on the mat."])
        tensor([0.5833])

    Source: arXiv:2402.03469, section 3.
    """

    n: int = 3
    strip: Callable[[str], str] | None = STRIPPING
    name: str = "repetition_penalty"

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InputError(f"repetition_penalty: n must be at least 1, and it is {self.n}.")

    @property
    def reads(self) -> tuple[str, ...]:
        return ("response",)

    def evaluate(self, answers: Answers) -> _Outcome:
        return leaf(self, torch.from_numpy(_tokens(answers, self.strip, self.name).uniqueness(self.n)))


@dataclass
class Relevance(Reward):
    """Closeness of an answer to its query or to a reference answer: <M(x), M(y)>, not normalised.

    Row-wise dot products, O(batch x d); each different text is encoded once, in batches of like length. The scale belongs to
    the encoder, and a dot product may be negative: in a product, longer and more varied answers are then punished more, and
    an empty one, worth 0, wins. `floor=0` rules that out.

    Args:
        encoder: any callable list[str] -> float [n, d].
        against: "query", or "reference".
        floor: values below are raised to it; None leaves them.
        batch_size: texts handed to the encoder at once.
        name: in reports; `relevance_query` or `relevance_reference` by default.

    Source: arXiv:2402.03469, section 3, with facebook/contriever as the encoder.
    """

    encoder: Encoder
    against: Literal["query", "reference"] = "query"
    floor: float | None = None
    batch_size: int = 64
    name: str = ""

    def __post_init__(self) -> None:
        if self.against not in ("query", "reference"):
            raise InputError(f"relevance: against is 'query' or 'reference'; got {self.against!r}.")
        if not callable(self.encoder):
            raise InputError(f"relevance: the encoder must be a callable list[str] -> [n, d]; got {self.encoder!r}.")
        self.name = self.name or f"relevance_{self.against}"

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.against, "response")

    def evaluate(self, answers: Answers) -> _Outcome:
        if self.against == "reference":
            self._refuse_absent(answers)
        x, y = self._states(answers, self.against), self._states(answers, "response")
        if x.shape[1] != y.shape[1]:
            raise QuantityError(
                f"{self.name}: the encoder gave {x.shape[1]} dimensions for the {self.against} and {y.shape[1]} for the response."
            )
        values = (x * y).sum(dim=1)
        return leaf(self, values if self.floor is None else values.clamp(min=self.floor))

    def _states(self, answers: Answers, column: str) -> Tensor:
        def compute() -> Tensor:
            return encode(self.encoder, answers.texts(column, self.name), self.batch_size)

        states: Tensor = answers.once(("states", id(self.encoder), self.batch_size, column), compute)
        return states

    def _refuse_absent(self, answers: Answers) -> None:
        entries = answers.columns.get("reference", [None] * answers.size)
        for i, text in enumerate(entries):
            if text is None or (isinstance(text, str) and not text.strip()):
                raise QuantityError(
                    f"{self.name}: the query of answer {i} has no reference, and its reward is measured against one. Give the "
                    "reference of every constrained query, or make the query open-ended."
                )


@dataclass
class Toxicity(Reward):
    """A hook for a classifier of harm: 1 - p, or 0 from a threshold on, so that a toxic answer earns nothing.

    In a product with a negative relevance, a factor below 1 is a gain; give the relevance `floor=0` then.

    Args:
        probability: list of responses -> p in [0, 1] for each, from any classifier.
        threshold: from this p on the factor is 0; None never.
        name: in reports.

    Example:
        >>> Toxicity(lambda texts: [0.9 if "damn" in t else 0.0 for t in texts], threshold=0.5)(["fine", "damn"])
        tensor([1., 0.])
    """

    probability: Callable[[list[str]], Any]
    threshold: float | None = None
    name: str = "toxicity"

    @property
    def reads(self) -> tuple[str, ...]:
        return ("response",)

    def evaluate(self, answers: Answers) -> _Outcome:
        texts = answers.texts("response", self.name)
        p = torch.as_tensor(self.probability(texts), dtype=torch.float64).detach()
        if p.shape != (answers.size,) or bool(((p < 0) | (p > 1)).any()):
            raise QuantityError(
                f"{self.name}: expected a probability in [0, 1] for each of {answers.size} answers, and the classifier gave "
                f"shape {list(p.shape)}, from {float(p.min()):g} to {float(p.max()):g}."
            )
        kept = 1 - p
        return leaf(self, kept if self.threshold is None else torch.where(p >= self.threshold, 0.0, kept))


def relevance_range(
    encoder: Encoder,
    references: Sequence[str],
    responses: Sequence[str] | None = None,
    quantile: float = 0.99,
    batch_size: int = 64,
) -> tuple[float, float]:
    """The input range of F for an encoder: from 0 to a high quantile of <M(y), M(y')>.

    Args:
        encoder: any callable list[str] -> float [n, d].
        references: reference answers y.
        responses: one answer y' to the query of each reference, from the model to be trained; without them pairs of
            different references count, which gives a smaller range, since they answer different queries.
        quantile: in (0, 1].

    Raises:
        InputError: the quantile is not positive, so that no range can be fitted.

    Example:
        >>> relevance_range(lambda texts: [[float(len(t))] for t in texts], ["a", "aa"], quantile=1.0)
        (0.0, 2.0)
    """
    if not 0 < quantile <= 1:
        raise InputError(f"relevance_range: quantile lies in (0, 1], and it is {quantile}.")
    y = encode(encoder, references, batch_size)
    if responses is not None:
        if len(responses) != len(references):
            raise InputError(f"relevance_range: {len(references)} references came with {len(responses)} responses.")
        products = (y * encode(encoder, responses, batch_size)).sum(dim=1)
    else:
        if len(references) < 2:
            raise InputError("relevance_range: give two references or more, or the responses to them.")
        # Pairs at a few distances stand for all n (n - 1) / 2.
        shifts = range(1, min(len(references), 33))
        products = torch.cat([(y * y.roll(shift, 0)).sum(dim=1) for shift in shifts])
    high = float(torch.quantile(products, quantile)) if len(products) < 2**24 else float(products.max())
    if not high > 0:
        raise InputError(
            f"relevance_range: the {quantile:g} quantile is {high:g}; F needs a positive one. Give related texts, or a range."
        )
    return (0.0, high)


def r3_reward(
    encoder: Encoder,
    max_length: int = 512,
    input_range: tuple[float, float] = (0.0, 3.5),
    per: float = 100,
    n: int = 3,
    query_type: str | Callable[[list[str]], list[str]] = "type",
    types: tuple[str, str] = (OPEN_ENDED, CONSTRAINED),
    strip: Callable[[str], str] | None = STRIPPING,
    floor: float | None = None,
    batch_size: int = 64,
) -> Branch:
    """The regularised relevance reward.

    R = r_x LI RP       if the query is open-ended,       r_x = <M(x), M(y)>
    R = F(r_y) RP       if it is constrained,             r_y = <M(reference), M(y)>
    F maps input_range linearly onto [0, max_length / per], not clipped, so that both branches have one scale.

    Args:
        encoder: any callable list[str] -> float [n, d], M.
        max_length: tokens of the longest answer.
        input_range: 0 to what r_y reaches. 3.5 belongs to Contriever; `relevance_range` fits it for another encoder.
        per: tokens that are worth 1 in LI.
        n: tokens of an n-gram in RP.
        query_type: the column of types, or a classifier of queries (`poise.parts.query_types`).
        types: the labels of open-ended and of constrained queries; the authors' data have ("OPENENDED", "CONSTRAINED").
        strip: cuts answers before tokens and n-grams are counted.
        floor: lower bound of both relevances; the paper has none.
        batch_size: texts handed to the encoder at once.

    Reads: query, response, type; reference where a query is constrained.

    Source: Kim and Seo 2024, arXiv:2402.03469, section 3; naver-ai/rethinking-proxy-reward.
    """
    if max_length < 1:
        raise InputError(f"r3_reward: max_length must be at least 1, and it is {max_length}.")
    r_x = Relevance(encoder, "query", floor, batch_size)
    r_y = Relevance(encoder, "reference", floor, batch_size)
    li, rp = LengthIncentive(per, strip), RepetitionPenalty(n, strip)
    f = r_y.mapped(input_range, (0.0, max_length / per))
    open_ended, constrained = types
    return Reward.branch(query_type, {open_ended: r_x * li * rp, constrained: f * rp})
