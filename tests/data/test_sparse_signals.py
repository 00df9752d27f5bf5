"""Sparse signals: their law, their noise, their matrices, and patches in a cosine dictionary."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from poise.data.sparse_signals import BernoulliGaussian, ImagePatches, gaussian_matrix, overcomplete_cosines
from poise.errors import InputError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_signals_have_their_density_and_variance(dtype: torch.dtype) -> None:
    x = BernoulliGaussian(10, 100, p=0.1, dtype=dtype)(2000, generator()).x
    assert x is not None
    assert float((x != 0).float().mean()) == pytest.approx(0.1, abs=0.003)
    assert float(x[x != 0].abs().square().mean()) == pytest.approx(1.0, abs=0.03)


def test_noise_has_its_deviation_or_its_ratio() -> None:
    batch = BernoulliGaussian(50, 100, noise=0.2)(500, generator())
    assert batch.x is not None
    assert float((batch.y - batch.x @ batch.operator.mT).std()) == pytest.approx(0.2, rel=0.02)
    batch = BernoulliGaussian(50, 100, p=0.3, snr=10.0)(20, generator())
    assert batch.x is not None
    clean = batch.x @ batch.operator.mT
    ratio = clean.square().sum(-1) / (batch.y - clean).square().sum(-1)
    torch.testing.assert_close(10 * ratio.log10(), torch.full((20,), 10.0), atol=1e-3, rtol=0)


def test_equal_seeds_give_equal_signals_whatever_the_matrix() -> None:
    base = BernoulliGaussian(5, 10)
    one, again, other = (s(3, generator(4)) for s in (base, base, base.changed(matrix="signal")))
    assert torch.equal(one.y, again.y)
    assert torch.equal(one.x, other.x)  # type: ignore[arg-type]
    assert other.operator.shape == (3, 5, 10)
    assert torch.equal(base.changed(p=0.5)(2, generator()).operator, one.operator)
    assert base.changed(matrix="batch")(3, generator()).operator.shape == (5, 10)


def test_a_share_of_the_signals_is_labelled() -> None:
    assert BernoulliGaussian(5, 10)(3, generator()).labelled is None
    marked = BernoulliGaussian(5, 10, labelled=0.25)(4000, generator()).labelled
    assert marked is not None
    assert float(marked.float().mean()) == pytest.approx(0.25, abs=0.03)


def test_columns_of_a_gaussian_matrix_have_length_one_on_average() -> None:
    assert float(gaussian_matrix(200, 300).square().sum(0).mean()) == pytest.approx(1.0, abs=0.02)


def test_the_square_dictionary_is_the_orthonormal_cosine_transform() -> None:
    from scipy.fft import dct

    line = torch.from_numpy(dct(torch.eye(4).double().numpy(), norm="ortho", axis=0)).float()
    torch.testing.assert_close(overcomplete_cosines(4, 4), torch.kron(line.T, line.T).float(), atol=1e-6, rtol=0)
    wide = overcomplete_cosines(8, 16)
    assert wide.shape == (64, 256)
    torch.testing.assert_close(wide.square().sum(0), torch.ones(256))
    assert int(torch.linalg.matrix_rank(wide)) == 64


def test_patches_have_no_mean_and_are_measured_as_they_are() -> None:
    source = ImagePatches([torch.rand(20, 24, generator=generator())], side=4, atoms=6)
    batch = source(7, generator(1))
    assert batch.x is None
    assert torch.equal(batch.y, source.patches(7, generator(1)))
    torch.testing.assert_close(batch.y.mean(1), torch.zeros(7), atol=1e-6, rtol=0)
    few = ImagePatches([torch.rand(20, 24)], side=4, atoms=6, measurements=9)(7, generator(1))
    assert few.y.shape == (7, 9)
    assert few.operator.shape == (9, 36)


def test_photographs_come_with_scikit_learn() -> None:
    assert ImagePatches()(3, generator()).y.shape == (3, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"m": 0}, "m and n must be"),
        ({"p": 0.0}, "p is a probability"),
        ({"noise": -1.0}, "noise must be"),
        ({"snr": float("inf")}, "snr is in decibels"),
        ({"matrix": "none"}, "matrix is 'fixed'"),
        ({"labelled": 2.0}, "labelled is a share"),
    ],
)
def test_settings_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BernoulliGaussian(**{"m": 5, "n": 10, **arguments})


def test_dictionaries_and_images_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="atoms must be at least side"):
        overcomplete_cosines(8, 4)
    with pytest.raises(InputError, match="at least 8 pixels"):
        ImagePatches([torch.rand(4, 4)])
