"""`poise solve` on named data and files: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from poise.cli import app


def solve(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["solve", *map(str, arguments), "--quiet"])


def table(folder: Path, rows: int = 120, name: str = "a") -> Path:
    g = np.random.default_rng(0)
    x = g.normal(size=(rows, 3))
    y = 2 * x[:, 0] - x[:, 1] + 0.1 * g.normal(size=rows)
    path = folder / "data.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([[name, "b", "c", "y"], *np.column_stack([x, y]).tolist()])
    return path


def test_a_file_is_solved_measured_and_drawn(tmp_path: Path) -> None:
    result = solve(table(tmp_path), "least_squares + 0.2*l1", "--label", "y", "--out", tmp_path / "out", "--path", 8)
    assert result.exit_code == 0, result.output
    for words in ("Solved", "duality gap", "inputs used  2 of 3", "Path: weight of l1", "best on validation rows"):
        assert words in result.stdout
    found = json.loads((tmp_path / "out" / "solution.json").read_text())
    assert found["certificate"]["residual"] <= found["certificate"]["tolerance"]
    assert found["path"][0]["support"] == 0
    weights = {row["input"]: float(row["weight"]) for row in csv.DictReader((tmp_path / "out" / "weights.csv").open())}
    assert weights["c"] == 0
    assert weights["a"] > -weights["b"] > 0
    rows = list(csv.DictReader((tmp_path / "out" / "path.csv").open()))
    assert len(rows) == 8
    assert float(rows[0]["weight"]) > float(rows[-1]["weight"])
    page = (tmp_path / "out" / "solution.html").read_text()
    assert 'id="plot-support"' in page
    assert "Solved." in page
    HTMLParser().feed(page)


def test_names_of_columns_are_escaped_in_page_and_tables(tmp_path: Path) -> None:
    path = table(tmp_path, name="=1+1<script>alert(1)</script>")
    result = solve(path, "least_squares + 0.1*l1", "--label", "y", "--out", tmp_path / "out", "--path", 3)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "out" / "solution.html").read_text()
    assert "<script>alert" not in page
    cells = [row["input"] for row in csv.DictReader((tmp_path / "out" / "weights.csv").open())]
    assert not any(cell.startswith("=") for cell in cells)


@pytest.mark.parametrize(
    "formula", ["cross_entropy + 0.05*l1", "cross_entropy + 0.05*group_lasso", "cross_entropy + 0.1*l2"]
)
def test_classes_have_a_weight_each_and_two_share_one(formula: str, tmp_path: Path) -> None:
    assert solve("wine", formula, "--out", tmp_path, "--path", 0, "--tol", 1e-5).exit_code == 0
    found = json.loads((tmp_path / "solution.json").read_text())
    assert len(found["coef"]) == len(found["outputs"]) == 3
    assert found["metrics"]["test"]["accuracy"] > 0.8
    assert solve("breast_cancer", formula, "--out", tmp_path, "--path", 0, "--tol", 1e-5).exit_code == 0
    found = json.loads((tmp_path / "solution.json").read_text())
    assert len(found["coef"]) == 1
    assert "against" in found["outputs"][0]


def test_a_set_has_no_path_and_says_so(tmp_path: Path) -> None:
    result = solve("diabetes", "least_squares + nonnegative", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "No path" in " ".join(result.stdout.split())
    assert not (tmp_path / "path.csv").exists()


def test_a_tolerance_that_is_missed_fails_and_says_so(tmp_path: Path) -> None:
    result = solve(
        "breast_cancer",
        "cross_entropy + 0.001*l1",
        "--iterations",
        3,
        "--solver",
        "proximal",
        "--path",
        0,
        "--out",
        tmp_path,
    )
    assert result.exit_code == 1
    assert "Not solved: stopped after 3 iterations" in result.output
    assert "Not solved" in (tmp_path / "solution.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("diabetes", "cross_entropy + 0.1*l1"), "Use least_squares or huber"),
        (("wine", "least_squares + 0.1*l1"), "Use cross_entropy"),
        (("diabetes", "least_squares + auto*l1"), "auto"),
        (("diabetes", "least_squares + 0.1*l1 + nonnegative"), "no common proximal map"),
        (("diabetes", "least_squares - 0.1*l1"), "no bound"),
        (("diabetes", "least_squares + 0.1*l1", "--solver", "newton"), "solver='proximal'"),
        (("diabetes", "least_squares + 0.1*l1", "--path", "1"), "--path is 0 or at least 2"),
        (("diabetes", "least_squares + 0.1*l1", "--tol", "0"), "--tol is positive"),
        (("no_such_data", "least_squares + 0.1*l1"), "no_such_data"),
        (("diabetes", "least_squares + 0.1*group_lasso(groups=3)"), "not groups of 3"),
        (("replies", "least_squares + 0.1*l1"), "language models"),
    ],
)
def test_a_mistake_is_one_paragraph(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    result = solve(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = solve("diabetes", "least_squares + 0.1*l1", "--path", 0, "--out", tmp_path / "file" / "out")
    assert result.exit_code == 2
    assert "cannot be written" in " ".join(result.output.split())
