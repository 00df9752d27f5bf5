"""The figures, as plain plotly JSON: curves with bands, forests of paired differences, cost against quality, trials.

Every function is pure and returns `{"data": [...], "layout": {...}}`. Colours are tokens of `palette`, text of the user goes
through `embed.figure_text`, and each trace carries `meta.formula`, by which the page's legend buttons find it. Titles and
legends are HTML, so that they wrap on a phone, can be reached by keyboard, and are read aloud.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from poise.report import palette
from poise.report.embed import figure_text

if TYPE_CHECKING:
    from poise.studies.intervals import Estimate
    from poise.studies.summary import Curve, Metric, TrialRow

_Any = TypeVar("_Any")
Figure = dict[str, Any]
Numbers = tuple[float | None, ...]

POINTS = 500
DOTS = 100
"""Most single runs that one row or mark draws; a thousand dots on one line are a line."""
TRIALS = 1000
"""Most trials that one figure draws."""
_HOVER_NAME = 32
_LETTER = 15  # pixels that a letter at the end of a line needs


@dataclass(frozen=True)
class Line:
    """One curve of one formula, ready to draw."""

    formula: int
    text: str
    steps: tuple[float, ...]
    mean: Numbers
    lower: Numbers
    upper: Numbers
    runs: tuple[Numbers, ...] = ()
    averaged: int = 1
    mark: str = ""

    @property
    def sign(self) -> str:
        """What stands at the end of the line: the formula's letter, or a mark of its own."""
        return self.mark or palette.letter(self.formula)

    @classmethod
    def of(cls, formula: int, text: str, curve: Curve, scale: float = 1.0, mark: str = "") -> Line:
        """Take a curve, at most `POINTS` points of it, in the unit that is drawn."""
        size = math.ceil(len(curve.steps) / POINTS)
        return cls(
            formula=formula,
            text=text,
            steps=tuple(value for value in _blocks(curve.steps, size) if value is not None),
            mean=_blocks(curve.mean, size, scale),
            lower=_blocks(curve.lower, size, scale),
            upper=_blocks(curve.upper, size, scale),
            runs=tuple(_blocks(values, size, scale) for values in curve.per_seed.values()),
            averaged=max(size, 1),
            mark=mark,
        )

    def end(self) -> tuple[float, float] | None:
        """Return the last point that has a value."""
        for step, value in zip(reversed(self.steps), reversed(self.mean), strict=True):
            if value is not None:
                return step, value
        return None


def _blocks(values: Sequence[float | None], size: int, scale: float = 1.0) -> Numbers:
    """Average blocks of `size` neighbours; a block without a finite value is None."""
    found = [value if value is not None and math.isfinite(value) else None for value in values]
    if size <= 1:
        return tuple(None if value is None else scale * value for value in found)
    thinned: list[float | None] = []
    for start in range(0, len(found), size):
        block = [value for value in found[start : start + size] if value is not None]
        thinned.append(scale * math.fsum(block) / len(block) if block else None)
    return tuple(thinned)


def curves(
    lines: Sequence[Line],
    *,
    unit: str = "",
    decimals: str = ".4g",
    logarithmic: bool = False,
    pixels: int = 320,
    across: str = "training step",
    zero: bool = False,
    stepped: bool = False,
) -> Figure:
    """Draw one line a formula over the training steps, with its band over seeds and its letter at the end.

    `pixels` is the height of the figure, by which the letters keep their distance; `zero` draws a line at 0 and keeps it in sight;
    `stepped` lines hold a value until the next one.
    """
    bottom, top = _frame(lines, logarithmic)
    if zero:
        room = 0.05 * (top - bottom)
        bottom, top = min(bottom, -room), max(top, room)
    data: list[dict[str, Any]] = []
    for line in lines:
        band = _band(line, bottom, top)
        if band is not None:
            data.append(band)
    for place, line in enumerate(lines):
        # Where two lines lie on each other, the upper one is dashed so that the lower one shows.
        covers = sum(_coincide(line, other, top - bottom) for other in lines[:place])
        data.append(
            {
                "type": "scatter",
                "mode": "lines" if len(line.steps) > 1 else "markers",
                "x": line.steps,
                "y": line.mean,
                "name": f"{line.sign}  {figure_text(line.text, _HOVER_NAME)}",
                "line": {
                    "color": palette.colour(line.formula),
                    "width": 2.2,
                    **({"shape": "hv"} if stepped else {}),
                    "dash": f"8px,{8 * covers}px" if covers else palette.dash(line.formula),
                },
                "marker": {"color": palette.colour(line.formula), "size": 8},
                "connectgaps": True,
                "hovertemplate": f"%{{y:{decimals}}}{unit}",
                "meta": {"formula": line.formula},
            }
        )
    data.extend(_letters(lines, bottom, top, logarithmic, pixels))
    axis: dict[str, Any] = {"ticksuffix": unit, "nticks": 6, "range": [bottom, top]}
    if logarithmic:
        axis |= {"type": "log", "range": [math.log10(bottom), math.log10(top)], "dtick": 1, "tickformat": "~g"}
    return {
        "data": data,
        "layout": {
            "margin": {"l": 48, "r": 18 + 8 * max((len(line.sign) for line in lines), default=1), "t": 10, "b": 40},
            "hovermode": "x unified",
            **({"shapes": [_level_line(0.0)]} if zero else {}),
            "showlegend": False,
            "xaxis": {
                "title": {"text": across},
                "nticks": 6,
                "rangemode": "tozero",
                "unifiedhovertitle": {"text": f"{across.removeprefix('training ')} %{{x:,.0f}}"},
            },
            "yaxis": axis,
        },
    }


def _level_line(height: float) -> dict[str, Any]:
    """Return a line across the whole figure."""
    ends = {"x0": 0, "x1": 1, "y0": height, "y1": height}
    return {
        "type": "line",
        "xref": "paper",
        "yref": "y",
        **ends,
        "layer": "below",
        "line": {"width": 1.5, "color": "zero"},
    }


def spread(values: Sequence[_Any], most: int) -> Sequence[_Any]:
    """Return at most so many of the values, evenly from the first to the last.

    >>> spread([1, 2, 3, 4, 5], 3)
    [1, 3, 5]
    """
    if len(values) <= most:
        return values
    return [values[round(place * (len(values) - 1) / (most - 1))] for place in range(most)]


def wants_logarithm(lines: Sequence[Line]) -> bool:
    """Whether values are all positive and span more than two decades, so that a linear axis would hide most of them."""
    values = [value for line in lines for value in line.mean if value is not None]
    return bool(values) and min(values) > 0 and max(values) / min(values) > 100


def _frame(lines: Sequence[Line], logarithmic: bool) -> tuple[float, float]:
    """Return the range of the vertical axis.

    It shows every mean and every single run, and of the bands as much as fits: with two seeds a t interval is so wide that
    it would press the lines flat.
    """
    seen = [value for line in lines for row in (line.mean, *line.runs) for value in row if value is not None]
    if not seen:
        return (0.1, 10.0) if logarithmic else (0.0, 1.0)
    if logarithmic:
        positive = [value for value in seen if value > 0]
        return min(positive) / 1.3, max(positive) * 1.3
    low, high = min(seen), max(seen)
    if high - low <= 1e-9 * max(1.0, abs(high)):
        room = 0.5 * abs(high) or 1.0
        return min(low - room, 0.0) if low >= 0 and low - room < 0 else low - room, high + room
    room = 0.35 * (high - low)
    lower = [value for line in lines for value in line.lower if value is not None]
    upper = [value for line in lines for value in line.upper if value is not None]
    bottom = max(min([low, *lower]), low - room)
    top = min(max([high, *upper]), high + room)
    edge = 0.05 * (top - bottom)
    # A quantity that cannot be negative should not have an axis that suggests it.
    return bottom - edge if bottom < 0 or bottom > 3 * edge else 0.0 if low >= 0 else bottom - edge, top + edge


def _coincide(one: Line, other: Line, span: float) -> bool:
    return one.steps == other.steps and all(
        a is None if b is None else a is not None and abs(a - b) < 0.004 * span
        for a, b in zip(one.mean, other.mean, strict=True)
    )


def _band(line: Line, bottom: float, top: float) -> dict[str, Any] | None:
    """Return the band as one closed outline over the steps that have an interval."""
    edges = [
        (step, min(max(low, bottom), top), min(max(high, bottom), top))
        for step, low, high in zip(line.steps, line.lower, line.upper, strict=True)
        if low is not None and high is not None
    ]
    if len(edges) < 2:
        return None
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [step for step, _, _ in edges] + [step for step, _, _ in reversed(edges)],
        "y": [high for _, _, high in edges] + [low for _, low, _ in reversed(edges)],
        "fill": "toself",
        "fillcolor": palette.colour(line.formula, 0.16),
        "line": {"width": 0, "color": palette.colour(line.formula, 0.0)},
        "hoverinfo": "skip",
        "meta": {"formula": line.formula},
    }


def _apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Move sorted places in 0..1 apart until neighbours are `gap` from each other, each group about its own middle."""
    groups: list[list[float]] = []
    for place in wanted:
        groups.append([place])
        while len(groups) > 1 and _start(groups[-1], gap) < _start(groups[-2], gap) + gap * len(groups[-2]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_start(group, gap) + gap * i for group in groups for i in range(len(group))]


def _start(group: Sequence[float], gap: float) -> float:
    """Return where a group of letters begins, so that it stands about its middle and inside 0..1."""
    length = gap * (len(group) - 1)
    middle = math.fsum(group) / len(group)
    return max(min(middle - length / 2, 1 - length), 0.0)


def _letters(lines: Sequence[Line], bottom: float, top: float, logarithmic: bool, pixels: int) -> list[dict[str, Any]]:
    """Write each formula's letter at the end of its line, moved apart where lines end together."""
    ends = [(line, *end) for line in lines if (end := line.end()) is not None]
    if not ends:
        return []

    def height(value: float) -> float:
        if logarithmic:
            return (math.log10(max(value, bottom)) - math.log10(bottom)) / (math.log10(top) - math.log10(bottom))
        return (value - bottom) / (top - bottom)

    ends.sort(key=lambda entry: height(entry[2]))
    places = _apart([height(value) for *_, value in ends], _LETTER / max(pixels - 60, _LETTER))
    last = max(step for _, step, _ in ends)
    traces = []
    for (line, _, _), place in zip(ends, places, strict=True):
        if logarithmic:
            y = 10 ** (math.log10(bottom) + place * (math.log10(top) - math.log10(bottom)))
        else:
            y = bottom + place * (top - bottom)
        traces.append(
            {
                "type": "scatter",
                "mode": "text",
                "x": [last],
                "y": [y],
                "text": [f" <b>{figure_text(line.sign)}</b>"],
                "textposition": "middle right",
                "textfont": {"color": palette.colour(line.formula), "size": 13},
                "cliponaxis": False,
                "hoverinfo": "skip",
                "meta": {"formula": line.formula},
            }
        )
    return traces


@dataclass(frozen=True)
class Row:
    """One row of a forest: a mean with its interval, and the difference on every seed."""

    formula: int
    label: str
    hover: str
    estimate: Estimate
    per_seed: dict[int, float]


def forest(rows: Sequence[Row], metric: Metric) -> Figure:
    """Draw differences with their intervals around a zero line; the better side is tinted and named."""
    scale, unit = (100.0, " points") if metric.percent else (1.0, "")
    decimals = "+.1f" if metric.percent else "+.4g"
    data: list[dict[str, Any]] = []
    reach = [0.0]
    for place, row in enumerate(rows):
        y = -float(place)
        tone = palette.colour(row.formula)
        finite = [(seed, scale * value) for seed, value in row.per_seed.items() if math.isfinite(value)]
        if len(finite) > DOTS:
            finite = list(spread(sorted(finite, key=lambda pair: pair[1]), DOTS))
        seeds = dict(finite)
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": list(seeds.values()),
                "y": [y - 0.24] * len(seeds),
                "marker": {"color": palette.colour(row.formula, 0.55), "size": 6},
                "customdata": list(seeds),
                "hovertemplate": f"seed %{{customdata}}: %{{x:{decimals}}}{unit}<extra></extra>",
                "meta": {"formula": row.formula},
            }
        )
        reach.extend(seeds.values())
        if not math.isfinite(row.estimate.mean):
            continue
        mean = scale * row.estimate.mean
        bar: dict[str, Any] = {}
        said = "no interval"
        if row.estimate.lower is not None and row.estimate.upper is not None:
            low, high = scale * row.estimate.lower, scale * row.estimate.upper
            said = f"{low:{decimals}} to {high:{decimals}}{unit}"
            bar = {
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [high - mean],
                    "arrayminus": [mean - low],
                    "color": tone,
                    "thickness": 2.4,
                    "width": 6,
                }
            }
            reach.extend((low, high))
        reach.append(mean)
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [mean],
                "y": [y],
                "marker": {
                    "color": tone,
                    "size": 11,
                    # Hollow where nothing says how sure the mean is.
                    "symbol": palette.symbol(row.formula) + ("" if bar else "-open"),
                },
                "text": [f"{figure_text(row.hover, 80)}<br>{mean:{decimals}}{unit} ({said})"],
                "hovertemplate": "%{text}<extra></extra>",
                "meta": {"formula": row.formula},
                **bar,
            }
        )
    low, high = min(reach), max(reach)
    room = 0.1 * (high - low) or 1.0
    low, high = low - room, high + room
    good = (0.0, high) if metric.direction == "max" else (low, 0.0)
    return {
        "data": data,
        "layout": {
            "margin": {"l": 20, "r": 16, "t": 30, "b": 44},
            "hovermode": "closest",
            "showlegend": False,
            "xaxis": {
                "title": {
                    "text": f"difference in {figure_text(metric.title, 40)}" + (" (points)" if metric.percent else "")
                },
                "range": [low, high],
                "nticks": 7,
                "tickformat": "~g",
            },
            "yaxis": {
                "tickvals": [-float(place) for place in range(len(rows))],
                "ticktext": [row.label for row in rows],
                "range": [0.6 - len(rows), 0.5],
                "showgrid": False,
            },
            "shapes": [
                {
                    "type": "rect",
                    "xref": "x",
                    "yref": "paper",
                    "x0": good[0],
                    "x1": good[1],
                    "y0": 0,
                    "y1": 1,
                    "layer": "below",
                    "line": {"width": 0},
                    "fillcolor": "good-wash",
                },
                {
                    "type": "line",
                    "xref": "x",
                    "yref": "paper",
                    "x0": 0,
                    "x1": 0,
                    "y0": 0,
                    "y1": 1,
                    "layer": "between",
                    "line": {"width": 2, "color": "zero"},
                },
            ],
            "annotations": [
                {
                    "xref": "x",
                    "yref": "paper",
                    "x": 0,
                    "y": 1,
                    "yanchor": "bottom",
                    "xanchor": "left" if metric.direction == "max" else "right",
                    "text": "better →" if metric.direction == "max" else "← better",
                    "showarrow": False,
                    "font": {"color": "good", "size": 12},
                }
            ],
        },
    }


@dataclass(frozen=True)
class Point:
    """One formula's cost and quality."""

    formula: int
    text: str
    cost: Estimate
    quality: Estimate
    runs: tuple[tuple[float, float], ...]


def cost_quality(
    points: Sequence[Point], metric: Metric, *, across: str = "seconds per training run", unit: str = " s"
) -> Figure:
    """Draw what a formula costs against the metric, one cross of intervals a formula and one faint mark a run.

    Args:
        across: what the level axis is, and in which `unit`.
    """
    price = unit
    scale, unit = (100.0, " %") if metric.percent else (1.0, "")
    decimals = ".1f" if metric.percent else ".4g"
    data: list[dict[str, Any]] = []
    for point in points:
        if not (math.isfinite(point.cost.mean) and math.isfinite(point.quality.mean)):
            continue
        tone = palette.colour(point.formula)
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [seconds for seconds, _ in point.runs],
                "y": [scale * quality for _, quality in point.runs],
                "marker": {
                    "color": palette.colour(point.formula, 0.4),
                    "size": 6,
                    "symbol": palette.symbol(point.formula),
                },
                "hoverinfo": "skip",
                "meta": {"formula": point.formula},
            }
        )
        data.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "x": [point.cost.mean],
                "y": [scale * point.quality.mean],
                "name": f"{palette.letter(point.formula)}  {figure_text(point.text, _HOVER_NAME)}",
                "text": [f" <b>{palette.letter(point.formula)}</b>"],
                "textposition": "top right",
                "textfont": {"color": tone, "size": 14},
                "cliponaxis": False,
                "marker": {"color": tone, "size": 12, "symbol": palette.symbol(point.formula)},
                "hovertemplate": f"%{{fullData.name}}<br>%{{y:{decimals}}}{unit} at %{{x:.3g}}{price}<extra></extra>",
                "meta": {"formula": point.formula},
                **_bar("error_x", point.cost, 1.0, tone),
                **_bar("error_y", point.quality, scale, tone),
            }
        )
    return {
        "data": data,
        "layout": {
            "margin": {"l": 48, "r": 26, "t": 16, "b": 44},
            "hovermode": "closest",
            "showlegend": False,
            "xaxis": {
                "title": {"text": across},
                "rangemode": "tozero",
                "nticks": 7,
                "ticksuffix": price if price == " s" else "",
            },
            "yaxis": {"title": {"text": f"test {figure_text(metric.title, 40)}"}, "ticksuffix": unit, "nticks": 6},
        },
    }


@dataclass(frozen=True)
class Front:
    """What one run found between two objectives, both to be minimised.

    Attributes:
        formula, seed: which run.
        points: the two objectives of every point.
        chosen: place of the point that the run ended with, or None.
    """

    formula: int
    seed: int
    points: tuple[tuple[float, float], ...]
    chosen: int | None

    def staircase(self) -> tuple[tuple[float, float], ...]:
        """Return the points that no other one dominates, from left to right."""
        best: list[tuple[float, float]] = []
        for x, y in sorted(set(self.points)):
            if not best or y < best[-1][1]:
                best.append((x, y))
        return tuple(best)


def fronts(found: Sequence[Front], across: str, upward: str) -> Figure:
    """Draw every run's front as a staircase, its points, and a ring about the point that was chosen."""
    data: list[dict[str, Any]] = []
    for front in found:
        stairs, letter = front.staircase(), palette.letter(front.formula)
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [x for x, _ in stairs],
                "y": [y for _, y in stairs],
                "line": {"color": palette.colour(front.formula, 0.5), "width": 1.6, "shape": "hv"},
                "hoverinfo": "skip",
                "meta": {"formula": front.formula},
            }
        )
        rings = [1.8 if place == front.chosen else 0 for place in range(len(front.points))]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [x for x, _ in front.points],
                "y": [y for _, y in front.points],
                "marker": {
                    "color": palette.colour(front.formula),
                    "size": [13 if ring else 7 for ring in rings],
                    "symbol": palette.symbol(front.formula),
                    "line": {"color": "ink", "width": rings},
                },
                "customdata": ["chosen" if ring else "point" for ring in rings],
                "hovertemplate": f"{letter}, seed {front.seed}, %{{customdata}}<br>%{{x:.4g}}, %{{y:.4g}}<extra></extra>",
                "meta": {"formula": front.formula},
            }
        )
    return {
        "data": data,
        "layout": {
            "margin": {"l": 52, "r": 18, "t": 10, "b": 44},
            "hovermode": "closest",
            "showlegend": False,
            "xaxis": {"title": {"text": figure_text(across, 40)}, "nticks": 6},
            "yaxis": {"title": {"text": figure_text(upward, 40)}, "nticks": 6},
        },
    }


def _bar(name: str, estimate: Estimate, scale: float, tone: str) -> dict[str, Any]:
    if estimate.lower is None or estimate.upper is None:
        return {}
    return {
        name: {
            "type": "data",
            "symmetric": False,
            "array": [scale * (estimate.upper - estimate.mean)],
            "arrayminus": [scale * (estimate.mean - estimate.lower)],
            "color": tone,
            "thickness": 1.6,
            "width": 4,
        }
    }


def trials(rows: Sequence[TrialRow], parameter: str, metric: Metric) -> Figure:
    """Draw every tried value of one parameter against the score it reached; a ring marks the values that were chosen."""
    scale, unit = (100.0, " %") if metric.percent else (1.0, "")
    decimals = ".1f" if metric.percent else ".4g"
    data: list[dict[str, Any]] = []
    tried = [1.0]
    for formula in sorted({row.formula for row in rows}):
        seen = [
            (value, scale * row.score, row)
            for row in rows
            if row.formula == formula and row.score is not None and math.isfinite(row.score)
            if (value := row.lr if parameter == "lr" else row.weights.get(parameter)) is not None and value > 0
        ]
        if not seen:
            continue
        tried = [*(tried if data else []), *(value for value, _, _ in seen)]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [value for value, _, _ in seen],
                "y": [score for _, score, _ in seen],
                "customdata": [[row.seed, row.trial, row.rung + 1] for _, _, row in seen],
                "marker": {
                    "color": [palette.colour(formula, 1.0 if row.selected else 0.45) for _, _, row in seen],
                    "size": [12 if row.selected else 7 for _, _, row in seen],
                    "symbol": palette.symbol(formula),
                    "line": {"color": "ink", "width": [1.8 if row.selected else 0 for _, _, row in seen]},
                },
                "hovertemplate": (
                    f"{palette.letter(formula)}, seed %{{customdata[0]}}, trial %{{customdata[1]}}, "
                    f"round %{{customdata[2]}}<br>%{{x:.3g}}: %{{y:{decimals}}}{unit}<extra></extra>"
                ),
                "meta": {"formula": formula},
            }
        )
    return {
        "data": data,
        "layout": {
            "margin": {"l": 48, "r": 16, "t": 10, "b": 44},
            "hovermode": "closest",
            "showlegend": False,
            "xaxis": {
                "title": {"text": "learning rate" if parameter == "lr" else f"weight of {figure_text(parameter, 40)}"},
                "type": "log",
                "tickformat": "~g",
                **({"dtick": 1} if max(tried) / min(tried) > 30 else {"nticks": 5}),
            },
            "yaxis": {
                "title": {"text": f"validation {figure_text(metric.title, 40)}"},
                "ticksuffix": unit,
                "nticks": 6,
            },
        },
    }
