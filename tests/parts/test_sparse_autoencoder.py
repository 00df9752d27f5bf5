"""Sparse autoencoders: the exact checks of the method, its relatives, and training with unit rows and counters."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import poise
from poise.errors import FormulaError, InputError, StateError
from poise.parts import BatchTopK, JumpReLU, ReLU, SparseAutoencoder, TopAFA, TopK
from poise.parts.sparse_activations import as_activation
from poise.readouts import Autoencoding
from poise.solvers import UnitNorm, follow_requests

KINDS = ("top_afa", "top_k(k=3)", "batch_top_k(k=3)", "jump_relu(threshold=0.1)", "relu")


def data(rows: int = 64, width: int = 6, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=g) + 0.3


# ---- the choice -----------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_with_orthonormal_atoms_the_true_support_is_kept_and_no_more(seed: int, active: int) -> None:
    g = torch.Generator().manual_seed(seed)
    atoms = torch.linalg.qr(torch.randn(16, 16, generator=g, dtype=torch.float64)).Q
    f = torch.zeros(1, 16, dtype=torch.float64)
    f[0, torch.randperm(16, generator=g)[:active]] = 0.1 + torch.rand(active, generator=g, dtype=torch.float64)
    z = f @ atoms
    torch.testing.assert_close(z @ atoms.T, f, rtol=0, atol=1e-12)
    # Activations that are exact to the last bit, as rounding in an inactive one is an entry above 0 too.
    kept, k = TopAFA()(f, torch.ones(16, dtype=torch.float64), torch.linalg.vector_norm(z, dim=1))
    assert int(k) == active
    assert torch.equal(kept, f)
    torch.testing.assert_close(kept @ atoms, z, rtol=0, atol=1e-12)


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_the_scale_of_an_atom_changes_neither_choice_nor_reconstruction(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(5, 20, generator=g, dtype=torch.float64)
    decoder = torch.randn(20, 6, generator=g, dtype=torch.float64)
    t = 4 * torch.rand(5, generator=g, dtype=torch.float64)
    c = 2.0 ** torch.randint(-3, 4, (20,), generator=g)  # powers of two, so that nothing is rounded
    one, k = TopAFA()(z, decoder.norm(dim=1), t)
    other, k2 = TopAFA()(z / c, (decoder * c[:, None]).norm(dim=1), t)
    assert torch.equal(k, k2)
    assert torch.equal(one > 0, other > 0)
    torch.testing.assert_close(one @ decoder, other @ (decoder * c[:, None]), rtol=1e-12, atol=1e-12)


def test_without_scaling_the_lengths_of_rows_do_not_count() -> None:
    z, norms, t = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([0.1, 1.0, 1.0]), torch.tensor([3.0])
    assert TopAFA(scaled=False)(z, norms, t)[0].tolist() == [[3, 0, 0]]
    assert TopAFA()(z, norms, t)[0].tolist() == [[0, 2, 1]]


def test_no_gradient_flows_through_the_choice() -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(4, 12, generator=g, dtype=torch.float64, requires_grad=True)
    t = torch.full((4,), 1.5, dtype=torch.float64, requires_grad=True)
    features, _ = TopAFA()(z, None, t)
    mask = (features > 0).double()
    assert torch.autograd.gradcheck(lambda z: TopAFA()(z, None, t.detach())[0], (z,))
    gradient, by_target = torch.autograd.grad(features.sum(), (z, t), allow_unused=True)
    assert torch.equal(gradient, mask)
    assert by_target is None


def test_centred_or_not_the_target_is_the_norm_that_is_said() -> None:
    x = data()
    for centred in (True, False):
        sae = SparseAutoencoder(6, 40, TopAFA(centred=centred))
        sae.centre_on(x)
        target = (x - sae.bias if centred else x).norm(dim=1)
        torch.testing.assert_close(sae._target(x), target)


def test_a_cap_bounds_every_row() -> None:
    sae = SparseAutoencoder(6, 40, "top_afa(max_k=4)")
    out = sae(data())
    assert int(out.k.max()) == 4  # at the start |f| is below |x| and k would be half of all
    assert bool(((out.features > 0).sum(1) <= 4).all())


def test_top_k_keeps_the_largest_of_each_row_and_batch_top_k_of_the_batch() -> None:
    z = torch.tensor([[5.0, 4.0, -1.0], [1.0, 2.0, 3.0]])
    assert TopK(1)(z)[0].tolist() == [[5, 0, 0], [0, 0, 3]]
    assert TopK(9)(z)[0].tolist() == [[5, 4, 0], [1, 2, 3]]
    kept, k = BatchTopK(1)(z)
    assert kept.tolist() == [[5, 4, 0], [0, 0, 0]]
    assert k.tolist() == [2, 0]
    assert BatchTopK(1.5)(z)[1].sum() == 3
    assert BatchTopK(2)(-z.abs())[1].sum() == 0


def test_in_evaluation_batch_top_k_goes_by_the_mean_of_the_least_active_values() -> None:
    activation = BatchTopK(1, rate=0.5)
    with pytest.raises(StateError, match="no threshold is known"):
        activation.eval()(torch.ones(1, 3))
    activation.train()
    for least in (1.0, 4.0):
        activation(torch.tensor([[least + 2, 0.1], [least, 0.2]]))
    # 0.5, 0.25 and the rest on the start, which is taken out: (0.5 * 4 + 0.25 * 1) / 0.75
    assert float(activation.applied()) == pytest.approx(3.0)
    activation.eval()
    z = torch.tensor([[2.9, 3.0, 3.1], [9.0, 8.0, 7.0]])
    assert activation(z)[1].tolist() == [2, 3]  # each input by itself, however many there are
    assert torch.equal(activation(z[:1])[0], activation(z)[0][:1])
    again = BatchTopK(1, rate=0.5)
    again.load_state_dict(activation.state_dict())
    assert torch.equal(again.eval()(z)[0], activation(z)[0])
    assert float(BatchTopK(1).calibrate([torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 2.0]])])) == pytest.approx(3)


def test_jump_relus_thresholds_have_the_rectangle_for_a_derivative() -> None:
    activation = JumpReLU(3, bandwidth=0.2, threshold=1.0).double()
    z = torch.tensor([[1.05, 0.95, 1.5]], dtype=torch.float64, requires_grad=True)
    features, k = activation(z)
    assert features.tolist() == [[1.05, 0, 1.5]]
    assert int(k) == 2
    by_z, by_log = torch.autograd.grad(features.sum(), (z, activation.log_threshold))
    assert by_z.tolist() == [[1, 0, 1]]
    # -theta / bandwidth within half the bandwidth, times theta for the logarithm
    torch.testing.assert_close(by_log, torch.tensor([-5.0, -5.0, 0.0], dtype=torch.float64))
    gates = activation.gates(z, features)
    assert gates.tolist() == [[1, 0, 1]]
    (by_log,) = torch.autograd.grad(gates.sum(), activation.log_threshold)
    torch.testing.assert_close(by_log, torch.tensor([-5.0, -5.0, 0.0], dtype=torch.float64))


# ---- the autoencoder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_pass_is_what_the_formula_says(kind: str, dtype: torch.dtype) -> None:
    sae = SparseAutoencoder(6, 40, kind, normalise=True).to(dtype)
    with torch.no_grad():
        sae.bias.normal_(generator=torch.Generator().manual_seed(1))
    x = data().to(dtype)
    out = sae(x)
    signal = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)
    z = (signal - sae.bias) @ sae.encoder.T + (0 if sae.encoder_bias is None else sae.encoder_bias)
    torch.testing.assert_close(out.signal, signal)
    torch.testing.assert_close(out.z, z, rtol=1e-4, atol=1e-5)
    assert torch.equal(out.features > 0, out.features != 0)
    torch.testing.assert_close(out.features, torch.where(out.features > 0, out.z, 0))
    torch.testing.assert_close(out.reconstruction, out.features @ sae.decoder + sae.bias)
    back = out.reconstruction * (x.std(1, keepdim=True) + 1e-5) + x.mean(1, keepdim=True)
    torch.testing.assert_close(out.restored, back)
    torch.testing.assert_close(sae.reconstruct(x.reshape(4, 16, 6)), back.reshape(4, 16, 6))
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(40, dtype=dtype))
    for name, p in sae.named_parameters():
        (gradient,) = torch.autograd.grad(out.reconstruction.square().mean(), p, retain_graph=True, allow_unused=True)
        assert gradient is not None or "threshold" in name, name


def test_the_bias_has_the_gradient_of_both_places_where_it_stands() -> None:
    sae = SparseAutoencoder(6, 40, "top_k(k=3)").double()
    x = data().double()
    with torch.no_grad():
        sae.bias.normal_(generator=torch.Generator().manual_seed(1))
    (ours,) = torch.autograd.grad(sae(x).reconstruction.square().mean(), sae.bias)
    z = (x - sae.bias) @ sae.encoder.T
    values, index = z.topk(3, dim=1)
    f = torch.zeros_like(z).scatter(1, index, values.relu())
    (plain,) = torch.autograd.grad((f @ sae.decoder + sae.bias).square().mean(), sae.bias)
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_stay_at_length_one_and_dead_features_are_counted(kind: str) -> None:
    sae = SparseAutoencoder(6, 40, kind)
    run = poise.fit(
        sae, "reconstruction + 0.03125*norm_matching + 0.03125*dead_features(after=2)", {"input": data()}, readout=Autoencoding(),
        solver="adam", lr=1e-2, steps=12, batch_size=16,
    )  # fmt: skip
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(40), rtol=0, atol=1e-6)
    assert run.history["loss"][-1] < 1.5
    assert int(sae.inactive.max()) <= 12
    before = sae.inactive.clone()
    sae.train()
    out = sae(data(8))
    sae.after_step()
    fired = (out.features > 0).any(0)
    assert torch.equal(sae.inactive, torch.where(fired, 0, before + 1))
    sae.after_step()  # without a pass nothing is counted
    assert torch.equal(sae.inactive, torch.where(fired, 0, before + 1))
    sae.eval()(data(8, seed=3))
    assert not bool(sae.fired.any())


def test_two_small_batches_count_as_the_one_big_batch() -> None:
    counters = []
    for accumulate in (1, 4):
        sae = SparseAutoencoder(6, 40, "top_k(k=2)").double()
        poise.fit(
            sae, "reconstruction + 0.03125*dead_features(after=2)", {"input": data().double()}, readout=Autoencoding(),
            solver="adam", lr=1e-2, steps=10, batch_size=32, accumulate=accumulate,
        )  # fmt: skip
        counters.append((sae.inactive, sae.decoder.detach()))
    assert torch.equal(counters[0][0], counters[1][0])
    torch.testing.assert_close(counters[0][1], counters[1][1])


@pytest.mark.parametrize("kind", ["top_afa", "batch_top_k(k=3)"])
def test_a_resumed_run_is_the_uninterrupted_one_with_its_counters(kind: str, tmp_path: Path) -> None:
    formula = "reconstruction + 0.03125*norm_matching + 0.03125*dead_features(after=1)"
    shared = {"readout": Autoencoding(), "solver": "adam", "lr": 1e-2, "steps": 8, "batch_size": 16}

    def stop(state: poise.training.FitState) -> None:
        if state.step == 4:
            raise KeyboardInterrupt

    whole, parts = SparseAutoencoder(6, 40, kind), SparseAutoencoder(6, 40, kind)
    poise.fit(whole, formula, {"input": data()}, **shared)
    halt = type("Halt", (), {"on_step_end": staticmethod(stop)})()
    with pytest.raises(KeyboardInterrupt):
        poise.fit(
            parts, formula, {"input": data()}, checkpoint=tmp_path, checkpoint_steps=3, callbacks=[halt], **shared
        )
    fresh = SparseAutoencoder(6, 40, kind, seed=5)
    poise.fit(fresh, formula, {"input": data()}, checkpoint=tmp_path, **shared)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name
    assert "inactive" in whole.state_dict()


def test_a_copy_is_the_same_and_apart() -> None:
    sae = SparseAutoencoder(6, 40, "batch_top_k(k=3)")
    sae(data())
    sae.after_step()
    twin = copy.deepcopy(sae)
    assert torch.equal(twin.eval()(data()).features, sae.eval()(data()).features)
    twin.train()(data())
    twin.after_step()
    assert int(sae.activation.batches) == 1
    assert int(twin.activation.batches) == 2


# ---- rows of length 1 -----------------------------------------------------------------------------------------------


def test_a_step_on_the_sphere_is_tangent_and_ends_on_it() -> None:
    layer = nn.Linear(5, 7, bias=False)
    UnitNorm(layer)()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    handle = UnitNorm(layer).follow(optimizer)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    g = layer.weight.grad.clone()
    optimizer.step()
    tangent = g - (g * before).sum(1, keepdim=True) * before
    torch.testing.assert_close(layer.weight.grad, tangent)
    torch.testing.assert_close(layer.weight.detach(), nn.functional.normalize(before - 0.1 * tangent, dim=1))
    handle.remove()
    layer.weight.grad = g.clone()
    optimizer.step()
    assert torch.equal(layer.weight.grad, g)


def test_a_loop_of_ones_own_asks_once() -> None:
    sae = SparseAutoencoder(6, 40, "top_k(k=2)")
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    follow_requests(sae, optimizer)
    for seed in range(3):
        out = sae(data(seed=seed))
        optimizer.zero_grad()
        (out.reconstruction - out.signal).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(40), rtol=0, atol=1e-6)
    assert int(sae.inactive.max()) == 3
    free = SparseAutoencoder(6, 40, "top_k(k=2)", unit_rows=False)
    poise.fit(free, "reconstruction", {"input": data()}, readout=Autoencoding(), solver="adam", lr=1e-2, steps=3)
    assert float((free.decoder.detach().norm(dim=1) - 1).abs().max()) > 1e-4


def test_an_optimiser_that_is_fitted_twice_is_followed_once() -> None:
    sae = SparseAutoencoder(6, 40, "top_k(k=2)")
    solver = poise.solvers.TorchOptimizer(torch.optim.Adam(sae.parameters(), lr=1e-2))
    for _ in range(2):
        poise.fit(sae, "reconstruction", {"input": data()}, readout=Autoencoding(), solver=solver, steps=3)
    assert int(sae.inactive.max()) <= 6
    copy.deepcopy(solver.requests).remove()  # a copy holds no hooks
    poise.fit(sae, "reconstruction", {"input": data()}, readout=Autoencoding(), solver=solver, steps=1)
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(40), rtol=0, atol=1e-6)


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_bad_arguments_are_named() -> None:
    for make, words in (
        (lambda: TopAFA(rule="next"), "top_afa: rule"),
        (lambda: TopAFA(max_k=0), "top_afa: k counts"),
        (lambda: TopAFA(guard=0), "top_afa: guard"),
        (lambda: TopK(0), "top_k: k counts"),
        (lambda: BatchTopK(0), "batch_top_k: k counts"),
        (lambda: BatchTopK(2, rate=0), "batch_top_k: rate"),
        (lambda: JumpReLU(3, bandwidth=0), "jump_relu: bandwidth"),
        (lambda: SparseAutoencoder(6, 1), "two features at least"),
        (lambda: SparseAutoencoder(6, 8, JumpReLU(5)), "jump_relu: it has thresholds for 5"),
        (lambda: SparseAutoencoder(6, 8, 3), "An activation is"),
        (lambda: as_activation("top_k(kk=3)"), "top_k: .*kk"),
        (lambda: as_activation("top_k"), "top_k: .*'k'"),
    ):
        with pytest.raises(InputError, match=words):
            make()
    with pytest.raises(FormulaError, match="top_k"):
        as_activation("topk(k=3)")


def test_bad_inputs_are_named() -> None:
    sae = SparseAutoencoder(6, 8)
    with pytest.raises(InputError, match=r"float \[batch, 6\]"):
        sae(torch.ones(3, 5))
    x = data()
    x[2, 1] = math.nan
    with pytest.raises(InputError, match="row 2 of the batch"):
        sae(x)
    with pytest.raises(InputError, match="target is the norm"):
        TopAFA()(torch.ones(3, 4))
    with torch.no_grad():
        sae.decoder[4] = 0
    with pytest.raises(InputError, match="decoder row 4 is 0"):
        sae(data())
    assert isinstance(SparseAutoencoder(6, 8, ReLU()).encoder_bias, nn.Parameter)
