"""Texts for a language model as a task: splits, the model and its tokens, and how a trained model is measured."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from poise.cache import cache_folder
from poise.errors import InputError
from poise.frozen import FrozenModel
from poise.quantities import derive, random_numbers
from poise.readouts.language import AdapterOff, Reference
from poise.run import choose_device
from poise.tasks.language.measure import Pages, metrics, profile, sample, score
from poise.tasks.language.models import LanguageModel, add_lora, load_language_model, save_language_model, unpack_gguf
from poise.tasks.language.records import Records, Text, read_records
from poise.tasks.language.reference import store_reference
from poise.tasks.language.tokens import TokenizedRecords, tokenize
from poise.tasks.splits import check_fractions, group_split

if TYPE_CHECKING:
    from poise.run import Run

_PRIMARY = {"pairs": "preference_accuracy", "labelled": "label_accuracy", "answers": "nll", "texts": "nll"}
_METRICS = {
    "pairs": ("preference_accuracy", "margin", "chosen_shift", "nll", "kl", "length_bias"),
    "labelled": ("label_accuracy", "nll", "kl"),
    "answers": ("nll", "kl"),
    "texts": ("nll", "kl"),
}
_WATCHED = (64, 16)
"""Held-out records that the curves during training are taken on, of a small model and of a larger one."""
_SAMPLED = 8
"""Prompts that the trained model answers for the report."""
_REPLIES = 1500
"""Pairs of the embedded source."""
_SMALL = 10_000_000
"""Weights below which a model is tried out in minutes on a laptop's cores."""
_RATES = ((_SMALL, 2e-4), (2_000_000_000, 1e-5))
_SMALLEST_RATE, _ADAPTER = 1e-6, 10.0


@dataclass(frozen=True)
class LanguageTask:
    """Records of texts with everything that training needs.

    Attributes:
        records: all of them; `test_records` stand in a file of their own, or None.
        name, source, examples, fingerprint, notes, warnings: as of a `Task`.
        shares: of train, valid and test; records of one prompt stay together.
        lengths: `max_length`, `max_prompt_length`.
        reward: a program that knows what an answer is worth, where there is one.
    """

    name: str
    source: str
    records: Records
    shares: tuple[float, ...]
    fingerprint: str
    lengths: tuple[int | None, int | None] = (None, None)
    skip_bad: bool = False
    test_records: Records | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    reward: Callable[[Text, str], float] | None = field(default=None, compare=False)

    @property
    def classes(self) -> None:
        """Texts have none."""
        return

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Texts have none."""
        return ()

    @property
    def examples(self) -> int:
        """Records, without those of a test file."""
        return len(self.records)

    @property
    def target_type(self) -> str:
        """What the records are: "preference pairs", "labelled answers" or "answers"."""
        return {"pairs": "preference pairs", "labelled": "labelled answers"}.get(self.records.kind, "answers")

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Every metric, the primary one first."""
        return _METRICS[self.records.kind] + (("reward",) if self.reward is not None else ())

    @property
    def primary(self) -> str:
        """The metric that comparisons are about."""
        return _PRIMARY[self.records.kind]

    @property
    def direction(self) -> str:
        """Whether more ("max") or less ("min") of the primary metric is better."""
        return "min" if self.primary == "nll" else "max"

    def usual_batch(self, model: str) -> int:
        """Return the records of a step where nobody says: 16 below 10 million weights; else 8 on an accelerator, and 2 on a CPU, where a
        step of a larger model takes tens of seconds."""
        return 16 if self._small(model) else 8 if torch.accelerator.is_available() else 2

    def usual_threads(self, model: str) -> int:
        """Return the threads of a run where nobody says: one, or every core where the memory does not hold a run for each of them.

        A run needs about nine numbers a weight: the model, its reference, gradients, AdamW's two, and what a step uses meanwhile.
        """
        import psutil

        need, cores = 4 * 9 * _weights_of(self.folder(model)), os.cpu_count() or 1
        return 1 if need * (cores + 1) <= psutil.virtual_memory().available else cores

    def _small(self, model: str) -> bool:
        return _weights_of(self.folder(model)) < _SMALL

    @property
    def usual_epochs(self) -> tuple[int, int]:
        """Fewest and most epochs where nobody says: preference losses overfit in a few."""
        return 1, 3

    def usual_solver(self, model: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any], float]:
        """Return AdamW with a rate by the size of the model: 2e-4 below 10 million weights, 1e-5 below 2 billion, else 1e-6; an
        adapter learns at ten times the rate."""
        size = _weights_of(self.folder(model))
        rate = next((rate for most, rate in _RATES if size < most), _SMALLEST_RATE)
        return "adamw", {"weight_decay": 0.0}, rate * (_ADAPTER if options.get("lora") else 1.0)

    def choose_model(self, name: str) -> str:
        """Return the folder of the model, absolute; "auto" stays, and is the small model that comes with the embedded pairs.

        Raises:
            InputError: "auto" for the user's own texts.
        """
        if name != "auto":
            return str(Path(name).resolve())
        if self.reward is None:
            raise InputError(
                f"Give the folder of a causal language model to train on {self.source}: --model FOLDER (with config.json, safetensors and "
                "a tokenizer)."
            )
        return name

    def folder(self, name: str) -> str:
        """Return the folder that a model is loaded from.

        The small one is made first where it is not there (about a minute), and a GGUF file is unpacked once.
        """
        chosen = self.choose_model(name)
        if chosen.endswith(".gguf"):
            return str(unpack_gguf(chosen, _model_hash(chosen)))
        if chosen != "auto":
            return chosen
        from poise.tasks.language.tiny import tiny_folder

        return str(tiny_folder())

    def model_code(self, name: str) -> str:
        """Return the sha256 of a model's weights and configuration."""
        chosen = self.choose_model(name)
        return _model_hash(chosen if chosen != "auto" else self.folder(name))

    def split(self, seed: int) -> LanguageSplit:
        """Draw training, validation and test records; answers to one prompt stay together.

        Args:
            seed: any integer of at least 0.
        """
        rows = group_split(self.records.groups(), self.shares, derive(seed, "split"))
        test = self.records.select(rows.test) if self.test_records is None else self.test_records
        return LanguageSplit(self, self.records.select(rows.train), self.records.select(rows.valid), test, seed)

    def model(self, name: str = "auto", seed: int = 0) -> nn.Module:
        """Load a model; the seed decides nothing, as the weights are there already."""
        return self.load(self.folder(name)).model

    def load(self, folder: str, **options: Any) -> LanguageModel:
        """Load model and tokenizer; `options` as of `load_language_model`."""
        return load_language_model(folder, **options)

    def arguments(
        self,
        split: LanguageSplit,
        model: str,
        seed: int,
        device: str = "auto",
        **options: Any,
    ) -> dict[str, Any]:
        """Return what `poise.fit` is given beside the objective and the training settings.

        Args:
            split: of this task.
            model: the folder.
            seed: decides an adapter's start.
            device: where the model is put.
            options: `lora`, the rank of an adapter that is trained instead of all weights; `gradient_checkpointing`, to compute
                activations twice instead of keeping them; `reference`, "stored" to compute the reference's log-probabilities of the
                training answers once and keep them in the user's cache.
        """
        lora: int | None = options.get("lora")
        split.forget()
        folder = self.folder(model)
        loaded = self.load(folder, gradient_checkpointing=bool(options.get("gradient_checkpointing")))
        policy = loaded.model.to(choose_device(device))
        split.prepare(folder, loaded, watched=_WATCHED[not self._small(model)])
        if lora is not None:
            with random_numbers(seed):
                policy = add_lora(policy, lora)
        train = split.tokens("train")
        if options.get("reference") == "stored":
            train = store_reference(policy, train, cache_folder() / "references", name=self.model_code(model))
        # At the same shares of the run for every seed: the sizes of their training parts differ.
        small = self._small(model)
        return {
            "model": policy,
            "train": train,
            "evaluate": split.watch,
            "validate_every": 0.1 if small else 0.25,
            "log_every": 0.05 if small else 0.125,
        }


class LanguageSplit:
    """One draw of training, validation and test records.

    Attributes:
        train, valid, test: the records; those of one prompt stand in one part.
        warnings: what looks wrong, in words.
    """

    def __init__(self, task: LanguageTask, train: Records, valid: Records, test: Records, seed: int) -> None:
        self.task, self.train, self.valid, self.test, self.seed = task, train, valid, test, seed
        self._folder, self._tokenizer = "", None
        self._tokens: dict[str, TokenizedRecords] = {}
        self._start: dict[str, Pages] = {}
        self._latest: tuple[Run, str, tuple[Pages, Pages]] | None = None
        self.warnings: list[str] = []

    @property
    def sizes(self) -> dict[str, int]:
        """Records of each part."""
        return {name: len(part) for name, part in self._parts().items()}

    def few(self, rows: int) -> LanguageSplit:
        """Return the same split with only the first records of each part, two at most: a step of a language model takes long."""
        parts = {name: part.select(range(min(rows, len(part), 2))) for name, part in self._parts().items()}
        return LanguageSplit(self.task, **parts, seed=self.seed)

    def _parts(self) -> dict[str, Records]:
        return {"train": self.train, "valid": self.valid, "test": self.test}

    def prepare(self, folder: str, loaded: LanguageModel, watched: int = _WATCHED[0]) -> None:
        """Tokenise for a model, and score what the curves are taken on while the model is still what it starts as."""
        if self._folder == folder:
            return
        self._folder, self._tokenizer = folder, loaded.tokenizer
        longest, prompt = self.task.lengths
        few = self.valid.select(range(min(watched, len(self.valid))))
        for name, records in {**self._parts(), "watched": few}.items():
            self._tokens[name] = tokenize(
                records, loaded.tokenizer, max_length=longest, max_prompt_length=prompt, skip_bad=self.task.skip_bad
            )
        self.warnings = [f"{name}: {t.note}" for name, t in self._tokens.items() if name in self.sizes and t.cut]
        self._start = {"watched": score(loaded.model, self._tokens["watched"], _device(loaded.model))}

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the model that was prepared."""
        return self._tokenizer

    def save(self, run: Run, folder: str | os.PathLike[str]) -> Path:
        """Keep a trained model with its tokenizer in a new folder, so that plain transformers loads it."""
        return save_language_model(run.model, self._tokenizer, folder)

    def tokens(self, part: str) -> TokenizedRecords:
        """Return a part as tokens of the model that was prepared."""
        return self._tokens[part]

    def watch(self, model: nn.Module) -> dict[str, float]:
        """Measure a model in training on a few held-out records."""
        return metrics(
            score(model, self._tokens["watched"], _device(model)), self._start["watched"], self._labels("watched")
        )

    def _labels(self, part: str) -> Tensor | None:
        data = self._tokens[part]
        return torch.tensor([bool(r.label) for r in data.records.items]) if data.records.kind == "labelled" else None

    def measure(self, run: Run, part: str) -> dict[str, float]:
        """Return the metrics of a trained model on "train", "valid" or "test"."""
        now, start = self._pages(run, part)
        # What has no better direction is a curve (`watch`) and no metric.
        every = metrics(now, start, self._labels(part))
        found = {name: value for name, value in every.items() if name in self.task.metric_names}
        if self.task.reward is not None:
            found["reward"] = self._reward(run, part)
        return found

    def _pages(self, run: Run, part: str) -> tuple[Pages, Pages]:
        """Score a part under a trained model and under the one that it started as."""
        if self._latest is None or self._latest[0] is not run or self._latest[1] != part:
            self._latest = (run, part, self._score(run, part))
        return self._latest[2]

    def forget(self) -> None:
        """Let go of the model that was measured last."""
        self._latest = None

    def _score(self, run: Run, part: str) -> tuple[Pages, Pages]:
        device = _device(run.model)
        data = self._tokens[part]
        reference = self._reference(run.model, device)
        start = self._start.get(part)
        if start is None:
            start = self._start[part] = reference.run(lambda module: score(module, data, device))
        return score(run.model, data, device, reference), start

    def _reference(self, model: nn.Module, device: torch.device) -> Reference:
        """Return the model as it was before training."""
        if hasattr(model, "disable_adapter"):
            return AdapterOff(model)
        return FrozenModel(self.task.load(self._folder).model.to(device), copy_weights=False)

    def _answers(self, run: Run, part: str, most: int, draws: int = 1) -> list[tuple[int, str]]:
        data = self._tokens[part]
        rows = [row for row in range(min(most, len(data))) for _ in range(draws)]
        prompts = [data.prompt(row) for row in rows]
        device = _device(run.model)
        texts = sample(run.model, self._tokenizer, prompts, seed=derive(self.seed, "samples"), device=device)
        return list(zip(rows, texts, strict=True))

    def _reward(self, run: Run, part: str) -> float:
        """Return the mean true reward of sampled answers, four to each of 32 prompts at most."""
        assert self.task.reward is not None
        answers = self._answers(run, part, most=32, draws=4)
        records = self._tokens[part].records
        return float(
            torch.tensor([self.task.reward(records.items[row].prompt, text) for row, text in answers]).double().mean()
        )

    def details(self, run: Run) -> dict[str, Any]:
        """Return what the report's pages on alignment show: the depth of the change, lengths, sampled answers, tokens a second."""
        now, _ = self._pages(run, "test")
        data, first = self._tokens["test"], self._tokens["test"].sides[0]
        steps, values = profile(now, "kl")
        train = self._tokens["train"]
        found: dict[str, Any] = {
            "curves": {"depth/kl": (steps, values)},
            "tokens_per_example": float(train.lengths.double().mean()) * len(train.sides),
        }
        samples = self._answers(run, "test", _SAMPLED) if data.records.kind != "texts" else []
        found["samples"] = [
            {
                "prompt": _words(data.records.items[row].prompt),
                "given": _words(data.records.items[row].answers[first]),
                "answer": text,
            }
            for row, text in samples
        ]
        self.forget()
        return found


def load_language_task(
    source: str,
    *,
    split: Sequence[float] = (0.6, 0.2, 0.2),
    test_file: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    skip_bad: bool = False,
) -> LanguageTask:
    """Load texts as a task; see `poise.load_task`.

    Raises:
        InputError: nothing to train on, or records that need a loop of one's own.
    """
    shares = check_fractions(tuple(split), test_file is not None)
    records, reward = _read(source, skip_bad)
    if records.kind not in _PRIMARY:
        raise InputError(
            f"{source} holds {records.kind}, and a comparison trains on pairs, labelled answers, answers or texts. Scored answers and "
            "prompts are for training on samples: see poise.readouts.OnPolicy."
        )
    test = None if test_file is None else read_records(test_file, kind=records.kind, skip_bad=skip_bad)
    records = records.limit(limit)
    if len(records) < 3:
        raise InputError(f"{source} holds {len(records)} records, and each of three parts needs one.")
    chosen = {
        "split": list(shares),
        "limit": limit,
        "max_length": max_length,
        "max_prompt_length": max_prompt_length,
        "skip_bad": skip_bad,
    }
    content = json.dumps([records.content, None if test is None else test.content, chosen], sort_keys=True)
    notes = [records.note, *([f"{len(records)} records are used (limit)."] if limit is not None else [])]
    return LanguageTask(
        name=Path(source).name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json"),
        source=source,
        records=records,
        shares=shares,
        fingerprint=hashlib.sha256(content.encode()).hexdigest(),
        lengths=(max_length, max_prompt_length),
        skip_bad=skip_bad,
        test_records=test,
        notes=[note for note in notes if note],
        warnings=[text for text in (records.bad_in_words(), "" if test is None else test.bad_in_words()) if text],
        reward=reward,
    )


def _read(source: str, skip_bad: bool) -> tuple[Records, Callable[[Text, str], float] | None]:
    from poise.tasks.load import REPLIES

    if source != REPLIES:
        return read_records(source, skip_bad=skip_bad), None
    from poise.tasks.language.tiny import tiny_pairs, true_reward

    return tiny_pairs(_REPLIES), true_reward


def _words(text: Any) -> str:
    return text if isinstance(text, str) else "\n".join(f"{m['role']}: {m['content']}" for m in text)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


_OF_A_MODEL = (".safetensors", ".gguf", ".json", ".model")


def _files(model: str) -> list[Path]:
    """List what a model is made of: the files of its folder, or the one GGUF file."""
    place = Path(model)
    if place.is_file():
        return [place]
    return [p for p in sorted(place.iterdir()) if p.suffix in _OF_A_MODEL and p.is_file()] if place.is_dir() else []


@lru_cache(maxsize=8)
def _model_hash(model: str) -> str:
    """sha256 over weights, configuration and tokenizer."""
    digest = hashlib.sha256()
    for path in _files(model):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@lru_cache(maxsize=8)
def _weights_of(model: str) -> int:
    """Count the weights from the headers of the files; of a GGUF file its bytes stand for them."""
    from safetensors import safe_open

    total = 0
    for path in _files(model):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        elif path.suffix == ".gguf":
            total += path.stat().st_size
    return total
