"""Which rows form which step, and how they are laid into tensors."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftcli.data.batching import Plan, collate
from peftcli.errors import UsageError
from peftcli.kernels.grouping import by_length


def plan(lengths: list[int], *, size: int | None = None, tokens: int | None = None, accumulation: int = 1, processes: int = 1, seed: int = 5,
         shuffle: bool = True, group: bool = False) -> Plan:  # fmt: skip
    return Plan(
        lengths=tuple(lengths), batch_size=size, batch_tokens=tokens, accumulation=accumulation, processes=processes, seed=seed,
        shuffle=shuffle, group_by_length=group,
    )  # fmt: skip


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=120)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, size=st.integers(1, 9), accumulation=st.integers(1, 4), processes=st.integers(1, 4), seed=st.integers(0, 9), group=st.booleans(), shuffle=st.booleans())  # fmt: skip
def test_every_row_once_per_epoch_and_no_micro_step_too_large(lengths: list[int], size: int, accumulation: int, processes: int, seed: int, group: bool, shuffle: bool) -> None:  # fmt: skip
    made = plan(lengths, size=size, accumulation=accumulation, processes=processes, seed=seed, group=group, shuffle=shuffle)
    for epoch in (0, 1):
        steps = made.epoch(epoch)
        assert Counter(row for step in steps for row in step.rows) == Counter(range(len(lengths)))
        full = size * accumulation * processes
        assert sorted(len(step.rows) for step in steps)[1:] == [full] * (len(steps) - 1), "only one step of an epoch may be partial"
        for step in steps:
            assert step.rows, "no step is empty"
            assert len(step.shares) == processes
            assert len({len(share) for share in step.shares}) == 1, "all processes take part equally often"
            assert all(len(micro) <= size for share in step.shares for micro in share)
            assert len(step.shares[0]) <= accumulation


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, limit=st.integers(40, 200), processes=st.integers(1, 3), group=st.booleans())
def test_batch_tokens_are_never_exceeded_and_filled_as_far_as_rows_fit(lengths: list[int], limit: int, processes: int, group: bool) -> None:
    made = plan(lengths, tokens=limit, processes=processes, group=group)
    steps = made.epoch(0)
    assert Counter(row for step in steps for row in step.rows) == Counter(range(len(lengths)))
    micros = [micro for step in steps for share in step.shares for micro in share if micro]
    assert all(sum(lengths[row] for row in micro) <= limit for micro in micros)
    if processes == 1 and not group:
        for one, following in pairwise(micros):
            assert sum(lengths[row] for row in one) + lengths[following[0]] > limit


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 5), group=st.booleans(), epoch=st.integers(0, 3))
def test_two_processes_take_the_rows_of_one_with_twice_the_batch(lengths: list[int], seed: int, group: bool, epoch: int) -> None:
    two = plan(lengths, size=8, processes=2, seed=seed, group=group).epoch(epoch)
    one = plan(lengths, size=16, seed=seed, group=group).epoch(epoch)
    accumulated = plan(lengths, size=8, accumulation=2, seed=seed, group=group).epoch(epoch)
    assert [sorted(step.rows) for step in two] == [sorted(step.rows) for step in one] == [sorted(step.rows) for step in accumulated]


def test_the_order_is_a_pure_function_of_the_seed_and_the_epoch() -> None:
    lengths = [1 + i % 7 for i in range(50)]
    before = np.random.get_state()[1].copy()
    first = plan(lengths, size=4)
    again = plan(lengths, size=4)
    assert [again.epoch(e) for e in (2, 0, 1)] == [first.epoch(e) for e in (2, 0, 1)]
    assert first.epoch(0) != first.epoch(1)
    assert first.epoch(0) != plan(lengths, size=4, seed=6).epoch(0)
    assert (np.random.get_state()[1] == before).all(), "nothing is drawn from the global generator"


def test_without_shuffling_rows_come_in_the_order_of_the_file() -> None:
    made = plan([3] * 10, size=4, shuffle=False)
    assert [row for step in made.epoch(1) for row in step.rows] == list(range(10))
    assert made.epoch(0) == made.epoch(1)


def test_group_by_length_puts_similar_rows_together_and_still_shuffles() -> None:
    lengths = [1 + (37 * i) % 97 for i in range(400)]
    grouped, plain = plan(lengths, size=8, group=True), plan(lengths, size=8)

    def spread(made: Plan, epoch: int = 0) -> float:
        return float(np.mean([np.ptp([lengths[row] for row in step.rows]) for step in made.epoch(epoch)]))

    assert spread(grouped) < 0.25 * spread(plain)
    means = [float(np.mean([lengths[row] for row in step.rows])) for step in grouped.epoch(0)]
    assert means != sorted(means)
    assert means != sorted(means, reverse=True)
    assert [sorted(s.rows) for s in grouped.epoch(0)] != [sorted(s.rows) for s in grouped.epoch(1)]


def test_the_digest_names_the_order() -> None:
    lengths = [2] * 30
    assert plan(lengths, size=4).digest(2) == plan(lengths, size=4).digest(2)
    others = [plan(lengths, size=4, seed=9), plan(lengths, size=5), plan(lengths, size=4, processes=2)]
    digests = {plan(lengths, size=4).digest(2), plan(lengths, size=4).digest(1), *(other.digest(2) for other in others)}
    assert len(digests) == 5


def test_a_row_longer_than_batch_tokens_is_refused() -> None:
    with pytest.raises(UsageError, match=r"longest row has 41 tokens .* 40"):
        plan([5, 41], tokens=40)


ROWS = st.lists(st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=12), min_size=1, max_size=6)


@settings(max_examples=80, deadline=None)
@given(rows=ROWS, packed=st.booleans())
def test_targets_are_the_next_tokens_of_the_same_row(rows: list[list[tuple[int, bool]]], packed: bool) -> None:
    ids = [np.asarray([token for token, _ in row], dtype=np.int32) for row in rows]
    masks = [np.asarray([mark for _, mark in row]) for row in rows]
    batch = collate(ids, masks, packed=packed, pad_id=7)
    longest = max(len(row) for row in rows)
    starts = np.cumsum([0] + [len(row) for row in rows])[:-1] if packed else np.arange(len(rows)) * longest
    expected = [
        (int(s) + i, int(row[i + 1])) for s, row, mask in zip(starts, ids, masks, strict=True) for i in range(len(row) - 1) if mask[i + 1]
    ]
    assert list(zip(batch.positions.tolist(), batch.targets.tolist(), strict=True)) == expected
    assert batch.rows == len(rows)
    assert batch.tokens == sum(len(row) for row in rows)
    flat = batch.input_ids.flatten()
    for start, row in zip(starts, ids, strict=True):
        assert flat[int(start) : int(start) + len(row)].tolist() == row.tolist()
        assert batch.position_ids.flatten()[int(start) : int(start) + len(row)].tolist() == list(range(len(row)))
    if packed:
        assert batch.input_ids.shape == (1, batch.tokens)
        assert batch.attention_mask is None
        assert batch.documents is not None
        assert batch.documents.lengths == tuple(len(row) for row in rows)
    else:
        assert batch.documents is None
        assert batch.attention_mask is not None
        assert batch.attention_mask.sum(1).tolist() == [len(row) for row in rows]
        assert (batch.input_ids[batch.attention_mask == 0] == 7).all()


def test_a_silent_batch_carries_no_loss() -> None:
    batch = collate([np.arange(5, dtype=np.int32)], [np.ones(5, dtype=np.bool_)], packed=True, silent=True)
    assert batch.positions.numel() == batch.targets.numel() == 0
    assert batch.positions.dtype == torch.int64


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), min_size=1, max_size=40),
    parts=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_rows_of_similar_lengths_go_together(lengths: list[tuple[int, int]], parts: int, seed: int) -> None:
    widths = [[pair[part] for pair in lengths] for part in range(parts)]
    rows = list(np.random.default_rng(seed).permutation(len(lengths)))
    groups = by_length(rows, widths, 256)
    assert sorted(row for group in groups for row in group) == sorted(rows)
    assert groups == by_length(sorted(rows), widths, 256)  # whatever their order
    for group in groups:
        tokens = sum(width[row] for row in group for width in widths)
        padded = sum(max(width[row] for row in group) for width in widths) * len(group)
        assert padded <= max(1.25 * tokens, 256) or len(group) == 1
