"""The page opens with the answer, never names a winner without an interval, and is written whole."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from report_example import NLL, PYTHON, RMSE, make_summary
from test_report_embedding import Structure
from test_report_figures import FIVE

from poise.errors import InputError, StoreError
from poise.report import rebuild, render, write_report
from poise.report.page import Mention, Page
from poise.studies.summary import Recommendation

ONE = (("cross_entropy", ("cross_entropy",)),)


def text_of(html: str) -> str:
    page = Structure(html)
    return " ".join(
        " ".join(text for name, text in page.text.items() if name not in ("script", "style", "data")).split()
    )


def test_the_answer_comes_before_tables_and_figures() -> None:
    html = render(make_summary())
    assert html.index('id="answer"') < html.index("<table") < html.index('class="plot"')


def test_the_answer_states_the_difference_with_its_interval() -> None:
    summary = make_summary()
    answer = Page(summary).answer
    assert answer.headline == "A clear difference"
    assert answer.amount.endswith(" points")
    assert answer.interval.count("+") == 2
    assert answer.interval in render(summary)


@pytest.mark.parametrize("seeds", [1, 5])
def test_a_recommendation_whose_interval_is_missing_or_touches_zero_is_not_shown_as_a_winner(seeds: int) -> None:
    summary = make_summary(seeds=seeds, gains=(0.0, -0.1))
    claimed = dataclasses.replace(summary, recommendation=Recommendation("better", 1, "B wins.", ""))
    if seeds == 5:
        flat = [
            dataclasses.replace(d, estimate=dataclasses.replace(d.estimate, lower=-1.0, upper=1.0))
            for d in summary.differences
        ]
        claimed = dataclasses.replace(claimed, differences=tuple(flat))
    page = Page(claimed)
    assert page.answer.kind == "no interval"
    assert page.answer.headline == "No interval, no winner"
    assert page.answer.shown is None
    assert all(row.verdict not in ("better", "worse") for row in page.results.rows)


def test_with_one_seed_the_table_says_why_there_is_no_interval() -> None:
    text = text_of(render(make_summary(seeds=1)))
    assert "one seed gives no interval" in text
    assert "A clear difference" not in text


def test_every_finding_in_the_table_stands_beside_its_interval_and_adjusted_p_value() -> None:
    for row in Page(make_summary(FIVE)).results.rows[1:]:
        assert row.difference is not None
        assert row.difference.interval
        assert row.p != "–"


def test_the_page_holds_every_part() -> None:
    html = render(make_summary(FIVE, failed=True, tuned=True))
    for part in (
        "answer",
        "results",
        "differences",
        "bought",
        "learning",
        "terms",
        "cost",
        "tuning",
        "failed",
        "python",
    ):
        assert f'<section id="{part}"' in html
        assert f'href="#{part}"' in html
    text = text_of(html)
    for said in (
        "became NaN at step 212",
        "looks like a row number",
        "40 % of the training",
        "torch",
        "2 cores",
        "1,797",
    ):
        assert said in text


def test_every_table_has_a_caption_and_every_figure_a_description() -> None:
    html = render(make_summary(FIVE, failed=True, tuned=True))
    assert html.count("<table") == html.count("<caption>")
    assert html.count('class="plot"') == html.count('role="img" aria-label="') > 10
    assert 'aria-label=""' not in html


def test_every_recorded_curve_is_drawn() -> None:
    summary = make_summary(FIVE)
    page = Page(summary)
    drawn = [page.loss_curve, *page.quality_curves, *page.other_curves]
    assert all(section is not None for section in drawn)
    panels = {panel.label for panel in page.terms if panel.value is not None and panel.weight is not None}
    recorded = {name for formula in summary.formulas for name in formula.curves}
    assert {name.split("/", 1)[1] for name in recorded if name.startswith(("term/", "weight/"))} == panels
    rest = {name for name in recorded if not name.startswith(("term/", "weight/", "active/"))}
    assert len(drawn) == len(rest)


def test_headings_do_not_skip_a_level() -> None:
    elements = Structure(render(make_summary(FIVE, failed=True, tuned=True))).elements
    levels = [int(tag[1]) for tag, _ in elements if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


@pytest.mark.parametrize(
    "summary",
    [
        make_summary(ONE),
        make_summary(seeds=1),
        make_summary(metrics=(RMSE,)),
        make_summary(metrics=(NLL, RMSE)),
        dataclasses.replace(
            make_summary(ONE), formulas=tuple(dataclasses.replace(f, curves={}, seeds=(), metrics={}) for f in make_summary(ONE).formulas)
        ),
        dataclasses.replace(make_summary(), recommendation=Recommendation("failed", None, "No run has finished.", "")),
    ],
    ids=["one formula", "one seed", "regression", "two metrics to minimise", "nothing finished", "failed"],
)  # fmt: skip
def test_a_study_of_any_shape_gives_a_page(summary: object) -> None:
    assert "How it was measured" in render(summary)  # type: ignore[arg-type]


def test_a_formula_named_in_a_sentence_gets_its_letter_and_a_longer_formula_is_not_taken_for_a_shorter_one() -> None:
    page = Page(make_summary())
    said = "cross_entropy + 3*early_learning is better than cross_entropy by 2 points, my_cross_entropy not."
    parts = page.marked(said)
    assert [part.key.letter for part in parts if isinstance(part, Mention)] == ["B", "A"]
    assert "".join(part.key.text if isinstance(part, Mention) else part for part in parts) == said
    assert page.marked("cross_entropy + l2") == ["cross_entropy + l2"]


def test_a_formula_is_written_out_once_in_a_sentence_and_then_named_by_its_letter() -> None:
    parts = Page(make_summary()).marked("cross_entropy, again cross_entropy")
    assert [part.first for part in parts if isinstance(part, Mention)] == [True, False]


def test_runs_that_failed_in_the_same_way_are_named_together() -> None:
    summary = make_summary(failed=True, tuned=True)
    trial = dataclasses.replace(summary.failed[0], role="trial")
    page = Page(
        dataclasses.replace(
            summary, failed=(*summary.failed, *(dataclasses.replace(trial, run=str(i)) for i in range(9)))
        )
    )
    assert [(failure.role, len(failure.runs)) for failure in page.failures()] == [("final", 1), ("trial", 9)]
    assert page.failed_text() == "10 runs"


def test_the_lines_to_paste_are_the_lines_of_the_summary_and_run() -> None:
    pasted = Structure(render(make_summary())).text["lines"]
    assert pasted.strip() == PYTHON.strip()
    done = subprocess.run([sys.executable, "-c", pasted], capture_output=True, text=True, check=True)
    assert done.stdout == "4.0 less < more & <b>\n"


def test_the_folder_holds_the_page_and_the_script_that_draws_it(tmp_path: Path) -> None:
    page = write_report(make_summary(), tmp_path / "new" / "folder")
    assert page == tmp_path / "new" / "folder" / "report.html"
    assert sorted(entry.name for entry in page.parent.iterdir()) == ["plotly.min.js", "report.html"]
    # The page stays small because the four megabytes of the script lie beside it.
    assert page.stat().st_size < 1_000_000
    assert (page.parent / "plotly.min.js").stat().st_size > 1_000_000


def test_a_second_report_replaces_the_first_and_the_same_summary_gives_the_same_bytes(tmp_path: Path) -> None:
    first = write_report(make_summary(seeds=2), tmp_path).read_bytes()
    second = write_report(make_summary(), tmp_path).read_bytes()
    assert first != second
    assert write_report(make_summary(seeds=2), tmp_path).read_bytes() == first


def test_the_page_mentions_study_toml_only_where_it_lies_beside_it(tmp_path: Path) -> None:
    assert "study.toml" not in write_report(make_summary(), tmp_path).read_text(encoding="utf-8")
    (tmp_path / "study.toml").write_text("")
    assert "study.toml" in write_report(make_summary(), tmp_path).read_text(encoding="utf-8")


def test_a_file_in_place_of_the_folder_is_named_and_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match=r"cannot be written to .*taken.*Give a folder"):
        write_report(make_summary(), tmp_path / "taken")


def test_a_disk_that_is_full_leaves_the_old_page_whole_and_no_scraps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = write_report(make_summary(), tmp_path)
    before = page.read_bytes()

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="No space left on device"):
        write_report(make_summary(seeds=2), tmp_path)
    assert page.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["plotly.min.js", "report.html"]


def test_rebuilding_without_a_store_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no store"):
        rebuild(tmp_path)


def test_importing_the_report_loads_neither_pytorch_nor_plotly_nor_jinja() -> None:
    script = "import sys, poise.report; print([name for name in ('torch', 'plotly', 'jinja2', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_report_of_two_formulas_and_five_seeds_takes_less_than_two_seconds(tmp_path: Path) -> None:
    summary = make_summary(steps=3000)
    start = time.process_time()
    write_report(summary, tmp_path)
    # Processor time, so that other work on the machine does not count; it takes about a tenth of this.
    assert time.process_time() - start < 2
