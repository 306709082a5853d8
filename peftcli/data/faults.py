"""Collecting the faults of data files so that a user sees several at once instead of one for each attempt."""

from __future__ import annotations

from peftcli.errors import DataError

FAULT_LIMIT = 10


class Faults:
    """Faults of one reading. Raises by itself at the tenth, since a file of the wrong kind has one on each line."""

    def __init__(self, hint: str | None = None) -> None:
        self.found: list[str] = []
        self.hint = hint

    def add(self, fault: str, *, hint: str | None = None) -> None:
        """Note one fault, with its place.

        Raises:
            DataError: when ten have been collected.
        """
        self.found.append(fault)
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
