"""How noisy the gradient of reward minus KL is, and what the term costs: leave-one-out baseline, normaliser, a hand-written loss.

The three-arm example of paper 02 (prior .5, .3, .2; reward 0, 1, 3; beta 1/2): equal samples on both sides, variance summed
over the logits. The cost is that of one evaluation with its gradient beside the same lines written by hand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness import Ratio, one_thread, paired
from poise.objective import Objective, Summand, Term
from poise.tasks.finite_space import FiniteSpace
from poise.terms.divergence import ForwardKL, ReverseKL

SPACE, BETA = FiniteSpace([0.5, 0.3, 0.2], [0.0, 1.0, 3.0]), 0.5
SAMPLES = (4, 8, 32)
"""Samples of one prompt. The baseline is a mean of the others, so its own noise adds 1/(n - 1) to the variance."""


def run(quick: bool) -> list[Ratio]:
    """Ratios of variances, and of the time of one evaluation."""
    with one_thread():
        return [*_baseline(quick), _normaliser(quick), _cost(quick)]


def _baseline(quick: bool) -> list[Ratio]:
    trials = 500 if quick else 20_000
    places = {"at the prior": SPACE.prior_logps, "half way to the target": _half_way()}
    ratios = []
    for name, logps in places.items():
        for samples in SAMPLES:
            without, loo = (
                _variance(ReverseKL(BETA, baseline=choice), logps, trials, samples) for choice in ("none", "loo")
            )
            title = f"variance of the gradient, leave-one-out / no baseline, {name}, {samples} samples"
            detail = f"{trials} batches: variance {loo:.3f} against {without:.3f}"
            ratios.append(Ratio(title, loo / without, 0.5, "lower", detail))
    return ratios


def _half_way() -> Tensor:
    return (0.5 * SPACE.prior_logps + 0.5 * SPACE.posterior(BETA)).log_softmax(-1)


def _normaliser(quick: bool) -> Ratio:
    """The forward direction: weights that share the batch's own normaliser against those with the exact one."""
    trials = 500 if quick else 20_000
    exact, own = (
        _variance(ForwardKL(BETA, log_z=z), SPACE.prior_logps, trials, 8) for z in (float(SPACE.log_z(BETA)), "batch")
    )
    detail = f"8 samples of the prior: variance {own:.3f} against {exact:.3f}; the first is biased by 1/n"
    return Ratio("variance of forward KL, self-normalised / exact log Z", own / exact, None, "lower", detail)


def _variance(term: Term, logps: Tensor, trials: int, samples: int) -> float:
    """Total variance of the gradient in the logits over batches of so many draws."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(logps[0].exp(), trials * samples, replacement=True, generator=generator)
    logits = logps.expand(trials, 3).clone().requires_grad_()
    rows = torch.arange(trials).repeat_interleave(samples)
    out = term(
        logits.log_softmax(-1)[rows, drawn],
        SPACE.prior_logps[0, drawn],
        SPACE.reward[0, drawn],
        group=rows,
    )
    loss = out.values if out.surrogate is None else out.surrogate
    (gradient,) = torch.autograd.grad(loss.sum() / samples, logits)
    return float(gradient.var(0).sum())


def _cost(quick: bool) -> Ratio:
    batch, time = (64, 64) if quick else (256, 512)
    generator = torch.Generator().manual_seed(0)
    logps = -torch.rand(batch, time, generator=generator)
    reference, reward = logps - 0.1, torch.randn(batch, generator=generator)
    objective = Objective([Summand(ReverseKL(0.1))])
    leaf = logps.clone().requires_grad_()

    def ours() -> Tensor:
        total = objective(response_logps=leaf, reference_response_logps=reference, reward=reward)
        return torch.autograd.grad(total, leaf)[0]

    def by_hand() -> Tensor:
        policy = leaf.sum(1)
        ratio = (policy - reference.sum(1) - reward / 0.1).detach()
        baseline = (ratio.sum() - ratio) / (batch - 1)
        return torch.autograd.grad(((ratio - baseline) * policy).mean(), leaf)[0]

    torch.testing.assert_close(ours(), by_hand())
    timing = paired(ours, by_hand, repeats=20 if quick else 200)
    detail = (
        f"{batch} x {time} log-probabilities: {timing.first * 1e6:.0f} against {timing.second * 1e6:.0f} microseconds"
    )
    return Ratio(
        "one evaluation of reverse_kl with its gradient / written by hand", timing.ratio, None, "lower", detail
    )
