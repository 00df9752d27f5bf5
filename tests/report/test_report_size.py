"""A study of thousands of runs gives a page that a browser can open, and says what it left out."""

from __future__ import annotations

import dataclasses

import pytest
from benchmarks import size_studies

from poise.report import figures, page
from poise.report.write import render
from poise.studies import Study


@pytest.fixture(scope="module")
def many_formulas(tmp_path_factory):
    made = size_studies.study("formulas", 780, tmp_path_factory.mktemp("formulas"))
    assert size_studies.write(made) > 700
    return Study.open(made.folder)


def test_figures_draw_the_best_formulas_and_the_tables_hold_all(many_formulas) -> None:
    made = page.Page(many_formulas)
    assert len(many_formulas.formulas) == 26
    assert len(made.drawn) == page.FORMULAS_DRAWN
    assert 0 in made.drawn
    assert len(made.results.rows) == 26
    best = max(many_formulas.formulas, key=lambda entry: entry.metrics["accuracy"].mean)
    assert best.index in made.drawn
    assert any("24 of the 26 formulas" in cut for cut in made.cuts)


def test_a_page_of_many_formulas_is_small_and_says_what_it_leaves_out(many_formulas) -> None:
    html = render(many_formulas)
    assert len(html) < 5e6
    assert "A large study." in html


def test_a_study_of_usual_size_leaves_nothing_out(many_formulas) -> None:
    small = dataclasses.replace(
        many_formulas, formulas=many_formulas.formulas[:3], term_effects=(), differences=(), between=()
    )
    assert page.Page(small).cuts == []


def test_thinning_keeps_both_ends() -> None:
    assert figures.spread(range(1000), 3) == [0, 500, 999]
    assert figures.spread([1, 2], 3) == [1, 2]


def test_the_list_of_trials_keeps_the_chosen_ones(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(page, "TRIALS_LISTED", 100)
    made = size_studies.study("search", 400, tmp_path)
    assert size_studies.write(made) > 300
    summary = Study.open(tmp_path)
    rows = page.Page(summary).trial_rows()
    chosen = sum(row.selected for row in summary.trials)
    assert len(rows) <= page.TRIALS_LISTED + chosen < len(summary.trials)
    assert sum(row["selected"] for row in rows) == chosen


@pytest.mark.slow
@pytest.mark.parametrize("shape", size_studies.SHAPES)
def test_ten_thousand_runs_fit_their_limits(shape: str, tmp_path) -> None:
    made = size_studies.study(shape, 10_000, tmp_path)
    size_studies.write(made)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 200e6
    assert len(render(Study.open(tmp_path))) < 10e6
