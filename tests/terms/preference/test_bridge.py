"""f_sft: exact optima on finite spaces, telescoping, the gauge, and its domains."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from poise.errors import FormulaError, InputError, QuantityError
from poise.formula import parse
from poise.objective import Objective, Summand
from poise.tasks.divergence_matching import match_divergence
from poise.tasks.finite_space import FiniteSpace
from poise.terms.preference.bridge import DIVERGENCES, FSFT
from poise.training import fit

EXPERT, REFERENCE, BETA = torch.tensor([0.2, 0.2, 0.6]), torch.tensor([0.5, 0.3, 0.2]), 0.5
ONE = torch.float64


@pytest.mark.parametrize("name", DIVERGENCES)
def test_phi_is_concave_with_slope_one_at_zero(name: str) -> None:
    phi = DIVERGENCES[name]
    t = torch.linspace(-0.5, 1.9, 49, dtype=ONE, requires_grad=True)
    out = phi.function(t)
    slope = torch.autograd.grad(out.sum(), t)[0]
    torch.testing.assert_close(phi.slope(t.detach()), slope)
    assert bool((slope.diff() <= 1e-12).all())
    zero = torch.zeros((), dtype=ONE)
    assert float(phi.function(zero)) == 0
    assert float(phi.slope(zero)) == 1


@pytest.mark.parametrize("name", DIVERGENCES)
def test_phi_continued_is_finite_and_concave_everywhere(name: str) -> None:
    t = torch.linspace(-200, 200, 4001, dtype=ONE, requires_grad=True)
    out = DIVERGENCES[name].continued(t)
    slope = torch.autograd.grad(out.sum(), t)[0]
    assert bool(torch.isfinite(out).all())
    assert bool((slope.diff() <= 1e-9).all())
    assert bool((slope >= 0).all())


@pytest.mark.parametrize(
    ("name", "policy", "value", "kl"),
    [
        ("tv", (0.2, 0.2, 0.6), 0.197408, 0.394816),
        ("chi2", (0.253046, 0.231873, 0.515081), 0.158771, 0.255208),
        ("hellinger", (0.352165, 0.265544, 0.382292), 0.096367, 0.091840),
    ],
)
def test_the_exact_optima_of_three_answers(name: str, policy: tuple[float, ...], value: float, kl: float) -> None:
    solved = match_divergence(EXPERT, REFERENCE, BETA, name)
    assert solved.policy.tolist() == pytest.approx(policy, abs=1e-6)
    assert solved.value == pytest.approx(value, abs=1e-6)
    assert solved.kl == pytest.approx(kl, abs=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_at_the_optimum_the_policy_is_the_expert_times_the_slope(name: str) -> None:
    assert match_divergence(EXPERT, REFERENCE, BETA, name).residual < 1e-5


@pytest.mark.parametrize("name", DIVERGENCES)
def test_on_single_tokens_the_token_form_ends_at_the_exact_optimum(name: str) -> None:
    space = FiniteSpace([0.5, 0.3, 0.2])
    expert = EXPERT.double() / EXPERT.double().sum()
    found = space.minimize(f"f_sft(divergence='{name}', beta=0.5)", space.responses_of(expert[None]))
    solved = match_divergence(expert, REFERENCE, BETA, name)
    torch.testing.assert_close(found.logps[0].exp(), solved.policy, rtol=0, atol=1e-6)
    assert -found.certificate.value == pytest.approx(solved.value, abs=1e-6)


def test_the_running_gauge_brings_the_sequence_form_to_the_exact_optimum() -> None:
    expert = EXPERT.double() / EXPERT.double().sum()
    reference = (REFERENCE.double() / REFERENCE.double().sum()).log()
    solved = match_divergence(expert, REFERENCE, BETA, "chi2")
    term = FSFT("chi2", BETA, level="sequence", gauge="running", rate=0.5)
    objective = Objective([Summand(term)])
    logits = reference.clone().requires_grad_()
    for _ in range(600):
        batch = {
            "response_logps": logits.log_softmax(-1),
            "reference_response_logps": reference,
            "sample_weight": 3 * expert,
        }
        loss = objective(batch)
        with torch.no_grad():
            logits -= torch.autograd.grad(loss, logits)[0]
        # The mean of phi' over demonstrations, each as often as the expert gives it.
        rows = torch.repeat_interleave(torch.arange(3), torch.tensor([1, 1, 3]))
        term.advance(logits.detach().log_softmax(-1)[rows], reference[rows])
    torch.testing.assert_close(logits.detach().softmax(-1), solved.policy, rtol=0, atol=1e-5)
    tilted = solved.reward - BETA * (solved.policy.log() - reference)
    assert term.constant.item() == pytest.approx(tilted[0].item(), abs=1e-4)


# ---- sequences ------------------------------------------------------------------------------------------------------


def record(seed: int = 0, shift: Tensor | None = None) -> dict[str, Tensor]:
    """Random logits of a policy and its reference over four tokens; answers of different lengths behind a prompt."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 6, 4, generator=g, dtype=ONE)
    logits = logits if shift is None else logits + shift
    reference = logits.mean(-1, keepdim=True) + 0.3 * torch.randn(3, 6, 4, generator=g, dtype=ONE) + logits
    ids = torch.randint(4, (3, 6), generator=g)
    mask = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0]]).bool()
    return of_logits(logits, reference, ids, mask)


def of_logits(logits: Tensor, reference: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    def taken(x: Tensor) -> Tensor:
        return torch.where(mask, x.log_softmax(-1).gather(-1, ids[..., None])[..., 0], 0.0)

    return {
        "logits": logits,
        "response_logps": taken(logits),
        "reference_response_logps": taken(reference),
        "response_mask": mask,
        "response_logsumexp": torch.where(mask, logits.logsumexp(-1), 0.0),
        "response_positions": torch.where(mask, mask.long().cumsum(1) - 1, -1),
        "response_ids": ids,
        "reference": reference,
    }


def run(term: FSFT, batch: dict[str, Tensor]) -> Any:
    names = ("response_logps", "reference_response_logps", "response_mask", "response_logsumexp", "response_positions")
    return term(**{name: batch[name] for name in names})


def test_the_rewards_telescope_to_the_log_ratio() -> None:
    batch = record()
    out = run(FSFT("chi2", 0.7), batch)
    torch.testing.assert_close(out.extras["reward"] - out.extras["value"], out.extras["implicit_reward"])
    ratio = 0.7 * (batch["response_logps"] - batch["reference_response_logps"]).sum(-1)
    torch.testing.assert_close(out.extras["implicit_reward"], ratio)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_total_variation_is_beta_times_supervised_fine_tuning(level: str) -> None:
    batch = record()
    logits = batch["logits"].requires_grad_()
    again = of_logits(logits, batch["reference"], batch["response_ids"], batch["response_mask"])
    ours = torch.autograd.grad(run(FSFT("tv", 0.7, level=level), again).values.mean(), logits, retain_graph=True)[0]
    theirs = torch.autograd.grad(parse("sft(reduction='sum')")(again), logits)[0]
    torch.testing.assert_close(ours, 0.7 * theirs)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_shift_of_all_logits_of_a_state_is_seen_by_every_phi_but_the_linear_one(name: str) -> None:
    shift = torch.zeros(3, 6, 1, dtype=ONE)
    shift[:, 2] = 0.4
    plain, shifted = record(), record()
    shifted["response_logsumexp"] = torch.where(
        shifted["response_mask"], (shifted["logits"] + shift).logsumexp(-1), 0.0
    )
    difference = run(FSFT(name, 0.3), shifted).values - run(FSFT(name, 0.3), plain).values
    if name == "tv":
        assert float(difference.abs().max()) < 1e-12
    else:
        assert float(difference[:2].abs().min()) > 1e-4
    assert float(difference[2].abs()) < 1e-12  # this answer does not pass that state


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_for_a_small_beta_the_gradient_is_that_of_fine_tuning(name: str, level: str) -> None:
    batch, beta = record(), 1e-6
    logits = batch["logits"].requires_grad_()
    again = of_logits(logits, batch["reference"], batch["response_ids"], batch["response_mask"])
    ours = (
        torch.autograd.grad(run(FSFT(name, beta, level=level), again).values.mean(), logits, retain_graph=True)[0]
        / beta
    )
    theirs = torch.autograd.grad(parse("sft(reduction='sum')")(again), logits)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_the_gradient_passes_through_the_values_and_not_through_a_detached_weight() -> None:
    batch = record()
    logits = batch["logits"].requires_grad_()
    again = of_logits(logits, batch["reference"], batch["response_ids"], batch["response_mask"])
    term, beta = FSFT("chi2", 0.5), 0.5
    ours = torch.autograd.grad(run(term, again).values.sum(), logits, retain_graph=True)[0]
    ratio = beta * (again["response_logps"] - again["reference_response_logps"])
    values = beta * again["response_logsumexp"]
    following = torch.nn.functional.pad(values, (0, 1))[:, 1:]
    weight = (1 - (ratio + values - following) / 2).detach()
    by_weight = torch.autograd.grad(-(weight * ratio).sum(), logits)[0]
    assert float((ours - by_weight).abs().max()) > 1e-3


def test_the_reference_never_gets_a_gradient() -> None:
    batch = record()
    reference = batch["reference_response_logps"].requires_grad_()
    logps = batch["response_logps"].requires_grad_()
    assert run(FSFT("chi2"), batch).values.requires_grad
    assert torch.autograd.grad(run(FSFT("chi2"), batch).values.sum(), [logps, reference], allow_unused=True)[1] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rewards_outside_the_domain_are_counted_and_stay_finite(dtype: torch.dtype) -> None:
    logps = torch.tensor([-100.0, -1.0, -1.0], dtype=dtype, requires_grad=True)
    reference = torch.tensor([-1.0, -1.0, -100.0], dtype=dtype)
    for name, outside in (("hellinger", [1, 0, 0]), ("js", [1, 0, 0]), ("chi2", [0, 0, 1]), ("reverse_kl", [0, 0, 0])):
        out = FSFT(name, level="sequence")(response_logps=logps, reference_response_logps=reference)
        assert out.extras["clipped"].tolist() == outside
        gradient = torch.autograd.grad(out.values.sum(), logps)[0]
        assert bool(torch.isfinite(out.values).all())
        assert bool((gradient <= 0).all())  # nothing pushes a demonstration down
        assert gradient[0] < 0
    with pytest.raises(InputError, match="1 rewards are outside the domain of 'hellinger'"):
        FSFT("hellinger", level="sequence", clip=False)(response_logps=logps, reference_response_logps=reference)


def test_padding_and_side_of_padding_change_nothing() -> None:
    batch = record()
    whole = run(FSFT("hellinger", 0.3), batch).values
    padded = {
        name: torch.nn.functional.pad(batch[name], (2, 3), value=-1 if name == "response_positions" else 0)
        for name in (
            "response_logps",
            "reference_response_logps",
            "response_mask",
            "response_logsumexp",
            "response_positions",
        )
    }
    torch.testing.assert_close(run(FSFT("hellinger", 0.3), padded).values, whole)


# ---- errors and state -----------------------------------------------------------------------------------------------


def test_bad_input_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="f_sft: beta must be positive"):
        FSFT(beta=0.0)
    with pytest.raises(InputError, match="divergence is one of 'tv', 'chi2'"):
        FSFT("kl")
    with pytest.raises(InputError, match="gauge='running' belongs to level='sequence'"):
        FSFT(gauge="running")
    with pytest.raises(FormulaError, match="level is one of"):
        parse("f_sft(level='word')")
    one = torch.tensor([-1.0])
    with pytest.raises(QuantityError, match="must be float \\[batch, time\\] each"):
        FSFT()(response_logps=one, reference_response_logps=one)
    with pytest.raises(QuantityError, match="must be of one shape"):
        FSFT(level="sequence")(response_logps=one, reference_response_logps=torch.tensor([-1.0, -2.0]))
    with pytest.raises(QuantityError, match="the token form reads"):
        FSFT()(response_logps=one[None], reference_response_logps=one[None])
    with pytest.raises(InputError, match="beta must be positive"):
        match_divergence(EXPERT, REFERENCE, 0.0)
    with pytest.raises(InputError, match="divergence is one of"):
        match_divergence(EXPERT, REFERENCE, 1.0, "kl")
    with pytest.raises(InputError, match="positive probabilities"):
        match_divergence(torch.tensor([1.0, 0.5]), REFERENCE, 1.0)


def test_an_answer_without_its_end_is_refused() -> None:
    batch = record()
    term = FSFT("chi2", eos=3)
    assert "response_ids" in term.reads
    assert "response_ids" not in FSFT("chi2").reads
    arguments = {name: batch[name] for name in term.reads}
    last = torch.tensor([[3], [5], [1]])
    arguments["response_ids"] = batch["response_ids"].scatter(1, last, 3)
    assert bool(torch.isfinite(term(**arguments).values).all())
    arguments["response_ids"] = arguments["response_ids"].scatter(1, last[:2], 2)
    with pytest.raises(InputError, match="2 of 3 answers do not end"):
        term(**arguments)


def test_the_sequence_form_does_not_ask_for_values() -> None:
    assert set(FSFT(level="sequence").reads) == {"response_logps", "reference_response_logps"}
    assert "response_logsumexp" in FSFT().reads


def test_state_survives_copies() -> None:
    term = FSFT("chi2", level="sequence", gauge="running")
    term.advance(torch.tensor([-1.0]), torch.tensor([-3.0]))
    assert term.constant.item() != 0
    other = FSFT("chi2", level="sequence", gauge="running")
    other.load_state_dict(term.state_dict())
    for copied in (other, copy.deepcopy(term), pickle.loads(pickle.dumps(term))):
        assert copied.constant.item() == term.constant.item()
        copied.advance(torch.tensor([-1.0]), torch.tensor([-3.0]))
        assert copied.constant.item() != term.constant.item()
    text = "f_sft(divergence='js', beta=0.5, level='sequence')"
    assert str(parse(text)) == text
    assert math.isfinite(term.constant.item())


def test_fine_tuning_under_a_bound_on_the_divergence_stays_within_it() -> None:
    """The explicit alternative to a smaller rate: the weight of the KL becomes whatever keeps the bound."""
    space = FiniteSpace([0.5, 0.3, 0.2], dtype=torch.float32)
    data = space.responses_of(torch.tensor([[0.05, 0.05, 0.9]]))
    ends = {}
    for formula in ("sft", "sft + constraint(token_kl(on='response', direction='reverse'), upper=0.2, lr=0.2)"):
        policy = space.policy()
        fit(policy, formula, data, readout=space.readout(), lr=0.3, steps=400, device="cpu")
        ends[formula[:5]] = float(space.kl(policy.logps.detach(), space.prior_logps))
    assert ends["sft"] > 0.9
    assert ends["sft +"] == pytest.approx(0.2, abs=0.02)
