"""`peftcli` commands that scripts run, each in a process of its own: memory and settings are its own, what has been imported is shared."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Sequence
from pathlib import Path


def peftcli(arguments: Sequence[str], log: Path) -> None:
    """Call the command line; what it prints goes into ``log``.

    Raises:
        SystemExit: it failed; the message holds the end of the log.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peftcli.cli", "peftcli.run", "transformers.models.bert.modeling_bert"])
    process = context.Process(target=_called, args=(list(arguments), str(log)))
    process.start()
    process.join()
    if process.exitcode:
        printed = log.read_text(encoding="utf-8")[-3000:]
        raise SystemExit(f"peftcli {' '.join(arguments[:2])} ended with exit code {process.exitcode}:\n{printed}")


def _called(arguments: Sequence[str], log: str) -> None:
    from peftcli.cli import app

    with open(log, "w", encoding="utf-8") as printed, contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        app(arguments)
