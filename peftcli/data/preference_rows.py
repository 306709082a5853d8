"""Rows of two answers: a better and a worse one to a prompt, or an answer that is wanted or not beside one that answers another prompt."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from peftcli.data.audit import TextAudit, audit_rows, runs
from peftcli.data.faults import Faults
from peftcli.data.kinds import ORIGINS_KEPT, RowKind
from peftcli.data.neutral import Item, Judged, Preference, TextItem, answered
from peftcli.data.splits import Split, SplitCounts
from peftcli.data.templates import install
from peftcli.data.tokenize import Encoded, Encoder, Ids
from peftcli.data.truncation import cut
from peftcli.errors import DataError
from peftcli.recipe.schema import DatasetSection
from peftcli.recipe.tasks import KTOTask, PreferenceTask

Two = tuple[Encoded, Encoded]
Floats = npt.NDArray[np.float64]
J = TypeVar("J", Preference, Judged)


@dataclass(frozen=True, kw_only=True)
class PairAudit(TextAudit):
    """Counts over both answers of every pair; ``rows`` are pairs.

    Attributes:
        same: pairs left out because their two answers are the same.
        chosen_tokens, rejected_tokens: of the answers.
    """

    same: int
    chosen_tokens: int
    rejected_tokens: int

    @property
    def learned(self) -> str:
        return (
            f"each with two answers to one prompt: {self.chosen_tokens:,} tokens preferred to {self.rejected_tokens:,}, "
            f"of {self.tokens:,} in all"
        )


@dataclass(frozen=True, kw_only=True)
class JudgedAudit(TextAudit):
    """Counts over single answers.

    Attributes:
        desirable, undesirable: how many are wanted and how many are not.
    """

    desirable: int
    undesirable: int

    @property
    def learned(self) -> str:
        return f"{self.desirable:,} wanted answers and {self.undesirable:,} others; {super().learned}"


@dataclass(frozen=True)
class TwoSplit(Split):
    """Rows of two token sequences each.

    Attributes:
        rows: the better and the worse answer with their prompt; or an answer, and the same prompt with an answer to another one.
        labels: [rows] the margin of each pair; or 1 for wanted answers and 0 for others.
        reference: [rows, 2] log-probabilities of the answers under the base, once they are known.
        prompts: the better answer's prompt is learned too.
    """

    rows: list[Two]
    labels: Floats
    reference: Floats | None = None
    prompts: bool = False

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(len(one.input_ids) + len(other.input_ids) for one, other in self.rows)

    @property
    def widths(self) -> tuple[Sequence[int], ...]:
        longer = [max(len(one.input_ids), len(other.input_ids)) for one, other in self.rows]
        return longer, longer

    def units(self, row: int) -> int:
        return 1

    def first_ids(self, row: int) -> Ids:
        return self.rows[row][0].input_ids


@dataclass
class Fitted(Generic[J]):
    """Rows that fit. ``truncated``: how many were cut; ``same``, ``too_long``, ``unsupervised``, ``faulty``: places of those left out."""

    items: list[J] = field(default_factory=list)
    rows: list[Two] = field(default_factory=list)
    truncated: int = 0
    same: list[str] = field(default_factory=list)
    too_long: list[str] = field(default_factory=list)
    unsupervised: list[str] = field(default_factory=list)
    faulty: list[str] = field(default_factory=list)

    @property
    def dropped(self) -> list[str]:
        return [*self.same, *self.too_long, *self.unsupervised, *self.faulty]


class _TwoRows(RowKind[Fitted[J]]):
    """What both kinds share: tokenizing, fitting, counting."""

    item: ClassVar[type[Preference | Judged]]

    def begin(self, base_dir: Path) -> list[str]:
        if self.config.truncation == "split":
            raise DataError(
                "dataset.truncation: answers that are compared cannot be split", hint="choose keep_start, keep_end, drop or error"
            )
        return install(self.config.chat_template, self.tokenizer, base_dir) if self.config.chat_template else []

    @abstractmethod
    def _encode(self, items: Sequence[J], max_length: int) -> Fitted[J]: ...

    @abstractmethod
    def labels(self, items: Sequence[J]) -> Floats:
        """[rows] as :class:`TwoSplit` has them."""

    def encode(self, items: Sequence[Item], *, max_length: int, held_out: bool, notes: list[str]) -> Fitted[J]:
        what, mode = "held-out" if held_out else "training", self.config.truncation
        own = [item for item in items if isinstance(item, self.item)]
        found = self._encode(own, max_length)  # type: ignore[arg-type]
        if not found.items:
            raise DataError(
                f"none of {len(own)} {what} rows is left: {len(found.same)} have two answers that are the same, {len(found.too_long)} are "
                f"longer than dataset.max_length {max_length}, {len(found.unsupervised)} lost an answer to it",
                hint="raise dataset.max_length, or look at the rows",
            )
        for places, why in (
            (found.same, "whose two answers are the same"),
            (found.too_long, f"longer than {max_length} tokens"),
            (found.unsupervised, f"of which {max_length} tokens hold no part of an answer"),
        ):
            if places:
                first = ", ".join(places[:3]) + (", ..." if len(places) > 3 else "")
                notes.append(f"{what}: dropped {len(places)} rows {why} ({first})")
        if found.truncated:
            notes.append(f"{what}: cut {found.truncated} rows to {max_length} tokens ({mode})")
        return found

    def split(self, fitted: Fitted[J], empty: Sequence[str], *, held_out: bool) -> TwoSplit:
        dropped = [*empty, *fitted.dropped]
        both = self._counted(fitted)
        return TwoSplit(
            origins=[item.origin for item in fitted.items],
            counts=SplitCounts(
                rows=len(fitted.rows),
                tokens=sum(len(row.input_ids) for row in both),
                supervised_tokens=sum(int(row.supervised.sum()) for row in both),
                truncated=fitted.truncated,
                dropped=len(dropped),
                longest=max(len(row.input_ids) for row in both),
            ),
            dropped_origins=dropped[:ORIGINS_KEPT],
            stop_ids=(self.tokenizer.eos_token_id,),
            rows=fitted.rows,
            labels=self.labels(fitted.items),
            prompts=self.config.train_on == "all",
        )

    @abstractmethod
    def _counted(self, fitted: Fitted[J]) -> list[Encoded]:
        """The sequences that the data hold."""

    def _audit(self, fitted: Fitted[J], empty: Sequence[str], notes: Sequence[str]) -> dict[str, object]:
        """The fields of the plain audit of all sequences, with the counts of rows."""
        plain = audit_rows(
            self._counted(fitted),
            self.tokenizer,
            train_on="completions",
            truncated=fitted.truncated,
            dropped=len(empty) + len(fitted.dropped),
            notes=notes,
        )
        return {**vars(plain), "rows": len(fitted.rows)}

    def _tokenized(self, items: Sequence[J], found: Fitted[J], *texts: Callable[[J], TextItem]) -> Iterator[tuple[J, list[Encoded]]]:
        """Each item with its texts in tokens; one of which a text cannot be rendered is a fault, or goes as ``on_error`` says."""
        encoder, before = Encoder(self.tokenizer, "completions"), len(self.skipped)
        tables = [encoder.encode([text(item) for item in items], faults=self.faults()) for text in texts]
        found.faulty = sorted({origin for origin, _ in self.skipped[before:]})
        faulty = set(found.faulty)
        kept = [item for item in items if item.origin not in faulty]
        self.check_any(len(kept), len(items))
        columns = [[row for row in rows if row.origin not in faulty] for rows in tables]
        return ((item, list(rows)) for item, *rows in zip(kept, *columns, strict=True))

    def _too_long(self, row: Encoded, max_length: int, faults: Faults) -> bool:
        """Whether a longer row has to go; with ``error`` it is a fault."""
        if len(row.input_ids) <= max_length:
            return False
        if self.config.truncation == "error":
            faults.add(
                f"{row.origin}: {len(row.input_ids)} tokens, dataset.max_length is {max_length}",
                hint="raise dataset.max_length, or choose dataset.truncation: keep_start, keep_end or drop",
            )
        return self.config.truncation in ("drop", "error")

    def _shorter(self, row: Encoded, length: int) -> Encoded:
        start = self.config.truncation != "keep_end"
        return row if len(row.input_ids) <= length else cut(row, length, start, self.tokenizer.bos_token_id)


class PreferenceRows(_TwoRows[Preference]):
    """Pairs of answers. From the start of a pair (``keep_end``) both answers lose the same tokens of their prompt.

    Args:
        whole: every token carries loss where ``train_on`` is ``all``; else that is refused.
    """

    formats = PreferenceTask.formats
    item = Preference

    def __init__(self, config: DatasetSection, tokenizer: object, *, whole: bool = False) -> None:
        super().__init__(config, tokenizer)
        self.whole = whole

    def begin(self, base_dir: Path) -> list[str]:
        if self.config.train_on == "all" and not self.whole:
            raise _answers_only()
        return super().begin(base_dir)

    def _encode(self, items: Sequence[Preference], max_length: int) -> Fitted[Preference]:
        found, faults = Fitted[Preference](), Faults()
        for item, (one, other) in self._tokenized(items, found, _chosen, _rejected):
            longest = max(one, other, key=lambda row: len(row.input_ids))
            if _same(one, other):
                found.same.append(item.origin)
                continue
            if self._too_long(longest, max_length, faults):
                found.too_long.append(item.origin)
                continue
            excess = max(0, len(longest.input_ids) - max_length)
            if self.config.truncation == "keep_end":
                kept = tuple(self._shorter(row, len(row.input_ids) - excess) for row in (one, other))
            else:
                kept = tuple(self._shorter(row, max_length) for row in (one, other))
            first, second = kept
            if not (first.supervised.any() and second.supervised.any()):
                found.unsupervised.append(item.origin)
            elif _same(first, second):
                found.same.append(item.origin)
            else:
                found.items.append(item)
                found.rows.append((first, second))
                found.truncated += excess > 0
        faults.raise_if_any()
        return found

    def labels(self, items: Sequence[Preference]) -> Floats:
        return np.asarray([item.margin for item in items], dtype=np.float64)

    def _counted(self, fitted: Fitted[Preference]) -> list[Encoded]:
        return [row for pair in fitted.rows for row in pair]

    def audit(self, fitted: Fitted[Preference], empty: Sequence[str], notes: Sequence[str]) -> PairAudit:
        fields = self._audit(fitted, empty, notes)
        place = next((i for i, pair in enumerate(fitted.rows) if not (pair[0].truncated or pair[1].truncated)), 0)
        one, other = fitted.rows[place]
        fields["example"] = (*runs(one, self.tokenizer), ("\nrejected:\n", False), *runs(other, self.tokenizer))
        fields["example_origin"] = one.origin
        chosen, rejected = (sum(int(pair[i].supervised.sum()) for pair in fitted.rows) for i in (0, 1))
        return PairAudit(**fields, same=len(fitted.same), chosen_tokens=chosen, rejected_tokens=rejected)  # type: ignore[arg-type]


class JudgedRows(_TwoRows[Judged]):
    """Single answers. Beside each stands its prompt with the answer of the nearest row before it (before the first comes the last)
    that has another prompt, in the order of the data: a pure function of the rows."""

    formats = KTOTask.formats
    item = Judged

    def begin(self, base_dir: Path) -> list[str]:
        if self.config.train_on == "all":
            raise _answers_only()
        return super().begin(base_dir)

    def encode(self, items: Sequence[Item], *, max_length: int, held_out: bool, notes: list[str]) -> Fitted[Judged]:
        found = super().encode(items, max_length=max_length, held_out=held_out, notes=notes)
        kinds = {item.desirable for item in found.items}
        if len(kinds) == 1:
            notes.append(f"every {'held-out' if held_out else 'training'} answer is {'wanted' if True in kinds else 'unwanted'}")
        return found

    def _encode(self, items: Sequence[Judged], max_length: int) -> Fitted[Judged]:
        found, faults, kept = Fitted[Judged](), Faults(), []
        for item, (row,) in self._tokenized(items, found, lambda item: _text(item, item)):
            if self._too_long(row, max_length, faults):
                found.too_long.append(item.origin)
                continue
            short = self._shorter(row, max_length)
            if not short.supervised.any():
                found.unsupervised.append(item.origin)
                continue
            found.items.append(item)
            kept.append(short)
            found.truncated += short.truncated
        faults.raise_if_any()
        mixed = [_text(item, other) for item, other in zip(found.items, _others(found.items), strict=True)]
        others = Encoder(self.tokenizer, "completions").encode(mixed)
        found.rows = [(own, self._shorter(other, max_length)) for own, other in zip(kept, others, strict=True)]
        return found

    def labels(self, items: Sequence[Judged]) -> Floats:
        return np.asarray([item.desirable for item in items], dtype=np.float64)

    def _counted(self, fitted: Fitted[Judged]) -> list[Encoded]:
        return [own for own, _ in fitted.rows]

    def audit(self, fitted: Fitted[Judged], empty: Sequence[str], notes: Sequence[str]) -> JudgedAudit:
        wanted = sum(item.desirable for item in fitted.items)
        fields = self._audit(fitted, empty, notes)
        return JudgedAudit(**fields, desirable=wanted, undesirable=len(fitted.items) - wanted)  # type: ignore[arg-type]


def _answers_only() -> DataError:
    return DataError("dataset.train_on: all has no meaning here, where answers alone are judged", hint="leave it out")


def _same(one: Encoded, other: Encoded) -> bool:
    return np.array_equal(one.input_ids, other.input_ids)


def _chosen(item: Preference) -> TextItem:
    return answered(item.prompt, item.chosen, item.origin, item.tools)


def _rejected(item: Preference) -> TextItem:
    return answered(item.prompt, item.rejected, item.origin, item.tools)


def _text(prompt: Judged, answer: Judged) -> TextItem:
    return answered(prompt.prompt, answer.answer, prompt.origin, prompt.tools)


def _others(items: Sequence[Judged]) -> list[Judged]:
    """For each row the one whose answer stands in for its own; itself where there is no other of its kind."""
    found = []
    for index, item in enumerate(items):
        kind = isinstance(item.prompt, str)
        before = (items[index - step] for step in range(1, len(items)))
        alike = (other for other in before if isinstance(other.prompt, str) == kind)
        nearest = next(alike, item)
        found.append(nearest if nearest.prompt != item.prompt else next((other for other in alike if other.prompt != item.prompt), nearest))
    return found
