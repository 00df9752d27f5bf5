"""A readout for a classifier that learns on one domain and is used on another: logits and the features before its head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import IncompatibleError, InputError
from poise.problem import ModelView
from poise.quantities import Quantities
from poise.readouts.supervised import Classification


class DomainFeatures(Classification):
    """Offer `features` [batch, width], `logits` and `frozen_head_logits` [batch, classes], from one forward pass over both domains.

    One pass, so that batch statistics are those of the joined batch. `features` is what enters the head, and
    `frozen_head_logits` are the same numbers as `logits`, through a constant copy of the head: `target_classification` and
    `mutual_information` read them where they are offered, so that the head learns from labels alone and its parameters are
    not among those that objectives share.

    Args:
        head: name of the submodule that makes logits from features; the last linear layer where nothing is said.
        target_trains_head: do not offer `frozen_head_logits`; objectives without labels then move the head as well.

    Raises:
        InputError: the model has no such submodule.
        IncompatibleError: the head is not called exactly once, or not with features [batch, width].
    """

    def __init__(self, head: str | None = None, target_trains_head: bool = False) -> None:
        super().__init__()
        self.head, self.target_trains_head = head, target_trains_head

    def __call__(self, model: ModelView, batch: Quantities, reads: frozenset[str]) -> Quantities:
        name = self._name_of_head(model.module)
        kept: dict[str, Tensor] = {}

        def run() -> Tensor:
            out, kept["features"] = model.run(_OutAndFeatures(name), batch["input"])
            return _in_float(self._output(out))

        def features() -> Tensor:
            batch["logits"]
            return kept["features"]

        batch.offer("logits", run)
        batch.offer("features", features)
        if not self.target_trains_head:
            batch.offer("frozen_head_logits", lambda: self._through_constant_head(model, name, batch["features"]))
        self._offer_more(batch)
        batch.put("model", model)
        if "parameters" in reads:
            batch.put("parameters", model.parameters)
        return batch

    def _through_constant_head(self, model: ModelView, name: str, features: Tensor) -> Tensor:
        head, at = model.module.get_submodule(name), model.at or {}
        own = {n: at.get(f"{name}.{n}", p).detach() for n, p in head.named_parameters()}
        with model.autocast():
            return _in_float(self._output(torch.func.functional_call(head, own, (features,))))

    def _name_of_head(self, module: nn.Module) -> str:
        if self.head is None:
            linear = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
            if not linear or linear[-1] == "":
                raise InputError(
                    "DomainFeatures: no layer of the model is taken for its head: name the submodule, head=..."
                )
            return str(linear[-1])
        if self.head not in dict(module.named_modules()):
            known = ", ".join(name for name, _ in module.named_children())
            raise InputError(f"DomainFeatures: the model has no submodule {self.head!r}; it has {known}.")
        return self.head


class _OutAndFeatures:
    """Run a model and keep what entered its head."""

    def __init__(self, head: str) -> None:
        self.head = head

    def __call__(self, module: nn.Module, input: Any) -> tuple[Any, Tensor]:
        entered: list[Tensor] = []
        handle = module.get_submodule(self.head).register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
        try:
            out = module(input)
        finally:
            handle.remove()
        if len(entered) != 1 or not isinstance(entered[0], Tensor) or entered[0].ndim != 2:
            raise IncompatibleError(
                f"DomainFeatures: the head {self.head!r} must be called once with features [batch, width], and it was called "
                f"{len(entered)} times."
            )
        return out, _in_float(entered[0])


def _in_float(x: Tensor) -> Tensor:
    """Losses are taken in float32 whatever the forward pass computed in."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
