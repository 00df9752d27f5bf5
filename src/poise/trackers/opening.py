"""Which trackers a run has: `tensorboard[:DIR]`, `mlflow[:URI]`, `wandb[:PROJECT]`, or objects of yours."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Sequence

from poise.errors import InputError, MissingDependencyError, nearest
from poise.trackers.contract import Tracker
from poise.trackers.tracking import Member, Own, Tracking

Given = str | Tracker | Sequence[str | Tracker] | None

LIBRARIES = {"tensorboard": "TensorBoard", "mlflow": "MLflow", "wandb": "Weights & Biases"}
FOLDER = "poise-runs"


def open_trackers(given: Given, say: Callable[[str], None] | None = None) -> Tracking:
    """Return what tells all of these trackers, several at a time.

    Args:
        given: `tensorboard[:DIR]` (a folder, `poise-runs` by default), `mlflow[:URI]` (a server, else `MLFLOW_TRACKING_URI`),
            `wandb[:PROJECT]` (offline unless `WANDB_MODE` says otherwise), an object with the three methods of `Tracker`, or several.
        say: takes the one sentence about a tracker that failed; by default it is a `PoiseWarning`.

    Raises:
        InputError: a name is not known, or lacks what it needs.
        MissingDependencyError: the library is not installed.
    """
    listed = [] if given is None else [given] if isinstance(given, str) or not isinstance(given, Sequence) else given
    return Tracking([_open(one) for one in listed], say)


def _open(given: str | Tracker) -> Member:
    from poise.trackers.process import TrackerProcess

    if not isinstance(given, str):
        lacking = [name for name in ("begin", "log", "end") if not callable(getattr(given, name, None))]
        if lacking:
            raise InputError(f"A tracker has the methods begin, log and end, and {given!r} lacks {', '.join(lacking)}.")
        return Own(given)
    library, colon, place = given.partition(":")
    if library not in LIBRARIES or (colon and not place.strip()):
        raise InputError(
            f"There is no tracker {given!r}.{nearest(library, LIBRARIES) if library not in LIBRARIES else ''} Write tensorboard[:DIR], "
            "mlflow[:URI] or wandb[:PROJECT], such as tensorboard:runs or mlflow:http://127.0.0.1:5000."
        )
    if importlib.util.find_spec(library) is None:
        raise MissingDependencyError(library, "trackers", f"The tracker {LIBRARIES[library]}")
    return TrackerProcess(library, _place(library, place))


def _place(library: str, place: str) -> str:
    if library == "tensorboard":
        return os.path.abspath(place or FOLDER)
    if library == "mlflow":
        place = place or os.environ.get("MLFLOW_TRACKING_URI", "")
        if not re.match(r"[a-z][a-z0-9+]*:", place):
            raise InputError(
                f"The tracker mlflow needs a server, and {place or 'none'} is no address: write mlflow:http://HOST:PORT, or set "
                "MLFLOW_TRACKING_URI. `mlflow server --port 5000` starts one."
            )
    if library == "wandb" and place and not re.fullmatch(r"[\w.\-]{1,128}", place):
        raise InputError(f"The wandb project {place!r} may have letters, digits, -, _ and . only.")
    return place or "poise"
