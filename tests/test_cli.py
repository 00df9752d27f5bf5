"""The command as a stranger uses it: fast answers, one paragraph for each mistake, exit codes that mean something."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from poise.cli import app


def poise(*arguments: str) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(app, list(arguments))


def test_the_help_names_every_command() -> None:
    result = poise("--help")
    assert result.exit_code == 0
    for name in ("compare", "fit", "solve", "predict", "terms", "explain", "claims", "report"):
        assert name in result.stdout


def test_help_version_terms_and_claims_do_not_load_torch() -> None:
    program = (
        "import sys\nfrom typer.testing import CliRunner\nfrom poise.cli import app\n"
        "for call in (['--help'], ['compare', '--help'], ['--version'], ['terms'], ['claims']):\n"
        "    result = CliRunner().invoke(app, call)\n"
        "    assert result.exit_code == 0, result.output\n"
        "    assert 'torch' not in sys.modules, call\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_version_lists_what_a_result_depends_on() -> None:
    words = poise("--version").stdout.split()
    for name in ("poise", "python", "torch", "numpy", "scikit-learn"):
        assert name in words


def test_terms_lists_every_name_with_one_line() -> None:
    from poise.catalogue import entries
    from poise.terms import CATALOGUE

    lines = poise("terms").stdout.splitlines()
    assert {entry.name for entry in entries() if entry.kind == "term"} == set(CATALOGUE)
    for entry in entries():
        assert entry.summary, f"{entry.name} has no summary"
        assert any(line.split()[:1] == [entry.name] for line in lines)


def test_every_listed_weight_is_known_to_formulas() -> None:
    from poise import parse

    for weight in (
        "auto*l2",
        "constraint(l2, upper=1)",
        "linear(0, 1)*l2",
        "cosine(1, 0)*l2",
        "exponential(1, 0.1)*l2",
    ):
        parse(f"cross_entropy + {weight}")
    for weight in ("rampup(1)*l2", "piecewise((0, 1.0), (100, 0.1))*l2"):
        parse(f"cross_entropy + {weight}")


def test_explain_prints_brackets_as_they_are() -> None:
    result = poise("explain", "cross_entropy + 0.1*l2")
    assert result.exit_code == 0
    assert "-log p[target]" in result.stdout
    assert "0.1" in result.stdout


def test_an_unknown_term_is_one_paragraph_with_a_caret_and_the_nearest_name() -> None:
    result = poise("explain", "cross_entropy + 3*early_lerning")
    assert result.exit_code == 2
    assert "Did you mean 'early_learning'?" in result.stderr
    text, caret = result.stderr.splitlines()[-2:]
    assert text[caret.index("^") :].startswith("early_lerning")
    assert "Traceback" not in result.output


def test_debug_lets_the_error_through() -> None:
    from poise.errors import FormulaError

    result = poise("explain", "nothing_here", "--debug")
    assert isinstance(result.exception, FormulaError)


@pytest.mark.parametrize("call", [["nonsense"], ["explain"], ["claims", "run", "x"], ["terms", "--colour"]])
def test_a_wrong_call_exits_2(call: list[str]) -> None:
    assert poise(*call).exit_code == 2


def test_claims_lists_seventy_rows_as_a_table_and_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POISE_CACHE", str(tmp_path))
    assert "70 papers:" in poise("claims").stdout
    records = json.loads(poise("claims", "--json").stdout)
    assert [record["number"] for record in records] == list(range(1, 71))
    assert {record["state"] for record in records} <= {"not run", "not built"}


def test_claims_run_prints_what_was_measured_and_remembers_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from poise.claims import Claim, Finding, Progress, runner

    def study(*, full: bool = False, seed: int = 0, progress: Progress | None = None) -> Finding:
        assert progress is not None
        progress(0.5, "half")
        return Finding("fails", f"1.0 points (paper: 3.1), full={full}, seed={seed}", reason="too small")

    monkeypatch.setenv("POISE_CACHE", str(tmp_path))
    monkeypatch.setattr(runner.Paper, "built", property(lambda paper: paper.number == 1))
    monkeypatch.setattr(runner, "load_claim", lambda number: Claim(number, "A statement.", "a gain", "no gain", study))
    result = poise("claims", "run", "1", "--full", "--seed", "4")
    assert result.exit_code == 0
    for text in ("A statement.", "1.0 points (paper: 3.1), full=True, seed=4", "fails", "too small"):
        assert text in result.stdout
    assert "claim 1: 50 % half" in result.stderr
    assert json.loads(poise("claims", "run", "1", "--json", "--quiet").stdout)[0]["state"] == "fails"


def test_a_paper_that_is_not_built_is_refused_by_name() -> None:
    result = poise("claims", "run", "71")
    assert result.exit_code == 2
    assert "There is no paper 71" in result.stderr
