"""Which shortcut a reward would pay: adversarial answers scored before training, and proxy against gold after it.

    audit = audit_reward(reward, audit_cases(queries, answers))
    print(audit)                       # what wins, in words
    audit.frame()                      # the same as a table
    monotonicity(proxy, gold)          # over checkpoints: does the true reward rise where the trained one does?

An optimiser finds what a reward pays for. For each query the audit asks which of the true answer, the query copied,
the query repeated, a long answer to other questions, the answer twice, and no answer at all earns most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from poise.errors import InputError, NonFiniteError
from poise.terms.reward_algebra import Reward, as_reward
from poise.terms.rewards import ngram_uniqueness, words

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "AnswerMetrics",
    "AuditCase",
    "Monotonicity",
    "RewardAudit",
    "answer_metrics",
    "audit_cases",
    "audit_reward",
    "closed_accuracy",
    "copy_rate",
    "monotonicity",
]

ANSWER, DOUBLED = "answer", "doubled"
HONEST = (ANSWER, DOUBLED)
"""Candidates that answer the query; all others are shortcuts."""
MEANINGS = {
    ANSWER: "the true answer",
    "copy": "the query copied",
    "repeat": "the query repeated",
    "off_topic": "a long answer to other questions",
    DOUBLED: "the true answer twice",
    "empty": "no answer",
}


@dataclass(frozen=True)
class AuditCase:
    """One query and the answers that compete for it.

    Args:
        query: the question.
        candidates: name -> answer; "answer" is the true one.
        reference: the reference answer, or None.
        type: the type of the query, or None.
        columns: other columns that the reward reads.
    """

    query: str
    candidates: Mapping[str, str]
    reference: str | None = None
    type: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


def audit_cases(
    queries: Sequence[str],
    answers: Sequence[str],
    types: Sequence[str] | None = None,
    repeats: int = 20,
    others: int = 4,
    extra: Mapping[str, Callable[[str, str], str]] | None = None,
) -> list[AuditCase]:
    """Build the adversarial answers: copy, repeat, off-topic, doubled and empty, next to the true answer.

    Args:
        queries: n questions.
        answers: their true answers, which also serve as references.
        types: their types, where the reward has branches.
        repeats: how often `repeat` says the query.
        others: how many other answers make up `off_topic`; at most n - 1.
        extra: more candidates, name -> function of (query, answer).

    Raises:
        InputError: the lists differ in length, or there are too few answers to make an off-topic one.

    Example:
        >>> audit_cases(["2 + 2?", "sky?"], ["4", "blue"], others=1)[0].candidates["off_topic"]
        'blue'
    """
    if len(queries) != len(answers) or (types is not None and len(types) != len(queries)):
        raise InputError(f"audit_cases: {len(queries)} queries came with {len(answers)} answers; give one for each.")
    if len(answers) < 2 or others < 1 or repeats < 1:
        raise InputError("audit_cases: an off-topic answer needs two queries or more, others >= 1 and repeats >= 1.")
    n = len(answers)
    # Steps of a third of the list: neighbours often come from one page and share its topic.
    stride = next(s for s in range(max(1, n // 3), 0, -1) if (s * min(others, n - 1)) < n or s == 1)
    cases = []
    for i, (query, answer) in enumerate(zip(queries, answers, strict=True)):
        foreign = [answers[(i + stride * k) % n] for k in range(1, min(others, n - 1) + 1)]
        candidates = {
            ANSWER: answer,
            "copy": query,
            "repeat": " ".join([query] * repeats),
            "off_topic": " ".join(foreign),
            DOUBLED: f"{answer} {answer}",
            "empty": "",
            **{name: make(query, answer) for name, make in (extra or {}).items()},
        }
        cases.append(AuditCase(query, candidates, answer, types[i] if types is not None else None))
    return cases


@dataclass(frozen=True)
class RewardAudit:
    """What a reward pays for.

    Args:
        name: the reward in words.
        rewards: candidate -> float64 [cases], NaN where a case lacks the candidate.
        won: candidate -> share of the cases in which it earns most; ties are split.
        factors: candidate -> factor -> its mean.
        elasticity: candidate -> factor -> its mean elasticity d log R / d log f.
    """

    name: str
    rewards: dict[str, Tensor]
    won: dict[str, float]
    factors: dict[str, dict[str, float]]
    elasticity: dict[str, dict[str, float]]

    @property
    def honest(self) -> float:
        """Share of the cases won by the true answer, once or twice said."""
        return sum(self.won.get(name, 0.0) for name in HONEST)

    @property
    def winner(self) -> str:
        """The candidate that wins most cases."""
        return max(self.won, key=lambda name: self.won[name])

    @property
    def shortcut(self) -> str | None:
        """The shortcut that wins most cases; None where none wins any."""
        shortcuts = {name: share for name, share in self.won.items() if name not in HONEST and share > 0}
        return max(shortcuts, key=lambda name: shortcuts[name]) if shortcuts else None

    @property
    def negative(self) -> float:
        """Share of the true answers with a negative reward; where it is high, saying nothing is the better answer."""
        return float((self.rewards[ANSWER] < 0).double().mean())

    def frame(self) -> pd.DataFrame:
        """One row for each candidate: share won, mean reward, mean of every factor."""
        import pandas as pd

        rows = {
            name: {"won": self.won[name], "reward": float(values.nanmean()), **self.factors[name]}
            for name, values in self.rewards.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index")

    def __str__(self) -> str:
        lines = [f"{self.name}: the true answer, once or twice, wins {self.honest:.1%} of {self._cases} queries."]
        for name in sorted(self.won, key=lambda key: -self.won[key]):
            meaning = MEANINGS.get(name, name)
            factors = ", ".join(f"{key} {value:.3g}" for key, value in self.factors[name].items() if value == value)
            lines.append(f"  {self.won[name]:6.1%}  {meaning} ({name}): {factors}")
        if self.shortcut is not None and self.won[self.shortcut] > 0.1:
            lines.append(
                f"An optimiser would find {self.shortcut!r}: {MEANINGS.get(self.shortcut, self.shortcut)} earns most on "
                f"{self.won[self.shortcut]:.1%} of the queries."
            )
        if self.negative > 0.05:
            lines.append(
                f"{self.negative:.1%} of the true answers earn less than 0, which is what an empty one earns in a product; "
                "floor=0 in the relevance prevents it."
            )
        return "\n".join(lines)

    @property
    def _cases(self) -> int:
        return len(self.rewards[ANSWER])


def audit_reward(reward: Reward | Callable[..., Any], cases: Sequence[AuditCase]) -> RewardAudit:
    """Score every candidate of every case, and say which of them the reward pays most.

    Args:
        reward: a `Reward`, or a function of columns.
        cases: from `audit_cases`, or your own.

    Raises:
        InputError: no case, or a case without the candidate "answer".
        NonFiniteError: a NaN reward.

    Example:
        >>> from poise.terms.rewards import LengthIncentive
        >>> audit_reward(LengthIncentive(), audit_cases(["a b?", "c d?"], ["one two three", "four"])).winner
        'repeat'
    """
    if not cases:
        raise InputError("audit_reward: there is no case; `audit_cases(queries, answers)` builds them.")
    if any(ANSWER not in case.candidates for case in cases):
        raise InputError("audit_reward: every case needs a candidate 'answer', the true one.")
    scored = as_reward(reward)
    places = [(i, name) for i, case in enumerate(cases) for name in case.candidates]
    found = scored.explain([_record(cases[i], name) for i, name in places])
    names = list(dict.fromkeys(name for _, name in places))
    column = {name: j for j, name in enumerate(names)}
    index = torch.tensor([[i, column[name]] for i, name in places])

    def table(values: Tensor) -> Tensor:
        grid = torch.full((len(cases), len(names)), torch.nan, dtype=torch.float64)
        grid[index[:, 0], index[:, 1]] = values.double().cpu()
        return grid

    grid = table(found.reward)
    if not grid.nan_to_num(0.0).isfinite().all():
        raise NonFiniteError(f"audit_reward: {scored} is not finite.")
    return RewardAudit(
        name=str(scored),
        rewards={name: grid[:, j] for name, j in column.items()},
        won=dict(zip(names, _shares_won(grid), strict=True)),
        factors=_means(found.factors, table, names),
        elasticity=_means(found.elasticity, table, names),
    )


def _record(case: AuditCase, name: str) -> dict[str, Any]:
    return {
        "query": case.query,
        "response": case.candidates[name],
        "reference": case.reference,
        "type": case.type,
        **case.columns,
    }


def _shares_won(grid: Tensor) -> list[float]:
    best = grid.nan_to_num(-torch.inf).amax(dim=1, keepdim=True)
    winners = (grid == best).double()
    shares: list[float] = (winners / winners.sum(dim=1, keepdim=True)).mean(dim=0).tolist()
    return shares


def _means(
    factors: Mapping[str, Tensor], table: Callable[[Tensor], Tensor], names: Sequence[str]
) -> dict[str, dict[str, float]]:
    means = {key: table(values).nanmean(dim=0).tolist() for key, values in factors.items()}
    return {name: {key: row[j] for key, row in means.items()} for j, name in enumerate(names)}


def copy_rate(query: str, response: str) -> float:
    """Share of the query that stands in the response, in order: longest common subsequence of words / words of the query.

    Args:
        query, response: texts; case does not matter.

    Returns: in [0, 1]; 0 for an empty query.

    Example:
        >>> copy_rate("what is the sky", "The blue sky")
        0.5
    """
    x, y = words(query.lower()), words(response.lower())
    return _longest_common(x, y) / len(x) if x else 0.0


def _longest_common(x: Sequence[str], y: Sequence[str]) -> int:
    """Length of the longest common subsequence; a row of the table is one integer (Hyyro 2004)."""
    where: dict[str, int] = {}
    for i, token in enumerate(x):
        where[token] = where.get(token, 0) | 1 << i
    everything = (1 << len(x)) - 1
    row = everything
    for token in y:
        matched = row & where.get(token, 0)
        row = ((row + matched) | (row - matched)) & everything
    return len(x) - row.bit_count()


def closed_accuracy(responses: Sequence[str], references: Sequence[str]) -> float:
    """Share of closed questions answered: the words of the reference stand together in the response. The alignment tax.

    Example:
        >>> closed_accuracy(["It is Paris.", "I like Rome, and cheese."], ["paris", "Bern"])
        0.5
    """
    if len(responses) != len(references) or not references:
        raise InputError(
            f"closed_accuracy: {len(responses)} responses came with {len(references)} references; give one for each."
        )
    # Framed by blanks, so that "art" is not found in "cart".
    framed = [
        (f" {' '.join(words(a.lower()))} ", f" {' '.join(words(b.lower()))} ")
        for a, b in zip(responses, references, strict=True)
    ]
    return fmean(b in a for a, b in framed)


@dataclass(frozen=True)
class AnswerMetrics:
    """What answers look like, on average.

    Args:
        tokens: words and marks in an answer.
        uniqueness: different trigrams / trigrams.
        copied: share of the query found in the answer, in order.
        relevance: mean of the relevance that was given, or NaN.
    """

    tokens: float
    uniqueness: float
    copied: float
    relevance: float = torch.nan


def answer_metrics(queries: Sequence[str], responses: Sequence[str], relevance: Reward | None = None) -> AnswerMetrics:
    """Length, trigram uniqueness, copy rate and, with a relevance against the query, its mean.

    Example:
        >>> answer_metrics(["what is it"], ["it is what it is"]).tokens
        5.0
    """
    if len(queries) != len(responses) or not responses:
        raise InputError(f"answer_metrics: {len(queries)} queries came with {len(responses)} responses.")
    tokens = [words(text) for text in responses]
    return AnswerMetrics(
        tokens=fmean(map(len, tokens)),
        uniqueness=fmean(map(ngram_uniqueness, tokens)),
        copied=fmean(map(copy_rate, queries, responses)),
        relevance=torch.nan if relevance is None else float(relevance(list(queries), list(responses)).mean()),
    )


@dataclass(frozen=True)
class Monotonicity:
    """Whether the gold reward rises where the proxy does.

    Args:
        spearman: rank correlation of proxy and gold over checkpoints; NaN where one of them is constant.
        gained: gold at the last checkpoint less gold at the first.
        overoptimised: gold's best checkpoint less its last, >= 0: what training past the peak cost.
        peak: the checkpoint at which gold was best, from 0.
    """

    spearman: float
    gained: float
    overoptimised: float
    peak: int

    def __str__(self) -> str:
        return (
            f"Spearman {self.spearman:.2f} between proxy and gold; gold changed by {self.gained:+.3g} and was best at checkpoint "
            f"{self.peak}, {self.overoptimised:.3g} above the last"
        )


def monotonicity(proxy: Sequence[float], gold: Sequence[float]) -> Monotonicity:
    """Compare the trained reward with a gold one over checkpoints, in the order of training.

    Example:
        >>> monotonicity([1, 2, 3, 4], [0.1, 0.2, 0.4, 0.3]).spearman
        0.8
    """
    from scipy.stats import spearmanr

    if len(proxy) != len(gold) or len(gold) < 3:
        raise InputError(
            f"monotonicity: expected proxy and gold of the same three checkpoints or more; got {len(proxy)} and {len(gold)}."
        )
    constant = len(set(proxy)) == 1 or len(set(gold)) == 1
    rank = torch.nan if constant else float(spearmanr(proxy, gold).statistic)
    peak = max(range(len(gold)), key=lambda i: gold[i])
    return Monotonicity(round(rank, 12), gold[-1] - gold[0], gold[peak] - gold[-1], peak)
