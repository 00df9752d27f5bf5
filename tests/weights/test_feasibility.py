"""Whether constraints hold: curves, the finding at the end, warnings by name, and bounds tightened on validation."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import poise
from poise.errors import InputError, PoiseWarning
from poise.weights import ConstraintCurves, TightenOnValidation, constraints_of, judge_constraints
from poise.weights.feasibility import watch


def data(rows: int = 40, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"input": torch.randn(rows, 4, generator=draw), "target": torch.randint(0, 3, (rows,), generator=draw)}


def fit(formula: str, steps: int = 300, **options: Any) -> poise.Run:
    torch.manual_seed(0)
    objective = poise.parse(formula)
    options["callbacks"] = [*watch(objective), *options.get("callbacks", [])]
    return poise.fit(
        nn.Linear(4, 3),
        objective,
        data(),
        steps=steps,
        batch_size=40,
        lr=0.2,
        device="cpu",
        **{"log_every": 10, **options},
    )


def test_a_run_records_violation_and_multiplier_and_the_finding_at_its_end() -> None:
    run = fit("cross_entropy + constraint(l2, upper=0.05, lr=0.5)")
    curve = run.history["constraint/l2/violation"]
    assert run.history.steps("constraint/l2/violation") == run.history.steps("loss") == list(range(10, 301, 10))
    assert curve[0] == pytest.approx(run.history["term/l2"][0] - 0.05, rel=1e-5)
    assert run.history["constraint/l2/multiplier"][-1] == pytest.approx(run.history["weight/l2"][-1], rel=0.05)
    (found,) = judge_constraints(run.objective, run.history)
    assert found.feasible
    assert found.sentence == "l2 <= 0.05: feasible"
    assert found.warning == ""
    assert run.history["constraint/l2/feasible"] == [1.0]
    assert run.history["constraint/l2/final_violation"] == [pytest.approx(found.violation)]


def test_a_constraint_that_cannot_hold_is_warned_of_by_name() -> None:
    """No model has a cross-entropy below 0, and none of this one's fits labels drawn at random."""
    with pytest.warns(
        PoiseWarning, match="The constraint cross_entropy <= 0.1 looks infeasible: its multiplier grew to"
    ) as seen:
        run = fit("0.1*l2 + constraint(cross_entropy, upper=0.1, lr=0.02)", steps=400)
    assert len(seen) == 1
    (found,) = judge_constraints(run.objective, run.history)
    assert found.hopeless
    assert found.sentence.startswith("cross_entropy <= 0.1: not feasible: violation 0.")
    assert run.history["constraint/cross_entropy/feasible"] == [0.0]


def test_a_constraint_that_is_not_met_yet_is_told_from_a_hopeless_one() -> None:
    with pytest.warns(PoiseWarning, match="l2 <= 0.001 does not hold at the end of the run"):
        run = fit("cross_entropy + constraint(l2, upper=0.001, lr=0.5)", steps=12, log_every=1)
    assert not judge_constraints(run.objective, run.history)[0].hopeless


def test_an_equality_is_judged_from_both_sides_and_a_bound_with_room_is_feasible() -> None:
    run = fit("cross_entropy + constraint(l2, equal=0.3, lr=0.05, damping=0.3) + constraint(l1, lower=-1)", steps=600)
    first, second = judge_constraints(run.objective, run.history)
    assert first.sentence == "l2 = 0.3: feasible"
    assert abs(first.violation) < 0.003
    assert second.violation < -1
    assert second.feasible
    assert second.multiplier == 0


def test_an_objective_without_constraints_is_not_watched() -> None:
    objective = poise.parse("cross_entropy + adaptive_kl(kl, target=1)")
    assert watch(objective) == []
    assert constraints_of(objective) == {}


def test_the_curves_of_a_resumed_run_are_those_of_an_uninterrupted_one(tmp_path: Any) -> None:
    class Stop:
        def on_step_end(self, state: Any) -> None:
            if state.step == 13:
                raise KeyboardInterrupt

    formula = "cross_entropy + constraint(l2, equal=0.3, lr=0.5)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PoiseWarning)
        whole = fit(formula, steps=25)
        with pytest.raises(KeyboardInterrupt):
            fit(formula, steps=25, checkpoint=tmp_path, checkpoint_steps=13, callbacks=[Stop()])
        again = fit(formula, steps=25, checkpoint=tmp_path)
        done = fit(formula, steps=25, checkpoint=tmp_path)
    for name in whole.history:
        assert again.history[name] == done.history[name] == whole.history[name], name


def test_two_watchers_write_every_point_once() -> None:
    run = fit("cross_entropy + constraint(l2, upper=5)", steps=20, callbacks=[ConstraintCurves()])
    assert run.history.steps("constraint/l2/violation") == [10, 20]
    assert len(run.history["constraint/l2/feasible"]) == 1


def test_a_bound_is_tightened_until_validation_holds_it() -> None:
    """A metric that lies 0.1 above what training measures: the margin becomes 0.1, and validation meets the written bound."""

    def metric(model: nn.Module) -> dict[str, float]:
        return {"size": float(model.weight.detach().square().sum() / 2) + 0.1}

    run = fit(
        "cross_entropy + constraint(l2, upper=0.3, lr=0.05, damping=0.3)",
        steps=1500,
        evaluate=metric,
        validate_every=10,
        callbacks=[TightenOnValidation("l2", "size", rate=0.02)],
    )
    (module,) = constraints_of(run.objective).values()
    assert run.history["valid/size"][-1] == pytest.approx(0.3, abs=0.01)
    assert float(module.margin) == pytest.approx(0.1, abs=0.02)
    (found,) = judge_constraints(run.objective, run.history)
    assert found.violation == pytest.approx(-0.1, abs=0.02)


@pytest.mark.parametrize(
    ("formula", "label", "metric", "words"),
    [
        (
            "cross_entropy + constraint(l2, upper=1)",
            "l22",
            "accuracy",
            "no constraint is called 'l22'; there are: l2. Did you mean 'l2'",
        ),
        ("cross_entropy + constraint(l2, equal=1)", "l2", "accuracy", "l2 is held at a value"),
        (
            "cross_entropy + constraint(l2, upper=1)",
            "l2",
            "size",
            "no metric is called 'size'; these are: accuracy, nll",
        ),
    ],
)
def test_tightening_what_is_not_there_is_refused(formula: str, label: str, metric: str, words: str) -> None:
    with pytest.raises(InputError) as error:
        fit(formula, steps=5, valid=data(), callbacks=[TightenOnValidation(label, metric)])
    assert words in str(error.value)
