"""Readout of models that map a noisy example to a clean one of the same shape."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from poise.errors import IncompatibleError
from poise.problem import ModelView
from poise.quantities import Quantities, describe
from poise.readouts.supervised import Regression


class Denoising(Regression):
    """Offer `prediction`, the shape of `input`, of a denoiser.

    Args:
        conditioned: hand the model `noise_level` [batch] as its `condition` too.
        teacher, extra: as `Classification`.
    """

    def __init__(self, conditioned: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.conditioned = conditioned

    def __call__(self, model: ModelView, batch: Quantities, reads: frozenset[str]) -> Quantities:
        if self.conditioned:
            whole = model

            def condition(y: Tensor) -> Any:
                return whole(y, condition=batch["noise_level"])

            batch.offer("prediction", lambda: self._same(batch["input"], condition(batch["input"])))
        else:
            batch.offer("prediction", lambda: self._same(batch["input"], model(batch["input"])))
        self._offer_more(batch)
        batch.put("model", model)
        if "parameters" in reads:
            batch.put("parameters", model.parameters)
        for name, make in self.extra.items():
            batch.offer(name, lambda make=make: make(batch))  # type: ignore[misc]
        return batch

    @staticmethod
    def _same(noisy: Tensor, out: Any) -> Tensor:
        if not isinstance(out, Tensor) or out.shape != noisy.shape:
            raise IncompatibleError(
                f"A denoiser returns what it was given, cleaned, {describe(noisy)}, and the model returned {describe(out)}."
            )
        return out
