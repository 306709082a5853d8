"""Where documents lie in a packed row, and the rectangles that they are gathered into for attention."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peftcli.kernels.grouping import by_length
from peftcli.kernels.transfer import ahead


@dataclass(frozen=True)
class Rectangle:
    """Documents that are attended to together.

    Attributes:
        rows, longest: its shape.
        gather: [rows * longest] positions in the packed row; padding repeats position 0.
        slots: [tokens] the places in the rectangle that hold tokens, and ``place``: where each lies in the packed row.
        valid: [rows, longest], or ``None`` where there is no padding.
    """

    rows: int
    longest: int
    gather: Tensor
    slots: Tensor
    place: Tensor
    valid: Tensor | None


@dataclass(frozen=True)
class Cells:
    """A rectangle's tokens by key-value head: what each token has for one of them is a cell, and a head's cells lie together.

    Attributes:
        rows, heads, longest: its shape.
        gather: [rows * heads * longest] cells of the packed row, in which a token's heads lie together; padding repeats cell 0.
        slots: [cells] the places in the rectangle that hold cells, or ``None`` where all do, and ``place``: where each lies in the packed
            row.
        lengths: [rows] int64, or ``None`` where all are as long.
        beginning: this is the shared beginning itself, which sees nothing in front of it.
    """

    rows: int
    heads: int
    longest: int
    gather: Tensor
    slots: Tensor | None
    place: Tensor
    lengths: Tensor | None
    beginning: bool


class Documents:
    """Where each document lies in a packed row of ``total`` tokens, prepared once for all layers of a batch.

    Args:
        lengths: of the documents, in the order in which they lie.
        device: of the index tensors.
        shared: tokens with which every document begins. They lie once, in front of all, are no part of ``lengths``, and every
            document sees them; each document's positions go on behind them.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu", shared: int = 0) -> None:
        self.lengths, self.shared = tuple(lengths), shared
        self.total, self.longest = shared + sum(self.lengths), max(self.lengths, default=0)
        self.device = torch.device(device)
        self._cells: dict[int, list[Cells]] = {}

    @functools.cached_property
    def starts(self) -> Tensor:
        """[documents + 1] int32: where each document begins, and the end."""
        return self._ahead(np.cumsum([0, *self.lengths], dtype=np.int32))

    @functools.cached_property
    def spans(self) -> Tensor:
        """[documents, 2] int64: (start, length) of each, the shared beginning first where there is one."""
        starts = itertools.accumulate(self.lengths, initial=self.shared)
        spans = [*([(0, self.shared)] if self.shared else []), *zip(starts, self.lengths, strict=False)]
        return self._ahead(np.array(spans, dtype=np.int64).reshape(-1, 2))

    @property
    def rectangles(self) -> list[Rectangle]:
        """The documents in rectangles of similar lengths."""
        return self._laid[0]

    @property
    def inverse(self) -> Tensor:
        """[total] where each token lies in the shared beginning and the rectangles, one behind the other."""
        return self._laid[1]

    def cells(self, heads: int) -> list[Cells]:
        """The shared beginning, where there is one, and the rectangles, for so many key-value heads."""
        if heads not in self._cells:
            self._cells[heads] = [self._cells_of(rows, heads) for rows in self._rows()]
        return self._cells[heads]

    @functools.cached_property
    def _groups(self) -> list[list[int]]:
        return by_length(range(len(self.lengths)), [self.lengths])

    @functools.cached_property
    def _laid(self) -> tuple[list[Rectangle], Tensor]:
        starts = list(itertools.accumulate(self.lengths, initial=self.shared))
        rectangles: list[Rectangle] = []
        # In numpy: under fake tensors (memory estimates) the numbers stay known.
        inverse = np.arange(self.total, dtype=np.int64)
        offset = self.shared
        for group in self._groups:
            longest = self.lengths[group[0]]
            gather = np.zeros((len(group), longest), dtype=np.int64)
            valid = np.zeros((len(group), longest), dtype=np.bool_)
            for row, index in enumerate(group):
                start, length = starts[index], self.lengths[index]
                gather[row, :length] = np.arange(start, start + length)
                valid[row, :length] = True
                inverse[start : start + length] = np.arange(offset, offset + length)
                offset += longest
            flat, slots = gather.reshape(-1), np.flatnonzero(valid)
            parts = [self._ahead(x) for x in (flat, slots, flat[slots])]
            rectangles.append(Rectangle(len(group), longest, parts[0], parts[1], parts[2], None if valid.all() else self._ahead(valid)))
        return rectangles, self._ahead(inverse)

    def _rows(self) -> list[list[tuple[int, int]]]:
        """(start, length) of the rows of each rectangle, the shared beginning first."""
        starts = list(itertools.accumulate(self.lengths, initial=self.shared))
        rows = [[(starts[index], self.lengths[index]) for index in group] for group in self._groups]
        return [[(0, self.shared)], *rows] if self.shared else rows

    def _cells_of(self, rows: list[tuple[int, int]], heads: int) -> Cells:
        longest = max(length for _, length in rows)
        start, lengths = (np.array(part, dtype=np.int64) for part in zip(*rows, strict=True))
        place = np.arange(longest)
        valid = place < lengths[:, None]
        tokens = np.where(valid, start[:, None] + place, 0)
        cells = tokens[:, None, :] * heads + np.arange(heads)[None, :, None] * valid[:, None, :]
        flat, beginning = cells.reshape(-1), rows[0][0] < self.shared
        if valid.all():
            gather = self._ahead(flat)
            return Cells(len(rows), heads, longest, gather, None, gather, None, beginning)
        slots = np.flatnonzero(np.broadcast_to(valid[:, None, :], cells.shape))
        parts = [self._ahead(x) for x in (flat, slots, flat[slots])]
        return Cells(len(rows), heads, longest, parts[0], parts[1], parts[2], self._ahead(lengths), beginning)

    def _ahead(self, numbers: NDArray[np.generic]) -> Tensor:
        return ahead(torch.from_numpy(numbers), self.device)


class Padded:
    """Rows of a padded batch, laid end to end with their padding.

    Args:
        rows, longest: the batch's shape.
        lengths: [rows] int64, tokens of each row; padding is behind them. ``None``: there is none.
    """

    shared = 0

    def __init__(self, rows: int, longest: int, lengths: Tensor | None) -> None:
        self.rows, self.longest, self.lengths = rows, longest, lengths
        self._cells: dict[int, list[Cells]] = {}

    @functools.cached_property
    def spans(self) -> Tensor:
        """[rows, 2] int64: (start, length) of each row without its padding."""
        starts = torch.arange(self.rows) * self.longest
        return torch.stack([starts, torch.full_like(starts, self.longest) if self.lengths is None else self.lengths], dim=1).contiguous()

    def cells(self, heads: int) -> list[Cells]:
        """All rows as one rectangle; its padding is computed like everything else, and seen by nothing."""
        if heads not in self._cells:
            token = torch.arange(self.rows * self.longest).view(self.rows, 1, self.longest)
            place = (token * heads + torch.arange(heads)[:, None]).flatten()
            self._cells[heads] = [Cells(self.rows, heads, self.longest, place, None, place, self.lengths, False)]
        return self._cells[heads]
