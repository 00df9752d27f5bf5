"""Guided preferences in a run: from a formula, with the guide's own discriminators, on what the terms share, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import poise
from poise.data.domain_pairs import DomainPairs
from poise.errors import InputError
from poise.objective import Objective
from poise.policy import Policies
from poise.problem import Problem, Signals
from poise.readouts import DomainFeatures
from poise.terms import DomainAdversarial, SourceClassification, TargetClassification
from poise.weights.pareto import GuidedPareto

K, WIDTH = 3, 4


def data(seed: int = 0) -> DomainPairs:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(60, 5, generator=generator), torch.randint(K, (60,), generator=generator)
    return DomainPairs((x, y), torch.randn(50, 5, generator=generator) + 0.5, 8, seed=seed)


def model() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(5, WIDTH), nn.Tanh(), nn.Linear(WIDTH, K))


def terms() -> tuple[Objective, TargetClassification]:
    target = TargetClassification(K, WIDTH, (6,), shifted=True)
    return SourceClassification() + DomainAdversarial(WIDTH, (6,), warmup=2) + target, target


def train(objective: Any, policy: Any, steps: int = 6, **options: Any) -> poise.Run:
    pairs = data()
    return poise.fit(
        model(), objective, pairs, valid=pairs.guide, evaluate=lambda m: {"found": 0.0}, readout=DomainFeatures(),
        policy=policy, lr=0.1, steps=steps, device="cpu", **options,
    )  # fmt: skip


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_run_records_its_preferences() -> None:
    objective, target = terms()
    policy = GuidedPareto(upper=target, valid_batch=4)
    run = train(objective, policy, log_every=2)
    summary = policy.summary()
    assert summary.steps == 6
    assert summary.names == objective.labels
    assert sum(summary.alpha) == pytest.approx(1)
    assert run.history["policy/alpha/target_classification"][-1] == pytest.approx(float(policy.log[-1].alpha[2]))


def test_a_formula_names_the_guide_by_the_term_that_learns() -> None:
    """The guide is then the run's own term with its discriminators, not a second one that never learns."""
    method = "guided(upper='target_classification', branch='balance')"
    auto = f'auto(policy="pareto", method="{method}")'
    formula = (
        f"{auto}*source_classification + {auto}*domain_adversarial(dim=4, hidden=(6,), warmup=2) + "
        f"{auto}*target_classification(classes=3, dim=4, hidden=(6,), shifted=True)"
    )
    objective, target = terms()
    first, second = train(formula, None), train(objective, GuidedPareto(branch="balance", upper=target))
    assert same(first.model, second.model)
    policies = Policies(terms()[0], GuidedPareto(upper="target_classification"))
    assert policies.upper.terms["target_classification"] is policies.objective.terms["target_classification"]


def test_the_head_and_the_discriminators_keep_weight_one() -> None:
    objective, target = terms()
    net, pairs = model(), data().prepare("main", 0, torch.device("cpu"))
    policies = Policies(objective, GuidedPareto(upper=target, branch="balance"))
    policies.bind()
    [batch] = next(pairs.iterate(0))
    problem = Problem(net, policies.objective, [{"main": batch}], DomainFeatures())
    [signals] = policies.set(
        problem,
        lambda *a, **k: Signals(
            *a, **k, validation=lambda: Problem(net, 1 * target, [{"main": pairs.guide}], DomainFeatures())
        ),
    )
    assert set(signals.gradients.shared) == {"0.weight", "0.bias"}
    combined = problem.gradient()
    rows = [
        Problem(net, objective, [{"main": batch}], DomainFeatures()).gradient(terms=[label])
        for label in objective.labels
    ]
    weights = [float(w) for w in policies.current.values()]
    for name, g in combined.items():
        factors = weights if name in ("0.weight", "0.bias") else [1.0] * 3
        expected: Tensor = sum(f * row[name] for f, row in zip(factors, rows, strict=True) if name in row)  # type: ignore[assignment]
        torch.testing.assert_close(g, expected)
    assert "2.weight" not in rows[2]


def test_a_resumed_run_equals_the_whole_one(tmp_path: Path) -> None:
    class Stop:
        def on_step_end(self, state: Any) -> None:
            if state.step == 3:
                state.stop = "enough"

    whole_policy = GuidedPareto(upper="target_classification", valid_batch=4)
    whole = train(terms()[0], whole_policy)
    train(
        terms()[0], GuidedPareto(upper="target_classification", valid_batch=4), callbacks=[Stop()], checkpoint=tmp_path
    )
    resumed_policy = GuidedPareto(upper="target_classification", valid_batch=4)
    saved = poise.checkpoint.load_newest(tmp_path, torch.device("cpu"))
    assert saved is not None
    assert saved["fields"]["step"] == 3
    _let_go_on(tmp_path)
    resumed = train(terms()[0], resumed_policy, checkpoint=tmp_path)
    assert same(whole.model, resumed.model)
    assert resumed_policy.summary() == whole_policy.summary()


def _let_go_on(folder: Path) -> None:
    """Take the reason to stop out of the newest checkpoint, as if the run had been interrupted."""
    saved = poise.checkpoint.load_newest(folder, torch.device("cpu"))
    assert saved is not None
    saved["fields"]["stop"] = None
    step = saved["fields"]["step"]
    poise.checkpoint.save(folder, step, saved)


def test_a_run_without_held_out_data_is_refused() -> None:
    objective, target = terms()
    with pytest.raises(InputError, match="no validation data"):
        poise.fit(
            model(),
            objective,
            data(),
            readout=DomainFeatures(),
            policy=GuidedPareto(upper=target),
            steps=1,
            device="cpu",
        )
    with pytest.raises(InputError, match="validation objective is not clear"):
        train(objective, GuidedPareto())
