"""One curve as a PyTorch parametrization: the module between a free parameter and the weight that a layer uses."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn

from poise.errors import InputError, PoiseWarning
from poise.parts.companding_functions import CompandingFunction, compand_value, companding_function

__all__ = ["BeforeWeightNorm", "Compander", "EnterPass", "ForwardScope", "LeavePass", "warn_of_drift"]

_DRIFT = math.log(1e4)  # a or b further than this factor from where it began is reported
_CHECK_EVERY = 100  # training passes between two checks; each check waits for the device once
MARGIN = 0.99  # clipping stops here, as a share of w_max: the inverse has a pole at 1
COMFORT = 0.9  # automatic `a` keeps the largest starting weight below this share of w_max
_CONTRADICTIONS = {
    "l1": "it pulls weights to zero, from where companding pushes them away; drop one of the two.",
    "compand_barrier": "companding with weight decay is this barrier already, and the term would act on v; use it on a plain model.",
}
SATURATED = 0.05  # a weight whose slope is below this share of the slope at zero hardly moves any more


class ForwardScope:
    """One pass through the model, during which every companded weight is computed once.

    Weights that are used several times (recurrent cells, shared layers) are then bent once. Nothing outlives the pass, so an optimiser
    step, `functional_call`, `deepcopy` or `load_state_dict` can never meet a stale weight.
    """

    def __init__(self, companders: list[Compander]) -> None:
        self.companders = companders
        self.depth = 0
        self.passes = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardScope:
        replica = ForwardScope([])
        memo[id(self)] = replica
        replica.companders = copy.deepcopy(self.companders, memo)
        return replica

    def enter(self) -> None:
        self.depth += 1

    def leave(self, training: bool) -> None:
        self.depth = max(0, self.depth - 1)
        if self.depth:
            return
        for compander in self.companders:
            compander._held = None
        if training:
            self.passes += 1
            if self.passes % _CHECK_EVERY == 0:
                warn_of_drift(self.companders)


class EnterPass:
    def __init__(self, scope: ForwardScope) -> None:
        self.scope = scope

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self.scope.enter()


class LeavePass:
    def __init__(self, scope: ForwardScope) -> None:
        self.scope = scope

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.scope.leave(module.training)


class Compander(nn.Module):
    """Bends a free parameter into a weight: `w = psi(v) = a*g(v/b)`, elementwise.

    `psi` is odd, smooth and strictly increasing, steepest at zero (slope `a/b*g'(0)`) and bounded by `w_max = a*sup|g|`. Fixed `a` and
    `b` are buffers, learned ones parameters; both are kept as logarithms, so they stay positive whatever the optimiser does. It is a
    parametrization in PyTorch's sense: `register_parametrization(layer, "weight", Compander(a=0.3))`.

    Args:
        fn: `arctan`, `tanh`, `softsign`, `erf`, `mu_law`, `identity` (companding off), or a `CompandingFunction`.
        a: scale of the weights, above 0, in units of the weight; a number or a tensor that broadcasts to `v`.
        b: scale of `v`, above 0; `"auto"` takes `a*g'(0)`, which makes the slope at zero 1.
        learn: whether `log a` and `log b` are trained.
        mu: the constant of `mu_law`.
        limit: if given, above 1: `a` and `b` stay within this factor of their start, by `log a0 + log(limit)*tanh(...)`.
        clip: whether `inverse` clips weights outside `0.99*w_max` instead of refusing them.

    Shape:
        `v` and `w`: any shape, float16 to float64. Half precision is computed in float32.

    Raises:
        InputError: `a` or `b` is not finite and positive, `limit` is not above 1, or `identity` is to be learned.

    Example:
        >>> bend = Compander("arctan", a=1.0)
        >>> bend(torch.tensor([0.0, 1.0, 1e9]))
        tensor([0.0000, 0.7854, 1.5708])

    Source:
        arXiv:2306.16993.
    """

    log_a: Tensor
    log_b: Tensor
    initial_log_a: Tensor
    initial_log_b: Tensor
    #: Read by `poise.parameter_groups`: how an optimiser should treat this module's own parameters.
    parameter_options = {
        "log_a": {"weight_decay": 0.0, "lr_multiplier": 0.1},
        "log_b": {"weight_decay": 0.0, "lr_multiplier": 0.1},
    }

    def __init__(
        self,
        fn: str | CompandingFunction = "arctan",
        a: float | Tensor = 1.0,
        b: float | Tensor | Literal["auto"] = "auto",
        *,
        learn: bool = False,
        mu: float = 255.0,
        limit: float | None = None,
        clip: bool = False,
    ) -> None:
        super().__init__()
        self.function = companding_function(fn, mu=mu)
        if learn and self.function.is_identity:
            raise InputError("compand: fn='identity' has no a or b to learn; use learn=False or another function.")
        if limit is not None and not limit > 1:
            raise InputError(
                f"compand: limit must be above 1 (the factor by which a and b may move), but it is {limit}."
            )
        scale = _positive(a, "a")
        bend = scale * self.function.slope_at_zero if isinstance(b, str) else _positive(b, "b").expand_as(scale)
        # Kept flat, so that penalties and decay, which go by dimensions, never take them for a matrix.
        self._shape = scale.shape
        for name, value in (("log_a", scale.log().reshape(-1)), ("log_b", bend.log().reshape(-1))):
            value = value if self._shape else value.reshape(())
            if learn:
                setattr(self, name, nn.Parameter(value.clone()))
            else:
                self.register_buffer(name, value.clone())
            self.register_buffer(f"initial_{name}", value.clone())
        self.learn, self.limit, self.clip = learn, limit, clip
        self.layer = ""
        self.decay_on: Literal["v", "w"] = "v"
        self.clipped_share = 0.0
        self.largest_change = 0.0
        self._adopt = False
        self._reported = False
        self._scope: ForwardScope | None = None
        self._read: tuple[Tensor, Tensor, int, tuple[float, float]] | None = None
        self._held: tuple[Tensor, int, Tensor, bool, Tensor] | None = None

    # -- the curve -----------------------------------------------------------------------------------------------------------------

    def _logs(self) -> tuple[Tensor, Tensor]:
        """`log a` and `log b` as the curve uses them: inside the box, and of a shape that broadcasts to the weight."""
        logs = (self.log_a, self.log_b)
        if self.limit is not None:
            width = math.log(self.limit)
            starts = (self.initial_log_a, self.initial_log_b)
            logs = tuple(s + width * torch.tanh((log - s) / width) for log, s in zip(logs, starts, strict=True))  # type: ignore[assignment]
        return logs if len(self._shape) < 2 else (logs[0].reshape(self._shape), logs[1].reshape(self._shape))

    @property
    def a(self) -> Tensor:
        """Scale of the weights, 0-dim or one entry a channel."""
        return self._logs()[0].exp()

    @property
    def b(self) -> Tensor:
        """Scale of the free parameter, 0-dim or one entry a channel."""
        return self._logs()[1].exp()

    @property
    def w_max(self) -> Tensor:
        """The bound that no weight reaches, `a*sup|g|`; infinite for `mu_law` and `identity`."""
        return torch.full_like(self.a, math.inf) if self.function.is_identity else self.a * self.function.bound

    @property
    def slope_at_zero(self) -> Tensor:
        """`psi'(0) = a/b*g'(0)`: its square multiplies the learning rate of small weights."""
        return torch.ones_like(self.a) if self.function.is_identity else self.a / self.b * self.function.slope_at_zero

    def forward(self, v: Tensor) -> Tensor:
        """`w = a*g(v/b)`; within one pass of a companded model the same `v` is bent only once."""
        scope = self._scope
        if scope is None or not scope.depth or self.function.is_identity or torch.compiler.is_compiling():
            return self._bend(v)
        version = 0 if v.is_inference() else v._version
        held = self._held
        if (
            held is not None
            and held[0] is v
            and held[1] == version
            and held[2] is self.log_a
            and held[3] == torch.is_grad_enabled()
        ):
            return held[4]
        w = self._bend(v)
        self._held = (v, version, self.log_a, torch.is_grad_enabled(), w)
        return w

    def _bend(self, v: Tensor) -> Tensor:
        if self.learn or self._shape or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return compand_value(v, *self._logs(), self.function)
        return compand_value(v, *self._constants(), self.function)

    def _constants(self) -> tuple[float, float]:
        """Fixed `log a` and `log b` as numbers, read from the device once."""
        log_a, log_b = self._buffers["log_a"], self._buffers["log_b"]
        assert log_a is not None
        assert log_b is not None
        read = self._read
        if read is None or read[0] is not log_a or read[1] is not log_b or read[2] != log_a._version + log_b._version:
            read = (log_a, log_b, log_a._version + log_b._version, (float(log_a), float(log_b)))
            self._read = read
        return read[3]

    def inverse(self, w: Tensor) -> Tensor:
        """`v = b*g^-1(w/a)`, computed in float64 because the inverse is steep near the bound.

        Raises:
            InputError: some `|w|` lies beyond `0.99*w_max` and `clip` is off; with `clip` it is moved there.
        """
        if self.function.is_identity:
            return w
        dtype = w.dtype if w.device.type == "mps" else torch.float64  # Metal has no float64
        a, b = self.a.detach().to(dtype), self.b.detach().to(dtype)
        share = w.detach().to(dtype) / a
        if math.isfinite(self.function.bound):
            edge = MARGIN * self.function.bound
            beyond = share.abs() > edge * (1 + 1e-6)  # a weight that float32 rounded past the edge is not beyond it
            if bool(beyond.any()):
                if not self.clip:
                    needed = float((w.detach().abs() / (COMFORT * self.function.bound)).max())
                    raise InputError(
                        f"compand: {self.layer or 'the tensor'} has {int(beyond.sum())} of {w.numel()} weights beyond 0.99*w_max "
                        f"(largest |w| {float(w.abs().max()):.4g}, w_max {float(self.w_max.max()):.4g}). "
                        f"Choose a >= {needed:.4g}, a='auto', or clip=True."
                    )
                share = share.clamp(-edge, edge)
        return (b * self.function.inverse(share)).to(w.dtype)

    def slope(self, v: Tensor) -> Tensor:
        """`psi'(v) = (a/b)*g'(v/b)`, the factor from `dL/dw` to `dL/dv`; of the shape of `v`."""
        if self.function.is_identity:
            return torch.ones_like(v)
        dtype = torch.float32 if v.dtype in (torch.float16, torch.bfloat16) else v.dtype
        a, b = self.a.to(dtype), self.b.to(dtype)
        return (a / b * self.function.slope(v.to(dtype) / b)).to(v.dtype)

    def right_inverse(self, w: Tensor) -> Tensor:
        """What `layer.weight = w` stores: the `v` that gives this `w`."""
        return w if self._adopt else self.inverse(w)

    # -- state ---------------------------------------------------------------------------------------------------------------------

    def drift(self) -> Tensor:
        """Largest `|log(a/a0)|` or `|log(b/b0)|`, 0-dim; 9.2 is a factor of 10^4."""
        moved = torch.stack(
            [(self.log_a - self.initial_log_a).abs().amax(), (self.log_b - self.initial_log_b).abs().amax()]
        )
        return moved.detach().amax()

    def check_objective(self, objective: Any) -> None:
        """Warn of terms that work against companding. `objective` is a `poise.Objective` about to be minimised."""
        for summand in getattr(objective, "summands", ()):
            formula = getattr(summand.term, "formula", "")
            if formula in _CONTRADICTIONS:
                warnings.warn(
                    f"companding: {formula} on a companded model: {_CONTRADICTIONS[formula]}",
                    PoiseWarning,
                    stacklevel=3,
                )

    def extra_repr(self) -> str:
        a, b = float(self.a.detach().mean()), float(self.b.detach().mean())
        return f"{self.function.name!r}, a={a:.4g}, b={b:.4g}, learn={self.learn}"

    def _apply(self, fn: Any, recurse: bool = True) -> Compander:
        # `.half()` must not round log a and log b: the curve is computed in float32 also in a half-precision model.
        def keep(t: Tensor) -> Tensor:
            moved: Tensor = fn(t)
            return t.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        super()._apply(keep, recurse)  # type: ignore[no-untyped-call]
        return self


class BeforeWeightNorm(nn.Module):
    """Weight normalisation whose direction is companded first: `w = gain * psi(v)/|psi(v)|`."""

    def __init__(self, norm: nn.Module, compander: Compander) -> None:
        super().__init__()
        self.norm, self.compander = norm, compander

    def forward(self, gain: Tensor, v: Tensor) -> Tensor:
        result: Tensor = self.norm(gain, self.compander(v))
        return result

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        gain, direction = self.norm.right_inverse(w)  # type: ignore[operator]
        return gain, self.compander.right_inverse(direction)


def _positive(value: float | Tensor, name: str) -> Tensor:
    tensor = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float32).detach()
    if tensor.dtype in (torch.float16, torch.bfloat16) or not tensor.is_floating_point():
        tensor = tensor.float()
    if not bool((torch.isfinite(tensor) & (tensor > 0)).all()):
        shown = value if not isinstance(value, Tensor) else f"a tensor with minimum {float(tensor.min()):.4g}"
        raise InputError(f"compand: {name} must be finite and above 0, but it is {shown}.")
    return tensor


def warn_of_drift(companders: list[Compander]) -> None:
    learned = [c for c in companders if c.learn and not c._reported]
    if not learned:
        return
    drifts = torch.stack([c.drift().float().to(learned[0].log_a.device) for c in learned]).cpu()
    for compander, drift in zip(learned, drifts.tolist(), strict=True):
        if not drift <= _DRIFT:  # also true for NaN
            compander._reported = True
            warnings.warn(
                f"companding: a or b of layer {compander.layer!r} left [1e-4, 1e4] times its start (a = {float(compander.a.mean()):.3g}, "
                f"b = {float(compander.b.mean()):.3g}). Give them a smaller learning rate (handle.parameter_groups(..., multiplier=0.1) or "
                "less), or bound them with limit=10.",
                PoiseWarning,
                stacklevel=2,
            )
