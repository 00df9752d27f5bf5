"""The pages on constraints and on weights that set themselves: there only where a run has the data, and true to them."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_example import WAYS, constraint_curves, curve, make_policy_summary, make_summary
from test_report_embedding import HOSTILE
from test_report_figures import coloured

from poise.report import figures
from poise.report.figures import Front, Line
from poise.report.page import Page
from poise.report.palette import plotly_template
from poise.report.tuning_cost import expected_best
from poise.report.write import render
from poise.studies.summary import FormulaSummary, Summary


@pytest.fixture(scope="module")
def summary() -> Summary:
    return make_policy_summary()


@pytest.fixture(scope="module")
def page(summary: Summary) -> Page:
    return Page(summary)


@pytest.fixture(scope="module")
def html(summary: Summary) -> str:
    return render(summary)


def test_a_study_without_them_has_neither_section() -> None:
    plain = Page(make_summary(tuned=True))
    assert plain.constraints is None
    assert plain.policies is None
    html = render(make_summary(tuned=True))
    assert 'id="constraints"' not in html
    assert 'id="policies"' not in html


@pytest.mark.parametrize(
    ("parts", "there"),
    [
        ({"weight"}, "weights"),
        ({"gradient_norm"}, "drivers"),
        ({"hypergradient"}, "drivers"),
        ({"cosine"}, "cosines"),
        ({"training_objective"}, "objectives"),
    ],
)
def test_a_figure_stands_only_where_its_curves_are(parts: set[str], there: str) -> None:
    found = Page(make_policy_summary(parts=frozenset(parts), seeds=2, steps=40)).policies
    assert found is not None
    (panel,) = found.panels
    for name in ("weights", "drivers", "cosines", "objectives"):
        assert bool(getattr(panel, name)) is (name == there)
    assert found.errors is None
    assert found.hypervolumes is None
    assert found.fronts == ()


def test_what_else_a_policy_says_about_every_weight_is_drawn_beside_it(summary: Summary) -> None:
    entry = summary.formulas[3]
    own = {
        f"policy/influence/{name}": curve("i", [0, 1], {0: [value, 2.0]})
        for name, value in (("l2", -1.0), ("mixup", 1.0))
    }
    changed = replace(entry, curves={**entry.curves, **own})
    page = Page(replace(summary, formulas=(*summary.formulas[:3], changed, summary.formulas[4])))
    assert page.policies is not None
    titles = [section.chart.title for section in page.policies.panels[0].drivers]
    assert titles == ["Gradient norms in D", "Hypergradients in D", "Influence in D"]


def test_what_policies_chose_is_no_alignment(summary: Summary) -> None:
    entry = summary.formulas[3]
    seeds = tuple(replace(run, details={"weights": {"l2": 0.1}}) for run in entry.seeds)
    assert (
        Page(
            replace(summary, formulas=(*summary.formulas[:3], replace(entry, seeds=seeds), summary.formulas[4]))
        ).alignment
        is None
    )


@pytest.mark.parametrize("part", ["hypergradient_error", "hypervolume", "front"])
def test_what_is_drawn_by_formula_needs_no_panel(part: str) -> None:
    found = Page(make_policy_summary(parts=frozenset({part}), seeds=2, steps=40)).policies
    assert found is not None
    assert found.panels == ()
    there = {"hypergradient_error": found.errors, "hypervolume": found.hypervolumes, "front": found.fronts}
    assert [name for name, value in there.items() if value] == [part]
    assert render(make_policy_summary(parts=frozenset({part}), seeds=2, steps=40))


def test_every_figure_is_valid_plotly_in_colours_of_the_palette_and_its_legend_finds_every_line(page: Page) -> None:
    import plotly.graph_objects as go

    for chart in page.charts:
        assert {trace["meta"]["formula"] for trace in chart.figure["data"]} <= {key.index for key in chart.keys}
        figure = coloured(chart.figure)
        figure["layout"]["template"] = plotly_template("light")
        go.Figure(figure)
    ids = [chart.id for chart in page.charts]
    assert len(ids) == len(set(ids))


def test_weights_norms_and_hypergradients_of_one_name_have_one_number_and_one_colour(page: Page) -> None:
    assert page.policies is not None
    (panel,) = page.policies.panels
    assert [(key.letter, key.text) for key in panel.names] == [("1", "l2"), ("2", "mixup"), ("3", "cross_entropy")]
    for chart in panel.shared:
        for key in chart.keys:
            assert key == panel.names[key.index]
    marks = [trace["text"][0] for trace in panel.shared[1].figure["data"] if trace["mode"] == "text"]
    assert sorted(marks) == [" <b>1</b>", " <b>2</b>", " <b>3</b>"]


def test_curves_of_these_sections_are_not_shown_twice_and_unknown_ones_are_not_lost(summary: Summary) -> None:
    first = summary.formulas[3]
    extra = replace(first, curves={**first.curves, "policy/own_measure": curve("own", [0, 1], {0: [1.0, 2.0]})})
    titles = [
        s.chart.title
        for s in Page(replace(summary, formulas=(*summary.formulas[:3], extra, summary.formulas[4]))).other_curves
    ]
    assert "policy/own_measure" in titles
    assert not [title for title in titles if title.startswith(("constraint/", "policy/weight", "policy/front"))]


def test_every_figure_is_said_in_words_and_in_numbers(page: Page, html: str) -> None:
    assert page.policies is not None
    (panel,) = page.policies.panels
    assert panel.weights is not None
    assert "l2 starts at 0.0" in panel.weights.chart.says
    for chart in page.charts:
        assert chart.says
    for title in ("Weights in D", "Gradient norms in D", "Hypergradients in D", "Cosines in D", "Objectives in D"):
        assert f"The numbers of {title}" in html
    assert "cross_entropy and l2" in html


# ---- constraints -----------------------------------------------------------------------------------------------------


def test_a_constraint_says_on_how_many_seeds_it_held(page: Page, html: str) -> None:
    assert page.constraints is not None
    held, lost = page.constraints.rows
    assert (held.key.letter, held.feasible, held.violation) == ("D", True, "0")
    assert (lost.key.letter, lost.feasible, lost.sentence) == (
        "E",
        False,
        "not feasible on 1 of 3 seeds, mean violation 1",
    )
    assert "not feasible on 1 of 3 seeds" in html
    (panel,) = page.constraints.panels
    assert [section.chart.title for section in panel.sections] == ["Violation of l2", "Multiplier of l2"]


def test_the_line_at_zero_is_always_in_sight() -> None:
    for values in ([3.0, 4.0], [-3.0, -4.0], [-1.0, 1.0]):
        figure = figures.curves([Line.of(0, "a", curve("v", [0, 1], {0: values}))], zero=True)
        low, high = figure["layout"]["yaxis"]["range"]
        assert low < 0 < high
        assert figure["layout"]["shapes"][0]["y0"] == 0


def test_one_seed_and_many_seeds_are_said_alike() -> None:
    one = make_policy_summary(seeds=1, steps=40).formulas[4].constraints
    assert [found.sentence for found in one] == ["l2: not feasible, violation 3"]
    many = make_policy_summary(seeds=22, steps=40).formulas[4]
    without_rows = {name: replace(c, per_seed={}) for name, c in many.curves.items()}
    assert replace(many, curves=without_rows).constraints == many.constraints
    assert many.constraints[0].feasible == 21


# ---- fronts ----------------------------------------------------------------------------------------------------------

POINTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12)


@given(POINTS)
def test_the_staircase_holds_every_point_that_no_other_beats_and_no_other_point(points: list[tuple[int, int]]) -> None:
    given_points = tuple((float(x), float(y)) for x, y in points)
    stairs = Front(0, 0, given_points, None).staircase()
    beaten = {p for p, q in itertools.product(given_points, repeat=2) if q != p and q[0] <= p[0] and q[1] <= p[1]}
    assert set(stairs) == set(given_points) - beaten
    assert list(stairs) == sorted(stairs)


def test_every_seed_has_its_own_front_and_its_own_choice(page: Page) -> None:
    assert page.policies is not None
    (chart,) = page.policies.fronts
    points = [trace for trace in chart.figure["data"] if trace["mode"] == "markers"]
    assert [trace["customdata"].index("chosen") for trace in points] == [2, 3, 2]
    assert chart.title == "Front of cross_entropy and l2"


# ---- what finding the weights cost -----------------------------------------------------------------------------------


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.booleans())
def test_the_expected_best_is_the_mean_over_all_choices_of_k(scores: list[float], rising: bool) -> None:
    best = max if rising else min
    for k, found in enumerate(expected_best(scores, rising), start=1):
        chosen = [best(choice) for choice in itertools.combinations(scores, k)]
        assert found == pytest.approx(sum(chosen) / len(chosen), abs=1e-9)


def test_policy_search_and_grid_are_compared_in_seconds_with_everything_that_was_tried(
    page: Page, summary: Summary
) -> None:
    assert page.policies is not None
    assert page.policies.tuning is not None
    rows = page.policies.tuning.rows
    assert [row.way for row in rows] == [
        "policy of D, one run",
        "random search of C, 8 trials",
        "grid of 2 fixed weights",
    ]
    assert [[key.letter for key in row.keys] for row in rows] == [["D"], ["C"], ["A", "B"]]
    seconds = [entry.cost.seconds.mean for entry in summary.formulas]
    plain = (seconds[0] + seconds[1]) / 2
    for row, spent in zip(rows, (seconds[3], 41 / 3 + seconds[2], seconds[0] + seconds[1]), strict=True):
        assert row.relative == f"{spent / plain:.1f}"


def test_a_search_of_the_learning_rate_alone_is_part_of_the_cost_and_no_search_of_weights(summary: Summary) -> None:
    """As `--tune` does: every formula has trials, those of fixed weights and of policies for the learning rate only."""
    rates = tuple(replace(row, formula=index, weights={}) for index in (0, 3) for row in summary.trials)
    changed = [
        replace(f, cost=replace(f.cost, tuning_seconds=30.0)) if f.index in (0, 3) else f for f in summary.formulas
    ]
    page = Page(replace(summary, formulas=tuple(changed), trials=(*rates, *summary.trials)))
    assert page.policies is not None
    assert page.policies.tuning is not None
    policy, search, grid = page.policies.tuning.rows
    assert policy.way == "policy of D, after its search of the learning rate"
    assert search.way == "random search of C, 8 trials"
    assert grid.way == "grid of 2 fixed weights"
    seconds = [f.cost.seconds.mean for f in changed]
    assert policy.relative == f"{(10 + seconds[3]) / ((seconds[0] + seconds[1]) / 2):.1f}"
    assert grid.relative == f"{(10 + seconds[0] + seconds[1]) / ((seconds[0] + seconds[1]) / 2):.1f}"


def test_a_constraint_is_no_fixed_weight(summary: Summary) -> None:
    entry = summary.formulas[1]
    changed = replace(entry, curves={**entry.curves, **constraint_curves(3, 40, "l2", False)})
    page = Page(replace(summary, formulas=(summary.formulas[0], changed, *summary.formulas[2:])))
    assert page.policies is not None
    assert page.policies.tuning is not None
    assert [row.keys[0].letter for row in page.policies.tuning.rows] == ["D", "C"]


def test_a_grid_reaches_on_each_seed_what_validation_chose(summary: Summary) -> None:
    """The better of A and B by validation, seed by seed, and not the better one by test."""
    swapped = []
    for entry in summary.formulas[:2]:
        other = summary.formulas[1 - entry.index]
        swapped.append(replace(entry, curves={**entry.curves, "valid/accuracy": other.curves["valid/accuracy"]}))
    page = Page(replace(summary, formulas=(*swapped, *summary.formulas[2:])))
    assert page.policies is not None
    assert page.policies.tuning is not None
    grid = page.policies.tuning.rows[-1]
    tests = [run.metrics["accuracy"] for run in summary.formulas[0].seeds]
    assert grid.reached == f"{100 * sum(tests) / len(tests):.1f} %"


def test_a_way_that_is_done_keeps_what_it_found_until_the_last_one_ends(page: Page) -> None:
    assert page.policies is not None
    assert page.policies.tuning is not None
    assert page.policies.tuning.chart is not None
    lines = [trace for trace in page.policies.tuning.chart.figure["data"] if trace["mode"] == "lines"]
    assert len({trace["x"][-1] for trace in lines}) == 1
    for trace in lines:
        assert list(trace["y"]) == sorted(trace["y"])
        assert trace["line"]["shape"] == "hv"


def test_ways_that_weigh_other_terms_are_not_compared() -> None:
    assert Page(make_summary(WAYS[2:3] + WAYS[4:], tuned=True)).policies is None


def test_a_search_whose_trials_failed_has_cost_its_budget(summary: Summary) -> None:
    lost = tuple(replace(row, score=None) for row in summary.trials)
    page = Page(replace(summary, trials=lost))
    assert page.policies is not None
    assert page.policies.tuning is not None
    assert "random search of C, 8 trials" in [row.way for row in page.policies.tuning.rows]
    assert page.policies.tuning.chart is not None
    assert len(page.policies.tuning.chart.keys) == 2  # nothing to draw of it


# ---- foreign text ----------------------------------------------------------------------------------------------------


def test_hostile_names_of_weights_and_constraints_stay_text() -> None:
    everything = "".join(HOSTILE)
    html = render(make_policy_summary(seeds=2, steps=40, label=lambda text: text + everything))
    scripts = re.findall(r"<script[^>]*>", html)
    assert len(scripts) == 3
    data: Any = json.loads(html.split('id="data">')[1].split("</script>")[0])
    assert data["figures"]
    assert "<img" not in html


def test_missing_values_leave_gaps_and_no_errors(summary: Summary) -> None:
    def holes(entry: FormulaSummary) -> FormulaSummary:
        curves = {
            name: replace(c, mean=(None, *c.mean[1:]), per_seed={s: (None, *row[1:]) for s, row in c.per_seed.items()})
            for name, c in entry.curves.items()
        }
        return replace(entry, curves=curves)

    assert render(replace(summary, formulas=tuple(holes(entry) for entry in summary.formulas)))
    assert render(make_policy_summary(seeds=1, steps=3))
