"""How well a model that is known up to a constant fits: its normaliser by quadrature, by samples, by annealing, and likelihoods from it.

    found = ais_log_normalizer(model, noise)             # or importance_..., or quadrature_... in up to three dimensions
    nll = heldout_nll(model, x_test, found.value)
    score = auroc(model(x_in), model(x_out))             # out-of-distribution detection by -E(x); the normaliser cancels

A log-normaliser from samples is too small in expectation (Jensen), so a likelihood from it is too good: look at the effective sample size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise.errors import InputError
from poise.quadrature import midpoints

__all__ = [
    "LogNormalizer",
    "ais_log_normalizer",
    "auroc",
    "heldout_nll",
    "importance_log_normalizer",
    "quadrature_kl",
    "quadrature_log_normalizer",
]

LogDensity = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LogNormalizer:
    """An estimate of log Z.

    Attributes:
        value: nats.
        error: standard error of `value` by the delta method; 0 for quadrature.
        ess: effective number of samples behind it; the number of points for quadrature.
        method: "quadrature", "importance" or "annealed importance".
        accepted: share of accepted moves, for annealing.
    """

    value: float
    error: float
    ess: float
    method: str
    accepted: float | None = None


@torch.no_grad()
def quadrature_log_normalizer(log_density: LogDensity, low: Tensor, high: Tensor, cells: int = 200) -> LogNormalizer:
    """Integrate p~ over a box by the midpoint rule.

    Args:
        log_density: maps points [n, d] to log p~ [n].
        low, high: corners of the box, which must hold nearly all mass.
        cells: along each side.

    >>> found = quadrature_log_normalizer(lambda x: -0.5 * x.square().sum(-1), torch.full((1,), -8.0), torch.full((1,), 8.0))
    >>> round(found.value, 4)                                            # log sqrt(2 pi)
    0.9189
    """
    points, log_volume = midpoints(low, high, cells)
    log_p = _in_chunks(log_density, points).double()
    return LogNormalizer(float(torch.logsumexp(log_p, 0)) + log_volume, 0.0, float(len(points)), "quadrature")


@torch.no_grad()
def quadrature_kl(log_p: LogDensity, log_q: LogDensity, low: Tensor, high: Tensor, cells: int = 200) -> float:
    """Return KL(p || q) of two densities on a box, both known up to a constant, in nats.

    >>> low, high = torch.full((1,), -9.0), torch.full((1,), 9.0)
    >>> round(quadrature_kl(lambda x: -0.5 * x[:, 0] ** 2, lambda x: -0.5 * (x[:, 0] - 1) ** 2, low, high), 4)       # 1/2
    0.5
    """
    points, _ = midpoints(low, high, cells)
    both = [torch.log_softmax(_in_chunks(f, points).double(), 0) for f in (log_p, log_q)]
    p = both[0].exp()
    return float(torch.where(p > 0, p * (both[0] - both[1]), 0.0).sum())


@torch.no_grad()
def importance_log_normalizer(
    log_density: LogDensity, noise: Any, samples: int = 100_000, chunk: int = 10_000
) -> LogNormalizer:
    """Estimate log Z = log E_q[p~/q] by fresh samples of the noise.

    Args:
        log_density: maps points [n, ...] to log p~ [n].
        noise: `sample(n)` and `log_prob(x)`, as in `poise.parts.noise`.
        samples, chunk: how many, and how many at a time.
    """
    parts = []
    for start in range(0, samples, chunk):
        z = noise.sample(min(chunk, samples - start))
        parts.append((log_density(z) - noise.log_prob(z)).double())
    return _summary(torch.cat(parts), "importance")


def ais_log_normalizer(
    log_density: LogDensity,
    noise: Any,
    chains: int = 256,
    temperatures: int = 200,
    leapfrogs: int = 5,
    step: float = 0.1,
) -> LogNormalizer:
    """Estimate log Z by annealed importance sampling from the noise to the model, with Hamiltonian moves.

    p_b = q^(1-b) p~^b,   log w = sum over temperatures of (b_t - b_{t-1}) (log p~ - log q)(x_t)

    The size of a move adapts towards 65 % accepted moves between temperatures, which leaves a small bias that fades with their number.

    Args:
        log_density: maps points [n, ...] to log p~ [n], differentiable in the points.
        noise: `sample(n)` and `log_prob(x)`, differentiable in the points.
        chains: independent chains.
        temperatures: distributions between noise and model.
        leapfrogs: leapfrog steps of a move.
        step: size of the first leapfrog step, in units of the noise's overall standard deviation.

    Source: Neal 2001; arXiv:1206.1901 for the moves.
    """
    x = noise.sample(chains).detach()
    size = step * max(float(x.std()), 1e-12)
    betas = torch.linspace(0, 1, temperatures + 1, dtype=torch.float64).tolist()
    log_w = torch.zeros(chains, dtype=torch.float64, device=x.device)
    accepted = 0.0
    for before, beta in itertools.pairwise(betas):
        with torch.no_grad():
            log_w += (beta - before) * (log_density(x) - noise.log_prob(x)).double()
        x, share = _hamiltonian_move(_between(log_density, noise, beta), x, size, leapfrogs)
        size *= 1.03 if share > 0.65 else 0.97
        accepted += share / temperatures
    found = _summary(log_w, "annealed importance")
    return LogNormalizer(found.value, found.error, found.ess, found.method, accepted)


def _between(log_density: LogDensity, noise: Any, beta: float) -> LogDensity:
    def log_p(x: Tensor) -> Tensor:
        mixed: Tensor = beta * log_density(x) + (1 - beta) * noise.log_prob(x)
        return mixed

    return log_p


def _hamiltonian_move(log_p: LogDensity, x: Tensor, size: float, leapfrogs: int) -> tuple[Tensor, float]:
    def slope(at: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            at = at.detach().requires_grad_()
            value = log_p(at)
            (g,) = torch.autograd.grad(value.sum(), at)
        return value.detach(), g

    momentum = torch.randn_like(x)
    value, g = slope(x)
    start = value - 0.5 * momentum.square().flatten(1).sum(1)
    y = x
    for _ in range(leapfrogs):
        momentum = momentum + 0.5 * size * g
        y = y + size * momentum
        value, g = slope(y)
        momentum = momentum + 0.5 * size * g
    end = value - 0.5 * momentum.square().flatten(1).sum(1)
    take = torch.rand_like(start).log() < end - start
    return torch.where(take.view(-1, *[1] * (x.ndim - 1)), y, x), float(take.double().mean())


@torch.no_grad()
def heldout_nll(log_density: LogDensity, x: Tensor, log_normalizer: float | LogNormalizer) -> float:
    """Return -mean log p~(x) + log Z, nats.

    >>> heldout_nll(lambda x: -0.5 * x[:, 0] ** 2, torch.zeros(1, 1), 0.9)
    0.9
    """
    log_z = log_normalizer.value if isinstance(log_normalizer, LogNormalizer) else log_normalizer
    return log_z - float(_in_chunks(log_density, x).double().mean())


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Return the chance that a point inside scores higher than one outside; ties count one half.

    Args:
        inside, outside: scores [n] and [m], such as -E(x).

    >>> auroc(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 2.0]))
    0.875
    """
    if not (len(inside) and len(outside)):
        raise InputError("auroc: both sides need at least one score.")
    both, place, count = torch.unique(torch.cat([inside, outside]).double(), return_inverse=True, return_counts=True)
    if bool(torch.isnan(both).any()):
        raise InputError("auroc: a score is NaN, and its rank is not defined.")
    # The middle rank of every distinct score.
    rank = (count.cumsum(0) - 0.5 * (count - 1))[place[: len(inside)]]
    n, m = len(inside), len(outside)
    return float((rank.sum() - n * (n + 1) / 2) / (n * m))


def _summary(log_w: Tensor, method: str) -> LogNormalizer:
    n = len(log_w)
    total = torch.logsumexp(log_w, 0)
    ess = float((2 * total - torch.logsumexp(2 * log_w, 0)).exp())
    error = math.sqrt(max(0.0, 1 / ess - 1 / n)) if ess > 0 else math.inf
    return LogNormalizer(float(total) - math.log(n), error, ess, method)


def _in_chunks(log_density: LogDensity, points: Tensor, chunk: int = 20_000) -> Tensor:
    return torch.cat([log_density(part) for part in torch.split(points, chunk)])
