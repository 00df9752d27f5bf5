"""The verdict of claim 39 follows from its figures: each outcome that it calls falsifying makes it fail."""

from __future__ import annotations

import dataclasses

import pytest

from poise.claims import p39

BASE = [
    p39._Measured(0.94 + 0.002 * s, 0.24 + 0.01 * s, 0.18 + 0.001 * s, 0.3, 0.82 + 0.003 * (s % 3)) for s in range(8)
]
GOOD = {"accuracy": 0.004, "largest": -0.1, "near_zero": -0.02, "robust": 0.03}


def runs(**changes: float) -> dict[str, list[p39._Measured]]:
    shift = {**GOOD, **changes}
    moved = [
        dataclasses.replace(m, **{k: getattr(m, k) + v * (1 + 0.01 * s) for k, v in shift.items()})
        for s, m in enumerate(BASE)
    ]
    return {"decay": BASE, "fixed+decay": moved, "learned+decay": moved}


def test_the_expected_outcome_contradicts_nothing() -> None:
    assert p39._failures(runs(), "fixed+decay") == []
    assert "largest |w| 0.275, 0.17" in p39._sentence(runs())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"largest": 0.01}, "largest"),
        ({"near_zero": 0.02}, "near zero"),
        ({"accuracy": -0.01}, "half a standard deviation"),
        ({"robust": -0.02}, "dropped weights"),
    ],
)
def test_each_falsifying_outcome_is_named(change: dict[str, float], words: str) -> None:
    (failure,) = p39._failures(runs(**change), "learned+decay")
    assert words in failure


def test_one_seed_of_every_variant_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(p39, "_EPOCHS", 1)
    for variant in p39._FULL.values():
        measured = p39._train(p39._mlp, variant, p39._digits(), 200, seed=0)
        assert 0 <= measured.accuracy <= 1
        assert measured.largest > 0
