"""What happens to rows that are longer than ``max_length``, and to rows without a supervised token. Nothing is lost uncounted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from peftcli.data.faults import Faults
from peftcli.data.tokenize import Encoded, Ids, Mask
from peftcli.errors import DataError
from peftcli.recipe.schema import Truncation


@dataclass(frozen=True)
class Fitted:
    """Rows that fit.

    Attributes:
        rows: each of at most ``max_length`` tokens, at least one of them supervised.
        truncated: how many of them lost tokens.
        too_long: origins of the rows that ``drop`` left out.
        unsupervised: origins of the rows that had no supervised token, or none left after truncation.
        split: how many documents ``split`` divided.
        faulty: origins of the rows that could not be tokenized and were skipped.
    """

    rows: list[Encoded]
    truncated: int
    too_long: list[str]
    unsupervised: list[str]
    split: int
    faulty: list[str] = field(default_factory=list)


class FittedRow(NamedTuple):
    """What became of one row.

    Attributes:
        pieces: what is kept of it, each with a supervised token.
        lost: how many pieces had none.
        too_long: whether it was left out for its length.
        divided: whether it was split.
    """

    pieces: list[Encoded]
    lost: int
    too_long: bool
    divided: bool


def fit(rows: Sequence[Encoded], *, max_length: int, mode: Truncation, bos: int | None) -> Fitted:
    """Apply a truncation mode.

    ``keep_start`` and ``keep_end`` cut the other end off; ``keep_end`` keeps a leading BOS. ``drop`` leaves the row out.
    ``split`` divides documents into pieces that together are the document, without a BOS of their own; the first token
    of a piece carries no loss, having nothing before it.

    Args:
        rows: uncut rows.
        max_length: tokens.
        bos: the tokenizer's BOS.

    Raises:
        DataError: ``error`` and a row is longer; ``split`` and a longer row is no document.
    """
    faults = Faults()
    fitted = [(row.origin, fit_row(row, max_length=max_length, mode=mode, bos=bos, faults=faults)) for row in rows]
    faults.raise_if_any()
    kept = [piece for _, row in fitted for piece in row.pieces]
    too_long = [origin for origin, row in fitted if row.too_long]
    unsupervised = [origin for origin, row in fitted for _ in range(row.lost)]
    if not kept:
        raise nothing_left(len(rows), max_length, len(too_long), len(unsupervised))
    return Fitted(kept, sum(piece.truncated for piece in kept), too_long, unsupervised, sum(row.divided for _, row in fitted))


def nothing_left(rows: int, max_length: int, too_long: int, unsupervised: int) -> DataError:
    """The error where truncation leaves nothing to learn."""
    return DataError(
        f"none of {rows} rows has a supervised token left within dataset.max_length {max_length} "
        f"({too_long} were dropped as too long, {unsupervised} lost every supervised token)",
        hint="raise dataset.max_length, or choose dataset.truncation: keep_end",
    )


def fit_row(row: Encoded, *, max_length: int, mode: Truncation, bos: int | None, faults: Faults) -> FittedRow:
    """Apply a truncation mode to one row; what the mode refuses is noted in ``faults``."""
    pieces, divided = [row], False
    if len(row.input_ids) > max_length:
        what = f"{len(row.input_ids)} tokens, dataset.max_length is {max_length}"
        if mode == "drop":
            return FittedRow([], 0, True, False)
        if mode == "error":
            faults.add(what, at=row.origin, hint="raise dataset.max_length, or choose dataset.truncation: keep_start, keep_end or drop")
            return FittedRow([], 0, False, False)
        if mode == "split":
            if len(row.prompt_ids):
                faults.add(
                    f"{what}; only rows of plain text can be split",
                    at=row.origin,
                    hint="choose dataset.truncation: keep_start, keep_end or drop",
                )
                return FittedRow([], 0, False, False)
            pieces, divided = list(_pieces(row, max_length)), True
        else:
            pieces = [cut(row, max_length, mode == "keep_start", bos)]
    kept = [piece for piece in pieces if piece.supervised.any()]
    return FittedRow(kept, len(pieces) - len(kept), False, divided)


def cut(row: Encoded, length: int, start: bool, bos: int | None) -> Encoded:
    """The first (``start``) or last ``length`` tokens of a longer row; a BOS that opens the row is kept either way."""
    ids: Ids
    mask: Mask
    if start:
        return replace(
            row, input_ids=row.input_ids[:length].copy(), supervised=row.supervised[:length].copy(), has_end=False, truncated=True
        )
    # A chat format may use its BOS token as the mark of each turn; only a BOS that opens the row alone is kept.
    opens = length > 1 and bos is not None and row.input_ids[0] == bos and int((row.input_ids == bos).sum()) == 1
    if opens:
        ids = np.concatenate([row.input_ids[:1], row.input_ids[1 - length :]])
        mask = np.concatenate([row.supervised[:1], row.supervised[1 - length :]])
    else:
        ids, mask = row.input_ids[-length:].copy(), row.supervised[-length:].copy()
    mask[0] = False
    return replace(row, input_ids=ids, supervised=mask, has_start=opens, truncated=True)


def _pieces(row: Encoded, length: int) -> Iterator[Encoded]:
    total = len(row.input_ids)
    ends = [*range(length, total, length), total]
    if length > 2 and total % length == 1:
        ends[-2] -= 1  # a piece of a single token could carry no loss
    for start, end in zip([0, *ends], ends, strict=False):
        mask = row.supervised[start:end].copy()
        mask[0] = False
        yield replace(row, input_ids=row.input_ids[start:end].copy(), supervised=mask, has_start=start == 0, has_end=end == total)
