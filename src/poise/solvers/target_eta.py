"""Steps in the space of the outputs: the rules for `eta`.

    constant       eta0                                       1/L is known: 1 squared, 4 logistic, 2 softmax
    stochastic     eta0 / sqrt(t)
    exponential    eta0 (1/T)^(t/T)
    armijo         the largest eta with l(z+) <= l(z) - c <G, z - z+>,  z+ = z - eta G
    adagrad_norm   eta0 / sqrt(sum over steps of the mean |G_i|^2)
    adagrad        eta0 / sqrt(sum over visits of G^2), for every output of every row
    adam           eta0 with momentum in place of G and a running mean of squares, for every output of every row

`t` is 1 in the first step. None of them depends on the model or its inputs, but for what `G` and `l` say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from poise.errors import InputError, nearest
from poise.solvers.target_divergence import Divergence, Eta
from poise.solvers.target_split import Linearisation, Split

__all__ = ["RULES", "TargetStep"]

RULES = ("constant", "stochastic", "exponential", "armijo", "adagrad_norm", "adagrad", "adam")


class TargetStep:
    """One rule with its state.

    Args:
        rule: out of `RULES`, a number (constant), or a function of `t`.
        eta0: the first step, above 0.
        total: `T` of the exponential rule.
        c, backtrack, growth, bounds: of the search: sufficient decrease, factor of a trial that failed, factor before the first trial, and
            the range of its answers.
        betas: of "adam".

    Raises:
        InputError: an argument is out of range.
    """

    def __init__(
        self,
        rule: float | str | Callable[[int], float] = "armijo",
        eta0: float = 1.0,
        total: int | None = None,
        c: float = 0.5,
        backtrack: float = 0.9,
        growth: float = 1.8,
        bounds: tuple[float, float] = (1e-4, 1e4),
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        if isinstance(rule, int | float):
            rule, eta0 = "constant", float(rule)
        if isinstance(rule, str) and rule not in RULES:
            raise InputError(
                f"target_surrogate: there is no rule {rule!r} for eta."
                + (nearest(rule, RULES) or f" There are: {', '.join(RULES)}; or a number, or a function of the step.")
            )
        if not (math.isfinite(eta0) and eta0 > 0):
            raise InputError(f"target_surrogate: eta must be finite and above 0, and it is {eta0}.")
        if rule == "exponential" and not total:
            raise InputError(
                "target_surrogate: eta='exponential' falls over the whole run: say its length, total_steps=..."
            )
        if not (0 < c < 1 and 0 < backtrack < 1 and growth >= 1):
            raise InputError(
                f"target_surrogate: a search needs 0 < c < 1, 0 < backtrack < 1 and growth >= 1; they are {c}, {backtrack} and {growth}."
            )
        if not 0 < bounds[0] <= bounds[1]:
            raise InputError(f"target_surrogate: bounds of eta must be positive and in order, and they are {bounds}.")
        self.rule, self.eta0, self.total = rule, float(eta0), total
        self.c, self.backtrack, self.growth, self.bounds, self.betas = c, backtrack, growth, bounds, betas
        self.eta = float(eta0)
        self.t = 0
        self.squares = 0.0
        self.trials = 0
        self._first: Tensor | None = None
        self._second: Tensor | None = None
        self._visits: Tensor | None = None

    def choose(
        self, at: Linearisation, divergence: Divergence, split: Split, index: list[Tensor] | None
    ) -> tuple[Eta, list[Tensor]]:
        """Return the step, and the linear term that it belongs to (`G` but for "adam").

        Args:
            index: of the rows in their data set, one tensor a micro-batch, or None where every step has the same rows.
        """
        self.t += 1
        self.trials = 0
        if self.rule == "armijo":
            self.eta = self._search(at, divergence, split)
        elif self.rule == "adagrad_norm":
            self.squares += float(sum(float(g.double().square().sum()) for g in at.g)) / at.rows
            self.eta = self.eta0 / math.sqrt(self.squares) if self.squares > 0 else self.eta0
        elif self.rule in ("adagrad", "adam"):
            return self._by_output(at.g, index)
        else:
            self.eta = self._scheduled()
        return self.eta, at.g

    def _scheduled(self) -> float:
        if not isinstance(self.rule, str):
            found = float(self.rule(self.t))
            if not (math.isfinite(found) and found > 0):
                raise InputError(
                    f"target_surrogate: the schedule of eta gave {found} in step {self.t}; it must be above 0."
                )
            return found
        if self.rule == "stochastic":
            return self.eta0 / math.sqrt(self.t)
        if self.rule == "exponential":
            assert self.total is not None
            return self.eta0 * math.exp(-math.log(self.total) * self.t / self.total)
        return self.eta0

    def _search(self, at: Linearisation, divergence: Divergence, split: Split) -> float:
        """Backtrack from `growth` times the step before, in the space of outputs: no parameter moves, the oracle is not asked."""
        start = split.target_value(at.z)
        noise = 8 * torch.finfo(at.z[0].dtype).eps * max(1.0, abs(start))
        low, high = self.bounds
        eta = min(self.growth * self.eta, high)
        for _ in range(200):
            moved = divergence.move(at.g, eta)
            promised = sum(float((g * (z - m)).sum()) for g, z, m in zip(at.g, at.z, moved, strict=True)) / at.rows
            self.trials += 1
            value = split.target_value(moved)
            if math.isfinite(value) and value <= start - self.c * promised + noise:
                break
            eta *= self.backtrack
            if eta <= low:
                break
        return min(max(eta, low), high)

    def _by_output(self, g: list[Tensor], index: list[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
        """Return a step for every output of every row, from sums that are kept for each row of the data set."""
        flat = torch.cat([part.reshape(len(part), -1) for part in g])
        rows = torch.arange(len(flat), device=flat.device) if index is None else torch.cat(index).to(flat.device)
        if index is None and self._second is not None and len(self._second) != len(flat):
            raise InputError(
                f"target_surrogate: eta={self.rule!r} keeps sums for every row, and this step has {len(flat)} rows where the last had "
                f"{len(self._second)}. Offer the rows' numbers as 'index', or use eta='adagrad_norm'."
            )
        self._grow(int(rows.max()) + 1, flat)
        assert self._first is not None
        assert self._second is not None
        assert self._visits is not None
        tiny = 1e-12
        if self.rule == "adagrad":
            self._second[rows] += flat.square()
            eta, linear = self.eta0 / (self._second[rows].sqrt() + tiny), flat
        else:
            first, second = self.betas
            self._visits[rows] += 1
            self._first[rows] = first * self._first[rows] + (1 - first) * flat
            self._second[rows] = second * self._second[rows] + (1 - second) * flat.square()
            seen = self._visits[rows][:, None].to(flat.dtype)
            linear = self._first[rows] / (1 - first**seen)
            eta = self.eta0 / ((self._second[rows] / (1 - second**seen)).sqrt() + 1e-7)
        sizes = [len(part) for part in g]
        # An output that has never had a gradient may move as far as eta0 says, no further.
        eta = torch.where(eta > self.bounds[1], self.bounds[1], eta)
        steps: tuple[Tensor, ...] = torch.split(eta, sizes)
        terms: tuple[Tensor, ...] = torch.split(linear, sizes)
        return (
            [e.reshape(part.shape) for e, part in zip(steps, g, strict=True)],
            [v.reshape(part.shape) for v, part in zip(terms, g, strict=True)],
        )

    def _grow(self, rows: int, like: Tensor) -> None:
        have = 0 if self._second is None else len(self._second)
        if rows <= have:
            return
        more = like.new_zeros(rows - have, like.shape[1])
        visits = torch.zeros(rows - have, dtype=torch.int64, device=like.device)
        self._first = more if self._first is None else torch.cat([self._first, more])
        self._second = more.clone() if self._second is None else torch.cat([self._second, more])
        self._visits = visits if self._visits is None else torch.cat([self._visits, visits])

    def state_dict(self) -> dict[str, Any]:
        """Return step, sums and what is kept for every row."""
        return {
            "eta": self.eta, "t": self.t, "squares": self.squares, "first": self._first, "second": self._second, "visits": self._visits,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.eta, self.t, self.squares = float(state["eta"]), int(state["t"]), float(state["squares"])
        copies = [None if state[k] is None else state[k].clone() for k in ("first", "second", "visits")]
        self._first, self._second, self._visits = copies
