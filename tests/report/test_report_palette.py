"""Colours can be told apart and read, in both themes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from poise.report.palette import COLOURS, THEMES, colour, dash, letter, symbol

# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
SIGHT = {
    "full colour vision": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
}  # fmt: skip


def linear(colour: str) -> np.ndarray:
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    high, low = sorted((float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """Ottosson (2020): a space in which distance follows perceived difference."""
    to_cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return to_lab @ np.cbrt(to_cones @ np.clip(rgb, 0, 1))


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("ground", ["page", "paper"])
def test_text_has_a_contrast_of_at_least_4_5(theme: str, ground: str) -> None:
    tones = THEMES[theme]
    for name in ("ink", "muted", "accent", "good", "alert"):
        assert contrast(tones[name], tones[ground]) >= 4.5, name
    assert contrast(tones["good"], tones["good-wash"]) >= 4.5
    assert contrast(tones["alert"], tones["alert-wash"]) >= 4.5
    assert contrast(tones["ink"], tones["alert-wash"]) >= 4.5
    assert contrast(tones["paper"], tones["accent"]) >= 4.5  # the copy button


@pytest.mark.parametrize("theme", THEMES)
def test_lines_have_a_contrast_of_at_least_3_on_what_they_are_drawn_on(theme: str) -> None:
    tones = THEMES[theme]
    for i in range(COLOURS):
        assert contrast(tones[f"series-{i}"], tones["paper"]) >= 3
        assert contrast(tones[f"series-{i}"], tones["good-wash"]) >= 3


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("sight", SIGHT)
def test_formulas_stay_apart_for_every_form_of_colour_vision(theme: str, sight: str) -> None:
    seen = [oklab(SIGHT[sight] @ linear(THEMES[theme][f"series-{i}"])) for i in range(COLOURS)]
    # 0.02 is a just noticeable difference in this space; thin lines need a few of them.
    assert min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2)) >= 0.065


def test_both_themes_name_the_same_colours() -> None:
    assert THEMES["light"].keys() == THEMES["dark"].keys()


def test_the_first_24_formulas_differ_in_colour_or_dash_and_neighbours_in_their_mark() -> None:
    assert len({(colour(i), dash(i)) for i in range(24)}) == 24
    assert all(symbol(i) != symbol(i + 1) for i in range(24))
    assert len({letter(i) for i in range(800)}) == 800
