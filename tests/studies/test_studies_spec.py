from __future__ import annotations

import dataclasses
import json

import pytest
from studies_fakes import make_record, make_spec

from poise.studies.spec import DataSpec, RunRecord, RunSpec


def test_the_id_of_a_specification_never_changes():
    # Written down once: a change of this value makes every stored run be repeated.
    assert make_spec().id == "1eb98eb83f7401f4"


def test_a_trip_through_json_keeps_specification_and_id():
    spec = make_spec(solver_options={"momentum": 0.9, "nesterov": True})
    again = RunSpec.from_json(spec.to_json())
    assert again == spec
    assert again.id == spec.id


@pytest.mark.parametrize(
    "change",
    [
        {"formula": "cross_entropy + 2*early_learning"},
        {"seed": 1},
        {"lr": 0.03},
        {"epochs": 91},
        {"epochs": None, "steps": 90},
        {"batch_size": 64},
        {"model": "linear"},
        {"model_code": "abc"},
        {"solver": "adam"},
        {"solver_options": {"momentum": 0.8}},
        {"schedule": "cosine"},
        {"precision": "bf16"},
        {"device": "cuda"},
        {"threads": 2},
        {"select": "best"},
        {"measure": "valid"},
        {"deterministic": True},
        {"protocol": 2},
        {"data": DataSpec("digits", fingerprint="e" * 64)},
        {"data": DataSpec("digits", fingerprint="f" * 64, split=(0.5, 0.25, 0.25))},
    ],
)
def test_everything_that_decides_the_result_decides_the_id(change):
    assert dataclasses.replace(make_spec(), **change).id != make_spec().id


@pytest.mark.parametrize(
    "change",
    [
        {"data": DataSpec("/elsewhere/digits.csv", fingerprint="f" * 64)},
        {"data": DataSpec("digits", fingerprint="f" * 64, test_file="/elsewhere/test.csv")},
    ],
)
def test_where_the_data_lie_does_not_decide_the_id(change):
    assert dataclasses.replace(make_spec(), **change).id == make_spec().id


def test_the_number_of_the_gpu_does_not_decide_the_id():
    assert make_spec(device="cuda:1").id == make_spec(device="cuda").id


def test_a_whole_number_and_its_float_are_the_same_learning_rate():
    assert make_spec(lr=1).id == make_spec(lr=1.0).id


def test_a_run_has_one_budget():
    with pytest.raises(ValueError, match="epochs or steps"):
        make_spec(epochs=3, steps=4)
    with pytest.raises(ValueError, match="epochs or steps"):
        make_spec(epochs=None)


def test_a_trip_through_json_keeps_a_record():
    record = make_record(make_spec())
    assert RunRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record
