"""The commands of runs that can be trusted: lock what a run is made of, repeat it, hold runs against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftcli.cli_options import InitAdapter, Json, Overrides, RecipePath, RemoteCode


def lock(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: beside RECIPE, its name with .lock.", show_default=False)
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit code 11 where anything differs.")] = False,
    processes: Annotated[int, typer.Option("--processes", min=1, max=1024, help="Of the run.")] = 1,
    init_adapter: InitAdapter = None,
    json: Json = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Write down by hash and version what RECIPE's run would be made of, for `train --locked`."""
    from peftcli.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from peftcli.commands import lock as command

    command.run(
        loaded,
        output or recipe.with_suffix(".lock"),
        processes=processes,
        init_adapter=init_adapter,
        check=check,
        json=json,
        trust_remote_code=trust_remote_code,
    )


def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.", show_default=False)],
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Only the first N steps.", show_default=False)] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            min=0.0,
            help="Relative, of losses and gradient norms in another environment than the run's. Default: 0.02, or 0.1 in bfloat16.",
            show_default=False,
        ),
    ] = None,
    init_adapter: InitAdapter = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Keep the repetition in this folder.", show_default=False)] = None,
    json: Json = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Repeat RUN from its lock, and fail with exit code 11 where its trace or its weights do not come out the same."""
    from peftcli import launch
    from peftcli.commands import verify as command
    from peftcli.lock import NAME, read_lock

    processes = read_lock(run / NAME).processes
    if processes > 1 and not launch.inside():
        raise typer.Exit(command.spawn(output, processes))
    command.run(
        run,
        output,
        steps=steps,
        tolerance=tolerance,
        init_adapter=init_adapter,
        json=json,
        trust_remote_code=trust_remote_code,
    )


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Folders of runs.", show_default=False)],
    html: Annotated[Path | None, typer.Option("--html", help="Also write a page with the curves on one chart.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Show what runs have in common and what not: recipes, metrics with their intervals, curves."""
    from peftcli.commands import compare as command

    command.run(runs, html, json=json)
