"""What a run may learn: the recipe's ``task`` section, one closed class of options for each task.

What a task computes lives in ``peftcli.tasks``, under the same name.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field


class TaskSection(BaseModel):
    """Options of a task; unknown keys are faults.

    Class attributes:
        formats: the dataset formats that it learns from, in the order of preference when columns fit several.
        summary: one sentence for the recipe reference.
        generates: an answer may be generated for its rows.
    """

    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True, protected_namespaces=())

    formats: ClassVar[tuple[str, ...]]
    summary: ClassVar[str]
    generates: ClassVar[bool] = False

    name: str = Field(description="Name of the task.")


class CausalLMTask(TaskSection):
    """Next-token prediction."""

    formats = ("messages", "sharegpt", "prompt_completion", "alpaca", "text")
    summary = "A language model learns to continue text: chats, completions, documents."
    generates = True

    name: Literal["causal_lm"] = Field("causal_lm", description="`causal_lm`")


class SequenceClassificationTask(TaskSection):
    """One judgement for a text or a pair of texts."""

    formats = ("classification",)
    summary = "A fresh output layer learns to label a text or a pair of texts: one class, several labels, or a number."

    name: Literal["sequence_classification"] = Field("sequence_classification", description="`sequence_classification`")
    problem: Literal["single_label", "multi_label", "regression"] | None = Field(
        None,
        description="One class for each row, any number of labels, or a number. `null`: seen from the labels (lists: `multi_label`; "
        "numbers with a fraction: `regression`; else `single_label`).",
    )
    labels: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="The labels in the order of the model's outputs. `null`: those of the training rows, sorted."
    )


class Seq2SeqTask(TaskSection):
    """Text to text."""

    formats = ("text_to_text", "prompt_completion", "alpaca")
    summary = "An encoder-decoder learns to turn one text into another: translation, summaries, answers, descriptions of data."
    generates = True

    name: Literal["seq2seq"] = Field("seq2seq", description="`seq2seq`")
    max_target_length: Annotated[int, Field(ge=2, le=1_000_000)] | None = Field(
        None,
        description="Longest target in tokens, its end token included. `null`: as `dataset.max_length`, which is that of the source. "
        "`dataset.truncation` says what happens to longer rows; a target is always cut at its end.",
    )


TASKS: dict[str, type[TaskSection]] = {
    str(section.model_fields["name"].default): section for section in (CausalLMTask, SequenceClassificationTask, Seq2SeqTask)
}
