"""Learning the strength of regularisation: a ridge coefficient for each column, judged on held-out patients.

    lower(w, theta) = mean (X w - y)^2 / 2 + sum_j exp(theta_j) w_j^2 / 2,    upper(w) = mean over validation of (X w - y)^2 / 2

442 diabetes patients, their 10 measurements with all squares and products: 65 columns, of which a few matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from poise.errors import InputError
from poise.quantities import derive
from poise.tasks.bilevel.task import BilevelTask, taken
from poise.tasks.embedded import EMBEDDED
from poise.weights.bilevel.levels import Levels, Tensors


def weight_decay(
    seed: int = 0,
    *,
    train: int = 180,
    validation: int = 130,
    shared: bool = False,
    start: float = -3.0,
    dtype: torch.dtype = torch.float64,
) -> BilevelTask:
    """Return the ridge problem.

    Args:
        seed: of the split.
        train, validation: patients of each; the rest tests.
        shared: one coefficient for all columns, instead of one each.
        start: of every theta, the logarithm of the coefficient.
        dtype: of data and variables.
    """
    bunch = EMBEDDED["diabetes"]()
    if train + validation >= len(bunch.target):
        raise InputError(f"weight_decay: {train} + {validation} of {len(bunch.target)} patients leave none to test.")
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(derive(seed, "split")))
    parts = torch.split(order, [train, validation, len(order) - train - validation])
    columns = _standard(bunch.inputs.double(), parts[0])
    pairs = torch.triu_indices(10, 10)
    columns = _standard(torch.cat([columns, columns[:, pairs[0]] * columns[:, pairs[1]]], 1), parts[0]).to(dtype)
    target = _standard(bunch.target.double()[:, None], parts[0])[:, 0].to(dtype)
    (x0, x1, x2), (y0, y1, y2) = (tuple(source[p] for p in parts) for source in (columns, target))

    def error(w: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return ((x @ w[0][..., None])[..., 0] - y).square().mean(-1) / 2

    def lower(w: Tensors, theta: Tensors, rows: Tensor | None) -> Tensor:
        return error(w, taken(x0, rows), taken(y0, rows)) + (theta[0].exp() * w[0].square()).sum(-1) / 2

    def upper(w: Tensors, theta: Tensors, rows: Tensor | None) -> Tensor:
        return error(w, taken(x1, rows), taken(y1, rows))

    def scores(w: Tensors, theta: Tensors) -> dict[str, float]:
        with torch.no_grad():
            unexplained = 2 * error(w, x2, y2) / y2.var(correction=0)
            return {"r2": float(1 - unexplained), "validation loss": float(upper(w, theta, None))}

    count = 1 if shared else columns.shape[1]
    return BilevelTask(
        levels=Levels(lower, upper, names=("log weight decay",)),
        x=(torch.zeros(columns.shape[1], dtype=dtype),),
        theta=(torch.full((count,), start, dtype=dtype),),
        lower_rows=train,
        upper_rows=validation,
        scores=scores,
        note=f"{train} patients to train, {validation} to judge, {len(y2)} to test; {columns.shape[1]} columns",
    )


def _standard(values: Tensor, rows: Tensor) -> Tensor:
    """Return columns with mean 0 and deviation 1 over some rows."""
    return (values - values[rows].mean(0)) / values[rows].std(0)
