"""Progress as a person sees it: a live table on a terminal, plain lines elsewhere, nothing where it was asked for."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from poise.errors import InputError
from poise.studies.study import FormulaProgress, StudyProgress
from poise.terminal import Journal, Terminal


def progress(event: str, message: str = "", done: int = 3, left: float | None = 75.0) -> StudyProgress:
    formulas = (
        FormulaProgress("cross_entropy", 2, 5, 0, 0.7712),
        FormulaProgress("cross_entropy + 3*early_learning", 1, 5, 1, None),
    )
    return StudyProgress(event, message, done, 20, 1, 0, {"a": 0.5}, formulas, seconds=12.0, seconds_left=left)


def terminal(live: bool, quiet: bool = False) -> tuple[Terminal, io.StringIO]:
    made, written = Terminal(quiet), io.StringIO()
    made.err = Console(file=written, force_terminal=live, width=100, highlight=False)
    return made, written


def test_without_a_terminal_every_finished_run_is_one_line_with_the_time_left(tmp_path: Path) -> None:
    made, written = terminal(live=False)
    with Journal(tmp_path / "log.txt") as journal, made.study(journal) as show:
        show(progress("started", "Run a has started."))
        show(progress("progress"))
        show(progress("finished", "cross_entropy, seed 0: 2.1 s"))
        show(progress("ended", "The study is complete.", done=20))
    assert written.getvalue().splitlines() == [
        "[3/20] cross_entropy, seed 0: 2.1 s, about 1 min 15 s left",
        "[20/20] The study is complete.",
    ]
    logged = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 1)[1][:6] for line in logged] == ["[3/20]", "[3/20]", "[20/20"]


def test_on_a_terminal_progress_is_a_table_with_formulas_seeds_means_and_time_left() -> None:
    made, written = terminal(live=True)
    with Journal(None) as journal, made.study(journal) as show:
        show(progress("failed", "seed 3: the loss became infinite"))
    text = written.getvalue()
    for part in ("cross_entropy + 3*early_learning", "2/5", "0.7712", "3 of 20 runs", "about 1 min 15 s left"):
        assert part in text
    assert "seed 3: the loss became infinite" in text


def test_quiet_shows_no_progress_and_still_writes_the_log(tmp_path: Path) -> None:
    made, written = terminal(live=True, quiet=True)
    with Journal(tmp_path / "log.txt") as journal, made.study(journal) as show:
        show(progress("finished", "cross_entropy, seed 0: 2.1 s"))
    assert written.getvalue() == ""
    assert "cross_entropy, seed 0" in (tmp_path / "log.txt").read_text()


def test_a_known_share_is_a_bar_on_a_terminal_and_a_line_every_ten_percent_elsewhere() -> None:
    made, written = terminal(live=False)
    with made.progress("claim 18") as show:
        for percent in range(0, 100, 5):
            show(percent / 100, "training")
    assert len(written.getvalue().splitlines()) == 10
    made, written = terminal(live=True)
    with made.progress("claim 18") as show:
        show(0.5, "training")
    assert "claim 18" in written.getvalue()


def test_text_from_elsewhere_is_never_read_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal().print("-log p[target] [red]")
    assert capsys.readouterr().out == "-log p[target] [red]\n"


def test_a_log_file_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        Journal(tmp_path / "no" / "log.txt")
