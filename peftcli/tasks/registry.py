"""The tasks by name: one line each."""

from __future__ import annotations

import importlib
from typing import Any

from peftcli.recipe.tasks import TaskSection
from peftcli.tasks.base import Task

_TASKS: dict[str, str] = {
    "causal_lm": "peftcli.tasks.causal_lm:CausalLMTask",
    "sequence_classification": "peftcli.tasks.sequence_classification:SequenceClassification",
    "token_classification": "peftcli.tasks.token_classification:TokenClassification",
    "seq2seq": "peftcli.tasks.seq2seq:Seq2Seq",
    "dpo": "peftcli.tasks.dpo:DPOTask",
    "orpo": "peftcli.tasks.orpo:ORPOTask",
    "simpo": "peftcli.tasks.simpo:SimPOTask",
    "kto": "peftcli.tasks.kto:KTOTask",
    "reward": "peftcli.tasks.reward:RewardTask",
}


def names() -> list[str]:
    """Registered names, in the order of the list above."""
    return list(_TASKS)


def make(section: TaskSection) -> Task[Any]:
    """The task that a recipe's section names."""
    module, _, attribute = _TASKS[section.name].partition(":")
    task: Task[Any] = getattr(importlib.import_module(module), attribute)(section)
    return task
