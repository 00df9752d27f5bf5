"""The page of one solution: its certificate, its weights, and what every weight of the penalty gives."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poise._version import __version__
from poise.errors import InputError
from poise.report import palette, wording
from poise.report.embed import figure_text, script_json

if TYPE_CHECKING:
    from poise.studies.solution import SolutionSummary

PAGE = "solution.html"
DRAWN = 8
"""Inputs that get a line of their own; the palette has so many colours."""
ROWS = 60
"""Inputs in the support plot; the largest ones."""


def write_solution(summary: SolutionSummary, folder: str | os.PathLike[str]) -> Path:
    """Write `solution.html` and the script that draws its figures; return the page's path.

    Raises:
        InputError: the folder cannot be written.
    """
    from poise.report.write import SCRIPT, _plotly, _replace

    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        _replace(place / SCRIPT, _plotly())
        _replace(place / PAGE, render_solution(summary).encode("utf-8", "replace"))
    except OSError as error:
        raise InputError(
            f"The page cannot be written to {place}: {error.strerror or error}. Give another folder."
        ) from error
    return place / PAGE


def render_solution(summary: SolutionSummary) -> str:
    """Return the page as HTML."""
    from markupsafe import Markup

    from poise.report.write import _environment, _text, _theme_style

    figures = _figures(summary)
    themes = {n: {"tones": t, "template": palette.plotly_template(n)} for n, t in palette.THEMES.items()}
    data = script_json({"figures": {name: figure for name, (figure, _, _) in figures.items()}, "themes": themes})
    return (
        _environment()
        .get_template("solution.html.j2")
        .render(
            summary=summary,
            rows=weight_rows(summary),
            left_out=max(0, len(summary.used) - ROWS),
            path=path_rows(summary),
            charts=[(name, says, height) for name, (_, says, height) in figures.items()],
            words=wording,
            version=__version__,
            nonce=hashlib.sha256(data.encode()).hexdigest()[:32],
            style=Markup(_theme_style() + _text("report.css")),
            script=Markup(_text("report.js")),
            figures_json=Markup(data),
        )
    )


def weight_rows(summary: SolutionSummary) -> list[dict[str, Any]]:
    """Return the inputs that are used, the largest first, with a weight for every output."""
    return [
        {"name": summary.inputs[j], "weights": [wording.rounded(row[j]) if row[j] else "0" for row in summary.coef]}
        for j in summary.used[:ROWS]
    ]


def path_rows(summary: SolutionSummary) -> list[dict[str, Any]]:
    """Return the points of the path."""
    return [
        {
            "weight": wording.rounded(p.weight),
            "support": p.support,
            "value": wording.rounded(p.value),
            "metric": wording.rounded(p.metrics[summary.primary]),
            "converged": p.converged,
            "best": i == summary.best,
        }
        for i, p in enumerate(summary.path)
    ]


def _figures(summary: SolutionSummary) -> dict[str, tuple[dict[str, Any], str, int]]:
    if not summary.path:
        return {}
    name = {"weights": "Weights", "quality": "Validation", "support": "Support"}
    best = summary.path[summary.best or 0]
    one = len(summary.coef) == 1
    found = {
        "weights": (
            _lines(summary),
            f"{name['weights']} along the path: the {'weight' if one else 'norm of the weights'} of the {min(DRAWN, len(summary.inputs))} "
            f"largest inputs against the {summary.varied}.",
            340,
        ),
        "quality": (
            _quality(summary),
            f"{summary.primary} on validation rows against the {summary.varied}; best at {wording.rounded(best.weight)}, "
            f"with {wording.count(best.support, 'input')}.",
            280,
        ),
    }
    figure, shown = _support(summary)
    found["support"] = (
        figure,
        f"Support: which of {wording.count(shown, 'input')} is used at which {summary.varied}; the darker, the larger.",
        max(220, 90 + 15 * shown),
    )
    return found


def _axis(summary: SolutionSummary) -> dict[str, Any]:
    return {
        "type": "log",
        "title": {"text": figure_text(summary.varied, 60)},
        "autorange": "reversed",
        "exponentformat": "power",
        "nticks": 8,
    }


def _marks(summary: SolutionSummary) -> list[dict[str, Any]]:
    """A line where the formula stands, if the path reaches that far."""
    factors = [p.factor for p in summary.path]
    if not min(factors) <= 1.0 <= max(factors):
        return []
    scale = summary.path[0].weight / summary.path[0].factor
    return [
        {"type": "line", "xref": "x", "yref": "paper", "x0": scale, "x1": scale, "y0": 0, "y1": 1,
         "line": {"color": "muted", "width": 1, "dash": "dot"}}
    ]  # fmt: skip


def _largest(summary: SolutionSummary, number: int) -> list[int]:
    reach = [max(abs(p.size[j]) for p in summary.path) for j in range(len(summary.inputs))]
    return [j for j in sorted(range(len(reach)), key=lambda j: -reach[j])[:number] if reach[j] > 0]


def _lines(summary: SolutionSummary) -> dict[str, Any]:
    x = [p.weight for p in summary.path]
    data = [
        {
            "type": "scatter", "mode": "lines", "x": x, "y": [p.size[j] for p in summary.path],
            "name": figure_text(summary.inputs[j], 28),
            "line": {"color": palette.colour(place), "width": 2, "dash": palette.dash(place)},
            "hovertemplate": "%{y:.4g}", "meta": {"formula": place},
        }
        for place, j in enumerate(_largest(summary, DRAWN))
    ]  # fmt: skip
    return {
        "data": data,
        "layout": {
            "margin": {"l": 56, "r": 12, "t": 10, "b": 44}, "hovermode": "x unified", "showlegend": True,
            "legend": {"orientation": "v", "x": 1.01, "y": 1}, "xaxis": _axis(summary), "shapes": _marks(summary),
            "yaxis": {"title": {"text": "weight" if len(summary.coef) == 1 else "norm over outputs"}, "zeroline": True},
        },
    }  # fmt: skip


def _quality(summary: SolutionSummary) -> dict[str, Any]:
    x = [p.weight for p in summary.path]
    best = summary.best or 0
    y = [p.metrics[summary.primary] for p in summary.path]
    common: dict[str, Any] = {"type": "scatter", "hovertemplate": "%{y:.4g}"}
    return {
        "data": [
            {**common, "mode": "lines", "x": x, "y": y, "name": summary.primary, "line": {"color": palette.colour(0), "width": 2.2},
             "meta": {"formula": 0}},
            {**common, "mode": "markers", "x": [x[best]], "y": [y[best]], "name": "best",
             "marker": {"color": palette.colour(0), "size": 10}, "meta": {"formula": 0}},
            {**common, "mode": "lines", "x": x, "y": [p.support for p in summary.path], "name": "inputs used", "yaxis": "y2",
             "line": {"color": palette.colour(1), "width": 1.6, "dash": "dot"}, "meta": {"formula": 1}},
        ],
        "layout": {
            "margin": {"l": 56, "r": 56, "t": 10, "b": 44}, "hovermode": "x unified", "showlegend": False, "xaxis": _axis(summary),
            "shapes": _marks(summary), "yaxis": {"title": {"text": f"{summary.primary}, validation"}},
            "yaxis2": {"title": {"text": "inputs used (dotted)"}, "overlaying": "y", "side": "right", "showgrid": False,
                       "rangemode": "tozero", "tickmode": "auto", "tickformat": ",d", "nticks": 6},
        },
    }  # fmt: skip


def _support(summary: SolutionSummary) -> tuple[dict[str, Any], int]:
    """A map of inputs against weights of the penalty: empty where an input is left out."""
    shown = sorted(_largest(summary, ROWS), key=lambda j: _entry(summary, j))
    top = max((abs(p.size[j]) for p in summary.path for j in shown), default=1.0) or 1.0
    z = [[abs(p.size[j]) / top if p.size[j] else None for p in summary.path] for j in shown]
    text = [[f"{p.size[j]:.4g}" for p in summary.path] for j in shown]
    data: dict[str, Any] = {
        "type": "heatmap", "x": [p.weight for p in summary.path], "y": [_row_name(summary, j) for j in shown], "z": z, "text": text,
        "hovertemplate": "%{y}: %{text} at %{x:.3g}<extra></extra>", "showscale": False, "xgap": 1, "ygap": 1, "zmin": 0, "zmax": 1,
        "colorscale": [[0, "rgba(88,113,206,0.25)"], [1, "rgba(88,113,206,1)"]], "meta": {"formula": 0},
    }  # fmt: skip
    layout: dict[str, Any] = {
        "margin": {"l": 10, "r": 12, "t": 10, "b": 44}, "xaxis": _axis(summary), "shapes": _marks(summary),
        "yaxis": {"autorange": "reversed", "automargin": True, "type": "category", "tickfont": {"size": 10}},
    }  # fmt: skip
    return {"data": [data], "layout": layout}, len(shown)


def _row_name(summary: SolutionSummary, j: int) -> str:
    name = figure_text(summary.inputs[j], 28)
    return name if summary.inputs.count(summary.inputs[j]) == 1 else f"{name} ({j})"


def _entry(summary: SolutionSummary, j: int) -> int:
    """Where along the path an input enters."""
    return next((i for i, p in enumerate(summary.path) if p.size[j]), len(summary.path))
