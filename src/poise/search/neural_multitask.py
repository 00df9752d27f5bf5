"""A neural representation shared by many tasks: one encoder, one linear head for each source.

    sum_t (n_t / N) mean_i loss(h_t(phi(x_ti)), y_ti)          every sample counts once

After training phi is whitened on all inputs, so that a distance between heads is one between predictions, and the heads are
fitted anew by ridge regression there: relevance compares heads, and must not depend on how an encoder scales its outputs.

Source: arXiv:2306.02556, section on neural representations (whitening and the ridge are this library's).
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import InputError
from poise.problem import ModelView
from poise.quantities import Quantities
from poise.training import fit

__all__ = ["NeuralMultiTask"]


class NeuralMultiTask:
    """The neural trainer.

    Args:
        encoder: maps inputs (n, ...) to (n, K); it is trained in place, from where it stands, so a second fit goes on.
        width: K.
        tasks: T, source tasks.
        loss: "squared" (numbers, or classes as -1 and 1) or "logistic" (classes as -1 and 1).
        steps: of every `fit`.
        lr, batch_size: of AdamW, on samples of all tasks together.
        ridge: of the heads in the whitened space, in samples.
        seed: decides order and heads at first.

    Raises:
        InputError: no such loss.
    """

    def __init__(
        self,
        encoder: nn.Module,
        width: int,
        tasks: int,
        *,
        loss: str = "logistic",
        steps: int = 500,
        lr: float = 3e-3,
        batch_size: int = 256,
        ridge: float = 1.0,
        seed: int = 0,
    ) -> None:
        if loss not in ("squared", "logistic"):
            raise InputError(f"NeuralMultiTask: loss is 'squared' or 'logistic', and it is {loss!r}.")
        self.model = _MultiHead(encoder, width, tasks, seed)
        self.width, self.tasks, self.loss, self.steps, self.ridge, self.seed = width, tasks, loss, steps, ridge, seed
        self.lr, self.batch_size = lr, batch_size
        self.samples: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(tasks)]
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.whitening = torch.eye(width, dtype=torch.float64)
        self.weights: Tensor | None = None
        self.left = math.nan
        self.fits = 0

    def add(self, task: int, inputs: Tensor, targets: Tensor) -> None:
        """Take samples of one task: inputs (n, ...), targets float (n,); classes are -1 and 1.

        Raises:
            InputError: lengths that differ, classes that are others, or values that are not finite.
        """
        if targets.shape != (len(inputs),):
            raise InputError(f"Task {task}: {len(inputs)} inputs came with targets of shape {list(targets.shape)}.")
        if self.loss == "logistic" and not bool((targets.abs() == 1).all()):
            raise InputError(f"Task {task}: the logistic loss needs targets -1 and 1.")
        if not bool(torch.isfinite(inputs).all() and torch.isfinite(targets).all()):
            raise InputError(f"Task {task}: its samples are not all finite.")
        self.samples[task].append((self._cast(inputs.detach()), targets.detach()))

    def fit(self) -> None:
        """Train encoder and heads on everything that was added, then whiten and fit the heads anew."""
        inputs, targets, task = self._pooled()
        target = (targets > 0).long() if self.loss == "logistic" else targets.to(inputs.dtype)
        fit(
            self.model,
            "cross_entropy" if self.loss == "logistic" else "squared_error",
            {"input": inputs, "target": target, "task": task},
            readout=_OfTask("logits" if self.loss == "logistic" else "prediction"),
            solver="adamw",
            lr=self.lr,
            steps=self.steps,
            batch_size=self.batch_size,
            device="cpu",
            seed=self.seed + self.fits,
            log_every=self.steps,
        )
        self.fits += 1
        self._whiten(inputs)
        z, y = self.represent(inputs), targets.double()
        self.weights = torch.stack([self._ridge(z[task == t], y[task == t]) for t in range(self.tasks)], 1)
        rest = (z * self.weights.T[task]).sum(1) - y
        self.left = float(rest.square().mean().sqrt())

    def heads(self) -> Tensor:
        """Return W, float64 (K + 1, T): the heads in the whitened space, and their constants."""
        if self.weights is None:
            raise InputError("The representation is not trained yet: call fit() first.")
        return self.weights

    def target_head(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return w, float64 (K + 1,), with the encoder frozen."""
        return self._ridge(self.represent(inputs), targets.double())

    def represent(self, inputs: Tensor) -> Tensor:
        """Return the whitened representation with a constant 1 behind it, float64 (n, K + 1)."""
        z = (self._encode(inputs) - self.mean) @ self.whitening
        return torch.cat([z, z.new_ones(len(z), 1)], 1)

    def predict(self, inputs: Tensor, head: Tensor) -> Tensor:
        """Return the predictions of a head, float64 (n,)."""
        return self.represent(inputs) @ head

    def noise(self) -> float:
        """Return the root of the mean squared residual of the ridge heads."""
        return self.left

    def fine_tune(self, inputs: Tensor, targets: Tensor, steps: int = 100, lr: float = 1e-3) -> nn.Module:
        """Train a copy of the encoder and one head on the target alone, from where the search ended.

        Returns:
            A module that maps inputs to predictions (n, 1) (of the squared error on targets -1 and 1, or numbers).
        """
        head = self.target_head(inputs, targets)
        slope = self.whitening @ head[:-1]
        last = nn.Linear(self.width, 1)
        with torch.no_grad():
            last.weight.copy_(slope[None])
            last.bias.copy_(head[-1] - self.mean @ slope)
        model = nn.Sequential(copy.deepcopy(self.model.encoder), last)
        fit(
            model,
            "squared_error",
            (self._cast(inputs), targets.to(self.model.head.dtype)),
            solver="adamw",
            lr=lr,
            steps=steps,
            batch_size=self.batch_size,
            device="cpu",
            seed=self.seed,
        )
        return model.eval()

    def state_dict(self) -> dict[str, Any]:
        """Return encoder, heads, whitening and samples."""
        names = ("mean", "whitening", "weights", "left", "fits", "samples")
        return {"model": copy.deepcopy(self.model.state_dict()), **{n: copy.deepcopy(getattr(self, n)) for n in names}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.model.load_state_dict(state["model"])
        for name, value in state.items():
            if name != "model":
                setattr(self, name, copy.deepcopy(value))

    def _pooled(self) -> tuple[Tensor, Tensor, Tensor]:
        drawn = [(x, y, t) for t, parts in enumerate(self.samples) for x, y in parts]
        if not drawn:
            raise InputError("There is nothing to fit: no task has a sample.")
        tasks = torch.cat([torch.full((len(x),), t) for x, _, t in drawn])
        return torch.cat([x for x, _, _ in drawn]), torch.cat([y for _, y, _ in drawn]), tasks

    def _cast(self, inputs: Tensor) -> Tensor:
        return inputs.to(self.model.head.dtype) if inputs.is_floating_point() else inputs

    def _encode(self, inputs: Tensor) -> Tensor:
        was = self.model.training
        self.model.eval()
        with torch.no_grad():
            parts = [self.model.encoder(part).double() for part in torch.split(self._cast(inputs), 4096)]
        self.model.train(was)
        return torch.cat(parts)

    def _whiten(self, inputs: Tensor) -> None:
        phi = self._encode(inputs)
        self.mean = phi.mean(0)
        sizes, directions = torch.linalg.eigh(torch.cov(phi.T).reshape(self.width, self.width))
        # A direction in which the encoder does not move says nothing, and must not be blown up.
        alive = sizes > 1e-6 * sizes.max()
        self.whitening = directions * torch.where(alive, sizes.clamp_min(1e-300).rsqrt(), 0.0)

    def _ridge(self, z: Tensor, y: Tensor) -> Tensor:
        small = self.ridge * torch.eye(z.shape[1], dtype=z.dtype)
        small[-1, -1] *= 1e-3  # the constant is hardly shrunk
        head: Tensor = torch.linalg.solve(z.T @ z + small, z.T @ y)
        return head


class _MultiHead(nn.Module):
    """An encoder with one linear head a task: `(phi(x) * head[task]).sum() + constant[task]`."""

    def __init__(self, encoder: nn.Module, width: int, tasks: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.encoder = encoder
        self.head = nn.Parameter(torch.randn(tasks, width, generator=generator) / math.sqrt(width))
        self.constant = nn.Parameter(torch.zeros(tasks))

    def forward(self, inputs: Tensor, task: Tensor) -> Tensor:
        output: Tensor = (self.encoder(inputs) * self.head[task]).sum(-1) + self.constant[task]
        return output


class _OfTask:
    """Offer what a head says about its own samples: a prediction, or the logits of -1 and 1."""

    # Both are made of the same number; `fit` need not ask the model how many classes it has, which takes the task to say.
    output = "prediction"

    def __init__(self, offered: str) -> None:
        self.offered = offered

    def __call__(self, model: ModelView, batch: Quantities, reads: frozenset[str]) -> Quantities:
        def output() -> Tensor:
            z: Tensor = model(batch["input"], batch["task"])
            return z if self.offered == "prediction" else torch.stack([torch.zeros_like(z), z], -1)

        batch.offer(self.offered, output)
        return batch
