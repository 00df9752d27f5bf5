"""A real study on real data, its report, and the lines that the report offers."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_report_embedding import Structure

from poise.report import rebuild, write_report
from poise.studies import Study, StudyResult


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    folder = tmp_path_factory.mktemp("study") / "out"
    formulas = ["cross_entropy", "cross_entropy + 3*early_learning"]
    return Study(
        "digits", formulas, seeds=2, epochs=2, limit=400, label_noise=0.4, out=folder, workers=1, leave_one_out=False
    ).run()


def test_the_report_of_a_real_study_is_the_same_when_it_is_rebuilt_from_the_store(result: StudyResult) -> None:
    first = write_report(result.summary, result.folder).read_bytes()
    assert rebuild(result.folder).read_bytes() == first
    assert b"cross_entropy + 3*early_learning" in first


def test_the_lines_to_paste_reach_what_the_report_says_they_reach(result: StudyResult, tmp_path: Path) -> None:
    page = Structure(write_report(result.summary, result.folder).read_text(encoding="utf-8"))
    pasted = tmp_path / "pasted.py"
    pasted.write_text(page.text["lines"], encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(pasted)],
        capture_output=True,
        text=True,
        # The thread count belongs to a run's identity; the study ran with one.
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    reached = ast.literal_eval(done.stdout.strip().splitlines()[-1])
    recommended = result.summary.recommendation.formula
    told = result.summary.formulas[recommended or 0].seeds[0].metrics
    assert reached == pytest.approx(told, abs=1e-6)  # printed and stored numbers come from one sequence of operations


def test_the_page_of_a_real_study_explains_why_noisy_validation_labels_differ_from_the_test_split(
    result: StudyResult,
) -> None:
    html = write_report(result.summary, result.folder).read_text(encoding="utf-8")
    assert "carry the same noise as those for training (40 % symmetric)" in " ".join(html.split())
