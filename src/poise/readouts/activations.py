"""A stream of what a model computes inside: activations of one module, token by token, shuffled across inputs.

    stream = ActivationStream(model, "encoder.layer.3", {"input_ids": ids, "attention_mask": mask}, batch_size=4096)
    poise.fit(sae, "reconstruction", stream, readout=Autoencoding(), steps=20_000)

Nothing is stored but a buffer of activations. It is filled from inputs in a new order each pass, shuffled, served, and filled again, so a
resumed run fills the same buffer and goes on at the batch where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from poise import processes
from poise.errors import IncompatibleError, InputError
from poise.quantities import derive
from poise.streams import Batch, Stream

__all__ = ["ActivationStream", "activations_of"]

Inputs = Tensor | Mapping[str, Tensor]


def _rows(inputs: Inputs, rows: Tensor | slice) -> Any:
    return {name: x[rows] for name, x in inputs.items()} if isinstance(inputs, Mapping) else inputs[rows]


@torch.no_grad()
def activations_of(model: nn.Module, module: str, inputs: Inputs, batch_size: int = 32) -> Tensor:
    """Return what a module gives on inputs, one row a token: float [tokens, width].

    Where the inputs have an `attention_mask` [batch, time], padding is left out.

    Args:
        model: runs in evaluation mode, called as `model(inputs)`, or `model(**inputs)` for a mapping.
        module: name of a submodule, as `model.named_modules()` has it; what it gives is a tensor, or a tuple that begins with one.
        inputs: a tensor, or tensors by name, with the inputs along the first axis.
        batch_size: inputs of one pass.

    Raises:
        InputError: the model has no such module.
        IncompatibleError: the module did not run, or gave no tensor float [batch, ..., width].

    >>> activations_of(nn.Sequential(nn.Linear(3, 5), nn.ReLU()), "0", torch.randn(4, 3)).shape
    torch.Size([4, 5])
    """
    names = dict(model.named_modules())
    if module not in names:
        raise InputError(
            f"activations: the model has no module {module!r}; it has {', '.join(n for n in list(names)[1:8])}, ..."
        )
    seen: list[Any] = []
    handle = names[module].register_forward_hook(lambda _, given, output: seen.append(output))
    was = model.training
    model.eval()
    found = []
    try:
        for start in range(0, _length(inputs), batch_size):
            batch = _rows(inputs, slice(start, start + batch_size))
            seen.clear()
            model(**batch) if isinstance(batch, Mapping) else model(batch)
            found.append(_tokens(seen, module, batch))
    finally:
        handle.remove()
        model.train(was)
    return torch.cat(found)


def _length(inputs: Inputs) -> int:
    return len(next(iter(inputs.values()))) if isinstance(inputs, Mapping) else len(inputs)


def _tokens(seen: list[Any], module: str, batch: Any) -> Tensor:
    output = seen[-1] if seen else None
    states = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(states, Tensor) or states.ndim < 2:
        raise IncompatibleError(
            f"activations: {module!r} must run and give a tensor float [batch, ..., width], and it gave "
            f"{'nothing' if output is None else f'a {type(states).__name__}'}."
        )
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is not None and states.shape[:2] == mask.shape:
        return states[mask.bool()]
    return states.reshape(-1, states.shape[-1])


class ActivationStream(Stream):
    """Batches `{"input": float [batch_size, width]}` of a module's activations.

    Args:
        model: what is looked into; it is not trained here.
        module, inputs: as `activations_of`.
        batch_size: activations of one optimiser step.
        buffer: activations that are held and shuffled together, at least a batch; ten batches where nothing is said. Those that do not
            fill a batch at the end of a buffer, a random few, are left out.
        inputs_a_pass: inputs of one pass through the model.
        shuffle: take inputs in a new order each epoch, and shuffle the buffer.
        select: `select(activations) -> activations` of a pass, such as `lambda a: a[a.norm(dim=1) < 1e3]`.

    Raises:
        InputError: a number is out of range, there are no inputs, or a whole pass over the inputs does not fill one batch.

    >>> stream = ActivationStream(nn.Sequential(nn.Linear(3, 5)), "0", torch.randn(64, 3), batch_size=8, buffer=16)
    >>> [micro] = next(stream.prepare("main", 0, torch.device("cpu")).iterate(0)); micro["input"].shape
    torch.Size([8, 5])
    """

    def __init__(
        self,
        model: nn.Module,
        module: str,
        inputs: Inputs,
        batch_size: int = 4096,
        *,
        buffer: int | None = None,
        inputs_a_pass: int = 32,
        shuffle: bool = True,
        select: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(inputs if isinstance(inputs, Mapping) else {"input": inputs}, batch_size, shuffle=shuffle)
        if inputs_a_pass < 1 or (buffer is not None and buffer < batch_size):
            raise InputError(
                f"ActivationStream: inputs_a_pass is at least 1 and buffer at least a batch ({batch_size}), and they are {inputs_a_pass} "
                f"and {buffer}."
            )
        self.model, self.module, self.inputs, self.select = model, module, inputs, select
        self.buffer, self.inputs_a_pass = buffer or 10 * batch_size, inputs_a_pass
        self.start = self.served = 0
        """Inputs taken before the present buffer was filled, and batches served from it."""
        self._after = 0
        self._held: Tensor | None = None
        self._inputs = self.examples or 0
        # Activations have no place in a data set: no term can keep a memory for each.
        self.examples = None

    @property
    def steps_per_epoch(self) -> int | None:
        """Unknown, as it depends on how many tokens the inputs have: give a run its length in steps."""
        return None

    @property
    def classes(self) -> int | None:
        return None

    def prepare(self, name: str, seed: int, device: torch.device, accumulate: int = 1) -> ActivationStream:
        """As `Stream.prepare`; inputs stay where the model is."""
        self.name, self.seed, self.device, self.accumulate = name, seed, device, accumulate
        return self

    def iterate(self, step: int) -> Iterator[list[Batch]]:
        while True:
            if self._held is None:
                self._fill()
            assert self._held is not None
            if (self.served + 1) * self.batch_size > len(self._held):
                self.start, self.served, self._held = self._after, 0, None
                continue
            rows = self._held[self.served * self.batch_size : (self.served + 1) * self.batch_size]
            self.served += 1
            yield self._micros(rows, step)
            step += 1

    def _micros(self, rows: Tensor, step: int) -> list[Batch]:
        micros = []
        for number, part in enumerate(torch.tensor_split(rows, self.accumulate)):
            own = part[processes.rank() :: processes.size()]
            batch: Batch = {"input": (own if len(own) else rows[:1]).to(self.device)}
            micros.append(self._finish(batch, step, number, not len(own)))
        return micros

    def _fill(self) -> None:
        """Fill the buffer from the inputs that begin at `start`."""
        found: list[Tensor] = []
        held, at = 0, self.start
        while held < self.buffer:
            epoch, place = divmod(at, self._inputs)
            if held < self.batch_size and at - self.start >= 2 * self._inputs:
                raise InputError(
                    f"ActivationStream: two passes over the inputs give {held} activations, and a batch has {self.batch_size}. Give more "
                    "inputs, or a smaller batch."
                )
            rows = self._order_of(epoch)[place : place + self.inputs_a_pass]
            tokens = activations_of(self.model, self.module, _rows(self.inputs, rows), self.inputs_a_pass)
            found.append(tokens if self.select is None else self.select(tokens))
            held, at = held + len(found[-1]), at + len(rows)
        self._held, self._after = torch.cat(found), at
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive(self.seed, "buffer", self.name, self.start))
            self._held = self._held[torch.randperm(held, generator=generator).to(self._held.device)]

    def _order_of(self, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(derive(self.seed, "order", self.name, epoch))
            order = torch.randperm(self._inputs, generator=generator) if self.shuffle else torch.arange(self._inputs)
            self._order = (epoch, order)
        return self._order[1]

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start, "served": self.served}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.start, self.served, self._held = int(state["start"]), int(state["served"]), None
