"""The end of a run on the terminal: before and after, a few answers, where the files are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftcli.report.gates import gate_line
from peftcli.report.schema import Gate, Report
from peftcli.report.text import change, comparisons, duration, metric, number, p_value, plural, shorten, size, verdict

EXAMPLES = 3
_TONE = {"good": "bold green", "bad": "bold red", "neutral": "bold"}


def print_summary(report: Report, console: Console, folder: Path | None = None) -> None:
    """Print the run's verdict, its metrics side by side, example answers and the paths of its files.

    Args:
        report: the run.
        console: where to print; decides about colour and width.
        folder: the run's folder, put before the file names.
    """
    judged = verdict(report)
    train = report.train
    console.print()
    console.print(Text(judged.text, style=_TONE[judged.tone]))
    if judged.detail:
        console.print(Text(judged.detail, style="red" if judged.tone == "bad" else "dim"))
    for note in report.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    rate = f"{train.tokens_per_second:,.0f} tokens/s, peak memory {size(train.peak_memory_bytes)}"
    console.print(Text(f"{plural(train.steps, 'step')} in {duration(train.seconds)}, {rate}", style="dim"))
    if found := comparisons(report):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("held-out rows")
        table.add_column("base", justify="right")
        table.add_column("tuned", justify="right", style="bold")
        table.add_column("95 % of tuned", justify="right", style="dim")
        if tested := any(item.test is not None for item in found):
            table.add_column("difference", justify="right", style="dim")
        for item in found:
            ends = item.interval_after
            between = "" if ends is None else f"{metric(item.name, ends[0])} to {metric(item.name, ends[1])}"
            style = "red" if item.tone == "bad" else ""
            row: list[str | Text] = [
                item.label.lower(),
                metric(item.name, item.before),
                Text(metric(item.name, item.after), style=style),
                between,
            ]
            if tested:
                row.append("" if item.test is None else f"{change(item.name, item.test.difference)}, {p_value(item.test)}")
            table.add_row(*row)
        console.print(table)
    elif train.loss_last is not None:
        console.print(f"training loss {number(train.loss_first)} → {number(train.loss_last)}")
    _print_examples(report, console)
    _print_checks(report, console)
    print_gates(report.gates, console)
    _print_files(report, console, folder)


def _print_examples(report: Report, console: Console) -> None:
    for item in report.examples[:EXAMPLES]:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_column(no_wrap=True)
        grid.add_row("request", Text(_line(item.prompt)), "")
        grid.add_row("expected", Text(_line(item.reference)), "")
        for name, answer, correct in (("base", item.before, item.correct_before), ("tuned", item.after, item.correct_after)):
            if answer is not None:
                mark = {True: Text("✓", style="green"), False: Text("✗", style="red"), None: Text("")}[correct]
                grid.add_row(name, Text(_line(answer) or "(empty)"), mark)
        console.print(grid)
        console.print()


def _line(text: str) -> str:
    """Text on one line, short, without characters that would steer the terminal."""
    return shorten("".join(char if char.isprintable() else " " for char in text).strip(), 240)


def _print_checks(report: Report, console: Console) -> None:
    live = report.checks.live_adapter
    if live is not None:
        text = Text("live-adapter check: ")
        text.append("passed" if live.passed else "FAILED", style="green" if live.passed else "bold red")
        text.append(f", {plural(live.keys, 'tensor')} read back from disk")
        console.print(text)


def print_gates(gates: Sequence[Gate], console: Console) -> None:
    """One line for each gate of the recipe."""
    for gate in gates:
        text = Text("gate: ")
        text.append("passed" if gate.passed else "FAILED", style="green" if gate.passed else "bold red")
        text.append(f", {gate_line(gate)}")
        console.print(text)


def _print_files(report: Report, console: Console, folder: Path | None) -> None:
    base = f"{folder}/" if folder is not None else ""
    console.print(Text(f"report: {base}report.html (also report.md, report.json)"))
    for name, what in (("adapter", "adapter"), ("model", "model")):
        if any(path.startswith(f"{name}/") for path in report.files):
            console.print(Text(f"{what}: {base}{name}/"))
