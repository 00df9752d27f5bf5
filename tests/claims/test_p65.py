"""The claim of paper 65: how it judges, and that its study runs."""

from __future__ import annotations

import pytest

from poise.claims.p65 import A_BUDGET, A_FIXED, CLAIM, EQUAL, MERGED, RANDOM, STRENGTHS, A, Path, Study, _judge, grid


def study(influence: list[float], guidance: list[float]) -> Study:
    """Bandits where equal weights are worth 5e-3, and fixed ones at the mean multiplier 4e-3."""
    bandits, paths = [], []
    for b, a in zip(influence, guidance, strict=True):
        fixed = dict.fromkeys(grid("abc"), 2e-3) | {
            MERGED: 1e-3,
            RANDOM: 4.9e-3,
            A_FIXED: 4e-3,
            A_BUDGET: 3.9e-3,
            EQUAL: 5e-3,
        }
        methods = {f"B {s:g}": b - 1e-4 * i for i, s in enumerate(STRENGTHS)}
        bandits.append({**fixed, **methods, A: a})
        points = [[0.0, 0.0, 0.0], [0.1, 0.1, 0.1]]
        paths.append({name: Path(points, [[0.5, 0.4, 0.1]], multiplier=0.6) for name in bandits[-1]})
    return Study(bandits, paths)


@pytest.mark.parametrize(
    ("influence", "guidance", "verdict", "reason"),
    [
        ([6e-3] * 4, [4.5e-3] * 4, "holds", ""),
        ([6e-3] * 2 + [4.9e-3] * 2, [4.5e-3] * 3 + [3e-3], "holds", ""),
        ([9e-3] + [4.9e-3] * 3, [4.5e-3] * 4, "fails", "not below them in 1 of 4"),
        ([4e-3] * 2 + [5e-3] * 2, [4.5e-3] * 4, "fails", "make 4.50 against 5.00"),
        (
            [6e-3] * 4,
            [4.5e-3] * 2 + [3e-3] * 2,
            "fails",
            "is better in 2 of 4 bandits: what it does is the size of the step",
        ),
    ],
)
def test_it_fails_where_either_rule_gains_nothing(
    influence: list[float], guidance: list[float], verdict: str, reason: str
) -> None:
    finding = _judge(study(influence, guidance))
    assert finding.verdict == verdict
    assert reason in finding.reason


def test_the_paper_stands_beside_what_was_measured_and_the_weights_are_told() -> None:
    finding = _judge(study([6e-3] * 4, [4.5e-3] * 4))
    assert "0.832 -> 0.850" in finding.measured
    assert "grid 2.00 to 5.00" in finding.measured
    assert "smallest influence weight ends at 0.1" in finding.reason
    assert "below equal weights at the full step" in finding.reason
    assert finding.figures["bandits where guidance beats its mean"] == 4
    assert finding.figures["mean multiplier"] == pytest.approx(0.6)


def test_the_grid_has_corners_edges_and_centre_and_each_point_is_on_the_simplex() -> None:
    points = grid(("a", "b", "c"))
    assert len(points) == 7
    assert all(sum(w.values()) == pytest.approx(1) for w in points.values())


@pytest.mark.slow
def test_the_study_runs() -> None:
    finding = CLAIM.run()
    assert finding.figures["bandits where influence is not below equal weights"] >= 0
    assert len(finding.figures) > 20
