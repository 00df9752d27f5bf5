"""A linear representation shared by many tasks, by alternating least squares on Gram matrices.

    y = x' B w_t + noise,      min over B (d, K), W (K, T) of   sum_t 1/2 |X_t B w_t - y_t|^2

All that the data say is `S_t = X_t'X_t` and `b_t = X_t'y_t`. They are kept in float64 and added to, so training anew after a
draw reads no old sample, and a sweep costs O(T K^2 d^2) however many there are.

    w_t = (B'S_t B)^-1 B'b_t
    sum_t S_t B w_t w_t' = sum_t b_t w_t'              dK equations, solved directly or by conjugate gradient

Source: arXiv:2306.02556, algorithm of the active sampler, step 2 (the solver is this library's).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from poise.errors import InputError

__all__ = ["LinearMultiTask"]

DIRECT = 1500
"""Up to so many unknowns dK the normal equations are solved directly."""


class LinearMultiTask:
    """The linear trainer.

    Args:
        features: d, columns of an input, without the constant.
        rank: K, columns of the representation.
        tasks: T, source tasks.
        bias: put a constant 1 behind every input.
        normalise: "covariance" makes `B'CB = I` with C the covariance of all inputs, so that a distance between heads is one
            between predictions; "orthonormal" makes `B'B = I`.
        sweeps: at most so many.
        tolerance: stop where the loss falls by less, relatively.
        solver: "direct", "cg", or "auto" by the number of unknowns.
        ridge: relative to the mean of the Gram matrices' diagonals; keeps tasks with few samples solvable.

    Attributes:
        basis: B, float64 (d, K), after `fit`.
        weights: W, float64 (K, T), after `fit`.
        losses: the mean squared error of every sweep of the last `fit`.

    Raises:
        InputError: sizes that do not fit.
    """

    def __init__(
        self,
        features: int,
        rank: int,
        tasks: int,
        *,
        bias: bool = False,
        normalise: str = "covariance",
        sweeps: int = 50,
        tolerance: float = 1e-6,
        solver: str = "auto",
        ridge: float = 1e-8,
    ) -> None:
        self.features, self.rank, self.tasks, self.bias = features + bias, rank, tasks, bias
        if not 1 <= rank <= self.features or tasks < 1:
            raise InputError(
                f"LinearMultiTask: 1 <= rank <= {self.features} features and at least one task; rank is {rank}, tasks {tasks}."
            )
        if normalise not in ("covariance", "orthonormal") or solver not in ("auto", "direct", "cg"):
            raise InputError(
                "LinearMultiTask: normalise is 'covariance' or 'orthonormal', solver 'auto', 'direct' or 'cg'; "
                f"they are {normalise!r} and {solver!r}."
            )
        self.normalise, self.sweeps, self.tolerance, self.solver, self.ridge = (
            normalise,
            sweeps,
            tolerance,
            solver,
            ridge,
        )
        d = self.features
        self.gram = torch.zeros(tasks, d, d, dtype=torch.float64)
        self.moment = torch.zeros(tasks, d, dtype=torch.float64)
        self.energy = torch.zeros(tasks, dtype=torch.float64)
        self.counts = torch.zeros(tasks, dtype=torch.int64)
        self.basis: Tensor | None = None
        self.weights: Tensor | None = None
        self.losses: list[float] = []
        self.products = 0

    def add(self, task: int, inputs: Tensor, targets: Tensor) -> None:
        """Take samples of one task: inputs float (n, d), targets float (n,).

        Raises:
            InputError: shapes that do not fit, or values that are not finite.
        """
        x, y = self._inputs(inputs), targets.detach().to(torch.float64)
        if x.ndim != 2 or x.shape[1] != self.features or y.shape != (len(x),):
            raise InputError(
                f"Task {task}: inputs float [n, {self.features - self.bias}] and targets [n] were expected, and "
                f"{list(inputs.shape)} and {list(targets.shape)} came."
            )
        if not bool(torch.isfinite(x).all() and torch.isfinite(y).all()):
            raise InputError(f"Task {task}: its samples are not all finite.")
        self.gram[task] += x.T @ x
        self.moment[task] += x.T @ y
        self.energy[task] += y @ y
        self.counts[task] += len(x)

    def fit(self) -> None:
        """Fit B and W to everything that was added, from the last B where there is one."""
        if not bool((self.counts > 0).any()):
            raise InputError("There is nothing to fit: no task has a sample.")
        basis = self._initial() if self.basis is None else self.basis
        self.losses = []
        for _ in range(self.sweeps):
            weights = self._heads(basis)
            basis = torch.linalg.qr(self._basis(weights, basis)).Q
            self.losses.append(self._loss(basis, self._heads(basis)))
            if len(self.losses) > 1 and self.losses[-2] - self.losses[-1] < self.tolerance * self.losses[-2]:
                break
        weights = self._heads(basis)
        change = torch.linalg.cholesky(basis.T @ self._covariance() @ basis).T
        if self.normalise == "orthonormal":
            change = torch.eye(self.rank, dtype=torch.float64)
        # B R^-1 and R W are the same model; of all R this one makes heads comparable
        self.basis, self.weights = (
            torch.linalg.solve_triangular(change, basis, upper=True, left=False),
            change @ weights,
        )

    def heads(self) -> Tensor:
        """Return W, float64 (K, T)."""
        return self._fitted()[1]

    def target_head(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return `argmin_w |X B w - y|^2` with B frozen, float64 (K,)."""
        z, y = self.represent(inputs), targets.detach().to(torch.float64)
        gram = z.T @ z
        head: Tensor = torch.linalg.solve(gram + self._small(gram), z.T @ y)
        return head

    def represent(self, inputs: Tensor) -> Tensor:
        """Return X B, float64 (n, K)."""
        return self._inputs(inputs) @ self._fitted()[0]

    def predict(self, inputs: Tensor, head: Tensor) -> Tensor:
        """Return X B w, float64 (n,)."""
        return self.represent(inputs) @ head

    def noise(self) -> float:
        """Return the standard deviation that the fit leaves in the labels, with its degrees of freedom taken off."""
        basis, weights = self._fitted()
        seen = int((self.counts > 0).sum())
        free = int(self.counts.sum()) - self.rank * (self.features - self.rank + seen)
        return math.sqrt(max(2 * self._loss(basis, weights) * int(self.counts.sum()) / max(free, 1), 0.0))

    def state_dict(self) -> dict[str, Any]:
        """Return the sufficient statistics and the last fit."""
        names = ("gram", "moment", "energy", "counts", "basis", "weights")
        return {name: None if getattr(self, name) is None else getattr(self, name).clone() for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        for name, value in state.items():
            setattr(self, name, None if value is None else value.clone())

    def _fitted(self) -> tuple[Tensor, Tensor]:
        if self.basis is None or self.weights is None:
            raise InputError("The representation is not trained yet: call fit() first.")
        return self.basis, self.weights

    def _inputs(self, inputs: Tensor) -> Tensor:
        x = inputs.detach().to(torch.float64)
        return torch.cat([x, x.new_ones(len(x), 1)], 1) if self.bias else x

    def _covariance(self) -> Tensor:
        pooled = self.gram.sum(0) / self.counts.sum()
        return pooled + self._small(pooled)

    def _small(self, matrix: Tensor) -> Tensor:
        scale = matrix.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)
        return self.ridge * scale[..., None, None] * torch.eye(matrix.shape[-1], dtype=matrix.dtype)

    def _initial(self) -> Tensor:
        """The leading left singular vectors of the tasks' own solutions; where a task has too few samples, of its moment."""
        own = self.gram + self._small(self.gram)
        few = (self.counts <= 2 * self.features)[:, None, None]
        own = torch.where(few, self._covariance() * self.counts[:, None, None].clamp_min(1), own)
        solutions = torch.linalg.solve(own, self.moment[..., None])[..., 0] * self.counts.sqrt()[:, None]
        left: Tensor = torch.linalg.svd(solutions.T, full_matrices=True).U
        return left[:, : self.rank]

    def _heads(self, basis: Tensor) -> Tensor:
        small = basis.T @ self.gram @ basis
        solved: Tensor = torch.linalg.solve(small + self._small(small), (self.moment @ basis)[..., None])[..., 0]
        return torch.where((self.counts > 0)[:, None], solved, 0.0).T

    def _basis(self, weights: Tensor, start: Tensor) -> Tensor:
        right = self.moment.T @ weights.T
        direct = self.solver == "direct" or (self.solver == "auto" and right.numel() <= DIRECT)
        return self._solve_directly(weights, right) if direct else self._solve_by_gradients(weights, right, start)

    def _solve_directly(self, weights: Tensor, right: Tensor) -> Tensor:
        d, k = right.shape
        outer = (weights.T[:, :, None] * weights.T[:, None, :]).reshape(self.tasks, -1)
        blocks = (outer.T @ self.gram.reshape(self.tasks, -1)).view(k, k, d, d)
        matrix = blocks.permute(0, 2, 1, 3).reshape(k * d, k * d)
        solved: Tensor = torch.linalg.solve(matrix + self._small(matrix), right.T.reshape(-1))
        return solved.view(k, d).T

    def _solve_by_gradients(self, weights: Tensor, right: Tensor, start: Tensor) -> Tensor:
        """Conjugate gradient on B -> sum_t S_t B w_t w_t', preconditioned by the pooled covariance and sum_t n_t w_t w_t'."""
        left = self._covariance()
        across = (weights * self.counts) @ weights.T
        across = across + self._small(across)
        left_factor, across_factor = torch.linalg.cholesky(left), torch.linalg.cholesky(across)

        def apply(b: Tensor) -> Tensor:
            self.products += 1
            return torch.bmm(self.gram, (b @ weights).T[..., None])[..., 0].T @ weights.T

        def precondition(b: Tensor) -> Tensor:
            return torch.cholesky_solve(torch.cholesky_solve(b, left_factor).T, across_factor).T

        # The basis that these heads belong to is the last one, up to the size that QR has taken away.
        b = start.clone()
        rest = right - apply(b)
        z = precondition(rest)
        p, inner = z.clone(), (rest * z).sum()
        goal = 1e-10 * right.norm()
        for _ in range(10 * right.numel()):
            if rest.norm() <= goal:
                break
            ap = apply(p)
            step = inner / (p * ap).sum()
            b, rest = b + step * p, rest - step * ap
            z = precondition(rest)
            last, inner = inner, (rest * z).sum()
            p = z + inner / last * p
        return b

    def _loss(self, basis: Tensor, weights: Tensor) -> float:
        """Return the mean of 1/2 (x'B w - y)^2 over all samples."""
        models = (basis @ weights).T
        fit = torch.einsum("td,tde,te->", models, self.gram, models)
        squares = self.energy.sum() - 2 * (models * self.moment).sum() + fit
        return float(0.5 * squares.clamp_min(0) / self.counts.sum())
