"""How rewards of answers compose: products, sums and branches of features, with every factor kept for the report.

A reward is a callable on a batch of answers, given as lists of strings or as records, and returns one number for each:

    reward = Relevance(encoder) * LengthIncentive() * RepetitionPenalty()        # or Reward.product(...)
    reward(queries, responses)                                                   # float [batch]
    reward([{"query": "...", "response": "..."}, ...])                           # the same from records
    reward.last                                                                  # every factor's value and elasticity

In a sum, one large feature buys off all others; in a product a factor near zero cancels the rest, which is why shortcuts
that a sum rewards lose in a product. A plain function joins in by the names of its parameters: `def brief(response)`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from poise.errors import InputError, NonFiniteError, QuantityError, nearest

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Answers", "Branch", "Breakdown", "Feature", "Mapped", "Product", "Reward", "Sum"]

COLUMNS = ("query", "response", "reference", "type")
REST = "(rest)"


class Answers:
    """A batch of answers in columns: `response`, and as needed `query`, `reference`, `type` and others.

    Args:
        columns: name -> one entry for each answer; None stands for an entry that is missing.
    """

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        for name, values in columns.items():
            if isinstance(values, str):
                raise QuantityError(f"reward: {name} is one string; expected a list of strings, one for each answer.")
        sizes = {name: len(values) for name, values in columns.items()}
        if len(set(sizes.values())) > 1:
            raise QuantityError(f"reward: the columns differ in length: {sizes}. Give one entry for each answer.")
        self.columns = dict(columns)
        self.size = next(iter(sizes.values()), 0)
        self._known: dict[Any, Any] = {}

    @classmethod
    def of(cls, given: Sequence[Any] | None, columns: Mapping[str, Any]) -> Answers:
        """Read records, or columns; a list of strings that comes alone is the responses."""
        if given is not None and len(given) and all(isinstance(row, Mapping) for row in given):
            if any(values is not None for values in columns.values()):
                raise QuantityError("reward: records hold every column already; give either records or columns.")
            names = dict.fromkeys(name for row in given for name in row)
            return cls({name: [row.get(name) for row in given] for name in names})
        named = {name: values for name, values in columns.items() if values is not None}
        if given is not None:
            named = {"query" if "response" in named else "response": given, **named}
        return cls(named)

    def entries(self, name: str, reader: str) -> Sequence[Any]:
        """A column as it is; `reader` is who asks, for the message."""
        if name not in self.columns:
            has = ", ".join(self.columns) or "nothing"
            raise QuantityError(f"{reader}: reads {name!r}, and the answers have {has}." + nearest(name, self.columns))
        return self.columns[name]

    def texts(self, name: str, reader: str) -> list[str]:
        """A column of strings; anything else is an error that names the answer."""
        entries = self.entries(name, reader)
        for i, text in enumerate(entries):
            if not isinstance(text, str):
                raise QuantityError(
                    f"{reader}: {name} must be a str, and that of answer {i} is {text!r:.60} ({type(text).__name__})."
                )
        return list(entries)

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """What several features share (tokens, states of an encoder), computed by the first that asks."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def rows(self, chosen: Sequence[int]) -> Answers:
        """Some of the answers."""
        return Answers({name: [values[i] for i in chosen] for name, values in self.columns.items()})


@dataclass(frozen=True)
class Breakdown:
    """What every factor of a reward was, and how much of the reward hangs on it.

    Args:
        reward: float64 [batch].
        factors: name -> float64 [batch]; NaN where the answer's branch does not have the factor.
        elasticity: name -> float64 [batch], d log|R| / d log|f|: by how many per cent the reward moves when the factor moves
            by one. 1 in a product, the share of the sum in a sum, 0 in a branch not taken, NaN in a sum that is 0.
    """

    reward: Tensor
    factors: dict[str, Tensor]
    elasticity: dict[str, Tensor]

    def spread(self) -> dict[str, float]:
        """Share of the variance of log|R| over the answers that each factor makes; they add up to 1.

        share_i = cov(e_i log|f_i|, log|R|) / var(log|R|),   over the answers whose reward is not 0

        `(rest)` is what sums, branches and offsets add to the product of the factors. All are NaN where log|R| is constant.
        """
        kept = (self.reward != 0) & torch.stack([e.isfinite() for e in self.elasticity.values()]).all(dim=0)
        total = self.reward[kept].abs().log()
        centred = total - total.mean()
        variance = (centred * total).sum()
        # A constant reward has a variance of rounding alone.
        if kept.sum() < 2 or not variance > 1e-24:
            return {**dict.fromkeys(self.factors, torch.nan), REST: torch.nan}
        shares = {}
        for name, values in self.factors.items():
            e = self.elasticity[name][kept]
            part = torch.where(e == 0, 0.0, e * values[kept].abs().clamp(min=1e-300).log())
            shares[name] = float((centred * part).sum() / variance)
        return {**shares, REST: 1 - sum(shares.values())}

    def frame(self) -> pd.DataFrame:
        """One row for each answer: the reward, every factor, every elasticity."""
        import pandas as pd

        columns = {"reward": self.reward, **self.factors}
        columns |= {f"elasticity of {name}": e for name, e in self.elasticity.items()}
        return pd.DataFrame({name: values.numpy(force=True) for name, values in columns.items()})

    def __str__(self) -> str:
        shares = self.spread()
        lines = [f"reward {float(self.reward.mean()):.4g} on average over {len(self.reward)} answers"]
        for name, values in self.factors.items():
            e = self.elasticity[name]
            lines.append(
                f"  {name}: {float(values.nanmean()):.4g}, elasticity {float(e.nanmean()):.2f}, "
                f"{shares[name]:.0%} of the spread of log|R|"
            )
        return "\n".join(lines)


@dataclass
class _Outcome:
    """Values of one node of a reward, and the factors below it: name -> (who, values, elasticity)."""

    values: Tensor
    factors: dict[str, tuple[Reward, Tensor, Tensor]] = field(default_factory=dict)


class Reward:
    """A number for each answer: a feature, or features that are multiplied, added, or chosen by the type of the query.

        Reward.product(f, g)      R = f g          also f * g
        Reward.sum(f, g)          R = f + g        also f + g, 0.5 * f
        Reward.branch("type", {"open-ended": f, "constrained": g})

    Features are `poise.terms.rewards`, or plain functions. Every call keeps `last`, the `Breakdown` of its answers.
    """

    name: str
    last: Breakdown | None = None

    # What a kind of reward defines.
    @property
    def reads(self) -> tuple[str, ...]:
        """The columns that it needs."""
        raise NotImplementedError

    def evaluate(self, answers: Answers) -> _Outcome:
        """Values and factors of a batch; `reward(...)` calls it."""
        raise NotImplementedError

    def __call__(
        self,
        query: Sequence[Any] | None = None,
        response: Sequence[str] | None = None,
        reference: Sequence[str | None] | None = None,
        type: Sequence[str] | None = None,
        **columns: Sequence[Any],
    ) -> Tensor:
        """The reward of each answer.

        Args:
            query: list of str [batch]; or records, mappings with the columns; or, alone, the responses.
            response: list of str [batch].
            reference: list of str [batch], None where there is no reference.
            type: list of str [batch], the types of the queries.
            columns: others that a feature of yours reads.

        Returns: float [batch] of PyTorch's default dtype.

        Raises:
            QuantityError: a missing column, a text that is not a str, an unknown type, a query without its reference.
            NonFiniteError: a NaN or infinite reward, with the factor that it came from.
        """
        return self.explain(query, response, reference, type, **columns).reward.to(torch.get_default_dtype())

    def explain(
        self,
        query: Sequence[Any] | None = None,
        response: Sequence[str] | None = None,
        reference: Sequence[str | None] | None = None,
        type: Sequence[str] | None = None,
        **columns: Sequence[Any],
    ) -> Breakdown:
        """The same with every factor's value and elasticity."""
        answers = Answers.of(query, {"response": response, "reference": reference, "type": type, **columns})
        if not answers.size:
            raise QuantityError("reward: there is no answer in the batch.")
        answers.texts("response", "reward")
        found = self.evaluate(answers)
        for who, values, e in found.factors.values():
            # A branch not taken leaves its factors NaN, with elasticity 0.
            who.refuse_nan(torch.where(e == 0, 0.0, values), answers)
        self.refuse_nan(found.values, answers)
        self.last = Breakdown(
            found.values,
            {name: values for name, (_, values, _) in found.factors.items()},
            {name: e for name, (_, _, e) in found.factors.items()},
        )
        return self.last

    def refuse_nan(self, values: Tensor, answers: Answers) -> None:
        """Raise where one of these values, the reward's own or a factor's, is NaN or infinite."""
        wrong = (~values.isfinite()).nonzero().flatten().tolist()
        if wrong:
            text = answers.columns["response"][wrong[0]]
            raise NonFiniteError(
                f"reward: {self.name} is {float(values[wrong[0]])} for {len(wrong)} of {len(values)} answers, the first is "
                f"answer {wrong[0]}, {text!r:.80}. Training on it would spoil every weight."
            )

    @staticmethod
    def product(*factors: Reward | Plain) -> Product:
        """R = f_1 f_2 ...: a zero in any factor cancels the others."""
        return Product(tuple(as_reward(f) for f in factors))

    @staticmethod
    def sum(*parts: Reward | Plain, weights: Sequence[float] | None = None) -> Sum:
        """R = w_1 f_1 + w_2 f_2 + ..., weights 1 by default."""
        return Sum(tuple(as_reward(f) for f in parts), tuple(weights) if weights is not None else (1.0,) * len(parts))

    @staticmethod
    def branch(key: str | Callable[[list[str]], list[str]], rewards: Mapping[str, Reward | Plain]) -> Branch:
        """The reward of the type that the column `key` says, or that a classifier `key(queries)` gives."""
        return Branch(key, {kind: as_reward(reward) for kind, reward in rewards.items()})

    def mapped(self, input_range: tuple[float, float], output_range: tuple[float, float]) -> Mapped:
        """Map one range linearly onto another, without clipping: the F of R3."""
        return Mapped(self, input_range, output_range)

    def named(self, name: str) -> Reward:
        """The same reward under another name in reports."""
        other = copy.copy(self)
        other.name, other.last = name, None
        return other

    def __mul__(self, other: Reward | Plain | float) -> Reward:
        if isinstance(other, int | float):
            return Reward.sum(self, weights=[other])
        if callable(other):
            return Reward.product(self, other)
        return NotImplemented

    __rmul__ = __mul__

    def __add__(self, other: Reward | Plain) -> Reward:
        return Reward.sum(self, other) if callable(other) else NotImplemented

    __radd__ = __add__

    def __str__(self) -> str:
        return self.name


Plain: TypeAlias = Callable[..., Any]
"""A function whose parameter names are the columns that it reads, and that returns one number for each answer."""


def as_reward(given: Reward | Plain) -> Reward:
    """A reward as it is; a plain function becomes a `Feature`."""
    if isinstance(given, Reward):
        return given
    if callable(given):
        return Feature(given)
    raise InputError(f"reward: expected a reward or a function of columns, got {given!r}.")


@dataclass
class Feature(Reward):
    """A plain function as a reward: its parameters name the columns that it reads.

    Args:
        function: lists in, one number for each answer out (list, array or tensor).
        name: in reports; the function's own by default.

    Example:
        >>> def brief(response):
        ...     return [1 / (1 + len(text)) for text in response]
        >>> Feature(brief)(["", "abc"])
        tensor([1.0000, 0.2500])
    """

    function: Plain
    name: str = ""

    def __post_init__(self) -> None:
        self.name = self.name or getattr(self.function, "__name__", type(self.function).__name__)
        self._reads = tuple(
            p.name
            for p in inspect.signature(self.function).parameters.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        )

    @property
    def reads(self) -> tuple[str, ...]:
        return self._reads

    def evaluate(self, answers: Answers) -> _Outcome:
        given = self.function(**{name: answers.entries(name, self.name) for name in self.reads})
        values = torch.as_tensor(given, dtype=torch.float64).detach()
        if values.shape != (answers.size,):
            raise QuantityError(
                f"{self.name}: expected one number for each of {answers.size} answers, and it gave shape {list(values.shape)}."
            )
        return leaf(self, values)


def leaf(who: Reward, values: Tensor) -> _Outcome:
    """The outcome of a feature: its own only factor."""
    return _Outcome(values, {who.name: (who, values, torch.ones_like(values))})


@dataclass
class Product(Reward):
    """R = f_1 f_2 ... f_k."""

    factors: tuple[Reward, ...]
    name: str = "product"

    def __post_init__(self) -> None:
        if not self.factors:
            raise InputError("Reward.product: give at least one factor.")

    @property
    def reads(self) -> tuple[str, ...]:
        return _union(self.factors)

    def evaluate(self, answers: Answers) -> _Outcome:
        parts = [f.evaluate(answers) for f in self.factors]
        values = torch.stack([p.values for p in parts]).prod(dim=0)
        # d log R / d log f_i = 1, also where another factor is 0: it is what a power law says.
        return _Outcome(values, _merge([(p, torch.ones_like(values)) for p in parts]))

    def __str__(self) -> str:
        return " * ".join(f"({f})" if isinstance(f, Sum) and len(f.parts) > 1 else str(f) for f in self.factors)


@dataclass
class Sum(Reward):
    """R = w_1 f_1 + ... + w_k f_k."""

    parts: tuple[Reward, ...]
    weights: tuple[float, ...]
    name: str = "sum"

    def __post_init__(self) -> None:
        if not self.parts or len(self.parts) != len(self.weights):
            raise InputError(
                f"Reward.sum: {len(self.parts)} parts came with {len(self.weights)} weights; give one for each."
            )

    @property
    def reads(self) -> tuple[str, ...]:
        return _union(self.parts)

    def evaluate(self, answers: Answers) -> _Outcome:
        parts = [p.evaluate(answers) for p in self.parts]
        shares = [w * p.values for w, p in zip(self.weights, parts, strict=True)]
        values = torch.stack(shares).sum(dim=0)
        # One part alone is a scaled feature, whose elasticity is 1 also where it is 0.
        local = [torch.ones_like(values)] if len(parts) == 1 else [share / values for share in shares]
        local = [torch.where(values == 0, torch.nan, e) for e in local] if len(parts) > 1 else local
        return _Outcome(values, _merge(list(zip(parts, local, strict=True))))

    def __str__(self) -> str:
        pairs = zip(self.weights, self.parts, strict=True)
        return " + ".join(str(p) if w == 1 else f"{w:g}*{p}" for w, p in pairs)


@dataclass
class Mapped(Reward):
    """F(v) = c + (v - a) (d - c) / (b - a): the range [a, b] onto [c, d], not clipped."""

    reward: Reward
    input_range: tuple[float, float]
    output_range: tuple[float, float]
    name: str = "mapped"

    def __post_init__(self) -> None:
        a, b = self.input_range
        if not a < b:
            raise InputError(f"reward: input_range runs from low to high, and it is {self.input_range}.")
        self.slope = (self.output_range[1] - self.output_range[0]) / (b - a)

    @property
    def reads(self) -> tuple[str, ...]:
        return self.reward.reads

    def evaluate(self, answers: Answers) -> _Outcome:
        inner = self.reward.evaluate(answers)
        values = self.output_range[0] + (inner.values - self.input_range[0]) * self.slope
        proportional = self.output_range[0] == self.slope * self.input_range[0]
        e = torch.ones_like(values) if proportional else self.slope * inner.values / values
        return _Outcome(values, _merge([(inner, e)]))

    def __str__(self) -> str:
        return f"F({self.reward})"


@dataclass
class Branch(Reward):
    """R = R_k, k the type of the query."""

    key: str | Callable[[list[str]], list[str]]
    rewards: dict[str, Reward]
    name: str = "branch"

    def __post_init__(self) -> None:
        if not self.rewards:
            raise InputError("Reward.branch: give a reward for each type.")

    @property
    def reads(self) -> tuple[str, ...]:
        key = self.key if isinstance(self.key, str) else "query"
        return tuple(dict.fromkeys((*_union(tuple(self.rewards.values())), key)))

    def evaluate(self, answers: Answers) -> _Outcome:
        rows: dict[str, list[int]] = {}
        for i, kind in enumerate(self._types(answers)):
            rows.setdefault(kind, []).append(i)
        values = torch.full((answers.size,), torch.nan, dtype=torch.float64)
        parts = []
        for kind, chosen in rows.items():
            if kind not in self.rewards:
                raise QuantityError(
                    f"reward: answer {chosen[0]} has the type {kind!r}, and there are branches for "
                    f"{', '.join(map(repr, self.rewards))}." + nearest(str(kind), self.rewards)
                )
            part = self.rewards[kind].evaluate(answers.rows(chosen))
            where = torch.tensor(chosen, device=part.values.device)
            values = values.to(part.values.device).index_copy(0, where, part.values)
            parts.append((_scattered(part, where, answers.size), torch.ones_like(values)))
        return _Outcome(values, _merge(parts))

    def _types(self, answers: Answers) -> Sequence[Any]:
        if isinstance(self.key, str):
            return answers.entries(self.key, "reward")
        return self.key(answers.texts("query", "reward"))

    def __str__(self) -> str:
        key = self.key if isinstance(self.key, str) else type(self.key).__name__
        return f"branch({key}: " + ", ".join(f"{kind} -> {reward}" for kind, reward in self.rewards.items()) + ")"


def _union(rewards: Sequence[Reward]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for reward in rewards for name in reward.reads))


def _scattered(part: _Outcome, where: Tensor, size: int) -> _Outcome:
    """Factors of some rows as factors of all: NaN and elasticity 0 elsewhere."""

    def spread(values: Tensor, fill: float) -> Tensor:
        return values.new_full((size,), fill).index_copy(0, where, values)

    factors = {name: (who, spread(v, torch.nan), spread(e, 0.0)) for name, (who, v, e) in part.factors.items()}
    return replace(part, factors=factors)


def _merge(parts: Sequence[tuple[_Outcome, Tensor]]) -> dict[str, tuple[Reward, Tensor, Tensor]]:
    """The chain rule: elasticities multiply along a path and add up over paths to the same factor."""
    factors: dict[str, tuple[Reward, Tensor, Tensor]] = {}
    for part, local in parts:
        for name, (who, values, inner) in part.factors.items():
            e = torch.where(inner == 0, 0.0, local * inner)
            if name in factors:
                other, seen, before = factors[name]
                if other is not who and other != who:
                    raise InputError(
                        f"reward: two different factors are called {name!r}; give one another name with .named(...)."
                    )
                values, e = torch.where(seen.isnan(), values, seen), before + e
            factors[name] = (who, values, e)
    return factors
