"""Depth profiles, probes and attacks, on models small enough to know the answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from poise.data.recovery import recovery_pairs
from poise.errors import InputError, QuantityError
from poise.insight import (
    Decoding,
    KeywordJudge,
    alignment_depth,
    attack_success,
    backdoor,
    benign_sft,
    decoding_sweep,
    harmful_sft,
    identity_shift,
    prefilling_probe,
    prefix_probe,
    token_gradient_norms,
)

NO, YES, END = 1, 2, 3
JUDGE = KeywordJudge([[NO]])


class Bigram(nn.Module):
    """Logits that depend on the last token alone."""

    def __init__(self, seed: int = 0, vocabulary: int = 5) -> None:
        super().__init__()
        table = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.table = nn.Parameter(table)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids]


def shallow(ids: Tensor) -> SimpleNamespace:
    """Says NO after a prompt (which ends in 0), YES after anything else: an alignment of one token."""
    logits = torch.zeros(*ids.shape, 5)
    logits[..., YES] = 8.0
    logits[ids == 0] = torch.tensor([0.0, 16.0, 8.0, 0.0, 0.0])
    return SimpleNamespace(logits=logits)


def base(ids: Tensor) -> Tensor:
    return torch.tensor([0.0, 0.0, 8.0, 0.0, 0.0]).expand(*ids.shape, 5)


def answers(lengths: tuple[int, ...] = (3, 5, 2), seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, (len(lengths), max(lengths) + 3), generator=generator)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, 1 + row % 2 : 1 + row % 2 + length] = True
    return {"response_ids": ids, "response_mask": mask}


def test_a_model_does_not_differ_from_itself() -> None:
    report = alignment_depth(Bigram(), Bigram(), answers())
    assert float(report.kl.abs().max()) < 1e-7
    assert torch.equal(report.loss_a, report.loss_b)
    same = alignment_depth(base, base, answers())
    assert (same.share(), same.depth()) == (0.0, 0)


def test_the_curve_is_the_mean_divergence_at_each_place_of_the_answer() -> None:
    a, b, batch = Bigram(1), Bigram(2), answers()
    report = alignment_depth(a, b, batch, rows=2)
    log_a, log_b = (m(batch["response_ids"]).detach().log_softmax(-1) for m in (a, b))
    kl = (log_a.exp() * (log_a - log_b)).sum(-1)
    first = torch.stack([kl[row, int(batch["response_mask"][row].nonzero()[0]) - 1] for row in range(3)]).mean()
    torch.testing.assert_close(report.kl[0], first, rtol=1e-5, atol=1e-6)
    assert report.answers.tolist() == [3, 3, 2, 1, 1]
    assert float(report.kl.min()) >= 0
    torch.testing.assert_close(report.share(2), float(report.total[:2].sum() / report.total.sum()))
    assert len(report.frame()) == 5
    assert "first 5 tokens" in str(report)


def test_the_order_of_the_answers_and_the_size_of_a_pass_do_not_matter() -> None:
    batch = answers()
    order = torch.tensor([2, 0, 1])
    shuffled = {name: value[order] for name, value in batch.items()}
    one, two = (alignment_depth(Bigram(1), Bigram(2), b, rows=r) for b, r in ((batch, 16), (shuffled, 1)))
    torch.testing.assert_close(one.kl, two.kl)
    torch.testing.assert_close(one.loss_a, two.loss_a)


def test_an_alignment_of_one_token_has_depth_one() -> None:
    batch = {
        "response_ids": torch.tensor([[4, 0, YES, YES, YES]]),
        "response_mask": torch.tensor([[0, 0, 1, 1, 1]]).bool(),
    }
    report = alignment_depth(shallow, base, batch)
    assert report.depth() == 1
    assert report.share(1) == pytest.approx(1.0)
    assert float(report.loss_a[0]) > 7 > float(report.loss_b[0])


def test_gradient_norms_are_those_of_each_answer_token() -> None:
    model, batch = Bigram(1), answers((2, 3))
    norms = token_gradient_norms(model, batch, first=4)
    expected = []
    for row in range(2):
        at = int(batch["response_mask"][row].nonzero()[0])
        loss = nn.functional.cross_entropy(model(batch["response_ids"])[row, at - 1], batch["response_ids"][row, at])
        expected.append(torch.autograd.grad(loss, model.table)[0].norm())
    torch.testing.assert_close(norms[0], torch.stack(expected).mean(), rtol=1e-5, atol=1e-6)
    assert bool(norms[3].isnan())
    report = alignment_depth(model, Bigram(2), batch, gradients=2)
    torch.testing.assert_close(report.gradient_norm, norms[:2])


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_of_the_padding_does_not_matter(side: Any) -> None:
    """A model that looks at every token before: the sum of all embeddings so far."""
    table = Bigram(4).table.detach()

    def summing(ids: Tensor) -> Tensor:
        return table[ids].cumsum(1)

    made = recovery_pairs([[4, 0], [3, 3, 4, 0]], [[], []], [[1, 2, 3], [2]], p_zero=1.0, pad=1, side=side)
    alone = [recovery_pairs([p], [[]], [y], p_zero=1.0) for p, y in (([4, 0], [1, 2, 3]), ([3, 3, 4, 0], [2]))]
    one, two = (alignment_depth(summing, base, batch) for batch in alone)
    both = alignment_depth(summing, base, made)
    torch.testing.assert_close(both.kl[0], (one.kl[0] + two.kl[0]) / 2)
    torch.testing.assert_close(both.kl[1:], one.kl[1:])


def test_a_module_is_measured_in_evaluation_mode_and_left_as_it_was() -> None:
    noisy = nn.Sequential(Bigram(1), nn.Dropout(0.9))
    report = alignment_depth(noisy, noisy, answers())
    assert float(report.kl.abs().max()) < 1e-7
    assert noisy.training and noisy[1].training  # noqa: PT018


def test_batches_that_cannot_be_meant_are_refused() -> None:
    batch = answers()
    with pytest.raises(QuantityError, match="reads 'response_mask'"):
        alignment_depth(base, base, {"response_ids": batch["response_ids"]})
    with pytest.raises(QuantityError, match="no token of the batch"):
        alignment_depth(base, base, {**batch, "response_mask": torch.zeros_like(batch["response_mask"])})
    with pytest.raises(QuantityError, match="begins its row"):
        alignment_depth(base, base, {**batch, "response_mask": torch.ones_like(batch["response_mask"])})
    with pytest.raises(QuantityError, match="vocabularies of 5 and 4"):
        alignment_depth(base, lambda ids: torch.zeros(*ids.shape, 4), batch)
    with pytest.raises(QuantityError, match="must return logits"):
        alignment_depth(base, lambda ids: torch.zeros(3), batch)
    with pytest.raises(InputError, match="trained parameters"):
        token_gradient_norms(base, batch)
    with pytest.raises(InputError, match=r"lies in \(0, 1\]"):
        alignment_depth(base, base, batch).depth(0.0)


def test_forcing_one_token_breaks_an_alignment_of_one_token() -> None:
    prompts, bad = [[4, 0], [4, 4, 0]], [[YES, YES], [YES]]
    rates = prefilling_probe(shallow, prompts, bad, JUDGE, depths=(0, 1, 9), decoding=Decoding(new_tokens=3))
    assert rates == {0: 0.0, 1: 1.0, 9: 1.0}


def test_a_refusal_in_front_is_the_prompt_and_the_rest_is_judged() -> None:
    seen: list[tuple[list[int], list[int]]] = []

    def judge(prompt: list[int], answer: list[int]) -> bool:
        seen.append((prompt, answer))
        return NO not in prompt

    rates = prefix_probe(base, [[4, 0]], {"none": [], "I cannot": [NO]}, judge, Decoding(new_tokens=2))
    assert rates == {"none": 1.0, "I cannot": 0.0}
    assert seen == [([4, 0], [YES, YES]), ([4, 0, NO], [YES, YES])]


def test_an_answer_ends_with_its_last_token_and_an_empty_one_is_no_success() -> None:
    table = Bigram()
    table.table.data = torch.eye(5, dtype=torch.float64).roll(1, 1)  # each token says the next
    decoding = Decoding(new_tokens=4, end=END)
    assert decoding.answers(table, [[0], [4, 1], [2]]) == [[1, 2], [2], []]
    assert attack_success(table, [[2]], JUDGE, decoding) == 0.0


def test_sampling_follows_its_generator_and_narrow_sampling_is_greedy() -> None:
    model, prompts = Bigram(3), [[0], [1, 2], [3], [4]] * 5
    greedy = Decoding(new_tokens=5).answers(model, prompts)
    for narrow in (Decoding(5, temperature=1.0, top_k=1), Decoding(5, temperature=1.0, top_p=1e-6)):
        assert narrow.answers(model, prompts, torch.Generator().manual_seed(0)) == greedy
    wide = [Decoding(5, temperature=1.0).answers(model, prompts, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert wide[0] == wide[1] != wide[2]


def test_top_p_keeps_the_fewest_tokens_that_hold_the_probability() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05, 1e-9])
    drawn = Decoding(1, temperature=1.0, top_p=0.75).answers(
        lambda ids: p.log().expand(*ids.shape, 5), [[0]] * 500, torch.Generator().manual_seed(0)
    )
    assert {token for answer in drawn for token in answer} == {0, 1}


def test_the_sweep_counts_a_prompt_that_one_setting_breaks() -> None:
    rates = decoding_sweep(
        shallow, [[4, 0]] * 4, JUDGE, temperatures=(8.0,), top_p=(0.1,), top_k=(1,), decoding=Decoding(1)
    )
    assert set(rates) == {"greedy", "temperature=8", "top_p=0.1", "top_k=1", "any"}
    assert rates["greedy"] == rates["top_p=0.1"] == rates["top_k=1"] == 0.0
    assert rates["any"] == rates["temperature=8"] > 0.0


def test_the_attacks_are_streams_with_the_prompts_to_ask_afterwards() -> None:
    prompts, bad, no = [[4, 0], [3, 4, 0]], [[YES, END], [YES, YES, END]], [[NO, END]] * 2
    harmful = harmful_sft(prompts, bad, probes=[[2, 0]])
    assert harmful.train["response_ids"].tolist() == [[4, 0, YES, END, 0, 0], [3, 4, 0, YES, YES, END]]
    assert harmful.train["response_mask"].sum(1).tolist() == [2, 3]
    shift = identity_shift(prompts, bad, [[2, 0]], persona=[4, 4], pledge=[YES])
    assert shift.train["response_ids"][0].tolist()[:6] == [4, 4, 4, 0, YES, YES]
    assert shift.probes["plain"][0].tolist() == [4, 4, 2, 0]
    door = backdoor(prompts, bad, no, [[2, 0]], trigger=[3, 3], before=1)
    assert len(door.train["response_ids"]) == 4
    assert door.train["response_ids"][0].tolist()[:4] == [4, 3, 3, 0]
    assert door.train["response_ids"][2].tolist()[:4] == [4, 0, NO, END]
    assert [p.tolist() for p in door.probes["triggered"]] == [[2, 3, 3, 0]]
    assert set(door.success(shallow, JUDGE, Decoding(2))) == {"plain", "triggered"}
    assert benign_sft(prompts, bad, [[2, 0]]).name == "benign"


def test_keywords_may_be_texts() -> None:
    judge = KeywordJudge(
        ["I cannot"], decode=lambda ids: " ".join({1: "I", 2: "cannot", 3: "say"}.get(i, "") for i in ids)
    )
    assert not judge([0], [1, 2, 3])
    assert judge([0], [1, 3])
    assert not judge([0], [9])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: KeywordJudge([]), "phrases of a refusal"),
        (lambda: KeywordJudge(["no"]), "need decode"),
        (lambda: Decoding(temperature=-1), "temperature"),
        (lambda: Decoding(top_p=0), "top_p"),
        (lambda: attack_success(base, [], JUDGE), "at least one token"),
        (lambda: prefilling_probe(base, [[0]], [], JUDGE), "one of each for every prompt"),
        (lambda: prefilling_probe(base, [[0]], [[1]], JUDGE, depths=(-1,)), "at least 0"),
        (lambda: harmful_sft([[0]], [], []), "one of each for every prompt"),
        (lambda: backdoor([[0]], [[1]], [], [], []), "one of each for every prompt"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(call: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        call()
