"""Nothing leaves that nobody asked to send: passwords, keys, and where files lie on this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from poise.trackers.contract import Scalar

_SECRET = re.compile(
    r"(?i)(?:^|[^a-z])(pass(word|wd|phrase)?|secret|token|(api|access|private)_?key|credentials?|auth)$"
)
_LOGIN = re.compile(r"(\w[\w+.-]*://)[^/\s@]+@")
_QUERY = re.compile(r"(?i)([?&][\w-]*(?:key|token|secret|password|sig|signature)=)[^&\s]+")
_KEY = re.compile(r"\b(?:sk|hf|ghp|gho|glpat|xox[abp]|AKIA)[-_]?[A-Za-z0-9_-]{16,}\b")
_FILE = re.compile(r"\b(file|sqlite):/+[^\s'\"]*/")
_START = r"(?:~|\.{1,2}|[A-Za-z]:)?"
_QUOTED = re.compile(rf"(?<=['\"]){_START}[/\\][^'\"\n]*(?=['\"])")
# At least two parts, so that a fraction in a formula is no path; not the rest of a URL or of a name like term/l2.
_PATH = re.compile(rf"(?<![\w/:.\-\]]){_START}(?:[/\\][^\s/\\:'\",;()<>|]+){{2,}}[/\\]?")
_HIDDEN = "(hidden)"


def scrub(text: str) -> str:
    """Return a text without logins, keys and folders; of a local path the last part stays.

    >>> scrub("cannot read /home/anna/data/quality.csv from http://anna:pw@host:5000/x")
    'cannot read quality.csv from http://host:5000/x'
    """
    if os.sep in text and "\n" not in text and "://" not in text and (_is_path(text) or os.path.exists(text)):
        return os.path.basename(os.path.normpath(text))
    text = _QUERY.sub(rf"\1{_HIDDEN}", _LOGIN.sub(r"\1", text))
    text = _FILE.sub(r"\1:", _KEY.sub(_HIDDEN, text))
    return _PATH.sub(_last, _QUOTED.sub(_last, text))


def public(content: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """Return nested settings as one flat mapping that may be sent; what is None is left out.

    >>> public({"data": {"source": "/home/anna/q.csv", "split": [0.6, 0.4]}, "api_key": "x", "lr": 0.1, "schedule": None})
    {'data/source': 'q.csv', 'data/split': '[0.6, 0.4]', 'api_key': '(hidden)', 'lr': 0.1}
    """
    flat: dict[str, Scalar] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if value is None:
            continue
        if isinstance(value, Mapping):
            flat |= public(value, f"{name}/")
        elif isinstance(value, str | os.PathLike) or not isinstance(value, bool | int | float):
            flat[name] = _HIDDEN if _SECRET.search(str(key)) else scrub(str(value))
        else:
            flat[name] = _HIDDEN if _SECRET.search(str(key)) else value
    return flat


def _last(found: re.Match[str]) -> str:
    return re.split(r"[/\\]", found[0].rstrip("/\\"))[-1]


def _is_path(text: str) -> bool:
    # A sentence may begin with a path too.
    return os.path.isabs(text) and ": " not in text and " /" not in text
