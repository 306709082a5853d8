"""A tag for each word of a text: named entities, parts of speech."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcli.data.batching import pad
from peftcli.data.kinds import RowKind
from peftcli.data.splits import Split, TaggedSplit
from peftcli.data.tagged_rows import NONE, TaggedRows
from peftcli.kernels.transfer import ahead
from peftcli.methods.base import Loss
from peftcli.recipe import tasks as options
from peftcli.recipe.schema import DatasetSection
from peftcli.tasks.agreement import macro_f1, quotient
from peftcli.tasks.base import Head, Layout, Measured, Metric, Task, TaskModule
from peftcli.tasks.intervals import of_sums

_OUTSIDE = "O"
_SPANNING = re.compile(r"[BIESLU]-.+")


@dataclass(frozen=True)
class TaggedBatch:
    """Rows as tensors, padded on the right.

    Attributes:
        input_ids, attention_mask: [rows, longest]; ``token_type_ids`` likewise, where the model has them.
        targets: [rows, longest] int64, -100 where no tag is learned.
        places: for each row, where the word's tag is read off.
        tags: for each row, the label's index of each word.
        silent: nothing carries loss.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor | None
    targets: Tensor
    places: list[Tensor]
    tags: list[list[int]]
    silent: bool


class Tagger(TaskModule):
    """A model with an output layer over every token. The loss is the cross-entropy of the tokens with a tag.

    Args:
        labels: the tags in the order of the model's outputs.
    """

    def __init__(self, model: nn.Module, labels: Sequence[str]) -> None:
        super().__init__(model)
        self.labels = tuple(labels)
        self.spanning = spans_entities(labels)
        self.kinds = kinds(labels)

    def logits(self, batch: TaggedBatch) -> Tensor:
        """[rows, longest, labels], in float32 at least."""
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if batch.token_type_ids is not None:
            inputs["token_type_ids"] = batch.token_type_ids
        found: Tensor = self.model(**inputs).logits
        return found if found.dtype == torch.float64 else found.float()

    def forward(self, batch: TaggedBatch) -> Loss:
        logits = self.logits(batch)
        losses = self.losses(logits, batch.targets)
        hits = (logits.argmax(-1) == batch.targets).sum()
        return Loss(losses.sum() * 0.0 if batch.silent else losses.sum(), hits, {})

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """[rows, longest] losses, zero where there is no tag."""
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NONE, reduction="none").view_as(targets)

    def measure(self, batch: TaggedBatch) -> Measured:
        """Beside loss and units: ``words`` and ``correct`` [rows], and ``counts`` [rows, kinds, 3]: for each type of entity (each tag,
        where tags mark no entities), how many were right, found and true."""
        logits = self.logits(batch)
        losses = self.losses(logits, batch.targets).double().sum(-1).cpu()
        found = logits.argmax(-1).cpu()
        counts = torch.zeros(len(losses), len(self.kinds), 3, dtype=torch.long)
        words, correct = torch.zeros(len(losses), dtype=torch.long), torch.zeros(len(losses), dtype=torch.long)
        number = {kind: index for index, kind in enumerate(self.kinds)}
        for row, (places, tags) in enumerate(zip(batch.places, batch.tags, strict=True)):
            guess = found[row][places].tolist()
            words[row], correct[row] = len(tags), sum(one == other for one, other in zip(guess, tags, strict=True))
            for column, units in enumerate(self._units(guess, tags)):
                for kind in units:
                    counts[row, number[kind], column] += 1
        units_ = (batch.targets != NONE).sum(-1).cpu()
        return {"loss": losses, "units": units_, "words": words, "correct": correct, "counts": counts}

    def _units(self, guess: Sequence[int], tags: Sequence[int]) -> tuple[list[str], list[str], list[str]]:
        """The kinds of what is right, found and true."""
        found, true = [self.labels[index] for index in guess], [self.labels[index] for index in tags]
        if not self.spanning:
            return [one for one, other in zip(found, true, strict=True) if one == other], found, true
        here, there = set(entities(found)), set(entities(true))
        return [kind for kind, _, _ in here & there], [kind for kind, _, _ in here], [kind for kind, _, _ in there]


class TokenClassification(Task[options.TokenClassificationTask]):
    """Tagging of words."""

    auto_model = "AutoModelForTokenClassification"
    peft_type = "TOKEN_CLS"

    def rows(self, config: DatasetSection, tokenizer: Any) -> TaggedRows:
        return TaggedRows(config, tokenizer, self.section.labels, self.section.label_at)

    def settle(self, rows: RowKind[Any]) -> options.TokenClassificationTask:
        assert isinstance(rows, TaggedRows) and rows.labels is not None
        self.section = self.section.model_copy(update={"labels": list(rows.labels)})
        return self.section

    @property
    def _labels(self) -> tuple[str, ...]:
        assert self.section.labels is not None, "the rows settle it"
        return tuple(self.section.labels)

    @property
    def figures(self) -> tuple[str, ...]:
        without = "f1" if spans_entities(self._labels) else "entity_"
        return tuple(name for name in self.section.figures if not name.startswith(without))

    def head(self) -> Head:
        return Head(self._labels, "single_label_classification")

    def module(self, model: nn.Module) -> Tagger:
        return Tagger(model, self._labels)

    def batch(self, split: Split, rows: Sequence[int], layout: Layout, *, silent: bool = False) -> TaggedBatch:
        assert isinstance(split, TaggedSplit)
        ids, mask = pad([split.input_ids[row] for row in rows], layout.pad_id)
        segments = None if split.segments is None else ahead(pad([split.segments[row] for row in rows], 0)[0], layout.device)
        targets = pad([split.targets[row] for row in rows], NONE)[0]
        places = [torch.from_numpy(split.places[row]).long() for row in rows]
        tags = [split.tags(row).tolist() for row in rows]
        ids, mask, targets = (ahead(tensor, layout.device) for tensor in (ids, mask, targets))
        return TaggedBatch(ids, mask, segments, targets, places, tags, silent)

    def masks(self, batch: TaggedBatch) -> tuple[Tensor, Tensor]:
        return batch.attention_mask.bool(), batch.targets != NONE

    def show(self, split: Split, row: int, tokenizer: Any) -> list[tuple[str, bool]]:
        assert isinstance(split, TaggedSplit)
        pairs = zip(split.words[row], split.tags(row), strict=True)
        return [part for word, tag in pairs for part in ((f"{word} ", False), (f"[{self._labels[tag]}] ", True))]

    def scores(self, measured: Mapping[str, Tensor], split: Split) -> dict[str, Metric]:
        words = torch.stack([measured["correct"], measured["words"]], -1).numpy()
        counts = measured["counts"].numpy()
        found = {"token_accuracy": of_sums(words, lambda sums: sums[:, 0] / sums[:, 1])}
        if spans_entities(self._labels):
            whole = counts.sum(1)
            found["entity_f1"] = of_sums(whole, lambda sums: 2 * sums[:, 0] / (sums[:, 1] + sums[:, 2]))
            found["entity_precision"] = of_sums(whole, lambda sums: quotient(sums[:, 0], sums[:, 1]))
            found["entity_recall"] = of_sums(whole, lambda sums: sums[:, 0] / sums[:, 2])
        else:
            found["f1"] = of_sums(counts.reshape(len(counts), -1), macro_f1)
        return {name: metric for name, metric in found.items() if np.isfinite(metric.value)}


def spans_entities(labels: Sequence[str]) -> bool:
    """Whether the tags mark entities over several words: ``O``, and letters for begin, inside, end, single (``B-PER``, ``I-PER``)."""
    others = [label for label in labels if label != _OUTSIDE]
    return bool(others) and all(_SPANNING.fullmatch(label) for label in others)


def kinds(labels: Sequence[str]) -> tuple[str, ...]:
    """The types of entities that tags speak of; the tags themselves, where they mark no entities."""
    if not spans_entities(labels):
        return tuple(labels)
    return tuple(dict.fromkeys(label[2:] for label in labels if label != _OUTSIDE))


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(type, first, last) of the entities that tags mark, as the CoNLL-2000 evaluation reads them: IOB1, IOB2, BIOES and BILOU alike,
    and tags that begin nowhere begin where they stand."""
    found: list[tuple[str, int, int]] = []
    start, kind, before = 0, "", _OUTSIDE
    for index, tag in enumerate([*tags, _OUTSIDE]):
        mark, _, other = tag.partition("-")
        goes_on = mark in ("I", "E", "L") and before in ("B", "I") and other == kind
        if before != _OUTSIDE and not goes_on:
            found.append((kind, start, index - 1))
        if mark != _OUTSIDE and not goes_on:
            start, kind = index, other
        before = mark
    return found
