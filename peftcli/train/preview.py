"""The training batches as a method may look at them before the first step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from peftcli.data.batching import Plan
from peftcli.data.splits import Split
from peftcli.methods.base import TrainingBatch
from peftcli.tasks.base import Layout, Task


def training_batches(plan: Plan, split: Split, task: Task[Any], layout: Layout) -> Iterator[TrainingBatch]:
    """The micro batches of all processes in the order of the run, epoch after epoch without end."""
    for epoch in itertools.count():
        for step in plan.epoch(epoch):
            for rows in itertools.chain.from_iterable(zip(*step.shares, strict=True)):
                if rows:
                    batch = task.batch(split, rows, layout)
                    yield TrainingBatch(partial(_forward, task, batch), *task.masks(batch))


def _forward(task: Task[Any], batch: Any, model: nn.Module) -> Any:
    return task.module(model)(batch)
