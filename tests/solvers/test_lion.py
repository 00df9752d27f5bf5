"""Lion: its step by hand, its laws, three ways of computing it, and what survives a checkpoint."""

from __future__ import annotations

import copy
import importlib
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import poise
from poise.errors import InputError, NonFiniteError, PoiseWarning
from poise.solvers import Lion, TorchOptimizer, as_solver, lion_from_adamw, lion_grid
from poise.solvers.lion_steps import CHUNK

WAYS: list[dict[str, Any]] = [{"fused": True}, {"foreach": True}, {"foreach": False}]
SHAPES = [(7, 5), (1,), (33,), (), (0,)]
ways = pytest.mark.parametrize("way", WAYS, ids=["fused", "foreach", "one by one"])


def parameters(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def walk(
    optimizer: torch.optim.Optimizer, held: list[nn.Parameter], steps: int, seed: int = 1, scale: float = 1.0
) -> None:
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in held:
            p.grad = (scale * torch.randn(p.shape, generator=g, dtype=torch.float64)).to(p.dtype)
        optimizer.step()


def run(steps: int = 30, dtype: torch.dtype = torch.float64, scale: float = 1.0, **options: Any) -> list[Tensor]:
    held = parameters(dtype)
    walk(Lion(held, **{"lr": 1e-2, "weight_decay": 0.3, **options}), held, steps, scale=scale)
    return [p.detach() for p in held]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---- the step ------------------------------------------------------------------------------------------------------


@ways
def test_two_steps_by_hand(way: dict[str, Any]) -> None:
    p = nn.Parameter(torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64))
    lion = Lion([p], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5, **way)
    p.grad = torch.tensor([3.0, 0.0, -0.5], dtype=torch.float64)
    lion.step()
    # keep = 0.95; the signs are 1, 0, -1; m = 0.01 g
    torch.testing.assert_close(p.data, torch.tensor([0.85, -1.9, 0.1], dtype=torch.float64))
    m = lion.state[p]["exp_avg"]
    torch.testing.assert_close(m, torch.tensor([0.03, 0.0, -0.005], dtype=torch.float64))
    p.grad = torch.tensor([-0.2, 1.0, 0.05], dtype=torch.float64)
    lion.step()
    # c = 0.9 m + 0.1 g = 0.007, 0.1, 0.0005: the momentum outweighs the first number's gradient, not the last one's
    torch.testing.assert_close(p.data, torch.tensor([0.7075, -1.905, -0.005], dtype=torch.float64))
    torch.testing.assert_close(m, torch.tensor([0.0277, 0.01, -0.00445], dtype=torch.float64))


@ways
def test_the_cautious_step_by_hand(way: dict[str, Any]) -> None:
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    lion = Lion([p], lr=0.1, betas=(0.9, 0.99), cautious=0.0, **way)
    p.grad = torch.ones(4, dtype=torch.float64)
    lion.step()
    torch.testing.assert_close(p.data, torch.full((4,), -0.1, dtype=torch.float64))
    p.grad = torch.tensor([1.0, 1.0, 1.0, -0.01], dtype=torch.float64)
    lion.step()
    # The last number would go on down against its gradient: it waits, and the others move by 4/3 of the rate.
    step = 0.1 * 4 / 3
    torch.testing.assert_close(p.data, torch.tensor([-0.1 - step] * 3 + [-0.1], dtype=torch.float64))


@ways
def test_a_cautious_factor_of_one_is_plain_lion_and_a_half_lies_between(way: dict[str, Any]) -> None:
    torch.testing.assert_close(run(cautious=1.0, **way), run(**way))
    torch.testing.assert_close(run(cautious=0.5, **way), run(cautious=0.5, foreach=False))
    assert not same(run(cautious=0.5, **way), run(**way))


@ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_ways_of_computing_give_the_same_parameters(way: dict[str, Any], dtype: torch.dtype) -> None:
    assert same(run(dtype=dtype, **way), run(dtype=dtype, foreach=False))


def test_without_the_compiled_loop_the_fused_step_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(fused=True), run(fused=True, cautious=0.2)
    monkeypatch.setattr("poise.solvers.lion_steps.compiled", lambda: None)
    assert same(run(fused=True), expected[0])
    torch.testing.assert_close(run(fused=True, cautious=0.2), expected[1])


@pytest.mark.parametrize("cautious", [None, 0.25])
@pytest.mark.parametrize("threads", [1, 2])
def test_ranges_and_chunks_make_up_the_tensor(
    cautious: float | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("poise.solvers.lion_steps.WORTH_THREADS", 1000)
    monkeypatch.setattr("poise.solvers.lion_steps.CHUNK", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    results = []
    for options in ({"fused": True}, {"fused": True, "state_dtype": torch.float64}, {"foreach": False}):
        p = nn.Parameter(torch.linspace(-1, 1, 5003))
        lion = Lion([p], lr=1e-2, weight_decay=0.1, cautious=cautious, **options)
        for seed in range(3):
            p.grad = torch.randn(5003, generator=torch.Generator().manual_seed(seed))
            lion.step()
        results.append(p.detach())
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[2])


@ways
def test_memory_order_does_not_matter(way: dict[str, Any]) -> None:
    def go(arrange: Any) -> Tensor:
        g = torch.Generator().manual_seed(0)
        p = nn.Parameter(arrange(torch.randn(2, 3, 4, 5, generator=g)))
        lion = Lion([p], lr=1e-2, weight_decay=0.1, **way)
        for _ in range(5):
            p.grad = torch.randn(2, 3, 4, 5, generator=g)
            lion.step()
        return p.detach()

    assert torch.equal(go(lambda t: t), go(lambda t: t.contiguous(memory_format=torch.channels_last)))
    assert torch.equal(go(lambda t: t), go(lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)))


@ways
def test_autograd_notices_the_step(way: dict[str, Any]) -> None:
    p = nn.Parameter(torch.ones(3))
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    Lion([p], **way).step()
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        loss.backward()


# ---- laws ----------------------------------------------------------------------------------------------------------


@ways
def test_without_betas_it_is_sign_descent(way: dict[str, Any]) -> None:
    held, by_hand = parameters(), [p.detach().clone() for p in parameters()]
    walk(Lion(held, lr=0.01, betas=(0.0, 0.0), **way), held, 10)
    g = torch.Generator().manual_seed(1)
    for _ in range(10):
        for p in by_hand:
            p.sub_(0.01 * torch.randn(p.shape, generator=g, dtype=torch.float64).sign())
    assert same([p.detach() for p in held], by_hand)


def test_with_equal_betas_it_is_signum() -> None:
    held, by_hand = parameters(), [p.detach().clone() for p in parameters()]
    momenta = [torch.zeros_like(p) for p in by_hand]
    walk(Lion(held, lr=0.01, betas=(0.9, 0.9)), held, 20)
    g = torch.Generator().manual_seed(1)
    for _ in range(20):
        for p, m in zip(by_hand, momenta, strict=True):
            m.mul_(0.9).add_(torch.randn(p.shape, generator=g, dtype=torch.float64), alpha=1 - 0.9)
            p.sub_(0.01 * m.sign())
    assert same([p.detach() for p in held], by_hand)


@ways
def test_the_first_step_is_the_rate_whatever_the_gradient(way: dict[str, Any]) -> None:
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.tensor([1e-30, -1e30, 1.0, 0.0])
    Lion([p], lr=0.5, **way).step()
    assert torch.equal(p.data, torch.tensor([-0.5, 0.5, -0.5, 0.0]))


@ways
@pytest.mark.parametrize("scale", [2.0**-20, 3.7, 1e6])
def test_a_common_scale_of_the_gradients_changes_nothing(way: dict[str, Any], scale: float) -> None:
    assert same(run(scale=scale, **way), run(**way))


def test_a_common_factor_of_all_weights_of_an_objective_changes_nothing() -> None:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    results = []
    for objective in ("cross_entropy + 0.01*l2", "8*cross_entropy + 0.08*l2"):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        poise.fit(model, objective, (x, x.argmax(1) % 3), solver="lion(lr=1e-3)", steps=5, batch_size=8)
        results.append(model.weight.detach())
    assert torch.equal(*results)


@ways
def test_decay_keeps_the_weights_in_a_box(way: dict[str, Any]) -> None:
    held = parameters()
    lion = Lion(held, lr=0.05, weight_decay=2.0, **way)
    largest = max(float(p.detach().abs().max()) for p in held if p.numel())
    for step in range(200):
        for p in held:
            p.grad = torch.ones_like(p) if step % 3 else torch.randn_like(p)
        lion.step()
        assert all(float(p.detach().abs().max()) <= max(largest, 0.5) + 1e-12 for p in held if p.numel())
    assert all(float(p.detach().abs().max()) <= 0.5 + 1e-8 for p in held if p.numel())


def test_the_limit_solves_the_problem_within_the_box() -> None:
    target = torch.tensor([3.0, 0.2, -5.0], dtype=torch.float64)
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    lion = Lion([p], lr=1e-3, weight_decay=1.0)
    for _ in range(8000):
        p.grad = p.detach() - target
        lion.step()
    torch.testing.assert_close(p.data, target.clamp(-1, 1), atol=5e-3, rtol=0)


@ways
def test_maximizing_is_minimizing_the_opposite(way: dict[str, Any]) -> None:
    assert same(run(maximize=True, **way), run(scale=-1.0, **way))
    torch.testing.assert_close(run(maximize=True, cautious=0.1, **way), run(scale=-1.0, cautious=0.1, foreach=False))


def test_decoupled_decay_follows_the_schedule_alone() -> None:
    p = nn.Parameter(torch.ones(2, dtype=torch.float64))
    lion = Lion([p], lr=1e-3, weight_decay=0.1, decoupled=True)
    p.grad = torch.zeros(2, dtype=torch.float64)
    lion.step()
    torch.testing.assert_close(p.data, torch.full((2,), 0.9, dtype=torch.float64))
    lion.param_groups[0]["lr"] = 5e-4
    lion.step()
    torch.testing.assert_close(p.data, torch.full((2,), 0.9 * 0.95, dtype=torch.float64))


def test_groups_have_their_own_settings() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    lion = Lion([{"params": [a], "lr": 0.1}, {"params": [b], "weight_decay": 0.5, "betas": (0.5, 0.5)}], lr=0.2)
    a.grad, b.grad = torch.ones(2), torch.zeros(2)
    lion.step()
    torch.testing.assert_close(a.data, torch.full((2,), 0.9))
    torch.testing.assert_close(b.data, torch.full((2,), 0.9))


def test_a_closure_is_evaluated_once_and_a_parameter_without_gradient_stays() -> None:
    p, idle = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    lion = Lion([p, idle], lr=0.1)
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        lion.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert float(torch.as_tensor(lion.step(closure)).detach()) == 2.0
    assert calls == [1]
    assert torch.equal(idle.data, torch.ones(2))
    assert idle not in lion.state


# ---- precision, memory and what is not finite ----------------------------------------------------------------------


def test_the_state_is_one_tensor_a_parameter_and_may_be_half_as_wide() -> None:
    held = parameters(torch.float32)
    lion = Lion(held, state_dtype="bfloat16")
    walk(lion, held, 1)
    assert all(set(lion.state[p]) == {"exp_avg"} and lion.state[p]["exp_avg"].dtype == torch.bfloat16 for p in held)
    walk(plain := Lion(held), held, 1)
    assert all(set(plain.state[p]) == {"exp_avg"} and plain.state[p]["exp_avg"].shape == p.shape for p in held)


def test_a_momentum_of_half_precision_steps_nearly_alike() -> None:
    wide, narrow = run(dtype=torch.float32, steps=20), run(dtype=torch.float32, steps=20, state_dtype=torch.bfloat16)
    differing = [float((a != b).float().mean()) for a, b in zip(wide, narrow, strict=True) if a.numel() > 1]
    assert all(share < 0.1 for share in differing)


def test_parameters_of_half_precision_are_rounded_once() -> None:
    p = nn.Parameter(torch.tensor([1.0, -0.5], dtype=torch.bfloat16))
    lion = Lion([p], lr=0.01, weight_decay=0.5)
    p.grad = torch.ones(2, dtype=torch.bfloat16)
    lion.step()
    assert torch.equal(p.data, (torch.tensor([1.0, -0.5]) * 0.995 - 0.01).bfloat16())


def test_a_half_precision_parameter_that_cannot_move_is_said() -> None:
    p = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    lion = Lion([p], lr=1e-4)
    with pytest.warns(PoiseWarning, match="stands still"):
        lion.step()
    lion.step()


@ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_without_a_finite_gradient_stays_and_the_error_says_so(
    way: dict[str, Any], dtype: torch.dtype, bad: float
) -> None:
    held = [nn.Parameter(torch.ones(3, dtype=dtype)), nn.Parameter(torch.ones(2, dtype=dtype))]
    for nonfinite in ("raise", "skip"):
        lion = Lion(held, lr=0.25, nonfinite=nonfinite, **way)
        before = [p.detach().clone() for p in held]
        held[0].grad, held[1].grad = torch.tensor([1.0, bad, -1.0], dtype=dtype), torch.ones(2, dtype=dtype)
        if nonfinite == "raise":
            with pytest.raises(NonFiniteError, match="lion: 1 of 5 numbers"):
                lion.step()
        else:
            lion.step()
        change = [(p.detach() - b).float() for p, b in zip(held, before, strict=True)]
        assert torch.equal(change[0], torch.tensor([-0.25, 0.0, 0.25]))
        assert torch.equal(change[1], torch.full((2,), -0.25))
        assert all(bool(torch.isfinite(lion.state[p]["exp_avg"]).all()) for p in held)


def test_sparse_and_complex_gradients_are_refused_before_anything_moves() -> None:
    whole = nn.Parameter(torch.ones(2))
    whole.grad = torch.ones(2)
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(InputError, match=r"lion: a gradient is sparse.*SparseAdam"):
        Lion([whole, table.weight]).step()
    turned = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    turned.grad = torch.ones(2, dtype=torch.complex64)
    with pytest.raises(InputError, match=r"lion: .*view_as_real"):
        Lion([whole, turned]).step()
    assert torch.equal(whole.data, torch.ones(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-4}, "lr must be finite and at least 0"),
        ({"lr": math.nan}, "lr must be finite"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\)"),
        ({"betas": (-0.1, 0.9)}, "betas must be"),
        ({"betas": 0.9}, "betas must be"),
        ({"cautious": 1.5}, "cautious must be None or a factor"),
        ({"state_dtype": "int8"}, "state_dtype must be a floating dtype"),
        ({"state_dtype": "bfloat"}, "state_dtype must be a floating dtype"),
        ({"foreach": True, "fused": True}, "exclude each other"),
        ({"nonfinite": "ignore"}, "nonfinite is 'raise' or 'skip'"),
        ({"lr": 0.0, "decoupled": True}, "the first lr, which is 0"),
        ({"lr": 0.5, "weight_decay": 2.0}, "lower one of them"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^lion: .*{message}"):
        Lion([nn.Parameter(torch.ones(1))], **options)


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@ways
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16, torch.float64])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    way: dict[str, Any], state_dtype: torch.dtype | None
) -> None:
    options = {"lr": 1e-2, "weight_decay": 0.1, "state_dtype": state_dtype, "decoupled": True, **way}
    held = parameters(torch.float32)
    lion = Lion(held, **options)
    walk(lion, held, 10)
    lion.param_groups[0]["lr"] = 5e-3  # a schedule has moved it: decoupled decay still knows the first
    file = io.BytesIO()
    torch.save({"weights": [p.data for p in held], "optimizer": lion.state_dict()}, file)
    walk(lion, held, 10, seed=2)
    file.seek(0)
    saved = torch.load(file)
    again = [nn.Parameter(w) for w in saved["weights"]]
    resumed = Lion(again, **{**options, "lr": 5e-3})
    resumed.load_state_dict(saved["optimizer"])
    walk(resumed, again, 10, seed=2)
    assert same([p.detach() for p in held], [p.detach() for p in again])
    assert all(
        torch.equal(lion.state[p]["exp_avg"], resumed.state[q]["exp_avg"]) for p, q in zip(held, again, strict=True)
    )


def test_a_copy_is_independent_and_goes_on_alike() -> None:
    held = parameters()
    lion = Lion(held, lr=1e-2, fused=True, nonfinite="skip")
    walk(lion, held, 3)
    copied = copy.deepcopy(lion)
    twins = copied.param_groups[0]["params"]
    walk(lion, held, 5, seed=2)
    walk(copied, twins, 5, seed=2)
    assert same([p.detach() for p in held], [p.detach() for p in twins])
    assert (copied.fused, copied.foreach, copied.nonfinite) == (True, None, "skip")


# ---- by name, from AdamW -------------------------------------------------------------------------------------------


def test_text_names_it() -> None:
    solver = as_solver("lion(lr=3e-4, betas=(0.95, 0.98), state_dtype='bfloat16')")
    assert isinstance(solver, TorchOptimizer)
    assert solver.name == "lion"
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(4, 3)
    poise.fit(model, "cross_entropy", (x, x[:, :3].argmax(1)), solver=solver, steps=3)
    assert isinstance(solver.optimizer, Lion)
    assert solver.optimizer.param_groups[0]["lr"] == 3e-4
    with pytest.raises(InputError, match="Did you mean 'betas'"):
        as_solver("lion(beta=0.9)")
    with pytest.raises(InputError, match=r"^lion: betas must be"):
        poise.fit(model, "cross_entropy", (x, x[:, :3].argmax(1)), solver="lion(betas=(1.0, 1.0))", steps=1)


@pytest.mark.parametrize("wrapped", ["half_fine_tuning(base='lion', level='layer')"])
def test_what_wraps_an_optimiser_wraps_it(wrapped: str) -> None:
    assert "lion" in repr(as_solver(wrapped, lr=1e-4))


def test_schedulers_of_pytorch_move_its_rate() -> None:
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    lion = Lion([p], lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(lion, start_factor=0.25, end_factor=1.0, total_iters=3)
    moved = []
    for _ in range(4):
        before = float(p.detach())
        p.grad = torch.ones(1, dtype=torch.float64)
        lion.step()
        schedule.step()
        moved.append(before - float(p.detach()))
    assert moved == pytest.approx([0.025, 0.05, 0.075, 0.1])


def test_the_settings_from_adamw_keep_the_product() -> None:
    assert lion_from_adamw(1e-3, 1.0, ratio=10) == pytest.approx({"lr": 1e-4, "weight_decay": 10.0})
    assert lion_from_adamw(3e-4, 0.01) == pytest.approx({"lr": 6e-5, "weight_decay": 0.05})
    Lion([nn.Parameter(torch.ones(1))], **lion_from_adamw(1e-3, 0.01))
    grid = lion_grid(1e-3, 0.01)
    assert len(grid) == 9
    assert lion_from_adamw(1e-3, 0.01, 5) in grid
    assert all(1e-4 <= g["lr"] <= 1e-3 / 3 and 0.03 <= g["weight_decay"] <= 0.1 for g in grid)
    for arguments in ((-1.0, 0.0, 5), (1e-3, -1.0, 5), (1e-3, 0.0, 0), (math.nan, 0.0, 5)):
        with pytest.raises(InputError, match=r"^lion_from_adamw: "):
            lion_from_adamw(*arguments)


def test_no_temporary_is_larger_than_one_tensor() -> None:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[2]))
    try:
        peak_bytes = importlib.import_module("benchmarks.harness").peak_bytes
    finally:
        sys.path.pop(0)
    n = 4 * CHUNK
    for options in ({"fused": True}, {"foreach": True}, {"fused": True, "state_dtype": "bfloat16"}):
        held = [nn.Parameter(torch.ones(n)) for _ in range(3)]
        for p in held:
            p.grad = torch.ones(n)
        # A chunk in passing is fixed in size, whatever the tensor's.
        assert peak_bytes(Lion(held, **options).step) <= 4 * n + (7 * 4 * CHUNK if "state_dtype" in options else 4096)


# ---- peers ---------------------------------------------------------------------------------------------------------


@pytest.mark.peer
@ways
@pytest.mark.parametrize("module", ["lion_pytorch", "pytorch_optimizer"])
def test_the_trace_is_that_of_the_peer_bit_for_bit(way: dict[str, Any], module: str) -> None:
    peer = pytest.importorskip(module)
    ours, theirs = parameters(), parameters()
    lion = Lion(ours, lr=1e-3, weight_decay=0.3, **way)
    other = peer.Lion(theirs, lr=1e-3, weight_decay=0.3)
    for step in range(200):
        for optimizer, held in ((lion, ours), (other, theirs)):
            walk(optimizer, held, 1, seed=step)
        assert same([p.detach() for p in ours], [p.detach() for p in theirs])
