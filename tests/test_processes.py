"""Law 11: value, gradient and state on two real processes equal those of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import poise
from poise import processes
from two_processes import on_two

FORMULA = "cross_entropy + 0.5*early_learning(beta=0.6) + 0.01*l2 + constraint(confidence_penalty, upper=-1.2, lr=0.5)"
ROWS, BATCH, CLASSES = (
    21,
    8,
    4,
)  # 8 + 8 + 5: uneven, and with accumulate=3 some part of the last batch is empty on one process


def train(accumulate: int, formula: str = FORMULA, clip: float | None = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    data = {
        "input": torch.randn(ROWS, 5, generator=generator).double(),
        "target": torch.randint(0, CLASSES, (ROWS,), generator=generator),
    }
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()
    objective = poise.parse(formula)
    run = poise.fit(
        model,
        objective,
        data,
        epochs=3,
        batch_size=BATCH,
        accumulate=accumulate,
        lr=0.1,
        clip=clip,
        device="cpu",
        log_every=1,
    )
    state = {k: v for k, v in objective.state_dict().items() if isinstance(v, torch.Tensor)}
    return {**model.state_dict(), **state, "loss": torch.tensor(run.history["loss"])}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_two_processes_train_as_one_with_a_stateful_term_and_an_uneven_last_batch(
    tmp_path: Path, accumulate: int
) -> None:
    first, second = on_two(train, tmp_path, accumulate)
    one = train(1)
    assert first.keys() == one.keys()
    for name, value in one.items():
        # Weights are float64 and differ by the order of sums; memories and curves are float32.
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        assert torch.equal(first[name], second[name]), name


def test_a_term_that_couples_examples_is_refused_by_name_on_two_processes(tmp_path: Path) -> None:
    for message in on_two(train, tmp_path, 1, "cross_entropy + spread_of_batch"):
        assert message.startswith("IncompatibleError: spread_of_batch")
        assert "several processes" in message


class SpreadOfBatch(poise.Term):
    """Charge the spread of the logits within the batch."""

    formula = "spread_of_batch"
    couples = ("logits",)

    def forward(self, logits):
        return logits.var(0).sum()


LAUNCHED = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_processes import train
from poise import processes
state = train(1)
assert processes.size() == 2
if processes.rank() == 0:
    torch.save(state, {result!r})
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_a_launcher_needs_nothing_but_its_own_command(tmp_path: Path) -> None:
    script, result = tmp_path / "train.py", tmp_path / "state.pt"
    script.write_text(LAUNCHED.format(tests=str(Path(__file__).parent), result=str(result)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        launch, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=200
    )
    assert result.exists(), done.stderr[-2000:]
    for name, value in train(1).items():
        torch.testing.assert_close(torch.load(result, weights_only=True)[name], value, rtol=1e-5, atol=1e-6)


def test_one_process_is_the_identity() -> None:
    rows = torch.ones(3)
    assert processes.size() == 1
    assert processes.rank() == 0
    assert processes.sum_across(rows) is rows
    assert processes.gather_rows(rows) is rows


def train_balanced(accumulate: int) -> dict[str, torch.Tensor]:
    from poise.weights.bilevel.online import OnlineBilevel

    generator = torch.Generator().manual_seed(0)
    data = {
        "input": torch.randn(ROWS, 5, generator=generator).double(),
        "target": torch.randint(0, CLASSES, (ROWS,), generator=generator),
    }
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()
    run = poise.fit(
        model, "cross_entropy + auto*l2 + auto*confidence_penalty", data, data, epochs=4, batch_size=BATCH,
        accumulate=accumulate, lr=0.1, device="cpu", policy=OnlineBilevel("one_step", every=2, warmup=0.0, upper="cross_entropy"),
    )  # fmt: skip
    return {**model.state_dict(), **{name: torch.tensor(w) for name, w in run.weights.items()}}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_two_processes_find_the_weights_of_one(tmp_path: Path, accumulate: int) -> None:
    first, second = on_two(train_balanced, tmp_path, accumulate)
    one = train_balanced(1)
    for name, value in one.items():
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        assert torch.equal(first[name], second[name]), name
