"""Rewards of answers: the figures of the paper by hand, the laws of composition, and the errors."""

from __future__ import annotations

import copy
import math
import pickle
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from poise.errors import InputError, NonFiniteError, QuantityError
from poise.parts.query_types import QueryTypes, RandomTypes
from poise.parts.text_counts import TokenTable
from poise.parts.text_encoders import TfidfEncoder
from poise.terms.rewards import (
    CONSTRAINED,
    OPEN_ENDED,
    LengthIncentive,
    Relevance,
    RepetitionPenalty,
    Reward,
    Stripping,
    Toxicity,
    ngram_uniqueness,
    r3_reward,
    relevance_range,
    words,
)

CAT = "the cat sat on the mat. the cat sat on the mat."
TEXTS = ["a red cat sat", "a red dog ran", "two blue birds fly", "birds fly high", "cats and dogs"]
texts = st.text(st.sampled_from(list("ab1_.,!? \n\t\xa0éß中\x1c")), max_size=60)


def letters(batch: list[str]) -> list[list[float]]:
    """A small encoder: counts of three letters."""
    return [[float(text.count(c)) for c in "abc"] for text in batch]


def close(values: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(values.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7)


# ---- features -------------------------------------------------------------------------------------------------------


def test_the_sentence_of_the_paper_has_fourteen_tokens_and_seven_of_twelve_trigrams() -> None:
    assert len(words(CAT)) == 14
    close(LengthIncentive()([CAT]), [0.14])
    close(RepetitionPenalty()([CAT]), [7 / 12])


@pytest.mark.parametrize("text", ["", "one", "one two"])
def test_below_three_tokens_nothing_is_repeated(text: str) -> None:
    close(RepetitionPenalty()([text]), [1.0])


@given(texts)
def test_words_are_those_of_the_regular_expression(text: str) -> None:
    assert words(text) == re.findall(r"\w+|[^\w\s]+", text)


@given(st.lists(texts, min_size=1, max_size=5), st.integers(1, 5))
def test_counting_many_texts_at_once_counts_each_of_them(batch: list[str], n: int) -> None:
    table = TokenTable(batch)
    assert table.counts.tolist() == [len(words(text)) for text in batch]
    assert table.uniqueness(n).tolist() == [ngram_uniqueness(words(text), n) for text in batch]


def test_every_white_space_of_unicode_and_half_a_surrogate_pair_are_counted_like_the_rest() -> None:
    blanks = [chr(c) for c in range(0x3001) if chr(c).isspace()]
    every = [f"a{blank}b" for blank in blanks] + ["a\u200bb c", "\ud800 a", "a\ud800"]
    assert TokenTable(every).counts.tolist() == [len(re.findall(r"\w+|[^\w\s]+", text)) for text in every]
    assert TokenTable([""] * 2).counts.tolist() == [0, 0]


def test_long_ngrams_of_many_words_do_not_overflow() -> None:
    text = " ".join(f"w{i % 700}" for i in range(1500))
    assert TokenTable([text]).uniqueness(9).tolist() == [ngram_uniqueness(words(text), 9)]


@given(st.lists(st.sampled_from("abc"), max_size=12), st.integers(1, 4))
def test_uniqueness_counts_different_ngrams(tokens: list[str], n: int) -> None:
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    assert ngram_uniqueness(tokens, n) == (len(set(grams)) / len(grams) if grams else 1.0)


@pytest.mark.parametrize("cut", ["\n\nHuman: more", "Assistant: more", "\n\n\n\nmore", "\n\n-- more", "\n\n____ more"])
def test_an_answer_ends_where_the_next_turn_or_the_padding_begins(cut: str) -> None:
    assert Stripping()("\n yes, it is" + cut) == "yes, it is"
    close(LengthIncentive()(["yes, it is" + cut]), [0.04])
    close(LengthIncentive(strip=None)(["yes"]), [0.01])


def test_stop_patterns_are_taken_literally() -> None:
    assert Stripping(roles=("[A.]",), stops=())("Ab [A.] c") == "Ab"
    assert Stripping((), ())("Human: x") == "Human: x"


def test_relevance_is_the_diagonal_of_all_dot_products() -> None:
    encoder = TfidfEncoder(3).fit(TEXTS)
    every = encoder(TEXTS) @ encoder(TEXTS[::-1]).T
    close(Relevance(encoder)(TEXTS, TEXTS[::-1]), every.diagonal().tolist())


def test_relevance_does_not_depend_on_the_batch_or_its_order() -> None:
    encoder = TfidfEncoder(3).fit(TEXTS)
    whole = Relevance(encoder)(TEXTS, TEXTS[::-1])
    close(Relevance(encoder, batch_size=1)(TEXTS, TEXTS[::-1]), whole.tolist())
    close(Relevance(encoder)(TEXTS[::-1], TEXTS), whole.flip(0).tolist())


def test_a_floor_keeps_relevance_from_punishing_long_answers() -> None:
    def signed(batch: list[str]) -> list[list[float]]:
        return [[1.0 if text.startswith("+") else -1.0] for text in batch]

    close(Relevance(signed)(["+", "+"], ["+", "-"]), [1.0, -1.0])
    close(Relevance(signed, floor=0.0)(["+", "+"], ["+", "-"]), [1.0, 0.0])


def test_an_answer_above_the_threshold_of_toxicity_earns_nothing() -> None:
    hook = Toxicity(lambda batch: [0.25 * len(text) for text in batch], threshold=0.5)
    close(hook(["a", "aa", ""]), [0.75, 0.0, 1.0])


# ---- composition ----------------------------------------------------------------------------------------------------


def test_a_product_a_sum_and_a_scaled_reward_are_what_they_say() -> None:
    li, rp = LengthIncentive(), RepetitionPenalty()
    a, b = li([CAT]).double(), rp([CAT]).double()
    close((li * rp)([CAT]), (a * b).tolist())
    close((li + rp)([CAT]), (a + b).tolist())
    close((3 * li + 0.5 * rp)([CAT]), (3 * a + 0.5 * b).tolist())
    close(Reward.sum(li, rp, weights=[2, -1])([CAT]), (2 * a - b).tolist())


def test_a_plain_function_is_a_factor_by_the_names_of_its_parameters() -> None:
    def brief(response: list[str], limit: list[int]) -> list[float]:
        return [float(len(text) <= n) for text, n in zip(response, limit, strict=True)]

    reward = Reward.product(brief, LengthIncentive())
    assert reward.reads == ("response", "limit")
    close(reward(response=["a b", "a b"], limit=[3, 2]), [0.02, 0.0])
    close(reward([{"response": "a b", "limit": 3}, {"response": "a b", "limit": 2}]), [0.02, 0.0])


def test_records_and_columns_give_the_same() -> None:
    reward = r3_reward(letters)
    columns = (["abc", "what"], ["ab", "cab"], [None, "abc"], [OPEN_ENDED, CONSTRAINED])
    records = [
        dict(zip(("query", "response", "reference", "type"), row, strict=True)) for row in zip(*columns, strict=True)
    ]
    assert torch.equal(reward(records), reward(*columns))


def test_repetition_does_not_change_with_the_query() -> None:
    reward = Relevance(letters) * RepetitionPenalty()
    reward(["abc", "b"], [CAT, CAT])
    assert reward.last is not None
    assert reward.last.factors["repetition_penalty"].unique().numel() == 1


def test_in_a_product_every_elasticity_is_one_and_in_a_sum_they_are_shares() -> None:
    li, rp = LengthIncentive(), RepetitionPenalty()
    for e in (li * rp).explain([CAT, ""]).elasticity.values():
        close(e, [1.0, 1.0])
    found = (2 * li + rp).explain([CAT])
    close(found.elasticity["length_incentive"], [0.28 / (0.28 + 7 / 12)])
    close(torch.stack(list(found.elasticity.values())).sum(0), [1.0])


@pytest.mark.parametrize("offset", [0.0, 0.4])
def test_an_elasticity_is_the_derivative_of_the_logarithms(offset: float) -> None:
    state = {"a": 0.3, "b": 1.7}

    def a(response: list[str]) -> list[float]:
        return [state["a"]] * len(response)

    def b(response: list[str]) -> list[float]:
        return [state["b"]] * len(response)

    first, second = Reward.product(a), Reward.product(b)
    reward = (first.mapped((0.0, 1.0), (offset, 2.0)) * second) + 0.5 * first
    base = reward.explain(["x"])
    for name in state:
        at = dict(state)
        step = 1e-6
        state[name] = at[name] * math.exp(step)
        slope = float((reward.explain(["x"]).reward.log() - base.reward.log()) / step)
        state.update(at)
        assert float(base.elasticity[name]) == pytest.approx(slope, rel=1e-4)


def test_shares_of_the_spread_of_a_product_add_up_to_one_without_a_rest() -> None:
    reward = LengthIncentive() * RepetitionPenalty()
    shares = reward.explain([CAT, "a b c d", "a a a a a a a"]).spread()
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["(rest)"] == pytest.approx(0, abs=1e-12)
    assert math.isnan(reward.explain([CAT]).spread()["(rest)"])


def test_a_branch_not_taken_has_no_factor_and_no_elasticity() -> None:
    found = r3_reward(letters).explain(["a", "a"], ["ab", "ab"], [None, "ab"], [OPEN_ENDED, CONSTRAINED])
    assert found.factors["relevance_reference"].isnan().tolist() == [True, False]
    assert found.elasticity["relevance_reference"].tolist() == [0, 1]
    assert found.elasticity["repetition_penalty"].tolist() == [1, 1]
    assert "relevance_reference" in str(found)
    assert list(found.frame()["reward"]) == found.reward.tolist()


# ---- the whole reward -----------------------------------------------------------------------------------------------


def test_the_range_map_of_the_paper() -> None:
    def given_relevance(response: list[str]) -> list[float]:
        return [float(text) for text in response]

    f = Reward.product(given_relevance).mapped((0.0, 3.5), (0.0, 512 / 100))
    assert f.slope == pytest.approx(1.462857, abs=1e-6)
    # not clipped
    close(f(["0", "3.5", "1.75", "7"]), [0.0, 5.12, 2.56, 10.24])


def test_r3_is_relevance_length_and_variety_or_the_mapped_reference_and_variety() -> None:
    reward = r3_reward(letters)
    got = reward(["abc", "abc"], ["a b a b a b", "a b a b a b"], ["bbc", "bbc"], [OPEN_ENDED, CONSTRAINED])
    rp = 2 / 4
    close(got, [(3 + 3) * 0.06 * rp, 6 * 5.12 / 3.5 * rp])


def test_types_may_come_from_a_classifier_and_from_the_authors_labels() -> None:
    kind = QueryTypes().fit(["write a", "how many", "write b", "how much"], [OPEN_ENDED, CONSTRAINED] * 2)
    learned = r3_reward(letters, query_type=kind)
    given_types = r3_reward(letters, types=("OPENENDED", "CONSTRAINED"))
    a = learned(["write c", "how c"], ["ab", "ab"], ["a", "a"])
    b = given_types(["write c", "how c"], ["ab", "ab"], ["a", "a"], ["OPENENDED", "CONSTRAINED"])
    assert torch.equal(a, b)
    random = r3_reward(letters, query_type=RandomTypes([OPEN_ENDED, CONSTRAINED]))
    assert random(["write c"] * 3, ["ab"] * 3, ["a"] * 3).unique().numel() == 1


def test_the_fitted_range_is_a_quantile_of_the_products_and_makes_f_reach_the_longest_answer() -> None:
    references, responses = ["a", "ab", "abc"], ["a", "a", "abc"]
    assert relevance_range(letters, references, responses, quantile=1.0) == (0.0, 3.0)
    reward = r3_reward(letters, input_range=(0.0, 3.0))
    close(reward(["q"], ["a b c"], ["abc"], [CONSTRAINED]), [5.12])


def test_rewards_are_copied_and_pickled_with_their_state() -> None:
    encoder = TfidfEncoder(3).fit(TEXTS)
    kind = QueryTypes().fit(TEXTS[:4], [OPEN_ENDED, CONSTRAINED] * 2)
    reward = r3_reward(encoder, input_range=relevance_range(encoder, TEXTS, TEXTS), query_type=kind)
    expected = reward(TEXTS, TEXTS[::-1], TEXTS)
    for other in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        assert torch.equal(other(TEXTS, TEXTS[::-1], TEXTS), expected)


def test_the_result_has_the_default_dtype_and_no_gradient() -> None:
    assert LengthIncentive()([CAT]).dtype == torch.float32
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert LengthIncentive()([CAT]).dtype == torch.float64
    finally:
        torch.set_default_dtype(before)
    weight = torch.ones(1, requires_grad=True)
    assert not Relevance(lambda batch: weight * torch.ones(len(batch), 1))(["a"], ["b"]).requires_grad


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_an_unknown_type_is_named_with_the_known_ones() -> None:
    with pytest.raises(QuantityError, match=r"answer 1 has the type 'open'.*'open-ended', 'constrained'"):
        r3_reward(letters)(["a", "a"], ["b", "b"], ["a", "a"], [OPEN_ENDED, "open"])


@pytest.mark.parametrize("reference", [None, "", "  "])
def test_a_constrained_query_without_reference_is_an_error(reference: str | None) -> None:
    with pytest.raises(QuantityError, match="no reference"):
        r3_reward(letters)(["a"], ["b"], [reference], [CONSTRAINED])
    with pytest.raises(QuantityError, match="no reference"):
        r3_reward(letters)(["a"], ["b"], None, [CONSTRAINED])
    r3_reward(letters)(["a"], ["b"], [reference], [OPEN_ENDED])


def test_an_encoder_of_changing_dimension_is_an_error() -> None:
    with pytest.raises(QuantityError, match="1 dimensions for the query and 2 for the response"):
        Relevance(lambda batch: [[1.0] * len(batch[0]) for _ in batch])(["a"], ["bb"])
    with pytest.raises(QuantityError, match="one batch came back with 1 dimensions and another with 2"):
        Relevance(lambda batch: [[1.0] * len(batch[0]) for _ in batch], batch_size=1)(["a", "bb"], ["a", "bb"])
    with pytest.raises(QuantityError, match=r"expected float \[1, d\]"):
        Relevance(lambda batch: [1.0])(["a"], ["b"])


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match="n must be at least 1, and it is 0"):
        RepetitionPenalty(n=0)
    with pytest.raises(InputError, match="per must be positive"):
        LengthIncentive(per=0)
    with pytest.raises(InputError, match="against is"):
        Relevance(letters, against="answer")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="input_range runs from low to high"):
        r3_reward(letters, input_range=(1.0, 1.0))
    with pytest.raises(InputError, match="max_length"):
        r3_reward(letters, max_length=0)
    with pytest.raises(InputError, match="at least one factor"):
        Reward.product()
    with pytest.raises(InputError, match="1 parts came with 2 weights"):
        Reward.sum(LengthIncentive(), weights=[1, 2])
    with pytest.raises(InputError, match="needs a positive one"):
        relevance_range(lambda batch: [[0.0]] * len(batch), TEXTS)


@pytest.mark.parametrize("response", [None, 3, b"bytes", ["a"]])
def test_a_response_that_is_not_a_str_is_an_error(response: object) -> None:
    with pytest.raises(QuantityError, match="response must be a str, and that of answer 1"):
        LengthIncentive()(response=["a", response])  # type: ignore[list-item]


def test_columns_that_do_not_fit_together_are_errors() -> None:
    with pytest.raises(QuantityError, match="differ in length"):
        Relevance(letters)(["a"], ["b", "c"])
    with pytest.raises(QuantityError, match="is one string"):
        LengthIncentive()(response="abc")
    with pytest.raises(QuantityError, match="reads 'query'"):
        Relevance(letters)(response=["a"])
    with pytest.raises(QuantityError, match="no answer in the batch"):
        LengthIncentive()(response=[])
    with pytest.raises(QuantityError, match="either records or columns"):
        LengthIncentive()([{"response": "a"}], ["b"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_names_the_factor_and_the_answer(value: float) -> None:
    def broken(response: list[str]) -> list[float]:
        return [1.0 if text == "a" else value for text in response]

    with pytest.raises(NonFiniteError, match=r"broken is (nan|inf) for 1 of 2 answers, the first is answer 1, 'b'"):
        Reward.product(broken, LengthIncentive())(["a", "b"])


def test_two_different_factors_of_one_name_are_refused_and_one_may_be_renamed() -> None:
    with pytest.raises(InputError, match="two different factors are called 'repetition_penalty'"):
        (RepetitionPenalty(n=2) * RepetitionPenalty())([CAT])
    found = (RepetitionPenalty(n=2).named("bigrams") * RepetitionPenalty()).explain([CAT])
    assert set(found.factors) == {"bigrams", "repetition_penalty"}


def test_a_probability_outside_its_range_is_an_error() -> None:
    with pytest.raises(QuantityError, match="probability in"):
        Toxicity(lambda batch: [1.5] * len(batch))(["a"])


# ---- oracle ---------------------------------------------------------------------------------------------------------


@pytest.mark.peer
def test_length_and_repetition_agree_with_nltk() -> None:
    nltk = pytest.importorskip("nltk", reason="nltk is not installed")
    samples = [CAT, "It's 3.5, no?", "a", "", "x_y z; z; z; z;", "mañana... 中文 mañana"]
    for text in samples:
        tokens = nltk.wordpunct_tokenize(text)
        grams = [" ".join(gram) for gram in nltk.ngrams(tokens, 3)]
        assert words(text) == tokens
        close(RepetitionPenalty(strip=None)([text]), [len(set(grams)) / len(grams) if grams else 1.0])
