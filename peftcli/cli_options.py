"""Arguments and options that several commands share, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Write JSON for programs to standard output.")]
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Override recipe values, such as train.learning_rate=1e-4.", show_default=False),
]
ResultPaths = Annotated[
    list[Path], typer.Argument(metavar="RUN_OR_ADAPTER", help="Folders of runs or adapters of one base.", show_default=False)
]
ResultPath = Annotated[Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run's folder, or an adapter's.", show_default=False)]
BaseModel = Annotated[
    str | None, typer.Option("--base-model", help="Base model, when it is not where the run or adapter says.", show_default=False)
]
Processes = Annotated[int, typer.Option("--processes", min=1, max=1024, help="Processes on this machine (gloo on the CPU, NCCL on GPUs).")]
InitAdapter = Annotated[Path | None, typer.Option("--init-adapter", help="Start from this adapter's weights.", show_default=False)]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model; needs a pinned base_model.revision.")
]
