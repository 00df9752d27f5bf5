"""Learned proximal networks: gradients of convex functions, their inverses, and the regularisers behind them."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import poise
from poise.errors import InputError, PoiseWarning
from poise.parts import (
    ICNN,
    ConvexPotential,
    ConvICNN,
    DnCNN,
    GradientStepDenoiser,
    LearnedProx,
    Patchwise,
    load_learned_prox,
)
from poise.readouts import Denoising
from poise.solvers import ProjectModules


class Quadratic(ConvexPotential):
    """psi(y) = alpha ||y||^2."""

    def __init__(self, alpha: float, size: int = 3) -> None:
        super().__init__()
        self.alpha, self.shape = alpha, (size,)

    def forward(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.alpha * y.square().sum(1)


class SoftThreshold(ConvexPotential):
    """psi(y) = 1/2 (|y| - 1)_+^2, whose gradient is soft-thresholding."""

    shape = (1,)

    def forward(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        return 0.5 * (y.abs() - 1).clamp_min(0).square().sum(1)


def nets(strong: float = 0.1) -> list[ConvexPotential]:
    torch.manual_seed(0)
    return [
        ICNN(3, hidden=8, layers=2, strong=strong),
        ICNN(3, hidden=6, layers=1, strong=strong, activation="squareplus", weights="exp"),
        ICNN((1, 4, 4), hidden=8, layers=3, strong=strong, weights="softplus"),
        ConvICNN((1, 6, 6), channels=3, strides=(1, 2), dense=4, strong=strong, init="uniform"),
    ]


NETS = pytest.mark.parametrize("which", range(4), ids=["clip", "squareplus", "softplus", "conv"])


def prox_of(which: int, strong: float = 0.1) -> LearnedProx:
    return LearnedProx(nets(strong)[which]).double()


def points(prox: LearnedProx, n: int = 5, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, *prox.psi.shape, generator=g, dtype=torch.float64)


# ---- what is known exactly ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("method", ["newton", "cg", "ls"])
def test_a_quadratic_potential_scales_and_its_regulariser_is_a_square(alpha: float, method: str) -> None:
    prox = LearnedProx(Quadratic(alpha))
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(prox(x), 2 * alpha * x)
    expected = (1 / (4 * alpha) - 0.5) * x.square().sum(1)
    # Inversion to 1e-9 moves R by its square.
    torch.testing.assert_close(prox.regularizer(x, method=method, tol=1e-9), expected, rtol=1e-9, atol=1e-9)


def test_soft_thresholding_has_the_absolute_value_as_its_regulariser() -> None:
    prox = LearnedProx(SoftThreshold())
    y = torch.tensor([[-3.0], [-1.2], [1.1], [2.0], [4.0]], dtype=torch.float64)
    x = prox(y)
    torch.testing.assert_close(x, y.sign() * (y.abs() - 1).clamp_min(0))
    torch.testing.assert_close(prox.regularizer(x, tol=1e-10), x.abs()[:, 0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(prox.regularizer_of_output(y), x.abs()[:, 0])


@NETS
def test_the_jacobian_is_symmetric_without_eigenvalues_below_twice_alpha(which: int) -> None:
    prox = prox_of(which)
    report = prox.jacobian_report(points(prox))
    assert report.is_prox
    assert report.asymmetry < 1e-12
    assert report.smallest >= 0.2 - 1e-12
    assert report.log_determinant.shape == (5,)


@NETS
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(2, 5))
def test_f_is_strongly_and_cyclically_monotone(which: int, seed: int, count: int) -> None:
    prox = prox_of(which)
    y = points(prox, count, seed)
    f = prox(y).detach().flatten(1)
    y = y.flatten(1)
    for a, b in itertools.combinations(range(count), 2):
        apart = y[a] - y[b]
        assert (f[a] - f[b]) @ apart >= 0.2 * apart @ apart * (1 - 1e-12)
    # Around a cycle: sum <f(y_i), y_(i+1) - y_i> <= 0 for the gradient of a convex function.
    assert (f * (y.roll(-1, 0) - y)).sum() <= 1e-12


def test_f_minimises_distance_and_regulariser_on_a_grid() -> None:
    torch.manual_seed(3)
    prox = LearnedProx(ICNN(1, hidden=6, layers=2, strong=0.05)).double()
    y = torch.tensor([[-2.0], [0.3], [1.7]], dtype=torch.float64)
    x = prox(y).detach()
    # What f puts out lies around x; the grid stays where its inverse is at hand.
    u = (x + torch.linspace(-0.2, 0.2, 81, dtype=torch.float64)).reshape(-1, 1)
    energy = 0.5 * (u.view(3, -1) - y).square() + prox.regularizer(u, tol=1e-8).view(3, -1)
    best = 0.5 * (x - y).square()[:, 0] + prox.regularizer(x, tol=1e-8)
    assert (energy >= best[:, None] - 1e-8).all()
    assert (energy.argmin(1) == 40).all()


@NETS
def test_the_gradient_of_the_regulariser_is_the_inverse_less_the_point(which: int) -> None:
    prox = prox_of(which)
    x = prox(points(prox, 3)).detach()
    found = prox.regularizer_gradient(x, tol=1e-9)
    v = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    h = 1e-4
    slope = (prox.regularizer(x + h * v, tol=1e-10) - prox.regularizer(x - h * v, tol=1e-10)) / (2 * h)
    # A central difference errs by h^2 times the third derivative, which a small alpha makes large.
    torch.testing.assert_close((found * v).flatten(1).sum(1), slope, rtol=1e-3, atol=1e-4)


@NETS
def test_the_regulariser_at_an_output_needs_no_inversion(which: int) -> None:
    prox = prox_of(which)
    y = points(prox)
    x = prox(y).detach()
    torch.testing.assert_close(
        prox.regularizer_of_output(y).detach(), prox.regularizer(x, tol=1e-9), rtol=1e-7, atol=1e-7
    )
    inner = (y * x).flatten(1).sum(1)
    torch.testing.assert_close(prox.conjugate(x, tol=1e-9), (inner - prox.potential(y)).detach(), rtol=1e-7, atol=1e-7)


@NETS
@pytest.mark.parametrize("method", ["newton", "cg", "ls"])
def test_the_inverse_is_found_and_its_residual_is_that_of_f(which: int, method: str) -> None:
    prox = prox_of(which)
    y = points(prox)
    x = prox(y).detach()
    found, residual = prox.invert(x, method, tol=1e-7)
    torch.testing.assert_close((prox(found) - x).flatten(1).norm(dim=1).detach(), residual, rtol=1e-6, atol=1e-15)
    assert (residual <= 1e-7).all()
    # |y - found| <= residual / (2 alpha).
    assert ((found - y).flatten(1).norm(dim=1) <= 1e-7 / 0.2 + 1e-12).all()


def test_a_point_out_of_reach_is_reported_and_warned_of() -> None:
    prox = prox_of(0, strong=0.0)
    with pytest.warns(PoiseWarning, match="not inverted"):
        _, residual = prox.invert(torch.full((2, 3), 50.0, dtype=torch.float64), max_iter=10)
    assert (residual > 1).all()


def test_float32_networks_are_inverted_in_float64() -> None:
    prox = LearnedProx(nets()[0])
    x = prox(points(prox).float()).detach()
    y, residual = prox.invert(x, tol=1e-9)
    assert y.dtype == torch.float32
    assert residual.dtype == torch.float64
    assert (residual <= 1e-9).all()
    assert all(p.requires_grad and p.dtype == torch.float32 for p in prox.parameters())


# ---- gradients ------------------------------------------------------------------------------------------------------


@NETS
def test_the_written_gradient_is_that_of_autograd(which: int) -> None:
    psi = nets()[which].double()
    y = points(LearnedProx(psi))
    torch.testing.assert_close(psi.gradient(y), ConvexPotential.gradient(psi, y), rtol=1e-12, atol=1e-12)


@NETS
def test_the_gradient_of_f_in_its_weights_passes_gradcheck(which: int) -> None:
    prox = prox_of(which)
    y = points(prox, 2).requires_grad_()
    names = [n for n, _ in prox.named_parameters()][:4]

    def loss(y: Tensor, *weights: Tensor) -> Tensor:
        given = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(prox, given, (y,)).flatten(1)[:, :3]

    weights = [dict(prox.named_parameters())[n].detach().clone().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(loss, (y, *weights), atol=1e-6)


@NETS
def test_without_gradients_the_output_is_the_same_and_holds_no_graph(which: int) -> None:
    prox = prox_of(which)
    y = points(prox)
    trained = prox(y)
    assert trained.requires_grad
    with torch.no_grad():
        free = prox(y)
    assert not free.requires_grad
    assert torch.equal(free, trained)
    assert torch.equal(prox.eval()(y), trained)
    with torch.inference_mode(False), torch.no_grad():
        assert prox(y).grad_fn is None


def test_memory_stays_flat_over_a_hundred_calls() -> None:
    import gc

    prox = prox_of(3)
    y = points(prox)

    def held() -> int:
        gc.collect()
        return sum(type(o) is torch.Tensor for o in gc.get_objects())

    with torch.no_grad():
        prox(y)
        before = held()
        for _ in range(100):
            prox(y)
        assert held() <= before


@NETS
def test_the_smallest_eigenvalue_is_that_of_the_jacobian(which: int) -> None:
    prox = prox_of(which)
    y = points(prox, 2)
    exact = torch.linalg.eigvalsh(prox.jacobian(y))[:, 0]
    found = prox.smallest_eigenvalue(y, iterations=500)
    # Power iteration comes from above and slowly where eigenvalues lie close.
    assert (found >= exact - 1e-9).all()
    torch.testing.assert_close(found, exact, rtol=0.1, atol=1e-3)


# ---- training -------------------------------------------------------------------------------------------------------


def test_fit_projects_the_weights_after_every_step() -> None:
    class Watch:
        least = 0.0
        seen = 0

        def on_step_end(self, state: object) -> None:
            self.seen += 1
            self.least = min(self.least, *(float(w.detach().min()) for w in prox.psi.positive))

    torch.manual_seed(0)
    prox, watch = LearnedProx(ICNN(2, hidden=8)), Watch()
    x = torch.randn(64, 2)
    batch = {"input": x + 0.5, "target": x}
    poise.fit(prox, "squared_error", batch, readout=Denoising(), solver="adam", lr=0.1, steps=20, callbacks=[watch])
    assert watch.seen == 20
    assert watch.least == 0
    assert prox.psi.zero_share > 0


def test_an_optimiser_of_ones_own_is_followed() -> None:
    net = ICNN(2, hidden=4)
    optimizer = torch.optim.SGD(net.parameters(), lr=100.0)
    ProjectModules(LearnedProx(net)).follow(optimizer)
    LearnedProx(net)(torch.randn(8, 2)).square().sum().backward()
    optimizer.step()
    assert min(float(w.detach().min()) for w in net.positive) >= 0


def test_a_condition_moves_f_and_leaves_it_a_proximal_operator() -> None:
    torch.manual_seed(0)
    prox = LearnedProx(ICNN(3, hidden=8, strong=0.1, condition=1)).double()
    y, low, high = points(prox), torch.full((5,), 0.1).double(), torch.full((5,), 0.9).double()
    assert not torch.allclose(prox(y, low), prox(y, high))
    assert prox.jacobian_report(y, high).is_prox
    x = prox(y, high).detach()
    found, residual = prox.invert(x, condition=high, tol=1e-8)
    assert (residual <= 1e-8).all()
    torch.testing.assert_close(found, y, rtol=1e-6, atol=1e-6)
    with pytest.raises(InputError, match="condition"):
        prox(y)


# ---- saving and errors ----------------------------------------------------------------------------------------------


@NETS
def test_a_saved_network_comes_back_with_its_architecture(which: int, tmp_path: Path) -> None:
    prox = prox_of(which)
    prox.save(tmp_path / "prox.pt")
    again = load_learned_prox(tmp_path / "prox.pt")
    y = points(prox)
    assert torch.equal(again(y), prox(y))
    assert again.psi.config() == prox.psi.config()
    assert torch.equal(copy.deepcopy(prox)(y), prox(y))


def test_a_file_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="no saved LearnedProx"):
        load_learned_prox(tmp_path / "other.pt")


def test_negative_weights_are_found_before_they_make_a_wrong_prior() -> None:
    prox = prox_of(0)
    with torch.no_grad():
        prox.psi.positive[0][0, 0] = -1.0
    for call in (prox.invert, prox.regularizer):
        with pytest.raises(InputError, match="1 weights that must be >= 0"):
            call(points(prox))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "tanh"}, "convex"),
        ({"activation": "softplsu"}, "Did you mean 'softplus'"),
        ({"beta": 0.0}, "beta"),
        ({"strong": -1.0}, "alpha"),
        ({"weights": "square"}, "weights is one of"),
        ({"init": "zeros"}, "init"),
        ({"hidden": 0}, "hidden"),
        ({"shape": 0}, "positive sizes"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ICNN(**{"shape": 2, **arguments})


def test_wrong_shapes_methods_and_numbers_are_refused() -> None:
    prox = prox_of(2)
    with pytest.raises(InputError, match=r"shape \[1, 4, 4\]"):
        prox(torch.zeros(2, 1, 5, 4, dtype=torch.float64))
    with pytest.raises(InputError, match="newton, cg, ls"):
        prox.invert(points(prox), "bisection")
    with pytest.raises(InputError, match="not finite"):
        prox.invert(torch.full((1, 1, 4, 4), torch.nan, dtype=torch.float64))
    with pytest.raises(InputError, match="convex potential"):
        LearnedProx(nn.Linear(2, 2))
    with pytest.raises(InputError, match="channels, height, width"):
        ConvICNN((8, 8))


# ---- others ---------------------------------------------------------------------------------------------------------


def test_the_gradient_step_denoiser_is_the_identity_less_a_gradient() -> None:
    torch.manual_seed(0)
    denoiser = GradientStepDenoiser(DnCNN(1, 4, 3, "elu")).double()
    y = torch.randn(2, 1, 6, 6, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(denoiser.potential(y).sum(), y)
    torch.testing.assert_close(denoiser(y), y - slope)
    with torch.no_grad():
        assert denoiser(y).grad_fn is None


def test_patches_of_a_pixelwise_map_give_that_map() -> None:
    y = torch.randn(2, 1, 11, 13)
    torch.testing.assert_close(Patchwise(nn.Tanh(), size=4, stride=3)(y), y.tanh())
    assert not Patchwise(nn.Tanh(), size=4, stride=3).exact
    with pytest.raises(InputError, match="stride"):
        Patchwise(nn.Tanh(), size=4, stride=5)
    with pytest.raises(InputError, match="smaller than a patch"):
        Patchwise(nn.Tanh(), size=12, stride=5)(y)
