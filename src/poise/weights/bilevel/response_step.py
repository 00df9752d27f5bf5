"""The answering weights' own step under Delta-STN: the network linearised in its gates, by forward-mode differentiation.

    f(x; d) ~ f(x; 0) + J d,     d_i = h_i - h,     J = df/d(gates) at shut gates

and V, C, W_hyper, b_hyper move down L_T(r(h_i), f + J d).

At shut gates the elementary weights are the whole network, so `f(x; 0)` does not depend on the answering weights, and the linear answer
cannot be bent by a large perturbation. One forward pass in dual numbers gives both. Source: arXiv:2010.13514, section 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from poise import processes
from poise.response_input import ResponseInput

if TYPE_CHECKING:
    from poise.problem import Problem

__all__ = ["ResponseStep", "linearised_outputs"]

MOMENTUM = 0.9


def linearised_outputs(problem: Problem, inputs: ResponseInput, shift: Tensor) -> list[Tensor]:
    """Return `f(x; 0) + J shift` for every micro-batch, with its graph in the answering weights.

    Args:
        problem: the step.
        inputs: of the model's gates.
        shift: of the gates' inputs, float [batch, n].
    """
    with forward_ad.dual_level():
        inputs.place(forward_ad.make_dual(torch.zeros_like(shift), shift))  # type: ignore[no-untyped-call]
        found = []
        for output in problem.outputs():
            value, moved = forward_ad.unpack_dual(output)  # type: ignore[no-untyped-call]
            found.append(value if moved is None else value + moved)
        return found


class ResponseStep:
    """Gradient descent with momentum on the answering weights alone.

    Args:
        lr: learning rate; None takes that of the optimiser.
    """

    def __init__(self, lr: float | None = None) -> None:
        self.lr = lr
        self.velocity: dict[str, Tensor] = {}

    def __call__(self, problem: Problem, inputs: ResponseInput, shift: Tensor, lr: float) -> float:
        """Make one step, and return the loss of the linearised network."""
        named = dict(_answering(problem.model))
        points = [p for p, _ in named.values()]
        with torch.enable_grad():
            loss = problem.loss_of(linearised_outputs(problem, inputs, shift))
            found: tuple[Tensor | None, ...] = torch.autograd.grad(loss, points, allow_unused=True)
        with torch.no_grad():
            for (name, (p, mask)), g in zip(named.items(), found, strict=True):
                if g is None:
                    continue
                g = processes.sum_across(g) * mask
                before = self.velocity.get(name)
                self.velocity[name] = g if before is None else MOMENTUM * before.to(g) + g
                p.sub_(self.velocity[name], alpha=self.lr or lr)
        return float(loss.detach())

    def state_dict(self) -> dict[str, Any]:
        """Return the momentum by parameter name."""
        return {name: v.clone() for name, v in self.velocity.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.velocity = {name: v.clone() for name, v in state.items()}


def _answering(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Parameter, Tensor]]]:
    """Every parameter with entries that answer, and which ones do: what the gated layers say of themselves."""
    for path, module in model.named_modules():
        said = getattr(module, "answering", None)
        if said is None:
            continue
        for own, mask in said().items():
            parameter = _stored(module, own)
            if isinstance(parameter, nn.Parameter) and parameter.requires_grad and bool(mask.any()):
                yield f"{path}.{own}".lstrip("."), (parameter, mask)


def _stored(module: nn.Module, name: str) -> Any:
    """The parameter itself, where what the module reads is made from it: a weight with entries dropped."""
    held = getattr(module, "parametrizations", {})
    return held[name].original if name in held else getattr(module, name)
