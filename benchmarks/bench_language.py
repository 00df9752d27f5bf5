"""What a step of preference optimisation costs beside TRL's and beside full logits, on a model of the shape of Gemma 3 270M.

Memory is the peak of the resident set over one forward and backward pass of head and loss on fixed hidden states, above the
weights, and less the gradients that it leaves. Each of its figures comes from a process of its own, in which freed memory goes back
at once. Both libraries are entered where a trainer enters them: TRL by the forward pass that its `DPOTrainer` fuses into the model,
with the outputs that it asks for, Poise by the language readout.

Times are processor times of one thread, of two sides that take turns: the steps are seconds long, and a busy machine would hit them
unevenly.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import poise
from benchmarks.harness import Paired, Ratio, one_thread, paired
from poise.frozen import FrozenModel
from poise.problem import Problem
from poise.readouts import Language, batch_quantities
from poise.readouts.token_scores import Head, token_scores

VOCABULARY, WIDTH, LAYERS = 262_144, 640, 18
PAIRS, TIME = 2, 256
BETA = 0.1
FORMULA = f"dpo(beta={BETA})"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIB = 2**20

Batch = dict[str, Tensor]


def run(quick: bool) -> list[Ratio]:
    """Ratios of memory in fresh processes, then ratios of time."""
    with one_thread():
        return [
            *_memory_of_head_and_loss(quick),
            *_memory_and_vocabulary(quick),
            *_chunks_beside_gather(quick),
            *(_whole_step(quick, dtype, answer) for dtype in DTYPES for answer in ((128,) if quick else (128, 255))),
            _another_term(quick),
            *_reference_passes(),
            _loop_beside_bare_loop(quick),
        ]


# ---- the model and its batches --------------------------------------------------------------------------------------


def _model(vocabulary: int, layers: int, width: int = WIDTH, body: bool = True, dtype: str = "fp32") -> Any:
    """A model of the shape of Gemma 3 270M with random weights; without a body, fixed hidden states stand for what it returns."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, intermediate_size=round(3.2 * width),
        num_attention_heads=4, num_key_value_heads=1, head_dim=256 * width // WIDTH, tie_word_embeddings=body,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cpu" if body else "meta"):
        model = Gemma3ForCausalLM(config)
    if not body:
        model.lm_head = nn.Linear(width, vocabulary, bias=False)
        model.states = nn.Parameter(torch.randn(2 * PAIRS, TIME, width))
        model.model.forward = lambda *_, **__: SimpleNamespace(last_hidden_state=model.states)
    return model.to(DTYPES[dtype])


def _batch(answer: int, vocabulary: int) -> Batch:
    """Pairs whose answers are the last tokens of each row, as TRL lays them out: the chosen rows above the rejected ones."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (2 * PAIRS, TIME), generator=generator)
    mask = (torch.arange(TIME) >= TIME - answer).long().expand(2 * PAIRS, TIME)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}


def _sides(batch: Batch) -> Batch:
    from poise.readouts import pairs_in_halves

    return pairs_in_halves(batch)


# ---- three ways to the loss -----------------------------------------------------------------------------------------


def _ours(model: Any, batch: Batch, reference: Mapping[str, Tensor]) -> Tensor:
    objective = poise.parse(FORMULA)
    return objective(batch_quantities(model, {**_sides(batch), **reference}, objective))


def _full(model: Any, batch: Batch, reference: Mapping[str, Tensor]) -> Tensor:
    """The logits of every token, their log-softmax, and one of each gathered."""
    states = model.model(**batch).last_hidden_state
    log_p = model.lm_head(states[:, :-1]).float().log_softmax(-1)
    logps = log_p.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1) * batch["completion_mask"][:, 1:]
    return _dpo(logps, reference)


def _trl(model: Any, batch: Batch, reference: Mapping[str, Tensor]) -> Tensor:
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True)
    return _dpo(out.log_probs, reference)


def _dpo(logps: Tensor, reference: Mapping[str, Tensor]) -> Tensor:
    chosen, rejected = logps.sum(-1).chunk(2)
    margin = chosen - reference["reference_chosen_logps"] - rejected + reference["reference_rejected_logps"]
    return -F.logsigmoid(BETA * margin).mean()


def _fuse(model: Any, metrics: bool = True) -> Any:
    """Fuse the head as TRL does, with what its trainer logs."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1") if metrics else ("log_probs",))
    return model


# ---- memory, each figure in a process of its own --------------------------------------------------------------------


def _memory_of_head_and_loss(quick: bool) -> list[Ratio]:
    vocabulary = 32_768 if quick else VOCABULARY
    ratios = []
    for dtype in DTYPES:
        # The others compute every token of a row, whether it is scored or not.
        others = {way: _peak("head", way, dtype, 255, vocabulary) for way in ("full", "trl")}
        for answer in (255,) if quick else (128, 255):
            ours = _peak("head", "ours", dtype, answer, vocabulary)
            peaks = {"ours": ours, **others}
            words = ", ".join(f"{way} {peak / MIB:.0f} MiB" for way, peak in peaks.items())
            words = f"vocabulary {vocabulary:,}: {words}"
            for way, called, goal in (("full", "full logits", 0.25), ("trl", "TRL", 1.0)):
                name = f"peak of head and loss, ours / {called}, {dtype}, {answer} answered"
                ratios.append(Ratio(name, ours / others[way], goal, "lower", words))
    return ratios


def _memory_and_vocabulary(quick: bool) -> list[Ratio]:
    """How much the peak grows with the vocabulary, beside how much the head's weights grow; their gradients aside."""
    large, small = (65_536, 16_384) if quick else (VOCABULARY, 65_536)
    ratios = []
    for dtype, kind in DTYPES.items():
        peaks = [_peak("head", "ours", dtype, 255, vocabulary) for vocabulary in (large, small)]
        weights = (large - small) * WIDTH * kind.itemsize
        words = f"{peaks[0] / MIB:.1f} against {peaks[1] / MIB:.1f} MiB, of heads of {large:,} and {small:,} tokens"
        name = f"growth of the peak / growth of the head with the vocabulary, {dtype}"
        ratios.append(Ratio(name, (peaks[0] - peaks[1]) / weights, 0.01, "lower", words))
    return ratios


@cache
def _peak(measure: str, *arguments: object) -> int:
    """Measure bytes in a fresh process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.bench_language", measure, *map(str, arguments)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return int(json.loads(done.stdout.splitlines()[-1]))


def _measure_head(way: str, dtype: str, answer: str, vocabulary: str) -> int:
    reference = {f"reference_{side}_logps": torch.full((PAIRS,), -3000.0) for side in ("chosen", "rejected")}
    loss = {"ours": _ours, "trl": _trl, "full": _full}[way]

    def made(size: int) -> tuple[Callable[[], None], nn.Module]:
        model = _model(size, 0, body=False, dtype=dtype)
        batch = _batch(int(answer), size)
        if way == "trl":
            _fuse(model)
        return lambda: loss(model, batch, reference).backward(), model

    made(1_024)[0]()  # what is made once, libraries' buffers among it, is there now
    return _growth(*made(int(vocabulary)))


def _growth(step: Callable[[], None], model: nn.Module) -> int:
    """The peak of the resident set over a step, above its size before and less the gradients that it leaves."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step()
    peak = _status("VmHWM")
    left = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)
    return peak - before - left


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


# ---- log-probabilities alone ----------------------------------------------------------------------------------------


def _chunks_beside_gather(quick: bool) -> list[Ratio]:
    """Chunked log-probabilities beside `log_softmax().gather()`, forward and backward, from hidden states."""
    rows, vocabulary = 512, 32_768
    ratios = []
    for width in (128, 640):
        timed = _cpu_paired(*_routes(rows, vocabulary, width), repeats=3 if quick else 9)
        words = f"{rows} tokens, width {width}, vocabulary {vocabulary:,}, fp32: {_milliseconds(timed)}"
        name = f"log_softmax().gather() / chunks, time, width {width}"
        ratios.append(Ratio(name, timed.ratio, 1.3, "higher", words))
        peaks = [_peak("route", place, rows, vocabulary, width) for place in (0, 1)]
        words = f"{peaks[1] / MIB:.0f} against {peaks[0] / MIB:.0f} MiB, above weights and gradients"
        name = f"chunks / log_softmax().gather(), peak memory, width {width}"
        ratios.append(Ratio(name, peaks[1] / peaks[0], 0.6, "lower", words))
    return ratios


def _routes(rows: int, vocabulary: int, width: int) -> tuple[Callable[[], None], Callable[[], None]]:
    head = _route_module(rows, vocabulary, width)
    target = torch.randint(vocabulary, (rows,))

    def gathered() -> None:
        head.zero_grad()
        logits = head.states @ head.weight.t()
        logits.log_softmax(-1).gather(-1, target[:, None]).sum().backward()  # type: ignore[no-untyped-call]

    def chunked() -> None:
        head.zero_grad()
        token_scores(Head((head.states,), (head.weight,)), target)["logps"].sum().backward()  # type: ignore[no-untyped-call]

    gathered.module = chunked.module = head  # type: ignore[attr-defined]
    return gathered, chunked


def _route_module(rows: int, vocabulary: int, width: int) -> Any:
    torch.manual_seed(0)
    head = nn.Module()
    head.states = nn.Parameter(torch.randn(rows, width))
    head.weight = nn.Parameter(0.05 * torch.randn(vocabulary, width))
    return head


def _measure_route(place: str, rows: str, vocabulary: str, width: str) -> int:
    _routes(int(rows), 1_024, int(width))[int(place)]()
    route: Any = _routes(int(rows), int(vocabulary), int(width))[int(place)]
    return _growth(route, route.module)


# ---- whole steps ----------------------------------------------------------------------------------------------------


def _whole_step(quick: bool, dtype: str, answer: int) -> Ratio:
    vocabulary, layers = (16_384, 2) if quick else (VOCABULARY, LAYERS)
    policy = _model(vocabulary, layers, dtype=dtype)
    reference = FrozenModel(policy)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-6)  # the same on both sides, and small
    batch = _batch(answer, vocabulary)
    theirs = _trl_step(policy, reference.module, batch, optimizer)
    ours = _our_step(policy, reference, batch, optimizer, FORMULA)
    policy.train()
    timed = _cpu_paired(ours, theirs, repeats=2 if quick else 3, warmup=1 if quick else 0)
    words = f"{layers} layers, vocabulary {vocabulary:,}, 2 pairs x {TIME} tokens, SGD: {_milliseconds(timed)}"
    return Ratio(f"DPO step, ours / TRL, {dtype}, {answer} of {TIME} answered", timed.ratio, 1.05, "lower", words)


def _our_step(
    policy: Any, reference: FrozenModel | None, batch: Batch, optimizer: Any, formula: str
) -> Callable[[], None]:
    """The step of `poise.fit`."""
    from poise.solvers.torch_optimizers import as_solver

    objective, solver, sides = poise.parse(formula), as_solver(optimizer), _sides(batch)
    solver.bind(policy, objective)
    readout = Language(reference)
    return lambda: solver.step(Problem(policy, objective, [{"main": sides}], readout))


def _trl_step(policy: Any, reference: Any, batch: Batch, optimizer: Any) -> Callable[[], None]:
    """The loss of TRL's `DPOTrainer`, its metrics included, and a step."""
    import trl

    _fuse(policy)
    _fuse(reference, metrics=False)
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer: Any = SimpleNamespace(
        model=policy, ref_model=reference, accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=False, f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0], beta=BETA,
        label_smoothing=0.0, use_weighting=False, args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip

    def step() -> None:
        optimizer.zero_grad()
        trl.DPOTrainer._compute_loss(trainer, policy, batch, False).backward()
        optimizer.step()

    return step


def _another_term(quick: bool) -> Ratio:
    """A term that reads what another reads already."""
    vocabulary = 16_384
    policy = _model(vocabulary, 2, width=320)
    reference = FrozenModel(policy)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-6)
    batch = _batch(128, vocabulary)
    sides = [_our_step(policy, reference, batch, optimizer, f) for f in (f"{FORMULA} + 0.2*sft", FORMULA)]
    timed = _cpu_paired(sides[0], sides[1], repeats=5 if quick else 15, warmup=2)
    words = f"2 layers, width 320, vocabulary {vocabulary:,}: {_milliseconds(timed)}"
    return Ratio("step of dpo + 0.2*sft / step of dpo", timed.ratio, 1.02, "lower", words)


def _reference_passes() -> list[Ratio]:
    policy = _model(1_024, 1, width=320)
    batch = _sides(_batch(128, 1_024))
    ratios = []
    for formula, goal in (("simpo + 0.2*sft", 0.0), (f"{FORMULA} + token_kl", 1.0)):
        reference, passes = FrozenModel(policy), []
        reference.module.model.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        objective = poise.parse(formula)
        Problem(policy, objective, [{"main": batch}], Language(reference)).gradient()
        ratios.append(Ratio(f"passes of the reference in a step of {formula}", float(len(passes)), goal))
    return ratios


def _loop_beside_bare_loop(quick: bool) -> Ratio:
    """`poise.fit` beside a loop in PyTorch over the same forward and backward passes, on fresh batches of each."""
    vocabulary, steps = 8_192, 4
    data = {n: torch.cat([v] * steps) for n, v in _sides(_batch(64, vocabulary)).items()}
    policy = _model(vocabulary, 2, width=320)
    reference = FrozenModel(policy)
    objective = poise.parse(FORMULA)

    def ours() -> None:
        optimizer = torch.optim.SGD(policy.parameters(), lr=1e-6)
        options = {"solver": optimizer, "steps": steps, "batch_size": PAIRS, "device": "cpu"}
        poise.fit(policy, FORMULA, data, readout=Language(reference), **options)

    def bare() -> None:
        optimizer = torch.optim.SGD(policy.parameters(), lr=1e-6)
        for rows in torch.randperm(PAIRS * steps).split(PAIRS):
            optimizer.zero_grad()
            read = batch_quantities(policy, {n: v[rows] for n, v in data.items()}, objective, reference)
            ratio = [(read[f"{s}_logps"] - read[f"reference_{s}_logps"]).sum(-1) for s in ("chosen", "rejected")]
            (-F.logsigmoid(BETA * (ratio[0] - ratio[1])).mean()).backward()
            optimizer.step()

    policy.train()
    timed = _cpu_paired(bare, ours, repeats=5 if quick else 11, warmup=1)
    each = timed.second / steps
    words = f"{each * 1e3:.0f} ms a step, {steps} steps, set-up of the run included"
    return Ratio("throughput of poise.fit / a bare PyTorch loop", timed.ratio, 0.95, "higher", words)


# ---- timing ---------------------------------------------------------------------------------------------------------


def _cpu_paired(first: Callable[[], None], second: Callable[[], None], repeats: int, warmup: int = 1) -> Paired:
    return paired(first, second, repeats, warmup, clock=time.process_time)


def _milliseconds(timed: Paired) -> str:
    return f"{timed.first * 1e3:.0f} against {timed.second * 1e3:.0f} ms of processor time"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"head": _measure_head, "route": _measure_route}[sys.argv[1]](*sys.argv[2:])))
