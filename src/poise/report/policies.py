"""What a report shows of weights that set themselves: their paths, what drove them, how they were judged, and what finding them cost.

It is drawn from curves that a policy writes by these names, and stands only where a run has them:

    policy/weight/<name>                the weight that the policy owns
    policy/gradient_norm/<name>         norm of the term's gradient
    policy/cosine/<a>,<b>               cosine between the gradients of two terms; below 0 they pull against each other
    policy/hypergradient/<name>         derivative of the validation objective by the weight
    policy/<anything>/<name>            what else a policy has to say about every weight, such as the influence of every reward
    policy/hypergradient_error          estimate of its relative error
    policy/training_objective, policy/validation_objective
    policy/front/<name>                 an objective at every point of a front, over the number of the point; to be minimised
    policy/front_chosen                 1 at the point that was chosen, over the same numbers
    policy/hypervolume                  of the front so far
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from poise.report import figures, palette
from poise.report.figures import Front, Line

if TYPE_CHECKING:
    from poise.report.page import Chart, CurveSection, Key, Page
    from poise.report.tuning_cost import TuningCost
    from poise.studies.summary import Curve, FormulaSummary

__all__ = ["Policies", "PolicyPanel", "policies_of", "stands_here"]

_DRIVERS = {"gradient_norm": "Gradient norms", "hypergradient": "Hypergradients"}
_SINGLES = ("hypergradient_error", "training_objective", "validation_objective", "front_chosen", "hypervolume")


def stands_here(curve: str) -> bool:
    """Say whether a curve is drawn in this section, and so not among the others: every one by name, and the known single ones."""
    return curve.startswith("policy/") and (curve.count("/") > 1 or curve.removeprefix("policy/") in _SINGLES)


@dataclass(frozen=True)
class PolicyPanel:
    """One formula's weights.

    Attributes:
        key: the formula.
        names: the weights and terms by number; the figures that share them.
        weights: the paths with their numbers.
        drivers: gradient norms, hypergradients, and what else the policy said by name.
        cosines: between the gradients of two terms.
        objectives: the training objective and the validation objective.
    """

    key: Key
    names: tuple[Key, ...]
    weights: CurveSection | None
    drivers: tuple[CurveSection, ...]
    cosines: CurveSection | None
    objectives: CurveSection | None

    @property
    def shared(self) -> tuple[Chart, ...]:
        """The figures whose lines are the weights and terms."""
        found = (self.weights, *self.drivers)
        return tuple(section.chart for section in found if section is not None)


@dataclass(frozen=True)
class Policies:
    """The section on weights that set themselves.

    Attributes:
        panels: one a formula with a policy.
        errors: relative error of the hypergradient, one line a formula.
        hypervolumes: of the front so far, one line a formula.
        fronts: every pair of objectives.
        volumes: the hypervolume at the end, one text a formula.
        tuning: what finding the weights cost.
    """

    panels: tuple[PolicyPanel, ...]
    errors: CurveSection | None
    hypervolumes: CurveSection | None
    fronts: tuple[Chart, ...]
    tuning: TuningCost | None


def policies_of(page: Page) -> Policies | None:
    """Return the section, or None where no run had a policy and nothing was tuned two ways."""
    from poise.report.tuning_cost import tuning_cost_of

    panels = [_panel(page, formula) for formula in page.summary.formulas if formula.curves_of("policy")]
    found = Policies(
        panels=tuple(panel for panel in panels if panel is not None),
        errors=page.curve(
            "hypergradient-error",
            "policy/hypergradient_error",
            "Relative error of the hypergradient",
            height=260,
            decades=True,
        ),
        hypervolumes=page.curve("hypervolume", "policy/hypervolume", "Hypervolume of the front", height=260),
        fronts=_fronts(page),
        tuning=tuning_cost_of(page),
    )
    there = (found.panels, found.errors, found.hypervolumes, found.fronts, found.tuning)
    return found if any(there) else None


def _kind(formula: FormulaSummary, kind: str) -> dict[str, Curve]:
    return {
        name.removeprefix(f"policy/{kind}/"): curve
        for name, curve in formula.curves.items()
        if name.startswith(f"policy/{kind}/")
    }


def _driving(formula: FormulaSummary) -> list[str]:
    """Return what there is by name beside weights, cosines and fronts; the well-known kinds first."""
    found = dict.fromkeys(name.split("/")[1] for name in formula.curves if stands_here(name) and name.count("/") > 1)
    return sorted(found.keys() - {"weight", "cosine", "front"}, key=lambda kind: (kind not in _DRIVERS, kind))


def _panel(page: Page, formula: FormulaSummary) -> PolicyPanel | None:
    weights = _kind(formula, "weight")
    driving = {kind: _kind(formula, kind) for kind in _driving(formula)}
    every = dict.fromkeys(name for curves in (weights, *driving.values()) for name in curves)
    names = {name: place for place, name in enumerate(every)}
    letter = palette.letter(formula.index)
    objectives = {
        title: formula.curves[f"policy/{name}"]
        for name, title in (("training_objective", "training"), ("validation_objective", "validation"))
        if f"policy/{name}" in formula.curves
    }
    pairs = {name.replace(",", " and "): curve for name, curve in _kind(formula, "cosine").items()}
    drivers = [
        _named(
            page,
            f"policy-{kind.replace('_', '-')}-{formula.index}",
            f"{_DRIVERS.get(kind, kind.replace('_', ' ').capitalize())} in {letter}",
            curves,
            names,
            zero=any(value is not None and value < 0 for curve in curves.values() for value in curve.mean),
        )
        for kind, curves in driving.items()
    ]
    panel = PolicyPanel(
        key=page.key(formula.index),
        names=tuple(_key(place, name) for name, place in names.items()),
        weights=_named(page, f"policy-weight-{formula.index}", f"Weights in {letter}", weights, names),
        drivers=tuple(section for section in drivers if section is not None),
        cosines=_named(page, f"policy-cosine-{formula.index}", f"Cosines in {letter}", pairs, zero=True),
        objectives=_named(page, f"policy-objective-{formula.index}", f"Objectives in {letter}", objectives),
    )
    return panel if panel.shared or panel.cosines or panel.objectives else None


def _key(place: int, name: str) -> Key:
    from poise.report.page import Key

    # Numbers, so that nobody takes them for the letters of formulas.
    return Key(place, str(place + 1), f"series-{place % palette.COLOURS}", name)


def _named(
    page: Page,
    id: str,
    title: str,
    curves: Mapping[str, Curve],
    places: Mapping[str, int] | None = None,
    zero: bool = False,
) -> CurveSection | None:
    """Draw several curves of one formula, one line a name."""
    from poise.report.page import Chart, CurveNumbers, CurveSection

    place = places or {name: number for number, name in enumerate(curves)}
    lines = [Line.of(place[name], name, curve, mark=str(place[name] + 1)) for name, curve in curves.items()]
    lines = [line for line in lines if line.end() is not None]
    if not lines:
        return None
    numbers = []
    for line in lines:
        values = [value for value in line.mean if value is not None]
        shown = [f"{value:.4g}" for value in (values[0], min(values), values[-1])]
        numbers.append(CurveNumbers(_key(line.formula, line.text), *shown))
    says = "; ".join(f"{row.key.text} starts at {row.first} and ends at {row.last}" for row in numbers)
    logarithmic = not zero and figures.wants_logarithm(lines)
    figure = figures.curves(lines, logarithmic=logarithmic, pixels=250, zero=zero)
    chart = page.put(
        Chart(id, figure, f"{title}, by training step: {says}.", tuple(row.key for row in numbers), title, height=250)
    )
    return CurveSection(chart, tuple(numbers), max(line.averaged for line in lines))


def _fronts(page: Page) -> tuple[Chart, ...]:
    from poise.report.page import Chart

    names = dict.fromkeys(name for formula in page.summary.formulas for name in _kind(formula, "front"))
    charts: list[Chart] = []
    for across, upward in itertools.combinations(names, 2):
        found = [front for formula in page.summary.formulas for front in _fronts_of(formula, across, upward)]
        if not found:
            continue
        said = [
            f"{palette.letter(front.formula)}, seed {front.seed}: {len(front.points)} points"
            + (
                ""
                if front.chosen is None
                else f", chosen {front.points[front.chosen][0]:.3g} and {front.points[front.chosen][1]:.3g}"
            )
            for front in found
        ]
        formulas = {front.formula for front in found}
        charts.append(
            page.put(
                Chart(
                    id=f"front-{len(charts)}",
                    figure=figures.fronts(found, across, upward),
                    says=f"{upward} against {across}. " + "; ".join(said) + ".",
                    keys=tuple(key for key in page.keys if key.index in formulas),
                    title=f"Front of {across} and {upward}",
                    height=320,
                )
            )
        )
    return tuple(charts)


def _fronts_of(formula: FormulaSummary, across: str, upward: str) -> list[Front]:
    """Return one front a seed: a mean of fronts would be none."""
    curves = _kind(formula, "front")
    if across not in curves or upward not in curves:
        return []
    chosen = formula.curves.get("policy/front_chosen")
    found = []
    for seed, xs in curves[across].per_seed.items():
        x = dict(zip(curves[across].steps, xs, strict=True))
        y = dict(zip(curves[upward].steps, curves[upward].per_seed.get(seed, ()), strict=False))
        picked = dict(zip(chosen.steps, chosen.per_seed.get(seed, ()), strict=False)) if chosen is not None else {}
        places = [n for n in x if _finite(x[n]) and _finite(y.get(n))]
        ring = next((i for i, n in enumerate(places) if (picked.get(n) or 0.0) > 0.5), None)
        points = tuple((float(x[n] or 0.0), float(y[n] or 0.0)) for n in places)
        if points:
            found.append(Front(formula.index, seed, points, ring))
    return found


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
