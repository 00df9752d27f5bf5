"""What self-distillation does to the eigen-directions of a kernel fit, step by step, and the plain ridge it amounts to.

Every step multiplies the labels' coefficient along eigen-direction k by a shrinkage `B_k` in [0, 1]. Small directions are
suppressed progressively: the ratios `R_k = B_k / B_(k+1)` rise above those of the first fit. Without labels in the target
they grow without bound; a share `alpha` of labels keeps them below `1/alpha` times the first ones. The report sets each
step beside the one plain fit that regularises as much, so that one sees whether distilling bought anything that tuning
the ridge would not have (arXiv:2102.13088).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from poise.errors import InputError
from poise.solvers.kernel_distillation import SelfDistillationKRR

if TYPE_CHECKING:
    from poise.solvers.kernel_distillation import Array, Step

__all__ = ["DistillationReport", "StepRow", "distillation_spectrum"]


@dataclass(frozen=True)
class StepRow:
    """One fit of the chain, beside the plain fit that regularises as much.

    Args:
        name: `"1"`, `"2"`, ..., `"limit"`, or `"ridge ..."` for the baseline.
        alpha: share of labels in this step's target; None for the first fit and the baseline, whose target is the labels.
        freedom: effective degrees of freedom, `sum B`.
        directions: effective number of eigen-directions, `(sum B)^2 / sum B^2`: falls as the solution grows sparse.
        equivalent_ridge: ridge of the plain fit with as many degrees of freedom; for the limit `ridge / alpha`, exactly.
        train_error: mean squared error on the training labels.
        error: mean squared error on the given data; None without.
        plain_error: that of the plain fit at `equivalent_ridge`; None without data.
    """

    name: str
    alpha: float | None
    freedom: float
    directions: float
    equivalent_ridge: float
    train_error: float
    error: float | None
    plain_error: float | None


@dataclass(frozen=True)
class DistillationReport:
    """How a chain of self-distillation filtered the labels.

    Args:
        rows: one for each fitted step, one for the limit, and last the baseline: a plain fit at the fixed `ridge / alpha`.
        eigenvalues: those above rounding, largest first, `[n]`.
        ratios: `R_k = B_k / B_(k+1)` of neighbouring directions, `[steps, n - 1]`.
        limit_ratios: the same for infinitely many steps, `[n - 1]`; NaN where the limit is the zero function.
    """

    rows: tuple[StepRow, ...]
    eigenvalues: Tensor
    ratios: Tensor
    limit_ratios: Tensor

    def __str__(self) -> str:
        header = ("step", "alpha", "freedom", "directions", "ridge alike", "train mse", "mse", "mse of that ridge")
        cells = [header, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
        return "\n".join(lines)


def distillation_spectrum(
    model: SelfDistillationKRR, X: Array | None = None, Y: Array | None = None
) -> DistillationReport:
    """Report shrinkage, ratios and equivalent ridge of every step of a fitted chain.

    Args:
        model: fitted.
        X, Y: data on which to measure errors, as in `model.predict`; the true function's values where they are known.

    Returns:
        `DistillationReport`; `str()` of it is a table.

    Raises:
        InputError: the model is not fitted, its steps have no limit, or only one of X and Y is given.

    >>> x = torch.linspace(0, 1, 11)[:, None]
    >>> model = SelfDistillationKRR("rbf", ridge=0.2, gamma=80.0).fit(x, torch.sin(6.28 * x[:, 0]), alpha=0.35, steps=3)
    >>> [row.name for row in distillation_spectrum(model).rows]
    ['1', '2', '3', 'limit', 'ridge 0.571']

    Source: arXiv:2102.13088, sparsification theorem and limit theorem.
    """
    if (X is None) != (Y is None):
        raise InputError("distillation_spectrum needs X and Y together, or neither.")
    spectrum = model.spectrum()
    shares: list[float | None] = [None, *spectrum.alphas]
    rows = [
        _row(model, str(step), step, share, spectrum.shrinkage[step - 1], X, Y)
        for step, share in enumerate(shares, start=1)
    ]
    held = spectrum.alphas[-1] if spectrum.alphas else None
    rows.append(_row(model, "limit", "limit", held, spectrum.limit, X, Y))
    rows.append(_baseline(model, spectrum.eigenvalues, X, Y))

    values = spectrum.eigenvalues
    seen = values > len(values) * torch.finfo(values.dtype).eps * values[0]
    shrinkage, limit = spectrum.shrinkage[:, seen], spectrum.limit[seen]
    return DistillationReport(tuple(rows), values[seen], shrinkage[:, :-1] / shrinkage[:, 1:], limit[:-1] / limit[1:])


def _row(
    model: SelfDistillationKRR,
    name: str,
    step: Step,
    alpha: float | None,
    shrinkage: Tensor,
    X: Array | None,
    Y: Array | None,
) -> StepRow:
    equivalent = model.equivalent_ridge(step)
    measured = X is not None
    return StepRow(
        name=name,
        alpha=alpha,
        freedom=float(shrinkage.sum()),
        directions=_directions(shrinkage),
        equivalent_ridge=equivalent,
        train_error=model.error(step),
        error=model.error(step, X, Y) if measured else None,
        plain_error=_plain_error(model, equivalent, X, Y) if measured else None,
    )


def _baseline(model: SelfDistillationKRR, values: Tensor, X: Array | None, Y: Array | None) -> StepRow:
    """Fit once at the fixed ridge that infinitely many steps amount to."""
    ridge = model.equivalent_ridge("limit")
    shrinkage = torch.zeros_like(values) if math.isinf(ridge) else values / (values + ridge)
    error = None if X is None else _plain_error(model, ridge, X, Y)
    return StepRow(
        name=f"ridge {ridge:.3g}",
        alpha=None,
        freedom=float(shrinkage.sum()),
        directions=_directions(shrinkage),
        equivalent_ridge=ridge,
        train_error=_plain_error(model, ridge, None, None),
        error=error,
        plain_error=error,
    )


def _plain_error(model: SelfDistillationKRR, ridge: float, X: Array | None, Y: Array | None) -> float:
    if math.isinf(ridge):  # the zero function
        return float(torch.as_tensor(Y).double().square().mean()) if Y is not None else model.error("limit")
    return model.with_ridge(ridge).error(1, X, Y)


def _directions(shrinkage: Tensor) -> float:
    energy = float(shrinkage.square().sum())
    return float(shrinkage.sum()) ** 2 / energy if energy > 0 else 0.0


def _cells(row: StepRow) -> tuple[str, ...]:
    def shown(value: float | None, digits: str) -> str:
        return "" if value is None else format(value, digits)

    return (
        row.name,
        shown(row.alpha, ".3f"),
        shown(row.freedom, ".3f"),
        shown(row.directions, ".2f"),
        shown(row.equivalent_ridge, ".4g"),
        shown(row.train_error, ".5f"),
        shown(row.error, ".5f"),
        shown(row.plain_error, ".5f"),
    )
