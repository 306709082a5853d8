"""From tokenized rows to batches: which rows form which step, and how they are laid into tensors.

The order is a pure function of the seed, the epoch and the rows: it does not depend on the number of processes beyond
how a step's rows are shared among them, and nothing is consumed from a random state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peftcli.errors import UsageError
from peftcli.kernels.attention import Documents

IntArray = NDArray[np.int32]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class Batch:
    """Rows as tensors, packed or padded.

    Attributes:
        input_ids: [1, total] packed; [rows, longest] padded.
        position_ids: same shape; restart at 0 with each row.
        positions: [supervised] indices into the flattened ``input_ids`` whose next token carries loss.
        targets: [supervised] those next tokens.
        documents: where the rows lie when packed, else ``None``.
        attention_mask: [rows, longest] int64 when padded, else ``None``.
        counts: tokens that carry loss in each row.
        rows, tokens: counts without padding.
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
) -> Batch:
    """Lay rows end to end (``packed``) or right-padded into one batch.

    Args:
        input_ids, supervised: rows of equal length each; the first token of a row is never predicted.
        silent: no position carries loss (for a process that has no rows of its own in a step).
    """
    longest = max(len(row) for row in input_ids)
    positions: list[NDArray[np.int64]] = []
    targets: list[IntArray] = []
    offset = 0
    for ids, learned in zip(input_ids, supervised, strict=True):
        if not silent:
            keep = np.flatnonzero(learned[1:])
            positions.append(keep + offset)
            targets.append(ids[1:][keep])
        offset += len(ids) if packed else longest
    tokens = sum(len(row) for row in input_ids)
    if packed:
        ids_array = np.concatenate(input_ids)[None, :]
        place = np.concatenate([np.arange(len(row)) for row in input_ids])[None, :]
        documents: Documents | None = Documents([len(row) for row in input_ids], device)
        attention_mask = None
    else:
        padded, mask = pad(input_ids, pad_id)
        ids_array = padded.numpy()
        place = np.broadcast_to(np.arange(longest), ids_array.shape).copy()
        documents, attention_mask = None, mask.to(device)

    def tensor(array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array.astype(np.int64))).to(device)

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

    lengths: tuple[int, ...]
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

    def epoch(self, epoch: int) -> list[StepPlan]:
        """The steps of epoch ``epoch`` (0-based): every row exactly once."""
        order = self._order(epoch)
        micros = self._micros(order)
        window = self.accumulation * self.processes
        steps = [self._share(micros[start : start + window]) for start in range(0, len(micros), window)]
        if self.group_by_length and self.shuffle:
            # Sorting put the long steps together; visit them in a random order.
            steps = [steps[i] for i in self._random(epoch, 1).permutation(len(steps))]
        return steps

    def digest(self, epochs: int) -> str:
        """sha256 of the order of the first ``epochs`` epochs."""
        digest = hashlib.sha256()
        for epoch in range(epochs):
            for step in self.epoch(epoch):
                digest.update(repr(step.shares).encode())
        return digest.hexdigest()

    def _random(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch, stream])))

    def _order(self, epoch: int) -> list[int]:
        count = len(self.lengths)
        order = self._random(epoch, 0).permutation(count) if self.shuffle else np.arange(count)
        if self.group_by_length:
            # Rows are sorted within large blocks only, so that epochs still differ in who meets whom.
            block = (
                50
                * (self.batch_size or max(1, (self.batch_tokens or 1) // (sum(self.lengths) // count + 1)))
                * self.accumulation
                * self.processes
            )
            lengths = np.asarray(self.lengths)
            parts = [part[np.argsort(-lengths[part], kind="stable")] for part in np.split(order, range(block, count, block))]
            order = np.concatenate(parts)
        return [int(i) for i in order]

    def _micros(self, order: list[int]) -> list[tuple[int, ...]]:
        if self.batch_size is not None:
            return [tuple(order[i : i + self.batch_size]) for i in range(0, len(order), self.batch_size)]
        limit = self.batch_tokens or 0
        micros: list[tuple[int, ...]] = []
        current: list[int] = []
        used = 0
        for row in order:
            if current and used + self.lengths[row] > limit:
                micros.append(tuple(current))
                current, used = [], 0
            current.append(row)
            used += self.lengths[row]
        if current:
            micros.append(tuple(current))
        return micros

    def _share(self, micros: list[tuple[int, ...]]) -> StepPlan:
        """Micro batches go round the processes, so that two processes take the rows that one would take with twice the batch."""
        shares: list[list[tuple[int, ...]]] = [[] for _ in range(self.processes)]
        for index, micro in enumerate(micros):
            shares[index % self.processes].append(micro)
        deepest = max(len(share) for share in shares)
        return StepPlan(tuple(tuple(share) + ((),) * (deepest - len(share)) for share in shares))
