"""From tokenized rows to batches: which rows form which step, and how they are laid into tensors.

The order is a pure function of the seed, the epoch and the rows: it does not depend on the number of processes beyond
how a step's rows are shared among them, and nothing is consumed from a random state.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peftcli.errors import UsageError
from peftcli.kernels import fast
from peftcli.kernels.documents import Documents
from peftcli.kernels.transfer import ahead

IntArray = NDArray[np.int32]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class Batch:
    """Rows as tensors, packed or padded.

    Attributes:
        input_ids: [1, total] packed; [rows, longest] padded. A beginning that packed rows share may lie there once, in front.
        position_ids: same shape; restart at 0 with each row, behind a shared beginning.
        positions: [supervised] indices into the flattened ``input_ids`` whose next token carries loss.
        targets: [supervised] those next tokens.
        documents: where the rows lie when packed, else ``None``.
        attention_mask: [rows, longest] int64 when padded, else ``None``.
        counts: tokens that carry loss in each row.
        rows, tokens: counts without padding; a shared beginning counts for each of its rows.
    """

    input_ids: Tensor
    position_ids: Tensor
    positions: Tensor
    targets: Tensor
    documents: Documents | None
    attention_mask: Tensor | None
    counts: tuple[int, ...]
    rows: int
    tokens: int


def collate(
    input_ids: Sequence[IntArray],
    supervised: Sequence[BoolArray],
    *,
    packed: bool,
    pad_id: int = 0,
    device: torch.device | str = "cpu",
    silent: bool = False,
    share: bool = False,
) -> Batch:
    """Lay rows end to end (``packed``) or right-padded into one batch.

    Args:
        input_ids, supervised: rows of equal length each; the first token of a row is never predicted.
        silent: no position carries loss (for a process that has no rows of its own in a step).
        share: tokens with which all packed rows begin are laid once. In a causal model without dropout nothing changes but rounding.
    """
    longest = max(len(row) for row in input_ids)
    common = shared_beginning(input_ids, supervised) if packed and share else 0
    if common:
        fast.take("beginnings that rows share, once")
    positions: list[NDArray[np.int64]] = []
    targets: list[IntArray] = []
    offset = 0
    for ids, learned in zip(input_ids, supervised, strict=True):
        if not silent:
            keep = np.flatnonzero(learned[1:])
            positions.append(keep + offset)
            targets.append(ids[1:][keep])
        offset += len(ids) - common if packed else longest
    tokens = sum(len(row) for row in input_ids)
    if packed:
        ids_array = np.concatenate([input_ids[0][:common], *(row[common:] for row in input_ids)])[None, :]
        place = np.concatenate([np.arange(common), *(np.arange(common, len(row)) for row in input_ids)])[None, :]
        documents: Documents | None = Documents([len(row) - common for row in input_ids], device, common)
        attention_mask = None
    else:
        padded, mask = pad(input_ids, pad_id)
        ids_array = padded.numpy()
        place = np.broadcast_to(np.arange(longest), ids_array.shape).copy()
        documents, attention_mask = None, ahead(mask, device)

    def tensor(array: NDArray[np.generic]) -> Tensor:
        return ahead(torch.from_numpy(np.ascontiguousarray(array.astype(np.int64))), device)

    empty: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
    return Batch(
        input_ids=tensor(ids_array),
        position_ids=tensor(place),
        positions=tensor(np.concatenate(positions) if positions else empty),
        targets=tensor(np.concatenate(targets) if targets else empty),
        documents=documents,
        attention_mask=attention_mask,
        counts=tuple(map(len, positions)) or (0,) * len(input_ids),
        rows=len(input_ids),
        tokens=tokens,
    )


# A beginning is shared if that spares at least this share of the batch's tokens: it makes attention somewhat dearer.
_WORTH = 1 / 32


def shared_beginning(input_ids: Sequence[IntArray], supervised: Sequence[BoolArray]) -> int:
    """How many tokens all rows begin with, as system prompts and templates have it, none of which predicts a token that carries loss.

    Every row keeps a token of its own. 0 where sharing would spare too little to pay.
    """
    limit = min(len(row) for row in input_ids) - 1
    for ids, learned in zip(input_ids, supervised, strict=True):
        unlike = np.flatnonzero(ids[:limit] != input_ids[0][:limit])
        limit = int(unlike[0]) if len(unlike) else limit
        # The last shared token predicts each row's own next one, so that one must not be learned either.
        carries = np.flatnonzero(learned[1 : limit + 1])
        limit = int(carries[0]) if len(carries) else limit
    spared = limit * (len(input_ids) - 1)
    return limit if spared > 0 and spared >= _WORTH * sum(map(len, input_ids)) else 0


def pad(rows: Sequence[NDArray[np.generic]], value: int) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as [rows, longest] int64, padded on the right with ``value``, and the mask of what is real."""
    longest = max(len(row) for row in rows)
    padded = np.full((len(rows), longest), value, dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return torch.from_numpy(padded), torch.from_numpy(mask)


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: ``shares[process][micro step]`` are row numbers. A share may be empty at the end of an epoch."""

    shares: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def rows(self) -> list[int]:
        return [row for share in self.shares for micro in share for row in micro]


class Epoch(Sequence[StepPlan]):
    """The steps of one epoch, each made when it is asked for: an epoch of a million rows takes some ten megabytes.

    Args:
        order: row numbers in the order of the epoch.
        ends: where each micro batch ends in it.
        accumulation, processes: micro steps and processes of a step.
        visits: the steps in another order than the rows'.
    """

    def __init__(
        self, order: NDArray[np.int64], ends: NDArray[np.int64], accumulation: int, processes: int, visits: NDArray[np.int64] | None
    ) -> None:
        self._order, self._ends, self._window, self._processes, self._visits = order, ends, accumulation * processes, processes, visits

    def __len__(self) -> int:
        return (len(self._ends) + self._window - 1) // self._window

    @overload
    def __getitem__(self, index: int) -> StepPlan: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[StepPlan]: ...
    def __getitem__(self, index: int | slice) -> StepPlan | Sequence[StepPlan]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return self._step(place if self._visits is None else int(self._visits[place]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Epoch) and len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def _step(self, number: int) -> StepPlan:
        """Micro batches go round the processes, so that two processes take the rows that one would take with twice the batch."""
        ends = self._ends[number * self._window : (number + 1) * self._window].tolist()
        start = int(self._ends[number * self._window - 1]) if number else 0
        rows = self._order[start : ends[-1]].tolist()
        micros = [tuple(rows[first - start : end - start]) for first, end in pairwise((start, *ends))]
        deepest = -(-len(micros) // self._processes)
        shares = (micros[process :: self._processes] for process in range(self._processes))
        return StepPlan(tuple((*share, *((),) * (deepest - len(share))) for share in shares))


@dataclass(frozen=True)
class Plan:
    """The whole run's order.

    Attributes:
        lengths: tokens of each row.
        batch_size, batch_tokens: rows, or tokens at most, for each process and accumulation step; one of them is set.
        accumulation, processes: micro steps and processes of a step.
        shuffle: a new order in each epoch; else the file's order.
        group_by_length: rows of similar length share a step.
    """

    lengths: Sequence[int]
    batch_size: int | None
    batch_tokens: int | None
    accumulation: int
    processes: int
    seed: int
    shuffle: bool = True
    group_by_length: bool = False

    def __post_init__(self) -> None:
        if self.batch_tokens is not None and max(self.lengths) > self.batch_tokens:
            raise UsageError(
                f"train.batch_tokens: the longest row has {max(self.lengths)} tokens and does not fit into {self.batch_tokens}",
                hint="raise train.batch_tokens or lower dataset.max_length.",
            )

    def epoch(self, epoch: int) -> Epoch:
        """The steps of epoch ``epoch`` (0-based): every row exactly once."""
        order = self._order(epoch)
        ends = self._micro_ends(order)
        visits = None
        if self.group_by_length and self.shuffle:
            # Sorting put the long steps together; visit them in a random order.
            visits = self._random(epoch, 1).permutation(-(-len(ends) // (self.accumulation * self.processes)))
        return Epoch(order, ends, self.accumulation, self.processes, visits)

    def digest(self, epochs: int) -> str:
        """sha256 of the order of the first ``epochs`` epochs."""
        digest = hashlib.sha256()
        for epoch in range(epochs):
            for step in self.epoch(epoch):
                digest.update(repr(step.shares).encode())
        return digest.hexdigest()

    def _random(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch, stream])))

    @cached_property
    def _lengths(self) -> NDArray[np.int64]:
        return np.asarray(self.lengths, dtype=np.int64)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        count = len(self.lengths)
        order = self._random(epoch, 0).permutation(count) if self.shuffle else np.arange(count)
        if self.group_by_length:
            # Rows are sorted within large blocks only, so that epochs still differ in who meets whom.
            block = (
                50
                * (self.batch_size or max(1, (self.batch_tokens or 1) // (int(self._lengths.sum()) // count + 1)))
                * self.accumulation
                * self.processes
            )
            parts = [part[np.argsort(-self._lengths[part], kind="stable")] for part in np.split(order, range(block, count, block))]
            order = np.concatenate(parts)
        return order

    def _micro_ends(self, order: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where each micro batch ends in the order: after ``batch_size`` rows, or before the row that no longer fits."""
        count = len(order)
        if self.batch_size is not None:
            return np.minimum(np.arange(1, -(-count // self.batch_size) + 1) * self.batch_size, count)
        through = np.cumsum(self._lengths[order])
        ends: list[int] = []
        while not ends or ends[-1] < count:
            used = int(through[ends[-1] - 1]) if ends else 0
            ends.append(int(np.searchsorted(through, used + (self.batch_tokens or 0), side="right")))
        return np.asarray(ends)
