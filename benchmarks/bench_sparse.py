"""What sparse masks cost: memory and time of `sparse_po` beside `tdpo`, whose forwards and divergences are the same.

A Llama of six layers, 128 wide, 8,000 tokens in the vocabulary, 4 pairs of 2 x 64 answer tokens behind prompts of 16. Both sides run
policy and reference on both answers; the learned mask also reads the reference's states of every layer.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks.bench_rrpo import _batch, _models, _peak, _stepping
from benchmarks.harness import Ratio, one_thread, paired
from poise.formula import parse
from poise.problem import ModelView
from poise.quantities import Quantities
from poise.readouts.language import Language
from poise.weights.activation_mask import ActivationMask

LAYERS, WIDTH = 6, 128


def run(quick: bool) -> list[Ratio]:
    """Ratios of peak memory and step time of learned and of given masks to TDPO, version 1."""
    vocabulary, repeats = (2_000, 3) if quick else (8_000, 12)
    with one_thread():
        model, reference = _models(vocabulary, LAYERS, WIDTH)
        batch, readout = _batch(vocabulary), Language(reference)
        weighing = ActivationMask().over(readout)

        known = {**batch, **ActivationMask().columns(reference, batch)}

        def side(formula: str, reading: Callable[..., Quantities], data: dict[str, Tensor]) -> Callable[[], Tensor]:
            objective = parse(formula)
            plan = objective.plan()

            def loss() -> Tensor:
                objective.advance()  # the step before this one
                offered = reading(ModelView(model), Quantities(dict(data), key=(0, 0, 0, 0)), plan)
                # What is read alone: in a loop of one's own, a term with random numbers looks at all that is offered.
                return objective({name: offered[name] for name in plan})

            return loss

        tdpo = side("tdpo(version=1)", readout, batch)
        rivals = {
            "learned masks": side(f"sparse_po(layers={LAYERS}, width={WIDTH})", readout, batch),
            "masks of activations, known before": side("sparse_po(mask_from='data')", readout, known),
            "masks of activations, in the step": side("sparse_po(mask_from='data')", weighing, batch),
        }
        where = f"{LAYERS} layers, {WIDTH} wide, {vocabulary} in the vocabulary"
        found = []
        for name, other in rivals.items():
            if name.startswith("learned"):
                peaks = [_peak(one) for one in (other, tdpo)]
                detail = f"{where}: {peaks[0] / 2**20:.0f} against {peaks[1] / 2**20:.0f} MiB above the models"
                found.append(Ratio(f"peak memory of {name} / of tdpo", peaks[0] / peaks[1], 1.25, "lower", detail))
            timing = paired(_stepping(model, other), _stepping(model, tdpo), repeats, warmup=1)
            detail = f"{where}: {timing.first * 1e3:.0f} against {timing.second * 1e3:.0f} ms"
            found.append(Ratio(f"step of {name} / step of tdpo", timing.ratio, 1.1, "lower", detail))
    return found
