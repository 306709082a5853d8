"""``metrics.jsonl``: one JSON object for each logged step and for each evaluation."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from peftcli.errors import CheckpointError
from peftcli.report.files import write_text_atomically

TRAIN_FIELDS = (
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "supervised_tokens",
    "tokens_per_second",
    "peak_memory_bytes",
    "seconds",
)
EVAL_FIELDS = ("step", "epoch", "eval_loss", "eval_perplexity", "eval_token_accuracy")


def jsonable(record: dict[str, Any]) -> dict[str, Any]:
    """``record`` with NaN and infinities as ``null`` and, beside them, a ``note`` that says what they were."""
    lost = {key: value for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)}
    if not lost:
        return record
    note = "; ".join(f"{key} is {value}" for key, value in lost.items())
    return {**record, **dict.fromkeys(lost), "note": note}


def to_line(record: dict[str, Any]) -> str:
    """One line of JSON, without the newline; never NaN."""
    return json.dumps(jsonable(record), ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True)
class MetricsLog:
    """What ``metrics.jsonl`` holds.

    Attributes:
        records: the objects, in the file's order.
        warning: says that the last line was torn and left out, else ``None``.
    """

    records: list[dict[str, Any]]
    warning: str | None = None


def read_metrics(path: Path) -> MetricsLog:
    """Read ``metrics.jsonl``. A torn last line (a run killed while writing) is left out and reported.

    Raises:
        CheckpointError: the file is missing, or a line other than the last is damaged (``file:line``).
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist", hint="it appears with the first logged step of a run") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    lines = data.split(b"\n")
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        # A complete file ends with a newline, so the last piece is empty; anything else there was torn.
        last = number == len(lines)
        if last and not line.strip():
            break
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("not an object with a step")
        except ValueError as error:
            if last:
                return MetricsLog(records, f"{path}:{number}: the last line is torn ({len(line)} bytes) and was left out")
            raise CheckpointError(f"{path}:{number} is damaged: {error}", hint="restore the file or start the run anew") from error
        records.append(record)
    return MetricsLog(records)


class MetricsWriter:
    """Appends records to ``metrics.jsonl``; each line reaches the operating system before ``write`` returns.

    Args:
        path: the file; its folder is made.
        append: continue an existing file instead of starting anew. A torn last line is removed first.
        truncate_after_step: with ``append``, drop records of later steps: the run resumes after this one.

    Attributes:
        warning: what was repaired on opening, else ``None``.

    Raises:
        CheckpointError: the file cannot be read or written.
    """

    def __init__(self, path: Path, append: bool = False, truncate_after_step: int | None = None) -> None:
        self.path = path
        self.warning: str | None = None
        kept: list[dict[str, Any]] = []
        if append and path.exists():
            log = read_metrics(path)
            self.warning = log.warning
            kept = [record for record in log.records if truncate_after_step is None or record["step"] <= truncate_after_step]
        write_text_atomically(path, "".join(to_line(record) + "\n" for record in kept))
        self._file: TextIO | None = self._open()

    def _open(self) -> TextIO:
        try:
            return self.path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1, newline="\n")
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error.strerror or error}") from error

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it must have an integer ``step``.

        Raises:
            CheckpointError: the disk refuses the line, or the writer is closed.
        """
        if not isinstance(record.get("step"), int):
            raise ValueError(f"a metrics record needs an integer step, got {record.get('step')!r}")
        if self._file is None:
            raise CheckpointError(f"{self.path} is closed")
        try:
            self._file.write(to_line(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error.strerror or error}", hint="free some space, then --resume") from error

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()
            except OSError as error:
                raise CheckpointError(f"cannot write {self.path}: {error.strerror or error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
