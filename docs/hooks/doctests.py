"""Shows the `>>>` examples of docstrings as code blocks.

A docstring ends with a two-line example, as `doctest` reads it. The site's parser knows such examples only under a
heading of their own; this extension fences them, wherever they stand.
"""

from __future__ import annotations

import textwrap
from typing import Any

import griffe


class FencedDoctests(griffe.Extension):
    """Puts every block that begins with `>>>` between fences, at the outermost indentation."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object, before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = fence(obj.docstring.value)


def fence(docstring: str) -> str:
    """Return the docstring with its doctest blocks fenced; a block ends at the first empty line."""
    written: list[str] = []
    block: list[str] = []
    for line in [*docstring.splitlines(), ""]:
        if line.strip() and (block or line.lstrip().startswith(">>> ")):
            block.append(line)
            continue
        if block:
            code = textwrap.dedent("\n".join(block)).splitlines()
            if written and written[-1].strip() in ("Example:", "Examples:"):
                written.pop()
            written += ["", "```pycon", *code, "```"]
            block = []
        written.append(line)
    return "\n".join(written)
