from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def little_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a language model that has not learned anything: 2 layers, width 16, a letter a token."""
    transformers = pytest.importorskip("transformers", reason="needs the extra lm")
    import torch
    from tokenizers_by_hand import letters

    from poise.tasks.language import models

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=34, **shape))
    return models.save_language_model(model, letters(), tmp_path_factory.mktemp("lm") / "model")
