"""Preference objectives: terms on pairs of answers, on single answers, and on their tokens."""

from __future__ import annotations

from typing import Any

from poise.lazy import load

_HOME = {
    "DPO": "dpo",
    "Pair": "margin",
    "PairedTerm": "margin",
    "PreferenceMargin": "margin",
    "RPO": "rpo",
    "SFT": "rpo",
    "TokenKL": "margin",
    "TokenTerm": "margin",
    "answer_length": "margin",
    "log_ratio": "margin",
    "sequence_sum": "margin",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    return load(__name__, _HOME, name)
