"""Where to sample and what to try next, by asking and telling. Public names are imported when they are first used."""

from __future__ import annotations

from typing import Any

from poise.lazy import load

_HOME: dict[str, str] = {
    "ActiveMultiTask": "active_multitask",
    "ActiveResult": "active_multitask",
    "gradient_similarity": "task_baselines",
    "LinearMultiTask": "linear_multitask",
    "NeuralMultiTask": "neural_multitask",
    "oracle_counts": "task_baselines",
    "proportional_counts": "task_baselines",
    "Round": "active_multitask",
    "target_only": "task_baselines",
    "uniform_counts": "task_baselines",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    return load(__name__, _HOME, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
