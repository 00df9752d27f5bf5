"""The readout of causal language models: the token record of answers, from one fused pass and without logits.

A batch holds, for each side (`chosen`, `rejected`, or `response` where there is one answer),

    <side>_ids int64 [batch, time]      prompt and answer, padded
    <side>_attention bool [batch, time] which tokens are real
    <side>_mask bool [batch, time]      which tokens are the answer's, its end-of-sequence token included

and terms read `<side>_logps`, `<side>_kl`, `reference_<side>_logps`, ... by name (`poise.quantities` lists them). Entry t of
every one concerns token t. Only the states before answer tokens meet the output matrix, tile by tile.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from poise.errors import IncompatibleError, QuantityError
from poise.frozen import FrozenModel
from poise.problem import ModelView
from poise.quantities import Quantities
from poise.readouts.token_scores import OUTPUTS, Head, token_scores

__all__ = ["SIDES", "AdapterOff", "Language", "Reference", "language_states", "needs_reference", "reference_for"]

SIDES = ("chosen", "rejected", "response")
_OF_REFERENCE = ("logps", "logsumexp", "entropy")


class Reference(Protocol):
    """A frozen language model: runs a function of the module without gradient."""

    def run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Return `function(module, *inputs)`."""
        ...


class AdapterOff:
    """The base model under a switched-off adapter, as the reference of a model that trains the adapter alone.

    Args:
        model: a peft model; its base weights do not move, so no second copy is needed.

    Raises:
        IncompatibleError: the model has no adapter that can be switched off.
    """

    def __init__(self, model: nn.Module) -> None:
        if not hasattr(model, "disable_adapter"):
            raise IncompatibleError(
                f"{type(model).__name__} has no adapter to switch off; use FrozenModel(model) as the reference."
            )
        self.module = model

    def run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Return `function(module, *inputs)` of the base model, in evaluation mode and without gradient."""
        with torch.no_grad(), self.module.disable_adapter(), _evaluating(self.module):  # type: ignore[operator]
            return function(self.module, *inputs)


@dataclass(frozen=True)
class States:
    """What the model's body says of a batch, and the map from there to logits.

    Attributes:
        last: float `[batch, time, width]`, after the final normalisation.
        all: hidden states of every layer, the embedding left out, or None where nobody asked.
        head: how `last`, gathered to rows, becomes a `Head`.
    """

    last: Tensor
    all: tuple[Tensor, ...] | None
    head: Callable[[Tensor], Head]


def language_states(module: nn.Module, ids: Tensor, attention: Tensor, layers: bool = False) -> States:
    """Run a transformers causal language model up to its output matrix.

    Args:
        module: a causal language model of transformers, or a peft model around one.
        ids: int64 `[batch, time]`. attention: bool `[batch, time]`; padding may stand on either side.
        layers: also return every layer's states.

    Raises:
        IncompatibleError: the module is no such model, or its output layer is of a kind that cannot be scored in tiles.
    """
    base: Any = module.get_base_model() if hasattr(module, "get_base_model") else module  # type: ignore[operator]
    if not hasattr(base, "get_output_embeddings") or base.get_output_embeddings() is None:
        raise IncompatibleError(
            f"The language readout needs a causal language model of transformers, and this {type(base).__name__} has no output layer."
        )
    body = base.base_model
    keywords: dict[str, Any] = {"input_ids": ids, "attention_mask": attention, "use_cache": False}
    if "position_ids" in _parameters_of(type(body).forward):
        keywords["position_ids"] = (attention.long().cumsum(-1) - 1).clamp(min=0)
    if layers:
        keywords["output_hidden_states"] = True
    out = body(**keywords)
    kind = ids.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    states = tuple(out.hidden_states[1:]) if layers else None
    return States(out.last_hidden_state, states, _head_of(base, dtype))


@lru_cache(maxsize=64)
def _parameters_of(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def _head_of(base: Any, dtype: torch.dtype | None) -> Callable[[Tensor], Head]:
    """Read the output layer of a model, an adapter on it included, at the parameters that it has now."""
    layer = base.get_output_embeddings()
    # A layer that peft trains whole stands beside the original one.
    copies = getattr(layer, "modules_to_save", None)
    if copies is not None:
        layer = layer.original_module if layer.disable_adapters else copies[layer.active_adapters[0]]
    plain = getattr(layer, "base_layer", layer)
    weight, bias = getattr(plain, "weight", None), getattr(plain, "bias", None)
    if not isinstance(weight, Tensor):
        raise IncompatibleError(f"The output layer is a {type(plain).__name__} without a plain weight matrix.")
    adapters = (
        [] if plain is layer or layer.disable_adapters else [_adapter(layer, name) for name in layer.active_adapters]
    )
    config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    softcap, scale = getattr(config, "final_logit_softcapping", None), _scale_of(config)

    def head(rows: Tensor) -> Head:
        features = (rows, *(project(rows) for project, _ in adapters))
        return Head(features, (weight, *(up for _, up in adapters)), bias, softcap, scale, dtype)

    return head


def _adapter(layer: Any, name: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return what a LoRA adapter of the output layer adds: `h -> s dropout(h) A'`, and `B`."""
    if name not in getattr(layer, "lora_A", {}) or getattr(layer, "use_dora", {}).get(name):
        raise IncompatibleError(
            f"The adapter {name!r} on the output layer is no plain LoRA, so the layer cannot be scored in tiles. "
            "Leave the output layer out of target_modules, or list it in modules_to_save."
        )
    down, up, dropout, scaling = (
        layer.lora_A[name].weight,
        layer.lora_B[name].weight,
        layer.lora_dropout[name],
        layer.scaling[name],
    )
    return lambda rows: scaling * (dropout(rows).to(down.dtype) @ down.t()), up


def _scale_of(config: Any) -> float:
    """Return what a model multiplies its logits by; families say it under different names."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None:
        return 1.0
    return float(divisor) if getattr(config, "model_type", "") == "hyperclovax" else 1.0 / float(divisor)


class Language:
    """Offer the token record of a causal language model's answers.

    On a batch of pairs `response_*` is another name of `chosen_*`. What the plan reads is computed in one pass over the sides
    together; what is read without being planned costs a pass of its own. No reference runs unless a term reads it, and a batch
    that brings `reference_<side>_logps` along (computed once, before training) is not computed again.

    Args:
        reference: the frozen model: a `FrozenModel`, `AdapterOff(model)`, or None where the batches bring its values along.

    Raises:
        QuantityError: the batch has no answers, or a reference is read and there is none.
    """

    output = "response_logps"

    def __init__(self, reference: Reference | None = None) -> None:
        self.reference = reference

    def also_named(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return the data of a batch with those of the chosen answer under `response_` too."""
        if "response_ids" in data:
            return dict(data)
        return {**{_renamed(n, "chosen_", "response_"): v for n, v in data.items() if n.startswith("chosen_")}, **data}

    def __call__(self, model: ModelView, batch: Quantities, reads: frozenset[str]) -> Quantities:
        sides = [side for side in SIDES if f"{side}_ids" in batch]
        if not sides:
            raise QuantityError(
                "The language readout reads 'response_ids', or 'chosen_ids' and 'rejected_ids', and the batch offers "
                f"{', '.join(sorted(batch)) or 'nothing'}."
            )
        batch.put("model", model)
        if "parameters" in reads:
            batch.put("parameters", model.parameters)
        passes = _Passes(model, self.reference, batch, sides, reads)
        for side in sides:
            passes.offer(side)
        if "response" not in sides and "chosen" in sides:
            _alias(batch, "chosen", "response")
        return batch


class _Passes:
    """The forward passes over one batch: one for the policy, one for the reference, each when first read."""

    def __init__(
        self, model: ModelView, reference: Reference | None, batch: Quantities, sides: list[str], reads: frozenset[str]
    ) -> None:
        self.model, self.reference, self.batch, self.sides = model, reference, batch, sides
        if "response" not in sides:
            reads = reads | {_renamed(name, "response_", "chosen_") for name in reads}
        self.reads = reads
        self.layers = any(f"{side}_states" in reads for side in sides)
        self.planned = {side: tuple(n for n in OUTPUTS if f"{side}_{n}" in reads) for side in sides}
        self.wanted = {
            side: tuple(n for n in _OF_REFERENCE if self._missing(side, n) and self._reads(side, n)) for side in sides
        }
        # Named values of the batch, so that each pass has its own random numbers whoever reads it first.
        batch.offer("_policy", lambda: self._states(self.model, [s for s in sides if self.planned[s]] or sides))
        batch.offer("_reference", lambda: self._states(self._have_reference(), self._of_reference()))
        # Sides that are asked for the same scores share one run over the vocabulary, and one gradient of the output matrix.
        for outputs in {*self.planned.values()}:
            batch.offer(f"_scores_{outputs}", partial(self._scores, _having(self.planned, outputs), outputs))
        for outputs in {*self.wanted.values()}:
            batch.offer(
                f"_reference_scores_{outputs}", partial(self._reference_scores, _having(self.wanted, outputs), outputs)
            )

    def _reads(self, side: str, name: str) -> bool:
        return f"reference_{side}_{name}" in self.reads

    def _missing(self, side: str, name: str) -> bool:
        return f"reference_{side}_{name}" not in self.batch

    def _of_reference(self) -> list[str]:
        """Return the sides that the reference has to run on."""
        asked = [
            s
            for s in self.sides
            if self.wanted[s] or {"kl", "reverse_kl"} & {*self.planned[s]} or f"{s}_states" in self.reads
        ]
        return asked or self.sides

    def offer(self, side: str) -> None:
        """Offer everything about one side's answer."""
        batch = self.batch
        if f"{side}_positions" not in batch:
            batch.offer(f"{side}_positions", lambda: _positions(batch[f"{side}_mask"]))
        for name in OUTPUTS:
            if f"{side}_{name}" not in batch:
                batch.offer(f"{side}_{name}", partial(self._one, side, name))
        for name in _OF_REFERENCE:
            if self._missing(side, name):
                batch.offer(f"reference_{side}_{name}", partial(self._one_of_reference, side, name))
        if f"{side}_states" not in batch:
            batch.offer(f"{side}_states", lambda: self._layers(side))

    def _have_reference(self) -> Reference:
        if self.reference is None:
            raise QuantityError(
                "A term reads the reference model, and there is none: give Language(reference=FrozenModel(model)), or data with "
                "'reference_<side>_logps'."
            )
        return self.reference

    def _states(self, model: ModelView | Reference, sides: list[str]) -> dict[str, States]:
        """Run a model over several sides in one pass."""
        ids = [self.batch[f"{side}_ids"] for side in sides]
        attention = [self._attention(side) for side in sides]
        longest = max(i.shape[1] for i in ids)
        joined = torch.cat([_padded(i, longest) for i in ids])
        deep = self.layers and model is self.reference
        with self.model.autocast():  # the reference too, so that equal weights give equal numbers
            states = model.run(language_states, joined, torch.cat([_padded(a, longest) for a in attention]), deep)
        found, start = {}, 0
        for side, i in zip(sides, ids, strict=True):
            stop, time = start + len(i), i.shape[1]
            layers = None if states.all is None else tuple(layer[start:stop, :time] for layer in states.all)
            found[side] = States(states.last[start:stop, :time], layers, states.head)
            start = stop
        return found

    def _attention(self, side: str) -> Tensor:
        name = f"{side}_attention"
        ids: Tensor = self.batch[f"{side}_ids"]
        return self.batch[name].bool() if name in self.batch else torch.ones_like(ids, dtype=torch.bool)

    def _policy(self, side: str) -> States:
        states: Mapping[str, States] = self.batch["_policy"]
        return states[side] if side in states else self._states(self.model, [side])[side]

    def _referred(self, side: str) -> States:
        states: Mapping[str, States] = self.batch["_reference"]
        return states[side] if side in states else self._states(self._have_reference(), [side])[side]

    def _targets(self, sides: list[str]) -> tuple[list[Tensor], Tensor]:
        """Return which tokens of each side are scored, bool `[batch, time - 1]`, and those tokens of all sides."""
        masks = [self.batch[f"{side}_mask"][:, 1:].bool() for side in sides]
        ids = [self.batch[f"{side}_ids"][:, 1:][mask] for side, mask in zip(sides, masks, strict=True)]
        return masks, torch.cat(ids)

    def _scores(self, sides: list[str], outputs: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
        """Score the answers of some sides under the policy: by side, by name, `[batch, time]`."""
        masks, target = self._targets(sides)
        head = _head([self._policy(side) for side in sides], masks)
        reference = None
        if {"kl", "reverse_kl"} & {*outputs}:
            with torch.no_grad():
                reference = _head([self._referred(side) for side in sides], masks)
        return _scatter(token_scores(head, target, outputs, reference), sides, masks)

    def _reference_scores(self, sides: list[str], outputs: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
        with torch.no_grad():
            masks, target = self._targets(sides)
            head = _head([self._referred(side) for side in sides], masks)
            return _scatter(token_scores(head, target, outputs), sides, masks)

    def _one(self, side: str, name: str) -> Tensor:
        outputs = self.planned[side]
        found = self.batch[f"_scores_{outputs}"] if name in outputs else self._scores([side], (name,))
        return found[side][name]

    def _one_of_reference(self, side: str, name: str) -> Tensor:
        outputs = self.wanted[side]
        known = name in outputs
        found = self.batch[f"_reference_scores_{outputs}"] if known else self._reference_scores([side], (name,))
        return found[side][name]

    def _layers(self, side: str) -> Tensor:
        """Return the reference's states before each answer token, `[layers, batch, time, width]`, 0 outside."""
        states = self._referred(side).all
        if states is None:
            states = (
                self._have_reference().run(language_states, self.batch[f"{side}_ids"], self._attention(side), True).all
            )
        assert states is not None
        mask = self.batch[f"{side}_mask"][:, 1:].bool()
        # Written into one tensor: stacking, padding and a change of type would each hold a copy of every layer.
        batch, time, width = states[0].shape
        wide = torch.promote_types(states[0].dtype, torch.float32)
        found = states[0].new_zeros(len(states), batch, time, width, dtype=wide)
        for place, layer in enumerate(states):
            found[place, :, 1:][mask] = layer[:, :-1][mask].to(wide)
        return found


def _having(outputs: Mapping[str, tuple[str, ...]], wanted: tuple[str, ...]) -> list[str]:
    return [side for side, asked in outputs.items() if asked == wanted]


def _head(states: list[States], masks: list[Tensor]) -> Head:
    """Return the head on the states before the tokens that each `mask` `[batch, time - 1]` marks."""
    rows = [s.last[:, :-1][mask] for s, mask in zip(states, masks, strict=True)]
    return states[0].head(torch.cat(rows))


def _scatter(scores: dict[str, Tensor], sides: list[str], masks: list[Tensor]) -> dict[str, dict[str, Tensor]]:
    """Put the scores of marked tokens back into `[batch, time]`, 0 elsewhere; a sequence's first token is never predicted."""
    found: dict[str, dict[str, Tensor]] = {side: {} for side in sides}
    counts = [int(mask.sum()) for mask in masks]
    for name, values in scores.items():
        for side, mask, own in zip(sides, masks, torch.split(values, counts), strict=True):
            placed = values.new_zeros(mask.shape).masked_scatter(mask, own)
            found[side][name] = nn.functional.pad(placed, (1, 0))
    return found


def _positions(mask: Tensor) -> Tensor:
    """Return each token's place in its answer, from 0; -1 outside."""
    place = mask.long().cumsum(-1) - 1
    return torch.where(mask.bool(), place, -1)


def _padded(values: Tensor, time: int) -> Tensor:
    return values if values.shape[1] == time else nn.functional.pad(values, (0, time - values.shape[1]))


def _renamed(name: str, old: str, new: str) -> str:
    """Put `new` in the place of the side `old`, also behind `reference_`."""
    head = "reference_" if name.startswith("reference_") else ""
    rest = name[len(head) :]
    return head + new + rest[len(old) :] if rest.startswith(old) else name


def _alias(batch: Quantities, old: str, new: str) -> None:
    """Offer every quantity of the side `old` under the side `new` too."""
    for name in [n for n in batch if n.startswith((f"{old}_", f"reference_{old}_"))]:
        other = _renamed(name, f"{old}_", f"{new}_")
        if other not in batch:
            batch.offer(other, partial(batch.__getitem__, name))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Hold a module in evaluation mode, and put every part back as it was."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def needs_reference(reads: Iterable[str]) -> bool:
    """Whether any of these quantities can only be had with a frozen reference."""
    ends = tuple(f"{side}_{name}" for side in SIDES for name in ("kl", "reverse_kl", "states"))
    return any(name.startswith("reference_") or name in ends for name in reads)


def reference_for(model: nn.Module) -> Reference:
    """Return the reference that belongs to a model before training: its adapter switched off, or a frozen copy."""
    if hasattr(model, "disable_adapter") and not any(
        p.requires_grad for n, p in model.named_parameters() if "lora_" not in n
    ):
        return AdapterOff(model)
    return FrozenModel(model)
