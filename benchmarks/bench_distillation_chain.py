"""The share of labels from two runs, beside a grid of eleven shares: processor seconds for the final student.

Both sides count everything from nothing: the teacher, the probe or the grid, and the student at the share that was found.
1,500 MNIST images with 30 % wrong labels, an MLP 784-256-10, Adam annealed to 0 over 40 epochs, penalty 0.003.
"""

from __future__ import annotations

from benchmarks.harness import Ratio
from poise.claims.p45 import TENTHS, network


def run(quick: bool) -> list[Ratio]:
    """Cost ratio, and what the cheaper way loses in accuracy on clean labels, in points."""
    found = network(3e-3, TENTHS, seed=0, epochs=3 if quick else 40)
    lost = 100 * (found.grid_accuracy - found.accuracy)
    shares = f"share {found.estimate.raw:.2f} from two runs, {found.grid:.1f} on the grid"
    return [
        Ratio("grid of eleven shares / two runs and the student, cpu seconds", found.cost_ratio, 4.0, "higher", shares),
        Ratio(
            "accuracy that two runs lose, points",
            lost,
            0.3,
            "lower",
            f"{found.accuracy:.4f} against {found.grid_accuracy:.4f}",
        ),
    ]
