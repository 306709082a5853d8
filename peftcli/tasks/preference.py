"""Learning from two answers to one prompt: batches, log-probabilities of whole answers, rewards and their metrics.

A loss is one file beside this one: a :class:`PairModule` that says what a pair's loss and rewards are, and its task.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from peftcli.data.audit import runs
from peftcli.data.batching import Batch, collate
from peftcli.data.preference_rows import PreferenceRows, TwoSplit
from peftcli.data.splits import Split
from peftcli.kernels.transfer import ahead
from peftcli.methods.base import Loss
from peftcli.recipe.schema import DatasetSection
from peftcli.recipe.tasks import PreferenceTask, TaskSection
from peftcli.tasks.base import Layout, Measured, Metric, Task, TaskModule
from peftcli.tasks.causal_lm import CausalLM, next_token_logits, supports_packing
from peftcli.tasks.intervals import mean_of_units, wilson

S = TypeVar("S", bound=TaskSection)
P = TypeVar("P", bound=PreferenceTask)


def log_probs(model: nn.Module, batch: Batch) -> Tensor:
    """[rows] float64 summed log-probabilities of each row's supervised tokens."""
    losses, _ = CausalLM(model).token_losses(batch)
    return -torch.stack([part.sum() for part in losses.double().split(list(batch.counts))])


class Compared(NamedTuple):
    """What a model says of n pairs; float64 [n, 2], the better answer first.

    Attributes:
        log_probs: summed over the tokens of each answer, with gradient. ``lengths``: how many tokens these are.
        reference: the same sums under the base without an adapter.
        loss: mean over all supervised tokens of each row, its prompt's among them where these are learned.
    """

    log_probs: Tensor
    lengths: Tensor
    reference: Tensor
    loss: Tensor


class Judgement(NamedTuple):
    """What a loss makes of n pairs: ``losses`` [n] and ``rewards`` [n, 2], the better answer first."""

    losses: Tensor
    rewards: Tensor


@dataclass(frozen=True)
class PairBatch:
    """Pairs of answers as tensors.

    Attributes:
        rows: better and worse answers by turns.
        answers: [positions] float64, 1 where a token of an answer is predicted and 0 where one of a prompt is.
        reference: [pairs, 2] float64 log-probabilities under the base; NaN where they are needed and not known.
        silent: nothing carries loss.
    """

    rows: Batch
    answers: Tensor
    reference: Tensor
    silent: bool

    def log_probs(self, model: nn.Module) -> Tensor:
        """[pairs, 2] under ``model``."""
        return self.compared(model).log_probs

    def compared(self, model: nn.Module) -> Compared:
        """What ``model`` says of the pairs."""
        counts = list(self.rows.counts)
        losses, _ = CausalLM(model).token_losses(self.rows)
        tokens, own = losses.double().split(counts), self.answers.split(counts)
        sums = torch.stack([(one * mine).sum() for one, mine in zip(tokens, own, strict=True)])
        lengths = torch.stack([mine.sum() for mine in own])
        means = torch.stack([one.mean() for one in tokens])
        return Compared(-sums.view(-1, 2), lengths.view(-1, 2), self.reference, means.view(-1, 2))


class LogProbs(TaskModule):
    """The log-probabilities of both answers of each row, for a reference: nothing is learned."""

    def forward(self, batch: Any) -> Loss:
        raise AssertionError("a reference is not trained")

    def measure(self, batch: Any) -> Measured:
        return {"log_probs": batch.log_probs(self.model).cpu()}


class PairModule(TaskModule):
    """A model with a loss over pairs of answers; a pair counts as one, and its loss does not depend on the others."""

    @abstractmethod
    def judge(self, pairs: Compared) -> Judgement:
        """Losses and rewards."""

    def forward(self, batch: PairBatch) -> Loss:
        return pair_loss(self.judge(batch.compared(self.model)), batch.silent)

    def measure(self, batch: PairBatch) -> Measured:
        pairs = batch.compared(self.model)
        return {**pair_measures(self.judge(pairs)), "log_probs": pairs.log_probs.cpu()}


def pair_loss(found: Judgement, silent: bool) -> Loss:
    """The summed loss of pairs, and what the log says of their rewards."""
    weight = 0.0 if silent else 1.0
    rewards = found.rewards.detach() * weight
    wins = preferred(found.rewards.detach()) * weight
    margins = rewards[:, 0] - rewards[:, 1]
    parts = {
        "reward_accuracy": wins.sum(),
        "reward_margin": margins.sum(),
        "chosen_reward": rewards[:, 0].sum(),
        "rejected_reward": rewards[:, 1].sum(),
    }
    return Loss(found.losses.sum() * weight, (wins == 1).sum(), parts)


def pair_measures(found: Judgement) -> Measured:
    """What :func:`pair_scores` needs."""
    units = torch.ones(len(found.losses), dtype=torch.long)
    return {"loss": found.losses.double().cpu(), "units": units, "rewards": found.rewards.double().cpu()}


def preferred(rewards: Tensor) -> Tensor:
    """[n] 1 where the better answer has the higher reward, one half where both have the same."""
    return (torch.sign(rewards[:, 0] - rewards[:, 1]) + 1) / 2


def pair_scores(measured: Mapping[str, Tensor]) -> dict[str, Metric]:
    """Reward accuracy and margin, rewards, and log-probabilities where they were measured."""
    rewards, units = measured["rewards"], measured["units"]
    figures = {
        "reward_accuracy": preferred(rewards),
        "reward_margin": rewards[:, 0] - rewards[:, 1],
        "chosen_reward": rewards[:, 0],
        "rejected_reward": rewards[:, 1],
    }
    if "log_probs" in measured:
        figures |= {"chosen_log_prob": measured["log_probs"][:, 0], "rejected_log_prob": measured["log_probs"][:, 1]}
    found = {name: mean_of_units(values, units) for name, values in figures.items()}
    accuracy = found["reward_accuracy"]
    interval = wilson(float(preferred(rewards).sum()), len(units))
    return {**found, "reward_accuracy": accuracy._replace(interval=interval)}


class AnswerTask(Task[S]):
    """Two answers for each row, judged by the log-probabilities that a causal model gives them.

    Class attributes:
        auto_model, peft_type: of :class:`Task`.
    """

    auto_model = "AutoModelForCausalLM"
    peft_type = "CAUSAL_LM"

    def base_module(self, model: nn.Module) -> LogProbs:
        return LogProbs(model)

    def with_base(self, split: Split, measured: Mapping[str, Tensor]) -> Split:
        assert isinstance(split, TwoSplit)
        return replace(split, reference=measured["log_probs"].numpy())

    def reference(self, split: TwoSplit, rows: Sequence[int], layout: Layout) -> Tensor:
        """[rows, 2] float64; zeros without a reference, NaN where it is not known."""
        if self.has_reference and split.reference is not None:
            values = torch.from_numpy(split.reference[list(rows)])
        else:
            values = torch.full((len(rows), 2), float("nan") if self.has_reference else 0.0, dtype=torch.float64)
        return ahead(values, layout.device)

    def packs(self, model: nn.Module, vocabulary: int, longest: int) -> bool:
        return supports_packing(model, vocabulary, longest)

    def probe(self, model: nn.Module, ids: Tensor) -> Tensor:
        return next_token_logits(model, ids)


class PairTask(AnswerTask[P]):
    """Pairs of answers."""

    @property
    def learns_prompts(self) -> bool:
        """Whether ``dataset.train_on: all`` has a meaning."""
        return False

    def rows(self, config: DatasetSection, tokenizer: Any) -> PreferenceRows:
        return PreferenceRows(config, tokenizer, whole=self.learns_prompts)

    def batch(self, split: Split, rows: Sequence[int], layout: Layout, *, silent: bool = False) -> PairBatch:
        assert isinstance(split, TwoSplit)
        both = [answer for row in rows for answer in split.rows[row]]
        own = [answer.supervised for answer in both]
        # Where prompts are learned, the better answer's is; the worse answer is compared only.
        learned = [np.ones_like(mask) if split.prompts and not place % 2 else mask for place, mask in enumerate(own)]
        inner = collate([answer.input_ids for answer in both], learned, packed=layout.packed, pad_id=layout.pad_id, device=layout.device)
        answers = np.concatenate([mask[1:][every[1:]] for mask, every in zip(own, learned, strict=True)])
        return PairBatch(inner, ahead(torch.from_numpy(answers).double(), layout.device), self.reference(split, rows, layout), silent)

    def masks(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        return row_masks(batch.rows)

    def scores(self, measured: Mapping[str, Tensor], split: Split) -> dict[str, Metric]:
        return pair_scores(measured)

    def show(self, split: Split, row: int, tokenizer: Any) -> list[tuple[str, bool]]:
        return show_pair(split, row, tokenizer)


def row_masks(batch: Batch) -> tuple[Tensor, Tensor]:
    """As :meth:`Task.masks`, of a causal batch."""
    supervised = torch.zeros(batch.input_ids.numel(), dtype=torch.bool, device=batch.input_ids.device)
    supervised[batch.positions] = True
    tokens = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
    return tokens.bool(), supervised.view_as(batch.input_ids)


def show_pair(split: Split, row: int, tokenizer: Any) -> list[tuple[str, bool]]:
    """Both answers of a pair with their prompt, in runs of (text, whether it is compared)."""
    assert isinstance(split, TwoSplit)
    chosen, rejected = (runs(answer, tokenizer) for answer in split.rows[row])
    return [*chosen, ("\nrejected:\n", False), *rejected]
