"""Where Poise keeps what would take a while to make again."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """Return where it is kept: `$POISE_CACHE`, or the platform's cache folder for this user."""
    if chosen := os.environ.get("POISE_CACHE"):
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "poise"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "poise"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "poise"
