"""The contract of a tracker: three methods, which hear of one run after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

Scalar = bool | int | float | str


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told when a run begins.

    Attributes:
        name: unlike that of every other run; letters, digits, `-`, `_` and `.`, so that it can name a folder.
        config: everything that decides the run, flat: `formula`, `seed`, `solver/lr`, `version/torch`, ... Secrets and the folders of local
            files are taken out before a tracker sees it.
        group: the study that the run belongs to; empty for a run of its own.
        kind: `run`, or `study` for the one entry of a group that carries the study's verdict.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    group: str = ""
    kind: Literal["run", "study"] = "run"

    def to_dict(self) -> dict[str, Any]:
        """Return plain dictionaries and literals."""
        return {**asdict(self), "config": dict(self.config)}


@runtime_checkable
class Tracker(Protocol):
    """Hears of runs, one after another: `begin`, any number of `log`, `end`.

    An object of yours is called in the run's own process, at log points only, so what it does there takes the run's time. An error that it
    raises is said once and ends its part in this run; the global random states are put back after every call.
    """

    def begin(self, run: TrackedRun) -> None:
        """A run begins."""
        ...

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take a point of some curves: `loss`, `term/<label>`, `weight/<label>`, `valid/accuracy`, ... Steps may repeat."""
        ...

    def end(self, verdict: Mapping[str, Scalar]) -> None:
        """Take how the run ended: `status` is `done`, `failed` or `stopped`; beside it final metrics, constraints and a sentence."""
        ...
