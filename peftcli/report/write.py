"""Put a report on disk in its three forms, and read it back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peftcli.errors import CheckpointError
from peftcli.report.files import hash_files, write_text_atomically
from peftcli.report.gates import cases, junit
from peftcli.report.html import render_html
from peftcli.report.markdown import render_markdown
from peftcli.report.schema import Report

__all__ = ["JUNIT_FILE", "REPORT_FILES", "hash_files", "read_report", "report_text", "write_report"]

REPORT_FILES = ("report.json", "report.md", "report.html")
JUNIT_FILE = "report.junit.xml"


def report_text(report: Report) -> str:
    """``report.json``: fields in the schema's order, indented by 2, no NaN, one newline at the end."""
    return json.dumps(report.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_report(
    folder: Path,
    report: Report,
    metrics: Sequence[dict[str, Any]],
    recipe_text: str,
    *,
    redact: Callable[[str], str] | None = None,
) -> None:
    """Write report.html, report.md and, last, report.json into ``folder``, each atomically; before them report.junit.xml where the
    recipe has gates.

    Args:
        folder: the run's folder; its name is the report's title.
        report: what to write.
        metrics: records of ``metrics.jsonl``, for the curves.
        recipe_text: the resolved recipe, YAML.
        redact: applied to every text before it is written (removes secrets by value).

    Raises:
        CheckpointError: a file cannot be written, or ``redact`` left a report.json that is not valid.
    """
    # A program that waits for report.json finds the other two complete, hence the order.
    clean = redact if redact is not None else str
    title = folder.resolve().name
    text = clean(report_text(report))
    if redact is not None:
        _parse(text, folder / "report.json")
    if report.gates:
        write_text_atomically(folder / JUNIT_FILE, clean(junit(title, list(cases(report)), report.train.seconds)))
    write_text_atomically(folder / "report.html", clean(render_html(report, metrics, recipe_text, title=title)))
    write_text_atomically(folder / "report.md", clean(render_markdown(report, recipe_text, title=title)))
    write_text_atomically(folder / "report.json", text)


def read_report(folder: Path) -> Report:
    """Read ``folder/report.json``.

    Raises:
        CheckpointError: it is missing, is not JSON, is of another version or does not fit the schema; the message
            names the first few places that do not fit.
    """
    path = folder / "report.json"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist", hint="name the output folder of a finished run; a run that is still going has no report yet"
        ) from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is damaged: byte {error.start} is not UTF-8") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    return _parse(text, path)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it holds {name}, which is not JSON")


def _parse(text: str, path: Path) -> Report:
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}:{error.lineno}:{error.colno} is damaged: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is damaged: it holds a {type(data).__name__} where a report is an object")
    version = data.get("report_version")
    if version != 2:
        raise CheckpointError(
            f"{path} has report_version {version!r}; this peftcli reads version 2", hint="use the peftcli release that wrote it"
        )
    try:
        return Report.model_validate(data)
    except ValidationError as error:
        faults = [f"  {'.'.join(str(part) for part in fault['loc']) or 'report'}: {fault['msg']}" for fault in error.errors()]
        more = [f"  and {len(faults) - 8} more"] if len(faults) > 8 else []
        raise CheckpointError("\n".join([f"{path} does not fit the report's schema:", *faults[:8], *more])) from error
