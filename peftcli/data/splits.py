"""A tokenized split of the data, as the loop and the evaluation take it."""

from __future__ import annotations

from dataclasses import dataclass

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
    """One held-out row whose answer the model is asked to write.

    Attributes:
        prompt_ids: what the model is given, generation prompt included.
        prompt: the readable request: the last user message, or the prompt.
        reference: the answer of the data.
        origin: the row's place.
    """

    prompt_ids: list[int]
    prompt: str
    reference: str
    origin: str


@dataclass(frozen=True)
class Split:
    """Tokenized rows.

    Attributes:
        input_ids, supervised: for each row, arrays of the same shape (length,).
        origins: the place of each row.
        counts: plain counts.
        dropped_origins: places of the rows left out, the first 1000.
        generation: held-out rows to be answered; empty for training rows and documents.
        stop_ids: the tokens that end an answer in these rows, EOS among them: where generation stops.
    """

    input_ids: list[Ids]
    supervised: list[Mask]
    origins: list[str]
    counts: SplitCounts
    dropped_origins: list[str]
    generation: list[GenerationExample]
    stop_ids: tuple[int, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row."""
        return tuple(len(row) for row in self.input_ids)
