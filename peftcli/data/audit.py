"""The label audit: what carries loss, checked and counted before the first step of every run.

It refuses what would train silently on nothing, or on the wrong tokens (rows 3 to 8 of the project's list of known bugs):
no supervised token, supervised prompts, a doubled BOS, an answer whose end is not learned.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from peftcli.data.tokenize import Encoded, Ids, Mask
from peftcli.errors import DataError
from peftcli.report.text import percent as _percent

if TYPE_CHECKING:
    from rich.text import Text

_LONGEST_EXAMPLE = 2000


@dataclass(frozen=True, kw_only=True)
class Audit(ABC):
    """Counts over the rows of a split, after truncation.

    Attributes:
        rows, tokens: kept rows and their tokens.
        truncated, dropped: rows cut, rows left out.
        notes: what a user should know.
        example: one row as (text, supervised) runs.
        example_origin: its place.
        skipped: faulty rows that were left out, held-out ones too (``dataset.on_error: skip``).
        duplicates: training rows that repeat an earlier one exactly, before weights and ``limit``.
        leaked_rows, leaked_inputs: held-out rows that stand among the training rows, whole or with their prompt or text alone.
    """

    rows: int
    tokens: int
    truncated: int
    dropped: int
    notes: tuple[str, ...]
    example: tuple[tuple[str, bool], ...]
    example_origin: str
    skipped: int = 0
    duplicates: int = 0
    leaked_rows: int = 0
    leaked_inputs: int = 0

    @property
    @abstractmethod
    def learned(self) -> str:
        """What carries loss, in a few words with counts."""

    @property
    def summary(self) -> str:
        """The audit in one line."""
        cut = f", {self.truncated:,} truncated, {self.dropped:,} dropped" if self.truncated or self.dropped else ""
        return f"{self.rows:,} rows, {self.learned}{cut}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; ``example`` is a list of [text, supervised] pairs."""
        values = asdict(self)
        values["notes"] = list(self.notes)
        values["example"] = [[text, supervised] for text, supervised in self.example]
        return {"summary": self.summary, **values}


@dataclass(frozen=True, kw_only=True)
class TextAudit(Audit):
    """Counts where next tokens are learned.

    Attributes:
        supervised_tokens, prompt_tokens: tokens that carry loss, and the others; their sum is ``tokens``.
        supervised_share: supervised_tokens / tokens, 0 to 1.
        complete_rows: rows whose end was not cut off.
        eos_supervised: rows of these whose end token (EOS, or the template's end-of-turn token) carries loss.
        bos_rows: rows that start with the tokenizer's BOS; none starts with two.
        train_on: ``completions`` or ``all``.
    """

    supervised_tokens: int
    prompt_tokens: int
    supervised_share: float
    complete_rows: int
    eos_supervised: int
    bos_rows: int
    train_on: str

    @property
    def learned(self) -> str:
        return f"{self.supervised_tokens:,} of {self.tokens:,} tokens carry loss ({_percent(self.supervised_share)})"


class RowFacts(NamedTuple):
    """What the audit finds in one row: whether a BOS opens it, whether its end was not cut off, and is learned if so."""

    bos: bool
    complete: bool
    ended: bool


class TextCounts(NamedTuple):
    """Sums over the rows of a split, as :class:`TextAudit` has them."""

    rows: int
    tokens: int
    supervised: int
    bos_rows: int
    complete: int
    ended: int


def inspect_row(row: Encoded, tokenizer: Any, train_on: Literal["completions", "all"]) -> RowFacts:
    """Check one row.

    Raises:
        DataError: its prompt is supervised although only completions should be; it starts with two BOS.
    """
    bos = tokenizer.bos_token_id
    opened = bos is not None and row.has_start and int(row.input_ids[0]) == bos
    if opened and len(row.input_ids) > 1 and row.input_ids[1] == bos:
        raise DataError(
            f"label audit: {row.origin} starts with two BOS tokens ({tokenizer.bos_token!r})",
            hint="take the BOS out of the chat template or of the data",
        )
    whole_prompt = len(row.prompt_ids) if row.has_start and not row.truncated else 0
    if train_on == "completions" and whole_prompt > 1 and row.supervised[1:].all():
        raise DataError(f"label audit: every token of {row.origin} carries loss, its prompt of {whole_prompt} tokens too")
    return RowFacts(opened, row.has_end, row.has_end and _end_supervised(row, tokenizer))


def audit_rows(
    rows: Sequence[Encoded],
    tokenizer: Any,
    *,
    train_on: Literal["completions", "all"],
    truncated: int,
    dropped: int,
    notes: Sequence[str] = (),
) -> TextAudit:
    """Check and count the rows of a split.

    Args:
        rows: rows as they will be trained.
        tokenizer: turns the example's ids back into text.
        truncated, dropped: counts of the preparation.

    Raises:
        DataError: nothing is supervised; prompts are supervised although only completions should be; a row starts with
            two BOS; a complete row's end carries no loss.
    """
    tokens, supervised = sum(len(row.input_ids) for row in rows), sum(int(row.supervised.sum()) for row in rows)
    _something(supervised, tokens, len(rows))
    facts = [inspect_row(row, tokenizer, train_on) for row in rows]
    counts = TextCounts(len(rows), tokens, supervised, *map(sum, zip(*facts, strict=True)))
    example = next((row for row in rows if row.has_start and not row.truncated), rows[0])
    return audit_counts(counts, example, tokenizer, train_on=train_on, truncated=truncated, dropped=dropped, notes=notes)


def audit_counts(
    counts: TextCounts,
    example: Encoded,
    tokenizer: Any,
    *,
    train_on: Literal["completions", "all"],
    truncated: int,
    dropped: int,
    notes: Sequence[str],
) -> TextAudit:
    """The audit of a split whose rows were inspected one by one.

    Raises:
        DataError: nothing is supervised; a complete row's end carries no loss.
    """
    _something(counts.supervised, counts.tokens, counts.rows)
    if counts.ended < counts.complete:
        raise DataError(
            f"label audit: the end of the answer carries no loss in {counts.complete - counts.ended} of {counts.complete} complete rows"
        )
    return TextAudit(
        rows=counts.rows,
        tokens=counts.tokens,
        supervised_tokens=counts.supervised,
        prompt_tokens=counts.tokens - counts.supervised,
        supervised_share=counts.supervised / counts.tokens,
        complete_rows=counts.complete,
        eos_supervised=counts.ended,
        bos_rows=counts.bos_rows,
        truncated=truncated,
        dropped=dropped,
        train_on=train_on,
        notes=tuple(notes),
        example=tuple(runs(example, tokenizer)),
        example_origin=example.origin,
    )


def _something(supervised: int, tokens: int, rows: int) -> None:
    if not supervised:
        raise DataError(f"label audit: none of {tokens} tokens in {rows} rows carries loss", hint="see one row with: peftcli check RECIPE")


def end_token(row: Encoded) -> int | None:
    """The last supervised token of a complete row: what ends an answer, and generation with it."""
    places = np.flatnonzero(row.supervised)
    return int(row.input_ids[places[-1]]) if row.has_end and len(places) else None


def _end_supervised(row: Encoded, tokenizer: Any) -> bool:
    last = end_token(row)
    if last is None:
        return False
    token = tokenizer.added_tokens_decoder.get(last)
    return last == tokenizer.eos_token_id or (token is not None and token.special) or last in tokenizer.all_special_ids


def runs(row: Encoded, tokenizer: Any) -> list[tuple[str, bool]]:
    """A row as text, cut wherever supervision changes; long rows are shortened in the middle of a run."""
    whole = marked(row.input_ids, row.supervised, tokenizer)
    return [
        (text if len(text) <= _LONGEST_EXAMPLE else f"{text[: _LONGEST_EXAMPLE // 2]} [...] {text[-_LONGEST_EXAMPLE // 2 :]}", learned)
        for text, learned in whole
    ]


def marked(input_ids: Ids, supervised: Mask, tokenizer: Any) -> list[tuple[str, bool]]:
    """Token ids [length] as text, cut wherever the mask [length] changes: (text, whether it carries loss)."""
    edges = [0, *(np.flatnonzero(np.diff(supervised.astype(np.int8))) + 1).tolist(), len(input_ids)]
    return [
        (
            tokenizer.decode(input_ids[start:end].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False),
            bool(supervised[start]),
        )
        for start, end in pairwise(edges)
    ]


def render_example(audit: Audit) -> Text:
    """The example for a terminal: supervised text in green, the rest dim."""
    from rich.text import Text

    text = Text()
    for piece, supervised in audit.example:
        text.append(piece, style="bold green" if supervised else "dim")
    return text


def plain_example(audit: Audit) -> str:
    """The example without colours: supervised text stands in ⟦ ⟧."""
    return "".join(f"⟦{piece}⟧" if supervised else piece for piece, supervised in audit.example)
