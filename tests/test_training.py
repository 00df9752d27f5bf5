"""The training loop: exact resume, honest stops, and what it leaves to others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import poise
from poise import checkpoint as checkpoints
from poise.errors import CheckpointError, IncompatibleError, InputError, Interrupted, NonFiniteError, PoiseWarning
from poise.problem import Certificate, Problem
from poise.readouts import Classification
from poise.solvers import LBFGS, SGD, AdamW, TorchOptimizer
from poise.streams import Stream
from poise.training import FitState
from poise.weights.schedule import cosine

FORMULA = "cross_entropy + 0.5*early_learning + linear(0, 0.01, steps=30)*l2 + 0.1*mixup"


def data(rows: int = 50, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 5, generator=g)
    return {"input": x, "target": (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()}


def net(seed: int = 1, dropout: float = 0.2) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))


def weights(run: poise.Run) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in run.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- the loop is the loop that one would write by hand ---------------------------------------------------------------


def test_a_run_equals_the_loop_written_by_hand() -> None:
    batch = data(32)
    ours, by_hand = net(dropout=0.0), net(dropout=0.0)
    poise.fit(ours, "cross_entropy + 0.1*l2", batch, steps=12, batch_size=32, solver=SGD(lr=0.1, momentum=0.9))
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9)
    for _ in range(12):
        optimizer.zero_grad()
        penalty = sum(p.square().sum() for p in by_hand.parameters() if p.ndim > 1) / 2
        loss = nn.functional.cross_entropy(by_hand(batch["input"]), batch["target"]) + 0.1 * penalty
        loss.backward()
        optimizer.step()
    for a, b in zip(ours.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # rows come in another order within the batch


def test_a_seed_decides_everything_and_the_global_generator_nothing() -> None:
    runs = []
    for noise in (0, 1):
        model = net()
        torch.manual_seed(noise)
        runs.append(weights(poise.fit(model, FORMULA, data(), steps=20, batch_size=16, seed=3)))
    assert same(*runs)
    assert not same(runs[0], weights(poise.fit(net(), FORMULA, data(), steps=20, batch_size=16, seed=4)))


def test_a_term_with_weight_zero_leaves_the_run_bit_identical_to_the_base() -> None:
    base = weights(poise.fit(net(), "cross_entropy", data(), steps=15, batch_size=16))
    assert same(base, weights(poise.fit(net(), "cross_entropy + 0*mixup", data(), steps=15, batch_size=16)))


def test_accumulation_gives_the_weights_of_the_full_batch() -> None:
    def train(accumulate: int) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Linear(5, 3).double()
        batch = {k: v.double() if v.is_floating_point() else v for k, v in data().items()}
        return poise.fit(
            model, "cross_entropy + 0.1*early_learning", batch, steps=9, batch_size=16, accumulate=accumulate
        ).model

    whole, parts = train(1), train(3)
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-6, atol=1e-7)  # memories are float32


@pytest.mark.parametrize(
    "solver",
    ["sgd", "adamw", torch.optim.Adam, AdamW(lr=1e-3), SGD(lr=0.1, clip=1.0), LBFGS(max_iter=5)],
    ids=["sgd", "adamw", "class", "adamw()", "clip", "lbfgs"],
)
def test_every_kind_of_solver_lowers_the_loss(solver) -> None:
    run = poise.fit(net(dropout=0.0), "cross_entropy", data(), steps=25, batch_size=50, solver=solver, log_every=1)
    assert run.history["loss"][-1] < run.history["loss"][0]


def test_an_optimiser_with_its_parameters_is_used_as_it_is() -> None:
    model = net()
    frozen = model[0].weight.detach().clone()
    poise.fit(model, "cross_entropy", data(), steps=5, solver=torch.optim.SGD(model[4].parameters(), lr=0.1))
    assert torch.equal(model[0].weight, frozen)


def test_streams_have_their_own_data_and_batch_size() -> None:
    train = {"main": Stream(data(40), 10), "anchor": Stream(data(12, seed=5), 4)}
    run = poise.fit(net(), "cross_entropy + 0.5*cross_entropy.on('anchor')", train, steps=8, log_every=1)
    assert run.history["active/cross_entropy@anchor"] == [1.0] * 8
    with pytest.raises(InputError, match="'other'"):
        poise.fit(net(), "cross_entropy.on('other')", train, steps=1)


@pytest.mark.parametrize("kind", ["tensors", "dataset", "loader"])
def test_data_come_as_tensors_data_sets_or_loaders(kind: str) -> None:
    batch = data(20)
    dataset = torch.utils.data.TensorDataset(batch["input"], batch["target"])
    given = {
        "tensors": (batch["input"], batch["target"]),
        "dataset": dataset,
        "loader": torch.utils.data.DataLoader(dataset, 8),
    }[kind]
    run = poise.fit(net(), "cross_entropy", given, valid=given, epochs=2, batch_size=8)
    assert run.steps == 6
    assert 0 <= run.history["valid/accuracy"][-1] <= 1


def test_bf16_computes_losses_in_float32_and_learns() -> None:
    run = poise.fit(net(dropout=0.0), "cross_entropy", data(), steps=60, batch_size=50, precision="bf16", lr=0.1)
    assert run.history["loss"][-1] < 0.6 * run.history["loss"][0]
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


def test_learning_rates_follow_the_schedule() -> None:
    rates = []

    class Watch:
        def on_step_end(self, state: FitState) -> None:
            rates.append(solver.optimizer.param_groups[0]["lr"])

    solver = SGD(lr=0.1)
    poise.fit(
        net(), "cross_entropy", data(), steps=11, solver=solver, lr_schedule=cosine(1, 0, steps=10), callbacks=[Watch()]
    )
    assert rates[0] == pytest.approx(0.1)
    assert rates[5] == pytest.approx(0.05)
    assert rates[10] == pytest.approx(0.0, abs=1e-12)


def test_a_constraint_is_met_and_its_multiplier_leaves_zero_again() -> None:
    objective = poise.parse("cross_entropy + constraint(l2, upper=2.0, lr=0.05)")
    run = poise.fit(
        net(dropout=0.0), objective, data(), steps=1500, batch_size=50, solver=SGD(lr=0.05, momentum=0.0), log_every=1
    )
    assert run.history["term/l2"][0] > 2.5
    assert sum(run.history["term/l2"][-100:]) / 100 == pytest.approx(2.0, rel=0.02)
    assert run.history["weight/l2"][-1] > 0
    module = next(iter(objective.coefficients.values()))
    for measured, expected in ((0.0, 0.0), (0.0, 0.0), (6.0, 0.2)):
        if measured == 0.0:
            module.multiplier = torch.zeros((), dtype=torch.float64)
        module.advance(measured)
        assert float(module.multiplier) == pytest.approx(expected)


def test_a_part_of_the_formula_is_put_into_the_model_and_resumes(tmp_path: Path) -> None:
    formula = "cross_entropy + 0.01*l2 with compand(learn=True)"
    whole = poise.fit(net(), formula, data(), steps=12, batch_size=16)
    assert "parametrizations.weight.original" in "".join(whole.model.state_dict())
    with pytest.raises(Interrupted):
        poise.fit(net(), formula, data(), steps=12, batch_size=16, checkpoint=tmp_path, callbacks=[StopAt(5)])
    assert same(
        weights(poise.fit(net(seed=3), formula, data(), steps=12, batch_size=16, checkpoint=tmp_path)), weights(whole)
    )


# ---- validation ------------------------------------------------------------------------------------------------------


def test_early_stopping_returns_the_best_model_and_says_why_it_stopped() -> None:
    batch = data(60)
    noisy = {"input": batch["input"], "target": torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(1))}
    run = poise.fit(
        net(),
        "cross_entropy",
        noisy,
        valid=data(80, seed=9),
        epochs=200,
        patience=4,
        restore_best=True,
        monitor="nll",
        lr=0.2,
    )
    assert "no better nll in 4 validations" in run.stopped
    assert run.best is not None
    losses = run.history["valid/nll"]
    assert run.best[1] == min(losses)
    assert nn.functional.cross_entropy(
        run.predict(data(80, seed=9)["input"]), data(80, seed=9)["target"]
    ) == pytest.approx(run.best[1], abs=1e-5)


def test_an_unknown_metric_to_monitor_is_named() -> None:
    with pytest.raises(InputError, match="accuracy, nll"):
        poise.fit(net(), "cross_entropy", data(), valid=data(), steps=3, monitor="acuracy", validate_every=1)


# ---- stopped and resumed ---------------------------------------------------------------------------------------------


class StopAt:
    """Stops like Ctrl-C does, at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, state: FitState) -> None:
        if state.step == self.step:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("stop", [1, 7, 13])
def test_an_interrupted_run_resumes_to_the_same_weights_bit_for_bit(tmp_path: Path, stop: int) -> None:
    options = {"steps": 20, "batch_size": 16, "solver": "adamw", "lr": 1e-2, "valid": data(30, seed=2), "log_every": 3}
    whole = poise.fit(net(), FORMULA, data(), **options)
    with pytest.raises(Interrupted, match=rf"after step {stop} of 20, and saved"):
        poise.fit(net(), FORMULA, data(), checkpoint=tmp_path, callbacks=[StopAt(stop)], **options)
    resumed = poise.fit(net(seed=99), FORMULA, data(), checkpoint=tmp_path, **options)
    assert same(weights(resumed), weights(whole))
    assert resumed.history.curves() == whole.history.curves()
    for name, value in whole.objective.state_dict().items():
        assert torch.equal(resumed.objective.state_dict()[name], value) if isinstance(value, torch.Tensor) else True


SCRIPT = """
    import sys, time, torch, poise
    sys.path.insert(0, {tests!r})
    from test_training import FORMULA, data, net

    class Slowly:
        def on_step_end(self, state):
            time.sleep(0.01)
            print(state.step, flush=True)

    run = poise.fit(net(), FORMULA, data(), steps=60, batch_size=16, checkpoint={folder!r}, checkpoint_steps=1, callbacks=[Slowly()])
    torch.save(run.model.state_dict(), {result!r})
"""


@pytest.mark.parametrize("kill_after", [3, 17, 41])
def test_a_killed_process_resumes_to_the_same_weights_bit_for_bit(tmp_path: Path, kill_after: int) -> None:
    result = tmp_path / "weights.pt"
    script = textwrap.dedent(
        SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "run"), result=str(result))
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= kill_after:
            break
    time.sleep(0.003)  # somewhere within a step or a save
    process.kill()
    process.wait()
    assert not result.exists()
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, env=environment)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = weights(poise.fit(net(), FORMULA, data(), steps=60, batch_size=16))
    torch.set_num_threads(threads)
    assert same(torch.load(result, weights_only=True), whole)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = poise.fit(net(), FORMULA, data(), steps=5, checkpoint=tmp_path)
    again = poise.fit(net(seed=7), FORMULA, data(), steps=5, checkpoint=tmp_path)
    assert same(weights(first), weights(again))
    assert again.seconds == first.seconds


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path: Path, damage: str) -> None:
    options = {"steps": 12, "batch_size": 16, "checkpoint": tmp_path, "checkpoint_steps": 5}
    whole = weights(poise.fit(net(), FORMULA, data(), **options))
    newest = sorted(tmp_path.glob("*.ckpt"))[-1]
    content = bytearray(newest.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    newest.write_bytes({"truncate": content[: len(content) // 2], "flip": content, "empty": b""}[damage])
    with pytest.warns(PoiseWarning, match="Falling back to the one before"):
        resumed = poise.fit(net(seed=5), FORMULA, data(), **options)
    assert same(weights(resumed), whole)


def test_only_damaged_checkpoints_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    poise.fit(net(), FORMULA, data(), steps=2, checkpoint=tmp_path)
    for file in tmp_path.glob("*.ckpt"):
        file.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="remove the folder"):
        poise.fit(net(), FORMULA, data(), steps=2, checkpoint=tmp_path)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    poise.fit(net(), "cross_entropy", data(), steps=2, checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match=r"objective is .cross_entropy."):
        poise.fit(net(), "cross_entropy + l2", data(), steps=2, checkpoint=tmp_path)


def test_a_checkpoint_holds_no_code(tmp_path: Path) -> None:
    import pickle

    body = pickle.dumps(print)
    import hashlib

    file = tmp_path / "step-000000000001.ckpt"
    file.write_bytes(b"poise-checkpoint-1 " + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    with pytest.raises(CheckpointError, match="plain containers"):
        checkpoints.load(file)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may write into a read-only folder")
def test_a_read_only_folder_is_an_error_with_its_name(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="could not be written"):
        poise.fit(net(), "cross_entropy", data(), steps=2, checkpoint=tmp_path / "run")


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_names_term_step_and_rows() -> None:
    batch = data(20)
    batch["input"][[4, 11]] = float("inf")
    with pytest.raises(NonFiniteError) as error:
        poise.fit(nn.Linear(5, 3), "0.1*l2 + cross_entropy", batch, steps=5, batch_size=20)
    assert "cross_entropy is not finite in step 0, at rows 4, 11 of the data" in str(error.value)


def test_skipping_counts_the_steps_and_keeps_the_model_finite() -> None:
    batch = data(20)
    batch["input"][4] = float("nan")
    run = poise.fit(
        nn.Linear(5, 3), "cross_entropy + early_learning", batch, epochs=3, batch_size=5, on_nonfinite="skip"
    )
    assert run.skipped == 3
    assert all(torch.isfinite(p).all() for p in run.model.parameters())
    assert run.objective.clock.step == 9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "fp8"}, "'fp32' or 'bf16'"),
        ({"steps": 2, "epochs": 2}, "not in both"),
        ({"accumulate": 0}, "accumulate"),
        ({"batch_size": 0}, "batch_size"),
        ({"solver": "adamv"}, "Did you mean 'adam"),
        ({"solver": SGD(lr=0.1), "lr": 0.2}, "made already"),
        ({"device": "tpu9"}, "no device"),
        ({"on_nonfinite": "ignore"}, "'stop' or 'skip'"),
        ({"train": {"input": torch.ones(3, 5), "target": torch.zeros(2).long()}}, "differ"),
        ({"train": {"input": torch.ones(0, 5), "target": torch.zeros(0).long()}}, "empty"),
        ({"train": {"input": torch.ones(3, 5), "target": torch.tensor([0, 1, 7])}}, "3 classes"),
        ({"objective": "cross_entropy - 0.1*l2"}, "no minimum"),
        ({"objective": "0*l2"}, "no terms"),
    ],
)
def test_a_wrong_argument_is_one_clear_error(options, words: str) -> None:
    arguments = {"model": nn.Linear(5, 3), "objective": "cross_entropy", "train": data(), **options}
    with pytest.raises(InputError, match=words):
        poise.fit(**arguments)


def test_an_auto_weight_needs_somebody_to_find_it() -> None:
    with pytest.raises(IncompatibleError, match="--tune"):
        poise.fit(nn.Linear(5, 3), "cross_entropy + auto*l2", data())


class Straight(poise.Term):
    """A value whose gradient comes from somewhere else."""

    capabilities = frozenset({"per_example"})

    def forward(self, logits):
        return poise.Value(logits.sign().sum(-1), surrogate=logits.sum(-1))


def test_a_line_search_refuses_a_surrogate_by_name() -> None:
    with pytest.raises(IncompatibleError, match=r"lbfgs.*potential.*'straight'"):
        poise.fit(nn.Linear(5, 3), Straight(), data(), solver=LBFGS())


# ---- solvers and problems --------------------------------------------------------------------------------------------


def problem(model: nn.Module, formula: str = "cross_entropy + 0.3*l2") -> Problem:
    batch = {k: v.double() if v.is_floating_point() else v for k, v in data(30).items()}
    return Problem(model, poise.parse(formula), [{"main": batch}], Classification())


def test_minimize_returns_a_certificate_that_its_own_gradient_confirms() -> None:
    torch.manual_seed(0)
    frozen = problem(nn.Linear(5, 3).double())
    certificate = LBFGS(max_iter=20).minimize(frozen)
    assert isinstance(certificate, Certificate)
    assert certificate.converged
    assert certificate.status == "converged"
    residual = torch.sqrt(sum(g.square().sum() for g in frozen.gradient().values()))
    assert residual <= certificate.tolerance
    unfinished = TorchOptimizer("sgd", lr=1e-3).minimize(problem(nn.Linear(5, 3).double()), iterations=3)
    assert not unfinished.converged
    assert "stopped after 3 iterations" in unfinished.status


def flat(table: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([table[k].reshape(-1) for k in ("weight", "bias")])


def test_curvature_products_equal_the_explicit_matrices() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    frozen = problem(model)
    names, shapes = ["weight", "bias"], [(3, 5), (3,)]
    start = flat({k: v.detach() for k, v in model.named_parameters()})

    def table(vector: torch.Tensor) -> dict[str, torch.Tensor]:
        return {n: v.view(s) for n, s, v in zip(names, shapes, vector.split([15, 3]), strict=True)}

    batch = frozen.batches[0]["main"]

    def loss(vector: torch.Tensor, penalty: float = 0.3) -> torch.Tensor:
        p = table(vector)
        ce = nn.functional.cross_entropy(batch["input"] @ p["weight"].T + p["bias"], batch["target"])
        return ce + penalty * 0.5 * p["weight"].square().sum()

    hessian = torch.autograd.functional.hessian(loss, start)
    gauss_newton = torch.autograd.functional.hessian(
        lambda v: loss(v, 0.0), start
    )  # the outputs are linear in the parameters
    vector = torch.randn(18, dtype=torch.float64)
    for kind, matrix in (("hessian", hessian), ("gauss_newton", gauss_newton), ("fisher", gauss_newton)):
        torch.testing.assert_close(
            flat(frozen.product(table(vector), kind)), matrix @ vector, rtol=1e-9, atol=1e-10, msg=kind
        )
    with pytest.raises(InputError, match="gauss_newton"):
        frozen.product(table(vector), "hesian")


def test_outputs_and_loss_of_outputs_compose_to_the_data_terms() -> None:
    model = nn.Linear(5, 3).double()
    frozen = problem(model)
    assert frozen.loss_of(frozen.outputs()) == frozen.value(terms=["cross_entropy"])


def test_evaluating_again_moves_no_batch_statistics() -> None:
    batch = data(30)
    model = net()
    frozen = Problem(model, poise.parse("cross_entropy"), [{"main": batch}], Classification())
    frozen.gradient()
    moved = model[1].running_mean.clone()
    frozen.value()
    frozen.gradient(at={n: p.detach() + 0.1 for n, p in model.named_parameters()})
    assert torch.equal(model[1].running_mean, moved)
    assert int(model[1].num_batches_tracked) == 1


def test_trackers_receive_the_curves(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the tensorboard tracker is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        poise.fit(
            net(),
            "cross_entropy",
            data(),
            steps=6,
            trackers=["tensorboard"],
            tracker_folder=tmp_path,
            device="cpu",
            log_every=1,
        )
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        folder = next(p.parent for p in tmp_path.rglob("events.out.tfevents*") if p.stat().st_size > 200)
        events = EventAccumulator(str(folder)).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
