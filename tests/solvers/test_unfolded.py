"""Unfolded solvers: they are the plain solvers until they learn, layer by layer and gradient by gradient."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from poise import penalties
from poise.data.sparse_signals import BernoulliGaussian, gaussian_matrix
from poise.errors import InputError, PoiseWarning
from poise.solvers import SignalOperator, TopK, Unfolded, alista_weights, coordinate_lasso, lasso_gap, recover
from poise.solvers.signal_operators import largest_eigenvalue


def problem(
    batch: int = 5, m: int = 15, n: int = 30, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = BernoulliGaussian(m, n, p=0.15, matrix_seed=seed, dtype=dtype)(batch, generator)
    return drawn.operator, drawn.y


def loop(A: Tensor, y: Tensor, steps: list[float], weight: float, hard: bool) -> Tensor:
    """ISTA and IHT as a textbook writes them, for one signal after the other."""
    rows = []
    for each in y:
        x = torch.zeros(A.shape[1], dtype=A.dtype)
        for alpha in steps:
            u = x + alpha * (A.T @ (each - A @ x))
            x = (
                torch.where(u.abs() > (2 * alpha * weight) ** 0.5, u, 0.0)
                if hard
                else u.sign() * (u.abs() - alpha * weight).clamp_min(0)
            )
        rows.append(x)
    return torch.stack(rows)


# ---- the layers are the plain solver -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["ista", "iht"])
@pytest.mark.parametrize("gram", [False, True])
def test_untrained_layers_are_the_textbook_iteration(form: Any, gram: bool) -> None:
    A, y = problem()
    model = Unfolded(form, layers=7, weight=0.05, gram=gram)
    alpha = float(1 / largest_eigenvalue(A))
    torch.testing.assert_close(
        model(A, y).detach(), loop(A, y, [alpha] * 7, 0.05, form == "iht"), atol=1e-12, rtol=1e-10
    )


@pytest.mark.parametrize("form", ["ista", "iht"])
def test_learned_steps_are_the_solver_run_with_this_list(form: Any) -> None:
    A, y = problem()
    model = Unfolded(form, layers=6, weight=0.05, gram=False).double()
    with torch.no_grad():
        model.set_steps(0.5 + 0.4 * torch.arange(6))
    result = recover(A, y, model.penalty, weight=0.05, step=model.export(A))
    torch.testing.assert_close(result.x, model(A, y).detach(), atol=1e-14, rtol=0)
    torch.testing.assert_close(
        model(A, y).detach(), loop(A, y, model.export(A), 0.05, form == "iht"), atol=1e-12, rtol=1e-10
    )


def test_many_layers_reach_the_lasso_of_coordinate_descent() -> None:
    A, y = problem(batch=4)
    model = Unfolded("ista", layers=1, weight=0.05, beyond="safe").double()
    with torch.no_grad():
        x = model(A, y, layers=1500)
    exact = coordinate_lasso(A, y, 0.05, tolerance=1e-12)
    assert float(lasso_gap(A, y, x, 0.05).max()) < 1e-6
    torch.testing.assert_close(x, exact.x, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.objective(A, y, x), exact.objective, atol=1e-8, rtol=0)


def test_with_the_identity_one_layer_is_the_proximal_map() -> None:
    y = torch.tensor([[2.0, -0.3, 0.5, -1.0]])
    soft, hard = Unfolded("ista", 1, weight=0.4), Unfolded("iht", 1, weight=0.4)
    torch.testing.assert_close(soft(torch.eye(4), y).detach(), penalties.L1().prox(y, 0.4))
    torch.testing.assert_close(hard(torch.eye(4), y).detach(), penalties.L0().prox(y, 0.4))


def test_with_orthonormal_columns_one_layer_is_optimal() -> None:
    A = torch.linalg.qr(torch.randn(9, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    y = torch.randn(4, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = Unfolded("ista", 1, weight=0.3)(A, y).detach()
    assert float(lasso_gap(A, y, x, 0.3).max()) < 1e-12


@pytest.mark.parametrize("form", ["ista", "iht"])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_objective_falls_from_layer_to_layer_while_no_step_exceeds_one(form: Any, share: float) -> None:
    A, y = problem()
    model = Unfolded(form, layers=40, weight=0.05).double()
    with torch.no_grad():
        model.step.fill_(share)
        trace = model(A, y, trace=True)[1]
    values = model.objective(A, y, trace)
    assert bool((values[1:] <= values[:-1] + 1e-12).all())


def test_a_k_sparse_layer_keeps_k_entries() -> None:
    A, y = problem()
    x = Unfolded("iht", 30, TopK(3))(A, y)
    assert ((x != 0).sum(-1) == 3).all()


def test_k_sparse_iht_reaches_what_orthogonal_matching_pursuit_finds_on_an_easy_problem() -> None:
    from sklearn.linear_model import orthogonal_mp

    A = gaussian_matrix(40, 60, dtype=torch.float64)
    x = torch.zeros(60, dtype=torch.float64)
    x[[4, 20, 51]] = torch.tensor([3.0, -2.0, 2.5], dtype=torch.float64)
    found = Unfolded("iht", 1, TopK(3), beyond="safe").double()(A, A @ x, layers=2000).detach()
    greedy = torch.from_numpy(orthogonal_mp(A.numpy(), (A @ x).numpy(), n_nonzero_coefs=3))
    torch.testing.assert_close(found, greedy, atol=1e-6, rtol=0)
    torch.testing.assert_close(found, x, atol=1e-6, rtol=0)


# ---- penalties, operators, complex numbers --------------------------------------------------------------------------------


PENALTIES = [
    penalties.L1(torch.linspace(0.5, 2, 30)), penalties.ElasticNet(0.7), penalties.GroupLasso(5), penalties.MCP(3.0), penalties.SCAD(1.0),
    penalties.CappedL1(1.0), penalties.TotalVariation(), penalties.Scaled(penalties.L1(), 0.5, 0.1),
]  # fmt: skip


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda p: type(p).__name__)
def test_any_penalty_can_be_unfolded_signal_by_signal(penalty: Any) -> None:
    A, y = problem(batch=3)
    model = Unfolded("ista", 30, penalty, weight=0.03)
    with torch.no_grad():
        together = model(A, y, trace=True)[1]
        apart = torch.stack([model(A, each) for each in y])
    torch.testing.assert_close(together[-1], apart, atol=1e-12, rtol=0)
    values = model.objective(A, y, together)
    single = torch.stack(
        [0.5 * (y[i] - A @ apart[i]).square().sum() + 0.03 * penalty.value(apart[i]) for i in range(3)]
    )
    torch.testing.assert_close(values[-1], single, atol=1e-10, rtol=1e-10)
    assert bool((values[1:] <= values[:-1] + 1e-9).all())


def test_a_group_penalty_learns_its_steps() -> None:
    A, y = problem(batch=3)
    model = Unfolded("ista", 4, penalties.GroupLasso(5), weight=0.03)
    model.objective(A, y, model(A, y)).sum().backward()
    assert model.step.grad is not None
    assert bool((model.step.grad != 0).all())


@pytest.mark.filterwarnings("ignore:Converting a tensor")
def test_a_proximal_map_without_a_gradient_is_refused_in_training_and_runs_without() -> None:
    A, y = problem(batch=2)
    model = Unfolded("ista", 2, penalties.TotalVariation())
    with pytest.raises(InputError, match="TotalVariation passes no gradient"):
        model(A, y)


@pytest.mark.parametrize("form", ["ista", "iht"])
def test_complex_signals_shrink_in_modulus(form: Any) -> None:
    A, y = problem(dtype=torch.complex128)
    model = Unfolded(form, 200, weight=0.05).double()
    with torch.no_grad():
        x, trace = model(A, y, trace=True)
    values = model.objective(A, y, trace)
    assert values.dtype == torch.float64
    assert bool((values[1:] <= values[:-1] + 1e-12).all())
    if form == "ista":  # stationary: A'r = weight x / |x| on the support, at most weight in modulus outside
        with torch.no_grad():
            x = Unfolded("ista", 1, weight=0.05, beyond="safe").double()(A, y, layers=5000)
        slope = (y - x @ A.mT) @ A.conj()
        torch.testing.assert_close(slope[x != 0], 0.05 * torch.sgn(x[x != 0]), atol=1e-6, rtol=0)
        assert float(slope.abs().max()) < 0.05 + 1e-6


def test_a_real_problem_in_complex_numbers_has_the_real_answer() -> None:
    A, y = problem()
    model = Unfolded("ista", 9, weight=0.05)
    torch.testing.assert_close(model(A.cdouble(), y.cdouble()).real, model(A, y), atol=1e-12, rtol=0)


def test_a_batch_of_operators_is_one_operator_after_the_other() -> None:
    A = gaussian_matrix(8, 16, batch=4, dtype=torch.float64)
    y = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = Unfolded("ista", 6, weight=0.05)
    torch.testing.assert_close(model(A, y), torch.stack([model(A[i], y[i]) for i in range(4)]), atol=1e-12, rtol=0)
    assert model.alpha(A).shape == (4, 6)


def test_an_operator_without_a_matrix_gives_what_its_matrix_gives() -> None:
    kernel = torch.tensor([0.5, 1.0, -0.3, 0.2, 0.0], dtype=torch.float64)
    matrix = torch.stack([torch.roll(torch.nn.functional.pad(kernel, (0, 11)), i) for i in range(16)]).T.contiguous()
    spectrum = torch.fft.fft(matrix[:, 0])
    free = SignalOperator(
        lambda x: torch.fft.ifft(torch.fft.fft(x) * spectrum).real,
        lambda r: torch.fft.ifft(torch.fft.fft(r) * spectrum.conj()).real,
        (16, 16),
        dtype=torch.float64,
    )
    y = torch.randn(3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(free.lipschitz) == pytest.approx(float(largest_eigenvalue(matrix)), rel=1e-4)
    model = Unfolded("ista", 5, weight=0.1)
    exact = SignalOperator(
        free.apply, free.adjoint, (16, 16), lipschitz=largest_eigenvalue(matrix), dtype=torch.float64
    )
    torch.testing.assert_close(model(exact, y), model(matrix, y), atol=1e-12, rtol=0)


def test_power_iteration_gives_a_safe_step_on_large_matrices() -> None:
    A = gaussian_matrix(1100, 1300)
    from poise.solvers import signal_operators

    bound = float(signal_operators._power_iteration(signal_operators._Dense(A)))
    exact = float(torch.linalg.svdvals(A)[0].square())
    assert bound == pytest.approx(exact, rel=5e-3)


def test_what_is_known_of_a_matrix_is_forgotten_when_it_is_written_to() -> None:
    A, y = problem()
    model = Unfolded("ista", 3, weight=0.05)
    model(A, y)
    A.mul_(3.0)
    torch.testing.assert_close(model(A, y), model(A.clone(), y))


def test_inference_mode_gives_the_same_answer() -> None:
    A, y = problem()
    model = Unfolded("ista", 3, weight=0.05)
    with torch.inference_mode():
        inside = model(A.clone(), y)
    torch.testing.assert_close(inside.clone(), model(A, y).detach())


# ---- what is learned -----------------------------------------------------------------------------------------------------


def test_gradients_of_ista_are_exact_away_from_kinks() -> None:
    A, y = problem(batch=2, m=5, n=8)
    model = Unfolded("ista", 3, weight=0.05, learn=("step", "threshold")).double()
    numbers = [p for _, p in model.named_parameters()]

    def value(*given: Tensor) -> Tensor:
        names = [n for n, _ in model.named_parameters()]
        return torch.func.functional_call(model, dict(zip(names, given, strict=True)), (A, y))

    assert torch.autograd.gradcheck(value, [p.detach().clone().requires_grad_() for p in numbers])


def test_gradients_are_exact_for_complex_signals() -> None:
    A, y = problem(batch=2, m=5, n=8, dtype=torch.complex128)
    model = Unfolded("ista", 2, weight=0.05).double()

    def value(*given: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"step": given[0]}, (A, y))

    assert torch.autograd.gradcheck(value, [torch.tensor([0.9, 1.3], dtype=torch.float64, requires_grad=True)])


def test_a_soft_threshold_teaches_step_and_level_a_hard_one_the_step_alone() -> None:
    from poise.solvers.unfolded_layers import hard_threshold, shrink

    u = torch.tensor([2.0, -3.0, 0.1], requires_grad=True)
    level = torch.tensor(0.5, requires_grad=True)
    shrink(u, level).sum().backward()
    assert u.grad.tolist() == [1.0, 1.0, 0.0]  # type: ignore[union-attr]
    assert level.grad.item() == 0.0  # type: ignore[union-attr]  # -sign(2) - sign(-3)
    u.grad = level.grad = None
    hard_threshold(u, level).sum().backward()
    assert u.grad.tolist() == [1.0, 1.0, 0.0]  # type: ignore[union-attr]
    assert level.grad is None
    hard_threshold(u, level, temperature=0.1).sum().backward()
    assert level.grad is not None
    torch.testing.assert_close(hard_threshold(u, level, 0.1), hard_threshold(u, level))


def test_lista_starts_as_ista() -> None:
    A, y = problem()
    for tied in (True, False):
        learned = Unfolded("ista", 5, weight=0.05, learn=("threshold", "matrices"), operator=A, tied=tied)
        torch.testing.assert_close(learned(A, y), Unfolded("ista", 5, weight=0.05)(A, y), atol=1e-7, rtol=1e-6)
        learned(A, y).sum().backward()
        assert len(learned.encode) == (1 if tied else 5)
        assert learned.encode[0].grad is not None


def test_the_analytic_weights_are_the_least_coherent_ones_and_can_be_unfolded() -> None:
    A, y = problem()
    W = alista_weights(A)
    torch.testing.assert_close((W * A).sum(0), torch.ones(30, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):  # no feasible direction lowers ||W'A||_F
        D = torch.randn(15, 30, generator=generator, dtype=torch.float64)
        D = D - A * (D * A).sum(0) / A.square().sum(0)
        assert float(((W + 1e-3 * D).T @ A).square().sum()) >= float((W.T @ A).square().sum())
    model = Unfolded("ista", 3, weight=0.05, learn=("step", "threshold"), adjoint=W)
    model(A, y).sum().backward()
    assert model.step.grad is not None


def test_given_steps_are_the_start() -> None:
    A, _ = problem()
    model = Unfolded("ista", 3, weight=0.05)
    model.set_steps([0.5, 1.5, 1.0])
    torch.testing.assert_close(model.steps, torch.tensor([0.5, 1.5, 1.0]))
    torch.testing.assert_close(model.alpha(A), torch.tensor([0.5, 1.5, 1.0]) / largest_eigenvalue(A))
    with pytest.raises(InputError, match="3 steps are learned"):
        model.set_steps([1.0])
    with pytest.raises(InputError, match="finite and above 0"):
        model.set_steps([1.0, 0.0, 1.0])


def test_shared_and_predicted_steps() -> None:
    A, y = problem()
    model = Unfolded("ista", 4, weight=0.05, shared=True)
    assert len(model.step) == 1
    torch.testing.assert_close(model(A, y), Unfolded("ista", 4, weight=0.05)(A, y))

    class Halves(torch.nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            return torch.full((len(y), 4), 0.5, dtype=y.dtype)

    predicted = Unfolded("ista", 4, weight=0.05, predict=Halves())
    half = Unfolded("ista", 4, weight=0.05)
    with torch.no_grad():
        half.step.fill_(0.5)
    torch.testing.assert_close(predicted(A, y), half(A, y))


@pytest.mark.parametrize("recompute", [True, 1, 3])
def test_layers_computed_again_have_the_same_gradients(recompute: bool | int) -> None:
    A, y = problem()
    plain, saving = Unfolded("ista", 7, weight=0.05), Unfolded("ista", 7, weight=0.05, recompute=recompute)
    for model in (plain, saving):
        model.objective(A, y, model(A, y)).sum().backward()
    torch.testing.assert_close(plain.step.grad, saving.step.grad, atol=0, rtol=0)


def test_layers_computed_again_take_less_memory() -> None:
    def held(recompute: bool) -> int:
        A, y = problem(batch=50, dtype=torch.float32)
        model = Unfolded("ista", 36, weight=0.05, recompute=recompute, gram=False)
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model.objective(A, y, model(A, y)).sum()
        del loss
        return sum(kept.values())

    assert held(True) < 0.4 * held(False)


def test_a_model_survives_copy_pickle_and_state() -> None:
    A, y = problem()
    model = Unfolded("ista", 3, weight=0.05, learn=("step", "threshold"))
    with torch.no_grad():
        model.step[1] = 1.7
        model.threshold[2] = 0.4  # type: ignore[index]
    fresh = Unfolded("ista", 3, weight=0.05, learn=("step", "threshold"))
    fresh.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        torch.testing.assert_close(other(A, y), model(A, y), atol=0, rtol=0)


def test_models_of_every_penalty_are_pickled() -> None:
    A, y = problem()
    for penalty in (penalties.L0(), TopK(2), penalties.GroupLasso(5), penalties.MCP()):
        form = "iht" if isinstance(penalty, penalties.L0 | TopK) else "ista"
        model = Unfolded(form, 2, penalty)  # type: ignore[arg-type]
        torch.testing.assert_close(pickle.loads(pickle.dumps(model))(A, y), model(A, y), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_the_answer_has_the_dtype_of_the_measurements(dtype: torch.dtype) -> None:
    A, y = problem(dtype=dtype)
    for model in (Unfolded("ista", 3), Unfolded("iht", 3), Unfolded("iht", 3, TopK(2))):
        assert model(A, y).dtype == dtype
        assert model(A, y[0]).shape == (30,)
        assert model(A, y, torch.zeros(5, 30, dtype=dtype), trace=True)[1].shape == (3, 5, 30)


# ---- warnings and refusals --------------------------------------------------------------------------------------------------


def test_more_layers_than_were_trained_warn_where_a_repeated_step_is_beyond_the_stable_range() -> None:
    A, y = problem()
    model = Unfolded("ista", 3, weight=0.05)
    with torch.no_grad():
        model.step[2] = 5.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(A, y)  # a single large step is only informative
    with pytest.warns(PoiseWarning, match="10 layers are asked for and 3 have steps"):
        far = model(A, y, layers=10)
    safe = Unfolded("ista", 3, weight=0.05, beyond="safe")
    safe.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        near = safe(A, y, layers=10)
    assert float(model.objective(A, y, far).max()) > float(model.objective(A, y, near).max())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": "itsa"}, "Did you mean 'ista'"),
        ({"layers": 0}, "layers must be an integer of at least 1"),
        ({"weight": -0.1}, "weight must be finite and at least 0"),
        ({"learn": ("stpe",)}, "Did you mean 'step'"),
        ({"learn": ("step", "matrices")}, "learned matrices contain the step"),
        ({"learn": ("matrices", "threshold")}, "give operator=A"),
        ({"penalty": penalties.L0()}, "say step='iht'"),
        ({"step": "iht", "penalty": penalties.L1()}, r"goes with L0\(\) or TopK"),
        ({"step": "iht", "learn": ("step", "threshold")}, "no derivative in its level"),
        ({"step": "iht", "penalty": TopK(3), "learn": ("threshold",)}, "TopK has no threshold"),
        ({"temperature": 0.1}, "smooths the backward pass of L0 alone"),
        ({"penalty": object()}, r"has value\(x\) and prox"),
        ({"recompute": -1}, "recompute counts layers"),
        ({"beyond": "first"}, "beyond is"),
        ({"adjoint": torch.ones(3)}, r"adjoint must be one matrix \[m, n\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Unfolded(**arguments)


def test_measurements_that_do_not_fit_are_refused() -> None:
    A, y = problem()
    model = Unfolded("ista", 2)
    with pytest.raises(InputError, match=r"y must be \[batch, 15\]"):
        model(A, y[:, :4])
    with pytest.raises(InputError, match="bring both to one dtype"):
        model(A, y.float())
    with pytest.raises(InputError, match="NaN"):
        model(A, torch.full_like(y, torch.nan))
    with pytest.raises(InputError, match="An operator has NaN"):
        model(torch.full_like(A, torch.nan), y)
    with pytest.raises(InputError, match="x0 must be"):
        model(A, y, torch.zeros(5, 7, dtype=torch.float64))
    with pytest.raises(InputError, match="go through SignalOperator"):
        model(A.to_sparse(), y)
    with pytest.raises(InputError, match="layers must be at least 1"):
        model(A, y, layers=0)
    with pytest.raises(InputError, match="maps every signal to 0"):
        model(SignalOperator(lambda x: 0 * x, lambda r: 0 * r, (15, 15), dtype=torch.float64), y)


def test_a_map_of_images_is_an_operator_on_their_entries():
    from poise.linear_maps import Blur, gaussian_kernel

    blur = Blur(gaussian_kernel(3, 1.0), (1, 6, 6))
    matrix = torch.stack([blur(e.view(1, 1, 6, 6)).flatten() for e in torch.eye(36)], 1)
    y = torch.rand(2, 36, generator=torch.Generator().manual_seed(0))
    model = Unfolded("ista", layers=3, weight=0.01, gram=False)
    # steps are 1/L by each one's own bound of L, that of the map one percent above
    torch.testing.assert_close(model(blur, y), model(matrix, y), atol=1e-2, rtol=0)
