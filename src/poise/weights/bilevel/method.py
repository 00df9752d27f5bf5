"""What every bilevel method has: two variables that it moves, one outer step at a time, and a state that resumes exactly.

    method = PenaltyBilevel(levels, x, theta, lr=0.1, inner_lr=1.0)
    report = method.step(lower_batch, upper_batch)            # one outer step
    method.run(500, batches)                                  # batches(step) -> (lower_batch, upper_batch)

A method draws no random numbers of its own that are not derived from its step, and batches come from outside: so `state_dict` holds
tensors and counts alone, and a run that was stopped anywhere goes on as if it had not been.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar
from warnings import warn

import torch
from torch import Tensor, nn

from poise.errors import IncompatibleError, InputError, NonFiniteError, PoiseWarning
from poise.operators import ConvexSet
from poise.weights.bilevel.levels import Levels, Linearised, Tensors, detached, leaves
from poise.weights.bilevel.projected import project, sets_of

Batches = Callable[[int], tuple[Any, Any]]
"""`batches(step) -> (lower_batch, upper_batch)`; a list of lower batches is taken in turn by the steps of the lower level."""
Self = TypeVar("Self", bound="BilevelMethod")


@dataclass(frozen=True)
class Outer:
    """What one outer step saw, in detached 0-dim tensors, so that nobody waits for the device.

    Attributes:
        upper: the upper objective on the upper batch, before the upper variable moved.
        gradient_norm: norm of the hypergradient estimate over all upper variables jointly.
        lower: the lower objective on the lower batch, where the method evaluated it.
        residual: what a method watches beside: of the linear system (`||H q - d upper/dx||`), or the norm of the inner gradient.
        gap: penalty methods: `||x - z|| / sigma`, which stays bounded where the penalty is exact.
    """

    upper: Tensor
    gradient_norm: Tensor
    lower: Tensor | None = None
    residual: Tensor | None = None
    gap: Tensor | None = None


class BilevelMethod:
    """Moves a lower variable `x` and an upper variable `theta` of a problem in two levels.

    Args:
        levels: the problem.
        x, theta: where both begin; copied.
        lower_set, upper_set: closed convex sets of the variables: one for all tensors, or a sequence with one (or None) for each.

    Raises:
        InputError: a variable without tensors, one tensor in both, starts that are not finite, sets that do not fit.
    """

    moving: ClassVar[tuple[str, ...]] = ("x", "theta")
    """Attributes that are tuples of tensors and belong to the state; an empty one is not made yet."""
    counting: ClassVar[tuple[str, ...]] = ("steps",)
    """Attributes that are plain numbers, lists or None and belong to the state."""

    def __init__(
        self,
        levels: Levels,
        x: Sequence[Tensor],
        theta: Sequence[Tensor],
        *,
        lower_set: ConvexSet | Sequence[ConvexSet | None] | None = None,
        upper_set: ConvexSet | Sequence[ConvexSet | None] | None = None,
    ) -> None:
        self._check_start(x, theta)
        self.levels = levels
        self.lower_sets, self.upper_sets = sets_of(lower_set, x, "lower_set"), sets_of(upper_set, theta, "upper_set")
        self.x: Tensors = project(self.lower_sets, tuple(t.detach().clone() for t in x))
        self.theta: Tensors = project(self.upper_sets, tuple(t.detach().clone() for t in theta))
        self.steps = 0
        self._checked = False
        self.direct = True
        """Whether the upper objective reads theta itself; the first step finds out."""

    def step(self, lower_batch: Any = None, upper_batch: Any = None) -> Outer:
        """Make one outer step and return what it saw.

        Args:
            lower_batch: for the lower objective; a list is taken in turn by the steps of the lower level.
            upper_batch: for the upper objective.

        Raises:
            InputError: an objective does not depend on what it must.
            NonFiniteError: the method diverged (found at the step's end only where the caller looks, see `run`).
        """
        if not self._checked:
            self.check(turn(lower_batch, 0), upper_batch)
        report = self._step(lower_batch, upper_batch)
        self.steps += 1
        return report

    def _step(self, lower_batch: Any, upper_batch: Any) -> Outer:
        raise NotImplementedError(f"{type(self).__name__} must say its outer step")

    def run(
        self: Self,
        steps: int,
        batches: Batches | None = None,
        watch: Callable[[Self, Outer], object] | None = None,
        every: int = 50,
    ) -> Self:
        """Make `steps` more outer steps.

        Args:
            steps: how many.
            batches: `batches(step) -> (lower_batch, upper_batch)`, with the step counted since the method's beginning; None gives None.
            watch: called as `watch(method, outer)` after every step.
            every: after how many steps it is looked whether the variables are finite still.

        Raises:
            NonFiniteError: they are not.
        """
        for _ in range(steps):
            lower_batch, upper_batch = (None, None) if batches is None else batches(self.steps)
            report = self.step(lower_batch, upper_batch)
            if self.steps % every == 0:
                self.check_finite()
            if watch is not None:
                watch(self, report)
        self.check_finite()
        return self

    # ---- what is checked -------------------------------------------------------------------------------------------

    def _check_start(self, x: Sequence[Tensor], theta: Sequence[Tensor]) -> None:
        own = type(self).__name__
        for name, tensors in (("x", x), ("theta", theta)):
            if not isinstance(tensors, list | tuple) or not tensors:
                raise InputError(
                    f"{own}: {name} is a sequence of one tensor or more, and it is {type(tensors).__name__}."
                )
            for t in tensors:
                if not t.is_floating_point() or not bool(torch.isfinite(t).all()):
                    raise InputError(
                        f"{own}: {name} must begin with finite floating-point numbers, and {list(t.shape)} does not."
                    )
        shared = {id(t) for t in x if isinstance(t, nn.Parameter)} & {id(t) for t in theta}
        if shared:
            raise InputError(
                f"{own}: {len(shared)} parameter(s) stand in x and in theta; a variable belongs to one level."
            )

    def check(self, lower_batch: Any = None, upper_batch: Any = None) -> None:
        """Look once whether the objectives depend on what they must; the first step does it.

        Raises:
            InputError: the lower objective does not depend on x, or on no upper variable; or neither objective depends on one of them.
        """
        own, names = type(self).__name__, self.levels.names or tuple(f"theta[{i}]" for i in range(len(self.theta)))
        below_x, below = self._reached(self.levels.lower, lower_batch)
        above_x, above = self._reached(self.levels.upper, upper_batch)
        if not any(below_x):
            raise InputError(f"{own}: the lower objective does not depend on x, so there is nothing to solve below.")
        if not any(below):
            raise InputError(
                f"{own}: the lower objective depends on no upper variable ({', '.join(names)}), so what is best below never changes. "
                "Minimise the upper objective directly, or let the weights enter the lower objective."
            )
        idle = [name for name, b, a in zip(names, below, above, strict=True) if not (a or b)]
        if idle:
            raise InputError(
                f"{own}: nothing depends on {', '.join(idle)}; its hypergradient is 0 whatever it is. Leave it out."
            )
        if not any(above_x):
            warn(
                f"{own}: the upper objective does not depend on x, so that the hypergradient is its direct part alone.",
                PoiseWarning,
                stacklevel=3,
            )
        self._checked, self.direct = True, any(above)

    def _reached(self, function: Callable[..., Tensor], batch: Any) -> tuple[list[bool], list[bool]]:
        x, theta = leaves(self.x), leaves(self.theta)
        with torch.enable_grad():
            value = function(x, theta, batch)
        if value.ndim:
            raise InputError(f"A level must give one number, and it gave a tensor of shape {tuple(value.shape)}.")
        if not value.requires_grad:
            return [False] * len(x), [False] * len(theta)
        found = [g is not None for g in torch.autograd.grad(value, (*x, *theta), allow_unused=True)]
        return found[: len(x)], found[len(x) :]

    def check_finite(self) -> None:
        """Raise where a variable is not finite any more."""
        for name in ("x", "theta"):
            if not all(bool(torch.isfinite(t).all()) for t in getattr(self, name)):
                raise NonFiniteError(
                    f"{type(self).__name__}: {name} is not finite after {self.steps} outer steps. Use a smaller "
                    f"{'inner_lr' if name == 'x' else 'lr'}."
                )

    # ---- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything that moves: tensors by name, and counts."""
        tensors = {name: [t.clone() for t in getattr(self, name)] for name in self.moving}
        return {**tensors, **{name: _copied(getattr(self, name)) for name in self.counting}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            InputError: a name is missing, or a tensor has another shape.
        """
        missing = [name for name in (*self.moving, *self.counting) if name not in state]
        if missing:
            raise InputError(f"{type(self).__name__}: the saved state lacks {', '.join(missing)}.")
        for name in ("x", "theta"):
            shapes = [tuple(t.shape) for t in state[name]]
            expected = [tuple(t.shape) for t in getattr(self, name)]
            if shapes != expected:
                raise InputError(
                    f"{type(self).__name__}: {name} has shapes {expected}, and the saved state has {shapes}."
                )
        for name in self.moving:
            like = self.theta[0] if name == "theta" else self.x[0]
            setattr(self, name, tuple(torch.as_tensor(t).detach().clone().to(like.device) for t in state[name]))
        for name in self.counting:
            setattr(self, name, _copied(state[name]))


def turn(batch: Any, place: int) -> Any:
    """Return the batch of inner step `place`: a list is taken in turn, anything else serves every step."""
    return batch[place % len(batch)] if isinstance(batch, list) else batch


def zeros_like(tensors: Sequence[Tensor]) -> Tensors:
    """Return zeros of the same forms."""
    return tuple(torch.zeros_like(t) for t in detached(tensors))


def twice_differentiable(reason: str, method: str) -> IncompatibleError:
    """Return the error that says which operation of the lower objective has no second derivative."""
    return IncompatibleError(
        f"{method}: the lower objective cannot be differentiated twice: {reason}. Replace that operation, or use a method without "
        "second derivatives (PenaltyBilevel). For recurrent layers on a GPU, switch cuDNN off."
    )


def refuse_first_order(second: Linearised, method: str) -> None:
    """Raise where the lower gradient passes through an operation that is differentiable once.

    PyTorch marks its place in the graph, but `torch.autograd.grad` goes round it without a word: the products would be 0.

    Raises:
        IncompatibleError: such an operation.
    """
    waiting = [g.grad_fn for g in second._gradient if g.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node.name().rpartition("::")[2] == "Error":
            raise twice_differentiable("a function of its own is marked as once_differentiable", method)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


def rate_at(rate: float | Callable[[int], float], step: int) -> float:
    """Return a step size at an outer step: a number, or a function of the step."""
    return rate(step) if callable(rate) else rate
