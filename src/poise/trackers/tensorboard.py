"""TensorBoard: one folder of event files a run; its configuration as hyperparameters and as text, its verdict as text."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from poise.trackers.contract import Scalar, TrackedRun
from poise.trackers.tracking import finite


class Adapter:
    """Write `DIR/[group/]run/events...`.

    Args:
        place: the folder.
    """

    def __init__(self, place: str) -> None:
        self._folder = Path(place)
        self._writer: Any = None
        self._step = 0

    def begin(self, run: TrackedRun) -> None:
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = self._folder / run.group / run.name
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard's usual writer puts the name of the machine here, and writes in a thread that keeps a full disk to itself.
        file = folder / f"events.out.tfevents.{int(time.time())}.poise.{os.getpid()}"
        self._writer, self._step = RecordWriter(file.open("ab")), 0
        self._write(file_version="brain.Event:2")
        self._add(hparams_pb(dict(run.config)))
        self._text("config", _table(run.config))
        self._writer.flush()

    def log(self, values: Mapping[str, float], step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._step = step
        self._add(Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()]), step)
        self._writer.flush()

    def end(self, verdict: Mapping[str, Scalar]) -> None:
        self.log({f"verdict/{name}": value for name, value in finite(verdict).items()}, self._step)
        self._text("verdict", _table(verdict))
        self._writer.close()

    def _text(self, tag: str, text: str) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING
        from tensorboard.plugins.text.metadata import create_summary_metadata

        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
        metadata = create_summary_metadata(display_name=tag, description="")
        self._add(Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=tensor)]), self._step)

    def _add(self, summary: Any, step: int = 0) -> None:
        self._write(step=step, summary=summary)

    def _write(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.write(Event(wall_time=time.time(), **content).SerializeToString())


def _table(values: Mapping[str, Scalar]) -> str:
    """Return a Markdown table."""
    rows = [f"| {name} | {json.dumps(value).replace('|', '&#124;')} |" for name, value in values.items()]
    return "\n".join(["| name | value |", "| --- | --- |", *rows])
