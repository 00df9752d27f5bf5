"""Put gates into a model that is there already, and take them out again."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Iterator, Sequence

from torch import nn

from poise.errors import InputError
from poise.parts.best_response import BestResponse, BestResponseConv2d, BestResponseEmbedding, BestResponseLinear
from poise.parts.best_response_lstm import BestResponseLSTM
from poise.response_input import ResponseInput

__all__ = ["fold_best_response", "make_best_response"]


def make_best_response(
    model: nn.Module,
    n_hyper: int,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    batch_axis: int = 0,
) -> ResponseInput:
    """Replace the linear, convolutional, embedding and LSTM layers of a model by gated ones, in place, at the same weights.

    The gates begin shut (`h = 0`), so the outputs do not change.

    Args:
        model: a module with layers of these kinds inside; it is changed.
        n_hyper: number of hyperparameters, at least 1.
        include, exclude: name patterns of layers (`"encoder.*"`); `exclude` wins.
        batch_axis: the axis of examples in the inputs of linear layers and embeddings; 1 for [time, batch, ...].

    Returns:
        The inputs that all gates read; a policy finds them in the model by itself.

    Raises:
        InputError: the model has gates already, is itself one of these layers, nothing is selected, or a selected weight is shared with
            another layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> make_best_response(model, n_hyper=2)
        ResponseInput(n_hyper=2)

    Source: arXiv:1903.03088, section 3.
    """
    if any(isinstance(m, BestResponse) for m in model.modules()):
        raise InputError("make_best_response: the model has gated layers already.")
    if isinstance(model, nn.Linear | nn.Conv2d | nn.Embedding | nn.LSTM):
        raise InputError(
            f"make_best_response replaces layers inside a module, and this is itself a {type(model).__name__}: wrap it in nn.Sequential."
        )
    chosen = [found for found in _layers(model) if _selected(found[0], include, exclude)]
    if not chosen:
        raise InputError(
            "make_best_response: no linear, convolutional, embedding or LSTM layer is selected, so no weight would answer."
        )
    _refuse_ties(model, chosen)
    inputs = ResponseInput(n_hyper)
    for name, parent, own, layer in chosen:
        made = _gated(name, layer, n_hyper, inputs, batch_axis)
        made.train(layer.training)
        parent._modules[own] = made
    inputs.to(next(model.parameters()).device)
    return inputs


def fold_best_response(model: nn.Module) -> nn.Module:
    """Return a plain copy of a model: every gated layer at the hyperparameters where its gates stand.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> _ = make_best_response(model, n_hyper=2)
    >>> fold_best_response(model)[0]
    Linear(in_features=4, out_features=8, bias=True)
    """
    folded = copy.deepcopy(model)
    modes = {module: module.training for module in folded.modules()}
    folded.eval()  # what is dropped from a weight in training is there in the plain layer
    if isinstance(folded, BestResponse):
        return folded.plain().train(model.training)
    for module, training in modes.items():
        for own, child in module._modules.items():
            if isinstance(child, BestResponse):
                module._modules[own] = child.plain().train(modes[child])
        module.training = training
    return folded


_Found = tuple[str, nn.Module, str, nn.Module]


def _layers(model: nn.Module) -> Iterator[_Found]:
    """Every layer that has a gated form: name, parent, name in the parent, layer."""
    for path, parent in model.named_modules():
        # Attention multiplies by its projection's weight itself, so a layer in its place would be passed by.
        if isinstance(parent, nn.MultiheadAttention):
            continue
        for own, layer in parent._modules.items():
            if type(layer) in (nn.Linear, nn.Conv2d, nn.Embedding, nn.LSTM):
                yield f"{path}.{own}".lstrip("."), parent, own, layer


def _selected(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    def matches(patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    return matches(include) and not matches(exclude)


def _refuse_ties(model: nn.Module, chosen: Sequence[_Found]) -> None:
    """A weight that another layer reads as well would no longer be shared."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for own, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{path}.{own}".lstrip("."))
    for name, _, _, layer in chosen:
        for parameter in layer.parameters():
            shared = owners[id(parameter)]
            if len(shared) > 1:
                raise InputError(
                    f"make_best_response: {shared[0]} and {shared[1]} are one weight, and {name!r} alone would be replaced. "
                    "Untie them, or exclude both layers."
                )


def _gated(name: str, layer: nn.Module, n_hyper: int, inputs: ResponseInput, batch_axis: int) -> BestResponse:
    made: BestResponse
    try:
        if isinstance(layer, nn.Linear):
            made = BestResponseLinear.of(layer, n_hyper, inputs, batch_axis)
        elif isinstance(layer, nn.Conv2d):
            made = BestResponseConv2d.of(layer, n_hyper, inputs)
        elif isinstance(layer, nn.Embedding):
            made = BestResponseEmbedding.of(layer, n_hyper, inputs, batch_axis)
        else:
            assert isinstance(layer, nn.LSTM)
            made = BestResponseLSTM.of(layer, n_hyper, inputs)
    except InputError as error:
        raise InputError(f"make_best_response: layer {name!r}: {error} (exclude=[{name!r}])") from error
    return made
