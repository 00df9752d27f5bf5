"""A readout for sparse autoencoders: what one pass over a batch of activations gives, by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from poise.errors import IncompatibleError
from poise.problem import ModelView
from poise.quantities import Quantities

_OF_THE_PASS = ("signal", "reconstruction", "features", "k", "z")


class Autoencoding:
    """Offer what a `poise.parts.SparseAutoencoder` makes of `input` float [batch, width], from one forward pass.

    `signal`, `reconstruction` float [batch, width]; `features`, `z`, `gates` float [batch, features]; `k` int64 [batch]; `decoder` float
    [features, width]; `centre` float [width], the decoder's bias; `inactive` int64 [features]. Predictions are `reconstruction`, on
    the scale of `signal`.

    Raises:
        IncompatibleError: the model returns something else than an `AutoencoderOutput`.
    """

    output = "reconstruction"

    def __call__(self, model: ModelView, batch: Quantities, reads: frozenset[str]) -> Quantities:
        batch.offer("_pass", lambda: self._run(model, batch["input"]))
        for name in _OF_THE_PASS:
            batch.offer(name, lambda name=name: getattr(batch["_pass"], name))  # type: ignore[misc]
        batch.offer("decoder", lambda: model.run(_attribute, "decoder"))
        batch.offer("centre", lambda: model.run(_attribute, "bias"))
        batch.offer("inactive", lambda: model.run(_attribute, "inactive"))
        batch.offer("gates", lambda: model.run(_gates, batch["z"], batch["features"]))
        batch.put("model", model)
        if "parameters" in reads:
            batch.put("parameters", model.parameters)
        return batch

    def _run(self, model: ModelView, input: Tensor) -> Any:
        out = model(input)
        if not all(hasattr(out, name) for name in _OF_THE_PASS):
            raise IncompatibleError(
                "Autoencoding: the model must return what poise.parts.SparseAutoencoder does, with "
                f"{', '.join(_OF_THE_PASS)}, and it returned a {type(out).__name__}."
            )
        return out


def _attribute(module: nn.Module, name: str) -> Any:
    return getattr(module, name)


def _gates(module: Any, z: Tensor, features: Tensor) -> Tensor:
    return module.activation.gates(z, features)  # type: ignore[no-any-return]
