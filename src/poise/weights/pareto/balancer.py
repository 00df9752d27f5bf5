"""What all balancers share: a rule from the Gram matrix of the terms' gradients to weights."""

from __future__ import annotations

from collections.abc import Mapping
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
        return dict(zip(table.labels, found.tolist(), strict=True))

    def advance(self, signals: Signals) -> None:
        """Move the rule's own state after the update; most have none."""


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
