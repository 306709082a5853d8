"""Several runs side by side: what differs in their recipes, their figures with intervals, their curves; as a page of its own too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

from peftcli.report.catalogue import FIGURES, figure
from peftcli.report.charts import Point, Series, line_chart
from peftcli.report.markup import data, section, table, text
from peftcli.report.schema import Report
from peftcli.report.text import duration, metric, number, size

_BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 40
# Title, key in metrics.jsonl; the curves that are compared.
CURVES = (("training loss", "loss"), ("held-out loss", "eval_loss"), ("gradient norm", "grad_norm"), ("learning rate", "learning_rate"))
# As many as the page's style sheet has colours.
MOST_RUNS = 8


@dataclass(frozen=True)
class Run:
    """One of the runs.

    Attributes:
        name: as people tell it from the others. ``settings``: the resolved recipe, flat, by dotted key.
        metrics: records of ``metrics.jsonl``.
    """

    name: str
    report: Report
    settings: dict[str, Any]
    metrics: Sequence[dict[str, Any]]

    def points(self, key: str) -> list[Point]:
        """The curve of ``key`` over the steps; the held-out loss with its measurements before and after."""
        found = [Point(float(r["step"]), float(r[key])) for r in self.metrics if isinstance(r.get(key), (int, float))]
        if key == "eval_loss" and self.report.eval_before is not None and (not found or found[0].x > 0):
            found.insert(0, Point(0.0, self.report.eval_before.loss))
        return found


class Line(NamedTuple):
    """One figure of every run: plain numbers and, where known, their 95 % intervals."""

    name: str
    label: str
    values: list[float | None]
    intervals: list[tuple[float, float] | None]

    def shown(self, index: int) -> str:
        """The value as people write it."""
        value = self.values[index]
        if value is None:
            return "–"
        if self.name in _COSTS:
            return str(_COSTS[self.name](value))
        return metric(self.name, value)

    def between(self, index: int) -> str:
        """Its interval, or nothing."""
        ends = self.intervals[index]
        return "" if ends is None else f"{metric(self.name, ends[0])} to {metric(self.name, ends[1])}"

    @property
    def best(self) -> set[int]:
        """The runs with the best value, where the figure has a better and a worse and they are not all equal."""
        known = [value for value in self.values if value is not None]
        if self.name in _COSTS or len(set(known)) < 2:
            return set()
        top = max(known) if figure(self.name).higher_is_better else min(known)
        return {index for index, value in enumerate(self.values) if value == top}


_COSTS = {
    "train.steps": lambda value: f"{value:,.0f}",
    "model.trainable_parameters": lambda value: f"{value:,.0f}",
    "train.seconds": duration,
    "train.tokens_per_second": lambda value: f"{value:,.0f}",
    "train.peak_memory_bytes": size,
}


def figures(runs: Sequence[Run]) -> list[Line]:
    """Every figure of the tuned models that one of the runs measured, the most telling first, then what they cost."""
    measured = [run.report.eval for run in runs]
    names = dict.fromkeys((*FIGURES, *(name for info in measured if info is not None for name in info.metrics)))
    lines = [
        Line(
            name,
            figure(name).label,
            [None if info is None else info.figure(name) for info in measured],
            [None if info is None else info.intervals.get(name) for info in measured],
        )
        for name in names
        if any(info is not None and info.figure(name) is not None for info in measured)
    ]
    for key in _COSTS:
        part, _, name = key.partition(".")
        values = [float(getattr(getattr(run.report, part), name)) for run in runs]
        lines.append(Line(key, name.replace("_", " ").capitalize(), list(values), [None] * len(runs)))
    return lines


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings in which the runs differ, by dotted key; ``None`` where a run has no such setting."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    values = {key: [run.settings.get(key) for run in runs] for key in keys}
    return {key: found for key, found in values.items() if len({json.dumps(value, sort_keys=True) for value in found}) > 1}


def setting(value: Any) -> str:
    """A setting's value on one line."""
    if isinstance(value, float):
        return f"{value:g}"
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class Scale(NamedTuple):
    """What several curves are drawn on together: the ends of both axes."""

    first: float
    last: float
    low: float
    high: float

    @classmethod
    def around(cls, curves: Sequence[Sequence[Point]]) -> Scale:
        """The smallest that holds every point of ``curves``."""
        xs, ys = zip(*(point for curve in curves for point in curve), strict=True)
        return cls(min(xs), max(xs), min(ys), max(ys))


def sparkline(points: Sequence[Point], scale: Scale, width: int) -> str:
    """A curve as a line of ``width`` blocks; blank where nothing was logged, a mean where several points share a place."""
    places: list[list[float]] = [[] for _ in range(width)]
    for point in points:
        share = (point.x - scale.first) / (scale.last - scale.first) if scale.last > scale.first else 0.0
        places[round(share * (width - 1))].append(point.y)
    span = scale.high - scale.low
    line = ""
    for place in places:
        share = (sum(place) / len(place) - scale.low) / span if place and span > 0 else 0.5
        line += _BLOCKS[min(len(_BLOCKS) - 1, int(share * len(_BLOCKS)))] if place else " "
    return line


def render_html(runs: Sequence[Run]) -> str:
    """The comparison as one self-contained page, in the style of ``report.html``."""
    css = resources.files("peftcli.report").joinpath("report.css").read_text(encoding="utf-8")
    title = " · ".join(run.name for run in runs)
    names = [run.name for run in runs]
    rows = []
    for line in figures(runs):
        cells = []
        for index, value in enumerate(line.values):
            shown = data(value, line.shown(index)) + (f" <small>{text(line.between(index))}</small>" if line.between(index) else "")
            cells.append(f"<strong>{shown}</strong>" if index in line.best else shown)
        rows.append([text(line.label), *cells])
    other = [[f"<code>{text(key)}</code>", *(text(setting(value)) for value in values)] for key, values in differing(runs).items()]
    charts = []
    for name, key in CURVES:
        series = [Series(run.name, run.points(key), style=f"run{index}", dots=key == "eval_loss") for index, run in enumerate(runs)]
        if any(item.points for item in series):
            charts.append(line_chart(name.capitalize(), series, y_label=name, show=number, from_zero="loss" in key, width=1040, height=300))
    sections = [
        section("figures", "Figures", table(["Held-out rows", *names], rows, name="figure-table", label="Figures", class_="counts")),
        section("curves", "Curves", *charts),
        section(
            "recipes",
            "What differs in the recipes",
            table(["Setting", *names], other, name="setting-table", label="Settings", class_="hashes") if other else "<p>Nothing.</p>",
        ),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(title)} · peftcli compare</title>\n<style>\n{css}</style>\n</head>\n<body>\n"
        f"<header><h1>{text(title)}</h1></header>\n<main>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )
