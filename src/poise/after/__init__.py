"""What is done with models once training is over. Public names are imported when they are first used."""

from __future__ import annotations

from typing import Any

from poise.lazy import load

_HOME: dict[str, str] = {
    "half_reset": "reset",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    return load(__name__, _HOME, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
