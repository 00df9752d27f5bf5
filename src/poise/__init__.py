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
    "fit": "training",
    "PoiseClassifier": "estimators",
    "PoiseRegressor": "estimators",
    "solve": "solving",
    "solve_path": "solving",
    "Run": "run",
    "Stream": "streams",
    "OnPolicy": "readouts.on_policy",
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
    "readouts", "recipes", "report", "search", "solvers", "streams", "studies", "tasks", "terms", "trackers", "weights",
)  # fmt: skip

__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from poise.errors import PoiseError as PoiseError
    from poise.errors import PoiseWarning as PoiseWarning
    from poise.estimators import PoiseClassifier as PoiseClassifier
    from poise.estimators import PoiseRegressor as PoiseRegressor
    from poise.formula import explain as explain
    from poise.formula import parse as parse
    from poise.frozen import FrozenModel as FrozenModel
    from poise.memory import PerExampleMemory as PerExampleMemory
    from poise.objective import DataInfo as DataInfo
    from poise.objective import Evaluation as Evaluation
    from poise.objective import Objective as Objective
    from poise.objective import Term as Term
    from poise.objective import Value as Value
    from poise.objective import auxiliary as auxiliary
    from poise.problem import Certificate as Certificate
    from poise.problem import Problem as Problem
    from poise.problem import Step as Step
    from poise.quantities import Quantities as Quantities
    from poise.readouts.on_policy import OnPolicy as OnPolicy
    from poise.run import Run as Run
    from poise.solving import solve as solve
    from poise.solving import solve_path as solve_path
    from poise.streams import Stream as Stream
    from poise.studies import Study as Study
    from poise.tasks import load_task as load_task
    from poise.training import fit as fit
    from poise.weights.auto import auto as auto
    from poise.weights.constraint import constraint as constraint
    from poise.weights.schedule import cosine as cosine
    from poise.weights.schedule import exponential as exponential
    from poise.weights.schedule import linear as linear
    from poise.weights.schedule import piecewise as piecewise
    from poise.weights.schedule import rampup as rampup


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
