"""Laws of progressive self-distillation (PS-KD)."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from poise.errors import CheckpointError, IncompatibleError, InputError, PoiseWarning, QuantityError, StateError
from poise.objective import DataInfo, Objective
from poise.terms.self_distillation import ProgressiveSelfDistillation

N, C = 12, 5


def logits_of(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def bound(**arguments: object) -> ProgressiveSelfDistillation:
    term = ProgressiveSelfDistillation(**arguments)  # type: ignore[arg-type]
    term.bind(DataInfo(examples=N, classes=C))
    return term


def with_memory(rows: Tensor, **arguments: object) -> ProgressiveSelfDistillation:
    """A term whose memory holds `rows`, as if they were written in the first epoch."""
    term = bound(**arguments)
    assert term.memory is not None
    term.memory.write(torch.arange(len(rows)), rows)
    return term


BATCH = torch.arange(N)
TARGET = torch.arange(N) % C


# ---- the exact checks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_zero_is_cross_entropy_bit_for_bit(dtype: torch.dtype) -> None:
    z = logits_of(0, N, C, dtype=dtype).requires_grad_()
    term = with_memory(logits_of(1, N, C).softmax(-1), alpha_max=0.0)
    expected = F.cross_entropy(z, TARGET, reduction="none")
    assert torch.equal(term(z, TARGET, 7, 10, BATCH), expected)
    objective: Objective = 1 * term
    total = objective(logits=z, target=TARGET, index=BATCH, epoch=7, epochs=10)
    assert torch.equal(total, F.cross_entropy(z, TARGET))
    ours, theirs = torch.autograd.grad(total, z), torch.autograd.grad(F.cross_entropy(z, TARGET), z)
    assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_first_epoch_is_cross_entropy_whatever_alpha(schedule: str) -> None:
    z = logits_of(0, N, C)
    for term in (
        bound(schedule=schedule, alpha_max=0.9),
        with_memory(logits_of(1, N, C).softmax(-1), schedule=schedule),
    ):
        assert torch.equal(term(z, TARGET, 0, 10, BATCH), F.cross_entropy(z, TARGET, reduction="none"))


def test_values_equal_cross_entropy_with_soft_targets_of_pytorch() -> None:
    z, past = logits_of(0, N, C), logits_of(1, N, C).softmax(-1)
    term = with_memory(past)
    alpha = 0.8 * 4 / 10
    soft = (1 - alpha) * F.one_hot(TARGET, C) + alpha * past
    # rows are stored in float32
    torch.testing.assert_close(
        term(z, TARGET, 3, 10, BATCH), F.cross_entropy(z, soft, reduction="none"), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(term.soft_targets(TARGET, 3, 10, index=BATCH).double(), soft, rtol=0, atol=1e-6)


def test_the_value_is_cross_entropy_plus_divergence_up_to_the_entropy_of_the_past() -> None:
    z, past = logits_of(0, N, C), logits_of(1, N, C).softmax(-1).float().double()
    alpha = 0.8 * 0.5
    p = z.softmax(-1)
    divergence = (past * (past.log() - p.log())).sum(-1)
    entropy = -(past * past.log()).sum(-1)
    expected = (1 - alpha) * F.cross_entropy(z, TARGET, reduction="none") + alpha * (divergence + entropy)
    torch.testing.assert_close(with_memory(past)(z, TARGET, 4, 10, BATCH), expected, rtol=0, atol=1e-6)


def test_the_memory_is_the_softmax_of_the_forward_before_the_update() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, C)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    term = ProgressiveSelfDistillation()
    objective = (1 * term).bind(examples=N, classes=C, steps=20, steps_per_epoch=2).follow(optimizer)
    x = logits_of(2, N, 3, dtype=torch.float32)
    for batch in (BATCH[:6], BATCH[6:]):
        before = model(x[batch]).softmax(-1).detach()
        optimizer.zero_grad()
        objective(logits=model(x[batch]), target=TARGET[batch], index=batch).backward()
        optimizer.step()
        assert term.memory is not None
        assert torch.equal(term.memory.read(batch), before)
        assert not torch.allclose(model(x[batch]).softmax(-1), before, atol=1e-3)


def test_the_row_of_this_batch_is_read_before_it_is_overwritten() -> None:
    past = logits_of(1, N, C).softmax(-1).float()
    z = logits_of(0, N, C, dtype=torch.float32).requires_grad_()
    term = with_memory(past)
    objective = (1 * term).bind(steps=20, steps_per_epoch=2)
    objective.clock = objective.clock.__class__(step=10, steps=20, steps_per_epoch=2)
    first = objective(logits=z, target=TARGET, index=BATCH)
    again = objective(logits=z, target=TARGET, index=BATCH)
    assert torch.equal(first, again)
    objective.advance()
    assert term.memory is not None
    assert torch.equal(term.memory.read(BATCH), z.detach().softmax(-1))


def test_a_constant_uniform_past_is_label_smoothing_with_epsilon_alpha() -> None:
    z = logits_of(0, N, C)
    term = with_memory(torch.full((N, C), 1 / C), alpha_max=0.3, schedule="constant")
    expected = F.cross_entropy(z, TARGET, reduction="none", label_smoothing=0.3)
    torch.testing.assert_close(term(z, TARGET, 5, 10, BATCH), expected, rtol=0, atol=1e-6)


def test_the_gradient_is_p_minus_the_soft_target_and_the_past_is_a_constant() -> None:
    z = logits_of(0, N, C).requires_grad_()
    term = with_memory(logits_of(1, N, C).softmax(-1))
    (gradient,) = torch.autograd.grad(term(z, TARGET, 3, 10, BATCH).sum(), z)
    expected = z.detach().softmax(-1) - term.soft_targets(TARGET, 3, 10, index=BATCH)
    # float32 rows in float64 arithmetic: both sides use the same rows, and differ by rounding alone
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-7)


def test_the_last_epoch_has_alpha_max_and_the_first_a_share_of_it() -> None:
    linear = ProgressiveSelfDistillation(0.8)
    assert linear.alpha(299, 300) == 0.8
    assert linear.alpha(0, 300) == pytest.approx(0.8 / 300)
    cosine = ProgressiveSelfDistillation(0.8, schedule="cosine")
    assert cosine.alpha(299, 300) == pytest.approx(0.8)
    assert cosine.alpha(149, 300) == pytest.approx(0.4)
    assert ProgressiveSelfDistillation(0.8, schedule="constant").alpha(0, 300) == 0.8
    for term in (linear, cosine):
        alphas = [term.alpha(t, 30) for t in range(30)]
        assert alphas == sorted(alphas)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), epoch=st.integers(1, 9))
def test_a_permutation_of_the_batch_changes_neither_loss_nor_memory(seed: int, epoch: int) -> None:
    z, past = logits_of(seed, N, C), logits_of(seed + 1, N, C).softmax(-1)
    shuffle = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    here, there = with_memory(past), with_memory(past)
    torch.testing.assert_close(
        here(z, TARGET, epoch, 10, BATCH)[shuffle],
        there(z[shuffle], TARGET[shuffle], epoch, 10, BATCH[shuffle]),
        rtol=0,
        atol=1e-12,
    )
    here.advance(logits=z, epoch=epoch, index=BATCH)
    there.advance(logits=z[shuffle], epoch=epoch, index=BATCH[shuffle])
    assert torch.equal(here.memory.values, there.memory.values)  # type: ignore[union-attr]


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), alpha=st.floats(0, 1), epoch=st.integers(1, 9))
def test_soft_targets_are_distributions(seed: int, alpha: float, epoch: int) -> None:
    term = with_memory(logits_of(seed, N // 2, C).softmax(-1), alpha_max=min(alpha, 0.999))
    soft = term.soft_targets(TARGET, epoch, 10, index=BATCH)
    assert (soft >= -1e-6).all()  # 1 - alpha * (sum of a float32 row)
    torch.testing.assert_close(soft.sum(-1), torch.ones(N), rtol=0, atol=1e-6)


# ---- unseen rows, precision ----------------------------------------------------------------------------------------


def test_an_example_that_was_never_seen_keeps_its_label_and_is_counted() -> None:
    z = logits_of(0, N, C)
    past = logits_of(1, N, C).softmax(-1)
    term = with_memory(past[:8])
    values = term(z, TARGET, 4, 10, BATCH)
    torch.testing.assert_close(values[8:], F.cross_entropy(z, TARGET, reduction="none")[8:], rtol=1e-12, atol=0)
    assert not torch.allclose(values[:8], F.cross_entropy(z, TARGET, reduction="none")[:8])
    assert term.unseen == 0
    term.advance(logits=z, epoch=4, index=BATCH)
    assert term.unseen == 4
    term.advance(logits=z, epoch=5, index=BATCH)
    assert term.unseen == 4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_rows_are_renormalised_and_take_half_the_space(dtype: str) -> None:
    classes = 100
    past = logits_of(1, 64, classes).softmax(-1)
    terms = {}
    for kind in ("float32", dtype):
        terms[kind] = ProgressiveSelfDistillation(dtype=kind)
        terms[kind].bind(DataInfo(examples=64, classes=classes))
        terms[kind].memory.write(torch.arange(64), past)  # type: ignore[union-attr]
    half, full = terms[dtype].memory, terms["float32"].memory
    assert half is not None
    assert full is not None
    assert half.values.element_size() * 2 == full.values.element_size()
    target, index = torch.arange(64) % classes, torch.arange(64)
    soft = terms[dtype].soft_targets(target, 8, 10, index=index)
    torch.testing.assert_close(soft.sum(-1), torch.ones(64), rtol=0, atol=1e-6)
    z = logits_of(2, 64, classes)
    difference = terms[dtype](z, target, 8, 10, index).mean() - terms["float32"](z, target, 8, 10, index).mean()
    assert abs(float(difference)) < 0.005


def test_half_precision_logits_are_compared_in_single_precision() -> None:
    z = logits_of(0, N, C).half()
    values = with_memory(logits_of(1, N, C).softmax(-1))(z, TARGET, 4, 10, BATCH)
    assert values.dtype == torch.float32


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_values_and_gradients_are_finite_at_extreme_logits(scale: float) -> None:
    z = (scale * torch.eye(N, C)).requires_grad_()
    term = with_memory(F.one_hot(TARGET, C).float())
    value = term(z, TARGET, 9, 10, BATCH).sum()
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(z.grad).all()  # type: ignore[arg-type]


# ---- sequences, mixed inputs, other targets ------------------------------------------------------------------------


def test_sequences_are_remembered_by_position_and_padding_does_not_count() -> None:
    time = 4
    term = ProgressiveSelfDistillation(time=time)
    objective = (1 * term).bind(examples=6, classes=C, steps=20, steps_per_epoch=2)
    index, target = torch.tensor([3, 1]), torch.tensor([[0, 1, 2], [3, -100, -100]])
    mask = target >= 0
    z = logits_of(0, 2, 3, C, dtype=torch.float32)
    expected = F.cross_entropy(z.flatten(0, 1), target.flatten(), ignore_index=-100)
    torch.testing.assert_close(objective(logits=z, target=target, index=index), expected)
    torch.testing.assert_close(objective(logits=z, target=target.clamp(min=0), mask=mask, index=index), expected)
    term.advance(logits=z, epoch=0, index=index)

    later = logits_of(1, 2, 4, C, dtype=torch.float32)  # a longer padding: position 3 was never stored
    target = F.pad(target, (0, 1), value=2)
    value = objective(logits=later, target=target, index=index, epoch=4, epochs=10)
    soft = F.one_hot(target.clamp(min=0), C).float()
    soft[:, :3] = (1 - 0.4) * soft[:, :3] + 0.4 * z.softmax(-1)
    torch.testing.assert_close(term.soft_targets(target, 4, 10, index=index), soft)
    losses = -(soft * later.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(value, losses[target >= 0].mean())


def test_positions_past_the_memory_keep_their_labels() -> None:
    term = ProgressiveSelfDistillation(time=2)
    term.bind(DataInfo(examples=3, classes=C))
    z, index = logits_of(0, 3, 4, C, dtype=torch.float32), torch.arange(3)
    target = torch.zeros(3, 4, dtype=torch.int64)
    term.advance(logits=z, epoch=0, index=index)
    values = term(z, target, 3, 4, index)
    plain = F.cross_entropy(z.flatten(0, 1), target.flatten(), reduction="none").view(3, 4)
    torch.testing.assert_close(values[:, 2:], plain[:, 2:])
    assert not torch.allclose(values[:, :2], plain[:, :2])


def test_with_mixed_inputs_the_softened_targets_are_mixed() -> None:
    z, past = logits_of(0, N, C), logits_of(1, N, C).softmax(-1)
    term = with_memory(past)
    partner = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    share = torch.linspace(0.5, 1, N)
    labels = F.one_hot(TARGET, C).float()
    mixed = share[:, None] * labels + (1 - share[:, None]) * labels[partner]
    soft = term.soft_targets(TARGET, 6, 10, index=BATCH)
    expected = share[:, None] * soft + (1 - share[:, None]) * soft[partner]
    values = term(z, mixed, 6, 10, BATCH, partner=partner, share=share)
    torch.testing.assert_close(values, F.cross_entropy(z, expected.double(), reduction="none"), rtol=0, atol=1e-6)


def test_a_snapshot_looks_at_the_mixed_input_itself() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, C)
    term = ProgressiveSelfDistillation(teacher="snapshot")
    term.end_epoch(model)
    x, z = logits_of(2, N, 3, dtype=torch.float32), logits_of(0, N, C, dtype=torch.float32)
    mixed = F.one_hot(TARGET, C).float() * 0.7 + F.one_hot(TARGET.flip(0), C).float() * 0.3
    soft = 0.6 * mixed + 0.4 * model(x).softmax(-1).detach()
    values = term(z, mixed, 1, 4, input=x, model=model, partner=BATCH.flip(0), share=torch.full((N,), 0.7))
    torch.testing.assert_close(values, F.cross_entropy(z, soft, reduction="none"))


def test_smoothed_labels_are_softened_like_any_distribution() -> None:
    z, past = logits_of(0, N, C), logits_of(1, N, C).softmax(-1)
    smooth = 0.9 * F.one_hot(TARGET, C).double() + 0.1 / C
    soft = (1 - 0.4) * smooth + 0.4 * past
    values = with_memory(past)(z, smooth, 4, 10, BATCH)
    torch.testing.assert_close(values, F.cross_entropy(z, soft, reduction="none"), rtol=0, atol=1e-6)


# ---- the snapshot --------------------------------------------------------------------------------------------------


def test_the_snapshot_is_the_model_at_the_end_of_the_previous_epoch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, C))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    term = ProgressiveSelfDistillation(teacher="snapshot")
    objective = (1 * term).bind(examples=N, classes=C, steps=6, steps_per_epoch=2).follow(optimizer)
    x = logits_of(2, N, 3, dtype=torch.float32)
    previous = copy.deepcopy(model)
    for step in range(6):
        epoch, rows = divmod(step, 2)
        batch = BATCH[6 * rows : 6 * rows + 6]
        optimizer.zero_grad()
        z = model(x[batch])
        value = objective(logits=z, target=TARGET[batch], input=x[batch], model=model)
        past = previous.eval()(x[batch]).softmax(-1)
        alpha = 0.8 * (epoch + 1) / 3
        soft = (
            F.one_hot(TARGET[batch], C).float()
            if epoch == 0
            else (1 - alpha) * F.one_hot(TARGET[batch], C) + alpha * past
        )
        torch.testing.assert_close(value, F.cross_entropy(z, soft.detach()), rtol=0, atol=1e-6)
        value.backward()
        optimizer.step()
        if rows == 1:
            previous = copy.deepcopy(model)
    assert model.training


def test_the_snapshot_survives_saving_and_copying() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, C)
    term = ProgressiveSelfDistillation(teacher="snapshot")
    term.end_epoch(model)
    x, z = logits_of(2, N, 3, dtype=torch.float32), logits_of(0, N, C, dtype=torch.float32)
    expected = term(z, TARGET, 2, 4, input=x, model=model)
    buffer = io.BytesIO()
    torch.save(term.state_dict(), buffer)
    buffer.seek(0)
    with torch.no_grad():
        model.weight.add_(1.0)  # training went on; the copy must not have
    fresh = ProgressiveSelfDistillation(teacher="snapshot")
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(z, TARGET, 2, 4, input=x, model=model), expected)
    assert torch.equal(copy.deepcopy(term)(z, TARGET, 2, 4, input=x, model=model), expected)
    assert not list(term.parameters())
    again = ProgressiveSelfDistillation(teacher="snapshot")
    again.load_state_dict(fresh.state_dict())
    assert torch.equal(again(z, TARGET, 2, 4, input=x, model=model), expected)


def test_a_due_snapshot_that_nobody_took_is_an_error() -> None:
    term = ProgressiveSelfDistillation(teacher="snapshot")
    z = torch.zeros(2, C)
    with pytest.raises(StateError, match="end_epoch"):
        term(z, TARGET[:2], 1, 4, input=torch.zeros(2, 3), model=nn.Linear(3, C))
    with pytest.raises(IncompatibleError, match=r"torch\.nn\.Module"):
        term.end_epoch(lambda x: x)  # type: ignore[arg-type]


# ---- state, errors, formulas ---------------------------------------------------------------------------------------


def test_the_memory_survives_saving_pickling_and_copying_bit_for_bit() -> None:
    term = bound(dtype="float16")
    term.advance(logits=logits_of(0, 6, C), epoch=0, index=BATCH[:6])
    term.advance(logits=logits_of(1, 6, C), epoch=1, index=BATCH[6:])
    z = logits_of(2, N, C)
    expected = term(z, TARGET, 3, 10, BATCH)
    loaded = ProgressiveSelfDistillation(dtype="float16")
    loaded.load_state_dict(term.state_dict())
    for other in (loaded, copy.deepcopy(term), pickle.loads(pickle.dumps(term))):
        assert torch.equal(other(z, TARGET, 3, 10, BATCH), expected)
        assert other.unseen == 6
        other.advance(logits=z, epoch=2, index=BATCH)
        assert other.unseen == 6


def test_the_term_follows_to_float64_and_the_rows_keep_their_dtype() -> None:
    term = bound(dtype="float16").to(torch.float64)
    assert term.memory is not None
    assert term.memory.values.dtype == torch.float16


@pytest.mark.parametrize(
    "row", [torch.tensor([0.5, 0.2, 0.0, 0.0, 0.0]), torch.full((5,), float("nan")), torch.full((5,), 0.4)]
)
def test_a_saved_row_that_is_no_distribution_is_refused(row: Tensor) -> None:
    term = with_memory(logits_of(1, N, C).softmax(-1))
    state = term.state_dict()
    state["memory.values"][3] = row
    with pytest.raises(CheckpointError, match="row 3"):
        bound().load_state_dict(state)


def test_arguments_out_of_range_are_refused_and_alpha_one_is_a_warning() -> None:
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="alpha_max"):
            ProgressiveSelfDistillation(alpha)
    with pytest.raises(InputError, match="memory, snapshot"):
        ProgressiveSelfDistillation(teacher="ema")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="schedule"):
        ProgressiveSelfDistillation(schedule="step")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="dtype"):
        ProgressiveSelfDistillation(dtype="int8")
    with pytest.raises(InputError, match="time"):
        ProgressiveSelfDistillation(time=0)
    with pytest.warns(PoiseWarning, match="removes the label"):
        ProgressiveSelfDistillation(1.0)


def test_what_does_not_fit_is_refused_by_name() -> None:
    term = bound()
    z = torch.zeros(2, C)
    with pytest.raises(QuantityError, match="epoch 10"):
        term(z, TARGET[:2], 10, 10, BATCH[:2])
    with pytest.raises(QuantityError, match="'index'"):
        term(z, TARGET[:2], 3, 10)
    with pytest.raises(QuantityError, match="outside"):
        term(z, TARGET[:2], 3, 10, torch.tensor([0, N]))
    with pytest.raises(QuantityError, match="more than once"):
        term.advance(logits=z, epoch=1, index=torch.tensor([1, 1]))
    with pytest.raises(QuantityError, match="number of classes"):
        term(torch.zeros(2, C + 1), TARGET[:2], 3, 10, BATCH[:2])
    with pytest.raises(StateError, match="bind"):
        ProgressiveSelfDistillation()(z, TARGET[:2], 3, 10, BATCH[:2])
    with pytest.raises(InputError, match="classes="):
        ProgressiveSelfDistillation(teacher="snapshot").soft_targets(TARGET, 0, 10)


def test_the_term_prints_as_the_formula_that_makes_it() -> None:
    from poise import parse

    for text in (
        "progressive_self_distillation",
        "progressive_self_distillation(alpha_max=0.5, teacher='snapshot', schedule='cosine')",
        "0.5*progressive_self_distillation(dtype='float16') + 0.1*distillation",
    ):
        objective = parse(text)
        assert parse(str(objective)).equals(objective)


def test_only_the_chosen_teacher_is_read() -> None:
    memory, snapshot = 1 * ProgressiveSelfDistillation(), 1 * ProgressiveSelfDistillation(teacher="snapshot")
    assert "model" not in memory.plan()
    assert "index" in memory.plan()
    assert {"model", "input"} <= snapshot.plan()
    assert "index" not in snapshot.plan()


# ---- in the training loop ------------------------------------------------------------------------------------------


def problem_data(n: int = 50) -> dict[str, Tensor]:
    x = logits_of(3, n, 6, dtype=torch.float32)
    return {"input": x, "target": (x[:, :C].argmax(1) + (torch.arange(n) % 7 == 0)) % C}


def small_model() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, C))


def trained(formula: str | Objective, **options: object) -> nn.Module:
    import poise

    settings: dict[str, object] = {"lr": 0.2, "epochs": 4, "batch_size": 16, "device": "cpu", "seed": 1}
    return poise.fit(small_model(), formula, problem_data(), **{**settings, **options}).model  # type: ignore[arg-type]


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_loop_equals_the_method_written_by_hand() -> None:
    from poise.streams import Stream

    data = problem_data()
    stream = Stream(data, 16).prepare("main", 1, torch.device("cpu"))
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    memory = F.one_hot(data["target"], C).float()
    for step, (batch,) in zip(range(16), stream.iterate(0), strict=False):
        alpha = 0.8 * (step // 4 + 1) / 4
        index = batch["index"]
        soft = (1 - alpha) * F.one_hot(batch["target"], C) + alpha * memory[index]
        z = model(batch["input"])
        optimizer.zero_grad()
        F.cross_entropy(z, soft).backward()
        optimizer.step()
        memory[index] = z.detach().softmax(-1)
    ours = trained("progressive_self_distillation")
    # sixteen float32 steps whose losses are summed in another order
    torch.testing.assert_close(weights(ours), weights(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("teacher", ["memory", "snapshot"])
def test_uneven_micro_batches_equal_one_big_batch(teacher: str) -> None:
    formula = f"progressive_self_distillation(teacher='{teacher}')"
    one, three = trained(formula), trained(formula, accumulate=3)
    torch.testing.assert_close(weights(one), weights(three), rtol=0, atol=1e-5)


@pytest.mark.parametrize("teacher", ["memory", "snapshot"])
def test_a_run_that_was_stopped_in_the_middle_of_an_epoch_ends_with_the_same_weights(
    teacher: str, tmp_path: object
) -> None:
    class Fail:
        def on_step_end(self, state: object) -> None:
            if state.step == 11:  # type: ignore[attr-defined]
                raise RuntimeError("the machine stops")

    formula = f"progressive_self_distillation(teacher='{teacher}')"
    whole = trained(formula)
    with pytest.raises(RuntimeError, match="stops"):
        trained(formula, checkpoint=tmp_path, checkpoint_steps=5, callbacks=[Fail()])
    resumed = trained(formula, checkpoint=tmp_path)
    assert torch.equal(weights(whole), weights(resumed))


def test_mixed_inputs_train_through_the_loop() -> None:
    from poise.data.augmentations import Mixup

    plain = trained("progressive_self_distillation")
    mixed = trained("progressive_self_distillation", transform=Mixup(1.0, classes=C))
    assert torch.isfinite(weights(mixed)).all()
    assert not torch.equal(weights(mixed), weights(plain))


def test_the_term_does_not_move_in_evaluation() -> None:
    term = ProgressiveSelfDistillation()
    objective = (1 * term).bind(examples=N, classes=C, steps=4, steps_per_epoch=2).eval()
    objective(logits=logits_of(0, N, C).requires_grad_(), target=TARGET, index=BATCH)
    objective.evaluate(logits=logits_of(0, N, C), target=TARGET, index=BATCH)
    assert not objective.waits()


def test_a_shuffled_batch_of_a_compiled_objective_equals_the_plain_one() -> None:
    term = with_memory(logits_of(1, N, C, dtype=torch.float32).softmax(-1))
    z = logits_of(0, N, C, dtype=torch.float32)
    compiled = torch.compile(term, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(z, TARGET, 3, 10, BATCH), term(z, TARGET, 3, 10, BATCH))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_term_on_a_gpu_equals_the_term_on_the_cpu() -> None:
    term = with_memory(logits_of(1, N, C).softmax(-1))
    z = logits_of(0, N, C)
    expected = term(z, TARGET, 3, 10, BATCH)
    moved = copy.deepcopy(term).to("cuda")
    values = moved(z.cuda(), TARGET.cuda(), 3, 10, BATCH.cuda())
    torch.testing.assert_close(values.cpu(), expected, rtol=0, atol=1e-6)
