"""Weights & Biases, offline unless the environment says otherwise; the runs of a study form a group."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from poise.trackers.contract import Scalar, TrackedRun


class Adapter:
    """Write `wandb/offline-run-...`, which `wandb sync` sends.

    Args:
        place: the project.
    """

    def __init__(self, place: str) -> None:
        self._project = place
        self._run: Any = None

    def begin(self, run: TrackedRun) -> None:
        import wandb

        # Nothing about machine, user, script, source code or packages: what is sent is what a run says.
        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            host="hidden",
            username="hidden",
            save_code=False,
            silent=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(
            project=self._project,
            name=run.name,
            group=run.group or None,
            job_type=run.kind,
            config=dict(run.config),
            mode=mode,
            settings=settings,
        )
        # A validation belongs to the step before it; W&B's own count of steps would drop what comes late.
        self._run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def end(self, verdict: Mapping[str, Scalar]) -> None:
        self._run.summary.update({f"verdict/{name}": value for name, value in verdict.items()})
        self._run.finish(exit_code=0 if verdict.get("status") == "done" else 1)
