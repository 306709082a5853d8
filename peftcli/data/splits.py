"""A tokenized split of the data, as the loop and the evaluation take it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from peftcli.data.tokenize import Ids, Mask


@dataclass(frozen=True)
class SplitCounts:
    """Plain counts of a split: kept rows and their tokens, rows cut, rows left out, and the longest kept row in tokens."""

    rows: int
    tokens: int
    supervised_tokens: int
    truncated: int
    dropped: int
    longest: int


@dataclass(frozen=True)
class GenerationExample:
    """What the model is asked to answer: one held-out row, or several that ask the same.

    Attributes:
        prompt_ids: what the model is given, generation prompt included.
        prompt: the readable request: the last user message, or the prompt.
        references: the different answers of the data, at least one.
        origin: the place of the first row.
    """

    prompt_ids: list[int]
    prompt: str
    references: tuple[str, ...]
    origin: str

    @property
    def reference(self) -> str:
        """The answers as people read them."""
        return "\nor: ".join(self.references)


def to_answer(rows: Iterable[GenerationExample]) -> list[GenerationExample]:
    """Rows with the same prompt as one example with all their answers, in the order of their first rows. So that a data set that
    has several answers to one request, as translations and descriptions have, is measured against all of them."""
    found: dict[tuple[tuple[int, ...], str], GenerationExample] = {}
    for row in rows:
        key = tuple(row.prompt_ids), row.prompt
        known = found.setdefault(key, row)
        if known is not row:
            found[key] = replace(known, references=tuple(dict.fromkeys(known.references + row.references)))
    return list(found.values())


@dataclass(frozen=True)
class Split(ABC):
    """Rows of one split, ready to be laid into batches. What a row holds is the task's matter.

    Attributes:
        origins: the place of each row.
        counts: plain counts.
        dropped_origins: places of the rows left out, the first 1000.
        generation: what is to be answered of the held-out rows; empty where the task writes no answers.
        stop_ids: the tokens that end an answer in these rows, EOS among them: where generation stops.
    """

    origins: Sequence[str]
    counts: SplitCounts
    dropped_origins: list[str]
    generation: list[GenerationExample] = field(default_factory=list, kw_only=True)
    stop_ids: tuple[int, ...] = field(default=(), kw_only=True)

    @property
    @abstractmethod
    def lengths(self) -> Sequence[int]:
        """Tokens of each row, as the model sees them."""

    @property
    def widths(self) -> tuple[Sequence[int], ...]:
        """For each tensor that the rows of a batch are padded into: the tokens of each row that go there."""
        return (self.lengths,)

    @abstractmethod
    def units(self, row: int) -> int:
        """What the loss of row number ``row`` is divided by: its supervised tokens, or 1 where the row itself is judged."""

    @abstractmethod
    def first_ids(self, row: int) -> Ids:
        """The token ids of row number ``row``, for looking at: those that go into the model first."""

    def all_ids(self, row: int) -> Ids:
        """Every token id of row number ``row``."""
        return self.first_ids(row)


@dataclass(frozen=True)
class TextSplit(Split):
    """Rows of text whose next tokens are learned.

    Attributes:
        input_ids, supervised: for each row, arrays of the same shape (length,).
    """

    input_ids: Sequence[Ids]
    supervised: Sequence[Mask]

    @property
    def lengths(self) -> Sequence[int]:
        return tuple(len(row) for row in self.input_ids)

    def units(self, row: int) -> int:
        return int(self.supervised[row][1:].sum())  # nothing precedes the first token

    def first_ids(self, row: int) -> Ids:
        return self.input_ids[row]


@dataclass(frozen=True)
class PairSplit(Split):
    """Pairs of texts; the second is learned from the first.

    Attributes:
        input_ids: of the source, for each row an array of shape (length,), special tokens included.
        target_ids: of the target, likewise; all of them carry loss.
    """

    input_ids: list[Ids]
    target_ids: list[Ids]

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(len(source) + len(target) for source, target in zip(self.input_ids, self.target_ids, strict=True))

    @property
    def widths(self) -> tuple[Sequence[int], ...]:
        return [len(source) for source in self.input_ids], [len(target) for target in self.target_ids]

    def units(self, row: int) -> int:
        return len(self.target_ids[row])

    def first_ids(self, row: int) -> Ids:
        return self.input_ids[row]

    def all_ids(self, row: int) -> Ids:
        return np.concatenate([self.input_ids[row], self.target_ids[row]])


@dataclass(frozen=True)
class LabelledSplit(Split):
    """Rows of text, each with a label as a whole.

    Attributes:
        input_ids: for each row, an array of shape (length,).
        segments: token type ids of the same shapes (which of two texts a token belongs to), where the tokenizer gives them.
        targets: float64 [rows, outputs]: the class's index in one column, a 0 or 1 for each label, or the number.
    """

    input_ids: list[Ids]
    segments: list[Ids] | None
    targets: npt.NDArray[np.float64]

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(len(row) for row in self.input_ids)

    def units(self, row: int) -> int:
        return 1

    def first_ids(self, row: int) -> Ids:
        return self.input_ids[row]


@dataclass(frozen=True)
class TaggedSplit(Split):
    """Rows of words, each with a tag.

    Attributes:
        input_ids: for each row, an array of shape (length,).
        segments: token type ids of the same shapes, where the tokenizer gives them.
        targets: of the same shapes, the label's index of tokens that carry loss, -100 elsewhere.
        places: for each row, the position of each word at which its tag is read off, in order.
        words: for each row, these words.
    """

    input_ids: list[Ids]
    segments: list[Ids] | None
    targets: list[Ids]
    places: list[Ids]
    words: list[list[str]]

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(len(row) for row in self.input_ids)

    def units(self, row: int) -> int:
        return int((self.targets[row] >= 0).sum())

    def first_ids(self, row: int) -> Ids:
        return self.input_ids[row]

    def tags(self, row: int) -> Ids:
        """The label's index of each word of row number ``row``."""
        return self.targets[row][self.places[row]]


def unseen_tokens(split: Split, tokens: Sequence[int]) -> set[int]:
    """Those of ``tokens`` that occur in no row."""
    left = set(tokens)
    for row in range(len(split.origins) if left else 0):
        left.difference_update(split.all_ids(row).tolist())
        if not left:
            break
    return left
