"""A kept model predicts what the trained one predicted, holds nothing pickled, and says when it is damaged."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from poise.cli import app
from poise.errors import InputError
from poise.saved import CONFIG, PROGRAM, WEIGHTS, Predictions, SavedModel


def fit(*arguments: str | Path) -> None:
    result = CliRunner().invoke(app, ["fit", *(str(argument) for argument in arguments), "--quiet", "--device", "cpu"])
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def flowers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV with numbers, text, missing values and three classes that are easy to tell apart."""
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("data") / "flowers.csv"
    lines = ["length,width,colour,kind"]
    for row in range(120):
        kind = row % 3
        length, width = (torch.randn(2, generator=generator) * 0.2 + kind).tolist()
        colour = ("red", "blue", "")[row % 7 % 3]
        lines.append(f"{length:.4f},{'' if row == 5 else f'{width:.4f}'},{colour},{('ash', 'birch', 'cedar')[kind]}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def kept(flowers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept") / "model"
    fit(flowers, "cross_entropy", "--label", "kind", "--epochs", "20", "--save", folder)
    return folder


def test_predictions_of_new_rows_name_classes_and_their_probabilities(
    kept: Path, flowers: Path, tmp_path: Path
) -> None:
    new = tmp_path / "new.csv"
    # Columns in another order, no label, and a colour that training never saw.
    new.write_text("colour,width,length\nred,0.1,0.0\ngreen,1.0,1.1\n,2.0,\n")
    result = CliRunner().invoke(app, ["predict", str(kept), str(new), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [row["prediction"] for row in rows[:2]] == ["ash", "birch"]
    for row in rows:
        # Seven digits are printed of each of the three.
        assert sum(float(row[f"probability of {name}"]) for name in ("ash", "birch", "cedar")) == pytest.approx(
            1, abs=1e-6
        )


def test_the_saved_model_repeats_the_training_metrics_on_the_same_rows(kept: Path, flowers: Path) -> None:
    from poise.tasks import load_task

    saved = SavedModel.load(kept)
    split = load_task(flowers, label="kind").split(seed=0)
    with torch.no_grad():
        metrics = split.metrics(saved.model(split.test["input"]), split.test["target"])
    assert metrics == pytest.approx(saved.config["metrics"], rel=1e-6)


def test_the_program_runs_without_poise_for_any_number_of_rows(kept: Path) -> None:
    program = torch.export.load(kept / PROGRAM).module()
    model = SavedModel.load(kept).model
    for rows in (1, 5):
        x = torch.randn(rows, *SavedModel.load(kept).config["task"]["input_shape"])
        torch.testing.assert_close(program(x), model(x))


def test_nothing_in_the_folder_is_pickled_and_no_row_of_the_data_is_kept(kept: Path) -> None:
    assert sorted(path.name for path in kept.iterdir()) == sorted([CONFIG, WEIGHTS, PROGRAM])
    with zipfile.ZipFile(kept / PROGRAM) as archive:
        for name in archive.namelist():
            content = archive.read(name)
            assert not content.startswith((b"\x80", b"PK")), name


def test_a_part_of_the_formula_is_folded_into_the_weights_that_are_kept(flowers: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = tmp_path / "model"
    fit(flowers, "cross_entropy with compand(learn=True)", "--label", "kind", "--epochs", "20", "--save", folder)
    assert not any("parametrizations" in name for name in load_file(folder / WEIGHTS))
    result = CliRunner().invoke(app, ["predict", str(folder), str(flowers), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    told = [row["prediction"] for row in csv.DictReader(io.StringIO(result.stdout))]
    truth = [line.rsplit(",", 1)[1] for line in flowers.read_text().splitlines()[1:]]
    assert sum(a == b for a, b in zip(told, truth, strict=True)) > 0.9 * len(truth)


def test_a_regression_predicts_in_the_unit_of_its_label(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, generator=generator)
    data = tmp_path / "data.csv"
    data.write_text("x,y\n" + "".join(f"{v:.5f},{1000 + 50 * v:.5f}\n" for v in x.tolist()))
    fit(data, "squared_error", "--label", "y", "--epochs", "60", "--save", tmp_path / "model")
    new = tmp_path / "new.csv"
    new.write_text("x\n0\n1\n")
    zero, one = SavedModel.load(tmp_path / "model").predict(new, device="cpu").values
    # The label's spread is 50; an unscaled answer would be near 0 and 1.
    assert zero == pytest.approx(1000, abs=15)
    assert one == pytest.approx(1050, abs=15)


def test_a_folder_that_holds_a_model_is_not_overwritten(kept: Path, flowers: Path) -> None:
    before = (kept / WEIGHTS).read_bytes()
    result = CliRunner().invoke(app, ["fit", str(flowers), "cross_entropy", "--label", "kind", "--save", str(kept)])
    assert result.exit_code == 2
    assert "holds a model already" in result.stderr
    assert (kept / WEIGHTS).read_bytes() == before


def test_auto_is_refused_with_the_command_that_finds_it(flowers: Path) -> None:
    result = CliRunner().invoke(app, ["fit", str(flowers), "cross_entropy + auto*l2", "--label", "kind"])
    assert result.exit_code == 2
    assert "poise compare" in result.stderr


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (CONFIG, None, "holds no saved model"),
        (CONFIG, b"{", "is damaged"),
        (WEIGHTS, None, "missing or damaged"),
        (WEIGHTS, b"abc", "missing or damaged"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(
    file: str, content: bytes | None, message: str, kept: Path, tmp_path: Path
) -> None:
    for path in kept.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=message):
        SavedModel.load(tmp_path)


def test_a_folder_of_a_newer_version_is_refused(kept: Path, tmp_path: Path) -> None:
    config = json.loads((kept / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "format": 99}))
    with pytest.raises(InputError, match="format 99"):
        SavedModel.load(tmp_path)


def test_a_missing_column_is_named(kept: Path, tmp_path: Path) -> None:
    new = tmp_path / "new.csv"
    new.write_text("colour,length\nred,0.1\n")
    result = CliRunner().invoke(app, ["predict", str(kept), str(new)])
    assert result.exit_code == 2
    assert "width" in result.stderr


def test_predictions_are_written_with_the_digits_that_float32_holds() -> None:
    file = io.StringIO()
    Predictions(["a"], torch.tensor([[0.25, 0.75]]), ("a", "b")).write_csv(file)
    assert file.getvalue() == "prediction,probability of a,probability of b\na,0.25,0.75\n"


def test_a_model_with_gates_is_saved_as_the_plain_model_that_it_is_at_its_hyperparameters(tmp_path: Path) -> None:
    formula = "cross_entropy + auto(policy='bilevel', method='self_tuning')*l2 with best_response(n_hyper=1)"
    fit("digits", formula, "--epochs", "2", "--save", tmp_path / "model")
    saved = SavedModel.load(tmp_path / "model")
    assert saved.config["weights"]["l2"] > 0
    assert len(saved.predict(torch.zeros(3, 64)).values) == 3
