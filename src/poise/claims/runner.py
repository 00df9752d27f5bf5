"""Lists the claims of all 70 papers, runs them, and remembers what was measured on this machine.

A verdict is only ever a measurement: the package ships none, and one that was taken with another version or on
another machine counts as `not run` here. Verdicts live in the user's cache folder, one small JSON file a paper (so
two runs at once lose nothing), together with version, machine and date.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from poise._version import __version__
from poise.cache import cache_folder
from poise.claims import Claim, Finding, Progress
from poise.errors import InputError

__all__ = ["Measurement", "Paper", "Row", "cache_folder", "load_claim", "papers", "rows", "run_claim"]

State = Literal["holds", "fails", "not run", "not built"]


@dataclass(frozen=True)
class Paper:
    """One of the 70 papers: its number, title, arXiv identifier and the rooms of `src/poise/` that hold its pieces."""

    number: int
    title: str
    arxiv: str
    room: tuple[str, ...]

    @property
    def module(self) -> str:
        """The module that holds this paper's claim once it is built, e.g. `poise.claims.p18`."""
        return f"poise.claims.p{self.number:02d}"

    @property
    def built(self) -> bool:
        """Whether the claim's module exists; nothing is imported to find out."""
        return (Path(__file__).parent / f"p{self.number:02d}.py").is_file()


@dataclass(frozen=True)
class Measurement:
    """A verdict together with the circumstances in which it was measured.

    Args:
        number: the paper's number.
        verdict: `"holds"` or `"fails"`.
        measured: one line with the figures.
        reason: why it fails or what limits the check.
        figures: the numbers by name.
        seconds: wall time of the study.
        full: whether the larger study ran.
        seed: the seed it ran with.
        version: version of Poise.
        code: fingerprint of the package's sources.
        machine: processor, cores, system, Python and PyTorch, in words.
        date: UTC time, ISO 8601.
    """

    number: int
    verdict: Literal["holds", "fails"]
    measured: str
    reason: str
    figures: dict[str, float]
    seconds: float
    full: bool
    seed: int
    version: str
    code: str
    machine: str
    date: str


@dataclass(frozen=True)
class Row:
    """One line of the table of claims: a paper, its state, and the measurement where there is one.

    `current` is False where the package's sources changed after the measurement, so that the verdict describes older
    code.
    """

    paper: Paper
    state: State
    measurement: Measurement | None = None
    current: bool = True

    def as_json(self) -> dict[str, Any]:
        """The row as plain types, for `poise claims --json`."""
        measured = asdict(self.measurement) if self.measurement else None
        return {**asdict(self.paper), "state": self.state, "current": self.current, "measurement": measured}


@functools.cache
def papers() -> tuple[Paper, ...]:
    """All 70 papers in order of their number.

    Example:
        >>> papers()[17].arxiv
        '2007.00151'
    """
    records = json.loads((Path(__file__).parent / "papers.json").read_text(encoding="utf-8"))
    return tuple(Paper(r["number"], r["title"], r["arxiv"], tuple(r["room"])) for r in records)


def find_paper(number: int) -> Paper:
    """The paper with this number; `InputError` for a number outside 1 to 70."""
    for paper in papers():
        if paper.number == number:
            return paper
    raise InputError(
        f"There is no paper {number}: the claims are numbered 1 to {len(papers())}. `poise claims` lists them."
    )


def load_claim(number: int) -> Claim:
    """The claim of one paper, imported from `poise.claims.pNN`.

    Raises:
        InputError: unknown number, or the paper is not built yet.
    """
    paper = find_paper(number)
    if not paper.built:
        built = ", ".join(str(p.number) for p in papers() if p.built) or "none"
        raise InputError(
            f"Paper {number} ({paper.title}) is not built yet, so there is no claim to run. Built so far: {built}; "
            "`poise claims` shows the state of all 70."
        )
    claim = importlib.import_module(paper.module).CLAIM
    if not isinstance(claim, Claim) or claim.number != number:
        raise TypeError(f"{paper.module}.CLAIM must be a poise.claims.Claim with number={number}, got {claim!r}.")
    return claim


def run_claim(number: int, *, full: bool = False, seed: int = 0, progress: Progress | None = None) -> Measurement:
    """Run one claim's study, time it, and keep the verdict in the user's cache.

    Args:
        number: the paper's number, 1 to 70.
        full: run the larger study where the claim offers one.
        seed: everything random in the study derives from it.
        progress: called as `progress(fraction, text)` while the study runs.

    Returns:
        The measurement as it was stored.

    Raises:
        InputError: unknown number, or the paper is not built yet.

    Example:
        >>> run_claim(18).verdict                                                   # doctest: +SKIP
        'holds'
    """
    claim = load_claim(number)
    started = time.perf_counter()
    found = claim.run(full=full, seed=seed, progress=progress)
    seconds = time.perf_counter() - started
    measurement = _measurement(number, replace(found, seconds=seconds), full=full, seed=seed)
    _store(measurement)
    return measurement


def rows(numbers: Iterable[int] | None = None) -> list[Row]:
    """The table of claims: every paper with its state on this machine and with this version.

    Args:
        numbers: restrict the table to these papers; all 70 by default.

    Example:
        >>> len(rows())
        70
    """
    chosen = papers() if numbers is None else tuple(find_paper(n) for n in numbers)
    return [_row(paper) for paper in chosen]


@functools.cache
def machine() -> str:
    """This machine in words: what a timing or a verdict depends on and a reader would ask for."""
    from importlib.metadata import version

    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    return (
        f"{processor}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}, torch {version('torch')}"
    )


@functools.cache
def code_fingerprint() -> str:
    """A hash of every Python source of the package, so that a verdict tells which code it judged."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _measurement(number: int, found: Finding, *, full: bool, seed: int) -> Measurement:
    assert found.seconds is not None
    return Measurement(
        number=number,
        verdict=found.verdict,
        measured=found.measured,
        reason=found.reason,
        figures={name: float(value) for name, value in found.figures.items()},
        seconds=found.seconds,
        full=full,
        seed=seed,
        version=__version__,
        code=code_fingerprint(),
        machine=machine(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _file(number: int) -> Path:
    return cache_folder() / "claims" / f"p{number:02d}.json"


def _store(measurement: Measurement) -> None:
    """Write atomically: a reader sees the old verdict or the new one, never half a file."""
    path = _file(measurement.number)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as handle:
        json.dump(asdict(measurement), handle, indent=1)
    os.replace(handle.name, path)


def _read(number: int) -> Measurement | None:
    """The stored measurement, or None where there is none that this version can read."""
    try:
        return Measurement(**json.loads(_file(number).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _row(paper: Paper) -> Row:
    if not paper.built:
        return Row(paper, "not built")
    measurement = _read(paper.number)
    if measurement is None or measurement.version != __version__ or measurement.machine != machine():
        return Row(paper, "not run")
    return Row(paper, measurement.verdict, measurement, current=measurement.code == code_fingerprint())
