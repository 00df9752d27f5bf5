"""Tell trackers about a study: every run as soon as it is stored, and the verdict at its end.

The process that keeps the store tells them, from the records; the workers know nothing of trackers. So a run is the same with and without,
on every engine, and a study that was stored before can be sent later. What a tracker has heard is noted in the store.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Sequence
from typing import Any

from poise.errors import StoreError
from poise.studies.config import StudyConfig
from poise.studies.plan import Plan
from poise.studies.spec import RunRecord, canonical_json
from poise.studies.store import Store
from poise.studies.summary import Summary
from poise.trackers.contract import TrackedRun
from poise.trackers.opening import Given
from poise.trackers.tracking import NewPoints, Tracking

_META = "tracked"


class StudyTracker:
    """One study, told to trackers.

    Args:
        tracking: the trackers.
        config: the study's, whole.
        task: its name, for the name of the group.
        key: which trackers these are; what another one heard does not count.
    """

    def __init__(self, tracking: Tracking, config: StudyConfig, task: str, key: str) -> None:
        self._tracking, self._config, self._key = tracking, config, f"{_META}:{key}"
        # Known by its content, so that a study that goes on stays one group.
        content = config.model_dump(mode="json", exclude={"engine"})
        for location in ("source", "test_file"):
            content["data"].pop(location, None)
        digest = hashlib.sha256(canonical_json(content).encode()).hexdigest()
        self.group = f"{_plain(task)}-{digest[:8]}"
        self._heard: list[str] = []

    def catch_up(self, store: Store, plan: Plan) -> None:
        """Tell of the runs that were finished before, unless these trackers have heard of them."""
        if not self._tracking:
            return
        self._heard = list(store.get_meta(self._key, []))
        heard = set(self._heard)
        missing = {run for run in plan.records if run in plan.roles and run not in heard}
        for record in store.records(curves=True, only=missing) if missing else ():
            self.tell(record, plan)

    def tell(self, record: RunRecord, plan: Plan) -> None:
        """Tell of one run, whole."""
        if not self._tracking:
            return
        role, index, seed = plan.roles[record.id]
        number = f"{index:02d}-{_plain(record.spec.formula)[:40]}-seed{seed}-{_plain(role)}-{record.id[:8]}"
        config = {
            **record.spec.to_dict(),
            "id": record.id,
            "role": role,
            "formula_number": index,
            "version": record.versions,
            "machine": {k: v for k, v in record.machine.items() if k in ("platform", "processor", "device")},
            "examples": record.sizes,
        }
        self._tracking.begin(TrackedRun(number, config, self.group))
        for values, step in NewPoints().of(record.curves):
            self._tracking.log(values, step)
        self._tracking.end(_verdict(record))
        self._heard.append(record.id)

    def end(self, summary: Summary) -> None:
        """Tell of what the study found."""
        if not self._tracking:
            return
        config = {"study": self._config.model_dump(mode="json"), "version": summary.versions, "title": summary.title}
        self._tracking.begin(TrackedRun(f"study-{self.group}", config, self.group, "study"))
        found = summary.recommendation
        verdict: dict[str, Any] = {
            "status": "failed" if summary.failed else "done",
            "kind": found.kind,
            "recommendation": found.text,
            "recommended": None if found.formula is None else summary.formulas[found.formula].text,
            "runs_done": summary.runs_done,
            "runs_failed": len(summary.failed),
            "seconds": summary.seconds,
        }
        for formula in summary.formulas:
            for name, estimate in formula.metrics.items():
                where = f"formula_{formula.index}/{name}"
                verdict |= {f"{where}/{key}": getattr(estimate, key) for key in ("mean", "lower", "upper", "n")}
        self._tracking.end(verdict)

    def keep(self, store: Store) -> None:
        """Wait until everything has arrived, and note what was heard; what failed is told again next time."""
        if not self._tracking:
            return
        self._tracking.close()
        if not self._tracking.failed:
            # A note that cannot be kept costs a second telling, not the study.
            with contextlib.suppress(StoreError):
                store.set_meta(self._key, self._heard)


def key_of(given: Given) -> str:
    """Return what trackers are known by in the store; of an address with a login, nothing that tells it."""
    listed = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    names = [one if isinstance(one, str) else type(one).__name__ for one in listed]
    return hashlib.sha256(canonical_json(names).encode()).hexdigest()[:16]


def _verdict(record: RunRecord) -> dict[str, Any]:
    return {
        "status": record.status,
        "reason": record.error,
        "steps": record.steps,
        "seconds": record.seconds,
        "peak_memory_bytes": record.peak_memory_bytes,
        "attempts": record.attempts,
        **record.metrics,
        **{f"warning/{number}": text for number, text in enumerate(record.warnings)},
    }


def _plain(text: str) -> str:
    return re.sub(r"[^\w.]+", "_", text).strip("_.") or "run"
