"""What the benchmarks share: calls in processes of their own, the peers' environments, and their runs."""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def apart(function: Any, *arguments: Any, start: str = "spawn") -> None:
    """Call ``function`` in a process of its own, whose peak memory is its own.

    Args:
        start: as multiprocessing names it; with ``forkserver`` what has been imported is shared.

    Raises:
        RuntimeError: it failed.
    """
    context: Any = multiprocessing.get_context(start)
    process = context.Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{function.__name__} ended with exit code {process.exitcode}")


def peer_environment(folder: Path, name: str, pinned: Sequence[str], own: Sequence[str] = (), *, first: Sequence[str] = ()) -> Path:
    """An interpreter for the peer ``name`` in ``folder``, made where it is not there yet.

    Args:
        pinned: packages in the versions of scripts/constraints.txt; ``own``: further ones, with theirs.
        first: those of ``pinned`` that are installed before and alone: what comes after takes the build that is there.
    """
    python, done = folder / "bin" / "python", folder / ".installed"
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "scripts" / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    wanted = [*(f"{package}=={pins[package]}" for package in pinned), *own]
    if not done.exists() or done.read_text(encoding="utf-8").split() != wanted:
        print(f"making {folder} for {name} ...", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)  # noqa: S603
        for packages in ([f"{package}=={pins[package]}" for package in first], wanted):
            if packages:
                pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
                subprocess.run(pip, check=True)  # noqa: S603
        done.write_text("\n".join(wanted), encoding="utf-8")
    return python


def run_script(python: Path, script: Path, description: Mapping[str, Any], work: Path, result: Path) -> None:
    """Run a peer's script on a description of its case, which says where it writes ``result``; what it prints lies beside that.

    Raises:
        RuntimeError: it failed; the message is the last line it printed.
    """
    file, log = work / "case.json", result.with_suffix(".log")
    file.write_text(json.dumps(description), encoding="utf-8")
    with log.open("w", encoding="utf-8") as out:
        ended = subprocess.run([str(python), str(script), str(file)], stdout=out, stderr=subprocess.STDOUT, check=False)  # noqa: S603
    if ended.returncode:
        lines = log.read_text(encoding="utf-8").strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"code {ended.returncode}")
