"""Token weights from activations of a frozen transformers model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import poise
from poise.errors import IncompatibleError, InputError, QuantityError
from poise.frozen import FrozenModel
from poise.problem import ModelView
from poise.quantities import Quantities
from poise.readouts.language import Language
from poise.weights.activation_mask import TYPES, ActivationMask

transformers = pytest.importorskip("transformers", reason="needs the extra lm")


def model(kind: str = "llama", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=19, n_embd=16, n_layer=2, n_head=2, n_positions=32)
        ).eval()
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=19, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
    ).eval()


def batch() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for side, time in (("chosen", 8), ("rejected", 7)):
        found[f"{side}_ids"] = torch.randint(3, 19, (2, time), generator=g)
        mask = torch.ones(2, time, dtype=torch.bool)
        mask[:, :2] = False
        mask[1, -2:] = False
        found[f"{side}_mask"] = mask
        found[f"{side}_attention"] = torch.ones(2, time, dtype=torch.bool)
        found[f"{side}_attention"][1, -2:] = False
    return found


def test_one_activation_is_the_mean_over_features_one_token_earlier_brought_to_0_and_1() -> None:
    frozen, q = FrozenModel(model()), batch()
    kept: list[Tensor] = []
    hook = frozen.module.model.layers[1].mlp.register_forward_hook(lambda *a: kept.append(a[2]))
    found = ActivationMask(("mlp",), layers=(1,)).columns(frozen, q)["chosen_token_weight"]
    hook.remove()
    level = kept[0].mean(-1)[:, :-1]
    for row in range(2):
        own = level[row][q["chosen_mask"][row, 1:]]
        z = (own - own.mean()) / (own.std() + 1e-12)  # standardising first changes nothing
        expected = (z - z.min()) / (z.max() - z.min())
        torch.testing.assert_close(found[row][q["chosen_mask"][row]], expected, rtol=1e-4, atol=1e-5)
        assert expected.min() == 0
        assert expected.max() == 1
    assert (found[~q["chosen_mask"]] == 0).all()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_layers_are_averaged_within_types_and_then_types(kind: str) -> None:
    frozen, q = FrozenModel(model(kind)), batch()
    single = {
        (t, i): ActivationMask((t,), layers=(i,)).columns(frozen, q)["chosen_token_weight"]
        for t in ("mlp", "attention")
        for i in (0, 1)
    }
    both = ActivationMask(("mlp", "attention")).columns(frozen, q)["chosen_token_weight"]
    expected = torch.stack([(single[t, 0] + single[t, 1]) / 2 for t in ("mlp", "attention")]).mean(0)
    torch.testing.assert_close(both, expected)
    assert ((both >= 0) & (both <= 1)).all()


def test_every_type_is_found_in_models_that_have_it() -> None:
    llama = set(TYPES) - {"query_key_value"}
    gpt2 = set(TYPES) - {"query", "key", "value"}
    for kind, types in (("llama", llama), ("gpt2", gpt2)):
        found = ActivationMask(tuple(sorted(types))).modules(model(kind))
        assert set(found.values()) == types
    assert set(ActivationMask((r"up_proj$",)).modules(model()).values()) == {r"up_proj$"}


def test_over_a_readout_the_weights_serve_sparse_po_margins_and_divergences() -> None:
    policy, frozen, q = model(seed=1), FrozenModel(model()), batch()
    mask = ActivationMask()
    readout = mask.over(Language(frozen))
    objective = poise.parse(
        "sparse_po(mask_from='data') + preference_margin(token_weight='data') + 0.1*token_kl(token_weight=True)"
    )
    lazily = objective(readout(ModelView(policy), Quantities(dict(q)), objective.plan()))
    given = {**q, **mask.columns(frozen, q)}
    assert not given["chosen_token_weight"].requires_grad
    before = objective(Language(frozen)(ModelView(policy), Quantities(given), objective.plan()))
    torch.testing.assert_close(lazily, before)
    lazily.backward()


def test_fit_trains_the_mask_with_a_transformers_model() -> None:
    policy, q = model(seed=1), batch()
    objective = poise.parse("sparse_po(beta=1.0, layers=2, width=16) + 0.01*mask_l1.on(size='sparse_po.reward_size')")
    before = {k: v.clone() for k, v in objective.state_dict().items() if isinstance(v, Tensor)}
    run = poise.fit(policy, objective, q, solver="adamw", lr=1e-2, steps=3, batch_size=2, device="cpu")
    assert run.steps == 3
    after = objective.state_dict()
    moved = [k for k, v in before.items() if not torch.equal(v, after[k])]
    assert any("weight" in k for k in moved)
    assert any("mixer" in k for k in moved)


def test_padding_does_not_matter_and_an_answer_of_one_token_weighs_1() -> None:
    frozen, q = FrozenModel(model()), batch()
    mask = ActivationMask()
    wide = {k: nn.functional.pad(v, (0, 3)) for k, v in q.items()}
    one, two = (mask.columns(frozen, x)["chosen_token_weight"] for x in (q, wide))
    torch.testing.assert_close(one, two[:, :-3])
    q["chosen_mask"] = torch.zeros_like(q["chosen_mask"])
    q["chosen_mask"][:, 4] = True
    assert mask.columns(frozen, q)["chosen_token_weight"][:, 4].tolist() == [1, 1]


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(InputError, match="one at least"):
        ActivationMask(())
    with pytest.raises(InputError, match="pattern of module names"):
        ActivationMask(("mlp", "("))
    with pytest.raises(IncompatibleError, match="no module of this LlamaForCausalLM is of the type 'query_key_value'"):
        ActivationMask(("query_key_value",)).modules(model())
    with pytest.raises(IncompatibleError, match=r"in layers \[7\]"):
        ActivationMask(("mlp",), layers=(7,)).modules(model())
    with pytest.raises(IncompatibleError, match="has no reference"):
        ActivationMask().over(Language())
    q = batch()
    q["chosen_mask"][1] = False
    with pytest.raises(QuantityError, match="the answer of row 1 has no token"):
        ActivationMask().columns(FrozenModel(model()), q)
