"""The recipe: a closed, typed schema. What a user may write, with its default and its meaning.

A section's fields carry their own descriptions: the README's recipe reference, the JSON Schema for editors and
``peftcli init`` are generated from them. Names are Hugging Face's wherever they have one. The ``method`` section
belongs to the method itself (``peftcli.methods``), so a new method brings its options along.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, field_validator, model_validator

from peftcli.methods.base import MethodConfig
from peftcli.recipe.sizes import SIZE
from peftcli.recipe.tasks import CausalLMTask, TaskSection
from peftcli.report.gates import COMPARISON

DType = Literal["auto", "float32", "bfloat16"]
Quantization = Literal["nf4", "fp4", "int8"]
Format = Literal[
    "auto",
    "alpaca",
    "sharegpt",
    "messages",
    "prompt_completion",
    "text",
    "classification",
    "text_to_text",
    "tagging",
    "preference",
    "preference_sharegpt",
    "preference_alpaca",
    "preference_implicit",
    "kto",
    "kto_messages",
]
Truncation = Literal["keep_start", "keep_end", "drop", "split", "error"]
Scheduler = Literal["cosine", "linear", "constant"]
AnswerMetric = Literal["exact_match", "numeric_match", "rouge", "bleu", "chrf"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "sgd"]

PositiveInt = Annotated[int, Field(ge=1)]
Comparison = Annotated[str, Field(pattern=COMPARISON, examples=["<= 1.20", ">= 0.8"])]
MemorySize = Annotated[str, Field(pattern=SIZE, examples=["24GB", "512MiB"])]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A closed section: unknown keys are faults, values are not coerced across kinds."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True, protected_namespaces=())


class BaseModelSection(Section):
    """The model that is fine-tuned. A plain string is taken as its ``name``."""

    name: str = Field(
        min_length=1,
        description="A hub id, a folder, a `.gguf` file, or `package:<import name>[/<path inside>]` for weights that an installed "
        "Python package carries.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model. Pin a commit for repeatable runs.")
    dtype: DType = Field(
        "auto",
        description="Number format of the frozen weights and of the computation. `auto`: bfloat16 where the machine computes in it "
        "natively, else float32. Trained parameters are always float32.",
    )
    quantization: Quantization | None = Field(
        None, description="Load the frozen linear layers in 4 bits (`nf4`, `fp4`) or 8 bits (`int8`) through bitsandbytes."
    )
    double_quantization: bool = Field(True, description="Quantize the 4-bit scales once more (saves about 0.4 bits for each weight).")
    new_tokens: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="Tokens to add to the vocabulary. Their embeddings are trained and saved with the adapter."
    )


class SourceSection(Section):
    """One source of rows. A plain string is taken as its ``path``."""

    path: str = Field(
        min_length=1, description="A file (JSON, JSONL, CSV, Parquet, optionally .gz), a folder of such files, or a hub dataset id."
    )
    name: str | None = Field(None, description="Configuration of a hub dataset.")
    split: str | None = Field(
        None, description="Split of a hub dataset (default: `train` for training, `test` or `validation` for evaluation)."
    )
    revision: str | None = Field(None, description="Revision of a hub dataset.")
    weight: float = Field(
        1.0,
        gt=0.0,
        le=1000.0,
        description="How often the rows of this source appear, relative to once: 0.5 takes every other row, 2 takes each twice.",
    )
    limit: PositiveInt | None = Field(None, description="Take only the first N rows of this source.")
    format: Format | None = Field(None, description="Format of this source when it differs from the section's.")
    columns: dict[str, str] | None = Field(None, description="Column mapping of this source when it differs from the section's.")
    header: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="Names of the columns of a CSV or TSV file whose first line is a row already."
    )
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = Field(
        None, description="Read the file as a table, whatever its name, with this character between the cells."
    )
    encoding: str = Field("utf-8", description="Encoding of text files, such as `latin-1` or `gb18030`.")
    pattern: str | None = Field(
        None,
        description="Read the file line by line, whatever its name: a regular expression that each line matches and whose named groups "
        "are the columns.",
    )


class DatasetSection(Section):
    """The rows to learn from. A plain string is taken as ``train``."""

    train: list[SourceSection] = Field(min_length=1, description="One source or a list of sources.")
    eval: Annotated[list[SourceSection], Field(min_length=1)] | None = Field(
        None, description="Held-out rows: one source or a list. Excludes `eval_fraction`."
    )
    eval_fraction: Fraction = Field(0.0, description="Hold out this fraction of the training rows when there is no `eval`.")
    format: Format = Field(
        "auto",
        description="`alpaca` (instruction, input, output), `sharegpt` (conversations: from, value), `messages` (role, content), "
        "`prompt_completion`, `text`, `classification` (text, label [text_pair]), `text_to_text` (source, target), "
        "`tagging` (tokens, tags); pairs of answers: `preference` (prompt, chosen, rejected), `preference_sharegpt` (conversations, "
        "chosen, rejected), `preference_alpaca` (instruction, chosen, rejected), `preference_implicit` (chosen, rejected); single answers: "
        "`kto` (prompt, completion, label), `kto_messages` (messages, label); `auto` looks at the columns.",
    )
    columns: dict[str, str] = Field(
        {},
        description="Column mapping, ours: yours, for example `{prompt: question, completion: answer}`. A dot leads into a column: "
        "`{output: instances.0.output}`.",
    )
    chat_template: str | None = Field(
        None, description="A shipped template's name or a path to a Jinja file; default: the tokenizer's own."
    )
    system: str | None = Field(None, description="System prompt put before conversations that have none.")
    max_length: PositiveInt = Field(1024, description="Longest row in tokens.")
    truncation: Truncation = Field(
        "keep_start",
        description="What happens to longer rows: keep the start or the end, drop the row, split it (`text` only), or stop with an "
        "error. Every case is counted in the report.",
    )
    train_on: Literal["completions", "all"] = Field(
        "completions", description="Which tokens carry loss: the completions (every assistant turn), or all tokens."
    )
    shuffle: bool = Field(True, description="Visit the rows in a new order each epoch, a pure function of the seed.")
    group_by_length: bool = Field(False, description="Put rows of similar length into the same step.")
    on_error: Literal["fail", "skip"] = Field(
        "fail",
        description="What happens to faulty rows: stop with their places, or leave them out, count them and list them in `skipped.jsonl`.",
    )
    deduplicate: bool = Field(
        False, description="Leave out training rows that repeat an earlier one exactly. They are counted and reported either way."
    )
    streaming: bool | None = Field(
        None,
        description="Read training rows as a stream and keep their tokens in a cache on disk that is keyed by content: memory holds a few "
        "bytes for each row, whatever its length, and a hub dataset is not downloaded as a whole first. `null`: from 64 MB of data on. "
        "For task `causal_lm`; the rows of others are kept in memory.",
    )
    num_proc: PositiveInt | None = Field(None, description="Processes that tokenize a stream. `null`: one for each core, at most 8.")
    limit: PositiveInt | None = Field(None, description="Use only the first N training rows.")
    eval_limit: PositiveInt | None = Field(None, description="Use only the first N held-out rows.")

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        if isinstance(value, (str, dict)):
            value = [value]
        if isinstance(value, list):
            value = [{"path": item} if isinstance(item, str) else item for item in value]
        return value


class TrainSection(Section):
    """The loop."""

    epochs: float = Field(1.0, gt=0.0, le=10_000.0, description="How often each row is visited.")
    max_steps: PositiveInt | None = Field(None, description="Stop after this many optimizer steps, whatever `epochs` says.")
    batch_size: PositiveInt | None = Field(8, description="Rows for each process and accumulation step, laid end to end without padding.")
    batch_tokens: PositiveInt | None = Field(None, description="In place of `batch_size`: as many rows as fit into this many tokens.")
    gradient_accumulation_steps: PositiveInt = Field(
        1, description="Batches whose gradients are summed before a step. The loss is the mean over all supervised tokens of the step."
    )
    learning_rate: float = Field(2e-4, gt=0.0, lt=100.0, description="Peak learning rate.")
    head_learning_rate: float | None = Field(
        None,
        gt=0.0,
        lt=100.0,
        description="Peak learning rate of a task's fresh output layer, and of a pooler that is trained with it; `null`: the same.",
    )
    scheduler: Scheduler = Field("cosine", description="Learning rate after the warm-up: `cosine` or `linear` to zero, or `constant`.")
    warmup_ratio: Fraction = Field(0.03, description="Fraction of the steps in which the learning rate rises from zero.")
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(None, description="In place of `warmup_ratio`: the number of steps.")
    weight_decay: float = Field(0.0, ge=0.0, lt=10.0, description="Decoupled weight decay of matrices; never of biases and norms.")
    max_grad_norm: float | None = Field(1.0, gt=0.0, description="Clip the gradient to this norm; `null` does not clip.")
    optimizer: Optimizer = Field(
        "adamw",
        description="`adamw` and `sgd`, `adafactor` from torch; `adamw_8bit`, `paged_adamw`, `paged_adamw_8bit` from bitsandbytes (GPU).",
    )
    adam_beta1: Fraction = Field(0.9, description="AdamW's first decay rate.")
    adam_beta2: Fraction = Field(0.999, description="AdamW's second decay rate.")
    adam_epsilon: float = Field(1e-8, gt=0.0, description="AdamW's term for numerical stability.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(42, description="Decides initial values, order and dropout.")
    logging_steps: PositiveInt = Field(10, description="Write a line to `metrics.jsonl` every N steps.")
    eval_steps: PositiveInt | None = Field(None, description="Evaluate the held-out rows every N steps (always at the end).")
    save_steps: PositiveInt | None = Field(None, description="Write a checkpoint every N steps (`null`: only the result).")
    save_total_limit: PositiveInt = Field(2, description="Keep this many of the newest checkpoints (the best one is kept beside them).")
    gradient_checkpointing: bool = Field(
        False, description="Recompute the activations of every layer in the backward pass: least memory, most time."
    )
    memory_budget: MemorySize | None = Field(
        None,
        description="Stay within this much memory: of the process on a CPU, of torch's tensors on a GPU. As few layers as possible are "
        "recomputed in the backward pass, and on a GPU, where that is not enough, their inputs wait in the host's memory; `peftcli check` "
        "shows the plan. No result changes by a bit. `null`: nothing is recomputed.",
    )
    load_best_model_at_end: bool = Field(False, description="End with the weights of the lowest held-out loss; needs `eval_steps`.")
    early_stopping_patience: PositiveInt | None = Field(
        None, description="Stop after this many evaluations without improvement; needs `eval_steps`."
    )
    early_stopping_threshold: float = Field(0.0, ge=0.0, description="Smallest fall of the held-out loss that counts as improvement.")
    deterministic: bool = Field(True, description="Use deterministic kernels only; refuse options that have none.")
    fast_paths: bool = Field(
        True, description="Take faster computations of the same results where there are any; the report names those that were taken."
    )
    frozen_products: Literal["fp8", "int8", "int8_backward"] | None = Field(
        None,
        description="Multiply by the frozen linear layers in 8 bits while training: faster, with rounding errors of one or two hundredths "
        "in each product. `fp8` for GPUs of compute capability 8.9 on and `int8` for CPUs with VNNI or AMX, at two more bytes for each "
        "frozen weight; `int8_backward` only on the way back, at one, so that the loss stays exact and gradients nearly so. Adapters, "
        "output layer, norms and evaluation stay as they are.",
    )
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "comet_ml", "trackio"]] = Field(
        [], description="Experiment trackers, through Accelerate."
    )

    @model_validator(mode="before")
    @classmethod
    def _in_place_of(cls, value: Any) -> Any:
        """``batch_tokens`` and ``warmup_steps`` stand in place of their twins, which then have no default of their own."""
        if isinstance(value, dict):
            for given, twin, off in (("batch_tokens", "batch_size", None), ("warmup_steps", "warmup_ratio", 0.0)):
                if value.get(given) is not None and twin not in value:
                    value = {**value, twin: off}
        return value


class EvalSection(Section):
    """What is measured on the held-out rows, before, during (`train.eval_steps`) and after training."""

    generate: bool = Field(
        False,
        description="Also let the model write its answers, each time, and measure them (`metrics`). Held-out rows that ask the same are "
        "answered once, and measured against all their answers.",
    )
    metrics: Annotated[list[AnswerMetric], Field(min_length=1)] = Field(
        ["exact_match"],
        description="How generated answers are measured: `exact_match`; `numeric_match` (the number that both end up with, as for GSM8K); "
        "`rouge` (ROUGE-1, -2 and -L); `bleu` and `chrf` (sacreBLEU).",
    )
    max_new_tokens: PositiveInt = Field(128, description="Longest generated answer in tokens.")
    generate_limit: PositiveInt | None = Field(None, description="Generate for only the first N requests of the held-out rows.")
    batch_size: PositiveInt = Field(16, description="Rows evaluated at once. Has no influence on the results.")
    examples: Annotated[int, Field(ge=0, le=100)] = Field(3, description="Example answers shown in the report.")
    before: bool = Field(True, description="Measure the base model as well, before training.")


class Recipe(Section):
    """A whole recipe. ``method`` is an instance of the named method's own ``Config``, ``task`` of the named task's section."""

    base_model: BaseModelSection
    task: SerializeAsAny[TaskSection] = Field(default_factory=CausalLMTask)
    method: SerializeAsAny[MethodConfig]
    dataset: DatasetSection
    train: TrainSection = Field(default_factory=TrainSection)
    eval: EvalSection = Field(default_factory=EvalSection)
    expect: dict[str, Comparison] = Field(
        {},
        description='Gates: keys of `report.json` with what they have to be, such as `eval.loss: "<= 1.20"`, `eval.exact_match`, '
        "`train.peak_memory_bytes`, `comparisons.loss.p_value`. `train` and `eval` judge them, and end with exit code 10 where one fails.",
    )
    output_dir: str = Field("runs/default", min_length=1, description="Folder that the run writes into.")

    @field_validator("base_model", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("dataset", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"train": value} if isinstance(value, (str, list)) else value
