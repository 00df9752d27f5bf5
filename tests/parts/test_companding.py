"""Laws of weight companding: the curve, its place in a model, its state, and what it refuses."""

from __future__ import annotations

import copy
import math
import warnings
from collections import deque
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import poise
from poise.errors import FormulaError, InputError, PoiseWarning, StateError
from poise.parts import (
    CompandBarrier,
    Compander,
    Companding,
    apply_part,
    arctan_kernel,
    compand,
    compand_pretrained,
    companding_of,
    folded_copy,
    parse_part,
)
from poise.parts.companding_functions import CompandingFunction, compand_value, companding_function, function_names
from poise.parts.companding_selection import select

BENT = ("arctan", "tanh", "softsign", "erf", "mu_law")
BOUNDED = ("arctan", "tanh", "softsign", "erf")


def mlp(seed: int = 0, *, width: int = 16) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.LayerNorm(width), nn.Linear(width, 3))


def batch(seed: int = 1, rows: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 8, generator=generator), torch.randint(0, 3, (rows,), generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> None:
    x, y = batch(seed, 32)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


# -- the curve ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BENT)
@given(a=st.floats(0.05, 20), b=st.floats(0.05, 20), position=st.floats(-0.99, 0.99))
@settings(max_examples=50, deadline=None)
def test_inverse_after_forward_gives_the_free_parameter_back(name: str, a: float, b: float, position: float) -> None:
    bend = Compander(name, torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    bound = bend.w_max if name in BOUNDED else bend.a
    v = bend.inverse((position * bound).reshape(1))
    # 1e-6 relative is the stated accuracy up to 0.99 w_max; the error of w, 1e-16, is amplified there by less than 1e3.
    torch.testing.assert_close(bend.inverse(bend(v)), v, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", BENT)
def test_in_float32_a_weight_survives_the_way_to_its_free_parameter_and_back(name: str) -> None:
    bend = Compander(name, a=0.3, b=0.2)
    w = torch.linspace(-0.99, 0.99, 2001) * (bend.w_max if name in BOUNDED else bend.a)
    torch.testing.assert_close(bend(bend.inverse(w)), w, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", BENT)
@given(v=st.floats(-1e3, 1e3), a=st.floats(0.1, 10), b=st.floats(0.1, 10))
@settings(max_examples=50, deadline=None)
def test_the_curve_is_odd_increasing_bounded_and_steepest_at_zero(name: str, v: float, a: float, b: float) -> None:
    bend = Compander(name, torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    point = torch.tensor([v], dtype=torch.float64)
    assert torch.equal(bend(-point), -bend(point))
    assert bool(bend(point + 1e-3) >= bend(point))
    assert bool(bend(point).abs() <= bend.w_max * (1 + 1e-15))
    assert bool(bend.slope(point) <= bend.slope_at_zero * (1 + 1e-12))
    torch.testing.assert_close(bend.slope(torch.zeros(1, dtype=torch.float64)), bend.slope_at_zero.reshape(1))


@pytest.mark.parametrize("name", BENT)
@pytest.mark.parametrize("shape", [(), (4, 1)], ids=["layer", "channel"])
def test_gradients_of_v_a_and_b_agree_with_finite_differences_twice_and_forwards(
    name: str, shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()

    arguments = (draw(4, 3), draw(*shape), draw(*shape))
    function = companding_function(name)

    def bend(v: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
        return compand_value(v, log_a, log_b, function)

    assert torch.autograd.gradcheck(bend, arguments, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(bend, arguments)


def test_the_gradients_of_arctan_are_the_papers() -> None:
    v = torch.linspace(-3, 3, 7, dtype=torch.float64)
    a, b = torch.tensor(0.7, dtype=torch.float64), torch.tensor(1.3, dtype=torch.float64)
    log_a, log_b = a.log().requires_grad_(), b.log().requires_grad_()
    jacobian = torch.autograd.functional.jacobian(
        lambda p, q: compand_value(v, p, q, companding_function()), (log_a, log_b)
    )
    # dw/da = arctan(v/b) and dw/db = -a v/(b^2 + v^2); the chain rule of the logarithm multiplies by a and b.
    torch.testing.assert_close(jacobian[0], a * torch.atan(v / b))
    torch.testing.assert_close(jacobian[1], b * (-a * v / (b**2 + v**2)))


def test_a_wide_curve_is_the_identity() -> None:
    v = torch.linspace(-2, 2, 101, dtype=torch.float64)
    wide = Compander("arctan", a=torch.tensor(1e6, dtype=torch.float64))
    # a = b large: arctan(x) = x - x^3/3, so the difference is below v^3/(3 a^2) = 3e-12.
    torch.testing.assert_close(wide(v), v, rtol=0, atol=1e-11)


def test_identity_switches_companding_off_bit_for_bit() -> None:
    model, x = mlp(), batch()[0]
    before = model(x).detach()
    compand(model, fn="identity")
    assert torch.equal(model(x), before)


def test_one_gradient_step_in_v_is_the_preconditioned_step_in_w() -> None:
    bend = Compander("arctan", torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64))
    v = torch.linspace(-2, 2, 41, dtype=torch.float64)
    w, gradient, lr = bend(v), torch.linspace(1, -1, 41, dtype=torch.float64), 1e-5
    stepped = bend(v - lr * gradient * bend.slope(v))
    preconditioned = w - lr * (bend.a / bend.b) ** 2 * torch.cos(w / bend.a) ** 4 * gradient
    # The next order is lr^2 psi''/2 times squares of order one: 1e-9.
    torch.testing.assert_close(stepped, preconditioned, rtol=0, atol=1e-9)


def test_the_fused_loop_agrees_with_pytorch_to_float32_resolution() -> None:
    pytest.importorskip("numba", reason="the fused CPU loop needs numba")
    v = torch.cat(
        [torch.linspace(-5, 5, 10001), torch.logspace(-30, 30, 2001), torch.tensor([0.0, math.inf, -math.inf])]
    )
    assert arctan_kernel.applies(v)
    exact = 0.3 * torch.atan(v.double() / 0.2)
    torch.testing.assert_close(arctan_kernel.value(v, 0.3, 0.2).double(), exact, rtol=4e-7, atol=1e-40)
    gradient = torch.linspace(-1, 1, v.numel())
    slope = (0.3 / 0.2) / (1 + (v.double() / 0.2) ** 2)
    finite = v.abs() < 1e15  # beyond, the square leaves float32 and the slope is 0 within 1e-30
    torch.testing.assert_close(
        arctan_kernel.times_slope(gradient, v, 0.3, 0.2).double()[finite],
        (gradient * slope)[finite],
        rtol=4e-7,
        atol=1e-30,
    )
    assert bool(arctan_kernel.value(torch.full((5000,), math.nan), 0.3, 0.2).isnan().all())


def test_nothing_but_the_free_parameter_is_kept_for_the_backward_pass() -> None:
    layer = nn.Linear(32, 32)
    compand(layer)
    kept: list[Tensor] = []
    free = layer.parametrizations.weight.original
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        weight = layer.weight
    assert {t.data_ptr() for t in kept if t.numel() > 1} == {free.data_ptr()}
    assert weight.shape == free.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    model = nn.Linear(16, 16)
    handle = compand(model)
    log_a = handle.companders["weight"].log_a.clone()
    model.to(dtype)
    compander, v = handle.companders["weight"], model.parametrizations.weight.original
    assert compander.log_a.dtype is torch.float32
    assert torch.equal(compander.log_a, log_a)  # not rounded to half on the way
    assert model.weight.dtype is dtype
    assert torch.equal(model.weight, compander(v.float()).to(dtype))


def test_under_autocast_the_curve_stays_in_float32() -> None:
    model = nn.Linear(16, 16)
    compand(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.weight.dtype is torch.float32
        assert model(torch.randn(2, 16)).dtype is torch.bfloat16


# -- a companded model -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*BENT, "identity"])
@pytest.mark.parametrize("per", ["layer", "network", "channel"])
def test_the_function_is_kept_at_the_start_and_after_folding(name: str, per: str) -> None:
    model, (x, _) = mlp(), batch()
    before, plain_state = model(x).detach(), model.state_dict()
    handle = compand(model, fn=name, per=per, learn=name != "identity")
    assert float((model(x).detach() - before).abs().max()) < 1e-5
    companded = model(x).detach()
    folded = handle.fold()
    assert float((folded(x).detach() - companded).abs().max()) < 1e-6
    assert list(folded.state_dict()) == list(plain_state)
    assert type(folded[0]) is nn.Linear
    mlp(seed=3).load_state_dict(folded.state_dict())


def test_weights_stay_below_the_bound_under_huge_gradients() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    handle = compand(layer)
    w_max = handle.stats()["weight"]["w_max"]
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    for step in range(10_000):
        layer.parametrizations.weight.original.grad = torch.full((4, 4), 1e6 * (-1) ** (step % 7))
        optimizer.step()
    assert float(layer.weight.detach().abs().max()) <= w_max * (1 + 1e-6)
    assert bool(torch.isfinite(layer.weight).all())


def test_automatic_a_is_three_standard_deviations_and_the_slope_at_zero_is_one() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    spread = float(layer.weight.std(correction=0))
    for name in BENT:
        bend = compand(copy.deepcopy(layer), fn=name).companders["weight"]
        assert float(bend.slope_at_zero) == pytest.approx(1, rel=1e-6)
        if name != "mu_law":
            assert float(bend.a) >= 3 * spread * (1 - 1e-6)
    assert float(compand(layer).companders["weight"].a) == pytest.approx(3 * spread, rel=1e-6)


def test_automatic_a_leaves_room_for_the_largest_weight() -> None:
    layer = nn.Linear(10, 10)
    with torch.no_grad():
        layer.weight.normal_(0, 0.01)
        layer.weight[0, 0] = 5.0
    stats = compand(layer).stats()["weight"]
    assert stats["max_abs"] == pytest.approx(5.0, rel=1e-5)
    assert stats["w_max"] == pytest.approx(5.0 / 0.9, rel=0.2) or stats["w_max"] > 5.0 / 0.9


def test_a_layer_that_starts_at_zero_gets_the_scale_of_the_usual_start() -> None:
    layer = nn.Linear(12, 3)
    nn.init.zeros_(layer.weight)
    handle = compand(layer)
    assert handle.stats()["weight"]["a"] == pytest.approx(3 / math.sqrt(36), rel=1e-6)
    assert bool((layer.weight == 0).all())


def test_direct_initialisation_divides_by_the_slope_at_zero() -> None:
    layer = nn.Linear(6, 6)
    w = layer.weight.detach().clone()
    handle = compand(layer, a=0.5, b=0.25, init="direct")
    torch.testing.assert_close(layer.parametrizations.weight.original, w / 2)
    torch.testing.assert_close(layer.weight, handle.companders["weight"](w / 2))


def test_the_weight_is_computed_once_in_a_pass_and_anew_in_the_next() -> None:
    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.RNNCell(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.zeros_like(x[0])
            for step in x:
                h = self.cell(step, h)
            return h

    torch.manual_seed(0)
    model, x = Unrolled(), torch.randn(5, 2, 4)
    before = model(x)
    handle = compand(model)
    bent: list[int] = []
    for compander in handle.companders.values():
        inner = compander._bend
        compander._bend = lambda v, inner=inner: (bent.append(1), inner(v))[1]  # type: ignore[method-assign]
    assert float((model(x) - before).detach().abs().max()) < 1e-6
    assert len(bent) == 2  # two weights, five uses each
    with torch.no_grad():
        model.cell.parametrizations.weight_ih.original.zero_()
    assert float((model(x) - before).detach().abs().max()) > 1e-3
    assert all(c._held is None for c in handle.companders.values())


def test_a_weight_computed_without_gradients_is_not_reused_with_them() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                target = self.layer(x)
            return (self.layer(x) - 2 * target).sum()

    model = Twice()
    compand(model)
    model(torch.ones(2, 4)).backward()
    assert float(model.layer.parametrizations.weight.original.grad.abs().sum()) > 0


def test_an_error_inside_the_model_does_not_leave_a_stale_weight() -> None:
    model = mlp()
    handle = compand(model)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(torch.ones(2, 5))
    assert all(c._held is None and c._scope is not None and c._scope.depth == 0 for c in handle.companders.values())


def test_two_passes_may_be_differentiated_in_any_order() -> None:
    model, (x, y) = mlp(), batch()
    compand(model, learn=True)
    first, second = nn.functional.cross_entropy(model(x), y), nn.functional.cross_entropy(model(2 * x), y)
    second.backward()
    first.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_functional_call_deepcopy_and_the_model_itself_agree() -> None:
    model, (x, y) = mlp(), batch()
    compand(model, learn=True)
    twin = copy.deepcopy(model)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    outside = nn.functional.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)
    gradients = torch.autograd.grad(outside, list(parameters.values()))
    for copied in (model, twin):
        copied.zero_grad()
        nn.functional.cross_entropy(copied(x), y).backward()
        for got, expected in zip(copied.parameters(), gradients, strict=True):
            torch.testing.assert_close(got.grad, expected)
    moved = {name: p + 0.1 for name, p in parameters.items()}
    assert not torch.allclose(torch.func.functional_call(model, moved, (x,)), model(x))


def test_per_example_gradients_by_vmap_sum_to_the_batch_gradient() -> None:
    model, (x, y) = mlp(), batch()
    compand(model, learn=True)
    parameters = dict(model.named_parameters())

    def loss(p: dict[str, Tensor], row: Tensor, label: Tensor) -> Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(model, p, (row[None],)), label[None])

    rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    nn.functional.cross_entropy(model(x), y).backward()
    for name, p in parameters.items():
        torch.testing.assert_close(rows[name].mean(0), p.grad, atol=1e-6, rtol=1e-5)


def test_a_companded_model_compiles_without_a_graph_break() -> None:
    model, (x, _) = mlp(), batch()
    compand(model, learn=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()


def test_a_copy_folds_without_harming_the_original() -> None:
    model, (x, _) = mlp(), batch()
    compand(model)
    twin = copy.deepcopy(model)
    expected = model(x)
    companding_of(twin).fold()
    torch.testing.assert_close(model(x), expected)
    companding_of(model).fold()
    torch.testing.assert_close(twin(x), model(x))


def test_saving_and_loading_continues_the_same_trajectory_bit_for_bit(tmp_path: Path) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = mlp()
        handle = compand(model, learn=True, limit=5.0)
        return model, torch.optim.SGD(handle.parameter_groups(1e-3, lr=0.1), lr=0.1, momentum=0.9, nesterov=True)

    whole, optimizer = start()
    train(whole, optimizer, 10)
    half, first = start()
    train(half, first, 5)
    torch.save({"model": half.state_dict(), "optimizer": first.state_dict()}, tmp_path / "half.pt")
    torch.manual_seed(99)
    resumed = mlp(seed=7)
    handle = compand(resumed, learn=True, limit=5.0)
    second = torch.optim.SGD(handle.parameter_groups(1e-3, lr=0.1), lr=0.1, momentum=0.9, nesterov=True)
    saved = torch.load(tmp_path / "half.pt")
    resumed.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    train(resumed, second, 5)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_checkpoint_names_are_pytorchs() -> None:
    model = mlp()
    compand(model, learn=True)
    names = set(model.state_dict())
    assert {
        "0.parametrizations.weight.original",
        "0.parametrizations.weight.0.log_a",
        "0.parametrizations.weight.0.log_b",
    } <= names
    assert "0.weight" not in names


def test_a_folded_copy_and_state_dict_leave_the_model_companded() -> None:
    model, (x, _) = mlp(), batch()
    handle = compand(model)
    plain = mlp(seed=5)
    plain.load_state_dict(handle.folded_state_dict())
    torch.testing.assert_close(plain(x), model(x))
    assert isinstance(companding_of(model), Companding)
    assert not parametrize.is_parametrized(folded_copy(model)[0])


def test_folding_keeps_the_optimisers_parameters() -> None:
    model = mlp()
    handle = compand(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle.fold()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters()} <= held
    with pytest.raises(StateError, match="folded"):
        handle.stats()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_use_the_bent_weights(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    layer, x = kind(5, 7, num_layers=2, bidirectional=True), torch.randn(3, 4, 5)
    before = layer(x)[0]
    handle = compand(layer)
    assert set(handle.companders) == {
        name for name, _ in kind(5, 7, num_layers=2, bidirectional=True).named_parameters() if "weight" in name
    }
    torch.testing.assert_close(layer(x)[0], before, atol=1e-5, rtol=1e-5)
    layer(x)[0].sum().backward()
    assert float(layer.parametrizations.weight_hh_l1.original.grad.abs().sum()) > 0
    with torch.no_grad():
        layer.parametrizations.weight_hh_l0.original.zero_()
    assert not torch.allclose(layer(x)[0], before)
    layer.double()
    twin = copy.deepcopy(layer)
    expected = layer(x.double())[0]
    handle.fold()
    torch.testing.assert_close(layer(x.double())[0], expected)
    torch.testing.assert_close(twin(x.double())[0], expected)
    assert type(layer) is kind


@pytest.mark.parametrize(
    "layer", [nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3), nn.Bilinear(4, 4, 3)]
)
@pytest.mark.parametrize("per", ["layer", "channel"])
def test_convolutions_and_bilinear_layers_are_companded(layer: nn.Module, per: str) -> None:
    layer = copy.deepcopy(layer)
    before = layer.weight.detach().clone()
    handle = compand(layer, per=per, learn=True)
    torch.testing.assert_close(layer.weight, before)
    expected = (3 if isinstance(layer, nn.Bilinear) else 6) if per == "channel" else 1
    assert handle.companders["weight"].log_a.numel() == expected
    layer.weight.sum().backward()
    assert handle.companders["weight"].log_a.grad.shape == handle.companders["weight"].log_a.shape


def test_attention_is_companded_and_embeddings_only_on_request() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"embedding": nn.Embedding(11, 8), "attention": nn.MultiheadAttention(8, 2)})
    x = torch.randn(3, 2, 8)
    before = model["attention"](x, x, x)[0]
    assert [p.name for p in select(model, ("linear", "attention"), ("bias",))] == [
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    ]
    handle = compand(model, include=("linear", "attention", "embedding"))
    assert "embedding.weight" in handle.companders
    torch.testing.assert_close(model["attention"](x, x, x)[0], before)


def test_biases_norms_and_scales_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.PReLU(2), nn.LayerNorm(4), nn.Linear(4, 4))
    model.register_parameter("scale", nn.Parameter(torch.ones(3, 3)))
    assert list(compand(model).companders) == ["0.weight", "4.weight"]


def test_filters_take_names_and_callables_and_exclude_wins() -> None:
    assert list(compand(mlp(), include="3.*").companders) == ["3.weight"]
    assert list(compand(mlp(), exclude=("bias", "norm", "0")).companders) == ["3.weight"]
    assert list(
        compand(mlp(), include=lambda name, module, tensor: tensor.shape[0] == 3 and tensor.dim() == 2).companders
    ) == ["3.weight"]


def test_tied_weights_share_their_free_parameter() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 6)
            self.out = nn.Linear(6, 11, bias=False)
            self.out.weight = self.embedding.weight

        def forward(self, index: Tensor) -> Tensor:
            return self.out(self.embedding(index))

    model, index = Tied(), torch.arange(5)
    before = model(index)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(InputError, match=r"tied weight.*include both"):
        compand(model)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    handle = compand(model, include=("linear", "embedding"))
    assert len(list(model.parameters())) == 1
    torch.testing.assert_close(model(index), before)
    handle.fold()
    torch.testing.assert_close(model(index), before)
    assert model.out.weight is model.embedding.weight


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_companding_stands_before_weight_and_spectral_normalisation(norm: object) -> None:
    torch.manual_seed(0)
    layer = norm(nn.Linear(5, 4)).eval()  # type: ignore[operator]
    x = torch.randn(2, 5)
    before = layer(x)
    handle = compand(layer)
    torch.testing.assert_close(layer(x), before)
    with torch.no_grad():
        for entry in layer.parametrizations.weight.parameters():
            entry.mul_(50)  # the directions saturate, and the norm still stands on top
    if norm is spectral_norm:
        layer.train()
        for _ in range(200):
            layer(x)
        layer.eval()
        assert float(torch.linalg.matrix_norm(layer.weight, 2)) == pytest.approx(1, rel=1e-3)
    expected = layer(x)
    handle.fold()
    torch.testing.assert_close(layer(x), expected)


def test_spectral_normalisation_can_be_added_after_companding() -> None:
    layer = nn.Linear(5, 4)
    handle = compand(layer)
    spectral_norm(layer)
    layer(torch.randn(2, 5))
    handle.fold()
    assert [type(p).__name__ for p in layer.parametrizations.weight] == ["_SpectralNorm"]


# -- learning a and b --------------------------------------------------------------------------------------------------------------------


def test_parameter_groups_spare_a_b_biases_and_norms_from_decay_and_slow_a_and_b() -> None:
    model = mlp()
    handle = compand(model, learn=True)
    groups = {g["name"]: g for g in handle.parameter_groups(weight_decay=5e-4, lr=0.1)}
    companders = handle.companders.values()
    assert {id(p) for p in groups["slow"]["params"]} == {id(p) for c in companders for p in (c.log_a, c.log_b)}
    assert groups["slow"]["weight_decay"] == 0
    assert groups["slow"]["lr"] == pytest.approx(0.01)
    assert [tuple(p.shape) for p in groups["decay"]["params"]] == [(16, 8), (3, 16)]
    assert groups["no_decay"]["weight_decay"] == 0
    assert all(p.dim() == 1 for p in groups["no_decay"]["params"])
    assert sum(len(g["params"]) for g in groups.values()) == len(list(model.parameters()))


def test_decay_never_moves_a_and_b() -> None:
    model = mlp()
    handle = compand(model, learn=True)
    before = {name: (float(c.log_a), float(c.log_b)) for name, c in handle.companders.items()}
    optimizer = torch.optim.SGD(handle.parameter_groups(weight_decay=0.5, lr=0.1), lr=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert before == {name: (float(c.log_a), float(c.log_b)) for name, c in handle.companders.items()}


def test_a_and_b_stay_positive_whatever_the_optimiser_does() -> None:
    layer = nn.Linear(4, 4)
    handle = compand(layer, learn=True)
    bend = handle.companders["weight"]
    with torch.no_grad():
        bend.log_a.sub_(30)
        bend.log_b.add_(30)
    assert float(bend.a) > 0
    assert float(bend.b) > 0


def test_a_box_bounds_how_far_a_and_b_go_and_still_has_a_gradient() -> None:
    layer = nn.Linear(4, 4)
    bend = compand(layer, learn=True, limit=4.0).companders["weight"]
    start = float(bend.a)
    with torch.no_grad():
        bend.log_a.add_(3.0)
    assert start < float(bend.a) < 4 * start
    layer.weight.square().sum().backward()
    assert float(bend.log_a.grad.abs()) > 0
    with torch.no_grad():
        bend.log_a.add_(1e3)
    assert float(bend.a) <= 4 * start * (1 + 1e-6)


def test_one_pair_for_the_network_is_one_pair_of_parameters() -> None:
    model = mlp()
    handle = compand(model, learn=True, per="network")
    first, second = handle.companders.values()
    assert first.log_a is second.log_a
    twin = companding_of(copy.deepcopy(model))
    assert len({id(c.log_a) for c in twin.companders.values()}) == 1


def test_a_run_whose_a_or_b_leaves_four_decades_warns_with_the_layer() -> None:
    model, (x, _) = mlp(), batch()
    handle = compand(model, learn=True)
    handle.check()
    with torch.no_grad():
        handle.companders["3.weight"].log_b.sub_(math.log(2e4))
    with pytest.warns(PoiseWarning, match=r"layer '3\.weight'.*multiplier"):
        deque((model(x) for _ in range(100)), maxlen=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle.check()  # once a layer


def test_a_and_b_that_became_nan_warn_too() -> None:
    handle = compand(nn.Linear(3, 3), learn=True)
    with torch.no_grad():
        handle.companders["weight"].log_a.fill_(math.nan)
    with pytest.warns(PoiseWarning, match="weight"):
        handle.check()


def test_the_librarys_groups_train_at_a_high_rate_and_keep_a_and_b_near_their_start() -> None:
    model, (x, y) = mlp(width=32), batch(rows=32)
    handle = compand(model, learn=True)
    optimizer = torch.optim.SGD(handle.parameter_groups(5e-4, lr=0.1), lr=0.1, momentum=0.9, nesterov=True)
    train(model, optimizer, 200)
    assert float(nn.functional.cross_entropy(model(x), y)) < 1.0
    assert all(float(c.drift()) < math.log(10) for c in handle.companders.values())


def test_l1_and_the_barrier_on_a_companded_model_warn() -> None:
    handle = compand(mlp())
    bend = handle.companders["0.weight"]
    with pytest.warns(PoiseWarning, match="l1"):
        bend.check_objective(poise.parse("cross_entropy + 0.1*l1"))
    with pytest.warns(PoiseWarning, match="compand_barrier"):
        bend.check_objective(poise.parse("cross_entropy + 0.1*compand_barrier"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bend.check_objective(poise.parse("cross_entropy + 0.1*l2"))


def test_a_run_of_fit_records_the_curve_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    class PullThePlug:
        def on_step_end(self, state: object) -> None:
            if state.step == 8:  # type: ignore[attr-defined]
                raise RuntimeError("no power")

    def run(seed: int, *more: object, **options: object) -> tuple[nn.Module, poise.Run]:
        model, (x, y) = mlp(seed), batch(rows=64)
        callbacks = [compand(model, learn=True), *more]
        record = poise.fit(
            model, "cross_entropy", (x, y), solver="adamw", lr=0.01, steps=12, batch_size=16, device="cpu", callbacks=callbacks, **options
        )  # fmt: skip
        return model, record

    whole, record = run(0)
    assert len(record.history["companding/0.weight/a"]) == 3
    with pytest.raises(RuntimeError, match="no power"):
        run(0, PullThePlug(), checkpoint=tmp_path, checkpoint_steps=6)
    resumed, _ = run(4, checkpoint=tmp_path)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_fit_warns_of_l1_on_a_companded_model() -> None:
    model, (x, y) = mlp(), batch()
    handle = compand(model)
    with pytest.warns(PoiseWarning, match="l1"):
        poise.fit(model, "cross_entropy + 1e-4*l1", (x, y), steps=1, callbacks=[handle], device="cpu")


# -- decay -------------------------------------------------------------------------------------------------------------------------------


def test_decay_on_w_shrinks_the_weight_itself_by_the_decoupled_factor() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    handle = compand(layer, decay_on="w")
    optimizer = torch.optim.SGD(handle.parameter_groups(weight_decay=0.2, lr=0.5), lr=0.5)
    handle.follow(optimizer)
    before = layer.weight.detach().clone()
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(layer.weight, 0.9 * before)
    assert handle.stats()["weight"]["decays_w"] == 1


def test_decay_on_v_is_the_gradient_of_the_barrier_seen_from_w() -> None:
    bend = Compander("arctan", torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64))
    w = torch.linspace(-1, 1, 11, dtype=torch.float64).requires_grad_()
    barrier = 0.5 * (bend.b * torch.tan(w / bend.a)).square().sum()
    (gradient,) = torch.autograd.grad(barrier, w)
    v = bend.inverse(w)
    torch.testing.assert_close(gradient * bend.slope(v), v)  # dL/dv = dL/dw psi'(v) = v


@pytest.mark.parametrize("name", BOUNDED)
def test_the_barrier_is_half_the_squared_free_parameter(name: str) -> None:
    torch.manual_seed(0)
    weight = (0.2 * torch.randn(4, 3, dtype=torch.float64)).requires_grad_()
    bend = Compander(name, torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64))
    value = CompandBarrier(a=1.0, b=0.7, fn=name)({"weight": weight, "bias": torch.ones(3)})
    torch.testing.assert_close(value, 0.5 * bend.inverse(weight).square().sum(), rtol=1e-6, atol=0)
    assert torch.autograd.gradcheck(lambda w: CompandBarrier(a=1.0, b=0.7, fn=name)({"weight": w}), (weight,))


def test_the_barrier_is_the_ridge_near_zero_and_infinite_at_the_bound() -> None:
    small = torch.full((2, 2), 1e-3)
    torch.testing.assert_close(CompandBarrier(a=0.5)({"w": small}), 0.5 * small.square().sum(), rtol=1e-5, atol=0)
    for edge in (0.5 * math.pi / 2 * 1.0001, 10.0):
        weight = torch.full((1, 1), edge, requires_grad=True)
        value = CompandBarrier(a=0.5)({"w": weight})
        assert math.isinf(float(value))
        value.backward()
        assert bool(torch.isfinite(weight.grad).all())


def test_the_barrier_is_a_term_of_the_formula_language() -> None:
    objective = poise.parse("cross_entropy + 0.01*compand_barrier(a=0.5, b=0.3)")
    assert str(objective) == "cross_entropy + 0.01*compand_barrier(a=0.5, b=0.3)"
    x, y = batch()
    model = mlp()
    total = objective(logits=model(x), target=y, parameters=dict(model.named_parameters()))
    expected = nn.functional.cross_entropy(model(x), y) + 0.01 * CompandBarrier(a=0.5, b=0.3)(
        dict(model.named_parameters())
    )
    torch.testing.assert_close(total, expected)
    assert float(CompandBarrier(include="0.*")(dict(model.named_parameters()))) < float(
        CompandBarrier()(dict(model.named_parameters()))
    )


# -- a trained model ---------------------------------------------------------------------------------------------------------------------


def test_converting_a_trained_model_reports_what_was_clipped_and_what_changed() -> None:
    model, (x, _) = mlp(), batch()
    before = model(x)
    largest = float(model[0].weight.abs().max())
    handle, report = compand_pretrained(model, x, a=largest / 2)  # the bound is 0.785 of the largest weight
    assert 0 < report.clipped_share["0.weight"] < 0.5
    assert report.weight_change["0.weight"] == pytest.approx(largest * (1 - 0.99 * math.pi / 4), rel=1e-3)
    assert report.output_change == pytest.approx(float((model(x) - before).abs().max()), rel=1e-5)
    assert handle.stats()["0.weight"]["saturated"] > 0


def test_a_conversion_that_changes_too_much_is_undone() -> None:
    model, (x, _) = mlp(), batch()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(InputError, match="tolerance"):
        compand_pretrained(model, x, a=0.05, tolerance=1e-3)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    _, report = compand_pretrained(model, x, tolerance=1e-5)
    assert report.relative_output_change < 1e-5
    assert set(report.clipped_share.values()) == {0.0}


def test_the_opposite_curve_empties_the_middle_where_companding_fills_it() -> None:
    """Powerpropagation, `w = v|v|^(alpha-1)`, is flat at zero: the same gradient field leaves more weights there than arctan does."""
    power = CompandingFunction(
        "power", lambda u: u * u.abs(), lambda u: 2 * u.abs(), lambda y: y.sign() * y.abs().sqrt(), math.inf, 1.0
    )
    torch.manual_seed(0)
    start, gradient = 0.1 * torch.randn(2000, dtype=torch.float64), 0.3 * torch.randn(2000, dtype=torch.float64)
    near = {}
    for bend in (Compander(power, 1.0, 1.0), Compander("arctan", 0.3)):
        v = bend.inverse(start)
        for _ in range(50):
            v = v - 0.01 * gradient * bend.slope(v)
        near[bend.function.name] = float((bend(v).abs() < 0.02).double().mean())
    assert near["power"] > 1.2 * near["arctan"]


# -- what is refused ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"a": 0.0}, "a must be finite and above 0"),
        ({"a": -1.0}, "a must be finite and above 0"),
        ({"b": math.nan}, "b must be finite and above 0"),
        ({"a": "3 sigma"}, "'auto'"),
        ({"fn": "sigmoid"}, "fn='sigmoid' is not known"),
        ({"fn": "arctam"}, "Did you mean 'arctan'"),
        ({"fn": "mu_law", "mu": 0.0}, "mu must be"),
        ({"fn": "identity", "learn": True}, "no a or b to learn"),
        ({"per": "weight"}, "per must be one of"),
        ({"init": "random"}, "init must be one of"),
        ({"decay_on": "a"}, "decay_on must be one of"),
        ({"limit": 1.0, "learn": True}, "limit must be above 1"),
        ({"multiple": -3.0}, "multiple must be"),
        ({"a": 1e-3}, r"beyond 0.99\*w_max.*a='auto', or clip=True"),
        ({"include": ("convolution",)}, "matches no weight"),
        ({"include": ("conv",)}, "no weight is selected"),
    ],
)
def test_a_wrong_argument_is_named_and_the_model_stays_as_it_was(options: dict[str, object], message: str) -> None:
    model = mlp()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        compand(model, **options)  # type: ignore[arg-type]
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert not model._forward_hooks


def test_a_layer_that_cannot_be_bent_is_named() -> None:
    model = mlp()
    compand(model)
    with pytest.raises(InputError, match=r"0\.weight is companded already"):
        compand(model)
    with pytest.raises(InputError, match=r"_Orthogonal"):
        compand(orthogonal(nn.Linear(3, 3)))
    with pytest.raises(InputError, match="lazy"):
        compand(nn.Sequential(nn.LazyLinear(3)))
    broken = nn.Linear(3, 3)
    nn.init.constant_(broken.weight, math.nan)
    with pytest.raises(InputError, match="NaN"):
        compand(broken)
    quantised = nn.Linear(3, 3)
    quantised.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InputError, match="before quantising"):
        compand(quantised)
    with pytest.raises(StateError, match="no companded weight"):
        companding_of(nn.Linear(3, 3))
    with pytest.raises(InputError, match="above 0"):
        CompandBarrier(a=0.0)


def test_assigning_a_weight_stores_its_free_parameter_and_refuses_what_is_out_of_reach() -> None:
    layer = nn.Linear(3, 3)
    compand(layer, a=1.0)
    layer.weight = torch.full((3, 3), 0.5)
    torch.testing.assert_close(layer.weight, torch.full((3, 3), 0.5))
    with pytest.raises(InputError, match="w_max"):
        layer.weight = torch.full((3, 3), 1.6)


def test_a_part_reads_from_text_and_says_what_is_wrong() -> None:
    assert parse_part("compand") == ("compand", {})
    assert parse_part("compand(fn='tanh', a=0.5, include=['0.*'])") == (
        "compand",
        {"fn": "tanh", "a": 0.5, "include": ["0.*"]},
    )
    handle = apply_part(mlp(), "compand(learn=True, per='network')")
    assert isinstance(handle, Companding)
    for text, message in (
        ("compand(", "reads like"),
        ("compand(0.5)", "keyword arguments"),
        ("compnd(a=1)", "Did you mean 'compand'"),
        ("compand(a=f(1))", "must be a number"),
        ("compand(**{})", "must be a number"),
    ):
        with pytest.raises(FormulaError, match=message):
            apply_part(mlp(), text)
    with pytest.raises(InputError, match="Did you mean 'learn'"):
        apply_part(mlp(), "compand(lern=True)")


def test_every_name_in_the_table_is_a_function() -> None:
    for name in function_names():
        function = companding_function(name)
        assert float(function.value(torch.zeros(1))) == 0.0
