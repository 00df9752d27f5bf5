"""Simulators of supervised factors: what they draw is what they say."""

from __future__ import annotations

import pytest
import torch

from poise.data.factor_simulators import feature_model, filter_model, third_direction, two_bases
from poise.errors import InputError


@pytest.mark.parametrize("model", [filter_model, feature_model])
def test_samples_follow_the_known_factors(model) -> None:  # type: ignore[no-untyped-def]
    data = model(4000, 10, 2, classes=3, covariates=2, noise=0.5, size=1.0, seed=0)
    noise = data.x.mT - data.dictionary @ data.codes
    assert float(noise.std()) == pytest.approx(0.5, rel=0.02)
    seen = data.dictionary.mT @ data.x.mT if model is filter_model else data.codes
    logits = data.coefficients.mT @ seen + data.covariate_coefficients.mT @ data.covariates.mT
    p = torch.cat([torch.zeros_like(logits[:1]), logits]).softmax(0)
    for c in range(3):
        # Four standard errors of a frequency over 4000 samples.
        assert abs(float((data.y == c).double().mean() - p[c].mean())) < 4 * 0.5 / 4000**0.5
    again = model(4000, 10, 2, classes=3, covariates=2, noise=0.5, size=1.0, seed=0)
    assert torch.equal(again.x, data.x)
    assert torch.equal(again.y, data.y)


def test_the_third_direction_carries_the_label_and_little_variance() -> None:
    data = third_direction(2000, 10, seed=0)
    along = data.x @ data.dictionary[:, 0]
    assert float(along.var()) == pytest.approx(1.0, rel=0.15)
    assert float(torch.linalg.svdvals(data.x)[1]) > 9 * 2000**0.5
    assert float(((along > 0).long() == data.y).double().mean()) > 0.8


def test_two_bases_take_features_and_labels_from_different_classes() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = torch.from_numpy(digits.data / 16), torch.from_numpy(digits.target)
    data = two_bases(images, labels, samples=100, noise=0.0, seed=0)
    assert data.dictionary.shape == (64, 20)
    torch.testing.assert_close(data.x.mT, data.dictionary @ data.codes)
    for column in data.dictionary.mT:
        found = (images == column).all(1).nonzero()[:, 0]
        assert int(labels[found[0]]) in (2, 5)
    with pytest.raises(InputError, match="each is 1000"):
        two_bases(images, labels, each=1000)
    with pytest.raises(InputError, match="two classes"):
        two_bases(images, labels, labels_from=(1, 2, 3))


def test_bad_sizes_are_named() -> None:
    with pytest.raises(InputError, match="a rank up to the smaller"):
        filter_model(10, 3, 4)
    with pytest.raises(InputError, match="needs 3 at least"):
        third_direction(10, 2)
