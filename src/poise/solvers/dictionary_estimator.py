"""Supervised dictionary learning as a scikit-learn estimator.

SupervisedDictionary(n_components=5, xi=0.1).fit(X, y, covariates=Z).predict(X_new, covariates=Z_new)
pareto_over_xi(SupervisedDictionary(5), X, y, X_new, y_new)         what each unit of reconstruction costs in accuracy
dictionary_baselines(5)                                                        logistic regression, with and without a factorisation first
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin, clone
from sklearn.metrics import roc_curve
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    _check_sample_weight,
    check_array,
    check_is_fitted,
    check_random_state,
    validate_data,
)
from torch import Tensor

from poise.errors import InputError, PoiseWarning
from poise.pareto_fronts import nondominated
from poise.problem import Certificate
from poise.solvers.dictionary import LowRankProjectedGradient, LowRankSolution
from poise.solvers.dictionary_blocks import BlockCoordinateDescent, FactorPenalty
from poise.solvers.dictionary_coder import Coder
from poise.solvers.dictionary_data import DataMatrix
from poise.solvers.dictionary_objective import Factors, GlobalBound, SupervisedFactors
from poise.solvers.low_rank import LowRank
from poise.solvers.stacked_matrix import Point

__all__ = ["OptimalityReport", "ParetoPoint", "SupervisedDictionary", "dictionary_baselines", "pareto_over_xi"]

METHODS = ("filter", "naive", "alternating", "exhaustive")


@dataclass(frozen=True)
class OptimalityReport:
    """What speaks for a solution being the best one.

    Attributes:
        certificate: of the solver.
        starts: the objective from every start, the kept one first.
        spread: their largest relative difference.
        gap: `(s_r - s_{r+1}) / s_r` of the matrix before the last truncation; near 0 the projection is not unique. None for blocks.
        bound: a lower bound over all matrices of this rank, where there is one.
    """

    certificate: Certificate
    starts: tuple[float, ...]
    spread: float
    gap: float | None
    bound: GlobalBound | None


class SupervisedDictionary(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClassifierMixin, BaseEstimator):
    """One dictionary that reconstructs features and predicts labels, with covariates that enter the classifier alone.

        min  sum_s w_s l(y_s, a_s) + xi |X - W H|^2 + nu/2 (|A|^2 + |Gamma|^2)
        filter   a_s = beta' W' x_s + Gamma' z_s,   A = W beta        feature   a_s = beta' h_s + Gamma' z_s,   A = beta' H

    Sums run over samples, as in scikit-learn's `C = 1 / nu`.

    Args:
        n_components: r, columns of the dictionary.
        variant: "filter" classifies by `W' x`; "feature" by codes, which new samples must be given first.
        solver: "lpgd" (lifted, low rank) or "bcd" (blocks). Constraints and penalties on single factors need blocks: "lpgd" then
            changes to them and says so.
        xi: weight of the reconstruction; "noise" sets it to `1 / (2 variance of the noise)`, by maximum likelihood.
        nu: weight of the squares.
        reconstruction_error: `|X - W H| / |X|` to reach at most; xi is then found, as the price of this constraint.
        scale, step: of `SupervisedFactors` and `LowRankProjectedGradient`.
        center, standardize: of the features; "auto" centres unless the data are sparse or a factor must not be negative.
        fit_intercept: a covariate of ones.
        nonneg: W and H (or both with True) without negative entries.
        l1, l2: penalties of W, H and beta.
        class_weight: None, "balanced" or a dictionary; multiplies the classification loss alone.
        prediction: "filter", "naive", "alternating", "exhaustive", or "auto": "filter" for that variant and "naive" for the other.
        threshold: None for 1/2, "youden" for the training data's largest sensitivity + specificity, or a number; two classes only.
        radius_decay: of the blocks' radius: None, 0.5 or 1.
        n_starts: how often to start: once from the better of the data's decomposition and the unbound classifier, or from both and
            then at random.
        tol, max_iter: of the solver.
        random_state: of random starts.

    Attributes:
        components_: [r, p], `W'`. codes_: [n, r]. coef_: [kappa, r]. covariate_coef_: [kappa, q]. intercept_: [kappa].
        objective_: at the end; `objective_path_` on the way. reconstruction_error_, xi_, threshold_, n_iter_: what was reached and used.
        classes_: labels, in order.
        optimality_: `OptimalityReport`.

    A sample weight counts a sample that often, in both losses. NaN is a missing entry; with "filter" the classifier reads the mean there.

    Example:
        >>> from sklearn.datasets import load_breast_cancer
        >>> X, y = load_breast_cancer(return_X_y=True)
        >>> model = SupervisedDictionary(3, xi=0.01, standardize=True).fit(X, y)
        >>> bool(model.score(X, y) > 0.95)
        True

    Source: arXiv:2206.06774.
    """

    def __init__(
        self,
        n_components: int = 2,
        *,
        variant: str = "filter",
        solver: str = "lpgd",
        xi: float | str = 1.0,
        nu: float = 0.1,
        reconstruction_error: float | None = None,
        scale: str | None = "auto",
        step: str | float = "auto",
        center: bool | str = "auto",
        standardize: bool = False,
        fit_intercept: bool = True,
        nonneg: bool | tuple[bool, bool] = False,
        l1: tuple[float, float, float] = (0.0, 0.0, 0.0),
        l2: tuple[float, float, float] = (0.0, 0.0, 0.0),
        class_weight: Any = None,
        prediction: str = "auto",
        threshold: float | str | None = None,
        radius_decay: float | None = None,
        n_starts: int = 1,
        tol: float = 1e-6,
        max_iter: int = 500,
        random_state: Any = None,
    ) -> None:
        self.n_components = n_components
        self.variant = variant
        self.solver = solver
        self.xi = xi
        self.nu = nu
        self.reconstruction_error = reconstruction_error
        self.scale = scale
        self.step = step
        self.center = center
        self.standardize = standardize
        self.fit_intercept = fit_intercept
        self.nonneg = nonneg
        self.l1 = l1
        self.l2 = l2
        self.class_weight = class_weight
        self.prediction = prediction
        self.threshold = threshold
        self.radius_decay = radius_decay
        self.n_starts = n_starts
        self.tol = tol
        self.max_iter = max_iter
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.allow_nan = True
        return tags

    # ---- fitting -----------------------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any, covariates: Any = None, sample_weight: Any = None) -> SupervisedDictionary:
        """Fit dictionary, codes and classifier.

        Args:
            X: [n, p] numbers or a SciPy sparse matrix; NaN is missing (dense only).
            y: [n] labels.
            covariates: [n, q] for the classifier alone, or None.
            sample_weight: [n], or None.

        Raises:
            InputError: the rank is too large, there is one class only, the data do not fit the constraints, or an argument is wrong.
        """
        self._check()
        X, y = validate_data(
            self, X, y, accept_sparse=("csr", "csc"), dtype=[np.float64, np.float32], ensure_all_finite="allow-nan", order=None
        )  # fmt: skip
        check_classification_targets(y)
        weights = _check_sample_weight(sample_weight, X, dtype=X.dtype, ensure_non_negative=True)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise InputError(
                f"SupervisedDictionary: y has 1 class only, {self.classes_[0]!r}; a classifier needs two at least."
            )
        z = self._covariates(covariates, X, fitting=True)
        every = X
        kept = weights > 0
        if not kept.all():
            X, labels, weights, z = X[kept], labels[kept], weights[kept], z[kept]
        self._check_rank(X)
        matrix = self._matrix(X, torch.from_numpy(weights))
        arguments = {
            "y": torch.from_numpy(labels.astype(np.int64)), "nu": float(self.nu), "variant": self.variant, "scale": self.scale,
            "covariates": torch.from_numpy(z.T.copy()), "weights": torch.from_numpy(weights * self._class_weights(labels, weights)),
        }  # fmt: skip
        found = self._searched(matrix, arguments)
        self._keep(found, every, X, kept, z)
        self._choose_threshold(X, labels, z, weights)
        return self

    def _check(self) -> None:
        choices: list[tuple[str, Any, tuple[Any, ...]]] = [
            ("variant", self.variant, ("filter", "feature")),
            ("solver", self.solver, ("lpgd", "bcd")),
            ("prediction", self.prediction, ("auto", *METHODS)),
            ("center", self.center, ("auto", True, False)),
            ("scale", self.scale, ("auto", None)),
        ]
        for name, value, known in choices:
            if value not in known:
                raise InputError(f"SupervisedDictionary: {name} is one of {known}, and it is {value!r}.")
        method = self._method()
        if (method == "filter") != (self.variant == "filter"):
            raise InputError(
                f"SupervisedDictionary: the {self.variant} variant does not predict by {self.prediction!r}. "
                "Use 'filter' for the filter variant, 'naive', 'alternating' or 'exhaustive' for the feature variant."
            )
        if isinstance(self.xi, str) and self.xi != "noise":
            raise InputError(f"SupervisedDictionary: xi is a number or 'noise', and it is {self.xi!r}.")
        error = self.reconstruction_error
        if error is not None and not 0 < error < 1:
            raise InputError(f"SupervisedDictionary: reconstruction_error lies between 0 and 1, and it is {error}.")
        if isinstance(self.threshold, str) and self.threshold != "youden":
            raise InputError(
                f"SupervisedDictionary: threshold is None, 'youden' or a number, and it is {self.threshold!r}."
            )
        if not (isinstance(self.n_starts, int) and self.n_starts >= 1):
            raise InputError(
                f"SupervisedDictionary: n_starts is an integer of at least 1, and it is {self.n_starts!r}."
            )

    def _check_rank(self, X: Any) -> None:
        n, p = X.shape
        r, kappa = self.n_components, len(self.classes_) - 1
        blocks = self._penalised() or self.solver == "bcd"
        most = min(p, n) if blocks else min(p, n + kappa) if self.variant == "filter" else min(p + kappa, n)
        if isinstance(r, bool) or not isinstance(r, (int, np.integer)) or not 1 <= r <= most:
            raise InputError(
                f"SupervisedDictionary: n_components is an integer from 1 to {most} for n_samples = {n}, n_features = {p} "
                f"and {kappa + 1} classes in the {self.variant} variant, and it is {r!r}."
            )

    def _covariates(self, covariates: Any, X: Any, fitting: bool = False) -> Any:
        n = X.shape[0]
        z = (
            np.zeros((n, 0), X.dtype)
            if covariates is None
            else check_array(covariates, dtype=X.dtype, ensure_min_features=0)
        )
        if len(z) != n:
            raise InputError(
                f"SupervisedDictionary: X has {n} samples and covariates {len(z)}; they need one row for each sample."
            )
        if fitting:
            self.n_covariates_in_ = z.shape[1]
        elif z.shape[1] != self.n_covariates_in_:
            raise InputError(
                f"SupervisedDictionary: it was fitted with {self.n_covariates_in_} covariates, and there are {z.shape[1]}. "
                "Give predict the same columns as fit."
            )
        return np.concatenate([np.ones((n, int(self.fit_intercept)), X.dtype), z], 1)

    def _penalties(self) -> tuple[FactorPenalty, FactorPenalty, FactorPenalty]:
        w, h = (self.nonneg, self.nonneg) if isinstance(self.nonneg, bool) else self.nonneg
        if len(self.l1) != 3 or len(self.l2) != 3:
            raise InputError(
                f"SupervisedDictionary: l1 and l2 are for W, H and beta, three numbers, and they are {self.l1} and {self.l2}."
            )
        found = [FactorPenalty(a, b, bool(c)) for a, b, c in zip(self.l1, self.l2, (w, h, False), strict=True)]
        return found[0], found[1], found[2]

    def _penalised(self) -> bool:
        return any(p.acts for p in self._penalties())

    def _matrix(self, X: Any, weights: Tensor) -> DataMatrix:
        """Centre and scale by products; keep what predictions need."""
        is_sparse, p = _is_sparse(X), X.shape[1]
        held = self._penalties()[:2]
        center = self.center is True or (
            self.center == "auto" and not is_sparse and not any(h.nonnegative for h in held)
        )
        self.mean_ = self.scale_ = None
        if center or self.standardize:
            mean, variance = _moments(X, weights.numpy())
            if np.isnan(mean).any():
                raise InputError(
                    f"SupervisedDictionary: feature {int(np.isnan(mean).argmax())} is missing in every sample; drop it."
                )
            self.mean_ = mean.astype(X.dtype) if center else None
            if self.standardize:
                deviation = np.sqrt(variance)
                # A feature that does not vary has nothing to scale.
                self.scale_ = (
                    1.0 / np.where(deviation > 1e-12 * max(1.0, float(np.abs(mean).max())), deviation, 1.0)
                ).astype(X.dtype)
        root = None if bool((weights == 1).all()) else weights.sqrt()
        assert p == X.shape[1]
        return self._seen(X, root)

    def _seen(self, X: Any, root: Tensor | None = None) -> DataMatrix:
        raw = X.T if _is_sparse(X) else torch.from_numpy(_writable(X)).mT
        mean, scale = (None if v is None else torch.from_numpy(v) for v in (self.mean_, self.scale_))
        return DataMatrix(raw, mean, scale, root)

    def _class_weights(self, labels: Any, weights: Any) -> Any:
        k = len(self.classes_)
        if self.class_weight is None:
            return np.ones_like(weights)
        if isinstance(self.class_weight, str) and self.class_weight == "balanced":
            mass = np.bincount(labels, weights, minlength=k)
            each = weights.sum() / (k * np.maximum(mass, 1e-300))
        elif isinstance(self.class_weight, dict):
            each = np.array([self.class_weight.get(c, 1.0) for c in self.classes_], dtype=np.float64)
        else:
            raise InputError(
                f"SupervisedDictionary: class_weight is None, 'balanced' or a dictionary, and it is {self.class_weight!r}."
            )
        return each[labels].astype(weights.dtype)

    # ---- how xi is set -----------------------------------------------------------------------------------------------

    def _searched(self, matrix: DataMatrix, arguments: dict[str, Any]) -> _Fit:
        if self.reconstruction_error is not None:
            return self._constrained(matrix, arguments, float(self.reconstruction_error))
        if self.xi == "noise":
            return self._by_noise(matrix, arguments)
        return self._solved(matrix, arguments, float(self.xi))

    def _by_noise(self, matrix: DataMatrix, arguments: dict[str, Any]) -> _Fit:
        """`xi <- 1 / (2 v)` with `v = |X - W H|^2 / (p n)`, until it stays."""
        p, n = matrix.shape
        xi = 1.0
        for _ in range(50):
            found = self._solved(matrix, arguments, xi, quiet=True)
            squares = float(found.objective.parts(found.point)[1])
            after = p * n / (2 * max(squares, 1e-12 * float(matrix.squared_norm())))
            if abs(after - xi) <= 1e-3 * xi:
                break
            xi = after
        return self._solved(matrix, arguments, xi, start=found.start)

    def _constrained(self, matrix: DataMatrix, arguments: dict[str, Any], error: float) -> _Fit:
        """Bisect the price of reconstruction, which falls with it, until the constraint holds with at most one percent to spare."""
        low, high, best = 0.0, 1.0, None
        for _ in range(40):
            best = self._solved(matrix, arguments, high, start=None if best is None else best.start, quiet=True)
            if best.error <= error:
                break
            low, high = high, 4 * high
            if high > 1e9 * max(1.0, arguments["weights"].max().item()):
                raise InputError(
                    f"SupervisedDictionary: {self.n_components} components reach a relative reconstruction error of {best.error:.4g} "
                    f"at best, and {error:.4g} was asked for. Take more components, or allow more error."
                )
        for _ in range(60):
            assert best is not None
            if error - best.error <= 0.01 * error or (high - low) <= 1e-3 * high:
                break
            middle = math.sqrt(low * high) if low > 1e-3 * high else high / 10
            if middle < 1e-8:
                break
            found = self._solved(matrix, arguments, middle, start=best.start, quiet=True)
            if found.error <= error:
                high, best = middle, found
            else:
                low = middle
        return self._solved(matrix, arguments, high)

    def _solved(
        self, matrix: DataMatrix, arguments: dict[str, Any], xi: float, start: Any = None, quiet: bool = False
    ) -> _Fit:
        with warnings.catch_warnings():
            if quiet:
                warnings.simplefilter("ignore", PoiseWarning)
            objective = SupervisedFactors(matrix, xi=xi, **arguments)
            blocks = self.solver == "bcd" or self._penalised()
            if blocks and self.solver == "lpgd":
                warnings.warn(
                    "SupervisedDictionary: constraints and penalties on single factors have no lifted form, "
                    "so the blocks of 'bcd' solve this. Say solver='bcd' to ask for them.",
                    PoiseWarning,
                    stacklevel=4,
                )
            count = 1 if quiet else self.n_starts
            return self._by_blocks(objective, start, count) if blocks else self._lifted(objective, start, count)

    def _seeds(self, count: int) -> list[int]:
        return [int(s) for s in check_random_state(self.random_state).randint(2**31 - 1, size=count)]

    @staticmethod
    def _start(i: int, count: int) -> str:
        return "auto" if count == 1 else ("svd", "classifier", "random")[min(i, 2)]

    def _lifted(self, objective: SupervisedFactors, start: Any, count: int) -> _Fit:
        solutions: list[LowRankSolution] = []
        for i, seed in enumerate(self._seeds(count)):
            solver = LowRankProjectedGradient(
                int(self.n_components), self.step, tol=self.tol, max_iter=self.max_iter, start=self._start(i, count), seed=seed
            )  # fmt: skip
            solutions.append(solver.minimize_function(objective, start if i == 0 else None))
        solutions.sort(key=lambda s: s.certificate.value)
        best = solutions[0]
        report = self._report(
            best.certificate, [s.certificate.value for s in solutions], best.gap, objective, best.point
        )
        return _Fit(objective, best.point, objective.factors(best.theta, best.point.free), report, best.point)  # type: ignore[arg-type]

    def _by_blocks(self, objective: SupervisedFactors, start: Any, count: int) -> _Fit:
        dictionary, codes, coefficients = self._penalties()
        solutions = []
        for i, seed in enumerate(self._seeds(count)):
            solver = BlockCoordinateDescent(
                int(self.n_components), dictionary=dictionary, codes=codes, coefficients=coefficients, decay=self.radius_decay,
                tol=self.tol, max_iter=self.max_iter, seed=seed,
            )  # fmt: skip
            solutions.append(solver.minimize(objective, start if i == 0 else None))
        solutions.sort(key=lambda s: s.certificate.value)
        best = solutions[0]
        f = best.factors
        h = f.codes if objective.data.root is None else f.codes * objective.data.root
        theta = LowRank(f.dictionary, torch.cat([f.coefficients, h], 1))
        if not objective.filters:
            theta = LowRank(torch.cat([f.coefficients.mT, f.dictionary]), h)
        point = Point(theta, f.covariate_coefficients)
        report = self._report(best.certificate, [s.certificate.value for s in solutions], None, objective, point)
        return _Fit(objective, point, f, report, f)

    def _report(
        self,
        certificate: Certificate,
        values: list[float],
        gap: float | None,
        objective: SupervisedFactors,
        point: Point,
    ) -> OptimalityReport:
        spread = (max(values) - min(values)) / max(abs(min(values)), 1e-300)
        bound = None if self._penalised() else objective.global_bound(point)
        return OptimalityReport(certificate, tuple(values), spread, gap, bound)

    # ---- what is kept ------------------------------------------------------------------------------------------------

    def _keep(self, found: _Fit, every: Any, X: Any, kept: Any, z: Any) -> None:
        f = found.factors
        self.components_ = _numpy(f.dictionary.mT)
        self.coef_ = _numpy(f.coefficients.mT)
        both = _numpy(f.covariate_coefficients.mT)
        ones = int(self.fit_intercept)
        self.intercept_ = both[:, 0] if ones else np.zeros(len(both), both.dtype)
        self.covariate_coef_ = both[:, ones:]
        self._n_features_out = len(self.components_)
        self.optimality_ = found.report
        self.objective_path_ = np.array(found.report.certificate.history)
        self.objective_ = found.report.certificate.value
        self.n_iter_ = max(1, found.report.certificate.iterations)
        self.xi_, self.reconstruction_error_ = found.objective.xi, found.error
        codes = _numpy(f.codes.mT)
        if not kept.all():
            whole = self._transformed(every)
            whole[kept] = codes
            codes = whole
        self.codes_ = codes

    def _choose_threshold(self, X: Any, labels: Any, z: Any, weights: Any) -> None:
        self.threshold_ = 0.5
        if self.threshold is None:
            return
        if len(self.classes_) != 2:
            raise InputError(
                f"SupervisedDictionary: a threshold is for two classes, and there are {len(self.classes_)}."
            )
        if self.threshold == "youden":
            scores = _probabilities(self._scores(X, z))[:, 1]
            false, true, thresholds = roc_curve(labels, scores, sample_weight=weights)
            best = thresholds[(true - false).argmax()]
            # Between the score that counts as positive and the next one below, so that rounding does not decide.
            below = scores[scores < best]
            self.threshold_ = float(best + (below.max() if len(below) else best)) / 2
        else:
            self.threshold_ = float(self.threshold)
        # A threshold of 0 or 1 has no finite logit.
        self.threshold_ = min(max(self.threshold_, 1e-12), 1 - 1e-12)

    # ---- new samples -------------------------------------------------------------------------------------------------

    def _method(self) -> str:
        return ("filter" if self.variant == "filter" else "naive") if self.prediction == "auto" else self.prediction

    def _coder(self) -> Coder:
        w, beta = torch.from_numpy(self.components_.T.copy()), torch.from_numpy(self.coef_.T.copy())
        return Coder(w, beta, self.xi_, float(self.nu), self._penalties()[1])

    def _checked(self, X: Any) -> Any:
        check_is_fitted(self)
        found = validate_data(
            self, X, reset=False, accept_sparse=("csr", "csc"), dtype=[np.float64, np.float32], ensure_all_finite="allow-nan"
        )  # fmt: skip
        return found.astype(self.components_.dtype, copy=False)

    def _scores(self, X: Any, z: Any, method: str | None = None) -> Any:
        method = self._method() if method is None else method
        gamma = torch.from_numpy(
            np.concatenate([self.intercept_[:, None]] * int(self.fit_intercept) + [self.covariate_coef_], 1)
        )
        offset = gamma @ torch.from_numpy(z.astype(self.components_.dtype, copy=False).T.copy())
        matrix, coder = self._seen(X), self._coder()
        if method == "filter":
            logits = coder.beta.mT @ matrix.transposed_times(coder.w).mT + offset
            return _numpy(torch.cat([torch.zeros_like(logits[:1]), logits]).mT)
        return _numpy(coder.predict(matrix, offset, method).scores.mT)

    def _transformed(self, X: Any) -> Any:
        return _numpy(self._coder().code(self._seen(X)).mT)

    def transform(self, X: Any) -> Any:
        """Return the codes that reconstruct X best, [m, r]; labels are not needed."""
        X = self._checked(X)
        return self._transformed(X)

    def inverse_transform(self, codes: Any) -> Any:
        """Return what codes [m, r] stand for, [m, p]."""
        check_is_fitted(self)
        found = np.asarray(codes) @ self.components_
        found = found if self.scale_ is None else found / self.scale_
        return found if self.mean_ is None else found + self.mean_

    def decision_function(self, X: Any, covariates: Any = None, method: str | None = None) -> Any:
        """Return logits: [m] above the threshold's for two classes, else [m, kappa + 1] with 0 for the first class.

        Args:
            X: [m, p].
            covariates: [m, q], as in `fit`.
            method: "filter", "naive", "alternating" or "exhaustive"; as the estimator says where it is None.
        """
        X = self._checked(X)
        if method is not None and (method not in METHODS or (method == "filter") != (self.variant == "filter")):
            raise InputError(f"SupervisedDictionary: the {self.variant} variant does not predict by {method!r}.")
        scores = self._scores(X, self._covariates(covariates, X), method)
        if len(self.classes_) > 2:
            return scores
        return scores[:, 1] - scores[:, 0] - math.log(self.threshold_ / (1 - self.threshold_))

    def predict_proba(self, X: Any, covariates: Any = None, method: str | None = None) -> Any:
        """Return probabilities [m, classes]; with "exhaustive" those of minus the joint losses."""
        X = self._checked(X)
        return _probabilities(self._scores(X, self._covariates(covariates, X), method))

    def predict(self, X: Any, covariates: Any = None, method: str | None = None) -> Any:
        """Return labels [m]."""
        scores = self.decision_function(X, covariates, method)
        return self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(1)]

    def score(self, X: Any, y: Any, sample_weight: Any = None, covariates: Any = None) -> float:
        """Return the accuracy."""
        hit = self.predict(X, covariates) == np.asarray(y)
        return float(np.average(hit, weights=sample_weight))

    def relative_error(self, X: Any) -> float:
        """Return `|X - W H| / |X|` of new samples, coded without labels, in the centred and scaled features."""
        X = self._checked(X)
        matrix, coder = self._seen(X), self._coder()
        codes = coder.code(matrix)
        matrix.fill(LowRank(coder.w, codes))
        cross = (matrix.transposed_times(coder.w).mT * codes).sum()
        total = float(matrix.squared_norm())
        squares = total - 2 * float(cross) + float(((coder.gram @ codes) * codes).sum())
        return math.sqrt(max(squares, 0.0) / max(total, 1e-300))


@dataclass
class _Fit:
    objective: SupervisedFactors
    point: Point
    factors: Factors
    report: OptimalityReport
    start: Any

    @property
    def error(self) -> float:
        return self.objective.relative_error(self.point)


def _is_sparse(X: Any) -> bool:
    return hasattr(X, "tocoo")


def _writable(X: Any) -> Any:
    # PyTorch warns of arrays that it could write to and must not; nothing here writes.
    return X if X.flags.writeable else X.copy()


def _moments(X: Any, weights: Any) -> tuple[Any, Any]:
    total = weights.sum(dtype=np.float64)
    if _is_sparse(X):
        mean = (X.T @ weights.astype(np.float64)) / total
        square = (X.multiply(X).T @ weights.astype(np.float64)) / total
        return mean, np.maximum(square - mean**2, 0.0)
    there = ~np.isnan(X)
    mass = weights.astype(np.float64) @ there
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = (weights.astype(np.float64) @ np.where(there, X, 0.0)) / mass
        square = (weights.astype(np.float64) @ np.where(there, (X - mean) ** 2, 0.0)) / mass
    return mean, square


def _probabilities(scores: Any) -> Any:
    shifted = np.exp(scores - scores.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def _numpy(x: Tensor) -> Any:
    return np.ascontiguousarray(x.detach().cpu().numpy())


# ---- comparison --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParetoPoint:
    """One weight of the reconstruction.

    Attributes:
        xi: the weight.
        accuracy: on the test data.
        error: relative reconstruction error of the test data.
        train_error: that of the training data.
        on_front: no other weight has both more accuracy and less error.
        price: points of accuracy given up for each point of error less, against the weight before; NaN for the first.
        model: the fitted estimator.
    """

    xi: float
    accuracy: float
    error: float
    train_error: float
    on_front: bool
    price: float
    model: SupervisedDictionary


def pareto_over_xi(
    model: SupervisedDictionary,
    X: Any,
    y: Any,
    X_test: Any,
    y_test: Any,
    *,
    grid: Sequence[float] = (0.01, 0.1, 1.0, 5.0, 10.0),
    covariates: Any = None,
    covariates_test: Any = None,
) -> list[ParetoPoint]:
    """Fit a model for each xi and say what reconstruction costs in accuracy.

    Args:
        model: an estimator; its copies are fitted.
        X, y, X_test, y_test: data.
        grid: weights, rising.
        covariates, covariates_test: as in `fit`.

    Returns:
        One point for each weight, in the order of the grid.
    """
    rows = []
    for xi in grid:
        fitted = clone(model).set_params(xi=xi).fit(X, y, covariates=covariates)
        rows.append(
            (xi, fitted.score(X_test, y_test, covariates=covariates_test), fitted.relative_error(X_test), fitted)
        )
    best = nondominated([[accuracy, -error] for _, accuracy, error, _ in rows]).tolist()
    points = []
    for i, (xi, accuracy, error, fitted) in enumerate(rows):
        saved = rows[i - 1][2] - error if i else math.nan
        price = (rows[i - 1][1] - accuracy) / saved if i and saved != 0 else math.nan
        points.append(ParetoPoint(xi, accuracy, error, fitted.reconstruction_error_, best[i], price, fitted))
    return points


def dictionary_baselines(n_components: int, random_state: int = 0) -> dict[str, Any]:
    """Return classifiers to compare with: logistic regression alone and after a factorisation that knows no labels, and naive Bayes.

    "logistic", "svd_logistic", "pca_logistic", "nmf_logistic" (data that are not negative), "naive_bayes".
    """
    from sklearn.decomposition import NMF, PCA, TruncatedSVD
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import GaussianNB
    from sklearn.pipeline import make_pipeline

    def logistic() -> Any:
        return LogisticRegression(max_iter=2000)

    return {
        "logistic": logistic(),
        "svd_logistic": make_pipeline(TruncatedSVD(n_components, random_state=random_state), logistic()),
        "pca_logistic": make_pipeline(PCA(n_components, random_state=random_state), logistic()),
        "nmf_logistic": make_pipeline(NMF(n_components, random_state=random_state, max_iter=1000), logistic()),
        "naive_bayes": GaussianNB(),
    }
