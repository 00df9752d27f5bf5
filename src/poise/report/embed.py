"""Put foreign text into the page so that it stays text: inside script tags, and inside figures.

Labels, column names, file names and error messages come from the user or from their data. Jinja escapes them in the HTML;
the two other places where they could turn into markup are guarded here.
"""

from __future__ import annotations

import json
import math
from typing import Any

# JSON in a script tag ends at "</script" and changes meaning at "<!--"; as \uXXXX neither can occur, and the JSON is the same.
_IN_SCRIPT = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&'"}


def script_json(value: Any) -> str:
    """Write a value as JSON that is safe inside `<script type="application/json">`.

    The result is pure ASCII without `<`, `>`, `&` and `'`; numbers that JSON does not know (NaN, infinity) become null.

    >>> script_json({"name": "</script>", "value": float("nan")})
    '{"name":"\\\\u003c/script\\\\u003e","value":null}'
    """
    text = json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.translate(_IN_SCRIPT)


def figure_text(text: str, limit: int | None = None) -> str:
    """Return text for a plotly label, where `<b>` or `<a href>` would be markup and `%{y}` a placeholder.

    Args:
        text: what shall be read.
        limit: longest length in characters; longer text is cut and ends in an ellipsis.

    >>> figure_text("a<b>c", 4)
    'a&lt;b…'
    """
    text = "".join(sign if sign.isprintable() else " " for sign in text)
    if limit is not None and len(text) > limit:
        text = text[: limit - 1] + "…"
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # A word joiner parts "%" from "{": plotly fills in %{...} wherever it formats a hover text.
    return text.replace("%{", "%\u2060{")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
