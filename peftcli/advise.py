"""Choose a method and settings for a model, rows and a machine, and say why: what `peftcli init --model M --data FILE` writes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from peftcli.data.formats import detect
from peftcli.data.sources import open_source, read_source
from peftcli.errors import DataError, UsageError
from peftcli.estimate import Estimate
from peftcli.forecast import Forecast, forecast
from peftcli.methods import registry
from peftcli.recipe.load import LoadedRecipe, parse_recipe
from peftcli.recipe.render import commented_recipe
from peftcli.recipe.schema import SourceSection, TrainSection
from peftcli.recipe.sizes import parse_size
from peftcli.recipe.tasks import CausalLMTask
from peftcli.report.text import size

__all__ = ["Advice", "advise", "parse_memory"]

# Rows whose lengths are looked at, and the share of a machine's memory that a run may take.
_SAMPLE, _SHARE = 1000, 0.9
# Rows that make training every weight worth its memory.
_MANY = 10_000
# Names that columns have in the wild, the likeliest first.
_QUESTIONS = ("question", "query", "problem", "request", "source", "input", "context", "prompt", "instruction")
_ANSWERS = ("answer", "response", "reply", "solution", "target", "output", "summary", "completion")
_TEXTS = ("content", "document", "body", "sentence", "article")
# Batch size and gradient checkpointing, fastest first.
_LADDER = tuple((batch, saving) for saving in (False, True) for batch in (8, 4, 2, 1))


@dataclass(frozen=True)
class Advice:
    """A recipe with the reason of each choice.

    Attributes:
        text: the recipe, commented. ``why``: dotted key -> reason. ``values``: dotted key -> value.
        need: its memory. ``budget``: bytes that there are; ``whose``: where they are.
    """

    text: str
    values: dict[str, Any]
    why: dict[str, str]
    need: Estimate
    budget: int
    whose: str


def parse_memory(text: str) -> int:
    """Bytes of ``24GB``, ``512 MiB`` and the like.

    Raises:
        UsageError: it is no size.
    """
    try:
        return parse_size(text)
    except ValueError as error:
        raise UsageError(f"--memory: {error}", hint="write a number and a unit, such as 24GB, 512MB or 16GiB.") from None


def advise(model: str, data: str, output: Path, *, memory: int | None = None, method: str | None = None) -> Advice:
    """Look at the model's config, at the rows and at the machine, and choose.

    Args:
        output: where the recipe will lie. ``memory``: bytes that the run may take; default: what the machine has free.
        method: take this one.

    Raises:
        UsageError: nothing fits; says what the smallest choice would take.
        PeftcliError: the model or the rows cannot be read.
    """
    base = output.absolute().parent
    values: dict[str, Any] = {"base_model.name": model, "dataset.train": data}
    why: dict[str, str] = {}
    rows = _rows(data, base, values, why)
    seen = _measure(values, output, why, rows)
    budget, whose = _budget(memory, seen)
    _train(rows, values, why)
    chosen, need = _fit(values, output, seen, rows, budget, whose, method, why)
    chosen["output_dir"] = f"runs/{re.sub(r'[^A-Za-z0-9._-]+', '-', Path(data).stem) or 'run'}-{chosen['method.name']}"
    said = {key: reason for key, reason in why.items() if key in chosen}
    return Advice(commented_recipe(chosen, said), chosen, why, need, budget, whose)


def _rows(data: str, base: Path, values: dict[str, Any], why: dict[str, str]) -> int:
    """The number of rows; chooses a format for columns that need one."""
    rows = read_source(open_source(SourceSection.model_validate({"path": data}), base_dir=base, role="train")).rows
    columns = list(dict.fromkeys(name for row in rows for name in row.values))
    try:
        format = detect(columns, {}, data, CausalLMTask.formats)
    except DataError:
        format, mapping = _mapping(columns)
        if not format:
            raise
        values |= {"dataset.format": format, "dataset.columns": mapping}
        pairs = ", ".join(f"{theirs} as {ours}" for ours, theirs in mapping.items())
        why["dataset.columns"] = f"the columns are {', '.join(columns)}: takes {pairs}"
        why["dataset.format"] = (
            "asks through the chat template where the model has one" if format == "alpaca" else "one document in each row"
        )
    else:
        why["dataset.train"] = f"{len(rows):,} rows in the format {format}"
    why.setdefault("dataset.train", f"{len(rows):,} rows")
    return len(rows)


def _mapping(columns: Sequence[str]) -> tuple[str, dict[str, str]]:
    """(format, our columns: theirs) for columns of other names; an empty format where none is known."""
    lower = {name.lower(): name for name in columns}
    asked = next((lower[name] for name in _QUESTIONS if name in lower), None)
    answered = next((lower[name] for name in _ANSWERS if name in lower and lower[name] != asked), None)
    if asked and answered:
        return "alpaca", {"instruction": asked, "output": answered}
    text = next((lower[name] for name in _TEXTS if name in lower), None)
    return ("text", {"text": text}) if text else ("", {})


def _measure(values: dict[str, Any], output: Path, why: dict[str, str], rows: int) -> Forecast:
    """Tokenize a sample, choose ``max_length`` and what is held out, and read the rows as the run will."""
    probe = {**values, "method.name": "lora", "dataset.max_length": 2**20, "dataset.limit": _SAMPLE}
    lengths = np.asarray(forecast(_parsed(probe, output)).data.train.lengths)
    longest, most = int(lengths.max()), int(np.percentile(lengths, 99))
    wanted = longest if longest <= 1.25 * most else most
    values["dataset.max_length"] = max(64, math.ceil(wanted / 64) * 64)
    why["dataset.max_length"] = (
        f"of {len(lengths):,} rows half have up to {int(np.median(lengths))} tokens, 99 % up to {most}, the longest {longest}"
    )
    if rows >= 40:
        fraction = 0.1 if rows < 1000 else 0.05 if rows < 20_000 else 0.01
        values["dataset.eval_fraction"] = fraction
        why["dataset.eval_fraction"] = f"about {round(rows * fraction):,} rows tell whether what is learned holds for others"
    sample = {} if rows <= _SAMPLE else {"dataset.limit": _SAMPLE}
    return forecast(_parsed({**values, **sample, "method.name": "lora"}, output))


def _budget(memory: int | None, seen: Forecast) -> tuple[int, str]:
    """(bytes, whose they are)."""
    if memory is not None:
        return memory, "given"
    if seen.device.type == "cuda":
        return int(torch.cuda.mem_get_info(seen.device)[0]), "free on the GPU"
    return int(psutil.virtual_memory().available), "free on this machine"


def _train(rows: int, values: dict[str, Any], why: dict[str, str]) -> None:
    epochs = next(count for least, count in ((50_000, 1), (5_000, 2), (500, 3), (0, 5)) if rows >= least)
    values["train.epochs"] = epochs
    why["train.epochs"] = f"{rows:,} rows: {'once is enough' if epochs == 1 else 'the fewer rows, the more often each is seen'}"


def _fit(
    values: dict[str, Any],
    output: Path,
    seen: Forecast,
    rows: int,
    budget: int,
    whose: str,
    method: str | None,
    why: dict[str, str],
) -> tuple[dict[str, Any], Estimate]:
    """The first method and the fastest settings that fit, with their memory."""
    names = [method] if method else (["full"] if rows >= _MANY else []) + ["lora", "qlora"]
    together = 16 if rows >= 1000 else 8
    tried: dict[str, Estimate] = {}
    for name in names:
        # The smallest settings first: where they do not fit, no others need be tried.
        smallest = _LADDER[-1]
        tried[name] = seen.need(_parsed(_settings(values, name, smallest, together), output).recipe)
        if tried[name].total > _SHARE * budget:
            continue
        for step in _LADDER:
            chosen = _settings(values, name, step, together)
            need = tried[name] if step == smallest else seen.need(_parsed(chosen, output).recipe)
            if need.total <= _SHARE * budget:
                too_large = [other for other, least in tried.items() if least.total > _SHARE * budget]
                why |= _reasons(name, step, together, too_large, rows, given=method is not None)
                return chosen, need
    least = min(tried, key=lambda name: tried[name].total)
    raise UsageError(
        f"nothing fits into {size(budget)} ({whose}): the smallest choice, {least} with one row at a time and gradient checkpointing, "
        f"needs {size(tried[least].total)} ({tried[least].moment})",
        hint=f"--memory {math.ceil(tried[least].total / _SHARE / 1e8) / 10:g}GB would do; else take a smaller model or shorter rows.",
    )


def _settings(values: dict[str, Any], name: str, step: tuple[int, bool], together: int) -> dict[str, Any]:
    batch, saving = step
    recommended = registry.get(name).recommended
    chosen: dict[str, Any] = {**values, "method.name": name, "train.batch_size": batch}
    chosen |= {"train.gradient_accumulation_steps": together // batch} if together > batch else {}
    chosen |= {"train.gradient_checkpointing": True} if saving else {}
    chosen["train.learning_rate"] = TrainSection.model_fields["learning_rate"].default
    return chosen | {key: value for key, value in recommended.items() if key != "base_model.double_quantization"}


def _reasons(name: str, step: tuple[int, bool], together: int, too_large: list[str], rows: int, *, given: bool) -> dict[str, str]:
    """Why these settings. No figure that differs from one moment to the next: the same question gives the same recipe."""
    enough = "enough" if rows >= _MANY else "too few"
    fits = (
        f"{' and '.join(too_large)} would not fit even with one row at a time"
        if too_large
        else f"{rows:,} rows are {enough} to train every weight"
    )
    return {
        "method.name": "asked for" if given else fits,
        "base_model.quantization": "holds the base in a quarter of the memory",
        "train.batch_size": "rows at once fit" + ("" if step[0] == _LADDER[0][0] else ", more do not"),
        "train.gradient_accumulation_steps": f"{together} rows for each step of the optimizer",
        "train.gradient_checkpointing": "recomputes activations, which takes time: without it nothing fits",
        "train.learning_rate": f"what {name} recommends",
    }


def _parsed(values: dict[str, Any], output: Path) -> LoadedRecipe:
    return parse_recipe(commented_recipe(values), str(output))
