"""MLflow: an experiment "poise"; the runs of a study are nested under the study's own run."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from typing import Any

from poise.trackers.contract import Scalar, TrackedRun
from poise.trackers.tracking import finite

EXPERIMENT = "poise"
# What a server takes in one request, and the longest values that every version of it takes.
_METRICS, _ITEMS, _CHARACTERS = 1000, 100, 500
_SECONDS = 2.0
"""Points are sent together, at most so long after the first of them."""
_STATUS = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


class Adapter:
    """Tell an MLflow server. The plain client is used: the fluent one would add the user's name and the path of the script.

    Args:
        place: its address.
    """

    def __init__(self, place: str) -> None:
        # The client's own defaults try for minutes to reach a server that is gone.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=place)
        self._experiment = ""
        self._run = ""
        self._studies: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._waiting: list[Any] = []
        self._since, self._step = 0.0, 0

    def begin(self, run: TrackedRun) -> None:
        self._experiment = self._experiment or self._find_experiment()
        tags: dict[str, str] = {"poise.kind": run.kind}
        if run.group:
            study = self._study(run.group)
            tags |= {"poise.study": run.group, "mlflow.parentRunId": study}
        if run.kind == "study":
            self._run = self._study(run.group)
        else:
            self._run = self._client.create_run(self._experiment, tags=tags, run_name=run.name).info.run_id
        self._names, self._waiting, self._step = {}, [], 0
        self._send_params(run.config)

    def log(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = time.monotonic()
        self._since = self._since if self._waiting else now
        self._step = max(self._step, step)
        self._waiting += [Metric(self._name(k), v, int(time.time() * 1000), step) for k, v in values.items()]
        if len(self._waiting) >= _METRICS or now - self._since >= _SECONDS:
            self._flush()

    def end(self, verdict: Mapping[str, Scalar]) -> None:
        from mlflow.entities import RunTag

        self.log({f"verdict/{name}": value for name, value in finite(verdict).items()}, self._step)
        self._flush()
        tags = [RunTag(f"verdict.{_key(name)}", str(value)[:5000]) for name, value in verdict.items()]
        for start in range(0, len(tags), _ITEMS):
            self._client.log_batch(self._run, tags=tags[start : start + _ITEMS])
        self._client.set_terminated(self._run, _STATUS.get(str(verdict.get("status")), "FINISHED"))

    def _flush(self) -> None:
        while self._waiting:
            self._client.log_batch(self._run, metrics=self._waiting[:_METRICS])
            del self._waiting[:_METRICS]

    def _send_params(self, config: Mapping[str, Scalar]) -> None:
        from mlflow.entities import Param

        # A server refuses a parameter that is set again with another value; a study that goes on sets the same ones.
        params = [Param(_key(name), str(value)[:_CHARACTERS]) for name, value in config.items()]
        for start in range(0, len(params), _ITEMS):
            self._client.log_batch(self._run, params=params[start : start + _ITEMS])

    def _find_experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(EXPERIMENT)
        if found is not None:
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(EXPERIMENT))
        except MlflowException:
            # Another run was faster, or the server is gone, which the next line says.
            found = self._client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                raise
            return str(found.experiment_id)

    def _study(self, group: str) -> str:
        """Return the run that a study's runs are nested under: the one of an earlier call, or a new one."""
        if group not in self._studies:
            name = group.replace("'", "")
            query = f"tags.`poise.study` = '{name}' and tags.`poise.kind` = 'study'"
            found = self._client.search_runs([self._experiment], query, max_results=1)
            tags = {"poise.kind": "study", "poise.study": name}
            run = found[0] if found else self._client.create_run(self._experiment, tags=tags, run_name=name)
            self._studies[group] = run.info.run_id
        return self._studies[group]

    def _name(self, curve: str) -> str:
        """Return a name that MLflow takes, and that no other curve of the run has."""
        if curve not in self._names:
            plain, number = _key(curve), 2
            name = plain
            while name in self._names.values():
                name, number = f"{plain}_{number}", number + 1
            self._names[curve] = name
        return self._names[curve]


def _key(name: str) -> str:
    return re.sub(r"[^\w\-. /]", "_", name)[:250]
