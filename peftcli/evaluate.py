"""Measure a model on held-out rows: the task's loss and metrics, and what the model writes.

Sums are taken in float64 over single rows, so the numbers do not depend on the batch size or the number of processes.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object

from peftcli.data.splits import Split
from peftcli.errors import DataError
from peftcli.generate import generate as write_answers
from peftcli.generate import is_match
from peftcli.tasks.base import Layout, Measured, Task, TaskModule
from peftcli.tasks.intervals import ratio, wilson


@dataclass(frozen=True)
class Scores:
    """Metrics of one model on one split.

    Attributes:
        loss: mean over the units that carry loss (tokens, or rows where each is judged as a whole), in nats.
        metrics: the task's figures by name, and of what the model wrote where it was asked to.
        intervals: 95 % intervals by metric, the loss among them.
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

    def plain(self) -> dict[str, float]:
        """The numbers that a training run logs."""
        return {"loss": self.loss, **self.metrics}


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
        rows: int | None = None,
        alone: bool = False,
    ) -> Scores:
        """Metrics of ``module`` on the split (its first ``rows``); the module's training mode is put back afterwards.

        Args:
            generate: let the model answer too, at most ``max_new_tokens`` tokens for each of the first ``limit`` examples.
            alone: this process measures every row itself, without the others.
        """
        started = time.perf_counter()
        training = module.training
        module.eval()
        try:
            with torch.no_grad(), self._autocast():
                measured = self._measure(module, rows, alone)
                answers = self._answers(module, max_new_tokens, limit) if generate else []
        finally:
            module.train(training)
        units = int(measured["units"].sum())
        if not units:
            raise DataError("the held-out rows hold no token that could be predicted from another")
        found = self.task.scores(measured, self.split)
        metrics = {name: metric.value for name, metric in found.items()}
        intervals = {name: metric.interval for name, metric in found.items() if metric.interval is not None}
        intervals["loss"] = ratio(measured["loss"], measured["units"])
        if generate:
            hits = sum(is_match(a, e.reference) for a, e in zip(answers, self.split.generation, strict=False))
            metrics["exact_match"] = hits / max(1, len(answers))
            intervals["exact_match"] = wilson(hits, len(answers))
        loss = float(measured["loss"].sum() / units)
        return Scores(loss, metrics, intervals, units, len(measured["loss"]), time.perf_counter() - started, answers)

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


__all__ = ["Evaluator", "Scores", "is_match"]
