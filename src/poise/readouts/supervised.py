"""Readouts of models that map an input to one output: class logits, or numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from poise.errors import IncompatibleError
from poise.problem import ModelView
from poise.quantities import Quantities, describe


class Readout(Protocol):
    """Runs a model on a batch and offers what the plan may read.

    Attributes:
        output: the quantity that predictions and metrics are made of.
    """

    output: str

    def __call__(self, model: ModelView, batch: Quantities, reads: frozenset[str]) -> Quantities:
        """Offer quantities on `batch` (which holds the data) and return it; compute nothing that nobody reads."""
        ...


class _Supervised:
    output: str

    def __init__(
        self,
        teacher: Callable[[Any], Tensor] | None = None,
        extra: Mapping[str, Callable[[Quantities], Any]] | None = None,
    ) -> None:
        self.teacher, self.extra = teacher, dict(extra or {})

    def __call__(self, model: ModelView, batch: Quantities, reads: frozenset[str]) -> Quantities:
        batch.offer(self.output, lambda: self._output(model(batch["input"])))
        self._offer_more(batch)
        if self.teacher is not None:
            teacher = self.teacher
            batch.offer("teacher_logits", lambda: teacher(batch["input"]).detach())
            batch.offer("teacher_probabilities", lambda: batch["teacher_logits"].softmax(-1))
        batch.put("model", model)
        if "parameters" in reads:
            batch.put("parameters", model.parameters)
        for name, make in self.extra.items():
            batch.offer(name, lambda make=make: make(batch))  # type: ignore[misc]
        return batch

    def _output(self, out: Any) -> Tensor:
        """Return the output tensor of what the model returned."""
        raise IncompatibleError(f"{type(self).__name__} does not say what the model's output is.")

    def _offer_more(self, batch: Quantities) -> None:
        """Offer what follows from the output."""


class Classification(_Supervised):
    """Offer `logits` `[batch, classes]` and `probabilities` of a model that maps `input` to logits.

    Args:
        teacher: a frozen model; then `teacher_logits` and `teacher_probabilities` are offered too.
        extra: more quantities by name, each made from the others when it is read.
    """

    output = "logits"

    def _output(self, out: Any) -> Tensor:
        logits = getattr(out, "logits", out)
        if not isinstance(logits, Tensor) or logits.ndim < 2:
            raise IncompatibleError(
                f"A classifier must return logits float [batch, classes], and the model returned {describe(logits)}."
            )
        return logits

    def _offer_more(self, batch: Quantities) -> None:
        batch.offer("probabilities", lambda: batch["logits"].softmax(-1))


class Regression(_Supervised):
    """Offer `prediction` `[batch]` (or `[batch, outputs]`) of a model that maps `input` to numbers.

    Args: as `Classification`.
    """

    output = "prediction"

    def _output(self, out: Any) -> Tensor:
        if not isinstance(out, Tensor):
            raise IncompatibleError(f"A regression model must return a tensor, and it returned {describe(out)}.")
        return out.squeeze(-1) if out.ndim == 2 and out.shape[-1] == 1 else out


def readout_for(target: Tensor) -> Readout:
    """Return the readout that fits a target: class indices or class probabilities, or numbers."""
    return Regression() if torch.is_floating_point(target) and target.ndim == 1 else Classification()
