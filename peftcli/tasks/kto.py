"""Kahneman-Tversky optimization (Ethayarajh et al., 2024, https://arxiv.org/abs/2402.01306): single answers, wanted or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peftcli.data.audit import runs
from peftcli.data.batching import Batch, collate
from peftcli.data.preference_rows import JudgedRows, TwoSplit
from peftcli.data.splits import Split
from peftcli.kernels.transfer import ahead
from peftcli.methods.base import Loss
from peftcli.recipe import tasks as options
from peftcli.recipe.schema import DatasetSection
from peftcli.tasks.base import Layout, Measured, Metric, TaskModule
from peftcli.tasks.intervals import Floats, mean_of_units, of_rows, of_sums
from peftcli.tasks.preference import AnswerTask, log_probs, row_masks


@dataclass(frozen=True)
class JudgedBatch:
    """Answers as tensors.

    Attributes:
        rows: prompts with their answers. ``others``: the same prompts with answers to other ones.
        desirable: [rows] bool.
        reference: [rows, 2] float64 log-probabilities of both under the base; NaN where they are not known.
        silent: nothing carries loss.
    """

    rows: Batch
    others: Batch
    desirable: Tensor
    reference: Tensor
    silent: bool

    def log_probs(self, model: nn.Module) -> Tensor:
        """[rows, 2] under ``model``."""
        return torch.stack([log_probs(model, self.rows), log_probs(model, self.others)], -1)


class KTO(TaskModule):
    """An answer's reward is ``beta`` times its log-probability beyond the reference's. What it gains is measured from the mean of
    that of unrelated answers, at least 0: an estimate of the KL divergence from the reference, which is held constant."""

    def __init__(self, model: nn.Module, section: options.KTOTask) -> None:
        super().__init__(model)
        self.section = section

    def forward(self, batch: JudgedBatch) -> Loss:
        weight = 0.0 if batch.silent else 1.0
        with torch.no_grad():
            moved = (log_probs(self.model, batch.others) - batch.reference[:, 1]) * weight
            found = torch.stack([moved.sum(), torch.full_like(moved, weight).sum()])
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(found)
            divergence = (found[0] / found[1].clamp(min=1)).clamp(min=0)
        ratios = log_probs(self.model, batch.rows) - batch.reference[:, 0]
        total = self.losses(ratios, batch.desirable, divergence).sum() * weight
        parts = {"kl": divergence * weight * len(ratios)}
        return Loss(total, torch.zeros((), dtype=torch.long), parts)

    def losses(self, ratios: Tensor, desirable: Tensor, divergence: Tensor) -> Tensor:
        """[rows] from log-probabilities beyond the reference's and the estimated divergence."""
        wanted = self.section.desirable_weight * (1 - torch.sigmoid(self.section.beta * (ratios - divergence)))
        other = self.section.undesirable_weight * (1 - torch.sigmoid(self.section.beta * (divergence - ratios)))
        return torch.where(desirable, wanted, other)

    def measure(self, batch: JudgedBatch) -> Measured:
        found = batch.log_probs(self.model)
        units = torch.ones(len(found), dtype=torch.long)
        ratios = (found - batch.reference).cpu()
        # The loss needs the divergence, which all rows together tell.
        return {"units": units, "ratios": ratios, "desirable": batch.desirable.cpu(), "log_probs": found[:, 0].cpu()}


class KTOTask(AnswerTask[options.KTOTask]):
    """Kahneman-Tversky optimization."""

    @property
    def has_reference(self) -> bool:
        return True

    def rows(self, config: DatasetSection, tokenizer: Any) -> JudgedRows:
        return JudgedRows(config, tokenizer)

    def module(self, model: nn.Module) -> KTO:
        return KTO(model, self.section)

    def groups(self, rows: Sequence[int], widths: Sequence[Sequence[int]], layout: Layout) -> list[list[int]]:
        """All together: what an answer gains is measured from the mean over the batch."""
        return [list(rows)]

    def batch(self, split: Split, rows: Sequence[int], layout: Layout, *, silent: bool = False) -> JudgedBatch:
        assert isinstance(split, TwoSplit)
        own, others = (
            collate(
                [answer.input_ids for answer in answers],
                [answer.supervised for answer in answers],
                packed=layout.packed,
                pad_id=layout.pad_id,
                device=layout.device,
            )
            for answers in zip(*(split.rows[row] for row in rows), strict=True)
        )
        desirable = ahead(torch.from_numpy(split.labels[list(rows)] > 0), layout.device)
        return JudgedBatch(own, others, desirable, self.reference(split, rows, layout), silent)

    def masks(self, batch: JudgedBatch) -> tuple[Tensor, Tensor]:
        return row_masks(batch.rows)

    def together(self, measured: Measured) -> Measured:
        divergence = measured["ratios"][:, 1].mean().clamp(min=0)
        module = KTO(nn.Identity(), self.section)
        return {**measured, "loss": module.losses(measured["ratios"][:, 0], measured["desirable"], divergence)}

    def scores(self, measured: Mapping[str, Tensor], split: Split) -> dict[str, Metric]:
        wanted = measured["desirable"].numpy()
        rewards = self.section.beta * measured["ratios"][:, 0].numpy()
        found = {"kl": mean_of_units(measured["ratios"][:, 1], measured["units"])}
        log_prob = measured["log_probs"].numpy()
        parts = np.stack([wanted * rewards, wanted * log_prob, wanted, ~wanted * rewards, ~wanted * log_prob, ~wanted], -1)

        def mean(place: int, count: int) -> Metric:
            return of_sums(parts, lambda sums: sums[:, place] / sums[:, count])

        if wanted.any():
            found |= {"chosen_reward": mean(0, 2), "chosen_log_prob": mean(1, 2)}
        if not wanted.all():
            found |= {"rejected_reward": mean(3, 5), "rejected_log_prob": mean(4, 5)}
        if 0 < wanted.sum() < len(wanted):
            found["reward_margin"] = of_sums(parts, lambda sums: sums[:, 0] / sums[:, 2] - sums[:, 3] / sums[:, 5])
            found["reward_accuracy"] = of_rows(lambda rows: pairs_right(rewards[rows], wanted[rows]), len(wanted))
        return found

    def show(self, split: Split, row: int, tokenizer: Any) -> list[tuple[str, bool]]:
        assert isinstance(split, TwoSplit)
        own, other = (runs(answer, tokenizer) for answer in split.rows[row])
        wanted = "wanted" if split.labels[row] else "not wanted"
        between = f"\n({wanted}) The model also sees, without learning it, another answer to measure how far it has moved:\n"
        return [*own, (between, False), *((text, False) for text, _ in other)]


def pairs_right(rewards: Floats, wanted: np.typing.NDArray[np.bool_]) -> float:
    """Share of all pairs of a wanted and another answer in which the wanted one has the higher reward, ties by half; NaN where
    there is no such pair."""
    from scipy.stats import rankdata

    many, others = int(wanted.sum()), int((~wanted).sum())
    if not many or not others:
        return float("nan")
    return float((rankdata(rewards)[wanted].sum() - many * (many + 1) / 2) / (many * others))
