"""``peftcli compare``: runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftcli.commands.show import print_json
from peftcli.errors import UsageError
from peftcli.plan import flatten
from peftcli.recipe.load import load_recipe
from peftcli.redact import redact
from peftcli.report import compare
from peftcli.report.compare import Run
from peftcli.report.files import write_text_atomically
from peftcli.report.metrics import read_metrics
from peftcli.report.text import number
from peftcli.report.write import read_report


def run(folders: Sequence[Path], html: Path | None, *, json: bool) -> None:
    """Compare and print; see the command's help for the arguments."""
    if not 2 <= len(folders) <= compare.MOST_RUNS:
        raise UsageError(f"compare takes 2 to {compare.MOST_RUNS} runs, not {len(folders)}", hint="peftcli compare RUN RUN...")
    runs = [_open(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    if html is not None:
        write_text_atomically(html, redact(compare.render_html(runs)))
    if json:
        print_json(_facts(runs, folders))
        return
    console = Console()
    _print(runs, console)
    if html is not None:
        console.print(f"page: {html}", markup=False, highlight=False)


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, or their paths where two share one."""
    names = [folder.resolve().name for folder in folders]
    return [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]


def _open(folder: Path, name: str) -> Run:
    report = read_report(folder)
    loaded = load_recipe(folder / "recipe.yaml")
    settings = {key: value for key, value in flatten(loaded.recipe).items() if key != "output_dir"}
    for key in ("base_model.name", "dataset.chat_template"):
        settings[key] = _place(folder, settings[key])
    for key in ("dataset.train", "dataset.eval"):
        # As the recipe would say it: paths alone, but for sources with settings of their own.
        sources = [{k: v for k, v in source.items() if v is not None} for source in settings[key] or []]
        settings[key] = [_place(folder, source["path"]) for source in sources] or None
        for number_, source in enumerate(sources):
            settings |= {f"{key}.{number_}.{k}": v for k, v in source.items() if k != "path"}
    return Run(name, report, settings, read_metrics(folder / "metrics.jsonl").records)


def _place(folder: Path, path: str | None) -> str | None:
    """A path as seen from everywhere: those in a run's recipe start at the run's folder."""
    return str((folder / path).resolve()) if path is not None and (folder / path).exists() else path


def _print(runs: Sequence[Run], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("held-out rows")
    for run in runs:
        table.add_column(Text(run.name), justify="right")
    for line in compare.figures(runs):
        cells = []
        for index in range(len(runs)):
            cell = Text(line.shown(index), style="bold green" if index in line.best else "")
            if ends := line.between(index):
                cell.append(f"\n{ends}", style="dim")
            cells.append(cell)
        table.add_row(line.label.lower(), *cells)
    console.print(table)
    for title, key in compare.CURVES:
        _print_curves(title, [(run.name, run.points(key)) for run in runs], console)
    other = compare.differing(runs)
    if not other:
        console.print("the recipes are the same")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("recipe")
    for run in runs:
        table.add_column(Text(run.name), overflow="fold")
    for key, values in other.items():
        table.add_row(Text(key), *(Text(compare.setting(value)) for value in values))
    console.print(table)


def _print_curves(title: str, curves: Sequence[tuple[str, list[Any]]], console: Console) -> None:
    drawn = [(name, points) for name, points in curves if points]
    if not drawn:
        return
    scale = compare.Scale.around([points for _, points in drawn])
    ends = f"{number(scale.low)} to {number(scale.high)}, steps {scale.first:,.0f} to {scale.last:,.0f}"
    console.print(Text(f"{title}: {ends}", style="dim"))
    margin = max(len(name) for name, _ in curves)
    width = min(compare.WIDTH, max(len(points) for _, points in drawn))
    for name, points in drawn:
        line = compare.sparkline(points, scale, width)
        console.print(Text(f"  {name.ljust(margin)} {line} {number(points[-1].y)}"), soft_wrap=True)


def _facts(runs: Sequence[Run], folders: Sequence[Path]) -> dict[str, Any]:
    figures = compare.figures(runs)
    return {
        "runs": [
            {
                "folder": str(folder),
                "name": run.name,
                "status": run.report.status,
                "figures": {line.name: line.values[index] for line in figures},
                "intervals": {line.name: ends for line in figures if (ends := line.intervals[index]) is not None},
                "curves": {key: run.points(key) for _, key in compare.CURVES},
            }
            for index, (run, folder) in enumerate(zip(runs, folders, strict=True))
        ],
        "recipe": compare.differing(runs),
    }
