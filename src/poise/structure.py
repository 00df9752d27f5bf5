"""What a formula means for a linear model: which fit, which penalty, and what cannot be read that way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from poise.coefficient import Number
from poise.composite import Composite, as_numbers
from poise.datafits import Datafit, Multinomial
from poise.errors import IncompatibleError
from poise.objective import Objective
from poise.penalties import L1, ElasticNet, Penalty, Scaled, SquaredL2
from poise.problem import Problem

PLAIN_READOUTS = ("poise.readouts.supervised.Classification", "poise.readouts.supervised.Regression")
"""Readouts that pass on what the model returned. By name, because solvers do not know that room."""
USE_FIT = "Train it with `poise fit` (poise.fit), which needs gradients only."


def composite_of(
    objective: Objective, x: Any, y: Any, intercept: bool = True, sample_weight: Any = None, classes: int | None = None
) -> Composite:
    """Read an objective of a linear model as one fit plus one penalty.

    Squared norms join any penalty, and absolute values join an elastic net; two other penalties have no common proximal map.

    Args:
        objective: terms with fixed weights: one fit, and penalties.
        x, y: examples [n, inputs] and targets.
        intercept: whether the model has one; penalties leave it alone.
        sample_weight: of the examples, or None.
        classes: how many there are, for `cross_entropy`; two are met with one logit. Counted in `y` where it is None.

    Raises:
        IncompatibleError: a weight is not a number, a term is neither a fit nor a penalty, or penalties do not combine; by name.
    """
    if objective.parts:
        raise IncompatibleError(
            f"solve has a plain linear model, and the formula asks for parts: {', '.join(map(str, objective.parts))}. {USE_FIT}"
        )
    fit: tuple[str, float, Datafit] | None = None
    ridge, absolute, other = 0.0, 0.0, None
    for entry in objective._entries:
        if entry.auxiliary:
            continue
        term: Any = entry.term
        weight = _number(entry.label, entry.weight)
        penalty = getattr(term, "penalty", None)
        if entry.stream is not None or entry.summand.renames:
            raise IncompatibleError(
                f"solve knows one table of examples, and {entry.label!r} reads another stream or quantity. {USE_FIT}"
            )
        if _has_datafit(term):
            if fit is not None:
                raise IncompatibleError(
                    f"solve reads one fit, and {objective} has {fit[0]!r} and {entry.label!r}. {USE_FIT}"
                )
            fit = entry.label, weight, term.datafit(as_numbers(y, "targets"), classes)
        elif not isinstance(penalty, Penalty):
            raise IncompatibleError(
                f"{entry.label!r} is neither a fit of a linear model (least_squares, huber, cross_entropy) nor a penalty with a proximal "
                f"map. {USE_FIT}"
            )
        elif getattr(term, "biases", False) and intercept:
            raise IncompatibleError(
                f"{entry.label!r} charges the intercept (biases=True), which solve leaves free: set intercept=False."
            )
        elif isinstance(penalty, SquaredL2):
            ridge += weight
        elif isinstance(penalty, ElasticNet):
            absolute, ridge = absolute + weight * penalty.ratio, ridge + weight * (1 - penalty.ratio)
        elif isinstance(penalty, L1) and penalty.scales is None:
            absolute += weight
        elif other is not None:
            raise IncompatibleError(
                f"{other[0]!r} and {entry.label!r} have no common proximal map, so their sum cannot be solved exactly. {USE_FIT}"
            )
        else:
            other = entry.label, weight, penalty
    if fit is None:
        raise IncompatibleError(f"{objective} has no fit: add least_squares, huber or cross_entropy.")
    if absolute and other is not None:
        raise IncompatibleError(
            f"'l1' and {other[0]!r} have no common proximal map, so their sum cannot be solved exactly. {USE_FIT}"
        )
    if other is not None:
        h = Scaled(other[2], other[1], ridge)
    else:
        h = Scaled(L1() if absolute else None, absolute, ridge)
    return Composite(x, y, fit[2], h, fit[1], intercept, sample_weight)


def composite_of_problem(problem: Problem) -> tuple[Composite, nn.Linear]:
    """Read one step of a linear layer on one batch as a composite; return the layer too, where a solution belongs.

    Raises:
        IncompatibleError: the model is not one linear layer that puts out what the terms read, or the terms do not fit one.
    """
    model = problem.model
    layer = model[0] if isinstance(model, nn.Sequential) and len(model) == 1 else model
    plain = f"{type(problem.readout).__module__}.{type(problem.readout).__name__}" in PLAIN_READOUTS
    batch = problem.batches[0]
    data = batch.get("main", next(iter(batch.values())))
    if (
        type(layer) is not nn.Linear
        or len(problem.batches) != 1
        or len(batch) != 1
        or not plain
        or "sample_weight" in data
    ):
        raise IncompatibleError(
            "A certificate is given for one linear layer, on one batch without sample weights. Train other models with poise.fit and "
            "solver='proximal', which makes the same steps."
        )
    found = composite_of(
        problem.objective, data["input"], data["target"], layer.bias is not None, classes=layer.out_features
    )
    if found.datafit.name == "logistic":
        # a layer of two outputs has two logits, where the formula alone has one
        found = Composite(found.design, data["target"], Multinomial(2), found.penalty, found.weight, found.intercept)
    return found, layer


def write_to_layer(layer: nn.Linear, w: Tensor, b: Tensor) -> None:
    """Put a solution into a linear layer."""
    with torch.no_grad():
        layer.weight.copy_(w.reshape(layer.weight.shape))
        if layer.bias is not None:
            layer.bias.copy_(b.reshape(layer.bias.shape))


def _number(label: str, weight: Any) -> float:
    if isinstance(weight, Number):
        return float(weight)
    raise IncompatibleError(
        f"solve minimises fixed weights, and that of {label!r} is {weight}. Give a number; `poise solve --path` tries many, and "
        "`poise compare` finds weights that are 'auto'."
    )


def _has_datafit(term: Any) -> bool:
    """Say whether the term has a fit, and one of its own: a subclass that computes another loss must not inherit it."""
    of = {name: next((c for c in type(term).__mro__ if name in c.__dict__), None) for name in ("datafit", "forward")}
    return of["datafit"] is not None and of["datafit"] is of["forward"]
