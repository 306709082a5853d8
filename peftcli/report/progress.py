"""How a run speaks while it goes on: a live bar, plain lines, JSON lines, or nothing.

The loop knows only :class:`Progress`. People are spoken to on stderr; stdout belongs to programs (``--json``).
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TextIO, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichBar
from rich.text import Text

from peftcli.report.metrics import to_line
from peftcli.report.text import duration, metric, number, size

Mode = Literal["auto", "rich", "plain", "json", "none"]

# A live bar is redrawn ten times a second at most; asking for more only costs time.
_REDRAW_SECONDS = 0.1


@runtime_checkable
class Progress(Protocol):
    """What the run and the loop tell. ``start`` and ``stop`` may each come more than once; a context manager that stops."""

    def start(self, total_steps: int, initial_step: int = 0) -> None:
        """Training begins (or goes on after ``initial_step``)."""

    def note(self, message: str) -> None:
        """A phase begins, such as ``loading model``."""

    def audit(self, facts: dict[str, Any]) -> None:
        """The label audit before the first step: counts, and ``example``, a row as (text, supervised) pairs."""

    def advance(self, step: int) -> None:
        """``step`` optimizer steps are done. Called after every step, so it must be cheap."""

    def step(self, record: dict[str, Any]) -> None:
        """A step was logged; the record is a line of ``metrics.jsonl``."""

    def evaluation(self, record: dict[str, Any]) -> None:
        """Held-out rows were evaluated; the record is a line of ``metrics.jsonl``."""

    def warn(self, message: str) -> None:
        """Something that a person should know."""

    def stop(self) -> None:
        """Nothing more will come."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class NullProgress:
    """Says nothing: for processes other than the main one. Base of the others."""

    def start(self, total_steps: int, initial_step: int = 0) -> None:
        """See :class:`Progress`; so are the following."""

    def note(self, message: str) -> None: ...

    def audit(self, facts: dict[str, Any]) -> None: ...

    def advance(self, step: int) -> None: ...

    def step(self, record: dict[str, Any]) -> None: ...

    def evaluation(self, record: dict[str, Any]) -> None: ...

    def warn(self, message: str) -> None: ...

    def stop(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


class _Lines(NullProgress):
    """Writes whole lines to a stream. A reader that went away must not end the training, so a broken pipe mutes it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream: TextIO | None = stream

    def _write(self, line: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except BrokenPipeError:
            self._stream = None


class PlainProgress(_Lines):
    """One plain line for each logged step; where stderr is a file or a pipe."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream if stream is not None else sys.stderr)
        self._total = 0
        self._first = 0
        self._begun = time.monotonic()

    def start(self, total_steps: int, initial_step: int = 0) -> None:
        self._total, self._first, self._begun = total_steps, initial_step, time.monotonic()
        after = f", continuing after step {initial_step}" if initial_step else ""
        self._write(f"training for {total_steps} steps{after}")

    def note(self, message: str) -> None:
        self._write(message)

    def audit(self, facts: dict[str, Any]) -> None:
        self._write(f"{describe_audit(facts)}; one row, with what is learned in ⟦ ⟧:")
        self._write("".join(f"⟦{text}⟧" if supervised else text for text, supervised in facts["example"]).rstrip())

    def step(self, record: dict[str, Any]) -> None:
        parts = [f"step {record['step']}/{self._total}" if self._total else f"step {record['step']}", *describe_step(record)]
        done = record["step"] - self._first
        left = self._total - record["step"]
        if done > 0 and left > 0:
            parts.append(f"{duration((time.monotonic() - self._begun) / done * left)} left")
        self._write("  ".join(parts))

    def evaluation(self, record: dict[str, Any]) -> None:
        self._write(describe_evaluation(record))

    def warn(self, message: str) -> None:
        self._write(f"warning: {message}")


class JsonProgress(_Lines):
    """One JSON object for each event, on stdout: ``{"event": "start" | "note" | "step" | "evaluation" | "warning" | "stop", ...}``."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream if stream is not None else sys.stdout)
        self._stopped = False

    def _event(self, event: str, fields: dict[str, Any]) -> None:
        self._write(to_line({"event": event, **fields}))

    def start(self, total_steps: int, initial_step: int = 0) -> None:
        self._event("start", {"total_steps": total_steps, "initial_step": initial_step})

    def note(self, message: str) -> None:
        self._event("note", {"message": message})

    def audit(self, facts: dict[str, Any]) -> None:
        self._event("audit", facts)

    def step(self, record: dict[str, Any]) -> None:
        self._event("step", record)

    def evaluation(self, record: dict[str, Any]) -> None:
        self._event("evaluation", record)

    def warn(self, message: str) -> None:
        self._event("warning", {"message": message})

    def stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            self._event("stop", {})


class RichProgress(NullProgress):
    """A live bar with loss, learning rate, tokens/s, memory and time left. Phases before it show a spinner."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console if console is not None else Console(stderr=True)
        self._bar = RichBar(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[figures]}", markup=False, style="cyan"),
            console=self._console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._drawn = 0.0
        self._total = 0

    def _ensure(self, description: str) -> TaskID:
        if self._task is None:
            self._task = self._bar.add_task(description, total=None, figures="")
        self._bar.start()
        return self._task

    def start(self, total_steps: int, initial_step: int = 0) -> None:
        # A fresh task, or rich would count the time of loading, and the steps before a resume, into the time left.
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task("training", total=total_steps, completed=initial_step, figures="")
        self._total = total_steps
        self._bar.start()

    def note(self, message: str) -> None:
        self._bar.update(self._ensure(message), description=message, refresh=True)

    def audit(self, facts: dict[str, Any]) -> None:
        shown = Text(f"{describe_audit(facts)}; one row, with what is learned in green:\n")
        for text, supervised in facts["example"]:
            shown.append(text, style="bold green" if supervised else "dim")
        self._console.print(shown)

    def advance(self, step: int) -> None:
        now = time.monotonic()
        if self._task is not None and (now - self._drawn >= _REDRAW_SECONDS or step >= self._total):
            self._drawn = now
            self._bar.update(self._task, completed=step)

    def step(self, record: dict[str, Any]) -> None:
        self._bar.update(self._ensure("training"), completed=record["step"], figures="  ".join(describe_step(record)))

    def evaluation(self, record: dict[str, Any]) -> None:
        self._console.print(Text(describe_evaluation(record)))

    def warn(self, message: str) -> None:
        self._console.print(Text(f"warning: {message}", style="yellow"))

    def stop(self) -> None:
        self._bar.stop()


def describe_audit(facts: dict[str, Any]) -> str:
    """The counts of the label audit in one line."""
    return f"label audit: {facts['summary']}"


def describe_step(record: dict[str, Any]) -> list[str]:
    """The figures of a logged step that are there, each as people read it."""
    parts = []
    if (loss := record.get("loss")) is not None:
        parts.append(f"loss {number(float(loss))}")
    if (rate := record.get("learning_rate")) is not None:
        parts.append(f"lr {number(float(rate), 3)}")
    if (speed := record.get("tokens_per_second")) is not None:
        parts.append(f"{speed:,.0f} tokens/s")
    if (memory := record.get("peak_memory_bytes")) is not None:
        parts.append(f"memory {size(memory)}")
    return parts


def describe_evaluation(record: dict[str, Any]) -> str:
    """An evaluation in one line."""
    parts = [f"step {record['step']}  held-out"]
    intervals = record.get("eval_intervals", {})
    for name, value in record.items():
        if name.startswith("eval_") and name != "eval_intervals" and value is not None:
            plain = name.removeprefix("eval_")
            between = f" ({metric(plain, intervals[plain][0])} to {metric(plain, intervals[plain][1])})" if plain in intervals else ""
            parts.append(f"{plain.replace('_', ' ')} {metric(plain, float(value))}{between}")
    return "  ".join(parts)


def make_progress(mode: Mode = "auto", *, console: Console | None = None, stream: TextIO | None = None) -> Progress:
    """The progress of a mode. ``auto``: a live bar where stderr is a terminal, else plain lines.

    Args:
        mode: ``auto``, ``rich``, ``plain``, ``json`` or ``none`` (processes other than the main one).
        console: for the live bar; default: stderr.
        stream: for plain and JSON lines; default: stderr and stdout.
    """
    if mode == "auto":
        mode = "rich" if (console or Console(stderr=True)).is_terminal else "plain"
    if mode == "rich":
        return RichProgress(console)
    if mode == "plain":
        return PlainProgress(stream)
    if mode == "json":
        return JsonProgress(stream)
    if mode == "none":
        return NullProgress()
    raise ValueError(f"unknown progress mode {mode!r}")
