from __future__ import annotations

import pytest
import studies_fakes

import poise.studies.study as study_module
from poise.studies import LocalEngine, Study


@pytest.fixture
def fake_task(monkeypatch):
    """Let every study see the task of `studies_fakes`, whatever data it names."""
    monkeypatch.setattr(study_module.Study, "task", studies_fakes.task())
    monkeypatch.setattr(study_module, "_rehearse", lambda plan, objectives: None)


@pytest.fixture
def fake_study(fake_task, tmp_path):
    """Make a study on the fake task, and an engine whose workers run one of the fake executors."""

    def make(formulas=("cross_entropy", "cross_entropy + 3*early_learning"), executor="instant", **settings):
        study = Study("digits", list(formulas), **{"seeds": 3, "out": tmp_path / "out", **settings})
        engine = LocalEngine(2, folder=study.folder / "checkpoints", executor=f"studies_fakes:{executor}", grace=2.0)
        return study, engine

    return make
