"""Paths of hyperparameters over a run: recorded, replayed, held, or shaken on purpose.

A tuner that moves hyperparameters while the model trains finds a schedule, not a value. Whether the schedule is what helps is asked with
a plain network: replay what was recorded, hold one value, or hold it and shake it as much as the tuner did.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from poise.errors import InputError
from poise.quantities import derive
from poise.weights.hyperparameter import Hyperparameter, check_names

if TYPE_CHECKING:
    from poise.problem import Signals

__all__ = ["HyperparameterSchedule", "PerturbedHyperparameters", "ReplayedHyperparameters"]


@dataclass(frozen=True)
class HyperparameterSchedule:
    """Where hyperparameters stood, step by step.

    Args:
        names: of the hyperparameters, n of them.
        steps: rising optimiser steps from which an entry holds, k of them.
        raws: the unconstrained variables, k rows of n.
        values: what was used, k rows of n.

    Raises:
        InputError: lengths differ, or steps do not rise.

    >>> path = HyperparameterSchedule(("rate",), (0, 100), ((0.0,), (1.0,)), ((0.5,), (0.73,)))
    >>> path.at(99)
    {'rate': 0.5}
    """

    names: tuple[str, ...]
    steps: tuple[int, ...]
    raws: tuple[tuple[float, ...], ...]
    values: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if not len(self.steps) == len(self.raws) == len(self.values) or not self.steps:
            raise InputError(
                f"A schedule has one row of variables and of values for each of its steps, at least one; it has {len(self.steps)} steps, "
                f"{len(self.raws)} and {len(self.values)} rows."
            )
        if any(len(row) != len(self.names) for row in (*self.raws, *self.values)):
            raise InputError(f"Every row of a schedule of {', '.join(self.names)} has {len(self.names)} numbers.")
        if any(a >= b for a, b in zip(self.steps, self.steps[1:], strict=False)):
            raise InputError("The steps of a schedule must rise.")

    def _row(self, step: int) -> int:
        return max(0, bisect.bisect_right(self.steps, step) - 1)

    def at(self, step: int) -> dict[str, float]:
        """Return the values at an optimiser step, by name; before the first entry, the first."""
        return dict(zip(self.names, self.values[self._row(step)], strict=True))

    def raw_at(self, step: int) -> dict[str, float]:
        """Return the unconstrained variables at an optimiser step, by name."""
        return dict(zip(self.names, self.raws[self._row(step)], strict=True))

    def path(self, name: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Return the steps and values of one hyperparameter.

        Raises:
            InputError: the schedule has none of that name.
        """
        if name not in self.names:
            raise InputError(f"The schedule has no {name!r}; it has {', '.join(self.names)}.")
        place = self.names.index(name)
        return self.steps, tuple(row[place] for row in self.values)

    def to_dict(self) -> dict[str, Any]:
        """Return it in lists and numbers, for a file."""
        return {
            "names": list(self.names),
            "steps": list(self.steps),
            "raws": [list(row) for row in self.raws],
            "values": [list(row) for row in self.values],
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> HyperparameterSchedule:
        """Take back what `to_dict` gave."""
        return cls(
            tuple(saved["names"]),
            tuple(saved["steps"]),
            tuple(map(tuple, saved["raws"])),
            tuple(map(tuple, saved["values"])),
        )


class _Path(nn.Module):
    """A policy that sets hyperparameters by the step alone."""

    needs: ClassVar[frozenset[str]] = frozenset()
    tunes_hyperparameters: ClassVar[bool] = True

    def __init__(self, hypers: Iterable[Hyperparameter]) -> None:
        super().__init__()
        self.hypers = nn.ModuleList(check_names(hypers, type(self).__name__))

    def _set(self, step: int) -> None:
        raise NotImplementedError

    def weights(self, signals: Signals) -> Mapping[str, float | Tensor]:
        """Set the hyperparameters of this step, and return those that are weights of terms."""
        self._set(signals.step)
        return {h.name: h.read() for h in self.hypers if isinstance(h, Hyperparameter) and h.name in signals.names}

    def advance(self, signals: Signals) -> None:
        """Nothing moves by itself."""


class ReplayedHyperparameters(_Path):
    """Train with a recorded schedule: a plain network, with the values that another run found.

    Args:
        schedule: what `SelfTuning.schedule` recorded.
        hypers: the hyperparameters that the model and the objective use, with the names of the schedule.

    Raises:
        InputError: a hyperparameter that the schedule does not have.

    Source: arXiv:1903.03088, section 5.1 (retraining with the schedule).
    """

    def __init__(self, schedule: HyperparameterSchedule, hypers: Iterable[Hyperparameter]) -> None:
        super().__init__(hypers)
        self.schedule = schedule
        for hyper in self.hypers:
            schedule.path(hyper.name)  # type: ignore[arg-type]

    def _set(self, step: int) -> None:
        raws = self.schedule.raw_at(step)
        for hyper in self.hypers:
            hyper.move(raws[hyper.name])  # type: ignore[operator, index]


class PerturbedHyperparameters(_Path):
    """Hold hyperparameters at their starts, and shake them: what a schedule has to beat.

        value_t = start + std e_t + amplitude sin(2 pi t / period),    e_t ~ N(0, 1), one draw for the batch

    cut at the ends of the range. With both 0 it is the fixed value.

    Args:
        hypers: what is shaken, each around its `start`.
        std: of the noise, in units of the value (the paper: 0.05 on a dropout rate).
        amplitude: of the wave, in units of the value (the paper: 0.1).
        period: of the wave, in steps (the paper: 1200).
        seed: of the noise.

    Raises:
        InputError: a negative size, or a period that is not positive.

    Source: arXiv:1903.03088, section 5.1.
    """

    def __init__(
        self,
        hypers: Iterable[Hyperparameter],
        std: float = 0.0,
        amplitude: float = 0.0,
        period: float = 1200.0,
        seed: int = 0,
    ) -> None:
        super().__init__(hypers)
        if std < 0 or amplitude < 0 or period <= 0:
            raise InputError(
                "PerturbedHyperparameters: std and amplitude must be at least 0 and period positive; they are "
                f"{std}, {amplitude} and {period}."
            )
        self.std, self.amplitude, self.period, self.seed = std, amplitude, period, seed

    def _set(self, step: int) -> None:
        generator = torch.Generator().manual_seed(derive(self.seed, "perturbed", step))
        noise = torch.randn(len(self.hypers), generator=generator, dtype=torch.float64).tolist()
        wave = self.amplitude * math.sin(2 * math.pi * step / self.period)
        for hyper, e in zip(self.hypers, noise, strict=True):
            assert isinstance(hyper, Hyperparameter)
            hyper.set(hyper.cut(hyper.start + self.std * e + wave))
