"""The estimators are scikit-learn's: its own checks, pipelines, searches, and agreement with `poise.solve`."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import poise
from poise import PoiseClassifier, PoiseRegressor
from poise.errors import InputError


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "estimator", [PoiseClassifier(), PoiseRegressor(), PoiseRegressor("least_squares + 0.01*l1")], ids=str
)
def test_it_passes_the_checks_of_scikit_learn(estimator):
    check_estimator(estimator)


def test_a_pipeline_searches_the_weight():
    x, y = load_breast_cancer(return_X_y=True)
    pipe = make_pipeline(StandardScaler(), PoiseClassifier())
    grid = {"poiseclassifier__formula": [f"cross_entropy + {w}*l1" for w in (0.3, 0.01)]}
    search = GridSearchCV(pipe, grid, cv=3).fit(x, y)
    assert search.best_params_["poiseclassifier__formula"] == "cross_entropy + 0.01*l1"
    assert search.best_score_ > 0.95
    best = search.best_estimator_[-1]
    assert best.certificate_.converged
    assert 0 < (best.coef_ != 0).sum() < 30


def test_it_is_what_solve_finds():
    x, y = load_diabetes(return_X_y=True)
    found = poise.solve("least_squares + 0.5*l1", (x, y))
    fitted = PoiseRegressor("least_squares + 0.5*l1").fit(x, y)
    np.testing.assert_array_equal(fitted.coef_, found.coef)
    np.testing.assert_allclose(fitted.predict(x), found.predict(x))


def test_sparse_inputs_are_taken():
    x, y = load_breast_cancer(return_X_y=True)
    x = x / x.max(0)
    dense = PoiseClassifier("cross_entropy + 0.01*l1").fit(x, y)
    sparse = PoiseClassifier("cross_entropy + 0.01*l1").fit(scipy.sparse.csr_matrix(x), y)
    np.testing.assert_allclose(dense.predict_proba(x), sparse.predict_proba(scipy.sparse.csr_matrix(x)), atol=1e-3)


@pytest.mark.parametrize(
    "model", ["mlp", "linear", lambda inputs, outputs: __import__("torch").nn.Linear(inputs, outputs)]
)
def test_what_cannot_be_solved_is_trained(model):
    x, y = load_iris(return_X_y=True)
    labels = np.array(["a", "b", "c"])[y]
    fitted = PoiseClassifier("focal + 0.001*l2", model=model, epochs=60, lr=0.02).fit(x, labels)
    assert fitted.score(x, labels) > 0.9
    assert fitted.predict_proba(x).shape == (150, 3)
    again = PoiseClassifier("focal + 0.001*l2", model=model, epochs=60, lr=0.02).fit(x, labels)
    np.testing.assert_array_equal(fitted.predict_proba(x), again.predict_proba(x))


def test_a_trained_regressor_predicts_one_number():
    x, y = load_diabetes(return_X_y=True)
    y = (y - y.mean()) / y.std()
    fitted = PoiseRegressor("absolute_error + 0.001*l2", epochs=100, lr=0.05).fit(StandardScaler().fit_transform(x), y)
    assert "absolute_error" in fitted.reason_
    assert fitted.predict(StandardScaler().fit_transform(x)).shape == y.shape
    assert fitted.score(StandardScaler().fit_transform(x), y) > 0.4


def test_a_model_that_is_none_is_refused():
    with pytest.raises(InputError, match="'linear', 'mlp' or a function"):
        PoiseClassifier(model="tree").fit(*load_iris(return_X_y=True))
