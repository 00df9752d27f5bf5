"""The scikit-learn estimator of supervised dictionary learning."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from poise.data.factor_simulators import feature_model, filter_model
from poise.errors import InputError, PoiseWarning
from poise.metrics.binary import binary_report
from poise.solvers import SupervisedDictionary, dictionary_baselines, pareto_over_xi

CRANFIELD = Path("shared/data/cranfield/documents.txt")


@pytest.fixture(autouse=True)
def _one_thread():  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# What is small enough to be solved within rounding has no tolerance to report.
@pytest.mark.filterwarnings("ignore::poise.errors.PoiseWarning")
@parametrize_with_checks([SupervisedDictionary()])
def test_it_is_a_scikit_learn_classifier(estimator, check) -> None:  # type: ignore[no-untyped-def]
    check(estimator)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::poise.errors.PoiseWarning")
@parametrize_with_checks([SupervisedDictionary(variant="feature", tol=1e-8)])
def test_the_feature_variant_is_one_too(estimator, check) -> None:  # type: ignore[no-untyped-def]
    check(estimator)


def cancer() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, y = load_breast_cancer(return_X_y=True)
    x = StandardScaler().fit_transform(x)
    return x[:, :20], x[:, 20:], y


def test_covariates_enter_the_classifier_alone() -> None:
    x, z, y = cancer()
    model = SupervisedDictionary(2, xi=0.1).fit(x, y, covariates=z)
    assert model.components_.shape == (2, 20)
    assert model.codes_.shape == (569, 2)
    assert model.coef_.shape == (1, 2)
    assert model.covariate_coef_.shape == (1, 10)
    assert model.score(x, y, covariates=z) > 0.95
    assert model.score(x, y, covariates=z) > SupervisedDictionary(2, xi=0.1).fit(x, y).score(x, y) - 0.02
    logits = (
        (x - model.mean_) @ model.components_.T @ model.coef_[0] + z @ model.covariate_coef_[0] + model.intercept_[0]
    )
    np.testing.assert_allclose(model.decision_function(x, covariates=z), logits)


def test_codes_and_components_rebuild_the_data() -> None:
    x, _, y = cancer()
    model = SupervisedDictionary(20, xi=1.0).fit(x, y)
    np.testing.assert_allclose(model.inverse_transform(model.codes_), x, atol=1e-6)
    np.testing.assert_allclose(model.transform(x), model.codes_, atol=1e-5)
    assert model.reconstruction_error_ < 1e-6
    assert model.relative_error(x) < 1e-6


def test_at_full_rank_it_is_logistic_regression() -> None:
    x, _, y = cancer()
    model = SupervisedDictionary(20, nu=2.0, center=False, tol=1e-9).fit(x, y)
    peer = LogisticRegression(C=0.5, fit_intercept=False, tol=1e-12, solver="newton-cholesky")
    peer.fit(np.concatenate([np.ones((len(x), 1)), x], 1), y)
    np.testing.assert_allclose(model.coef_ @ model.components_, peer.coef_[:, 1:], atol=1e-6)
    np.testing.assert_allclose(model.intercept_, peer.coef_[:, 0], atol=1e-6)


def test_multiclass_labels_of_any_kind() -> None:
    digits = load_digits()
    names = np.array(["zero", "one", "two", "three"])
    kept = digits.target < 4
    x, y = digits.data[kept] / 16, names[digits.target[kept]]
    model = SupervisedDictionary(3, xi=0.1).fit(x, y)
    assert model.score(x, y) > 0.97
    assert set(model.predict(x)) <= set(names)
    np.testing.assert_allclose(model.predict_proba(x).sum(1), 1.0)


def test_a_weight_counts_a_sample_that_often() -> None:
    data = filter_model(50, 8, 3, seed=0)
    x, y = data.x.numpy(), data.y.numpy()
    weights = np.random.default_rng(0).integers(0, 4, 50)
    for variant in ("filter", "feature"):
        model = SupervisedDictionary(2, variant=variant, tol=1e-7)
        one = clone(model).fit(x, y, sample_weight=weights)
        other = clone(model).fit(np.repeat(x, weights, 0), np.repeat(y, weights))
        assert one.objective_ == pytest.approx(other.objective_, rel=1e-9)
        np.testing.assert_allclose(one.predict_proba(x), other.predict_proba(x), atol=1e-5)
        np.testing.assert_allclose(one.codes_[weights > 0][:1], other.codes_[:1], atol=1e-4)


def test_class_weights_raise_the_sensitivity_of_a_rare_class() -> None:
    digits = load_digits()
    y = (digits.target == 8).astype(int)
    rows = np.concatenate([np.flatnonzero(y == 0), np.flatnonzero(y == 1)[:85]])
    x, y = digits.data[rows] / 16, y[rows]
    found = []
    for options in ({}, {"class_weight": "balanced"}, {"threshold": "youden"}, {"class_weight": {1: 19.0}}):
        model = SupervisedDictionary(4, xi=0.01, tol=1e-5, **options).fit(x, y)
        found.append(binary_report(torch.from_numpy(model.predict(x)).double(), torch.from_numpy(y)).sensitivity)
    assert min(found[1:]) > found[0] + 0.1
    assert found[3] == pytest.approx(found[1], abs=0.05)


def test_youden_moves_the_threshold_and_not_the_probabilities() -> None:
    x, z, y = cancer()
    plain, moved = (SupervisedDictionary(2, threshold=t).fit(x, y, covariates=z) for t in (None, "youden"))
    np.testing.assert_allclose(plain.predict_proba(x, covariates=z), moved.predict_proba(x, covariates=z))
    rates = [
        binary_report(torch.from_numpy(m.predict(x, covariates=z)).double(), torch.from_numpy(y))
        for m in (plain, moved)
    ]
    assert rates[1].sensitivity + rates[1].specificity >= rates[0].sensitivity + rates[0].specificity
    assert plain.threshold_ == 0.5 != moved.threshold_


def test_the_three_ways_to_predict_by_codes() -> None:
    data = feature_model(400, 12, 3, noise=1.0, seed=0)
    x, y = data.x.numpy(), data.y.numpy()
    model = SupervisedDictionary(3, variant="feature", xi=1.0).fit(x[:200], y[:200])
    for method in ("naive", "alternating", "exhaustive"):
        train, test = (
            float((model.predict(a, method=method) == b).mean()) for a, b in ((x[:200], y[:200]), (x[200:], y[200:]))
        )
        assert train > 0.8, method
        # The gap between training and new samples is that of two halves of 200, not of a code that has seen its label.
        assert abs(train - test) < 0.1, method
        np.testing.assert_allclose(model.predict_proba(x, method=method).sum(1), 1.0)
    with pytest.raises(InputError, match="does not predict by 'filter'"):
        model.predict(x, method="filter")


def test_penalties_change_to_blocks_and_say_so() -> None:
    digits = load_digits()
    kept = digits.target < 2
    x, y = digits.data[kept] / 16, digits.target[kept]
    with pytest.warns(PoiseWarning, match="blocks of 'bcd'"):
        model = SupervisedDictionary(4, nonneg=True, xi=0.1, tol=1e-2, max_iter=100).fit(x, y)
    assert model.components_.min() >= 0 <= model.codes_.min()
    assert model.mean_ is None
    assert model.score(x, y) > 0.97
    assert model.optimality_.certificate.feasible
    assert model.transform(x).min() >= 0


@pytest.mark.filterwarnings("ignore::poise.errors.PoiseWarning")
def test_several_starts_and_what_is_known_of_the_best() -> None:
    data = filter_model(80, 10, 3, seed=0)
    model = SupervisedDictionary(3, nu=30.0, n_starts=4, random_state=0).fit(data.x.numpy(), data.y.numpy())
    report = model.optimality_
    assert len(report.starts) == 4
    assert report.spread < 1e-6
    assert report.gap is not None
    assert report.bound is not None
    assert report.bound.certified
    assert report.certificate.measure == "relative norm of the gradient mapping"
    assert model.objective_ == report.starts[0] == model.objective_path_[-1]
    blocks = SupervisedDictionary(3, solver="bcd", nu=30.0, n_starts=2, random_state=0).fit(
        data.x.numpy(), data.y.numpy()
    )
    assert blocks.objective_ == pytest.approx(model.objective_, rel=1e-3)


@pytest.mark.filterwarnings("ignore::poise.errors.PoiseWarning")
def test_reconstruction_has_a_price() -> None:
    x, _, y = cancer()
    free = SupervisedDictionary(3, xi=0.001).fit(x, y)
    bound = SupervisedDictionary(3, reconstruction_error=0.55).fit(x, y)
    assert free.reconstruction_error_ > 0.55 >= bound.reconstruction_error_ >= 0.54
    assert bound.xi_ > free.xi_
    with pytest.raises(InputError, match=re.escape("at best, and 0.01 was asked for")):
        SupervisedDictionary(3, reconstruction_error=0.01).fit(x, y)


@pytest.mark.filterwarnings("ignore::poise.errors.PoiseWarning")
def test_xi_by_maximum_likelihood_is_one_over_twice_the_variance_of_the_noise() -> None:
    data = filter_model(400, 40, 3, noise=0.5, seed=0)
    model = SupervisedDictionary(3, xi="noise").fit(data.x.numpy(), data.y.numpy())
    # Three of forty directions are fitted, so the variance is a little small.
    assert model.xi_ == pytest.approx(1 / (2 * 0.25), rel=0.15)


def test_a_front_over_xi() -> None:
    x, z, y = cancer()
    points = pareto_over_xi(
        SupervisedDictionary(2), x[:300], y[:300], x[300:], y[300:], grid=(0.001, 0.1, 10.0), covariates=z[:300], covariates_test=z[300:]
    )  # fmt: skip
    assert [p.xi for p in points] == [0.001, 0.1, 10.0]
    assert points[0].train_error >= points[1].train_error >= points[2].train_error
    assert any(p.on_front for p in points)
    assert np.isnan(points[0].price)
    assert np.isfinite(points[1].price)


def test_baselines_are_classifiers() -> None:
    digits = load_digits()
    kept = digits.target < 2
    for name, model in dictionary_baselines(4).items():
        assert model.fit(digits.data[kept], digits.target[kept]).score(digits.data[kept], digits.target[kept]) > 0.9, (
            name
        )


def test_it_stands_in_pipelines_and_survives_copies() -> None:
    x, _, y = cancer()
    model = make_pipeline(StandardScaler(), SupervisedDictionary(2, xi=0.1))
    assert cross_val_score(model, x, y, cv=3).mean() > 0.9
    fitted = SupervisedDictionary(2).fit(x, y)
    for other in (copy.deepcopy(fitted), pickle.loads(pickle.dumps(fitted))):
        np.testing.assert_array_equal(other.predict_proba(x), fitted.predict_proba(x))
    single = SupervisedDictionary(2, tol=1e-3).fit(x.astype(np.float32), y)
    assert single.components_.dtype == np.float32
    assert single.objective_ == pytest.approx(fitted.objective_, rel=1e-3)


@pytest.mark.filterwarnings("ignore::poise.errors.PoiseWarning")
def test_missing_entries_are_allowed() -> None:
    x, _, y = cancer()
    holes = np.where(np.random.default_rng(0).random(x.shape) < 0.1, np.nan, x)
    before = holes.copy()
    for variant in ("filter", "feature"):
        model = SupervisedDictionary(3, variant=variant, xi=0.1, tol=1e-4).fit(holes, y)
        np.testing.assert_array_equal(holes, before)
        assert model.score(holes, y) > 0.9
        assert np.isfinite(model.transform(holes)).all()


def test_sparse_documents_are_never_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, y = cancer()
    x = np.where(np.abs(x) < 0.7, 0.0, x)
    dense = SupervisedDictionary(3, xi=0.1, center=True).fit(x, y)
    for kind in (sparse.csr_array, sparse.csc_array, sparse.coo_array, sparse.csr_matrix, sparse.csc_matrix):
        monkeypatch.setattr(kind, "toarray", lambda *_: pytest.fail("written out"))
        monkeypatch.setattr(kind, "todense", lambda *_: pytest.fail("written out"))
    thin = SupervisedDictionary(3, xi=0.1, center=True).fit(sparse.csr_matrix(x), y)
    assert thin.objective_ == pytest.approx(dense.objective_, rel=1e-8)
    np.testing.assert_allclose(thin.predict_proba(sparse.csr_matrix(x)), dense.predict_proba(x), atol=1e-5)


def test_documents_of_the_cranfield_collection() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    places = [folder / CRANFIELD for folder in (Path.cwd(), *Path.cwd().parents)]
    file = next((p for p in places if p.is_file()), None)
    if file is None:
        pytest.skip(f"needs {CRANFIELD}")
    texts = [
        part.split(".W", 1)[-1] for part in file.read_text(encoding="utf-8", errors="replace").split("\n.I ")[:600]
    ]
    y = np.array([int("boundary layer" in t) for t in texts])
    hidden = [t.replace("boundary layer", "") for t in texts]
    x = TfidfVectorizer(min_df=3, stop_words="english").fit_transform(hidden)
    model = SupervisedDictionary(5, xi=1.0, nu=0.1, class_weight="balanced", tol=1e-4).fit(x[:400], y[:400])
    assert model.components_.shape[1] == x.shape[1] > 1000
    report = binary_report(torch.from_numpy(model.predict_proba(x[400:])[:, 1]), torch.from_numpy(y[400:]))
    assert report.area > 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_components": 11}, "from 1 to 10 for n_samples = 40, n_features = 10 and 2 classes in the filter variant"),
        ({"n_components": 12, "variant": "feature"}, "from 1 to 11"),
        ({"variant": "wrapper"}, "variant is one of"),
        ({"solver": "sgd"}, "solver is one of"),
        ({"xi": "auto"}, "a number or 'noise'"),
        ({"xi": -1.0}, "xi must be finite"),
        ({"prediction": "naive"}, "the filter variant does not predict by 'naive'"),
        ({"reconstruction_error": 2.0}, "between 0 and 1"),
        ({"threshold": "best"}, "None, 'youden' or a number"),
        ({"class_weight": "equal"}, "None, 'balanced' or a dictionary"),
        ({"n_starts": 0}, "integer of at least 1"),
        ({"l1": (1.0,)}, "three numbers"),
        ({"nonneg": True, "solver": "bcd"}, "data must not be either"),
    ],
)
def test_arguments_are_checked(options: dict, message: str) -> None:  # type: ignore[type-arg]
    data = filter_model(40, 10, 3, seed=0)
    with pytest.raises(InputError, match=message):
        SupervisedDictionary(**options).fit(data.x.numpy(), data.y.numpy())


def test_data_are_checked() -> None:
    data = filter_model(40, 10, 3, seed=0)
    x, y = data.x.numpy(), data.y.numpy()
    with pytest.raises(InputError, match="1 class only"):
        SupervisedDictionary().fit(x, np.ones(40))
    with pytest.raises(InputError, match="one row for each sample"):
        SupervisedDictionary().fit(x, y, covariates=np.ones((39, 2)))
    model = SupervisedDictionary().fit(x, y, covariates=np.ones((40, 2)))
    with pytest.raises(InputError, match="fitted with 2 covariates, and there are 0"):
        model.predict(x)
    with pytest.raises(InputError, match="missing in every sample"):
        SupervisedDictionary().fit(np.where(np.arange(10) == 3, np.nan, x), y)
    with pytest.raises(InputError, match="threshold is for two classes"):
        SupervisedDictionary(threshold="youden").fit(x, np.arange(40) % 3)
