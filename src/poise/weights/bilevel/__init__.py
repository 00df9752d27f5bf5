"""Weights found by the validation objective: two levels, and how the hypergradient arises."""

from __future__ import annotations

from typing import Any

from poise.lazy import load

_HOME = {
    "AcceleratedGradient": "accelerated",
    "Counters": "levels",
    "Differences": "hypergradient",
    "ErrorBound": "error_bound",
    "HOAG": "hoag",
    "HOAGStep": "hoag",
    "Hypergradient": "hypergradient",
    "ImplicitHypergradient": "hypergradient",
    "Levels": "levels",
    "LowerSolution": "accelerated",
    "MAID": "maid",
    "MAIDStep": "maid",
    "Prediction": "prediction",
    "UnrolledHypergradient": "hypergradient",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    return load(__name__, _HOME, name)
