"""Where batches come from: one stream for each data set, each with its own sampler, batch size and index space.

The order of the data is a pure function of (seed, name of the stream, epoch), so a run that is stopped and resumed at
a step sees the same batches, and the number of processes or micro-batches changes no batch, only how it is shared out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from poise import processes
from poise.errors import IncompatibleError, InputError
from poise.quantities import derive

Batch = dict[str, Any]
Transform = Callable[[Batch, torch.Generator], Batch]


class Stream:
    """A data set and how it is drawn.

    Args:
        data: tensors by quantity name (`{"input": ..., "target": ...}`), a pair `(input, target)`, a map-style data set whose
            items are such pairs or dictionaries, or a `DataLoader` (drawn as it is; then `index` is what its batches say). Where a
            data set has a method `collate(items)`, that makes its batches.
        batch_size: examples of one optimiser step, over all processes and micro-batches.
        shuffle: draw each epoch in a new order; else in the order of the data.
        drop_last: leave out the last, smaller batch of an epoch.
        transform: `transform(batch, generator) -> batch`, applied to every micro-batch; draws only from the generator.
        workers: processes that load items of a map-style data set.

    Raises:
        InputError: the data are empty, or their tensors differ in length.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int = 128,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        transform: Transform | None = None,
        workers: int = 0,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, and it is {batch_size}.")
        if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(d, Tensor) for d in data):
            data = {"input": data[0], "target": data[1]}
        self.data, self.batch_size = data, batch_size
        self.shuffle, self.drop_last, self.transform, self.workers = shuffle, drop_last, transform, workers
        self.examples = self._count()
        self._order: tuple[int, Tensor] | None = None
        self.name, self.seed, self.accumulate = "main", 0, 1
        self.device = torch.device("cpu")

    def _count(self) -> int | None:
        if isinstance(self.data, Mapping):
            lengths = {name: len(value) for name, value in self.data.items()}
            if len(set(lengths.values())) != 1:
                raise InputError(f"The tensors of a stream need one length, and these differ: {lengths}.")
            if not next(iter(lengths.values())):
                raise InputError("The training data are empty.")
            return next(iter(lengths.values()))
        if isinstance(self.data, DataLoader):
            self.batch_size = self.data.batch_size or self.batch_size
            dataset = self.data.dataset
            return None if isinstance(dataset, IterableDataset) else len(dataset)  # type: ignore[arg-type]
        if isinstance(self.data, IterableDataset):
            raise InputError("An iterable data set has no order to resume in: wrap it in a DataLoader.")
        if isinstance(self.data, Dataset) or hasattr(self.data, "__getitem__"):
            return len(self.data)
        raise InputError(
            f"Training data are tensors by name, a data set or a DataLoader, and this is a {type(self.data).__name__}."
        )

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimiser steps of one pass, or None where nobody knows."""
        if isinstance(self.data, DataLoader):
            try:
                return math.ceil(len(self.data) / self.accumulate)
            except TypeError:
                return None
        if self.examples is None:
            return None
        return (
            max(1, self.examples // self.batch_size) if self.drop_last else math.ceil(self.examples / self.batch_size)
        )

    @property
    def classes(self) -> int | None:
        """Classes of the target, where the target says so: one more than the largest index, or the columns of probabilities."""
        target = self.data.get("target") if isinstance(self.data, Mapping) else None
        if isinstance(target, Tensor) and target.ndim == 2 and target.is_floating_point():
            return int(target.shape[1])
        if isinstance(target, Tensor) and not target.is_floating_point() and target.numel():
            return int(target.max()) + 1
        return None

    def prepare(self, name: str, seed: int, device: torch.device, accumulate: int = 1) -> Stream:
        """Tell the stream what it is called, its seed, its device and how many micro-batches a step has.

        Raises:
            IncompatibleError: a `DataLoader` under several processes.
        """
        if isinstance(self.data, DataLoader) and processes.size() > 1:
            raise IncompatibleError(
                "Several processes share out a data set themselves: give the data set instead of a DataLoader."
            )
        self.name, self.seed, self.device, self.accumulate = name, seed, device, accumulate
        if isinstance(self.data, Mapping):
            self.data = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.data.items()}
        return self

    def attach(self, model: nn.Module) -> None:
        """Tell the stream which model is trained; data that are there already do not depend on it."""

    @property
    def limit(self) -> int | None:
        """Optimiser steps that the stream can serve in all, or None where it never ends."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run cannot derive from (seed, name, step): nothing, for data that are there already."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""

    def iterate(self, step: int) -> Iterator[list[Batch]]:
        """Give the micro-batches of every optimiser step from `step` on, without end."""
        if isinstance(self.data, Mapping):
            return self._from_tensors(step)
        return self._from_loader(step) if isinstance(self.data, DataLoader) else self._from_dataset(step)

    def _rows(self, step: int) -> Tensor:
        """Return the positions of one optimiser step, for all processes and micro-batches."""
        epoch, position = divmod(step, self.steps_per_epoch or 1)
        examples = self.examples or 0
        if self._order is None or self._order[0] != epoch:
            if self.shuffle:
                generator = torch.Generator().manual_seed(derive(self.seed, "order", self.name, epoch))
                order = torch.randperm(examples, generator=generator)
            else:
                order = torch.arange(examples)
            self._order = (epoch, order)
        return self._order[1][position * self.batch_size : (position + 1) * self.batch_size]

    def _shares(self, step: int) -> list[tuple[Tensor, bool]]:
        """Return this process's positions, one part a micro-batch, and whether a part is only padding."""
        shares = []
        rows = self._rows(step)
        for part in torch.tensor_split(rows, self.accumulate) if self.accumulate > 1 else (rows,):
            own = part[processes.rank() :: processes.size()]
            # A process without a row takes one that counts nothing, so that it can run the model along with the others.
            shares.append((own, False) if len(own) else (rows[:1], True))
        return shares

    def _from_tensors(self, step: int) -> Iterator[list[Batch]]:
        while True:
            micros = []
            for number, (rows, padding) in enumerate(self._shares(step)):
                index = rows.to(self.device)
                batch: Batch = {name: value[index] for name, value in self.data.items()}
                batch.setdefault("index", index)
                micros.append(self._finish(batch, step, number, padding))
            yield micros
            step += 1

    def _from_dataset(self, step: int) -> Iterator[list[Batch]]:
        while True:
            # One loader an epoch, so that its processes read ahead; it begins in the middle where the run resumes.
            length = self.steps_per_epoch or 1
            steps = range(step, step - step % length + length)
            shares = [share for s in steps for share in self._shares(s)]
            loader = DataLoader(
                self.data,
                batch_sampler=_Lists([rows.tolist() for rows, _ in shares]),
                num_workers=self.workers,
                collate_fn=getattr(self.data, "collate", default_collate),
            )
            micros: list[Batch] = []
            for (rows, padding), items in zip(shares, loader, strict=True):
                batch = _named(items)
                batch.setdefault("index", rows)
                micros.append(self._finish(self._moved(batch), step, len(micros), padding))
                if len(micros) == self.accumulate:
                    yield micros
                    micros, step = [], step + 1

    def _from_loader(self, step: int) -> Iterator[list[Batch]]:
        length = self.steps_per_epoch
        skip = (step % length if length else step) * self.accumulate
        while True:
            micros: list[Batch] = []
            for items in self.data:
                if skip:
                    skip -= 1
                    continue
                micros.append(self._finish(self._moved(_named(items)), step, len(micros), False))
                if len(micros) == self.accumulate:
                    yield micros
                    micros, step = [], step + 1
            if micros:
                yield micros
                step += 1

    def _moved(self, batch: Batch) -> Batch:
        return {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def _finish(self, batch: Batch, step: int, number: int, padding: bool) -> Batch:
        if padding:
            batch["sample_weight"] = torch.zeros(1, device=self.device)
        if self.transform is not None:
            generator = torch.Generator().manual_seed(
                derive(self.seed, "transform", self.name, step, number, processes.rank())
            )
            batch = self.transform(batch, generator)
        return batch


class _Lists:
    """A batch sampler that gives lists it was given."""

    def __init__(self, lists: Sequence[list[int]]) -> None:
        self.lists = lists

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.lists)

    def __len__(self) -> int:
        return len(self.lists)


def _named(items: Any) -> Batch:
    if isinstance(items, Mapping):
        return dict(items)
    if isinstance(items, tuple | list) and len(items) in (2, 3):
        return dict(zip(("input", "target", "index"), items, strict=False))
    raise InputError(
        f"A batch is a dictionary of quantities or a pair (input, target), and this one is a {type(items).__name__}"
        + (f" of {len(items)}." if isinstance(items, tuple | list) else ".")
    )
