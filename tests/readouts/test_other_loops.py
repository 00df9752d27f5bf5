"""The recipes of docs/other-loops.md run as they stand there, and equal poise.fit and TRL in value, gradient and weights."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import poise
from poise.errors import QuantityError
from poise.frozen import FrozenModel
from poise.problem import Problem
from poise.readouts import Language, batch_quantities, pairs_in_halves, read_in_forward, reference_for
from poise.tasks.language import make_records, tokenize

transformers = pytest.importorskip("transformers", reason="needs the extra lm")
from tasks.language.tokenizers_by_hand import letters  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "other-loops.md"
TOLERANCE = 1e-5  # relative, in float32
PAIRS = [
    {"prompt": "name a fruit", "chosen": " plum", "rejected": " fox"},
    {"prompt": "name an animal", "chosen": " the red fox", "rejected": " saw"},
    {"prompt": "count", "chosen": " one two three", "rejected": " pear and fig"},
    {"prompt": "what is hot", "chosen": " fire", "rejected": " ice is hot"},
]


def tiny_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=34, **shape))


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recipes]:
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("model")
    letters(pad="<p>").save_pretrained("model")
    Path("pairs.jsonl").write_text("\n".join(json.dumps(row) for row in PAIRS))
    made = Recipes()
    made.run("In other people's loops")
    yield made
    made["objective"]._live.unfollow()


class Recipes(dict[str, Any]):
    """The names that the examples of the page have defined so far."""

    def run(self, heading: str, **changes: str) -> None:
        """Run the examples under a heading, with some of their numbers changed."""
        text = PAGE.read_text(encoding="utf-8")
        section = re.split(r"^#+ ", text, flags=re.MULTILINE)
        (body,) = [part for part in section if part.startswith(heading + "\n")]
        for block in re.findall(r"^```py\n(.*?)^```", body, re.DOTALL | re.MULTILINE):
            for old, new in changes.items():
                assert f"{old}=" in block
                block = re.sub(rf"\b{old}=[^,)\n]+", f"{old}={new}", block)
            exec(compile(block, str(PAGE), "exec"), self)

    def batch(self) -> dict[str, Tensor]:
        pairs = self["pairs"]
        return pairs.collate([pairs[i] for i in range(len(pairs))])


def fitted(formula: str, recipes: Recipes, **options: Any) -> tuple[float, list[Tensor]]:
    """The loss of the first step of poise.fit, and the weights after it."""
    model = copy.deepcopy(recipes["model"])
    options = {"lr": 0.1, "batch_size": 4, **options}
    solver = torch.optim.SGD(model.parameters(), lr=options.pop("lr"))
    run = poise.fit(model, formula, recipes["pairs"], solver=solver, steps=1, **options)
    return run.history["loss"][0], [p.detach() for p in model.parameters()]


def moved(weights: Iterable[Tensor]) -> list[Tensor]:
    """How far the weights are from where they began."""
    return [a.detach() - b.detach() for a, b in zip(weights, tiny_model().parameters(), strict=True)]


# A step is a difference of weights near 0.02, which float32 holds to 2e-9.
STEP_TOLERANCE = 1e-4


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = TOLERANCE) -> None:
    largest = max(float(e.abs().max()) for e in expected)
    assert largest > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * largest)


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


# ---- the reading of a batch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("formula", ["dpo(beta=0.5) + 0.2*sft", "simpo", "tdpo(beta=0.1) + 0.1*token_kl", "orpo"])
def test_a_batch_read_in_any_loop_gives_the_loss_and_the_gradient_of_fit(recipes: Recipes, formula: str) -> None:
    objective, model = poise.parse(formula), tiny_model()
    expected, _ = fitted(formula, recipes)
    reference = FrozenModel(tiny_model())
    loss = objective(batch_quantities(model, recipes.batch(), objective, reference))
    assert loss.item() == pytest.approx(expected, rel=TOLERANCE)
    step = Problem(model, objective, [{"main": recipes.batch()}], Language(reference))
    assert_same(gradients(loss, model), list(step.gradient().values()))


def test_the_value_before_the_first_step_is_that_of_equal_models() -> None:
    model = tiny_model()
    objective = poise.parse("dpo")
    batch = {
        **{f"{s}_ids": torch.arange(3, 8).expand(2, 5) for s in ("chosen", "rejected")},
        **{f"{s}_mask": torch.ones(2, 5, dtype=torch.bool) for s in ("chosen", "rejected")},
    }
    found = batch_quantities(model, batch, objective, reference_for(model))
    assert objective(found).item() == pytest.approx(0.6931472)
    assert not found["reference_chosen_logps"].requires_grad
    with pytest.raises(QuantityError, match="there is none"):
        batch_quantities(model, batch, objective)


def test_answers_alone_have_the_likelihood_that_transformers_computes(recipes: Recipes) -> None:
    model, objective = tiny_model(), poise.parse("sft")
    rows = [{"prompt": row["prompt"], "response": row["chosen"]} for row in PAIRS]
    answers = tokenize(make_records(rows), recipes["tokenizer"])
    batch = answers.collate([answers[i] for i in range(len(answers))])
    ours = objective(batch_quantities(model, batch, objective))
    theirs = model(
        input_ids=batch["response_ids"],
        attention_mask=batch["response_attention"],
        labels=batch["response_ids"].masked_fill(~batch["response_mask"], -100),
    ).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=TOLERANCE)
    assert_same(gradients(ours, model), gradients(theirs, model))


def test_a_model_that_reads_in_forward_is_otherwise_the_same(recipes: Recipes) -> None:
    model, objective = tiny_model(), poise.parse("simpo")
    ids = torch.randint(3, 26, (1, 5))
    before = model(input_ids=ids).logits
    read_in_forward(model, objective)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert torch.equal(model(ids).logits, before)
    assert {*model.state_dict()} == {*tiny_model().state_dict()}
    other = copy.deepcopy(model)
    nn.init.zeros_(other.lm_head.weight)
    found = other(**recipes.batch())
    assert "chosen_logps" in found
    assert objective(found) != objective(model(**recipes.batch()))
    assert other(input_ids=ids).logits.abs().max() == 0


def test_rows_in_halves_are_named_by_side() -> None:
    rows = torch.arange(8).reshape(4, 2)
    masks = rows % 2
    found = pairs_in_halves(
        {"input_ids": rows, "attention_mask": masks, "completion_mask": masks, "ref_chosen_logps": torch.zeros(2)}
    )
    assert found["chosen_ids"].tolist() == [[0, 1], [2, 3]]
    assert found["rejected_ids"].tolist() == [[4, 5], [6, 7]]
    assert found["rejected_mask"].dtype == torch.bool
    assert "reference_chosen_logps" in found
    assert "reference_rejected_logps" not in found


# ---- the recipes ----------------------------------------------------------------------------------------------------


def test_a_loop_of_your_own(recipes: Recipes) -> None:
    expected, _ = fitted(str(recipes["objective"]), recipes)
    recipes.run("A loop of your own")
    assert recipes["loss"].item() == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize(("size", "steps"), [(4, 1), (2, 2)], ids=["one batch", "two micro-batches"])
def test_the_trainer_of_transformers_takes_the_step_of_fit(recipes: Recipes, size: int, steps: int) -> None:
    # A mean over tokens is exact in one batch alone; a schedule shows that the objective follows the optimiser.
    formula = "dpo(beta=0.5) + linear(0.2, 0)*sft(reduction='sequence_mean')"
    recipes["objective"] = poise.parse(formula)
    expected, weights = fitted(formula, recipes)
    recipes.run(
        "The Trainer of transformers: preference pairs",
        per_device_train_batch_size=str(size),
        gradient_accumulation_steps=str(steps),
        learning_rate="0.1, optim='sgd', lr_scheduler_type='constant', max_grad_norm=0.0, use_cpu=True, disable_tqdm=True",
    )
    (log,) = [entry for entry in recipes["trainer"].state.log_history if "loss" in entry]
    assert log["loss"] == pytest.approx(expected, rel=TOLERANCE)
    assert_same(moved(recipes["model"].parameters()), moved(weights), STEP_TOLERANCE)
    assert recipes["objective"].clock.step == 1
    assert recipes["objective"].clock.steps == 1


@pytest.mark.parametrize("steps", [1, 2])
def test_the_trainer_of_transformers_with_logits_and_labels_equals_its_own_loss(recipes: Recipes, steps: int) -> None:
    recipes.run("The Trainer of transformers: logits and labels")
    recipes["token_objective"] = poise.parse("cross_entropy")
    rows = [
        {"input_ids": torch.randint(3, 26, (6,)), "labels": torch.tensor([-100, -100, 5, 6, 7 if i else -100, 8])}
        for i in range(2)
    ]
    weights = []
    for loss in (recipes["token_loss"], None):
        model = tiny_model()
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                "trained", per_device_train_batch_size=2 // steps, gradient_accumulation_steps=steps, max_steps=1, optim="sgd",
                learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0, report_to="none", use_cpu=True,
                disable_tqdm=True, logging_steps=1,
            ),
            train_dataset=rows,
            compute_loss_func=loss,
        )  # fmt: skip
        trainer.train()
        weights.append(moved(model.parameters()))
    assert_same(*weights, STEP_TOLERANCE)


PAIRED = [
    ("dpo(beta=0.1)", "sigmoid", {}),
    ("dpo(beta=0.3, length_normalized=True)", "sigmoid_norm", {"beta": 0.3}),
    ("dpo(beta=0.3, divergence='js')", "sigmoid", {"beta": 0.3, "f_divergence_type": "js_divergence"}),
    ("robust_dpo(beta=0.2, label_smoothing=0.1)", "robust", {"beta": 0.2, "label_smoothing": 0.1}),
    ("ipo(beta=0.2, length_normalized=True)", "ipo", {"beta": 0.2}),
    ("slic(beta=0.2)", "hinge", {"beta": 0.2}),
    ("exo_pair(beta=0.2, label_smoothing=0.01)", "exo_pair", {"beta": 0.2, "label_smoothing": 0.01}),
    ("nca_pair(beta=0.2)", "nca_pair", {"beta": 0.2}),
    ("bco_pair(beta=0.2)", "bco_pair", {"beta": 0.2}),
    ("sppo_hard(beta=0.2)", "sppo_hard", {"beta": 0.2}),
    ("aot(beta=0.2)", "aot", {"beta": 0.2}),
    ("aot(beta=0.2, unpaired=True)", "aot_unpaired", {"beta": 0.2}),
    ("apo_zero(beta=0.2)", "apo_zero", {"beta": 0.2}),
    ("apo_down(beta=0.2)", "apo_down", {"beta": 0.2}),
    ("discopop(beta=0.2)", "discopop", {"beta": 0.2}),
    ("sft(on='chosen')", "sft", {}),
    ("dpo + 0.2*sft(on='chosen')", "sigmoid", {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}),
]


@pytest.fixture
def trl_trainer(recipes: Recipes, request: pytest.FixtureRequest) -> Any:
    trl = pytest.importorskip("trl", reason="needs the extra peers")
    datasets = pytest.importorskip("datasets", reason="needs the extra lm")
    recipes.run("TRL's DPOTrainer")
    options = getattr(request, "param", {})
    return recipes["ObjectiveTrainer"](
        tiny_model(0),
        ref_model=tiny_model(1),
        args=trl.DPOConfig(
            "trained", per_device_train_batch_size=4, max_steps=1, learning_rate=0.1, optim="sgd", max_grad_norm=0.0,
            lr_scheduler_type="constant", logging_steps=1, bf16=False, gradient_checkpointing=False, report_to="none",
            use_cpu=True, disable_tqdm=True, **options,
        ),
        train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=letters(pad="<p>"),
        objective="dpo(beta=0.1)",
    )  # fmt: skip


@pytest.mark.peer
def test_a_formula_in_the_dpo_trainer_equals_its_own_losses_in_value_and_gradient(trl_trainer: Any) -> None:
    trl = pytest.importorskip("trl")
    model = trl_trainer.model.train()
    batch = next(iter(trl_trainer.get_train_dataloader()))
    for formula, loss_type, settings in PAIRED:
        vars(trl_trainer).update(
            {"loss_types": [loss_type], "loss_weights": [1.0], "beta": 0.1, "label_smoothing": 0.0,
             "f_divergence_type": "reverse_kl", **settings}
        )  # fmt: skip
        theirs = trl.DPOTrainer.compute_loss(trl_trainer, model, batch)
        objective = poise.parse(formula)
        reference = FrozenModel(trl_trainer.ref_model, copy_weights=False)
        ours = objective(batch_quantities(model, pairs_in_halves(batch), objective, reference))
        assert ours.item() == pytest.approx(theirs.item(), rel=TOLERANCE), formula
        assert_same(gradients(ours, model), gradients(theirs, model))


@pytest.mark.peer
@pytest.mark.parametrize(
    "trl_trainer", [{}, {"precompute_ref_log_probs": True}], ids=["reference model", "stored reference"], indirect=True
)
def test_the_dpo_trainer_trains_on_a_formula(trl_trainer: Any) -> None:
    trl = pytest.importorskip("trl")
    batch = next(iter(trl_trainer.get_train_dataloader()))
    theirs = trl.DPOTrainer.compute_loss(trl_trainer, trl_trainer.model.train(), batch)
    expected = [-0.1 * g for g in gradients(theirs, trl_trainer.model)]
    trl_trainer.train()
    logged = [entry["loss"] for entry in trl_trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([theirs.item()], rel=TOLERANCE)
    assert_same(moved(trl_trainer.model.parameters()), expected, STEP_TOLERANCE)


def test_lightning_takes_the_step_of_fit(recipes: Recipes) -> None:
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed")
    formula = str(recipes["objective"])
    expected, weights = fitted(formula, recipes)
    recipes.run("Lightning")
    module = recipes["Aligned"](recipes["model"], recipes["objective"], recipes["reference"])
    sgd = torch.optim.SGD(module.model.parameters(), lr=0.1)
    module.configure_optimizers = lambda: (recipes["objective"].follow(sgd), sgd)[1]
    loader = torch.utils.data.DataLoader(recipes["pairs"], batch_size=4, collate_fn=recipes["pairs"].collate)
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    assert trainer.callback_metrics["loss"].item() == pytest.approx(expected, rel=TOLERANCE)
    assert_same(moved(recipes["model"].parameters()), moved(weights), STEP_TOLERANCE)
