"""Refuse what cannot fit into memory before anything is allocated."""

from __future__ import annotations

from poise.errors import InputError


def check_memory(needed: int, what: str) -> None:
    """Raise InputError where something does not fit the free memory.

    Args:
        needed: bytes.
        what: the subject of the message.
    """
    import psutil

    free = psutil.virtual_memory().available
    if needed > free:
        raise InputError(
            f"{what} would need {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free. Give a "
            "smaller file or fewer columns, fewer rows (limit=), or stream the file through a DataLoader (docs/your-data.md)."
        )
