"""Texts, models and tokens for the alignment of language models."""

from __future__ import annotations

from typing import Any

from poise import lazy

_HOME = {
    "Record": "records",
    "Records": "records",
    "TokenizedAnswers": "tokens",
    "TokenizedPairs": "tokens",
    "TokenizedPrompts": "tokens",
    "TokenizedRecords": "tokens",
    "make_records": "records",
    "pad": "tokens",
    "read_records": "records",
    "tokenize": "tokens",
    "write_jsonl": "records",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    return lazy.load(__name__, _HOME, name)
