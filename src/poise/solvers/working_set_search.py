"""How a working set grows until the whole problem is certified.

Coordinates that are 0 at the solution need not be visited. What is visited is chosen by how near a block's correlation with the residual
is to where the block would leave 0, over the norm of its columns: the distance that a dual point could move before it is infeasible. The
set is minimised, all correlations are taken, and what violates its condition joins. Blocks whose correlation cannot have reached their
limit since it was last taken, by the distance that the residual has moved, are safe and not even looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from poise.solvers.working_set_loops import loops
from poise.solvers.working_set_parts import Columns, Loss, Structure

__all__ = ["Found", "Search"]

Array = Any
EPOCHS = 12
"""Epochs between two looks at the working set: two extrapolations of six iterates, and one epoch that sets to 0 what they nearly did."""
FIRST = 100
"""Blocks of a working set that begins with nothing."""
MOST_UNKNOWNS = 2000
"""Coordinates up to which a dense system is solved where epochs are slow."""
PATIENCE = 500
"""Looks at a working set without a tenth less residual, after which it is left."""


@dataclass
class Found:
    """What was found for one penalty.

    Attributes:
        w, b: f64 [p * outputs] and f64 [outputs].
        value, residual, tolerance: the objective, and what certifies it.
        working_sets, epochs: how many were made.
        largest: blocks of the last working set.
        status: "converged" or why not.
        history: objectives, one a working set.
    """

    w: Array
    b: Array
    value: float
    residual: float
    tolerance: float
    working_sets: int
    epochs: int
    largest: int
    status: str
    history: list[float] = field(default_factory=list)


class Search:
    """One problem without its penalty's strength: coefficients, predictions and residual live on from one penalty to the next.

    Args:
        columns, loss: the problem.
        structure: the first penalty; all have the same blocks.
        intercept: whether there is one; it is never penalised.
        tol: residual asked for, as a part of the objective at 0 (gap) or of the largest correlation there (subdifferential).
        working_sets, epochs: at most, for one penalty.
    """

    def __init__(
        self, columns: Columns, loss: Loss, structure: Structure, intercept: bool, tol: float, working_sets: int, epochs: int
    ) -> None:  # fmt: skip
        self.columns, self.loss, self.intercept = columns, loss, intercept
        self.tol, self.working_sets, self.epochs = tol, working_sets, epochs
        outputs = loss.outputs
        self.w, self.b = np.zeros(columns.p * outputs), np.zeros(outputs)
        self.bounds = structure.bounds(columns.norms)
        self._seen_u: Array | None = None  # where all correlations were last taken, and what they were
        self._seen_v = np.zeros(columns.p * outputs)
        self.refresh()
        self.base = loss.value(self.z)
        self.v = self._take_all()
        self.largest_reach = float(structure.reach(self.v).max(initial=0.0))
        self._before: tuple[float, Array, Array, Array] | None = None  # strength, w, b, v of the penalty before
        self._last: tuple[float, Array, Array, Array] | None = None

    # ---- state -------------------------------------------------------------------------------------------------------

    def start(self, w: Array, b: Array) -> None:
        """Begin from these coefficients."""
        self.w, self.b = np.array(w, float).ravel(), np.array(b, float).ravel()
        self.refresh()
        self.v = self._take_all()

    def refresh(self) -> None:
        """Take predictions afresh from the coefficients, set the intercept to its minimiser, and take the residual."""
        self.z = self.columns.predictions(self.w, self.loss.outputs)
        if self.intercept:
            self.z = (self.z.reshape(-1, self.loss.outputs) + self.b).ravel()
            self._settle()
        self.u, self.h = self.loss.pieces(self.z)
        self.inverse = 1.0 / float(self.h.sum()) if self.intercept else 0.0

    def _settle(self) -> None:
        """Set the intercept to its minimiser by damped Newton steps; exact at once where the loss is quadratic."""
        outputs, value = self.loss.outputs, None
        for _ in range(50):
            u, h = self.loss.pieces(self.z)
            total = u.reshape(-1, outputs).sum(axis=0)
            if np.abs(total).max() <= 1e-14 * np.abs(u).sum():
                break
            curvature = self.loss.intercept_curvature(self.z, h)
            # Softmax does not change with a number added to all intercepts: the least move is taken.
            move = total / curvature if np.ndim(curvature) == 0 else np.linalg.lstsq(curvature, total, rcond=1e-12)[0]
            if not self.loss.quadratic:
                value = self.loss.value(self.z) if value is None else value
                move, value = self._damped(move, value)
            self.b = self.b + move
            self.z = (self.z.reshape(-1, outputs) + move).ravel()

    def _damped(self, move: Array, value: float) -> tuple[Array, float]:
        move = move * min(1.0, 8.0 / max(float(np.abs(move).max()), 1e-300))
        for _ in range(30):
            new = self.loss.value((self.z.reshape(-1, self.loss.outputs) + move).ravel())
            if new <= value + 1e-15 * abs(value):
                return move, new
            move = move / 2
        return np.zeros_like(move), value

    def _take_all(self) -> Array:
        v = np.empty_like(self._seen_v)
        self.columns.products(self.u, np.zeros(self.columns.p, bool), v)
        self._seen_u, self._seen_v = self.u.copy(), v
        return v

    def correlations(self, structure: Structure) -> Array:
        """Return X' u, with what was seen before where a block is safe: it is 0 and cannot have reached its limit since."""
        radius = float(np.linalg.norm(self.u - self._seen_u))
        reach = structure.reach(self._seen_v) + self.bounds * (radius * (1 + 1e-9))
        skip = (reach < structure.limit * (1 - 1e-9)) & ~structure.active(self.w)
        if skip.mean() < 0.5:
            return self._take_all()
        v = self._seen_v.copy()
        self.columns.products(self.u, structure.spread(skip), v)
        return v

    # ---- certificate -------------------------------------------------------------------------------------------------

    def tolerance(self, structure: Structure) -> float:
        return self.tol * (self.base if structure.gap else self.largest_reach)

    def _residual(self, structure: Structure, w: Array, u: Array, v: Array, value: float) -> float:
        """Return the duality gap, or where there is none the largest distance from a subdifferential."""
        if not structure.gap:
            away = float(-structure.rooms(w, v).min(initial=0.0))
            if self.intercept:
                away = max(away, float(np.abs(u.reshape(-1, self.loss.outputs).sum(axis=0)).max()))
            return away
        c = structure.scale(v)
        return value - (self.loss.dual(c, u) - structure.conjugate(c, v))

    # ---- one penalty -------------------------------------------------------------------------------------------------

    def solve(self, structure: Structure, guess: Array | None = None) -> Found:
        """Minimise under one penalty, from where the coefficients stand.

        Args:
            structure: the penalty.
            guess: correlations as they may be at the solution; they choose the first working set.
        """
        tolerance, epochs = self.tolerance(structure), 0
        working, history, residual, value = np.zeros(0, np.int64), [], np.inf, np.inf
        status, best, stalled = "", np.inf, 0
        for turn in range(self.working_sets + 1):
            guessed = turn == 0 and guess is not None
            if not guessed:
                self.v = self.correlations(structure)
                value = self.loss.value(self.z) + structure.value(self.w)
                residual = self._residual(structure, self.w, self.u, self.v, value)
                history.append(value)
                if residual <= tolerance:
                    status = "converged"
                    break
                stalled = 0 if residual < 0.9 * best else stalled + 1
                best = min(best, residual)
                if stalled >= 5:
                    status = f"stopped where nothing improves any more in {self.columns.dtype}: the residual stays at {best:.3g}"
                    break
            if turn == self.working_sets or epochs >= self.epochs:
                break
            working = self._choose(structure, guess if guessed else self.v, working, guessed)
            sure = guessed or len(working) == structure.blocks or stalled
            target = 0.5 * tolerance if sure else max(0.5 * tolerance, 0.1 * residual)
            target *= 0.3**stalled
            epochs += self._descend(structure, working, target, self.epochs - epochs)
            self.refresh()
        status = status or f"stopped after {len(history)} working sets and {epochs} epochs"
        return Found(
            self.w.copy(), self.b.copy(), value, residual, tolerance, len(history), epochs, len(working), status, history
        )  # fmt: skip

    def _choose(self, structure: Structure, v: Array, working: Array, guessed: bool) -> Array:
        rooms, active = structure.rooms(self.w, v), structure.active(self.w)
        used = int(active.sum())
        kept = active.copy()
        kept[working] = True
        outside = int(((rooms < 0) & ~kept).sum())
        if guessed:
            near = int(((rooms < 0.05 * structure.limit) & ~active).sum())
            size = used + near + 10
        else:
            room = max(FIRST, len(working), used)
            size = int(kept.sum()) + min(2 * outside + 10, room)
        size = min(size, structure.blocks)
        if size == structure.blocks:
            return np.arange(structure.blocks)
        with np.errstate(divide="ignore", invalid="ignore"):
            order = np.where(self.bounds > 0, rooms / self.bounds, np.where(rooms < 0, rooms, np.inf))
        order[kept] = -np.inf
        return np.sort(np.argpartition(order, size - 1)[:size])

    def _descend(self, structure: Structure, working: Array, target: float, epochs: int) -> int:
        """Minimise over a working set until its own residual is at the target; return the epochs made."""
        local, places = structure.local(working)
        cols = structure.columns_of(working)
        if self.loss.quadratic:
            return self._quadratic(local, places, cols, target, epochs)
        return self._newton(local, places, cols, target, epochs)

    def _products(self, cols: Array, u: Array) -> Array:
        if self.loss.outputs == 1:
            out = np.empty(len(cols))
            loops().products(*self.columns.pack, cols, u, out)
            return out
        outputs = self.loss.outputs
        out = np.empty((len(cols), outputs))
        u = u.reshape(-1, outputs)
        for c in range(outputs):
            column = np.empty(len(cols))
            loops().products(*self.columns.pack, cols, np.ascontiguousarray(u[:, c]), column)
            out[:, c] = column
        return out.ravel()

    def _quadratic(self, local: Structure, places: Array, cols: Array, target: float, epochs: int) -> int:
        dtype, outputs = self.columns.dtype, self.loss.outputs
        w, u, shift = self.w[places].astype(dtype), self.u.astype(dtype, copy=True), np.zeros(outputs)
        run = local.runner(self.columns, cols, self.h, self.inverse)
        done, least, stalled, leapt = 0, np.inf, 0, 0
        while done < epochs:
            made, largest = run(w, u, shift, min(EPOCHS, epochs - done), self._inner(local, w, target))
            done += made
            residual = self._model_residual(local, cols, w, u, shift)
            if residual > target and self._due(w, done - leapt):
                leapt = done
                self._leap(local, cols, w, u, shift)
                residual = self._model_residual(local, cols, w, u, shift)
            stalled = 0 if residual < 0.9 * least else stalled + 1
            least = min(least, residual)
            if residual <= target or (largest == 0.0 and made < EPOCHS) or stalled > PATIENCE:
                break
        self.w[places] = w
        self.b = self.b + shift
        return done

    def _model_residual(self, local: Structure, cols: Array, w: Array, u: Array, shift: Array) -> float:
        true = u.astype(float) - np.multiply.outer(self.h, shift).ravel()
        value = self._model_value(local, w, u, shift)
        return self._residual(local, w.astype(float), true, self._products(cols, true), value)

    def _model_value(self, local: Structure, w: Array, u: Array, shift: Array) -> float:
        h = self.h.astype(self.columns.dtype, copy=False)
        return float(loops()._model(u, h, shift)) + local.value(w)

    # ---- where epochs are slow: one linear system over what is not 0 ---------------------------------------------------

    def _due(self, w: Array, epochs: int) -> bool:
        """Say whether the system would cost no more than the epochs since the last one: half as many as it has unknowns."""
        used = int(np.count_nonzero(w))
        return self.loss.outputs == 1 and 0 < used <= MOST_UNKNOWNS and epochs >= max(4 * EPOCHS, used / 2)

    def _direction(self, local: Structure, cols: Array, w: Array, u: Array) -> Array | None:
        """Return the step to the minimum of the model over the coordinates that are at no corner; u is the true residual."""
        smooth = local.smooth_part(w)
        if smooth is None or len(smooth[0]) == 0:
            return None
        used, slope, hessian = smooth
        some, k = cols[used], len(used)
        L, hs, gram = np.empty(k), np.empty(k), np.empty(k * k)
        loops().curvatures(*self.columns.pack, some, self.h, self.inverse, L, hs)
        ptr, where = np.array([0, k]), np.zeros(2, np.int64)
        loops().group_grams(
            *self.columns.pack, some, ptr, self.h, hs, self.inverse, 0.0, where, gram, np.empty(1)
        )  # fmt: skip
        step = np.zeros(len(w))
        matrix, right = gram.reshape(k, k) + hessian, self._products(some, u) - slope
        # Columns that are alike leave directions free, along which nothing should move.
        step[used] = np.linalg.lstsq(matrix, right, rcond=1e-13)[0]
        return step

    def _leap(self, local: Structure, cols: Array, w: Array, u: Array, shift: Array) -> None:
        """Move w, u and shift to the minimum over what is not 0, or part of the way; nothing moves where that does not help."""
        at = w.astype(float)
        step = self._direction(local, cols, at, u.astype(float) - self.h * shift[0])
        if step is None:
            return
        before = self._model_value(local, w, u, shift)
        for t in (1.0, 0.5, 0.25, 0.125):
            new = local.within(at, at + t * step).astype(w.dtype)
            dz = np.zeros(len(u))
            loops().add_columns(*self.columns.pack, cols, new.astype(float) - at, dz)
            moved = (u - self.h * dz).astype(u.dtype)
            b = np.array([float(moved.sum(dtype=float)) * self.inverse])
            if self._model_value(local, new, moved, b) < before:
                w[:], u[:], shift[:] = new, moved, b
                return

    def _inner(self, local: Structure, w: Array, target: float) -> float:
        """Return the step, in units of the gradient, below which epochs end before their number."""
        if not local.gap:
            return 0.3 * target
        limit = local.limit[local.limit > 0]
        size = local.value(w)
        return 0.3 * float(limit.min()) * target / size if len(limit) and 0 < size < np.inf else 0.0

    def _newton(self, local: Structure, places: Array, cols: Array, target: float, epochs: int) -> int:
        dtype, outputs, columns = self.columns.dtype, self.loss.outputs, self.columns
        w = self.w[places]
        value = self.loss.value(self.z) + local.value(w)
        done, leapt = 0, 0
        while done < epochs:
            v = self._products(cols, self.u)
            if self._residual(local, w, self.u, v, value) <= target:
                break
            away = float(-local.rooms(w, v).min(initial=0.0))
            run = local.runner(columns, cols, self.h, self.inverse)
            new, u, shift = w.astype(dtype), self.u.astype(dtype, copy=True), np.zeros(outputs)
            if self.intercept:
                shift[:] = u.reshape(-1, outputs).sum(axis=0) * self.inverse
            made, _ = run(new, u, shift, min(2 * EPOCHS, epochs - done), 0.1 * away)
            done += made
            dw = new.astype(float) - w
            dz = np.zeros(len(self.z))
            loops().add_columns(*columns.pack, cols, dw, dz)
            if self.intercept:
                dz.reshape(-1, outputs)[:] += shift
            found = self._along(local, w, dw, dz, shift, value)
            if found is None:
                break
            w, value = found
            if self._due(w, done - leapt):
                leapt = done
                w, value = self._newton_leap(local, cols, w, value)
        self.w[places] = w
        return done

    def _newton_leap(self, local: Structure, cols: Array, w: Array, value: float) -> tuple[Array, float]:
        step = self._direction(local, cols, w, self.u)
        if step is None:
            return w, value
        step = local.within(w, w + step) - w
        dz = np.zeros(len(self.z))
        loops().add_columns(*self.columns.pack, cols, step, dz)
        shift = np.array([-float(self.h @ dz) * self.inverse])
        return self._along(local, w, step, dz + shift, shift, value) or (w, value)

    def _along(
        self, local: Structure, w: Array, dw: Array, dz: Array, shift: Array, value: float
    ) -> tuple[Array, float] | None:
        """Take the longest of the steps 1, 1/2, 1/4, ... that decreases the objective enough; None where there is none."""
        slope = local.value(w + dw) - local.value(w) - float(self.u @ dz)
        noise = 1e-15 * abs(value)
        if slope >= 0 and slope > noise:
            return None
        t = 1.0
        for _ in range(20):
            z, at = self.z + t * dz, w + t * dw
            new = self.loss.value(z) + local.value(at)
            if new <= value + 1e-4 * t * min(slope, 0.0) + noise:
                self.z, self.b = z, self.b + t * shift
                if self.intercept:  # a dual point needs residuals that add up to 0
                    self._settle()
                    new = min(new, self.loss.value(self.z) + local.value(at))
                self.u, self.h = self.loss.pieces(self.z)
                self.inverse = 1.0 / float(self.h.sum()) if self.intercept else 0.0
                return at, new
            t /= 2
        return None

    # ---- a path ------------------------------------------------------------------------------------------------------

    def follow(self, structure: Structure, strength: float) -> Found:
        """Minimise under the next penalty of a path, whose strength is this: from where the last two solutions point."""
        guess = self._point_on(structure, strength) if self._last is not None else None
        found = self.solve(structure, guess)
        self._before, self._last = self._last, (strength, found.w, found.b, self.v)
        return found

    def _point_on(self, structure: Structure, strength: float) -> Array:
        """Move coefficients along the last two solutions where that is better, and return the correlations expected."""
        assert self._last is not None
        last, w, _, v = self._last
        if self._before is None or self._before[0] == last:
            # Nothing is known but that correlations rarely change faster than the strength does.
            return v * (1 + (last - strength) / max(last, 1e-300))
        before, w_before, _, v_before = self._before
        t = (strength - last) / (last - before)
        new = w + t * (w - w_before)
        new[(new * w < 0) | (w == 0)] = 0.0
        value = self.loss.value(self.z) + structure.value(self.w)
        kept = self.w, self.b, self.z, self.u, self.h, self.inverse
        self.w = new
        self.refresh()
        if not self.loss.value(self.z) + structure.value(self.w) < value:
            self.w, self.b, self.z, self.u, self.h, self.inverse = kept
        return v + t * (v - v_before)
