"""Cells of a CSV that a spreadsheet will show and never run."""

from __future__ import annotations


def harmless(cell: str) -> str:
    """Return a cell's text; one that a spreadsheet would take for a formula gets an apostrophe before it.

    >>> harmless("=1+1"), harmless("-1"), harmless("setosa")
    ("'=1+1", '-1', 'setosa')
    """
    try:
        float(cell)
    except ValueError:
        return "'" + cell if cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell
    return cell
