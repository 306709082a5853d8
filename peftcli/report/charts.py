"""Line charts over steps, as SVG. Colours come from the page's style sheet (``report.css``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 720, 280
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 44
MAX_POINTS = 400
MAX_SMOOTHED = 1_000
MAX_HOVERS = 160
TABLE_ROWS = 30


class Point(NamedTuple):
    """One value of a curve: ``x`` is a step."""

    x: float
    y: float


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        name: for the legend and the table's column.
        points: in the order of the steps; finite.
        style: CSS class, ``train`` or ``eval``.
        dots: draw a dot at each point (few, precious points) rather than only a line.
        smoothed: draw the points faintly and a smoothed line over them.
    """

    name: str
    points: Sequence[Point]
    style: str = "train"
    dots: bool = False
    smoothed: bool = False


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers from ``low`` to ``high``, both inside; at least one."""
    if not high > low:
        return [low]
    raw = (high - low) / max(count, 1)
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = magnitude * next(factor for factor in (1, 2, 2.5, 5, 10) if raw <= factor * magnitude * (1 + 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)] or [low]


def tick_label(value: float) -> str:
    """A round number as short as it goes: ``0.5``, ``2e-4``, ``1,000``."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.12g}"
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def smooth(points: Sequence[Point]) -> list[Point]:
    """Each point as a weighted mean of its neighbours on both sides (Gaussian), so the line does not lag behind.

    Of very many points, stretches are averaged first: the result has at most ``MAX_SMOOTHED`` points.
    """
    if len(points) > MAX_SMOOTHED:
        stretch = math.ceil(len(points) / MAX_SMOOTHED)
        pieces = [points[start : start + stretch] for start in range(0, len(points), stretch)]
        points = [Point(sum(point.x for point in piece) / len(piece), sum(point.y for point in piece) / len(piece)) for piece in pieces]
    spread = max(1.0, len(points) / 50)
    reach = math.ceil(2.5 * spread)
    weights = [math.exp(-0.5 * (offset / spread) ** 2) for offset in range(reach + 1)]
    result = []
    for index, point in enumerate(points):
        # The same reach on both sides: at the ends a one-sided mean would bend the line.
        near = min(reach, index, len(points) - 1 - index)
        around = range(index - near, index + near + 1)
        total = sum(weights[abs(other - index)] for other in around)
        result.append(Point(point.x, sum(weights[abs(other - index)] * points[other].y for other in around) / total))
    return result


def thin(points: Sequence[Point], limit: int) -> list[Point]:
    """At most about ``limit`` points: lowest and highest of each stretch, so that spikes stay; first and last are kept."""
    if len(points) <= limit:
        return list(points)
    stretch = math.ceil(2 * len(points) / limit)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), stretch):
        indices = range(start, min(start + stretch, len(points)))
        kept.add(min(indices, key=lambda index: points[index].y))
        kept.add(max(indices, key=lambda index: points[index].y))
    return [points[index] for index in sorted(kept)]


def _every(points: Sequence[Point], limit: int) -> list[Point]:
    """At most ``limit`` evenly spaced points, first and last among them."""
    if len(points) <= limit:
        return list(points)
    return [points[round(index * (len(points) - 1) / (limit - 1))] for index in range(limit)]


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    y_label: str,
    show: Callable[[float], str],
    from_zero: bool = False,
    width: int = WIDTH,
    height: int = HEIGHT,
) -> str:
    """A figure with a line chart over steps, a legend where there is more than one curve, and its table folded below.

    Args:
        title: shown above the chart and read out by screen readers.
        series: curves; those without points are left out, and without any the figure says so.
        y_label: quantity and unit.
        show: writes a y value.
        from_zero: let the y axis start at zero.
        width, height: of the drawing, in its own units.
    """
    drawn = [item for item in series if item.points]
    if not drawn:
        return f'<figure class="chart"><figcaption>{escape(title)}</figcaption><p class="empty">Nothing was logged.</p></figure>'
    xs = [point.x for item in drawn for point in item.points]
    ys = [point.y for item in drawn for point in item.points]
    frame = _Frame.around(xs, ys, from_zero=from_zero, width=width, height=height)
    legend = "".join(_keys(item) for item in drawn) if len(drawn) > 1 or _is_smoothed(drawn[0]) else ""
    summary = "; ".join(_summary(item, show) for item in drawn)
    body = [frame.axes(y_label)]
    body += [_curve(item, frame) for item in drawn]
    body.append(_hovers(drawn, frame, show))
    return (
        f'<figure class="chart"><figcaption>{escape(title)}<span class="legend">{legend}</span></figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}. {escape(summary)}">'
        f"{''.join(body)}</svg>{_table(drawn, show)}</figure>"
    )


def _is_smoothed(item: Series) -> bool:
    return item.smoothed and len(item.points) >= 8


def _keys(item: Series) -> str:
    if _is_smoothed(item):
        return f'<span class="key faint {item.style}">{escape(item.name)}</span><span class="key {item.style}">smoothed</span>'
    return f'<span class="key {item.style}">{escape(item.name)}</span>'


def _summary(item: Series, show: Callable[[float], str]) -> str:
    first, last = item.points[0], item.points[-1]
    if len(item.points) == 1:
        return f"{item.name}: {show(first.y)} at step {first.x:g}"
    return f"{item.name}: {show(first.y)} at step {first.x:g}, {show(last.y)} at step {last.x:g}"


@dataclass(frozen=True)
class _Frame:
    """The plot area: which values its edges stand for, and where on the drawing they are."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    width: int
    height: int

    @classmethod
    def around(cls, xs: Sequence[float], ys: Sequence[float], *, from_zero: bool, width: int, height: int) -> _Frame:
        low, high = min(ys), max(ys)
        if from_zero:
            low = min(low, 0.0)
        # A constant curve still needs an axis; it is put in the middle of one.
        margin = (high - low) * 0.06 if high > low else abs(high) * 0.5 or 1.0
        bottom = low if from_zero and low == 0.0 else low - margin
        if low >= 0.0:
            bottom = max(bottom, 0.0)
        return cls(min(0.0, *xs), max(1.0, *xs), bottom, high + margin, width, height)

    def x(self, value: float) -> float:
        return round(LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (self.width - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        return round(self.height - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (self.height - TOP - BOTTOM), 1)

    def axes(self, y_label: str) -> str:
        left, right, base = LEFT, self.width - RIGHT, self.height - BOTTOM
        parts = []
        for value in ticks(self.y_low, self.y_high, max(2, self.height // 45)):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text class="tick" x="{left - 8}" y="{y + 4}" text-anchor="end">{tick_label(value)}</text>')
        parts += [
            f'<text class="tick" x="{self.x(value)}" y="{base + 18}" text-anchor="middle">{value:,.0f}</text>'
            for value in ticks(self.x_low, self.x_high, max(2, self.width // 100))
            if value == int(value)
        ]
        parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{base}" y2="{base}"/>')
        parts.append(f'<text class="unit" x="{(left + right) / 2}" y="{self.height - 6}" text-anchor="middle">step</text>')
        middle = (TOP + base) / 2
        parts.append(
            f'<text class="unit" x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(y_label)}</text>'
        )
        return "".join(parts)


def _path(points: Sequence[Point], frame: _Frame) -> str:
    return "M" + "L".join(f"{frame.x(point.x)} {frame.y(point.y)}" for point in points)


def _curve(item: Series, frame: _Frame) -> str:
    points = thin(item.points, MAX_POINTS)
    parts = []
    smoothed = _is_smoothed(item)
    if len(points) > 1:
        parts.append(f'<path class="line {item.style}{" faint" if smoothed else ""}" d="{_path(points, frame)}"/>')
    if smoothed:
        parts.append(f'<path class="line {item.style}" d="{_path(thin(smooth(item.points), MAX_POINTS), frame)}"/>')
    if item.dots or len(points) == 1:
        parts += [f'<circle class="dot {item.style}" cx="{frame.x(point.x)}" cy="{frame.y(point.y)}" r="4"/>' for point in points]
    return "".join(parts)


def _hovers(drawn: Sequence[Series], frame: _Frame, show: Callable[[float], str]) -> str:
    """Invisible strips, one for each shown step; pointing at one shows a rule, dots and the browser's own tooltip."""
    at: dict[float, list[tuple[Series, float]]] = {}
    for item in drawn:
        for point in item.points if item.dots else _every(item.points, MAX_HOVERS):
            at.setdefault(point.x, []).append((item, point.y))
    steps = sorted(at)
    parts = []
    for index, step in enumerate(steps):
        x = frame.x(step)
        left = LEFT if index == 0 else (frame.x(steps[index - 1]) + x) / 2
        right = frame.width - RIGHT if index == len(steps) - 1 else (frame.x(steps[index + 1]) + x) / 2
        told = "\n".join([f"step {step:,g}", *(f"{item.name}: {show(y)}" for item, y in at[step])])
        dots = "".join(f'<circle class="dot {item.style}" cx="{x}" cy="{frame.y(y)}" r="4"/>' for item, y in at[step])
        parts.append(
            f'<g class="hover"><title>{escape(told)}</title>'
            f'<rect x="{left:.1f}" y="{TOP}" width="{max(right - left, 1):.1f}" height="{frame.height - TOP - BOTTOM}"/>'
            f'<g><line class="rule" x1="{x}" x2="{x}" y1="{TOP}" y2="{frame.height - BOTTOM}"/>{dots}</g></g>'
        )
    return "".join(parts)


def _table(drawn: Sequence[Series], show: Callable[[float], str]) -> str:
    values = [{point.x: point.y for point in item.points} for item in drawn]
    steps = sorted({step for column in values for step in column})
    few = [point.x for point in _every([Point(step, 0) for step in steps], TABLE_ROWS)]
    head = "".join(f'<th scope="col">{escape(item.name)}</th>' for item in drawn)
    rows = "".join(
        f'<tr><th scope="row">{step:,g}</th>'
        + "".join(f"<td>{escape(show(column[step])) if step in column else ''}</td>" for column in values)
        + "</tr>"
        for step in few
    )
    count = f"{len(few)} of {len(steps)} steps" if len(few) < len(steps) else "all logged steps" if len(steps) > 1 else "1 step"
    return (
        f'<details class="numbers"><summary>Table ({count})</summary>'
        f'<table><thead><tr><th scope="col">step</th>{head}</tr></thead><tbody>{rows}</tbody></table></details>'
    )
