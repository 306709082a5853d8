"""Draw what peftcli's speed and memory cost over the work, from a sweep that scripts/benchmark.py recorded.

python scripts/benchmark.py --data FOLDER --sweep --results scripts/results/sweep.json
python scripts/plot_benchmark.py            # scripts/results/sweep.json -> scripts/results/sweep.svg
"""

from __future__ import annotations

import json
import math
import sys
from html import escape
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
# What varies in each panel; the rest is that of the smallest case.
PANELS = {"max_length": "tokens in a row", "batch_size": "rows in a batch", "rank": "rank"}
ROWS = {"tokens_per_cpu_second": "tokens per CPU second", "peak_bytes": "peak memory, GiB"}
WIDTH, HEIGHT, EDGE = 250, 150, 46


def series(summary: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The cases in which only ``name`` differs from the commonest values of the others."""
    lines = [line for line in summary if "failed" not in line]
    usual = {key: _commonest([line["case"][key] for line in lines]) for key in PANELS if key != name}
    return sorted((line for line in lines if all(line["case"][k] == v for k, v in usual.items())), key=lambda line: line["case"][name])


def _commonest(values: list[int]) -> int:
    return max(sorted(set(values)), key=values.count)


def panel(points: list[tuple[float, float]], title: str, unit: str, left: float, top: float) -> str:
    """One curve: x in powers of two, y from zero."""
    xs, most = [math.log2(x) for x, _ in points], max(y for _, y in points) * 1.15
    low, high = min(xs), max(*xs, min(xs) + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        return left + EDGE + (x - low) / (high - low) * (WIDTH - EDGE - 12), top + HEIGHT - 34 - y / most * (HEIGHT - 60)

    marks = [place(x, y) for x, (_, y) in zip(xs, points, strict=True)]
    parts = [f'<text x="{left + EDGE}" y="{top + 14}" class="title">{escape(unit)}</text>']
    base = place(low, 0)[1]
    parts.append(f'<path d="M{left + EDGE} {top + 24}V{base}H{left + WIDTH - 8}" class="axis"/>')
    parts.append('<path d="M' + "L".join(f"{x:.1f} {y:.1f}" for x, y in marks) + '" class="curve"/>')
    for (x, y), (value, found) in zip(marks, points, strict=True):
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/><text x="{x:.1f}" y="{y - 7:.1f}" class="value">{found:.3g}</text>')
        parts.append(f'<text x="{x:.1f}" y="{base + 14:.1f}" class="value">{value:g}</text>')
    parts.append(f'<text x="{left + (WIDTH + EDGE) / 2}" y="{base + 29:.1f}" class="value">{escape(title)}</text>')
    return "".join(parts)


def draw(document: dict[str, Any]) -> str:
    """The whole picture, as SVG."""
    body = []
    for column, (name, title) in enumerate(PANELS.items()):
        lines = series(document["summary"], name)
        for row, (figure, unit) in enumerate(ROWS.items()):
            scale = 2**30 if figure == "peak_bytes" else 1
            points = [(line["case"][name], line[figure] / scale) for line in lines]
            body.append(panel(points, title, unit, column * WIDTH, row * HEIGHT))
    style = (
        "text{font:11px sans-serif;fill:#555}.title{font-weight:bold}.value{text-anchor:middle}"
        ".axis{fill:none;stroke:#999}.curve{fill:none;stroke:#2a6fdb;stroke-width:2}circle{fill:#2a6fdb}"
    )
    size = f'viewBox="0 0 {WIDTH * len(PANELS)} {HEIGHT * len(ROWS)}"'
    background = '<rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>{background}{"".join(body)}</svg>\n'


def main() -> int:
    source = RESULTS / "sweep.json"
    source.with_suffix(".svg").write_text(draw(json.loads(source.read_text(encoding="utf-8"))), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
