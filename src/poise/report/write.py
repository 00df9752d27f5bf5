"""Render the page and put it into its folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from poise._version import __version__
from poise.errors import InputError
from poise.report import palette, wording
from poise.report.embed import script_json
from poise.report.page import VERDICTS, Page

if TYPE_CHECKING:
    import jinja2
    from markupsafe import Markup

    from poise.studies.summary import Summary

PAGE = "report.html"
SCRIPT = "plotly.min.js"


def render(summary: Summary, *, beside: frozenset[str] = frozenset()) -> str:
    """Return the page as HTML.

    Args:
        summary: what the study found.
        beside: names of the files that lie in the page's folder; the page mentions `study.toml` only where it is there.

    >>> render(summary).startswith("<!doctype html>")          # doctest: +SKIP
    True
    """
    from markupsafe import Markup

    page = Page(summary)
    data = script_json({"figures": {chart.id: chart.figure for chart in page.charts}, "themes": page.themes()})
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            page=page,
            words=wording,
            verdicts=VERDICTS,
            version=__version__,
            has_toml="study.toml" in beside,
            # The page runs only scripts that carry this word, so markup that slipped in could not run one.
            nonce=hashlib.sha256(data.encode()).hexdigest()[:32],
            style=Markup(_theme_style() + _text("report.css")),
            script=Markup(_text("report.js")),
            figures_json=Markup(data),
        )
    )


def write_report(summary: Summary, folder: str | os.PathLike[str]) -> Path:
    """Write `report.html` and the script that draws its figures.

    Args:
        summary: what the study found.
        folder: where the files go; made where it is missing. A page that is there already is replaced in one step, so a
            reader never sees half of one.

    Returns:
        The path of the page.

    Raises:
        InputError: the folder cannot be made or written.

    >>> write_report(summary, "poise-report")          # doctest: +SKIP
    PosixPath('poise-report/report.html')
    """
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        html = render(summary, beside=frozenset(entry.name for entry in place.iterdir()))
        _replace(place / SCRIPT, _plotly())
        # A name on disk may hold bytes that are no text; they become "?".
        _replace(place / PAGE, html.encode("utf-8", "replace"))
    except OSError as error:
        raise InputError(
            f"The report cannot be written to {place}: {error.strerror or error}. "
            "Give a folder that can be written and has about 6 MB of room; the runs themselves are not lost."
        ) from error
    return place / PAGE


def rebuild(folder: str | os.PathLike[str]) -> Path:
    """Write the report of a study anew from its store, without the data and without training anything.

    Args:
        folder: the output folder of a study, finished or not; it holds `study.sqlite`.

    Returns:
        The path of the page.

    Raises:
        StoreError: there is no store in the folder, or it holds no study.
        InputError: the folder cannot be written.

    >>> rebuild("poise-report")          # doctest: +SKIP
    PosixPath('poise-report/report.html')
    """
    from poise.studies.study import Study

    return write_report(Study.open(folder), folder)


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that it is either the old one or the new one, whole."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        # mkstemp keeps the file to its owner; a report is made to be shared.
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _umask() -> int:
    # The mask can only be read by setting it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _plotly() -> bytes:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs()).encode()


@cache
def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_text), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["breakable"] = _breakable
    return environment


def _breakable(text: str) -> Markup:
    """Let a formula break where a reader would break it: after a comma or an opening parenthesis."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=[(,])(?=\S)", text))


@cache
def _text(name: str) -> str:
    return (resources.files("poise.report") / "templates" / name).read_text(encoding="utf-8")


def _theme_style() -> str:
    def rules(theme: str) -> str:
        return "".join(f"--{name}:{value};" for name, value in palette.THEMES[theme].items())

    return (
        f":root{{color-scheme:light;{rules('light')}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root{{color-scheme:dark;{rules('dark')}}}}}\n"
    )
