"""What rows become: the part of the preparation that differs between tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from peftcli.data.audit import Audit
from peftcli.data.faults import Faults, Skipped
from peftcli.data.neutral import Item
from peftcli.data.sampling import Places
from peftcli.data.splits import Split
from peftcli.data.stream import StoredRows
from peftcli.errors import DataError
from peftcli.recipe.schema import DatasetSection

F = TypeVar("F")
ORIGINS_KEPT = 1000


class RowKind(ABC, Generic[F]):
    """Turns items of the neutral form into a split that a task trains on. One is made for each run.

    Attributes:
        formats: the dataset formats that it takes.
        plain: nothing is put around the texts of a row, neither a chat template nor a prompt text.
        config, tokenizer: of the run.
        streams: rows may lie in stores on disk; :meth:`stored` makes a split of them.
        skipped: faulty rows that were left out.
    """

    formats: tuple[str, ...]
    plain: bool = False
    streams: bool = False

    def __init__(self, config: DatasetSection, tokenizer: Any) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.skipped: list[Skipped] = []

    def faults(self) -> Faults:
        """Where faulty rows are noted: they end the run, or are left out as ``dataset.on_error`` says."""
        return Faults(skip=self.config.on_error == "skip", skipped=self.skipped)

    def check_any(self, left: int, rows: int) -> None:
        """Check that of so many ``rows``, of which the faulty ones are skipped, some are left.

        Raises:
            DataError: with the last of the faults.
        """
        if rows and not left and self.skipped:
            origin, reason = self.skipped[-1]
            raise DataError(
                f"each of {rows} rows is faulty and would be skipped, as {origin}: {reason}",
                hint="see the faults with dataset.on_error: fail",
            )

    def begin(self, base_dir: Path) -> list[str]:
        """Make the tokenizer ready for training; notes for the user."""
        return []

    def learn(self, items: Sequence[Item]) -> None:
        """See what only all training rows together tell, such as the set of labels."""

    @abstractmethod
    def encode(self, items: Sequence[Item], *, max_length: int, held_out: bool, notes: list[str]) -> F:
        """Tokenize rows and make them fit into ``max_length`` tokens; what was changed or left out is said in ``notes``.

        Raises:
            DataError: a row cannot be turned into what is learned.
        """

    @abstractmethod
    def audit(self, fitted: F, empty: Sequence[str], notes: Sequence[str]) -> Audit:
        """Check and count what carries loss. ``empty``: places of rows that were left out before.

        Raises:
            DataError: nothing would be learned, or the wrong thing.
        """

    @abstractmethod
    def split(self, fitted: F, empty: Sequence[str], *, held_out: bool) -> Split:
        """The rows as the loop and the evaluation take them."""

    def stored(
        self, pools: Sequence[StoredRows], chosen: Sequence[Places], *, max_length: int, notes: list[str]
    ) -> tuple[Split, Callable[[], Audit]]:
        """For a kind that ``streams``: the training split of the chosen rows of each source, and its audit, to be made once the
        ``notes`` are complete.

        Raises:
            DataError: truncation leaves nothing.
        """
        raise NotImplementedError
