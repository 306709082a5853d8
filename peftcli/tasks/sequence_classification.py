"""One judgement for a text or a pair of texts: a class, several labels, or a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcli.data.batching import pad
from peftcli.data.kinds import RowKind
from peftcli.data.labelled_rows import LabelledRows
from peftcli.data.splits import LabelledSplit, Split
from peftcli.kernels.transfer import ahead
from peftcli.methods.base import Loss
from peftcli.recipe import tasks as options
from peftcli.recipe.schema import DatasetSection
from peftcli.tasks.agreement import last_f1, macro_f1, matthews, micro_f1, tallies
from peftcli.tasks.base import Head, Layout, Measured, Metric, Task, TaskModule
from peftcli.tasks.intervals import of_rows, of_sums, share

_PROBLEMS = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}


@dataclass(frozen=True)
class LabelledBatch:
    """Rows as tensors, padded on the right.

    Attributes:
        input_ids, attention_mask: [rows, longest]; ``token_type_ids`` likewise, where the model has them.
        targets: [rows] int64 classes, or [rows, outputs] float32 for several labels and for numbers.
        silent: nothing carries loss.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor | None
    targets: Tensor
    silent: bool


class Classifier(TaskModule):
    """A model with a classification head. The loss of a row is the cross-entropy of its class, the mean binary cross-entropy
    of its labels, or the squared error of its number.

    Args:
        problem: ``single_label``, ``multi_label`` or ``regression``.
    """

    def __init__(self, model: nn.Module, problem: str) -> None:
        super().__init__(model)
        self.problem = problem
        # Some tokenizers give types of tokens that the model has no embeddings for, or (GPT-2) takes for words.
        self._types = (getattr(model.config, "type_vocab_size", None) or 0) > 1

    def logits(self, batch: LabelledBatch) -> Tensor:
        """[rows, outputs], in float32 at least."""
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if batch.token_type_ids is not None and self._types:
            inputs["token_type_ids"] = batch.token_type_ids
        found: Tensor = self.model(**inputs).logits
        return found if found.dtype == torch.float64 else found.float()

    def forward(self, batch: LabelledBatch) -> Loss:
        logits = self.logits(batch)
        losses = self.losses(logits, batch.targets)
        total = losses.sum() * 0.0 if batch.silent else losses.sum()
        hits = (logits.argmax(-1) == batch.targets).sum() if self.problem == "single_label" else torch.zeros_like(total, dtype=torch.long)
        return Loss(total, hits, {})

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """[rows] losses."""
        if self.problem == "single_label":
            return F.cross_entropy(logits, targets, reduction="none")
        targets = targets.to(logits.dtype)
        if self.problem == "multi_label":
            return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1)
        return F.mse_loss(logits, targets, reduction="none").mean(-1)

    def measure(self, batch: LabelledBatch) -> Measured:
        logits = self.logits(batch)
        losses = self.losses(logits, batch.targets)
        units = torch.ones(len(losses), dtype=torch.long)
        return {"loss": losses.double().cpu(), "units": units, "outputs": logits.double().cpu()}


class SequenceClassification(Task[options.SequenceClassificationTask]):
    """Classification and regression of whole texts."""

    auto_model = "AutoModelForSequenceClassification"
    peft_type = "SEQ_CLS"

    def rows(self, config: DatasetSection, tokenizer: Any) -> LabelledRows:
        return LabelledRows(config, tokenizer, self.section.problem, self.section.labels)

    def settle(self, rows: RowKind[Any]) -> options.SequenceClassificationTask:
        assert isinstance(rows, LabelledRows)
        labels = None if rows.labels is None else list(rows.labels)
        self.section = self.section.model_copy(update={"problem": rows.problem, "labels": labels})
        return self.section

    @property
    def figures(self) -> tuple[str, ...]:
        assert self.section.problem is not None, "the rows settle it"
        return self.section.figures_of[self.section.problem]

    def head(self) -> Head:
        problem, labels = self.section.problem, self.section.labels
        assert problem is not None, "the rows settle it"
        return Head(tuple(labels or ("value",)), _PROBLEMS[problem], self.section.train_pooler)

    def module(self, model: nn.Module) -> Classifier:
        assert self.section.problem is not None, "the rows settle it"
        return Classifier(model, self.section.problem)

    def batch(self, split: Split, rows: Sequence[int], layout: Layout, *, silent: bool = False) -> LabelledBatch:
        assert isinstance(split, LabelledSplit)
        ids, mask = pad([split.input_ids[row] for row in rows], layout.pad_id)
        segments = None if split.segments is None else ahead(pad([split.segments[row] for row in rows], 0)[0], layout.device)
        targets = torch.from_numpy(split.targets[list(rows)])
        single = self.section.problem == "single_label"
        targets = targets[:, 0].long() if single else targets.float()
        return LabelledBatch(ahead(ids, layout.device), ahead(mask, layout.device), segments, ahead(targets, layout.device), silent)

    def masks(self, batch: LabelledBatch) -> tuple[Tensor, Tensor]:
        return batch.attention_mask.bool(), batch.attention_mask.bool()

    def show(self, split: Split, row: int, tokenizer: Any) -> list[tuple[str, bool]]:
        assert isinstance(split, LabelledSplit)
        target, labels = split.targets[row], self.section.labels or []
        match self.section.problem:
            case "single_label":
                label = labels[int(target[0])]
            case "multi_label":
                label = ", ".join(name for name, there in zip(labels, target, strict=True) if there) or "(none)"
            case _:
                label = f"{target[0]:g}"
        return [*super().show(split, row, tokenizer), (" → ", False), (label, True)]

    def scores(self, measured: Mapping[str, Tensor], split: Split) -> dict[str, Metric]:
        assert isinstance(split, LabelledSplit)
        outputs = measured["outputs"].numpy()
        targets = split.targets[: len(outputs)]
        match self.section.problem:
            case "single_label":
                return class_scores(outputs.argmax(-1), targets[:, 0].astype(np.int64), classes=outputs.shape[1])
            case "multi_label":
                return label_scores(outputs > 0, targets > 0.5)
        return number_scores(outputs[:, 0], targets[:, 0])


Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def class_scores(found: Ints, wanted: Ints, *, classes: int) -> dict[str, Metric]:
    """Accuracy, macro F1 (F1 of class 1 where there are two, as GLUE has it) and Matthews correlation.

    Args:
        found, wanted: [rows] class indices.
    """
    known = np.arange(classes)
    parts = tallies(found[:, None] == known, wanted[:, None] == known)
    return {
        "accuracy": share(found == wanted),
        "f1": of_sums(parts, last_f1 if classes == 2 else macro_f1),
        "matthews": of_sums(parts, matthews),
    }


def label_scores(found: Bools, wanted: Bools) -> dict[str, Metric]:
    """Accuracy (every label of a row right), micro and macro F1. Arguments are [rows, labels]."""
    parts = tallies(found, wanted)
    return {"accuracy": share((found == wanted).all(-1)), "f1_micro": of_sums(parts, micro_f1), "f1": of_sums(parts, macro_f1)}


def number_scores(found: Floats, wanted: Floats) -> dict[str, Metric]:
    """Pearson and Spearman correlation and the mean absolute error; a correlation with a constant is left out. Arguments are [rows]."""
    from scipy.stats import rankdata

    # Sums of squares around zero would lose digits.
    one, two = found - found.mean(), wanted - wanted.mean()
    parts = np.stack([np.ones_like(one), one, two, one**2, two**2, one * two], -1)

    def pearson(sums: Floats) -> Floats:
        rows, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
        spread = (xx - x**2 / rows) * (yy - y**2 / rows)
        known = spread > 1e-24 * xx * yy
        found: Floats = np.divide(xy - x * y / rows, np.sqrt(np.maximum(spread, 0)), out=np.full_like(xy, np.nan), where=known)
        return found

    def spearman(rows: Ints) -> float:
        if not (np.ptp(found[rows]) and np.ptp(wanted[rows])):
            return float("nan")
        return float(np.corrcoef(rankdata(found[rows]), rankdata(wanted[rows]))[0, 1])

    distance = np.stack([np.abs(found - wanted), np.ones_like(one)], -1)
    scores = {
        "pearson": of_sums(parts, pearson),
        "spearman": of_rows(spearman, len(wanted)),
        "mean_absolute_error": of_sums(distance, lambda sums: sums[..., 0] / sums[..., 1]),
    }
    return {name: metric for name, metric in scores.items() if np.isfinite(metric.value)}
