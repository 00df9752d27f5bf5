"""Language models in folders: loaded, fitted with an adapter, and saved so that plain `transformers` loads them.

Nothing is fetched from a network, nothing is unpickled, and no code of a model's folder runs.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from poise.cache import cache_folder
from poise.errors import InputError, MissingDependencyError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ADAPTER = "adapter"
"""The folder, within that of a saved model, that holds the adapter it was merged with."""

_PURPOSE = "Training a language model"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


class LanguageModel(NamedTuple):
    """A causal language model and its tokenizer."""

    model: nn.Module
    tokenizer: Any


def load_language_model(
    folder: str | os.PathLike[str],
    *,
    dtype: str = "fp32",
    lora: int | Mapping[str, Any] | None = None,
    gradient_checkpointing: bool = False,
    gguf: str | None = None,
) -> LanguageModel:
    """Load a causal language model and its tokenizer from a folder.

    Args:
        folder: what `save_pretrained` wrote: config.json, safetensors, the tokenizer's files; or, with `gguf`, a folder with such a file.
        dtype: "fp32" or "bf16", of the weights. Weights in bf16 halve the memory and lose small updates; to compute in bf16 over weights
            in fp32 leave it and give `poise.fit(precision="bf16")`.
        lora: train an adapter of this rank on every linear layer but the output, scale 2, and freeze the rest; a mapping is handed to
            `peft.LoraConfig`. None trains all weights.
        gradient_checkpointing: compute each layer again in the backward pass instead of keeping its insides.
        gguf: the name of a GGUF file in the folder; its weights are unpacked to `dtype`.
    Returns:
        Model and tokenizer.
    Raises:
        InputError: the folder lacks a model or a tokenizer, holds pickled weights only, weights are missing or damaged, the tokenizer
            knows more tokens than the model, or the adapter leaves nothing to train.
        MissingDependencyError: `transformers`, `peft` or `gguf` is not installed.

        >>> model, tokenizer = load_language_model("my-lm", lora=8)  # doctest: +SKIP
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, and it is {dtype!r}.")
    _need("transformers", _PURPOSE)
    place = Path(folder)
    if place.suffix == ".gguf" and place.is_file():
        place, gguf = place.parent, place.name
    _check_folder(place, gguf)
    tokenizer = _tokenizer(place, gguf)
    model = _model(place, gguf, DTYPES[dtype])
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > int(rows):
        raise InputError(
            f"The tokenizer in {place} knows {len(tokenizer)} tokens, and the model has embeddings for {rows}. They do not belong together."
        )
    if lora is not None:
        model = add_lora(model, lora)
    if gradient_checkpointing:
        # The method was renamed along the way.
        name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    check_trainable(model)
    return LanguageModel(model, tokenizer)


def unpack_gguf(file: str | os.PathLike[str], name: str) -> Path:
    """Unpack a GGUF file into a folder of safetensors in the user's cache, once: reading the file itself takes minutes.

    Args:
        file: the GGUF file.
        name: what the folder is known by, such as the hash of the file.
    Returns:
        The folder, 4 bytes a weight.

        >>> folder = unpack_gguf("gemma.gguf", name="b1946ac9")  # doctest: +SKIP
    """
    return cached_model(f"gguf-{name[:16]}", lambda: load_language_model(file))


def cached_model(name: str, make: Callable[[], LanguageModel]) -> Path:
    """Return the folder of this name in the user's cache; a model that is not there yet is made and saved, whole or not at all."""
    place = cache_folder() / "models" / name
    if not (place / "config.json").is_file():
        model, tokenizer = make()
        place.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=place.parent))
        try:
            save_language_model(model, tokenizer, made / "lm")
            (made / "lm").replace(place)
        except OSError:
            # Another process was first; its folder holds the same.
            if not (place / "config.json").is_file():
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return place


def add_lora(model: nn.Module, lora: int | Mapping[str, Any]) -> nn.Module:
    """Freeze a model and give it a low-rank adapter to train.

    Args:
        model: a causal language model of `transformers`.
        lora: the rank, or arguments of `peft.LoraConfig`; what they leave out is: rank 8, alpha twice the rank, every linear layer but the
            output.
    Raises:
        InputError: `peft` refuses the arguments, or nothing is left to train.

        >>> model = add_lora(model, {"r": 16, "target_modules": ["q_proj", "v_proj"]})  # doctest: +SKIP
    """
    peft = _need("peft", "Training an adapter (LoRA)")
    asked = {"r": lora} if isinstance(lora, int) else dict(lora)
    rank = asked.get("r", 8)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InputError(f"lora: the rank must be a whole number from 1, and it is {rank!r}.")
    settings = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **asked}
    try:
        adapted: nn.Module = peft.get_peft_model(model, peft.LoraConfig(**settings))
    except (ValueError, TypeError) as error:
        raise InputError(f"lora: peft refuses {settings}: {error}") from error
    check_trainable(adapted)
    return adapted


def check_trainable(model: nn.Module) -> None:
    """Raise InputError where nothing of a model would be trained, as with an adapter for inference only."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(
            "Nothing of the model can be trained: all its parameters are frozen. Give the adapter layers to train (target_modules, without "
            "inference_mode), or unfreeze some."
        )


def check_vocabularies(policy: LanguageModel, reference: LanguageModel) -> None:
    """Raise InputError where a policy and its reference do not speak of the same tokens."""
    sizes = [int(one.model.get_output_embeddings().weight.shape[0]) for one in (policy, reference)]  # type: ignore[operator]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"The vocabularies differ: the policy gives probabilities to {sizes[0]} tokens, the reference to "
            f"{sizes[1]}. Use a reference of the same family."
        )
    ours, theirs = policy.tokenizer.get_vocab(), reference.tokenizer.get_vocab()
    if ours != theirs:
        different = next((word for word in sorted(ours | theirs) if ours.get(word) != theirs.get(word)), "")
        raise InputError(
            f"The vocabularies differ: {different!r} is token {ours.get(different)} of the policy and {theirs.get(different)} of the "
            "reference. Use a reference of the same family."
        )


def save_language_model(
    model: nn.Module, tokenizer: Any, folder: str | os.PathLike[str], *, overwrite: bool = False
) -> Path:
    """Save a model so that `transformers.AutoModelForCausalLM.from_pretrained(folder)` loads it.

    An adapter is merged into a copy of the weights (the model itself stays as it is), and saved beside them in `adapter/`.

    Args:
        model: a causal language model of `transformers`, or a `peft` model around one.
        tokenizer: its tokenizer.
        folder: a folder that is new or empty; it is complete or not there at all.
        overwrite: replace a model that the folder holds.
    Returns:
        The folder.
    Raises:
        InputError: the folder holds something already.

        >>> save_language_model(model, tokenizer, "aligned")  # doctest: +SKIP
    """
    place = Path(folder)
    if place.exists() and (not place.is_dir() or any(place.iterdir())) and not overwrite:
        raise InputError(f"{place} is not empty. Give a new folder, or pass overwrite=True to replace the model in it.")
    place.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    try:
        made.chmod(0o755)
        if hasattr(model, "merge_and_unload"):
            model.save_pretrained(str(made / ADAPTER))  # type: ignore[operator]
            # A card that names the folder of this run is of no use to anybody else.
            (made / ADAPTER / "README.md").unlink(missing_ok=True)
            model = copy.deepcopy(model).merge_and_unload(safe_merge=True)  # type: ignore[operator]
        with _without_bars():
            model.save_pretrained(str(made))  # type: ignore[operator]
        tokenizer.save_pretrained(str(made))
        _put(made, place)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return place


def _put(made: Path, place: Path) -> None:
    if place.is_dir() and any(place.iterdir()):
        shutil.rmtree(place / ADAPTER, ignore_errors=True)
        for old in (path for pattern in _WEIGHTS for path in place.glob(pattern)):
            old.unlink()
        for new in made.iterdir():
            os.replace(new, place / new.name)
        return
    if place.is_dir():
        place.rmdir()
    os.replace(made, place)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Load and save without the library's progress bars; Poise draws its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _need(library: str, purpose: str) -> Any:
    import importlib

    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise MissingDependencyError(library, "lm", purpose) from error


def _check_folder(place: Path, gguf: str | None) -> None:
    if not place.is_dir():
        raise InputError(
            f"{place} is not a folder. Give the folder of a causal language model with config.json, safetensors and a tokenizer."
        )
    if gguf is not None:
        if not (place / gguf).is_file():
            there = ", ".join(sorted(p.name for p in place.glob("*.gguf"))) or "none"
            raise InputError(f"{place} has no file {gguf!r}; GGUF files there: {there}.")
        _need("gguf", "Reading a GGUF file")
        return
    if not (place / "config.json").is_file():
        raise InputError(f"{place} holds no language model: config.json is missing.{_what_it_is(place)}")
    if not any(place.glob("*.safetensors")):
        if any(path for pattern in _PICKLED for path in place.glob(pattern)):
            raise InputError(
                f"The weights in {place} are pickled, and unpickling can run any code. Save them as safetensors: load them where you "
                "trust them and call model.save_pretrained(folder)."
            )
        raise InputError(f"{place} has no weights: there is no *.safetensors file.{_what_it_is(place)}")
    if not any((place / name).is_file() for name in _TOKENIZER):
        raise InputError(
            f"{place} has no tokenizer: expected one of {', '.join(_TOKENIZER)}. Save it there with tokenizer.save_pretrained(folder)."
        )


def _what_it_is(place: Path) -> str:
    if (place / "adapter_config.json").is_file():
        return " It is an adapter: merge it into its model (merge_and_unload) and give the folder of that."
    files = sorted(path.name for path in place.glob("*.gguf"))
    return f" For a GGUF file pass gguf={files[0]!r}." if files else ""


def _tokenizer(place: Path, gguf: str | None) -> Any:
    from transformers import AutoTokenizer

    more = {"gguf_file": gguf} if gguf else {}
    try:
        return AutoTokenizer.from_pretrained(str(place), local_files_only=True, trust_remote_code=False, **more)
    except Exception as error:  # whatever the library raises for a folder that it cannot read
        raise InputError(f"The tokenizer in {place} cannot be loaded: {_first_line(error)}") from error


def _model(place: Path, gguf: str | None, dtype: torch.dtype) -> Any:
    import transformers

    # The argument was renamed along the way.
    named = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    more: dict[str, Any] = {"gguf_file": gguf} if gguf else {"use_safetensors": True}
    library: Any = transformers.AutoModelForCausalLM
    try:
        with _without_bars():
            model, info = library.from_pretrained(
                str(place),
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **{named: dtype},
                **more,
            )
    except Exception as error:  # whatever the library raises for a folder that it cannot read
        raise InputError(f"The model in {place} cannot be loaded: {_first_line(error)}") from error
    if gguf is not None:
        # The weights are unpacked and plain now; what the library remembers of their packing would forbid saving them.
        model.hf_quantizer = None
        if getattr(model.config, "quantization_config", None) is not None:
            del model.config.quantization_config
    absent = sorted(info["missing_keys"])
    if absent:
        raise InputError(
            f"The weights in {place} are not whole: {len(absent)} are missing, the first is {absent[0]}. The folder may be of another "
            "kind of model, or damaged."
        )
    return model


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
