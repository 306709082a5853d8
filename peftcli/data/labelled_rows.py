"""Rows of text that are judged as a whole: a class, several labels, or a number for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from peftcli.data.audit import Audit
from peftcli.data.faults import Faults
from peftcli.data.kinds import ORIGINS_KEPT, RowKind
from peftcli.data.messages import RowFault
from peftcli.data.neutral import Item, Labelled
from peftcli.data.splits import LabelledSplit, SplitCounts
from peftcli.data.tokenize import Ids
from peftcli.errors import DataError, nearest
from peftcli.recipe.schema import DatasetSection
from peftcli.recipe.tasks import SequenceClassificationTask

Problem = Literal["single_label", "multi_label", "regression"]
_MOST_LABELS_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class ClassAudit(Audit):
    """Counts where rows are labelled.

    Attributes:
        problem: ``single_label``, ``multi_label`` or ``regression``.
        labels: how many rows have each label; empty for numbers.
        target_range: smallest and largest number; ``None`` for labels.
    """

    problem: Problem
    labels: dict[str, int]
    target_range: tuple[float, float] | None

    @property
    def learned(self) -> str:
        if self.target_range is not None:
            return f"each with a number from {self.target_range[0]:g} to {self.target_range[1]:g}"
        shown = [f"{name} {count:,}" for name, count in list(self.labels.items())[:_MOST_LABELS_SHOWN]]
        more = len(self.labels) - len(shown)
        return f"{len(self.labels)} labels ({', '.join(shown)}{f', and {more} more' if more > 0 else ''})"


@dataclass
class Fitted:
    """Rows that fit.

    Attributes:
        targets: of each row, as :class:`LabelledSplit` has them.
        truncated: how many were cut. ``too_long``, ``faulty``: places of those left out.
    """

    items: list[Labelled] = field(default_factory=list)
    targets: list[list[float]] = field(default_factory=list)
    input_ids: list[Ids] = field(default_factory=list)
    segments: list[Ids] = field(default_factory=list)
    truncated: int = 0
    too_long: list[str] = field(default_factory=list)
    faulty: list[str] = field(default_factory=list)

    @property
    def dropped(self) -> list[str]:
        return [*self.too_long, *self.faulty]


class LabelledRows(RowKind[Fitted]):
    """For classification and regression.

    Attributes:
        problem, labels: as the recipe says, else as the training rows tell (:meth:`learn`); no labels for numbers.
    """

    formats = SequenceClassificationTask.formats

    def __init__(self, config: DatasetSection, tokenizer: Any, problem: Problem | None, labels: Sequence[str] | None) -> None:
        super().__init__(config, tokenizer)
        self.problem: Problem | None = problem
        self.labels: tuple[str, ...] | None = None if labels is None else tuple(labels)

    def begin(self, base_dir: Path) -> list[str]:
        if self.config.truncation == "split":
            raise DataError(
                "dataset.truncation: a labelled row cannot be split: its parts would have no label",
                hint="choose keep_start, keep_end, drop or error",
            )
        given = [f"dataset.{name}" for name in ("chat_template", "system") if getattr(self.config, name)]
        return [f"{' and '.join(given)} has no influence on labelled rows"] if given else []

    def learn(self, items: Sequence[Item]) -> None:
        labels = [item.label for item in items if isinstance(item, Labelled)]
        if self.problem is None:
            if any(isinstance(label, tuple) for label in labels):
                self.problem = "multi_label"
            else:
                numbers = [_number(label) for label in labels]
                fractions = any(number is not None and not number.is_integer() for number in numbers)
                self.problem = "regression" if fractions and None not in numbers and self.labels is None else "single_label"
        if self.labels is None and self.problem != "regression":
            names = {name for label in labels for name in _names(label)}
            self.labels = tuple(sorted(names, key=_order))
        if self.problem == "single_label" and len(self.labels or ()) < 2:
            raise DataError(
                f"the training rows have one label only ({', '.join(self.labels or ())}); there is nothing to tell apart",
                hint="look at dataset.columns.label, and at dataset.limit where the file is sorted by label",
            )

    def encode(self, items: Sequence[Item], *, max_length: int, held_out: bool, notes: list[str]) -> Fitted:
        what = "held-out" if held_out else "training"
        found = Fitted()
        rows, targets = self._judged([item for item in items if isinstance(item, Labelled)], found)
        mode, side = self.config.truncation, self.tokenizer.truncation_side
        encoded = self._tokenize(rows, None)
        long = [len(ids) > max_length for ids in encoded["input_ids"]]
        faults = Faults()
        if mode == "error":
            for row, ids, over in zip(rows, encoded["input_ids"], long, strict=True):
                if over:
                    faults.add(
                        f"{row.origin}: {len(ids)} tokens, dataset.max_length is {max_length}",
                        hint="raise dataset.max_length, or choose dataset.truncation: keep_start, keep_end or drop",
                    )
        faults.raise_if_any()
        if any(long) and mode in ("keep_start", "keep_end"):
            self.tokenizer.truncation_side = "right" if mode == "keep_start" else "left"
            encoded = self._tokenize(rows, max_length)
            self.tokenizer.truncation_side = side
        for index, (row, over) in enumerate(zip(rows, long, strict=True)):
            if over and mode == "drop":
                found.too_long.append(row.origin)
                continue
            found.items.append(row)
            found.targets.append(targets[index])
            found.input_ids.append(np.asarray(encoded["input_ids"][index], dtype=np.int32))
            if "token_type_ids" in encoded:
                found.segments.append(np.asarray(encoded["token_type_ids"][index], dtype=np.int32))
            found.truncated += over
        if not found.items:
            raise DataError(f"none of {len(rows)} rows fits into dataset.max_length {max_length}", hint="raise it, or cut rows: keep_start")
        if found.too_long:
            notes.append(f"{what}: dropped {len(found.too_long)} rows longer than {max_length} tokens")
        if found.truncated:
            notes.append(f"{what}: cut {found.truncated} rows to {max_length} tokens ({mode})")
        return found

    def audit(self, fitted: Fitted, empty: Sequence[str], notes: Sequence[str]) -> ClassAudit:
        targets = np.asarray(fitted.targets)
        assert self.problem is not None
        counts: dict[str, int] = {}
        if self.problem == "single_label":
            counts = {name: int((targets[:, 0] == index).sum()) for index, name in enumerate(self.labels or ())}
        elif self.problem == "multi_label":
            counts = {name: int(targets[:, index].sum()) for index, name in enumerate(self.labels or ())}
        text = self.tokenizer.decode(fitted.input_ids[0].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return ClassAudit(
            rows=len(fitted.items),
            tokens=sum(map(len, fitted.input_ids)),
            truncated=fitted.truncated,
            dropped=len(empty) + len(fitted.dropped),
            notes=tuple(notes),
            example=((f"{text} → ", False), (", ".join(_names(fitted.items[0].label)) or "(none)", True)),
            example_origin=fitted.items[0].origin,
            problem=self.problem,
            labels=counts,
            target_range=(float(targets.min()), float(targets.max())) if self.problem == "regression" else None,
        )

    def split(self, fitted: Fitted, empty: Sequence[str], *, held_out: bool) -> LabelledSplit:
        dropped = [*empty, *fitted.dropped]
        lengths = [len(ids) for ids in fitted.input_ids]
        return LabelledSplit(
            origins=[item.origin for item in fitted.items],
            counts=SplitCounts(len(lengths), sum(lengths), len(lengths), fitted.truncated, len(dropped), max(lengths)),
            dropped_origins=dropped[:ORIGINS_KEPT],
            input_ids=fitted.input_ids,
            segments=fitted.segments or None,
            targets=np.asarray(fitted.targets),
        )

    def _tokenize(self, rows: Sequence[Labelled], max_length: int | None) -> dict[str, list[list[int]]]:
        """Ids, and token types where the tokenizer gives them. Texts and pairs apart: a row does not depend on the others."""
        settings: dict[str, Any] = {} if max_length is None else {"truncation": True, "max_length": max_length}
        between = "" if self._separates else "\n"
        encoded: dict[str, list[list[int]]] = {}
        for paired in (False, True):
            chosen = [index for index, row in enumerate(rows) if (row.text_pair is not None) is paired]
            if not chosen:
                continue
            texts = [rows[index].text for index in chosen]
            second = [f"{between}{rows[index].text_pair}" for index in chosen] if paired else None
            for key, values in self.tokenizer(texts, second, verbose=False, **settings).items():
                if key not in encoded:
                    encoded[key] = [[] for _ in rows]
                for index, value in zip(chosen, values, strict=True):
                    encoded[key][index] = value
        return encoded

    @property
    def _separates(self) -> bool:
        """Whether the tokenizer puts a token of its own between two texts; else (GPT-2) a line break goes there."""
        return bool(self.tokenizer.num_special_tokens_to_add(pair=True) > self.tokenizer.num_special_tokens_to_add(pair=False))

    def _judged(self, items: Sequence[Labelled], found: Fitted) -> tuple[list[Labelled], list[list[float]]]:
        """The rows whose label is one of the run's, and the targets of each. Others are faults, or go as ``on_error`` says.

        Raises:
            DataError: up to ten rows with a strange label, with their places; no row is left.
        """
        faults, rows, targets = self.faults(), list[Labelled](), list[list[float]]()
        place = {name: index for index, name in enumerate(self.labels or ())}
        if all(_number(name) is None for name in place):  # then numbers are no names
            place |= {str(index): index for index in range(len(place))}
        for item in items:
            try:
                target = self._target(item, place)
            except RowFault as fault:
                faults.add(str(fault), at=item.origin, hint=fault.hint)
                found.faulty.append(item.origin)
                continue
            rows.append(item)
            targets.append(target)
        faults.raise_if_any()
        self.check_any(len(rows), len(items))
        return rows, targets

    def _target(self, item: Labelled, place: Mapping[str, int]) -> list[float]:
        """One row of the targets that :class:`LabelledSplit` has."""
        if self.problem == "regression":
            number = _number(item.label)
            if number is None:
                raise RowFault(f"the label {item.label!r} is no number, and this run learns numbers")
            return [number]
        names = _names(item.label)
        if self.problem == "single_label" and len(names) != 1:
            raise RowFault(f"{len(names)} labels where one is needed", hint="several labels: task.problem: multi_label")
        if len(set(names)) != len(names):
            raise RowFault(f"a label stands twice in {list(names)}", hint="a list names the labels that apply; it is no vector of 0 and 1")
        for name in names:
            if name not in place:
                known = list(self.labels or ())
                near = nearest(name, known)
                more = f"; did you mean {near!r}?" if near else f" ({', '.join(known[:_MOST_LABELS_SHOWN])})"
                raise RowFault(f"{name!r} is none of the {len(known)} labels{more}")
        if self.problem == "multi_label":
            applies = {place[name] for name in names}
            return [float(index in applies) for index in range(len(self.labels or ()))]
        return [float(place[names[0]])]


def _number(label: str | float | tuple[str, ...]) -> float | None:
    """The label as a finite number, or ``None`` where it is none."""
    if isinstance(label, tuple):
        return None
    try:
        value = float(label)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def _names(label: str | float | tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(label, tuple):
        return label
    # 1 and 1.0 are one label.
    return (str(int(label) if isinstance(label, float) and label.is_integer() else label),)


def _order(name: str) -> tuple[int, float, str]:
    """Numbers by size, before other names by the alphabet."""
    number = _number(name)
    return (1, 0.0, name) if number is None else (0, number, name)
