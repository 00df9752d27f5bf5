"""Named values of one batch: computed when somebody reads them, once, in any order.

A readout sits next to the model and offers quantities (`logits`, `prediction`, ...); terms read them by name.
A lazy quantity runs under the gradient and autocast mode of its creation, and under random numbers derived from
(seed, step, micro-batch, rank, name). So neither the order of reading nor who else reads it changes its value,
and computing it again gives the same dropout masks.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from poise.errors import InputError, QuantityError

_RECORD: dict[str, tuple[str, str]] = {
    "ids": ("int64 [batch, time]", "tokens of the prompt and the {} answer"),
    "mask": ("bool [batch, time]", "which of them belong to the {} answer; entry t says it of token t"),
    "positions": ("int64 [batch, time]", "place of each token within the {} answer, from 0; -1 outside"),
    "logps": (
        "float [batch, time] | float [batch]",
        "log-probability of each token of the {} answer, 0 outside, or their sum",
    ),
    "entropy": ("float [batch, time]", "entropy of the distribution from which each token of the {} answer came, nats"),
    "logsumexp": ("float [batch, time]", "log-normaliser of the logits before each token of the {} answer"),
    "kl": (
        "float [batch, time]",
        "KL(reference || policy) over the vocabulary before each token of the {} answer, nats",
    ),
    "reverse_kl": (
        "float [batch, time]",
        "KL(policy || reference) over the vocabulary before each token of the {} answer, nats",
    ),
    "spans": (
        "int64 [batch, time]",
        "number of the key phrase that each token of the {} answer belongs to, 0 for none",
    ),
    "token_weight": ("float [batch, time]", "weight of each token of the {} answer"),
    "token_reward": ("float [batch, time]", "reward of each token of the {} answer"),
    "states": (
        "float [layers, batch, time, width]",
        "hidden states of the reference from which each token of the {} answer came",
    ),
}
"""The token record of one answer; every name stands in the catalogue behind `response_`, `chosen_` and `rejected_`.

Entry t of the time axis concerns token t, whose probability the model gave at t - 1. Outside the answer every number is 0.
"""


def _of_side(place: str, form: str) -> str:
    """Say of which side the time axis is: chosen and rejected answers may be padded to different lengths."""
    return form if place == "response_" else form.replace("time", f"{place}time")


CATALOGUE: dict[str, tuple[str, str]] = {
    "input": ("any [batch, ...]", "what the model is given"),
    "target": ("int64 [batch, ...] | float [batch, ...]", "class indices, or numbers to be predicted"),
    "domain": ("int64 [batch]", "number of the domain of each example, from 0; -1 for an unlabelled target domain"),
    "index": ("int64 [batch]", "position of each example in its data set, from 0"),
    "sample_weight": ("float [batch]", "each example's share of the denominator; 0 for a padding duplicate"),
    "mask": ("bool [batch, time]", "which positions of a sequence count"),
    "logits": ("float [batch, ..., classes]", "unnormalised log-probabilities"),
    "prediction": ("float [batch]", "predicted numbers"),
    "features": ("float [batch, ...]", "what the model computes before its last layer"),
    "probabilities": ("float [batch, ..., classes]", "softmax of the logits"),
    "teacher_logits": ("float [batch, ..., classes]", "logits of a frozen teacher on the same batch"),
    "teacher_probabilities": ("float [batch, ..., classes]", "softmax of the teacher's logits"),
    "label": ("bool [batch] | float [batch]", "whether an unpaired response is wanted"),
    "reward": ("float [batch]", "what a response earned"),
    "behaviour_logps": (
        "float [batch, time] | float [batch]",
        "log-probability of each token of a sampled answer under the policy that sampled it, 0 outside, or their sum",
    ),
    "log_score": (
        "float [batch]",
        "log-probability of a response under a target, up to its normaliser; -inf forbids it",
    ),
    "group": ("int64 [batch]", "which prompt a sampled response answers; responses of one group are compared"),
    **{
        f"{place}{name}": (
            _of_side(place, form),
            meaning.format(place.rstrip("_")).replace("response answer", "answer"),
        )
        for place in ("response_", "chosen_", "rejected_")
        for name, (form, meaning) in _RECORD.items()
    },
    **{
        f"reference_{place}{name}": (
            _of_side(place, form),
            f"{meaning.format(place.rstrip('_')).replace('response answer', 'answer')}, under the frozen reference",
        )
        for place in ("response_", "chosen_", "rejected_")
        for name, (form, meaning) in _RECORD.items()
        if name in ("logps", "entropy", "logsumexp")
    },
    "model": ("callable", "the trained model itself, at the parameters of this evaluation"),
    "parameters": ("mapping", "the trained parameters by name"),
    "step": ("int", "optimiser steps done, from 0"),
    "steps": ("int", "optimiser steps of the run"),
    "steps_per_epoch": ("int", "optimiser steps of one pass over the main stream"),
    "epoch": ("int", "passes done over the main stream, from 0"),
    "epochs": ("int", "passes of the run"),
    "progress": ("float", "share of the run that is done"),
}
"""The standard names: shape and meaning. A task or a readout may offer others."""

CLOCK = ("step", "steps", "steps_per_epoch", "epoch", "epochs", "progress")
_GOLDEN, _MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1


@dataclass(frozen=True)
class Pattern:
    """One accepted form of a quantity, such as `float [batch, classes]`."""

    kind: str
    dims: tuple[str, ...] | None
    text: str

    def fits(self, value: Any, sizes: dict[str, int]) -> bool:
        """Say whether `value` has this form, given the sizes that the names already have; record new ones."""
        if self.kind == "callable":
            return callable(value)
        if self.kind == "mapping":
            return isinstance(value, Mapping)
        if self.kind in ("int", "number") and not isinstance(value, Tensor):
            return isinstance(value, int) or (self.kind == "number" and isinstance(value, float))
        if not isinstance(value, Tensor) or not _is_kind(value.dtype, self.kind):
            return self.kind == "float" and self.dims is None and isinstance(value, float)
        return self.dims is None or _fit_dims(self.dims, tuple(value.shape), sizes)


def _is_kind(dtype: torch.dtype, kind: str) -> bool:
    if kind == "float":
        return dtype.is_floating_point
    return kind == "any" or str(dtype) == f"torch.{kind}"


def _fit_dims(dims: tuple[str, ...], shape: tuple[int, ...], sizes: dict[str, int]) -> bool:
    if "..." in dims:
        at = dims.index("...")
        after = len(dims) - at - 1
        if len(shape) < len(dims) - 1:
            return False
        pairs = [
            *zip(dims[:at], shape[:at], strict=True),
            *zip(dims[at + 1 :], shape[len(shape) - after :], strict=True),
        ]
    elif len(dims) != len(shape):
        return False
    else:
        pairs = list(zip(dims, shape, strict=True))
    found: dict[str, int] = {}
    for name, size in pairs:
        expected = int(name) if name.isdigit() else sizes.get(name, found.get(name, size))
        if expected != size:
            return False
        found[name] = size
    sizes.update(found)
    return True


@lru_cache(maxsize=512)
def patterns(text: str) -> tuple[Pattern, ...]:
    """Read `"int64 [batch] | float [batch, classes]"` into its alternatives."""
    result = []
    for part in (piece.strip() for piece in text.split("|")):
        kind, bracket, rest = part.partition("[")
        dims = tuple(d.strip() for d in rest.rstrip("] ").split(",") if d.strip()) if bracket else None
        result.append(Pattern(kind.strip(), dims, part))
    return tuple(result)


def check(reader: str, name: str, value: Any, expected: str, sizes: dict[str, int]) -> None:
    """Raise a `QuantityError` that names reader, quantity, the expected form and the offered one."""
    for pattern in patterns(expected):
        if pattern.fits(value, sizes):
            return
    known = f" (with {', '.join(f'{k} = {v}' for k, v in sizes.items())})" if sizes else ""
    raise QuantityError(f"{reader} reads {name!r} as {expected}{known}, and it was offered {describe(value)}.")


def describe(value: Any) -> str:
    """Describe a value as `float32 [128, 10]`, or by its type.

    >>> describe(torch.zeros(2, 3))
    'float32 [2, 3]'
    """
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"{type(value).__name__} {value!r}" if isinstance(value, int | float | str) else f"a {type(value).__name__}"


def derive(*keys: int | str) -> int:
    """Mix integers and names into one 63-bit seed; equal keys give equal seeds on every machine.

    Source: the splitmix64 finaliser (Steele, Lea and Flood, 2014).
    """
    state = 0
    for key in keys:
        word = zlib.crc32(key.encode()) if isinstance(key, str) else key
        state = (state ^ (word & _MASK)) + _GOLDEN & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


@contextmanager
def random_numbers(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Run a block under PyTorch's default generators seeded with `seed`, and put them back as they were.

    Args:
        seed: any integer in [0, 2**63).
        device: the accelerator whose generator is seeded too, beside the CPU's.
    """
    generators = [torch.default_generator]
    if device is not None and device.type == "cuda":
        at = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[at])
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        if device is not None and device.type == "mps":
            torch.mps.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


class Quantities(Mapping[str, Any]):
    """The named values of one micro-batch of one stream.

    Args:
        values: what is there already: the batch.
        key: (seed, step, micro-batch, rank), from which every lazy value derives its random numbers; without it, lazy
            values draw from PyTorch's default generator.
        device: where the random numbers are drawn, beside the CPU.

    >>> q = Quantities({"x": torch.ones(2)})
    >>> q.offer("double", lambda: 2 * q["x"])
    >>> q["double"]
    tensor([2., 2.])
    """

    def __init__(
        self,
        values: Mapping[str, Any] | None = None,
        *,
        key: tuple[int, ...] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._values: dict[str, Any] = dict(values) if values else {}
        self.given = tuple(self._values)
        """Names of what was there from the start: the data. Reading these computes nothing."""
        self._makers: dict[str, Callable[[], Any]] = {}
        self._running: list[str] = []
        self.key = key
        self.device = device
        self._grad = torch.is_grad_enabled()
        self._kind = device.type if device is not None else "cpu"
        self._autocast = torch.is_autocast_enabled(self._kind)
        self._dtype = torch.get_autocast_dtype(self._kind) if self._autocast else None

    def offer(self, name: str, make: Callable[[], Any]) -> None:
        """Offer a value that `make` computes when somebody first reads it."""
        if name in self._values or name in self._makers:
            raise InputError(f"The quantity {name!r} is offered twice.")
        self._makers[name] = make

    def put(self, name: str, value: Any) -> None:
        """Offer a value that is there already."""
        self._values[name] = value

    def __getitem__(self, name: str) -> Any:
        if name in self._values:
            return self._values[name]
        make = self._makers[name]
        if name in self._running:
            raise QuantityError(f"Quantities read each other in a circle: {' -> '.join([*self._running, name])}.")
        self._running.append(name)
        try:
            self._values[name] = value = self._compute(name, make)
        finally:
            self._running.pop()
        return value

    def _compute(self, name: str, make: Callable[[], Any]) -> Any:
        # The modes of now are most often those of the creation; entering them again would cost more than asking.
        if self._grad == torch.is_grad_enabled() and self._autocast == torch.is_autocast_enabled(self._kind):
            return self._draw(name, make)
        with (
            torch.set_grad_enabled(self._grad),
            torch.autocast(self._kind, dtype=self._dtype, enabled=self._autocast),
        ):
            return self._draw(name, make)

    def _draw(self, name: str, make: Callable[[], Any]) -> Any:
        if self.key is None:
            return make()
        with random_numbers(derive(*self.key, name), self.device):
            return make()

    def __contains__(self, name: object) -> bool:
        return name in self._values or name in self._makers

    def __iter__(self) -> Iterator[str]:
        yield from self._values
        yield from (name for name in self._makers if name not in self._values)

    def __len__(self) -> int:
        return len(self._values.keys() | self._makers.keys())

    def __repr__(self) -> str:
        waiting = [name for name in self._makers if name not in self._values]
        return f"Quantities({', '.join(self._values)}; not computed yet: {', '.join(waiting) or 'none'})"


class Streams(dict[str, Mapping[str, Any]]):
    """Quantities of several streams by the name of the stream; terms without a stream read `main`."""
