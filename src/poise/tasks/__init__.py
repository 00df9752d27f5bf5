"""Data, model, readout and metrics, ready to train: embedded tasks and the user's own files."""

from __future__ import annotations

from poise.tasks.embedded import EMBEDDED
from poise.tasks.load import load_task, read_inputs, read_table
from poise.tasks.models import build_model, check_model, choose_model, load_factory
from poise.tasks.preprocessing import preprocessor_from_dict
from poise.tasks.task import Split, Task

__all__ = [
    "EMBEDDED",
    "Split",
    "Task",
    "build_model",
    "check_model",
    "choose_model",
    "load_factory",
    "load_task",
    "preprocessor_from_dict",
    "read_inputs",
    "read_table",
]
