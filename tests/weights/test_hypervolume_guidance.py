"""Rewards weighed by progress: the archive, the multiplier, its timing, its state, and the trap of scale-free advantages."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch

from poise.errors import InputError, NonFiniteError, PoiseWarning
from poise.formula import parse
from poise.metrics.pareto import hypervolume
from poise.weights.pareto import HypervolumeGuidance, ParetoArchive


def vectors(n: int, m: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the archive --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [2, 3, 4])
def test_gains_add_up_to_the_volume_and_never_are_negative(m: int) -> None:
    archive = ParetoArchive(reference=[0.2] * m)
    points = vectors(30, m)
    gains = [archive.add(p) for p in points]
    assert min(gains) >= 0
    assert sum(gains) == pytest.approx(archive.volume, rel=1e-10)
    assert archive.volume == pytest.approx(hypervolume(points, [0.2] * m), rel=1e-10)


def test_pruning_changes_no_gain_and_keeps_only_what_is_not_dominated() -> None:
    pruned, whole = ParetoArchive(reference=[0.0] * 3), ParetoArchive(reference=[0.0] * 3, prune=False)
    points = vectors(40)
    for p in points:
        assert pruned.add(p) == pytest.approx(whole.add(p), abs=1e-12)
    assert len(pruned) < len(whole)
    assert pruned.volume == pytest.approx(whole.volume, rel=1e-12)


def test_duplicates_and_dominated_vectors_are_not_taken_in() -> None:
    archive = ParetoArchive(reference=[0.0, 0.0])
    archive.add([2.0, 2.0])
    assert [archive.add(v) for v in ([2.0, 2.0], [1.0, 2.0], [3.0, -1.0])] == [0.0, 0.0, 0.0]
    assert archive.points.tolist() == [[2.0, 2.0]]


def test_the_first_vector_is_the_reference_unless_another_rule_is_given() -> None:
    first = ParetoArchive()
    assert first.add([1.0, 1.0]) == 0.0
    assert not first.informative
    assert first.add([2.0, 3.0]) == 2.0
    assert first.informative
    worst = ParetoArchive(reference="worst")
    worst.add([1.0, 1.0])
    assert worst.add([2.0, 0.0]) == 0.0  # as bad as the worst in the second objective
    assert worst.reference is not None
    assert worst.reference.tolist() == [1.0, 0.0]
    assert worst.add([2.0, 2.0]) == 2.0


def test_what_is_minimised_changes_sign_and_ranges_set_the_unit() -> None:
    archive = ParetoArchive(
        "accuracy, -length", reference={"accuracy": 0.0, "length": 100.0}, normalise=[(0, 1), (0, 200)]
    )
    assert archive.add({"length": 50.0, "accuracy": 0.5, "loss": 3.0}) == pytest.approx(0.5 * 0.25)
    assert archive.points.tolist() == [[0.5, 50.0]]
    assert archive.gain({"accuracy": 0.9, "length": 150.0}) == 0.0


def test_an_archive_says_when_its_volume_means_nothing() -> None:
    archive = ParetoArchive(reference=[1.0, 1.0])
    archive.add([2.0, 0.0])
    assert not archive.informative
    assert "no point dominates the reference" in repr(archive)


# ---- the multiplier -----------------------------------------------------------------------------------------------------


def test_the_multiplier_is_the_published_one_and_lies_between_one_half_and_two() -> None:
    guidance = HypervolumeGuidance(temperature=0.3)
    points = vectors(50) * 4
    assert guidance.multiplier == 1.0
    assert guidance.update(points[0] * 0) == 1.0  # nothing to compare with yet
    kept = [points[0] * 0]
    for p in points:
        before = hypervolume(torch.stack(kept), torch.zeros(3))
        gain = hypervolume(torch.stack([*kept, p]), torch.zeros(3)) - before
        assert guidance.update(p) == pytest.approx(0.5 + 1.5 * math.tanh(gain / 0.3), abs=1e-9)
        assert 0.5 <= guidance.multiplier <= 2.0
        kept.append(p)
    assert guidance.update(points[0]) == 0.5


def test_raw_units_saturate_and_ranges_or_a_temperature_do_not() -> None:
    steps = [{"accuracy": 0.1, "length": 1500.0}, {"accuracy": 0.2, "length": 1200.0}]
    raw = HypervolumeGuidance("accuracy, -length")
    ranged = HypervolumeGuidance("accuracy, -length", normalise=[(0, 1), (0, 2048)])
    for step in steps:
        raw.update(step)
        ranged.update(step)
    assert raw.multiplier == pytest.approx(2.0, abs=1e-9)
    assert 0.5 < ranged.multiplier < 0.6


def signals(metrics: dict[str, float], formula: str = "rloo", names: tuple[str, ...] = ("rloo",)) -> SimpleNamespace:
    return SimpleNamespace(names=names, metrics=metrics, problem=SimpleNamespace(objective=parse(formula)))


def test_a_step_uses_the_multiplier_of_the_end_of_the_step_before() -> None:
    guidance = HypervolumeGuidance("accuracy")
    seen = []
    # The initial model, then what each step's validation found; the third step is made without a new one.
    for before in ({"accuracy": 0.0}, {"accuracy": 0.5}, {}, {"accuracy": 0.25}):
        step = signals(before)
        seen.append(guidance.weights(step)["rloo"])
        assert guidance.weights(step)["rloo"] == seen[-1]  # asking twice moves nothing
        guidance.advance(step)
    raised = 0.5 + 1.5 * math.tanh(0.5)
    assert seen == pytest.approx([1.0, raised, raised, 0.5])
    assert guidance.mean == pytest.approx((raised + 0.5) / 2)


def test_a_step_that_is_skipped_leaves_no_trace_in_the_archive() -> None:
    guidance = HypervolumeGuidance("accuracy", reference=[0.0])
    first = guidance.weights(signals({"accuracy": 0.5}))
    assert not len(guidance.archive)
    assert copy.deepcopy(guidance).multiplier == 1.0
    assert guidance.weights(signals({})) == first  # the step is made at last, with the validation before it
    guidance.advance(signals({}))
    assert len(guidance.archive) == 1


def test_the_preference_is_scaled_and_must_lie_on_the_simplex() -> None:
    guidance = HypervolumeGuidance("accuracy", preference={"a": 0.25, "b": 0.75})
    guidance.update([0.0])
    guidance.update([1.0])
    found = guidance.weights(signals({}, names=("a", "b")))
    assert found["a"] == pytest.approx(0.25 * guidance.multiplier)
    assert found["b"] == pytest.approx(0.75 * guidance.multiplier)
    with pytest.raises(InputError, match="no weight for c; it names a, b"):
        guidance.weights(signals({}, names=("a", "c")))
    with pytest.raises(InputError, match="must add up to 1"):
        HypervolumeGuidance(preference={"a": 0.5, "b": 0.4})
    with pytest.raises(InputError, match="all weights are 0"):
        HypervolumeGuidance(preference={"a": 0.0, "b": 0.0})
    with pytest.raises(InputError, match="at least 0"):
        HypervolumeGuidance(preference={"a": 1.5, "b": -0.5})
    HypervolumeGuidance(preference={"a": 0.334, "b": 0.333, "c": 0.333})


def test_scores_carry_the_multiplier_and_validation_moves_it() -> None:
    guidance = HypervolumeGuidance("accuracy")
    score = guidance.scoring(lambda batch: {"reward": batch, "kind": torch.tensor([1, 2])})
    evaluate = guidance.watching(lambda model: {"accuracy": next(accuracies)})
    accuracies = iter([0.0, 1.0])
    assert evaluate(torch.nn.Identity()) == {"accuracy": 0.0, "multiplier": 1.0}
    evaluate(torch.nn.Identity())
    found = score(torch.tensor([1.0, 2.0]))
    assert found["reward"].tolist() == pytest.approx([guidance.multiplier, 2 * guidance.multiplier])
    assert found["kind"].tolist() == [1, 2]
    advantage = HypervolumeGuidance("accuracy", apply_to="advantage")
    advantage.load_state_dict(guidance.state_dict())
    assert advantage.scoring(lambda batch: batch)(torch.tensor([1.0])).tolist() == [1.0]


# ---- the trap -----------------------------------------------------------------------------------------------------------


def batch(factor: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "response_logps": torch.randn(12, generator=generator, dtype=torch.float64),
        "reward": factor * torch.rand(12, generator=generator, dtype=torch.float64),
        "group": torch.arange(3).repeat_interleave(4),
    }


def gradient(formula: str, factor: float) -> torch.Tensor:
    data = batch(factor)
    logps = data.pop("response_logps").requires_grad_()
    (found,) = torch.autograd.grad(parse(formula)(response_logps=logps, **data), logps)
    return found


@pytest.mark.parametrize("factor", [0.5, 2.0])
@pytest.mark.parametrize(
    "formula", ["grpo(clip=None)", "grpo(clip=None, scale_rewards='batch')", "rloo(clip=None, whiten=True)"]
)
def test_a_factor_on_the_reward_does_nothing_where_advantages_are_divided_by_their_deviation(
    formula: str, factor: float
) -> None:
    # The guard against a deviation of 0 is 1e-4 and the deviations are about 0.3, so up to that it is exact.
    one, other = gradient(formula, 1.0), gradient(formula, factor)
    assert float((one - other).abs().max()) <= 1e-3 * float(one.abs().max())
    with pytest.warns(PoiseWarning, match="changes nothing"):
        HypervolumeGuidance().weights(signals({}, formula))


def test_without_the_guard_the_factor_cancels_to_1e_5() -> None:
    formula = "reinforce(baseline='whitened_group')"  # its guard is 1e-12
    torch.testing.assert_close(gradient(formula, 1.0), gradient(formula, 0.5), rtol=1e-5, atol=1e-8)
    with pytest.warns(PoiseWarning, match="reinforce divides advantages"):
        HypervolumeGuidance().check(parse(formula))


@pytest.mark.parametrize("formula", ["rloo(clip=None)", "reinforce", "grpo(clip=None, scale_rewards='none')"])
def test_other_advantages_feel_the_factor_in_full_and_nothing_is_warned_of(formula: str) -> None:
    torch.testing.assert_close(gradient(formula, 2.0), 2 * gradient(formula, 1.0), rtol=1e-12, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HypervolumeGuidance().check(parse(formula))
        HypervolumeGuidance(apply_to="advantage").check(parse("grpo"))


# ---- state and bad input ------------------------------------------------------------------------------------------------


def test_a_resumed_guidance_goes_on_bit_for_bit() -> None:
    points = vectors(20)
    one = HypervolumeGuidance(temperature=0.1)
    for p in points[:10]:
        one.update(p)
    loaded = HypervolumeGuidance(temperature=0.1)
    loaded.load_state_dict(one.state_dict())
    copies = [copy.deepcopy(one), pickle.loads(pickle.dumps(one)), loaded]
    path = [one.update(p) for p in points[10:]]
    for other in copies:
        assert [other.update(p) for p in points[10:]] == path
        assert other.mean == one.mean
    assert one.half().state.dtype == torch.float64


def test_bad_input_is_refused_with_words() -> None:
    for arguments, message in (
        ({"base": 0.0}, "base must lie in"),
        ({"temperature": 0.0}, "temperature positive"),
        ({"apply_to": "loss"}, "'reward' or 'advantage'"),
        ({"directions": "a, -a"}, "a name of its own"),
        ({"directions": {"a": "up"}}, "'max' and 'min' by name"),
        ({"normalise": [(1.0, 1.0)]}, "low < high"),
        ({"directions": "a, b", "normalise": [(0.0, 1.0)]}, "2 objectives need as many ranges"),
        ({"reference": "last"}, "one of initial, worst"),
    ):
        with pytest.raises(InputError, match=message):
            HypervolumeGuidance(**arguments)
    guidance = HypervolumeGuidance("a, b")
    with pytest.raises(InputError, match=r"expected a vector of 2 objectives, and got \[3\]"):
        guidance.update([1.0, 2.0, 3.0])
    with pytest.raises(InputError, match="objectives b are not among the metrics, which are a, loss"):
        guidance.update({"a": 1.0, "loss": 2.0})
    with pytest.raises(NonFiniteError, match="must be finite"):
        guidance.update([1.0, math.nan])
    assert guidance.multiplier == 1.0


def test_insight_offers_the_archive_and_the_volume_too() -> None:
    from poise import insight

    assert insight.ParetoArchive is ParetoArchive
    assert insight.hypervolume is hypervolume
