"""The readout of models that are known up to a constant: log p~ and the noise's log q, at the data and at fresh points of the noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from poise.errors import IncompatibleError, InputError
from poise.problem import ModelView
from poise.quantities import Quantities, describe

__all__ = ["Unnormalized"]


class Unnormalized:
    """Offer what `unnormalized_nll`, `nce`, `short_run_langevin` and `energy_l2` read.

    Data and noise go through the model in one pass. The points of the noise are drawn anew in every step, from (seed, step, micro-batch,
    process), so that a second evaluation of a step sees the same ones.

    Args:
        noise: an object with `sample(n)` and `log_prob(x)`: one of `poise.parts.noise`, or your own.
        n_noise: points drawn for a micro-batch; by default `ratio` for each example.
        ratio: points for each example, where `n_noise` is not given.
        energy: the model puts out E(x); otherwise it puts out log p~(x) = -E(x).
        extra: more quantities by name, each made from the others when it is read.

    Offers: `log_density`, `log_noise` float [batch]; `drawn` [drawn, ...], `drawn_log_density`, `drawn_log_noise` float [drawn];
        `log_density_of`, a function of points; `noise_name`.

    Raises:
        InputError: a noise without `sample` or `log_prob`, or a number out of range.

    >>> from poise.parts.noise import GaussianNoise
    >>> Unnormalized(GaussianNoise(torch.zeros(2), torch.ones(2)), ratio=2.0).output
    'log_density'
    """

    output = "log_density"

    def __init__(
        self,
        noise: Any,
        n_noise: int | None = None,
        ratio: float = 1.0,
        energy: bool = False,
        extra: Mapping[str, Callable[[Quantities], Any]] | None = None,
    ) -> None:
        for method in ("sample", "log_prob"):
            if not callable(getattr(noise, method, None)):
                raise InputError(
                    f"Unnormalized: the noise needs sample(n) and log_prob(x), and {type(noise).__name__} has no {method}. "
                    "poise.parts.noise has such distributions; as_noise(...) wraps those of PyTorch and normalising flows."
                )
        if n_noise is not None and n_noise < 1:
            raise InputError(f"Unnormalized: n_noise is a number of points, at least 1; got {n_noise}.")
        if not ratio > 0:
            raise InputError(f"Unnormalized: ratio is points of noise for each example, positive; got {ratio}.")
        self.noise, self.n_noise, self.ratio, self.energy = noise, n_noise, ratio, energy
        self.extra = dict(extra or {})

    def __call__(self, model: ModelView, batch: Quantities, reads: frozenset[str]) -> Quantities:
        x = batch["input"]
        apart: list[Tensor] = []

        def log_densities() -> list[Tensor]:
            """log p~ of the data and of the noise, of one pass where both are read."""
            if not apart:
                points = [x, batch["drawn"]] if "drawn_log_density" in reads else [x]
                found = self.log_density(model, torch.cat(points) if len(points) > 1 else x)
                apart.extend(torch.split(found, [len(p) for p in points]))
            return apart

        batch.offer("drawn", lambda: self.draw(x))
        batch.offer("log_density", lambda: log_densities()[0])
        batch.offer(
            "drawn_log_density",
            lambda: log_densities()[1] if "drawn_log_density" in reads else self.log_density(model, batch["drawn"]),
        )
        batch.offer("log_noise", lambda: self._log_noise(x))
        batch.offer("drawn_log_noise", lambda: self._log_noise(batch["drawn"]))
        batch.put("log_density_of", lambda points: self.log_density(model, points))
        batch.put("noise_name", repr(self.noise))
        batch.put("model", model)
        if "parameters" in reads:
            batch.put("parameters", model.parameters)
        for name, make in self.extra.items():
            batch.offer(name, lambda make=make: make(batch))  # type: ignore[misc]
        return batch

    def draw(self, like: Tensor) -> Tensor:
        """Return fresh points of the noise for a batch of data `like`, in its form and dtype."""
        count = self.n_noise or max(1, round(self.ratio * len(like)))
        with torch.no_grad():
            drawn = self.noise.sample(count)
        if not isinstance(drawn, Tensor) or drawn.shape[1:] != like.shape[1:]:
            raise IncompatibleError(
                f"The noise must draw points of the form of the data, {describe(like[:1])} but for the rows, and it drew "
                f"{describe(drawn)}."
            )
        return drawn.detach().to(like)

    def log_density(self, model: Callable[[Tensor], Any], points: Tensor) -> Tensor:
        """Return log p~ of points, [n]."""
        out = model(points)
        if not isinstance(out, Tensor) or out.shape != (len(points),):
            fix = " Add .squeeze(-1) to what it returns." if getattr(out, "shape", None) == (len(points), 1) else ""
            raise IncompatibleError(
                f"The model of a log-density must return one number for each point, float [{len(points)}], and it returned "
                f"{describe(out)}.{fix}"
            )
        return -out if self.energy else out

    def _log_noise(self, points: Tensor) -> Tensor:
        with torch.no_grad():
            log_q = self.noise.log_prob(points)
        if not isinstance(log_q, Tensor) or log_q.shape != (len(points),):
            raise IncompatibleError(
                f"The noise's log_prob must return one number for each point, float [{len(points)}], and it returned {describe(log_q)}. "
                "Sum it over the dimensions of a point: as_noise(...) does that for distributions of PyTorch."
            )
        return log_q.detach().to(points.dtype if points.is_floating_point() else torch.float32)
