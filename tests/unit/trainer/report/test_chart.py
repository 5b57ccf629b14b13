"""Charts: numbers that an axis names, where points lie, what is left out, what is said in words."""

import html
import itertools
import json
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.report import chart, scale
from trainer.report.chart import POINTS, Curve, Look, Mark

finite = st.floats(-1e12, 1e12, allow_nan=False)


def drawn(svg: str) -> dict[str, Any]:
    """The data that a chart carries for its reader."""
    found = re.search(r"data-chart='([^']*)'", svg)
    assert found is not None
    data: dict[str, Any] = json.loads(html.unescape(found[1]))
    return data


def places(svg: str) -> list[list[tuple[float, float]]]:
    """The pixels of each unbroken line."""
    return [
        [(float(x), float(y)) for x, y in (pair.split(",") for pair in points.split())]
        for points in re.findall(r'<polyline class="line s\d" points="([^"]*)"', svg)
    ]


@given(st.lists(finite, min_size=1, max_size=20), st.booleans(), st.booleans())
def test_an_axis_holds_its_values_and_names_round_numbers(values: list[float], zero: bool, log: bool) -> None:
    made = scale.axis(values, 200.0, 10.0, zero=zero, log=log)
    for value in values:
        assert 10 - 1e-6 <= made.place(value) <= 200 + 1e-6
    ticks = made.ticks(5)
    room = 1e-6 * (made.high - made.low) + 1e-9 * max(abs(made.low), abs(made.high))
    assert all(made.low - room <= tick <= made.high + room for tick in ticks)
    assert len(ticks) <= 20


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 5, [0, 1, 2, 3, 4, 5]), (0.5, 2.5, [0.5, 1, 1.5, 2, 2.5]), (0, 0.0007, [0, 0.0002, 0.0004, 0.0006])],
)
def test_ticks(low: float, high: float, expected: list[float]) -> None:
    assert scale.Axis(low, high, 0, 1).ticks(5) == pytest.approx(expected)


def test_a_logarithmic_axis_is_one_only_where_it_says_more() -> None:
    assert scale.axis([1.0, 50.0], 0, 1, log=True).ticks(5) == [1.0, 2.0, 5.0, 10, 20, 50]
    assert scale.axis([1.0, 1000.0], 0, 1, log=True).ticks(5) == [1.0, 10, 100, 1000]
    assert scale.axis([1e-9, 1000.0], 0, 1, log=True).ticks(5) == pytest.approx([1e-8, 1e-6, 1e-4, 1e-2, 1, 100])
    assert not scale.axis([1.0, 2.0], 0, 1, log=True).log
    assert not scale.axis([0.0, 1000.0], 0, 1, log=True).log


def test_numbers_in_few_characters() -> None:
    shown = [scale.short(value) for value in (0, 0.0005, 12, 3400, 1.5e6, 2e9, 4e12, 2e-7, 3.6e21)]
    assert shown == ["0", "0.0005", "12", "3.4k", "1.5M", "2G", "4T", "2e-07", "3.6e+21"]
    assert [scale.percent(value) for value in (0, 0.41, 0.4125, 1)] == ["0%", "41%", "41.2%", "100%"]
    assert [scale.hours(value) for value in (0, 0.01, 0.5, 3, 100)] == ["0", "36 s", "30 min", "3 h", "4.17 d"]


def test_points_lie_where_the_axes_say() -> None:
    svg = chart.curves([Curve("", [(0, 0.0), (5, 50.0), (10, 100.0)])], Look(y="loss", zero=True))
    (line,) = places(svg)
    (left, bottom), middle, (right, top) = line
    assert middle == pytest.approx(((left + right) / 2, (bottom + top) / 2), abs=0.11)
    assert left < right
    assert bottom > top  # pixels run down
    assert "0 at step 0, 100 at 10, between 0 and 100" in svg


def test_what_is_not_finite_breaks_the_line() -> None:
    svg = chart.curves([Curve("", [(0, 1.0), (1, 2.0), (2, math.nan), (3, 3.0), (4, math.inf), (5, 2.0)])], Look())
    assert [len(line) for line in places(svg)] == [2, 1, 1]
    assert drawn(svg)["curves"] == [["", [[0, 1], [1, 2], [3, 3], [5, 2]]]]
    assert svg.count("<circle") == 2 + 1 + 1  # pieces of a point or two would not be seen as lines


def test_nothing_to_draw_is_said() -> None:
    for curves in ([], [Curve("a", [])], [Curve("a", [(1, math.nan)])]):
        assert "nothing was recorded" in chart.curves(curves, Look())
    assert "nothing was recorded" in chart.bar([("a", 0.0)], scale.short)
    assert chart.sparkline([1.0]) == ""


def test_many_points_are_drawn_as_means_in_a_band() -> None:
    points = [(float(step), float(step % 2)) for step in range(100 * POINTS)]
    svg = chart.curves([Curve("", points)], Look())
    ((_, kept),) = drawn(svg)["curves"]
    assert len(kept) == POINTS
    assert kept[-1][0] == points[-1][0]
    assert {value for _, value in kept} == {0.5}
    assert '<polygon class="band s0"' in svg
    assert "between 0 and 1" in svg


def test_curves_have_names_dashes_and_places_of_their_own() -> None:
    svg = chart.curves([Curve(f"run <{number}>", [(0, 1.0), (1, 1.0)]) for number in range(12)], Look())
    names = re.findall(r'<text class="curve" x="[\d.]+" y="([-\d.]+)">([^<]*)</text>', svg)
    assert [html.unescape(name) for _, name in names] == [f"run <{number}>" for number in range(chart.CURVES)]
    heights = [float(y) for y, _ in names]
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 13
    assert min(heights) > 0
    assert max(heights) < chart.HEIGHT
    assert {f"line s{number}" for number in range(chart.CURVES)} <= set(re.findall(r"line s\d", svg))


def test_marks_are_said_in_words_and_do_not_lie_on_each_other() -> None:
    marks = [Mark(x, "s", f"save {x}") for x in (5.0, 5.01, 9.0, 99.0)] + [Mark(7.0, "R", "a <fault>", True)]
    svg = chart.curves([Curve("", [(0, 1.0), (10, 2.0)])], Look(marks=marks))
    assert svg.count("<title>save") == 3  # one lies outside
    assert svg.count(">s</text>") == 2  # two would lie on each other
    assert '<g class="mark fault"><title>a &lt;fault&gt;</title>' in svg


def test_a_bar_lists_its_parts_and_keeps_their_patterns() -> None:
    svg = chart.bar([("a", 30.0), ("absent", 0.0), ("b", 10.0)], lambda value: f"{value:g} s")
    assert "absent" not in svg
    for words in ("<b>75.0%</b> <span>30 s</span>", "<b>25.0%</b> <span>10 s</span>", "pattern-0", "pattern-2"):
        assert words in svg
    widths = [float(width) for width in re.findall(r'class="c\d" x="[\d.]+" y="0" width="([\d.]+)" height="34"', svg)]
    assert widths == pytest.approx([chart.WIDTH * 0.75 - 2, chart.WIDTH * 0.25 - 2])
    assert chart.patterns().count("<pattern ") == len(scale_classes())


def scale_classes() -> list[str]:
    """The classes that a bar of wall time has parts for."""
    from trainer.health.goodput import CLASSES

    return list(CLASSES)
