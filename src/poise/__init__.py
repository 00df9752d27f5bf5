"""Poise: write a learning objective as a formula, balance it, minimise it, compare it, see what every term bought.

Names are imported when they are first used, so that the command line can print its help without loading PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from poise._version import __version__

_HOME: dict[str, str] = {
    "Term": "objective",
    "Value": "objective",
    "Objective": "objective",
    "Evaluation": "objective",
    "DataInfo": "objective",
    "auxiliary": "objective",
    "Quantities": "quantities",
    "parse": "formula",
    "explain": "formula",
    "Problem": "problem",
    "Step": "problem",
    "Certificate": "problem",
    "fit": "fit",
    "Run": "fit",
    "Stream": "streams",
    "PerExampleMemory": "memory",
    "FrozenModel": "frozen",
    "constraint": "weights.constraint",
    "linear": "weights.schedule",
    "cosine": "weights.schedule",
    "exponential": "weights.schedule",
    "rampup": "weights.schedule",
    "piecewise": "weights.schedule",
    "auto": "weights.auto",
    "Study": "studies",
    "load_task": "tasks",
    "PoiseError": "errors",
    "PoiseWarning": "errors",
}
_ROOMS = (
    "after", "claims", "data", "errors", "insight", "metrics", "objective", "operators", "parts", "quantities",
    "readouts", "recipes", "report", "search", "solvers", "streams", "studies", "tasks", "terms", "weights",
)  # fmt: skip

__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from poise.errors import PoiseError, PoiseWarning
    from poise.fit import Run, fit
    from poise.formula import explain, parse
    from poise.frozen import FrozenModel
    from poise.memory import PerExampleMemory
    from poise.objective import DataInfo, Evaluation, Objective, Term, Value, auxiliary
    from poise.problem import Certificate, Problem, Step
    from poise.quantities import Quantities
    from poise.streams import Stream
    from poise.studies import Study
    from poise.tasks import load_task
    from poise.weights.auto import auto
    from poise.weights.constraint import constraint
    from poise.weights.schedule import cosine, exponential, linear, piecewise, rampup


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"poise.{_HOME[name]}"), name)
    elif name in _ROOMS:
        return importlib.import_module(f"poise.{name}")
    else:
        # A term by its class name: poise.CrossEntropy is poise.terms.CrossEntropy.
        terms = importlib.import_module("poise.terms")
        if name.startswith("_") or name not in terms.class_names():
            raise AttributeError(f"module 'poise' has no attribute {name!r}")
        value = getattr(terms, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_ROOMS})
