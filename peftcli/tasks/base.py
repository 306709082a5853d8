"""The one interface that every task implements: from rows to batches, from a batch to the loss, from measurements to metrics.

A task is one file: a subclass of :class:`Task`, its options in ``peftcli.recipe.tasks``, and a line in
``peftcli.tasks.registry``. The loop, the evaluation and the report know tasks only through this module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from peftcli.data.kinds import RowKind
from peftcli.data.splits import Split
from peftcli.kernels import fast
from peftcli.kernels.again import sparing
from peftcli.kernels.grouping import by_length
from peftcli.methods.base import Loss
from peftcli.recipe.schema import DatasetSection
from peftcli.recipe.tasks import TaskSection
from peftcli.tasks.intervals import Metric

__all__ = ["Head", "Layout", "Measured", "Metric", "Task", "TaskModule"]

S = TypeVar("S", bound=TaskSection)
# Tokens, padding included, up to which a batch is filled before another is begun: each has a cost of its own. Measured with MiniLM and 32
# rows of SST-2, forward and backward on one core: 0.69 s instead of 1.16 in float32, 0.62 instead of 0.97 in bfloat16; with 128 as fast.
_FEW_TOKENS = 256
Measured = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """How rows become tensors.

    Attributes:
        packed: end to end in one row, without padding; else padded on the right.
        pad_id: the token of the padding.
        device: where the tensors go.
        share: packed rows that begin alike hold that beginning once.
        grouped: padded rows of a step go in several batches, each of similar lengths.
    """

    packed: bool
    pad_id: int
    device: torch.device | str = "cpu"
    share: bool = False
    grouped: bool = False


@dataclass(frozen=True)
class Head:
    """The output layer that a task needs, for transformers' config.

    Attributes:
        labels: names of the outputs. ``problem``: transformers' ``problem_type``.
        pooler: the pooler below it is trained whole, too.
    """

    labels: tuple[str, ...]
    problem: str
    pooler: bool = False


class TaskModule(nn.Module, ABC):
    """A model with the task's loss around it: what Accelerate prepares. ``model`` is the unwrapped model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As every module is called; what costs little to compute again is not kept for the backward pass."""
        with sparing():
            return super().__call__(*args, **kwargs)

    @abstractmethod
    def forward(self, batch: Any) -> Loss:
        """The summed loss of a batch."""

    @abstractmethod
    def measure(self, batch: Any) -> Measured:
        """What the metrics need of each row of a batch, without gradient: tensors [rows, ...] on the CPU; ``loss`` [rows]
        float64 (sum over the row's units) and ``units`` [rows] int64 among them, there or from :meth:`Task.together`. A row's values
        do not depend on the others."""


class Task(ABC, Generic[S]):
    """A kind of problem.

    Class attributes:
        auto_model: name of the class of transformers that loads its models.
        peft_type: PEFT's name of the task.
    """

    auto_model: ClassVar[str]
    peft_type: ClassVar[str]

    def __init__(self, section: S) -> None:
        self.section = section

    @abstractmethod
    def rows(self, config: DatasetSection, tokenizer: Any) -> RowKind[Any]:
        """What the dataset's rows become in this run."""

    def settle(self, rows: RowKind[Any]) -> S:
        """The section with what the training rows told, as the run's folder keeps it; also taken as the task's own."""
        return self.section

    @property
    def figures(self) -> tuple[str, ...]:
        """What :meth:`scores` tells of rows like the training rows, which have settled the section."""
        return self.section.figures

    def head(self) -> Head | None:
        """The output layer to put on the base, once the rows are known; ``None``: the base's own."""
        return None

    @property
    def has_reference(self) -> bool:
        """Whether rows are compared with what the base alone makes of them, before any method is applied."""
        return False

    def base_module(self, model: nn.Module) -> TaskModule:
        """The base alone, to measure every row with before the method is applied, where there is a reference."""
        raise NotImplementedError

    def with_base(self, split: Split, measured: Mapping[str, Tensor]) -> Split:
        """``split`` with what :meth:`base_module` measured of all its rows."""
        raise NotImplementedError

    @abstractmethod
    def module(self, model: nn.Module) -> TaskModule:
        """The model with this task's loss."""

    def packs(self, model: nn.Module, vocabulary: int, longest: int) -> bool:
        """Whether rows of at most ``longest`` tokens may lie end to end without seeing each other, found by trying."""
        return False

    def shares(self, model: nn.Module, vocabulary: int) -> bool:
        """Whether packed rows that begin alike may hold that beginning once in training, found by trying."""
        return False

    def groups(self, rows: Sequence[int], widths: Sequence[Sequence[int]], layout: Layout) -> list[list[int]]:
        """The rows of one micro step as batches that follow each other; a row's loss does not depend on those beside it.

        Args:
            widths: of the split.
        """
        if layout.packed or not layout.grouped or not fast.on():
            return [list(rows)]
        groups = by_length(rows, widths, _FEW_TOKENS) or [[]]
        if len(groups) > 1:
            fast.take("rows of similar lengths padded together")
        return groups

    @abstractmethod
    def batch(self, split: Split, rows: Sequence[int], layout: Layout, *, silent: bool = False) -> Any:
        """Rows of a split as tensors.

        Args:
            silent: nothing in it carries loss (for a process that has no rows of its own in a step).
        """

    @abstractmethod
    def masks(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Which positions of a batch's input ids hold tokens and no padding, and which carry loss: booleans of their shape. Where
        rows are judged as a whole, every token does."""

    def together(self, measured: Measured) -> Measured:
        """What was measured of each row, with what only all rows together tell."""
        return measured

    @abstractmethod
    def scores(self, measured: Mapping[str, Tensor], split: Split) -> dict[str, Metric]:
        """Metrics from what :meth:`TaskModule.measure` gave for the first rows of a split, all rows together."""

    def show(self, split: Split, row: int, tokenizer: Any) -> list[tuple[str, bool]]:
        """Row number ``row`` as people read it, in runs of (text, whether it is learned)."""
        return [(tokenizer.decode(split.first_ids(row).tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False), False)]

    def probe(self, model: nn.Module, ids: Tensor) -> Tensor:
        """[positions, outputs] logits of one row of token ids [1, length], to compare two models by."""
        logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return logits.flatten(0, -2)
