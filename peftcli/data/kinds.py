"""What rows become: the part of the preparation that differs between tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from peftcli.data.audit import Audit
from peftcli.data.neutral import Item
from peftcli.data.splits import Split
from peftcli.recipe.schema import DatasetSection

F = TypeVar("F")
ORIGINS_KEPT = 1000


class RowKind(ABC, Generic[F]):
    """Turns items of the neutral form into a split that a task trains on. One is made for each run.

    Attributes:
        formats: the dataset formats that it takes.
        plain: nothing is put around the texts of a row, neither a chat template nor a prompt text.
        config, tokenizer: of the run.
    """

    formats: tuple[str, ...]
    plain: bool = False

    def __init__(self, config: DatasetSection, tokenizer: Any) -> None:
        self.config, self.tokenizer = config, tokenizer

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
