"""What kind of question a query is: the label by which a reward chooses its branch, learned, or drawn as a control.

kind = QueryTypes().fit(labelled_queries, labels)         # bag of words + logistic regression
kind(["List three rivers.", "What is 2 + 2?"])            # ['open-ended', 'constrained']
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from poise.errors import InputError, StateError

__all__ = ["QueryTypes", "RandomTypes"]


class QueryTypes:
    """A classifier of queries: bag of words and word pairs, logistic regression.

    Args:
        strength: inverse of the l2 penalty, > 0.

    Example:
        >>> kind = QueryTypes().fit(["write a poem", "how many legs", "write a song", "how many eyes"], ["o", "c", "o", "c"])
        >>> kind(["write a letter", "how many days"])
        ['o', 'c']
    """

    def __init__(self, strength: float = 10.0) -> None:
        if not strength > 0:
            raise InputError(f"QueryTypes: strength must be positive, and it is {strength}.")
        self.strength = strength
        self.pipeline: Any = None

    @property
    def types(self) -> tuple[str, ...]:
        """The types that it knows, sorted."""
        return tuple(str(kind) for kind in self._fitted().classes_)

    def fit(self, queries: Sequence[str], types: Sequence[str]) -> QueryTypes:
        """Learn from labelled queries, and return the classifier."""
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        if len(queries) != len(types):
            raise InputError(f"QueryTypes.fit: {len(queries)} queries came with {len(types)} types; give one for each.")
        if len(set(types)) < 2:
            raise InputError(f"QueryTypes.fit: two types are needed, and the labels are {sorted(set(types))}.")
        words = CountVectorizer(ngram_range=(1, 2), binary=True, token_pattern=r"(?u)\w+|[^\w\s]+")
        model = LogisticRegression(C=self.strength, max_iter=1000)
        self.pipeline = make_pipeline(words, model).fit(list(queries), list(types))
        return self

    def __call__(self, queries: Sequence[str]) -> list[str]:
        return [str(kind) for kind in self._fitted().predict(list(queries))]

    def agreement(self, queries: Sequence[str], types: Sequence[str]) -> float:
        """Share of queries that get the given type, in [0, 1]."""
        return sum(a == b for a, b in zip(self(queries), types, strict=True)) / len(types)

    def _fitted(self) -> Any:
        if self.pipeline is None:
            raise StateError("QueryTypes: fit it to labelled queries first, `kind.fit(queries, types)`.")
        return self.pipeline


class RandomTypes:
    """The control: types that are drawn without reading the query. One query always gets the same type.

    Args:
        shares: type -> probability, or a sequence of types for equal ones.
        seed: of the draw.

    Example:
        >>> kind = RandomTypes(["open-ended", "constrained"])
        >>> kind(["a"]) == kind(["a"])
        True
    """

    def __init__(self, shares: Mapping[str, float] | Sequence[str], seed: int = 0) -> None:
        given = dict(shares) if isinstance(shares, Mapping) else dict.fromkeys(shares, 1.0)
        if not given or min(given.values()) < 0 or not sum(given.values()) > 0:
            raise InputError(f"RandomTypes: shares are non-negative numbers with a positive sum; got {given}.")
        total = sum(given.values())
        self.shares, self.seed = {kind: share / total for kind, share in given.items()}, seed

    def __call__(self, queries: Sequence[str]) -> list[str]:
        return [self._draw(query) for query in queries]

    def _draw(self, query: str) -> str:
        # A checksum is linear in its bits, so two seeds would give related draws; the multiplication breaks that.
        mixed = (zlib.crc32(query.encode(), self.seed) * 0x9E3779B97F4A7C15 + self.seed) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        left = ((mixed ^ (mixed >> 32)) & 0xFFFFFFFF) / 2**32
        for kind, share in self.shares.items():
            left -= share
            if left < 0:
                return kind
        return next(reversed(self.shares))
