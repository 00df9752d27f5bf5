"""Tokens and n-grams of many texts at once, counted in arrays: what length and repetition need, without the tokens themselves.

Most of a text is words that were seen before. So texts are split at white space, every different piece is split into tokens once,
and from there on tokens are numbers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

__all__ = ["TokenTable", "words"]

_LAST = np.iinfo(np.int64).max
_WORD = re.compile(r"\w+|[^\w\s]+")
_MOST_PIECES = 200_000


class _Pieces(dict[str, tuple[str, ...]]):
    """What stands between white space -> its tokens. Text repeats itself, so most of it is looked up."""

    def __missing__(self, piece: str) -> tuple[str, ...]:
        if len(self) >= _MOST_PIECES:
            self.clear()
        tokens = self[piece] = tuple(_WORD.findall(piece))
        return tokens


_PIECES = _Pieces()


def words(text: str) -> list[str]:
    r"""Split into runs of letters and digits, and runs of other marks: the regular expression `\w+|[^\w\s]+`.

    Example:
        >>> words("It's 3.5, no?")
        ['It', "'", 's', '3', '.', '5', ',', 'no', '?']
    """
    # No token crosses white space, so each piece can be split by itself and remembered.
    return list(chain.from_iterable(map(_PIECES.__getitem__, text.split())))


class TokenTable:
    r"""The tokens `\w+|[^\w\s]+` of n texts as numbers, one run after another.

    Args:
        texts: n strings.

    Attributes:
        counts: int64 [n], tokens of each text.

    Example:
        >>> TokenTable(["a b a b a b", "it's"]).counts.tolist()
        [6, 3]
    """

    def __init__(self, texts: Sequence[str]) -> None:
        pieces, numbers, per_text = _split(texts)
        known: dict[str, int] = {}
        parts = [[known.setdefault(token, len(known)) for token in _PIECES[piece]] for piece in pieces]
        size = np.fromiter(map(len, parts), np.int64, len(parts))
        flat = np.fromiter((token for part in parts for token in part), np.int64)
        self.tokens = flat[_runs(np.cumsum(size) - size, size, numbers)]
        self.kinds = len(known)
        ends = np.concatenate([[0], np.cumsum(size[numbers])])
        self.begin = ends[np.concatenate([[0], np.cumsum(per_text)])]
        self.counts = np.diff(self.begin)

    def uniqueness(self, n: int = 3) -> Any:
        """Different n-grams over all n-grams of each text, float64 [n]; 1 below n tokens.

        Example:
            >>> TokenTable(["a b a b a b", "it's"]).uniqueness(2).tolist()
            [0.4, 1.0]
        """
        grams = np.maximum(self.counts - n + 1, 0)
        most = int(grams.max(initial=0))
        if most == 0:
            return np.ones(len(grams))
        codes = self._codes(n)
        grid = np.full((len(grams), most), _LAST)
        inside = np.arange(most) < grams[:, None]
        grid[inside] = codes[_runs(self.begin[:-1], grams, np.arange(len(grams)))]
        grid.sort(axis=1)
        new = np.concatenate([np.ones((len(grid), 1), dtype=bool), grid[:, 1:] != grid[:, :-1]], axis=1)
        different = (new & (grid != _LAST)).sum(axis=1)
        return np.where(grams > 0, different / np.maximum(grams, 1), 1.0)

    def _codes(self, n: int) -> Any:
        """A number for the n-gram that begins at each place; equal n-grams have equal numbers."""
        length = max(len(self.tokens) - n + 1, 0)
        codes, kinds = self.tokens[:length], max(self.kinds, 1)
        for i in range(1, n):
            if kinds * self.kinds >= _LAST:
                codes = np.unique(codes, return_inverse=True)[1]
                kinds = int(codes.max(initial=0)) + 1
            codes = codes * self.kinds + self.tokens[i : i + length]
            kinds *= self.kinds
        return codes


def _split(texts: Sequence[str]) -> tuple[list[str], Any, Any]:
    """The different pieces between white space, the number of each piece of all texts, and how many each text has."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        lists = pc.utf8_split_whitespace(pa.array(texts, pa.string()))
    except UnicodeEncodeError:
        # Half of a surrogate pair is a str, but no UTF-8.
        lists = pa.array([[piece.encode("utf-8", "surrogatepass") for piece in text.split()] for text in texts])
    coded = lists.values.dictionary_encode()
    pieces = [p if isinstance(p, str) else p.decode("utf-8", "surrogatepass") for p in coded.dictionary.to_pylist()]
    per_text = np.diff(lists.offsets.to_numpy())
    return pieces, coded.indices.to_numpy(zero_copy_only=False).astype(np.int64), per_text


def _runs(begin: Any, size: Any, which: Any) -> Any:
    """The places begin[k], ..., begin[k] + size[k] - 1 of each k in `which`, one run after another."""
    length = size[which]
    ends = np.cumsum(length)
    inside = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - length, length)
    return inside + np.repeat(begin[which], length)
