"""What Weights & Biases stored offline: its file is a log of records, which `wandb sync` sends later."""

from __future__ import annotations

import getpass
import json
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tracker_runs import LEAKS, run, same

pytestmark = pytest.mark.peer


def records(path: Path) -> Iterator[Any]:
    """Yield the records of a file in LevelDB's log format: blocks of 32 KiB, in them parts with checksum, length and kind."""
    from wandb.proto import wandb_internal_pb2

    data, position, whole = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def items(entries: Any) -> dict[str, Any]:
    return {entry.key or "/".join(entry.nested_key): json.loads(entry.value_json) for entry in entries}


def test_a_run_is_stored_whole_and_changed_in_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    plain, told = run(None), run("wandb:objectives")
    assert same(plain, told)
    (file,) = tmp_path.rglob("*.wandb")
    stored = list(records(file))
    (begun,) = [record.run for record in stored if record.WhichOneof("record_type") == "run"]
    config = items(begun.config.update)
    assert (begun.project, begun.job_type) == ("objectives", "run")
    assert (config["formula"], config["seed"], config["solver/lr"]) == ("cross_entropy + 0.01*l2", 7, 0.1)
    assert "version/torch" in config
    curves: dict[str, tuple[list[int], list[float]]] = {}
    verdict: dict[str, Any] = {}
    for record in stored:
        if record.WhichOneof("record_type") == "history":
            row = items(record.history.item)
            for name in told.history.curves().keys() & row.keys():
                steps, points = curves.setdefault(name, ([], []))
                steps.append(row["step"])
                points.append(row[name])
        elif record.WhichOneof("record_type") == "summary":
            verdict |= items(record.summary.update)
    assert curves == told.history.curves()
    assert (verdict["verdict/status"], verdict["verdict/test/accuracy"]) == ("done", 0.5)
    # All that `wandb sync` would send.
    raw = file.read_bytes()
    assert begun.host != socket.gethostname()
    own = (str(Path.home()) + "/", str(Path.cwd()), str(tmp_path), f'"{getpass.getuser()}"')
    assert not [leak for leak in (*LEAKS, *own) if leak.encode() in raw]
