"""What all balancers share: a rule from the Gram matrix of the terms' gradients to weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn

from poise.errors import InputError, NonFiniteError

if TYPE_CHECKING:
    from poise.problem import Signals


class Balancer(nn.Module):
    """A rule that weighs gradients on shared parameters; a term's own parameters keep weight 1.

    A subclass writes `weigh`. Its state, where it has any, stands in buffers.

    Class attributes:
        formula: the name of the method in `auto(policy="pareto", method=...)`.
        total: what the weights sum to where no term conflicts with another: "1", "m" (as the plain sum) or "free".
        needs: what it must be told.
        balances: its weights are for shared parameters alone.
    """

    formula: ClassVar[str] = ""
    total: ClassVar[str] = "free"
    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})
    balances: ClassVar[bool] = True

    _said: Mapping[str, float] = MappingProxyType({})
    features: str | None = None
    """The submodule on whose output gradients are weighed; None weighs them on parameters."""

    def on(self, features: str) -> Self:
        """Weigh gradients on the output of a submodule: one backward pass of what lies below it, for any number of terms."""
        self.features = features
        return self

    def weigh(self, gram: Tensor, values: Tensor) -> Tensor:
        """Return the weights of the rows, f64 [m].

        Args:
            gram: `<g_i, g_j>`, f64 [m, m].
            values: the terms' values, f64 [m].
        """
        raise NotImplementedError(f"{type(self).__name__} must say how it weighs.")

    def weights(self, signals: Signals) -> Mapping[str, float | Tensor]:
        """Return the weights of this step by name.

        Raises:
            InputError: one weight alone, or a gradient that is not finite: it says whose.
        """
        table = signals.gradients
        check_gram(table.gram, table.labels)
        found = self.weigh(table.gram, table.values)
        self._said = gradient_curves(table.gram, table.labels)
        return dict(zip(table.labels, found.tolist(), strict=True))

    def report(self) -> Mapping[str, float]:
        """The norm of every gradient and the cosine of every pair, in the last step."""
        return self._said

    def advance(self, signals: Signals) -> None:
        """Move the rule's own state after the update; most have none."""


def gradient_curves(gram: Tensor, labels: Sequence[str]) -> dict[str, float]:
    """Return what a run's curves tell of gradients: `gradient_norm/<label>`, and `cosine/<a>,<b>` of pairs that do not vanish.

    >>> gradient_curves(torch.eye(2), ("a", "b"))
    {'gradient_norm/a': 1.0, 'gradient_norm/b': 1.0, 'cosine/a,b': 0.0}
    """
    norms = gram.diagonal().clamp_min(0).sqrt().tolist()
    found = {f"gradient_norm/{label}": norm for label, norm in zip(labels, norms, strict=True)}
    for i, j in combinations(range(len(labels)), 2):
        if norms[i] > 0 and norms[j] > 0:
            found[f"cosine/{labels[i]},{labels[j]}"] = float(gram[i, j]) / (norms[i] * norms[j])
    return found


def check_gram(gram: Tensor, labels: tuple[str, ...]) -> None:
    """Refuse what no rule can weigh.

    Raises:
        InputError: fewer than two rows.
        NonFiniteError: a row that is not finite.
    """
    if len(labels) < 2:
        raise InputError(
            f"A balancer needs two terms at least, and it has {', '.join(labels) or 'none'}: write "
            "auto(policy='pareto') before every term that is weighed, or hand the policy to poise.fit to weigh them all."
        )
    bad = [label for label, row in zip(labels, torch.isfinite(gram.diagonal()).tolist(), strict=True) if not row]
    if bad:
        raise NonFiniteError(f"The gradient of {', '.join(bad)} is not finite, so it cannot be weighed.")
