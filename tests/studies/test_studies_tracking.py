"""A study told to trackers: every run once, in one group, with the verdict, and the same results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from poise.errors import PoiseWarning
from poise.studies import Store

sys.path.insert(0, str(Path(__file__).parents[1] / "trackers"))
from tracker_runs import Kept


def stored(folder: Path) -> dict[str, Any]:
    with Store(folder / "study.sqlite", readonly=True) as store:
        return {record.id: (record.metrics, record.curves) for record in store.records(curves=True)}


def test_every_run_is_told_once_in_one_group_and_the_verdict_last(fake_study: Any, tmp_path: Path) -> None:
    kept = Kept()
    study, engine = fake_study()
    result = study.run(engine=engine, tracker=kept)
    told = {run.config["id"]: number for number, run in enumerate(kept.runs[:-1])}
    records = stored(study.folder)
    assert set(told) == set(records)
    for run, (metrics, curves) in records.items():
        heard = kept.curves(told[run])
        assert heard.keys() == curves.keys()
        for name, (steps, values) in curves.items():
            assert heard[name][0] == steps
            assert heard[name][1] == pytest.approx(values, rel=1e-6)  # the store keeps single precision
        assert kept.verdicts[told[run]].items() >= metrics.items()
    (group,) = {run.group for run in kept.runs}
    assert [run.kind for run in kept.runs] == ["run"] * len(told) + ["study"]
    assert {run.config["seed"] for run in kept.runs[:-1]} == {0, 1, 2}
    assert "formula" in kept.runs[0].config
    assert "version/torch" in kept.runs[0].config
    assert kept.verdicts[-1]["recommendation"] == result.summary.recommendation.text
    assert kept.verdicts[-1]["formula_0/accuracy/mean"] == result.summary.formulas[0].metrics["accuracy"].mean
    assert str(tmp_path) not in repr([(run.config, run.group) for run in kept.runs])

    # Again: nothing is told twice, and the group is the same.
    again, engine = fake_study()
    again.run(engine=engine, tracker=(later := Kept()))
    assert [(run.kind, run.group) for run in later.runs] == [("study", group)]


def test_a_study_that_was_stored_without_is_told_later_and_its_results_are_the_same(
    fake_study: Any, tmp_path: Path
) -> None:
    study, engine = fake_study()
    study.run(engine=engine)
    before = stored(study.folder)
    again, engine = fake_study()
    again.run(engine=engine, tracker=(kept := Kept()))
    assert stored(study.folder) == before
    assert {run.config["id"] for run in kept.runs[:-1]} == set(before)
    told, engine = fake_study(out=tmp_path / "told")
    told.run(engine=engine, tracker=Kept())
    assert stored(told.folder) == before


def test_what_a_broken_tracker_missed_is_told_next_time(fake_study: Any) -> None:
    class Broken(Kept):
        def log(self, values: Any, step: int) -> None:
            raise OSError("gone")

    study, engine = fake_study()
    with pytest.warns(PoiseWarning, match="The tracker Broken failed") as said:
        result = study.run(engine=engine, tracker=Broken())
    assert len(said) == 1
    assert result.ok
    again, engine = fake_study()
    with pytest.warns(PoiseWarning):
        again.run(engine=engine, tracker=(broken := Broken()))
    assert len(broken.runs) > 1
