"""The training section of report.html: curves from ``metrics.jsonl`` and the figures of the whole run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from peftcli.report.charts import Point, Series, line_chart
from peftcli.report.markup import data, facts, section, text
from peftcli.report.schema import Report
from peftcli.report.text import number


def _points(metrics: Sequence[dict[str, Any]], key: str) -> list[Point]:
    found = ((record.get("step"), record.get(key)) for record in metrics)
    return [Point(float(step), float(value)) for step, value in found if isinstance(step, int) and isinstance(value, (int, float))]


# Title, key in metrics.jsonl, unit.
_SMALL = (
    ("Learning rate", "learning_rate", ""),
    ("Gradient norm before clipping", "grad_norm", ""),
    ("Speed", "tokens_per_second", "tokens/s"),
    ("Peak memory", "peak_memory_bytes", "bytes"),
)


def _small_chart(title: str, key: str, unit: str, metrics: Sequence[dict[str, Any]]) -> str:
    points = _points(metrics, key)
    if unit == "bytes":
        # Ticks are round in the unit that is shown, so the values are converted first.
        power = max(0, int(math.log2(max(1.0, *(point.y for point in points))) // 10))
        unit = ("B", "KiB", "MiB", "GiB", "TiB")[min(power, 4)]
        points = [Point(point.x, point.y / 1024 ** min(power, 4)) for point in points]

    def show(value: float) -> str:
        return f"{number(value, 3)} {unit}".strip()

    return line_chart(title, [Series(title.lower(), points)], y_label=unit, show=show, from_zero=True, width=510, height=220)


def training_section(report: Report, metrics: Sequence[dict[str, Any]]) -> str:
    """Loss with its held-out points, learning rate, gradient norm, speed and memory over the steps, then the totals."""
    train = report.train
    held_out = _points(metrics, "eval_loss")
    seen = {point.x for point in held_out}
    # The measurements before and after belong on the same curve as those during training.
    if report.eval_before is not None and 0.0 not in seen:
        held_out.insert(0, Point(0.0, report.eval_before.loss))
    if report.eval is not None and float(train.steps) not in seen and train.steps > 0:
        held_out.append(Point(float(train.steps), report.eval.loss))
    loss = [Series("training", _points(metrics, "loss"), smoothed=True), Series("held-out", held_out, style="eval", dots=True)]
    charts = [line_chart("Loss", loss, y_label="nats per token", show=number, from_zero=True, width=1040, height=340)]
    charts += [_small_chart(*item, metrics) for item in _SMALL if _points(metrics, item[1])]
    pairs = [
        ("First logged loss", data(train.loss_first, number(train.loss_first))),
        ("Last logged loss", data(train.loss_last, number(train.loss_last))),
        ("Tokens", data(train.tokens, f"{train.tokens:,}")),
        ("Supervised tokens", data(train.supervised_tokens, f"{train.supervised_tokens:,}")),
        ("Tokens/s", data(train.tokens_per_second, f"{train.tokens_per_second:,.0f}")),
        ("Supervised tokens/s", data(train.supervised_tokens_per_second, f"{train.supervised_tokens_per_second:,.0f}")),
        ("Optimizer", text(train.optimizer)),
        ("Order", text(train.batch_order)),
        ("Processes", data(train.world_size, str(train.world_size))),
    ]
    if train.loss_best is not None:
        at = f" at step {train.best_step:,}" if train.best_step is not None else ""
        pairs.insert(2, ("Best held-out loss", data(train.loss_best, number(train.loss_best)) + text(at)))
    if train.fast_paths:
        pairs.append(("Fast paths", text(", ".join(train.fast_paths))))
    if train.resumed_from is not None:
        pairs.append(("Resumed from", text(train.resumed_from)))
    grid = f'<div class="grid2">{"".join(charts[1:])}</div>' if charts[1:] else ""
    return section("training", "Training", charts[0], grid, f'<div class="card">{facts(pairs)}</div>')
