from __future__ import annotations

import dataclasses
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from studies_fakes import make_spec
from torch import nn

import poise.studies.execute as execute_module
from poise.errors import InputError, PoiseWarning
from poise.readouts import Classification
from poise.studies.execute import execute, explain, make_schedule, rehearse
from poise.studies.spec import DataSpec
from poise.tasks.task import Split, Task
from poise.training import default_metrics

MIB = 2**20


def part(seed, rows):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 3, (rows,), generator=generator)
    return {"input": nn.functional.one_hot(target, 3) + torch.randn(rows, 3, generator=generator), "target": target}


class Untouchable(dict):
    def __getitem__(self, name):
        raise AssertionError("the test split was read")


class TinySplit(Split):
    def metrics(self, output, target):
        return default_metrics(output, target)


class TinyTask:
    name, primary, fingerprint, arguments = "tiny", "accuracy", "f" * 64, Task.arguments

    def split(self, seed):
        parts = part(seed, 300), part(seed + 100, 60), part(seed + 200, 60)
        return TinySplit(*parts, true_target={}, rows=None, preprocessor=None, warnings=["Remark."])

    def model(self, name, seed):
        torch.manual_seed(seed)
        return nn.Linear(3, 3)

    def readout(self):
        return Classification()


@pytest.fixture
def tiny(monkeypatch):
    """Let runs see a task of three noisy clusters; yields it so that a test can spoil it."""
    task = TinyTask()
    monkeypatch.setattr(execute_module, "_load", lambda data: task)
    execute_module._split.cache_clear()
    yield task
    execute_module._split.cache_clear()


SPEC = make_spec("cross_entropy + 0.01*l2", epochs=3, batch_size=32)


def test_a_run_is_measured_once_at_the_end_and_records_its_curves_and_cost(tiny):
    record = execute(SPEC)
    assert (record.status, record.error) == ("done", "")
    assert set(record.metrics) == {f"{part}/{name}" for part in ("valid", "test") for name in ("accuracy", "nll")}
    assert record.metrics["test/accuracy"] > 0.5
    assert record.metrics["valid/accuracy"] == record.curves["valid/accuracy"][1][-1]
    assert {"loss", "term/cross_entropy", "term/l2", "weight/l2", "valid/nll"} <= set(record.curves)
    assert record.curves["valid/nll"][0] == [10, 20, 30]
    assert record.steps == 30
    assert record.sizes == {"train": 300, "valid": 60, "test": 60}
    assert record.warnings == ["Remark."]
    assert record.seconds > 0
    assert record.peak_memory_bytes > 50 * MIB  # PyTorch alone is more
    assert record.versions["torch"] == torch.__version__


def test_the_same_specification_gives_the_same_record(tiny):
    one, two = execute(SPEC), execute(SPEC)
    assert one.metrics == two.metrics
    assert one.curves == two.curves
    other = execute(dataclasses.replace(SPEC, seed=1))
    assert one.metrics != other.metrics


def test_a_trial_never_reads_the_test_split(tiny, monkeypatch):
    split = dataclasses.replace(TinyTask().split(0), test=Untouchable())
    monkeypatch.setattr(tiny, "split", lambda seed: split, raising=False)
    monkeypatch.setattr(TinySplit, "sizes", {})
    record = execute(dataclasses.replace(SPEC, measure="valid"))
    assert record.status == "done"
    assert not any(name.startswith("test/") for name in record.metrics)
    assert execute(SPEC).detail.strip().endswith("the test split was read")


def test_the_best_model_is_measured_where_that_is_asked_for(tiny):
    record = execute(dataclasses.replace(SPEC, select="best", lr=2.0, epochs=8))
    assert record.metrics["valid/accuracy"] == max(record.curves["valid/accuracy"][1])


def test_progress_is_reported_up_to_the_end(tiny):
    seen = []
    execute(SPEC, report=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_an_interrupted_run_goes_on_from_its_checkpoint_and_ends_as_if_nothing_had_happened(tiny, tmp_path):
    whole = execute(SPEC)
    folder = tmp_path / "run"
    sent = []

    def stop(fraction):
        if fraction > 0.4 and not sent:
            sent.append(fraction)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        execute(SPEC, folder=folder, report=stop)
    seen = []
    record = execute(SPEC, folder=folder, report=seen.append)
    assert seen[0] > 0.5
    assert record.metrics == whole.metrics
    assert record.curves == whole.curves


def test_a_checkpoint_of_another_run_costs_a_warning_and_a_fresh_start(tiny, tmp_path):
    execute(dataclasses.replace(SPEC, batch_size=64), folder=tmp_path)
    with pytest.warns(PoiseWarning, match="starts afresh"):
        record = execute(SPEC, folder=tmp_path)
    assert record.metrics == execute(SPEC).metrics


def test_a_value_that_is_not_finite_fails_the_run_and_names_the_term(tiny, monkeypatch):
    split = TinyTask().split(0)
    split.train["input"][7] = float("inf")
    monkeypatch.setattr(tiny, "split", lambda seed: split, raising=False)
    record = execute(SPEC)
    assert record.status == "failed"
    assert record.error.startswith("cross_entropy is not finite in step ")
    assert "NonFiniteError" in record.detail
    assert "\n" not in record.error


def test_no_memory_fails_the_run_and_says_what_to_do(tiny, monkeypatch):
    def model(name, seed):
        return nn.Linear(2**40, 2**10)

    monkeypatch.setattr(tiny, "model", model, raising=False)
    record = execute(SPEC)
    assert record.status == "failed"
    assert record.error.startswith("Out of memory on cpu. Use a smaller batch_size (it is 32)")


def test_what_is_meant_by_out_of_memory():
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), OSError(12, "Cannot allocate memory")):
        assert explain(error, SPEC).startswith("Out of memory")
    assert explain(RuntimeError("shapes differ"), SPEC) == "The run stopped with RuntimeError: shapes differ"


def test_data_that_changed_under_a_study_fail_the_run():
    spec = dataclasses.replace(SPEC, data=DataSpec("digits", fingerprint="0" * 64))
    task = SimpleNamespace(fingerprint="1" * 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute_module, "_load", lambda data: task)
        assert "have changed since the study began" in execute(spec).error


def test_a_rehearsal_finds_what_cannot_work_and_nothing_else(tiny, monkeypatch):
    rehearse(SPEC)
    rehearse(dataclasses.replace(SPEC, lr=1e30))
    monkeypatch.setattr(tiny, "model", lambda name, seed: nn.Linear(3, 2), raising=False)
    with pytest.raises(InputError, match="2 classes"):
        rehearse(SPEC)
    with pytest.raises(InputError, match="no optimiser"):
        rehearse(dataclasses.replace(SPEC, solver="sdg"))


def test_schedules_by_name_and_by_formula():
    assert make_schedule(None) is make_schedule("constant") is None
    assert str(make_schedule("cosine")) == "cosine(1, 0)"
    assert str(make_schedule("linear(1, 0.1)")) == "linear(1, 0.1)"
    for wrong in ("cosin", "0.5", "l2", "cosine(1, 0) + l1"):
        with pytest.raises(InputError, match="no learning-rate schedule"):
            make_schedule(wrong)
