"""`track`: tell trackers about a run of `poise.fit`, at its log points."""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from poise import processes
from poise.trackers.contract import TrackedRun
from poise.trackers.opening import Given, open_trackers
from poise.trackers.tracking import NewPoints, Tracking

if TYPE_CHECKING:
    from poise.run import FitState


class FitTracker:
    """What `track` gives: hand it to `poise.fit` as `progress`.

    It is called at log points only, so a step costs nothing more, and it is no part of a checkpoint. Every curve of the run's history is
    sent once, with the steps that it belongs to; a run that was resumed sends all of it.

    Attributes:
        verdict: what is added to the verdict; put metrics of your own here before the block ends.
    """

    def __init__(
        self,
        tracking: Tracking,
        config: Mapping[str, Any],
        name: str,
        group: str,
        progress: Callable[[FitState], None] | None,
    ) -> None:
        self.verdict: dict[str, Any] = {}
        self._tracking, self._config, self._progress = tracking, config, progress
        self._name, self._group = name, group
        self._points = NewPoints()
        self._state: FitState | None = None

    def __call__(self, state: FitState) -> None:
        if self._state is None and self._tracking:
            self._tracking.begin(TrackedRun(self._name, {**_config(state), **self._config}, self._group))
        self._state = state
        self._send()
        if self._progress is not None:
            self._progress(state)

    def finish(self, status: str, reason: str) -> None:
        """Send what came after the last log point, and the verdict."""
        if not self._tracking:
            return
        state = self._state
        if state is None:
            self._tracking.begin(TrackedRun(self._name, {**_versions(), **self._config}, self._group))
            self._tracking.end({"status": status, "reason": reason or "No step was logged.", **self.verdict})
            return
        self._send()
        best = {} if state.best is None else {"best/step": state.best[0], "best/value": state.best[1]}
        found = {
            "status": status,
            "reason": reason or state.stop or "all steps are done",
            "steps": state.step,
            "skipped": state.skipped,
            "seconds": state.seconds,
            **best,
        }
        self._tracking.end({**found, **self.verdict})

    def _send(self) -> None:
        if self._tracking and self._state is not None:
            for values, step in self._points.of(self._state.history.curves()):
                self._tracking.log(values, step)


@contextmanager
def track(
    tracker: Given,
    *,
    config: Mapping[str, Any] | None = None,
    name: str = "",
    group: str = "",
    progress: Callable[[FitState], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Iterator[FitTracker]:
    """Tell trackers about the run of `poise.fit` in this block.

    Args:
        tracker: `tensorboard[:DIR]`, `mlflow[:URI]`, `wandb[:PROJECT]`, an object with `begin`, `log` and `end`, or several of them;
            None for none.
        config: what the run is known by, nested as you like, beside what its state says (formula, seed, steps, model, versions).
        name: of the run; by default the time and four random digits.
        group: puts runs together.
        progress: a function that is called at every log point too.
        say: takes the one sentence about a tracker that failed; by default it is a `PoiseWarning`.

    Raises:
        InputError: a tracker's name is not known.
        MissingDependencyError: its library is not installed.

    >>> import poise, torch
    >>> x, y = torch.randn(64, 3), torch.randint(0, 2, (64,))
    >>> with track(None) as tracker:
    ...     run = poise.fit(torch.nn.Linear(3, 2), "cross_entropy", (x, y), steps=5, progress=tracker)
    """
    with open_trackers(None if processes.rank() else tracker, say) as tracking:
        follower = FitTracker(tracking, config or {}, name or _new_name(), group, progress)
        try:
            yield follower
        except KeyboardInterrupt as interrupt:
            follower.finish("stopped", str(interrupt) or "interrupted")
            raise
        except BaseException as error:
            follower.finish("failed", f"{type(error).__name__}: {error}")
            raise
        follower.finish("done", "")


def _new_name() -> str:
    # Not from `random`, whose state belongs to the run.
    return f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def _config(state: FitState) -> dict[str, Any]:
    parameters = list(state.model.parameters())
    return {
        "formula": str(state.objective),
        "seed": state.objective.seed,
        "steps": state.steps,
        "steps_per_epoch": state.steps_per_epoch,
        "model": type(state.model).__name__,
        "parameters": sum(p.numel() for p in parameters),
        "device": str(parameters[0].device) if parameters else "cpu",
        **_versions(),
    }


def _versions() -> dict[str, Any]:
    import platform

    import numpy
    import torch

    from poise._version import __version__

    found = {
        "poise": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
    }
    return {"version": found}
