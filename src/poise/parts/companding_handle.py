"""The handle of a companded model: its figures, its optimiser groups, decay of the weight itself, and the way back to a plain model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from poise.errors import StateError
from poise.parts.compander import SATURATED, BeforeWeightNorm, Compander, EnterPass, LeavePass, warn_of_drift

__all__ = ["Companding", "Entry", "companding_of", "entries_of", "folded_copy", "read_weights_live", "remember_order"]


@dataclass(frozen=True)
class Entry:
    name: str
    module: nn.Module
    tensor_name: str
    parametrizations: Any
    compander: Compander

    @property
    def free_name(self) -> str:
        return "original" if self.parametrizations.is_tensor else "original1"

    @property
    def free(self) -> nn.Parameter:
        """The free parameter `v`."""
        free: nn.Parameter = getattr(self.parametrizations, self.free_name)
        return free


def entries_of(model: nn.Module) -> Iterator[Entry]:
    for module_name, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for tensor_name, held in cast(nn.ModuleDict, module.parametrizations).items():
            first = cast(nn.ModuleList, held)[0]
            compander = first.compander if isinstance(first, BeforeWeightNorm) else first
            if isinstance(compander, Compander):
                yield Entry(f"{module_name}.{tensor_name}".lstrip("."), module, tensor_name, held, compander)


class Companding:
    """The handle of a companded model: what `compand` returns, and `companding_of(model)` finds again after a copy.

    As a callback of `poise.fit` it writes `companding/LAYER/a`, `/b`, `/saturated` and `/max_abs` into the history after every epoch.

    Args:
        model: a model that holds companded weights.

    Raises:
        StateError: the model holds none.

    Example:
        >>> from poise.parts import compand
        >>> handle = compand(nn.Linear(4, 3))
        >>> sorted(handle.stats()["weight"])[:3]
        ['a', 'b', 'clipped_share']
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        if not list(entries_of(model)):
            raise StateError(
                "this model holds no companded weight (never companded, or folded already); call compand(model) first."
            )

    @property
    def companders(self) -> dict[str, Compander]:
        """Weight name (`"0.weight"`) to its `Compander`."""
        return {entry.name: entry.compander for entry in self._checked_entries()}

    def _checked_entries(self) -> list[Entry]:
        entries = list(entries_of(self.model))
        if not entries:
            raise StateError("this model was folded: nothing in it is companded any more.")
        return entries

    def stats(self) -> dict[str, dict[str, float]]:
        """Per companded weight: where the curve stands and how far the weights are into its flat part.

        Returns:
            name -> `a`, `b` (means over channels), `w_max`, `slope_at_zero = a/b*g'(0)`, `effective_lr` (its square: the factor on the
            learning rate of small weights under plain gradient descent), `saturated` (share with `psi' < 0.05 psi'(0)`), `max_abs`
            (largest `|w|`), `clipped_share` and `largest_change` (at conversion), `decays_w` (1 if decay acts on w).
        """
        result = {}
        with torch.no_grad():
            for entry in self._checked_entries():
                c, v = entry.compander, entry.free
                result[entry.name] = {
                    "a": float(c.a.mean()),
                    "b": float(c.b.mean()),
                    "w_max": float(c.w_max.max()),
                    "slope_at_zero": float(c.slope_at_zero.mean()),
                    "effective_lr": float(c.slope_at_zero.square().mean()),
                    "saturated": float((c.slope(v) < SATURATED * c.slope_at_zero).float().mean()),
                    "max_abs": float(c._bend(v).abs().max()),
                    "clipped_share": c.clipped_share,
                    "largest_change": c.largest_change,
                    "decays_w": float(c.decay_on == "w"),
                }
        return result

    def parameter_groups(
        self, weight_decay: float = 0.0, lr: float | None = None, multiplier: float = 0.1
    ) -> list[dict[str, Any]]:
        """Optimiser groups for the whole model: decay on `v` and other matrices, none on `a`, `b`, biases, norms; slow `a` and `b`.

        Args:
            weight_decay: at least 0; with `decay_on="w"` it is kept for `follow(optimizer)`, which decays the weight itself.
            lr: the learning rate; needed when `a` and `b` are learned, because theirs is `multiplier*lr`.
            multiplier: at least 0. With 1 and a large `lr`, training can diverge: the curve then moves faster than the weights.

        Returns:
            Groups for any `torch.optim` optimiser. The same as `poise.parameter_groups(model, ...)`.
        """
        from poise.parameter_groups import parameter_groups

        return parameter_groups(self.model, weight_decay=weight_decay, lr=lr, multiplier=multiplier)

    def follow(self, optimizer: Optimizer) -> RemovableHandle:
        """Decay the weights themselves before each step, `w <- (1 - lr*weight_decay) w`, where `compand(decay_on="w")` asked for it.

        Works with any optimiser built from `parameter_groups`; the decay is decoupled, as in AdamW.

        Returns:
            A handle whose `remove()` stops it.
        """
        frees = {id(entry.free): entry.compander for entry in self._checked_entries()}

        def decay(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            with torch.no_grad():
                for group in optimizer.param_groups:
                    kept = 1 - float(group["lr"]) * group.get("weight_space_decay", 0.0)
                    if kept == 1:
                        continue
                    for v in group["params"]:
                        if id(v) in frees and v.grad is not None:
                            v.copy_(_shrink(frees[id(v)], v, kept))

        return optimizer.register_step_pre_hook(decay)

    def check(self) -> None:
        """Warn, once a layer, when `a` or `b` left [1e-4, 1e4] times its start. Runs by itself every 100 training passes."""
        warn_of_drift([entry.compander for entry in self._checked_entries()])

    def on_begin(self, state: Any) -> None:
        """Warn of terms of `state.objective` that work against companding."""
        self._checked_entries()[0].compander.check_objective(state.objective)

    def on_epoch_end(self, state: Any) -> None:
        """Record the curves' state in `state.history`, and check the drift."""
        self.check()
        for name, figures in self.stats().items():
            for figure in ("a", "b", "saturated", "max_abs"):
                state.history.add(f"companding/{name}/{figure}", state.step, figures[figure])

    def folded_state_dict(self) -> dict[str, Any]:
        """The state dict of the plain model with `w` in place of `v`, leaving this model as it is."""
        return folded_copy(self.model).state_dict()

    def fold(self) -> nn.Module:
        """Replace every `v` by `w = psi(v)` and remove `a` and `b`: the same outputs, the plain model's speed and names.

        Parameters keep their identity, so an optimiser built before still holds them. Other parametrizations stay.

        Returns:
            The model.
        """
        folded: set[int] = set()
        for entry in self._checked_entries():
            free = entry.free
            if id(free) not in folded:
                with torch.no_grad():
                    free.copy_(entry.compander._bend(free))
                folded.add(id(free))
            _remove(entry)
        for module in self.model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [k for k, hook in hooks.items() if isinstance(hook, EnterPass | LeavePass)]:
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)
        return self.model


def _shrink(compander: Compander, v: Tensor, kept: float) -> Tensor:
    """The `v` whose weight is `kept` times that of the given one; float64, because `psi` is flat where weights are large."""
    if compander.function.is_identity:
        return v * kept
    dtype = v.dtype if v.device.type == "mps" else torch.float64
    b = compander.b.to(dtype)
    share = compander.function.value(v.to(dtype) / b) * kept
    return (b * compander.function.inverse(share)).to(v.dtype)


def _remove(entry: Entry) -> None:
    module, held = entry.module, entry.parametrizations
    # Copies of a module share its injected class, and removing a parametrization deletes a property there: give this module its own.
    injected = type(module)
    own = {k: value for k, value in vars(injected).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(injected.__name__, injected.__bases__, own)
    if isinstance(held[0], BeforeWeightNorm):
        held[0] = held[0].norm
    elif len(held) > 1:
        del held[0]
    else:
        if isinstance(module, nn.RNNBase) and "_flat_weights" in vars(type(module)):
            delattr(type(module), "_flat_weights")
            module.__dict__["_flat_weights"] = [None] * len(module._flat_weights_names)
        parametrize.remove_parametrizations(module, entry.tensor_name, leave_parametrized=False)
        _restore_order(module)
        if isinstance(module, nn.RNNBase):
            if any(isinstance(e.module, nn.RNNBase) and e.module is module for e in entries_of(module)):
                read_weights_live(module)
            else:
                module._init_flat_weights()


def remember_order(module: nn.Module) -> None:
    """Note the order of a module's parameters before the first is moved away, so that folding gives the plain model's order back."""
    if not parametrize.is_parametrized(module):
        module.__dict__["_plain_order"] = list(module._parameters)


def _restore_order(module: nn.Module) -> None:
    if parametrize.is_parametrized(module):
        return
    for name in module.__dict__.pop("_plain_order", ()):
        module._parameters[name] = module._parameters.pop(name)


def read_weights_live(module: nn.RNNBase) -> None:
    """Make a recurrent layer look its weights up at every pass: its own list would keep the free parameters."""

    def live(self: nn.RNNBase) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    def ignore(self: nn.RNNBase, value: Any) -> None:
        pass

    setattr(type(module), "_flat_weights", property(live, ignore))  # noqa: B010  # PyTorch made this class for this module alone
    module.__dict__.pop("_flat_weights", None)


def companding_of(model: nn.Module) -> Companding:
    """Find the handle of a model that is companded already: after `deepcopy`, as the best model of a run, or inside a wrapper.

    Raises:
        StateError: nothing in the model is companded.

    Example:
        >>> from poise.parts import compand
        >>> model = nn.Linear(4, 3); _ = compand(model)
        >>> companding_of(copy.deepcopy(model)).fold()
        Linear(in_features=4, out_features=3, bias=True)
    """
    return Companding(model)


def folded_copy(model: nn.Module) -> nn.Module:
    """A plain copy of the model with every companded weight folded; the model itself stays companded. A plain model is only copied.

    Example:
        >>> from poise.parts import compand
        >>> model = nn.Linear(4, 3); _ = compand(model)
        >>> sorted(folded_copy(model).state_dict())
        ['bias', 'weight']
    """
    replica = copy.deepcopy(model)
    return Companding(replica).fold() if any(True for _ in entries_of(replica)) else replica
