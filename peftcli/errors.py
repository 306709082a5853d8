"""Every error that peftcli raises on purpose, with the exit code that it ends the command with.

::

    PeftcliError                 1   the root; anything a user can act on derives from it
    ├── UsageError               2   the command line asks for something that does not exist or does not fit
    │   └── RecipeError          2   one or more faults in a recipe, each with its place
    ├── DataError                3   a data file or its rows
    ├── ModelError               4   a base model or tokenizer that cannot be found, read or used
    ├── TrainingError            5   the run itself: not-a-number, nothing to train, an impossible combination
    │   └── OutOfMemoryError     6   memory ran out; says what to change
    ├── CheckpointError          7   a checkpoint or adapter file that is missing, torn or does not fit
    ├── CheckFailed              8   a safety check failed after the work was done (merge parity, live adapter)
    ├── Busy                     9   another run holds the output folder
    ├── GateFailed              10   a gate of the recipe (`expect`) did not pass; the result is kept
    └── NotRepeatable           11   what is there is not what was locked, or a repeated run parted from the first one's trace

130 and 143 end a run that was interrupted or terminated. This module imports nothing of peftcli and no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class PeftcliError(Exception):
    """A fault that the user can act on.

    Args:
        message: what is wrong and where, in one sentence or a short list.
        hint: what to do next; printed on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  hint: {self.hint}"


class UsageError(PeftcliError):
    """The command line asks for something that does not exist or does not fit."""

    exit_code = 2


@dataclass(frozen=True)
class Fault:
    """One fault of a recipe: where it stands, what stands there, what may stand there.

    Attributes:
        message: what is wrong, without the place.
        file: the recipe file, or ``"<command line>"`` for an override.
        line, column: 1-based; ``None`` where the fault has no place (a key that is missing altogether has its parent's).
        key: dotted path such as ``train.learning_rate``.
        found: the offending text as it stands in the file.
        allowed: what may stand there, in words.
        nearest: the nearest allowed name, when one is near.
    """

    message: str
    file: str = ""
    line: int | None = None
    column: int | None = None
    key: str = ""
    found: str | None = None
    allowed: str | None = None
    nearest: str | None = None

    def __str__(self) -> str:
        place = self.file
        if self.line is not None:
            place += f":{self.line}"
            if self.column is not None:
                place += f":{self.column}"
        parts = [f"{place}: " if place else "", f"{self.key}: " if self.key else "", self.message]
        if self.found is not None:
            parts.append(f" (found {self.found})")
        text = "".join(parts)
        if self.nearest is not None:
            text += f"\n    did you mean {self.nearest!r}?"
        if self.allowed is not None:
            text += f"\n    allowed: {self.allowed}"
        return text


class RecipeError(UsageError):
    """All faults of a recipe, reported together."""

    def __init__(self, faults: Sequence[Fault], *, hint: str | None = None) -> None:
        self.faults = tuple(faults)
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        lines = "\n".join(f"  {fault}" for fault in self.faults)
        super().__init__(f"{count} in the recipe:\n{lines}", hint=hint)


class DataError(PeftcliError):
    """A data file or its rows."""

    exit_code = 3


class ModelError(PeftcliError):
    """A base model or tokenizer that cannot be found, read or used."""

    exit_code = 4


class TrainingError(PeftcliError):
    """The run itself: not-a-number, nothing to train, an impossible combination."""

    exit_code = 5


class OutOfMemoryError(TrainingError):
    """Memory ran out; says what to change."""

    exit_code = 6


class CheckpointError(PeftcliError):
    """A checkpoint or adapter file that is missing, torn or does not fit."""

    exit_code = 7


class CheckFailed(PeftcliError):
    """A safety check failed after the work was done."""

    exit_code = 8


class Busy(PeftcliError):
    """Another run holds the output folder."""

    exit_code = 9


class GateFailed(PeftcliError):
    """What the recipe expects of its run (``expect``) did not come true."""

    exit_code = 10


class NotRepeatable(PeftcliError):
    """What is there is not what was locked, or a repeated run is not the run that was."""

    exit_code = 11


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """The allowed name most like ``name``, or ``None`` when none is near enough to be a likely typing error."""
    found = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return found[0] if found else None
