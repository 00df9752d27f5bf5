"""Whatever a file or a formula holds: Poise reads it or says what is wrong, soon, in little memory, and runs none of it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hostile_runner import ROOT, Outcome, run_cases

# A few cases of each kind every day, with a start of the process of about two seconds each.
EVERYDAY = {"npy": 300, "delimited": 300}
MANY = {
    "delimited": 20_000, "task": 2_000, "parquet": 20_000, "npy": 20_000, "npz": 10_000, "bombs": 30, "images": 10_000, "jsonl": 20_000,
    "dataset_folder": 5_000, "language_model": 300, "gguf": 300, "saved_model": 5_000, "checkpoint": 5_000, "study_file": 10_000,
    "store": 1_500, "curves": 10_000,
}  # fmt: skip
FORMULAS, SHARD = 1_000_000, 25_000


def check(found: Outcome, count: int) -> None:
    assert not found.problems, "\n\n".join(found.problems[:5])
    assert found.done == count
    # With nothing read at all the cases would only show that the reader refuses everything.
    assert found.outcomes.keys() - {"read"}


@pytest.mark.parametrize("kind", EVERYDAY)
def test_a_few_hostile_cases(kind: str, tmp_path: Path) -> None:
    check(run_cases(kind, 0, EVERYDAY[kind], tmp_path), EVERYDAY[kind])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", MANY)
def test_many_hostile_cases(kind: str, tmp_path: Path) -> None:
    check(run_cases(kind, 100_000, MANY[kind], tmp_path, seconds=1_700), MANY[kind])


def test_two_thousand_hostile_formulas(tmp_path: Path) -> None:
    check(run_cases("formula", 0, 2_000, tmp_path), 2_000)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("shard", range(FORMULAS // SHARD))
def test_a_million_hostile_formulas(shard: int, tmp_path: Path) -> None:
    """A shard that passed is not repeated while the code stays as it is, so that an interrupted night goes on where it was."""
    folder = os.environ.get("POISE_FUZZ_STATE")
    mark = Path(folder) / f"formula-{_version()}-{shard}" if folder else None
    if mark is not None and mark.exists():
        pytest.skip(f"shard {shard} passed before with this code")
    check(run_cases("formula", 1_000_000 + shard * SHARD, SHARD, tmp_path, seconds=1_700), SHARD)
    if mark is not None:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _version() -> str:
    """A hash of all that decides what a formula does."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "src" / "poise").rglob("*.py"), *Path(__file__).parent.glob("hostile_*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
