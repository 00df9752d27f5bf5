"""Plug and play: what the iterations minimise, when they descend, and where they end."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from poise.errors import InputError, PoiseWarning
from poise.linear_maps import Blur, CompressedSensing, LinearMap, Mask, Matrix, Radon, gaussian_kernel
from poise.parts import ICNN, LearnedProx, Patchwise
from poise.penalties import L1, TotalVariation
from poise.solvers import plug_and_play
from poise.wavelets import WaveletL1


def maps() -> dict[str, LinearMap]:
    g = torch.Generator().manual_seed(0)
    return {
        "matrix": Matrix(torch.randn(5, 12, generator=g).double(), (3, 4)),
        "mask": Mask(torch.rand(1, 4, 4, generator=g)),
        "blur": Blur(torch.rand(3, 5, generator=g).double(), (2, 8, 8)),
        "blur with zeros": Blur(torch.rand(3, 3, generator=g).double(), (2, 8, 8), "zeros"),
        "compressed sensing": CompressedSensing((1, 8, 8), 20),
        "radon": Radon(16, 7),
    }


MAPS = pytest.mark.parametrize("name", list(maps()))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def prox_of(size: int | tuple[int, ...] = (1, 8, 8), curved: bool = True) -> LearnedProx:
    torch.manual_seed(0)
    # Weights large enough for a regulariser that is not convex: eigenvalues of the Jacobian above 1.
    net = ICNN(size, hidden=24, layers=2, strong=0.05, init="uniform")
    if curved:
        with torch.no_grad():
            net.skip.weight.mul_(3.0)
            net.positive[-1].mul_(4.0)
    return LearnedProx(net).double()


# ---- linear maps ----------------------------------------------------------------------------------------------------


@MAPS
def test_the_adjoint_is_the_adjoint(name: str) -> None:
    A = maps()[name]
    x, v = draw(3, *A.shape), draw(3, *A.measured, seed=1)
    torch.testing.assert_close((A(x) * v).sum(), (x * A.adjoint(v)).sum(), rtol=1e-12, atol=1e-12)


@MAPS
def test_the_norm_is_an_upper_bound_and_not_far_off(name: str) -> None:
    A = maps()[name]
    size = int(np.prod(A.shape))
    whole = A(torch.eye(size, dtype=torch.float64).view(size, *A.shape)).flatten(1)
    exact = float(torch.linalg.matrix_norm(whole, 2)) ** 2
    assert exact <= A.norm_squared * (1 + 1e-9)
    # A blur without wrap-around is bounded by the one with.
    assert A.norm_squared <= exact * (1.5 if "zeros" in name else 1.02)


@MAPS
def test_a_closed_form_solves_the_normal_equations(name: str) -> None:
    A = maps()[name]
    right = draw(2, *A.shape)
    found = A.solve(right, 1.3, 0.2)
    if found is not None:
        torch.testing.assert_close(1.3 * A.normal(found) + 0.2 * found, right, rtol=1e-10, atol=1e-10)


def test_a_blur_is_a_convolution_as_in_scipy() -> None:
    from scipy.ndimage import convolve

    kernel, x = draw(3, 5), draw(1, 2, 9, 8)
    for padding, mode in (("circular", "wrap"), ("zeros", "constant")):
        found = Blur(kernel, (2, 9, 8), padding)(x)
        for channel in range(2):
            expected = convolve(x[0, channel].numpy(), kernel.numpy(), mode=mode)
            np.testing.assert_allclose(found[0, channel].numpy(), expected, atol=1e-12)


def test_radon_and_its_back_projection_are_those_of_scikit_image() -> None:
    transform = pytest.importorskip("skimage.transform")
    data = pytest.importorskip("skimage.data")
    image = transform.resize(data.shepp_logan_phantom(), (48, 48))
    A = Radon(48, 60)
    expected = transform.radon(image, theta=A.angles.numpy(), circle=True)
    found = A(torch.from_numpy(image)[None, None])
    np.testing.assert_allclose(found[0].numpy().T, expected, atol=1e-10)
    ours = A.back_projection(found)[0, 0].numpy()
    theirs = transform.iradon(expected, theta=A.angles.numpy(), circle=True)
    errors = [np.sqrt(np.mean((guess - image) ** 2)) for guess in (ours, theirs)]
    assert errors[0] < 1.2 * errors[1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Blur(torch.ones(2, 3), (1, 8, 8)), "odd sizes"),
        (lambda: Blur(torch.ones(3, 3), (1, 8, 8), "mirror"), "padding"),
        (lambda: CompressedSensing((1, 4, 4), 17), r"\[1, 16\]"),
        (lambda: Radon(8, 0), "at least one angle"),
        (lambda: Matrix(torch.ones(2, 3), (2, 2)), "does not act"),
        (lambda: gaussian_kernel(4, 1.0), "odd"),
        (lambda: WaveletL1(0), "levels"),
        (lambda: WaveletL1(2).value(torch.ones(6, 8)), "divisible"),
    ],
)
def test_maps_and_penalties_refuse_what_does_not_fit(make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()  # type: ignore[operator]


# ---- wavelets -------------------------------------------------------------------------------------------------------


def test_the_wavelet_prox_is_a_minimiser_and_exact() -> None:
    penalty, y = WaveletL1(2), draw(2, 1, 8, 8)
    x = penalty.prox(y, 0.3)
    best = 0.5 * (x - y).square().sum() + 0.3 * penalty.value(x)
    for seed in range(20):
        u = x + 1e-3 * draw(2, 1, 8, 8, seed=seed + 1)
        assert 0.5 * (u - y).square().sum() + 0.3 * penalty.value(u) >= best
    torch.testing.assert_close(penalty.prox(y, 0.0), y)


# ---- the iterations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mask", "blur", "compressed sensing", "radon"])
def test_the_objective_of_pgd_never_rises_within_its_bound(name: str) -> None:
    A = maps()[name]
    prox = prox_of(A.shape)
    assert float(torch.linalg.eigvalsh(prox.jacobian(draw(3, *A.shape))).max()) > 1
    result = plug_and_play(A, A(draw(3, *A.shape)), prox, iterations=60)
    assert result.exact
    # Rounding of float64 in sums of some hundred terms.
    assert result.rises(1e-10) == 0


def test_the_traced_objective_is_that_of_an_inversion() -> None:
    A, prox = maps()["mask"], prox_of((1, 4, 4))
    v = A(draw(2, *A.shape))
    result = plug_and_play(A, v, prox, step=0.7, iterations=5)
    energy = 0.5 * (A(result.x) - v).flatten(1).square().sum(1) + prox.regularizer(result.x, tol=1e-9) / 0.7
    torch.testing.assert_close(result.objective[-1], energy, rtol=1e-7, atol=1e-7)
    assert result.weight == pytest.approx(1 / 0.7)


def test_pgd_and_admm_with_an_l1_penalty_solve_the_lasso() -> None:
    from sklearn.linear_model import Lasso

    A = Matrix(draw(20, 8))
    v = 3 * draw(1, 20, seed=3)
    expected = Lasso(alpha=2.0 / 20, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(A.matrix.numpy(), v[0]).coef_
    for method in ("pgd", "admm"):
        result = plug_and_play(A, v, L1(), method=method, weight=2.0, iterations=3000, tolerance=1e-7, trace=False)
        np.testing.assert_allclose(result.x[0].numpy(), expected, atol=1e-4)
        assert result.certificate.converged


def test_both_methods_and_orders_end_in_a_fixed_point_of_their_own_objective() -> None:
    A, prox = maps()["mask"], prox_of((1, 4, 4))
    v = A(draw(2, *A.shape))
    pgd = plug_and_play(A, v, prox, step=0.9 / A.norm_squared, iterations=5000, tolerance=1e-10)
    # At a fixed point  A'(A x - v) + lambda grad R(x) = 0.
    for result in (
        pgd,
        plug_and_play(A, v, prox, "admm", iterations=5000, tolerance=1e-10),
        plug_and_play(A, v, prox, "admm", iterations=5000, tolerance=1e-10, order="xzu"),
    ):
        stationary = A.adjoint(A(result.x) - v) + result.weight * prox.regularizer_gradient(result.x, tol=1e-10)
        assert stationary.abs().max() < 1e-6
        assert result.certificate.converged


def test_admm_with_bounds_keeps_them_and_pgd_cuts() -> None:
    A = maps()["mask"]
    prox = prox_of((1, 4, 4), curved=False)
    v = 5 * A(draw(2, *A.shape))
    bounded = plug_and_play(A, v, prox, "admm", bounds=(-0.5, 0.5), iterations=3000, tolerance=1e-9)
    assert bounded.x.abs().max() <= 0.5 + 1e-6
    cut = plug_and_play(A, v, prox, "pgd", bounds=(-0.5, 0.5), iterations=10)
    assert cut.x.abs().max() <= 0.5
    assert not cut.exact


def test_any_denoiser_runs_without_an_objective() -> None:
    A = maps()["blur"]
    v, truth = A(draw(2, *A.shape)), draw(2, *A.shape)
    result = plug_and_play(A, v, Patchwise(nn.Tanh(), size=4, stride=2), iterations=5, reference=truth)
    assert result.objective is None
    assert not result.exact
    assert "not that of a known regulariser" in result.certificate.status
    assert result.psnr.shape == (5, 2)
    with pytest.raises(InputError, match="not known"):
        result.rises()


def test_a_condition_reaches_the_denoiser() -> None:
    prox = LearnedProx(ICNN((1, 4, 4), hidden=4, strong=0.1, condition=1)).double()
    A = maps()["mask"]
    v = A(draw(2, 1, 4, 4))
    found = [plug_and_play(A, v, prox, iterations=3, condition=torch.full((2,), s)).x for s in (0.1, 0.9)]
    assert not torch.allclose(*found)


def test_float32_stays_float32() -> None:
    A = Blur(gaussian_kernel(3, 1.0), (1, 8, 8))
    for method in ("pgd", "admm"):
        result = plug_and_play(A, A(torch.rand(2, 1, 8, 8)), TotalVariation(dims=2), method, weight=0.01, iterations=3)
        assert result.x.dtype == torch.float32
        assert result.objective.shape == (3, 2)


@pytest.mark.peer
def test_pgd_is_that_of_deepinv() -> None:
    deepinv = pytest.importorskip("deepinv")
    kernel = gaussian_kernel(5, 1.0)
    A, prox = Blur(kernel, (1, 8, 8)), prox_of()
    v = A(draw(3, 1, 8, 8))
    physics = deepinv.physics.Blur(filter=kernel[None, None], padding="circular")
    peer = deepinv.optim.PGD(
        data_fidelity=deepinv.optim.data_fidelity.L2(),
        prior=deepinv.optim.prior.PnP(lambda y, sigma: prox(y)),
        stepsize=0.9,
        max_iter=20,
        early_stop=False,
    )
    with torch.no_grad():
        expected = peer(v, physics)
    torch.testing.assert_close(plug_and_play(A, v, prox, step=0.9, iterations=20).x, expected, rtol=1e-6, atol=1e-6)


# ---- what is said ---------------------------------------------------------------------------------------------------


def test_a_missed_tolerance_is_said_and_warned_of() -> None:
    A = maps()["mask"]
    with pytest.warns(PoiseWarning, match="relative fixed-point residual"):
        result = plug_and_play(A, draw(1, *A.measured), prox_of((1, 4, 4)), iterations=2, tolerance=1e-12)
    assert not result.certificate.converged
    assert "stopped after 2 iterations" in result.certificate.status


@pytest.mark.parametrize(("method", "option", "message"), [("pgd", "step", "below 1 /"), ("admm", "rho", "not above")])
def test_steps_beyond_the_theory_warn_unless_that_is_wanted(method: str, option: str, message: str) -> None:
    A = Mask(torch.ones(1, 4, 4))
    prox, v = prox_of((1, 4, 4)), draw(1, 1, 4, 4)
    value = 2.0 if method == "pgd" else 0.5
    with pytest.warns(PoiseWarning, match=message):
        plug_and_play(A, v, prox, method, iterations=1, **{option: value})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plug_and_play(A, v, prox, method, iterations=1, guarantee=False, **{option: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "fista"}, "'pgd' or 'admm'"),
        ({"order": "zux"}, "'xuz' or 'xzu'"),
        ({"iterations": 0}, "at least one"),
        ({"step": -1.0}, "step must be positive"),
        ({"bounds": (1.0, 0.0)}, "bounds"),
        ({"weight": 0.1}, "weight belongs to a penalty"),
        ({"prox": L1()}, "needs weight > 0"),
        ({"prox": 3}, "and it is a int"),
        ({"v": torch.zeros(1, 1, 5, 4)}, r"\[batch, 1, 4, 4\]"),
    ],
)
def test_bad_calls_are_refused_by_name(options: dict[str, object], message: str) -> None:
    given = {"A": Mask(torch.ones(1, 4, 4)), "v": draw(1, 1, 4, 4), "prox": prox_of((1, 4, 4)), **options}
    with pytest.raises(InputError, match=message):
        plug_and_play(**given)  # type: ignore[arg-type]


def test_negative_weights_are_found_before_the_first_iteration() -> None:
    prox = prox_of((1, 4, 4))
    with torch.no_grad():
        prox.psi.positive[0][0, 0] = -1.0
    with pytest.raises(InputError, match="must be >= 0"):
        plug_and_play(Mask(torch.ones(1, 4, 4)), draw(1, 1, 4, 4), prox)
