"""Texts, models and tokens for the alignment of language models."""

from __future__ import annotations

from typing import Any

from poise import lazy

_HOME = {
    "Record": "records",
    "Records": "records",
    "make_records": "records",
    "read_records": "records",
    "write_jsonl": "records",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    return lazy.load(__name__, _HOME, name)
