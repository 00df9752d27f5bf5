"""What the weights of a network look like: how many take part, how large they are, and how far they still can move.

"Democratic" is measured by the participation ratio `(sum w^2)^2 / (n sum w^4)`: 1 when all weights have one magnitude, 1/3 for Gaussian
weights, 1/n when a single weight decides. A network in which many weights share the decision also keeps its accuracy when some are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from poise.errors import InputError
from poise.parts.compander import SATURATED, Compander
from poise.parts.companding_handle import entries_of, folded_copy

__all__ = [
    "Robustness",
    "WeightStatistics",
    "decay_pull",
    "effective_lr_profile",
    "weight_drop_robustness",
    "weight_report",
]

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True)
class WeightStatistics:
    """The distribution of one layer's weights, as the layer uses them.

    Args:
        count: number of weights `n`.
        participation: `(sum w^2)^2/(n sum w^4)`, in (0, 1]; NaN if all are zero.
        near_zero: share with `|w| <` the threshold of the report.
        max_abs: largest `|w|`.
        std: standard deviation.
        kurtosis: `E(w-m)^4/(E(w-m)^2)^2`, 3 for a Gaussian; NaN for a constant.
        quantiles: level -> quantile of `|w|`, at 5, 25, 50, 75, 95 and 99 %.
        saturated: share that companding has nearly stopped (`psi' < 0.05 psi'(0)`); 0 for a plain layer.
        w_max: companding's bound; infinite for a plain layer.
        effective_lr: `psi'(0)^2`, the factor on the learning rate of small weights; 1 for a plain layer.
    """

    count: int
    participation: float
    near_zero: float
    max_abs: float
    std: float
    kurtosis: float
    quantiles: dict[float, float]
    saturated: float
    w_max: float
    effective_lr: float


def weight_report(model: nn.Module, threshold: float = 0.01) -> dict[str, WeightStatistics]:
    """Describe every matrix and kernel of a model; a companded layer by the weight it uses, not by its free parameter.

    Args:
        model: plain or companded.
        threshold: `|w|` below it counts as near zero, at least 0, in the weights' own units.

    Returns:
        weight name -> `WeightStatistics`.

    Raises:
        InputError: `threshold` is negative.

    Example:
        >>> round(weight_report(nn.Linear(400, 300))["weight"].participation, 1)  # uniform weights: 5/9
        0.6

    Source:
        participation ratio, near-zero share and saturation for arXiv:2306.16993, "more democratic decision-making".
    """
    if not threshold >= 0:
        raise InputError(f"weight_report: threshold must be at least 0, but it is {threshold}.")
    companders = {entry.name: (entry.compander, entry.free) for entry in entries_of(model)}
    plain = folded_copy(model)
    return {
        name: _describe(weight.detach().cpu().double().flatten(), threshold, *companders.get(name, (None, None)))
        for name, weight in _weights(plain)
    }


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, p) for name, p in model.named_parameters() if p.dim() > 1 and p.is_floating_point())


def _describe(w: Tensor, threshold: float, compander: Compander | None, v: Tensor | None) -> WeightStatistics:
    magnitude = w.abs()
    squares = w.square()
    fourth = float(squares.square().sum())
    centred = w - w.mean()
    variance = float(centred.square().mean())
    levels = torch.quantile(_thinned(magnitude), torch.tensor(_QUANTILES, dtype=w.dtype, device=w.device))
    saturated, w_max, rate = 0.0, math.inf, 1.0
    if compander is not None and v is not None:
        with torch.no_grad():
            saturated = float((compander.slope(v) < SATURATED * compander.slope_at_zero).double().mean())
            w_max = float(compander.w_max.max())
            rate = float(compander.slope_at_zero.square().mean())
    return WeightStatistics(
        count=w.numel(),
        participation=float(squares.sum()) ** 2 / (w.numel() * fourth) if fourth > 0 else math.nan,
        near_zero=float((magnitude < threshold).double().mean()),
        max_abs=float(magnitude.max()),
        std=math.sqrt(variance),
        kurtosis=float(centred.pow(4).mean()) / variance**2 if variance > 0 else math.nan,
        quantiles=dict(zip(_QUANTILES, levels.tolist(), strict=True)),
        saturated=saturated,
        w_max=w_max,
        effective_lr=rate,
    )


def _thinned(values: Tensor, most: int = 2**24) -> Tensor:
    """At most 2^24 values, evenly spaced in order: `torch.quantile` takes no more, and the error is far below its own resolution."""
    return values if values.numel() <= most else values.sort().values[:: values.numel() // most + 1]


@dataclass(frozen=True)
class Robustness:
    """A metric after dropping random weights.

    Args:
        rates: shares of weights dropped.
        mean: mean of the metric at each rate.
        std: standard deviation over the repeats at each rate; 0 for a single repeat.
        intact: the metric with every weight in place.
    """

    rates: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    intact: float


def weight_drop_robustness(
    model: nn.Module,
    metric: Callable[[nn.Module], float],
    rates: Sequence[float] = (0.1, 0.2, 0.3, 0.5),
    *,
    repeats: int = 5,
    seed: int = 0,
) -> Robustness:
    """Measure a metric with a random share of the weights set to zero: redundancy that other weights make up for.

    Args:
        model: plain or companded; it is left as it is.
        metric: `metric(model) -> number`, called on a plain copy in evaluation mode.
        rates: shares of the entries of every matrix and kernel, in [0, 1).
        repeats: draws at each rate, at least 1.
        seed: of the draws; the same seed drops the same positions in every model of this shape, so models compare pairwise.

    Raises:
        InputError: a rate outside [0, 1) or no repeats.

    Example:
        >>> weight_drop_robustness(nn.Linear(4, 3), lambda m: float(m.weight.abs().sum()), rates=[0.0], repeats=1).std
        (0.0,)
    """
    if repeats < 1 or any(not 0 <= rate < 1 for rate in rates):
        raise InputError(
            f"weight_drop_robustness: rates must lie in [0, 1) and repeats be at least 1, but they are {rates} and {repeats}."
        )
    plain = folded_copy(model).eval()
    kept = [(weight, weight.detach().clone()) for _, weight in _weights(plain)]
    with torch.no_grad():
        intact = float(metric(plain))
        rows = []
        for rate in rates:
            generator = torch.Generator().manual_seed(seed)
            values = []
            for _ in range(repeats):
                for weight, original in kept:
                    stays = torch.rand(original.shape, generator=generator) >= rate
                    weight.copy_(original * stays.to(original.device))
                values.append(float(metric(plain)))
            rows.append(torch.tensor(values, dtype=torch.float64))
    return Robustness(
        tuple(rates), tuple(float(r.mean()) for r in rows), tuple(float(r.std(correction=0)) for r in rows), intact
    )


def effective_lr_profile(compander: Compander, points: int = 101) -> tuple[Tensor, Tensor]:
    """The factor `psi'(v)^2` that companding puts on the learning rate of a weight, against the weight.

    For `arctan` it is `(a/b)^2 cos^4(w/a)`: full speed at zero, a stand at the bound. It holds for plain gradient descent; Adam divides
    by the gradient's own size and feels only `psi'` at most.

    Args:
        compander: with one `a` and `b` (not per channel).
        points: how many, at least 2.

    Returns:
        `|w|` from 0 to `0.99 w_max` (to `3a` where there is no bound) and the factors, both `[points]`.

    Raises:
        InputError: `compander` is per channel, or too few points.

    Example:
        >>> w, factor = effective_lr_profile(Compander(a=1.0))
        >>> round(float(factor[0]), 6)
        1.0
    """
    if compander.a.numel() != 1 or points < 2:
        raise InputError("effective_lr_profile: give a compander with a single a and b, and at least 2 points.")
    with torch.no_grad():
        w_max = float(compander.w_max)
        end = 0.99 * w_max if math.isfinite(w_max) else 3 * float(compander.a)
        w = torch.linspace(0, end * (1 - 1e-9), points, dtype=torch.float64)
        return w, compander.slope(compander.inverse(w)).square()


def decay_pull(compander: Compander, w: Tensor, weight_decay: float = 1.0) -> Tensor:
    """How strongly weight decay pulls a weight back, seen from the weight: `-dw/dt = weight_decay * v * psi'(v)` at `w = psi(v)`.

    Plain decay pulls with `weight_decay * w`. With `decay_on="w"` companded weights do too; with `decay_on="v"` the pull is weaker near the
    bound, because there the weight hardly follows its free parameter.

    Args:
        compander: the curve, and which of `v` and `w` decays (`compander.decay_on`).
        w: weights inside the bound, any shape.
        weight_decay: at least 0, the rate.

    Returns:
        The pull, of the shape of `w`, with the sign of `w`.

    Raises:
        InputError: a weight lies beyond `0.99 w_max`.

    Example:
        >>> float(decay_pull(Compander(a=1.0), torch.zeros(1)))
        0.0
    """
    if compander.decay_on == "w":
        return weight_decay * w
    with torch.no_grad():
        v = compander.inverse(w)
        return weight_decay * v * compander.slope(v)
