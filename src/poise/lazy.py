"""Import a room's public names when they are first used, so that nothing loads what nobody asks for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any


def load(room: str, home: Mapping[str, str], name: str) -> Any:
    """Return a public name of a room, and keep it there.

    Args:
        room: the module, `poise.solvers`.
        home: its public names, each with the file in the room that defines it.
        name: what is asked for.

    Raises:
        AttributeError: the room has no such name.
    """
    if name not in home:
        raise AttributeError(f"module {room!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{room}.{home[name]}"), name)
    setattr(sys.modules[room], name, value)
    return value
