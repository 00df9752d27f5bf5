"""The laws of the algebra, over random objectives built from real terms."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import poise
from poise.errors import PoiseError, QuantityError, StateError
from poise.objective import Objective, Term, Value, auxiliary
from poise.problem import Problem
from poise.quantities import Quantities, Streams
from poise.readouts import Classification
from poise.terms import L2, ConfidencePenalty, CrossEntropy, Focal, LabelSmoothing

CLASSES, FEATURES = 4, 5
TERMS = (
    "cross_entropy",
    "label_smoothing(epsilon=0.3)",
    "focal(gamma=1.5)",
    "confidence_penalty",
    "kl",
    "l2",
    "l1(biases=True)",
    "mixup(a=0.4)",
    "early_learning(beta=0.6)",
)
PURE = tuple(t for t in TERMS if not t.startswith(("mixup", "early")))
WEIGHTS = st.floats(0.01, 5).map(lambda w: round(w, 3))


class Net(nn.Module):
    """A small classifier with dropout, so that frozen randomness is tested too."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def data(rows: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "input": torch.randn(rows, FEATURES, generator=g),
        "target": torch.randint(0, CLASSES, (rows,), generator=g),
        "index": torch.randperm(40, generator=g)[:rows],
        "teacher_logits": torch.randn(rows, CLASSES, generator=g),
    }


def net(dropout: float = 0.0, seed: int = 1) -> Net:
    torch.manual_seed(seed)
    return Net(dropout).double()


def doubled(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def formulas(terms: tuple[str, ...] = TERMS) -> st.SearchStrategy[str]:
    weighted = st.tuples(WEIGHTS, st.sampled_from(terms)).map(lambda p: f"{p[0]}*{p[1]}")
    return st.lists(weighted, min_size=1, max_size=4, unique_by=lambda f: f.split("*")[1]).map(" + ".join)


def apart(formula: str, prefix: str) -> Objective:
    pieces = [piece.split("*", 1) for piece in formula.split(" + ")]
    return poise.parse(" + ".join(f"{w}*{t}.named('{prefix}{i}')" for i, (w, t) in enumerate(pieces)))


def bound(formula: str) -> Objective:
    return poise.parse(formula).bind(examples=40, classes=CLASSES, steps=100, steps_per_epoch=10)


def problem(model: nn.Module, objective: Objective, batches: list[dict[str, torch.Tensor]], step: int = 0) -> Problem:
    return Problem(model, objective, [{"main": doubled(b)} for b in batches], Classification(), key=(0, step))


def gradients_agree(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-10) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


# ---- 1 and 2: terms return unreduced values, the objective alone reduces ---------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    formulas(tuple(t for t in TERMS if not t.startswith("mixup"))),
    st.lists(st.integers(1, 11), max_size=3, unique=True),
)
def test_uneven_micro_batches_give_the_value_and_gradient_of_the_full_batch(formula: str, cuts: list[int]) -> None:
    model, objective, full = net(), bound(formula), data()
    whole = problem(model, objective, [full])
    pieces = [
        dict(zip(full, parts, strict=True))
        for parts in zip(*(v.tensor_split(sorted(cuts)) for v in full.values()), strict=True)
    ]
    split = problem(model, objective, pieces)
    # Sums are taken in another order: agreement up to rounding of float64.
    torch.testing.assert_close(split.value(), whole.value(), rtol=1e-10, atol=1e-10)
    gradients_agree(split.gradient(), whole.gradient())


@settings(max_examples=25, deadline=None)
@given(formulas(PURE), st.integers(1, 5))
def test_padding_rows_of_count_zero_change_neither_value_nor_gradient(formula: str, padding: int) -> None:
    model, objective, full = net(), bound(formula), data()
    full["sample_weight"] = torch.ones(12)
    padded = {k: torch.cat([v, v[:padding]]) for k, v in full.items()}
    padded["sample_weight"][12:] = 0
    padded["teacher_logits"][12:] = 1e3
    gradients_agree(problem(model, objective, [padded]).gradient(), problem(model, objective, [full]).gradient())


def test_a_token_term_counts_tokens_over_all_micro_batches() -> None:
    class Tokens(Term):
        def forward(self, scores, mask):
            return scores

        def count(self, mask):
            return mask.double()

    objective = 1 * Tokens()
    scores = torch.arange(12.0, dtype=torch.float64).view(3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    expected = scores[mask].mean()
    torch.testing.assert_close(objective(scores=scores, mask=mask), expected)
    micro = [{"main": {"scores": scores[i : i + 1], "mask": mask[i : i + 1]}} for i in range(3)]
    split = Problem(nn.Linear(1, 1), objective, micro, lambda model, batch, reads: batch)
    torch.testing.assert_close(split.value(), expected)


def test_values_over_time_without_a_count_are_refused() -> None:
    class Silent(Term):
        def forward(self, scores):
            return scores

    with pytest.raises(QuantityError, match="count"):
        (1 * Silent())(scores=torch.ones(2, 3))


# ---- 3: algebra ------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(formulas(), formulas(), WEIGHTS)
def test_sums_commute_and_scaling_distributes(left: str, right: str, weight: float) -> None:
    model, batch = net(), data()

    def value(make) -> torch.Tensor:
        a, b = apart(left, "a"), apart(right, "b")
        return problem(model, make(a, b).bind(examples=40, classes=CLASSES), [batch]).value()

    tolerance = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(value(lambda a, b: a + b), value(lambda a, b: b + a), **tolerance)
    torch.testing.assert_close(
        value(lambda a, b: weight * (a + b)), value(lambda a, b: weight * a + weight * b), **tolerance
    )
    torch.testing.assert_close(value(lambda a, b: sum([a, b])), value(lambda a, b: a + b), **tolerance)
    torch.testing.assert_close(value(lambda a, b: weight * (a + b)), weight * value(lambda a, b: a + b), **tolerance)


@settings(max_examples=25, deadline=None)
@given(formulas())
def test_the_gradient_is_the_weighted_sum_of_the_terms_gradients(formula: str) -> None:
    model, objective, batch = net(), bound(formula), data()
    frozen = problem(model, objective, [batch])
    whole = frozen.gradient()
    for name, gradient in whole.items():
        parts = [frozen.gradient(terms=[label]).get(name) for label in objective.labels]
        torch.testing.assert_close(sum(p for p in parts if p is not None), gradient, rtol=1e-9, atol=1e-11)


def test_a_weight_that_is_the_number_zero_removes_the_term_and_what_it_alone_reads() -> None:
    objective = poise.parse("cross_entropy + 0*kl")
    assert objective.labels == ("cross_entropy",)
    assert "teacher_logits" not in objective.reads


def test_a_scheduled_weight_is_evaluated_while_it_is_zero() -> None:
    objective = poise.parse("cross_entropy + linear(0, 1, steps=5)*l2")
    report = objective.evaluate(
        logits=torch.zeros(2, 3), target=torch.tensor([0, 1]), parameters={"w": torch.ones(2, 2)}
    )
    assert report.terms["l2"].weight == 0
    assert report.terms["l2"].value == 2


def test_numpy_does_not_capture_the_operators() -> None:
    import numpy as np

    for weight in (np.float64(0.5), np.float32(0.5), np.int64(2)):
        objective = weight * CrossEntropy()
        assert isinstance(objective, Objective)
        assert isinstance(weight * objective, Objective)


@settings(max_examples=25, deadline=None)
@given(formulas(PURE))
def test_per_example_tensor_weights_multiply_inside_the_sum(formula: str) -> None:
    objective = poise.parse("cross_entropy")
    weight = torch.rand(12, generator=torch.Generator().manual_seed(3)).double()
    batch, model = doubled(data()), net()
    values = nn.functional.cross_entropy(model(batch["input"]), batch["target"], reduction="none")
    torch.testing.assert_close(
        (weight * objective)(logits=model(batch["input"]), target=batch["target"]), (weight * values).mean()
    )


# ---- 4: calls --------------------------------------------------------------------------------------------------------


def test_calling_returns_a_plain_scalar_and_evaluate_tells_every_term() -> None:
    objective = poise.parse("cross_entropy + 0.5*confidence_penalty")
    logits, target = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, 2])
    total = objective(logits=logits, target=target)
    assert type(total) is torch.Tensor
    assert total.ndim == 0
    report = objective.evaluate({"logits": logits, "target": target})
    torch.testing.assert_close(report.total, total)
    torch.testing.assert_close(
        report.terms["cross_entropy"].value + 0.5 * report.terms["confidence_penalty"].value, total
    )
    assert objective.reads == ("logits", "target")


# ---- 5: quantities ---------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.permutations(["a", "b", "c"]), st.sets(st.sampled_from(["a", "b", "c"])))
def test_lazy_quantities_do_not_depend_on_the_order_of_reading_or_on_who_else_reads(
    order: list[str], also: set[str]
) -> None:
    def offer() -> Quantities:
        q = Quantities(key=(0, 7, 0, 0))
        for name in "abc":
            q.offer(name, lambda: torch.rand(3))
        return q

    reference = {name: offer()[name] for name in "abc"}
    q = offer()
    for name in [n for n in order if n in also] + ["b"]:
        assert torch.equal(q[name], reference[name])
    assert q["b"] is q["b"]


def test_a_lazy_quantity_runs_under_the_gradient_mode_of_its_creation() -> None:
    weight = torch.ones(2, requires_grad=True)
    q = Quantities()
    q.offer("twice", lambda: 2 * weight)
    with torch.no_grad():
        assert q["twice"].requires_grad


def test_reading_leaves_the_global_generator_as_it_was() -> None:
    before = torch.get_rng_state()
    q = Quantities(key=(1, 2))
    q.offer("noise", lambda: torch.rand(5))
    assert q["noise"].shape == (5,)
    assert torch.equal(torch.get_rng_state(), before)


def test_quantities_that_read_each_other_are_an_error() -> None:
    q = Quantities()
    q.offer("a", lambda: q["b"])
    q.offer("b", lambda: q["a"])
    with pytest.raises(QuantityError, match="a -> b -> a"):
        q["a"]


class Publishes(Term):
    def forward(self, x):
        return Value(x, extras={"margin": 2 * x})


class Reads(Term):
    def forward(self, margin):
        return margin


def test_what_a_term_publishes_is_read_by_name_and_detached() -> None:
    x = torch.ones(2, requires_grad=True)
    objective = Publishes().named("p") + 10 * Reads().on(margin="p.margin")
    total = objective(x=x)
    assert total == 21
    (gradient,) = torch.autograd.grad(total, x)
    assert torch.equal(gradient, torch.full((2,), 0.5))


def test_terms_that_read_each_other_are_an_error() -> None:
    objective = Reads().on(margin="b.margin").named("a") + Reads().on(margin="a.margin").named("b")
    with pytest.raises(QuantityError, match="circle"):
        objective(x=torch.ones(1))


def test_the_same_step_has_the_same_dropout_masks_and_another_step_has_others() -> None:
    model, objective, batch = net(dropout=0.5), bound("cross_entropy + mixup"), data()
    first = problem(model, objective, [batch], step=3)
    assert torch.equal(first.value(), first.value())
    assert torch.equal(problem(model, objective, [batch], step=3).value(), first.value())
    assert not torch.equal(problem(model, objective, [batch], step=4).value(), first.value())


# ---- 6: streams ------------------------------------------------------------------------------------------------------


def test_streams_of_different_sizes_are_read_by_the_terms_that_name_them() -> None:
    objective = poise.parse("cross_entropy + 2*cross_entropy.on('anchor')")
    main, anchor = doubled(data(8)), doubled(data(3, seed=5))
    model = net()
    got = objective(
        Streams(
            main={"logits": model(main["input"]), "target": main["target"]},
            anchor={"logits": model(anchor["input"]), "target": anchor["target"]},
        )
    )
    ce = nn.functional.cross_entropy
    torch.testing.assert_close(
        got, ce(model(main["input"]), main["target"]) + 2 * ce(model(anchor["input"]), anchor["target"])
    )


def test_a_term_whose_stream_is_absent_is_inactive_and_charges_nothing() -> None:
    objective = poise.parse("cross_entropy + 2*cross_entropy.on('anchor')")
    report = objective.evaluate(logits=torch.zeros(2, 3), target=torch.tensor([0, 1]))
    assert not report.terms["cross_entropy@anchor"].active
    torch.testing.assert_close(report.total, report.terms["cross_entropy"].value)


def test_the_main_stream_goes_by_its_name_however_quantities_are_given() -> None:
    objective, given_ = (
        poise.parse("cross_entropy.on('main')"),
        {"logits": torch.zeros(1, 2), "target": torch.tensor([0])},
    )
    for report in (
        objective.evaluate(given_),
        objective.evaluate(**given_),
        objective.evaluate({"logits": given_["logits"]}, target=given_["target"]),
    ):
        assert report.terms["cross_entropy@main"].active
        assert report.total == pytest.approx(0.6931, abs=1e-4)


def test_renaming_redirects_what_a_term_reads() -> None:
    objective = poise.parse("cross_entropy.on(logits='student')")
    assert objective.reads == ("student", "target")
    assert objective(student=torch.zeros(1, 2), target=torch.tensor([0])) == pytest.approx(0.6931, abs=1e-4)


# ---- 7: evaluate, then advance ---------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(formulas())
def test_forward_is_pure(formula: str) -> None:
    model, objective, batch = net(dropout=0.3), bound(formula), data()
    before = copy.deepcopy(objective.state_dict())
    frozen = problem(model, objective, [batch])
    first, again = frozen.value(), frozen.value()
    frozen.gradient()
    third = frozen.value()
    assert torch.equal(first, again)
    assert torch.equal(first, third)
    for name, value in objective.state_dict().items():
        assert torch.equal(value, before[name]) if isinstance(value, torch.Tensor) else value == before[name]


def memory_of(objective: Objective) -> torch.Tensor:
    return objective.terms["early_learning"].memory.visits


def test_follow_advances_once_per_step_over_micro_batches_and_repeated_closures() -> None:
    model, objective = net(), bound("cross_entropy + early_learning")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    objective.follow(optimizer)
    batch = doubled(data())
    halves = [{k: v[:6] for k, v in batch.items()}, {k: v[6:] for k, v in batch.items()}]
    for _ in range(3):
        optimizer.zero_grad()
        for half in halves:
            (objective(logits=model(half["input"]), target=half["target"], index=half["index"]) / 2).backward()
        optimizer.step()
    assert objective.clock.step == 3
    assert memory_of(objective)[batch["index"]].tolist() == [3] * 12
    assert memory_of(objective).sum() == 36


def test_following_twice_advances_once_and_another_optimiser_takes_over() -> None:
    model, objective, batch = net(), bound("cross_entropy + early_learning"), doubled(data())
    old, new = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    objective.follow(old).follow(old).follow(new)
    for optimizer, steps in ((new, 1), (old, 1), (new, 2)):
        objective(logits=model(batch["input"]), target=batch["target"], index=batch["index"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert objective.clock.step == steps


def test_lbfgs_evaluates_many_times_and_advances_once() -> None:
    model, objective, batch = net(), bound("cross_entropy + 0.1*early_learning"), doubled(data())
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=8)
    objective.follow(optimizer)
    calls = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = objective(logits=model(batch["input"]), target=batch["target"], index=batch["index"])
        loss.backward()
        calls.append(loss.item())
        return loss

    optimizer.step(closure)
    assert len(calls) > 3
    assert memory_of(objective).max() == 1


def test_a_sharpness_step_sees_the_same_objective_twice_and_advances_once() -> None:
    model, objective, batch = net(dropout=0.4), bound("cross_entropy + 0.5*early_learning"), data()
    frozen = problem(model, objective, [batch])
    gradient = frozen.gradient()
    norm = torch.sqrt(sum(g.square().sum() for g in gradient.values()))
    own = dict(model.named_parameters())
    climbed = {n: (own[n] + 0.05 * g / norm).detach() for n, g in gradient.items()}
    sharp = frozen.gradient(at=climbed)
    assert any(not torch.equal(sharp[n], gradient[n]) for n in sharp)
    gradients_agree(frozen.gradient(), gradient, 1e-14)
    objective.advance()
    assert memory_of(objective)[batch["index"]].tolist() == [1] * 12


def test_a_skipped_step_does_not_advance() -> None:
    model, objective = net(), bound("cross_entropy + early_learning")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    objective.follow(optimizer)
    first, second = doubled(data(seed=1)), doubled(data(seed=2))
    objective(logits=model(first["input"]), target=first["target"], index=first["index"]).backward()
    optimizer.zero_grad()  # the step of the first batch is skipped
    objective(logits=model(second["input"]), target=second["target"], index=second["index"]).backward()
    optimizer.step()
    assert objective.clock.step == 1
    assert memory_of(objective).nonzero().flatten().tolist() == sorted(second["index"].tolist())


def test_a_stateful_objective_that_nobody_advances_raises() -> None:
    model, objective = net(), bound("cross_entropy + early_learning")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loop() -> None:
        for step in range(5):
            batch = doubled(data(seed=step))
            objective(logits=model(batch["input"]), target=batch["target"], index=batch["index"]).backward()
            optimizer.step()

    with pytest.raises(StateError, match="follow"):
        loop()


def test_evaluation_mode_and_no_grad_record_nothing() -> None:
    model, objective, batch = net(), bound("early_learning"), doubled(data())
    with torch.no_grad():
        objective(logits=model(batch["input"]), index=batch["index"])
    objective.eval()
    objective(logits=model(batch["input"]), index=batch["index"])
    assert not objective.waits()


def test_what_waits_for_advance_is_neither_saved_nor_pickled_nor_copied() -> None:
    model, objective, batch = net(), bound("cross_entropy + early_learning"), doubled(data())
    objective(logits=model(batch["input"]), target=batch["target"], index=batch["index"])
    assert objective.waits()
    assert not copy.deepcopy(objective).waits()
    assert not pickle.loads(pickle.dumps(objective)).waits()
    assert not any("pending" in key for key in objective.state_dict())


# ---- 8: who owns parameters ------------------------------------------------------------------------------------------


class Temperature(Term):
    """Cross-entropy at a learned temperature, with an adversary's scale that ascends."""

    def __init__(self) -> None:
        super().__init__()
        self.log_t = nn.Parameter(torch.zeros(()))
        self.scale = nn.Parameter(torch.zeros(()))

    def player(self, parameter: str) -> str:
        return "max" if parameter == "scale" else "min"

    def forward(self, logits, target):
        return (
            nn.functional.cross_entropy(logits * self.log_t.exp(), target, reduction="none")
            + self.scale
            - self.scale.square()
        )


def test_a_terms_own_parameters_are_trained_and_an_adversarys_ascend() -> None:
    objective = 1 * Temperature()
    groups = {g["player"]: g["params"] for g in objective.parameter_groups()}
    assert groups["min"] == [objective.terms["temperature"].log_t]
    assert groups["max"] == [objective.terms["temperature"].scale]
    batch = data()
    poise.fit(net().float(), objective, {k: batch[k] for k in ("input", "target")}, steps=200, lr=0.05)
    assert float(objective.terms["temperature"].scale) == pytest.approx(0.5, abs=0.05)


def test_an_auxiliary_term_adds_nothing_and_trains_only_its_own_parameters() -> None:
    model, batch = net(), doubled(data())
    objective = 3 * (CrossEntropy() + auxiliary(Temperature()))
    logits = model(batch["input"])
    total = objective(logits=logits, target=batch["target"])
    torch.testing.assert_close(total, 3 * nn.functional.cross_entropy(logits, batch["target"]))
    own = objective.terms["temperature"].log_t
    plain = torch.autograd.grad(
        3 * nn.functional.cross_entropy(logits, batch["target"]), list(model.parameters()), retain_graph=True
    )
    got = torch.autograd.grad(total, [*model.parameters(), own])
    for a, b in zip(plain, got, strict=False):
        torch.testing.assert_close(a, b)
    assert got[-1] != 0


def test_multipliers_are_buffers_that_no_optimiser_sees() -> None:
    objective = poise.parse("cross_entropy + constraint(confidence_penalty, upper=-1)")
    assert list(objective.parameters()) == []
    assert any(name.endswith("multiplier") for name, _ in objective.named_buffers())


# ---- 9: state is exact -----------------------------------------------------------------------------------------------


def trained(
    formula: str = "cross_entropy + early_learning + linear(0, 1, steps=20)*l2 + constraint(confidence_penalty, upper=-1)",
):
    model, objective = net(), bound(formula)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        frozen = problem(model, objective, [data(seed=step)], step=step)
        for parameter, gradient in zip(frozen.parameters.values(), frozen.gradient().values(), strict=True):
            parameter.grad = gradient
        optimizer.step()
        objective.advance()
    return model, objective


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_state_survives_bit_for_bit(way: str) -> None:
    model, objective = trained()
    if way == "state_dict":
        twin = poise.parse(str(objective))
        twin.load_state_dict(copy.deepcopy(objective.state_dict()))
    else:
        twin = copy.deepcopy(objective) if way == "deepcopy" else pickle.loads(pickle.dumps(objective))
    batch = data(seed=9)
    assert torch.equal(problem(model, twin, [batch], 5).value(), problem(model, objective, [batch], 5).value())
    assert twin.clock == objective.clock


def test_declared_dtypes_survive_a_change_of_dtype() -> None:
    _, objective = trained("cross_entropy + early_learning")
    memory = objective.terms["early_learning"].memory
    before = memory.values.clone()
    objective.half().double()
    assert memory.values.dtype == torch.float32
    assert torch.equal(memory.values, before)


def test_two_stateful_terms_of_one_name_must_be_named_before_they_are_saved() -> None:
    objective = poise.parse("early_learning + early_learning(beta=0.9)").bind(examples=4, classes=2)
    with pytest.raises(StateError, match="named"):
        objective.state_dict()
    assert (
        poise.parse("early_learning + early_learning(beta=0.9).named('slow')").bind(examples=4, classes=2).state_dict()
    )


def test_a_memory_refuses_another_data_set() -> None:
    _, objective = trained("cross_entropy + early_learning")
    with pytest.raises(PoiseError, match="examples"):
        objective.bind(examples=41, classes=CLASSES)


# ---- 10: nothing is silent -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_quantities", "words"),
    [
        ({"logits": torch.zeros(2, 3)}, ["cross_entropy", "'target'", "logits"]),
        ({"logits": torch.zeros(2, 3), "targets": torch.zeros(2)}, ["Did you mean 'targets'"]),
        (
            {"logits": torch.zeros(2, 3), "target": torch.zeros(3, dtype=torch.int64)},
            ["target", "int64 [batch]", "int64 [3]", "batch = 2"],
        ),
        ({"logits": torch.zeros(2, 3), "target": torch.zeros(2, dtype=torch.int32)}, ["int64 [batch]", "int32 [2]"]),
        (
            {"logits": torch.zeros(2, 3).int(), "target": torch.zeros(2, dtype=torch.int64)},
            ["logits", "float", "int32 [2, 3]"],
        ),
    ],
)
def test_a_wrong_quantity_is_named_with_what_was_expected_and_offered(given_quantities, words: list[str]) -> None:
    with pytest.raises(QuantityError) as error:
        poise.parse("cross_entropy")(given_quantities)
    for word in words:
        assert word in str(error.value)


def test_an_index_out_of_range_is_named() -> None:
    objective = bound("early_learning")
    with pytest.raises(QuantityError, match=r"40.*\[0, 40\)"):
        objective(logits=torch.zeros(1, CLASSES), index=torch.tensor([40]))


# ---- compile ---------------------------------------------------------------------------------------------------------


def test_a_plain_supervised_objective_compiles_without_a_graph_break() -> None:
    objective, model = poise.parse("cross_entropy + 0.3*label_smoothing + 0.1*confidence_penalty"), net()
    batch = doubled(data())
    compiled = torch.compile(lambda x, y: objective(logits=model(x), target=y), fullgraph=True, backend="aot_eager")
    loss = compiled(batch["input"], batch["target"])
    torch.testing.assert_close(loss, objective(logits=model(batch["input"]), target=batch["target"]))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@given(
    weights=st.lists(st.floats(-3, 3).filter(bool), min_size=1, max_size=4),
    batch=st.integers(1, 9),
    ruin=st.sampled_from(["nothing", "sample_weight", "penalty"]),
)
@settings(max_examples=40, deadline=None)
def test_one_mean_of_the_sum_is_the_sum_of_the_means(weights: list[float], batch: int, ruin: str) -> None:
    """`forward` reduces plain terms once; `evaluate` reduces them one by one, and so does `forward` where one is not plain."""
    kinds = [CrossEntropy(), LabelSmoothing(0.2), Focal(), ConfidencePenalty()]
    objective = sum(w * t for w, t in zip(weights, kinds, strict=False))
    generator = torch.Generator().manual_seed(batch)
    logits = torch.randn(batch, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    given_ = {"logits": logits, "target": torch.randint(0, 5, (batch,), generator=generator)}
    if ruin == "sample_weight":
        given_["sample_weight"] = torch.rand(batch, generator=generator, dtype=torch.float64) + 0.1
    if ruin == "penalty":
        objective = objective + 0.1 * L2()
        given_["parameters"] = {"w": logits}
    total, whole = objective(**given_), objective.evaluate(**given_).total
    # Two orders of summation of at most 36 numbers.
    torch.testing.assert_close(total, whole, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(*(torch.autograd.grad(v, logits)[0] for v in (total, whole)), rtol=1e-12, atol=1e-13)


def test_a_loop_of_ones_own_computes_no_quantity_that_nobody_reads() -> None:
    """A stateful objective recognises a repeated closure by the data, not by what a readout could compute from them."""
    from poise.terms import EarlyLearning

    model = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    objective = (CrossEntropy() + EarlyLearning()).bind(examples=8, classes=4).follow(optimizer)
    x = torch.randn(8, 3)
    for _ in range(2):
        batch = Quantities({"input": x, "target": torch.zeros(8, dtype=torch.int64), "index": torch.arange(8)})
        batch.offer("logits", lambda batch=batch: model(batch["input"]))
        batch.offer("costly", lambda: pytest.fail("nobody reads this"))
        optimizer.zero_grad()
        objective(batch).backward()
        optimizer.step()
    assert objective.clock.step == 2
