"""The page in a real browser: it asks only for files, says nothing on the console, draws, fits, switches and copies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from report_browser import CHROMIUM, Browser
from report_example import PYTHON, make_policy_summary, make_summary
from test_report_embedding import HOSTILE
from test_report_figures import FIVE

from poise.report import write_report

pytest.importorskip("websocket", reason="the browser tests need websocket-client: pip install 'poise[test]'")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found: install chromium")]

OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
# Every drawn figure holds at least one mark, line or text that plotly made.
DRAWN = "[...document.querySelectorAll('.plot')].filter(p => p.querySelector('svg.main-svg .trace')).length"
VISIBLE = "[...document.querySelectorAll('.plot')].filter(p => p.clientWidth > 0).length"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    return write_report(make_summary(FIVE, failed=True, tuned=True), folder)


@pytest.fixture(scope="module")
def small_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with few figures, for what does not depend on them."""
    return write_report(make_summary(seeds=2, steps=60), tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def policy_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with constraints and with weights that set themselves."""
    return write_report(make_policy_summary(), tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser) -> Browser:
    chromium.requests.clear()
    chromium.problems.clear()
    chromium.show()
    return chromium


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_asks_for_two_files_and_the_network_for_nothing(browser: Browser, page: Path, dark: bool) -> None:
    browser.show(dark=dark)
    browser.open(page)
    assert sorted(url for url in browser.requests if not url.startswith("data:")) == [
        (page.parent / "plotly.min.js").as_uri(),
        page.as_uri(),
    ]
    assert browser.problems == []


def test_every_figure_is_drawn(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.run(DRAWN) == browser.run(VISIBLE) > 15
    browser.run("document.querySelectorAll('details').forEach(box => { box.open = true })")
    browser.wait(f"{DRAWN} === document.querySelectorAll('.plot').length")
    assert browser.problems == []


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_page_never_scrolls_sideways(browser: Browser, page: Path, width: int) -> None:
    browser.show(width, 844, touch=width < 800)
    browser.open(page)
    assert browser.run(OVERFLOW) == 0
    browser.run("document.querySelectorAll('details').forEach(box => { box.open = true })")
    browser.wait(f"{DRAWN} === document.querySelectorAll('.plot').length")
    assert browser.run(OVERFLOW) == 0


@pytest.mark.parametrize(("width", "dark"), [(320, False), (390, True), (1280, False), (1280, True)])
def test_constraints_and_policies_are_drawn_in_every_width_and_theme_without_the_network(
    browser: Browser, policy_page: Path, width: int, dark: bool
) -> None:
    browser.show(width, 844, touch=width < 800, dark=dark)
    browser.open(policy_page)
    browser.run("document.querySelectorAll('details').forEach(box => { box.open = true })")
    browser.wait(f"{DRAWN} === document.querySelectorAll('.plot').length")
    assert browser.run(OVERFLOW) == 0
    for section, drawn in (("constraints", 2), ("policies", 8)):
        assert browser.run(f"document.querySelectorAll('#{section} .plot svg.main-svg').length") >= drawn
        assert browser.run(f"document.querySelector('nav a[href=\"#{section}\"]') !== null")
    assert all(url.startswith(("file://", "data:")) for url in browser.requests)
    assert browser.problems == []


def test_a_button_of_the_weights_hides_that_weight_in_all_its_figures(browser: Browser, policy_page: Path) -> None:
    browser.open(policy_page)
    button = 'document.querySelector(\'button[data-charts^="policy-weight-3"][data-formula="0"]\')'
    assert browser.run(f"{button}.textContent.trim()").startswith("1")
    browser.run(f"{button}.click()")
    for chart in ("weight", "gradient-norm", "hypergradient"):
        shown = f"document.getElementById('plot-policy-{chart}-3').data.filter(t => t.visible).map(t => t.meta.formula)"
        assert 0 not in browser.run(shown)
        assert 1 in browser.run(shown)
    other = "document.getElementById('plot-policy-cosine-3').data.filter(t => t.visible).map(t => t.meta.formula)"
    assert 0 in browser.run(other)


def test_a_change_of_theme_recolours_page_and_figures_at_once(browser: Browser, small_page: Path) -> None:
    browser.open(small_page)
    look = "[getComputedStyle(document.body).backgroundColor, document.querySelector('.plot .xtick text').style.fill, document.querySelector('.plot .js-line').style.stroke]"  # noqa: E501
    light = browser.run(look)
    browser.show(dark=True)
    browser.wait(f"{look}[1] !== {light[1]!r}")
    dark = browser.run(look)
    assert all(a != b for a, b in zip(light, dark, strict=True))


def test_a_legend_button_works_by_keyboard_and_hides_its_formula_only(browser: Browser, small_page: Path) -> None:
    browser.open(small_page)
    browser.run('document.querySelector(\'button[data-charts="valid-0"][data-formula="1"]\').focus()')
    shown = "document.getElementById('plot-valid-0').data.filter(t => t.visible).map(t => t.meta.formula)"
    before = browser.run(shown)
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key=" ", code="Space", text=" ", windowsVirtualKeyCode=32)
    assert browser.run("document.activeElement.getAttribute('aria-pressed')") == "false"
    assert browser.run(shown) == [formula for formula in before if formula != 1]
    browser.run("document.activeElement.click()")
    assert browser.run(shown) == before


def test_the_copy_button_puts_exactly_the_lines_into_the_clipboard(browser: Browser, small_page: Path) -> None:
    browser.open(small_page)
    browser.run("navigator.clipboard.writeText = async text => { window.got = text }")
    browser.run("document.querySelector('button.copy').click()")
    browser.wait("document.querySelector('button.copy').textContent === 'Copied'")
    assert browser.run("window.got") == PYTHON
    assert "clipboard" in browser.run("document.getElementById('copied').textContent")


def test_the_copy_button_falls_back_where_a_browser_keeps_the_clipboard_from_pages_on_disk(
    browser: Browser, small_page: Path
) -> None:
    browser.open(small_page)
    browser.run("navigator.clipboard.writeText = () => Promise.reject(new Error('not here'))")
    browser.run("document.addEventListener('copy', () => { window.got = String(getSelection()) })")
    browser.run("document.querySelector('button.copy').click()")
    browser.wait("window.got")
    assert browser.run("window.got").strip() == PYTHON.strip()


def test_without_the_script_the_page_still_says_everything_in_words(
    browser: Browser, small_page: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "report.html"
    alone.write_bytes(small_page.read_bytes())
    browser.open(alone)
    text = browser.run("document.body.innerText")
    assert "A starts at" in text
    assert browser.run("document.documentElement.classList.contains('no-figures')")


def test_hostile_names_run_nothing_load_nothing_and_do_not_disturb_the_figures(
    browser: Browser, tmp_path: Path
) -> None:
    everything = "".join(HOSTILE)
    page = write_report(
        make_summary(seeds=2, steps=30, failed=True, tuned=True, label=lambda text: text + everything), tmp_path
    )
    browser.open(page)
    assert browser.run("typeof window.hacked") == "undefined"
    assert all(url.startswith(("file://", "data:")) for url in browser.requests)
    assert browser.problems == []
    assert browser.run(DRAWN) == browser.run(VISIBLE) > 8
    assert browser.run("document.querySelectorAll('main a[href^=\"http\"], svg a').length") == 0
    browser.show(390, 844, touch=True)
    browser.open(page)
    assert browser.run(OVERFLOW) == 0


def test_in_print_the_figures_are_light_and_fit_the_paper(browser: Browser, small_page: Path) -> None:
    browser.show(dark=True)
    browser.open(small_page)
    browser.run("window.dispatchEvent(new Event('beforeprint'))")
    widths = browser.run(
        "[...document.querySelectorAll('.plot svg.main-svg')].map(s => s.getBoundingClientRect().width)"
    )
    assert max(widths) <= 660  # A4 less margins and padding, at 96 pixels an inch
    fill = browser.run("document.querySelector('.plot .xtick text').style.fill")
    assert fill == "rgb(88, 97, 107)"  # the muted ink of the light theme
    browser.run("window.dispatchEvent(new Event('afterprint'))")
    assert browser.run("document.querySelector('.plot .xtick text').style.fill") != fill


def test_the_labels_that_a_screen_reader_gets_name_every_figure_and_button(browser: Browser, page: Path) -> None:
    browser.open(page)
    tree = browser.call("Accessibility.getFullAXTree")["nodes"]
    for role in ("image", "img", "button", "link", "table"):
        for node in tree:
            if node.get("role", {}).get("value") == role and not node.get("ignored"):
                assert node.get("name", {}).get("value"), json.dumps(node)[:300]
