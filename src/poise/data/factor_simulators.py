"""Data with known factors: what supervised dictionary learning should find, and where ordinary factorisation misleads.

filter_model       x = W h + noise,  P(y = c) from  beta' W' x + Gamma' z
feature_model      x = W h + noise,  P(y = c) from  beta' h + Gamma' z
two_bases          features from one set of images, labels from another
third_direction    features of large variance in two directions, the label on a third
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.errors import InputError

__all__ = ["FactorData", "feature_model", "filter_model", "third_direction", "two_bases"]


@dataclass(frozen=True)
class FactorData:
    """Samples and the factors behind them.

    Attributes:
        x: float64 [n, p].
        y: int64 [n].
        covariates: float64 [n, q], or None.
        dictionary: W* [p, r].
        codes: H* [r, n].
        coefficients: beta* [r, kappa].
        covariate_coefficients: Gamma* [q, kappa], or None.
    """

    x: Tensor
    y: Tensor
    covariates: Tensor | None
    dictionary: Tensor
    codes: Tensor
    coefficients: Tensor
    covariate_coefficients: Tensor | None


def filter_model(
    samples: int,
    features: int,
    rank: int,
    *,
    classes: int = 2,
    covariates: int = 0,
    noise: float = 0.5,
    size: float = 3.0,
    seed: int = 0,
) -> FactorData:
    """Draw from the filter model.

    Args:
        samples, features, rank, classes, covariates: n, p, r, kappa + 1, q.
        noise: standard deviation of what is added to `W h`.
        size: standard deviation of the logits.
        seed: of everything.

    >>> filter_model(50, 8, 2).x.shape
    torch.Size([50, 8])
    """
    return _drawn(True, samples, features, rank, classes, covariates, noise, size, seed)


def feature_model(
    samples: int,
    features: int,
    rank: int,
    *,
    classes: int = 2,
    covariates: int = 0,
    noise: float = 0.5,
    size: float = 3.0,
    seed: int = 0,
) -> FactorData:
    """Draw from the feature model; arguments as for `filter_model`."""
    return _drawn(False, samples, features, rank, classes, covariates, noise, size, seed)


def _drawn(
    filters: bool, n: int, p: int, rank: int, classes: int, q: int, noise: float, size: float, seed: int
) -> FactorData:
    if min(n, p, rank) < 1 or classes < 2 or rank > min(n, p):
        raise InputError(
            f"A factor model needs samples and features, a rank up to the smaller of them and two classes, "
            f"got n = {n}, p = {p}, r = {rank}, {classes} classes."
        )
    g = torch.Generator().manual_seed(seed)
    w = torch.linalg.qr(_normal(g, p, rank))[0]
    h = 3.0 * _normal(g, rank, n)
    x = w @ h + noise * _normal(g, p, n)
    beta = _normal(g, rank, classes - 1)
    seen = w.mT @ x if filters else h
    beta = beta * size / (beta.mT @ seen).std(1)
    z, gamma, logits = None, None, beta.mT @ seen
    if q:
        z, gamma = _normal(g, n, q), _normal(g, q, classes - 1)
        logits = logits + gamma.mT @ z.mT
    return FactorData(x.mT, _labels(logits, g), z, w, h, beta, gamma)


def two_bases(
    images: Tensor, labels: Tensor, *, samples: int = 500, features_from: tuple[int, ...] = (2, 5), labels_from: tuple[int, ...] = (4, 7),
    each: int = 10, noise: float = 0.5, seed: int = 0,
) -> FactorData:  # fmt: skip
    """Features from images of some classes, labels from those of others: the paper's semi-synthetic study.

        x = W_x h + noise,   W_x `each` images of every class in `features_from`,   h uniform
        P(y = 1) from the centred  beta' W_y' W_x h,   W_y images of `labels_from`, beta 1 for the first class and -1 for the second

    Args:
        images: float [m, p].
        labels: int64 [m].
        samples: n.
        features_from, labels_from: classes; two of the latter.
        each: images of a class.
        noise: standard deviation.
        seed: of everything.

    Source: arXiv:2206.06774, section on semi-synthetic MNIST, and the authors' generator.
    """
    if len(labels_from) != 2:
        raise InputError(f"two_bases: labels come from two classes, and labels_from is {labels_from}.")
    g = torch.Generator().manual_seed(seed)
    images = images.double()

    def basis(classes: tuple[int, ...]) -> Tensor:
        picked = []
        for c in classes:
            rows = (labels == c).nonzero()[:, 0]
            if len(rows) < each:
                raise InputError(f"two_bases: there are {len(rows)} images of class {c}, and each is {each}.")
            picked.append(images[rows[torch.randperm(len(rows), generator=g)[:each]]])
        return torch.cat(picked).mT

    w, other = basis(features_from), basis(labels_from)
    h = torch.rand(w.shape[1], samples, generator=g, dtype=torch.float64)
    signal = w @ h
    beta = torch.ones(other.shape[1], 1, dtype=torch.float64)
    beta[each:] = -1.0
    logits = beta.mT @ (other.mT @ signal)
    y = _labels(logits - logits.mean(), g)
    x = signal + noise * _normal(g, w.shape[0], samples)
    return FactorData(x.mT, y, None, w, h, beta, None)


def third_direction(
    samples: int = 500, features: int = 30, *, spread: float = 10.0, size: float = 4.0, seed: int = 0
) -> FactorData:
    """Two directions carry the variance, a third one the label.

        x = U diag(spread, spread, 1, ..., 1) normal,   P(y = 1) from  size * u_3' x

    A dictionary of two columns that looks at x alone misses the label.

    >>> third_direction(20, 5).coefficients.shape
    torch.Size([1, 1])
    """
    if features < 3:
        raise InputError(f"third_direction: there are {features} features, and it needs 3 at least.")
    g = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(_normal(g, features, features))[0]
    scale = torch.ones(features, dtype=torch.float64)
    scale[:2] = spread
    h = scale[:, None] * _normal(g, features, samples)
    x = u @ h
    return FactorData(
        x.mT, _labels(size * h[2:3], g), None, u[:, 2:3], h[2:3], torch.full((1, 1), size, dtype=torch.float64), None
    )


def _labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    p = torch.cat([torch.zeros_like(logits[:1]), logits]).softmax(0).mT
    y = torch.multinomial(p, 1, generator=generator)[:, 0]
    if len(torch.unique(y)) < 2 or not math.isfinite(float(logits.sum())):
        raise InputError("A factor model drew one class only; take more samples or smaller logits.")
    return y


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
