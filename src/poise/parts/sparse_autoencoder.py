"""Sparse autoencoders: a wide dictionary of unit directions, of which each input uses few.

    x_c = x - b,   z = x_c W_enc + b_enc,   f = activation(z),   x' = f W_dec + b,   |rows of W_dec| = 1

    sae = SparseAutoencoder(768, 12288, "top_afa")
    formula = "reconstruction + 0.03125*norm_matching + 0.03125*dead_features"
    poise.fit(sae, formula, {"input": x}, readout=Autoencoding(), solver="adam", lr=3e-4)

The rows stay of length 1 and the counters of dead features move, with every optimiser that a solver makes: the module asks for it. In a
loop of your own say `poise.solvers.follow_requests(sae, optimizer)` once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from poise import processes
from poise.errors import InputError
from poise.operators import require_count
from poise.parts import sparse_products
from poise.parts.sparse_activations import (
    BatchTopK,
    FeatureActivation,
    JumpReLU,
    ReLU,
    TopAFA,
    TopK,
    as_activation,
)

__all__ = [
    "AutoencoderOutput", "BatchTopK", "FeatureActivation", "JumpReLU", "ReLU", "SparseAutoencoder", "TopAFA", "TopK",
]  # fmt: skip


@dataclass(frozen=True)
class AutoencoderOutput:
    """One pass of an autoencoder over a batch.

    Attributes:
        signal: float [batch, width], what is reconstructed: the input, normalised where the autoencoder does so.
        reconstruction: float [batch, width], on the scale of `signal`.
        features: float [batch, features], never negative, mostly 0.
        k: int64 [batch], how many features the activation chose.
        z: float [batch, features], what the encoder gave, before the activation.
        mean, scale: float [batch, 1], by which the input was normalised, or None.
    """

    signal: Tensor
    reconstruction: Tensor
    features: Tensor
    k: Tensor
    z: Tensor
    mean: Tensor | None = None
    scale: Tensor | None = None

    @property
    def restored(self) -> Tensor:
        """The reconstruction on the scale of the input."""
        if self.mean is None or self.scale is None:
            return self.reconstruction
        return self.reconstruction * self.scale + self.mean


class SparseAutoencoder(nn.Module):
    """Encode in many features of which few are active, and decode by directions of length 1.

    x_c = x - b,   f = activation(x_c W_enc + b_enc),   x' = f W_dec + b

    Args:
        width: of the inputs, d.
        features: size of the dictionary, h, from 2.
        activation: "top_afa", "top_k(k=64)", "batch_top_k(k=64)", "jump_relu", "relu", or an activation itself.
        normalise: take from each input its mean and divide by its standard deviation (unbiased, plus 1e-5) first; the scale on which the
            paper measures, where |x| is about sqrt(d - 1) for every input.
        encoder_bias: learn b_enc; by default where the activation has no other threshold (ReLU, JumpReLU).
        unit_rows: keep the decoder's rows at length 1: the gradient's component along a row is taken out before a step, and rows are
            divided by their length after it.
        seed: of the encoder's start, uniform in +-sqrt(6 / h). The decoder starts as its transpose with rows of length 1.

    Buffers: `inactive`, int64 [features], training steps since a feature was last active; it is part of the state.

    Raises:
        InputError: a size is out of range, an input has another width, or a decoder row is 0.

    >>> sae = SparseAutoencoder(4, 16, "top_k(k=3)")
    >>> sae(torch.randn(5, 4)).features.shape
    torch.Size([5, 16])

    Source: arXiv:2503.24277; SewoongLee/top-afa-sae.
    """

    inactive: Tensor
    fired: Tensor

    def __init__(
        self,
        width: int,
        features: int,
        activation: FeatureActivation | str = "top_afa",
        *,
        normalise: bool = False,
        encoder_bias: bool | None = None,
        unit_rows: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_count("SparseAutoencoder", width)
        require_count("SparseAutoencoder", features)
        if features < 2 or (normalise and width < 2):
            raise InputError(
                f"SparseAutoencoder: it needs two features at least, and inputs of two numbers to normalise; got {features} and {width}."
            )
        self.width, self.features, self.normalise = width, features, normalise
        self.activation = as_activation(activation)
        self.activation.bind(features)
        bound = math.sqrt(6 / features)
        start = torch.empty(features, width)
        start.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
        self.encoder = nn.Parameter(start)
        self.decoder = nn.Parameter(functional.normalize(start, dim=1))
        self.bias = nn.Parameter(torch.zeros(width))
        has_bias = self.activation.encoder_bias if encoder_bias is None else encoder_bias
        self.encoder_bias = nn.Parameter(torch.zeros(features)) if has_bias else None
        self.parameter_options: dict[str, dict[str, Any]] = {"decoder": {"unit_rows": True}} if unit_rows else {}
        self.register_buffer("inactive", torch.zeros(features, dtype=torch.int64))
        self.register_buffer("fired", torch.zeros(features, dtype=torch.bool), persistent=False)
        self._ran = False

    def forward(self, x: Tensor) -> AutoencoderOutput:
        """Return the pass over a batch, float [batch, width]."""
        if x.ndim != 2 or x.shape[1] != self.width:
            raise InputError(
                f"SparseAutoencoder: inputs are float [batch, {self.width}], and these are {list(x.shape)}."
            )
        signal, mean, scale = self._normalised(x)
        z = sparse_products.encode(signal, self.bias, self.encoder, self.encoder_bias)
        norms = self.row_norms() if self.activation.uses_norms else None
        features, k = self.activation(z, norms, self._target(signal))
        if self.training:
            self._ran = True
            self.fired.logical_or_(features.detach().amax(0) > 0)
        decoded = (
            sparse_products.decode(features, self.decoder, self.bias, k)
            if self.activation.masks
            else self.decode(features)
        )
        return AutoencoderOutput(signal, decoded, features, k, z, mean, scale)

    def decode(self, features: Tensor) -> Tensor:
        """Return `f W_dec + b`."""
        return torch.addmm(self.bias.to(features.dtype), features, self.decoder.to(features.dtype))

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return x as the autoencoder sees it, on x's scale and in its shape float [..., width]: what is spliced into a model."""
        output: AutoencoderOutput = self(x.reshape(-1, self.width))
        return output.restored.reshape(x.shape)

    def _normalised(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if not self.normalise:
            return x, None, None
        mean = x.mean(1, keepdim=True)
        scale = x.std(1, keepdim=True) + 1e-5
        return (x - mean) / scale, mean, scale

    def _target(self, signal: Tensor) -> Tensor | None:
        if not self.activation.uses_norms:
            return None
        with torch.no_grad():
            centred = getattr(self.activation, "centred", True)
            norms: Tensor = torch.linalg.vector_norm(signal - self.bias if centred else signal, dim=1)
        return norms

    def row_norms(self) -> Tensor:
        """Return the lengths of the decoder's rows, float [features], without gradient.

        Raises:
            InputError: a row is 0 (looked at on the CPU alone).
        """
        norms: Tensor = torch.linalg.vector_norm(self.decoder.detach(), dim=1)
        if norms.device.type == "cpu" and float(norms.min()) == 0:
            raise InputError(
                f"SparseAutoencoder: decoder row {int(norms.argmin())} is 0, which is no direction. Draw it anew, or drop the feature."
            )
        return norms

    @torch.no_grad()
    def centre_on(self, x: Tensor) -> SparseAutoencoder:
        """Start the bias at the mean of inputs, float [n, width], as activations of transformers lie far from 0; return the autoencoder."""
        self.bias.copy_(self._normalised(x)[0].mean(0))
        return self

    def after_step(self) -> None:
        """Count one training step: what was active since the last one begins at 0 again. Solvers call it."""
        if not self._ran:
            return
        fired = processes.sum_across(self.fired.long()) > 0 if processes.size() > 1 else self.fired
        self.inactive.add_(1).masked_fill_(fired, 0)
        self.fired.zero_()
        self._ran = False

    def dead(self, after: int = 5) -> Tensor:
        """Return which features were inactive for `after` training steps or more, bool [features]."""
        return self.inactive >= after

    def extra_repr(self) -> str:
        return f"{self.width}, {self.features}, normalise={self.normalise}"
