"""What token rewards cost: a training step of t_reg beside dpo, and the pre-pass beside scoring the same tokens plainly.

The step is that of `bench_preference_terms`: two transformer blocks, 8 pairs of 2 x 64 tokens, AdamW, the reference's
log-probabilities stored. The pre-pass fills the templates, tokenises them, scores every answer behind both prompts and makes
rewards; the plain side scores the same sequences, tokenised and sorted by length beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import bench_preference_terms as pairs
from benchmarks.harness import Ratio, one_thread, paired
from poise.formula import parse
from poise.problem import ModelView
from poise.quantities import Quantities
from poise.readouts import token_rewards
from poise.readouts.language import Language
from poise.readouts.token_rewards import BETTER, WORSE, contrastive_token_rewards

BATCH, BLOCK, LETTERS = 16, 20, "abcdefghijklmnopqrstuvwxyz"


def run(quick: bool) -> list[Ratio]:
    """The ratios of step times, of throughput, and of memory."""
    with one_thread():
        return [*_steps(quick), _prepass(quick), _memory()]


def _steps(quick: bool) -> list[Ratio]:
    repeats = 5 if quick else 60
    found = []
    for formula, base in (("t_reg", "dpo"), ("t_reg(base='simpo', beta=2.0)", "simpo")):
        timing = pairs._race(_rewarded(formula), pairs._formula(base), repeats)
        size = f"{pairs.PAIRS} pairs of 2 x {pairs.TIME} tokens"
        detail = f"{size}: {timing.first * 1e3:.1f} against {timing.second * 1e3:.1f} ms"
        found.append(Ratio(f"step of {formula} / step of {base}", timing.ratio, 1.02, "lower", detail))
        # What differs is far below the jitter of a whole step on a shared machine, so it is measured by itself too.
        alone = paired(_alone(formula), _alone(base), repeats)
        more = (alone.first - alone.second) / BLOCK
        detail = f"loss and its gradient alone: {alone.first / BLOCK * 1e6:.0f} against {alone.second / BLOCK * 1e6:.0f} microseconds"
        found.append(
            Ratio("the same, by what the loss alone costs more", 1 + more / timing.second, 1.02, "lower", detail)
        )
    return found


def _alone(formula: str) -> Callable[[], None]:
    """The objective and its gradient on a given token record, a block of them."""
    objective, generator = parse(formula), torch.Generator().manual_seed(0)
    record = _columns()
    for side in ("chosen", "rejected"):
        shape = (pairs.PAIRS, pairs.TIME)
        record[f"{side}_logps"] = torch.randn(shape, generator=generator).requires_grad_()
        record[f"reference_{side}_logps"] = torch.randn(shape, generator=generator)
        record[f"{side}_mask"] = torch.ones(shape, dtype=torch.bool)

    def block() -> None:
        for _ in range(BLOCK):
            objective(record).backward()

    return block


def _columns() -> dict[str, Tensor]:
    rewards = torch.rand(2, pairs.PAIRS, pairs.TIME, generator=torch.Generator().manual_seed(0)) - 0.5
    return {"chosen_token_reward": rewards[0], "rejected_token_reward": rewards[1]}


def _rewarded(formula: str) -> pairs.Loss:
    objective, columns = parse(formula), _columns()
    return lambda model, batch: objective({**pairs._record(model, batch), **columns})


def _prepass(quick: bool) -> Ratio:
    import transformers

    answers_count, repeats = (8, 2) if quick else (64, 5)
    tokenizer, generator = _letters(), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config).eval()
    lengths = torch.randint(32, 128, (answers_count,), generator=generator).tolist()
    answers = [torch.randint(len(LETTERS), (n,), generator=generator) for n in lengths]
    prompts = ["which letters follow"] * answers_count
    batches = _plain_batches(tokenizer, prompts, answers)
    tokens = sum(int(batch["response_attention"].sum()) for batch in batches)

    def plain() -> None:
        with torch.no_grad():
            for batch in batches:
                Language()(ModelView(model), Quantities(dict(batch)), frozenset({"response_logps"}))["response_logps"]

    def ours() -> None:
        contrastive_token_rewards(model, tokenizer, prompts, answers, batch_size=BATCH)

    timing = paired(plain, ours, repeats, warmup=1)
    return Ratio(
        "throughput of the pre-pass / of plain scoring of the same tokens",
        timing.ratio,
        0.9,
        "higher",
        f"{answers_count} answers behind two prompts, {tokens} tokens: {timing.second:.2f} against {timing.first:.2f} s",
    )


def _plain_batches(tokenizer: Any, prompts: list[str], answers: list[Tensor]) -> list[dict[str, Tensor]]:
    sequences = [
        (token_rewards._prompt_ids(tokenizer, template, prompt, answer, False), answer)
        for template in (BETTER, WORSE)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    sequences.sort(key=lambda pair: -len(pair[0]) - len(pair[1]))
    cpu = torch.device("cpu")
    parts = [sequences[i : i + BATCH] for i in range(0, len(sequences), BATCH)]
    return [token_rewards._batch([p for p, _ in part], [a for _, a in part], 0, cpu) for part in parts]


def _letters() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = [*LETTERS, *(chr(code) for code in range(32, 127) if chr(code) not in LETTERS), "\n", "<end>"]
    tokenizer = Tokenizer(models.WordLevel({token: at for at, token in enumerate(vocabulary)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def _memory() -> Ratio:
    term: nn.Module = parse("t_reg")
    rewards = torch.zeros(1000)
    size = rewards.untyped_storage().nbytes() / len(rewards) / 4
    held = sum(t.numel() for t in (*term.parameters(), *term.buffers()))
    return Ratio("floats kept for each token", size, 1.0, "lower", f"and {held} in the term")
