"""Token weights from what a frozen model computes: no training, one forward pass of the reference (MaPO).

    mask = ActivationMask(types=("mlp", "attention"), layers=(0, 1, 2))
    readout = mask.over(Language(reference))        # offers <side>_token_weight beside everything else
    run = poise.fit(model, "sparse_po(mask_from='data')", pairs, readout=readout)

The same weights serve `preference_margin(token_weight='data')` and `token_kl(token_weight=True)`. Where the reference runs once before
training anyway, `mask.columns(reference, batch)` gives them as data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import IncompatibleError, InputError, QuantityError
from poise.operators import rescaled

__all__ = ["TYPES", "ActivationMask"]

SIDES = ("chosen", "rejected", "response")

TYPES: dict[str, str] = {
    "mlp_activation": r"(^|\.)(act|act_fn)$",
    "mlp": r"(^|\.)(mlp|feed_forward)$",
    "query": r"(^|\.)q_proj$",
    "key": r"(^|\.)k_proj$",
    "value": r"(^|\.)v_proj$",
    "query_key_value": r"(^|\.)c_attn$",
    "attention": r"(^|\.)(self_attn|attn|attention)$",
    "residual": r"(^|\.)(layers|h|blocks)\.\d+$",
    "layer_norm": r"(layernorm|layer_norm|(^|\.)(ln|norm)_?\d)$",
    "final_norm": r"(^|\.)(ln_f|final_layer_norm|model\.norm)$|^norm$",
}
"""Activation types by the names that modules carry in transformers models; any other type is a pattern of its own."""


class ActivationMask:
    """Weigh tokens by the mean activation of a frozen model before each of them.

    a_t = mean over features of the activation at t - 1,     m_t = (a_t - min a) / (max a - min a)  over the answer's tokens

    averaged over the layers of a type, then over types. Every activation is brought to [0, 1] by itself, so that it reaches both
    ends; an activation that is equal at every token, and an answer of one token, weigh 1. Standardising before, as the authors do,
    changes nothing but rounding. All in float32, detached.

    Args:
        types: names of `TYPES`, or patterns of module names of your own. Queries and keys after their rotation are no modules and
            cannot be named.
        layers: which layers, from 0; None takes all. Modules outside of layers count always.

    Raises:
        InputError: no type, or a pattern that is none.

    Example:
        >>> net = nn.ModuleDict({"mlp": nn.Linear(2, 2)})
        >>> sorted(ActivationMask(types=("mlp",)).modules(net))
        ['mlp']

    Source: arXiv:2410.05102 (MaPO); the folder SparsePO of huawei-noah/HEBO.
    """

    def __init__(
        self, types: Sequence[str] = ("mlp", "attention", "residual"), layers: Sequence[int] | None = None
    ) -> None:
        if not types or isinstance(types, str):
            raise InputError(f"activation_mask: types is a sequence of names, one at least, and it is {types!r}.")
        try:
            self.patterns = {name: re.compile(TYPES.get(name, name)) for name in types}
        except re.error as error:
            raise InputError(
                f"activation_mask: a type is one of {', '.join(TYPES)}, or a pattern of module names ({error})."
            ) from error
        self.layers = None if layers is None else frozenset(layers)

    def modules(self, module: nn.Module) -> dict[str, str]:
        """Return the modules that are read, by name, each with its type.

        Raises:
            IncompatibleError: a type that no module of the model has.
        """
        found: dict[str, str] = {}
        for kind, pattern in self.patterns.items():
            names = [name for name, _ in module.named_modules() if pattern.search(name) and self._wanted(name)]
            if not names:
                raise IncompatibleError(
                    f"activation_mask: no module of this {type(module).__name__} is of the type {kind!r}"
                    + ("" if self.layers is None else f" in layers {sorted(self.layers)}")
                    + f". Types are {', '.join(TYPES)}, or a pattern of module names."
                )
            found |= {name: kind for name in names if name not in found}
        return found

    def _wanted(self, name: str) -> bool:
        number = re.search(r"\.(\d+)(\.|$)", name)
        return self.layers is None or number is None or int(number[1]) in self.layers

    @torch.no_grad()
    def scores(self, module: nn.Module, run: Callable[[], Any], mask: Tensor, ahead: int = 1) -> Tensor:
        """Return m float32 [batch, time] of answers.

        Args:
            module: the frozen model.
            run: makes one forward pass of it over [batch, time] tokens.
            mask: bool [batch, time], the answers' tokens.
            ahead: how many places before a token the activations stand that predict it: 1, or 0 where the model shifts its input itself.

        Raises:
            QuantityError: an answer without tokens, or an activation that is no [batch, time, ...].
        """
        if not bool(mask.any(-1).all()):
            raise QuantityError(f"activation_mask: the answer of row {int((~mask.any(-1)).nonzero()[0])} has no token.")
        parts = dict(module.named_modules())
        sums: dict[str, list[Tensor]] = {kind: [] for kind in self.patterns}

        def take(kind: str, name: str, _: nn.Module, __: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if not isinstance(value, Tensor) or value.shape[:2] != mask.shape:
                raise QuantityError(f"activation_mask: {name} gives no activation [batch, time, ...].")
            # One number a token and layer: nothing of the activation is kept.
            level = value.float().flatten(2).mean(-1)
            sums[kind].append(rescaled(nn.functional.pad(level, (ahead, 0))[:, : mask.shape[1]], mask))

        hooks = [
            parts[name].register_forward_hook(partial(take, kind, name)) for name, kind in self.modules(module).items()
        ]
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack([torch.stack(own).mean(0) for own in sums.values() if own]).mean(0)

    def of(self, reference: Any, ids: Tensor, attention: Tensor | None, mask: Tensor) -> Tensor:
        """Return m of answers under a frozen language model of transformers.

        Args:
            reference: has `run(function, *inputs)`, as `FrozenModel` and `AdapterOff` do.
            ids, attention, mask: [batch, time]; attention None takes every token as real.
        """

        def measured(module: nn.Module) -> Tensor:
            real = torch.ones_like(ids, dtype=torch.bool) if attention is None else attention.bool()
            body = getattr(module, "base_model", module)
            places = (real.long().cumsum(-1) - 1).clamp(min=0)
            return self.scores(module, lambda: body(input_ids=ids, attention_mask=real, position_ids=places), mask)

        found: Tensor = reference.run(measured)
        return found

    def columns(self, reference: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return `<side>_token_weight` of every answer that a batch holds."""
        return {
            f"{side}_token_weight": self.of(
                reference, batch[f"{side}_ids"], batch.get(f"{side}_attention"), batch[f"{side}_mask"].bool()
            )
            for side in SIDES
            if f"{side}_ids" in batch
        }

    def over(self, readout: Any) -> _Weighing:
        """Return a readout that offers `<side>_token_weight` beside what `readout` does, from its reference.

        Raises:
            IncompatibleError: the readout has no reference.
        """
        if getattr(readout, "reference", None) is None:
            raise IncompatibleError(
                "activation_mask: the readout has no reference; give Language(reference=FrozenModel(model))."
            )
        return _Weighing(self, readout)


class _Weighing:
    """A readout with token weights of its reference's activations."""

    def __init__(self, mask: ActivationMask, readout: Any) -> None:
        self.mask, self.readout, self.reference = mask, readout, readout.reference
        self.output = readout.output

    def __getattr__(self, name: str) -> Any:
        if name in ("readout", "mask"):
            raise AttributeError(name)
        return getattr(self.readout, name)

    def __call__(self, model: Any, batch: Any, reads: frozenset[str]) -> Any:
        sides = [side for side in SIDES if f"{side}_ids" in batch]
        for side in sides:
            if f"{side}_token_weight" not in batch:
                batch.offer(f"{side}_token_weight", partial(self._weight, batch, side))
        return self.readout(model, batch, reads)

    def _weight(self, batch: Any, side: str) -> Tensor:
        attention = batch.get(f"{side}_attention")
        return self.mask.of(self.reference, batch[f"{side}_ids"], attention, batch[f"{side}_mask"].bool())
