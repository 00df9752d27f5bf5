"""How much each source task says about a target task, and how many samples each should give.

    nu1 = argmin |nu|_1  s.t.  W nu = w                            p = 1, heads known
    nu2 = argmin |nu|_2  s.t.  W nu = w                            p = 2
    nu  = argmin 1/2 |W nu - w|^2 + lam |nu|_1                     p = 1, heads estimated
    n_t = clip(beta |nu_t|^q, floor, available),  sum n = budget

W (K, T) holds the heads of the sources and w (K,) that of the target over one representation. (p, q) = (1, 1) is L1-A-MTRL, the
best pair: the excess risk grows with sum nu^2/n, and |nu1|_1^2/N is the least that N samples reach. (2, 2) is the earlier
rule, q = 0 passive sampling.

    relevance = LassoRelevance(floor=25)
    relevance.fit(heads, target_head, noise=1.0, samples=400)
    counts = relevance.allocate(6000)
    print(relevance.report(counts))

Source: arXiv:2306.02556. Costs, rounding, the choice of lam and the reasons are this library's.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from poise.errors import InputError, PoiseWarning
from poise.weights.allocation import largest_remainder, optimal_counts, water_fill
from poise.weights.basis_pursuit import LassoPath, Pursuit, basis_pursuit, lasso, lasso_path
from poise.weights.relevance_report import RelevanceReport, relevance_report

__all__ = ["LassoRelevance"]

Array = NDArray[np.float64]


class LassoRelevance:
    """Relevance of sources for a target, and the samples that follow from it.

    Args:
        lam: weight of |nu|_1 (p = 1). "noise": `noise * sqrt(2 log(2T)/samples) * rms |w_t|`, the size at which chance alone
            correlates with a source; "discrepancy": the largest at which `|W nu - w|^2 <= noise^2 K/samples`; or a number. At 0
            (and where `fit` is told of no noise) nu1 exactly.
        floor: least samples of every task; with `opening`, of every task that is used.
        costs: of one sample of each task, positive (T,). Then a budget is a sum of money, `nu = argmin sum sqrt(c_t) |nu_t|` and
            `n_t ~ |nu_t| / sqrt(c_t)`.
        p: norm of the relevance, 1 or 2.
        q: power of it in the allocation, >= 0.
        opening: what it costs to use a task at all, not negative (T,). Then few tasks are used: the support is chosen that makes
            `(sum sqrt(c) |nu|)^2 / (budget - sum of openings)` small, and other tasks get nothing.
        top: keep the k tasks of largest |nu| and fit nu anew on them by least squares.

    Attributes, after `fit`:
        relevance: nu, float64 (T,).
        certificate: the dual and the reduced cost of every task (`Pursuit`); None for p = 2.
        residual: |W nu - w|.
        used_lam: lam as a number.

    Raises:
        InputError: an argument out of its range.
    """

    def __init__(
        self,
        lam: str | float = "noise",
        floor: int = 0,
        costs: Tensor | Sequence[float] | None = None,
        p: int = 1,
        q: float = 1.0,
        *,
        opening: Tensor | Sequence[float] | None = None,
        top: int | None = None,
    ) -> None:
        if isinstance(lam, str) and lam not in ("noise", "discrepancy"):
            raise InputError(f"LassoRelevance: lam is 'noise', 'discrepancy' or a number >= 0, and it is {lam!r}.")
        if not isinstance(lam, str) and not 0 <= lam < math.inf:
            raise InputError(f"LassoRelevance: lam must be a finite number >= 0, and it is {lam}.")
        if p not in (1, 2) or q < 0:
            raise InputError(f"LassoRelevance: p is 1 or 2 and q >= 0; they are {p} and {q}.")
        if floor < 0 or (top is not None and top < 1):
            raise InputError(f"LassoRelevance: floor must be >= 0 and top at least 1; they are {floor} and {top}.")
        self.lam, self.floor, self.p, self.q, self.top = lam, int(floor), p, q, top
        self.costs = None if costs is None else _prices("costs", costs, positive=True)
        self.opening = None if opening is None else _prices("opening", opening, positive=False)
        self.relevance: Tensor | None = None
        self.certificate: Pursuit | None = None
        self.residual, self.used_lam = math.nan, math.nan
        self._heads: Array | None = None
        self._target: Array | None = None
        self._found: Array | None = None

    # ---- relevance --------------------------------------------------------------------------------------------------

    def fit(self, heads: Tensor, target: Tensor, *, noise: float = 0.0, samples: int | None = None) -> Tensor:
        """Find the relevance of every source.

        Args:
            heads: W, float (K, T).
            target: w, float (K,).
            noise: standard deviation of the labels; 0 says that the heads are exact.
            samples: of the target, from which its head was estimated; needed where there is noise.

        Returns:
            nu, of the dtype of `heads`, (T,).

        Raises:
            InputError: heads that are not finite or do not fit, or exact heads that do not span the target.
        """
        self._check(heads, target, noise, samples)
        w, goal = _array(heads), _array(target)
        self._heads, self._target = w, goal
        self.certificate, self.used_lam = None, 0.0
        if self.p == 2:
            nu = self._least_squares(w, goal)
        else:
            scale = np.ones(w.shape[1]) if self.costs is None else np.sqrt(self.costs)
            self.used_lam = self._choose(w / scale, goal, noise, samples)
            # sum sqrt(c)|nu| is |mu|_1 with mu = sqrt(c) nu, and W nu = (W / sqrt(c)) mu
            found = _pursue(w / scale, goal, self.used_lam)
            self.certificate, nu = found, found.coefficients / scale
        if self.top is not None:
            nu = _refit(w, goal, nu, self.top)
        self.residual = float(np.linalg.norm(w @ nu - goal))
        self._found = nu
        self.relevance = torch.from_numpy(nu.copy())
        return self.relevance.to(dtype=heads.dtype, device=heads.device)

    def _check(self, heads: Tensor, target: Tensor, noise: float, samples: int | None) -> None:
        if heads.ndim != 2 or target.shape != heads.shape[:1] or not heads.shape[1]:
            raise InputError(
                "LassoRelevance: heads float (K, T) and target float (K,) were expected, and "
                f"{list(heads.shape)} and {list(target.shape)} came."
            )
        bad = (~torch.isfinite(heads)).any(0).nonzero().flatten().tolist()
        if bad:
            raise InputError(f"LassoRelevance: the heads of tasks {', '.join(map(str, bad[:10]))} are not finite.")
        if not bool(torch.isfinite(target).all()):
            raise InputError("LassoRelevance: the head of the target is not finite.")
        for name, prices in (("costs", self.costs), ("opening", self.opening)):
            if prices is not None and len(prices) != heads.shape[1]:
                raise InputError(
                    f"LassoRelevance: {name} has {len(prices)} entries, and there are {heads.shape[1]} tasks."
                )
        if noise < 0 or not math.isfinite(noise):
            raise InputError(f"LassoRelevance: noise must be finite and >= 0, and it is {noise}.")
        if noise and isinstance(self.lam, str) and self.p == 1 and (samples is None or samples < 1):
            raise InputError(
                f"LassoRelevance: lam={self.lam!r} needs samples, of how many the target's head was estimated; it is {samples}."
            )

    def _choose(self, w: Array, goal: Array, noise: float, samples: int | None) -> float:
        """Return lam as a number."""
        if not isinstance(self.lam, str):
            return float(self.lam)
        if noise == 0:
            return 0.0
        assert samples is not None
        if self.lam == "noise":
            size = math.sqrt(float((w**2).sum(0).mean()))
            return noise * math.sqrt(2 * math.log(2 * w.shape[1]) / samples) * size
        return _discrepancy(w, goal, noise**2 * len(goal) / samples)

    def _least_squares(self, w: Array, goal: Array) -> Array:
        """nu2 = W' (W W')^-1 w, by the pseudo-inverse."""
        nu = np.linalg.lstsq(w, goal, rcond=1e-12)[0]
        rest = float(np.linalg.norm(w @ nu - goal))
        if rest > 1e-7 * float(np.linalg.norm(goal)):
            raise InputError(
                f"The target's head is not a combination of the source heads: a residual of {rest:.3g} is left of "
                f"{np.linalg.norm(goal):.3g}. Add sources, or use p=1 with lam > 0."
            )
        return np.asarray(nu, dtype=np.float64)

    def path(self, lam: float = 0.0) -> LassoPath:
        """Return the LASSO's whole path, from nu = 0 to `lam`; of `sqrt(c) nu` where there are costs."""
        w, goal = self._fitted()
        return lasso_path(w if self.costs is None else w / np.sqrt(self.costs), goal, lam)

    @property
    def reduced_costs(self) -> Tensor:
        """By how much the price of each task lies below what its use would need, 1 - |w_t'y|, float64 (T,); 0 in the support."""
        self._fitted()
        if self.certificate is None:
            raise InputError("LassoRelevance: p=2 has no reduced costs; they belong to the linear program of p=1.")
        return torch.from_numpy(self.certificate.reduced_costs.copy())

    @property
    def alternates(self) -> Tensor:
        """Tasks outside the support that could be used as well, int64: not empty where the relevance is not unique."""
        self._fitted()
        found = np.zeros(0, np.int64) if self.certificate is None else self.certificate.alternates
        return torch.from_numpy(found)

    # ---- samples ----------------------------------------------------------------------------------------------------

    def allocate(
        self,
        budget: float,
        available: Tensor | Sequence[int] | None = None,
        drawn: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """Share out a budget.

        Args:
            budget: samples in all, or money where there are costs. Those drawn already count.
            available: most samples of each task, (T,).
            drawn: samples that are there already, (T,); no task gets fewer.

        Returns:
            n, int64 (T,), of sum `budget`; with costs the most that the budget buys. With `opening` the relevance becomes that
            of the tasks that are opened for this budget.

        Raises:
            InputError: the budget is below the floors or above what is available, or the relevance is not known yet.
        """
        w, goal = self._fitted()
        assert self.relevance is not None
        assert self._found is not None
        tasks = w.shape[1]
        costs = np.ones(tasks) if self.costs is None else self.costs
        cap = np.full(tasks, np.inf) if available is None else _counts("available", available, tasks)
        least = np.zeros(tasks) if drawn is None else _counts("drawn", drawn, tasks)
        nu = self._found
        used = np.ones(tasks, dtype=bool)
        if self.opening is not None:
            # What is open already has been paid for, whether it is used again or not.
            budget = budget - float(self.opening[least > 0].sum())
            opening = np.where(least > 0, 0.0, self.opening)
            nu = self._few_tasks(nu, budget, costs, opening)
            self.relevance, self.residual = torch.from_numpy(nu), float(np.linalg.norm(w @ nu - goal))
            used = (nu != 0) | (least > 0)
            budget = budget - float(opening[used].sum())
            if self.costs is None:
                budget = math.floor(budget)
            cap = np.where(used, cap, 0.0)
        floor = np.maximum(np.where(used, np.minimum(self.floor, cap), 0.0), least)
        cap = np.maximum(cap, floor)
        self._check_budget(budget, floor, cap, costs)
        shares = np.abs(nu) ** self.q / np.sqrt(costs)
        if not (shares > 0).any():
            warnings.warn(
                f"LassoRelevance: no source is relevant at lam={self.used_lam:.3g}, so every one gets the same number of samples. "
                "Lower lam if that is not what you think.",
                PoiseWarning,
                stacklevel=2,
            )
            shares = used.astype(np.float64)
        amounts = water_fill(shares, budget, floor, cap, None if self.costs is None else costs)
        if self.costs is None and self.p == 1 and (nu != 0).any() and bool((amounts >= cap)[nu != 0].all()):
            # All that is relevant is used up: what is left goes where it lowers the risk most.
            amounts = _next_best(w, nu, budget, floor, cap)
        if self.costs is None:
            return torch.from_numpy(largest_remainder(amounts, int(budget)))
        return torch.from_numpy(_affordable(amounts, costs, budget, cap))

    def _check_budget(self, budget: float, floor: Array, cap: Array, costs: Array) -> None:
        if self.costs is None and float(budget) != int(budget) and self.opening is None:
            raise InputError(f"LassoRelevance: a budget of samples is a whole number, and it is {budget}.")
        least, most = float(costs @ floor), float(costs @ cap)
        if budget < least:
            raise InputError(
                f"LassoRelevance: the budget is {budget:g}, and the floors of {len(floor)} tasks alone need {least:g}. "
                "Raise the budget or lower the floor."
            )
        if budget > most:
            raise InputError(f"LassoRelevance: the budget is {budget:g}, and the tasks have {most:g} to give.")

    def _few_tasks(self, nu: Array, budget: float, costs: Array, opening: Array) -> Array:
        """Choose the tasks to open: `min (sum sqrt(c)|nu|)^2 / (budget - openings)` over supports that span the target as well.

        The candidates are the relevance itself, what it becomes when tasks that are little used grow dearer, and what exchanges of
        one task for another make of each for as long as that pays. A heuristic: the problem is combinatorial.
        """
        w, goal = self._fitted()
        root = np.sqrt(costs)

        def solve(weights: Array) -> Array | None:
            try:
                found = _pursue(w / weights, goal, self.used_lam)
            except InputError:
                return None
            if found.residual > max(2 * self.residual, 1e-7 * float(np.linalg.norm(goal))):
                return None
            return found.coefficients / weights

        def value(candidate: Array) -> float:
            left = budget - float(opening[candidate != 0].sum())
            return math.inf if left <= 0 else float(root @ np.abs(candidate)) ** 2 / left

        best, worth = nu, value(nu)
        current, candidates = nu, [nu]
        for _ in range(8):
            dear = root + opening / max(budget, 1e-12) / np.maximum(np.abs(current), 1e-3 * np.abs(current).max())
            found = solve(dear)
            if found is None:
                break
            current = found
            if value(current) < worth:
                best, worth = current, value(current)
            candidates.append(current)
        # What each candidate says of the target is kept, and bought by fewer or cheaper tasks.
        for found in [_exchange(w, start, root, opening, budget) for start in candidates]:
            if value(found) < worth:
                best, worth = found, value(found)
        if not math.isfinite(worth):
            raise InputError(
                f"LassoRelevance: opening the {int((nu != 0).sum())} tasks that are needed costs more than the budget of {budget:g}."
            )
        return best

    def report(self, counts: Tensor, names: Sequence[str] | None = None) -> RelevanceReport:
        """Say why each task got its samples: relevance, samples, share of the predicted risk, reduced cost, reason.

        Args:
            counts: n, (T,).
            names: of the tasks; their numbers by default.
        """
        w, goal = self._fitted()
        assert self.relevance is not None
        costs = None if self.certificate is None else self.certificate.reduced_costs
        return relevance_report(
            self.relevance, counts, torch.from_numpy(w), torch.from_numpy(goal), costs, names, self.floor
        )

    # ---- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what `fit` found."""
        names = ("relevance", "certificate", "residual", "used_lam", "_heads", "_target", "_found")
        return {name: copy.deepcopy(getattr(self, name)) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        for name, value in state.items():
            setattr(self, name, copy.deepcopy(value))

    def _fitted(self) -> tuple[Array, Array]:
        if self._heads is None or self._target is None:
            raise InputError("LassoRelevance: the relevance is not known yet; call fit(heads, target) first.")
        return self._heads, self._target


def _pursue(columns: Array, target: Array, lam: float) -> Pursuit:
    return basis_pursuit(columns, target) if lam == 0 else lasso(columns, target, lam)


def _exchange(w: Array, nu: Array, root: Array, opening: Array, budget: float) -> Array:
    """Exchange one used task for an unused one, or give one up, for as long as `(sum sqrt(c)|nu|)^2 / (budget - openings)` falls.

    With B = W_S^+ W the target stays the same where nu_j enters and nu_S becomes nu_S - B_j nu_j; nu_j = nu_t / B_tj takes t out.
    All exchanges are valued at once.
    """
    nu = nu.copy()
    for _ in range(100):
        used = np.flatnonzero(nu)
        if not len(used) or len(used) ** 2 * len(nu) > 2e7:  # all exchanges at once would not fit in memory
            break
        own = w[:, used]
        paths = np.linalg.pinv(own) @ w
        spanned = np.linalg.norm(own @ paths - w, axis=0) <= 1e-8 * np.linalg.norm(w, axis=0)
        left = budget - (float(opening[used].sum()) - opening[used][:, None] + opening[None])
        with np.errstate(divide="ignore", invalid="ignore"):
            enter = nu[used][:, None] / paths
            remaining = nu[used][:, None, None] - paths[:, None] * enter[None]
            size = (root[used][:, None, None] * np.abs(remaining)).sum(0) + root * np.abs(enter)
            worth = np.where((left > 0) & spanned & (nu == 0) & (np.abs(paths) > 1e-8), size**2 / left, np.inf)
        rest = budget - float(opening[used].sum())
        now = float(root @ np.abs(nu)) ** 2 / rest if rest > 0 else math.inf
        place, other = np.unravel_index(int(np.nanargmin(worth)), worth.shape)
        if not worth[place, other] < now * (1 - 1e-12):
            break
        nu[used] = remaining[:, place, other]
        nu[used[place]] = 0.0
        nu[other] = enter[place, other]
        nu[np.abs(nu) < 1e-12 * np.abs(nu).max()] = 0.0
    return nu


def _refit(w: Array, goal: Array, nu: Array, keep: int) -> Array:
    """The k largest |nu|, and nu anew on these by least squares."""
    largest = np.argsort(-np.abs(nu), kind="stable")[:keep]
    largest = largest[nu[largest] != 0]
    fitted = np.zeros_like(nu)
    if len(largest):
        fitted[largest] = np.linalg.lstsq(w[:, largest], goal, rcond=None)[0]
    return fitted


def _discrepancy(w: Array, goal: Array, allowed: float) -> float:
    """The largest lam at which |W nu - w|^2 <= allowed; 0 where no lam above it does."""
    path = lasso_path(w, goal)
    rests = [goal - w @ path.coefficients(i) for i in range(len(path.lams))]
    squares = np.array([float(r @ r) for r in rests])
    if squares[0] <= allowed:
        return float(path.lams[0])
    after = int(np.argmax(squares <= allowed))
    if squares[after] > allowed:
        return 0.0
    # the residual is linear between breakpoints, so its square is a quadratic in the share of the way
    move = rests[after] - rests[after - 1]
    a, b, c = float(move @ move), 2 * float(move @ rests[after - 1]), squares[after - 1] - allowed
    share = (-b - math.sqrt(max(b * b - 4 * a * c, 0.0))) / (2 * a)
    return float(path.lams[after - 1] + share * (path.lams[after] - path.lams[after - 1]))


def _next_best(w: Array, nu: Array, budget: float, floor: Array, cap: Array) -> Array:
    """The best counts where caps bind: other tasks take over the part of those that are used up."""
    goal = torch.from_numpy(w @ nu)
    found = optimal_counts(
        torch.from_numpy(w), goal, budget, torch.from_numpy(floor), torch.from_numpy(cap), rounds=200
    )
    return np.asarray(found.numpy())


def _affordable(amounts: Array, costs: Array, budget: float, cap: Array) -> NDArray[np.int64]:
    """Round down, and spend what is left on the largest remainders that it still buys."""
    whole = np.floor(amounts + 1e-9)
    left = budget - float(costs @ whole)
    for task in np.argsort(-(amounts - whole), kind="stable"):
        if amounts[task] > whole[task] + 1e-9 and whole[task] < cap[task] and costs[task] <= left + 1e-9:
            whole[task] += 1
            left -= costs[task]
    return whole.astype(np.int64)


def _prices(name: str, values: Tensor | Sequence[float], *, positive: bool) -> Array:
    prices = np.asarray(torch.as_tensor(values).tolist(), dtype=np.float64)
    if prices.ndim != 1 or not np.isfinite(prices).all() or (prices < 0).any() or (positive and (prices == 0).any()):
        sign = "positive" if positive else "not negative"
        raise InputError(
            f"LassoRelevance: {name} must be finite and {sign}, one for each task; they are {prices.tolist()[:10]}."
        )
    return prices


def _counts(name: str, values: Tensor | Sequence[int], tasks: int) -> Array:
    counts = np.asarray(torch.as_tensor(values).tolist(), dtype=np.float64)
    if counts.shape != (tasks,) or not (counts >= 0).all():
        raise InputError(f"LassoRelevance: {name} must hold a number >= 0 for each of {tasks} tasks.")
    return counts


def _array(values: Tensor) -> Array:
    return np.asarray(values.detach().to(device="cpu", dtype=torch.float64).numpy())
