from __future__ import annotations

import tomllib

import pytest

from poise.errors import InputError
from poise.studies.config import build_config, read_config

MINIMAL = {"formulas": ["cross_entropy"], "seeds": [0, 1], "data": {"source": "digits"}}


def test_a_configuration_comes_back_from_toml(tmp_path):
    config = build_config(
        {
            **MINIMAL,
            "leave_one_out": False,
            "data": {"source": 'odd "name".csv', "label": "größe", "split": [0.5, 0.25, 0.25], "label_noise": 0.4},
            "training": {
                "lr": 0.1,
                "epochs": 7,
                "solver": "sgd",
                "solver_options": {"momentum": 0.9, "nesterov": True},
            },
            "tuning": {"trials": 8},
            "engine": {"threads": 2},
        }
    )
    path = tmp_path / "study.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert read_config(path) == config
    assert tomllib.loads(path.read_text())["format"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"formulae": []}, r"unknown key formulae\. Did you mean 'formulas'\?"),
        ({"data": {"source": "digits", "labl": "y"}}, r"unknown key data\.labl\. Did you mean 'label'\?"),
        ({"training": {"learning": 0.1}}, r"unknown key training\.learning\. Known keys: model, .*solver"),
        ({"tuning": {"trails": 4}}, r"unknown key tuning\.trails\. Did you mean 'trials'\?"),
        ({"engine": {"name": "rey"}}, r"engine\.name: .*'local'.*'rey'"),
        ({"seeds": [1, 1]}, "seeds must differ"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [-1]}, "from 0"),
        ({"formulas": []}, "formulas"),
        ({"training": {"lr": -1}}, r"training\.lr: .*greater than 0.*-1"),
        ({"training": {"epochs": 3, "steps": 4}}, "epochs or steps, not both"),
        ({"tuning": {"trials": 1}}, "one trial is no search"),
        ({"data": {}}, r"the key data\.source is missing"),
        ({"data": {"source": "digits", "label_noise": 1.0}}, r"data\.label_noise"),
    ],
)
def test_what_is_wrong_is_named_with_its_key(change, message):
    with pytest.raises(InputError, match=message):
        build_config({**MINIMAL, **change})


def test_all_faults_are_named_at_once():
    with pytest.raises(InputError, match=r"unknown key data\.beta.*unknown key alpha") as caught:
        build_config({**MINIMAL, "alpha": 1, "data": {"source": "digits", "beta": 2}})
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_toml_is_refused_by_its_name(tmp_path):
    path = tmp_path / "study.toml"
    with pytest.raises(InputError, match="Cannot read"):
        read_config(path)
    path.write_text("formulas = [")
    with pytest.raises(InputError, match="not a TOML file"):
        read_config(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not a TOML file"):
        read_config(path)
