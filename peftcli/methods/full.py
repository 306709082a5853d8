"""Full fine-tuning: every weight moves (BERT, Devlin et al., https://arxiv.org/abs/1810.04805)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from peftcli.methods.base import Caps, MethodConfig
from peftcli.methods.kinds import Select


class FullConfig(MethodConfig):
    """Full fine-tuning has no options."""

    name: Literal["full"] = Field("full", description="`full`")


class Full(Select[FullConfig]):
    """All weights move; the result is a complete model folder."""

    Config = FullConfig
    paper = "https://arxiv.org/abs/1810.04805"
    summary = "All weights move; the result is a complete model."
    solves = "Reuses pre-training instead of starting from nothing, with the greatest capacity of all."
    costs = (
        "Memory for the gradients and optimizer state of every weight, a whole copy of the model for each task; "
        "forgets, and overfits small data."
    )
    choose = (
        "Memory allows it, there are many thousands of rows, and the task is far from what the base knows. Learning rates are "
        "ten times smaller."
    )
    caps = Caps(mergeable=True, quantized_base=False, identity_at_init=True, whole_model=True)
    recommended = {"train.learning_rate": 2e-5}

    def trainable(self, name: str) -> bool:
        return True
