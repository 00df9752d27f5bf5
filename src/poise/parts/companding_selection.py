"""Which tensors of a model are companded: by kind of layer, by name, or by the user's own test."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from poise.errors import InputError

__all__ = ["KINDS", "Place", "Selector", "parametrizations_of", "select"]

KINDS = ("linear", "conv", "recurrent", "attention", "embedding", "norm", "bias", "other")
Selector = Sequence[str] | str | Callable[[str, nn.Module, Tensor], bool]

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)


@dataclass(frozen=True)
class Place:
    """Where a tensor sits: `module` holds it as `tensor_name`, and users know it as `name`."""

    name: str
    module: nn.Module
    tensor_name: str
    kind: str

    @property
    def tensor(self) -> nn.Parameter:
        """The trainable tensor itself: below another parametrization, the one that this starts from."""
        if not parametrize.is_parametrized(self.module, self.tensor_name):
            plain = self.module._parameters[self.tensor_name]
            assert plain is not None
            return plain
        held = parametrizations_of(self.module, self.tensor_name)
        start: nn.Parameter = held.original if held.is_tensor else held.original1
        return start

    @property
    def channel_dim(self) -> int:
        """The dimension that counts output channels (for an embedding: features)."""
        return 1 if isinstance(self.module, nn.modules.conv._ConvTransposeNd | nn.Embedding | nn.EmbeddingBag) else 0


def parametrizations_of(module: nn.Module, tensor_name: str) -> Any:
    """The `ParametrizationList` of a parametrized tensor."""
    return cast(nn.ModuleDict, module.parametrizations)[tensor_name]


def _kind(module: nn.Module, tensor_name: str, tensor: Tensor) -> str:
    if isinstance(module, _NORMS):
        return "norm"
    if tensor_name.startswith("bias") or tensor_name.endswith("bias"):
        return "bias"
    if tensor.dim() < 2:
        return "other"
    by_type = {
        "linear": (nn.Linear, nn.Bilinear),
        "conv": (_ConvNd,),
        "recurrent": (nn.RNNBase, nn.RNNCellBase),
        "attention": (nn.MultiheadAttention,),
        "embedding": (nn.Embedding, nn.EmbeddingBag),
    }
    return next((kind for kind, types in by_type.items() if isinstance(module, types)), "other")


def _places(model: nn.Module) -> Iterable[Place]:
    for module_name, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList) or ".parametrizations." in f".{module_name}.":
            continue
        names = [n for n, p in module._parameters.items() if p is not None]
        if parametrize.is_parametrized(module):
            names += [n for n in cast(nn.ModuleDict, module.parametrizations) if isinstance(getattr(module, n), Tensor)]
        for tensor_name in names:
            tensor = getattr(module, tensor_name)
            name = f"{module_name}.{tensor_name}".lstrip(".")
            kind = "other" if is_lazy(tensor) else _kind(module, tensor_name, tensor)
            if is_lazy(tensor) and isinstance(module, nn.Linear | _ConvNd) and tensor_name == "weight":
                kind = "linear" if isinstance(module, nn.Linear) else "conv"
            yield Place(name, module, tensor_name, kind)


def _matches(place: Place, pattern: str) -> bool:
    if pattern in KINDS:
        return place.kind == pattern
    module_name = place.name.rpartition(".")[0]
    return fnmatch.fnmatchcase(place.name, pattern) or fnmatch.fnmatchcase(module_name, pattern)


def _chosen(place: Place, selector: Selector) -> bool:
    if callable(selector):
        return bool(selector(place.name, place.module, getattr(place.module, place.tensor_name)))
    return any(_matches(place, p) for p in ([selector] if isinstance(selector, str) else selector))


def select(model: nn.Module, include: Selector, exclude: Selector) -> list[Place]:
    """List the tensors that `include` takes and `exclude` leaves, in the model's order, each ready to be companded.

    Args:
        model: any module tree.
        include, exclude: kinds of layer (`linear`, `conv`, `recurrent`, `attention`, `embedding`, `norm`, `bias`, `other`), name patterns
            (`"encoder.*"`, `"*.weight"`, or a module's name), or `callable(name, module, tensor) -> bool`. `exclude` wins.

    Raises:
        InputError: nothing is selected, a pattern of `include` matches nothing, or a selected tensor is quantised, lazy or not finite.

    Example:
        >>> [place.name for place in select(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), ("linear",), ("bias",))]
        ['0.weight']
    """
    places = list(_places(model))
    for pattern in () if callable(include) else [include] if isinstance(include, str) else include:
        if pattern not in KINDS and not any(_matches(place, pattern) for place in places):
            known = ", ".join(place.name for place in places[:12])
            raise InputError(
                f"compand: include={pattern!r} matches no weight. Kinds are {', '.join(KINDS)}; names here: {known}."
            )
    chosen = [place for place in places if _chosen(place, include) and not _chosen(place, exclude)]
    if not chosen:
        known = ", ".join(f"{place.name} ({place.kind})" for place in places[:12]) or "none at all"
        raise InputError(
            f"compand: no weight is selected by include={include!r}, exclude={exclude!r}. The model's parameters: {known}."
        )
    for place in chosen:
        _require_usable(place)
    return chosen


def _require_usable(place: Place) -> None:
    tensor = getattr(place.module, place.tensor_name)
    if is_lazy(tensor):
        raise InputError(
            f"compand: {place.name} has no shape yet (a lazy layer). Run one batch through the model first."
        )
    if not tensor.is_floating_point():
        raise InputError(
            f"compand: {place.name} is {tensor.dtype}; companding needs float weights that can be trained. "
            "Compand before quantising, or leave this layer out with exclude=."
        )
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(
            f"compand: {place.name} holds NaN or infinite weights; repair or re-initialise the layer first."
        )
