"""One accent palette for page and figures: the same formula has the same colour, dash and letter everywhere.

The first formula is the baseline and is drawn in slate, so that the others stand out against what they are compared with.
The six colours of each theme keep a contrast of at least 3 to 1 on the page and stay apart from each other under the three
forms of colour-blindness (both are tests). Colour is never the only sign: every line ends in its formula's letter, and from
the seventh formula on the dash changes.

Figures name colours by token (`series-1`, `ink`, `series-1/0.2` with an opacity); the page's script puts in the value of the
theme that is shown, and the style sheet reads the same table.
"""

from __future__ import annotations

from typing import Any

THEMES: dict[str, dict[str, str]] = {
    "light": {
        "page": "#f7f7f5",
        "paper": "#ffffff",
        "ink": "#1d2329",
        "muted": "#58616b",
        "line": "#dcdfe3",
        "grid": "#eceef0",
        "zero": "#8b949e",
        "accent": "#0652bf",
        "wash": "#eef3fb",
        "good": "#1c6b52",
        "good-wash": "#e9f5f0",
        "alert": "#9a3412",
        "alert-wash": "#fdf1ea",
        "series-0": "#616871",
        "series-1": "#0652bf",
        "series-2": "#cf752d",
        "series-3": "#2f9479",
        "series-4": "#7f2c70",
        "series-5": "#936900",
    },
    "dark": {
        "page": "#121519",
        "paper": "#1a1e23",
        "ink": "#e8ebee",
        "muted": "#a6b0ba",
        "line": "#343b43",
        "grid": "#272d34",
        "zero": "#7d8894",
        "accent": "#7ab4f7",
        "wash": "#1d2a3a",
        "good": "#6fd3b4",
        "good-wash": "#173029",
        "alert": "#f4a672",
        "alert-wash": "#37251b",
        "series-0": "#a7b1bc",
        "series-1": "#4a97f0",
        "series-2": "#ee8a3c",
        "series-3": "#5fe0bf",
        "series-4": "#c06a9c",
        "series-5": "#f6cf4a",
    },
}

COLOURS = 6
_DASHES = ("solid", "dash", "dot", "dashdot")
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "triangle-down", "hexagon")
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def letter(index: int) -> str:
    """Return the letter of a formula: A, B, ..., Z, AA, AB, ...

    >>> letter(0), letter(25), letter(26)
    ('A', 'Z', 'AA')
    """
    name = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        name = chr(ord("A") + rest) + name
    return name


def colour(index: int, opacity: float | None = None) -> str:
    """Return the colour token of a formula, with an opacity where one is given.

    >>> colour(1), colour(7, 0.2)
    ('series-1', 'series-1/0.2')
    """
    token = f"series-{index % COLOURS}"
    return token if opacity is None else f"{token}/{opacity:g}"


def dash(index: int) -> str:
    """Return the line style of a formula; it changes after every six formulas."""
    return _DASHES[index // COLOURS % len(_DASHES)]


def symbol(index: int) -> str:
    """Return the marker of a formula."""
    return _SYMBOLS[index % len(_SYMBOLS)]


def plotly_template(theme: str) -> dict[str, Any]:
    """Return the plotly template of a theme: type, grid and hover box in the colours of the page."""
    tone = THEMES[theme]
    axis = {
        "gridcolor": tone["grid"],
        "linecolor": tone["line"],
        "zeroline": False,
        "zerolinecolor": tone["zero"],
        "ticks": "",
        "ticklabelstandoff": 6,
        "spikecolor": tone["zero"],
        "spikethickness": 1,
        "spikedash": "solid",
        "automargin": True,
        "tickfont": {"color": tone["muted"], "size": 12},
        "title": {"font": {"color": tone["muted"], "size": 12}, "standoff": 8},
    }
    return {
        "layout": {
            "font": {"family": _FONT, "size": 13, "color": tone["ink"]},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "colorway": [tone[f"series-{i}"] for i in range(COLOURS)],
            "xaxis": axis,
            "yaxis": axis,
            "hoverlabel": {
                "bgcolor": tone["paper"],
                "bordercolor": tone["line"],
                "font": {"color": tone["ink"], "size": 12, "family": _FONT},
            },
            "annotationdefaults": {"font": {"color": tone["muted"], "size": 12}},
        }
    }
