"""`--tracker` on the command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from test_trackers import scalars
from typer.testing import CliRunner, Result

from poise.cli import app


def poise(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def figures(result: Result) -> list[str]:
    return re.findall(r"(?:accuracy|nll|macro_f1|ece).*", result.stdout)


@pytest.fixture
def short(tmp_path: Path) -> tuple[str | Path, ...]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(80, 2, generator=generator).tolist()
    path = tmp_path / "points.csv"
    path.write_text("x,y,side\n" + "".join(f"{x:.4f},{y:.4f},{'up' if x + y > 0 else 'down'}\n" for x, y in rows))
    return path, "--label", "side", "--epochs", "2", "--device", "cpu"


def test_fit_sends_curves_settings_and_test_metrics_and_prints_the_same(
    short: tuple[str | Path, ...], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    data, *options = short
    plain = poise("fit", data, "cross_entropy + 0.01*l2", *options)
    told = poise("fit", data, "cross_entropy + 0.01*l2", *options, "--tracker", f"tensorboard:{tmp_path / 'runs'}")
    assert told.exit_code == 0, told.output
    assert figures(told) == figures(plain) != []
    (folder,) = (tmp_path / "runs").iterdir()
    stored, events = scalars(folder)
    assert {"loss", "term/l2", "weight/l2", "valid/accuracy", "verdict/test/accuracy"} <= set(stored)
    config = events.Tensors("config")[0].tensor_proto.string_val[0].decode()
    assert '| data/source | "points.csv" |' in config
    assert "| seed | 0 |" in config
    assert str(tmp_path) not in config


@pytest.mark.slow
def test_compare_sends_every_run_and_the_verdict_into_one_group(short: tuple[str | Path, ...], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    data, *options = short
    options += ["--seeds", "2", "--workers", "1", "--no-leave-one-out", "--out", tmp_path / "out"]
    result = poise(
        "compare", data, "cross_entropy", "cross_entropy + 0.01*l2", *options, "--tracker",
        f"tensorboard:{tmp_path / 'runs'}",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (group,) = (tmp_path / "runs").iterdir()
    names = sorted(folder.name for folder in group.iterdir())
    assert len(names) == 5  # two formulas, two seeds, and the study
    assert names[-1].startswith("study-")
    _, events = scalars(group / names[-1])
    assert "| recommendation |" in events.Tensors("verdict")[0].tensor_proto.string_val[0].decode()


def test_a_tracker_that_fails_is_one_line_and_the_command_succeeds(
    short: tuple[str | Path, ...], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    data, *options = short
    (tmp_path / "file").write_text("")
    result = poise("fit", data, "cross_entropy", *options, "--quiet", "--tracker", f"tensorboard:{tmp_path / 'file'}")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("The tracker tensorboard failed") == 1
    assert str(tmp_path) not in result.stderr


def test_every_command_that_trains_has_the_option_and_refuses_an_unknown_tracker() -> None:
    for command in (("compare", "wine", "cross_entropy"), ("fit", "wine", "cross_entropy")):
        result = poise(*command, "--tracker", "tensorbord")
        assert result.exit_code == 2, result.output
        assert "Did you mean 'tensorboard'?" in result.stderr
    assert "--tracker" in re.sub(r"\x1b\[[0-9;]*m", "", poise("align", "--help").output)
