"""`poise compare` as a stranger uses it: real runs on a small file, interrupted, continued, mistaken."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from poise.cli import app

A, B = "cross_entropy", "cross_entropy + 0.01*l2"


def poise(*arguments: str | Path) -> Result:
    """Run a command in this process; its workers are real."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV with two numeric columns and two classes."""
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("data") / "points.csv"
    rows = torch.randn(80, 2, generator=generator)
    lines = [f"{x:.4f},{y:.4f},{'up' if x + y > 0 else 'down'}" for x, y in rows.tolist()]
    path.write_text("x,y,side\n" + "\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """One whole comparison: two formulas, two seeds, two epochs."""
    out = tmp_path_factory.mktemp("compared") / "out"
    short = ("--seeds", "2", "--epochs", "2", "--workers", "1", "--device", "cpu")
    return poise("compare", data, A, B, "--label", "side", *short, "--out", out, "--log", out.parent / "log"), out


def test_a_comparison_ends_with_intervals_differences_effects_advice_and_where_the_report_is(
    finished: tuple[Result, Path],
) -> None:
    result, out = finished
    assert result.exit_code == 0, result.output
    for heading in ("Test metrics over 2 seeds", "95 % interval", "Paired difference to A", "What each term bought"):
        assert heading in result.stdout
    assert "Recommendation" in result.stdout
    assert "poise.fit(" in result.stdout
    assert f"Report: {out / 'report.html'}" in result.stdout
    assert sorted(path.name for path in out.iterdir() if path.suffix in (".html", ".sqlite", ".toml")) == [
        "report.html",
        "study.sqlite",
        "study.toml",
    ]


def test_every_finished_run_is_a_line_of_progress_and_of_the_log(finished: tuple[Result, Path]) -> None:
    result, out = finished
    done = [line for line in result.stderr.splitlines() if re.match(r"\[\d+/6\] .*seed \d", line)]
    assert len(done) == 6
    assert len((out.parent / "log").read_text().splitlines()) >= 6


def test_the_study_file_continues_and_repeats_nothing(finished: tuple[Result, Path]) -> None:
    first, out = finished
    again = poise("compare", "--study", out / "study.toml")
    assert again.exit_code == 0
    assert "6 runs, 6 of them finished before" in again.stderr
    tables = [text.split("Test metrics")[1].split("Recommendation")[0] for text in (first.stdout, again.stdout)]
    assert tables[0] == tables[1]


def test_the_report_is_rebuilt_from_the_store(finished: tuple[Result, Path]) -> None:
    _, out = finished
    (out / "report.html").unlink()
    result = poise("report", out)
    assert result.exit_code == 0, result.output
    assert (out / "report.html").is_file()
    assert "Paired difference to A" in result.stdout


def test_another_metric_stands_first_and_is_what_the_advice_rests_on(data: Path, tmp_path: Path) -> None:
    short = ("--seeds", "2", "--epochs", "1", "--workers", "1", "--device", "cpu", "--no-leave-one-out", "--quiet")
    result = poise("compare", data, A, B, "--label", "side", *short, "--metric", "nll", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    metrics = result.stdout.split("Test metrics")[1]
    assert metrics.index("negative log-likelihood") < metrics.index("accuracy")
    assert 'metric = "nll"' in (tmp_path / "out" / "study.toml").read_text()


def test_a_run_that_fails_is_named_and_the_exit_code_is_1(data: Path, tmp_path: Path) -> None:
    short = ("--seeds", "2", "--epochs", "2", "--workers", "1", "--device", "cpu", "--no-leave-one-out")
    # An exploding penalty makes one formula infinite, and not the other.
    result = poise("compare", data, A, "cross_entropy + 1e30*l2", "--label", "side", *short, "--out", tmp_path / "out")
    assert result.exit_code == 1, result.output
    assert "Failed runs (the others went on)" in result.stdout
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is sent as a POSIX signal")
def test_ctrl_c_keeps_what_is_done_says_how_to_go_on_and_exits_130(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    long = ("--seeds", "2", "--epochs", "20000", "--workers", "1", "--device", "cpu", "--no-leave-one-out")
    command = [sys.executable, "-m", "poise", "compare", str(data), A, B, "--label", "side", *long, "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "checkpoints").exists() and not (out / "study.toml").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert f"poise compare --study {out}/study.toml" in errors.splitlines()[-1]
    assert "Traceback" not in errors


BAD_ARGUMENTS = {
    "no column": (["--label", "nope"], "no column 'nope'"),
    "kind of target": (["--label", "side", "--target-type", "regression"], "holds text"),
    "one seed": (["--label", "side", "--seeds", "1"], "at least two seeds"),
    "shares": (["--label", "side", "--split", "60/20"], "three shares"),
    "shares that do not add up": (["--label", "side", "--split", "60/30/30"], "add up to 100"),
    "engine": (["--label", "side", "--engine", "ray"], "local"),
    "metric": (["--label", "side", "--metric", "rmse"], "The metrics are accuracy"),
    "model": (["--label", "side", "--model", "resnet"], "no model 'resnet'"),
    "factory": (["--label", "side", "--model", "no_module_here:make"], "no_module_here"),
    "device": (["--label", "side", "--device", "tpu"], "no device 'tpu'"),
    "precision": (["--label", "side", "--precision", "fp8"], "fp8"),
    "solver": (["--label", "side", "--solver", "sgdd"], "Did you mean 'sgd'?"),
    "learning rate": (["--label", "side", "--lr", "-1"], "training.lr"),
    "two budgets": (["--label", "side", "--epochs", "2", "--steps", "9"], "not both"),
    "noise": (["--label", "side", "--label-noise", "0.2", "--noise", "pink"], "no label noise 'pink'"),
    "one trial": (["--label", "side", "--tune", "1"], "one trial is no search"),
    "class weight": (["--label", "side", "--class-weight", "equal"], "balanced"),
    "log": (["--label", "side", "--log", "/no/such/folder/log"], "cannot be written"),
    "folder": (["--label", "side", "--out", "/proc/no"], "/proc/no"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_a_wrong_argument_is_one_clear_error_with_exit_code_2(case: str, data: Path, tmp_path: Path) -> None:
    arguments, message = BAD_ARGUMENTS[case]
    out = () if "--out" in arguments else ("--out", tmp_path / "out")
    result = poise("compare", data, A, B, *arguments, *out, "--workers", "1")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("formulas", "message"),
    [
        ((A, A), "given twice"),
        ((A, "cross_entropy - 0.1*l2"), "negative weight"),
        ((A, "squared_error"), "prediction"),
        ((A, "cross_entropy + 3*early_lerning"), "Did you mean 'early_learning'?"),
        ((A, "early_learning(gamma=1)"), "gamma"),
        ((), "at least one formula"),
    ],
)
def test_a_wrong_formula_is_one_clear_error_with_exit_code_2(
    formulas: tuple[str, ...], message: str, data: Path, tmp_path: Path
) -> None:
    result = poise("compare", data, *formulas, "--label", "side", "--out", tmp_path / "out", "--workers", "1")
    assert result.exit_code == 2, result.output
    assert message in result.stderr


def test_a_study_file_allows_no_option_that_it_would_ignore(finished: tuple[Result, Path]) -> None:
    result = poise("compare", "--study", finished[1] / "study.toml", "--lr", "0.1")
    assert result.exit_code == 2
    assert "--lr cannot stand beside --study" in result.stderr


def test_a_study_file_with_an_unknown_key_is_refused_by_name(finished: tuple[Result, Path], tmp_path: Path) -> None:
    text = (finished[1] / "study.toml").read_text()
    (tmp_path / "study.toml").write_text(text.replace("[data]", "[data]\nlable = 'y'"))
    result = poise("compare", "--study", tmp_path / "study.toml")
    assert result.exit_code == 2
    assert "data.lable" in result.stderr


def test_a_folder_in_use_is_refused_while_the_other_process_goes_on(finished: tuple[Result, Path]) -> None:
    from poise.studies.lock import FolderLock

    with FolderLock(finished[1]):
        result = poise("compare", "--study", finished[1] / "study.toml")
    assert result.exit_code == 2
    assert "another process" in result.stderr.lower()


def test_a_store_of_a_newer_version_is_refused(finished: tuple[Result, Path], tmp_path: Path) -> None:
    import shutil
    import sqlite3

    copy = tmp_path / "copy"
    shutil.copytree(finished[1], copy)
    with sqlite3.connect(copy / "study.sqlite") as store:
        store.execute("PRAGMA user_version = 999")
    result = poise("report", copy)
    assert result.exit_code == 2
    assert "newer" in result.stderr


def test_a_folder_without_a_study_is_refused(tmp_path: Path) -> None:
    result = poise("report", tmp_path)
    assert result.exit_code == 2
    assert "study.sqlite" in result.stderr


def test_the_answer_is_printed_even_where_the_report_cannot_be_written(
    finished: tuple[Result, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from poise import report
    from poise.errors import InputError

    def full(*_: object) -> Path:
        raise InputError("No space left on the device.")

    monkeypatch.setattr(report, "write_report", full)
    result = poise("compare", "--study", finished[1] / "study.toml")
    assert result.exit_code == 2
    assert "Recommendation" in result.stdout
    assert "No space left" in result.stderr


def test_json_and_tables_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POISE_CACHE", str(tmp_path))
    result = poise("claims", "--json")
    assert json.loads(result.stdout)
    assert result.stderr == ""
