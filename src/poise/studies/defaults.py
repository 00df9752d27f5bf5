"""The training settings that a study chooses where the user says nothing: the same for every formula, stated, written
down. The task says which solver, learning rate and batch are usual for its kind of data.

The number of epochs follows from the size of the training split, so that small data sets see enough steps and large
ones end in reasonable time:

    epochs = clamp(1500 / steps per epoch, fewest, most)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from poise.errors import InputError
from poise.solvers.torch_optimizers import as_solver, parse_solver
from poise.studies.config import DataConfig, TrainingConfig

if TYPE_CHECKING:
    from poise.tasks.contract import AnyTask

STEPS = 1500
# A usual learning rate for an optimiser that the user names without giving one.
_RATES = {
    "sgd": 0.02,
    "adam": 0.003,
    "adamw": 0.003,
    "rmsprop": 0.001,
    "adagrad": 0.01,
    "lion": 3e-4,
    "half_fine_tuning": 0.003,
    "newton": 1.0,
    "proximal": 0.02,
    "sls": 1.0,
    "target_surrogate": 1.0,
}


def resolve_training(given: TrainingConfig, task: AnyTask, data: DataConfig) -> TrainingConfig:
    """Fill in what the user left out.

    Args:
        given: the settings as given.
        task: the data; its number of examples and kind of target decide.
        data: how it is split.

    Returns:
        Settings without None, except for the one of `epochs` and `steps` that is not used and the schedule.

    Raises:
        InputError: a device that does not exist here, or an optimiser without a learning rate.
    """
    solver, options, lr = task.usual_solver(given.model, given.model_options())
    if given.solver is not None and given.solver != solver:
        name, said = parse_solver(given.solver)
        # What wraps an optimiser takes the rate of the one that it wraps.
        rate = _RATES.get(said.get("base", name))
        if given.lr is None and rate is None:
            # A name that does not exist is the greater mistake, and says so with the nearest one.
            as_solver(given.solver)
            raise InputError(f"Give a learning rate for the solver {given.solver!r}: its usual one is not known here.")
        solver, options, lr = given.solver, {}, rate or 0.0
    train = max(1, round(task.examples * data.split[0] / sum(data.split)))
    batch_size = given.batch_size or min(task.usual_batch(given.model), train)
    epochs = given.epochs
    if epochs is None and given.steps is None:
        fewest, most = task.usual_epochs
        epochs = min(most, max(fewest, round(STEPS / math.ceil(train / batch_size))))
    return given.model_copy(
        update={
            "model": task.choose_model(given.model),
            "model_code": model_code(given, task),
            "solver": solver,
            "solver_options": options if given.solver_options is None else given.solver_options,
            "lr": lr if given.lr is None else given.lr,
            "epochs": epochs,
            "batch_size": batch_size,
            "device": resolve_device(given.device),
        }
    )


def model_code(given: TrainingConfig, task: AnyTask) -> str:
    """Return the sha256 of what the user's own model is made of, so that a changed model is another run.

    Raises:
        InputError: the factory cannot be imported, or its source is no longer the one that `study.toml` was written for.
    """
    code = task.model_code(given.model)
    if given.model_code not in ("", code):
        raise InputError(
            f"The source of the model {given.model} has changed since study.toml was written. Restore it, or delete the "
            "line 'model_code' to study the new one."
        )
    return code


def resolve_device(device: str) -> str:
    """Return the device that `auto` stands for, or check that the one named exists.

    Raises:
        InputError: the device does not exist on this machine.
    """
    if device == "cpu":
        return device
    import torch

    kind = device.split(":")[0]
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind == "cuda" and torch.cuda.is_available():
        number = device.partition(":")[2]
        if not number or (number.isdigit() and int(number) < torch.cuda.device_count()):
            return device
        raise InputError(
            f"There is no device {device!r}; this machine has {torch.cuda.device_count()} GPUs, from cuda:0."
        )
    if kind == "mps" and torch.backends.mps.is_available():
        return device
    raise InputError(f"There is no device {device!r} on this machine. Use cpu, or auto for the best there is.")
