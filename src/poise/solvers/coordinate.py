"""Block coordinate descent: which block moves, how far, and what is known at the end.

    F(x) = f(x) + sum_i h_i(x_i)        x_b <- x_b + d_b

    result = BlockCoordinate(select="gsl", update="hessian", block_size=5).minimize(LinearModel(a, y), L1(), x0)
    result.x, result.certificate.status, result.active_sets, result.identified

Greedy rules (`gs`, `gsl`, `gsd`, `gsq`, `gs_q`) look at the whole gradient, which moves with every block instead of being computed anew.
`partition=None` lets a block be any `block_size` coordinates; `select="forest"` lets it be as many nodes of a graph as hold no cycle. Rules
stand in `coordinate_rules`, updates in `coordinate_updates`, fixed blocks in `coordinate_partitions`.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise.composite import Composite, Solution
from poise.errors import IncompatibleError, InputError, NonFiniteError, PoiseWarning, StateError, nearest
from poise.problem import Certificate
from poise.solvers.coordinate_losses import CoordinateSmooth, State
from poise.solvers.coordinate_partitions import Partition, part
from poise.solvers.coordinate_penalty import charge_of, group_labels
from poise.solvers.coordinate_rules import GREEDY, RULES, Scene
from poise.solvers.coordinate_updates import UPDATES
from poise.solvers.linear_model import LinearModel

__all__ = ["BlockCoordinate", "CoordinateResult", "Counters"]

CHECK = 5
"""Blocks of a greedy rule after which a certificate is computed."""
REFRESH = 10
"""Passes over all coordinates after which incremental sums are computed anew."""


@dataclass(frozen=True)
class Counters:
    """What a run cost.

    Attributes:
        iterations: blocks moved.
        flops: of gradients, moves and solves, about two a multiplication.
        gradient_entries: entries of the gradient computed or changed.
        evaluations: values of line searches.
        seconds: wall time.
    """

    iterations: int
    flops: int
    gradient_entries: int
    evaluations: int
    seconds: float


@dataclass(frozen=True)
class CoordinateResult:
    """Where block coordinate descent ended.

    Attributes:
        x: [size].
        certificate: the residual is the norm of the least subgradient.
        history: F before the first block and after each.
        active_sets: number of entries that are not 0, likewise.
        identified: the iteration after which the support no longer changed: it is that of `x` from there on.
        counters: what it cost.
    """

    x: Tensor
    certificate: Certificate
    history: tuple[float, ...]
    active_sets: tuple[int, ...]
    identified: int
    counters: Counters


@dataclass
class _Run:
    """One run's moving parts."""

    state: State
    scene: Scene
    value: float
    history: list[float]
    sizes: list[int]
    identified: int = 0


class BlockCoordinate:
    """Minimise a smooth function plus a sum over coordinates, a block at a time.

    Args:
        select: which block: "random", "cyclic", "perm", "lipschitz", "gs" (also "gs_s"), "gsl", "gsd", "gsq", "gsq_iht", "gsq_niht",
            "gs_r", "gs_q", "forest"; see `coordinate_rules`.
        update: how far: "lipschitz", "diagonal", "backtracking", "hessian", "exact", "newton", "projected_newton", "two_metric"; see
            `coordinate_updates`.
        block_size: coordinates of a block; 5 where it is None, and with select="forest" as many as fit.
        partition: None for variable blocks, or fixed ones: "order", "sort", "avg", "sort_rows", "avg_rows", "red_black", "forest", "groups"
            (those of a group lasso), or a list of index tensors.
        diagonal: D of "gsd" and "diagonal": "rows" (`sum_j |H_ij|`) or "lipschitz" (`block_size L_i`).
        iterations: blocks moved at most.
        tol: norm of the least subgradient that is asked for; of a `Composite`, its relative tolerance.
        seed: of random rules.

    Raises:
        InputError: an argument is unknown or out of range.
        IncompatibleError: rule, update, penalty and function do not go together.

    >>> a = torch.eye(3, dtype=torch.float64)
    >>> BlockCoordinate(block_size=3).minimize(LinearModel(a, torch.tensor([1.0, 2.0, 3.0])), BoundedElasticNet(l1=1.5)).x
    tensor([0.0000, 0.5000, 1.5000], dtype=torch.float64)

    Source: Nutini, Laradji and Schmidt, arXiv:1712.08859.
    """

    name = "block_coordinate"

    def __init__(
        self,
        select: str = "gsl",
        update: str = "hessian",
        block_size: int | None = None,
        partition: str | Sequence[Tensor] | None = None,
        diagonal: str = "rows",
        iterations: int = 10_000,
        tol: float = 1e-8,
        seed: int = 0,
    ) -> None:
        for name, value, known in (("select", select, RULES), ("update", update, UPDATES)):
            if value not in known:
                raise InputError(
                    f"BlockCoordinate: there is no {name} {value!r}."
                    + (nearest(str(value), known) or f" There are: {', '.join(sorted(known))}.")
                )
        if diagonal not in ("rows", "lipschitz"):
            raise InputError(f"BlockCoordinate: diagonal is 'rows' or 'lipschitz', and it is {diagonal!r}.")
        if block_size is not None and (
            isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1
        ):
            raise InputError(f"BlockCoordinate: block_size counts coordinates, from 1, and it is {block_size!r}.")
        if iterations < 0 or not tol >= 0:
            raise InputError(
                f"BlockCoordinate: iterations and tol must not be negative, but they are {iterations} and {tol}."
            )
        if select == "forest" and partition is not None:
            raise IncompatibleError(
                "BlockCoordinate: select='forest' chooses its own blocks; leave partition out, or use partition='forest'."
            )
        self.select, self.update, self.block_size, self.partition = select, update, block_size, partition
        self.diagonal, self.iterations, self.tol, self.seed = diagonal, iterations, tol, seed
        self._last: dict[str, Any] = {}
        self._resume: dict[str, Any] | None = None

    # ---- entry points ------------------------------------------------------------------------------------------------

    def minimize(self, smooth: Any, penalty: Any = None, x0: Tensor | None = None) -> Any:
        """Minimise `f + h` from `x0` (0 where it is None), or a `Composite` problem.

        Args:
            smooth: f: a `LinearModel`, a `QuadraticGraph`, or another `CoordinateSmooth`; or a `Composite`, which brings its penalty.
            penalty: h: None, a `Penalty`, a `Scaled` one or a convex set; a sum over coordinates, or a group lasso over fixed blocks.
            x0: float [size].

        Returns:
            A `CoordinateResult`; for a `Composite`, a `Solution` whose `extras["result"]` is one.

        Raises:
            InputError: the block is larger than the function, or shapes do not fit.
            IncompatibleError: rule, update, penalty and function do not go together.
            StateError: what moves update has drifted from what it should be: data were changed under way.
            NonFiniteError: the objective is not finite at the start.
        """
        if isinstance(smooth, Composite):
            return self._minimize_composite(smooth)
        return self._descend(smooth, penalty, x0)

    def _minimize_composite(self, problem: Composite) -> Solution:
        started = time.perf_counter()
        model = LinearModel.of(problem)
        shape = (problem.outputs or 1, model.inputs)

        def read(x: Tensor) -> tuple[Tensor, Tensor]:
            w = x.view(shape)
            w, b = (w[:, :-1], w[:, -1]) if problem.intercept else (w, w.new_zeros(shape[0]))
            return (w, b) if problem.outputs is not None else (w[0], b[0])

        def settled(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Return weights, the best intercept beside them, and predictions."""
            w, b = read(x)
            best = problem.settle(z - b, b)
            return w, best, z - b + best

        def enough(state: Any) -> bool:
            return problem.residual(*settled(state.x, state.z)) <= problem.tolerance(self.tol)

        result = self._descend(model, problem.penalty, None, enough)
        z = model.design.predict(result.x if problem.outputs is None else result.x.view(shape))
        w, b = (part.clone() for part in settled(result.x, z)[:2])
        certificate = problem.certify(
            w, b, self.tol, result.certificate.iterations, result.history, result.certificate.status
        )
        reason = f"{self.select} blocks, {self.update} steps"
        return Solution(w, b, certificate, self.name, reason, time.perf_counter() - started, {"result": result})

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def _descend(
        self, smooth: CoordinateSmooth, penalty: Any, x0: Tensor | None, enough: Callable[[State], bool] | None = None
    ) -> CoordinateResult:
        """Move blocks until the residual is met, or `enough(state)` says yes; after every pass where a check costs more than a block."""
        started = time.perf_counter()
        run = self._start(smooth, penalty, x0)
        scene, state = run.scene, run.state
        every = max(1, math.ceil(smooth.size / scene.block_size))
        # a greedy rule has the gradient at hand, so it can afford to look more often
        checked = min(every, CHECK) if self.select in GREEDY else every
        greedy, choose, move = self.select in GREEDY, RULES[self.select], UPDATES[self.update]
        first, status = scene.turn, ""

        def residual() -> float:
            return float(scene.charge.distance(state.x, state.gradient).norm())

        while True:
            whole = scene.turn % checked == 0
            if enough is not None:
                if whole and enough(state):
                    break
            elif (greedy or whole) and residual() <= self.tol:
                break
            if scene.turn - first >= self.iterations:
                status = f"stopped after {self.iterations} blocks"
                break
            block = choose(scene, state)
            d = move(scene, state, block) if len(block) else state.x[block]
            if greedy and not bool((d != 0).any()):
                status = "no block of the rule makes progress"
                break
            self._apply(run, block, d)
            if scene.turn % (REFRESH * every) == 0:
                self._refresh(run)
        # before sums are computed anew, so that a run that goes on from here is the uninterrupted run to the bit
        self._last = self._snapshot(run)
        self._refresh(run)
        return self._result(run, residual(), status, first, time.perf_counter() - started, warn=enough is None)

    def _apply(self, run: _Run, block: Tensor, d: Tensor) -> None:
        state, scene = run.state, run.scene
        x, free, exact = state.x[block], scene.charge.free, scene.charge.exact
        landed = x + d
        if exact is not None and not free:
            # x + (bound - x) may miss the bound by rounding
            landed = torch.minimum(torch.maximum(landed, exact.lower[block]), exact.upper[block])
            d = landed - x
        if scene.smooth.quadratic:
            run.value += state.change(block, d) + (0.0 if free else scene.charge.change(x, landed, block))
            state.move(block, d)
        else:
            state.move(block, d)
            run.value = state.value() + (0.0 if free else scene.charge.value(state.x))
        state.x[block] = landed
        scene.turn += 1
        before, after = x != 0, landed != 0
        if bool((before != after).any()):
            run.identified = scene.turn
        run.history.append(run.value)
        run.sizes.append(run.sizes[-1] + int(after.sum()) - int(before.sum()))

    def _refresh(self, run: _Run) -> None:
        """Compute gradient and value anew; a gradient that has drifted far was computed from other data."""
        drift = run.state.refresh()
        limit = 1e-6 if run.state.x.dtype == torch.float64 else 1e-3
        if not drift <= limit:
            raise StateError(
                f"BlockCoordinate: the residual had drifted by {drift:.2g} of its size, and {limit:g} is the most "
                "that rounding explains. The data "
                "were changed while it ran; start again."
            )
        run.value = run.state.value() + run.scene.charge.value(run.state.x)

    def _start(self, smooth: CoordinateSmooth, penalty: Any, x0: Tensor | None) -> _Run:
        size = self.block_size or 5
        if self.block_size is not None and size > smooth.size:
            raise InputError(f"BlockCoordinate: block_size is {size}, and there are only {smooth.size} coordinates.")
        size = min(size, smooth.size)
        lipschitz = smooth.lipschitz
        if bool((lipschitz < 0).any()) or not bool(torch.isfinite(lipschitz).all()):
            worst = int(lipschitz.nan_to_num(-math.inf).argmin())
            raise InputError(
                "BlockCoordinate: Lipschitz constants must be finite and not negative, and that of coordinate "
                f"{worst} is {float(lipschitz[worst])}."
            )
        split = self._partition(smooth, penalty, size)
        _, outputs, intercept = _layout(smooth)
        charge = charge_of(penalty, lipschitz, None if split is None else split.owner, outputs, intercept)
        generator = torch.Generator().manual_seed(self.seed)
        scene = Scene(smooth, charge, size, split, generator, rows=self.diagonal == "rows")
        scene.forest_size = self.block_size if self.select == "forest" else 0
        self._check_pair(scene)
        x = torch.zeros_like(lipschitz) if x0 is None else x0.to(lipschitz)
        if x.shape != (smooth.size,):
            raise InputError(
                f"BlockCoordinate: x0 must have [{smooth.size}] entries, and its shape is {list(x.shape)}."
            )
        # Where f does not depend on a coordinate, h alone decides.
        x = torch.where(lipschitz > 0, x, charge.prox(x, 1e30)) if not charge.free and charge.exact is not None else x
        state = smooth.at(x)
        value = state.value() + charge.value(state.x)
        if self._resume is None and not math.isfinite(value):
            raise NonFiniteError(
                f"BlockCoordinate: the objective is {value} at the start: x0 must be finite and within the bounds."
            )
        run = _Run(state, scene, value, [value], [int((x != 0).sum())])
        if self._resume is not None:
            if x0 is not None:
                raise StateError("BlockCoordinate: a state was loaded, so the run goes on from there; leave x0 out.")
            self._restore(run)
        return run

    def _partition(self, smooth: CoordinateSmooth, penalty: Any, size: int) -> Partition | None:
        if self.partition is None:
            return None
        if self.partition != "groups":
            return part(self.partition, smooth, size)
        labels = group_labels(penalty, *_layout(smooth))
        if labels is None:
            raise IncompatibleError(
                "BlockCoordinate: partition='groups' takes the groups of a group lasso, and there is none."
            )
        return Partition([(labels == g).nonzero()[:, 0] for g in range(int(labels.max()) + 1)], smooth.size)

    def _check_pair(self, scene: Scene) -> None:
        if self.update == "exact" and not scene.smooth.quadratic:
            raise IncompatibleError("BlockCoordinate: update='exact' is for quadratics; use 'newton' (or 'hessian').")
        if self.select == "forest" and self.update in ("hessian", "newton", "exact") and not scene.charge.free:
            raise IncompatibleError(
                "BlockCoordinate: forests are solved exactly without a penalty; leave it out, or use update='diagonal'."
            )

    def _result(
        self, run: _Run, residual: float, status: str, first: int, seconds: float, warn: bool
    ) -> CoordinateResult:
        state, scene = run.state, run.scene
        met = residual <= self.tol
        if not met and warn:
            warnings.warn(
                f"BlockCoordinate: {status}; the least subgradient has norm {residual:.3g}, and {self.tol:.3g} was asked for.",
                PoiseWarning,
                stacklevel=4,
            )
        certificate = Certificate(
            value=run.value,
            residual=residual,
            tolerance=self.tol,
            measure="norm of the least subgradient",
            iterations=scene.turn - first,
            status="converged" if met or not status else status,
            feasible=None if scene.charge.exact is None or scene.charge.free else True,
            support=(state.x != 0).nonzero()[:, 0],
            history=tuple(run.history),
        )
        counters = Counters(
            scene.turn - first, 2 * (state.work + scene.solves), state.touched, scene.evaluations, seconds
        )
        return CoordinateResult(
            state.x.clone(), certificate, tuple(run.history), tuple(run.sizes), run.identified, counters
        )

    # ---- state -------------------------------------------------------------------------------------------------------

    def _snapshot(self, run: _Run) -> dict[str, Any]:
        scene = run.scene
        return {
            "state": run.state.state_dict(),
            "generator": scene.generator.get_state(),
            "turn": scene.turn,
            "permutation": scene.permutation,
            "estimates": scene.estimates,
            "value": run.value,
            "identified": run.identified,
            "partition": None if scene.partition is None else scene.partition.blocks,
            "forests": scene.partition is not None and scene.partition.forests,
        }

    def _restore(self, run: _Run) -> None:
        saved, scene = self._resume, run.scene
        assert saved is not None
        if saved["state"]["x"].shape != run.state.x.shape:
            raise StateError(
                f"BlockCoordinate: the loaded state has {len(saved['state']['x'])} coordinates, and the function has {len(run.state.x)}."
            )
        run.state.load_state_dict(saved["state"])
        scene.generator.set_state(saved["generator"])
        scene.turn, run.value, run.identified = saved["turn"], saved["value"], saved["identified"]
        scene.permutation, scene.estimates = (
            None if v is None else v.clone() for v in (saved["permutation"], saved["estimates"])
        )
        if saved["partition"] is not None:
            scene.partition = Partition(saved["partition"], len(run.state.x), saved["forests"])
        run.history, run.sizes = [run.value], [int((run.state.x != 0).sum())]
        self._resume = None

    def state_dict(self) -> dict[str, Any]:
        """Return what the next `minimize` needs to go on where the last one stopped: x, residual, random numbers, constants, partition."""
        return dict(self._last)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next `minimize` (without x0) go on from there."""
        self._resume = dict(state) or None

    def __repr__(self) -> str:
        shown = {n: getattr(self, n) for n in ("select", "update", "block_size", "tol")}
        return f"BlockCoordinate({', '.join(f'{n}={v!r}' for n, v in shown.items())})"


def _layout(smooth: Any) -> tuple[int, int, bool]:
    """Return inputs and outputs of a model whose weight is flattened, and whether the last input is an intercept."""
    return (
        getattr(smooth, "inputs", smooth.size),
        getattr(smooth, "outputs", None) or 1,
        getattr(smooth, "intercept", False),
    )
