"""Half fine-tuning: frozen means frozen, and the rest is trained as if nothing else were there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import poise
from poise.errors import CheckpointError, FormulaError, IncompatibleError, InputError
from poise.problem import Problem
from poise.readouts import Classification
from poise.solvers import HalfFineTuning, TorchOptimizer, as_solver
from poise.weights.schedule import cosine

LEVELS = ["category", "layer", "model", "element"]


class Net(nn.Module):
    """Two of PyTorch's transformer layers (fused projections) and a classifier."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.embed = nn.Embedding(12, 8)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.lm_head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lm_head(self.encoder(self.embed(x)).mean(1))
        return out


def data(rows: int = 48) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randint(12, (rows, 5), generator=g)
    return {"input": x, "target": x.sum(1) % 3}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, clip: Any = None) -> None:
    batch = data()
    for step in range(steps):
        rows = slice(8 * (step % 6), 8 * (step % 6) + 8)
        functional.cross_entropy(model(batch["input"][rows]), batch["target"][rows]).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(clip(), 0.1)
        optimizer.step()
        optimizer.zero_grad()


def frozen_moved(before: dict[str, Tensor], after: dict[str, Tensor], mask: Any) -> tuple[bool, bool]:
    """Whether anything frozen moved, and whether everything trained did."""
    stayed, moved = [], []
    for name, value in before.items():
        free = torch.as_tensor(mask[name]).expand(value.shape)
        stayed.append(torch.equal(value[~free], after[name][~free]))
        if bool(free.any()):
            moved.append(bool((value[free] != after[name][free]).any()))
    return not all(stayed), all(moved)


# ---- exact ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("base", ["adamw", "sgd"])
def test_frozen_weights_stay_to_the_last_bit_under_weight_decay_and_momentum(level: str, base: str) -> None:
    model = Net()
    half = HalfFineTuning(base, level, lr=0.01, weight_decay=0.1)
    half.bind(model)
    for _ in range(3):
        before = weights(model)
        train(model, half.optimizer, 4)
        assert frozen_moved(before, weights(model), half.mask) == (False, True)
        half.new_phase()


@pytest.mark.parametrize("level", ["category", "layer", "model"])
def test_the_trajectory_is_that_of_an_optimiser_over_the_trained_subset_alone(level: str) -> None:
    model = Net()
    half = HalfFineTuning("adamw", level, lr=0.01, weight_decay=0.1, seed=3)
    half.bind(model)
    for _ in range(2):
        peer, mask = copy.deepcopy(model), half.mask
        parts = [(n, p, mask[n]) for n, p in peer.named_parameters() if mask[n] is not False]
        # By hand: a tensor of its own for the trained rows, put into the whole by concatenation.
        own = [
            (n, p, m, nn.Parameter((p[m.flatten()] if isinstance(m, Tensor) else p).detach().clone()))
            for n, p, m in parts
        ]
        optimizer = torch.optim.AdamW([free for *_, free in own], lr=0.01, weight_decay=0.1)
        batch = data()
        for step in range(4):
            rows = slice(8 * step, 8 * step + 8)
            at = {n: p.detach() for n, p in peer.named_parameters()}
            for n, p, m, free in own:
                at[n] = p.detach().index_put((m.flatten(),), free) if isinstance(m, Tensor) else free
            out = torch.func.functional_call(peer, at, (batch["input"][rows],))
            optimizer.zero_grad()
            functional.cross_entropy(out, batch["target"][rows]).backward()
            optimizer.step()
        train(model, half.optimizer, 4)
        for name, _, m, free in own:
            ours = dict(model.named_parameters())[name]
            ours = ours[m.flatten()] if isinstance(m, Tensor) else ours
            torch.testing.assert_close(ours, free, rtol=0, atol=1e-7)
        half.new_phase()


def test_memory_and_gradients_are_those_of_the_trained_part() -> None:
    model = Net()
    half = HalfFineTuning("adamw", lr=0.01)
    half.bind(model)
    train(model, half.optimizer, 1)
    held = sum(t.numel() for s in half.optimizer.state.values() for t in s.values() if t.ndim)
    report = half.report()
    assert held == 2 * sum(c.parameters_trained for c in report.categories.values())
    for name, p in model.named_parameters():
        assert p.requires_grad == (half.mask[name] is not False)
        assert p.grad is None


def test_a_clipped_norm_runs_over_what_is_trained_alone() -> None:
    model = Net()
    half = HalfFineTuning("sgd", lr=1.0, momentum=0.0)
    half.bind(model)
    before = weights(model)
    train(model, half.optimizer, 1, clip=half.parameters)
    moved = torch.sqrt(sum(((p.detach() - before[n]) ** 2).sum() for n, p in model.named_parameters()))
    assert float(moved) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("state", ["keep", "offload"])
@pytest.mark.parametrize("level", ["category", "element"])
def test_kept_moments_wait_unchanged_until_their_tensor_is_trained_again(state: str, level: str) -> None:
    model = Net()
    half = HalfFineTuning("adamw", level, lr=0.01, state=state)
    half.bind(model)
    train(model, half.optimizer, 3)
    first = half.mask
    half.new_phase()
    kept = copy.deepcopy(half._parked)
    train(model, half.optimizer, 3)

    def waits(name: str) -> bool:
        return not bool(torch.as_tensor(half.mask[name]).all()) and first[name] is not False

    name = next(n for n in first if waits(n))
    free = torch.as_tensor(half.mask[name]).expand(first.matrices.shapes[name])
    half._park()
    after = half._parked[name]["exp_avg"]
    assert torch.equal(after[~free], kept[name]["exp_avg"][~free])
    assert bool(kept[name]["exp_avg"].any())


def test_a_tensor_that_is_never_frozen_keeps_its_moments_only_where_state_is_kept() -> None:
    for state, expected in (("keep", 4.0), ("reset", 2.0)):
        model = Net()
        half = HalfFineTuning("adamw", lr=0.01, state=state)
        half.bind(model)
        train(model, half.optimizer, 2)
        half.new_phase()
        train(model, half.optimizer, 2)
        assert float(half.optimizer.state[model.lm_head.weight]["step"]) == expected


def test_the_same_seed_draws_the_same_masks_and_each_phase_another() -> None:
    digests = []
    for _ in range(2):
        half = HalfFineTuning("sgd", lr=0.1, seed=5)
        half.bind(Net())
        row = [half.mask.digest()]
        for _ in range(3):
            half.new_phase()
            row.append(half.mask.digest())
        digests.append(row)
    assert digests[0] == digests[1]
    assert len(set(digests[0])) > 1


@pytest.mark.parametrize("state", ["reset", "keep"])
@pytest.mark.parametrize("level", LEVELS)
def test_a_run_in_a_loop_of_one_s_own_resumes_bit_for_bit(level: str, state: str, tmp_path: Path) -> None:
    def start() -> tuple[nn.Module, HalfFineTuning]:
        model = Net()
        half = HalfFineTuning("adamw", level, redraw=3, state=state, lr=0.01, weight_decay=0.1)
        half.bind(model)
        return model, half

    whole, half = start()
    train(whole, half.optimizer, 4)
    torch.save({"model": whole.state_dict(), "solver": half.state_dict()}, tmp_path / "saved")
    train(whole, half.optimizer, 5)

    resumed, again = start()
    saved = torch.load(tmp_path / "saved", weights_only=True)
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["solver"])
    train(resumed, again.optimizer, 5)
    assert same(weights(whole), weights(resumed))
    assert again.phase == half.phase == 4


# ---- in fit ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("redraw", ["phase", "epoch", 4])
def test_a_fit_that_is_stopped_and_resumed_equals_the_uninterrupted_one(redraw: Any, tmp_path: Path) -> None:
    def solver() -> HalfFineTuning:
        return HalfFineTuning("adamw", redraw=redraw, state="keep", lr=0.01, weight_decay=0.1, clip=0.5)

    def fit(steps_allowed: int | None, folder: Path | None) -> nn.Module:
        class Stop:
            def on_step_end(self, state: Any) -> None:
                if steps_allowed is not None and state.step == steps_allowed:
                    state.stop = "enough"

        settings: dict[str, Any] = {"steps": 14, "batch_size": 8, "lr_schedule": cosine(1, 0), "checkpoint": folder}
        model = Net()
        poise.fit(
            model, "cross_entropy", data(), solver=solver(), callbacks=[Stop()], checkpoint_seconds=None, **settings
        )
        return model

    whole = fit(None, None)
    fit(9, tmp_path)
    # The run that stopped says so in its checkpoint; taking that back is what an interruption would have left.
    from poise import checkpoint

    saved = checkpoint.load_newest(tmp_path)
    assert saved is not None
    saved["fields"]["stop"] = None
    checkpoint.save(tmp_path, 9, saved)
    assert same(weights(whole), weights(fit(None, tmp_path)))


def test_each_fit_is_a_phase_and_gives_the_model_back_whole() -> None:
    model, half = Net(), HalfFineTuning("adamw", lr=0.01)
    for phase in (1, 2, 3):
        before = weights(model)
        poise.fit(model, "cross_entropy", data(), solver=half, steps=3)
        assert half.phase == phase
        assert frozen_moved(before, weights(model), half.mask) == (False, True)
        assert all(p.requires_grad for p in model.parameters())
        assert not any(p._backward_hooks for p in model.parameters())


def test_a_phase_that_was_asked_for_between_two_fits_is_drawn_once() -> None:
    model, half = Net(), HalfFineTuning("adamw", lr=0.01)
    poise.fit(model, "cross_entropy", data(), solver=half, steps=1)
    half.new_phase()
    poise.fit(model, "cross_entropy", data(), solver=half, steps=1)
    assert half.phase == 2


def test_a_new_half_is_drawn_for_each_epoch_where_that_is_asked_for() -> None:
    half = HalfFineTuning("sgd", redraw="epoch", lr=0.01)
    poise.fit(Net(), "cross_entropy", data(48), solver=half, epochs=3, batch_size=16)
    assert half.phase == 3


def test_parameters_that_the_user_froze_stay_frozen() -> None:
    model = Net()
    model.embed.requires_grad_(False)
    half = HalfFineTuning("adamw", lr=0.01)
    poise.fit(model, "cross_entropy", data(), solver=half, steps=2)
    assert not model.embed.weight.requires_grad
    assert "embed.weight" not in half.mask


def test_terms_with_parameters_of_their_own_train_them() -> None:
    class Scaled(poise.Term):
        def __init__(self) -> None:
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros(()))

        def forward(self, logits: Tensor, target: Tensor) -> Tensor:
            return functional.cross_entropy(logits * self.log_scale.exp(), target, reduction="none")

    term = Scaled()
    poise.fit(Net(), 1.0 * term, data(), solver=HalfFineTuning("adamw", lr=0.01, redraw=1), steps=4)
    assert float(term.log_scale.detach()) != 0


def test_it_wraps_an_optimiser_that_holds_its_parameters_and_gives_it_back() -> None:
    model = Net()
    optimizer = torch.optim.SGD(
        [{"params": [*model.encoder.parameters()], "lr": 0.1}, {"params": [*model.lm_head.parameters()]}], lr=0.2
    )
    half = HalfFineTuning(optimizer)
    half.bind(model)
    assert half.optimizer is optimizer
    before = weights(model)
    train(model, optimizer, 2)
    assert not frozen_moved(before, weights(model), half.mask)[0]
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.2]
    half.release()
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.encoder.parameters()))
    train(model, optimizer, 1)


def test_minimize_reaches_the_minimum_of_the_trained_half() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    batch = {"input": torch.randn(20, 3), "target": torch.randint(2, (20,))}
    problem = Problem(model, poise.parse("cross_entropy + 0.1*l2"), [{"main": batch}], Classification())
    certificate = HalfFineTuning("sgd", level="model", lr=0.5, momentum=0.5).minimize(problem, tolerance=1e-3)
    assert certificate.converged
    assert [p.requires_grad for p in model.parameters()].count(False) == 2


# ---- by name ---------------------------------------------------------------------------------------------------------


def test_the_solver_is_found_by_name_with_its_options() -> None:
    solver = as_solver("half_fine_tuning(level='model', ratio=0.4, base='sgd')", lr=0.1)
    assert isinstance(solver, HalfFineTuning)
    assert (solver.level, solver.ratio, solver.base.name) == ("model", 0.4, "sgd")
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    batch = {"input": torch.randn(20, 4), "target": torch.randint(3, (20,))}
    poise.fit(model, "cross_entropy", batch, solver="half_fine_tuning(level='element')", lr=0.01, steps=2)
    adamw = as_solver("adamw(weight_decay=0.1)", lr=0.1)
    assert isinstance(adamw, TorchOptimizer)
    assert adamw.options == {"weight_decay": 0.1, "lr": 0.1}


def test_text_that_is_no_solver_says_so() -> None:
    with pytest.raises(InputError, match="Did you mean 'half_fine_tuning'"):
        as_solver("half_finetuning")
    with pytest.raises(FormulaError, match="no solver is called 'half'"):
        as_solver("half(ratio=0.5)")
    with pytest.raises(FormulaError, match="must be a number"):
        as_solver("sgd(lr=open('x'))")
    with pytest.raises(InputError, match="says lr, which is given beside it too"):
        as_solver("sgd(lr=0.1)", lr=0.1)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 1.0}, r"ratio must be in \(0, 1\), and it is 1.0"),
        ({"level": "blocks"}, "level is one of category, layer, model, element"),
        ({"redraw": 0}, "redraw is 'phase', 'epoch' or a number of steps above 0"),
        ({"redraw": True}, "redraw is"),
        ({"state": "drop"}, "state is 'reset', 'keep' or 'offload'"),
        ({"lerning_rate": 1.0}, "AdamW has no option 'lerning_rate'"),
    ],
)
def test_bad_arguments_say_what_is_expected(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        HalfFineTuning(**arguments)


def test_an_optimiser_that_evaluates_again_within_a_step_is_refused() -> None:
    with pytest.raises(IncompatibleError, match="needs an optimiser that steps once a gradient"):
        HalfFineTuning("lbfgs")


def test_state_of_another_mask_is_refused_and_leaves_the_solver_as_it_was() -> None:
    saved = HalfFineTuning("sgd", lr=0.1)
    saved.bind(Net())
    other = HalfFineTuning("sgd", "layer", lr=0.1)
    model = Net()
    other.bind(model)
    before = other.mask.digest()
    with pytest.raises(CheckpointError, match="belongs to another mask than level='layer'"):
        other.load_state_dict(saved.state_dict())
    assert other.mask.digest() == before
    train(model, other.optimizer, 1)


def test_what_is_not_bound_or_not_held_says_so() -> None:
    half = HalfFineTuning("sgd", lr=0.1)
    with pytest.raises(InputError, match="not bound to a model yet"):
        half.state_dict()
    with pytest.raises(InputError, match="no mask is drawn yet"):
        half.report()
    model = Net()
    with pytest.raises(InputError, match=r"does not hold encoder\.layers\.0"):
        HalfFineTuning(torch.optim.SGD(model.lm_head.parameters(), lr=0.1)).bind(model)
    with pytest.raises(InputError, match="the optimiser is made already"):
        HalfFineTuning(TorchOptimizer("sgd"), lr=0.1)
