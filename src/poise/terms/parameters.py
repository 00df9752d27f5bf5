"""Penalties on the model's parameters: 0-dim, sums over weights.

`l1` and `l2` charge weights with two axes or more (`biases=True`: all), as an intercept is not to be shrunk; `anchored` charges
every parameter that its reference names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from poise import penalties
from poise.errors import InputError
from poise.objective import Term
from poise.parameter_masks import check, draw_mask, matrices_of
from poise.penalties import Penalty, SquaredL2


class PenaltyTerm(Term):
    """A penalty of `poise.penalties` on every charged parameter: the sum of its values, 0-dim.

    Args:
        biases: charge vectors (biases, normalisation scales) too.

    Attributes:
        penalty: value, proximal map, subdifferential and conjugate, for solvers with structure.
        smooth: whether it has a gradient everywhere, so that its proximal map is not needed.
    """

    capabilities = frozenset({"potential", "deterministic"})
    smooth: ClassVar[bool] = False
    penalty: Penalty

    def __init__(self, biases: bool = False) -> None:
        super().__init__()
        self.biases = biases

    def charged(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return those of the parameters that it charges."""
        return {n: p for n, p in parameters.items() if p.is_floating_point() and (self.biases or p.ndim > 1)}

    def forward(self, parameters: Mapping[str, Tensor]) -> Tensor:
        # a penalty sees `[outputs, inputs]`, and a kernel's inputs are its channels and places
        found = [self.penalty.value(p.flatten(1) if p.ndim > 2 else p) for p in self.charged(parameters).values()]
        return torch.stack(found).sum() if found else torch.zeros(())


class L2(PenaltyTerm):
    """Half the squared norm of the weights: `1/2 sum w^2`. Its gradient is `w`.

    Decoupled weight decay is the solver's `weight_decay`, another thing.

    Args:
        biases: charge vectors (biases, normalisation scales) too.
    """

    formula = "l2"
    equation = "1/2 sum w^2"
    smooth = True
    penalty = SquaredL2()

    @property
    def strong_convexity(self) -> float:
        """The least curvature that it gives a convex objective: 1 where it charges every parameter."""
        return 1.0 if self.biases else 0.0


class L1(PenaltyTerm):
    """The sum of absolute weights: `sum |w|`.

    Args:
        biases: charge vectors (biases, normalisation scales) too.
    """

    formula = "l1"
    equation = "sum |w|"
    penalty = penalties.L1()


class AnchoredPenalty(Term):
    """Half the squared distance to reference weights: `1/2 sum (1 - M)(theta - theta_0)^2`. Its gradient is `(1 - M)(theta - theta_0)`.

    Without a mask it is L2-SP; with one that frees a random half it is the soft form of half fine-tuning, which an infinite weight
    turns into the hard one. A penalty written `lambda ||(1 - M)(theta - theta_0)||^2`, without the half, has the weight `2*lambda` here.

    Args:
        reference: a module, or weights by name, that is copied; parameters that it lacks are not charged. None takes the weights
            at the first evaluation, saves them with the objective's state, and so resumes with them.
        mask: parameter name -> True (free), False (anchored) or a bool tensor that broadcasts; absent names are anchored.
        ratio: instead of a mask, the free share, drawn as `poise.parameter_masks.draw_mask` does with `level` and `seed`;
            embeddings and the head are free.

    The reference is held as tensors outside the parameters and the state (but see None above): no optimiser sees it.

    Raises:
        InputError: mask and ratio are both given, or the reference has none of the model's parameters, or another shape.

    Source:
        arXiv:1802.01483 (L2-SP), arXiv:2404.18466, section 3.
    """

    formula = "anchored"
    equation = "1/2 sum (1 - M)(theta - theta_0)^2"
    source = "arXiv:2404.18466"
    capabilities = frozenset({"potential", "deterministic"})

    def __init__(
        self,
        reference: nn.Module | Mapping[str, Tensor] | None = None,
        mask: Mapping[str, bool | Tensor] | None = None,
        ratio: float | None = None,
        level: str = "category",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if mask is not None and ratio is not None:
            raise InputError("anchored: give a mask or a ratio, not both.")
        if ratio is not None:
            check(level, ratio)
        given = dict(reference.named_parameters()) if isinstance(reference, nn.Module) else reference
        # What is found at the first evaluation is kept apart from the arguments, which name the objective in checkpoints.
        self.reference = None if given is None else _copies(given)
        self._start, self._free = self.reference, mask
        # Fused queries, keys and values may lie head by head, which the module tells and its tensors do not.
        self.mask = mask
        if ratio is not None and isinstance(reference, nn.Module):
            self._free = draw_mask(matrices_of(reference, None, level), level, ratio, seed)
        self.ratio, self.level, self.seed = ratio, level, seed

    def forward(self, parameters: Mapping[str, Tensor]) -> Tensor:
        if self._start is None:
            self._start = _copies(parameters)
        if self._free is None and self.ratio is not None:
            self._free = draw_mask(matrices_of(self._start, None, self.level), self.level, self.ratio, self.seed)
        charged = [self._distance(name, p) for name, p in parameters.items() if name in self._start]
        if not charged:
            few = ", ".join(list(parameters)[:3])
            raise InputError(f"anchored: the reference has none of the trained parameters ({few}, ...).")
        return 0.5 * torch.stack([c for c in charged if c is not None] or [torch.zeros(())]).sum()

    def _distance(self, name: str, parameter: Tensor) -> Tensor | None:
        assert self._start is not None
        free: bool | Tensor = False if self._free is None else self._free.get(name, False)
        if free is True:
            return None
        start = self._start[name].to(parameter)
        if start.shape != parameter.shape:
            raise InputError(
                f"anchored: {name} is {tuple(parameter.shape)}, and in the reference it is {tuple(start.shape)}."
            )
        moved = parameter - start
        if isinstance(free, Tensor):
            moved = moved.masked_fill(free.to(parameter.device), 0)
        return moved.square().sum()

    def _apply(self, fn: Any, recurse: bool = True) -> AnchoredPenalty:
        if self._start is not None:
            self._start = {name: fn(value) for name, value in self._start.items()}
            self.reference = None if self.reference is None else self._start
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def get_extra_state(self) -> dict[str, Any]:
        return {"reference": self._start if self.reference is None else None}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if state["reference"] is not None:
            self._start = _copies(state["reference"])


def _copies(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in weights.items()}
