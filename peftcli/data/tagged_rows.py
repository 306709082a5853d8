"""Rows of words with a tag for each: named entities, parts of speech."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from peftcli.data.audit import Audit
from peftcli.data.faults import Faults
from peftcli.data.kinds import ORIGINS_KEPT, RowKind
from peftcli.data.neutral import Item, Tagged
from peftcli.data.splits import SplitCounts, TaggedSplit
from peftcli.data.tokenize import Ids
from peftcli.errors import DataError, nearest
from peftcli.recipe.schema import DatasetSection
from peftcli.recipe.tasks import TokenClassificationTask

LabelAt = Literal["first", "last", "all"]
OUTSIDE = "O"
# The target of a token without a tag.
NONE = -100
_MOST_LABELS_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class TagAudit(Audit):
    """Counts where words are tagged.

    Attributes:
        labels: how many words have each tag, in the order of the model's outputs.
        words_cut: words that were cut off with their tags. ``words_without_token``: words that the tokenizer makes nothing of.
    """

    labels: dict[str, int]
    words_cut: int
    words_without_token: int

    @property
    def learned(self) -> str:
        shown = [f"{name} {count:,}" for name, count in list(self.labels.items())[:_MOST_LABELS_SHOWN]]
        more = len(self.labels) - len(shown)
        return (
            f"{sum(self.labels.values()):,} words with {len(self.labels)} tags ({', '.join(shown)}{f', and {more} more' if more else ''})"
        )


@dataclass
class Fitted:
    """Rows that fit.

    Attributes:
        words: for each token of a row the number of its word, -1 for none; ``segments``: token type ids where the tokenizer has them.
        tags: for each row, the label's index of each word.
        truncated: how many rows were cut. ``dropped``, ``faulty``: places of those left out.
        words_cut, words_without_token: as :class:`TagAudit` has them.
    """

    items: list[Tagged] = field(default_factory=list)
    input_ids: list[Ids] = field(default_factory=list)
    segments: list[Ids] = field(default_factory=list)
    words: list[Ids] = field(default_factory=list)
    tags: list[Ids] = field(default_factory=list)
    truncated: int = 0
    dropped: list[str] = field(default_factory=list)
    faulty: list[str] = field(default_factory=list)
    words_cut: int = 0
    words_without_token: int = 0


class TaggedRows(RowKind[Fitted]):
    """For token classification. A row's words are joined by single blanks, so that no token belongs to two of them.

    Attributes:
        labels: as the recipe says, else those of the training rows (:meth:`learn`): ``O`` first, the others sorted.
        label_at: which tokens of a word carry its tag.
    """

    formats = TokenClassificationTask.formats

    def __init__(self, config: DatasetSection, tokenizer: Any, labels: Sequence[str] | None, label_at: LabelAt) -> None:
        super().__init__(config, tokenizer)
        self.labels: tuple[str, ...] | None = None if labels is None else tuple(labels)
        self.label_at = label_at

    def begin(self, base_dir: Path) -> list[str]:
        if self.config.truncation == "split":
            raise DataError(
                "dataset.truncation: a tagged row is not split: an entity could be cut in two",
                hint="choose keep_start, keep_end, drop or error",
            )
        if not self.tokenizer.is_fast:
            raise DataError("the tokenizer of this model does not say which characters a token stands for, so tags cannot be aligned")
        given = [f"dataset.{name}" for name in ("chat_template", "system") if getattr(self.config, name)]
        return [f"{' and '.join(given)} has no influence on tagged rows"] if given else []

    def learn(self, items: Sequence[Item]) -> None:
        if self.labels is None:
            found = {tag for item in items if isinstance(item, Tagged) for tag in item.tags}
            self.labels = tuple(sorted(found, key=lambda tag: (tag != OUTSIDE, not tag.isdigit(), int(tag) if tag.isdigit() else 0, tag)))
        if len(self.labels) < 2:
            raise DataError(
                f"the training rows have one tag only ({', '.join(self.labels)}); there is nothing to tell apart",
                hint="look at dataset.columns.tags, and at dataset.limit",
            )

    def encode(self, items: Sequence[Item], *, max_length: int, held_out: bool, notes: list[str]) -> Fitted:
        what = "held-out" if held_out else "training"
        found = Fitted()
        rows, tags = self._tagged([item for item in items if isinstance(item, Tagged)], found)
        mode, side = self.config.truncation, self.tokenizer.truncation_side
        whole = self._tokenize(rows, None)
        long = [len(ids) > max_length for ids in whole["input_ids"]]
        faults = Faults()
        if mode == "error":
            for row, ids, over in zip(rows, whole["input_ids"], long, strict=True):
                if over:
                    faults.add(
                        f"{row.origin}: {len(ids)} tokens, dataset.max_length is {max_length}",
                        hint="raise dataset.max_length, or choose dataset.truncation: keep_start, keep_end or drop",
                    )
        faults.raise_if_any()
        encoded = whole
        if any(long) and mode in ("keep_start", "keep_end"):
            self.tokenizer.truncation_side = "right" if mode == "keep_start" else "left"
            encoded = self._tokenize(rows, max_length)
            self.tokenizer.truncation_side = side
        for index, (row, over) in enumerate(zip(rows, long, strict=True)):
            words = _words(row, encoded["offset_mapping"][index], encoded["special_tokens_mask"][index])
            present = len(np.unique(words[words >= 0]))
            if (over and mode == "drop") or not present:
                found.dropped.append(row.origin)
                continue
            lost = len(row.tokens) - present
            if over:
                all_words = _words(row, whole["offset_mapping"][index], whole["special_tokens_mask"][index])
                cut = len(np.unique(all_words[all_words >= 0])) - present
                found.words_cut, lost = found.words_cut + cut, lost - cut
            found.words_without_token += lost
            found.items.append(row)
            found.tags.append(tags[index])
            found.input_ids.append(np.asarray(encoded["input_ids"][index], dtype=np.int32))
            found.words.append(words)
            if "token_type_ids" in encoded:
                found.segments.append(np.asarray(encoded["token_type_ids"][index], dtype=np.int32))
            found.truncated += over
        if not found.items:
            raise DataError(f"none of {len(rows)} rows fits into dataset.max_length {max_length}", hint="raise it, or cut rows: keep_start")
        if found.dropped:
            notes.append(f"{what}: dropped {len(found.dropped)} rows that are longer than {max_length} tokens or hold no word")
        if found.truncated:
            notes.append(
                f"{what}: cut {found.truncated} rows to {max_length} tokens ({mode}), and {found.words_cut} tagged words with them"
            )
        if found.words_without_token:
            notes.append(
                f"{what}: the tokenizer makes nothing of {found.words_without_token} words; their tags are neither learned nor judged"
            )
        return found

    def audit(self, fitted: Fitted, empty: Sequence[str], notes: Sequence[str]) -> TagAudit:
        counts = np.zeros(len(self.labels or ()), dtype=np.int64)
        for tags, words in zip(fitted.tags, fitted.words, strict=True):
            np.add.at(counts, tags[np.unique(words[words >= 0])], 1)
        first, words = fitted.items[0], fitted.words[0]
        shown = [(word, tag) for index, (word, tag) in enumerate(zip(first.tokens, first.tags, strict=True)) if index in words]
        return TagAudit(
            rows=len(fitted.items),
            tokens=sum(map(len, fitted.input_ids)),
            truncated=fitted.truncated,
            dropped=len(empty) + len(fitted.dropped) + len(fitted.faulty),
            notes=tuple(notes),
            example=tuple(part for word, tag in shown for part in ((f"{word} ", False), (f"[{tag}] ", True))),
            example_origin=first.origin,
            labels=dict(zip(self.labels or (), counts.tolist(), strict=True)),
            words_cut=fitted.words_cut,
            words_without_token=fitted.words_without_token,
        )

    def split(self, fitted: Fitted, empty: Sequence[str], *, held_out: bool) -> TaggedSplit:
        dropped = [*empty, *fitted.dropped, *fitted.faulty]
        lengths = [len(ids) for ids in fitted.input_ids]
        targets, places, words = [], [], []
        for item, tags, of in zip(fitted.items, fitted.tags, fitted.words, strict=True):
            first = np.flatnonzero((of >= 0) & (of != np.concatenate([[-1], of[:-1]])))
            last = np.flatnonzero((of >= 0) & (of != np.concatenate([of[1:], [-1]])))
            labelled = {"first": first, "last": last, "all": np.flatnonzero(of >= 0)}[self.label_at]
            target = np.full(len(of), NONE, dtype=np.int32)
            target[labelled] = tags[of[labelled]]
            targets.append(target)
            places.append((last if self.label_at == "last" else first).astype(np.int32))
            words.append([item.tokens[index] for index in of[first]])
        return TaggedSplit(
            origins=[item.origin for item in fitted.items],
            counts=SplitCounts(
                len(lengths), sum(lengths), sum(int((row != NONE).sum()) for row in targets), fitted.truncated, len(dropped), max(lengths)
            ),
            dropped_origins=dropped[:ORIGINS_KEPT],
            input_ids=fitted.input_ids,
            segments=fitted.segments or None,
            targets=targets,
            places=places,
            words=words,
        )

    def _tokenize(self, rows: Sequence[Tagged], max_length: int | None) -> dict[str, list[Any]]:
        settings: dict[str, Any] = {} if max_length is None else {"truncation": True, "max_length": max_length}
        texts = [" ".join(row.tokens) for row in rows]
        return dict(self.tokenizer(texts, verbose=False, return_offsets_mapping=True, return_special_tokens_mask=True, **settings))

    def _tagged(self, items: Sequence[Tagged], found: Fitted) -> tuple[list[Tagged], list[Ids]]:
        """The rows whose tags are all of the run's, and for each the label's index of each word. Others are faults, or go as
        ``on_error`` says.

        Raises:
            DataError: up to ten rows with a strange tag, with their places; no row is left.
        """
        faults, rows, tags = self.faults(), list[Tagged](), list[Ids]()
        place = {name: index for index, name in enumerate(self.labels or ())}
        for item in items:
            strange = [tag for tag in dict.fromkeys(item.tags) if tag not in place]
            if strange:
                near = {tag: nearest(tag, list(place)) for tag in strange}
                first, *others = sorted(strange, key=lambda tag: near[tag] is None)
                more = f"; did you mean {near[first]!r}?" if near[first] else f" ({', '.join(list(place)[:_MOST_LABELS_SHOWN])})"
                what = f"{first!r} is none of the {len(place)} tags{more}" + (f" Nor is {', '.join(map(repr, others))}." if others else "")
                faults.add(what, at=item.origin, hint="list all of them: task.labels")
                found.faulty.append(item.origin)
                continue
            rows.append(item)
            tags.append(np.asarray([place[tag] for tag in item.tags], dtype=np.int32))
        faults.raise_if_any()
        self.check_any(len(rows), len(items))
        return rows, tags


def _words(row: Tagged, offsets: Sequence[tuple[int, int]], special: Sequence[int]) -> Ids:
    """For each token the number of the word that its first visible character belongs to, -1 for none."""
    owner = np.full(sum(map(len, row.tokens)) + len(row.tokens), -1, dtype=np.int32)
    start = 0
    for index, word in enumerate(row.tokens):
        owner[start : start + len(word)] = index
        start += len(word) + 1
    found = np.full(len(offsets), -1, dtype=np.int32)
    for token, (begin, end) in enumerate(offsets):
        inside = owner[begin:end]
        inside = inside[inside >= 0]
        if len(inside) and not special[token]:
            found[token] = inside[0]
    return found
