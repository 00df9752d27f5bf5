"""Texts as a task: from a file to a measured, saved language model, in Python and from the command."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import poise
from poise.cli import app
from poise.errors import InputError
from poise.tasks.language.measure import Pages, metrics
from poise.tasks.language.task import LanguageTask

pytest.importorskip("transformers", reason="needs the extra lm")


def pairs(n: int = 24) -> list[dict[str, str]]:
    """A chosen answer begins with the letter that the prompt asks for."""
    rng = random.Random(0)
    letters = "abcdefgh"
    rows = []
    for number in range(n):
        asked, other = rng.sample(letters, 2)
        prompt = f"say {asked} {'x' * (number % 5)}{number % 7 * 'y'}{chr(105 + number % 17)} "
        rows.append({"prompt": prompt, "chosen": asked * 3, "rejected": other * (2 + number % 2)})
    return rows


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", pairs())


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_pairs_are_split_by_prompt_anew_for_each_seed(file: Path) -> None:
    task = poise.load_task(file)
    assert isinstance(task, LanguageTask)
    assert (task.target_type, task.primary, task.direction, task.examples) == (
        "preference pairs",
        "preference_accuracy",
        "max",
        24,
    )
    one, again, other = task.split(0), task.split(0), task.split(1)
    assert one.sizes == {"train": 14, "valid": 5, "test": 5}
    assert [r.line for r in one.train.items] == [r.line for r in again.train.items]
    assert [r.line for r in one.train.items] != [r.line for r in other.train.items]
    prompts = [{r.prompt for r in part.items} for part in (one.train, one.valid, one.test)]
    assert not prompts[0] & prompts[1]
    assert not (prompts[0] | prompts[1]) & prompts[2]


def test_training_by_the_task_learns_the_pairs_and_measures_them_against_the_start(
    file: Path, little_lm: Path, tmp_path: Path
) -> None:
    task = poise.load_task(file)
    split = task.split(0)
    run = poise.fit(
        objective="dpo(beta=1.0) + 0.1*sft",
        **task.arguments(split, str(little_lm), seed=0),
        solver="adamw",
        lr=1e-2,
        steps=40,
        batch_size=14,
    )
    found = split.measure(run, "train")
    assert set(found) == set(task.metric_names)
    assert found["preference_accuracy"] == 1.0
    assert found["margin"] > 1
    assert found["kl"] > 0
    assert len(run.history["valid/margin"]) == 10
    details = split.details(run)
    assert [len(s) for s in details["samples"]] == [3] * 5
    assert details["curves"]["depth/kl"][0][0] == 1
    saved = split.save(run, tmp_path / "aligned")
    import transformers

    again = transformers.AutoModelForCausalLM.from_pretrained(saved)
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(again(ids).logits, run.model(ids).logits)
    with pytest.raises(InputError, match="not empty"):
        split.save(run, saved)


def test_an_untrained_model_has_moved_nowhere(file: Path, little_lm: Path) -> None:
    task = poise.load_task(file)
    split = task.split(0)
    run = poise.fit(objective="sft", **task.arguments(split, str(little_lm), seed=0), steps=0)
    found = split.measure(run, "test")
    assert found["preference_accuracy"] == 0.5
    assert (found["margin"], found["chosen_shift"], found["length_bias"]) == (0.0, 0.0, 0.0)
    assert found["kl"] == pytest.approx(0.0, abs=1e-6)


def test_an_adapter_is_its_own_reference_and_is_merged_when_it_is_saved(
    file: Path, little_lm: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft", reason="needs the extra lm")
    task = poise.load_task(file)
    split = task.split(0)
    run = poise.fit(
        objective="dpo(beta=1.0)",
        **task.arguments(split, str(little_lm), seed=0, lora=2),
        solver="adamw",
        lr=3e-2,
        steps=10,
        batch_size=14,
    )
    assert split.measure(run, "train")["margin"] > 0
    saved = split.save(run, tmp_path / "aligned")
    assert (saved / "adapter").is_dir()


def test_metrics_by_hand() -> None:
    def page(chosen: list[float], rejected: list[float], lengths: tuple[list[int], list[int]]) -> Pages:
        double = lambda values: torch.tensor(values, dtype=torch.float64)  # noqa: E731
        return Pages(
            {"chosen": double(chosen), "rejected": double(rejected)},
            {"chosen": torch.tensor(lengths[0]), "rejected": torch.tensor(lengths[1])},
        )

    lengths = ([4, 2, 3], [3, 2, 5])
    found = metrics(page([-4, -5, -6], [-9, -5, -3], lengths), page([-5, -5, -5], [-8, -5, -5], lengths))
    # Margins over the start: (1 - -1), (0 - 0), (-1 - 2).
    assert found["preference_accuracy"] == 0.5
    assert found["margin"] == pytest.approx(-1 / 3)
    assert found["chosen_shift"] == 0.0
    assert found["rejected_shift"] == pytest.approx(1 / 3)
    assert found["nll"] == pytest.approx(15 / 9)
    # Margins 2, 0, -3 against differences of length 1, 0, -2: they rise together.
    assert found["length_bias"] == pytest.approx(69 / (114 * 42) ** 0.5)


def test_labelled_answers_train_by_kto_and_are_measured_by_their_labels(little_lm: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": r["prompt"], "response": r[side], "label": side == "chosen"}
        for r in pairs(12)
        for side in ("chosen", "rejected")
    ]
    task = poise.load_task(write(tmp_path / "labels.jsonl", rows))
    split = task.split(0)
    run = poise.fit(
        objective="kto(beta=1.0)",
        **task.arguments(split, str(little_lm), seed=0),
        solver="adamw",
        lr=1e-2,
        steps=30,
        batch_size=16,
    )
    found = split.measure(run, "train")
    assert set(found) == {"label_accuracy", "nll", "kl"}
    assert found["label_accuracy"] > 0.8


def test_compare_ends_in_a_report_with_the_alignment_section(file: Path, little_lm: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = command(
        "compare", file, "dpo", "dpo + 0.2*sft", "--model", little_lm, "--steps", 4, "--seeds", 2, "--workers", 1, "--lr", 0.01,
        "--batch-size", 4, "--device", "cpu", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "preference accuracy" in result.stdout
    page = (out / "report.html").read_text()
    for text in (
        'id="alignment"',
        "Chosen answers",
        "Divergence from the start by position",
        "What the models answer",
        "Tokens of training",
    ):
        assert text in page, text
    lines = result.stdout[result.stdout.index("    import poise") : result.stdout.index("How to read")]
    assert "task.arguments(split" in lines
    # The lines to paste run, and measure what the study measured.
    code = (
        "\n".join(line[4:] for line in lines.splitlines())
        .replace("'aligned'", repr(str(tmp_path / "pasted")))
        .replace('"aligned"', repr(str(tmp_path / "pasted")))
    )
    namespace: dict[str, object] = {}
    exec(compile(code.replace("print(", "found = ("), "pasted", "exec"), namespace)
    stored = poise.Study.open(out).formulas[0].seeds[0].metrics
    assert namespace["found"] == pytest.approx(stored)
    assert (tmp_path / "pasted" / "config.json").is_file()


def test_texts_that_try_to_break_out_of_the_report_stay_texts(little_lm: Path, tmp_path: Path) -> None:
    bad = "<script>alert(1)</script></table>{{ 7*7 }}"
    rows = [{"prompt": f"say {n} {chr(97 + n)}", "chosen": f"{bad} a", "rejected": "b"} for n in range(8)]
    result = command(
        "compare", write(tmp_path / "p.jsonl", rows), "dpo", "sft", "--model", little_lm, "--steps", 1, "--seeds", 2, "--workers", 1,
        "--batch-size", 2, "--device", "cpu", "--out", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "{{ 7*7 }}" in page


def test_align_trains_one_formula_and_saves_what_transformers_loads(
    file: Path, little_lm: Path, tmp_path: Path
) -> None:
    out = tmp_path / "aligned"
    options = ("--model", little_lm, "--steps", 3, "--batch-size", 4, "--device", "cpu", "--threads", 1)
    result = command("align", file, "dpo + 0.2*sft", "--save", out, *options)
    assert result.exit_code == 0, result.output
    assert "AutoModelForCausalLM.from_pretrained" in result.stdout
    import transformers

    transformers.AutoModelForCausalLM.from_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(out)
    assert not list(tmp_path.glob("*.checkpoints"))
    again = command("align", file, "dpo", "--save", out, *options)
    assert again.exit_code == 2
    assert "holds a model already" in again.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--label", "x"), "for tables and images"),
        ((), "Give the folder of a causal language model"),
        (("--model", "nowhere"), "is not a folder"),
        (("--model", "LM", "--max-length", "1"), "max_length"),
        (("--model", "LM", "--lora", "0"), "lora"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(
    file: Path, little_lm: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    given = [little_lm if a == "LM" else a for a in arguments]
    result = command("compare", file, "dpo", "sft", "--seeds", 2, "--steps", 1, "--out", tmp_path / "out", *given)
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.output.split())


def test_bad_records_are_named_by_line_or_counted(little_lm: Path, tmp_path: Path) -> None:
    rows = [*pairs(9), {"prompt": "say a ", "chosen": "same", "rejected": "same"}]
    path = write(tmp_path / "bad.jsonl", rows)
    with pytest.raises(InputError, match=r"bad\.jsonl, line 10"):
        poise.load_task(path)
    task = poise.load_task(path, skip_bad=True)
    assert task.examples == 9
    assert "1 bad record was left out" in task.warnings[0]


def test_scored_answers_and_prompts_point_to_training_on_samples(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.jsonl", [{"prompt": f"say {n}"} for n in range(5)])
    with pytest.raises(InputError, match="training on samples"):
        poise.load_task(path)
