"""Projected gradient descent on several tensors at once: the inner solver of checks, accurate and without second derivatives.

    x <- x + t (P(x - s g) - x),    s = <dx, dx> / <dx, dg>   (Barzilai and Borwein),   t by a nonmonotone line search

`P` projects every tensor onto its own closed convex set. Source: Birgin, Martinez and Raydan (2000), spectral projected gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from poise.errors import InputError
from poise.operators import ConvexSet
from poise.weights.bilevel.levels import Tensors, dot, norm, shifted

Sets = tuple[ConvexSet | None, ...]


class Minimum(NamedTuple):
    """Where a minimisation ended: the point, its value, `||x - P(x - g)||` there, and the steps made."""

    point: Tensors
    value: Tensor
    residual: float
    steps: int


def sets_of(given: ConvexSet | Sequence[ConvexSet | None] | None, tensors: Sequence[Tensor], name: str) -> Sets:
    """Return one set (or None) for every tensor; a single set serves all.

    Raises:
        InputError: something that is no set with a projection, or another number of them than tensors.
    """
    found: Sets = tuple(given) if isinstance(given, Sequence) else tuple(given for _ in tensors)
    if len(found) != len(tensors):
        raise InputError(f"{name}: {len(tensors)} tensors need {len(tensors)} sets, and there are {len(found)}.")
    for each in found:
        if each is not None and not hasattr(each, "project"):
            raise InputError(
                f"{name}: a set needs a projection, and {each!r} has none. Give Box, Ball, Simplex or NonNegative of "
                "poise.operators, or an object of your own with project(point)."
            )
    return found


def project(sets: Sets, tensors: Sequence[Tensor]) -> Tensors:
    """Return every tensor projected onto its set; where the set is None it stays."""
    return tuple(t if s is None else s.project(t) for s, t in zip(sets, tensors, strict=True))


def spectral_projected_gradient(
    value_and_gradient: Callable[[Tensors], tuple[Tensor, Tensors]],
    start: Tensors,
    sets: Sets | None = None,
    tol: float = 1e-10,
    max_steps: int = 5000,
    memory: int = 10,
) -> Minimum:
    """Minimise a smooth function over closed convex sets to a projected gradient of norm `tol`.

    Args:
        value_and_gradient: detached value (0-dim) and gradient at a point.
        start: where to begin.
        sets: one for every tensor; None for no constraint.
        tol: on `||x - P(x - g)||`.
        max_steps: gradient evaluations are a little more.
        memory: values that the line search looks back on.
    """
    sets = tuple(None for _ in start) if sets is None else sets
    point = project(sets, start)
    value, gradient = value_and_gradient(point)
    recent, step = [value], 1.0
    for done in range(max_steps):
        residual = float(norm(shifted(project(sets, shifted(point, -1.0, gradient)), -1.0, point)))
        if residual <= tol:
            return Minimum(point, value, residual, done)
        direction = shifted(project(sets, shifted(point, -step, gradient)), -1.0, point)
        slope = dot(gradient, direction)
        bound = torch.stack(recent[-memory:]).max()
        # A decrease below the rounding of the value cannot be seen, and is no reason to stop.
        slack = 16 * torch.finfo(value.dtype).eps * bound.abs()
        share = 1.0
        while True:
            new = shifted(point, share, direction)
            new_value, new_gradient = value_and_gradient(new)
            if bool(new_value <= bound + 1e-4 * share * slope + slack) or share < 1e-12:
                break
            share /= 2
        moved, turned = shifted(new, -1.0, point), shifted(new_gradient, -1.0, gradient)
        curvature = float(dot(moved, turned))
        step = min(max(float(dot(moved, moved)) / curvature, 1e-10), 1e10) if curvature > 0 else min(2 * step, 1e4)
        point, value, gradient = new, new_value, new_gradient
        recent.append(value)
    residual = float(norm(shifted(project(sets, shifted(point, -1.0, gradient)), -1.0, point)))
    return Minimum(point, value, residual, max_steps)
