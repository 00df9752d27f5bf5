"""Models that are known up to a constant: maximum likelihood without the constant, and its contrast with noise.

A network gives log p~(x) = -E(x), and p = p~ / Z with Z = E over noise q of p~(z)/q(z), which nobody can integrate. MECO minimises the
negative log-likelihood itself, as a mean inside a logarithm:

    unnormalized_nll      -mean log p~(x) + log E_q[r],   r = p~/q;   gradient  -mean grad log p~(x) + sum_j c_j grad log p~(z_j)

with c_j = r_j / (m u) and u a moving average of the mean of r. Noise-contrastive estimation, `nce`, tells data from noise with a classifier
instead; where noise is far from the data its loss is nearly flat, and steps that pay in the likelihood hardly move it.

Both read four numbers that `poise.readouts.Unnormalized(noise)` offers: log p~ and log q, at the data and at the noise's own points.
"""

from __future__ import annotations

import math
import warnings
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from poise.errors import IncompatibleError, InputError, PoiseWarning, QuantityError
from poise.inner_average import LogInnerAverage, log_mean_everywhere
from poise.objective import Term, Value

__all__ = ["NCE", "EnergyL2", "UnnormalizedNLL"]

_FORMS = {
    "log_density": "float [batch]",
    "log_noise": "float [batch]",
    "drawn_log_density": "float [drawn]",
    "drawn_log_noise": "float [drawn]",
    "previous_drawn_log_density": "float [drawn]",
}
PATIENCE = 100
"""Steps in a row with an effective sample size below 2 until a warning."""


class UnnormalizedNLL(Term):
    """Charge the negative log-likelihood of a model without a known normaliser (MECO).

    -log p~(x) + log u,   u <- (1 - gamma) u + gamma g,   g = mean_j r_j,   r_j = p~(z_j)/q(z_j),   z_j ~ q

    The gradient is that of -log p~(x) + sum_j c_j log p~(z_j) with the weights c_j = r_j/(m u) held constant. All of it is in log space.
    Their sum g/u is 1 only for gamma=1, which is self-normalised importance sampling with its bias of order 1/m; it never exceeds
    1/gamma.
    `u` is updated first and used then: `forward` looks ahead, `advance` stores it, once an optimiser step. The value is the tracker's: a
    final likelihood is measured by `poise.metrics.density`. A constant in log p~ changes no gradient as long as `u` follows it; the
    output's bias still drifts, so leave it out, or call `recenter`.

    Args:
        gamma: share of the new batch in u, in (0, 1]; towards 1 where the model moves fast, lower for small batches of noise.
        variance_reduction: follow the parameters without lag, u <- (1 - gamma)(u - g at the last parameters) + g. Reads
            `previous_drawn_log_density`, which `poise.solvers.Compositional(variance_reduction=True)` offers.
        clip: largest r_j/u that counts in the gradient; `clipped` says how many were cut. None cuts none, as in the paper.
        ahead: update, then use, as in the paper. False uses the u of the step before, so that a step decomposes over micro-batches; only
            the very first step takes the mean of its own batch.

    Reads: `log_density` float [batch], log p~ of the data; `drawn_log_density` and `drawn_log_noise` float [drawn], log p~ and log q of
        points that were drawn from q.
    Returns: float [batch], nats; publishes `log_normalizer` (log u), `ess` (effective sample size (sum r)^2 / sum r^2), `weight_sum`
        (g/u), `noise_weights` [drawn] (c) and `clipped` (a share).
    State: `average` (log u and the steps), `ess` and `weight_sum` of the last step, saved with the objective; equal on every process.

    Raises:
        InputError: an argument out of range.
        QuantityError: log q is -inf at a point of its own, or log p~ is -inf at every point of the noise.
        IncompatibleError: a step of several micro-batches (without `ahead=False`).

    Example:
        >>> log_r = torch.tensor([1.0, 3.0]).log()                      # g = 2, so log Z is estimated as log 2
        >>> UnnormalizedNLL()(torch.zeros(1), log_r, torch.zeros(2)).values
        tensor([0.6931])

    Source: Jiang et al., arXiv:2306.07485, algorithm 1; the form in log space is this library's.
    """

    formula = "unnormalized_nll"
    equation: ClassVar[str] = "-log p~(x) + log u,  u <- (1 - gamma) u + gamma mean_j p~(z_j)/q(z_j)"
    source: ClassVar[str] = "arXiv:2306.07485"
    expects: ClassVar[dict[str, str]] = _FORMS
    # No "potential": u carries no gradient, so the gradient is not that of the value.
    capabilities = frozenset({"per_example"})
    ess: Tensor
    weight_sum: Tensor
    poor: Tensor

    def __init__(
        self, gamma: float = 0.5, variance_reduction: bool = False, clip: float | None = None, ahead: bool = True
    ) -> None:
        super().__init__()
        if clip is not None and not clip > 0:
            raise InputError(
                f"unnormalized_nll: clip is the largest ratio r/u that counts, positive or None; got {clip}."
            )
        self.gamma, self.variance_reduction, self.clip, self.ahead = gamma, variance_reduction, clip, ahead
        self.average = LogInnerAverage(gamma, "unnormalized_nll")
        self.register_buffer("ess", torch.tensor(math.nan, dtype=torch.float64))
        self.register_buffer("weight_sum", torch.tensor(math.nan, dtype=torch.float64))
        self.register_buffer("poor", torch.zeros((), dtype=torch.int64))
        self._rows, self._looks, self._warned = 0, 0, False

    @property
    def log_normalizer(self) -> Tensor:
        """log u, the running estimate of log Z, float64 0-dim."""
        return self.average.log_u

    def readings(self) -> tuple[str, ...]:
        """Without variance reduction, nothing at the last parameters is read."""
        return () if self.variance_reduction else ("previous_drawn_log_density",)

    def requirements(self) -> tuple[str, ...]:
        """With it, the ratios at the last parameters are needed."""
        return ("previous_drawn_log_density",) if self.variance_reduction else ()

    def forward(
        self,
        log_density: Tensor,
        drawn_log_density: Tensor,
        drawn_log_noise: Tensor,
        previous_drawn_log_density: Tensor | None = None,
    ) -> Value:
        log_p, log_p_drawn = _wide(log_density), _wide(drawn_log_density)
        log_r = (log_p_drawn - drawn_log_noise).detach()
        # Only a training step is sure to be taken by every process at once.
        alone = not (self.training and torch.is_grad_enabled()) or not self.ahead
        log_g, rows = log_mean_everywhere(log_r, alone)
        log_g = _checked(log_g, log_p_drawn, drawn_log_noise, self.formula)
        if not alone:
            self._rows = rows
        log_u = self._ahead(log_g, _before(previous_drawn_log_density, drawn_log_noise, alone))
        ratio = (log_r - log_u).exp().to(log_r.dtype)
        # Weights far below rounding would only make denormal gradients, which a CPU passes many times slower.
        kept = functional.threshold(ratio, torch.finfo(ratio.dtype).eps ** 2, 0.0)
        kept = kept if self.clip is None else kept.clamp(max=self.clip)
        c = kept / len(kept)
        # Where the model gives no mass its log-density is -inf, and 0 times it would be NaN.
        negative = (c * torch.where(c > 0, log_p_drawn, 0.0)).sum()
        extras = {"log_normalizer": log_u, "noise_weights": c, "weight_sum": (log_g - log_u).exp()}
        extras["ess"] = ratio.sum().square() / ratio.square().sum()
        extras["clipped"] = c.new_zeros(()) if self.clip is None else (ratio > self.clip).to(c.dtype).mean()
        return Value(log_u.to(log_p.dtype) - log_p, surrogate=negative - log_p, extras=extras)

    def advance(
        self,
        drawn_log_density: Tensor,
        drawn_log_noise: Tensor,
        previous_drawn_log_density: Tensor | None = None,
        noise_name: str | None = None,
    ) -> None:
        """Store the average, over the noise of all processes; warn of noise that hardly meets the model."""
        self._refuse_micro_batches(len(drawn_log_noise))
        log_r = _wide(drawn_log_density) - drawn_log_noise
        log_g, _ = log_mean_everywhere(log_r, alone=True)  # the rows of all processes are here already
        self.average.store(log_g, _before(previous_drawn_log_density, drawn_log_noise, alone=True))
        self.ess = torch.exp(2 * torch.logsumexp(log_r, 0) - torch.logsumexp(2 * log_r, 0)).double()
        self.weight_sum = (log_g - self.average.log_u).exp()
        self.poor = torch.where(self.ess < 2, self.poor + 1, 0)
        self._warn_of_poor_noise(noise_name)

    def shift(self, delta: float | Tensor) -> None:
        """Say that log p~ was shifted by a constant: log u is shifted alike, and no gradient changes."""
        self.average.log_u = self.average.log_u + delta

    def recenter(self, bias: Tensor) -> None:
        """Subtract log u from a bias that adds to log p~, so that p~ is about normalised and u about 1.

        Args:
            bias: one number, changed in place: the last layer's bias of a network that puts out log p~.
        """
        if bias.numel() != 1:
            raise InputError(
                f"unnormalized_nll: recenter moves one number, the bias of log p~; got {list(bias.shape)}."
            )
        with torch.no_grad():
            bias -= self.average.log_u.to(bias.dtype)
        self.shift(-self.average.log_u)

    def _ahead(self, log_g: Tensor, before: Tensor | None) -> Tensor:
        if self.ahead:
            return self.average.ahead(log_g, before)
        return torch.where(self.average.steps == 0, log_g.double(), self.average.log_u)

    def _refuse_micro_batches(self, rows: int) -> None:
        """A look ahead from a part of the noise is not that from all of it."""
        if self.ahead and self._rows and rows > self._rows:
            raise IncompatibleError(
                f"unnormalized_nll looks ahead at the mean over all the noise of a step, and this step was made of micro-batches ({rows} "
                f"points, {self._rows} at once). Use accumulate=1, or unnormalized_nll(ahead=False)."
            )

    def _warn_of_poor_noise(self, noise: str | None) -> None:
        self._looks += 1
        # An accelerator is waited for only once in so many steps.
        if self._warned or (not self.poor.is_cpu and self._looks % PATIENCE):
            return
        if int(self.poor) >= PATIENCE:
            self._warned = True
            warnings.warn(
                f"unnormalized_nll: in {PATIENCE} steps in a row fewer than 2 points of the noise {noise or 'q'} carried all the weight "
                f"(effective sample size {float(self.ess):.2f}), so the gradient hardly knows the model's normaliser. Fit the noise to "
                "the data (a mixture around them, a full covariance), make it wider than the model, or draw more.",
                PoiseWarning,
                stacklevel=3,
            )


class NCE(Term):
    """Charge a classifier that tells data from noise, h = log p~ - c - log q - log nu: noise-contrastive estimation.

    softplus(-h(x)) + nu mean_j softplus(h(z_j)),   x data, z_j ~ q

    At the optimum p~ exp(-c) is the density of the data, and c its log-normaliser. The loss is nearly flat where noise and data are far
    apart.

    Args:
        ratio: nu, the weight of noise against data, > 0: usually as many points of noise as of data (m/n) as are drawn.
        learn_normalizer: learn c; False takes p~ as normalised, c fixed.
        initial: c at first.

    Reads: `log_density` and `log_noise` float [batch], log p~ and log q of the data; `drawn_log_density` and `drawn_log_noise` float
        [drawn], of the noise's points.
    Returns: float [batch], nats, >= 0; publishes `log_normalizer` (c) and `accuracy` (of the classifier, both sides alike).
    Parameters: `log_normalizer`, 0-dim, trained with the model.

    Raises:
        InputError: an argument out of range.
        QuantityError: log q is -inf at a point of its own.

    Example:
        >>> NCE()(torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.zeros(1)).values.detach()     # nothing to tell apart: 2 log 2
        tensor([1.3863])

    Source: Gutmann and Hyvarinen, AISTATS 2010; the baseline of arXiv:2306.07485.
    """

    formula = "nce"
    equation: ClassVar[str] = "softplus(-h(x)) + nu E_q softplus(h(z)),  h = log p~ - c - log q - log nu"
    source: ClassVar[str] = "Gutmann and Hyvarinen 2010"
    expects: ClassVar[dict[str, str]] = _FORMS
    capabilities = frozenset({"per_example", "potential"})

    def __init__(self, ratio: float = 1.0, learn_normalizer: bool = True, initial: float = 0.0) -> None:
        super().__init__()
        if not (ratio > 0 and math.isfinite(ratio)):
            raise InputError(f"nce: ratio is the weight of the noise, positive and finite; got {ratio}.")
        self.ratio, self.learn_normalizer, self.initial = ratio, learn_normalizer, initial
        self.log_normalizer = nn.Parameter(torch.tensor(float(initial)), requires_grad=learn_normalizer)

    def forward(
        self, log_density: Tensor, log_noise: Tensor, drawn_log_density: Tensor, drawn_log_noise: Tensor
    ) -> Value:
        shift = self.log_normalizer + math.log(self.ratio)
        data = _wide(log_density) - log_noise - shift
        noise = _wide(drawn_log_density) - drawn_log_noise - shift
        loss = functional.softplus(noise)
        mean = _checked(loss.mean(), drawn_log_density, drawn_log_noise, self.formula)
        accuracy = 0.5 * ((data > 0).to(data.dtype).mean() + (noise < 0).to(data.dtype).mean())
        values = functional.softplus(-data) + self.ratio * mean
        return Value(values, extras={"log_normalizer": self.log_normalizer, "accuracy": accuracy})


class EnergyL2(Term):
    """Charge large energies, so that they stay bounded where no data pull at them.

    log p~(x)^2 + mean_j log p~(z_j)^2

    It fixes the free constant of the energy near 0 as well. A weight of 1e-4 to 1e-2 is usual.

    Reads: `log_density` float [batch]; `drawn_log_density` float [drawn], if offered.
    Returns: float [batch], squared nats, >= 0.

    Example:
        >>> EnergyL2()(torch.tensor([2.0]), torch.tensor([1.0, 3.0]))                # 4 + (1 + 9)/2
        tensor([9.])

    Source: Du and Mordatch, arXiv:1903.08689, section 3.
    """

    formula = "energy_l2"
    equation: ClassVar[str] = "log p~(x)^2 + E_q log p~(z)^2"
    source: ClassVar[str] = "arXiv:1903.08689"
    expects: ClassVar[dict[str, str]] = _FORMS

    def forward(self, log_density: Tensor, drawn_log_density: Tensor | None = None) -> Tensor:
        values = _wide(log_density).square()
        return values if drawn_log_density is None else values + _wide(drawn_log_density).square().mean()


def _wide(x: Tensor) -> Tensor:
    """Return half precision as float32: the exponential of a rounded log-density would be noise."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _before(log_density: Tensor | None, log_noise: Tensor, alone: bool) -> Tensor | None:
    return None if log_density is None else log_mean_everywhere((_wide(log_density) - log_noise).detach(), alone)[0]


def _checked(summary: Tensor, log_density: Tensor, log_noise: Tensor, name: str) -> Tensor:
    """Return what summarises the noise, once it is known to be finite; a NaN of the model itself passes, and the loop names it."""
    if not summary.is_cpu:
        # Without waiting for the device: NaN, which the loop reports at its next look.
        return torch.where(torch.isinf(summary), torch.nan, summary)
    if math.isinf(summary.item()):
        _explain(log_density, log_noise, name)
    return summary


def _explain(log_density: Tensor, log_noise: Tensor, name: str) -> None:
    outside = int(torch.isneginf(log_noise).sum())
    if outside:
        raise QuantityError(
            f"{name}: drawn_log_noise is -inf at {outside} of {len(log_noise)} points that the noise itself drew: its log_prob and its "
            "sample do not belong to one distribution. Correct log_prob, or the support."
        )
    if bool(torch.isneginf(log_density).all()):
        raise QuantityError(
            f"{name}: drawn_log_density is -inf at all {len(log_density)} points of the noise: the model gives no mass where the noise is, "
            "so its normaliser cannot be seen. Fit the noise to the data, or give the model wider support."
        )
