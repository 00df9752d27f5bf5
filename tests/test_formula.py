"""The formula language: what is read, what is printed, and what is refused without being run."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import poise
from poise.coefficient import Clock
from poise.errors import FormulaError, PoiseError
from poise.objective import Objective, Term
from poise.weights.constraint import DualWeight

NUMBERS = st.one_of(st.integers(1, 50), st.floats(1e-6, 1e6, allow_nan=False).map(lambda x: float(f"{x:.4g}")))
TERMS = st.sampled_from(
    ["cross_entropy", "l2", "l1(biases=True)", "huber(delta=0.5)", "mixup(a=0.7)", "kl.on('anchor')", "focal.named('hard')",
     "kl.on('anchor', teacher_logits='other').named('k')", "label_smoothing(epsilon=0.05)", "early_learning(beta=0.9)"]
)  # fmt: skip
SCHEDULES = st.sampled_from(
    ["linear(0, 1, steps=500)", "cosine(1, 0.1)", "exponential(1, 0.01, epochs=5)", "rampup(3, steps=100, after=10)",
     "piecewise((0, 1), (100, 0.5))", "auto", "auto('a', low=0.1, high=10)", "progress", "step"]
)  # fmt: skip


def weights() -> st.SearchStrategy[str]:
    leaf = st.one_of(NUMBERS.map(str), SCHEDULES)
    return st.recursive(
        leaf,
        lambda inner: st.tuples(inner, st.sampled_from(["+", "-", "*"]), inner).map(
            lambda t: f"({t[0]} {t[1]} {t[2]})"
        ),
        max_leaves=3,
    )


def formulas() -> st.SearchStrategy[str]:
    single = st.one_of(TERMS, st.tuples(weights(), TERMS).map(lambda t: f"{t[0]}*{t[1]}"))
    limited = st.tuples(st.lists(single, min_size=1, max_size=2), NUMBERS).map(
        lambda t: f"constraint({' + '.join(t[0])}, upper={t[1]})"
    )
    part = st.one_of(single, single, limited, st.tuples(NUMBERS, limited).map(lambda t: f"{t[0]}*{t[1]}"))
    return st.lists(st.tuples(st.sampled_from([" + ", " - "]), part), min_size=1, max_size=4).map(
        lambda parts: parts[0][1] + "".join(sign + part for sign, part in parts[1:])
    )


@settings(max_examples=200, deadline=None)
@given(formulas())
def test_printing_and_parsing_again_gives_an_equal_objective(formula: str) -> None:
    objective = poise.parse(formula)
    again = poise.parse(str(objective))
    assert again.equals(objective)
    assert str(again) == str(objective)
    clock = Clock(step=7, steps=100, steps_per_epoch=10)
    for left, right in zip(objective.summands, again.summands, strict=True):
        if not objective.autos:
            a, b = (w.value(clock) if hasattr(w, "value") else w for w in (left.weight, right.weight))
            assert float(a) == pytest.approx(float(b), rel=1e-12)


@pytest.mark.parametrize(
    ("formula", "printed"),
    [
        ("cross_entropy+3*early_learning", "cross_entropy + 3*early_learning"),
        ("2*(cross_entropy + 0.5*l2)", "2*cross_entropy + l2"),
        ("cross_entropy - -l2", "cross_entropy + l2"),
        ("l2*0.5", "0.5*l2"),
        ("(1-a)*cross_entropy + a*kl where a = 0.25", "0.75*cross_entropy + 0.25*kl"),
        ("a*l2 where a = auto", "auto('a')*l2"),
        ("label_smoothing(epsilon=0.1)", "label_smoothing"),
        ("2*linear(0, 1, steps=5)*l2", "2*linear(0, 1, steps=5)*l2"),
        ("cross_entropy.on('anchor', logits='student')", "cross_entropy.on('anchor', logits='student')"),
        (
            "cross_entropy + a*l2 with compand( learn = True) where a = 2",
            "cross_entropy + 2*l2 with compand(learn=True)",
        ),
    ],
)
def test_formulas_print_in_one_form(formula: str, printed: str) -> None:
    assert str(poise.parse(formula)) == printed


def test_bound_names_may_be_given_in_python() -> None:
    objective = poise.parse("(1-a)*cross_entropy + a*mine", a=poise.linear(0, 1, steps=10), mine=poise.parse("l2"))
    assert objective.labels == ("cross_entropy", "l2")
    assert objective.summands[0].weight.value(Clock(step=5)) == 0.5


def test_a_constraint_on_a_sum_shares_one_multiplier() -> None:
    objective = poise.parse("cross_entropy + constraint(l1 + 0.5*l2, upper=0.5)")
    duals = [s.weight for s in objective.summands if isinstance(s.weight, DualWeight)]
    assert duals[0].module is duals[1].module
    assert len(objective.coefficients) == 1


def test_resolving_auto_weights_by_name() -> None:
    objective = poise.parse("cross_entropy + auto*l2 + a*l1 + (1-a)*kl where a = auto")
    assert sorted(objective.autos) == ["a", "l2"]
    assert str(objective.resolve({"a": 0.25, "l2": 3})) == "cross_entropy + 3*l2 + 0.25*l1 + 0.75*kl"
    with pytest.raises(PoiseError, match="Did you mean 'l2'"):
        objective.resolve({"l22": 1})


def test_taking_a_term_out_leaves_the_other_weights() -> None:
    objective = poise.parse("cross_entropy + 3*l2 + 0.5*l1")
    assert str(objective.without("l2")) == "cross_entropy + 0.5*l1"
    with pytest.raises(PoiseError, match="Did you mean 'l2'"):
        objective.without("l3")


class OwnTerm(Term):
    """Charge the mean logit."""

    formula = "own_term_of_a_user"

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, logits):
        return self.scale * logits.mean(-1)


def test_a_term_that_a_user_defines_is_known_to_formulas() -> None:
    assert str(poise.parse("2*own_term_of_a_user(scale=3)")) == "2*own_term_of_a_user(scale=3)"


def test_what_is_no_literal_prints_so_that_it_is_refused() -> None:
    class Hidden(Term):
        def forward(self, logits):
            return logits.mean(-1)

    assert str(1 * Hidden()) == "<Hidden>"
    with pytest.raises(FormulaError):
        poise.parse(str(1 * Hidden()))
    with pytest.raises(FormulaError):
        poise.parse(str(torch.ones(3) * Hidden()))


@pytest.mark.parametrize(
    ("formula", "words", "under"),
    [
        ("cross_entorpy + l2", ["'cross_entorpy'", "Did you mean 'cross_entropy'"], 0),
        ("cross_entropy + l2(biasses=True)", ["'biasses'", "Did you mean 'biases'"], 16),
        ("cross_entropy + 3", ["cannot be added"], 16),
        ("l2*l1", ["cannot be multiplied"], 0),
        ("cross_entropy / 2", ["no division"], 16),
        ("cross_entropy ** 2", ["'+', '-' and '*'"], 17),
        ("huber(delta=-1)", ["delta must be positive"], 0),
        ("linear*l2", ["needs arguments", "linear(0, 1, steps=500)"], 0),
        ("linear(0, 1, step=5)*l2", ["'step'", "Did you mean 'steps'"], 0),
        ("linear(0)*l2", ["end"], 0),
        ("l2(True)", ["given by name"], 0),
        ("l2(biases=True, biases=False)", ["'biases'", "twice"], 23),
        ("cross_entropy.of('x')", [".on(", ".named("], 0),
        ("constraint(l2)", ["exactly one of"], 0),
        ("constraint(l2, upper=1, lower=0)", ["exactly one of"], 0),
        ("cross_entropy +", ["does not parse"], None),
        ("(cross_entropy", ["never closed"], 0),
        ("", ["empty"], None),
        ("3", ["a weight without a term"], None),
        ("x where x = l2", ["bound to a term"], None),
        ("1e999*l2", ["finite"], 0),
        ("auto(low=5, high=1)*l2", ["0 < low < high"], 0),
        ("[l2]", ["a list"], 0),
        ("l2 if l1 else l2", ["'if'"], 0),
        ("(lambda: l2)()", ["Only names can be called"], 0),
        ("l2(**l1)", ["by name"], 5),
        ("l2 with comapnd", ["'comapnd'", "Did you mean 'compand'"], None),
        ("l2 with compand(a=l2)", ["must be a number"], None),
    ],
)
def test_errors_point_at_the_place_and_name_the_nearest(formula: str, words: list[str], under: int | None) -> None:
    with pytest.raises(FormulaError) as error:
        poise.parse(formula)
    message = str(error.value)
    for word in words:
        assert word in message
    if under is not None:
        assert message.splitlines()[-1] == " " * (4 + under) + "^"


@pytest.mark.parametrize(
    "attack",
    [
        "__import__('os').system('touch /tmp/poise-was-here')",
        "(lambda: 0).__globals__",
        "open('/etc/passwd')",
        "cross_entropy.__class__.__mro__",
        "[x for x in ().__class__.__base__.__subclasses__()]",
        "l2(biases=exec('1'))",
        "f'{__import__(\"os\")}'",
        "(x := l2)",
        "l2 @ l1",
        "cross_entropy[0]",
        "b'l2'",
        "l2\x00",
        "\ud800",
        "(" * 500 + "l2" + ")" * 500,
        "-" * 2000 + "l2",
        "l2.named(" * 100 + "'x'" + ")" * 100,
        "9" * 5000 + "*l2",
        "l2" + "+l2" * 6000,
    ],
)
def test_nothing_is_ever_evaluated(attack: str) -> None:
    with pytest.raises(FormulaError):
        poise.parse(attack)


@settings(max_examples=400, deadline=None)
@given(st.text(alphabet="cros_entpyl12 +-*().,'=:0123456789auoi\n\t[]{}@#é", max_size=60))
def test_any_text_is_read_or_refused_with_a_formula_error(text: str) -> None:
    with contextlib.suppress(FormulaError):
        assert isinstance(poise.parse(text), Objective)


def test_a_sum_of_many_terms_is_no_deep_tree() -> None:
    formula = " + ".join(f"l2.named('t{i}')" for i in range(300))
    assert len(poise.parse(formula).labels) == 300


def test_explain_says_equation_reads_defaults_and_source() -> None:
    text = poise.explain("cross_entropy + 3*mixup")
    for word in (
        "-log softmax(logits)[target]",
        "reads    input, target, model",
        "a=0.2",
        "arXiv:1710.09412",
        "weight 3",
    ):
        assert word in text


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["linear", "cosine", "exponential"]),
    st.floats(0.1, 9),
    st.floats(0.1, 9),
    st.integers(1, 50),
    st.integers(0, 20),
)
def test_schedules_begin_at_start_end_at_end_and_stay_between(
    kind: str, start: float, end: float, steps: int, after: int
) -> None:
    schedule = getattr(poise, kind)(start, end, steps=steps, after=after)
    values = [schedule.value(Clock(step=s)) for s in range(after + steps + 5)]
    assert values[0] == pytest.approx(start)
    assert values[-1] == pytest.approx(end)
    assert all(min(start, end) - 1e-9 <= v <= max(start, end) + 1e-9 for v in values)
    assert values == sorted(values, reverse=start > end)


def test_a_schedule_without_a_length_needs_to_know_the_run() -> None:
    with pytest.raises(PoiseError, match=r"objective\.bind\(steps=\.\.\.\)"):
        poise.linear(0, 1).value(Clock())
    assert poise.linear(0, 1).value(Clock(step=50, steps=100)) == 0.5
    assert poise.rampup(2).value(Clock(step=0, steps=100)) == pytest.approx(2 * 0.0067379, rel=1e-4)


@pytest.mark.parametrize(
    ("formula", "words"),
    [
        ("constraint(3, upper=1)", "constraint"),
        ("rampup('x')*l2", "must be a number"),
        ("linear([1], 2)*l2", "must be a number"),
        ("l2.named('__class__')", "PyTorch"),
        ("l2.named('keys')", "PyTorch"),
        ("cross_entropy with \ud800", "forbidden"),
        ("focal(gamma=1" + "0" * 400 + ")", "digits|too large|focal"),
    ],
)
def test_what_fuzzing_found_is_refused_in_words(formula, words):
    with pytest.raises(poise.errors.PoiseError, match=words):
        str(poise.parse(formula))


def test_a_sum_of_nothing_keeps_its_parts():
    once = str(poise.parse("0*l2 with compand(learn=True)"))
    assert str(poise.parse(once)) == once
