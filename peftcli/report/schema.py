"""``report.json``: the closed, versioned account of a run that other programs read.

Plain numbers are finite; where a quantity has no finite value it is ``null`` and ``notes`` says why (``finite`` turns
NaN and infinity into ``None``). Shares such as accuracies are between 0 and 1, times are seconds, sizes are bytes,
losses are nats for each supervised token. Fields may be added within version 2; none changes its meaning or goes.
"""

from __future__ import annotations

import json
import math
from importlib import resources
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from peftcli.report.catalogue import FIGURES, GENERATED

Status = Literal["completed", "interrupted", "failed", "stopped_early"]

SCHEMA_FILE = "report.schema.json"


def finite(value: float | None) -> float | None:
    """``value``, or ``None`` where it is NaN or infinite: report.json holds no such number."""
    return value if value is not None and math.isfinite(value) else None


def _encodable(text: Any) -> Any:
    """Text from data files may hold half a surrogate pair, which no UTF-8 file can; it becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(text, str) else text


def _json_only(value: dict[str, Any]) -> dict[str, Any]:
    """A free part holds what JSON holds. The error names the path of the first value that it does not."""

    def walk(item: Any, place: str) -> Any:
        if item is None or isinstance(item, (str, bool, int)):
            return _encodable(item)
        if isinstance(item, float):
            if not math.isfinite(item):
                raise ValueError(f"{place or 'value'} is {item}; report.json holds finite numbers only (use null and a note)")
            return item
        if isinstance(item, dict):
            for key in item:
                if not isinstance(key, str):
                    raise ValueError(f"{place or 'value'} has the key {key!r}; keys are strings")
            return {key: walk(inner, f"{place}.{key}" if place else key) for key, inner in item.items()}
        if isinstance(item, (list, tuple)):
            return [walk(inner, f"{place}[{index}]") for index, inner in enumerate(item)]
        raise ValueError(f"{place or 'value'} is a {type(item).__name__}, which JSON does not hold")

    return {key: walk(inner, str(key)) for key, inner in value.items()}


def _relative(path: str) -> str:
    parts = path.split("/")
    if path.startswith("/") or "\\" in path or ".." in parts or "" in parts:
        raise ValueError(f"{path!r} is not a path relative to the run's folder, written with '/'")
    return path


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"the interval's low end {pair[0]} is above its high end {pair[1]}")
    return pair


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Free = Annotated[dict[str, Any], AfterValidator(_json_only)]
RelativePath = Annotated[str, Field(min_length=1), AfterValidator(_relative)]
Text = Annotated[str, BeforeValidator(_encodable)]
Interval = Annotated[tuple[float, float], AfterValidator(_ordered)]


class Part(BaseModel):
    """A closed part of the report: unknown fields and non-finite numbers are refused."""

    model_config = ConfigDict(
        extra="forbid", allow_inf_nan=False, protected_namespaces=(), json_schema_serialization_defaults_required=True
    )


class ModelInfo(Part):
    """The base model."""

    name: str = Field(description="As the recipe names it.")
    revision: str | None = Field(None, description="Commit of a hub model.")
    sha256: Sha256 | None = Field(None, description="Hash of the weight file(s) of a local model.")
    dtype: str = Field(description="Number format of the frozen weights, such as `bfloat16`.")
    quantization: str | None = Field(None, description="`nf4`, `fp4`, `int8` or null.")
    architecture: str = Field(description="Class of the model, such as `LlamaForCausalLM`.")
    parameters: Count = Field(description="Parameters of the base model.")
    trainable_parameters: Count = Field(description="Parameters that were trained.")


class MethodInfo(Part):
    """The fine-tuning method."""

    name: str
    options: Free = Field(default_factory=dict, description="The method's resolved options.")
    paper: str = Field("", description="Address of the reference.")


class SplitInfo(Part):
    """What one split holds after formatting, tokenizing and truncation."""

    rows: Count
    tokens: Count
    supervised_tokens: Count = Field(description="Tokens that carry loss.")
    truncated: Count = Field(0, description="Rows that were cut to `max_length`.")
    dropped: Count = Field(0, description="Rows that were left out.")
    longest: Count = Field(0, description="Tokens of the longest row.")


class DataFile(Part):
    """A data file that was read."""

    path: str = Field(description="As the recipe names it.")
    sha256: Sha256 | None = None


class DataInfo(Part):
    """The rows that were learned from and the held-out ones."""

    train: SplitInfo
    eval: SplitInfo | None = None
    files: list[DataFile] = Field(default_factory=list)
    batch_order_sha256: Sha256 | None = Field(None, description="Hash of the row numbers in the order of the steps.")


class TrainInfo(Part):
    """The training itself."""

    steps: Count = Field(description="Optimizer steps taken, those before a resume included.")
    epochs: Amount
    loss_first: float | None = Field(description="Loss of the first logged step.")
    loss_last: float | None = Field(description="Loss of the last logged step.")
    loss_best: float | None = Field(None, description="Lowest held-out loss seen during training.")
    best_step: Count | None = Field(None, description="Step of `loss_best`.")
    tokens: Count = Field(description="Tokens that went through the model in training.")
    supervised_tokens: Count
    seconds: Amount = Field(description="Wall time of the loop, without evaluation and loading.")
    tokens_per_second: Amount
    supervised_tokens_per_second: Amount
    peak_memory_bytes: Count
    peak_memory_kind: Literal["resident", "allocated"] = Field(
        description="`resident`: the process's resident set; `allocated`: torch's GPU memory."
    )
    peak_memory_phase: str | None = Field(None, description="When it was reached, such as `training` or `loading`.")
    predicted_memory_bytes: Count | None = Field(None, description="What was predicted of it, where `train.memory_budget` is set.")
    memory_plan: str | None = Field(None, description="What was recomputed for it, such as `24 of 30 layers saved, 6 recomputed`.")
    world_size: Annotated[int, Field(ge=1)] = 1
    batch_order: str = Field(description="How rows were ordered, such as `shuffled, seed 42`.")
    optimizer: str
    resumed_from: str | None = Field(None, description="Checkpoint that the run continued from.")
    fast_paths: list[str] = Field(default_factory=list, description="Faster computations in use, by name.")


class EvalInfo(Part):
    """Measurements on the held-out rows. Plain numbers; their 95 % intervals stand beside them in `intervals`."""

    loss: float = Field(description="Mean loss of a supervised token (of a row, where each is judged as a whole), in nats.")
    metrics: dict[str, float] = Field(
        default_factory=dict, description=f"Figures of the task by name: {', '.join(name for name in FIGURES if name != 'loss')}."
    )
    supervised_tokens: Count = Field(description="What the loss is the mean over: tokens that carry loss, or rows.")
    rows: Count
    generated: Count | None = Field(None, description="Rows that an answer was generated for.")
    intervals: dict[str, Interval] = Field(default_factory=dict, description="Metric name to [low, high], 95 %.")
    seconds: Amount = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in self.intervals:
            if name != "loss" and name not in self.metrics:
                raise ValueError(f"intervals: {name!r} names no metric; there are: {', '.join(('loss', *self.metrics))}")
        for name in GENERATED:
            if name in self.metrics and not self.generated:
                raise ValueError(f"{name} needs `generated`, the number of answers that it is a figure of")
        return self

    def figure(self, name: str) -> float | None:
        """The loss or a metric by name; ``None`` where it was not measured."""
        return self.loss if name == "loss" else self.metrics.get(name)


class PairedTest(Part):
    """One figure of the tuned model minus that of the base model on the same held-out rows, and whether chance could have made it."""

    difference: float
    interval: Interval = Field(description="[low, high] of the difference, 95 %.")
    p_value: Share = Field(description="Two-sided, of no difference.")
    test: Literal["mcnemar", "bootstrap"] = Field(
        description="`mcnemar`: exact, for shares of rows; `bootstrap`: paired, over rows drawn anew 1,000 times (p is at least 0.002)."
    )


class Example(Part):
    """One held-out request with its expected answer and what the model wrote before and after training."""

    prompt: Text
    reference: Text
    before: Text | None = None
    after: Text | None = None
    correct_before: bool | None = None
    correct_after: bool | None = None


class Environment(Part):
    """What the run ran on. ``fingerprint`` hashes what byte identity depends on."""

    peftcli: str
    python: str
    platform: str
    torch: str
    transformers: str
    accelerate: str | None = None
    bitsandbytes: str | None = None
    safetensors: str | None = None
    tokenizers: str | None = None
    datasets: str | None = None
    peft: str | None = None
    cuda: str | None = None
    driver: str | None = None
    device: str = Field(description="`cpu`, `cuda`, ...")
    device_name: str | None = None
    cpu_capability: str | None = Field(None, description="Instruction set that torch uses, such as `AVX512`.")
    kernels: str | None = Field(None, description="The compiled arithmetic: a hash of its source, compiler and instructions.")
    threads: Annotated[int, Field(ge=1)]
    deterministic: bool
    fingerprint: Sha256


class LiveAdapterCheck(Part):
    """Result of reading the saved weights back from disk."""

    passed: bool
    keys: Count = Field(description="Tensors in the file.")
    missing: list[str] = Field(default_factory=list)
    unexpected: list[str] = Field(default_factory=list)
    non_finite: list[str] = Field(default_factory=list)
    unmoved: list[str] = Field(default_factory=list, description="Tensors equal to their initial values.")
    loss_before_save: float | None = None
    loss_after_reload: float | None = None
    note: str | None = None


class Gate(Part):
    """One line of the recipe's ``expect``."""

    key: str = Field(description="Dotted key of this report, such as `eval.loss`.")
    expected: str = Field(description="Comparison that was asked for, such as `<= 1.20`.")
    found: float | None = Field(description="null: it was not measured.")
    passed: bool


class Checks(Part):
    """The two gates of every run."""

    label_audit: Free = Field(
        default_factory=dict, description="Counts before the first step; `example` is a list of [text, supervised] pairs."
    )
    live_adapter: LiveAdapterCheck | None = Field(None, description="null: nothing was saved.")


class Report(Part):
    """The whole report of one run."""

    report_version: Literal[2] = 2
    status: Status
    error: Text | None = Field(None, description="Why the run failed, in one or a few lines.")
    created: str | None = Field(None, description="UTC time at which the run ended, ISO 8601.")
    model: ModelInfo
    method: MethodInfo
    data: DataInfo
    train: TrainInfo
    eval_before: EvalInfo | None = Field(None, description="The base model, measured before training; null: not measured.")
    eval: EvalInfo | None = Field(None, description="The tuned model. Required where held-out rows exist and the run ended well.")
    comparisons: dict[str, PairedTest] = Field(
        default_factory=dict, description="Tuned against base by metric, `loss` among them; empty where not both were measured."
    )
    examples: list[Example] = Field(default_factory=list)
    environment: Environment
    files: dict[RelativePath, Sha256] = Field(
        default_factory=dict, description="Relative path to SHA-256 of what the run wrote, the report itself excepted."
    )
    checks: Checks = Field(default_factory=Checks)
    gates: list[Gate] = Field(default_factory=list, description="What the recipe expects of the run (`expect`), judged.")
    notes: list[str] = Field(default_factory=list, description="What a reader must know, such as why a number is null.")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        held_out = self.data.eval is not None and self.data.eval.rows > 0
        if held_out and self.eval is None and self.status in ("completed", "stopped_early"):
            raise ValueError("eval is required: the run has held-out rows and ended well, so it must report their loss")
        if self.status == "failed" and not self.error:
            raise ValueError("error is required where status is 'failed'")
        return self


def json_schema() -> dict[str, Any]:
    """The JSON Schema of ``report.json`` as it is written (every field present)."""
    schema = Report.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def json_schema_text() -> str:
    """The content of the shipped ``report.schema.json``."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def shipped_schema_text() -> str:
    """``report.schema.json`` as it lies in the installed package."""
    return resources.files("peftcli.report").joinpath(SCHEMA_FILE).read_text(encoding="utf-8")
