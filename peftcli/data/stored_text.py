"""A split of text whose rows lie in stores on disk: a few bytes of memory for each row, whatever its length."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np
import numpy.typing as npt

from peftcli.data import store
from peftcli.data.kinds import ORIGINS_KEPT
from peftcli.data.sampling import Places
from peftcli.data.splits import SplitCounts, TextSplit
from peftcli.data.store import Store
from peftcli.data.tokenize import Encoded

T = TypeVar("T")


class Lazy(Sequence[T]):
    """A sequence whose items are made when they are asked for."""

    def __init__(self, count: int, make: Callable[[int], T]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._make(place) for place in range(*index.indices(self._count))]
        return self._make(range(self._count)[index])


class Found(NamedTuple):
    """Counts over the chosen rows: how many there are, what became of them, and what the audit asks of their pieces."""

    rows: int
    too_long: int
    unsupervised: int
    split: int
    opened: int
    bos: int
    complete: int
    ended: int


@dataclass(frozen=True)
class StoredText(TextSplit):
    """Rows in stores; ``origins``, ``input_ids`` and ``supervised`` are read as they are asked for.

    Attributes:
        stores: of each source. ``source``, ``piece``, ``row``: for each row of the split its source, and its numbers there.
        found: counts of the choice.
    """

    stores: Sequence[Store] = field(kw_only=True)
    source: npt.NDArray[np.int16] = field(kw_only=True)
    piece: Places = field(kw_only=True)
    found: Found = field(kw_only=True)

    @classmethod
    def of(cls, stores: Sequence[Store], chosen: Sequence[Places], left_out: Sequence[str], eos: int) -> StoredText:
        """The split that holds the pieces of the ``chosen`` rows of each store, in this order.

        Args:
            left_out: places of rows that could not be chosen. ``eos``: the token that ends any answer.
        """
        pieces, rows = zip(*(_pieces(stored, places) for stored, places in zip(stores, chosen, strict=True)), strict=True)
        source = np.repeat(np.arange(len(stores), dtype=np.int16), [len(part) for part in pieces])
        piece, row = np.concatenate(pieces), np.concatenate(rows)
        records = np.concatenate([stored.pieces[part] for stored, part in zip(stores, pieces, strict=True)])
        state, lost, kept = (
            np.concatenate([stored.rows[name][places] for stored, places in zip(stores, chosen, strict=True)])
            for name in ("state", "lost", "pieces")
        )
        flags, count = records["flags"], len(piece)

        def having(flag: int) -> int:
            return int(np.count_nonzero(flags & flag))

        unsupervised = int(lost.sum())
        faulty, too_long = int((state == store.FAULTY).sum()), int((state == store.TOO_LONG).sum())
        dropped = list(left_out[:ORIGINS_KEPT])
        for what in (store.TOO_LONG, store.KEPT, store.FAULTY):
            for stored, places in zip(stores, chosen, strict=True):
                if len(dropped) == ORIGINS_KEPT or not (too_long + unsupervised + faulty):
                    break
                part = stored.rows[places]
                times = part["lost"] if what == store.KEPT else part["state"] == what
                left = ORIGINS_KEPT - len(dropped)
                dropped.extend(stored.origin(int(place)) for place in np.repeat(places, times)[:left])
        ends = set(np.unique(records["end"]).tolist()) - {-1}
        return cls(
            origins=Lazy(count, lambda place: stores[source[place]].origin(int(row[place]))),
            counts=SplitCounts(
                rows=count,
                tokens=int(records["tokens"].sum(dtype=np.int64)),
                supervised_tokens=int(records["supervised"].sum(dtype=np.int64)),
                truncated=having(store.TRUNCATED),
                dropped=len(left_out) + too_long + unsupervised + faulty,
                longest=int(records["tokens"].max(initial=0)),
            ),
            dropped_origins=dropped,
            input_ids=Lazy(count, lambda place: stores[source[place]].ids(int(piece[place]))),
            supervised=Lazy(count, lambda place: stores[source[place]].supervised(int(piece[place]))),
            stop_ids=tuple(sorted(ends | {eos})),
            stores=stores,
            source=source,
            piece=piece,
            found=Found(
                rows=len(state),
                too_long=too_long,
                unsupervised=unsupervised,
                split=int((kept + lost > 1).sum()),
                opened=having(store.HAS_START),
                bos=having(store.BOS),
                complete=having(store.HAS_END),
                ended=having(store.ENDED),
            ),
        )

    @cached_property
    def lengths(self) -> Sequence[int]:
        return self._of_pieces("tokens")

    @cached_property
    def _units(self) -> Sequence[int]:
        return self._of_pieces("supervised")

    def _of_pieces(self, name: str) -> array[int]:
        values = np.empty(len(self.piece), np.int32)
        for number, stored in enumerate(self.stores):
            mine = self.source == number
            values[mine] = stored.pieces[name][self.piece[mine]]
        return array("i", values.tobytes())

    def units(self, row: int) -> int:
        return self._units[row]

    @property
    def example(self) -> Encoded:
        """The first whole row, else the first."""
        place = 0
        for number, stored in enumerate(self.stores):
            mine = np.flatnonzero(self.source == number)
            flags = stored.pieces["flags"][self.piece[mine]]
            whole = np.flatnonzero((flags & store.HAS_START > 0) & (flags & store.TRUNCATED == 0))
            if len(whole):
                place = int(mine[whole[0]])
                break
        return Encoded(self.input_ids[place], self.supervised[place], self.origins[place], np.zeros(0, np.int32))


def _pieces(stored: Store, rows: Places) -> tuple[Places, Places]:
    """The numbers of the pieces of these rows, in their order, and the row of each."""
    whole: Any = np.asarray(stored.rows["pieces"])
    first, counts = (np.cumsum(whole) - whole)[rows], whole[rows]
    # Each row's pieces follow each other: its first one's number, less the pieces listed before, plus the place in the list.
    first -= np.cumsum(counts) - counts
    pieces = np.repeat(first, counts)
    pieces += np.arange(len(pieces))
    return pieces, np.repeat(rows, counts)
