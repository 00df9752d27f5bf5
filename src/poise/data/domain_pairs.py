"""A labelled source domain and an unlabelled target domain in one batch, with a part of the target held out to guide.

    pairs = DomainPairs((x_source, y_source), x_target, batch_size=32)
    poise.fit(model, "source_classification + domain_adversarial(dim=64)", pairs, readout=DomainFeatures(), ...)

Each step draws as many rows from the target as from the source, source rows first: `domain` is 0 and -1, and `target` is -1 wherever
nobody knows it. Labels of the target never enter a batch. The held-out rows are never trained on: `pairs.guide` offers them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise.errors import CheckpointError, InputError, PoiseWarning
from poise.quantities import derive
from poise.streams import Batch, Stream, Transform

__all__ = ["DomainPairs", "HeldOut", "hold_out"]

UNKNOWN = -1
"""The target of an example without a label, and the number of the unlabelled domain."""


@dataclass(frozen=True)
class HeldOut:
    """Which rows train, and which are held out to guide.

    Args:
        train: row numbers, int64 [n].
        guide: row numbers, int64 [m].

    Raises:
        InputError: a part is empty, names a row twice, or shares a row with the other.
    """

    train: Tensor
    guide: Tensor

    def __post_init__(self) -> None:
        for name, rows in (("train", self.train), ("guide", self.guide)):
            if rows.ndim != 1 or rows.dtype != torch.int64 or not len(rows):
                raise InputError(
                    f"The {name} part of a held-out split is a list of rows int64 [n], and it must not be empty."
                )
            if len(torch.unique(rows)) != len(rows):
                raise InputError(f"The {name} part of a held-out split names a row twice.")
        shared = self.guide[torch.isin(self.guide, self.train)]
        if len(shared):
            raise InputError(
                f"The guide must not have been trained on, and {len(shared)} of its {len(self.guide)} rows are training rows "
                f"(such as {', '.join(map(str, shared[:5].tolist()))}). Take them out of one of the two parts."
            )


def hold_out(examples: int, share: float = 0.1, seed: int = 0) -> HeldOut:
    """Hold out a share of the rows, at least one and never all.

    Args:
        examples: number of rows.
        share: of the rows, in (0, 1).
        seed: decides which.

    >>> hold_out(20, 0.1).guide.shape
    torch.Size([2])
    """
    if not 0 < share < 1 or examples < 2:
        raise InputError(f"hold_out: it needs two rows at least and a share in (0, 1); got {examples} and {share}.")
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(derive(seed, "held out")))
    many = min(max(1, round(share * examples)), examples - 1)
    return HeldOut(order[many:].sort().values, order[:many].sort().values)


class DomainPairs(Stream):
    """Draw source and target rows together.

    A batch holds `input`, `target` (-1 on target rows), `domain` (0 on source rows, -1 on target rows) and `index` (the row of the
    source; after the source's rows come those of the target).

    Args:
        source: `(input, target)` or `{"input": ..., "target": int64 [n]}`; it may bring `domain` where there are several.
        target: input tensor, or `{"input": ...}`; labels among it are left out.
        batch_size: rows of each domain in a step.
        target_batch_size: of the target, where it differs.
        held_out: share of the target rows that is held out to guide, or a `HeldOut` split of them; None for no guide.
        seed: decides which rows are held out.
        transform: as in `Stream`, on the joined batch.

    Raises:
        InputError: nothing is held out, held-out rows train, or the inputs of the domains differ in form.

    >>> pairs = DomainPairs((torch.zeros(40, 2), torch.zeros(40).long()), torch.rand(50, 2), batch_size=4)
    >>> [micro] = next(pairs.iterate(0)); micro["domain"]
    tensor([ 0,  0,  0,  0, -1, -1, -1, -1])
    """

    def __init__(
        self,
        source: Any,
        target: Any,
        batch_size: int = 32,
        *,
        target_batch_size: int | None = None,
        held_out: float | HeldOut | None = 0.1,
        seed: int = 0,
        transform: Transform | None = None,
    ) -> None:
        labelled, unlabelled = _source(source), _inputs(target)
        if unlabelled["input"].shape[1:] != labelled["input"].shape[1:]:
            raise InputError(
                f"Source and target must have inputs of one form, and theirs are {list(labelled['input'].shape[1:])} and "
                f"{list(unlabelled['input'].shape[1:])} an example."
            )
        super().__init__(labelled, min(batch_size, len(labelled["input"])), drop_last=True, transform=transform)
        self.rows = _split(len(unlabelled["input"]), held_out, seed)
        self._held_out = None if self.rows is None else unlabelled["input"][self.rows.guide]
        kept = unlabelled["input"] if self.rows is None else unlabelled["input"][self.rows.train]
        self.target = Stream({"input": kept}, min(target_batch_size or batch_size, len(kept)), drop_last=True)
        self.first_target = len(labelled["input"])
        self.examples = self.first_target + len(unlabelled["input"])
        if self._held_out is not None:
            _warn_of_copies(kept, self._held_out)

    @property
    def guide(self) -> dict[str, Tensor]:
        """The held-out rows as data: `input`, `target` (-1), `domain` (-1) and `index`.

        Raises:
            InputError: nothing was held out.
        """
        if self.rows is None or self._held_out is None:
            raise InputError("Nothing was held out of the target, so there is nothing to guide by: give held_out=0.1.")
        none = torch.full((len(self._held_out),), UNKNOWN)
        return {
            "input": self._held_out,
            "target": none,
            "domain": none.clone(),
            "index": self.first_target + self.rows.guide,
        }

    def guide_stream(self, batch_size: int = 32) -> Stream:
        """Return a stream of the held-out rows."""
        return Stream(self.guide, min(batch_size, len(self.guide["input"])), drop_last=True)

    @property
    def steps_per_epoch(self) -> int | None:
        """Steps of one pass over the source."""
        return max(1, self.first_target // self.batch_size)

    def prepare(self, name: str, seed: int, device: torch.device, accumulate: int = 1) -> DomainPairs:
        """As `Stream.prepare`, for both domains."""
        super().prepare(name, seed, device, accumulate)
        self.target.prepare(f"{name}.target", seed, device, accumulate)
        return self

    def _rows(self, step: int) -> Tensor:
        # `examples` counts both domains; the order runs over the source alone.
        both, self.examples = self.examples, self.first_target
        try:
            return super()._rows(step)
        finally:
            self.examples = both

    def _finish(self, batch: Batch, step: int, number: int, padding: bool) -> Batch:
        # The transform sees the joined batch.
        if padding:
            batch["sample_weight"] = torch.zeros(len(batch["input"]), device=self.device)
        return batch

    def iterate(self, step: int) -> Iterator[list[Batch]]:
        """Give the micro-batches of every optimiser step from `step` on, without end."""
        for sources, targets in zip(super().iterate(step), self.target.iterate(step), strict=False):
            yield [
                super(DomainPairs, self)._finish(self._joined(s, t), step, number, False)
                for number, (s, t) in enumerate(zip(sources, targets, strict=True))
            ]
            step += 1

    def _joined(self, source: Batch, target: Batch) -> Batch:
        here, there = len(source["input"]), len(target["input"])
        unknown = torch.full((there,), UNKNOWN, device=self.device)
        positions = target["index"] if self.rows is None else self.rows.train.to(self.device)[target["index"]]
        batch: Batch = {
            "input": torch.cat([source["input"], target["input"]]),
            "target": torch.cat([source["target"], unknown]),
            "domain": torch.cat([source.get("domain", torch.zeros_like(source["target"])), unknown]),
            "index": torch.cat([source["index"], self.first_target + positions]),
        }
        weights = [batch_.get("sample_weight") for batch_ in (source, target)]
        if any(w is not None for w in weights):
            batch["sample_weight"] = torch.cat(
                [
                    torch.ones(n, device=self.device) if w is None else w
                    for w, n in zip(weights, (here, there), strict=True)
                ]
            )
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return which rows are held out."""
        return {} if self.rows is None else {"guide": self.rows.guide}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that a resumed run holds out the same rows.

        Raises:
            CheckpointError: it does not, so that it would train on what has guided it.
        """
        before = state.get("guide")
        now = None if self.rows is None else self.rows.guide
        same = before is None if now is None else before is not None and torch.equal(before.cpu(), now)
        if not same:
            raise CheckpointError(
                "The saved run held out other rows of the target, and this one would train on them. Use the same held_out and seed."
            )


def _source(data: Any) -> dict[str, Tensor]:
    if isinstance(data, tuple | list) and len(data) == 2:
        data = {"input": data[0], "target": data[1]}
    if not isinstance(data, Mapping) or not {"input", "target"} <= set(data):
        raise InputError("The source domain is (input, target) or a mapping with 'input' and 'target'.")
    kept: dict[str, Tensor] = {k: data[k] for k in ("input", "target", "domain") if k in data}
    if kept["target"].dtype != torch.int64 or bool((kept["target"] < 0).any()):
        raise InputError("The source's target are class indices int64, >= 0: the source is the labelled domain.")
    if "domain" in kept and bool((kept["domain"] < 0).any()):
        raise InputError("The source's domain numbers are >= 0: a negative one marks the unlabelled target.")
    return kept


def _inputs(data: Any) -> dict[str, Tensor]:
    found = data.get("input") if isinstance(data, Mapping) else data
    if not isinstance(found, Tensor) or not len(found):
        raise InputError("The target domain is an input tensor or a mapping with 'input', and it must not be empty.")
    return {"input": found}


def _split(examples: int, held_out: float | HeldOut | None, seed: int) -> HeldOut | None:
    if held_out is None:
        return None
    if not isinstance(held_out, HeldOut):
        return hold_out(examples, held_out, seed)
    last = int(torch.cat([held_out.train, held_out.guide]).max())
    if last >= examples or int(torch.cat([held_out.train, held_out.guide]).min()) < 0:
        raise InputError(f"The held-out split names row {last}, and the target has rows 0 to {examples - 1}.")
    return held_out


def _warn_of_copies(train: Tensor, guide: Tensor) -> None:
    """Warn where a held-out row is an exact copy of a training row."""
    both = torch.cat([train, guide]).flatten(1)
    _, number = torch.unique(both, dim=0, return_inverse=True)
    copies = int(torch.isin(number[len(train) :], number[: len(train)]).sum())
    if copies:
        warnings.warn(
            f"{copies} of the {len(guide)} held-out rows are exact copies of training rows, so the guide has seen them. Remove copies "
            "from the target first.",
            PoiseWarning,
            stacklevel=4,
        )
