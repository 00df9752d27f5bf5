"""Lion: every number moves by the learning rate, in the direction of a sign.

    c     = beta1 m + (1 - beta1) g
    theta <- theta - lr (sign(c) + decay theta)
    m     <- beta2 m + (1 - beta2) g

One state a parameter, half of Adam's. The sign is of the momentum before its update, which beta1 < beta2 mixes with more of
the present gradient: with beta1 = beta2 it is Signum, with both 0 sign-SGD. Three laws follow. The step does not depend on the gradient's
scale, so a common factor of all weights of an objective changes nothing: only their ratios do. The first step is `lr * sign(g)`. With
decay, |theta| never exceeds max(|theta_0|, 1/decay): decay is a box around zero, and the limit solves `min f` within it.

Source: arXiv:2302.06675, algorithm 2; the box, arXiv:2310.05898; the cautious variant, arXiv:2411.16085.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from itertools import product
from typing import Any, overload

import torch
from torch import Tensor

from poise.errors import InputError, NonFiniteError, PoiseWarning
from poise.solvers.lion_steps import Rule, update

__all__ = ["Lion", "lion_from_adamw", "lion_grid"]

LARGE = 1_000_000
"""Numbers from which the fused pass is the default on a CPU; below, its first call costs more than it saves."""


class Lion(torch.optim.Optimizer):
    """Lion as a `torch.optim` optimiser; by name, `poise.fit(..., solver="lion(lr=3e-4)")`.

    Args:
        params: parameters or groups; every option but `foreach`, `fused` and `nonfinite` may differ by group.
        lr: what every number moves by, 3 to 10 times below AdamW's; see `lion_from_adamw`. A scheduler may change it.
        betas: shares of the momentum in the direction and in the next momentum; (0.95, 0.98) for language models.
        weight_decay: decay by `lr * weight_decay` a step, 3 to 10 times above AdamW's.
        decoupled: decay by `weight_decay * lr / (the group's first lr)`: the decay no longer depends on the size of `lr`, a schedule still
            scales it.
        cautious: a factor in [0, 1] for the steps of numbers whose direction opposes their gradient; steps are then rescaled so that a
            number of the tensor moves by `lr` on average. 0 leaves such numbers out; None treats all alike.
        state_dtype: of the momentum, such as "bfloat16"; by default that of the parameter.
        foreach: lists of tensors at a time. By default where `fused` is not used.
        fused: one pass over memory on a CPU, without a temporary; a GPU takes `foreach`. By default from a million numbers on.
        maximize: climb instead.
        nonfinite: what follows when numbers of the gradient are infinite or NaN. They and their momentum stay as they are in any
            case, and the others make their step; then "raise" raises an error, and "skip" goes on. A GPU is waited for once a step.

    Raises:
        InputError: an argument out of range; a sparse or a complex gradient.
        NonFiniteError: a gradient is not finite.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    >>> weight.grad = torch.tensor([100.0, -1e-3, 0.0])
    >>> Lion([weight], lr=0.1).step()
    >>> weight.data
    tensor([ 0.9000, -1.9000,  0.5000])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        decoupled: bool = False,
        cautious: float | None = None,
        state_dtype: torch.dtype | str | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        nonfinite: str = "raise",
    ) -> None:
        if foreach and fused:
            raise InputError("lion: foreach=True and fused=True exclude each other: choose one.")
        if nonfinite not in ("raise", "skip"):
            raise InputError(f"lion: nonfinite is 'raise' or 'skip', and it is {nonfinite!r}.")
        self.foreach, self.fused, self.nonfinite = foreach, fused, nonfinite
        self._warned = False
        defaults = {
            "lr": lr, "betas": betas, "weight_decay": weight_decay, "decoupled": decoupled, "cautious": cautious,
            "state_dtype": state_dtype, "maximize": maximize,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = {**self.defaults, **param_group}
        _check(group)
        group["state_dtype"] = _dtype(group["state_dtype"])
        # Decoupled decay is measured by the rate at the start, whatever a schedule makes of it.
        group.setdefault("first_lr", float(group["lr"]))
        super().add_param_group(group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one step. A `closure` is evaluated once, before it, and its value returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        held = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        flat = [p for parameters in held for p in parameters]
        fused = self.fused
        if fused is None:
            fused = self.foreach is None and sum(p.numel() for p in flat) >= LARGE
        _refuse([p.grad for p in flat])
        foreach = self.foreach is not False
        finite = [
            update([self._three(p, group) for p in parameters], _rule(group), foreach=foreach, fused=fused)
            for group, parameters in zip(self.param_groups, held, strict=True)
        ]
        if self.nonfinite == "raise" and not all(finite):
            bad = sum(int((~torch.isfinite(p.grad)).sum()) for p in flat)
            raise NonFiniteError(
                f"lion: {bad} of {sum(p.numel() for p in flat)} numbers of the gradient are infinite or NaN. They have not moved, because "
                "a NaN would stay in parameter and momentum for ever; the others have made their step. Find the cause (warm up, lower lr), "
                "or pass nonfinite='skip' to go on."
            )
        return loss

    def _three(self, parameter: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(
                parameter, dtype=group["state_dtype"], memory_format=torch.preserve_format
            )
            self._warn_of_standstill(parameter, max(float(group["lr"]), group["first_lr"]))
        assert parameter.grad is not None
        return parameter, parameter.grad, state["exp_avg"]

    def _warn_of_standstill(self, parameter: Tensor, rate: float) -> None:
        """Say where steps of `rate` are lost in the rounding of a half-precision parameter."""
        if self._warned or parameter.dtype not in (torch.bfloat16, torch.float16) or not parameter.numel():
            return
        moved = (parameter.abs() - rate).to(parameter.dtype) != parameter.abs()
        share = 1 - float(moved.float().mean())
        if share > 0.5:
            self._warned = True
            warnings.warn(
                f"lion: a step of {rate:g} is lost in the rounding of {share:.0%} of a {parameter.dtype} "
                "parameter, so it stands still. Keep parameters in float32, under autocast; state_dtype='bfloat16' saves memory safely.",
                PoiseWarning,
                stacklevel=4,
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state. The momentum keeps its own dtype, so that training goes on bit for bit."""
        super().load_state_dict(state_dict)
        saved = (index for group in state_dict["param_groups"] for index in group["params"])
        for index, parameter in zip(saved, (p for group in self.param_groups for p in group["params"]), strict=True):
            if "exp_avg" in state_dict["state"].get(index, {}):
                momentum = state_dict["state"][index]["exp_avg"]
                self.state[parameter]["exp_avg"] = deepcopy(momentum).to(parameter.device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A checkpoint of another Lion has fewer options.
        for group in self.param_groups:
            for option, value in self.defaults.items():
                group.setdefault(option, value)
            group["state_dtype"] = _dtype(group["state_dtype"])
            group.setdefault("first_lr", float(self.defaults["lr"]))

    def __getstate__(self) -> dict[str, Any]:
        own = {"foreach": self.foreach, "fused": self.fused, "nonfinite": self.nonfinite, "_warned": self._warned}
        return {**super().__getstate__(), **own}


def _refuse(gradients: Sequence[Tensor]) -> None:
    """Refuse what Lion has no step for, before anything has moved."""
    for gradient in gradients:
        if gradient.layout != torch.strided:
            raise InputError(
                "lion: a gradient is sparse, and the momentum of every number changes in each step: use dense gradients "
                "(nn.Embedding(..., sparse=False)) or torch.optim.SparseAdam for this parameter."
            )
        if gradient.is_complex():
            raise InputError(
                "lion: a parameter is complex, and a complex number has no sign of its own: train torch.view_as_real of it."
            )


def _rule(group: dict[str, Any]) -> Rule:
    rate = float(group["lr"])
    decay = group["weight_decay"] / group["first_lr"] if group["decoupled"] else group["weight_decay"]
    beta1, beta2 = group["betas"]
    return Rule(rate, 1 - rate * decay, beta1, beta2, group["cautious"], -1.0 if group["maximize"] else 1.0)


def _check(group: dict[str, Any]) -> None:
    rate, decay, betas = float(group["lr"]), group["weight_decay"], group["betas"]
    if not (math.isfinite(rate) and rate >= 0):
        raise InputError(f"lion: lr must be finite and at least 0, and it is {rate}.")
    if not (math.isfinite(decay) and decay >= 0):
        raise InputError(f"lion: weight_decay must be finite and at least 0, and it is {decay}.")
    if not (isinstance(betas, Sequence) and len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
        raise InputError(f"lion: betas must be two numbers in [0, 1), and they are {betas!r}.")
    if group["cautious"] is not None and not 0 <= group["cautious"] <= 1:
        raise InputError(f"lion: cautious must be None or a factor in [0, 1], and it is {group['cautious']}.")
    if group["decoupled"] and rate == 0:
        raise InputError(
            "lion: decoupled=True measures the decay by the first lr, which is 0: give the rate that the schedule scales."
        )
    if rate * decay >= 1 and not group["decoupled"]:
        raise InputError(
            f"lion: lr * weight_decay is {rate * decay:g}, and from 1 on a step throws the weights across zero: lower one of them."
        )


def _dtype(named: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, named, None) if isinstance(named, str) else named
    if named is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise InputError(
            f"lion: state_dtype must be a floating dtype such as 'bfloat16' or 'float32', and it is {named!r}."
        )
    return found


def lion_from_adamw(lr: float, weight_decay: float, ratio: float = 5) -> dict[str, float]:
    """Return Lion's rate and decay for those of a tuned AdamW: `lr / ratio` and `weight_decay * ratio`.

    A sign has norm 1 a number, Adam's direction less, so the rate falls; the decay grows so that their product stays. Warm-up and
    schedule stay as they are, with all their rates scaled alike. The paper's pairs lie between 3 and 10.

    Args:
        lr, weight_decay: AdamW's.
        ratio: how much lower the rate is, above 0.

    >>> lion_from_adamw(1e-3, 1.0, ratio=10)
    {'lr': 0.0001, 'weight_decay': 10.0}
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"lion_from_adamw: {name} must be finite and at least 0, and it is {value}.")
    if not (math.isfinite(ratio) and ratio > 0):
        raise InputError(f"lion_from_adamw: ratio must be finite and above 0, and it is {ratio}.")
    return {"lr": lr / ratio, "weight_decay": weight_decay * ratio}


def lion_grid(lr: float, weight_decay: float, ratios: Sequence[float] = (3, 5, 10)) -> list[dict[str, float]]:
    """Return the settings to try when Lion is compared with a tuned AdamW: each rate `lr / r` with each decay `weight_decay * r'`.

    Tune AdamW over as many settings as there are here, choose both by the same validation data, and give both the same steps.

    Args:
        lr, weight_decay: AdamW's.
        ratios: the factors to try; the paper's rule is 3 to 10.

    >>> len(lion_grid(1e-3, 0.01))
    9
    """
    settings = (
        (lion_from_adamw(lr, 0.0, r)["lr"], lion_from_adamw(0.0, weight_decay, d)) for r, d in product(ratios, ratios)
    )
    return [{"lr": rate, "weight_decay": decay["weight_decay"]} for rate, decay in settings]
