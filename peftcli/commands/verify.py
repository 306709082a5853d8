"""``peftcli verify``: repeat a run from its lock, and say whether it came out the same."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from rich.console import Console

from peftcli import launch
from peftcli.commands.show import print_json
from peftcli.report.progress import make_progress
from peftcli.report.text import plural
from peftcli.verify import Verdict, verify


def run(
    path: Path,
    output: Path | None,
    *,
    steps: int | None,
    tolerance: float | None,
    init_adapter: Path | None,
    json: bool,
    trust_remote_code: bool,
) -> None:
    """Verify and print; see the command's help for the arguments."""
    main = launch.rank() == 0
    display = make_progress("auto" if main and not json else "none")
    with tempfile.TemporaryDirectory(prefix="peftcli-verify-") as aside:
        found = verify(
            path,
            output or Path(aside) / "run",
            display,
            steps=steps,
            tolerance=tolerance,
            init_adapter=init_adapter,
            trust_remote_code=trust_remote_code,
        )
    if main:
        _show(path, found, json)


def spawn(output: Path | None, processes: int) -> int:
    """Run this command again in as many processes as the run had, all with one folder; returns the exit code."""
    with tempfile.TemporaryDirectory(prefix="peftcli-verify-") as aside:
        if output is None:
            sys.argv += ["--output", str(Path(aside) / "run")]
        return launch.spawn(processes)


def _show(path: Path, found: Verdict, json: bool) -> None:
    if json:
        facts = {
            "steps": found.steps,
            "records": found.records,
            "exact": found.exact,
            "tolerance": None if found.exact else found.tolerance,
        }
        more = {"largest_difference": found.largest, "weights": found.weights, "environment": found.environment}
        print_json({"run": str(path), "passed": True, **facts, **more})
        return
    console = Console()
    console.print(f"{path}: repeated {plural(found.steps, 'step')}: [green]the same[/]", highlight=False)
    if found.exact:
        console.print(f"  {plural(found.records, 'record')} of loss, gradient norm and learning rate are equal to the last digit")
        for name in found.weights:
            console.print(f"  {name} is equal to the last byte", markup=False, highlight=False)
        return
    console.print(
        f"  {plural(found.records, 'record')} within {found.tolerance:g} of the run's (largest difference {found.largest:.2g}); "
        "bytes are only promised in the run's own environment:"
    )
    for line in found.environment:
        console.print(f"  {line}", markup=False, highlight=False)
