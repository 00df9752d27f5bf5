"""Foreign text stays text: in the HTML, in the JSON of the script tag, and in the figures."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_example import make_summary

from poise.report import render
from poise.report.embed import figure_text, script_json

HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<!--<script>",
    "-->",
    "]]>",
    "<img src=x onerror='window.hacked = 1'>",
    '" onmouseover="window.hacked = 1',
    "' style='position:fixed",
    "\u2028window.hacked = 1\u2029",
    "&lt;b&gt; &amp;",
    "<a href='http://example.invalid'>x</a>",
    "%{y} %{customdata[0]}",
    "{{ 7 * 7 }} {% raw %}",
    "$x^2$",
    "\x00\x1b[31m\r\n\t",
    "\u202eabc",
    "\ud800",
    "series-1",
    "`; window.hacked = 1; //",
    "A" * 300,
]
names = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(max_size=12),
    st.tuples(st.sampled_from(HOSTILE), st.text(max_size=5)).map("".join),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | names,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)


class Structure(HTMLParser):
    """What a browser makes of a page: elements with the names of their attributes, text, and the JSON of the figures."""

    # A long name may wrap, and the answer shows formulas that it names with their letter: these come and go.
    INLINE = frozenset({"wbr", "span", "code", "b", "i"})

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.inline: set[tuple[str, tuple[str, ...]]] = set()
        self.links: list[str] = []
        self.text: dict[str, str] = {}
        self._open = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        shape = (tag, tuple(name for name, _ in attrs))
        (self.inline.add if tag in self.INLINE else self.elements.append)(shape)  # type: ignore[attr-defined]
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "action", "srcset", "data")]
        self._open = dict(attrs).get("id") or tag

    def handle_data(self, data: str) -> None:
        self.text[self._open] = self.text.get(self._open, "") + data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment opened: {data[:50]}")


def small(**options: object) -> object:
    return make_summary(seeds=2, steps=12, failed=True, tuned=True, **options)  # type: ignore[arg-type]


@given(json_values)
def test_json_in_a_script_tag_reads_back_equal_and_holds_nothing_that_could_end_the_tag(value: object) -> None:
    text = script_json(value)
    assert json.loads(text) == json.loads(json.dumps(value))
    assert text.isascii()
    assert not set("<>&'") & set(text)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_know_become_null(number: float) -> None:
    assert json.loads(script_json({"a": [1.5, number]})) == {"a": [1.5, None]}


@given(names, st.integers(1, 60) | st.none())
def test_text_in_a_figure_holds_no_markup_no_placeholder_and_no_control_sign(text: str, limit: int | None) -> None:
    shown = figure_text(text, limit)
    assert "<" not in shown
    assert ">" not in shown
    assert "%{" not in shown
    assert all(sign.isprintable() or sign == "\u2060" for sign in shown)


# One page takes a few hundredths of a second; twenty-five names are enough beside the list that is always tried.
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(names)
def test_no_name_changes_the_structure_of_the_page(name: str) -> None:
    check_structure(name)


@pytest.mark.parametrize("name", HOSTILE)
def test_known_attacks_do_not_change_the_structure_of_the_page(name: str) -> None:
    check_structure(name)


HARMLESS = Structure(render(small()))  # type: ignore[arg-type]


def check_structure(name: str) -> None:
    html = render(small(label=lambda text: f"{text}{name}"))  # type: ignore[arg-type]
    page = Structure(html)
    assert page.elements == HARMLESS.elements
    assert page.inline - {("wbr", ())} <= HARMLESS.inline | {("b", ()), ("code", ("class",))}
    assert page.links == HARMLESS.links
    assert all(link.startswith("#") or link in ("data:,", "plotly.min.js") for link in page.links)
    data = json.loads(page.text["data"])
    assert data["figures"].keys() == json.loads(HARMLESS.text["data"])["figures"].keys()
    html.encode("utf-8", "replace")


def test_a_template_in_a_name_is_not_evaluated() -> None:
    html = render(small(label=lambda text: text + "{{ 7 * 7 }}"))  # type: ignore[arg-type]
    assert "{{ 7 * 7 }}" in html


def test_the_page_names_no_address_on_the_network() -> None:
    html = render(small())  # type: ignore[arg-type]
    assert "http://" not in html
    assert "https://" not in html
    assert "//" not in "".join(Structure(html).links)
