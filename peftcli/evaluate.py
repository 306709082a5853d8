"""Measure a model on held-out rows: the task's loss and metrics, and what the model writes.

Sums are taken in float64 over single rows, so the numbers do not depend on the batch size or the number of processes.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import nn

from peftcli.data.splits import Split
from peftcli.errors import DataError
from peftcli.generate import generate as write_answers
from peftcli.tasks.answers import answer_scores
from peftcli.tasks.base import Layout, Measured, Task, TaskModule
from peftcli.tasks.intervals import Difference, Metric, compare, mean_of_units


@dataclass(frozen=True)
class Scores:
    """Metrics of one model on one split.

    Attributes:
        loss: mean over the units that carry loss (tokens, or rows where each is judged as a whole), in nats.
        metrics: the task's figures by name, and of what the model wrote where it was asked to.
        intervals: 95 % intervals by metric, the loss among them.
        paired: what a comparison with another model on the same rows needs, by metric.
        units, rows: how much was measured. ``seconds``: how long it took.
        answers: what the model wrote, in the order of the split's generation examples; empty where it was not asked to.
    """

    loss: float
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    units: int
    rows: int
    seconds: float
    answers: list[str] = field(default_factory=list)
    paired: dict[str, str] = field(default_factory=dict)

    def plain(self) -> dict[str, float]:
        """The numbers."""
        return {"loss": self.loss, **self.metrics}

    def logged(self) -> dict[str, Any]:
        """What a training run logs: the numbers, and as ``intervals`` those that are finite."""
        return {**self.plain(), "intervals": {name: ends for name, ends in self.intervals.items() if all(map(math.isfinite, ends))}}

    def since(self, before: Scores) -> dict[str, Difference]:
        """Each figure minus that of ``before``, another model on the same rows, with the paired test."""
        found = {name: compare(before._metric(name), self._metric(name)) for name in self.paired if name in before.paired}
        return {name: difference for name, difference in found.items() if difference is not None}

    def _metric(self, name: str) -> Metric:
        return Metric(self.plain()[name], None, self.paired[name])


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a task module on one split, always in the same way.

    Attributes:
        task: what is learned. ``split``: held-out rows. ``layout``: how they become tensors.
        batch_size: rows at once; no influence on the results.
        mixed: compute in autocast (trained float32 weights, bfloat16 products).
    """

    processes: PartialState | Accelerator
    task: Task[Any]
    split: Split
    tokenizer: Any
    layout: Layout
    batch_size: int
    mixed: bool = False

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if not self.mixed:
            return contextlib.nullcontext()
        return torch.autocast(self.processes.device.type, dtype=torch.bfloat16)

    def scores(
        self,
        module: TaskModule,
        *,
        generate: bool = False,
        max_new_tokens: int = 128,
        limit: int | None = None,
        metrics: Sequence[str] = ("exact_match",),
        rows: int | None = None,
        alone: bool = False,
    ) -> Scores:
        """Metrics of ``module`` on the split (its first ``rows``); the module's training mode is put back afterwards.

        Args:
            generate: let the model answer too, at most ``max_new_tokens`` tokens for each of the first ``limit`` examples.
            metrics: how the answers are measured, as in the recipe's ``eval.metrics``.
            alone: this process measures every row itself, without the others.
        """
        started = time.perf_counter()
        training = module.training
        module.eval()
        try:
            with torch.no_grad(), self._autocast():
                measured = self.task.together(self._measure(module, rows, alone))
                answers = self._answers(module, max_new_tokens, limit) if generate else []
        finally:
            module.train(training)
        units = int(measured["units"].sum())
        if not units:
            raise DataError("the held-out rows hold no token that could be predicted from another")
        found = self.task.scores(measured, self.split)
        if generate:
            found |= answer_scores(metrics, answers, [example.references for example in self.split.generation[: len(answers)]])
        loss = mean_of_units(measured["loss"], measured["units"])
        known = {**found, "loss": loss}
        return Scores(
            loss.value,
            {name: metric.value for name, metric in found.items()},
            {name: metric.interval for name, metric in known.items() if metric.interval is not None},
            units,
            len(measured["loss"]),
            time.perf_counter() - started,
            answers,
            {name: metric.paired for name, metric in known.items() if metric.paired is not None},
        )

    def with_base(self, model: nn.Module) -> Split:
        """The split with what the task compares its rows with: what ``model``, the base alone, makes of them."""
        module = self.task.base_module(model).eval()
        with torch.no_grad(), self._autocast():
            return self.task.with_base(self.split, self._measure(module, None, False))

    def _measure(self, module: TaskModule, rows: int | None, alone: bool) -> Measured:
        """What the task measures of every row, in the split's order; each process measures its share."""
        split, processes = self.split, self.processes
        lengths = split.lengths
        total = len(lengths) if rows is None else min(rows, len(lengths))
        # Similar lengths meet, so padded layouts waste little; the result does not depend on who meets whom.
        order = sorted(range(total), key=lambda row: (-lengths[row], row))
        batches = [order[start : start + self.batch_size] for start in range(0, total, self.batch_size)]
        first, every = (0, 1) if alone else (processes.process_index, processes.num_processes)
        parts = [(chosen, module.measure(self.task.batch(split, chosen, self.layout))) for chosen in batches[first::every]]
        if every > 1:
            parts = gather_object(parts)
        measured = {}
        for name in parts[0][1]:
            values = torch.cat([part[name] for _, part in parts])
            measured[name] = torch.empty_like(values).index_copy_(0, torch.tensor([row for chosen, _ in parts for row in chosen]), values)
        return measured

    def _answers(self, module: TaskModule, max_new_tokens: int, limit: int | None) -> list[str]:
        examples = self.split.generation[:limit]
        mine = list(range(self.processes.process_index, len(examples), self.processes.num_processes))
        prompts = [examples[i].prompt_ids for i in mine]
        texts = write_answers(module.model, self.tokenizer, prompts, max_new_tokens, self.batch_size, self.split.stop_ids)
        if self.processes.num_processes == 1:
            return texts
        pairs = gather_object(list(zip(mine, texts, strict=True)))
        return [text for _, text in sorted(pairs)]


__all__ = ["Evaluator", "Scores"]
