"""What a run may learn: the recipe's ``task`` section, one closed class of options for each task.

What a task computes lives in ``peftcli.tasks``, under the same name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class TaskSection(BaseModel):
    """Options of a task; unknown keys are faults.

    Class attributes:
        formats: the dataset formats that it learns from, in the order of preference when columns fit several.
        summary: one sentence for the recipe reference.
        generates: an answer may be generated for its rows.
        fresh_head: it puts an output layer of its own on the base.
        streams: its training rows may lie on disk, whatever their number.
        figures: what its evaluation may tell beside the loss and the metrics of generated answers.
        figures_of: those of one ``problem``, where the task has several kinds.
    """

    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True, protected_namespaces=())

    formats: ClassVar[tuple[str, ...]]
    summary: ClassVar[str]
    generates: ClassVar[bool] = False
    fresh_head: ClassVar[bool] = False
    streams: ClassVar[bool] = False
    figures: ClassVar[tuple[str, ...]]
    figures_of: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    name: str = Field(description="Name of the task.")


class CausalLMTask(TaskSection):
    """Next-token prediction."""

    formats = ("messages", "sharegpt", "prompt_completion", "alpaca", "text")
    summary = "A language model learns to continue text: chats, completions, documents."
    generates = True
    streams = True
    figures = ("perplexity", "token_accuracy")

    name: Literal["causal_lm"] = Field("causal_lm", description="`causal_lm`")


class SequenceClassificationTask(TaskSection):
    """One judgement for a text or a pair of texts."""

    formats = ("classification",)
    summary = "A fresh output layer learns to label a text or a pair of texts: one class, several labels, or a number."
    fresh_head = True
    figures = ("accuracy", "f1", "f1_micro", "matthews", "pearson", "spearman", "mean_absolute_error")
    figures_of: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "single_label": ("accuracy", "f1", "matthews"),
        "multi_label": ("accuracy", "f1_micro", "f1"),
        "regression": ("pearson", "spearman", "mean_absolute_error"),
    }

    name: Literal["sequence_classification"] = Field("sequence_classification", description="`sequence_classification`")
    problem: Literal["single_label", "multi_label", "regression"] | None = Field(
        None,
        description="One class for each row, any number of labels, or a number. `null`: seen from the labels (lists: `multi_label`; "
        "numbers with a fraction: `regression`; else `single_label`).",
    )
    labels: Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="The labels in the order of the model's outputs, by which whole numbers in the rows may stand for them. `null`: "
        "those of the training rows, sorted.",
    )
    train_pooler: bool = Field(
        False,
        description="Train the pooler of a BERT-like encoder whole, like the head above it. Worth it where the base has not learned one: "
        "sentence encoders, models distilled without.",
    )


class TokenClassificationTask(TaskSection):
    """A tag for each word."""

    formats = ("tagging",)
    summary = "A fresh output layer learns to tag the words of a text: named entities (IOB, IOB2, BIOES), parts of speech."
    fresh_head = True
    figures = ("entity_f1", "entity_precision", "entity_recall", "f1", "token_accuracy")

    name: Literal["token_classification"] = Field("token_classification", description="`token_classification`")
    labels: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="The tags in the order of the model's outputs. `null`: those of the training rows, `O` first, the others sorted."
    )
    label_at: Literal["first", "last", "all"] = Field(
        "first",
        description="Which tokens of a word learn its tag; it is read off at the first, or with `last` at the last: the choice for "
        "decoder-only models, which at a word's first token have not read the rest of it.",
    )


class Seq2SeqTask(TaskSection):
    """Text to text."""

    formats = ("text_to_text", "prompt_completion", "alpaca", "messages", "sharegpt")
    summary = "An encoder-decoder learns to turn one text into another: translation, summaries, answers, descriptions of data."
    generates = True
    figures = ("perplexity", "token_accuracy")

    name: Literal["seq2seq"] = Field("seq2seq", description="`seq2seq`")
    max_target_length: Annotated[int, Field(ge=2, le=1_000_000)] | None = Field(
        None,
        description="Longest target in tokens, its end token included. `null`: as `dataset.max_length`, which is that of the source. "
        "`dataset.truncation` says what happens to longer rows; a target is always cut at its end.",
    )


_REWARDS: tuple[str, ...] = ("reward_accuracy", "reward_margin", "chosen_reward", "rejected_reward")
_ANSWERS: tuple[str, ...] = (*_REWARDS, "chosen_log_prob", "rejected_log_prob")


class PreferenceTask(TaskSection):
    """Of two answers to one prompt, the better one is to be preferred."""

    figures = _ANSWERS
    formats = ("preference", "preference_sharegpt", "preference_alpaca", "preference_implicit")


Positive = Annotated[float, Field(gt=0.0, le=1000.0)]


class DPOTask(PreferenceTask):
    """Direct preference optimization (Rafailov et al., 2023, https://arxiv.org/abs/2305.18290)."""

    summary = (
        "Answers that people prefer become more likely than those that they reject, measured against the base model without an "
        "adapter (Rafailov et al., 2023). The base's log-probabilities of all rows are computed once, before training, so no second "
        "model is in memory; with `--init-adapter` too the base alone is the reference."
    )

    name: Literal["dpo"] = Field("dpo", description="`dpo`")
    beta: Positive = Field(0.1, description="How closely the model stays to the reference; with `ipo`, the strength of the regularization.")
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust"] = Field(
        "sigmoid",
        description="`sigmoid` (DPO), `hinge` (SLiC), `ipo` (Azar et al., 2023; log-probabilities are averaged over tokens), or `robust` "
        "to wrong labels (Chowdhury et al., 2024).",
    )
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = Field(
        0.0, description="Share of pairs whose answers are taken to be swapped, for `sigmoid` (conservative DPO) and `robust`."
    )
    reference_free: bool = Field(False, description="Measure against a reference that finds all answers equally likely.")

    @model_validator(mode="after")
    def _smoothing_has_an_effect(self) -> DPOTask:
        if self.label_smoothing and self.loss_type not in ("sigmoid", "robust"):
            raise ValueError(f"label_smoothing is for loss_type sigmoid and robust; {self.loss_type} has none")
        return self


class ORPOTask(PreferenceTask):
    """Odds ratio preference optimization (Hong et al., 2024, https://arxiv.org/abs/2403.07691)."""

    summary = (
        "Supervised fine-tuning on the better answer and, without a reference model, a penalty on the odds of the worse one (Hong et al., "
        "2024). With `dataset.train_on: all` the better answer's prompt is learned too, as in the authors' code and TRL."
    )

    name: Literal["orpo"] = Field("orpo", description="`orpo`")
    beta: Positive = Field(0.1, description="Weight of the odds ratio's loss beside that of the better answer (lambda in the paper).")


class SimPOTask(PreferenceTask):
    """Simple preference optimization (Meng et al., 2024, https://arxiv.org/abs/2405.14734)."""

    summary = (
        "The average log-probability of a token is the reward, without a reference model; the better answer's is to exceed the worse "
        "one's by a margin (Meng et al., 2024)."
    )

    name: Literal["simpo"] = Field("simpo", description="`simpo`")
    beta: Positive = Field(2.0, description="Scale of the reward.")
    gamma: Annotated[float, Field(ge=0.0, le=1000.0)] = Field(
        1.0, description="Margin between the two rewards; the paper tunes its share of beta, here 0.5 by default."
    )


class KTOTask(TaskSection):
    """Kahneman-Tversky optimization (Ethayarajh et al., 2024, https://arxiv.org/abs/2402.01306)."""

    formats = ("kto", "kto_messages")
    figures = (*_ANSWERS, "kl")
    summary = (
        "Single answers, each wanted or not, become more or less likely than under the base model without an adapter, as far as they are "
        "not so in general (Ethayarajh et al., 2024). How far the model has moved in general is estimated from prompts with answers to "
        "other prompts, over the rows of a batch in all processes; it is the one loss here that depends on the batch size."
    )

    name: Literal["kto"] = Field("kto", description="`kto`")
    beta: Positive = Field(0.1, description="How closely the model stays to the reference.")
    desirable_weight: Positive = Field(1.0, description="Weight of the wanted answers.")
    undesirable_weight: Positive = Field(
        1.0, description="Weight of the others. The paper keeps the two classes' total weights within a factor of 1 to 1.33."
    )


class RewardTask(PreferenceTask):
    """A reward model (Bradley and Terry, 1952; Stiennon et al., 2020, https://arxiv.org/abs/2009.01325)."""

    summary = (
        "A fresh output layer learns to give an answer a number that is higher the better it is, from pairs (Bradley-Terry). A `margin` "
        "column says by how much (Touvron et al., 2023). It reads the answer's last token that is not padding; where EOS is the padding "
        "token, the run's tokenizer pads with another special token, so that EOS is read."
    )
    fresh_head = True
    figures = _REWARDS

    name: Literal["reward"] = Field("reward", description="`reward`")
    center_rewards_coefficient: Positive | None = Field(
        0.01,
        description="Weight of the squared sum of the two rewards, which keeps them around zero (Eisenstein et al., 2023). With `null` "
        "the loss knows differences only, so a bias behind the last layer cannot learn.",
    )


TASKS: dict[str, type[TaskSection]] = {
    str(section.model_fields["name"].default): section
    for section in (
        CausalLMTask,
        SequenceClassificationTask,
        TokenClassificationTask,
        Seq2SeqTask,
        DPOTask,
        ORPOTask,
        SimPOTask,
        KTOTask,
        RewardTask,
    )
}
