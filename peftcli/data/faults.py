"""Collecting the faults of data files so that a user sees several at once instead of one for each attempt."""

from __future__ import annotations

from typing import NamedTuple

from peftcli.errors import DataError

FAULT_LIMIT = 10


class Skipped(NamedTuple):
    """A faulty row that ``dataset.on_error: skip`` left out: its place (``file:line``) and what is wrong with it."""

    origin: str
    reason: str


class Faults:
    """Faults of one reading. Raises by itself at the tenth, since a file of the wrong kind has one on each line.

    Args:
        hint: what to do about them.
        skip: rows with faults are left out instead: nothing is raised, and each fault goes into ``skipped``.
        skipped: a list to go on with.
    """

    def __init__(self, hint: str | None = None, *, skip: bool = False, skipped: list[Skipped] | None = None) -> None:
        self.found: list[str] = []
        self.hint = hint
        self.skip = skip
        self.skipped: list[Skipped] = [] if skipped is None else skipped
        self.count = 0

    def add(self, fault: str, *, at: str | None = None, hint: str | None = None) -> None:
        """Note one fault.

        Args:
            fault: what is wrong; it begins with the place (``place: ...``) where ``at`` does not give it.

        Raises:
            DataError: when ten have been collected and rows are not skipped.
        """
        self.count += 1
        if self.skip:
            origin, _, reason = fault.partition(": ") if at is None else (at, "", fault)
            self.skipped.append(Skipped(origin, reason))
            return
        self.found.append(fault if at is None else f"{at}: {fault}")
        self.hint = self.hint or hint
        if len(self.found) >= FAULT_LIMIT:
            self.raise_if_any(more=True)

    def raise_if_any(self, *, more: bool = False) -> None:
        """Raise one ``DataError`` that lists every fault so far.

        Raises:
            DataError: when there is at least one fault.
        """
        if not self.found:
            return
        count = "1 fault" if len(self.found) == 1 else f"{'the first ' if more else ''}{len(self.found)} faults"
        raise DataError(f"{count} in the data:\n" + "\n".join(f"  {fault}" for fault in self.found), hint=self.hint)
