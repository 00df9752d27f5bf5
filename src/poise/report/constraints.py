"""What a report shows of constraints: how far each was from holding, what holding it cost, and whether it held at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from poise.report.page import CurveSection, Key, Page

__all__ = ["CONSTRAINT_CURVES", "ConstraintPanel", "Constraints", "constraints_of"]

CONSTRAINT_CURVES = ("constraint/",)
"""How the names of the curves begin that stand here and not among the others."""


@dataclass(frozen=True)
class ConstraintPanel:
    """One constraint: its violation and its multiplier over the training steps."""

    label: str
    violation: CurveSection
    multiplier: CurveSection | None

    @property
    def sections(self) -> tuple[CurveSection, ...]:
        """The curves that there are."""
        return tuple(section for section in (self.violation, self.multiplier) if section is not None)

    @property
    def keys(self) -> tuple[Key, ...]:
        """The formulas of both."""
        return tuple(dict.fromkeys(key for section in self.sections for key in section.chart.keys))


@dataclass(frozen=True)
class ConstraintRow:
    """Whether a formula's constraint held."""

    key: Key
    label: str
    feasible: bool
    sentence: str
    violation: str


@dataclass(frozen=True)
class Constraints:
    """The section on constraints."""

    panels: tuple[ConstraintPanel, ...]
    rows: tuple[ConstraintRow, ...]


def constraints_of(page: Page) -> Constraints | None:
    """Return the section, or None where no run had a constraint."""
    labels = dict.fromkeys(
        name.removesuffix("/violation")
        for formula in page.summary.formulas
        for name in formula.curves_of("constraint")
        if name.endswith("/violation")
    )
    panels = []
    for place, label in enumerate(labels):
        violation = page.curve(
            f"violation-{place}", f"constraint/{label}/violation", f"Violation of {label}", height=250, zero=True
        )
        multiplier = page.curve(
            f"multiplier-{place}", f"constraint/{label}/multiplier", f"Multiplier of {label}", height=250
        )
        if violation is not None:
            panels.append(ConstraintPanel(label, violation, multiplier))
    if not panels:
        return None
    rows = tuple(
        ConstraintRow(
            page.key(formula.index),
            found.label,
            found.feasible == found.seeds,
            found.sentence.removeprefix(f"{found.label}: "),
            f"{found.violation:+.3g}" if found.violation else "0",
        )
        for formula in page.summary.formulas
        for found in formula.constraints
    )
    return Constraints(tuple(panels), rows)
