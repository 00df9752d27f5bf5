"""The monitor of the three D's: exact identities, flags, couplings, and its life inside a run."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Sequence
from decimal import Decimal, getcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import poise
from poise.errors import FormulaError, InputError, QuantityError
from poise.formula import parse
from poise.frozen import FrozenModel
from poise.insight.likelihood_dynamics import (
    LikelihoodMonitor,
    LikelihoodReport,
    LikelihoodRow,
    likelihood_flags,
    log_gradients,
    shared_tokens,
)
from poise.readouts.tokens import TokenReadout
from poise.tasks.finite_space import FinitePolicy, FiniteSpace

ONE = torch.float64


# ---- exact ----------------------------------------------------------------------------------------------------------


def dpo_of(p: Tensor, q: Tensor, p_ref: float, q_ref: float, up: float = 0.1, down: float = 0.1) -> Tensor:
    """The loss with both probabilities as free variables."""
    a, b = (p / p_ref) ** up, (q / q_ref) ** down
    return -(a / (a + b)).log()


def test_the_gradient_ratio_is_the_ratio_of_probabilities() -> None:
    p, q = (torch.tensor(x, dtype=ONE, requires_grad=True) for x in (0.2, 0.05))
    dpo_of(p, q, 0.1, 0.2).backward()
    assert -q.grad / p.grad == pytest.approx(4.0, rel=1e-12)
    margin = 0.1 * (math.log(2.0) - math.log(0.25))
    up, down = log_gradients(p.detach().log(), q.detach().log(), torch.tensor(margin, dtype=ONE))
    assert up.exp().item() == pytest.approx(-float(p.grad), rel=1e-12)
    assert down.exp().item() == pytest.approx(float(q.grad), rel=1e-12)


def test_flex_dpo_multiplies_the_ratio_by_that_of_the_betas() -> None:
    p, q = (torch.tensor(x, dtype=ONE, requires_grad=True) for x in (0.2, 0.05))
    dpo_of(p, q, 0.1, 0.2, 0.1, 0.025).backward()
    assert -q.grad / p.grad == pytest.approx(0.25 * 4.0, rel=1e-12)
    objective = parse("flex_dpo(beta_chosen=0.1, beta_rejected=0.025)")
    one = objective(
        chosen_logps=p.log()[None], rejected_logps=q.log()[None],
        reference_chosen_logps=torch.tensor([0.1], dtype=ONE).log(), reference_rejected_logps=torch.tensor([0.2], dtype=ONE).log(),
    )  # fmt: skip
    assert one.item() == pytest.approx(dpo_of(p, q, 0.1, 0.2, 0.1, 0.025).item(), rel=1e-12)


def test_flex_dpo_with_equal_betas_is_dpo() -> None:
    g = torch.Generator().manual_seed(0)
    sides = [-torch.rand(6, 4, generator=g, dtype=ONE) * 5 for _ in range(4)]
    names = ("chosen_logps", "rejected_logps", "reference_chosen_logps", "reference_rejected_logps")
    batch = dict(zip(names, sides, strict=True))
    assert parse("flex_dpo(beta_chosen=0.3, beta_rejected=0.3)")(batch).item() == parse("dpo(beta=0.3)")(batch).item()


def test_a_dying_rejected_answer_pulls_without_limit_while_the_push_on_the_chosen_one_dies() -> None:
    """Corollary 2: with w ~ pi-^beta, dl/dpi+ -> 0 and dl/dpi- ~ pi-^(beta - 1)."""
    log_q = torch.tensor([-20.0, -40.0], dtype=ONE)
    up, down = log_gradients(torch.zeros(2, dtype=ONE), log_q, -0.5 * (log_q - math.log(0.5)), 0.5, 0.5)
    assert (up[1] - up[0]).item() == pytest.approx(-0.5 * 20, abs=1e-3)
    assert (down[1] - down[0]).item() == pytest.approx(0.5 * 20, abs=1e-3)


def test_in_the_logits_of_a_softmax_the_pulls_are_equal_and_opposite_and_elsewhere_zero() -> None:
    logits = torch.tensor([[0.3, -0.2, 0.9, 0.1]], dtype=ONE, requires_grad=True)
    log_p = logits.log_softmax(-1)
    reference = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=ONE).log()
    report = parse("dpo(beta=0.7)").evaluate(
        chosen_logps=log_p[:, 0], rejected_logps=log_p[:, 1], reference_chosen_logps=reference[:, 0],
        reference_rejected_logps=reference[:, 1],
    )  # fmt: skip
    report.total.backward()
    margin = 0.7 * ((log_p[0, 0] - reference[0, 0]) - (log_p[0, 1] - reference[0, 1]))
    w = torch.sigmoid(-margin).item()
    assert logits.grad[0].tolist() == pytest.approx([-0.7 * w, 0.7 * w, 0.0, 0.0], abs=1e-12)


def test_the_gradients_of_a_reward_model_are_balanced_and_bounded() -> None:
    up, down = (torch.tensor([x], dtype=ONE, requires_grad=True) for x in (-3.0, 4.0))
    parse("bradley_terry")(chosen_prediction=up, rejected_prediction=down).backward()
    assert -up.grad.item() == down.grad.item() == pytest.approx(1 / (1 + math.exp(-7)), rel=1e-12)


def test_the_weight_at_log_probabilities_of_minus_800_equals_the_direct_formula() -> None:
    getcontext().prec = 60
    values = [Decimal(x) for x in ("-800.25", "-811.5", "-802.75", "-799.125")]
    p, q, p_ref, q_ref = (x.exp() for x in values)
    beta = Decimal("0.1")
    a, b = (p / p_ref) ** beta, (q / q_ref) ** beta
    monitor = LikelihoodMonitor(beta_chosen=0.1)
    row = monitor.observe(*(torch.tensor([float(x)]) for x in values))
    assert row.weight == pytest.approx(float(b / (a + b)), abs=1e-6)
    assert row.log_gradient_ratio == pytest.approx(11.25)


def test_reference_answers_that_are_held_out_lose_exactly_the_divergence() -> None:
    """A mean shift over answers of the reference is -KL(reference || policy): such a set cannot show dispersion."""
    space = FiniteSpace([0.5, 0.3, 0.2])
    policy = space.policy(torch.tensor([0.1, 0.5, -0.4])).logps
    shift = space.expectation(space.prior_logps, policy - space.prior_logps)
    torch.testing.assert_close(shift, -space.kl(space.prior_logps, policy))
    assert shift.item() < 0


# ---- flags ----------------------------------------------------------------------------------------------------------


def series(*values: float) -> Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(("rejected", "drop"), [(-1.0, False), (-1.79, False), (-1.85, True)])
def test_d1_is_a_fall_of_more_than_three_times_the_rise(rejected: float, drop: bool) -> None:
    assert likelihood_flags(series(0, 0.6), series(0, rejected)).drop.tolist() == [False, drop]


def test_d2_is_a_fall_of_a_fifth_below_the_best_or_below_the_start_while_the_margin_grows() -> None:
    falls = series(0, 1.0, 0.8, 0.7)
    assert likelihood_flags(falls, series(0, -1, -2, -3)).degradation.tolist() == [False, False, False, True]
    below = likelihood_flags(series(0, -0.1), series(0, -0.5))
    assert below.degradation.tolist() == [False, True]
    shrinking = likelihood_flags(series(0, 1.0, 0.2), series(0, -1, 0.5))
    assert not shrinking.degradation.any()


def test_d3_is_a_rise_of_the_unseen_while_the_chosen_fall() -> None:
    chosen, rejected = series(0, 0.5, 0.3), series(0, -1, -4)
    assert likelihood_flags(chosen, rejected, series(0, -0.5, 0.3)).dispersion.tolist() == [False, False, True]
    assert not likelihood_flags(chosen, rejected, series(0, -0.5, -0.1)).dispersion.any()
    assert not likelihood_flags(chosen, rejected).dispersion.any()


def test_flags_take_every_seed_by_itself() -> None:
    chosen = torch.stack([series(0, 1, 0.2), series(0, 1, 1.2)], 1)
    rejected = torch.stack([series(0, -1, -4), series(0, -1, -2)], 1)
    assert likelihood_flags(chosen, rejected).degradation[-1].tolist() == [True, False]


def test_shared_tokens_of_answers_that_stand_at_different_places() -> None:
    ids = torch.tensor([[7, 7, 1, 2, 3]])
    mask = torch.tensor([[False, False, True, True, True]])
    other, other_mask = torch.tensor([[7, 7, 1, 3, 3, 9]]), torch.tensor([[False, False, True, True, True, True]])
    assert shared_tokens(ids, mask, other, other_mask).tolist() == [[False, False, True, False, True]]
    assert shared_tokens(ids, mask, other, other_mask, prefix=True).tolist() == [[False, False, True, False, False]]


# ---- what the monitor says ------------------------------------------------------------------------------------------


def rows(*chosen: float, shared: tuple[float, ...] | None = None) -> tuple[LikelihoodRow, ...]:
    return tuple(
        LikelihoodRow(
            step,
            c,
            -5.0 * step,
            None,
            0.0,
            0.5,
            1.0,
            chosen_shared=shared and shared[step],
            chosen_own=shared and c - shared[step],
        )
        for step, c in enumerate(chosen)
    )


def test_the_verdict_names_the_coupling() -> None:
    assert LikelihoodReport(rows(0, 0.5, 0.6)).coupling == "none"
    assert LikelihoodReport(rows(0, 0.5, -2.0)).coupling == "shared parameters"
    assert LikelihoodReport(rows(0, 0.5, -2.0), competing=0.4).coupling == "competing answers"
    assert LikelihoodReport(rows(0, 0.5, -2.0, shared=(0, 0.2, -2.0)), competing=0.4).coupling == "shared tokens"
    assert LikelihoodReport(rows(0, 0.5, -2.0, shared=(0, 0.2, 0.1))).coupling == "shared parameters"
    report = LikelihoodReport(rows(0, 0.5, -2.0))
    assert "shared parameters" in report.verdict
    assert report.first("degradation") == 2
    assert report.first("dispersion") is None
    assert "x" in str(report)
    assert LikelihoodReport(()).verdict == "Nothing was observed."


def test_competing_chosen_answers_lower_their_mean_even_with_free_logits() -> None:
    """Two answers are chosen against a third, and one of them against the other."""
    space = FiniteSpace([0.45, 0.45, 0.1])
    ids = [(0, 2), (1, 2), (0, 1)]
    pairs = {
        **space._answers("chosen", torch.zeros(3, dtype=torch.int64), torch.tensor([a for a, _ in ids])),
        **space._answers("rejected", torch.zeros(3, dtype=torch.int64), torch.tensor([b for _, b in ids])),
        "group": torch.zeros(3, dtype=torch.int64),
    }
    policy = space.policy()
    monitor = LikelihoodMonitor(policy, every=50, pairs=pairs, readout=TokenReadout(space.policy()), beta_chosen=0.1)
    poise.fit(
        policy, "dpo(beta=0.1)", pairs, readout=space.readout(), lr=5.0, steps=400, device="cpu", callbacks=[monitor]
    )
    report = monitor.report()
    assert report.rows[-1].chosen < 0
    assert report.first("degradation") is not None
    assert report.coupling == "competing answers"


def test_accuracy_fluctuation_is_the_spread_of_the_differences() -> None:
    steps = tuple(LikelihoodRow(i, 0, 0, None, 0, 0.5, a) for i, a in enumerate((0.5, 0.7, 0.6, 0.8)))
    assert LikelihoodReport(steps).accuracy_fluctuation == pytest.approx(torch.tensor([0.2, -0.1, 0.2]).std().item())
    assert math.isnan(LikelihoodReport(steps[:2]).accuracy_fluctuation)


def test_figures_per_token_divide_by_lengths_of_the_answers() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    zero = torch.zeros(2, 3)
    row = LikelihoodMonitor().observe(
        torch.tensor([[-1.0, -1.0, 0.0], [-1.0, -1.0, -4.0]]), zero, zero, zero, chosen_mask=mask, rejected_mask=mask
    )
    assert row.chosen == pytest.approx(-4.0)
    assert row.chosen_per_token == pytest.approx(-1.5)


def test_the_split_adds_up_to_the_shift() -> None:
    g = torch.Generator().manual_seed(1)
    ids, others = torch.randint(5, (4, 6), generator=g), torch.randint(5, (4, 5), generator=g)
    mask, other = torch.ones(4, 6, dtype=torch.bool), torch.ones(4, 5, dtype=torch.bool)
    logps, ref = -torch.rand(4, 6, generator=g), -torch.rand(4, 6, generator=g)
    zero = torch.zeros(4, 5)
    row = LikelihoodMonitor().observe(
        logps, zero, ref, zero, chosen_mask=mask, rejected_mask=other, chosen_ids=ids, rejected_ids=others
    )
    assert row.chosen_shared is not None
    assert row.chosen_own is not None
    assert row.chosen_shared + row.chosen_own == pytest.approx(row.chosen)
    shared = shared_tokens(ids, mask, others, other)
    assert row.chosen_shared == pytest.approx(float(((logps - ref) * shared).sum(1).mean()))


# ---- inside fit -----------------------------------------------------------------------------------------------------


@pytest.fixture
def space() -> FiniteSpace:
    return FiniteSpace([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]], [[3.0, 2.0, 1.0, 0.0], [0.0, 2.0, 1.0, 0.5]])


def run(
    space: FiniteSpace,
    monitor: LikelihoodMonitor,
    formula: str = "dpo(beta=0.1) + 0.1*sft",
    others: Sequence[object] = (),
    **options: Any,
) -> nn.Module:
    policy = space.policy()
    pairs = {name: column for name, column in space.pairs().items() if name != "sample_weight"}
    poise.fit(
        policy, formula, pairs, readout=space.readout(), lr=0.5, device="cpu", batch_size=8,
        callbacks=[monitor, *others], **{"steps": 12, **options},
    )  # fmt: skip
    return policy


def test_in_fit_it_reads_what_the_loss_computed_and_lets_go_in_the_end(space: FiniteSpace) -> None:
    monitor = LikelihoodMonitor(heldout=space.responses_of(), every=4, readout=space.readout())
    objective = parse("flex_dpo(beta_chosen=0.2, beta_rejected=0.1) + 0.1*sft")
    policy = space.policy()
    pairs = {name: column for name, column in space.pairs().items() if name != "sample_weight"}
    fitted = poise.fit(
        policy,
        objective,
        pairs,
        readout=space.readout(),
        lr=0.5,
        steps=10,
        device="cpu",
        batch_size=8,
        callbacks=[monitor],
    )
    assert [row.step for row in monitor.report().rows] == [4, 8, 10]
    assert fitted.history.steps("likelihood/chosen") == [4, 8, 10]
    assert (monitor.beta_chosen, monitor.beta_rejected) == (0.2, 0.1)
    assert monitor.report().rows[-1].unseen is not None
    assert not any(term._forward_hooks for term in objective.terms.values())


def test_watching_changes_nothing(space: FiniteSpace) -> None:
    watched = run(space, LikelihoodMonitor(heldout=space.responses_of(), every=3, readout=space.readout()))
    alone = space.policy()
    pairs = {name: column for name, column in space.pairs().items() if name != "sample_weight"}
    poise.fit(
        alone, "dpo(beta=0.1) + 0.1*sft", pairs, readout=space.readout(), lr=0.5, steps=12, device="cpu", batch_size=8
    )
    assert torch.equal(watched.logits, alone.logits)


def test_what_the_hook_sees_equals_what_observe_computes(space: FiniteSpace) -> None:
    pairs = {name: column for name, column in space.pairs().items() if name != "sample_weight"}
    hooked, fixed = LikelihoodMonitor(every=1), LikelihoodMonitor(every=1, pairs=pairs, readout=space.readout())
    policy = space.policy()
    poise.fit(
        policy, "dpo(beta=0.3)", pairs, readout=space.readout(), lr=0.5, steps=3, device="cpu", batch_size=100,
        callbacks=[hooked, fixed],
    )  # fmt: skip
    # The hook sees a step's values before the update, fixed pairs are read after it.
    for before, after in zip(hooked.report().rows[1:], fixed.report().rows[1:], strict=False):
        for name in ("chosen", "rejected", "log_gradient_ratio", "weight", "accuracy"):
            assert getattr(before, name) == pytest.approx(getattr(after, name), abs=1e-6)


def test_a_resumed_run_has_the_rows_of_the_uninterrupted_one(space: FiniteSpace, tmp_path: Path) -> None:
    def made() -> LikelihoodMonitor:
        return LikelihoodMonitor(heldout=space.responses_of(), every=4, readout=space.readout())

    whole, first, second = made(), made(), made()
    run(space, whole)

    class Broken:
        def on_step_end(self, state: Any) -> None:
            if state.step == 7:
                raise RuntimeError("the lights go out")

    options: dict[str, Any] = {"checkpoint": tmp_path, "checkpoint_steps": 6, "checkpoint_seconds": None}
    with pytest.raises(RuntimeError, match="lights"):
        run(space, first, others=[Broken()], **options)
    run(space, second, others=[object()], **options)
    assert [row.step for row in first.report().rows] == [4]
    assert second.report() == whole.report()


def test_state_survives_copies(space: FiniteSpace) -> None:
    monitor = LikelihoodMonitor({"chosen": torch.tensor([-1.0]), "rejected": torch.tensor([-1.0])})
    monitor.observe(torch.tensor([-1.5]), torch.tensor([-2.0]), heldout_logps=torch.tensor([-3.0]))
    other = LikelihoodMonitor({"chosen": torch.tensor([-1.0]), "rejected": torch.tensor([-1.0])})
    other.load_state_dict(monitor.state_dict())
    for copied in (other, copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))):
        row = copied.observe(torch.tensor([-1.5]), torch.tensor([-4.0]), heldout_logps=torch.tensor([-2.5]))
        assert row.step == 1
        assert row.unseen == pytest.approx(0.5)
        assert len(copied.report().rows) == 2


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_by_name(space: FiniteSpace) -> None:
    with pytest.raises(InputError, match="beta_chosen must be positive"):
        LikelihoodMonitor(beta_chosen=0.0)
    with pytest.raises(InputError, match="beta_rejected must be at least 0"):
        LikelihoodMonitor(beta_rejected=-0.1)
    with pytest.raises(InputError, match="every must be positive"):
        LikelihoodMonitor(every=0)
    one = torch.tensor([-1.0])
    with pytest.raises(QuantityError, match="needs the reference"):
        LikelihoodMonitor().observe(one, one)
    with pytest.raises(QuantityError, match="rejected_logps are log-probabilities"):
        LikelihoodMonitor().observe(one, -one, one, one)
    with pytest.raises(QuantityError, match="same answers"):
        LikelihoodMonitor().observe(one, one, torch.tensor([-1.0, -2.0]), one)
    with pytest.raises(InputError, match="A flag is one of drop"):
        LikelihoodReport(rows(0.0)).first("d1")
    with pytest.raises(InputError, match="no term of sft reads"):
        run(space, LikelihoodMonitor(), "sft")
    with pytest.raises(FormulaError, match="beta_rejected must be at least 0"):
        parse("flex_dpo(beta_rejected=-0.1)")
    with pytest.raises(FormulaError, match="beta_chosen must be positive"):
        parse("flex_dpo(beta_chosen=0)")


def test_a_model_may_be_the_reference_of_fixed_pairs() -> None:
    monitor = LikelihoodMonitor(FinitePolicy(torch.zeros(1, 3)))
    assert isinstance(monitor.reference, FrozenModel)


def test_it_watches_a_transformers_model_with_the_readout_that_fit_chooses() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra lm")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=17,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    g = torch.Generator().manual_seed(1)
    mask = torch.ones(8, 6, dtype=torch.bool)
    mask[:, :2] = False
    pairs = {
        "chosen_ids": torch.randint(17, (8, 6), generator=g),
        "rejected_ids": torch.randint(17, (8, 6), generator=g),
        "chosen_mask": mask,
        "rejected_mask": mask,
    }
    answers = {"response_ids": torch.randint(17, (8, 6), generator=g), "response_mask": mask}
    free = LikelihoodMonitor(heldout=answers, every=5)
    fixed = LikelihoodMonitor(copy.deepcopy(model), heldout=answers, every=5, pairs=pairs)
    poise.fit(
        model,
        "dpo + f_sft(divergence='chi2', beta=0.1)",
        pairs,
        lr=0.1,
        steps=10,
        device="cpu",
        callbacks=[free, fixed],
    )
    assert [row.step for row in free.report().rows] == [5, 10]
    assert [row.step for row in fixed.report().rows] == [0, 5, 10]
    assert fixed.report().rows[0].chosen == pytest.approx(0, abs=1e-5)
    assert fixed.report().rows[-1].chosen_shared is not None
    assert fixed.report().rows[-1].margin > 0
    # The first look of the hook has no start row before it, and both watch the same held-out answers.
    assert free.report().rows[-1].unseen == pytest.approx(fixed.report().rows[-1].unseen, abs=1e-5)
