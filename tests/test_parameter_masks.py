"""Masks over matrices: what counts as one, how many are trained, and which models are understood."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from poise.errors import InputError
from poise.parameter_masks import Matrices, ParameterMask, draw_mask, matrices_of


def llama_names(blocks: int, width: int = 4, kv: int = 4) -> dict[str, Tensor]:
    """The parameters of a Llama by name, as shapes."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (8, width)}
    for i in range(blocks):
        block = f"model.layers.{i}"
        for name, rows in (("q", width), ("k", kv), ("v", kv), ("o", width)):
            shapes[f"{block}.self_attn.{name}_proj.weight"] = (rows, width)
        for name in ("gate", "up", "down"):
            shapes[f"{block}.mlp.{name}_proj.weight"] = (width, 2 * width)
        shapes[f"{block}.input_layernorm.weight"] = shapes[f"{block}.post_attention_layernorm.weight"] = (width,)
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (8, width)}
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def trained(mask: ParameterMask, category: str) -> list[int]:
    """How many matrices of a category are trained in each block."""
    counts: dict[str, int] = {}
    assert mask.trained is not None
    for matrix in mask.matrices:
        if matrix.category == category:
            counts[matrix.block] = counts.get(matrix.block, 0) + (matrix.name in mask.trained)
    return list(counts.values())


@pytest.mark.parametrize(("blocks", "feed_forward"), [(4, [1, 1, 2, 2]), (5, [1, 1, 2, 2, 2]), (1, [2]), (2, [1, 2])])
def test_each_block_trains_two_of_attention_and_one_norm_and_half_the_blocks_one_feed_forward_matrix(
    blocks: int, feed_forward: list[int]
) -> None:
    for seed in range(5):
        mask = draw_mask(matrices_of(llama_names(blocks)), seed=seed)
        assert trained(mask, "attention") == [2] * blocks
        assert trained(mask, "norm") == [1] * blocks
        # An odd number of blocks: floor(L/2) of them train one and the rest two.
        assert sorted(trained(mask, "feed_forward")) == feed_forward
        for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
            assert mask[name] is True


@settings(max_examples=40, deadline=None)
@given(
    level=st.sampled_from(["category", "layer", "model", "element"]),
    ratio=st.floats(0.3, 0.7),
    seed=st.integers(0, 10**6),
    blocks=st.integers(3, 6),
)
def test_a_mask_and_its_complement_partition_what_is_drawn_from(
    level: str, ratio: float, seed: int, blocks: int
) -> None:
    matrices = matrices_of(llama_names(blocks))
    mask = draw_mask(matrices, level, ratio, seed)
    other = mask.complement()
    drawn = {piece.parameter for matrix in matrices for piece in matrix.pieces}
    for name, shape in matrices.shapes.items():
        ours, theirs = (torch.as_tensor(m[name]).expand(shape) for m in (mask, other))
        assert bool((ours ^ theirs).all()) if name in drawn else bool((ours & theirs).all())
    assert draw_mask(matrices, level, ratio, seed).digest() == mask.digest()
    assert draw_mask(matrices, level, ratio, seed + 1).digest() != mask.digest() or level == "layer"


@settings(max_examples=40, deadline=None)
@given(ratio=st.floats(0.2, 0.8), seed=st.integers(0, 1000), blocks=st.integers(2, 9))
def test_a_ratio_is_met_to_half_a_matrix_in_each_category(ratio: float, seed: int, blocks: int) -> None:
    report = draw_mask(matrices_of(llama_names(blocks)), ratio=ratio, seed=seed).report()
    for name in ("attention", "feed_forward", "norm"):
        count = report.categories[name]
        assert abs(count.matrices_trained - ratio * count.matrices) <= 0.5 + 1e-6


def test_with_grouped_queries_half_the_matrices_is_not_half_the_parameters_and_both_are_reported() -> None:
    matrices = matrices_of(llama_names(6, width=8, kv=2))
    shares = set()
    for seed in range(8):
        attention = draw_mask(matrices, seed=seed).report().categories["attention"]
        assert attention.matrices_trained * 2 == attention.matrices
        shares.add(attention.parameters_trained / attention.parameters)
        balanced = draw_mask(matrices, seed=seed, measure="parameters").report().categories["attention"]
        share = balanced.parameters_trained / balanced.parameters
        assert abs(share - 0.5) <= abs(attention.parameters_trained / attention.parameters - 0.5)
        assert abs(share - 0.5) < 0.05
    assert shares != {0.5}
    assert "attention" in str(draw_mask(matrices).report())


def test_the_layer_level_trains_whole_blocks_and_the_model_level_half_of_all_matrices() -> None:
    matrices = matrices_of(llama_names(4))
    mask = draw_mask(matrices, "layer")
    assert sorted(trained(mask, "attention")) == [0, 0, 4, 4]
    assert trained(mask, "attention") == [2 * n for n in trained(mask, "norm")]
    assert (
        sum(
            draw_mask(matrices, "model").report().categories[c].matrices_trained
            for c in ("attention", "feed_forward", "norm")
        )
        == 18
    )


def test_an_element_mask_trains_half_the_numbers_of_every_tensor() -> None:
    mask = draw_mask(matrices_of(llama_names(2)), "element", 0.25)
    assert int(torch.as_tensor(mask["model.layers.0.mlp.up_proj.weight"]).sum()) == 8
    assert mask.report().parameter_share == pytest.approx(0.25)


# ---- models ----------------------------------------------------------------------------------------------------------


def test_pytorch_s_own_layer_is_understood_its_fused_projection_as_three_matrices_of_rows() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    matrices = matrices_of(layer)
    assert [m.name for m in matrices if m.category == "attention"] == [
        "self_attn.in_proj[q]", "self_attn.in_proj[k]", "self_attn.in_proj[v]", "self_attn.out_proj",
    ]  # fmt: skip
    rows = [m.pieces[0].rows for m in matrices if m.name.startswith("self_attn.in_proj")]
    assert torch.equal(torch.cat([r for r in rows if r is not None]), torch.arange(24))
    report = draw_mask(matrices).report()
    assert [report.categories[c].matrices_trained for c in ("attention", "feed_forward", "norm")] == [2, 1, 1]


def transformers_model(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra 'lm')")
    small: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 32,
    }
    if kind == "GPT2":
        config = transformers.GPT2Config(
            vocab_size=32, n_embd=16, n_layer=2, n_head=4, n_positions=8, bos_token_id=0, eos_token_id=0
        )
        return transformers.GPT2LMHeadModel(config)
    if kind == "GPTNeoX":
        return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**small))
    if kind == "Phi3":
        return transformers.Phi3ForCausalLM(transformers.Phi3Config(**small, num_key_value_heads=1, pad_token_id=0))
    if kind == "Gemma2":
        return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**small, num_key_value_heads=1, head_dim=4))
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**small, num_key_value_heads=2, tie_word_embeddings=True)
    )


@pytest.mark.parametrize(
    ("kind", "counts"),
    [("Llama", (8, 6, 4)), ("Gemma2", (8, 6, 8)), ("GPT2", (8, 4, 4)), ("GPTNeoX", (8, 4, 4)), ("Phi3", (8, 6, 4))],
)
def test_the_names_of_transformers_models_are_understood(kind: str, counts: tuple[int, int, int]) -> None:
    model = transformers_model(kind)
    matrices = matrices_of(model)
    found = tuple(sum(m.category == c for m in matrices) for c in ("attention", "feed_forward", "norm"))
    assert found == counts
    # Each matrix's numbers, and what is always trained, make up the model: nothing is counted twice or lost.
    report = draw_mask(matrices).report()
    assert sum(c.parameters for c in report.categories.values()) == sum(p.numel() for p in model.parameters())
    assert report.matrix_share == 0.5


def test_gpt_neox_keeps_queries_head_by_head_and_gpt2_in_columns() -> None:
    neox = next(m for m in matrices_of(transformers_model("GPTNeoX")) if m.name.endswith("[k]"))
    rows = neox.pieces[0].rows
    assert rows is not None
    assert rows.tolist() == [4, 5, 6, 7, 16, 17, 18, 19, 28, 29, 30, 31, 40, 41, 42, 43]
    gpt2 = next(m for m in matrices_of(transformers_model("GPT2")) if m.name.endswith("[k]"))
    assert gpt2.pieces[0].axis == 1
    assert gpt2.pieces[0].rows is not None
    assert gpt2.pieces[0].rows.tolist() == list(range(16, 32))
    assert gpt2.pieces[1].axis == 0


def test_the_key_rows_of_a_fused_tensor_are_those_that_move_the_keys() -> None:
    model = transformers_model("GPTNeoX")
    matrix = next(m for m in matrices_of(model) if m.name.endswith("0.attention.query_key_value[v]"))
    attention = model.get_submodule("gpt_neox.layers.0.attention")
    x = torch.randn(1, 3, 16)
    seen = {}

    def look(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        q, k, v = output.view(1, 3, -1, 12).chunk(3, dim=-1)
        seen.update(q=q, k=k, v=v)

    fused = attention.get_submodule("query_key_value")
    handle = fused.register_forward_hook(look)
    fused(x)
    before = dict(seen)
    with torch.no_grad():
        fused.weight[matrix.pieces[0].rows] += 1.0
    fused(x)
    handle.remove()
    assert torch.equal(before["q"], seen["q"])
    assert torch.equal(before["k"], seen["k"])
    assert bool((before["v"] != seen["v"]).all())


def test_a_tied_embedding_is_one_tensor_and_always_trained() -> None:
    model = transformers_model("Llama")
    mask = draw_mask(matrices_of(model))
    assert mask["model.embed_tokens.weight"] is True
    assert "lm_head.weight" not in mask


def test_a_plain_network_gives_its_weights_at_the_model_level() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    assert [m.name for m in matrices_of(model, level="model")] == ["0", "2", "4"]
    own = matrices_of(model, {"hidden": ["0", "2"]})
    assert [(m.name, m.category, m.block) for m in own] == [("0", "hidden", "0"), ("2", "hidden", "2")]


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_bad_arguments_say_what_is_expected() -> None:
    matrices = matrices_of(llama_names(2))
    for ratio in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(InputError, match=r"ratio must be in \(0, 1\)"):
            draw_mask(matrices, ratio=ratio)
    with pytest.raises(InputError, match="level is one of"):
        draw_mask(matrices, "half")
    with pytest.raises(InputError, match="measure is"):
        draw_mask(matrices, measure="bytes")
    with pytest.raises(InputError, match="freezes all of the 18 matrices"):
        draw_mask(matrices, "layer", ratio=0.1)
    with pytest.raises(InputError, match=r"no category 'atention'\. Did you mean 'attention'"):
        matrices_of(llama_names(1), ["atention"])


def test_a_category_that_nothing_matches_is_named() -> None:
    with pytest.raises(InputError, match="no tensor matched the category 'experts'"):
        matrices_of(llama_names(1), {"experts": ["*.experts.*"]})
    with pytest.raises(InputError, match="no tensor matched attention or feed_forward"):
        matrices_of(nn.Linear(2, 2))


def test_a_tensor_tied_across_categories_is_refused() -> None:
    model = nn.ModuleDict(
        {"embed_tokens": nn.Embedding(4, 4), "layers": nn.ModuleList([nn.ModuleDict({"up_proj": nn.Linear(4, 4)})])}
    )
    block: Any = model["layers"]
    block[0]["up_proj"].weight = model["embed_tokens"].weight
    with pytest.raises(InputError, match=r"are one tensor, and they are of two categories \(embedding, feed_forward\)"):
        matrices_of(model)


def test_a_fused_tensor_of_unknown_layout_is_refused() -> None:
    with pytest.raises(InputError, match="the size of a head is not known"):
        matrices_of({"layers.0.attention.query_key_value.weight": torch.zeros(12, 4)})
    with pytest.raises(InputError, match="do not divide into 3 matrices"):
        matrices_of({"layers.0.attn.qkv_proj.weight": torch.zeros(13, 4)})


def test_matrices_are_a_sequence() -> None:
    matrices = matrices_of(llama_names(1))
    assert isinstance(matrices, Matrices)
    assert len(matrices) == 9
    assert matrices[0].size == 16
