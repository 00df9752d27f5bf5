"""The figures are valid plotly, say what the numbers say, and stay small."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_example import ACCURACY, NLL, curve, make_summary

from poise.report import figures
from poise.report.figures import POINTS, Line, Row
from poise.report.page import Page
from poise.report.palette import THEMES, plotly_template
from poise.studies.intervals import t_interval
from poise.studies.summary import Curve

FIVE = (
    ("cross_entropy", ("cross_entropy",)),
    ("cross_entropy + 3*early_learning", ("cross_entropy", "early_learning")),
    (
        "cross_entropy + auto*early_learning + linear(0, 1, steps=500)*mixup",
        ("cross_entropy", "early_learning", "mixup"),
    ),
    ("cross_entropy + auto*l2", ("cross_entropy", "l2")),
    ("label_smoothing(amount=0.1)", ("label_smoothing",)),
)


def coloured(value: Any, key: str = "") -> Any:
    """Do in Python what the page's script does: put in the colours of a theme."""
    if isinstance(value, dict):
        return {name: coloured(item, name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [coloured(item, key) for item in value]
    if isinstance(value, str) and key.endswith("color"):
        name, _, _ = value.partition("/")
        assert name in THEMES["light"], f"{value!r} is no colour token"
        return THEMES["light"][name]
    return value


@pytest.mark.parametrize("options", [{}, {"formulas": FIVE, "tuned": True, "failed": True}, {"seeds": 1}, {"seeds": 2}])
def test_every_figure_is_valid_plotly_in_colours_of_the_palette(options: dict[str, Any]) -> None:
    import plotly.graph_objects as go

    charts = Page(make_summary(**options)).charts
    assert charts
    for chart in charts:
        figure = coloured(chart.figure)
        figure["layout"]["template"] = plotly_template("dark")
        go.Figure(figure)  # raises on any property or value that plotly does not know


def test_every_trace_says_to_which_formula_it_belongs() -> None:
    for chart in Page(make_summary(FIVE, tuned=True)).charts:
        assert {trace["meta"]["formula"] for trace in chart.figure["data"]} <= {key.index for key in chart.keys}


def test_ids_of_figures_are_unique() -> None:
    ids = [chart.id for chart in Page(make_summary(FIVE, tuned=True)).charts]
    assert len(ids) == len(set(ids))


@given(st.integers(1, 20_000))
def test_a_long_curve_is_drawn_with_at_most_500_points_and_keeps_its_mean(length: int) -> None:
    values = tuple(float(i % 7) for i in range(length))
    line = Line.of(0, "a", Curve("loss", tuple(range(length)), values, values, values, {0: values}))
    assert len(line.steps) == len(line.mean) == len(line.runs[0]) <= POINTS
    whole = length - length % line.averaged
    if whole:
        blocks = [value for value in line.mean[: whole // line.averaged] if value is not None]
        assert sum(blocks) / len(blocks) == pytest.approx(sum(values[:whole]) / whole)


def test_missing_and_infinite_values_leave_a_gap_and_no_number() -> None:
    line = Line.of(0, "a", Curve("loss", (0, 1, 2), (1.0, None, float("inf")), (None,) * 3, (None,) * 3))
    assert line.mean == (1.0, None, None)
    assert line.end() == (0, 1.0)
    figures.curves([line])


def test_the_band_has_the_edges_of_the_interval() -> None:
    made = curve("loss", [0, 1], {0: [1.0, 2.0], 1: [1.1, 2.2], 2: [1.2, 2.3]})
    band = figures.curves([Line.of(0, "a", made)])["data"][0]
    assert band["fill"] == "toself"
    assert band["x"] == [0, 1, 1, 0]
    assert band["y"] == pytest.approx([made.upper[0], made.upper[1], made.lower[1], made.lower[0]])


def test_one_seed_has_no_band() -> None:
    made = curve("loss", [0, 1], {0: [1.0, 2.0]})
    assert all("fill" not in trace for trace in figures.curves([Line.of(0, "a", made)])["data"])


def test_a_wide_interval_does_not_press_the_lines_flat() -> None:
    made = curve("loss", [0, 1, 2], {0: [1.0, 2.0, 3.0], 1: [1.3, 2.1, 3.2]})
    assert made.upper[0] is not None
    assert made.upper[0] > 3
    low, high = figures.curves([Line.of(0, "a", made)])["layout"]["yaxis"]["range"]
    assert high - low < 2 * (3.2 - 1.0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9).map(sorted), st.floats(0.02, 0.1))
def test_letters_at_the_ends_of_lines_keep_their_order_and_their_distance(wanted: list[float], gap: float) -> None:
    places = figures._apart(wanted, gap)
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(places))
    assert min(places) >= -1e-9
    assert max(places) <= 1 + 1e-9


def test_lines_that_lie_on_each_other_are_dashed_so_that_both_show() -> None:
    made = curve("weight", [0, 1, 2], {0: [1.0, 1.0, 1.0]})
    data = figures.curves([Line.of(0, "a", made), Line.of(1, "b", made)])["data"]
    dashes = [trace["line"]["dash"] for trace in data if trace["mode"] == "lines"]
    assert dashes == ["solid", "8px,8px"]


def test_a_forest_shows_mean_interval_and_every_seed_in_points() -> None:
    per_seed = {0: 0.10, 1: 0.12, 2: 0.11}
    estimate = t_interval(list(per_seed.values()))
    seeds, mean = figures.forest([Row(1, "B − A", "B", estimate, per_seed)], ACCURACY)["data"]
    assert seeds["x"] == pytest.approx([10, 12, 11])
    assert mean["x"] == pytest.approx([11])
    assert estimate.upper is not None
    assert mean["error_x"]["array"][0] == pytest.approx(100 * estimate.upper - 11)
    assert "-open" not in mean["marker"]["symbol"]


def test_a_mean_without_interval_is_drawn_hollow_and_without_bar() -> None:
    *_, mean = figures.forest([Row(1, "B − A", "B", t_interval([0.1]), {0: 0.1})], ACCURACY)["data"]
    assert mean["marker"]["symbol"].endswith("-open")
    assert "error_x" not in mean
    assert "no interval" in mean["text"][0]


@pytest.mark.parametrize(("metric", "side"), [(ACCURACY, "right"), (NLL, "left")])
def test_the_better_side_follows_the_direction_of_the_metric(metric: Any, side: str) -> None:
    layout = figures.forest([Row(1, "B", "B", t_interval([0.1, -0.2]), {0: 0.1, 1: -0.2})], metric)["layout"]
    tinted = layout["shapes"][0]
    assert (tinted["x0"] == 0 and tinted["x1"] > 0) if side == "right" else (tinted["x1"] == 0 and tinted["x0"] < 0)
    assert layout["annotations"][0]["text"] == ("better →" if side == "right" else "← better")


def test_a_loss_over_many_decades_gets_a_logarithmic_axis() -> None:
    made = curve("loss", [0, 1, 2], {0: [1000.0, 1.0, 0.01]})
    assert figures.wants_logarithm([Line.of(0, "a", made)])
    assert figures.curves([Line.of(0, "a", made)], logarithmic=True)["layout"]["yaxis"]["type"] == "log"


def test_figures_say_their_numbers_in_words_too() -> None:
    page = Page(make_summary())
    assert re.search(r"B − A.*: \+\d+\.\d points, interval \+\d+\.\d to \+\d+\.\d points", page.forests[0].says)
    assert "A starts at" in page.quality_curves[0].chart.says
