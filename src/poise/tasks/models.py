"""Small models to start from, and the user's own factory."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import InputError, nearest
from poise.quantities import derive, random_numbers

MODELS = ("auto", "linear", "mlp", "cnn")


def linear(input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """One affine map of the flattened input: `W x + b`.

    Args:
        input_shape: of one example.
        outputs: classes, or 1 for regression.

        >>> linear((64,), 10)(torch.zeros(2, 64)).shape
        torch.Size([2, 10])
    """
    return nn.Sequential(*_flatten(input_shape), nn.Linear(math.prod(input_shape), outputs))


def mlp(input_shape: tuple[int, ...], outputs: int, width: int = 256) -> nn.Module:
    """Two hidden layers with ReLU: `in - width - width - out`.

    Args:
        input_shape: of one example.
        outputs: classes, or 1 for regression.
        width: units of each hidden layer.

        >>> mlp((64,), 10)(torch.zeros(2, 64)).shape
        torch.Size([2, 10])
    """
    return nn.Sequential(
        *_flatten(input_shape),
        nn.Linear(math.prod(input_shape), width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, outputs),
    )


def cnn(input_shape: tuple[int, ...], outputs: int, image_shape: tuple[int, int, int] | None = None) -> nn.Module:
    """Two convolutions with ReLU and average pooling, then one hidden layer.

    The pooling before the hidden layer leaves at most 4 x 4 places, whatever the image's size. There is no batch normalisation, so that
    an example's output does not depend on its neighbours in the batch.

    Args:
        input_shape: of one example; flat examples need `image_shape`.
        outputs: classes, or 1 for regression.
        image_shape: channels, height, width.
    Raises:
        InputError: the examples are not images, or smaller than 4 x 4.

        >>> cnn((64,), 10, (1, 8, 8))(torch.zeros(2, 64)).shape
        torch.Size([2, 10])
    """
    if image_shape is None:
        if len(input_shape) != 3:
            raise InputError(
                f"The model cnn needs images; the examples of this task have the shape {list(input_shape)}. Use mlp or linear."
            )
        image_shape = (input_shape[0], input_shape[1], input_shape[2])
    channels, height, width = image_shape
    if min(height, width) < 4:
        raise InputError(
            f"The model cnn needs images of at least 4 x 4 pixels, got {height} x {width}. Use mlp or linear."
        )
    unfold = [nn.Unflatten(1, image_shape)] if tuple(input_shape) != image_shape else []
    pool = (math.ceil(height // 2 / 4), math.ceil(width // 2 / 4))
    places = (height // 2 // pool[0]) * (width // 2 // pool[1])
    return nn.Sequential(
        *unfold,
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(pool),
        nn.Flatten(),
        nn.Linear(64 * places, 128),
        nn.ReLU(),
        nn.Linear(128, outputs),
    )


def choose_model(name: str, input_shape: tuple[int, ...]) -> str:
    """Return what "auto" stands for, cnn for examples that are images and mlp otherwise; every other name as it is.

    >>> choose_model("auto", (1, 28, 28)), choose_model("auto", (64,))
    ('cnn', 'mlp')
    """
    return name if name != "auto" else "cnn" if len(input_shape) == 3 else "mlp"


def build_model(
    name: str,
    input_shape: tuple[int, ...],
    outputs: int,
    *,
    image_shape: tuple[int, int, int] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Build a model by name with a start that the seed alone decides; the default generators stay as they were.

    Args:
        name: "linear", "mlp", "cnn", "auto" (cnn for examples that are images, mlp otherwise), or "package.module:factory"; the factory
            is called with `(input_shape, outputs)` and returns an `nn.Module`. Modules of the working directory are found.
        input_shape: of one example.
        outputs: classes, or 1 for regression.
        image_shape: channels, height, width, where a flat example folds into an image.
        seed: any integer of at least 0.
    Raises:
        InputError: an unknown name, a factory that cannot be found or fails, a model whose output does not fit.

        >>> model = build_model("mlp", (64,), 10, seed=1)
    """
    name = choose_model(name, input_shape)
    makers: dict[str, Callable[[], Any]] = {
        "linear": lambda: linear(input_shape, outputs),
        "mlp": lambda: mlp(input_shape, outputs),
        "cnn": lambda: cnn(input_shape, outputs, image_shape),
    }
    with random_numbers(derive(seed, "model")):
        if name in makers:
            model: nn.Module = makers[name]()
            return model
        if ":" not in name:
            raise InputError(
                f"There is no model {name!r}.{nearest(name, MODELS)} The models are {', '.join(MODELS)}, or your "
                "own as package.module:factory."
            )
        model = _call_factory(name, input_shape, outputs)
        check_model(model, input_shape, outputs, name)
    return model


def check_model(model: nn.Module, input_shape: tuple[int, ...], outputs: int, name: str = "the model") -> None:
    """Raise InputError where a model does not turn `[batch, *input_shape]` into `[batch, outputs]`.

    A regression model may also return `[batch]`. Buffers, random numbers and training mode are left as they were.
    """
    training = model.training
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    model.eval()
    try:
        with torch.no_grad():
            output = model(torch.zeros(2, *input_shape, device=device))
    except Exception as error:
        raise InputError(
            f"The model {name} cannot read examples of shape {list(input_shape)}: {type(error).__name__}: {_first_line(error)}"
        ) from error
    finally:
        model.train(training)
    output = getattr(output, "logits", output)
    expected = [(2, outputs)] + ([(2,)] if outputs == 1 else [])
    if not isinstance(output, Tensor) or tuple(output.shape) not in expected:
        came = f"float {list(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        what = f"{outputs} classes" if outputs > 1 else "one number an example"
        raise InputError(
            f"The model {name} does not fit the labels: for a batch of 2 it returned {came}; expected [2, "
            f"{outputs}] ({what}). Use the argument outputs for its last layer."
        )
    if not output.is_floating_point():
        raise InputError(
            f"The model {name} returned {output.dtype}; expected floating-point outputs (logits, not class numbers)."
        )


def load_factory(name: str) -> Callable[..., Any]:
    """Return what `package.module:factory` names; modules of the working directory are found.

    Raises:
        InputError: the module or the factory does not exist, or the module fails when it is imported.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise InputError(f"Expected package.module:factory, got {name!r}.")
    with _working_directory_first():
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise InputError(
                f"There is no module {error.name!r} for the model {name!r}. Run from the folder that holds it, or install it."
            ) from error
        except Exception as error:
            raise InputError(
                f"Importing {module_name!r} for the model {name!r} failed: {type(error).__name__}: {_first_line(error)}"
            ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        functions = [known for known in vars(module) if not known.startswith("_")]
        raise InputError(f"The module {module_name!r} has no callable {attribute!r}.{nearest(attribute, functions)}")
    made: Callable[..., Any] = factory
    return made


def _call_factory(name: str, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    factory = load_factory(name)
    try:
        model = factory(input_shape, outputs)
    except Exception as error:
        raise InputError(
            f"The factory {name} failed for (input_shape={input_shape}, outputs={outputs}): {type(error).__name__}: {_first_line(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"The factory {name} returned a {type(model).__name__}; expected a torch.nn.Module.")
    return model


def _flatten(input_shape: tuple[int, ...]) -> list[nn.Module]:
    return [nn.Flatten()] if len(input_shape) > 1 else []


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["(no message)"])[0]


@contextmanager
def _working_directory_first() -> Iterator[None]:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
