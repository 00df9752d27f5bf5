"""The language readout's record equals that of full logits, on hand-made batches of tiny transformers models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from poise.errors import IncompatibleError, QuantityError
from poise.frozen import FrozenModel
from poise.problem import ModelView
from poise.quantities import Quantities
from poise.readouts.language import AdapterOff, Language, reference_for

transformers = pytest.importorskip("transformers", reason="needs the extra lm")
VOCABULARY, EOS, PAD = 19, 2, 0


def model(seed: int = 0, kind: str = "llama", **options: object) -> nn.Module:
    torch.manual_seed(seed)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=32,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        return transformers.GPT2LMHeadModel(config).double()
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    if kind == "gemma2":
        config = transformers.Gemma2Config(**shape, num_key_value_heads=1, head_dim=8, final_logit_softcapping=5.0)
        return transformers.Gemma2ForCausalLM(config).double()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **options)).double()


# Two pairs: prompts of 3 and 2 tokens, answers that end with EOS; padding on the right.
PAIRS = {
    "chosen_ids": torch.tensor([[1, 5, 6, 7, 8, EOS], [1, 9, 10, EOS, PAD, PAD]]),
    "chosen_mask": torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0]]).bool(),
    "chosen_attention": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool(),
    "rejected_ids": torch.tensor([[1, 5, 6, 11, EOS], [1, 9, 12, 13, EOS]]),
    "rejected_mask": torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]).bool(),
    "rejected_attention": torch.ones(2, 5).bool(),
}


def dense(module: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the tokens and of the whole vocabulary before each, from plain logits; 0 outside the answer."""
    log_p = nn.functional.pad(module(input_ids=ids).logits[:, :-1].log_softmax(-1), (0, 0, 1, 0))
    return log_p.gather(-1, ids[..., None]).squeeze(-1) * mask, log_p


def read(module: nn.Module, names: set[str], batch: dict[str, Tensor] = PAIRS, reference: object = None) -> Quantities:
    return Language(reference)(ModelView(module), Quantities(batch, key=(0, 0, 0, 0)), frozenset(names))  # type: ignore[arg-type]


def count_passes(module: nn.Module) -> list[int]:
    passes: list[int] = []
    module.base_model.register_forward_hook(
        lambda _, inputs, keywords, out: passes.append(len(keywords["input_ids"])), with_kwargs=True
    )
    return passes


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_the_record_equals_full_logits_in_value_and_gradient(kind: str) -> None:
    policy, other = model(0, kind), model(1, kind)
    names = {f"{s}_{n}" for s in ("chosen", "rejected") for n in ("logps", "entropy", "logsumexp", "kl", "reverse_kl")}
    found = read(policy, names | {"reference_chosen_logps"}, reference=FrozenModel(other))
    for side in ("chosen", "rejected"):
        ids, mask = PAIRS[f"{side}_ids"], PAIRS[f"{side}_mask"]
        logps, log_p = dense(policy, ids, mask)
        with torch.no_grad():
            reference_logps, log_q = dense(other, ids, mask)
        torch.testing.assert_close(found[f"{side}_logps"], logps)
        torch.testing.assert_close(found[f"{side}_entropy"], -(log_p.exp() * log_p).sum(-1) * mask)
        torch.testing.assert_close(found[f"{side}_kl"], (log_q.exp() * (log_q - log_p)).sum(-1) * mask)
        torch.testing.assert_close(found[f"{side}_reverse_kl"], (log_p.exp() * (log_p - log_q)).sum(-1) * mask)
        if side == "chosen":
            torch.testing.assert_close(found["reference_chosen_logps"], reference_logps)
        loss = (logps.sum(-1) * torch.tensor([1.0, -2.0])).sum()
        ours = (found[f"{side}_logps"].sum(-1) * torch.tensor([1.0, -2.0])).sum()
        expected = torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True)
        for a, b in zip(
            torch.autograd.grad(ours, list(policy.parameters()), allow_unused=True, retain_graph=True),
            expected,
            strict=True,
        ):
            if b is not None:
                # Gemma's normalisation computes in float32 whatever its input.
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_positions_count_from_the_first_answer_token() -> None:
    found = read(model(), set())
    assert found["chosen_positions"].tolist() == [[-1, -1, -1, 0, 1, 2], [-1, -1, 0, 1, -1, -1]]


def test_padding_on_the_left_changes_nothing() -> None:
    def moved(name: str) -> Tensor:
        shift = [0, 2]
        return torch.stack([row.roll(n) for row, n in zip(PAIRS[name], shift, strict=True)])

    left = {n: moved(n) for n in ("chosen_ids", "chosen_mask", "chosen_attention")}
    a, b = read(model(), {"chosen_logps"}, left)["chosen_logps"], read(model(), {"chosen_logps"})["chosen_logps"]
    torch.testing.assert_close(a.sum(-1), b.sum(-1))
    torch.testing.assert_close(a[1, 4:], b[1, 2:4])


def test_one_pass_serves_both_sides_and_no_reference_runs_unless_read() -> None:
    policy, other = model(0), model(1)
    passes, of_reference = count_passes(policy), count_passes(other)
    found = read(policy, {"chosen_logps", "rejected_logps"}, reference=FrozenModel(other, copy_weights=False))
    _ = found["chosen_logps"], found["rejected_logps"], found["response_logps"]
    assert passes == [4]
    assert of_reference == []
    found = read(
        policy,
        {"chosen_logps", "reference_chosen_logps", "chosen_kl"},
        reference=FrozenModel(other, copy_weights=False),
    )
    _ = found["chosen_kl"], found["reference_chosen_logps"]
    assert passes == [4, 2]
    assert of_reference == [2]


def test_values_that_the_data_bring_along_are_not_computed_again() -> None:
    stored = torch.full((2, 6), -0.5, dtype=torch.float64)
    batch = {**PAIRS, "reference_chosen_logps": stored}
    found = read(model(), {"reference_chosen_logps"}, batch)
    assert found["reference_chosen_logps"] is stored


def test_one_answer_is_read_as_response() -> None:
    batch = {n.replace("chosen", "response"): v for n, v in PAIRS.items() if n.startswith("chosen")}
    expected = read(model(), {"response_logps"})["response_logps"]
    torch.testing.assert_close(read(model(), {"response_logps"}, batch)["response_logps"], expected)


def test_states_of_the_reference_stand_before_their_tokens() -> None:
    other = model(1)
    found = read(model(), {"chosen_states", "chosen_kl"}, reference=FrozenModel(other))
    states = other.base_model(input_ids=PAIRS["chosen_ids"], output_hidden_states=True).hidden_states[1:]
    assert found["chosen_states"].shape == (2, 2, 6, 16)
    torch.testing.assert_close(found["chosen_states"][1, 0, 4].double(), states[1][0, 3], rtol=1e-5, atol=1e-6)
    assert found["chosen_states"][:, 0, 0].abs().max() == 0


@pytest.mark.parametrize("target", [["q_proj"], ["q_proj", "lm_head"]], ids=["body", "head too"])
def test_an_adapter_is_scored_and_switched_off_for_the_reference(target: list[str]) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra lm")
    torch.manual_seed(3)
    base = model(0)
    with torch.no_grad():
        expected_reference, _ = dense(base, PAIRS["chosen_ids"], PAIRS["chosen_mask"])
    policy = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=target, lora_dropout=0.0)).double()
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    reference = reference_for(policy)
    assert isinstance(reference, AdapterOff)
    found = read(policy, {"chosen_logps", "reference_chosen_logps", "chosen_kl"}, reference=reference)
    expected, _ = dense(policy, PAIRS["chosen_ids"], PAIRS["chosen_mask"])
    torch.testing.assert_close(found["chosen_logps"], expected)
    torch.testing.assert_close(found["reference_chosen_logps"], expected_reference)
    trained = [p for n, p in policy.named_parameters() if p.requires_grad]
    ours = torch.autograd.grad(found["chosen_logps"].sum(), trained)
    for a, b in zip(ours, torch.autograd.grad(expected.sum(), trained), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert found["chosen_kl"].sum() > 1e-6


def test_other_parameters_can_be_tried_without_touching_the_model() -> None:
    policy, other = model(0), model(1)
    at = {n: p.detach() for n, p in other.named_parameters()}
    batch = Quantities(PAIRS, key=(0, 0, 0, 0))
    found = Language()(ModelView(policy, at), batch, frozenset({"chosen_logps"}))
    torch.testing.assert_close(found["chosen_logps"], dense(other, PAIRS["chosen_ids"], PAIRS["chosen_mask"])[0])


def test_a_missing_reference_and_a_batch_without_answers_are_named() -> None:
    with pytest.raises(QuantityError, match="there is none: give Language"):
        _ = read(model(), {"reference_chosen_logps"})["reference_chosen_logps"]
    with pytest.raises(QuantityError, match="response_ids"):
        read(model(), set(), {"input": torch.zeros(1)})
    with pytest.raises(IncompatibleError, match="Linear has no output layer"):
        _ = read(nn.Linear(2, 2), {"chosen_logps"})["chosen_logps"]
    with pytest.raises(IncompatibleError, match="no adapter to switch off"):
        AdapterOff(model())
