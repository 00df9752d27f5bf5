"""`Tracking`: tell every tracker, and let none of them stop or change what it is told about."""

from __future__ import annotations

import contextlib
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from poise.errors import PoiseWarning
from poise.trackers.contract import Scalar, TrackedRun, Tracker
from poise.trackers.privacy import public, scrub


class Member(Protocol):
    """One tracker, as `Tracking` sees it. `failure` is a sentence once something went wrong."""

    name: str
    failure: str

    def begin(self, run: TrackedRun) -> None: ...
    def log(self, values: Mapping[str, float], step: int) -> None: ...
    def end(self, verdict: Mapping[str, Scalar]) -> None: ...
    def close(self) -> None: ...


class Own:
    """A tracker of the user's, called here."""

    def __init__(self, tracker: Tracker) -> None:
        self.name, self.failure = type(tracker).__name__, ""
        self._tracker, self._off = tracker, False

    def begin(self, run: TrackedRun) -> None:
        self._off = False
        self._call("begin", run)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._call("log", values, step)

    def end(self, verdict: Mapping[str, Scalar]) -> None:
        self._call("end", verdict)

    def close(self) -> None:
        pass

    def _call(self, method: str, *arguments: Any) -> None:
        if self._off:
            return
        try:
            with _same_randomness():
                getattr(self._tracker, method)(*arguments)
        except Exception as error:
            self._off = True
            self.failure = f"{type(error).__name__}: {error}"


class Tracking:
    """All trackers of a run or study. Use it as a context manager, or call `close`.

    Args:
        members: the trackers.
        say: takes the one sentence about a tracker that failed.
    """

    def __init__(self, members: Sequence[Member], say: Callable[[str], None] | None = None) -> None:
        self._members = list(members)
        self._say = say or _warn
        self._said: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self._members)

    @property
    def failed(self) -> bool:
        """Whether any tracker missed something."""
        return any(member.failure for member in self._members)

    def begin(self, run: TrackedRun) -> None:
        """A run begins; secrets and local paths are taken out here, once for every tracker."""
        run = replace(run, name=scrub(run.name), group=scrub(run.group), config=public(run.config))
        self._tell(lambda member: member.begin(run))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Pass on a point of some curves."""
        clean = {name: float(value) for name, value in values.items()}
        self._tell(lambda member: member.log(clean, step))

    def end(self, verdict: Mapping[str, Any]) -> None:
        """Pass on how the run ended."""
        clean = public(verdict)
        self._tell(lambda member: member.end(clean))

    def close(self) -> None:
        """Wait until everything has arrived, a while at most, and say what did not."""
        self._tell(lambda member: member.close())

    def _tell(self, call: Callable[[Member], None]) -> None:
        for number, member in enumerate(self._members):
            # A member catches what its library raises; this is for what it did not foresee.
            try:
                call(member)
            except Exception as error:
                member.failure = member.failure or f"{type(error).__name__}: {error}"
            if member.failure and number not in self._said:
                self._said.add(number)
                reason = scrub(" ".join(member.failure.split()))[:400]
                self._say(f"The tracker {member.name} failed, and the run goes on without it. {reason}")

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NewPoints:
    """The points of growing curves that were not sent yet, step by step."""

    def __init__(self) -> None:
        self._sent: dict[str, int] = {}

    def of(self, curves: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> Iterator[tuple[dict[str, float], int]]:
        """Yield the values of every step that came since the last call, oldest first.

        >>> list(NewPoints().of({"loss": ([1, 2], [0.5, 0.25]), "valid/accuracy": ([2], [0.9])}))
        [({'loss': 0.5}, 1), ({'loss': 0.25, 'valid/accuracy': 0.9}, 2)]
        """
        found: dict[int, dict[str, float]] = {}
        for name, (steps, values) in curves.items():
            start = self._sent.get(name, 0)
            self._sent[name] = len(steps)
            for step, value in zip(steps[start:], values[start:], strict=True):
                found.setdefault(int(step), {})[name] = float(value)
        for step in sorted(found):
            yield found[step], step


def finite(values: Mapping[str, Scalar]) -> dict[str, float]:
    """Return the numbers among some values that are finite."""
    return {k: float(v) for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}


def _warn(sentence: str) -> None:
    try:
        warnings.warn(sentence, PoiseWarning, stacklevel=2)
    except Warning:
        # Where warnings are errors, this one still must not stop a run.
        print(f"warning: {sentence}", file=sys.stderr)


@contextlib.contextmanager
def _same_randomness() -> Iterator[None]:
    """Put the global random states back, so that a tracker that draws numbers moves nothing in the run."""
    python, torch, numpy = random.getstate(), sys.modules.get("torch"), sys.modules.get("numpy")
    state = torch.get_rng_state() if torch is not None else None
    legacy = numpy.random.get_state() if numpy is not None else None
    try:
        yield
    finally:
        random.setstate(python)
        if torch is not None:
            torch.set_rng_state(state)
        if numpy is not None:
            numpy.random.set_state(legacy)
