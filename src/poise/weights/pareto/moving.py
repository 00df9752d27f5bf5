"""Balancers that remember: what they keep between steps stands in float64 buffers, sized when the terms are first seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from poise.errors import InputError
from poise.weights.descent import adam
from poise.weights.pareto.balancer import Balancer

if TYPE_CHECKING:
    from poise.problem import Signals


class Remembering(nn.Module):
    """A module whose buffers take the shape of what is saved, and keep their dtype and place on the host."""

    def keep(self, name: str, value: Tensor | None = None) -> None:
        """Register a buffer; without a value it is empty until the terms are seen."""
        self.register_buffer(name, torch.empty(0, dtype=torch.float64) if value is None else value)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, buffer in self._buffers.items():
            saved = state_dict.get(prefix + name)
            if buffer is not None and isinstance(saved, Tensor) and saved.shape != buffer.shape:
                self._buffers[name] = torch.empty_like(saved, device=buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Remembering:
        """Buffers keep their dtype and stay on the host, where weights are found; half a model's precision is not theirs."""
        return self


class MovingBalancer(Remembering, Balancer):
    """A balancer with state. `weigh` reads it and `move`, once after the update, changes it; asking twice in a step changes nothing."""

    def move(self, gram: Tensor, values: Tensor) -> None:
        """Change the state by what was measured in this step."""
        raise NotImplementedError(f"{type(self).__name__} must say how it moves.")

    def advance(self, signals: Signals) -> None:
        """Move the state, after the update."""
        table = signals.gradients
        self.move(table.gram, table.values)

    def keep_random_state(self, generator: torch.Generator | None, seed: int) -> None:
        """Keep where random numbers go on, as a buffer: it is saved, copied and resumed like any other."""
        start = torch.Generator().manual_seed(seed) if generator is None else generator
        if start.device.type != "cpu":
            raise InputError(f"{self.formula}: generator must be on the CPU, and it is on {start.device}.")
        self.keep("random_state", start.get_state())

    def random_numbers(self) -> torch.Generator:
        """Return a generator at the start of this step's random numbers, the same one each time."""
        generator = torch.Generator()
        generator.set_state(self.random_state.cpu())
        return generator

    def take_random_numbers(self, draw: Callable[[torch.Generator], object]) -> None:
        """Leave this step's random numbers behind: those that `draw` takes."""
        generator = self.random_numbers()
        draw(generator)
        self.random_state = generator.get_state()


class ValueBalancer(MovingBalancer):
    """A balancer that looks at the values of the terms alone: a step costs what a plain step does.

    Its weights are those that earlier steps led to, because the values of this one are known only after its forward pass.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"values"})

    def current(self, terms: int, values: Callable[[], Tensor]) -> Tensor:
        """Return the weights of this step, f64 [m]; calling `values` costs a forward pass more."""
        raise NotImplementedError(f"{type(self).__name__} must say how it weighs.")

    def move_values(self, values: Tensor) -> None:
        """Change the state by the values of this step, all finite."""

    def weigh(self, gram: Tensor, values: Tensor) -> Tensor:
        """Return the weights; the gradients are not looked at."""
        return self.current(len(values), lambda: values)

    def move(self, gram: Tensor, values: Tensor) -> None:
        """Change the state; the gradients are not looked at, and values that are not finite change nothing."""
        if bool(torch.isfinite(values).all()):
            self.move_values(values.detach().double().cpu())

    def weights(self, signals: Signals) -> Mapping[str, float | Tensor]:
        """Return the weights of this step by name."""
        names = tuple(signals.names)
        return dict(zip(names, self.current(len(names), lambda: signals.values).tolist(), strict=True))

    def advance(self, signals: Signals) -> None:
        """Move the state by the values of this step, after the update."""
        self.move(torch.empty(0), signals.values)


class Adam(Remembering):
    """Adam for the few numbers of a balancer; its moments are buffers and nothing here is a parameter of the model's optimiser.

    x <- x - lr (m/(1-b1^t)) / (sqrt(v/(1-b2^t)) + 1e-8)

    Buffers: `first`, `second`, `count`.

    Source: arXiv:1412.6980, algorithm 1.
    """

    first: Tensor
    second: Tensor
    count: Tensor

    def __init__(self, formula: str, lr: float, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        super().__init__()
        if not 0 < lr < float("inf"):
            raise InputError(f"{formula}: lr is positive and finite, and it is {lr}.")
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
            raise InputError(f"{formula}: betas lie in [0, 1), and they are {betas}.")
        self.lr, self.betas = float(lr), betas
        self.keep("first")
        self.keep("second")
        self.keep("count", torch.tensor(0, dtype=torch.int64))

    def step(self, at: Tensor, gradient: Tensor) -> Tensor:
        """Return where the numbers go from `at`, and move the moments."""
        if not self.first.numel():
            self.first, self.second = torch.zeros_like(gradient), torch.zeros_like(gradient)
        self.count = self.count + 1
        direction, self.first, self.second = adam(gradient, self.first, self.second, int(self.count), self.betas)
        return at - self.lr * direction
