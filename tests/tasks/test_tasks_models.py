"""Starting models: shapes, seeds, and the user's own factory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from poise.errors import InputError
from poise.tasks.models import build_model


@pytest.mark.parametrize(
    ("name", "input_shape", "image_shape"),
    [
        ("linear", (64,), None),
        ("mlp", (64,), None),
        ("cnn", (64,), (1, 8, 8)),
        ("cnn", (3, 32, 48), (3, 32, 48)),
        ("cnn", (1, 5, 4), (1, 5, 4)),
        ("auto", (3, 28, 28), (3, 28, 28)),
        ("mlp", (3, 8, 8), (3, 8, 8)),
    ],
)
@pytest.mark.parametrize("outputs", [1, 10])
def test_every_model_maps_a_batch_to_outputs(
    name: str, input_shape: tuple[int, ...], image_shape: tuple[int, int, int] | None, outputs: int
) -> None:
    model = build_model(name, input_shape, outputs, image_shape=image_shape)
    assert model(torch.randn(3, *input_shape)).shape == (3, outputs)


def test_the_seed_alone_decides_the_start_and_the_default_generator_stays() -> None:
    before = torch.random.get_rng_state()
    first = build_model("mlp", (8,), 3, seed=1)
    torch.rand(5)
    again, other = build_model("mlp", (8,), 3, seed=1), build_model("mlp", (8,), 3, seed=2)
    assert torch.equal(first[0].weight, again[0].weight)  # type: ignore[index]
    assert not torch.equal(first[0].weight, other[0].weight)  # type: ignore[index]
    torch.random.set_rng_state(before)
    build_model("mlp", (8,), 3, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_auto_is_a_cnn_for_images_and_an_mlp_for_rows() -> None:
    assert any(isinstance(module, torch.nn.Conv2d) for module in build_model("auto", (3, 8, 8), 2).modules())
    assert not any(isinstance(module, torch.nn.Conv2d) for module in build_model("auto", (64,), 2).modules())


FACTORY = """
import torch
from torch import nn

def good(input_shape, outputs):
    return nn.Sequential(nn.Linear(input_shape[0], 4), nn.BatchNorm1d(4), nn.Linear(4, outputs))

def one_number(input_shape, outputs):
    return nn.Sequential(nn.Linear(input_shape[0], 1), nn.Flatten(0))

def too_wide(input_shape, outputs):
    return nn.Linear(input_shape[0], outputs + 1)

def wrong_input(input_shape, outputs):
    return nn.Linear(input_shape[0] + 1, outputs)

def whole(input_shape, outputs):
    class Argmax(nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), outputs, dtype=torch.long)
    return Argmax()

def nothing(input_shape, outputs):
    return None

def breaks(input_shape, outputs):
    raise RuntimeError("no such layer")

number = 3
"""


@pytest.fixture
def factory_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "poise_test_factory.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    return "poise_test_factory"


def test_a_factory_of_the_working_directory_is_found_and_seeded(factory_module: str) -> None:
    first, again = (build_model(f"{factory_module}:good", (6,), 3, seed=5) for _ in range(2))
    assert torch.equal(first[0].weight, again[0].weight)  # type: ignore[index]
    assert first.training
    # The check ran in evaluation mode: batch statistics are untouched.
    assert int(first[1].num_batches_tracked) == 0  # type: ignore[index, arg-type]


def test_a_regression_factory_may_return_one_number_an_example(factory_module: str) -> None:
    assert build_model(f"{factory_module}:one_number", (6,), 1)(torch.zeros(2, 6)).shape == (2,)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("too_wide", r"does not fit the labels.*returned float \[2, 4\]; expected \[2, 3\] \(3 classes\)"),
        ("wrong_input", r"cannot read examples of shape \[6\]"),
        ("whole", "logits, not class numbers"),
        ("nothing", "returned a NoneType"),
        ("breaks", "RuntimeError: no such layer"),
        ("number", "no callable 'number'"),
        ("gud", "Did you mean 'good'"),
    ],
)
def test_a_factory_that_does_not_fit_is_refused_in_words(factory_module: str, factory: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_model(f"{factory_module}:{factory}", (6,), 3)


@pytest.mark.parametrize(
    ("name", "input_shape", "message"),
    [
        ("mlpp", (6,), "Did you mean 'mlp'"),
        ("cnn", (6,), "needs images"),
        ("cnn", (1, 2, 2), "at least 4 x 4"),
        ("no_such_module_here:f", (6,), "no module 'no_such_module_here'"),
        (":f", (6,), "package.module:factory"),
    ],
)
def test_an_unknown_model_is_refused_in_words(name: str, input_shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_model(name, input_shape, 3)
