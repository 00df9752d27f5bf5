"""One memory for everything that is remembered per training example.

Rows are keyed by the example's position in its data set. Who reads in `forward` and writes in `advance` has a term
whose forward is pure and whose state is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import InputError, QuantityError, StateError

_EXACT = (torch.float32, torch.float64)


class PerExampleMemory(nn.Module):
    """A row for each training example, and how often it was written.

    Args:
        width: numbers in a row; None takes the number of classes when the memory is bound.
        dtype: what the rows are stored in; float16 or bfloat16 halves the memory. It survives `.to(dtype)`.
        initial: what an unwritten row holds.

    Buffers: `values` `[examples, width]` and `visits` `int64 [examples]`; both are saved, and loading a saved state binds.
    Rows that are read come back as float32 (float64 where they are stored so).

    >>> memory = PerExampleMemory(width=2).bind(examples=3)
    >>> memory.write(torch.tensor([1]), torch.tensor([[0.25, 0.75]]))
    >>> memory.read(torch.tensor([0, 1]))
    tensor([[0.0000, 0.0000],
            [0.2500, 0.7500]])
    """

    values: Tensor
    visits: Tensor

    def __init__(self, width: int | None = None, dtype: torch.dtype = torch.float32, initial: float = 0.0) -> None:
        super().__init__()
        if not dtype.is_floating_point:
            raise InputError(f"PerExampleMemory stores floating-point rows, and dtype is {dtype}.")
        self.width, self.dtype, self.initial = width, dtype, initial
        self.register_buffer("values", torch.empty(0, width or 0, dtype=dtype))
        self.register_buffer("visits", torch.empty(0, dtype=torch.int64))

    @property
    def examples(self) -> int:
        """Rows that the memory holds; 0 before it is bound."""
        return len(self.visits)

    @property
    def rows(self) -> Tensor:
        """`values`, found at once: the search of nn.Module costs as much as an operation."""
        return self._buffers["values"]  # type: ignore[return-value]

    def bind(self, examples: int, classes: int | None = None, device: torch.device | None = None) -> PerExampleMemory:
        """Make room for `examples` rows; what is there already stays, and must fit.

        Raises:
            InputError: the width is not known, or the memory holds another number of rows or columns.
        """
        width = self.width or classes
        if width is None:
            raise InputError(
                "A per-example memory needs the number of classes: give `width`, or bind it to data with classes."
            )
        if self.examples:
            if tuple(self.values.shape) != (examples, width):
                raise InputError(
                    f"The memory holds {self.examples} examples of width {self.values.shape[1]}, and the data have {examples} of width "
                    f"{width}. A memory belongs to one training set: start afresh, or resume with the data it was made for."
                )
            return self
        self.values = torch.full((examples, width), self.initial, dtype=self.dtype, device=device or self.values.device)
        self.visits = torch.zeros(examples, dtype=torch.int64, device=device or self.visits.device)
        return self

    def read(self, index: Tensor) -> Tensor:
        """Return the rows of `index` `int64 [batch]` as float `[batch, width]`, without gradient.

        Raises:
            QuantityError: an index lies outside `[0, examples)`.
            StateError: the memory is not bound.
        """
        rows = self._select(self.rows, index)
        return rows if rows.dtype in _EXACT else rows.float()

    def visits_of(self, index: Tensor) -> Tensor:
        """Return how often each of `index` was written, `int64 [batch]`."""
        return self._select(self.visits, index)

    def write(self, index: Tensor, rows: Tensor) -> None:
        """Store `rows` `[batch, width]` at `index` `int64 [batch]` and count the visit.

        Raises:
            QuantityError: an index is out of range or stands twice, so that the result would depend on an order.
        """
        values, visits = self.rows, self._buffers["visits"]
        assert visits is not None
        if index.dtype != torch.int64 or index.ndim != 1:
            self._check(index)
        counted = self._select(visits, index).add_(1)
        if rows.requires_grad:
            rows = rows.detach()
        if rows.dtype != values.dtype:
            rows = rows.to(values.dtype)
        if index.is_cpu:
            once = torch.ones_like(index)
            visits.index_add_(0, index, once)
            if not torch.equal(visits.index_select(0, index), counted):
                visits.index_add_(0, index, once, alpha=-1)
                self._refuse_duplicates(index)
        else:
            # Duplicates cannot be seen without waiting for the device: the row of one of them is stored, whole, and counted once.
            ticket = torch.arange(len(index), device=index.device)
            won = torch.empty_like(visits).index_copy_(0, index, ticket).index_select(0, index)
            rows = rows.index_select(0, won)
            visits.index_copy_(0, index, counted)
        values.index_copy_(0, index, rows)

    def _refuse_duplicates(self, index: Tensor) -> None:
        twice = [int(i) for i, n in zip(*torch.unique(index, return_counts=True), strict=True) if n > 1]
        raise QuantityError(
            f"The index {twice[0]} stands more than once in one step, so it is not defined which of its rows is remembered. "
            "Sample without replacement within a step."
        )

    def _select(self, table: Tensor, index: Tensor) -> Tensor:
        if not table.numel():
            self._check(index)
        try:
            return table.index_select(0, index)
        except (IndexError, RuntimeError):
            self._check(index)
            raise

    def _check(self, index: Tensor) -> None:
        if not self.examples:
            raise StateError(
                "A per-example memory is not bound to data yet: call objective.bind(examples=..., classes=...) before the first step."
            )
        if index.dtype != torch.int64 or index.ndim != 1:
            raise QuantityError(f"'index' must be int64 [batch], and it is {index.dtype} {list(index.shape)}.")
        if index.device.type == "cpu" and len(index) and (int(index.min()) < 0 or int(index.max()) >= self.examples):
            worst = int(index.max()) if int(index.max()) >= self.examples else int(index.min())
            raise QuantityError(
                f"The index {worst} lies outside [0, {self.examples}), the examples that the memory was bound to."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PerExampleMemory:
        # A change of device moves the rows; a change of dtype leaves them as they were declared.
        values = self.values
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.values.dtype != self.dtype:
            self.values = values.to(self.values.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(prefix + "values")
        if saved is not None and not self.examples:
            self.values = torch.empty(saved.shape, dtype=self.dtype, device=self.values.device)
            self.visits = torch.empty(saved.shape[0], dtype=torch.int64, device=self.visits.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
