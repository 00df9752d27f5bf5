"""What an MLflow server stored, read back over its REST interface.

The server has requirements of its own (an older pandas), so it lives in an environment of its own: `make mlflow-server`, or any `mlflow`
that POISE_MLFLOW names.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tracker_runs import LEAKS, run, same

from poise.errors import PoiseWarning
from poise.studies import Study

pytestmark = [pytest.mark.peer, pytest.mark.slow]


class Server:
    def __init__(self, command: str, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        store = ["--backend-store-uri", f"sqlite:///{folder}/m.db", "--artifacts-destination", str(folder / "a")]
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [command, "server", *store, "--port", str(port), "--workers", "1"], stdout=log, stderr=log, cwd=folder,
                start_new_session=True,
            )  # fmt: skip
        until = time.monotonic() + 240
        while time.monotonic() < until and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.address}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.5)
        self.close()
        pytest.fail(f"The MLflow server did not start:\n{self.log.read_text()[-2000:]}")

    def ask(self, path: str, **content: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.address}/api/2.0/mlflow/{path}", json.dumps(content).encode() if content else None,
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=30) as answer:
            return dict(json.load(answer))

    def runs(self) -> list[dict[str, Any]]:
        experiment = self.ask("experiments/get-by-name?experiment_name=poise")["experiment"]["experiment_id"]
        return list(self.ask("runs/search", experiment_ids=[experiment], max_results=1000)["runs"])

    def curve(self, run: str, name: str) -> tuple[list[int], list[float]]:
        points = self.ask(f"metrics/get-history?run_id={run}&metric_key={name}&max_results=1000")["metrics"]
        points.sort(key=lambda point: int(point.get("step", 0)))
        return [int(p.get("step", 0)) for p in points], [float(p["value"]) for p in points]

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("mlflow", reason="the MLflow client is not installed")
    beside = [
        Path(folder) / "mlflow-server" / "bin" / "mlflow"
        for folder in (sys.prefix, os.environ.get("VIRTUAL_ENV", sys.prefix))
    ]
    found = os.environ.get("POISE_MLFLOW") or next((str(path) for path in beside if path.exists()), None)
    command = found or shutil.which("mlflow-server")
    if command is None:
        pytest.skip("no MLflow server: `make mlflow-server` installs one, or POISE_MLFLOW names its command")
    running = Server(command, tmp_path_factory.mktemp("mlflow"))
    yield running
    running.close()


def values(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    return {pair["key"]: pair["value"] for pair in pairs}


def test_a_run_is_stored_whole_and_changed_in_nothing(server: Server) -> None:
    plain, told = run(None), run(f"mlflow:{server.address}")
    assert same(plain, told)
    (stored,) = server.runs()
    assert stored["info"]["status"] == "FINISHED"
    for name, (steps, points) in told.history.curves().items():
        assert server.curve(stored["info"]["run_id"], name) == (steps, points), name
    params, tags = values(stored["data"]["params"]), values(stored["data"]["tags"])
    assert (params["formula"], params["seed"], params["solver/lr"]) == ("cross_entropy + 0.01*l2", "7", "0.1")
    assert "version/torch" in params
    assert (tags["verdict.status"], tags["verdict.test/accuracy"]) == ("done", "0.5")
    assert params["data/source"] == "quality.csv"
    assert not [leak for leak in LEAKS if leak in json.dumps(stored)]


def test_the_runs_of_a_study_are_nested_under_its_verdict_also_when_it_goes_on(server: Server, tmp_path: Path) -> None:
    def study() -> Study:
        formulas = ["cross_entropy", "cross_entropy + 0.01*l2"]
        return Study("wine", formulas, 2, out=tmp_path, epochs=1, leave_one_out=False, workers=1, device="cpu")

    study().run(tracker=f"mlflow:{server.address}")
    found = study().run(tracker=f"mlflow:{server.address}")
    stored = [(one["info"], values(one["data"]["tags"]), values(one["data"]["params"])) for one in server.runs()]
    (parent,) = [(info, tags) for info, tags, _ in stored if tags["poise.kind"] == "study"]
    children = [params for _, tags, params in stored if tags.get("mlflow.parentRunId") == parent[0]["run_id"]]
    assert sorted((params["formula"], params["seed"]) for params in children) == [
        (formula, seed) for formula in ("cross_entropy", "cross_entropy + 0.01*l2") for seed in "01"
    ]
    assert parent[1]["verdict.recommendation"] == found.summary.recommendation.text


def test_a_server_that_goes_away_in_the_middle_is_said_once(server: Server) -> None:
    """The last test of this file: it takes the server away."""
    plain = run(None)
    steps = 0

    class Killer:
        def on_step_end(self, state: Any) -> None:
            nonlocal steps
            steps += 1
            if steps == 6:
                time.sleep(3.0)  # until the first points have arrived
                server.close()

    with pytest.warns(PoiseWarning, match="The tracker mlflow failed") as said:
        told = run(f"mlflow:{server.address}", callbacks=[Killer()])
    assert len(said) == 1
    assert same(plain, told)
