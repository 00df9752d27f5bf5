"""How far samples of a model are from data: the kernel distance and the Fréchet distance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from poise.errors import InputError

__all__ = ["FrechetDistance", "frechet_distance", "mmd"]


def mmd(x: Tensor, y: Tensor, bandwidths: Sequence[float] | None = None) -> float:
    """Return the squared maximum mean discrepancy under a sum of Gaussian kernels, unbiased; it may fall below 0 for equal distributions.

    Args:
        x, y: samples, float [n, ...] and [m, ...], at least two of each.
        bandwidths: of the kernels; by default 1/2, 1 and 2 times the median distance within both together.

    >>> mmd(torch.zeros(3, 1), torch.zeros(3, 1), bandwidths=(1.0,))
    0.0

    Source: Gretton et al. 2012, JMLR 13, lemma 6.
    """
    x, y = (v.flatten(1).double() for v in (x, y))
    if len(x) < 2 or len(y) < 2 or x.shape[1] != y.shape[1]:
        raise InputError(
            f"mmd: two samples of at least two points of one form; got {list(x.shape)} and {list(y.shape)}."
        )
    squares = torch.cdist(torch.cat([x, y]), torch.cat([x, y]), compute_mode="donot_use_mm_for_euclid_dist").square()
    if bandwidths is None:
        upper = torch.triu_indices(len(squares), len(squares), 1)
        middle = float(squares[upper[0], upper[1]].sqrt().median())
        bandwidths = [f * (middle or 1.0) for f in (0.5, 1.0, 2.0)]
    kernel = torch.stack([(-squares / (2 * b**2)).exp() for b in bandwidths]).mean(0)
    n, m = len(x), len(y)
    own = (kernel[:n, :n].sum() - n) / (n * (n - 1)) + (kernel[n:, n:].sum() - m) / (m * (m - 1))
    return float(own - 2 * kernel[:n, n:].mean())


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Return the squared Fréchet distance of two Gaussians with the samples' moments: |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)).

    Args:
        x, y: features, float [n, d] and [m, d]. With fewer examples than d it is biased upward.

    >>> round(frechet_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [5.0]])), 6)        # equal spread, means 3 apart
    9.0

    Source: Heusel et al., arXiv:1706.08500.
    """
    x, y = (v.flatten(1).double() for v in (x, y))
    if len(x) < 2 or len(y) < 2 or x.shape[1] != y.shape[1]:
        raise InputError(
            f"frechet_distance: two samples of at least two points of one form; got {list(x.shape)} and {list(y.shape)}."
        )
    one, other = (torch.cov(v.T).reshape(v.shape[1], v.shape[1]) for v in (x, y))
    # The eigenvalues of S S' are those of the symmetric S^(1/2) S' S^(1/2).
    values, vectors = torch.linalg.eigh(one)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0).sqrt().sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + one.trace() + other.trace() - 2 * cross)


class FrechetDistance:
    """The Fréchet distance in the features of a network of your own: FID with the usual Inception features, without shipping them.

    Args:
        features: maps a batch of images to features [n, d].
        data: the images to compare with, [n, ...]; their features are taken once.
        chunk: images a pass.

    >>> distance = FrechetDistance(lambda images: images.flatten(1), torch.tensor([[0.0], [2.0]]))
    >>> round(distance(torch.tensor([[3.0], [5.0]])), 6)
    9.0
    """

    def __init__(self, features: Callable[[Tensor], Tensor], data: Tensor, chunk: int = 256) -> None:
        self.features, self.chunk = features, chunk
        self.data = self._of(data)

    def __call__(self, samples: Tensor) -> float:
        """Return the distance of samples from the data."""
        return frechet_distance(self._of(samples), self.data)

    @torch.no_grad()
    def _of(self, images: Tensor) -> Tensor:
        return torch.cat([self.features(part).flatten(1) for part in torch.split(images, self.chunk)])
