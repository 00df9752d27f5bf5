"""Put a part of a fine-tuned model back to what it was before."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from poise.errors import InputError
from poise.parameter_masks import Categories, check, draw_mask, matrices_of

__all__ = ["half_reset"]

Weights = nn.Module | Mapping[str, Tensor]


@torch.no_grad()
def half_reset(
    tuned: Weights,
    before: Weights,
    mask: Mapping[str, bool | Tensor] | None = None,
    *,
    ratio: float | None = None,
    level: str = "category",
    seed: int = 0,
    categories: Categories = None,
    rescale: bool = False,
) -> dict[str, Tensor]:
    """Keep a fine-tuned model's weights where a mask says so, and put the rest back: `M*theta_tuned + (1 - M)*theta_before`.

    Args:
        tuned, before: modules of one architecture, or their state dicts.
        mask: parameter name -> True (keep), False (put back) or a bool tensor that broadcasts; names that are absent are kept.
            The mask of a `HalfFineTuning` fits.
        ratio: instead of a mask, the share to keep, in [0, 1]; it is then drawn with `level`, `seed` and `categories` as
            `poise.parameter_masks.draw_mask` does. 0 gives `before` and 1 gives `tuned`; in between, embeddings and the head keep
            their tuned values.
        rescale: divide what is kept of the change by the share that is kept, so that its mean stays (DARE does so by elements);
            the paper does not.

    Returns:
        A new state dict for `load_state_dict`; neither model is touched.

    Raises:
        InputError: neither or both of mask and ratio are given, the ratio is out of range, or names or shapes differ.

    >>> before, tuned = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> half = half_reset(tuned, before, {"weight": False})
    >>> torch.equal(half["weight"], before.weight), torch.equal(half["bias"], tuned.bias)
    (True, True)

    Source:
        arXiv:2404.18466, section 2 (Half-Reset); `rescale` from arXiv:2311.03099 (DARE).
    """
    if (mask is None) == (ratio is None):
        raise InputError("half_reset: give a mask or a ratio, one of them.")
    new, old = _weights(tuned), _weights(before)
    _refuse_strangers(new, old)
    if ratio is not None:
        if ratio in (0, 1):
            return {name: value.clone() for name, value in (new if ratio else old).items()}
        if not 0 < ratio < 1:
            raise InputError(f"half_reset: ratio must be in [0, 1], and it is {ratio}.")
        check(level, ratio)
        mask = draw_mask(matrices_of(tuned, categories, level), level, ratio, seed)
    assert mask is not None
    unknown = [name for name in mask if name not in new]
    if unknown:
        raise InputError(f"half_reset: the mask names {unknown[0]!r}, which the model does not have.")
    factor = 1 / _kept_share(mask, new) if rescale else 1.0
    result = {}
    for name, value in new.items():
        entry = mask.get(name, True)
        keep = entry.to(value.device) if isinstance(entry, Tensor) else torch.tensor(entry, device=value.device)
        start = old[name].to(value)
        # Without the difference where nothing is rescaled: kept and restored weights are then the same to the last bit.
        drawn = isinstance(entry, Tensor) or not entry
        moved = start + factor * (value - start) if rescale and drawn else value
        result[name] = torch.where(keep, moved, start)
    return result


def _kept_share(mask: Mapping[str, bool | Tensor], weights: Mapping[str, Tensor]) -> float:
    """Return the kept share of the numbers in tensors that are put back in part."""
    partly = {n: e for n, e in mask.items() if isinstance(e, Tensor)}
    kept = sum(int(e.expand(weights[n].shape).sum()) for n, e in partly.items())
    return kept / max(1, sum(weights[n].numel() for n in partly)) if kept else 1.0


def _weights(model: Weights) -> dict[str, Tensor]:
    return {n: t.detach() for n, t in (model.state_dict() if isinstance(model, nn.Module) else model).items()}


def _refuse_strangers(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> None:
    for name in [*new, *old]:
        if name not in new or name not in old or new[name].shape != old[name].shape:
            shapes = [tuple(w[name].shape) if name in w else "nothing" for w in (new, old)]
            raise InputError(
                f"half_reset: the models must have the same tensors, and {name!r} is {shapes[0]} in the tuned one and {shapes[1]} before."
            )
