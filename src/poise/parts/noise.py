"""Distributions to draw from and to weigh by: the noise of `unnormalized_nll` and `nce`.

A noise has `sample(n)` and `log_prob(x)`. It must reach wherever the model puts mass, and it should be little wider: the relative variance
of p~/q under q is chi^2(p || q), which is exp(theta^2) - 1 already for two unit Gaussians at distance theta. So fit it to the data:

    noise = KDENoise.fit(data)                     # or GaussianNoise.fit, FullGaussianNoise.fit, BoxNoise.fit, MixtureNoise.fit
    noise = MixedNoise([KDENoise.fit(data), GaussianNoise.fit(data, scale=2.0)], (0.9, 0.1))     # with a tail for safety
    noise = as_noise(torch.distributions.Laplace(loc, scale))                                    # or a normalising flow
    noise = GridNoise(low, high, 100)              # every point of a grid, once: quadrature in the place of sampling

`sample` draws from PyTorch's default generator, which a run seeds for each step. Points have the form of the data: a batch of images
gives and takes images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import InputError
from poise.quadrature import midpoints

__all__ = [
    "BoxNoise",
    "EnumerationNoise",
    "FlowNoise",
    "FullGaussianNoise",
    "GaussianNoise",
    "GridNoise",
    "KDENoise",
    "MixedNoise",
    "MixtureNoise",
    "as_noise",
]

_LOG_2PI = math.log(2 * math.pi)


class _Noise(nn.Module):
    """A distribution over points of one form; its numbers are buffers, so that it moves and saves with what holds it."""

    shape: tuple[int, ...]

    def sample(self, n: int) -> Tensor:
        """Return `n` points, [n, ...], without gradient."""
        raise NotImplementedError

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log q of points [n, ...], [n]; differentiable in the points."""
        raise NotImplementedError

    def _flat(self, x: Tensor) -> Tensor:
        if x.shape[1:] != self.shape:
            raise InputError(
                f"{type(self).__name__}: points have the form {list(self.shape)}, and these have {list(x.shape[1:])}."
            )
        return x.flatten(1)

    def _formed(self, flat: Tensor) -> Tensor:
        return flat.view(len(flat), *self.shape)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'x'.join(map(str, self.shape))})"


class GaussianNoise(_Noise):
    """A Gaussian with a variance for each number of a point.

    Args:
        mean: of a point, float [...].
        std: standard deviations, of the same form, or one number; positive.

    >>> GaussianNoise(torch.zeros(2), 1.0).log_prob(torch.zeros(1, 2))               # -log 2 pi
    tensor([-1.8379])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor | float) -> None:
        super().__init__()
        std = torch.as_tensor(std, dtype=mean.dtype, device=mean.device).expand_as(mean).clone()
        if not bool((std > 0).all()):
            raise InputError(
                f"GaussianNoise: standard deviations are positive; the smallest is {float(std.min()):.4g}."
            )
        self.shape = tuple(mean.shape)
        self.register_buffer("mean", mean.flatten().clone())
        self.register_buffer("std", std.flatten())

    @classmethod
    def fit(cls, data: Tensor, scale: float = 1.0, floor: float = 1e-3) -> GaussianNoise:
        """Fit mean and standard deviations.

        Args:
            data: float [n, ...].
            scale: factor of the standard deviations; a little above 1 covers the tails.
            floor: smallest standard deviation, as a share of the largest, for numbers that never change.
        """
        _need("GaussianNoise", data)
        std = scale * data.std(0)
        return cls(data.mean(0), std.clamp(min=max(float(std.max()) * floor, 1e-12)))

    def sample(self, n: int) -> Tensor:
        """Return `n` points, [n, ...]."""
        e = torch.randn(n, len(self.mean), dtype=self.mean.dtype, device=self.mean.device)
        return self._formed(self.mean + self.std * e)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log q, [n]."""
        z = (self._flat(x) - self.mean) / self.std
        return -0.5 * z.square().sum(1) - self.std.log().sum() - 0.5 * len(self.mean) * _LOG_2PI


class FullGaussianNoise(_Noise):
    """A Gaussian with any covariance.

    Args:
        mean: of a point, float [...].
        covariance: float [d, d] over the numbers of a point in row-major order, positive definite.
    """

    mean: Tensor
    factor: Tensor

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        super().__init__()
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if int(failed):
            raise InputError(
                "FullGaussianNoise: the covariance is not positive definite. Fit it to more examples than dimensions, or with "
                "shrinkage=0.1."
            )
        self.shape = tuple(mean.shape)
        self.register_buffer("mean", mean.flatten().clone())
        self.register_buffer("factor", factor)

    @classmethod
    def fit(cls, data: Tensor, scale: float = 1.0, shrinkage: float = 1e-3) -> FullGaussianNoise:
        """Fit mean and covariance.

        Args:
            data: float [n, ...].
            scale: factor of the standard deviations.
            shrinkage: share of the mean variance times the identity in the covariance, in [0, 1].
        """
        _need("FullGaussianNoise", data)
        flat = data.flatten(1)
        covariance = torch.cov(flat.T).reshape(flat.shape[1], flat.shape[1])
        round_one = covariance.diagonal().mean() * torch.eye(len(covariance), dtype=data.dtype, device=data.device)
        return cls(data.mean(0), scale**2 * torch.lerp(covariance, round_one, shrinkage))

    def sample(self, n: int) -> Tensor:
        """Return `n` points, [n, ...]."""
        e = torch.randn(n, len(self.mean), dtype=self.mean.dtype, device=self.mean.device)
        return self._formed(self.mean + e @ self.factor.T)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log q, [n]."""
        z = torch.linalg.solve_triangular(self.factor, (self._flat(x) - self.mean).T, upper=False)
        log_q: Tensor = -0.5 * z.square().sum(0) - self.factor.diagonal().log().sum() - 0.5 * len(self.mean) * _LOG_2PI
        return log_q


class MixtureNoise(_Noise):
    """A mixture of Gaussians, each with a variance for each number of a point.

    Args:
        centres: float [k, ...].
        std: standard deviations: [k, ...], [...] for all alike, or one number; positive.
        weights: [k], positive; equal where nothing is said.
    """

    centres: Tensor
    std: Tensor
    log_weights: Tensor

    def __init__(self, centres: Tensor, std: Tensor | float, weights: Tensor | None = None) -> None:
        super().__init__()
        k = len(centres)
        std = torch.as_tensor(std, dtype=centres.dtype, device=centres.device)
        if not bool((std > 0).all()):
            raise InputError(
                f"{type(self).__name__}: standard deviations are positive; the smallest is {float(std.min()):.4g}."
            )
        weights = centres.new_ones(k) if weights is None else weights.to(centres)
        if weights.shape != (k,) or not bool((weights > 0).all()):
            raise InputError(f"{type(self).__name__}: weights are positive, one for each of the {k} centres.")
        self.shape = tuple(centres.shape[1:])
        self.alike = std.ndim < centres.ndim
        """Whether one kernel serves all centres."""
        flat = std.expand(self.shape).reshape(1, -1) if self.alike else std.expand_as(centres).flatten(1)
        self.register_buffer("centres", centres.flatten(1).clone())
        self.register_buffer("std", flat.clone())
        self.register_buffer("log_weights", (weights / weights.sum()).log())

    @classmethod
    def fit(cls, data: Tensor, components: int = 10, scale: float = 1.0, seed: int = 0) -> MixtureNoise:
        """Fit a mixture by expectation-maximisation (scikit-learn's).

        Args:
            data: float [n, ...].
            components: Gaussians, at most n.
            scale: factor of the standard deviations.
            seed: of the start.
        """
        _need("MixtureNoise", data)
        from sklearn.mixture import GaussianMixture

        found = GaussianMixture(components, covariance_type="diag", random_state=seed).fit(
            data.flatten(1).cpu().numpy()
        )
        centres, variances, weights = (
            torch.as_tensor(v).to(data) for v in (found.means_, found.covariances_, found.weights_)
        )
        form = (components, *data.shape[1:])
        return cls(centres.view(form), scale * variances.sqrt().view(form), weights)

    def sample(self, n: int) -> Tensor:
        """Return `n` points, [n, ...]."""
        which = torch.multinomial(self.log_weights.exp(), n, replacement=True)
        centres = self.centres[which]
        return self._formed(centres + self.std[0 if self.alike else which] * torch.randn_like(centres))

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log q, [n]."""
        flat = self._flat(x)
        if self.alike:
            # Without the product of matrices, whose rounding the exponential would show.
            squares = torch.cdist(
                flat / self.std, self.centres / self.std, compute_mode="donot_use_mm_for_euclid_dist"
            ).square()
        else:
            squares = ((flat[:, None] - self.centres) / self.std).square().sum(-1)
        scale = self.std.log().sum(1) + 0.5 * flat.shape[1] * _LOG_2PI
        return torch.logsumexp(self.log_weights - scale - 0.5 * squares, 1)


class KDENoise(MixtureNoise):
    """A Gaussian kernel on every example: data times N(0, sigma^2), the practical noise for images.

    Args:
        centres: float [k, ...], the examples.
        bandwidth: standard deviation of the kernel: a number, or one for each number of a point.
    """

    def __init__(self, centres: Tensor, bandwidth: Tensor | float) -> None:
        super().__init__(centres, bandwidth)

    @classmethod
    def fit(  # type: ignore[override]
        cls, data: Tensor, bandwidth: float | None = None, scale: float = 1.0, most: int = 1000, seed: int = 0
    ) -> KDENoise:
        """Put kernels on the examples.

        Args:
            data: float [n, ...].
            bandwidth: of the kernel, in the data's units; by default Scott's rule, n^(-1/(d+4)) standard deviations of each number.
            scale: factor of the bandwidth; wider is safer than narrower.
            most: examples that get a kernel, drawn at random where there are more; the cost of `log_prob` grows with it.
            seed: of that draw.
        """
        _need("KDENoise", data)
        rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:most].to(data.device)
        centres = data[rows]
        if bandwidth is not None:
            return cls(centres, scale * bandwidth)
        spread = data.std(0)
        spread = spread.clamp(min=max(1e-3 * float(spread.max()), 1e-12))
        return cls(centres, scale * len(centres) ** (-1 / (data[0].numel() + 4)) * spread)


class BoxNoise(_Noise):
    """The uniform distribution on a box; log q is -inf outside.

    Args:
        low, high: corners, float [...] of the form of a point; low < high.
    """

    low: Tensor
    high: Tensor

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        if low.shape != high.shape or not bool((low < high).all()):
            raise InputError(
                "BoxNoise: low and high are the corners of a box, of one form, with low below high everywhere."
            )
        self.shape = tuple(low.shape)
        self.register_buffer("low", low.flatten().clone())
        self.register_buffer("high", high.flatten().clone())

    @classmethod
    def fit(cls, data: Tensor, margin: float = 0.1) -> BoxNoise:
        """Take the smallest box around the data, wider by `margin` of its sides on each."""
        _need("BoxNoise", data)
        low, high = data.amin(0), data.amax(0)
        room = (margin * (high - low)).clamp(min=1e-6)
        return cls(low - room, high + room)

    def sample(self, n: int) -> Tensor:
        """Return `n` points, [n, ...]."""
        u = torch.rand(n, len(self.low), dtype=self.low.dtype, device=self.low.device)
        return self._formed(torch.lerp(self.low, self.high, u))

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log q, [n]."""
        flat = self._flat(x)
        inside = ((flat >= self.low) & (flat <= self.high)).all(1)
        return torch.where(inside, -(self.high - self.low).log().sum(), -torch.inf)


class EnumerationNoise(_Noise):
    """Every point of a finite space, once: `sample` gives all of them in order, so that sums over the space are exact.

    Args:
        points: float [k, ...].
        log_volume: log of what a point stands for, 0 for the points of a finite space.

    `unnormalized_nll(gamma=1)` on it is the exact negative log-likelihood.
    """

    points: Tensor

    def __init__(self, points: Tensor, log_volume: float = 0.0) -> None:
        super().__init__()
        self.shape, self.log_volume = tuple(points.shape[1:]), log_volume
        self.register_buffer("points", points.clone())

    def sample(self, n: int) -> Tensor:
        """Return all points, whatever `n` is."""
        return self.points

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log q = -log(k volume), [n]."""
        self._flat(x)
        return torch.full((len(x),), -math.log(len(self.points)) - self.log_volume, dtype=x.dtype, device=x.device)


class GridNoise(EnumerationNoise):
    """The middle of every cell of a grid, once: `unnormalized_nll(gamma=1)` on it is the likelihood by the midpoint rule.

    Args:
        low, high: corners of the box, float [d] with d at most 3, low < high.
        cells: cells along each side.
    """

    def __init__(self, low: Tensor, high: Tensor, cells: int = 100) -> None:
        points, log_volume = midpoints(low, high, cells)
        super().__init__(points, log_volume)


class MixedNoise(_Noise):
    """A mixture of noises: a close one with a wide one for the tails.

    Args:
        parts: noises over points of one form.
        weights: positive, one for each; equal where nothing is said.
    """

    def __init__(self, parts: Sequence[Any], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        weights = [1.0] * len(parts) if weights is None else list(weights)
        if not parts or len(weights) != len(parts) or not all(w > 0 for w in weights):
            raise InputError(f"MixedNoise: one positive weight for each of the {len(parts)} noises; got {weights}.")
        self.parts: list[Any] = [as_noise(part) for part in parts]
        self.held = nn.ModuleList(self.parts)
        self.weights = [w / sum(weights) for w in weights]

    def sample(self, n: int) -> Tensor:
        """Return `n` points, [n, ...], in random order."""
        counts = torch.multinomial(torch.tensor(self.weights), n, replacement=True).bincount(minlength=len(self.parts))
        drawn = [part.sample(int(c)) for part, c in zip(self.parts, counts, strict=True) if c]
        points = torch.cat(drawn)
        return points[torch.randperm(n).to(points.device)]

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log q, [n]."""
        each = [part.log_prob(x) + math.log(w) for part, w in zip(self.parts, self.weights, strict=True)]
        return torch.logsumexp(torch.stack(each), 0)

    def __repr__(self) -> str:
        return f"MixedNoise({' + '.join(f'{w:g} {part!r}' for w, part in zip(self.weights, self.parts, strict=True))})"


class FlowNoise(_Noise):
    """A learned density: a normalising flow, or anything else with `sample(n)` and `log_prob(x)`.

    What `sample` returns may be points or a pair (points, log q), as normalising-flow libraries have it. The flow is not trained here; fit
    it to the data before, by its own likelihood.

    Args:
        flow: the fitted density.
        name: what warnings call it.
    """

    def __init__(self, flow: Any, name: str | None = None) -> None:
        super().__init__()
        for method in ("sample", "log_prob"):
            if not callable(getattr(flow, method, None)):
                raise InputError(
                    f"FlowNoise: the flow needs sample(n) and log_prob(x), and {type(flow).__name__} has no {method}."
                )
        self.flow, self.name = flow, name or type(flow).__name__

    def sample(self, n: int) -> Tensor:
        """Return `n` points, [n, ...]."""
        with torch.no_grad():
            drawn = self.flow.sample(n)
        points = drawn[0] if isinstance(drawn, tuple | list) else drawn
        assert isinstance(points, Tensor)
        return points

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log q, [n]."""
        found = self.flow.log_prob(x)
        assert isinstance(found, Tensor)
        return found

    def __repr__(self) -> str:
        return f"FlowNoise({self.name})"


class _TorchNoise(_Noise):
    """A distribution of PyTorch; the dimensions of its batch are those of a point."""

    def __init__(self, distribution: torch.distributions.Distribution) -> None:
        super().__init__()
        self.distribution = distribution
        self.shape = tuple(distribution.batch_shape) + tuple(distribution.event_shape)

    def sample(self, n: int) -> Tensor:
        drawn: Tensor = self.distribution.sample(torch.Size([n]))
        return drawn

    def log_prob(self, x: Tensor) -> Tensor:
        found: Tensor = self.distribution.log_prob(x)
        return found.flatten(1).sum(1) if found.ndim > 1 else found

    def __repr__(self) -> str:
        return repr(self.distribution)


def as_noise(source: Any) -> nn.Module:
    """Return a noise made of a distribution of PyTorch, a flow, or another object with `sample(n)` and `log_prob(x)`.

    Raises:
        InputError: a method is missing.

    >>> as_noise(torch.distributions.Laplace(torch.zeros(3), 1.0)).log_prob(torch.zeros(2, 3))       # -3 log 2
    tensor([-2.0794, -2.0794])
    """
    if isinstance(source, _Noise):
        return source
    return _TorchNoise(source) if isinstance(source, torch.distributions.Distribution) else FlowNoise(source)


def _need(name: str, data: Tensor) -> None:
    if data.ndim < 2 or len(data) < 2 or not data.is_floating_point():
        raise InputError(
            f"{name}.fit: data are float [examples, ...] with at least two examples; got {data.dtype} {list(data.shape)}."
        )
    if not bool(torch.isfinite(data).all()):
        raise InputError(f"{name}.fit: the data have values that are not finite.")
