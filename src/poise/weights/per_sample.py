"""A weight for every training example, found by its index: what hyper-cleaning learns.

    weight = PerSampleWeight(500, init=1.0)                       # lambda, one number for each example; sigma(lambda) is its weight
    objective = weight * CrossEntropy() + 1e-3 * L2()
    loss = objective(logits=logits, target=target, index=index)   # each example's value times sigma(lambda[index])

The numbers are a buffer that only a policy moves: in the optimiser of the model they would run to where nothing costs anything. A bilevel
method replaces them by name, and gradients flow:

    torch.func.functional_call(objective, {weight.name_in(objective): theta[0]}, (quantities,))
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from poise.errors import InputError, QuantityError
from poise.objective import Objective, Summand, Term, Value

Transform = Literal["sigmoid", "softplus", "exp", "identity"]
TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softplus": nn.functional.softplus,
    "exp": torch.exp,
    "identity": lambda raw: raw,
}


class PerSampleWeight(nn.Module):
    """One weight for each example of the training set.

        w_i = transform(lambda_i),    weight * term = sum_i w_i term_i / count    over a batch

    Args:
        n: examples of the training set; indices lie in [0, n).
        init: every lambda at first.
        transform: "sigmoid", into (0, 1); "softplus" or "exp", positive; "identity".
        dtype: of lambda.

    Buffer: `raw`, lambda [n].

    Raises:
        InputError: n below 1, an unknown transform, an init that is not finite, or a term that has no values per example.

    >>> weight = PerSampleWeight(3, init=0.0)
    >>> weight(torch.tensor([0, 2]))
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    __array_ufunc__ = None
    raw: Tensor

    def __init__(
        self, n: int, init: float = 1.0, transform: Transform = "sigmoid", dtype: torch.dtype = torch.float64
    ) -> None:
        super().__init__()
        if n < 1:
            raise InputError(f"PerSampleWeight: n is the number of examples, at least 1, and it is {n}.")
        if transform not in TRANSFORMS:
            raise InputError(f"PerSampleWeight: transform is one of {', '.join(TRANSFORMS)}, and it is {transform!r}.")
        if not torch.isfinite(torch.tensor(init)):
            raise InputError(f"PerSampleWeight: init must be finite, and it is {init}.")
        self.transform = transform
        self.register_buffer("raw", torch.full((n,), float(init), dtype=dtype))

    def forward(self, index: Tensor | None, raw: Tensor | None = None) -> Tensor:
        """Return the weights of a batch, [batch].

        Args:
            index: int64 [batch], positions in the training set; None for all of it.
            raw: lambda [n] in place of the buffer.
        """
        chosen = self.raw if raw is None else raw
        return TRANSFORMS[self.transform](chosen if index is None else chosen[index])

    @property
    def values(self) -> Tensor:
        """The weights of all examples, [n]."""
        return TRANSFORMS[self.transform](self.raw)

    def __mul__(self, other: Any) -> Objective:
        if isinstance(other, Term):
            other = Objective([Summand(other)])
        if not isinstance(other, Objective):
            return NotImplemented
        result = Objective([replace(s, term=weighed(s.term, self)) for s in other.summands], other.parts)
        result.clock, result.seed = other.clock, other.seed
        return result

    __rmul__ = __mul__

    def name_in(self, module: nn.Module) -> str:
        """Return the name of `raw` among the buffers of a module, such as an objective, for `torch.func.functional_call`.

        Raises:
            InputError: the module does not hold this weight.
        """
        for name, buffer in module.named_buffers():
            if buffer is self.raw:
                return name
        raise InputError(f"PerSampleWeight: this {type(module).__name__} does not hold the weight.")

    def __repr__(self) -> str:
        return f"PerSampleWeight({len(self.raw)}, transform={self.transform!r})"


class _Weighed(Term):
    """A term whose value for each example is multiplied by the example's weight; it reads `index` beside what the term reads."""

    formula = "weighed"

    def __init__(self, term: Term, weight: PerSampleWeight) -> None:
        super().__init__()
        self.term, self.weight = term, weight

    def _weigh(self, found: Tensor | Value, index: Tensor) -> Tensor | Value:
        value = Value(found) if isinstance(found, Tensor) else found
        if not value.values.ndim:
            raise QuantityError(
                f"{self.formula}: PerSampleWeight weighs values per example, and this term gives one number."
            )
        try:
            weights = self.weight(index).to(value.values.dtype)
        except IndexError as error:
            raise QuantityError(
                f"{self.formula}: PerSampleWeight has weights for examples 0 to {len(self.weight.raw) - 1}, and index goes up to "
                f"{int(index.max())}. Give n = the number of training examples."
            ) from error
        weights = weights.view(-1, *[1] * (value.values.ndim - 1))
        surrogate = None if value.surrogate is None else value.surrogate * weights
        return replace(value, values=value.values * weights, surrogate=surrogate)

    def bind(self, info: Any) -> None:
        self.term.bind(info)

    def player(self, parameter: str) -> str:
        return self.term.player(parameter.removeprefix("term."))

    def readings(self) -> tuple[str, ...]:
        return self.term.readings()

    def requirements(self) -> tuple[str, ...]:
        return self.term.requirements()

    def __reduce__(self) -> tuple[Any, ...]:
        return weighed, (self.term, self.weight)


def weighed(term: Term, weight: PerSampleWeight) -> Term:
    """Return the term with every example's value times the example's weight.

    What a term reads is the signature of its `forward`, so the class is made for the term: its signature, and `index`.
    """
    if "per_example" not in term.capabilities or term.composes():
        raise InputError(f"PerSampleWeight: {term.formula} has no values per example to weigh.")
    own = inspect.signature(type(term).forward)
    names = list(own.parameters)[1:]

    def forward(self: _Weighed, **quantities: Any) -> Tensor | Value:
        index = quantities["index"] if "index" in names else quantities.pop("index")
        return self._weigh(self.term(**quantities), index)

    parameters = list(own.parameters.values())
    if "index" not in names:
        parameters.insert(1, inspect.Parameter("index", inspect.Parameter.POSITIONAL_OR_KEYWORD))
    forward.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    body: dict[str, Any] = {"forward": forward, "__module__": __name__, "__doc__": _Weighed.__doc__}
    for name in ("formula", "equation", "source", "couples", "stochastic", "capabilities", "bounded_below"):
        body[name] = getattr(term, name)
    body["expects"], body["differentiable_extras"] = dict(term.expects), term.differentiable_extras
    for name in ("count", "advance"):
        inner = getattr(type(term), name, None)
        if inner is not None:
            body[name] = _passing(name, inspect.signature(inner))
    made: Term = type("Weighed", (_Weighed,), body)(term, weight)
    return made


def _passing(name: str, signature: inspect.Signature) -> Callable[..., Any]:
    def method(self: _Weighed, **named: Any) -> Any:
        return getattr(self.term, name)(**named)

    method.__signature__ = signature  # type: ignore[attr-defined]
    return method
