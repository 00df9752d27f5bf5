"""Searches over whole runs, ask and tell: what a tuner that works within one run is compared with.

    search = BayesianSearch([rate, decay], seed=0)
    for _ in range(10):
        point = search.ask()                   # {"rate": 0.31, "decay": 2e-4}
        search.tell(point, train_with(point))  # a loss: lower is better
    search.best

All walk the unit cube of the hyperparameters' ranges, on a log scale where a hyperparameter has one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from poise.errors import InputError
from poise.quantities import derive
from poise.weights.hyperparameter import Hyperparameter, check_names

__all__ = ["BayesianSearch", "GridSearch", "RandomSearch", "from_cube", "to_cube"]

Point = dict[str, float]


def from_cube(hyper: Hyperparameter, share: float) -> float:
    """Return the value at a share in [0, 1] of a range: r at the variable whose sigmoid is the share.

    A range without an end is walked as far as eight times (on a log scale a thousand times) its start.

    >>> from_cube(Hyperparameter("decay", 0.1, 1e-4, 1, scale="log"), 0.5)
    0.01
    """
    low, high = _span(hyper)
    top = high + 1 if hyper.discrete else high
    if hyper.scale == "log":
        value = math.exp(math.log(low) + share * (math.log(top) - math.log(low)))
    else:
        value = low + share * (top - low)
    return min(float(math.floor(value)), high) if hyper.discrete else float(f"{hyper.cut(value):.12g}")


def to_cube(hyper: Hyperparameter, value: float) -> float:
    """Return the share of the range at which a value lies, in the middle of its cell where it is discrete."""
    low, high = _span(hyper)
    top = high + 1 if hyper.discrete else high
    if hyper.scale == "log":
        value = math.sqrt(value * (value + 1)) if hyper.discrete else value
        return (math.log(value) - math.log(low)) / (math.log(top) - math.log(low))
    return (value + (0.5 if hyper.discrete else 0.0) - low) / (top - low)


def _span(hyper: Hyperparameter) -> tuple[float, float]:
    """The range that is searched: the hyperparameter's own, cut where it has no end."""
    if math.isfinite(hyper.high):
        return hyper.low, hyper.high
    if hyper.scale == "log":
        return max(hyper.low, hyper.start / 1e3), hyper.start * 1e3
    return hyper.low, hyper.low + 8 * (hyper.start - hyper.low)


class _Search:
    """Trials, and the best of them."""

    def __init__(self, hypers: Iterable[Hyperparameter]) -> None:
        self.hypers = check_names(hypers, type(self).__name__)
        self.points: list[Point] = []
        self.losses: list[float] = []

    def ask(self) -> Point:
        """Return the next point: a value for each hyperparameter, by name."""
        raise NotImplementedError

    def tell(self, point: Point, loss: float) -> None:
        """Say what a point was worth; lower is better, and NaN or infinity counts as worse than all others."""
        self.points.append(dict(point))
        self.losses.append(loss if math.isfinite(loss) else math.inf)

    @property
    def best(self) -> tuple[Point, float]:
        """The best point so far, and its loss.

        Raises:
            InputError: nothing was told yet.
        """
        if not self.losses:
            raise InputError(f"{type(self).__name__}: nothing was told yet, so no point is best.")
        place = min(range(len(self.losses)), key=self.losses.__getitem__)
        return self.points[place], self.losses[place]

    def _value(self, shares: Iterable[float]) -> Point:
        return {h.name: from_cube(h, share) for h, share in zip(self.hypers, shares, strict=True)}


class GridSearch(_Search):
    """Every combination of evenly spread values.

    Args:
        hypers: what is searched.
        points: values of each hyperparameter, at the middles of as many equal cells, at least 1.

    >>> [GridSearch([Hyperparameter("rate", 0.1, 0, 1)], 2).ask()]
    [{'rate': 0.25}]
    """

    def __init__(self, hypers: Iterable[Hyperparameter], points: int) -> None:
        super().__init__(hypers)
        if points < 1:
            raise InputError(f"GridSearch: points must be at least 1, and it is {points}.")
        places = [(i + 0.5) / points for i in range(points)]
        self._rest: Iterator[tuple[float, ...]] = itertools.product(places, repeat=len(self.hypers))
        self.size = points ** len(self.hypers)

    def ask(self) -> Point:
        """Return the next combination.

        Raises:
            InputError: all were asked for.
        """
        shares = next(self._rest, None)
        if shares is None:
            raise InputError(f"GridSearch: all {self.size} combinations were asked for.")
        return self._value(shares)


class RandomSearch(_Search):
    """Independent draws, uniform over each range (over its logarithm on a log scale).

    Args:
        hypers: what is searched.
        seed: of the draws.
    """

    def __init__(self, hypers: Iterable[Hyperparameter], seed: int = 0) -> None:
        super().__init__(hypers)
        self.generator = torch.Generator().manual_seed(derive(seed, "random_search"))

    def _draw(self, points: int) -> Tensor:
        return torch.rand(points, len(self.hypers), generator=self.generator, dtype=torch.float64)

    def ask(self) -> Point:
        return self._value(self._draw(1)[0].tolist())


class BayesianSearch(RandomSearch):
    """Expected improvement under a Gaussian process (Matern 5/2, a length for each hyperparameter).

    Args:
        hypers: what is searched.
        initial: random points at first, at least 2.
        candidates: random points among which the best expected improvement is taken, at least 1.
        seed: of the draws.

    Raises:
        InputError: `initial` or `candidates` is too small.

    Source: Snoek et al., arXiv:1206.2944.
    """

    def __init__(
        self, hypers: Iterable[Hyperparameter], initial: int = 3, candidates: int = 2000, seed: int = 0
    ) -> None:
        super().__init__(hypers, seed)
        if initial < 2 or candidates < 1:
            raise InputError(
                f"BayesianSearch: initial must be at least 2 and candidates at least 1; they are {initial} and {candidates}."
            )
        self.initial, self.candidates, self.seed = initial, candidates, seed

    def ask(self) -> Point:
        if len([loss for loss in self.losses if math.isfinite(loss)]) < self.initial:
            return super().ask()
        shares = self._draw(self.candidates)
        return self._value(shares[int(self._improvement(shares).argmax())].tolist())

    def _improvement(self, shares: Tensor) -> Tensor:
        """Expected improvement over the best loss, E max(0, best - loss(x)), at each row."""
        import numpy as np

        process, scaled = self._process()
        mean, std = process.predict(shares.numpy(), return_std=True)
        mean, std = torch.from_numpy(np.asarray(mean)), torch.from_numpy(np.asarray(std)).clamp_min(1e-12)
        gain = scaled.min() - mean
        z = gain / std
        below = 0.5 * torch.erfc(-z / math.sqrt(2))
        density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
        improvement: Tensor = gain * below + std * density
        return improvement

    def _process(self) -> tuple[Any, Tensor]:
        """The process fitted to standardised losses; a failed trial counts as the worst one."""
        import warnings

        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import Matern, WhiteKernel

        x = torch.tensor([[to_cube(h, p[h.name]) for h in self.hypers] for p in self.points], dtype=torch.float64)
        losses = torch.tensor(self.losses, dtype=torch.float64)
        losses = torch.where(torch.isfinite(losses), losses, losses[torch.isfinite(losses)].max())
        scaled = (losses - losses.mean()) / losses.std().clamp_min(1e-12)
        kernel = Matern([0.3] * len(self.hypers), (0.05, 20.0), nu=2.5) + WhiteKernel(1e-3, (1e-6, 1.0))
        process = GaussianProcessRegressor(kernel, n_restarts_optimizer=1, random_state=self.seed)
        with warnings.catch_warnings():
            # A length at the end of its range says that a hyperparameter does not matter, which is no failure.
            warnings.simplefilter("ignore", ConvergenceWarning)
            process.fit(x.numpy(), scaled.numpy())
        return process, scaled
