"""Trackers hear everything, and change nothing."""

from __future__ import annotations

import importlib.util
import json
import resource
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from tracker_runs import LEAKS, Kept, run, same

import poise
from poise.errors import InputError, Interrupted, MissingDependencyError, NonFiniteError, PoiseWarning
from poise.trackers import open_trackers, process, scrub, track
from poise.trackers.privacy import public


@pytest.fixture(scope="module")
def plain() -> poise.Run:
    return run(None)


def test_a_tracker_of_ones_own_hears_every_curve_with_its_steps_and_the_run_is_the_same_bit_for_bit(
    plain: poise.Run,
) -> None:
    kept = Kept()
    told = run(kept)
    assert same(plain, told)
    assert kept.curves() == told.history.curves()
    assert {"loss", "term/cross_entropy", "term/l2", "weight/l2", "valid/accuracy"} <= set(kept.curves())
    config = kept.runs[0].config
    assert (config["formula"], config["seed"], config["steps"]) == ("cross_entropy + 0.01*l2", 7, 12)
    assert config["version/torch"] == str(torch.__version__)
    assert config["solver/lr"] == 0.1
    verdict = kept.verdicts[0]
    assert (verdict["status"], verdict["steps"], verdict["test/accuracy"]) == ("done", 12, 0.5)


def test_secrets_and_folders_reach_no_tracker() -> None:
    kept = Kept()
    run(kept)
    heard = json.dumps([kept.runs[0].to_dict(), kept.verdicts])
    assert not [leak for leak in LEAKS if leak in heard]
    assert kept.runs[0].config["data/source"] == "quality.csv"
    assert kept.runs[0].config["api_key"] == "(hidden)"


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("term/cross_entropy", "term/cross_entropy"),
        ("cross_entropy + 1/2*l2", "cross_entropy + 1/2*l2"),
        ("http://127.0.0.1:5000/api/2.0/x", "http://127.0.0.1:5000/api/2.0/x"),
        ("https://a:b@host/x?token=abc&y=1", "https://host/x?token=(hidden)&y=1"),
        ("No such file: '/home/a b/c/d.csv'", "No such file: 'd.csv'"),
        ("read ~/data/d.csv, ../e/f.csv", "read d.csv, f.csv"),
        ("sqlite:////home/a/m.db", "sqlite:m.db"),
        ("C:\\Users\\anna\\d.csv is gone", "d.csv is gone"),
        ("package.module:factory", "package.module:factory"),
    ],
)
def test_a_text_loses_logins_keys_and_folders_and_nothing_else(text: str, sent: str) -> None:
    assert scrub(text) == sent


def test_settings_become_flat_and_only_keys_that_name_a_secret_are_hidden() -> None:
    given = {"a": {"max_tokens": 3, "hf_token": "x", "password": 1}, "author": "b", "none": None, "split": (0.5, 0.5)}
    assert public(given) == {
        "a/max_tokens": 3,
        "a/hf_token": "(hidden)",
        "a/password": "(hidden)",
        "author": "b",
        "split": "(0.5, 0.5)",
    }


class Broken(Kept):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def __getattribute__(self, name: str) -> Any:
        if name == object.__getattribute__(self, "__dict__").get("where"):

            def fail(*arguments: Any) -> None:
                raise OSError(28, "No space left on device", "/home/anna/runs/x")

            return fail
        return object.__getattribute__(self, name)


@pytest.mark.parametrize("where", ["begin", "log", "end"])
def test_a_tracker_that_fails_says_so_once_and_changes_nothing(where: str, plain: poise.Run) -> None:
    with pytest.warns(PoiseWarning) as said:
        told = run(Broken(where))
    assert same(plain, told)
    assert len(said) == 1
    assert "The tracker Broken failed, and the run goes on without it" in str(said[0].message)
    assert "anna" not in str(said[0].message)


def test_a_failure_does_not_stop_a_run_whose_warnings_are_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(Broken("log"))
    assert capsys.readouterr().err.count("The tracker Broken failed") == 1


def test_the_verdict_of_a_run_that_breaks_or_is_stopped_says_so() -> None:
    kept = Kept()
    x, y = torch.full((8, 2), float("nan")), torch.zeros(8, dtype=torch.long)
    with pytest.raises(NonFiniteError), track(kept) as follower:
        poise.fit(nn.Linear(2, 2), "cross_entropy", (x, y), steps=2, device="cpu", progress=follower)
    with pytest.raises(Interrupted), track(kept):
        raise Interrupted("Interrupted after step 3.")
    assert [verdict["status"] for verdict in kept.verdicts] == ["failed", "stopped"]
    assert "not finite" in kept.verdicts[0]["reason"]


def test_a_resumed_run_tells_its_whole_history(tmp_path: Path) -> None:
    first, second = Kept(), Kept()
    run(first, checkpoint=tmp_path)
    found = run(second, checkpoint=tmp_path)
    assert found.steps == 12
    run(third := Kept())
    assert first.curves() == third.curves()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("tensorbord", "Did you mean 'tensorboard'"),
        ("tensorboard:", "tensorboard\\[:DIR\\]"),
        ("mlflow:5000", "is no address"),
        ("wandb:my project", "letters, digits"),
        (3, "lacks begin, log, end"),
    ],
)
def test_what_is_no_tracker_is_refused_before_the_run(given: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(InputError, match=words):
        open_trackers(given)


def test_a_library_that_is_missing_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("tensorboard", "mlflow:http://127.0.0.1:5000", "wandb"):
        with pytest.raises(MissingDependencyError, match=r"poise\[trackers\]"):
            open_trackers(name)


def scalars(folder: Path) -> tuple[dict[str, tuple[list[int], list[float]]], Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    found = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    return {name: ([e.step for e in es], [e.value for e in es]) for name, es in found.items()}, events


def test_tensorboard_stores_every_curve_settings_and_verdict(plain: poise.Run, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    assert same(plain, run(f"tensorboard:{tmp_path}"))
    (folder,) = tmp_path.iterdir()
    stored, events = scalars(folder)
    for name, (steps, values) in plain.history.curves().items():
        assert stored[name][0] == steps, name
        assert stored[name][1] == pytest.approx(values, rel=1e-6), name
    assert stored["verdict/test/accuracy"] == ([12], [0.5])
    text = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in ("config", "verdict")}
    assert '| formula | "cross_entropy + 0.01*l2" |' in text["config"]
    assert '| status | "done" |' in text["verdict"]
    raw = b"".join(path.read_bytes() for path in folder.iterdir())
    assert not [leak for leak in LEAKS if leak.encode() in raw]


def test_a_folder_that_cannot_be_written_is_said_once(plain: poise.Run, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    (tmp_path / "file").write_text("")
    with pytest.warns(PoiseWarning, match="The tracker tensorboard failed") as said:
        assert same(plain, run(f"tensorboard:{tmp_path / 'file'}"))
    assert len(said) == 1
    assert str(tmp_path) not in str(said[0].message)


def test_a_disk_that_is_full_in_the_middle_is_said_once(
    plain: poise.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tracker's process may write files of 2 KB, and then every write fails as on a full disk."""
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    start = process.TrackerProcess._start

    def limited(self: process.TrackerProcess) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        try:
            start(self)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(process.TrackerProcess, "_start", limited)
    with pytest.warns(PoiseWarning, match="tensorboard failed") as said:
        assert same(plain, run(f"tensorboard:{tmp_path}"))
    assert len(said) == 1


def test_a_tracker_process_that_is_killed_or_hangs_does_not_hold_the_run(
    plain: poise.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(process, "_START", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.warns(PoiseWarning, match=f"ended with {-signal.SIGKILL}"):
        assert same(plain, run("tensorboard"))
    monkeypatch.setattr(process, "_START", "import time; time.sleep(600)")
    monkeypatch.setattr(process, "PATIENCE", 0.5)
    begun = time.monotonic()
    with pytest.warns(PoiseWarning, match="gave no answer"):
        assert same(plain, run("tensorboard"))
    assert time.monotonic() - begun < 30  # 600 s if the run waited
