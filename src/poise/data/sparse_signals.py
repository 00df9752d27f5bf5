"""Sparse signals and their measurements: drawn ones, and patches of photographs in an overcomplete cosine dictionary.

    y = A x + v,   x_i = b_i g_i  with b_i ~ Bernoulli(p), g_i ~ N(0, 1),   v ~ N(0, noise^2)

Samplers are called as `sampler(size, generator)` and draw from the generator alone, so equal seeds give equal batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poise.errors import InputError

__all__ = ["BernoulliGaussian", "ImagePatches", "Measurements", "gaussian_matrix", "overcomplete_cosines"]


class Measurements(NamedTuple):
    """One batch of recovery problems.

    Attributes:
        operator: A, `[m, n]` or `[batch, m, n]`.
        y: measurements, `[batch, m]`.
        x: the signals, `[batch, n]`, or None where nobody knows them.
        labelled: bool `[batch]`, the signals that a loss may look at; None for all.
    """

    operator: Any
    y: Tensor
    x: Tensor | None = None
    labelled: Tensor | None = None


def gaussian_matrix(
    m: int,
    n: int,
    generator: torch.Generator | None = None,
    *,
    batch: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw a matrix with entries N(0, 1/m), so that columns have length 1 on average; complex entries have that variance too.

    Args:
        m, n: measurements, and entries of a signal.
        generator: where it is drawn; None draws from seed 0.
        batch: a matrix for each of so many signals, `[batch, m, n]`.
        dtype: float or complex.

    >>> gaussian_matrix(3, 5).shape
    torch.Size([3, 5])
    """
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    shape = (m, n) if batch is None else (batch, m, n)
    return torch.randn(shape, generator=generator, dtype=dtype) / math.sqrt(m)


@dataclass(frozen=True)
class BernoulliGaussian:
    """Bernoulli-Gaussian signals under a Gaussian matrix.

    Args:
        m, n: measurements, and entries of a signal.
        p: probability that an entry is not 0, in (0, 1].
        noise: standard deviation of the noise on each measurement, >= 0; of a complex one, of its modulus.
        snr: in decibels, in place of `noise`: `10 log10(||A x||^2 / ||v||^2)` of every signal, exactly.
        matrix: "fixed" is one matrix drawn from `matrix_seed`, "batch" a new one for every batch, "signal" one for every signal.
        matrix_seed: of the fixed matrix.
        labelled: share of the signals that a supervised loss may look at, in [0, 1].
        dtype: float or complex.

    Raises:
        InputError: an argument out of range.

    >>> batch = BernoulliGaussian(4, 8)(3, torch.Generator().manual_seed(0))
    >>> batch.y.shape, batch.x.shape
    (torch.Size([3, 4]), torch.Size([3, 8]))
    """

    m: int
    n: int
    p: float = 0.08
    noise: float = 0.03
    snr: float | None = None
    matrix: str = "fixed"
    matrix_seed: int = 0
    labelled: float = 1.0
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.m < 1 or self.n < 1:
            raise InputError(f"BernoulliGaussian: m and n must be at least 1, and they are {self.m} and {self.n}.")
        if not 0 < self.p <= 1:
            raise InputError(f"BernoulliGaussian: p is a probability above 0, and it is {self.p}.")
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise InputError(f"BernoulliGaussian: noise must be finite and at least 0, and it is {self.noise}.")
        if self.snr is not None and not math.isfinite(self.snr):
            raise InputError(f"BernoulliGaussian: snr is in decibels, finite, and it is {self.snr}.")
        if self.matrix not in ("fixed", "batch", "signal"):
            raise InputError(f"BernoulliGaussian: matrix is 'fixed', 'batch' or 'signal', and it is {self.matrix!r}.")
        if not 0 <= self.labelled <= 1:
            raise InputError(f"BernoulliGaussian: labelled is a share in [0, 1], and it is {self.labelled}.")
        fixed = None
        if self.matrix == "fixed":
            fixed = gaussian_matrix(self.m, self.n, torch.Generator().manual_seed(self.matrix_seed), dtype=self.dtype)
        object.__setattr__(self, "_fixed", fixed)

    def __call__(self, size: int, generator: torch.Generator) -> Measurements:
        kinds = self.dtype
        amplitude = torch.randn(size, self.n, generator=generator, dtype=kinds)
        x = amplitude * (torch.rand(size, self.n, generator=generator) < self.p)
        noise = torch.randn(size, self.m, generator=generator, dtype=kinds)
        known = torch.rand(size, generator=generator) < self.labelled
        A = self._matrix(size, generator)
        clean = x @ A.mT if A.ndim == 2 else (A @ x[..., None])[..., 0]
        if self.snr is None:
            v = self.noise * noise
        else:
            level = torch.linalg.vector_norm(clean, dim=-1, keepdim=True) * 10 ** (-self.snr / 20)
            v = level * noise / torch.linalg.vector_norm(noise, dim=-1, keepdim=True)
        return Measurements(A, clean + v, x, None if self.labelled == 1 else known)

    def _matrix(self, size: int, generator: torch.Generator) -> Tensor:
        if self.matrix == "fixed":
            return self._fixed  # type: ignore[attr-defined, no-any-return]
        # drawn last, so that signals and noise are those of the sampler with a fixed matrix
        return gaussian_matrix(
            self.m, self.n, generator, batch=size if self.matrix == "signal" else None, dtype=self.dtype
        )

    def changed(self, **changes: Any) -> BernoulliGaussian:
        """Return the sampler with other settings, on the same matrix where m, n and its seed stay."""
        return replace(self, **changes)


def overcomplete_cosines(side: int = 8, atoms: int = 16) -> Tensor:
    """Return the overcomplete cosine dictionary of square patches, `[side^2, atoms^2]`, columns of length 1.

    d_k(i) = cos((i + 1/2) k pi / atoms), its mean taken off for k > 0; atoms of patches are products along both axes

    Args:
        side: of a patch, in pixels.
        atoms: along one axis, at least `side`; equal is the orthonormal cosine transform.

    >>> overcomplete_cosines(8, 16).shape
    torch.Size([64, 256])
    """
    if atoms < side:
        raise InputError(f"overcomplete_cosines: atoms must be at least side = {side}, and it is {atoms}.")
    i = torch.arange(side, dtype=torch.float64)[:, None] + 0.5
    k = torch.arange(atoms, dtype=torch.float64)[None]
    line = torch.cos(i * k * math.pi / atoms)
    line[:, 1:] -= line[:, 1:].mean(0)
    line = line / torch.linalg.vector_norm(line, dim=0)
    return torch.kron(line, line).float()


class ImagePatches:
    """Square patches of photographs without their mean, measured through a matrix: `y = M patch + v`, `A = M D`.

    Nobody knows the sparse code of a patch, so `x` is None and training is by the objective; the patch itself is `M^-1` of nothing but the
    reconstruction `D x`, which `patches` gives for comparison.

    Args:
        images: grey images `[height, width]` in [0, 1]; scikit-learn's two sample photographs by default.
        side, atoms: of `overcomplete_cosines`.
        measurements: rows of a Gaussian M; None measures the patch itself.
        noise: standard deviation on each measurement.
        seed: of M.

    >>> ImagePatches([torch.rand(32, 32)], side=4, atoms=6)(5, torch.Generator().manual_seed(0)).y.shape
    torch.Size([5, 16])
    """

    def __init__(
        self,
        images: list[Tensor] | None = None,
        side: int = 8,
        atoms: int = 16,
        measurements: int | None = None,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.images = _photographs() if images is None else [image.float() for image in images]
        if not self.images or any(image.ndim != 2 or min(image.shape) < side for image in self.images):
            raise InputError(
                f"ImagePatches: images are grey, [height, width], and at least {side} pixels high and wide."
            )
        self.side, self.noise = side, noise
        self.dictionary = overcomplete_cosines(side, atoms)
        if measurements is None:
            self.measure, self.operator = None, self.dictionary
        else:
            self.measure = gaussian_matrix(measurements, side * side, torch.Generator().manual_seed(seed))
            self.operator = self.measure @ self.dictionary

    def patches(self, size: int, generator: torch.Generator) -> Tensor:
        """Draw patches without their mean, `[size, side^2]`."""
        which = torch.randint(len(self.images), (size,), generator=generator).tolist()
        places = torch.rand(size, 2, generator=generator).tolist()
        rows = []
        for image, (down, right) in zip(which, places, strict=True):
            height, width = self.images[image].shape
            top, left = int(down * (height - self.side + 1)), int(right * (width - self.side + 1))
            rows.append(self.images[image][top : top + self.side, left : left + self.side].reshape(-1))
        drawn = torch.stack(rows)
        return drawn - drawn.mean(1, keepdim=True)

    def __call__(self, size: int, generator: torch.Generator) -> Measurements:
        drawn = self.patches(size, generator)
        clean = drawn if self.measure is None else drawn @ self.measure.mT
        return Measurements(self.operator, clean + self.noise * torch.randn(clean.shape, generator=generator))


def _photographs() -> list[Tensor]:
    from sklearn.datasets import load_sample_images

    return [torch.from_numpy(image.astype("float32")).mean(-1) / 255 for image in load_sample_images().images]
