"""Before/after bars with their intervals, as SVG. Colours come from the page's style sheet (``report.css``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape


def bars(
    title: str,
    rows: Sequence[tuple[str, str, float, tuple[float, float] | None]],
    *,
    top: float | None,
    show: Callable[[float], str],
) -> str:
    """Horizontal bars from zero with whiskers for their 95 % intervals.

    Args:
        title: read out by screen readers.
        rows: name, CSS class (``before`` or ``after``), value, interval or ``None``.
        top: value at the right end; ``None``: the largest value or interval end.
        show: writes a value.
    """
    # A wide interval must not squeeze the bars to nothing; its whisker is cut at the edge instead.
    largest = max((value for _, _, value, _ in rows), default=0.0)
    ends = [min(interval[1], 1.5 * largest) for _, _, _, interval in rows if interval]
    full = top if top is not None else max([largest, *ends])
    width, bar, gap = 320.0, 16, 10

    def x(value: float) -> float:
        return round(min(max(value / full, 0.0), 1.0) * width, 1) if full > 0 else 0.0

    parts, told = [], []
    for index, (name, style, value, interval) in enumerate(rows):
        y = index * (bar + gap) + 2
        middle = y + bar / 2
        text = f"{name}: {show(value)}" + (f", 95 % interval {show(interval[0])} to {show(interval[1])}" if interval else "")
        told.append(text)
        parts.append(f'<g><title>{escape(text)}</title><rect class="track" x="0" y="{y}" width="{width}" height="{bar}" rx="4"/>')
        # A value of zero still shows where its bar would start.
        parts.append(f'<rect class="bar {style}" x="0" y="{y}" width="{max(x(value), 2)}" height="{bar}" rx="4"/>')
        if interval:
            low, high = max(x(interval[0]), 1), min(max(x(interval[1]), 1), width - 1)
            parts.append(f'<path class="halo" d="M{low} {middle}H{high}M{low} {middle - 5}v10M{high} {middle - 5}v10"/>')
            parts.append(f'<path class="whisker" d="M{low} {middle}H{high}M{low} {middle - 5}v10M{high} {middle - 5}v10"/>')
        parts.append("</g>")
    height = len(rows) * (bar + gap) - gap + 4
    label = escape(f"{title}. {'; '.join(told)}")
    return (
        f'<svg class="bars" viewBox="0 0 {width:g} {height}" preserveAspectRatio="xMinYMid" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )
