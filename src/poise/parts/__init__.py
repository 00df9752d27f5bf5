"""Pieces of a model that are trained with it: how its weights are made, not what they are charged for.

A part changes a model in place and returns a handle. It can be named in text, as the command line and study files do:

    handle = apply_part(model, "compand(learn=True)")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from poise.call_text import parse_call
from poise.errors import InputError, nearest
from poise.lazy import load

if TYPE_CHECKING:
    from torch import nn

__all__ = ["CATALOGUE", "apply_part", "parse_part", "plain_copy"]

CATALOGUE: dict[str, str] = {
    "best_response": "poise.parts.best_response_conversion:make_best_response",
    "compand": "poise.parts.companding:compand",
}
"""Parts that text may name, and where each is defined; read without importing PyTorch."""

_HOME: dict[str, str] = {
    "as_noise": "noise",
    "AutoencoderOutput": "sparse_autoencoder",
    "BatchTopK": "sparse_activations",
    "BestResponse": "best_response",
    "BestResponseConv2d": "best_response",
    "BestResponseEmbedding": "best_response",
    "BestResponseLinear": "best_response",
    "BestResponseLSTM": "best_response_lstm",
    "BoxNoise": "noise",
    "compand": "companding",
    "compand_pretrained": "companding_conversion",
    "CompandBarrier": "companding",
    "Compander": "companding",
    "Companding": "companding",
    "companding_of": "companding",
    "ConversionReport": "companding_conversion",
    "ConvexPotential": "proximal_network",
    "ConvICNN": "proximal_network",
    "DnCNN": "denoisers",
    "drop_connect": "tuned_noise",
    "EnumerationNoise": "noise",
    "expert_capacity": "routing",
    "FeatureActivation": "sparse_activations",
    "FlowNoise": "noise",
    "fold_best_response": "best_response_conversion",
    "folded_copy": "companding",
    "FullGaussianNoise": "noise",
    "GaussianNoise": "noise",
    "GradientStepDenoiser": "denoisers",
    "GridNoise": "noise",
    "ICNN": "proximal_network",
    "Inverse": "proximal_network",
    "JumpReLU": "sparse_activations",
    "KDENoise": "noise",
    "LearnedProx": "proximal_network",
    "Load": "routing",
    "load_learned_prox": "proximal_network",
    "make_best_response": "best_response_conversion",
    "mask_report": "token_mask",
    "MaskReport": "token_mask",
    "MixedNoise": "noise",
    "MixtureNoise": "noise",
    "norm_mask": "norm_selection",
    "Patchwise": "patchwise",
    "ProxReport": "proximal_network",
    "ReLU": "sparse_activations",
    "Routing": "routing",
    "SparseAutoencoder": "sparse_autoencoder",
    "TokenMask": "token_mask",
    "TopAFA": "sparse_activations",
    "TopK": "sparse_activations",
    "TopKRouter": "routing",
    "TransportRouter": "routing",
    "TunedChannelDropout": "tuned_noise",
    "TunedColourJitter": "tuned_noise",
    "TunedCutout": "tuned_noise",
    "TunedDropout": "tuned_noise",
    "TunedInputScale": "tuned_noise",
    "TunedNoise": "tuned_noise",
}


def parse_part(text: str) -> tuple[str, dict[str, Any]]:
    """Read `"compand(learn=True, a=0.3)"` as a name and keyword arguments; nothing is evaluated.

    Args:
        text: a name of `CATALOGUE`, alone or with keyword arguments that are literals.

    Returns:
        The name and the arguments.

    Raises:
        FormulaError: the text is not of that form or the name is unknown.

    Example:
        >>> parse_part("compand(fn='tanh', learn=True)")
        ('compand', {'fn': 'tanh', 'learn': True})
    """
    return parse_call(text, CATALOGUE, "part", "compand(learn=True)")


def apply_part(model: nn.Module, text: str) -> Any:
    """Change `model` in place as the text says, and return the part's handle.

    Raises:
        FormulaError: the text is not a part.
        InputError: an argument is unknown, or the part refuses the model.

    Example:
        >>> from torch import nn
        >>> apply_part(nn.Linear(4, 3), "compand(learn=True)").stats()["weight"]["clipped_share"]
        0.0
    """
    import inspect

    name, arguments = parse_part(text)
    module, _, attribute = CATALOGUE[name].partition(":")
    part = getattr(importlib.import_module(module), attribute)
    known = list(inspect.signature(part).parameters)[1:]
    for argument in arguments:
        if argument not in known:
            raise InputError(
                f"{name} has no argument {argument!r}; it takes {', '.join(known)}.{nearest(argument, known)}"
            )
    return part(model, **arguments)


def plain_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model with what every part did to its weights worked into them: layers that PyTorch alone knows.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> _ = apply_part(model, "best_response(n_hyper=1)")
        >>> plain_copy(model)[0]
        Linear(in_features=4, out_features=8, bias=True)
    """
    from poise.parts.best_response_conversion import fold_best_response
    from poise.parts.companding import folded_copy

    return fold_best_response(folded_copy(model))


def __getattr__(name: str) -> Any:
    return load(__name__, _HOME, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
