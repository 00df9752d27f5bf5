from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from studies_fakes import make_record, make_spec

from poise.errors import StoreError
from poise.studies import store as store_module
from poise.studies.lock import FolderLock
from poise.studies.spec import failed_record
from poise.studies.store import MIGRATIONS, SCHEMA_VERSION, Store


@pytest.fixture
def path(tmp_path):
    return tmp_path / "study.sqlite"


def run_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_record_comes_back_as_it_was_put(path):
    record = make_record(make_spec())
    record.curves = {"loss": ([0, 5], [1.5, 0.25])}
    with Store(path) as store:
        store.put(record)
    with Store(path) as store:
        assert store.get(record.id) == record
        assert store.get("absent") is None
        assert store.ids() == store.ids("done") == {record.id}
        assert next(store.records()).curves == {}


def test_curves_are_read_as_arrays_for_the_runs_asked_for(path):
    records = [make_record(make_spec(seed=seed)) for seed in range(3)]
    with Store(path) as store:
        for record in records:
            store.put(record)
        found = dict(store.curves([records[0].id, records[2].id]))
    assert set(found) == {records[0].id, records[2].id}
    assert found[records[0].id]["loss"][0].tolist() == records[0].curves["loss"][0]


def test_a_finished_run_is_never_overwritten_and_a_failed_one_gives_way(path):
    spec = make_spec()
    done = make_record(spec, 0.9)
    with Store(path) as store:
        store.put(failed_record(spec, "first"))
        store.put(failed_record(spec, "second"))
        assert store.get(spec.id).error == "second"
        store.put(done)
        store.put(failed_record(spec, "third"))
        store.put(make_record(spec, 0.1))
        assert store.get(spec.id).metrics == done.metrics


def test_the_file_is_in_wal_mode_and_synchronous_full(path):
    with Store(path) as store:
        assert store._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert store._connection.execute("PRAGMA synchronous").fetchone() == (2,)


def test_writers_in_several_processes_lose_nothing(path):
    code = """
import sys
from studies_fakes import make_record, make_spec
from poise.studies.store import Store
with Store(sys.argv[1]) as store:
    for seed in range(40):
        store.put(make_record(make_spec(seed=1000 * int(sys.argv[2]) + seed)))
"""
    # The first writers also race for the creation of the file.
    processes = [run_python(code, path, number) for number in range(4)]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    with Store(path) as store:
        assert len(store.ids("done")) == 160
        assert sum(1 for _ in store.curves(store.ids())) == 160


def test_a_writer_killed_between_two_runs_loses_neither(path):
    code = """
import os, signal, sys
from studies_fakes import make_record, make_spec
from poise.studies.store import Store
store = Store(sys.argv[1])
store.put(make_record(make_spec(seed=0)))
store.put(make_record(make_spec(seed=1)))
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = run_python(code, path)
    process.communicate(timeout=60)
    with Store(path) as store:
        assert store.ids("done") == {make_spec(seed=0).id, make_spec(seed=1).id}


def test_an_older_store_is_brought_up_to_date_and_keeps_its_runs(path, monkeypatch):
    record = make_record(make_spec())
    with Store(path) as store:
        store.put(record)
    step = ("ALTER TABLE runs ADD COLUMN later TEXT NOT NULL DEFAULT 'x'",)
    monkeypatch.setattr(store_module, "MIGRATIONS", (*MIGRATIONS, step))
    monkeypatch.setattr(store_module, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
    with Store(path) as store:
        assert store.get(record.id).metrics == record.metrics
        assert store._connection.execute("SELECT later FROM runs").fetchone() == ("x",)
        assert store._connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION + 1,)


def test_a_migration_that_fails_leaves_the_old_store(path, monkeypatch):
    with Store(path) as store:
        store.put(make_record(make_spec()))
    steps = ("ALTER TABLE runs ADD COLUMN later TEXT", "SELECT no_such_function()")
    monkeypatch.setattr(store_module, "MIGRATIONS", (*MIGRATIONS, steps))
    monkeypatch.setattr(store_module, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
    with pytest.raises(StoreError):
        Store(path)
    monkeypatch.undo()
    with Store(path) as store:
        assert len(store.ids()) == 1


def test_a_store_of_a_newer_version_is_refused_and_left_alone(path):
    with Store(path) as store:
        store._connection.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"newer Poise .*pip install --upgrade poise"):
        Store(path)
    assert path.read_bytes() == before


def test_a_database_of_another_program_is_refused(path):
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE theirs (a)")
    other.close()
    with pytest.raises(StoreError, match="another program"):
        Store(path)


def test_a_damaged_file_is_refused_with_advice(path):
    path.write_bytes(b"this is no database at all" * 100)
    with pytest.raises(StoreError, match="damaged"):
        Store(path)


def test_a_full_disk_is_a_clear_error_and_keeps_what_was_stored(path):
    with Store(path) as store:
        store.put(make_record(make_spec(seed=0)))
        pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
        store._connection.execute(f"PRAGMA max_page_count={pages}")
        big = make_record(make_spec(seed=1))
        big.curves = {"loss": (list(range(100_000)), [float(hash((i, "x"))) for i in range(100_000)])}
        with pytest.raises(StoreError, match="disk is full"):
            store.put(big)
        store._connection.execute("PRAGMA max_page_count=1000000")
        store.put(big)
        assert len(store.ids("done")) == 2


def test_a_folder_that_cannot_be_written_is_a_clear_error():
    # /proc refuses new files even to the superuser.
    with pytest.raises(StoreError, match="Choose another output folder"):
        Store("/proc/poise-test/study.sqlite")


def test_a_store_is_read_without_writing(path, tmp_path):
    record = make_record(make_spec())
    with Store(path) as store:
        store.put(record)
    with Store(path, readonly=True) as store:
        assert store.get(record.id).metrics == record.metrics
        with pytest.raises(StoreError, match="cannot be written"):
            store.put(make_record(make_spec(seed=9)))
    with pytest.raises(StoreError, match="no store"):
        Store(tmp_path / "absent.sqlite", readonly=True)


def test_meta_values_come_back(path):
    with Store(path) as store:
        store.set_meta("study", {"a": [1, None]})
        assert store.get_meta("study") == {"a": [1, None]}
        assert store.get_meta("absent", 7) == 7


def test_two_processes_on_one_folder_get_a_clear_error(tmp_path):
    code = """
import sys, time
from poise.studies.lock import FolderLock
with FolderLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""
    process = run_python(code, tmp_path)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(StoreError, match=rf"process {process.pid} on .* is running a study"), FolderLock(tmp_path):
            pass
    finally:
        process.kill()
        process.communicate()
    # A killed holder leaves nothing locked.
    with FolderLock(tmp_path):
        pass


def test_a_folder_that_cannot_hold_a_lock_is_a_clear_error():
    with pytest.raises(StoreError, match="Choose another output folder"), FolderLock(Path("/proc")):
        pass
