"""Whether a sparse autoencoder activates as much as its inputs hold: norms of features against norms of inputs.

    |z|^2 - |f|^2 = sum_{i != j} f_i f_j <d_i, d_j>        for unit atoms d_i and z = sum f_i d_i
    eps_lbo = | |z|^2 - |f|^2 | / ((h - 1) |f|^2)          the least quasi-orthogonality that could explain the gap

    report = afa_report(z, output.features, sae.decoder, sae.bias)
    print(report);  report.figure().show()                 # the ZF plot

It serves any autoencoder with a linear decoder: rows of any length and a bias are taken into account.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from poise.errors import InputError

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["AFAReport", "GramStatistics", "afa_report", "description_length", "gram_statistics"]

BOUNDS = (0.25, 0.5, 1.0)
"""Values of eps (h - 1) at which the ZF plot draws its bounds, as in the paper."""
_BLOCK = 2048


@dataclass(frozen=True)
class GramStatistics:
    """How far a dictionary's unit directions are from orthogonal.

    Attributes:
        largest: of |<d_i, d_j>| over i != j, the epsilon of quasi-orthogonality.
        mean: of |<d_i, d_j>|.
        signed_mean: of <d_i, d_j>.
        welch: the least `largest` that so many directions can have in that width, `sqrt((h - d) / (d (h - 1)))`; 0 where h <= d.
        pairs: how many were looked at; all of them unless `sample` said fewer directions.
    """

    largest: float
    mean: float
    signed_mean: float
    welch: float
    pairs: int


@dataclass(frozen=True)
class AFAReport:
    """Norms of inputs and features, input by input.

    Attributes:
        epsilon: float64 [batch], eps_lbo; 0 on the line |f| = |z|, infinite where nothing is active.
        z_norm: float64 [batch], |z|.
        f_norm: float64 [batch], |f~|, the features scaled by their rows' lengths and the bias as one feature more.
        loss: float64 [batch], |z - z^|^2 / |z|^2.
        active: int64 [batch], features above 0.
        features: h.
        gram: of the decoder.
    """

    epsilon: Tensor
    z_norm: Tensor
    f_norm: Tensor
    loss: Tensor
    active: Tensor
    features: int
    gram: GramStatistics
    bounds: tuple[float, ...] = field(default=BOUNDS)

    @property
    def over(self) -> float:
        """Share of inputs above the line: more activation than the input holds."""
        return float((self.f_norm > self.z_norm).double().mean())

    @property
    def points(self) -> Tensor:
        """The ZF plot's points, float64 [batch, 2]: |z| across, |f~| up."""
        return torch.stack([self.z_norm, self.f_norm], dim=1)

    @property
    def description(self) -> float:
        """Bits that an input's features take, on average; see `description_length`."""
        return float(description_length(self.active, self.features).mean())

    def bound(self, share: float) -> tuple[float, float]:
        """Return the slopes between which |f~| / |z| lies where eps (h - 1) is `share`: 1/sqrt(1 + share) and 1/sqrt(1 - share).

        From share = 1 on there is no upper one.

        >>> z = torch.eye(2); afa_report(z, z, torch.eye(2)).bound(1.0)[1]
        inf
        """
        if not share > 0:
            raise InputError(f"afa_report: a bound belongs to eps (h - 1) above 0, and it is {share}.")
        return (1 + share) ** -0.5, (1 - share) ** -0.5 if share < 1 else math.inf

    def clipped(self, quantile: float = 0.99) -> tuple[Tensor, Tensor]:
        """Return `epsilon` and `loss`, each cut at its quantile, as the paper draws them: one outlier would hide the others."""
        return tuple(x.clamp_max(float(torch.quantile(x, quantile))) for x in (self.epsilon, self.loss))  # type: ignore[return-value]

    def figure(self, title: str = "") -> go.Figure:
        """The ZF plot: |f~| against |z|, the line on which they agree, and the bounds around it."""
        import plotly.graph_objects as go

        end = 1.05 * float(self.points[torch.isfinite(self.points)].max())
        figure = go.Figure()
        for share in self.bounds:
            low, high = self.bound(share)
            # Up to where the upper line leaves the frame; without an upper bound that is at once.
            left = end / high if math.isfinite(high) else 0.0
            x, y = [0, end, end, left], [0, end * low, end, end]
            name = f"ε(h−1) ≤ {share:g}"
            figure.add_trace(
                go.Scatter(
                    x=x,
                    y=y,
                    fill="toself",
                    mode="lines",
                    line={"width": 0.5, "dash": "dot"},
                    opacity=0.35,
                    name=name,
                    hoverinfo="skip",
                )
            )
        figure.add_trace(
            go.Scatter(x=[0, end], y=[0, end], mode="lines", line={"dash": "dash"}, name="|f| = |z|", hoverinfo="skip")
        )
        figure.add_trace(
            go.Scatter(
                x=self.z_norm.tolist(), y=self.f_norm.tolist(), mode="markers", marker={"size": 4, "opacity": 0.7}, name="inputs",
                customdata=self.active.tolist(), hovertemplate="|z| %{x:.4g}<br>|f| %{y:.4g}<br>%{customdata} active",
            )
        )  # fmt: skip
        figure.update_xaxes(title_text="norm of the input, |z|", range=[0, end], constrain="domain")
        figure.update_yaxes(title_text="norm of its features, |f|", range=[0, end], scaleanchor="x", scaleratio=1)
        return figure.update_layout(title={"text": title} if title else None)

    def __str__(self) -> str:
        return (
            f"|f| / |z| {float((self.f_norm / self.z_norm).median()):.3f} in the median, {self.over:.0%} of inputs over-activated\n"
            f"eps_lbo {float(self.epsilon.median()):.3g} in the median; the dictionary's epsilon {self.gram.largest:.3g}, mean "
            f"{self.gram.mean:.3g}, least possible {self.gram.welch:.3g}\n"
            f"normalised loss {float(self.loss.mean()):.4g}, {float(self.active.double().mean()):.1f} of {self.features} features "
            f"active, {self.description:.0f} bits an input"
        )


def afa_report(
    z: Tensor,
    features: Tensor,
    decoder: Tensor,
    bias: Tensor | None = None,
    *,
    sample: int | None = 4096,
    seed: int = 0,
) -> AFAReport:
    """Compare the norms of inputs and of their features.

    f~ = [f_1 |d_1|, ..., f_h |d_h|, |b|],   eps_lbo = ||z|^2 - |f~|^2| / ((h - 1) |f~|^2)

    Args:
        z: float [batch, width], inputs on the scale on which the autoencoder reconstructs (`output.signal`).
        features: float [batch, h], none negative.
        decoder: float [h, width], an atom a row, of any length but 0.
        bias: float [width], what the decoder adds; it counts as one feature more that is always on.
        sample: directions at most whose pairs the Gram statistics look at; None for all.
        seed: of that sample.

    Raises:
        InputError: shapes do not fit, h is 1, a row is 0, a feature is negative, an input is 0, or something is not finite.

    >>> report = afa_report(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.0]]), torch.eye(2))
    >>> report.epsilon
    tensor([0.], dtype=torch.float64)

    Source: arXiv:2503.24277; SewoongLee/top-afa-sae, visualization/zf-plot.ipynb.
    """
    _check(z, features, decoder, bias)
    z, features, decoder = z.detach().double(), features.detach().double(), decoder.detach().double()
    offset = (
        torch.zeros(decoder.shape[1], dtype=torch.float64, device=z.device) if bias is None else bias.detach().double()
    )
    rows = torch.linalg.vector_norm(decoder, dim=1)
    z2 = z.square().sum(1)
    f2 = (features * rows).square().sum(1) + offset.square().sum()
    gap = (z2 - f2).abs()
    return AFAReport(
        epsilon=torch.where(f2 > 0, gap / ((decoder.shape[0] - 1) * f2), torch.inf),
        z_norm=z2.sqrt(),
        f_norm=f2.sqrt(),
        loss=(z - features @ decoder - offset).square().sum(1) / z2,
        active=(features > 0).sum(1),
        features=decoder.shape[0],
        gram=gram_statistics(decoder, sample, seed),
    )


def _check(z: Tensor, features: Tensor, decoder: Tensor, bias: Tensor | None) -> None:
    if decoder.ndim != 2 or z.ndim != 2 or features.ndim != 2:
        raise InputError("afa_report: z, features and decoder are matrices: [batch, width], [batch, h] and [h, width].")
    h, width = decoder.shape
    if z.shape[1] != width or features.shape != (len(z), h) or (bias is not None and bias.shape != (width,)):
        raise InputError(
            f"afa_report: a decoder [{h}, {width}] goes with z [batch, {width}], features [batch, {h}] and a bias [{width}], and they are "
            f"{list(z.shape)}, {list(features.shape)} and {None if bias is None else list(bias.shape)}."
        )
    if h < 2:
        raise InputError(
            "afa_report: eps_lbo divides by h - 1, so a dictionary has two atoms at least, and this one has one."
        )
    for name, x in (("z", z), ("features", features), ("decoder", decoder), ("bias", bias)):
        if x is not None and not bool(torch.isfinite(x).all()):
            raise InputError(f"afa_report: {name} has values that are not finite.")
    if bool((features < 0).any()):
        row = int((features < 0).any(1).nonzero()[0])
        raise InputError(
            f"afa_report: features are never negative, and row {row} has one below 0. Give them after the activation."
        )
    for name, x in (("decoder", decoder), ("z", z)):
        lengths = torch.linalg.vector_norm(x.detach(), dim=1)
        if len(lengths) and float(lengths.min()) == 0:
            raise InputError(
                f"afa_report: row {int(lengths.argmin())} of {name} is 0, a direction that does not exist."
            )


def gram_statistics(decoder: Tensor, sample: int | None = None, seed: int = 0) -> GramStatistics:
    """Measure the inner products of a dictionary's directions, block by block.

    Args:
        decoder: float [h, width], rows of any length but 0.
        sample: directions at most whose pairs are looked at, drawn at random; None for all h (h - 1) pairs. A sample's `largest` is a
            lower estimate.
        seed: of the sample.

    >>> gram_statistics(torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])).largest
    0.7071067811865475
    """
    h, width = decoder.shape
    d = torch.nn.functional.normalize(decoder.detach().double(), dim=1)
    if sample is not None and sample < h:
        order = torch.randperm(h, generator=torch.Generator().manual_seed(seed))[: max(sample, 2)]
        d = d[order.to(d.device)]
    n = len(d)
    largest, total, signed = 0.0, 0.0, 0.0
    for start in range(0, n, _BLOCK):
        block = d[start : start + _BLOCK] @ d.T
        block[torch.arange(len(block)), torch.arange(start, start + len(block))] = 0.0
        largest = max(largest, float(block.abs().max()))
        total += float(block.abs().sum())
        signed += float(block.sum())
    pairs = n * (n - 1)
    welch = math.sqrt((h - width) / (width * (h - 1))) if h > width else 0.0
    return GramStatistics(largest, total / pairs, signed / pairs, welch, pairs)


def description_length(active: Tensor, features: int, bits: float = 7.0) -> Tensor:
    """Return how many bits the active features of each input take: `L0 (bits + log2 h)`, a value and a place for each.

    Args:
        active: int64 [batch], active features, or float [batch, h], the features themselves.
        features: h.
        bits: of a value.

    >>> description_length(torch.tensor([2]), 1024)
    tensor([34.], dtype=torch.float64)

    Source: SewoongLee/top-afa-sae, visualization/mdl.ipynb, with 7 bits.
    """
    if features < 2 or not bits >= 0:
        raise InputError(
            f"description_length: it needs two features at least and bits of 0 or more; got {features} and {bits}."
        )
    count = (active > 0).sum(1) if active.ndim == 2 else active
    return count.double() * (bits + math.log2(features))
