"""Linear maps of measurement: what an image goes through before it is seen.

    A = Blur(gaussian_kernel(5, 1.0), (1, 32, 32))
    v = A(x) + noise                     # [batch, ...]
    A.adjoint(v)                         # <A x, v> = <x, A' v>, exactly
    A.norm_squared                       # ||A'A||, an upper bound: steps below 1 / norm_squared are safe

All take and return batches; every adjoint is exact up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from poise.errors import InputError

__all__ = ["Blur", "CompressedSensing", "LinearMap", "Mask", "Matrix", "Radon", "gaussian_kernel"]


class LinearMap:
    """A linear map of the examples of a batch, with its adjoint; the base of those below and of your own.

    Attributes:
        shape: of one example.
        measured: the shape of what comes out.
    """

    shape: tuple[int, ...]
    measured: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Return A x, [batch, *measured]."""
        raise NotImplementedError(f"{type(self).__name__} must say what it measures")

    def adjoint(self, v: Tensor) -> Tensor:
        """Return A' v, [batch, *shape]."""
        raise NotImplementedError(f"{type(self).__name__} must say its adjoint")

    def normal(self, x: Tensor) -> Tensor:
        """Return A'A x."""
        return self.adjoint(self(x))

    @cached_property
    def norm_squared(self) -> float:
        """The largest eigenvalue of A'A, by power iteration in float64, with one percent on top since that comes from below."""
        x = torch.randn(1, *self.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        value = 0.0
        for _ in range(200):
            x = self.normal(x / x.norm())
            before, value = value, float(x.norm())
            if abs(value - before) <= 1e-4 * value:
                break
        return 1.01 * value

    def solve(self, right: Tensor, factor: float, weight: float) -> Tensor | None:
        """Return the solution of `(factor A'A + weight I) x = right` where the map has a closed form for it, else None."""
        return None

    def check(self, v: Tensor) -> None:
        """Refuse measurements of another shape."""
        if tuple(v.shape[1:]) != self.measured:
            raise InputError(
                f"{type(self).__name__}: measurements have the shape [batch, {', '.join(map(str, self.measured))}], got {list(v.shape)}."
            )


class Matrix(LinearMap):
    """A dense matrix applied to each example, flattened.

    Args:
        matrix: float [m, n].
        shape: of one example, of n numbers; (n,) where nothing is said.

    >>> Matrix(torch.tensor([[1.0, 1.0]]))(torch.tensor([[2.0, 3.0]]))
    tensor([[5.]])
    """

    def __init__(self, matrix: Tensor, shape: Sequence[int] | None = None) -> None:
        self.matrix = matrix
        self.shape = (matrix.shape[1],) if shape is None else tuple(shape)
        self.measured = (matrix.shape[0],)
        if matrix.dim() != 2 or math.prod(self.shape) != matrix.shape[1]:
            raise InputError(f"Matrix: {list(matrix.shape)} does not act on examples of the shape {list(self.shape)}.")

    def __call__(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.matrix.to(x).mT

    def adjoint(self, v: Tensor) -> Tensor:
        return (v @ self.matrix.to(v)).view(len(v), *self.shape)

    @cached_property
    def norm_squared(self) -> float:
        """The square of the largest singular value."""
        return float(torch.linalg.matrix_norm(self.matrix.double(), 2)) ** 2


class Mask(LinearMap):
    """Keep some pixels, or weigh them: inpainting.

    Args:
        mask: float or bool, of the shape of one example or broadcasting to it.
        shape: of one example; the mask's where nothing is said.
    """

    def __init__(self, mask: Tensor, shape: Sequence[int] | None = None) -> None:
        self.mask = mask
        self.shape = self.measured = tuple(mask.shape if shape is None else shape)

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.mask.to(x)

    def adjoint(self, v: Tensor) -> Tensor:
        return v * self.mask.to(v)

    def solve(self, right: Tensor, factor: float, weight: float) -> Tensor:
        """Divide pixel by pixel."""
        return right / (factor * self.mask.to(right).square() + weight)

    @cached_property
    def norm_squared(self) -> float:
        """The square of the largest weight."""
        return float(self.mask.double().abs().max()) ** 2


class Blur(LinearMap):
    """Convolve every channel with one kernel; the image keeps its size.

    Args:
        kernel: float [height, width], odd sizes.
        shape: channels, height, width.
        padding: "circular" or "zeros" beyond the edge.

    >>> Blur(torch.full((3, 3), 1 / 9), (1, 4, 4))(torch.ones(1, 1, 4, 4)).sum()
    tensor(16.)
    """

    def __init__(self, kernel: Tensor, shape: Sequence[int], padding: str = "circular") -> None:
        if kernel.dim() != 2 or kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
            raise InputError(f"Blur: the kernel is [height, width] with odd sizes, and it is {list(kernel.shape)}.")
        if padding not in ("circular", "zeros"):
            raise InputError(f"Blur: padding is 'circular' or 'zeros', and it is {padding!r}.")
        self.kernel, self.shape, self.padding = kernel, tuple(shape), padding
        self.measured = self.shape
        if len(self.shape) != 3 or min(s - k // 2 for s, k in zip(self.shape[1:], kernel.shape, strict=True)) < 1:
            raise InputError(
                f"Blur: images are [channels, height, width] and at least half as large as the kernel; got {list(self.shape)}."
            )

    def __call__(self, x: Tensor) -> Tensor:
        # PyTorch's convolution is a correlation; a kernel is turned for it.
        return self._correlate(x, self.kernel.flip(0, 1))

    def adjoint(self, v: Tensor) -> Tensor:
        return self._correlate(v, self.kernel)

    def solve(self, right: Tensor, factor: float, weight: float) -> Tensor | None:
        """Divide frequency by frequency, where the image goes on beyond its edge."""
        if self.padding != "circular":
            return None
        found: Tensor = torch.fft.irfft2(
            torch.fft.rfft2(right) / (factor * self._power.to(right) + weight), s=right.shape[-2:]
        )
        return found

    @cached_property
    def _power(self) -> Tensor:
        """The squared modulus of the kernel at each frequency, float64."""
        point = torch.zeros(1, *self.shape, dtype=torch.float64)
        point[..., 0, 0] = 1.0
        power: Tensor = torch.fft.rfft2(self(point)).abs().square()
        return power

    def _correlate(self, x: Tensor, kernel: Tensor) -> Tensor:
        height, width = kernel.shape
        mode = "circular" if self.padding == "circular" else "constant"
        padded = F.pad(x, (width // 2, width // 2, height // 2, height // 2), mode=mode)
        weight = kernel.to(x)[None, None].expand(x.shape[1], 1, -1, -1)
        return F.conv2d(padded, weight, groups=x.shape[1])

    @cached_property
    def norm_squared(self) -> float:
        """The square of the sum of absolute weights: exact for circular blurs without negative weights, else from above."""
        return float(self.kernel.double().abs().sum()) ** 2


def gaussian_kernel(size: int, sigma: float) -> Tensor:
    """Return a Gaussian bell of `size` by `size` pixels that adds up to 1, float64.

    >>> gaussian_kernel(3, 1.0).shape
    torch.Size([3, 3])
    """
    if size % 2 == 0 or not sigma > 0:
        raise InputError(f"gaussian_kernel: the size is odd and sigma positive; they are {size} and {sigma}.")
    place = torch.arange(size, dtype=torch.float64) - size // 2
    bell = torch.exp(-0.5 * (place / sigma) ** 2)
    return torch.outer(bell, bell) / bell.sum() ** 2


class CompressedSensing(LinearMap):
    """Few random measurements: m rows of `H diag(signs)`, H the orthonormal Hartley transform over height and width.

    The rows are orthonormal, `A A' = I`, so `||A'A|| = 1`; nothing of the size of a matrix is held.

    Args:
        shape: channels, height, width.
        measurements: m, at most the numbers of one example.
        seed: of signs and rows.
    """

    def __init__(self, shape: Sequence[int], measurements: int, seed: int = 0) -> None:
        self.shape = tuple(shape)
        numbers = math.prod(self.shape)
        if not 1 <= measurements <= numbers:
            raise InputError(f"CompressedSensing: measurements lie in [1, {numbers}], and there are {measurements}.")
        generator = torch.Generator().manual_seed(seed)
        self.measured = (measurements,)
        self.signs = 2.0 * torch.randint(0, 2, self.shape, generator=generator) - 1.0
        self.rows = torch.randperm(numbers, generator=generator)[:measurements].sort().values

    def __call__(self, x: Tensor) -> Tensor:
        return _hartley(x * self.signs.to(x)).flatten(1)[:, self.rows.to(x.device)]

    def adjoint(self, v: Tensor) -> Tensor:
        whole = v.new_zeros(len(v), math.prod(self.shape))
        whole[:, self.rows.to(v.device)] = v
        return _hartley(whole.view(-1, *self.shape)) * self.signs.to(v)

    def solve(self, right: Tensor, factor: float, weight: float) -> Tensor:
        """Shrink what is measured: A'A is a projection."""
        return right / weight - factor / (weight * (weight + factor)) * self.normal(right)

    @cached_property
    def norm_squared(self) -> float:
        """1: the rows are orthonormal."""
        return 1.0


def _hartley(x: Tensor) -> Tensor:
    """Return the orthonormal Hartley transform over the last two dimensions, its own inverse and adjoint."""
    spectrum = torch.fft.fft2(x, norm="ortho")
    found: Tensor = spectrum.real - spectrum.imag
    return found


class Radon(LinearMap):
    """Line integrals of a square image under parallel beams: tomography.

    The image is turned about its centre with bilinear interpolation and summed along its columns, for each angle. What lies outside the
    inscribed circle is cut off by the turn, as in a scanner.

    Args:
        size: side of the image, one channel: examples are [1, size, size].
        angles: degrees; or how many between 0 and 180.
    """

    def __init__(self, size: int, angles: int | Tensor = 30) -> None:
        if isinstance(angles, int):
            if angles < 1:
                raise InputError(f"Radon: there is at least one angle, and there are {angles}.")
            angles = torch.arange(angles, dtype=torch.float64) * (180.0 / angles)
        self.size, self.angles = size, angles.double()
        self.shape, self.measured = (1, size, size), (len(angles), size)
        self.matrix = self._matrix()
        self._kept: tuple[Tensor, Tensor] | None = None

    def _matrix(self) -> Tensor:
        """Return the whole map as a sparse matrix [angles * size, size^2], float64: each ray's bilinear weights."""
        n = self.size
        centre = n // 2
        line = torch.arange(n, dtype=torch.float64) - centre
        rows, columns, weights = [], [], []
        for number, angle in enumerate(torch.deg2rad(self.angles)):
            c, s = torch.cos(angle), torch.sin(angle)
            # Detector t and depth d lie at column c t + s d and row c d - s t of the image.
            x = c * line[None, :] + s * line[:, None] + centre
            y = c * line[:, None] - s * line[None, :] + centre
            detector = torch.arange(n).expand(n, n)
            for dx in (0, 1):
                for dy in (0, 1):
                    column, row = x.floor() + dx, y.floor() + dy
                    weight = (1 - (x - column).abs()) * (1 - (y - row).abs())
                    inside = (column >= 0) & (column < n) & (row >= 0) & (row < n) & (weight > 0)
                    rows.append(number * n + detector[inside])
                    columns.append((row * n + column)[inside].long())
                    weights.append(weight[inside])
        place = torch.stack([torch.cat(rows), torch.cat(columns)])
        found = torch.sparse_coo_tensor(
            place, torch.cat(weights), (len(self.angles) * n, n * n), check_invariants=False
        )
        return found.coalesce()

    def __call__(self, x: Tensor) -> Tensor:
        return (self._at(x)[0] @ x.flatten(1).mT).mT.reshape(len(x), *self.measured)

    def adjoint(self, v: Tensor) -> Tensor:
        return (self._at(v)[1] @ v.flatten(1).mT).mT.reshape(len(v), *self.shape)

    def _at(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the matrix and its transpose in a tensor's precision, on its device; those of the last call are kept."""
        kept = self._kept
        if kept is None or kept[0].dtype != like.dtype or kept[0].device != like.device:
            matrix = self.matrix.to(like)
            self._kept = kept = (matrix, matrix.t().coalesce())
        return kept

    def back_projection(self, v: Tensor) -> Tensor:
        """Return the filtered back projection of v, [batch, 1, size, size]: where tomography starts."""
        length = max(64, 2 ** math.ceil(math.log2(2 * self.size)))
        filtered = torch.fft.rfft(v, n=length, dim=-1) * _ramp(length).to(v)
        sharp = torch.fft.irfft(filtered, n=length, dim=-1)[..., : self.size]
        found: Tensor = self.adjoint(sharp) * (math.pi / (2 * len(self.angles)))
        return found


def _ramp(length: int) -> Tensor:
    """Return the ramp filter in frequency, made from its band-limited form on the line so that its mean is right."""
    place = torch.fft.fftfreq(length, 1 / length, dtype=torch.float64).round()
    kernel = torch.where(place % 2 == 1, -1.0 / (math.pi * place) ** 2, 0.0)
    kernel[0] = 0.25
    found: Tensor = 2.0 * torch.fft.rfft(kernel).real
    return found
