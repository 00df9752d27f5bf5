"""Claim of paper 60: masks learned from the reference's states find the tokens that a preference is about.

Planted: answers of 20 symbols, written by a small recurrent model (two layers, 64 wide, trained on such answers). Twice an answer holds
a cue, and what follows a cue is good in the chosen and bad in the rejected one; the other 18 symbols are the same. `sparse_po` learns
on 512 pairs, 150 steps of 64, beta = 0.4, five seeds, against masks that are random. The mask sees the state before a token alone.

Words: the character model of English words, with pairs whose chosen word has a rare letter (z, q, x, j): 600 pairs, 60 steps of 64,
beta in 0.1, 0.4, 0.8, two seeds, DPO, TDPO, MaPO, SparsePO with common and independent masks, and random masks. Measured on 800
samples: the share of words with a rare letter, and the divergence of words from the reference, so that points can be compared at equal KL.

The claim fails where the learned mask weighs planted tokens at most 3 times as much as the others, where random masks do as well,
where the sparsity is outside 20 to 80 %, or where SparsePO earns less than DPO at equal KL by more than 0.03 on words. Points whose
share is above 0.99 are left out of that comparison: a first version drew DPO's line on through them, to shares above 1.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from poise.claims import Claim, Finding, Progress
from poise.formula import parse
from poise.frozen import FrozenModel
from poise.quantities import derive
from poise.readouts.tokens import TokenReadout
from poise.solvers.torch_optimizers import Adam
from poise.tasks import words
from poise.training import fit
from poise.weights.activation_mask import ActivationMask

SEEDS, WORD_SEEDS = 5, 2
LENGTH, SYMBOLS, CUE, GOOD, BAD = 20, 12, 9, 10, 11
PLANTED, PLANTED_STEPS, BATCH, WIDTH = 512, 150, 64, 64
WORD_PAIRS, WORD_STEPS, SAMPLES, PRIOR_STEPS = 600, 60, 800, 300
BETAS = (0.1, 0.4, 0.8)
L1 = 0.001
SATURATED = 0.99
SIZES = f"layers=2, width={WIDTH}"
METHODS = {
    "DPO": "dpo(beta={beta})",
    "TDPO": "tdpo(beta={beta}, version=1)",
    "MaPO": "sparse_po(beta={beta}, mask_from='data')",
    "SparsePO": f"sparse_po(beta={{beta}}, {SIZES}) + {L1}*mask_l1.on(size='sparse_po.reward_size')",
    "SparsePO independent": f"sparse_po(beta={{beta}}, {SIZES}, masks='independent')"
    f" + {L1}*mask_l1.on(size='sparse_po.reward_size') + {L1}*mask_l1.on(size='sparse_po.kl_size')",
    "random": f"sparse_po(beta={{beta}}, {SIZES}, kind='random')",
}


@dataclass(frozen=True)
class Planted:
    """One run: how much more planted tokens weigh, the share of tokens at 0, the probability of good after a cue."""

    ratio: float
    sparsity: float
    good: float


@dataclass(frozen=True)
class Point:
    """A policy on words: share with a rare letter, KL(policy || reference) of words in nats."""

    reward: float
    kl: float


Frontier = Mapping[tuple[str, float], Point]
"""By method and beta, mean over seeds."""


def run(*, full: bool = False, seed: int = 0, progress: Progress | None = None) -> Finding:
    """Learn masks on planted pairs, then compare six methods on words (`full`: five seeds there too)."""
    planted: dict[str, list[Planted]] = {}
    for number in range(SEEDS):
        if progress is not None:
            progress(0.5 * number / SEEDS, f"planted tokens, seed {number + 1}")
        reference, pairs, places = _planted(seed + number)
        for name in ("SparsePO", "random"):
            planted.setdefault(name, []).append(_learn(name, reference, pairs, places, seed + number))
    frontier: dict[tuple[str, float], list[Point]] = {}
    for number in range(SEEDS if full else WORD_SEEDS):
        prior = words.fit_prior(seed + number, hidden=WIDTH, steps=PRIOR_STEPS)
        g = torch.Generator().manual_seed(derive(seed + number, "words"))
        data = words.preference_pairs(prior, WORD_PAIRS, words.rare_letters, g)
        for place, (name, beta) in enumerate((n, b) for n in METHODS for b in BETAS):
            if progress is not None:
                done = (number + place / (len(METHODS) * len(BETAS))) / (SEEDS if full else WORD_SEEDS)
                progress(0.5 + 0.5 * done, f"words, {name}, beta {beta:g}, seed {number + 1}")
            frontier.setdefault((name, beta), []).append(_words(name, beta, prior, data, seed + number))
    means = {key: Point(fmean(p.reward for p in ps), fmean(p.kl for p in ps)) for key, ps in frontier.items()}
    return _judge(planted, means)


def _judge(planted: Mapping[str, list[Planted]], frontier: Frontier) -> Finding:
    ours, control = (
        {n: fmean(getattr(p, n) for p in planted[m]) for n in ("ratio", "sparsity", "good")}
        for m in ("SparsePO", "random")
    )
    gaps = {name: _gap(frontier, name) for name in METHODS if name != "DPO"}
    reasons = []
    if ours["ratio"] <= 3:
        reasons.append(f"planted tokens weigh {ours['ratio']:.2f} times the others, and more than 3 was asked for")
    if control["ratio"] >= ours["ratio"]:
        reasons.append(
            f"random masks weigh planted tokens {control['ratio']:.2f} times the others, no less than learned ones"
        )
    if not 0.2 <= ours["sparsity"] <= 0.8:
        reasons.append(
            f"{ours['sparsity']:.0%} of the tokens are at 0, outside of 20 to 80 %; 90 % is what the planted tokens alone would be"
        )
    if gaps["SparsePO"] < -0.03:
        reasons.append(f"on words SparsePO earns {-gaps['SparsePO']:.3f} less than DPO at equal KL")
    table = "; ".join(
        f"{name} " + ", ".join(f"{frontier[name, b].reward:.3f} at {frontier[name, b].kl:.2f}" for b in BETAS)
        for name in METHODS
    )
    measured = (
        f"planted tokens weigh {ours['ratio']:.0f} times the others (random masks {control['ratio']:.2f}), {ours['sparsity']:.0%} of the "
        f"tokens at 0, good after a cue {ours['good']:.3f} (random {control['good']:.3f}); words, share with a rare letter at KL in nats, "
        f"beta {' / '.join(f'{b:g}' for b in BETAS)}: {table}; over DPO at equal KL: "
        + ", ".join(f"{name} {gap:+.3f}" for name, gap in gaps.items())
        + " (paper: +10 points of win rate in summaries, +3 in dialogues)"
    )
    figures = {f"planted/{m}/{n}": v for m, d in (("SparsePO", ours), ("random", control)) for n, v in d.items()}
    figures |= {
        f"words/{n}/{b:g}/{what}": getattr(p, what) for (n, b), p in frontier.items() for what in ("reward", "kl")
    }
    figures |= {f"words/{name}/over DPO at equal KL": gap for name, gap in gaps.items()}
    return Finding("fails" if reasons else "holds", measured, "; ".join(reasons), figures)


def _gap(frontier: Frontier, name: str) -> float:
    """The mean over beta of a method's reward less DPO's at the same KL, where the reward still has room to differ.

    Above the largest KL of DPO its last reward is held: a share ends at 1, and a line through saturated points would not.
    """
    line = sorted((p.kl, p.reward) for (n, _), p in frontier.items() if n == "DPO")

    def at(kl: float) -> float:
        if kl >= line[-1][0]:
            return line[-1][1]
        right = next(i for i in range(1, len(line)) if line[i][0] >= kl)
        (x0, y0), (x1, y1) = line[right - 1], line[right]
        return y0 + (y1 - y0) * (kl - x0) / max(x1 - x0, 1e-9)

    points = [p for (n, _), p in frontier.items() if n == name]
    return fmean(p.reward - at(p.kl) for p in [p for p in points if p.reward < SATURATED] or points)


# ---- planted tokens ------------------------------------------------------------------------------------------------------


class Writer(nn.Module):
    """Two recurrent layers over symbols; entry t of logits and states has seen the tokens before t."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS + 1, 32)
        self.layers = nn.ModuleList([nn.GRU(32, WIDTH, batch_first=True), nn.GRU(WIDTH, WIDTH, batch_first=True)])
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.states(ids)[-1])  # type: ignore[no-any-return]

    def states(self, ids: Tensor) -> Tensor:
        """Return float [2, batch, time, width]."""
        state, found = self.embedding(nn.functional.pad(ids, (1, 0), value=SYMBOLS)[:, :-1]), []
        for layer in self.layers:
            state = layer(state)[0]
            found.append(state)
        return torch.stack(found)


def _texts(count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Answers int64 [count, 20] with a cue at two of the even places, and where what follows it stands, bool."""
    ids = torch.randint(CUE, (count, LENGTH), generator=g)
    cues = 2 * torch.rand(count, LENGTH // 2, generator=g).argsort(1)[:, :2]
    ids.scatter_(1, cues, CUE)
    return ids, torch.zeros(count, LENGTH, dtype=torch.bool).scatter(1, cues + 1, True)


def _planted(seed: int) -> tuple[Writer, dict[str, Tensor], Tensor]:
    """Train the writer on answers that are good or bad alike, and make pairs."""
    g = torch.Generator().manual_seed(derive(seed, "planted"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "writer"))
        model = Writer()
    ids, places = _texts(4096, g)
    ids = torch.where(places, torch.randint(GOOD, BAD + 1, ids.shape, generator=g), ids)
    everything = torch.ones(ids.shape, dtype=torch.bool)
    fit(model, "sft", {"response_ids": ids, "response_mask": everything}, readout=TokenReadout(), solver=Adam(lr=5e-3), steps=120,
        batch_size=128, device="cpu", seed=seed, log_every=120)  # fmt: skip
    ids, places = _texts(PLANTED, g)
    pairs = {"chosen_ids": torch.where(places, GOOD, ids), "rejected_ids": torch.where(places, BAD, ids)}
    pairs |= {f"{side}_mask": torch.ones(ids.shape, dtype=torch.bool) for side in ("chosen", "rejected")}
    return model.eval(), pairs, places


def _learn(name: str, reference: Writer, pairs: dict[str, Tensor], places: Tensor, seed: int) -> Planted:
    model, objective = copy.deepcopy(reference), parse(METHODS[name].format(beta=0.4))
    fit(model, objective, pairs, readout=TokenReadout(FrozenModel(reference)), solver=Adam(lr=3e-3), steps=PLANTED_STEPS,
        batch_size=BATCH, device="cpu", seed=seed, log_every=PLANTED_STEPS)  # fmt: skip
    network: Any = objective.eval().terms["sparse_po"].networks[0]  # type: ignore[index]
    with torch.no_grad():
        m = network(reference.states(pairs["chosen_ids"]), pairs["chosen_mask"])
        good = model(pairs["chosen_ids"]).softmax(-1)[..., GOOD][places]
    inside, outside = m[places].mean(), m[~places].mean()
    ratio = float(inside / outside.clamp(min=max(1e-3 * float(inside), 1e-9)))  # at most 1000
    return Planted(ratio, float((m == 0).float().mean()), float(good.mean()))


# ---- words --------------------------------------------------------------------------------------------------------------


def _words(name: str, beta: float, prior: words.WordModel, data: dict[str, Tensor], seed: int) -> Point:
    model, reference = copy.deepcopy(prior).train(), FrozenModel(prior)
    pairs = {k: v for k, v in data.items() if k.endswith(("ids", "mask"))}
    if name == "MaPO":
        rule = ActivationMask((r"^layers\.\d+$",))
        for side in ("chosen", "rejected"):
            run_once = partial(prior, pairs[f"{side}_ids"])
            pairs[f"{side}_token_weight"] = rule.scores(prior, run_once, pairs[f"{side}_mask"], ahead=0)
    fit(model, METHODS[name].format(beta=beta), pairs, readout=TokenReadout(reference), solver=Adam(lr=1e-3), steps=WORD_STEPS,
        batch_size=BATCH, device="cpu", seed=seed, log_every=WORD_STEPS)  # fmt: skip
    g = torch.Generator().manual_seed(derive(seed, "samples"))
    drawn = words.sample(model.eval(), SAMPLES, g)
    with torch.no_grad():
        known = words.sequence_logps(prior, drawn.ids, drawn.mask)
    return Point(float(words.rare_letters(drawn.ids).mean()), float((drawn.logps.sum(1) - known).mean()))


CLAIM = Claim(
    number=60,
    statement=(
        "Sparse token masks learned from the reference's states find the tokens that carry a preference, and give more reward at equal "
        "divergence than losses in which every token counts alike (summaries: +10 points of win rate)."
    ),
    expected="Planted tokens weigh more than 3 times the others, 20 to 80 % of the tokens are at 0, reward at equal KL not below DPO's.",
    falsified="Random masks do as well on planted tokens, or the learned ones do not find them.",
    run=run,
)
