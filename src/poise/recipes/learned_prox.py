"""Train a learned proximal operator: absolute error first, then proximal matching down a ladder.

    first half     mean over pixels of |f(y) - x|                    learning rate 1e-3
    second half    1 - exp(-||f(y) - x||^2 / gamma^2),  gamma = 8, 4, 2, 1 times 0.8 sigma sqrt(n)         1e-4
    y = x + sigma * noise, drawn anew in every step

One call of `poise.fit`: the optimiser keeps its state, and the nonnegative weights are projected after every step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from poise.coefficient import text
from poise.data.denoising import AddNoise
from poise.errors import InputError
from poise.metrics.images import denoising_metrics
from poise.quantities import derive
from poise.readouts.denoising import Denoising
from poise.run import FitState, Run
from poise.training import fit
from poise.weights.schedule import GammaLadder, piecewise

__all__ = ["AverageWeights", "WatchProx", "fit_learned_prox", "proximal_schedule"]


def proximal_schedule(
    numbers: int,
    sigma: float,
    steps: int = 40_000,
    pretrain: int | None = None,
    stages: int = 4,
    start: float | None = None,
    stop: float | None = None,
) -> str:
    """Return the paper's schedule as a formula.

    Args:
        numbers: n, of one example.
        sigma: largest standard deviation of the noise.
        steps: of the whole training.
        pretrain: steps on absolute error (its mean over numbers); half of `steps` where nothing is said.
        stages: values of gamma.
        start, stop: first and last gamma; stop is 0.8 sigma sqrt(n), a little below the residual of a good denoiser, start 8 times that.

    >>> proximal_schedule(1, 1.0, steps=200, start=0.5, stop=0.1)[:55]
    'piecewise((0, 1), (100, 0))*absolute_error + piecewise('
    """
    pretrain = steps // 2 if pretrain is None else pretrain
    if not 0 <= pretrain < steps or numbers < 1 or not sigma > 0:
        raise InputError(
            f"proximal_schedule: 0 <= pretrain < steps, numbers >= 1 and sigma > 0 are needed; got {pretrain}, {steps}, {numbers}, {sigma}."
        )
    last = 0.8 * sigma * math.sqrt(numbers) if stop is None else stop
    ladder = GammaLadder(8 * last if start is None else start, last, stages, steps=steps - pretrain, after=pretrain)
    matching = f"proximal_matching(gamma={ladder})"
    if not pretrain:
        return matching
    before = text(1 / numbers)
    return (
        f"{piecewise((0, float(before)), (pretrain, 0))}*absolute_error + {piecewise((0, 0), (pretrain, 1))}*{matching}"
    )


def fit_learned_prox(
    model: nn.Module,
    clean: Tensor,
    sigma: float | tuple[float, float] = 0.1,
    valid: Tensor | None = None,
    *,
    steps: int = 40_000,
    pretrain: int | None = None,
    objective: str | None = None,
    lr: float = 1e-3,
    matching_lr: float = 1e-4,
    conditioned: bool = False,
    ema: float | None = None,
    batch_size: int = 64,
    solver: Any = "adam",
    seed: int = 0,
    validate_every: float = 0.05,
    **options: Any,
) -> Run:
    """Train a denoiser on clean examples with noise that is drawn anew in every step.

    Args:
        model: a `LearnedProx`, or any denoiser (a baseline).
        clean: float [examples, ...], images in [0, 1] where PSNR is to mean something.
        sigma: standard deviation of the noise, or a range from which it is drawn for each example.
        valid: clean examples that PSNR and SSIM are measured on every `validate_every` steps, with noise that stays the same.
        steps, pretrain: see `proximal_schedule`.
        objective: another formula than the schedule's, such as "squared_error".
        lr, matching_lr: learning rates before and after `pretrain`; `lr_schedule` takes their place where it is given.
        conditioned: hand the model the noise level as `condition`.
        ema: share of the old average in an exponential average of the weights, which the model has in the end; None for none.
        batch_size, solver, seed, validate_every, options: of `poise.fit`.

    Returns:
        The run; curves "valid/psnr" and "valid/ssim" are in its history.

    Example:
        >>> from poise.parts import ICNN, LearnedProx
        >>> run = fit_learned_prox(LearnedProx(ICNN(1, hidden=4)), torch.randn(64, 1), 1.0, steps=4)
        >>> run.steps
        4

    Source: arXiv:2310.14344, appendix; Sulam-Group/learned-proximal-networks, lpn/train.py.
    """
    high = sigma[1] if isinstance(sigma, tuple) else sigma
    pretrain = steps // 2 if pretrain is None else pretrain
    if objective is None:
        objective = proximal_schedule(math.prod(clean.shape[1:]), high, steps, pretrain)
    noise = AddNoise(sigma)
    held: Mapping[str, Any] | None = None
    if valid is not None:
        held = noise({"input": valid}, torch.Generator().manual_seed(derive(seed, "validation noise")))
    if held is not None and conditioned:
        options["evaluate"] = _Evaluation(held)
        held = None
    if 0 < pretrain < steps:
        options.setdefault("lr_schedule", piecewise((0, 1), (pretrain, matching_lr / lr)))
    callbacks = [*options.pop("callbacks", ()), *([] if ema is None else [AverageWeights(ema)])]
    return fit(
        model,
        objective,
        {"input": clean},
        held,
        readout=Denoising(conditioned),
        solver=solver,
        lr=lr,
        steps=steps,
        batch_size=batch_size,
        transform=noise,
        metrics=denoising_metrics,
        monitor="psnr",
        validate_every=validate_every,
        seed=seed,
        callbacks=callbacks,
        **options,
    )


class _Evaluation:
    """PSNR and SSIM of a denoiser that is told the noise level."""

    def __init__(self, held: Mapping[str, Any]) -> None:
        self.held = held

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        noisy, clean, level = (self.held[name].to(device) for name in ("input", "target", "noise_level"))
        return denoising_metrics(model(noisy, condition=level), clean)


class WatchProx:
    """Callback of `poise.fit` that draws, as curves of the run, what tells a proximal operator in training.

    "prox/smallest_eigenvalue" of the Jacobian over some noisy examples, by power iteration; "prox/zero_share" of the nonnegative weights;
    "prox/matching", the proximal matching loss at one gamma, which unlike the trained one means the same in every stage.

    Args:
        clean: examples [batch, ...]; a few dozen are enough.
        sigma: noise that is put on them, drawn once.
        gamma: of the yardstick; the last of the ladder.
        every: steps between points.
        iterations: of the power iteration.
    """

    def __init__(self, clean: Tensor, sigma: float, gamma: float, every: int = 500, iterations: int = 30) -> None:
        if not (gamma > 0 and every >= 1):
            raise InputError(f"WatchProx: gamma and every are positive, and they are {gamma} and {every}.")
        self.clean, self.gamma, self.every, self.iterations = clean, gamma, every, iterations
        self.noisy = AddNoise(sigma)({"input": clean}, torch.Generator().manual_seed(0))["input"]

    def on_step_end(self, state: FitState) -> None:
        """Add a point to each curve where it is due."""
        if state.step % self.every:
            return
        model: Any = state.model
        device = next(model.parameters()).device
        noisy, clean = self.noisy.to(device), self.clean.to(device)
        with torch.no_grad():
            square = (model(noisy) - clean).flatten(1).square().sum(1)
        state.history.add("prox/matching", state.step, float(-torch.expm1(-square / self.gamma**2).mean()))
        least = model.smallest_eigenvalue(noisy, self.iterations).min()
        state.history.add("prox/smallest_eigenvalue", state.step, float(least))
        share = getattr(model.psi, "zero_share", None)
        if share is not None:
            state.history.add("prox/zero_share", state.step, share)


class AverageWeights:
    """Callback of `poise.fit`: an exponential average of the weights, which the model has in the end.

    average <- keep * average + (1 - keep) * weights

    A mean of nonnegative weights is nonnegative, so a convex potential stays convex.

    Args:
        keep: share of the old average, in [0, 1).
    """

    def __init__(self, keep: float = 0.999) -> None:
        if not 0 <= keep < 1:
            raise InputError(f"AverageWeights: keep lies in [0, 1), and it is {keep}.")
        self.keep = keep
        self.average: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_step_end(self, state: FitState) -> None:
        """Move the average."""
        for name, weight in state.model.named_parameters():
            if name in self.average:
                self.average[name].lerp_(weight, 1 - self.keep)
            else:
                self.average[name] = weight.detach().clone()

    @torch.no_grad()
    def on_end(self, state: FitState) -> None:
        """Put the average into the model."""
        for name, weight in state.model.named_parameters():
            weight.copy_(self.average.get(name, weight))
