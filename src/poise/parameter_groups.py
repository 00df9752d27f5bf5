"""Which parameters an optimiser should decay, and which it should move slowly.

Weight decay belongs on matrices and kernels: biases, normalisation and learned scales only lose by it. A module may say more about its own
parameters with an attribute

    parameter_options = {"log_a": {"weight_decay": 0.0, "lr_multiplier": 0.1}}

so that this file need not know the parts of the library.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from poise.errors import InputError

__all__ = ["asked_for", "parameter_groups"]

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def parameter_groups(
    model: nn.Module, weight_decay: float = 0.0, lr: float | None = None, multiplier: float | None = None
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into optimiser groups by whether they decay and how fast they learn.

    | group | parameters | weight decay | learning rate |
    | --- | --- | --- | --- |
    | `decay` | tensors of two dimensions or more outside normalisation | `weight_decay` | `lr` |
    | `no_decay` | biases, normalisation, learned scales | 0 | `lr` |
    | `slow` | parameters whose module asks for a multiplier: a compander's `log a`, `log b` | 0 | `multiplier*lr` |
    | `weight_space` | free parameters whose weight decays instead of themselves | 0, the value kept as `weight_space_decay` | `lr` |

    Args:
        model: any module tree; shared parameters are listed once, frozen ones not at all.
        weight_decay: at least 0.
        lr: the learning rate, above 0; needed when some parameters are slow.
        multiplier: at least 0, replaces the multiplier that modules ask for (0.1 for companding).

    Returns:
        Groups with `name`, `params`, `weight_decay` and, if `lr` is given, `lr`, in this order and without empty ones. Learning-rate
        schedules of PyTorch scale every group's own rate, so the ratio stays.

    Raises:
        InputError: an argument is out of range, or `lr` is missing where a multiplier needs it.

    Example:
        >>> [(g["name"], len(g["params"])) for g in parameter_groups(nn.Linear(3, 2), weight_decay=0.1)]
        [('decay', 1), ('no_decay', 1)]
    """
    for name, value in (("weight_decay", weight_decay), ("lr", lr), ("multiplier", multiplier)):
        if value is not None and not value >= 0:
            raise InputError(f"parameter_groups: {name} must be at least 0, but it is {value}.")
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        options: dict[str, dict[str, Any]] = getattr(module, "parameter_options", {})
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            group = _group_of(module, name, parameter.dim(), options.get(name, {}), weight_decay)
            scale = group.pop("lr_multiplier", 1.0)
            scale = multiplier if multiplier is not None and group["name"] == "slow" else scale
            if lr is not None:
                group["lr"] = lr * scale
            elif scale != 1.0:
                where = f"{module_name}.{name}".lstrip(".")
                raise InputError(
                    f"parameter_groups: {where} learns at {scale:g} times the learning rate, so lr=... must be given."
                )
            groups.setdefault((group["name"], scale), {**group, "params": []})["params"].append(parameter)
    order = ("decay", "weight_space", "no_decay", "slow")
    return [groups[key] for key in sorted(groups, key=lambda k: (order.index(k[0]), k[1]))]


def asked_for(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """One group with every trained parameter, but for those whose module asks for something else in `parameter_options`.

    What an optimiser gets that is only named: `poise.fit(model, ..., solver="sgd", lr=0.1)`. A companded model so keeps `log a` and
    `log b` slow and free of decay without its user knowing of them; a plain model gets a single group, as in PyTorch.

    Raises:
        InputError: a weight is to decay in its own space (`compand(decay_on="w")`), which a named optimiser cannot do.
    """
    rest: list[Any] = []
    special: list[dict[str, Any]] = []
    seen: set[int] = set()
    for module in model.modules():
        options: dict[str, dict[str, Any]] = getattr(module, "parameter_options", {})
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            asked = options.get(name)
            if asked is None or (asked.get("weight_space_decay") and weight_decay == 0):
                rest.append(parameter)
            elif asked.get("weight_space_decay"):
                raise InputError(
                    "this model was companded with decay_on='w', and an optimiser that is only named cannot decay its weights. Build the "
                    "optimiser from handle.parameter_groups(weight_decay=..., lr=...), call handle.follow(optimizer), and hand it over."
                )
            else:
                special.append({"params": [parameter], "lr": lr * asked.get("lr_multiplier", 1.0)})
                special[-1]["weight_decay"] = asked.get("weight_decay", weight_decay)
    merged: dict[tuple[float, float], dict[str, Any]] = {}
    for group in special:
        merged.setdefault((group["lr"], group["weight_decay"]), {**group, "params": []})["params"] += group["params"]
    return [{"params": rest}, *merged.values()]


def _group_of(
    module: nn.Module, name: str, dimensions: int, options: dict[str, Any], weight_decay: float
) -> dict[str, Any]:
    if options.get("weight_space_decay"):
        return {"name": "weight_space", "weight_decay": 0.0, "weight_space_decay": weight_decay}
    if "lr_multiplier" in options:
        return {
            "name": "slow",
            "weight_decay": options.get("weight_decay", 0.0),
            "lr_multiplier": float(options["lr_multiplier"]),
        }
    # Parametrized tensors are named `original`, so dimensions, not names, tell matrices from biases.
    # `original0` is the gain of weight normalisation: a learned scale, though it has two dimensions.
    is_scale = dimensions < 2 or name == "original0" or isinstance(module, _NORMS)
    if is_scale or name.endswith("bias") or options.get("weight_decay") == 0.0:
        return {"name": "no_decay", "weight_decay": 0.0}
    return {"name": "decay", "weight_decay": weight_decay}
