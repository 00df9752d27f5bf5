"""How good a sparse autoencoder is: error, sparsity, dead features, and what a model loses that runs through its reconstructions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import IncompatibleError, InputError
from poise.insight.feature_norms import description_length

__all__ = ["AutoencoderQuality", "SplicedLoss", "autoencoder_quality", "spliced", "spliced_loss"]


@dataclass(frozen=True)
class AutoencoderQuality:
    """What an autoencoder does on inputs that it was not trained on.

    Attributes:
        mse: mean of (x' - x)^2 over inputs and coordinates, on the scale of the signal: the paper's normalised error where the autoencoder
            normalises.
        unexplained: sum |x' - x|^2 over sum |x - mean x|^2, which no scale changes; 0 is perfect, 1 is what the mean alone gives.
        l0: active features of an input, on average.
        l0_spread: their standard deviation over inputs.
        dead: share of features that no input activates.
        bits: description length of an input's features, `l0 (7 + log2 h)`.
    """

    mse: float
    unexplained: float
    l0: float
    l0_spread: float
    dead: float
    bits: float


@torch.no_grad()
def autoencoder_quality(autoencoder: nn.Module, inputs: Tensor, batch_size: int = 1024) -> AutoencoderQuality:
    """Measure an autoencoder in evaluation mode.

    Args:
        autoencoder: returns what `poise.parts.SparseAutoencoder` does.
        inputs: float [n, width], activations that were held out, two at least.
        batch_size: inputs of one pass.

    >>> from poise.parts import SparseAutoencoder
    >>> autoencoder_quality(SparseAutoencoder(4, 16, "top_k(k=3)"), torch.randn(64, 4)).l0 <= 3
    True
    """
    if inputs.ndim != 2 or len(inputs) < 2:
        raise InputError(
            f"autoencoder_quality: inputs are float [n, width], two at least, and they are {list(inputs.shape)}."
        )
    was = autoencoder.training
    autoencoder.eval()
    try:
        errors, signals, active = [], [], []
        fired: Tensor | None = None
        for x in torch.split(inputs, batch_size):
            out = autoencoder(x)
            on = out.features > 0
            errors.append((out.reconstruction - out.signal).double().square().sum(1))
            signals.append(out.signal.double())
            active.append(on.sum(1))
            fired = on.any(0) if fired is None else fired | on.any(0)
    finally:
        autoencoder.train(was)
    assert fired is not None
    signal, error, l0 = torch.cat(signals), torch.cat(errors), torch.cat(active).double()
    spread = (signal - signal.mean(0)).square().sum()
    return AutoencoderQuality(
        mse=float(error.mean() / signal.shape[1]),
        unexplained=float(error.sum() / spread),
        l0=float(l0.mean()),
        l0_spread=float(l0.std()),
        dead=float((~fired).double().mean()),
        bits=float(description_length(l0, len(fired)).mean()),
    )


@contextmanager
def spliced(model: nn.Module, module: str, change: Callable[[Tensor], Tensor]) -> Any:
    """Run a model with the output of one of its modules replaced: `change(output)`, or of the first of several outputs.

    Args:
        model: any model.
        module: name of a submodule, as `model.named_modules()` has it.
        change: `autoencoder.reconstruct`, or `torch.zeros_like` for the ablation.

    >>> layers = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> with spliced(layers, "0", torch.zeros_like):
    ...     float(layers(torch.ones(1, 2)).sum())
    0.0
    """
    names = dict(model.named_modules())
    if module not in names:
        raise InputError(
            f"spliced: the model has no module {module!r}; it has {', '.join(n for n in list(names)[1:8])}, ..."
        )

    def replace(_: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return change(output)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            return (change(output[0]), *output[1:])
        raise IncompatibleError(
            f"spliced: {module!r} must give a tensor, or a tuple that begins with one, and it gave a {type(output).__name__}."
        )

    handle = names[module].register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class SplicedLoss:
    """A model's loss as it is, with reconstructions in place of one module's output, and with zeros there.

    Attributes:
        whole, reconstructed, ablated: mean losses over batches.
    """

    whole: float
    reconstructed: float
    ablated: float

    @property
    def recovered(self) -> float:
        """Share of what the ablation costs that the reconstruction keeps: 1 loses nothing, 0 is no better than zeros."""
        return (self.ablated - self.reconstructed) / (self.ablated - self.whole)


@torch.no_grad()
def spliced_loss(
    model: nn.Module, module: str, autoencoder: Any, loss: Callable[[nn.Module, Any], Tensor], batches: Iterable[Any]
) -> SplicedLoss:
    """Measure what a model loses when an autoencoder's reconstructions take the place of one module's output.

    Args:
        model: runs in evaluation mode.
        module: name of the module whose output the autoencoder was trained on.
        autoencoder: has `reconstruct`.
        loss: `loss(model, batch) -> 0-dim`, such as the cross-entropy of the next token.
        batches: what `loss` is given, one after another; each counts the same.
    """
    was = model.training, autoencoder.training
    model.eval()
    autoencoder.eval()
    try:
        rows = []
        for batch in batches:
            row = [float(loss(model, batch))]
            for change in (autoencoder.reconstruct, torch.zeros_like):
                with spliced(model, module, change):
                    row.append(float(loss(model, batch)))
            rows.append(row)
    finally:
        model.train(was[0])
        autoencoder.train(was[1])
    if not rows:
        raise InputError("spliced_loss: there is no batch.")
    return SplicedLoss(*torch.tensor(rows, dtype=torch.float64).mean(0).tolist())
