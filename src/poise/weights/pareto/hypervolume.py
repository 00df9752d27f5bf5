"""Rewards weighed by progress: an improvement of the Pareto front makes the next step larger (dynamic reward weighting, rule A).

With a preference w over the objectives fixed, the whole reward is scaled by how much the last validation extended the front:

    gain       = volume(archive + v) - volume(archive)          v: validation after the step; reference: the initial model
    multiplier = base + scale * tanh(gain / temperature)        in [0.5, 2] as published; 1 in the first step
    archive   <- archive + v                                    if gain > 0

and the multiplier scales the rewards of the NEXT step. Three ways to use it:

    guidance = HypervolumeGuidance("accuracy, -length, format", normalise=[(0, 1), (0, 12), (0, 1)])
    poise.fit(model, "auto*grpo(reward=...)", ..., policy=guidance)          # before a term: after its advantages
    poise.fit(model, "rloo(reward=auto('a')*... + auto('b')*...)", ..., policy=guidance)      # on the reward itself, or
    OnPolicy(prompts, generate, guidance.scoring(score))                     # the same where answers are scored, with
    poise.fit(..., evaluate=guidance.watching(evaluate), callbacks=[guidance])
    guidance.update(vector); guidance.multiplier                             # in a loop of one's own
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from poise.errors import InputError, NonFiniteError, PoiseWarning
from poise.pareto_fronts import hypervolume, hypervolume_improvement, nondominated

if TYPE_CHECKING:
    from poise.objective import Objective
    from poise.problem import Signals

__all__ = ["HypervolumeGuidance", "ParetoArchive"]

Vector = Any
"""Numbers `[m]`: a tensor, an array, a sequence, or a mapping by name where names were given."""
REFERENCES = ("initial", "worst")


class ParetoArchive(nn.Module):
    """Vectors of objectives that extend the volume dominated above a reference.

    Args:
        directions: names, as a list in which a minus sign marks what is to be minimised ("accuracy, -length"), a mapping from
            name to "max" or "min", or 1 and -1 without names; None takes every objective for one to be maximised.
        reference: a vector in the objectives' own units; "initial": the first vector that is added, which is the paper's
            rule; "worst": the worst of each objective so far, so that nothing is ever below it.
        normalise: (low, high) of each objective, fixed beforehand; volumes are then in units of the product of the ranges.
        prune: drop points that a new one dominates; without it the archive only grows, and volumes are the same.

    Attributes:
        points: float64 [k, m] in the objectives' own units, in order of arrival.
        volume: what they dominate.

    Raises:
        InputError: directions, ranges or a vector that do not fit.
        NonFiniteError: a vector with NaN or infinity; nothing is changed by it.

    >>> archive = ParetoArchive("accuracy, -length", reference=[0.0, 10.0])
    >>> archive.add([0.5, 6.0]), archive.add([0.4, 7.0]), archive.add([0.25, 2.0])
    (2.0, 0.0, 1.0)
    """

    def __init__(
        self,
        directions: str | Sequence[str | int] | Mapping[str, str | int] | None = None,
        reference: Literal["initial", "worst"] | Vector = "initial",
        normalise: Sequence[tuple[float, float]] | None = None,
        prune: bool = True,
    ) -> None:
        super().__init__()
        self.names, self.signs = _directions(directions)
        if isinstance(reference, str) and reference not in REFERENCES:
            raise InputError(
                f"pareto archive: reference is a vector or one of {', '.join(REFERENCES)}; it is {reference!r}."
            )
        self.rule = reference if isinstance(reference, str) else "fixed"
        self.widths = _widths(normalise, self.signs)
        self.prune = prune
        self.reference: Tensor | None = None
        self.points = torch.zeros(0, 0, dtype=torch.float64)
        if not isinstance(reference, str):
            self.reference = self._vector(reference)

    # ---- questions ----------------------------------------------------------------------------------------------------

    @property
    def volume(self) -> float:
        """The volume that the points dominate above the reference."""
        if self.reference is None or not len(self.points):
            return 0.0
        return hypervolume(self._oriented(self.points), self._oriented(self.reference))

    @property
    def informative(self) -> bool:
        """Whether any point dominates the reference in every objective: below that the volume says nothing."""
        return bool(len(self.points)) and self.volume > 0

    def gain(self, vector: Vector) -> float:
        """Return what a vector would add to the volume, without adding it."""
        return self._gain(self._vector(vector))[0]

    def __len__(self) -> int:
        return len(self.points)

    def extra_repr(self) -> str:
        """Say what is there, and whether it means anything."""
        if self.reference is None:
            return "no vector yet"
        status = (
            f"volume {self.volume:.4g}" if self.informative else "no point dominates the reference in every objective"
        )
        return f"{len(self)} points, {status}"

    # ---- adding -------------------------------------------------------------------------------------------------------

    def add(self, vector: Vector) -> float:
        """Take a vector in where it extends the volume, and return by how much; the first one may become the reference.

        Args:
            vector: [m], or by name.
        """
        point = self._vector(vector)
        gain, reference = self._gain(point)
        self.reference = reference
        if gain > 0:
            points = torch.cat([self.points.reshape(-1, len(point)), point[None]])
            self.points = points[nondominated(self._oriented(points))] if self.prune else points
        return gain

    def _gain(self, point: Tensor) -> tuple[float, Tensor]:
        """Return the gain of a point, and the reference that it is measured against."""
        if self.reference is None:
            return 0.0, point
        reference = self.reference
        if self.rule == "worst":
            sign = self._sign(len(point))
            reference = sign * torch.minimum(sign * reference, sign * point)
        others = self._oriented(self.points.reshape(-1, len(point)))
        return hypervolume_improvement(self._oriented(point), others, self._oriented(reference)), reference

    def _sign(self, m: int) -> Tensor:
        return (
            torch.ones(m, dtype=torch.float64) if self.signs is None else torch.tensor(self.signs, dtype=torch.float64)
        )

    def _oriented(self, values: Tensor) -> Tensor:
        """Return objectives that are all to be maximised, in units of their ranges."""
        sign = self._sign(values.shape[-1])
        return values * sign if self.widths is None else values * sign / torch.tensor(self.widths, dtype=torch.float64)

    def _vector(self, vector: Vector) -> Tensor:
        if isinstance(vector, Mapping):
            vector = self._by_name(vector)
        found = torch.as_tensor(vector, dtype=torch.float64).detach().cpu()
        wanted = self._size()
        if found.ndim != 1 or (wanted is not None and len(found) != wanted):
            raise InputError(
                f"pareto archive: expected a vector of {wanted if wanted is not None else 'm'} objectives, and got "
                f"{list(found.shape)}."
            )
        if not bool(torch.isfinite(found).all()):
            raise NonFiniteError(
                f"pareto archive: the vector of objectives is {found.tolist()}, and it must be finite."
            )
        return found

    def _size(self) -> int | None:
        if self.signs is not None:
            return len(self.signs)
        if self.widths is not None:
            return len(self.widths)
        return None if self.reference is None else len(self.reference)

    def _by_name(self, vector: Mapping[str, Any]) -> list[float]:
        names = self.names or tuple(vector)
        missing = [name for name in names if name not in vector]
        if missing:
            raise InputError(
                f"pareto archive: the objectives {', '.join(missing)} are not among the metrics, which are {', '.join(vector)}."
            )
        return [float(vector[name]) for name in names]

    # ---- state --------------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """Return points and reference."""
        return {"points": self.points.clone(), "reference": None if self.reference is None else self.reference.clone()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.points, self.reference = state["points"].clone(), state["reference"]


class HypervolumeGuidance(nn.Module):
    """A multiplier on rewards that follows the growth of the Pareto front: base + scale * tanh(gain / temperature).

    Args:
        directions: the validation metrics that make the vector, see `ParetoArchive`; None takes all of them, each to be
            maximised.
        preference: weights by the name of the weight they belong to, >= 0 and of sum 1, which the multiplier scales; None
            leaves a weight at the multiplier alone (the preference is then written in the formula).
        reference, normalise, prune: see `ParetoArchive`.
        base, scale, temperature: base in (0, 1], scale >= 0 and temperature > 0. Published with 0.5, 1.5 and 1 on raw units,
            where a validation length of order 1000 makes the multiplier 0.5 or 2 and nothing between: give `normalise`.
        apply_to: "reward": the reward itself, as published; "advantage": after the advantage is normalised, which is a factor
            on the learning rate against everything else in the objective.

    Advantages that are divided by their deviation (`grpo`, whitening) cancel any factor on the reward: with
    `apply_to="reward"` the rule then does nothing, and a warning says so. `rloo`, `reinforce` and
    `grpo(scale_rewards="none")` feel it. After the front has stopped growing the multiplier rests at `base`, so the rule is
    half the learning rate from there on: compare it with fixed weights at its mean multiplier, `mean`.

    Attributes:
        multiplier: of the next step, 1 before the first validation has been compared.
        mean: of the multipliers so far.

    Raises:
        InputError: an argument out of range, a preference off the simplex, or metrics that lack an objective.
        NonFiniteError: a validation metric that is NaN or infinite.

    >>> guidance = HypervolumeGuidance("accuracy, brevity")
    >>> guidance.update([0.0, 0.0]), round(guidance.update([0.5, 1.0]), 4), guidance.update([0.4, 0.9])
    (1.0, 1.1932, 0.5)

    Source: arXiv:2509.11452, algorithm 1; yining610/dynamic-reward-weighting.
    """

    formula: ClassVar[str] = "hypervolume"
    needs: ClassVar[frozenset[str]] = frozenset({"metrics"})
    within_rewards: ClassVar[bool] = True

    def __init__(
        self,
        directions: str | Sequence[str | int] | Mapping[str, str | int] | None = None,
        preference: Mapping[str, float] | None = None,
        reference: Literal["initial", "worst"] | Vector = "initial",
        base: float = 0.5,
        scale: float = 1.5,
        temperature: float = 1.0,
        normalise: Sequence[tuple[float, float]] | None = None,
        apply_to: Literal["reward", "advantage"] = "reward",
        prune: bool = True,
    ) -> None:
        super().__init__()
        if not 0 < base <= 1 or not 0 <= scale < math.inf or not 0 < temperature < math.inf:
            raise InputError(
                "hypervolume: base must lie in (0, 1], scale be at least 0 and temperature positive; they are "
                f"{base}, {scale} and {temperature}."
            )
        if apply_to not in ("reward", "advantage"):
            raise InputError(f"hypervolume: apply_to is 'reward' or 'advantage', and it is {apply_to!r}.")
        self.base, self.scale, self.temperature, self.apply_to = base, scale, temperature, apply_to
        self.preference = None if preference is None else check_simplex("hypervolume", preference)
        self.archive = ParetoArchive(directions, reference, normalise, prune)
        self.register_buffer("state", torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64))
        self._told = False
        self._next: tuple[ParetoArchive, Tensor] | None = None

    state: Tensor
    """The multiplier, the last gain, the sum of the multipliers compared so far, and how many."""

    @property
    def multiplier(self) -> float:
        """What scales the rewards of the next step."""
        return float(self.state[0])

    @property
    def last_gain(self) -> float:
        """What the last validation added to the volume."""
        return float(self.state[1])

    @property
    def mean(self) -> float:
        """The mean of the multipliers so far: the factor at which fixed weights are a fair comparison."""
        return float(self.state[2] / self.state[3]) if self.state[3] else 1.0

    def update(self, vector: Vector) -> float:
        """Take the validation vector at the END of a step, and return the multiplier of the next one.

        Args:
            vector: [m], or metrics by name. The first becomes the reference, where that is "initial".
        """
        self._next = self._moved(vector)
        self._take()
        return self.multiplier

    def _moved(self, vector: Vector) -> tuple[ParetoArchive, Tensor]:
        """Return archive and state with one validation more."""
        archive = copy.deepcopy(self.archive)
        gain = archive.add(vector)
        first = self.archive.reference is None
        multiplier = 1.0 if first else self.base + self.scale * math.tanh(gain / self.temperature)
        _, _, total, count = self.state.tolist()
        moved = [multiplier, gain, total, count] if first else [multiplier, gain, total + multiplier, count + 1]
        return archive, torch.tensor(moved, dtype=torch.float64, device=self.state.device)

    def _take(self) -> None:
        if self._next is not None:
            self.archive, self.state = self._next
            self._next = None

    # ---- as a policy --------------------------------------------------------------------------------------------------

    def weights(self, signals: Signals) -> Mapping[str, float | Tensor]:
        """Return the preference times the multiplier of the validation before this step, if there has been one; else the last one."""
        self.check(signals.problem.objective)
        if signals.metrics:
            self._next = self._moved(signals.metrics)
        multiplier = self.multiplier if self._next is None else float(self._next[1][0])
        if self.preference is None:
            return dict.fromkeys(signals.names, multiplier)
        missing = [name for name in signals.names if name not in self.preference]
        if missing:
            raise InputError(
                f"hypervolume: the preference has no weight for {', '.join(missing)}; it names {', '.join(self.preference)}."
            )
        return {name: self.preference[name] * multiplier for name in signals.names}

    def advance(self, signals: Signals) -> None:
        """Keep what was compared before the step that has been made."""
        self._take()

    def report(self) -> Mapping[str, float]:
        """Return what drove the weights."""
        return {"multiplier": self.multiplier, "gain": self.last_gain, "hypervolume": self.archive.volume}

    # ---- in the reward itself -------------------------------------------------------------------------------------------

    def scoring(self, score: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Return a score for `OnPolicy` whose rewards carry the multiplier of the moment; "advantage" leaves them alone.

        Args:
            score: `score(batch)`, rewards [rows] or columns by name; every float column is a reward.
        """

        def scaled(batch: Any) -> Any:
            found, factor = score(batch), self.multiplier if self.apply_to == "reward" else 1.0
            if isinstance(found, Tensor):
                return found * factor
            return {name: column * factor if column.is_floating_point() else column for name, column in found.items()}

        return scaled

    def watching(
        self, evaluate: Callable[[nn.Module], Mapping[str, float]]
    ) -> Callable[[nn.Module], Mapping[str, float]]:
        """Return an `evaluate` for `fit` whose metrics move the multiplier; it adds `multiplier` to them."""

        def watched(model: nn.Module) -> Mapping[str, float]:
            metrics = evaluate(model)
            return {**metrics, "multiplier": self.update(metrics)}

        return watched

    def on_begin(self, state: Any) -> None:
        """As a callback: look whether the objective feels the rule at all."""
        self.check(state.objective)

    def check(self, objective: Objective) -> None:
        """Warn, once, where advantages that are divided by their deviation cancel the rule."""
        if self._told or self.apply_to != "reward":
            return
        self._told = True
        deaf = [label for label, term in objective.terms.items() if getattr(term, "scale_free_reward", False)]
        if deaf:
            warnings.warn(
                f"hypervolume: {', '.join(deaf)} divides advantages by their deviation, so a factor on the reward changes nothing. "
                "Use apply_to='advantage', or a term that feels the scale: rloo, reinforce, grpo(scale_rewards='none').",
                PoiseWarning,
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:
        # What waits for `advance` is never copied or pickled.
        return {**self.__dict__, "_next": None}

    def _apply(self, fn: Any, recurse: bool = True) -> HypervolumeGuidance:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.state = self.state.double()
        return self


# ---- arguments ----------------------------------------------------------------------------------------------------------


def check_simplex(formula: str, weights: Mapping[str, float]) -> dict[str, float]:
    """Return weights that are a point of the simplex, or say why they are not."""
    found = {name: float(w) for name, w in weights.items()}
    if not found or not all(math.isfinite(w) and w >= 0 for w in found.values()):
        raise InputError(f"{formula}: weights must be at least 0 and finite; they are {found}.")
    total = sum(found.values())
    if total == 0:
        raise InputError(f"{formula}: all weights are 0, so nothing would be learnt: give at least one.")
    if abs(total - 1) > 1e-6:
        raise InputError(
            f"{formula}: weights must add up to 1 (within 1e-6), and they add up to {total:g}: divide by it."
        )
    return found


def _directions(given: Any) -> tuple[tuple[str, ...] | None, tuple[float, ...] | None]:
    """Return names, where there are any, and signs."""
    if given is None:
        return None, None
    if isinstance(given, Mapping):
        items = list(given.items())
    else:
        listed = [part.strip() for part in given.split(",")] if isinstance(given, str) else list(given)
        items = [(x.lstrip("-+"), -1 if x.startswith("-") else 1) if isinstance(x, str) else (None, x) for x in listed]
    known = {"max": 1.0, "min": -1.0, 1: 1.0, -1: -1.0}
    for name, way in items:
        if way not in known or name == "":
            raise InputError(
                "pareto archive: directions are names, a minus sign before what is to be minimised ('accuracy, -length'), or "
                f"'max' and 'min' by name; got {given!r}."
            )
    names = tuple(name for name, _ in items if name is not None)
    if not items or len(set(names)) < len(names):
        raise InputError(f"pareto archive: every objective needs a name of its own, and directions are {given!r}.")
    return names or None, tuple(known[way] for _, way in items)


def _widths(ranges: Any, signs: tuple[float, ...] | None) -> tuple[float, ...] | None:
    if ranges is None:
        return None
    pairs = [(float(low), float(high)) for low, high in ranges]
    if not all(math.isfinite(low) and math.isfinite(high) and low < high for low, high in pairs):
        raise InputError(
            f"pareto archive: normalise has (low, high) of each objective, low < high; it is {list(ranges)}."
        )
    if signs is not None and len(pairs) != len(signs):
        raise InputError(
            f"pareto archive: {len(signs)} objectives need as many ranges, and normalise has {len(pairs)}."
        )
    return tuple(high - low for low, high in pairs)
