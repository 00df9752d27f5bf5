from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from studies_fakes import make_spec

from poise.errors import InputError, PoiseError
from poise.studies.engine import Engine, LocalEngine, available_cores


def outcomes(engine, specs):
    with engine:
        engine.submit(specs)
        return list(engine.events())


def finished(events):
    return {event.id: event.record for event in events if event.kind == "finished"}


def test_every_run_ends_with_one_record_and_starts_first(tmp_path):
    specs = [make_spec(seed=seed) for seed in range(5)]
    engine = LocalEngine(2, executor="studies_fakes:instant")
    assert isinstance(engine, Engine)
    events = outcomes(engine, specs)
    for spec in specs:
        kinds = [event.kind for event in events if event.id == spec.id]
        assert kinds[0] == "started"
        assert kinds.count("finished") == 1
        assert kinds[-1] == "finished"
    assert {record.status for record in finished(events).values()} == {"done"}


def test_runs_submitted_while_events_are_consumed_run_too():
    with LocalEngine(1, executor="studies_fakes:instant") as engine:
        engine.submit([make_spec(seed=0)])
        ids = []
        for event in engine.events():
            if event.kind == "finished":
                ids.append(event.id)
                if len(ids) < 3:
                    engine.submit([make_spec(seed=len(ids))])
    assert ids == [make_spec(seed=seed).id for seed in range(3)]


def test_a_worker_that_is_killed_once_costs_a_second_attempt_and_nothing_else(tmp_path):
    specs = [make_spec(seed=seed) for seed in range(4)]
    events = outcomes(LocalEngine(2, folder=tmp_path, executor="studies_fakes:killed_once"), specs)
    records = finished(events)
    assert {record.status for record in records.values()} == {"done"}
    assert records[specs[1].id].attempts == 2
    assert records[specs[0].id].attempts == 1
    (retried,) = [event for event in events if event.kind == "retried"]
    assert retried.id == specs[1].id
    assert "SIGKILL" in retried.message


def test_a_worker_that_is_always_killed_fails_that_run_only():
    specs = [make_spec(seed=seed) for seed in range(3)]
    records = finished(outcomes(LocalEngine(1, executor="studies_fakes:killed_always"), specs))
    failed = records[specs[1].id]
    assert failed.status == "failed"
    assert failed.error == (
        "The worker process of this run was killed by SIGKILL, which usually means that memory ran out (twice)."
    )
    assert records[specs[0].id].status == records[specs[2].id].status == "done"


def test_an_unforeseen_error_fails_that_run_only_and_keeps_the_traceback():
    specs = [make_spec(seed=seed) for seed in range(3)]
    records = finished(outcomes(LocalEngine(1, executor="studies_fakes:raising"), specs))
    assert records[specs[1].id].error == "The run stopped with RuntimeError: something unforeseen"
    assert "Traceback" in records[specs[1].id].detail
    assert records[specs[2].id].status == "done"


def test_what_a_model_prints_does_not_disturb_the_protocol():
    records = finished(outcomes(LocalEngine(1, executor="studies_fakes:chatty"), [make_spec()]))
    assert [record.status for record in records.values()] == ["done"]


def test_threads_are_set_before_torch_is_loaded():
    specs = [make_spec(threads=3)]
    record = finished(outcomes(LocalEngine(1, 3, executor="studies_fakes:environment"), specs))[specs[0].id]
    assert record.machine == {"threads": "3", "main": "0"}


def test_a_run_with_another_number_of_threads_is_refused():
    with LocalEngine(1, 1) as engine, pytest.raises(InputError, match="asks for 2 threads"):
        engine.submit([make_spec(threads=2)])


def test_workers_times_threads_stay_within_the_cores():
    for threads in (1, 2, 3):
        engine = LocalEngine(threads=threads)
        assert engine.slots == 1 or engine.slots * threads <= available_cores()
    with pytest.raises(InputError, match="at least 1"):
        LocalEngine(0)


def test_cancelled_runs_end_with_cancelled_and_others_go_on():
    slow, other = make_spec(seed=0), make_spec(seed=1)
    with LocalEngine(1, executor="studies_fakes:slow_on_seed_zero", grace=2.0) as engine:
        engine.submit([slow, other])
        kinds = []
        for event in engine.events():
            kinds.append((event.id, event.kind))
            if event.kind == "progress":
                engine.cancel([slow.id])
    assert kinds[-1] == (other.id, "finished")
    assert (slow.id, "cancelled") in kinds
    assert (slow.id, "finished") not in kinds


def test_a_run_that_does_not_listen_to_an_interrupt_is_ended_after_the_grace_period():
    spec = make_spec()
    with LocalEngine(1, executor="studies_fakes:deaf", grace=0.2) as engine:
        engine.submit([spec])
        kinds = []
        for event in engine.events():
            kinds.append(event.kind)
            if event.kind == "progress" and kinds.count("progress") == 1:
                engine.cancel()
    assert kinds[-1] == "cancelled"


def test_leaving_the_engine_ends_its_processes():
    with LocalEngine(2, executor="studies_fakes:slow", grace=2.0) as engine:
        engine.submit([make_spec(seed=0), make_spec(seed=1)])
        events = engine.events()
        next(event for event in events if event.kind == "progress")
        processes = [worker._process for worker in engine._workers]
        began = time.monotonic()
    assert all(process.poll() is not None for process in processes)
    assert time.monotonic() - began < 5


def test_workers_end_when_the_engine_is_killed():
    code = """
import sys
from studies_fakes import make_spec
from poise.studies.engine import LocalEngine
engine = LocalEngine(1, executor="studies_fakes:slow")
engine.submit([make_spec()])
for event in engine.events():
    if event.kind == "progress":
        print(engine._workers[0]._process.pid, flush=True)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, stdout=subprocess.PIPE)
    worker = int(process.stdout.readline())
    os.kill(worker, 0)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and _alive(worker):
        time.sleep(0.05)
    assert not _alive(worker)


def _alive(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_that_cannot_start_are_an_error_and_not_a_loop():
    with LocalEngine(1, executor="no_such_module:execute") as engine:
        engine.submit([make_spec()])
        with pytest.raises(PoiseError, match="no_such_module"):
            list(engine.events())
