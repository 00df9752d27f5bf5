"""Weight companding: every weight is a bounded, bent function of a free parameter, `w = a*arctan(v/b)`.

The bend does two things at once. Large weights cannot grow past `w_max = a*pi/2`, and the nearer they come the slower they move; weights
near zero move at full speed. So many weights share a decision, and none rules it. Seen from `w`, gradient descent on `v` is descent on `w`
with every weight's own step size,

    dw/dt = -psi'(v)^2 dL/dw,      psi'(v) = (a/b) / (1 + (v/b)^2) = (a/b) cos^2(w/a),

and L2 decay of `v` is the barrier `(lambda/2) (b tan(w/a))^2` on `w`. The two effects can be had separately: `compand` without decay is the
geometry alone, `CompandBarrier` on plain weights is the penalty alone.

    handle = compand(model, learn=True)                                        # w is unchanged at the start
    optimizer = torch.optim.SGD(handle.parameter_groups(weight_decay=5e-4, lr=0.1), lr=0.1)
    ...                                                                        # train as usual
    handle.fold()                                                              # a plain model again, at no cost

Source: Cakaj, Mehnert, Yang, "Weight Compander", arXiv:2306.16993. The abstract states the two effects and the learned hyperparameters; the
arctangent with two parameters and the starting values are this library's reading of it.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from poise.errors import InputError
from poise.objective import Term
from poise.parts.compander import COMFORT, MARGIN, BeforeWeightNorm, Compander, EnterPass, ForwardScope, LeavePass
from poise.parts.companding_functions import CompandingFunction, companding_function
from poise.parts.companding_handle import Companding, companding_of, folded_copy, read_weights_live, remember_order
from poise.parts.companding_selection import Place, Selector, parametrizations_of, select

__all__ = ["CompandBarrier", "Compander", "Companding", "compand", "companding_of", "folded_copy"]


@dataclass
class _Plan:
    """One free parameter with every place that uses it, and the curve it gets."""

    places: list[Place]
    compander: Compander
    start: Tensor


def compand(
    module: nn.Module,
    fn: str | CompandingFunction = "arctan",
    a: float | Tensor | Literal["auto"] = "auto",
    b: float | Tensor | Literal["auto"] = "auto",
    learn: bool = False,
    per: Literal["layer", "network", "channel"] = "layer",
    include: Selector = ("linear", "conv", "recurrent", "attention"),
    exclude: Selector = ("bias", "norm"),
    init: Literal["inverse", "direct"] = "inverse",
    decay_on: Literal["v", "w"] = "v",
    *,
    mu: float = 255.0,
    multiple: float = 3.0,
    limit: float | None = None,
    clip: bool = False,
    cache: bool = True,
) -> Companding:
    """Compand the weights of a model in place: every selected weight becomes `w = a*g(v/b)` of a free parameter `v`.

    `a = max(multiple*std(w0), max|w0|/(0.9 sup|g|))` and `b = a*g'(0)` by default, per layer: slope 1 at zero, `w_max` about 4.7 standard
    deviations for `arctan`, nothing clipped. With `init="inverse"`, `v = psi^-1(w0)` and the model computes what it did before; with
    `"direct"`, `v = w0/psi'(0)` and the outer weights start compressed. Weights shared between modules share `v`. Names in the state dict
    are `layer.parametrizations.weight.original` (`v`) and `.0.log_a`, `.0.log_b`. Spectral and weight normalisation that stand on a layer
    already are applied after companding, and can be added later.

    Args:
        module: any module tree; build the optimiser afterwards.
        fn: `arctan`, `tanh`, `softsign`, `erf`, `mu_law`, `identity` or a `CompandingFunction`.
        a, b: numbers above 0, tensors that broadcast to the weight, or `"auto"`.
        learn: train `log a` and `log b` with the weights; use `handle.parameter_groups`, which slows them down and spares them decay.
        per: one `(a, b)` for each `"layer"`, for the `"network"`, or for each output `"channel"`.
        include, exclude: kinds of layer (`linear`, `conv`, `recurrent`, `attention`, `embedding`), name patterns, or a callable;
            `exclude` wins. Biases, norms and learned scales are never included by default, embeddings neither.
        init: `"inverse"` keeps the function, `"direct"` keeps the distribution of `v`.
        decay_on: whether weight decay acts on `v` (then it is a barrier on `w`) or on `w` (then call `handle.follow(optimizer)`).
        mu: the constant of `mu_law`.
        multiple: standard deviations that make the automatic `a`.
        limit: factor by which learned `a` and `b` may leave their start; `None` leaves them free.
        clip: clip weights outside `0.99*w_max` (the share is reported) instead of refusing them.
        cache: compute each weight once a forward pass of `module`; switch it off for layers that are shared between several activation
            checkpoints, which must save the same tensors when they run again.

    Returns:
        The handle: `.stats()`, `.parameter_groups(...)`, `.follow(optimizer)`, `.fold()`.

    Raises:
        InputError: nothing selected; `a` or `b` not positive; weights outside the range; a weight that is tied to one left out, is
            quantised, lazy or not finite, or has a parametrization that companding cannot stand under. The model is unchanged then.

    Example:
        >>> handle = compand(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), learn=True)
        >>> list(handle.companders)
        ['0.weight', '2.weight']

    Source:
        Cakaj, Mehnert, Yang, "Weight Compander", arXiv:2306.16993.
    """
    for name, value, allowed in (
        ("per", per, ("layer", "network", "channel")),
        ("init", init, ("inverse", "direct")),
        ("decay_on", decay_on, ("v", "w")),
    ):
        if value not in allowed:
            raise InputError(f"compand: {name} must be one of {', '.join(map(repr, allowed))}, but it is {value!r}.")
    if not (math.isfinite(multiple) and multiple > 0):
        raise InputError(f"compand: multiple must be finite and above 0, but it is {multiple}.")
    groups = _by_parameter(module, select(module, include, exclude))
    function = companding_function(fn, mu=mu)
    scales = _scales(groups, a, function, per, multiple)
    plans = []
    for places, scale in zip(groups, scales, strict=True):
        compander = Compander(function, scale, b, learn=learn, limit=limit, clip=clip)
        compander.layer, compander.decay_on = places[0].name, decay_on
        plans.append(_Plan(places, compander, _starting_value(places[0], compander, init)))
    if per == "network":
        for plan in plans[1:]:
            plan.compander.log_a, plan.compander.log_b = plans[0].compander.log_a, plans[0].compander.log_b
    for plan in plans:
        _install(plan)
    if cache:
        scope = ForwardScope([plan.compander for plan in plans])
        for plan in plans:
            plan.compander._scope = scope
        module.register_forward_pre_hook(EnterPass(scope), prepend=True)
        module.register_forward_hook(LeavePass(scope), always_call=True)
    return Companding(module)


def _by_parameter(model: nn.Module, places: list[Place]) -> list[list[Place]]:
    """Group the selected places by the tensor they share, and refuse a tensor that also serves where it would not be bent."""
    groups: dict[int, list[Place]] = {}
    for place in places:
        _require_free(place)
        groups.setdefault(id(place.tensor), []).append(place)
    chosen = {place.name for place in places}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if (
            id(tensor) in groups
            and ".parametrizations." not in f".{name}"
            and name not in chosen
            and not _same_module(model, name, groups[id(tensor)])
        ):
            other = groups[id(tensor)][0].name
            raise InputError(
                f"compand: {other} and {name} are one tied weight, but only {other} is selected. Tied weights must share v: include both "
                f"(include=[{other!r}, {name!r}, ...]) or exclude both."
            )
    return list(groups.values())


def _same_module(model: nn.Module, name: str, places: list[Place]) -> bool:
    """Whether `name` is only another path to a module that is selected already."""
    module_name, _, tensor_name = name.rpartition(".")
    owner = model.get_submodule(module_name)
    return any(place.module is owner and place.tensor_name == tensor_name for place in places)


def _require_free(place: Place) -> None:
    if not parametrize.is_parametrized(place.module, place.tensor_name):
        return
    held = parametrizations_of(place.module, place.tensor_name)
    kinds = [type(p).__name__ for p in held]
    if any(isinstance(p, Compander | BeforeWeightNorm) for p in held):
        raise InputError(f"compand: {place.name} is companded already; fold it first with companding_of(model).fold().")
    if kinds not in (["_SpectralNorm"], ["_WeightNorm"]):
        raise InputError(
            f"compand: {place.name} has the parametrization {' then '.join(kinds)}, and bending the tensor below it would break what that "
            "guarantees. Remove it with torch.nn.utils.parametrize.remove_parametrizations, or leave the layer out with exclude=."
        )


def _scales(
    groups: list[list[Place]], a: float | Tensor | str, function: CompandingFunction, per: str, multiple: float
) -> list[float | Tensor]:
    if not isinstance(a, str):
        return [a] * len(groups) if per != "channel" else [_per_channel(places[0], a) for places in groups]
    if a != "auto":
        raise InputError(f"compand: a must be a number above 0, a tensor or 'auto', but it is {a!r}.")
    if per == "network":
        tensors = [places[0].tensor.detach() for places in groups]
        together = torch.cat([t.reshape(-1).double().cpu() for t in tensors])
        fan_in = tensors[0][0].numel()
        pooled = _scale_of(together.unsqueeze(0), function, multiple, fan_in).reshape(())
        return [pooled.to(t.device, _at_least_float32(t)) for t in tensors]
    result: list[float | Tensor] = []
    for places in groups:
        tensor = places[0].tensor.detach()
        rows = tensor.reshape(1, -1) if per == "layer" else tensor.transpose(0, places[0].channel_dim).flatten(1)
        scale = _scale_of(rows, function, multiple, fan_in=tensor[0].numel()).to(_at_least_float32(tensor))
        result.append(scale.reshape(()) if per == "layer" else _along_channels(scale, places[0]))
    return result


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _scale_of(rows: Tensor, function: CompandingFunction, multiple: float, fan_in: int) -> Tensor:
    """`a` of each row: `multiple` standard deviations, or more where the largest weight needs it."""
    rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    spread = rows.std(dim=1, correction=0)
    scale = torch.maximum(multiple * spread, rows.abs().amax(dim=1) / (COMFORT * function.bound))
    # A layer that starts at zero says nothing about its scale: take that of PyTorch's default start, uniform in +-1/sqrt(fan_in).
    usual = multiple / math.sqrt(3 * max(1, fan_in))
    return torch.where(scale > 0, scale, torch.full_like(scale, usual))


def _along_channels(scale: Tensor, place: Place) -> Tensor:
    shape = [1] * place.tensor.dim()
    shape[place.channel_dim] = -1
    return scale.reshape(shape)


def _per_channel(place: Place, a: float | Tensor) -> Tensor:
    channels = place.tensor.shape[place.channel_dim]
    value = torch.as_tensor(a, dtype=torch.float32) if not isinstance(a, Tensor) else a
    return _along_channels(value.to(place.tensor.device).expand(channels).clone(), place) if value.dim() < 2 else value


def _starting_value(place: Place, compander: Compander, init: str) -> Tensor:
    """`v` at the start, with the cost of getting there noted on the compander."""
    compander.to(place.tensor.device)
    w = place.tensor.detach()
    if init == "direct":
        return (w / compander.slope_at_zero.detach()).to(w.dtype)
    v = compander.inverse(w)
    if compander.clip and math.isfinite(compander.function.bound):
        compander.clipped_share = float((w.abs() > MARGIN * (1 + 1e-6) * compander.w_max.detach()).float().mean())
    compander.largest_change = float((compander._bend(v).detach() - w).abs().max())
    return v


def _install(plan: _Plan) -> None:
    compander, tensor = plan.compander, plan.places[0].tensor
    with torch.no_grad():
        tensor.copy_(plan.start)
    compander._adopt = True  # the tensor holds v already
    for place in plan.places:
        if parametrize.is_parametrized(place.module, place.tensor_name):
            held = parametrizations_of(place.module, place.tensor_name)
            if held.is_tensor:
                held.insert(0, compander)
            else:
                held[0] = BeforeWeightNorm(held[0], compander)
        else:
            remember_order(place.module)
            parametrize.register_parametrization(place.module, place.tensor_name, compander)
            held = parametrizations_of(place.module, place.tensor_name)
            if isinstance(place.module, nn.RNNBase):
                read_weights_live(place.module)
        if compander.decay_on == "w":
            free_name = "original" if held.is_tensor else "original1"
            held.parameter_options = {free_name: {"weight_decay": 0.0, "weight_space_decay": True}}
    compander._adopt = False


class CompandBarrier(Term):
    """Keep plain weights inside a bound: the L2 penalty of a companded model, `1/2 sum (b*g^-1(w/a))^2`, without its geometry.

    For `arctan` it is `1/2 sum (b*tan(w/a))^2`: near zero the ridge `b^2/(2 a^2) w^2`, infinite at `|w| = a*pi/2`. Beside
    `compand(...)` without decay it takes companding's two effects apart. Matrices and kernels only, as in `l2`.

    Args:
        a: scale of the weights, above 0: the bound is `a*sup|g|`.
        b: strength, above 0; `None` takes `a*g'(0)`, which makes the penalty equal to `l2` near zero.
        fn: the curve, as in `compand`.
        include: name pattern of the parameters that are charged, such as `"encoder.*"`.

    Reads:
        `parameters`: name -> float tensor.

    Returns:
        0-dim, at least 0; infinite when a weight stands on or beyond the bound (its gradient is then 0, and training stops by name).

    Raises:
        InputError: `a` or `b` is not above 0, or `fn` is unknown.

    Example:
        >>> float(CompandBarrier(a=1.0)({"weight": torch.full((1, 1), 0.7854)}).item()) - 0.5 < 1e-3
        True

    Source:
        own derivation from arXiv:2306.16993: decay of v, seen from w.
    """

    formula = "compand_barrier"
    equation = "1/2 sum (b tan(w/a))^2"
    source = "derived from arXiv:2306.16993 (weight decay under companding, seen from the weight)"
    capabilities = frozenset({"potential", "deterministic"})

    def __init__(self, a: float = 1.0, b: float | None = None, fn: str = "arctan", include: str = "*") -> None:
        super().__init__()
        for name, value in (("a", a), ("b", b)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"compand_barrier: {name} must be finite and above 0, but it is {value}.")
        self.a, self.b, self.fn, self.include = a, b, fn, include
        self._function = companding_function(fn)

    def forward(self, parameters: Mapping[str, Tensor]) -> Tensor:
        charged = [
            p
            for name, p in parameters.items()
            if p.is_floating_point() and p.dim() > 1 and fnmatch.fnmatchcase(name, self.include)
        ]
        if not charged:
            return torch.zeros(())
        return torch.stack([self._penalty(w) for w in charged]).sum()

    def _penalty(self, w: Tensor) -> Tensor:
        b = self.a * self._function.slope_at_zero if self.b is None else self.b
        share = (w.float() if w.dtype in (torch.float16, torch.bfloat16) else w) / self.a
        inside = share.abs() < self._function.bound
        v = b * self._function.inverse(torch.where(inside, share, torch.zeros_like(share)))
        return torch.where(inside, 0.5 * v.square(), torch.full_like(v, math.inf)).sum()
