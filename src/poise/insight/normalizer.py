"""Does the noise meet the model? The normaliser's trace over a run, and the effective sample size of a noise.

trace = NormalizerTrace()
poise.fit(model, "unnormalized_nll", data, readout=Unnormalized(noise), callbacks=[trace])
print(trace.report().text())
noise_report(model, {"kde": KDENoise.fit(x), "gaussian": GaussianNoise.fit(x)})      # before a run: which noise?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from torch import Tensor

from poise.errors import InputError
from poise.metrics.density import importance_log_normalizer

__all__ = ["NoiseRow", "NormalizerReport", "NormalizerTrace", "noise_report"]


@dataclass(frozen=True)
class NormalizerReport:
    """What the normaliser and the noise did over a run; one entry a recorded step.

    Attributes:
        steps: optimiser steps done.
        log_normalizer: log u after them (for `nce`, its c).
        ess: effective sample size of the step's noise; NaN for `nce`.
        weight_sum: g/u, the sum of the noise's weights: 1 where u keeps up; NaN for `nce`.
        drawn: points that the noise drew in a step, or None.
    """

    steps: tuple[int, ...]
    log_normalizer: tuple[float, ...]
    ess: tuple[float, ...]
    weight_sum: tuple[float, ...]
    drawn: int | None = None

    def warnings(self) -> list[str]:
        """Say in words what looks wrong."""
        found, half = [], len(self.steps) // 2
        ess = [e for e in self.ess[half:] if math.isfinite(e)]
        sums = [w for w in self.weight_sum[half:] if math.isfinite(w)]
        if ess and median(ess) < 2:
            found.append(
                f"the effective sample size of the noise is {median(ess):.1f} in the later half: fit the noise to the data, or widen it"
            )
        elif ess and self.drawn and median(ess) < 0.05 * self.drawn:
            found.append(
                f"only {median(ess):.0f} of {self.drawn} points of the noise count: a closer noise would give more for the same cost"
            )
        if sums and max(sums) > 3:
            found.append(
                f"g/u rose to {max(sums):.1f}: u lags behind the model; raise gamma or lower the learning rate"
            )
        if sums and abs(fmean(sums) - 1) > 0.1:
            found.append(
                f"g/u is {fmean(sums):.2f} on average in the later half, where 1 is expected: the normaliser still moves"
            )
        drift = self.log_normalizer[-1] - self.log_normalizer[half] if self.steps else 0.0
        if abs(drift) > 5:
            found.append(
                f"log u drifted by {drift:+.1f} in the later half: take the bias out of the model's output, or use recenter"
            )
        return found

    def text(self) -> str:
        """Print first, middle and last entries, and the warnings."""
        rows = zip(self.steps, self.log_normalizer, self.ess, self.weight_sum, strict=True)
        lines = [f"{step:>6} {log_u:>10.4f} {ess:>9.1f} {total:>9.3f}" for step, log_u, ess, total in rows]
        shown = [lines[i] for i in sorted({0, len(lines) // 2, len(lines) - 1})]
        return "\n".join(["  step      log u       ESS       g/u", *shown, *(f"! {w}" for w in self.warnings())])


class NormalizerTrace:
    """Callback of `poise.fit` that records every `unnormalized_nll` or `nce` term's normaliser and effective sample size.

    Args:
        every: record each so many steps. On an accelerator each record waits for the device.
        term: the term's label where there are several.
    """

    def __init__(self, every: int = 1, term: str | None = None) -> None:
        if every < 1:
            raise InputError(f"NormalizerTrace: every is a number of steps, at least 1; got {every}.")
        self.every, self.term = every, term
        self.drawn: int | None = None
        self._rows: list[tuple[int, float, float, float]] = []

    def on_begin(self, state: Any) -> None:
        """Look whether there is something to record, before the first step."""
        self._find(state.objective)

    def on_step_end(self, state: Any) -> None:
        """Record a step, if it is due."""
        if state.step % self.every:
            return
        term = self._find(state.objective)
        ess, total = (getattr(term, name, None) for name in ("ess", "weight_sum"))
        if getattr(term, "_rows", 0):
            self.drawn = term._rows
        values = [math.nan if v is None else float(v.detach()) for v in (term.log_normalizer, ess, total)]
        self._rows.append((state.step, values[0], values[1], values[2]))

    def report(self) -> NormalizerReport:
        """Return what was recorded so far."""
        if not self._rows:
            raise InputError("NormalizerTrace: nothing is recorded yet; pass it to poise.fit(callbacks=[...]).")
        steps, log_u, ess, total = zip(*self._rows, strict=True)
        return NormalizerReport(steps, log_u, ess, total, self.drawn)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"rows": self._rows, "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._rows, self.drawn = [tuple(row) for row in state["rows"]], state["drawn"]

    def _find(self, objective: Any) -> Any:
        found = {n: t for n, t in objective.terms.items() if hasattr(t, "log_normalizer") and self.term in (None, n)}
        if len(found) != 1:
            raise InputError(
                f"NormalizerTrace: one term with a normaliser is recorded, and the objective {objective} has "
                f"{', '.join(found) or 'none of that name'}. Say which: NormalizerTrace(term='...')."
            )
        return next(iter(found.values()))


@dataclass(frozen=True)
class NoiseRow:
    """One noise beside a model.

    Attributes:
        name: what it was called.
        log_normalizer, error: log Z by its samples, and the standard error.
        ess_share: effective sample size over samples, in (0, 1].
        chi_square: chi^2(p || q) as the samples see it, 1/ess_share - 1; it is too small where the noise misses mass.
    """

    name: str
    log_normalizer: float
    error: float
    ess_share: float
    chi_square: float


def noise_report(
    log_density: Callable[[Tensor], Tensor], noises: Mapping[str, Any], samples: int = 20_000
) -> list[NoiseRow]:
    """Compare noises on a model, the best first.

    Args:
        log_density: maps points to log p~: the model itself.
        noises: by name.
        samples: drawn from each, from PyTorch's default generator.

    >>> from poise.parts.noise import GaussianNoise
    >>> unit = lambda x: -0.5 * x.square().sum(-1)
    >>> rows = noise_report(unit, {"far": GaussianNoise(torch.full((1,), 4.0), 1.0), "same": GaussianNoise(torch.zeros(1), 1.0)})
    >>> [row.name for row in rows], round(rows[0].log_normalizer, 4)
    (['same', 'far'], 0.9189)
    """
    rows = []
    for name, noise in noises.items():
        found = importance_log_normalizer(log_density, noise, samples)
        share = found.ess / samples
        rows.append(NoiseRow(name, found.value, found.error, share, 1 / share - 1 if share > 0 else math.inf))
    return sorted(rows, key=lambda row: -row.ess_share)
