"""Seventy papers, seventy claims: what each paper says, the study that checks it here, and the verdict.

A claim is a statement that a small study on this machine can contradict. `poise.claims.pNN` holds the claim of paper
NN as `CLAIM`; the runner in `poise.claims.runner` lists them, runs them, times them and remembers what was measured.
No verdict ships with the package.

    from poise.claims.runner import run_claim
    print(run_claim(18).verdict)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

__all__ = ["Claim", "ClaimRun", "Finding", "Progress"]

Progress = Callable[[float, str], None]
"""Called as `progress(fraction, text)` while a claim runs: the part done, in [0, 1], and what is being done."""


@dataclass(frozen=True)
class Finding:
    """What a claim's study measured.

    Args:
        verdict: `"holds"` or `"fails"`; a claim that honestly fails at this size says so.
        measured: one line with the figures, the paper's own beside them.
        reason: why it fails, or what limits the check; empty when there is nothing to add.
        figures: the numbers behind `measured`, by name, for `poise claims --json`.
        seconds: wall time of the study; the runner fills it.

    Example:
        >>> Finding("holds", "2.8 points (paper: 3.1)", figures={"gain": 2.8}).verdict
        'holds'
    """

    verdict: Literal["holds", "fails"]
    measured: str
    reason: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None


class ClaimRun(Protocol):
    """The study of a claim: at most three minutes on two cores, longer only with `full`."""

    def __call__(self, *, full: bool = False, seed: int = 0, progress: Progress | None = None) -> Finding:
        """Measure and judge; everything random derives from `seed`."""
        ...


@dataclass(frozen=True)
class Claim:
    """One paper's claim, in words that a measurement can contradict.

    Args:
        number: the paper's number, 1 to 70, as in `papers.json`.
        statement: one sentence with the paper's figure.
        expected: direction and size that the study should show here.
        falsified: the outcome that would contradict the statement.
        run: the study.

    Example:
        >>> claim = Claim(18, "ELR gains 3 %", "2 % or more", "no gain", run=lambda **_: Finding("holds", "3.2 %"))
        >>> claim.run().measured
        '3.2 %'
    """

    number: int
    statement: str
    expected: str
    falsified: str
    run: ClaimRun
