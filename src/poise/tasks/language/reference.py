"""Log-probabilities under the frozen reference, computed once and stored on the disk.

A term that reads `reference_<side>_logps` then costs no pass of a second model, in this run, in the next one, and after a restart. What
needs the whole distribution of the reference (`token_kl`, hidden states) still runs it.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from poise.errors import InputError
from poise.problem import ModelView
from poise.quantities import Quantities
from poise.readouts.language import Language
from poise.tasks.language.tokens import Ragged, TokenizedRecords

__all__ = ["store_reference"]


def store_reference(
    model: nn.Module, data: TokenizedRecords, folder: str | os.PathLike[str], *, name: str, batch: int = 8
) -> TokenizedRecords:
    """Return the data with `reference_<side>_logps` beside each answer, read from the disk where they lie there already.

    Args:
        model: the reference, as it is now: the policy before training.
        data: of `tokenize`.
        folder: where the values are kept, one safetensors file for each pair of data and model.
        name: what names the reference, such as the hash of its files; another name is another reference.
        batch: answers at once.

    Raises:
        InputError: the name is empty, or the file is of other data.

        >>> data = store_reference(model, data, "references", name="my-lm")  # doctest: +SKIP
    """
    from safetensors.torch import load_file, save_file

    if not name:
        raise InputError("A stored reference needs a name that changes with the model, such as the hash of its files.")
    key = hashlib.sha256(f"{data.fingerprint} {name}".encode()).hexdigest()[:24]
    place = Path(folder) / f"reference-{key}.safetensors"
    if place.is_file():
        values = load_file(place)
    else:
        values = _score(model, data, batch)
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
        os.close(handle)
        try:
            save_file(values, temporary)
            os.replace(temporary, place)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    try:
        return data.with_reference({side: Ragged.of(values[side], data.answer_lengths(side)) for side in data.sides})
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{place} holds the reference of other data. Remove it, so that it is computed anew."
        ) from error


def _score(model: nn.Module, data: TokenizedRecords, batch: int) -> dict[str, Tensor]:
    """Return by side the log-probabilities of all answers' tokens, one answer behind the other, float32."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    found: dict[str, list[Tensor]] = {side: [torch.empty(0)] * len(data) for side in data.sides}
    try:
        with torch.no_grad():
            for rows, moved in data.batches_by_length(batch, device):
                plan = frozenset(f"{side}_logps" for side in data.sides)
                read = Language()(ModelView(model), Quantities(moved, device=device), plan)
                for side in data.sides:
                    real = moved[f"{side}_attention"]
                    for place, row in enumerate(rows.tolist()):
                        whole = read[f"{side}_logps"][place][real[place]].float().cpu()
                        found[side][row] = whole[len(whole) - int(data.answer_lengths(side)[row]) :]
    finally:
        model.train(training)
    return {side: torch.cat(parts) for side, parts in found.items()}
