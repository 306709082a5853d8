"""The charts: with no, one, constant and many points; ticks; thinning; the YAML colouring."""

from __future__ import annotations

import re
from html import unescape
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftcli.report.bars import bars
from peftcli.report.charts import MAX_POINTS, Point, Series, line_chart, smooth, thin, tick_label, ticks
from peftcli.report.highlight import highlight_yaml


def draw(points: list[Point], *, smoothed: bool = False) -> str:
    return line_chart("Loss", [Series("training", points, smoothed=smoothed)], y_label="nats", show=lambda value: f"{value:.3f}")


def coordinates(svg: str) -> list[float]:
    """Every coordinate of the drawing; parsing proves that the SVG is well-formed."""
    root = ET.fromstring(re.search(r"<svg.*</svg>", svg, re.DOTALL).group())  # type: ignore[union-attr]
    found: list[float] = []
    for node in root.iter():
        found += [float(node.attrib[key]) for key in ("x", "y", "cx", "cy", "x1", "x2", "y1", "y2") if key in node.attrib]
        found += [float(number) for number in re.findall(r"-?[\d.]+", node.attrib.get("d", ""))]
    return found


def test_no_points_say_so() -> None:
    assert "Nothing was logged" in draw([])
    assert "<svg" not in draw([])


def test_one_point_is_a_dot() -> None:
    svg = draw([Point(5, 1.25)])
    assert 'class="dot train"' in svg
    assert "<path" not in svg
    assert "1.250 at step 5" in svg


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-12, 1e12])
def test_a_constant_curve_has_an_axis(value: float) -> None:
    assert all(-1 <= number <= 721 for number in coordinates(draw([Point(step, value) for step in range(20)])))


def test_many_points_are_thinned_but_spikes_stay() -> None:
    points = [Point(step, 1.0) for step in range(100_000)]
    points[54_321] = Point(54_321, 9.0)
    points[12_345] = Point(12_345, 0.0)
    few = thin(points, MAX_POINTS)
    assert len(few) <= MAX_POINTS + 2
    assert {Point(54_321, 9.0), Point(12_345, 0.0), points[0], points[-1]} <= set(few)
    assert len(draw(points, smoothed=True)) < 200_000


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=60))
def test_any_curve_stays_on_the_drawing(values: list[float]) -> None:
    svg = draw([Point(step + 1, value) for step, value in enumerate(values)], smoothed=True)
    assert all(-1 <= number <= 721 for number in coordinates(svg))


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 10))
def test_ticks_are_round_few_and_inside(low: float, span: float, count: int) -> None:
    found = ticks(low, low + span, count)
    assert 1 <= len(found) <= 2 * count + 2
    slack = span * 1e-6 + abs(low) * 1e-9
    assert all(low - slack <= value <= low + span + slack for value in found)
    assert found == sorted(found)


def test_tick_labels_are_short() -> None:
    assert [tick_label(value) for value in (0.0, 0.5, 1000.0, 2e-4, 1.5e7)] == ["0", "0.5", "1,000", "2e-4", "1.5e7"]


def test_smoothing_keeps_lines_straight_and_calms_noise() -> None:
    straight = [Point(step, 2.0 * step) for step in range(50)]
    assert [point.y for point in smooth(straight)] == pytest.approx([point.y for point in straight])
    noisy = [Point(step, float(step % 2)) for step in range(100)]
    inner = [point.y for point in smooth(noisy)[10:-10]]
    assert max(inner) - min(inner) < 0.1


def test_bars_show_values_and_intervals() -> None:
    svg = bars("Exact match", [("Base", "before", 0.0, (0.0, 0.05)), ("Tuned", "after", 0.5, (0.4, 0.6))], top=1.0, show=str)
    root = ET.fromstring(svg)
    widths = {node.attrib["class"]: float(node.attrib["width"]) for node in root.iter("rect")}
    assert widths["bar after"] == widths["track"] / 2
    assert 0 < widths["bar before"] < 5
    assert "Tuned: 0.5, 95 % interval 0.4 to 0.6" in root.attrib["aria-label"]


def test_bars_of_nothing_but_zeros() -> None:
    ET.fromstring(bars("Loss", [("Base", "before", 0.0, None), ("Tuned", "after", 0.0, (0.0, 0.0))], top=None, show=str))


@given(st.text(alphabet=st.characters(blacklist_categories=["Cs"]), max_size=200))
def test_yaml_colouring_changes_no_text(text: str) -> None:
    assert unescape(re.sub(r"</?span[^>]*>", "", highlight_yaml(text))) == text


def test_yaml_colouring_knows_the_kinds() -> None:
    found = highlight_yaml('rate: 2e-4  # peak\nname: "a # b"\nflag: true\nlist: {rank: 16, path: a/b-2.bin}')
    assert '<span class="y-key">rate</span>: <span class="y-number">2e-4</span>' in found
    assert '<span class="y-comment"># peak</span>' in found
    assert '<span class="y-string">&quot;a # b&quot;</span>' in found
    assert '<span class="y-constant">true</span>' in found
    assert '<span class="y-key">rank</span>: <span class="y-number">16</span>' in found
    assert '<span class="y-number">2</span>' not in found
