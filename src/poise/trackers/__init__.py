"""Send what a run found elsewhere: TensorBoard, MLflow, Weights & Biases, or anything with three methods.

A tracker hears of a run three times: `begin`, `log` at every log point, `end` with the verdict. It never stops or changes a run: the
libraries work in a process of their own, and what fails there is said once. Public names are imported when they are first used.
"""

from __future__ import annotations

from typing import Any

from poise.lazy import load

_HOME: dict[str, str] = {
    "FitTracker": "fitting",
    "open_trackers": "opening",
    "scrub": "privacy",
    "track": "fitting",
    "TrackedRun": "contract",
    "Tracker": "contract",
    "Tracking": "tracking",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    return load(__name__, _HOME, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
