"""A reward model: a number for an answer, higher the better it is (Stiennon et al., 2020, https://arxiv.org/abs/2009.01325)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcli.data.batching import pad
from peftcli.data.preference_rows import PreferenceRows, TwoSplit
from peftcli.data.splits import Split
from peftcli.kernels.transfer import ahead
from peftcli.methods.base import Loss
from peftcli.recipe import tasks as options
from peftcli.recipe.schema import DatasetSection
from peftcli.tasks.base import Head, Layout, Measured, Metric, Task, TaskModule
from peftcli.tasks.preference import Judgement, pair_loss, pair_measures, pair_scores, show_pair


@dataclass(frozen=True)
class RewardBatch:
    """Pairs of answers as tensors.

    Attributes:
        input_ids, attention_mask: [2 n, longest], padded on the right; better and worse answers by turns.
        margins: [n] how much better the better one is at least. ``silent``: nothing carries loss.
    """

    input_ids: Tensor
    attention_mask: Tensor
    margins: Tensor
    silent: bool


class Reward(TaskModule):
    """A model with one output. A pair's loss is ``-log sigmoid(better - worse - margin)``."""

    def __init__(self, model: nn.Module, section: options.RewardTask) -> None:
        super().__init__(model)
        self.section = section

    def judge(self, batch: RewardBatch) -> Judgement:
        """Losses and rewards."""
        found: Tensor = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        rewards = found.view(-1, 2).double()
        losses = -F.logsigmoid(rewards[:, 0] - rewards[:, 1] - batch.margins)
        if self.section.center_rewards_coefficient is not None:
            losses = losses + self.section.center_rewards_coefficient * rewards.sum(-1).square()
        return Judgement(losses, rewards)

    def forward(self, batch: RewardBatch) -> Loss:
        return pair_loss(self.judge(batch), batch.silent)

    def measure(self, batch: RewardBatch) -> Measured:
        return pair_measures(self.judge(batch))


class RewardTask(Task[options.RewardTask]):
    """A reward model."""

    auto_model = "AutoModelForSequenceClassification"
    peft_type = "SEQ_CLS"

    def rows(self, config: DatasetSection, tokenizer: Any) -> PreferenceRows:
        return PreferenceRows(config, tokenizer)

    def head(self) -> Head:
        return Head(("reward",), "regression")

    def module(self, model: nn.Module) -> Reward:
        return Reward(model, self.section)

    def batch(self, split: Split, rows: Sequence[int], layout: Layout, *, silent: bool = False) -> RewardBatch:
        assert isinstance(split, TwoSplit)
        ids, mask = pad([answer.input_ids for row in rows for answer in split.rows[row]], layout.pad_id)
        margins = torch.from_numpy(split.labels[list(rows)])
        return RewardBatch(ahead(ids, layout.device), ahead(mask, layout.device), ahead(margins, layout.device), silent)

    def masks(self, batch: RewardBatch) -> tuple[Tensor, Tensor]:
        return batch.attention_mask.bool(), batch.attention_mask.bool()

    def scores(self, measured: Mapping[str, Tensor], split: Split) -> dict[str, Metric]:
        return pair_scores(measured)

    def show(self, split: Split, row: int, tokenizer: Any) -> list[tuple[str, bool]]:
        return show_pair(split, row, tokenizer)
