"""What an objective reads, in a loop that is not Poise's.

    loss = objective(batch_quantities(model, batch, objective, reference))     # the loop hands you the batch
    read_in_forward(model, objective, reference)                               # the loop calls model(**batch) by itself,
    loss = objective(model(**batch))                                           # and hands you what came out

The batch is one of `poise.tasks.language.tokenize(...).collate`; `pairs_in_halves` makes one of the layout in which the chosen
answers stand above the rejected ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from types import MethodType
from typing import Any

from torch import Tensor, nn

from poise.frozen import FrozenModel
from poise.objective import Objective
from poise.problem import ModelView
from poise.quantities import Quantities
from poise.readouts.language import SIDES, Language, Reference

__all__ = ["batch_quantities", "pairs_in_halves", "read_in_forward"]


def batch_quantities(
    model: nn.Module, batch: Mapping[str, Any], objective: Objective, reference: Reference | None = None
) -> dict[str, Any]:
    """Run a causal language model on a batch of answers and return what an objective reads.

    One pass over both sides, without logits; the reference runs only where a term reads it and the batch brings no
    `reference_<side>_logps` along.

    Args:
        model: a causal language model of transformers, or a peft model around one.
        batch: `<side>_ids`, `<side>_mask` and `<side>_attention` `[batch, time]` of chosen and rejected answers or of responses,
            and other columns that terms read.
        reference: the frozen model: `reference_for(model)`, made before the first step; it is moved to where the model is.

    Returns:
        The batch together with the quantities, by name: what `objective(...)` and `objective.evaluate(...)` take.

    Raises:
        QuantityError: the batch has no answers, or a term reads the reference and there is none.

        >>> loss = objective(batch_quantities(model, batch, objective, reference_for(model)))  # doctest: +SKIP
    """
    reads = objective.plan(None) | objective.plan("main")
    readout = Language(_beside(reference, model))
    found = readout(ModelView(model), Quantities(readout.also_named(batch)), reads)
    # In full and at once: a loop may pass the result through wrappers that look at every value.
    return {name: found[name] for name in dict.fromkeys([*batch, *sorted(reads)]) if name in found}


def read_in_forward(model: nn.Module, objective: Objective, reference: Reference | None = None) -> nn.Module:
    """Teach a model to return what an objective reads when it is called with answers: `model(chosen_ids=..., ...)`.

    Every other call stays what it was, so that the model generates, is saved and is wrapped (mixed precision, data parallelism) as
    before. For loops that call the model themselves, such as the `Trainer` of transformers.

    Args:
        model: as in `batch_quantities`; its `forward` is replaced, no weight and no class.
        reference: the frozen model, made before.

    Returns: the model itself.
    """
    own = model.forward
    plain = getattr(own, "__func__", None)

    @wraps(own)
    def forward(self: nn.Module, *inputs: Any, **keywords: Any) -> Any:
        if inputs or not any(f"{side}_ids" in keywords for side in SIDES):
            # A copy of the model must run its own weights, so the method is bound anew.
            return own(*inputs, **keywords) if plain is None else plain(self, *inputs, **keywords)
        keywords.pop("num_items_in_batch", None)
        return batch_quantities(self, keywords, objective, reference)

    model.forward = MethodType(forward, model)
    return model


def _beside(reference: Reference | None, model: nn.Module) -> Reference | None:
    """Move a frozen copy to the model's device: loops move the model after the copy was made."""
    if isinstance(reference, FrozenModel):
        device = next(model.parameters()).device
        if next(reference.module.parameters()).device != device:
            reference.to(device)
    return reference


def pairs_in_halves(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name what TRL's preference collator joins: the chosen answers in the first half of the rows, the rejected ones in the second.

    Args:
        batch: `input_ids`, `attention_mask` and `completion_mask` `[2 batch, time]`; if offered, `ref_chosen_logps` and
            `ref_rejected_logps` `[batch]`.

    Returns: `<side>_ids`, `<side>_attention`, `<side>_mask` `[batch, time]`, and `reference_<side>_logps` where they were offered.

        >>> rows = torch.tensor([[1, 2], [3, 4]])
        >>> pairs_in_halves({"input_ids": rows, "attention_mask": rows, "completion_mask": rows})["rejected_ids"]
        tensor([[3, 4]])
    """
    found: dict[str, Tensor] = {}
    for name, joined in (("ids", "input_ids"), ("attention", "attention_mask"), ("mask", "completion_mask")):
        rows = batch[joined] if name == "ids" else batch[joined].bool()
        found[f"chosen_{name}"], found[f"rejected_{name}"] = rows.chunk(2)
    for side in ("chosen", "rejected"):
        if f"ref_{side}_logps" in batch:
            found[f"reference_{side}_logps"] = batch[f"ref_{side}_logps"]
    return found
