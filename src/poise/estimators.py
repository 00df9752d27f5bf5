"""scikit-learn estimators: a formula as something that pipelines and searches can fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor, nn

from poise.errors import IncompatibleError, InputError
from poise.formula import parse
from poise.solving import minimize
from poise.structure import composite_of

Model = Callable[[int, int], nn.Module]


class _PoiseEstimator(BaseEstimator):
    """What both estimators share."""

    formula: str

    def __init__(
        self,
        formula: str,
        model: str | Model = "linear",
        fit_intercept: bool = True,
        solver: str | None = None,
        tol: float = 1e-8,
        max_iter: int | None = None,
        lr: float | None = None,
        epochs: int = 100,
        batch_size: int = 64,
        random_state: int | None = 0,
    ) -> None:
        self.formula = formula
        self.model = model
        self.fit_intercept = fit_intercept
        self.solver = solver
        self.tol = tol
        self.max_iter = max_iter
        self.lr = lr
        self.epochs = epochs
        self.batch_size = batch_size
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = self.model == "linear"
        return tags

    def _checked(self, x: Any, y: Any, **options: Any) -> tuple[Any, Any]:
        checked: tuple[Any, Any] = validate_data(
            self, x, y, accept_sparse="csc" if self.model == "linear" else False, dtype=np.float64, **options
        )
        return checked

    def _learn(self, x: Any, y: Tensor, outputs: int, classes: int | None, sample_weight: Any) -> None:
        """Solve where the formula is that of a linear model, else train."""
        weights = (
            None
            if sample_weight is None
            else _check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True)
        )
        if weights is not None and not weights.sum() > 0:
            raise ValueError("All sample weights are zero: there is nothing to learn from.")
        if self.model == "linear":
            try:
                problem = composite_of(parse(self.formula), x, y, self.fit_intercept, weights, classes)
            except IncompatibleError as reason:
                if hasattr(x, "tocsc"):
                    raise
                self.reason_ = str(reason)
            else:
                found = minimize(problem, solver=self.solver, tol=self.tol, iterations=self.max_iter)
                self.certificate_, self.reason_ = found.certificate, found.reason
                self.n_iter_ = max(found.certificate.iterations, 1)
                self.coef_, self.intercept_ = found.coef.numpy(), found.intercept.numpy()
                return
        self._train(x, y, outputs, weights)

    def _train(self, x: Any, y: Tensor, outputs: int, weights: Any) -> None:
        from poise.training import fit

        torch.manual_seed(0 if self.random_state is None else self.random_state)
        data: dict[str, Any] = {
            "input": torch.from_numpy(np.asarray(x)).float(),
            "target": y.float() if y.is_floating_point() else y,
        }
        if weights is not None:
            data["sample_weight"] = torch.from_numpy(weights).float()
        run = fit(
            self._build(x.shape[1], outputs), parse(self.formula), data, solver=self.solver or "adamw", epochs=self.epochs,
            batch_size=self.batch_size, seed=self.random_state or 0, readout=self._readout(), lr=self.lr,
        )  # fmt: skip
        self.model_ = run.model.eval()
        self.n_iter_ = self.epochs

    def _build(self, inputs: int, outputs: int) -> nn.Module:
        if self.model == "linear":
            return nn.Linear(inputs, outputs, bias=self.fit_intercept)
        if self.model == "mlp":
            return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, outputs))
        if not callable(self.model):
            raise InputError(
                f"model is 'linear', 'mlp' or a function of inputs and outputs that makes a module, and it is {self.model!r}."
            )
        return self.model(inputs, outputs)

    def _readout(self) -> Any:
        raise NotImplementedError

    def _output(self, x: Any) -> Any:
        """Return what the model puts out, [n] or [n, outputs]."""
        check_is_fitted(self)
        x = validate_data(
            self, x, reset=False, accept_sparse="csr" if hasattr(self, "coef_") else False, dtype=np.float64
        )
        if hasattr(self, "coef_"):
            return np.asarray(x @ self.coef_.T) + self.intercept_
        with torch.no_grad():
            return self.model_(torch.from_numpy(x).float()).double().numpy()


class PoiseClassifier(ClassifierMixin, _PoiseEstimator):
    """A formula as a scikit-learn classifier.

    A linear model whose formula is one fit and penalties is minimised to a certificate (`poise.solve`); everything else is trained
    (`poise.fit`). Inputs are taken as they are: put a scaler before it.

    Args:
        formula: the objective, such as `"cross_entropy + 0.01*l1"`.
        model: "linear", "mlp" (64 hidden units), or a function `(inputs, outputs) -> nn.Module`.
        fit_intercept: whether a linear model has one.
        solver: by name; chosen where it is None.
        tol, max_iter: of the certificate.
        lr, epochs, batch_size: of training.
        random_state: of training.

    Attributes:
        classes_: labels, in order.
        coef_, intercept_: of a solved linear model; two classes have one row.
        certificate_: of a solved one. reason_: why this way was taken.
        model_: of a trained one.

    >>> from sklearn.datasets import load_iris
    >>> x, y = load_iris(return_X_y=True)
    >>> PoiseClassifier("cross_entropy + 0.01*l2").fit(x, y).score(x, y) > 0.95
    True
    """

    def __init__(
        self,
        formula: str = "cross_entropy + 0.01*l2",
        model: str | Model = "linear",
        fit_intercept: bool = True,
        solver: str | None = None,
        tol: float = 1e-8,
        max_iter: int | None = None,
        lr: float | None = None,
        epochs: int = 100,
        batch_size: int = 64,
        random_state: int | None = 0,
    ) -> None:
        super().__init__(formula, model, fit_intercept, solver, tol, max_iter, lr, epochs, batch_size, random_state)

    def fit(self, x: Any, y: Any, sample_weight: Any = None) -> PoiseClassifier:
        """Learn from examples [n, inputs] and labels [n]."""
        x, y = self._checked(x, y)
        check_classification_targets(y)
        self.classes_, index = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"A classifier needs two classes, and all labels are of one class: {self.classes_[0]!r}.")
        self._learn(x, torch.from_numpy(index), len(self.classes_), len(self.classes_), sample_weight)
        return self

    def _readout(self) -> Any:
        from poise.readouts import Classification

        return Classification()

    def decision_function(self, x: Any) -> Any:
        """Return logits: [n] where there are two classes, of the second against the first, else [n, classes]."""
        z = self._output(x)
        return z[:, 1] - z[:, 0] if z.ndim > 1 and z.shape[1] == 2 else z

    def predict_proba(self, x: Any) -> Any:
        """Return class probabilities, [n, classes]."""
        z = torch.from_numpy(np.asarray(self.decision_function(x)))
        logits = torch.stack([torch.zeros_like(z), z], 1) if z.ndim == 1 else z
        return logits.softmax(1).numpy()

    def predict(self, x: Any) -> Any:
        """Return the likeliest labels, [n]."""
        z = self.decision_function(x)
        return self.classes_[(z > 0).astype(int) if z.ndim == 1 else z.argmax(1)]


class PoiseRegressor(RegressorMixin, _PoiseEstimator):
    """A formula as a scikit-learn regressor; see `PoiseClassifier`.

    Args:
        formula: the objective, such as `"least_squares + 0.1*l1"`.

    >>> from sklearn.datasets import load_diabetes
    >>> x, y = load_diabetes(return_X_y=True)
    >>> PoiseRegressor("least_squares + 0.01*l1").fit(x, y).score(x, y) > 0.5
    True
    """

    def __init__(
        self,
        formula: str = "least_squares + 0.01*l2",
        model: str | Model = "linear",
        fit_intercept: bool = True,
        solver: str | None = None,
        tol: float = 1e-8,
        max_iter: int | None = None,
        lr: float | None = None,
        epochs: int = 100,
        batch_size: int = 64,
        random_state: int | None = 0,
    ) -> None:
        super().__init__(formula, model, fit_intercept, solver, tol, max_iter, lr, epochs, batch_size, random_state)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, x: Any, y: Any, sample_weight: Any = None) -> PoiseRegressor:
        """Learn from examples [n, inputs] and targets [n] or [n, outputs]."""
        x, y = self._checked(x, y, multi_output=True, y_numeric=True)
        target = torch.from_numpy(np.ascontiguousarray(y, dtype=np.float64))
        self._learn(x, target, 1 if target.ndim == 1 else target.shape[1], None, sample_weight)
        return self

    def _readout(self) -> Any:
        from poise.readouts import Regression

        return Regression()

    def predict(self, x: Any) -> Any:
        """Return predictions, [n] or [n, outputs]."""
        z = self._output(x)
        return z[:, 0] if hasattr(self, "model_") and z.ndim > 1 and z.shape[1] == 1 else z
