"""What fuzzing found, one test each."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_model

from poise import checkpoint
from poise.errors import CheckpointError, InputError, StoreError
from poise.saved import Predictions, SavedModel
from poise.studies import curves
from poise.studies.config import read_config
from poise.tasks import build_model
from poise.tasks.arrays import read_npy, read_npz
from poise.tasks.delimited import read_delimited
from poise.tasks.images import read_image_folder
from poise.tasks.language.files import BadRow, read_rows


def saved(folder: Path, **changes: object) -> Path:
    save_model(build_model("linear", (1,), 2), str(folder / "model.safetensors"))
    preprocessor = {
        "kind": "table",
        "numbers": ["x"],
        "indicators": [],
        "categories": {},
        "medians": [0.0],
        "means": [0.0],
        "scales": [1.0],
    }
    task = {"classes": ["a", "b"], "outputs": 2, "input_shape": [1], "image_shape": None}
    config = {"format": 1, "model": "linear", "task": task, "preprocessor": {**preprocessor, "seen": []}, **changes}
    (folder / "poise.json").write_text(json.dumps(config))
    return folder


def test_a_saved_model_runs_no_callable_that_its_configuration_names(tmp_path: Path) -> None:
    task = {"classes": None, "outputs": -1, "input_shape": ["touch", str(tmp_path / "canary")], "image_shape": None}
    with pytest.raises(InputError, match="damaged"):
        SavedModel.load(saved(tmp_path, model="subprocess:call", task=task))
    with pytest.raises(InputError, match="allow_code=True"):
        SavedModel.load(saved(tmp_path, model="subprocess:call"))
    assert not (tmp_path / "canary").exists()


def test_a_saved_model_larger_than_its_weights_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    task = {"classes": None, "outputs": 2_000_000_000, "input_shape": [1], "image_shape": None}
    with pytest.raises(InputError, match="missing or damaged"):
        SavedModel.load(saved(tmp_path, task=task, target={"mean": 0.0, "std": 1.0}))


@pytest.mark.parametrize("change", [{"task": 3}, {"preprocessor": {}}, {"model": []}, {"task": {}}])
def test_a_saved_model_with_a_foreign_configuration_is_damaged(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(InputError, match="damaged"):
        SavedModel.load(saved(tmp_path, **change))


def test_a_class_named_like_a_formula_is_text_in_the_predictions() -> None:
    sink = io.StringIO()
    Predictions(["=1+1", "-1"], None, ("=1+1", "-1")).write_csv(sink)
    assert sink.getvalue().splitlines()[1:] == ["'=1+1", "-1"]


def test_postscript_under_the_name_of_an_image_starts_no_ghostscript(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with pytest.raises(InputError, match="broken image"):
        read_image_folder(tmp_path)


def test_an_npz_that_unpacks_to_far_more_than_it_is_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:  # noqa: SIM117
        with archive.open("x.npy", "w") as member:
            np.lib.format.write_array_header_1_0(
                member, {"descr": "|u1", "fortran_order": False, "shape": (300 << 20, 1)}
            )
            for _ in range(300):
                member.write(bytes(1 << 20))
    with pytest.raises(InputError, match="fill the memory"):
        read_npz(tmp_path / "a.npz")


@pytest.mark.parametrize(
    "raw",
    [
        b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f8',",
        b"\x93NUMPY\x02\x00\xff\xff\xff\x7f{}",
        b"\x93NUMPY\x01\x00\x3c\x00{'descr': '<U1', 'fortran_order': False, 'shape': (1, 1), } \xff\xff\xff\xff",
        b"\x93NUMPY\x01\x00\x3c\x00{'descr': '|S1', 'fortran_order': False, 'shape': (1, 1), } \xff",
    ],
)
def test_a_broken_npy_is_an_input_error(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.npy").write_bytes(raw)
    with pytest.raises(InputError):
        read_npy(tmp_path / "a.npy")


def test_a_line_end_within_an_unquoted_name_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'a"\rb"c,d\n1,2\n')
    with pytest.raises(InputError, match="header line"):
        read_delimited(tmp_path / "a.csv")


def test_a_number_of_ten_thousand_digits_is_a_bad_row_and_no_toml(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": ' + "9" * 10_000 + "}\n")
    assert isinstance(next(iter(read_rows(tmp_path / "a.jsonl"))), BadRow)
    for text in ("a = " + "9" * 10_000, "a = " + "[" * 3_000):
        (tmp_path / "study.toml").write_text(text)
        with pytest.raises(InputError, match="not a TOML file"):
            read_config(tmp_path / "study.toml")


def test_a_datasets_folder_leads_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "../../etc/passwd"}]}')
    with pytest.raises(InputError, match="lies in the folder itself"):
        list(read_rows(tmp_path))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["../.."]}')
    with pytest.raises(InputError, match="lies in the folder itself"):
        list(read_rows(tmp_path))


def test_a_checkpoint_with_the_right_digest_and_foreign_contents_is_refused(tmp_path: Path) -> None:
    import hashlib

    sink = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, sink)
    out = io.BytesIO()
    with zipfile.ZipFile(sink) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(
                name, b"\x80\x02X\x03\x00\x00\x00\xff\xff\xff." if name.endswith("data.pkl") else old.read(name)
            )
    file = tmp_path / "step-000000000001.ckpt"
    file.write_bytes(
        b"poise-checkpoint-1 " + hashlib.sha256(out.getvalue()).hexdigest().encode() + b"\n" + out.getvalue()
    )
    with pytest.raises(CheckpointError):
        checkpoint.load(file)


def test_curves_that_unpack_without_end_are_damaged() -> None:
    import zlib

    squeeze = zlib.compressobj(1)
    bomb = b"".join(squeeze.compress(bytes(1 << 20)) for _ in range(300)) + squeeze.flush()
    with pytest.raises(StoreError, match="damaged"):
        curves.unpack(bomb)
