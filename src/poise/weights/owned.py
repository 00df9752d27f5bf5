"""A weight that a policy owns: it stands in the formula where `auto` stood, and only the policy moves it.

The total of an objective is affine in its owned weights, `total = rest + sum_i w_i row_i`; a product of two of them says nothing about
either and is refused.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from torch import Tensor

from poise.coefficient import Clock, Coefficient, Number, leaves_of, text, value_of
from poise.errors import InputError


class OwnedWeight(Coefficient):
    """The present value of a weight that a policy moves: a number, or a tensor `[batch]`.

    Args:
        name: what the weight is called.
        current: its value now.

    It prints as its value, so that the formula of a finished run is that of its last step.
    """

    def __init__(self, name: str, current: float | Tensor = 1.0) -> None:
        self.name, self.current = name, current

    def value(self, clock: Clock) -> float | Tensor:
        return self.current

    def __str__(self) -> str:
        return text(float(self.current.mean()) if isinstance(self.current, Tensor) else self.current)


def without_owned(weight: Number | Coefficient, names: Container[str]) -> Number | Coefficient:
    """Return a weight with the owned ones of these names at 0: the part that stays where they move."""
    if not isinstance(weight, Coefficient):
        return weight
    owned = [leaf for leaf in leaves_of(weight) if isinstance(leaf, OwnedWeight) and leaf.name in names]
    return weight.replace(dict.fromkeys(owned, 0)) if owned else weight


def rows_of(
    weights: Mapping[str, Number | Coefficient], names: Iterable[str], clock: Clock
) -> dict[str, dict[str, float]]:
    """Return, for every owned weight, the terms that it multiplies and their factors.

        factor = d(weight of the term)/d(owned weight)

    Args:
        weights: of the objective's terms, by label.
        names: of the owned weights.

    Raises:
        InputError: a product of two owned weights, or an owned weight that multiplies nothing.
    """
    rows: dict[str, dict[str, float]] = {name: {} for name in names}
    for label, weight in weights.items():
        leaves = list(dict.fromkeys(leaf for leaf in leaves_of(weight) if isinstance(leaf, OwnedWeight)))
        for leaf in leaves:
            others: dict[Coefficient, Number | Coefficient] = {other: 0 for other in leaves if other is not leaf}
            factor = _slope(weight, leaf, others, clock)
            if any(abs(_slope(weight, leaf, {**others, o: 1}, clock) - factor) > 1e-12 for o in others) or (
                abs(_at(weight, {leaf: 2, **others}, clock) - _at(weight, {leaf: 1, **others}, clock) - factor)
                > 1e-9 * max(1.0, abs(factor))
            ):
                raise InputError(
                    f"The weight of {label!r} has a product of two 'auto' weights, and only the product could be found. Use one of them."
                )
            if leaf.name in rows:
                rows[leaf.name][label] = factor
    for name, row in rows.items():
        if not row:
            raise InputError(f"Nothing depends on the weight {name!r}: it multiplies no term.")
    return rows


def _slope(
    weight: Number | Coefficient, leaf: OwnedWeight, others: Mapping[Coefficient, Number | Coefficient], clock: Clock
) -> float:
    return _at(weight, {leaf: 1, **others}, clock) - _at(weight, {leaf: 0, **others}, clock)


def _at(weight: Number | Coefficient, table: Mapping[Coefficient, Number | Coefficient], clock: Clock) -> float:
    put = weight.replace(dict(table)) if isinstance(weight, Coefficient) else weight
    return float(value_of(put, clock))
