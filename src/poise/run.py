"""What a run is made of: its curves, its state while it trains, its result, and predictions of its model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from poise import processes
from poise.errors import InputError
from poise.objective import Objective
from poise.problem import ModelView, Step
from poise.quantities import Quantities
from poise.readouts.supervised import Readout


class History(Mapping[str, list[float]]):
    """Curves by name: `history["loss"]` are the values and `history.steps("loss")` the optimiser steps they belong to."""

    def __init__(self) -> None:
        self._curves: dict[str, tuple[list[int], list[float]]] = {}

    def add(self, name: str, step: int, value: float) -> None:
        """Append a point to a curve."""
        steps, values = self._curves.setdefault(name, ([], []))
        steps.append(step)
        values.append(value)

    def steps(self, name: str) -> list[int]:
        """Return the steps of a curve."""
        return self._curves[name][0]

    def curves(self) -> dict[str, tuple[list[int], list[float]]]:
        """Return every curve as `(steps, values)`."""
        return self._curves

    def __getitem__(self, name: str) -> list[float]:
        return self._curves[name][1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._curves)

    def __len__(self) -> int:
        return len(self._curves)


@dataclass
class Run:
    """What `fit` returns.

    Attributes:
        model: the trained module (the best one by `monitor` where `restore_best` was asked for).
        objective: with its memories and multipliers.
        history: the curves.
        steps: optimiser steps that were made, skipped ones included.
        best: `(step, value)` of the monitored metric, or None.
        stopped: why training ended, in words.
        skipped: steps that were skipped as not finite.
        seconds: time in the loop, of this process and of those it resumed from.
        weights: what policies set, by name, as they were after the last step; empty where every weight is a number or a schedule.
        peak_memory: bytes: of the device on CUDA, else the largest growth of this process's memory seen at the log points.
    """

    model: nn.Module
    objective: Objective
    history: History
    steps: int
    best: tuple[int, float] | None
    stopped: str
    skipped: int
    seconds: float
    peak_memory: int
    readout: Readout
    device: torch.device
    weights: dict[str, float] = field(default_factory=dict)

    def predict(self, input: Tensor, batch_size: int = 1024) -> Tensor:
        """Return the readout's output (logits or predictions) for all rows, in evaluation mode, on the CPU."""
        return predict(self.model, input, self.readout, self.device, batch_size).cpu()


@dataclass
class FitState:
    """What callbacks see; they may set `stop` to a reason."""

    model: nn.Module
    objective: Objective
    history: History
    step: int = 0
    epoch: int = 0
    steps: int = 0
    steps_per_epoch: int | None = None
    best: tuple[int, float] | None = None
    latest: Step | None = None
    stop: str | None = None
    skipped: int = 0
    seconds: float = 0.0
    unimproved: int = 0
    best_weights: dict[str, Tensor] | None = None


@dataclass
class Window:
    """What the steps since the last log point were worth, kept on the device."""

    totals: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    terms: dict[str, list[Tensor]] = field(default_factory=dict)
    weights: dict[str, float | Tensor] = field(default_factory=dict)
    acted: dict[str, int] = field(default_factory=dict)

    def add(self, step: Step) -> None:
        if not step.skipped:
            self.totals.append(step.value)
        if step.gradient_norm is not None:
            self.norms.append(step.gradient_norm)
        for label, term in step.terms.items():
            self.weights[label] = term.weight
            self.acted[label] = self.acted.get(label, 0) + term.active
            if term.active and not step.skipped:
                self.terms.setdefault(label, []).append(term.value)

    def write(self, history: History, step: int) -> None:
        if self.totals:
            history.add("loss", step, float(torch.stack(self.totals).mean()))
        if self.norms:
            history.add("gradient_norm", step, float(torch.stack(self.norms).mean()))
        for label, values in self.terms.items():
            history.add(f"term/{label}", step, float(processes.sum_across(torch.stack(values).mean())))
        for label, weight in self.weights.items():
            value = float(weight.mean()) if isinstance(weight, Tensor) else float(weight)
            history.add(f"weight/{label}", step, value)
            history.add(f"active/{label}", step, self.acted[label] / max(1, len(self.totals)))

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        weights = {k: float(v.mean()) if isinstance(v, Tensor) else float(v) for k, v in self.weights.items()}
        return {
            "totals": self.totals,
            "norms": self.norms,
            "terms": self.terms,
            "weights": weights,
            "acted": self.acted,
        }

    @classmethod
    def from_state(cls, saved: dict[str, Any]) -> Window:
        """Take it back."""
        return cls(saved["totals"], saved["norms"], saved["terms"], saved["weights"], saved["acted"])


def choose_device(device: str | torch.device) -> torch.device:
    """Return the device that a name means; "auto" takes CUDA, then MPS, then the CPU; several processes each take their own.

    Raises:
        InputError: PyTorch does not know the name, or the device is not there.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and processes.size() == 1:
        # A launcher started several processes (`torchrun`, `accelerate launch`): Accelerate brings them together.
        from accelerate import PartialState

        own: torch.device = PartialState(cpu=str(device) == "cpu").device
        if str(device) in ("auto", "cuda"):
            return own
    if str(device) == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise InputError(f"There is no device {str(device)!r}; write auto, cpu, cuda, cuda:N or mps.") from None
    missing = (chosen.type == "cuda" and not torch.cuda.is_available()) or (
        chosen.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing or (chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"The device {str(device)!r} is not on this machine.")
    return chosen


def predict(
    model: nn.Module,
    input: Tensor,
    readout: Readout,
    device: torch.device | None = None,
    batch_size: int = 1024,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """Return the readout's output for all rows of `input` `[examples, ...]`, in evaluation mode, without gradients."""
    model.eval()
    view = ModelView(model, None, autocast)
    plan = frozenset({readout.output})
    with torch.no_grad():
        parts = []
        for start in range(0, len(input), batch_size):
            rows = input[start : start + batch_size]
            batch = Quantities({"input": rows if device is None else rows.to(device)})
            parts.append(readout(view, batch, plan)[readout.output])
        return torch.cat(parts)


def default_metrics(output: Tensor, target: Tensor) -> dict[str, float]:
    """Return accuracy and negative log-likelihood of logits, or RMSE and MAE of predictions."""
    if output.ndim > 1 and not target.is_floating_point():
        accuracy = (output.argmax(-1) == target).double().mean()
        return {"accuracy": float(accuracy), "nll": float(nn.functional.cross_entropy(output.double(), target))}
    if output.ndim > 1 and output.shape == target.shape and output.shape[-1] > 1:
        accuracy = (output.argmax(-1) == target.argmax(-1)).double().mean()
        return {
            "accuracy": float(accuracy),
            "nll": float(nn.functional.cross_entropy(output.double(), target.double())),
        }
    error = (output - target).double()
    return {"rmse": float(error.square().mean().sqrt()), "mae": float(error.abs().mean())}
