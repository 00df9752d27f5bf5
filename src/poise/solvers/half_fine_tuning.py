"""Train a random half of a model's matrices at a time, so that the other half keeps what earlier training taught.

    theta_trained <- theta_trained - lr * update(gradient)         theta_frozen stays, bit for bit
    a new phase (a task, a round of training) draws a new half

It is full fine-tuning under an infinitely strong anchor on the frozen half: `min L(theta) + lambda ||(1 - M)(theta - theta_0)||^2` with
lambda to infinity (`anchored` is the finite one). Frozen tensors leave the optimiser, because weight decay and momentum move
whatever stays in it, gradient or none. Where a tensor is trained in part (fused queries, keys and values; level "element"), the optimiser
holds a small copy of the trained part alone, and the part is written back after each step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import CheckpointError, IncompatibleError, InputError
from poise.objective import Objective
from poise.parameter_masks import Categories, MaskReport, ParameterMask, check, draw_mask, matrices_of
from poise.problem import Certificate, Problem, Step
from poise.quantities import derive
from poise.solvers.torch_optimizers import TorchOptimizer

__all__ = ["HalfFineTuning"]


class HalfFineTuning:
    """A `torch.optim` optimiser over a random half of the model that is drawn anew for each phase.

    Use it in `poise.fit`, where each fit is a phase; or around any optimiser in a loop of your own:

        half = HalfFineTuning(torch.optim.AdamW(model.parameters(), lr=1e-4))
        half.bind(model)                        # draws the first half
        ...                                     # loss.backward(); half.optimizer.step(); half.optimizer.zero_grad()
        half.new_phase()                        # draws the next

    Args:
        base: the optimiser: a name, a class, a `TorchOptimizer`, or an object that holds its parameters. It must step once a gradient.
        level: "category" (in each block two of q, k, v, o, half of the feed-forward matrices, one of two norms), "layer", "model" or
            "element"; see `poise.parameter_masks.draw_mask`.
        ratio: the trained share, in (0, 1).
        redraw: "phase": for each fit, and where you call `new_phase()`; "epoch": for each pass over the data, too; a number: after so many
            steps, too.
        categories: what is drawn from; see `poise.parameter_masks.matrices_of`. Embeddings and the head are always trained.
        seed: decides every mask, with the number of the phase.
        state: "reset": each phase begins with a fresh optimiser, as a new round of training does; "keep": the moments of a frozen tensor
            wait, unchanged, until it is trained again (their memory is then not saved); "offload": they wait on the CPU. A tensor that is
            trained in part has one step count for all its parts.
        measure: "matrices" counts matrices, "parameters" balances their sizes (they differ with grouped queries).
        options: the optimiser's own, where `base` is a name or a class: `lr`, `weight_decay`, `clip`, ...

    Attributes:
        phase: masks drawn so far.
        mask: parameter name -> True, False or, for a tensor trained in part, a bool tensor; see `ParameterMask`.

    Clip over what is trained (`clip=` does; in your own loop the gradient of a frozen part is 0). Gather a distributed model
    anew after each draw: `DistributedDataParallel` fixes at its creation which parameters have gradients. A compiled model
    recompiles by itself. Optimisers whose update mixes the numbers of a tensor see the trained part only.

    Raises:
        InputError: an argument is out of range.
        IncompatibleError: the optimiser evaluates several times a step (L-BFGS).

    >>> HalfFineTuning("adamw", lr=1e-3, level="layer")
    half_fine_tuning(adamw(lr=0.001), level='layer', ratio=0.5, redraw='phase', state='reset')

    Source:
        arXiv:2404.18466. What it leaves open is chosen here: biases go with their matrix, the final norm is always trained, one
        mask lasts a phase.
    """

    name = "half_fine_tuning"

    def __init__(
        self,
        base: str | type[torch.optim.Optimizer] | torch.optim.Optimizer | TorchOptimizer = "adamw",
        level: str = "category",
        ratio: float = 0.5,
        redraw: str | int = "phase",
        categories: Categories = None,
        seed: int = 0,
        state: str = "reset",
        measure: str = "matrices",
        **options: Any,
    ) -> None:
        check(level, ratio, measure)
        if redraw not in ("phase", "epoch") and not (type(redraw) is int and redraw > 0):
            raise InputError(
                f"half_fine_tuning: redraw is 'phase', 'epoch' or a number of steps above 0, and it is {redraw!r}."
            )
        if state not in ("reset", "keep", "offload"):
            raise InputError(f"half_fine_tuning: state is 'reset', 'keep' or 'offload', and it is {state!r}.")
        if isinstance(base, TorchOptimizer) and options:
            raise InputError("half_fine_tuning: the optimiser is made already; say its options where it is made.")
        self.base = base if isinstance(base, TorchOptimizer) else TorchOptimizer(base, **options)
        if self.base.closure:
            raise IncompatibleError(
                f"half_fine_tuning needs an optimiser that steps once a gradient, and {self.base.name} evaluates again within a "
                "step. Use 'adamw' or 'sgd'."
            )
        self.level, self.ratio, self.redraw, self.categories = level, ratio, redraw, categories
        self.seed, self.state, self.measure = seed, state, measure
        self.needs = self.base.needs
        self.phase = 0
        self._spent = False  # whether a step was made with the present mask
        self._steps = 0
        self._epoch: int | None = None
        self._inner: TorchOptimizer | None = None
        self._mask: ParameterMask | None = None
        self._parts: list[_Part] = []
        self._parked: dict[str, dict[str, Any]] = {}

    # ---- the model that is trained -----------------------------------------------------------------------------------

    def bind(self, model: nn.Module, objective: Objective | None = None) -> None:
        """Take hold of the parameters, and draw a mask unless the present one has not been used yet.

        Raises:
            InputError: no tensor matches a category, or the mask would train or freeze everything.
        """
        self.release()
        matrices = matrices_of(model, self.categories, self.level)
        # The same solver serves fit after fit: its optimiser is made anew for each.
        inner = copy.copy(self.base)
        inner.bind(model, Objective() if objective is None else objective)
        assert inner.optimizer is not None
        self._inner, self._matrices = inner, matrices
        self._named = {n: p for n, p in model.named_parameters() if n in matrices.shapes}
        self._names = {id(p): n for n, p in self._named.items()}
        self._groups = [list(group["params"]) for group in inner.optimizer.param_groups]
        held = {id(p) for group in self._groups for p in group}
        for matrix in matrices:
            for piece in matrix.pieces:
                if id(self._named[piece.parameter]) not in held:
                    raise InputError(
                        f"half_fine_tuning: the optimiser does not hold {piece.parameter}. Make it over all parameters of the model "
                        "that is bound; the mask takes the frozen ones out."
                    )
        self._hooks = [
            inner.optimizer.register_step_pre_hook(self._before_step),
            inner.optimizer.register_step_post_hook(self._after_step),
        ]
        self._epoch = None
        if self.phase == 0 or self._spent:
            self.phase += 1
        self._draw()

    def release(self) -> None:
        """Give the model and the optimiser back: every parameter is trained again. The mask stays to be looked at."""
        if self._inner is None:
            return
        self._park()
        for part in self._parts:
            self.optimizer.state.pop(part.copy, None)
        self._set_aside_parts()
        for hook in self._hooks:
            hook.remove()
        for parameter in self._named.values():
            parameter.requires_grad_(True)
        for group, parameters in zip(self.optimizer.param_groups, self._groups, strict=False):
            group["params"] = list(parameters)
        self._inner = None

    def new_phase(self) -> None:
        """Draw the mask of the next phase; before `bind`, the one that `bind` will use."""
        self.phase += 1
        self._spent = False
        if self._inner is not None:
            self._park()
            self._draw()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser, over the trained tensors alone."""
        assert self._bound().optimizer is not None
        return self._bound().optimizer  # type: ignore[return-value]

    @property
    def mask(self) -> ParameterMask:
        """The mask of this phase."""
        if self._mask is None:
            raise InputError("half_fine_tuning: no mask is drawn yet: call bind(model), or fit with this solver.")
        return self._mask

    def report(self) -> MaskReport:
        """Count trained matrices and parameters by category."""
        return self.mask.report()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield what is trained, whole tensors and the tensors that are trained in part: what to clip over."""
        own = {id(part.copy) for part in self._parts}
        for group in self.optimizer.param_groups:
            yield from (p for p in group["params"] if id(p) not in own)

    def _bound(self) -> TorchOptimizer:
        if self._inner is None:
            raise InputError("half_fine_tuning: the solver is not bound to a model yet: call bind(model).")
        return self._inner

    # ---- masks -------------------------------------------------------------------------------------------------------

    def _draw(self) -> None:
        """Draw the mask of this phase and put the trained tensors, and nothing else, into the optimiser."""
        self._mask = draw_mask(self._matrices, self.level, self.ratio, derive(self.seed, self.phase), self.measure)
        self._steps, self._spent = 0, False
        self._set_aside_parts()
        optimizer = self.optimizer
        optimizer.state.clear()
        for group, parameters in zip(optimizer.param_groups, self._groups, strict=False):
            group["params"] = [held for parameter in parameters for held in self._held(parameter)]
        self._take_up()

    def _held(self, parameter: nn.Parameter) -> list[nn.Parameter]:
        """Switch a parameter's gradient, and return what the optimiser holds of it."""
        name = self._names.get(id(parameter))
        entry = True if name is None else self.mask[name]
        if isinstance(entry, bool):
            if name is not None:
                parameter.requires_grad_(entry)
            if not entry:
                parameter.grad = None
            return [parameter] if entry else []
        assert name is not None
        parameter.requires_grad_(True)
        parameter.grad = None
        part = _Part.of(name, parameter, entry)
        self._parts.append(part)
        # The tensor itself stays in its group so that `zero_grad` and gradient scalers reach it. It steps without a gradient: not at all.
        return [parameter, part.copy]

    def _set_aside_parts(self) -> None:
        for part in self._parts:
            part.hook.remove()
        self._parts = []

    @torch.no_grad()
    def _before_step(self, *_: Any) -> None:
        for part in self._parts:
            gradient, part.parameter.grad = part.parameter.grad, None
            part.copy.grad = None if gradient is None else part.gather(gradient)
            part.copy.copy_(part.gather(part.parameter))

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        for part in self._parts:
            part.scatter(part.copy, part.parameter)
            part.copy.grad = None
        self._steps += 1
        self._spent = True
        if isinstance(self.redraw, int) and self._steps >= self.redraw:
            self.new_phase()

    # ---- the optimiser's state of frozen tensors ---------------------------------------------------------------------

    def _park(self) -> None:
        """Keep the state of everything that was trained, by parameter name and in the parameter's full shape."""
        if self.state == "reset":
            return
        parts = {id(part.copy): part for part in self._parts}
        for held, state in self.optimizer.state.items():
            part = parts.get(id(held))
            name = part.name if part is not None else self._names.get(id(held))
            if name is None or not state:
                continue
            before = self._parked.get(name, {})
            whole = state if part is None else {k: part.spread(v, before.get(k)) for k, v in state.items()}
            where = "cpu" if self.state == "offload" else None
            self._parked[name] = {k: v.to(where) if where and isinstance(v, Tensor) else v for k, v in whole.items()}

    def _take_up(self) -> None:
        """Give the trained tensors their kept state back. What is not drawn from always has its own."""
        parts = {part.name: part for part in self._parts}
        for name in list(self._parked):
            parameter, entry = self._named.get(name), self.mask.entries.get(name, False)
            if parameter is None or entry is False:
                continue
            state = self._parked[name] if name in parts else self._parked.pop(name)
            part = parts.get(name)
            self.optimizer.state[parameter if part is None else part.copy] = {
                k: _like(v if part is None else part.excerpt(v), parameter) for k, v in state.items()
            }

    # ---- the contract of a solver ------------------------------------------------------------------------------------

    def step(self, problem: Problem, accept: Callable[[Step], bool] | None = None) -> Step:
        """Make one step on the trained half; see `poise.problem.Solver.step`."""
        if self.redraw == "epoch":
            epoch = problem.objective.clock.epoch
            if self._epoch is not None and epoch != self._epoch:
                self.new_phase()
            self._epoch = epoch
        return self._bound().step(problem, accept)

    def minimize(self, problem: Problem, tolerance: float = 1e-6, iterations: int = 1000) -> Certificate:
        """Repeat steps on one problem until the gradient in the trained half is within `tolerance`."""
        if self._inner is None:
            self.bind(problem.model, problem.objective)
        return self._bound().minimize(problem, tolerance, iterations)

    def state_dict(self) -> dict[str, Any]:
        """Return mask, phase, the optimiser's state and the states that wait."""
        optimizer = self.optimizer
        return {
            "phase": self.phase, "steps": self._steps, "spent": self._spent, "epoch": self._epoch, "seed": self.seed,
            "mask": self.mask.digest(), "optimizer": optimizer.state_dict(),
            "parked": {name: dict(state) for name, state in self._parked.items()},
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Draw the saved phase's mask again, and take the optimiser's state back.

        Raises:
            CheckpointError: the state belongs to another mask: another seed, level, ratio, measure, set of categories, or model.
        """
        before = self.phase, self.seed, self._parked
        self.phase, self.seed, self._parked = state["phase"], state["seed"], {}
        self._draw()
        if self.mask.digest() != state["mask"]:
            self.phase, self.seed, self._parked = before
            self._draw()
            raise CheckpointError(
                f"half_fine_tuning: the saved state belongs to another mask than level={self.level!r}, ratio={self.ratio:g}, measure="
                f"{self.measure!r} give for this model in phase {state['phase']}. Use the settings that it was saved with, or start afresh."
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self._parked = {name: dict(each) for name, each in state["parked"].items()}
        self._steps, self._spent, self._epoch = state["steps"], state["spent"], state["epoch"]

    def __repr__(self) -> str:
        chosen = {"level": self.level, "ratio": self.ratio, "redraw": self.redraw, "state": self.state}
        return f"{self.name}({self.base!r}, {', '.join(f'{k}={v!r}' for k, v in chosen.items())})"


@dataclass
class _Part:
    """The trained part of a tensor: `rows` along `axis`, or single numbers (axis None), and the copy that the optimiser moves."""

    name: str
    parameter: nn.Parameter
    axis: int | None
    index: Tensor
    copy: nn.Parameter
    hook: Any

    @classmethod
    def of(cls, name: str, parameter: nn.Parameter, entry: Tensor) -> _Part:
        entry = entry.to(parameter.device)
        axis = (
            None
            if entry.shape == parameter.shape and entry.ndim > 1
            else max(range(entry.ndim), key=lambda i: entry.shape[i])
        )
        index = entry.flatten().nonzero().flatten()
        frozen = ~entry
        # Without it the gradient of the frozen part would count in a norm that is clipped.
        hook = parameter.register_hook(lambda gradient: gradient.masked_fill(frozen, 0))  # type: ignore[no-untyped-call]
        part = cls(name, parameter, axis, index, parameter, hook)
        part.copy = nn.Parameter(part.gather(parameter.detach()).clone())
        return part

    def gather(self, whole: Tensor) -> Tensor:
        return whole.take(self.index) if self.axis is None else whole.index_select(self.axis, self.index)

    def scatter(self, part: Tensor, whole: Tensor) -> None:
        if self.axis is None:
            whole.put_(self.index, part)
        else:
            whole.index_copy_(self.axis, self.index, part)

    def spread(self, value: Any, before: Any) -> Any:
        """Return a state of the part as one of the whole tensor, over what the other parts have."""
        if not isinstance(value, Tensor) or value.shape != self.copy.shape:
            return value
        whole = torch.zeros(self.parameter.shape, dtype=value.dtype, device=value.device)
        if isinstance(before, Tensor) and before.shape == whole.shape:
            whole.copy_(before)
        self.scatter(value, whole)
        return whole

    def excerpt(self, value: Any) -> Any:
        """Return the part's share of a state of the whole tensor."""
        if not isinstance(value, Tensor) or value.shape != self.parameter.shape:
            return value.clone() if isinstance(value, Tensor) else value
        return self.gather(value.to(self.parameter.device))


def _like(value: Any, parameter: Tensor) -> Any:
    """Bring moments back to their parameter's device; a step count stays where the optimiser keeps it."""
    return value.to(parameter.device) if isinstance(value, Tensor) and value.ndim else value
