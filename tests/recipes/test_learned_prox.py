"""Training a learned proximal operator: noise on the fly, the schedule, averages, and what its prior says."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import poise
from poise.data.denoising import AddNoise
from poise.errors import IncompatibleError, InputError
from poise.insight import prior_profile
from poise.parts import ICNN, DnCNN, LearnedProx
from poise.recipes import AverageWeights, WatchProx, fit_learned_prox, proximal_schedule


def clean(n: int = 48, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def prox(condition: int = 0) -> LearnedProx:
    torch.manual_seed(0)
    return LearnedProx(ICNN((1, 8, 8), hidden=16, layers=2, strong=0.01, condition=condition))


def test_noise_has_the_level_that_is_said_and_leaves_the_target() -> None:
    x = clean(400)
    batch = AddNoise((0.05, 0.2))({"input": x}, torch.Generator().manual_seed(0))
    assert torch.equal(batch["target"], x)
    level = batch["noise_level"]
    assert level.min() >= 0.05
    assert level.max() <= 0.2
    spread = ((batch["input"] - x).flatten(1) / level[:, None]).std(1)
    # 64 numbers an image: the standard deviation of each estimate is 1 / sqrt(128).
    assert float((spread - 1).abs().mean()) < 0.1
    assert batch["input"].min() < 0  # nothing is cut to the range of the data
    again = AddNoise((0.05, 0.2))({"input": x}, torch.Generator().manual_seed(0))
    assert torch.equal(again["input"], batch["input"])


@pytest.mark.parametrize("sigma", [-0.1, (0.2, 0.1)])
def test_a_noise_level_that_is_none_is_refused(sigma: object) -> None:
    with pytest.raises(InputError, match="sigma"):
        AddNoise(sigma)  # type: ignore[arg-type]


def test_the_schedule_is_absolute_error_and_then_a_ladder_to_the_residual_of_a_good_denoiser() -> None:
    objective = poise.parse(proximal_schedule(64, 0.1, steps=400))
    first, second = objective.summands
    assert first.weight.pieces == ((0, 1 / 64), (200, 0))
    assert second.weight.pieces == ((0, 0), (200, 1))
    # 0.08 sqrt(n) at sigma = 0.1
    assert second.term.gamma.values == pytest.approx((5.12, 2.56, 1.28, 0.64))
    assert (second.term.gamma.steps, second.term.gamma.after) == (200, 200)
    with pytest.raises(InputError, match="pretrain"):
        proximal_schedule(64, 0.1, steps=10, pretrain=10)


def test_training_improves_psnr_keeps_the_weights_nonnegative_and_says_psnr_and_ssim() -> None:
    model = prox()
    run = fit_learned_prox(model, clean(), 0.1, clean(16, 1), steps=60, batch_size=16, lr=1e-2, matching_lr=1e-3)
    assert run.history["valid/psnr"][-1] > run.history["valid/psnr"][0]
    assert len(run.history["valid/ssim"]) == len(run.history["valid/psnr"])
    model.check()
    assert model.double().jacobian_report(clean(2).double()).is_prox


def test_a_denoiser_that_is_told_the_noise_is_trained_and_measured_so() -> None:
    model = prox(condition=1)
    run = fit_learned_prox(model, clean(), (0.05, 0.2), clean(8, 1), steps=6, batch_size=16, conditioned=True)
    assert len(run.history["valid/psnr"]) > 0


def test_any_denoiser_is_trained_by_the_same_call_and_a_wrong_output_is_refused() -> None:
    assert fit_learned_prox(DnCNN(1, 4, 2), clean(), steps=2, objective="squared_error").steps == 2
    with pytest.raises(IncompatibleError, match="denoiser returns"):
        fit_learned_prox(nn.Conv2d(1, 1, 3), clean(), steps=2)


def test_the_average_of_the_weights_is_what_the_model_has_in_the_end() -> None:
    seen: list[dict[str, torch.Tensor]] = []

    class Watch:
        def on_step_end(self, state: object) -> None:
            seen.append(copy.deepcopy(dict(model.named_parameters())))

    model = prox()
    fit_learned_prox(model, clean(), steps=4, ema=0.5, callbacks=[Watch()])
    for name, weight in model.named_parameters():
        expected = seen[0][name]
        for later in seen[1:]:
            expected = 0.5 * expected + 0.5 * later[name]
        torch.testing.assert_close(weight, expected)
    with pytest.raises(InputError, match="keep"):
        AverageWeights(1.0)


def test_a_watched_run_draws_eigenvalue_zeros_and_a_yardstick() -> None:
    watch = WatchProx(clean(4), 0.1, gamma=0.64, every=2)
    run = fit_learned_prox(prox(), clean(), steps=4, callbacks=[watch])
    assert run.history.steps("prox/matching") == [2, 4]
    # At least 2 alpha, as far as power iteration tells in float32.
    assert min(run.history["prox/smallest_eigenvalue"]) >= 0.02 - 1e-4
    assert 0 <= run.history["prox/zero_share"][-1] <= 1
    with pytest.raises(InputError, match="gamma and every"):
        WatchProx(clean(4), 0.1, gamma=0.0)


def test_the_profile_of_a_square_prior_is_known() -> None:
    class Square:
        """R(x) = 1/2 ||x||^2."""

        def regularizer(self, x: torch.Tensor, **how: object) -> torch.Tensor:
            return 0.5 * x.double().flatten(1).square().sum(1)

    x = torch.zeros(4, 1, 8, 8)
    profile = prior_profile(Square(), x, noise=(0.0, 0.1, 0.2))
    curve = profile.curves["noise"]
    assert curve.monotone
    assert curve.monotone_share == 1
    torch.testing.assert_close(curve.mean[2], 4 * curve.mean[1], rtol=1e-5, atol=1e-9)
    assert list(profile.curves) == ["noise", "blur", "mixing"]
    assert "noise" in str(profile)
    assert list(prior_profile(Square(), torch.zeros(1, 5)).curves) == ["noise"]
    with pytest.raises(InputError, match="begin with 0"):
        prior_profile(Square(), x, noise=(0.1, 0.2))
