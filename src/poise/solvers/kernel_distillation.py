"""Self-distillation of kernel ridge regression, solved exactly: every step, their limit, and the best share of labels.

Step `tau` fits the same kernel ridge regression again, on a target that mixes the labels with the previous step's fit:

    f^(tau) = argmin_f  alpha/2 sum (f(x_n) - y_n)^2 + (1-alpha)/2 sum (f(x_n) - y_n^(tau-1))^2 + ridge/2 ||f||^2
    y^(tau) = K (K + ridge I)^-1 (alpha y + (1-alpha) y^(tau-1)),   y^(0) = y                           (the labels)

In the eigenbasis `K = V diag(d) V^T` every step is a filter on the coefficients `c = V^T y`: the fit at the training
points is `V (B c)` and at a new point `kappa(x)^T V (G c)` with `B = d G`. With a constant share the filter is known in
closed form, one geometric term away from its limit:

    G^(tau) = G^inf + (G^1 - G^inf) r^(tau-1),    G^1 = 1/(d + ridge),   G^inf = alpha/(alpha d + ridge),
    r = (1-alpha) d/(d + ridge)

so that infinitely many steps are one plain fit with the ridge amplified to `ridge/alpha`, and `alpha = 0` ends at the
zero function (arXiv:2102.13088; `alpha = 0`: Mobahi, Farajtabar and Bartlett, arXiv:2002.05715). One eigendecomposition
therefore prices every step and every share at O(n).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from poise.errors import CheckpointError, InputError
from poise.operators import project_on_line

if TYPE_CHECKING:
    import numpy.typing as npt

    from poise.problem import Certificate

    Array = Tensor | npt.NDArray[Any]

__all__ = ["SelfDistillationKRR", "Spectrum", "distillation_filter", "limit_filter"]

KernelFunction = Callable[[Tensor, Tensor], Tensor]
Share = float | Sequence[float] | Callable[[int], float] | Literal["optimal"]
Step = int | Literal["last", "best", "limit"]


def distillation_filter(eigenvalues: Tensor, ridge: float, alpha: float | Tensor, step: int | Tensor) -> Tensor:
    """Return the filter `G` of step `step` at a constant share `alpha`, in closed form.

    `G^(tau) = G^inf + (G^1 - G^inf) r^(tau-1)` with `r = (1-alpha) d/(d + ridge)`. The fit's shrinkage is `B = d G`.

    Args:
        eigenvalues: `d`, float `[..., n]`, >= 0.
        ridge: > 0, or 0 where every eigenvalue is positive.
        alpha: share of the labels, in [0, 1]; a tensor broadcasts against `eigenvalues`.
        step: `tau` >= 1; a tensor broadcasts too, so a grid of shares and steps is one call.

    >>> distillation_filter(torch.tensor([1.0, 0.0]), ridge=1.0, alpha=0.5, step=2)
    tensor([0.3750, 0.5000])

    Source: arXiv:2102.13088, the constant-share recursion summed.
    """
    limit = limit_filter(eigenvalues, ridge, alpha)
    first = 1 / (eigenvalues + ridge)
    contraction = (1 - alpha) * eigenvalues / (eigenvalues + ridge)
    return limit + (first - limit) * contraction ** (step - 1)


def limit_filter(eigenvalues: Tensor, ridge: float, alpha: float | Tensor) -> Tensor:
    """Return the filter of infinitely many steps, `alpha/(alpha d + ridge)`: ridge regression at `ridge/alpha`.

    Args:
        eigenvalues: `d`, float `[..., n]`, >= 0.
        ridge: > 0, or 0 where every eigenvalue is positive; at 0 every step interpolates the labels, `1/d`.
        alpha: share of the labels, > 0, or 0 for the zero function.

    >>> limit_filter(torch.tensor([1.0]), ridge=1.0, alpha=0.5)
    tensor([0.3333])

    Source: arXiv:2102.13088, limit theorem.
    """
    if ridge == 0:
        return (1 / eigenvalues).expand_as(eigenvalues * alpha)
    return alpha / (alpha * eigenvalues + ridge)


@dataclass(frozen=True)
class Spectrum:
    """How strongly each eigen-direction of the labels survives each step.

    Args:
        eigenvalues: `d`, `[n]`, largest first.
        ridge: the ridge of every fit.
        alphas: the share of labels in steps 2, 3, ...; one fewer than there are steps.
        shrinkage: `B`, `[steps, n]`: the factor that step `tau` leaves of each coefficient of the labels, in [0, 1].
        limit: `B` of infinitely many steps, `[n]`, the last share being held.
    """

    eigenvalues: Tensor
    ridge: float
    alphas: tuple[float, ...]
    shrinkage: Tensor
    limit: Tensor


class SelfDistillationKRR:
    """Kernel ridge regression distilled into itself, with a share of the labels kept in every step's target.

    `y^(tau) = K (K + ridge I)^-1 (alpha y + (1-alpha) y^(tau-1))`.

    Args:
        kernel: `"rbf"` (`exp(-gamma ||x - x'||^2)`), `"linear"` (`<x, x'>`), `"polynomial"`
            (`(gamma <x, x'> + coef0)^degree`), `"precomputed"` (inputs are kernel matrices), or a function
            `(X [m, d], X' [n, d]) -> [m, n]`.
        ridge: the weight of `||f||^2 / 2` beside halved sums of squares over examples, >= 0 (scikit-learn's `alpha`:
            not divided by n); 0 only where the kernel matrix is not singular.
        gamma: of the rbf and polynomial kernels, > 0; None means `1 / d`.
        degree, coef0: of the polynomial kernel.
        decomposition: `"eigh"` (every step and share at O(n) after one eigendecomposition) or `"cholesky"` (several
            times cheaper to start, O(n^2) a step: for a few steps of one schedule; what needs the spectrum then pays
            the eigendecomposition when it is first asked for).
        dtype: precision of all computations, `torch.float64` or `torch.float32`.

    After `fit`: `alphas` (share of labels in steps 2, 3, ...), `raw_alphas` (before clipping; `"optimal"` only),
    `flags` (how to read them), `validation_errors` (mean squared error of each step, with validation data),
    `best_step`.

    >>> x = torch.linspace(0, 1, 11)[:, None]
    >>> model = SelfDistillationKRR("rbf", ridge=0.2, gamma=80.0).fit(x, torch.sin(6.28 * x[:, 0]), alpha=0.35, steps=6)
    >>> round(model.equivalent_ridge(), 4)
    0.5714

    Source: arXiv:2102.13088.
    """

    _basis: _Basis | None
    _lazy_eigenbasis: _Eigenbasis | None
    _train: Tensor
    _center: Tensor
    _duals: list[Tensor]
    _alphas: list[float]
    _raw_alphas: list[float]
    _flags: list[str]
    _validation_errors: list[float]
    _held: float
    _flat: bool

    def __init__(
        self,
        kernel: str | KernelFunction = "rbf",
        ridge: float = 1.0,
        *,
        gamma: float | None = None,
        degree: int = 3,
        coef0: float = 1.0,
        decomposition: Literal["eigh", "cholesky"] = "eigh",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if not callable(kernel) and kernel not in _KERNELS:
            raise InputError(
                f"kernel must be one of {', '.join(_KERNELS)} or a function (X, X') -> matrix; got {kernel!r}."
            )
        if not (math.isfinite(ridge) and ridge >= 0):
            raise InputError(f"ridge must be a finite number >= 0; got {ridge}.")
        if gamma is not None and not (math.isfinite(gamma) and gamma > 0):
            raise InputError(f"gamma must be positive, or None for 1 / number of columns; got {gamma}.")
        if decomposition not in ("eigh", "cholesky"):
            raise InputError(f"decomposition must be 'eigh' or 'cholesky'; got {decomposition!r}.")
        if dtype not in (torch.float64, torch.float32):
            raise InputError(f"dtype must be torch.float64 or torch.float32; got {dtype}.")
        self.kernel = kernel
        self.ridge = float(ridge)
        self.gamma = gamma
        self.degree = degree
        self.coef0 = coef0
        self.decomposition = decomposition
        self.dtype = dtype
        self._forget()

    # ------------------------------------------------------------------------------------------------- fitting

    def fit(
        self,
        X: Array,
        Y: Array,
        alpha: Share = 0.3,
        steps: int | None = None,
        X_val: Array | None = None,
        Y_val: Array | None = None,
        *,
        extrapolate: bool = False,
        patience: int | None = None,
    ) -> SelfDistillationKRR:
        """Fit the first step and distil it `steps - 1` times.

        Args:
            X: float `[n, d]`, or the kernel matrix `[n, n]` for `"precomputed"`.
            Y: float `[n]` or `[n, outputs]`.
            alpha: share of the labels in the target of steps 2, 3, ...: a number, a sequence (one value for each of
                these steps), a function of the step number, or `"optimal"` (greedy: the best share on the validation
                data, step by step, one for all outputs). The last share is held beyond the fitted steps.
            steps: number of fits including the first, >= 1; by default 10, or what a sequence says.
            X_val: float `[m, d]`, or `[m, n]` for `"precomputed"`; needed by `"optimal"` and `patience`.
            Y_val: float `[m]` or `[m, outputs]`.
            extrapolate: lets shares leave [0, 1]: given ones are accepted, optimal ones are not clipped.
            patience: stop rule: end after so many steps in a row without a lower validation error.

        Returns:
            itself.

        Raises:
            InputError: shapes do not fit, a value is not finite, a share leaves [0, 1], validation data is missing, the
                kernel matrix is not symmetric or not positive semi-definite, or it is singular at `ridge = 0`.
        """
        schedule, steps, held = _schedule(alpha, steps, extrapolate)
        if (X_val is None) != (Y_val is None):
            raise InputError("X_val and Y_val belong together: give both or neither.")
        if X_val is None and (schedule is None or patience is not None):
            asked = 'alpha="optimal"' if schedule is None else "patience"
            raise InputError(f"{asked} is chosen on validation data: give X_val and Y_val.")
        if patience is not None and patience < 1:
            raise InputError(f"patience counts steps and must be at least 1; got {patience}.")

        self._forget()
        try:
            inputs, labels = self._matrix(X, "X"), self._labels(Y, "Y")
            if len(inputs) != len(labels):
                raise InputError(
                    f"X and Y must have the same number of rows; they have {len(inputs)} and {len(labels)}."
                )
            self._flat, labels = labels.ndim == 1, labels.reshape(len(labels), -1)
            gram = self._gram(inputs)
            self._basis = (
                _Eigenbasis.of(gram, labels, self.ridge)
                if self.decomposition == "eigh"
                else _Factored.of(gram, labels, self.ridge)
            )
            validation = None
            if X_val is not None and Y_val is not None:
                features = self._basis.features(self._cross(X_val, "X_val"))
                validation = features, self._truth(Y_val, "Y_val", len(features))
            self._held = held
            self._distil(schedule, steps, validation, extrapolate, patience)
        except InputError:
            self._forget()
            raise
        return self

    def _distil(
        self,
        schedule: Callable[[int], float] | None,
        steps: int,
        validation: tuple[Tensor, Tensor] | None,
        extrapolate: bool = False,
        patience: int | None = None,
    ) -> None:
        basis = self._require_basis()
        labels = basis.labels
        first = basis.solve(labels)
        self._record(first, validation)
        previous = basis.apply(first, labels)
        for step in range(2, steps + 1):
            if patience is not None and self.steps - self.best_step >= patience:
                break
            if schedule is not None:
                share = schedule(step)
            else:
                share = self._best_share(first, basis.solve(previous), validation, extrapolate)
            target = share * labels + (1 - share) * previous
            dual = basis.solve(target)
            previous = basis.apply(dual, target)
            self._alphas.append(share)
            self._held = share
            self._record(dual, validation)

    def _best_share(
        self, teacher: Tensor, student: Tensor, validation: tuple[Tensor, Tensor] | None, extrapolate: bool
    ) -> float:
        """`alpha* = <y - g, f_1 - g> / ||f_1 - g||^2`: the prediction is affine in the share."""
        assert validation is not None
        features, truth = validation
        share, coincide = project_on_line(truth, start=features @ student, end=features @ teacher)
        raw = float(share)
        self._raw_alphas.append(raw)
        self._flags.append("undefined" if coincide else "below" if raw < 0 else "above" if raw > 1 else "inside")
        return raw if extrapolate else min(max(raw, 0.0), 1.0)

    def _record(self, dual: Tensor, validation: tuple[Tensor, Tensor] | None) -> None:
        self._duals.append(dual)
        if validation is not None:
            features, truth = validation
            self._validation_errors.append(float((features @ dual - truth).square().mean()))

    # --------------------------------------------------------------------------------------------- predictions

    def predict(self, X: Array | None = None, step: Step = "last") -> Tensor:
        """Return the predictions of one step.

        `f^(tau)(x) = kappa(x)^T V (G^(tau) c)`.

        Args:
            X: float `[m, d]` (`[m, n]` kernel rows for `"precomputed"`); None means the training points.
            step: 1, 2, ... (beyond the fitted steps the last share is held, at no extra cost), `"last"` fitted,
                `"best"` on the validation data, or `"limit"` of infinitely many.

        Returns:
            `[m]` or `[m, outputs]`, as `Y` was.

        Raises:
            InputError: not fitted, a step below 1, columns that do not fit, or a limit that does not exist.
        """
        basis: _Basis = self._require_basis()
        number = self._number(step)
        if isinstance(number, int) and number <= self.steps:
            dual = self._duals[number - 1]
        else:
            basis = self._eigenbasis()
            dual = self._filter(number)[:, None] * basis.labels
        fitted = basis.fitted(dual) if X is None else basis.features(self._cross(X, "X")) @ dual
        return fitted[:, 0] if self._flat else fitted

    def path(self, alphas: Sequence[float], steps: int, X: Array | None = None) -> Tensor:
        """Return the predictions of steps 1 to `steps` for every constant share, from the one decomposition.

        Args:
            alphas: shares in [0, 1].
            steps: >= 1.
            X: as in `predict`.

        Returns:
            `[len(alphas), steps, m]` or `[len(alphas), steps, m, outputs]`.
        """
        basis = self._eigenbasis()
        features = basis.vectors * basis.values if X is None else basis.features(self._cross(X, "X"))
        fitted = torch.stack([self._predict_all(features, weights) for weights in self._filters(alphas, steps)])
        fitted = fitted.transpose(1, 2)
        return fitted[..., 0] if self._flat else fitted

    def errors(self, alphas: Sequence[float], steps: int, X: Array | None = None, Y: Array | None = None) -> Tensor:
        """Return the mean squared error of steps 1 to `steps` for every constant share, from the one decomposition.

        On the training points it costs O(n) a step, `||V (B c) - y||^2 = ||(B - 1) c||^2`; elsewhere one matrix
        product.

        Args:
            alphas: shares in [0, 1].
            steps: >= 1.
            X, Y: data as in `predict`, and its targets; both None means the training data.

        Returns:
            `[len(alphas), steps]`.
        """
        basis = self._eigenbasis()
        if (X is None) != (Y is None):
            raise InputError("errors needs X and Y together, or neither for the training data.")
        if X is None or Y is None:
            energy = basis.labels.square().sum(1)
            rows = [(basis.values * weights - 1).square() @ energy for weights in self._filters(alphas, steps)]
            return torch.stack(rows) / basis.labels.numel()
        features = basis.features(self._cross(X, "X"))
        truth = self._truth(Y, "Y", len(features))[:, None, :]
        rows = [self._predict_all(features, weights) for weights in self._filters(alphas, steps)]
        return torch.stack([(fitted - truth).square().mean((0, 2)) for fitted in rows])

    def _predict_all(self, features: Tensor, weights: Tensor) -> Tensor:
        """Return `[m, steps, outputs]` for filters `[steps, n]`: one matrix product an output."""
        columns = self._eigenbasis().labels.T
        return torch.stack([(features * column) @ weights.T for column in columns], dim=-1)

    def error(self, step: Step = "last", X: Array | None = None, Y: Array | None = None) -> float:
        """Return the mean squared error of one step, on the training data where X and Y are None.

        Args:
            step: as in `predict`.
            X, Y: data as in `predict`, and its targets.
        """
        basis = self._require_basis()
        if (X is None) != (Y is None):
            raise InputError("error needs X and Y together, or neither for the training data.")
        fitted = self.predict(X, step)
        fitted = fitted.reshape(len(fitted), -1)
        truth = basis.decode(basis.labels) if Y is None else self._truth(Y, "Y", len(fitted))
        return float((fitted - truth).square().mean())

    def with_ridge(self, ridge: float) -> SelfDistillationKRR:
        """Return the same chain of steps at another ridge, from the decomposition that is there: no new O(n^3) work.

        The shares are kept (those that were optimal at the old ridge too); validation errors are not carried over.

        Args:
            ridge: > 0, or 0 where the kernel matrix is not singular.
        """
        basis = self._eigenbasis()
        other = SelfDistillationKRR(
            self.kernel, ridge, gamma=self.gamma, degree=self.degree, coef0=self.coef0, dtype=self.dtype
        )
        if other.ridge == 0 and basis.is_singular():
            raise _singular()
        other._basis = _Eigenbasis(other.ridge, basis.values, basis.vectors, basis.labels)
        other._train, other._center, other._flat, other._held = self._train, self._center, self._flat, self._held
        other._replay(self._alphas)
        return other

    # ------------------------------------------------------------------------------------------------- reading

    @property
    def steps(self) -> int:
        """Number of fits done, the first one included."""
        return len(self._duals)

    @property
    def alphas(self) -> tuple[float, ...]:
        """The share of labels in steps 2, 3, ..."""
        return tuple(self._alphas)

    @property
    def raw_alphas(self) -> tuple[float, ...]:
        """The optimal shares before clipping; empty unless `alpha` was `"optimal"`."""
        return tuple(self._raw_alphas)

    @property
    def flags(self) -> tuple[str, ...]:
        """How to read each raw share: `inside`, `below`, `above` or `undefined`, as in `poise.weights.Mixing`."""
        return tuple(self._flags)

    @property
    def validation_errors(self) -> tuple[float, ...]:
        """Mean squared validation error of each step; empty without validation data."""
        return tuple(self._validation_errors)

    @property
    def best_step(self) -> int:
        """The step with the lowest validation error, the earliest of equals."""
        if not self._validation_errors:
            raise InputError("The best step is known from validation data only: give X_val and Y_val to fit.")
        return 1 + min(range(len(self._validation_errors)), key=self._validation_errors.__getitem__)

    def spectrum(self) -> Spectrum:
        """Return the eigenvalues and what every fitted step, and the limit, leaves of each eigen-direction.

        `B^(1) = A`, `B^(tau) = A ((1-alpha) B^(tau-1) + alpha)` with `A = d/(d + ridge)`.
        """
        values = self._eigenbasis().values
        shrinkage = torch.stack([values * weights for weights in self._filter_path()])
        limit = values * self._filter("limit")
        return Spectrum(values.flip(0), self.ridge, self.alphas, shrinkage.flip(1), limit.flip(0))

    def equivalent_ridge(self, step: Step = "limit") -> float:
        """Return the ridge of the one plain fit that regularises as much as a step does.

        For the limit it is exact, `ridge / alpha`: the same function (infinite for `alpha = 0`, the zero function).
        For a finite step no single ridge gives the same filter; the one returned has equal degrees of freedom,
        `sum d/(d + equivalent) = sum B`.
        """
        number = self._number(step)
        if number == "limit":
            self._filter("limit")  # raises where there is none
            if self.ridge == 0:
                return 0.0
            return self.ridge / self._held if self._held != 0 else math.inf
        values = self._eigenbasis().values
        freedom = float((values * self._filter(number)).sum())
        return _ridge_of_freedom(values[values > 0], freedom)

    def steps_to_limit(self, tolerance: float = 1e-6) -> int:
        """Return the first step from which the shrinkage stays within `tolerance` of the limit's in every direction.

        The distance falls geometrically, `B^(tau) - B^inf = (B^(T) - B^inf) r^(tau-T)`, so the answer is a logarithm.

        Args:
            tolerance: > 0, in units of the labels' coefficients.
        """
        if not tolerance > 0:
            raise InputError(f"tolerance must be positive; got {tolerance}.")
        values = self._eigenbasis().values
        limit = values * self._filter("limit")
        # Steps whose share was the held one lie on the geometric path already, so it may be entered before the last
        # step.
        start = self.steps
        while start > 1 and self._alphas[start - 2] == self._held:
            start -= 1
        gap = (values * self._filter(start) - limit).abs()
        far = gap > tolerance
        if not bool(far.any()):
            return start
        rate = ((1 - self._held) * values / (values + self.ridge)).abs()[far]
        further = (math.log(tolerance) - gap[far].log()) / rate.clamp_min(torch.finfo(self.dtype).tiny).log()
        # A hair above an integer is rounding, not a further step.
        return start + max(1, math.ceil(float(further.max()) - 1e-9))

    def objective_value(self, step: int) -> float:
        """Return the minimum that a fitted step attains, summed over examples and outputs.

        `alpha/2 ||f - y||^2 + (1-alpha)/2 ||f - y^(tau-1)||^2 + ridge/2 ||f||_H^2`.
        """
        basis = self._require_basis()
        if not 1 <= step <= self.steps:
            raise InputError(f"objective_value knows the fitted steps 1 to {self.steps}; got {step}.")
        share = 1.0 if step == 1 else self._alphas[step - 2]
        labels, dual = basis.decode(basis.labels), self._duals[step - 1]
        fitted = basis.fitted(dual)
        previous = labels if step == 1 else basis.fitted(self._duals[step - 2])
        norm = (basis.decode(dual) * fitted).sum()  # ||f||_H^2 = a^T K a
        mixed = share * (fitted - labels).square().sum() + (1 - share) * (fitted - previous).square().sum()
        return float(mixed + self.ridge * norm) / 2

    def certificate(self, step: int | None = None, tolerance: float = 1e-8) -> Certificate:
        """Return what is known about a fitted step: its minimum, and how well the normal equations hold.

        The residual is `max |K a + ridge a - target| / max |target|` with `target = alpha y + (1-alpha) y^(tau-1)`, where `K` is
        computed anew (a precomputed one is rebuilt from its eigenvectors).

        Args:
            step: a fitted step; None means the last.
            tolerance: the residual that counts as solved.
        """
        from poise.problem import Certificate

        basis = self._require_basis()
        number = self.steps if step is None else step
        value = self.objective_value(number)
        share = 1.0 if number == 1 else self._alphas[number - 2]
        labels, dual = basis.decode(basis.labels), basis.decode(self._duals[number - 1])
        previous = labels if number == 1 else basis.fitted(self._duals[number - 2])
        target = share * labels + (1 - share) * previous
        rebuilt = self.kernel == "precomputed"
        fitted = (
            basis.fitted(self._duals[number - 1]) if rebuilt else self._kernel_between(self._train, self._train) @ dual
        )
        residual = float((fitted + self.ridge * dual - target).abs().max() / target.abs().max().clamp_min(1e-300))
        status = "converged" if residual <= tolerance else "ill-conditioned: use a larger ridge or float64"
        return Certificate(value, residual, tolerance, "relative residual of the normal equations", number, status)

    def _eigenbasis(self) -> _Eigenbasis:
        basis = self._require_basis()
        if isinstance(basis, _Eigenbasis):
            return basis
        if self._lazy_eigenbasis is None:
            self._lazy_eigenbasis = _Eigenbasis.of(basis.gram.clone(), basis.labels, self.ridge)
        return self._lazy_eigenbasis

    def _filters(self, alphas: Sequence[float], steps: int) -> Iterator[Tensor]:
        """Give `G [steps, n]` for each constant share, as `distillation_filter` does, sharing the powers of `r`."""
        _check_steps(steps)
        values = self._eigenbasis().values
        first = 1 / (values + self.ridge)
        shrinkage = values * first
        for alpha in alphas:
            share = _check_share(float(alpha), "alphas")
            limit = limit_filter(values, self.ridge, share)
            yield torch.addcmul(limit, first - limit, _powers((1 - share) * shrinkage, steps))

    def _filter_path(self) -> list[Tensor]:
        """Return `G` of every fitted step: `G^(tau) = ((1-alpha) d G^(tau-1) + alpha) / (d + ridge)`."""
        values = self._eigenbasis().values
        path = [1 / (values + self.ridge)]
        for share in self._alphas:
            path.append(((1 - share) * values * path[-1] + share) / (values + self.ridge))
        return path

    def _filter(self, step: int | Literal["limit"]) -> Tensor:
        """Return `G` of any step, the last share being held beyond the fitted ones."""
        values = self._eigenbasis().values
        if step == "limit":
            rate = float(((1 - self._held) * values / (values + self.ridge)).abs().max())
            if rate >= 1 and self.ridge > 0:
                raise InputError(
                    f"The steps have no limit: at the share {self._held:g} each multiplies a direction by {rate:.3g}. "
                    "Only shares in [0, 1] always have one; fit without extrapolate, or predict at a finite step."
                )
            return limit_filter(values, self.ridge, self._held)
        path = self._filter_path()
        if step <= len(path):
            return path[step - 1]
        further = step - len(path)
        if self._held < 0:  # the closed form may divide by zero here
            weights = path[-1]
            for _ in range(further):
                weights = ((1 - self._held) * values * weights + self._held) / (values + self.ridge)
            return weights
        limit = limit_filter(values, self.ridge, self._held)
        return limit + (path[-1] - limit) * ((1 - self._held) * values / (values + self.ridge)) ** further

    def _number(self, step: Step) -> int | Literal["limit"]:
        self._require_basis()
        if step == "limit":
            return "limit"
        if step == "last":
            return self.steps
        if step == "best":
            return self.best_step
        if isinstance(step, bool) or not isinstance(step, int):
            raise InputError(f"step must be a number from 1, 'last', 'best' or 'limit'; got {step!r}.")
        _check_steps(step)
        return step

    # --------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the fit knows, as tensors and plain values: eigenpairs, `V^T y`, step, shares."""
        basis = self._require_basis()
        return {
            "version": 1,
            "settings": self._settings(),
            "train": self._train,
            "center": self._center,
            "basis": basis.state(),
            "flat": self._flat,
            "step": self.steps,
            "alphas": list(self._alphas),
            "raw_alphas": list(self._raw_alphas),
            "flags": list(self._flags),
            "held": self._held,
            "validation_errors": list(self._validation_errors),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved fit, bit for bit; the constructor's arguments must be those of the saved one.

        Raises:
            CheckpointError: the settings differ, or something is missing.
        """
        lacking = [name for name in _STATE if name not in state]
        if lacking:
            raise CheckpointError(f"The state of a SelfDistillationKRR lacks {', '.join(lacking)}.")
        if state["version"] != 1 or state["step"] != len(state["alphas"]) + 1:
            raise CheckpointError("This state of a SelfDistillationKRR is damaged or from another version.")
        mine, theirs = self._settings(), state["settings"]
        different = [name for name in mine if theirs.get(name) != mine[name]]
        if different:
            said = ", ".join(f"{name} is {theirs.get(name)!r} there and {mine[name]!r} here" for name in different)
            raise CheckpointError(f"The state belongs to a SelfDistillationKRR with other settings: {said}.")
        self._forget()
        self._basis = (_Eigenbasis if self.decomposition == "eigh" else _Factored)(ridge=self.ridge, **state["basis"])
        self._train, self._center, self._flat = state["train"], state["center"], state["flat"]
        self._held = state["held"]
        self._replay(state["alphas"])
        self._raw_alphas, self._flags = list(state["raw_alphas"]), list(state["flags"])
        self._validation_errors = list(state["validation_errors"])

    def to(self, device: torch.device | str) -> SelfDistillationKRR:
        """Move the fit to a device and return itself."""
        basis = self._require_basis()
        moved = {name: tensor.to(device) for name, tensor in basis.state().items()}
        self._basis = type(basis)(ridge=self.ridge, **moved)
        self._lazy_eigenbasis = None
        self._train, self._center = self._train.to(device), self._center.to(device)
        self._duals = [dual.to(device) for dual in self._duals]
        return self

    def _replay(self, alphas: Sequence[float]) -> None:
        """Walk known shares again from the decomposition: the same operations in the same order, bit for bit."""
        held, shares = self._held, list(alphas)
        self._distil(lambda step: shares[step - 2], len(shares) + 1, validation=None)
        self._held = held

    def _settings(self) -> dict[str, Any]:
        name = self.kernel if isinstance(self.kernel, str) else getattr(self.kernel, "__qualname__", "function")
        return {
            "kernel": name,
            "ridge": self.ridge,
            "gamma": self.gamma,
            "degree": self.degree,
            "coef0": self.coef0,
            "decomposition": self.decomposition,
            "dtype": str(self.dtype),
        }

    def _forget(self) -> None:
        self._basis = None
        self._lazy_eigenbasis = None
        self._train = self._center = torch.empty(0, dtype=self.dtype)
        self._duals, self._alphas, self._raw_alphas = [], [], []
        self._flags, self._validation_errors = [], []
        self._held, self._flat = 1.0, True

    # -------------------------------------------------------------------------------------------------- inputs

    def _require_basis(self) -> _Basis:
        if self._basis is None:
            raise InputError("This SelfDistillationKRR is not fitted yet: call fit(X, Y) first.")
        return self._basis

    def _matrix(self, values: Array, name: str) -> Tensor:
        matrix = torch.as_tensor(values).detach().to(self.dtype)
        if matrix.ndim != 2 or 0 in matrix.shape:
            raise InputError(
                f"{name} must be a matrix [examples, columns]; its shape is {list(matrix.shape)}. "
                "A single column is reshape(-1, 1)."
            )
        if not bool(torch.isfinite(matrix).all()):
            raise InputError(f"{name} holds infinite or NaN values; impute or drop these rows first.")
        return matrix

    def _labels(self, values: Array, name: str) -> Tensor:
        labels = torch.as_tensor(values).detach().to(self.dtype)
        if labels.ndim not in (1, 2) or labels.numel() == 0:
            raise InputError(f"{name} must be [examples] or [examples, outputs]; its shape is {list(labels.shape)}.")
        if not bool(torch.isfinite(labels).all()):
            raise InputError(f"{name} holds infinite or NaN values; drop these rows first.")
        return labels

    def _truth(self, values: Array, name: str, rows: int) -> Tensor:
        outputs = self._require_basis().labels.shape[1]
        truth = self._labels(values, name)
        if (truth.ndim == 1) != self._flat or truth.reshape(len(truth), -1).shape != (rows, outputs):
            expected = f"[{rows}]" if self._flat else f"[{rows}, {outputs}]"
            raise InputError(f"{name} must be {expected}, like the predictions; its shape is {list(truth.shape)}.")
        return truth.reshape(rows, outputs)

    def _gram(self, inputs: Tensor) -> Tensor:
        """Return the kernel matrix of the training points, and remember what new points need."""
        if self.kernel == "precomputed":
            if inputs.shape[0] != inputs.shape[1]:
                raise InputError(f"A precomputed kernel matrix is square; X has shape {list(inputs.shape)}.")
            gram = inputs
        else:
            # Distances from the centre lose fewer digits; only the rbf kernel does not notice the shift.
            self._center = inputs.mean(0) if self.kernel == "rbf" else torch.zeros_like(inputs[0])
            self._train = inputs - self._center
            gram = self._kernel_between(self._train, self._train)
        return gram if isinstance(self.kernel, str) and self.kernel != "precomputed" else _symmetric(gram)

    def _cross(self, values: Array, name: str) -> Tensor:
        """Return the kernel `[m, n]` between new points and the training points."""
        inputs = self._matrix(values, name)
        columns = self._require_basis().examples if self.kernel == "precomputed" else self._train.shape[1]
        if inputs.shape[1] != columns:
            meaning = "kernel rows against the training examples" if self.kernel == "precomputed" else "inputs"
            raise InputError(f"{name} must have {columns} columns ({meaning}); it has {inputs.shape[1]}.")
        return inputs if self.kernel == "precomputed" else self._kernel_between(inputs - self._center, self._train)

    def _kernel_between(self, left: Tensor, right: Tensor) -> Tensor:
        gamma = 1.0 / right.shape[1] if self.gamma is None else self.gamma
        if self.kernel == "linear":
            return left @ right.T
        if self.kernel == "polynomial":
            return (gamma * (left @ right.T) + self.coef0) ** self.degree
        if self.kernel == "rbf":
            # ||x||^2 + ||x'||^2 - 2 <x, x'>, in place: this is the one n x n array besides the decomposition.
            squared = torch.addmm(right.square().sum(1), left, right.T, alpha=-2.0).add_(left.square().sum(1)[:, None])
            if left is right:
                squared.fill_diagonal_(0.0)
            return squared.clamp_(min=0.0).mul_(-gamma).exp_()
        assert callable(self.kernel)
        matrix = torch.as_tensor(self.kernel(left, right)).to(self.dtype)
        if matrix.shape != (len(left), len(right)) or not bool(torch.isfinite(matrix).all()):
            raise InputError(
                f"The kernel function must return finite values of shape [{len(left)}, {len(right)}]; "
                f"it returned {list(matrix.shape)}."
            )
        return matrix


class _Eigenbasis:
    """Coordinates in which the kernel matrix is diagonal: `K = V diag(d) V^T`, smallest eigenvalue first."""

    def __init__(self, ridge: float, values: Tensor, vectors: Tensor, labels: Tensor) -> None:
        self.ridge = ridge
        self.values = values
        self.vectors = vectors
        self.labels = labels  # c = V^T y, [n, outputs]

    @classmethod
    def of(cls, gram: Tensor, labels: Tensor, ridge: float) -> _Eigenbasis:
        """Decompose `gram`, which is overwritten."""
        values, vectors = _eigh(gram)
        basis = cls(ridge, values.clamp(min=0.0), vectors, vectors.T @ labels)
        if float(values[0]) < -10 * basis.rounding():
            raise InputError(
                f"The kernel matrix is not positive semi-definite: its smallest eigenvalue is {float(values[0]):.3g}. "
                "Use a valid kernel, or add a constant to the diagonal."
            )
        if ridge == 0 and basis.is_singular():
            raise _singular()
        return basis

    def rounding(self) -> float:
        """Return the size below which an eigenvalue is rounding."""
        return len(self.values) * torch.finfo(self.values.dtype).eps * float(self.values[-1])

    def is_singular(self) -> bool:
        return float(self.values[0]) <= self.rounding()

    @property
    def examples(self) -> int:
        return len(self.values)

    def solve(self, target: Tensor) -> Tensor:
        return target / (self.values + self.ridge)[:, None]

    def apply(self, dual: Tensor, target: Tensor) -> Tensor:
        return self.values[:, None] * dual

    def features(self, cross: Tensor) -> Tensor:
        return cross @ self.vectors

    def decode(self, coordinates: Tensor) -> Tensor:
        return self.vectors @ coordinates

    def fitted(self, dual: Tensor) -> Tensor:
        return self.vectors @ (self.values[:, None] * dual)

    def state(self) -> dict[str, Tensor]:
        return {"values": self.values, "vectors": self.vectors, "labels": self.labels}


class _Factored:
    """The examples' own coordinates, with `K + ridge I = L L^T`."""

    def __init__(self, ridge: float, gram: Tensor, factor: Tensor, labels: Tensor) -> None:
        self.ridge = ridge
        self.gram = gram
        self.factor = factor
        self.labels = labels

    @classmethod
    def of(cls, gram: Tensor, labels: Tensor, ridge: float) -> _Factored:
        shifted = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if bool(failed) and ridge == 0:
            raise _singular()
        if bool(failed):
            raise InputError(
                "The kernel matrix plus the ridge is not positive definite. Use a valid kernel or a larger ridge."
            )
        return cls(ridge, gram, factor, labels)

    @property
    def examples(self) -> int:
        return len(self.gram)

    def solve(self, target: Tensor) -> Tensor:
        return torch.cholesky_solve(target, self.factor)

    def apply(self, dual: Tensor, target: Tensor) -> Tensor:
        return target - self.ridge * dual  # K a, because (K + ridge I) a = target

    def features(self, cross: Tensor) -> Tensor:
        return cross

    def decode(self, coordinates: Tensor) -> Tensor:
        return coordinates

    def fitted(self, dual: Tensor) -> Tensor:
        return self.gram @ dual

    def state(self) -> dict[str, Tensor]:
        return {"gram": self.gram, "factor": self.factor, "labels": self.labels}


_Basis = _Eigenbasis | _Factored
_KERNELS = ("rbf", "linear", "polynomial", "precomputed")
_STATE = (
    "version", "settings", "train", "center", "basis", "flat", "step", "alphas", "raw_alphas", "flags", "held",
    "validation_errors",
)  # fmt: skip


def _schedule(alpha: Share, steps: int | None, extrapolate: bool) -> tuple[Callable[[int], float] | None, int, float]:
    """Return the share of each step as a function (None: to be found), the number of steps, and the share that goes on
    where only one step is asked for.
    """
    if steps is not None:
        _check_steps(steps)
    if isinstance(alpha, str):
        if alpha != "optimal":
            raise InputError(f"alpha must be a number, a sequence, a function of the step or 'optimal'; got {alpha!r}.")
        return None, steps or 10, 1.0
    if callable(alpha):
        return (lambda step: _check_share(float(alpha(step)), f"alpha({step})", extrapolate)), steps or 10, 1.0
    if isinstance(alpha, Iterable):
        shares = [_check_share(float(value), f"alpha[{i}]", extrapolate) for i, value in enumerate(alpha)]
        if not shares or (steps is not None and steps != len(shares) + 1):
            raise InputError(
                f"A sequence of shares holds one for each of the steps 2, 3, ...: {len(shares)} values make "
                f"{len(shares) + 1} steps, and steps is {steps}."
            )
        return (lambda step: shares[step - 2]), len(shares) + 1, 1.0
    share = _check_share(float(alpha), "alpha", extrapolate)
    return (lambda step: share), steps or 10, share


def _check_share(value: float, name: str, extrapolate: bool = False) -> float:
    if not math.isfinite(value) or not (extrapolate or 0 <= value <= 1):
        raise InputError(
            f"{name} is the share of labels in the target and lies in [0, 1]; got {value:g}. "
            "Only fit(..., extrapolate=True) lets it leave."
        )
    return value


def _check_steps(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"Steps are counted from 1, the plain fit; got {steps!r}.")


def _powers(base: Tensor, count: int) -> Tensor:
    """Return `base^0, ..., base^(count-1)` as rows, by doubling: `log2(count)` products instead of a power each."""
    powers = torch.ones((count, len(base)), dtype=base.dtype, device=base.device)
    done, factor = 1, base
    while done < count:
        more = min(done, count - done)
        torch.mul(powers[:more], factor, out=powers[done : done + more])
        done, factor = done + more, factor * factor
    return powers


def _symmetric(gram: Tensor) -> Tensor:
    gap = float((gram - gram.T).abs().max())
    if gap > 1e3 * torch.finfo(gram.dtype).eps * float(gram.abs().max()):
        raise InputError(
            f"The kernel matrix must be symmetric; entries differ from their mirror images by up to {gap:.3g}."
        )
    return (gram + gram.T) / 2


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, smallest first, and eigenvectors as columns; `gram` is given up."""
    if gram.device.type != "cpu":
        values, vectors = torch.linalg.eigh(gram)
        return values, vectors
    # SciPy works in place, and on one thread is a fifth faster than torch.linalg.eigh at n = 1000 (equal on two).
    from scipy.linalg import eigh

    found = eigh(gram.numpy().T, driver="evd", overwrite_a=True, check_finite=False)
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


def _singular() -> InputError:
    return InputError("The kernel matrix is singular, so ridge = 0 has no unique fit; use a ridge > 0.")


def _ridge_of_freedom(values: Tensor, freedom: float) -> float:
    """Return `e` with `sum d/(d + e) = freedom`, by bisection on its logarithm."""
    if freedom >= len(values):
        return 0.0
    if freedom <= 0:
        return math.inf
    # The sum lies between n d_min/(d_min + e) and n d_max/(d_max + e), which brackets e.
    excess = len(values) / freedom - 1
    low, high = math.log(float(values.min()) * excess), math.log(float(values.max()) * excess)
    for _ in range(100):
        middle = (low + high) / 2
        if float((values / (values + math.exp(middle))).sum()) > freedom:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)
