"""PSNR and SSIM beside scikit-image, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch

from poise.errors import InputError
from poise.metrics import rises
from poise.metrics.images import denoising_metrics, psnr, ssim


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_psnr_and_ssim_are_those_of_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    a, b = images(3, 20, 17), images(3, 20, 17, seed=1)
    for i in range(3):
        one, other = a[i].numpy(), b[i].numpy()
        assert float(psnr(a, b, 2.0)[i]) == pytest.approx(metrics.peak_signal_noise_ratio(other, one, data_range=2.0))
        expected = metrics.structural_similarity(one, other, data_range=1.0)
        assert float(ssim(a, b)[i]) == pytest.approx(expected, abs=1e-12)
        expected = metrics.structural_similarity(
            one, other, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert float(ssim(a, b, window=11, gaussian=1.5)[i]) == pytest.approx(expected, abs=1e-9)


def test_equal_images_have_infinite_psnr_and_ssim_one() -> None:
    a = images(2, 3, 8, 8)
    assert psnr(a, a).tolist() == [math.inf] * 2
    torch.testing.assert_close(ssim(a, a), torch.ones(2, dtype=torch.float64))


def test_channels_are_averaged() -> None:
    a, b = images(2, 3, 9, 9), images(2, 3, 9, 9, seed=1)
    torch.testing.assert_close(ssim(a, b), torch.stack([ssim(a[:, c], b[:, c]) for c in range(3)]).mean(0))


def test_small_images_and_vectors_have_psnr_alone_and_both_rise() -> None:
    assert list(denoising_metrics(images(2, 1, 5, 5), images(2, 1, 5, 5))) == ["psnr"]
    assert list(denoising_metrics(images(2, 7), images(2, 7))) == ["psnr"]
    assert rises("psnr")
    assert rises("valid/ssim")


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="one shape"):
        psnr(images(2, 4), images(2, 5))
    with pytest.raises(InputError, match="data_range"):
        psnr(images(2, 4), images(2, 4), 0.0)
    with pytest.raises(InputError, match="odd side"):
        ssim(images(2, 6, 6), images(2, 6, 6))
