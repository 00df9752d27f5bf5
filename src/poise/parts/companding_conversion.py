"""Companding of a model that is trained already, with a report of what that changed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from poise.errors import InputError
from poise.parts.companding import compand
from poise.parts.companding_handle import Companding

__all__ = ["ConversionReport", "compand_pretrained"]


@dataclass(frozen=True)
class ConversionReport:
    """What companding a trained model changed.

    Args:
        clipped_share: weight name -> share of its weights that were clipped to `0.99*w_max`.
        weight_change: weight name -> largest `|w_after - w_before|`.
        saturated: weight name -> share of weights that hardly move any more (`psi' < 0.05 psi'(0)`): they resist fine-tuning.
        output_change: largest absolute change of an output on the given inputs.
        relative_output_change: the same, divided by the largest absolute output before.
    """

    clipped_share: dict[str, float]
    weight_change: dict[str, float]
    saturated: dict[str, float]
    output_change: float
    relative_output_change: float


def compand_pretrained(
    model: nn.Module, inputs: Tensor | tuple[Any, ...], *, tolerance: float | None = None, **options: Any
) -> tuple[Companding, ConversionReport]:
    """Compand a trained model in place and measure what that changed; undo it if it changed more than `tolerance`.

    Args:
        model: a trained plain model; its outputs are compared in evaluation mode.
        inputs: a batch for it, a tensor or the tuple of its arguments.
        tolerance: largest `relative_output_change` that is accepted; `None` accepts any.
        **options: those of `compand`, except that `clip` is on unless switched off.

    Returns:
        The handle, and the `ConversionReport`.

    Raises:
        InputError: the outputs changed by more than `tolerance`; the model is as it was.

    Example:
        >>> handle, report = compand_pretrained(nn.Linear(4, 3), torch.ones(2, 4), tolerance=1e-5)
        >>> report.clipped_share
        {'weight': 0.0}
    """
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    before_state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    before = _outputs(model, arguments)
    handle = compand(model, **{"clip": True, **options})
    after = _outputs(model, arguments)
    change = max((float((x - y).abs().max()) for x, y in zip(before, after, strict=True)), default=0.0)
    largest = max((float(x.abs().max()) for x in before), default=0.0)
    relative = change / largest if largest > 0 else (0.0 if change == 0 else math.inf)
    stats = handle.stats()
    report = ConversionReport(
        clipped_share={name: figures["clipped_share"] for name, figures in stats.items()},
        weight_change={name: figures["largest_change"] for name, figures in stats.items()},
        saturated={name: figures["saturated"] for name, figures in stats.items()},
        output_change=change,
        relative_output_change=relative,
    )
    if tolerance is not None and not relative <= tolerance:
        handle.fold().load_state_dict(before_state)
        worst = max(report.clipped_share, key=lambda name: report.clipped_share[name])
        raise InputError(
            f"compand_pretrained: outputs would change by {relative:.3g} of their range, more than tolerance={tolerance:g} (most clipped: "
            f"{worst}, {100 * report.clipped_share[worst]:.2g} % of its weights). Choose a larger a, a='auto', or a larger tolerance."
        )
    return handle, report


def _outputs(model: nn.Module, arguments: tuple[Any, ...]) -> list[Tensor]:
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            result = model(*arguments)
    finally:
        for m, mode in modes:
            m.training = mode
    return [x.detach().clone() for x in tree_leaves(result) if isinstance(x, Tensor) and x.is_floating_point()]
