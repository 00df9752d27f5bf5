"""The scoreboard: 70 rows from the start, verdicts only from measurements on this machine and with this version."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from poise.claims import Claim, Finding, runner
from poise.errors import InputError


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POISE_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def one_claim(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Paper 1 as if it were built, with a study that takes no time; returns the calls that it receives."""
    calls: list[dict[str, object]] = []

    def study(**arguments: object) -> Finding:
        calls.append(arguments)
        return Finding("holds", "2.0 points (paper: 3.1)", figures={"gain": 2.0})

    claim = Claim(1, "A statement.", "at least one point", "no gain", study)
    monkeypatch.setattr(runner.Paper, "built", property(lambda paper: paper.number == 1))
    monkeypatch.setattr(runner, "load_claim", lambda number: claim)
    return calls


def test_all_seventy_papers_are_listed_in_order_with_distinct_identifiers() -> None:
    papers = runner.papers()
    assert [paper.number for paper in papers] == list(range(1, 71))
    assert len({paper.arxiv for paper in papers}) == 70
    assert all(re.fullmatch(r"\d{4}\.\d{4,5}", paper.arxiv) for paper in papers)
    assert all(paper.room and paper.title for paper in papers)


def test_a_built_paper_that_never_ran_here_says_not_run_and_an_absent_one_not_built() -> None:
    assert {row.state for row in runner.rows() if row.paper.built} <= {"not run"}
    assert {row.state for row in runner.rows() if not row.paper.built} <= {"not built"}


def test_every_built_claim_says_what_it_expects_and_what_would_contradict_it() -> None:
    for paper in runner.papers():
        if paper.built:
            claim = runner.load_claim(paper.number)
            assert claim.number == paper.number
            assert claim.statement
            assert claim.expected
            assert claim.falsified


def test_running_a_claim_stores_verdict_time_version_machine_and_date(one_claim: list[dict[str, object]]) -> None:
    measured = runner.run_claim(1, full=True, seed=3)
    assert one_claim == [{"full": True, "seed": 3, "progress": None}]
    row = runner.rows([1])[0]
    assert (row.state, row.current, row.measurement) == ("holds", True, measured)
    assert measured.seconds >= 0
    assert measured.version == runner.__version__
    assert measured.machine == runner.machine()
    assert measured.date.endswith("+00:00")


@pytest.mark.parametrize("field", ["version", "machine"])
def test_a_verdict_from_another_version_or_machine_counts_as_not_run(
    field: str, one_claim: list[dict[str, object]], empty_cache: Path
) -> None:
    runner.run_claim(1)
    path = empty_cache / "claims" / "p01.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: "another"}))
    assert runner.rows([1])[0].state == "not run"


def test_a_verdict_on_older_code_is_marked(one_claim: list[dict[str, object]], empty_cache: Path) -> None:
    runner.run_claim(1)
    path = empty_cache / "claims" / "p01.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "code": "older"}))
    row = runner.rows([1])[0]
    assert (row.state, row.current) == ("holds", False)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"number": 1}'])
def test_a_damaged_cache_file_counts_as_not_run(
    damage: str, one_claim: list[dict[str, object]], empty_cache: Path
) -> None:
    runner.run_claim(1)
    (empty_cache / "claims" / "p01.json").write_text(damage)
    assert runner.rows([1])[0].state == "not run"


def test_a_row_survives_json(one_claim: list[dict[str, object]]) -> None:
    runner.run_claim(1)
    record = json.loads(json.dumps(runner.rows([1])[0].as_json()))
    assert record["measurement"]["figures"] == {"gain": 2.0}


def test_an_unknown_number_and_an_unbuilt_paper_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no paper 71"):
        runner.run_claim(71)
    monkeypatch.setattr(runner.Paper, "built", property(lambda paper: False))
    with pytest.raises(InputError, match="not built yet"):
        runner.run_claim(70)
