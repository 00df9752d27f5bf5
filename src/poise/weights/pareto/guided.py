"""Weights that a guide sets: of the steps that hurt no objective, the one that helps held-out data most (ParetoDA).

    max_a  a' (G g_v)     subject to     a on the simplex,     <G'a, g_i> >= r_i

`G` holds one gradient a row, `g_v` is the gradient of a guide, such as a label-free objective on held-out data. The program
sees `G G'` and `G g_v` alone, a matrix and a vector of as many entries as there are objectives; so the guide can be followed
without being fitted: it only picks a point of a small simplex.

Without a guide and with the least norm in the place of the program it is MGDA; with a fixed ray in the guide's place, EPO; with the
guide's gradient and no constraint, the weight of a term is how well its gradient agrees with validation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from poise.errors import InputError, NonFiniteError
from poise.weights.pareto.balancer import Balancer
from poise.weights.pareto.simplex_program import Array, maximize_on_simplex

if TYPE_CHECKING:
    from poise.problem import Signals

__all__ = ["GuidedChoice", "GuidedPareto", "GuidedSummary"]

Branch = Literal["auto", "balance", "dominance"]
Normalize = Literal["none", "l2", "loss"]


@dataclass(frozen=True)
class GuidedChoice:
    """The preferences of one step and what they do to first order.

    Attributes:
        alpha: f64 [m], on the simplex, of the gradients as they were normalised.
        weights: f64 [m], of the gradients as they are: `m alpha_i s / s_i` with the sizes `s_i` that `normalize` divides by and
            their geometric mean `s`, and 1 more for what is `added`.
        branch: "balance", "dominance", or "fallback" where the program had no solution and every weight is 1.
        descent: f64 [m], `<d, g_i>` of the direction `d = sum_i weights_i g_i`: how fast each objective falls along `-d`.
        guide_descent: `<d, g_v>`, the same for the guide.
        conflicts: pairs of gradients with a negative cosine.
    """

    alpha: Tensor
    weights: Tensor
    branch: str
    descent: Tensor
    guide_descent: float
    conflicts: int


@dataclass(frozen=True)
class GuidedSummary:
    """What the weights did over a run.

    Attributes:
        names: the objectives, as `alpha` and `rising` list them.
        alpha: mean preference of each objective.
        log_share: mean of `log alpha`, of steps where it is not 0; very unequal values say that the scales differ.
        rising: share of steps in which an objective rose to first order, `<d, g_i> < 0`, for each objective.
        any_rising: share of steps in which some objective did.
        conflicts: mean number of pairs of gradients in conflict.
        fallbacks: steps without a solution. steps: all of them.
        branches: how often each branch was taken.
        warning: what looks wrong, or nothing.
    """

    names: tuple[str, ...]
    alpha: tuple[float, ...]
    log_share: tuple[float, ...]
    rising: tuple[float, ...]
    any_rising: float
    conflicts: float
    fallbacks: int
    steps: int
    branches: Mapping[str, int]
    warning: str


class GuidedPareto(Balancer):
    """Preferences over objectives, set at every step by a small linear program that a guide steers.

    Balance (the guide is not satisfied yet), with `J = {j: <g_j, g_v> > 0}` and its best members `J*`:

        max_a a'(G g_v)   s.t.   <d, g_i> >= 0              for i in J*, or for all i where J is empty
                                 nothing                    for the rest of J
                                 <d, g_i> >= <g_i, g_v>     for i not in J (a bounded loss: the right side is not positive)

    Dominance (it is):

        max_a sum_i <d, g_i>   s.t.   <d, g_i> >= 0 for all i,   <d, g_v> >= min(0, max_j <g_j, g_v>)

    with `d = G'a` and `a` on the simplex. The weights are `m a`, so that equal preferences are the plain sum. Where several
    preferences are equally good, the one with the shorter `d` is taken. Where none satisfies the constraints every weight is 1, and
    the step is counted in `summary().fallbacks`.

    Args:
        branch: "auto" takes dominance where the guide's value is at most `satisfied` above `guide_minimum`, else balance.
        satisfied: the guide is satisfied this close to its minimum.
        guide_minimum: least value that the guide can have: `-log K` for `mutual_information` of K classes, 0 for
            `target_classification(shifted=True)`. The authors' code compares `-MI`, which is never positive, with 0 the wrong way
            round, and so it always runs dominance; here a value below the minimum is an error under "auto".
        relaxed: drop the guide's constraint from dominance.
        normalize: "none"; "l2" divides each gradient by its norm, "loss" by its objective's absolute value, so that the units
            of an objective do not matter. The program is not free of scale: use "l2" where units differ.
        added: names of objectives whose gradient is added once more, whatever the preferences. The authors' code does so for
            the source and the alignment loss; the method as written adds none.
        upper: the guide: a term, an objective or a formula. A term with parameters of its own, such as `target_classification`, is
            given as the very object that is trained, so that both share them.
        valid_batch: held-out rows of a step; all of them where nothing is said.

    Needs `gradients` and `validation`: the guide is the validation objective on a held-out batch.

    Raises:
        InputError: an option out of range, one objective alone, no guide, or a guide below its minimum.
        NonFiniteError: a gradient or the guide is not finite; it says whose.

    >>> gram, guide = torch.tensor([[1.0, -0.5], [-0.5, 1.0]]), torch.tensor([1.0, 0.0])
    >>> GuidedPareto().choose(gram, guide, guide_value=1.0).alpha       # the second may lose nothing: <d, g_2> >= 0
    tensor([0.6667, 0.3333], dtype=torch.float64)

    Source: Lv et al., arXiv:2112.04137; BIT-DA/ParetoDA, tools/epo_lp_dna.py.
    """

    formula: ClassVar[str] = "guided"
    total: ClassVar[str] = "m"
    balances: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"gradients", "validation"})

    def __init__(
        self,
        branch: Branch = "auto",
        satisfied: float = 1e-3,
        guide_minimum: float = 0.0,
        relaxed: bool = False,
        normalize: Normalize = "none",
        added: Sequence[str] = (),
        upper: Any = None,
        valid_batch: int | None = None,
    ) -> None:
        super().__init__()
        if branch not in get_args(Branch):
            raise InputError(f"guided: branch is 'auto', 'balance' or 'dominance'; got {branch!r}.")
        if normalize not in get_args(Normalize):
            raise InputError(f"guided: normalize is 'none', 'l2' or 'loss'; got {normalize!r}.")
        if not satisfied >= 0:
            raise InputError(f"guided: satisfied is a distance from the guide's minimum, >= 0; got {satisfied}.")
        self.branch, self.satisfied, self.guide_minimum = branch, satisfied, guide_minimum
        if valid_batch is not None and valid_batch < 1:
            raise InputError(f"guided: valid_batch is a number of held-out rows, at least 1; got {valid_batch}.")
        self.relaxed, self.normalize, self.added = relaxed, normalize, tuple(added)
        # Not a submodule: the guide's own parameters, where it has any, belong to the objective that is trained.
        self.__dict__["upper"] = upper
        self.valid_batch = valid_batch
        self.names: tuple[str, ...] = ()
        self.log: list[GuidedChoice] = []
        self._waiting: GuidedChoice | None = None

    # ---- the rule ---------------------------------------------------------------------------------------------------

    def choose(
        self,
        gram: Tensor,
        guide_dot: Tensor,
        guide_value: float,
        values: Tensor | None = None,
        names: Sequence[str] | None = None,
    ) -> GuidedChoice:
        """Return the preferences of one step; it changes nothing.

        Args:
            gram: `<g_i, g_j>`, [m, m], m >= 2.
            guide_dot: `<g_i, g_v>`, [m].
            guide_value: value of the guide.
            values: of the objectives, [m]; needed for `normalize="loss"` only.
            names: of the objectives, for messages.
        """
        names = tuple(names or (f"objective {i + 1}" for i in range(len(gram))))
        c, a = gram.detach().double().cpu().numpy(), guide_dot.detach().double().cpu().numpy()
        check_program(c, a, guide_value, names)
        m = len(names)
        branch, size, mean = self._branch(guide_value), None, 1.0
        if self.normalize == "none":
            alpha = _preferences(branch, c, a, self.relaxed)
        else:
            size = self._sizes(c, values, names)
            mean = math.exp(float(np.log(size).mean()))
            alpha = _preferences(branch, c / np.outer(size, size), a / size, self.relaxed)
        if alpha is None:
            alpha, weights, branch = np.full(m, 1 / m), np.ones(m), "fallback"
        else:
            weights = m * alpha if size is None else m * alpha * mean / size
        if self.added:
            weights = weights + [name in self.added for name in names]
        return GuidedChoice(
            alpha=torch.from_numpy(alpha),
            weights=torch.from_numpy(weights),
            branch=branch,
            descent=torch.from_numpy(c @ weights),
            guide_descent=float(a @ weights),
            conflicts=_conflicts(c),
        )

    def _branch(self, guide_value: float) -> str:
        if self.branch != "auto":
            return self.branch
        distance = guide_value - self.guide_minimum
        if distance < -1e-6 * max(1.0, abs(self.guide_minimum)):
            raise InputError(
                f"guided: the guide is {guide_value:.4g}, below its least value guide_minimum={self.guide_minimum:.4g}, so nobody "
                "can say whether it is satisfied. Give guide_minimum (minus the logarithm of the number of classes for "
                "mutual information), or shift the guide, or name the branch."
            )
        return "dominance" if distance <= self.satisfied else "balance"

    def _sizes(self, gram: Array, values: Tensor | None, names: tuple[str, ...]) -> Array:
        """Return what each gradient is divided by."""
        if self.normalize == "l2":
            size = np.sqrt(np.maximum(np.diag(gram), 0.0))
        else:
            if values is None:
                raise InputError("guided: normalize='loss' needs the values of the objectives.")
            size = np.abs(values.detach().double().cpu().numpy())
        zero = size <= 0
        if zero.all():
            return np.ones(len(gram))
        # What is 0 has no scale of its own; it takes that of the others.
        size[zero] = math.exp(float(np.log(size[~zero]).mean()))
        found: Array = size
        return found

    # ---- as a policy ------------------------------------------------------------------------------------------------

    def weigh(self, gram: Tensor, values: Tensor) -> Tensor:
        """Refuse: the Gram matrix alone does not say where the guide points."""
        raise InputError(
            "guided: the weights follow a guide, so `choose` needs <g_i, g_v> and the guide's value as well."
        )

    def weights(self, signals: Signals) -> Mapping[str, float | Tensor]:
        """Return the weights of this step by name."""
        if signals.validation is None:
            raise InputError(
                "guided: the weights follow a guide on held-out data, and there is none. Give validation data and an objective for "
                "them, such as target_classification on a tenth of the unlabelled examples."
            )
        table = signals.gradients
        unknown = [name for name in self.added if name not in table.labels]
        if unknown:
            raise InputError(
                f"guided: added names {', '.join(unknown)}, and the objectives are {', '.join(table.labels)}."
            )
        guide = table.against(signals.validation.gradient())
        # The value comes with the gradient, so that the guide costs one forward pass.
        choice = self.choose(table.gram, guide, float(signals.validation.latest_value), table.values, table.labels)
        self.names, self._waiting = table.labels, choice
        return dict(zip(table.labels, choice.weights.tolist(), strict=True))

    def advance(self, signals: Signals) -> None:
        """Keep what was chosen for the step that has just been made."""
        if self._waiting is not None:
            self.log.append(self._waiting)
            self._waiting = None

    def report(self) -> Mapping[str, float]:
        """Return the last step's preferences, conflicts and descent of the guide, for the run's curves."""
        if not self.log:
            return {}
        last = self.log[-1]
        shares = {f"alpha/{name}": float(a) for name, a in zip(self.names, last.alpha, strict=True)}
        falls = {f"descent/{name}": float(a) for name, a in zip(self.names, last.descent, strict=True)}
        return {**shares, **falls, "descent/guide": last.guide_descent, "conflicts": float(last.conflicts)}

    def summary(self, last: int | None = None) -> GuidedSummary:
        """Return what the weights did, over all steps or the `last` ones.

        Raises:
            InputError: there was no step yet.
        """
        log = self.log if last is None else self.log[-last:]
        if not log:
            raise InputError("guided: no step was made yet, so there is nothing to summarise.")
        alpha, descent = torch.stack([c.alpha for c in log]), torch.stack([c.descent for c in log])
        # A descent of rounding size below 0 is an active constraint, not a rise.
        rising = descent < -1e-9 * descent.abs().amax(dim=1, keepdim=True)
        shares = [float(a[a > 0].log().mean()) if bool((a > 0).any()) else -math.inf for a in alpha.T]
        branches = {name: sum(c.branch == name for c in log) for name in ("balance", "dominance", "fallback")}
        return GuidedSummary(
            self.names, tuple(alpha.mean(0).tolist()), tuple(shares), tuple(rising.double().mean(0).tolist()),
            float(rising.any(1).double().mean()), sum(c.conflicts for c in log) / len(log), branches["fallback"], len(log),
            branches, self._warning(alpha),
        )  # fmt: skip

    def _warning(self, alpha: Tensor) -> str:
        share, place = alpha.mean(0).max(0)
        if len(alpha) < 20 or share < 0.95 or self.normalize != "none":
            return ""
        return (
            f"{self.names[int(place)]} has {share:.0%} of the preferences over {len(alpha)} steps: that says its gradient is of another "
            "scale, not that it is preferred. Look again with normalize='l2'."
        )

    # ---- state ------------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "names": list(self.names),
            "alpha": torch.stack([c.alpha for c in self.log]) if self.log else None,
            "weights": torch.stack([c.weights for c in self.log]) if self.log else None,
            "descent": torch.stack([c.descent for c in self.log]) if self.log else None,
            "branch": [c.branch for c in self.log],
            "guide_descent": [c.guide_descent for c in self.log],
            "conflicts": [c.conflicts for c in self.log],
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.names, self._waiting = tuple(state["names"]), None
        rows = [] if state["alpha"] is None else [state["alpha"], state["weights"], state["descent"]]
        self.log = [
            GuidedChoice(alpha.cpu(), weights.cpu(), branch, descent.cpu(), guide_descent, conflicts)
            for alpha, weights, descent, branch, guide_descent, conflicts in zip(
                *rows, state["branch"], state["guide_descent"], state["conflicts"], strict=True
            )
        ] if rows else []  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_waiting": None}  # what waits for `advance` is never saved or copied


def check_program(gram: Array, guide_dot: Array, guide_value: float, names: tuple[str, ...]) -> None:
    """Refuse what the program cannot take.

    Raises:
        InputError: one objective, or shapes that do not fit.
        NonFiniteError: something is not finite; it says what.
    """
    m = len(names)
    if len(gram) < 2:
        raise InputError(f"guided: preferences need two objectives at least, and there is {len(gram)}.")
    if gram.shape != (m, m) or guide_dot.shape != (m,):
        raise InputError(
            f"guided: gram is [m, m], guide_dot [m], with a name for each; got {list(gram.shape)}, {list(guide_dot.shape)} "
            f"and {m} names."
        )
    if not np.isfinite(gram).all():
        own = [name for name, ok in zip(names, np.isfinite(np.diag(gram)), strict=True) if not ok]
        raise NonFiniteError(
            f"guided: the gradient of {', '.join(own or names)} is not finite, so the step has no weights."
        )
    if not (np.isfinite(guide_dot).all() and math.isfinite(guide_value)):
        raise NonFiniteError("guided: the guide or its gradient is not finite, so the step has no weights.")


def _conflicts(gram: Array) -> int:
    """Return how many pairs of gradients have a cosine below 0, beyond rounding."""
    rows = gram.tolist()
    norms = [math.sqrt(max(row[i], 0.0)) for i, row in enumerate(rows)]
    return sum(rows[i][j] < -1e-12 * norms[i] * norms[j] for i in range(len(rows)) for j in range(i))


def least_descent(guide: Array) -> Array:
    """Return the least `<d, g_i>` that balance asks for, f64 [m]: 0, `<g_i, g_v>`, or minus infinity for nothing.

    >>> least_descent(np.array([2.0, 1.0, -3.0]))
    array([  0., -inf,  -3.])
    """
    helpful = guide > 0
    if not helpful.any():
        return np.zeros(len(guide))
    return np.where(guide == guide.max(), 0.0, np.where(helpful, -np.inf, guide))


def _preferences(branch: str, gram: Array, guide: Array, relaxed: bool) -> Array | None:
    return _balance(gram, guide) if branch == "balance" else _dominate(gram, guide, relaxed)


def _balance(gram: Array, guide: Array) -> Array | None:
    least = least_descent(guide)
    held = np.isfinite(least)
    return maximize_on_simplex(guide, gram[held], least[held], tie=gram)


def _dominate(gram: Array, guide: Array, relaxed: bool) -> Array | None:
    rows, least = gram, np.zeros(len(gram))
    if not relaxed:
        rows, least = np.vstack([gram, guide]), np.append(least, min(0.0, guide.max()))
    return maximize_on_simplex(gram.sum(axis=0), rows, least, tie=gram)
