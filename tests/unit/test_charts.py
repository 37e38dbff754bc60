"""Charts: whatever the numbers and names, a picture that a parser takes."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.charts import Axis, Series, bar_chart, line_chart, number, page, table

points = st.lists(st.tuples(st.floats(1e-6, 1e12), st.floats(1e-6, 1e12)), min_size=1, max_size=20)


@given(points, st.text(max_size=20), st.booleans(), st.booleans())
def test_any_points_and_names_make_a_picture_with_all_of_them_in_it(
    given_points: list[tuple[float, float]], name: str, is_log: bool, is_line: bool
) -> None:
    name = "".join(letter for letter in name if letter.isprintable()) + "<&>"
    axes = Axis(name, is_log), Axis(name, is_log)

    picture = line_chart([Series(name, given_points, [name], is_line)], *axes)

    tree = ElementTree.fromstring(picture)
    circles = tree.findall("circle")
    assert len(circles) == len(given_points) + 1  # and the legend's
    for circle in circles:
        assert 0 <= float(circle.attrib["cx"]) <= 760
        assert 0 <= float(circle.attrib["cy"]) <= 380
    assert name in {text.text for text in tree.findall("text")}


@given(
    st.lists(st.lists(st.floats(0, 1e12), min_size=3, max_size=3), min_size=1, max_size=30),
    st.text(max_size=20),
)
def test_bars_stand_on_each_other_within_the_picture_and_each_says_what_it_is(
    columns: list[list[float]], name: str
) -> None:
    name = "".join(letter for letter in name if letter.isprintable()) + "<&>"
    series = [(f"{name}{n}", [column[n] for column in columns]) for n in range(3)]

    picture = bar_chart([name] * len(columns), series, name)

    bars = ElementTree.fromstring(picture).findall("rect")
    assert len(bars) == 3 * len(columns)
    for place, bar in enumerate(bars):
        top, height = float(bar.attrib["y"]), float(bar.attrib["height"])
        assert top >= 0 and height >= 0 and top + height <= 380
        assert bar.findtext("title", "").startswith(f"{name}: {name}{place % 3}: ")


@given(st.floats(1e-3, 1e9), st.floats(1.0001, 1e6), st.booleans())
def test_ticks_are_few_and_within_the_axis(low: float, times: float, is_log: bool) -> None:
    ticks = Axis("", is_log).ticks(low, low * times)

    assert len(ticks) <= 10
    assert all(low * 0.999 <= tick <= low * times * 1.001 for tick in ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.01234, "0.0123"),
        (12.34, "12.3"),
        (12345.6, "12,346"),
        (100, "100"),
        (2.5, "2.5"),
    ],
)
def test_numbers_are_for_people(value: float, text: str) -> None:
    assert number(value) == text


def test_a_page_asks_for_nothing_and_shows_what_it_is_given_as_text() -> None:
    html = page("<b>", table(["<i>"], [["</table>"]]))

    assert "<b>" not in html and "<i>" not in html and html.count("</table>") == 1
    assert "http" not in html and "src=" not in html
