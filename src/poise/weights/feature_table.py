"""One gradient for each term on activations that terms share, so that any number of terms costs one backward pass of the trunk.

    z = trunk(x);  L_i = L_i(z)        G_ij = <dL_i/dz, dL_j/dz>,     update  (dz/dtheta)' sum_i w_i dL_i/dz

Every term goes back as far as the activation only (its head); the trunk, where the time goes, is passed once, with the combination.
Balancing `dL_i/dz` instead of `dL_i/dtheta` bounds the latter from above: a direction that lowers every term in the features exists
wherever one in the parameters does, and is Pareto stationary there where the trunk's Jacobian has full rank.

    table = FeatureTable(("a", "b"), parameters)
    with features_of(model, "trunk") as seen:                # any submodule by name
        out = model(x)
    table.add([loss_a(out), loss_b(out)], seen)               # once for each micro-batch
    update = table.combine(MGDA().weigh(table.gram, table.values))

Rows of different examples are different coordinates, so Gram matrices add over micro-batches and processes.

Source: arXiv:1810.04650, section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from poise import processes
from poise.errors import InputError, StateError
from poise.weights.gradient_table import Gradient, GradientTable, products, reached, weighted_sum


class FeatureTable(GradientTable):
    """Per-row gradients on shared features, gathered micro-batch by micro-batch; `combine` goes through the trunk once.

    Args:
        labels: names of the rows.
        parameters: what is trained, by name.

    What lies above the features and is reached by one row alone keeps weight 1; what several rows reach there is weighed with them.
    """

    def __init__(self, labels: Sequence[str], parameters: Mapping[str, Tensor]) -> None:
        self.labels, self.parameters = tuple(labels), dict(parameters)
        self.shared = ("features",)
        self._names = {id(p): name for name, p in self.parameters.items()}
        self._own: list[dict[str, Tensor]] = [{} for _ in self.labels]
        self._parts: list[_Part] = []
        self._sums = torch.zeros(len(self.labels), dtype=torch.float64)
        self._gram = torch.zeros(len(self.labels), len(self.labels), dtype=torch.float64)
        self._reaching = torch.zeros(len(self.labels), dtype=torch.float64)
        self._pulled = False

    def add(self, losses: Sequence[Tensor | None], features: Sequence[Tensor], rest: Tensor | None = None) -> None:
        """Take the gradients of one micro-batch: one backward pass each, from the loss to the features.

        Args:
            losses: one for each row, 0-dim, or None where the term did not act; over micro-batches they add up.
            features: the shared activations of the same graph, not detached.
            rest: what is minimised besides and not weighed; it adds its whole gradient to `combine`, in the same pass.

        Raises:
            InputError: features without a graph, features behind one another, or a loss that reaches a parameter of the trunk on a
                way around the features.
        """
        if "gram" in self.__dict__:
            raise StateError(
                "A table whose Gram matrix has been read takes no further micro-batch: add them all first."
            )
        points = [f for f in features if f.requires_grad]
        if not points or len({id(f.grad_fn) for f in points}) < len(points) or any(f.grad_fn is None for f in points):
            raise InputError(
                "Balancing on features needs activations that trained parameters produce, each once. "
                "Name a submodule that has trained parameters in or below it, and do not detach its output."
            )
        ends = [f.grad_fn for f in points]
        below = self._leaves([edge for end in ends for edge in end.next_functions], stop=ends, inside=True)  # type: ignore[union-attr]
        present = [loss if loss is not None and loss.requires_grad else None for loss in losses]
        above = [() if loss is None else self._leaves([(loss.grad_fn, 0)], stop=ends) for loss in present]
        for label, names in zip(self.labels, above, strict=True):
            if around := sorted(set(names) & set(below)):
                raise InputError(
                    f"{label} reaches {', '.join(around[:3])} of the trunk on a way around the features, so its gradient on them is not "
                    "all of it. Give it a fixed weight, choose features below, or balance on parameters."
                )
        self._take(present, points, above, keep=rest is not None)
        acting = [i for i, loss in enumerate(losses) if loss is not None]
        if acting:
            self._sums[acting] += torch.stack([loss.detach() for loss in losses if loss is not None]).double().cpu()
        self._parts[-1].rest, self._parts[-1].below = rest, below

    def _take(
        self, losses: Sequence[Tensor | None], points: list[Tensor], above: Sequence[Sequence[str]], keep: bool
    ) -> None:
        last = max((i for i, loss in enumerate(losses) if loss is not None), default=-1)
        rows: list[list[Tensor]] = []
        for i, (loss, names) in enumerate(zip(losses, above, strict=True)):
            if loss is None:
                rows.append([torch.zeros_like(f) for f in points])
                continue
            # Each loss is asked for its own parameters alone: asking for everybody's costs the engine more than the head does.
            own = [self.parameters[name] for name in names]
            # Only what lies above the features is passed, and freed after the last; the trunk's graph stays for `combine`.
            found = torch.autograd.grad(loss, [*points, *own], retain_graph=keep or i < last, allow_unused=True)
            rows.append(
                [torch.zeros_like(f) if g is None else g for f, g in zip(points, found[: len(points)], strict=True)]
            )
            self._reaching[i] += any(g is not None for g in found[: len(points)])
            for name, g in zip(names, found[len(points) :], strict=True):
                if g is not None:
                    before = self._own[i].get(name)
                    self._own[i][name] = g if before is None else before + g
        columns = [[row[k] for row in rows] for k in range(len(points))]
        for column in columns:
            self._gram += products(column).double().cpu()
        self._parts.append(_Part(points, columns))

    def _leaves(self, edges: Sequence[Any], stop: Sequence[Any], inside: bool = False) -> tuple[str, ...]:
        """Return the names of the parameters that a graph reaches without passing `stop`; with `inside`, meeting it is an error."""
        found, seen, waiting = [], set(stop), [node for node, _ in edges if node is not None]
        while waiting:
            node = waiting.pop()
            if node in seen:
                if inside and node in stop:
                    raise InputError("One of the features lies behind another one. Name one of the two submodules.")
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) in self._names:
                found.append(self._names[id(leaf)])
            waiting.extend(after for after, _ in node.next_functions if after is not None)
        return tuple(dict.fromkeys(found))

    @property
    def rows(self) -> tuple[Gradient, ...]:  # type: ignore[override]
        """The gradients of this process on features, by micro-batch, and on parameters above them."""
        found: list[dict[str, Tensor]] = [dict(own) for own in self._own]
        for number, part in enumerate(self._parts):
            for place, column in enumerate(part.columns):
                for row, g in zip(found, column, strict=True):
                    row[f"features.{number}.{place}"] = g
        return tuple(found)

    @cached_property
    def values(self) -> Tensor:  # type: ignore[override]
        """The values of the rows over micro-batches and processes, f64 [m]."""
        return self._across(self._sums)

    @cached_property
    def gram(self) -> Tensor:
        """Inner products on the features over micro-batches and processes, f64 [m, m].

        Raises:
            InputError: a row reaches no features anywhere.
        """
        reaching = self._across(self._reaching).tolist()
        nowhere = [label for label, times in zip(self.labels, reaching, strict=True) if not times]
        if nowhere:
            raise InputError(
                f"{', '.join(nowhere)} does not depend on the features, so there is nothing to balance. Give it a fixed weight, or name a "
                "submodule that its gradient passes."
            )
        return self._across(self._gram)

    def against(self, vector: Gradient) -> Tensor:
        """Refuse: a vector of parameters has no product with gradients on features."""
        raise InputError(
            "A table on features has no inner products with vectors of parameters: balance on parameters for a policy that is guided."
        )

    def combine(self, weights: Tensor) -> dict[str, Tensor]:
        """Return the gradient by parameter name of `sum_i weights_i L_i + rest`, heads with weight 1: one pass through the trunk.

        Args:
            weights: [m].

        Raises:
            StateError: called twice; the graph of the trunk is gone.
        """
        if self._pulled:
            raise StateError(
                "The features have been pulled back already; the trunk's graph is freed by the first combine."
            )
        self._pulled = True
        numbers = weights.tolist()
        common = frozenset(name for name, times in reached(self._own).items() if times > 1)
        total = weighted_sum(self._own, numbers, common)
        for part in self._parts:
            for name, g in self._pull(part, numbers).items():
                total[name] = total[name] + g if name in total else g
        return self._meet(total)

    def _pull(self, part: _Part, weights: Sequence[float]) -> dict[str, Tensor]:
        roots, seeds = list(part.points), [_combination(column, weights) for column in part.columns]
        names: tuple[str, ...] = tuple(part.below)
        if part.rest is not None and part.rest.requires_grad:
            roots.append(part.rest)
            seeds.append(torch.ones_like(part.rest))
            names = tuple(dict.fromkeys([*names, *self._leaves([(part.rest.grad_fn, 0)], stop=())]))
        found = torch.autograd.grad(roots, [self.parameters[name] for name in names], seeds, allow_unused=True)
        return {name: g for name, g in zip(names, found, strict=True) if g is not None}

    def _across(self, local: Tensor) -> Tensor:
        if processes.size() == 1:
            return local
        device = next(iter(self.parameters.values())).device
        return processes.sum_across(local.to(device)).cpu()

    def _meet(self, total: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum gradients over processes; one that is absent on some processes only is 0 there."""
        if processes.size() == 1:
            return total
        here = torch.tensor([float(name in total) for name in self.parameters], dtype=torch.float64)
        names = [name for name, times in zip(self.parameters, self._across(here).tolist(), strict=True) if times]
        filled = [total[n] if n in total else torch.zeros_like(self.parameters[n]) for n in names]
        return dict(zip(names, processes.sum_gradients(filled), strict=True))


class _Part:
    """One micro-batch: its features, their gradients by feature and row, and what its trunk and its rest are."""

    def __init__(self, points: list[Tensor], columns: list[list[Tensor]]) -> None:
        self.points, self.columns = points, columns
        self.rest: Tensor | None = None
        self.below: Sequence[str] = ()


def _combination(column: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = column[0] * weights[0]
    for g, weight in zip(column[1:], weights[1:], strict=True):
        total.add_(g, alpha=weight)
    return total


@contextmanager
def features_of(model: nn.Module, name: str) -> Iterator[list[Tensor]]:
    """Collect what a submodule returns while the context is open: the features that terms share.

    Args:
        model: the trained module.
        name: of the submodule, as `model.named_modules()` has it.

    Raises:
        InputError: there is no such submodule.
    """
    there = dict(model.named_modules())
    if name not in there or not name:
        close = ", ".join([n for n in there if n][:8])
        raise InputError(f"The model has no submodule {name!r} to take features from; it has {close}.")
    seen: list[Tensor] = []
    handle = there[name].register_forward_hook(lambda module, inputs, output: seen.extend(_tensors(output)))
    try:
        yield seen
    finally:
        handle.remove()


def _tensors(output: Any) -> list[Tensor]:
    """Return the tensors with a graph in a module's output: itself, or what a tuple or a mapping holds."""
    if isinstance(output, Tensor):
        return [output] if output.requires_grad else []
    held = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return [t for t in held if isinstance(t, Tensor) and t.requires_grad]
