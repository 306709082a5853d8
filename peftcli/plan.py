"""What a recipe comes to: the order of the rows, the number of steps, and what identifies the run."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from peftcli.data.batching import Plan
from peftcli.data.prepare import Prepared
from peftcli.recipe.load import LoadedRecipe
from peftcli.recipe.schema import Recipe

# Settings that may change when a run is resumed: they do not influence the weights.
_FREE = (
    "dataset.streaming",
    "train.logging_steps",
    "train.save_steps",
    "train.save_total_limit",
    "train.memory_budget",
    "train.report_to",
    "dataset.num_proc",
    "output_dir",
    "eval.",
    "expect.",
)


def make_plan(recipe: Recipe, data: Prepared, processes: int) -> Plan:
    """The order of the rows for the whole run."""
    settings = recipe.train
    return Plan(
        lengths=data.train.lengths,
        batch_size=settings.batch_size,
        batch_tokens=settings.batch_tokens,
        accumulation=settings.gradient_accumulation_steps,
        processes=processes,
        seed=settings.seed,
        shuffle=recipe.dataset.shuffle,
        group_by_length=recipe.dataset.group_by_length,
    )


def count_steps(recipe: Recipe, plan: Plan) -> int:
    """Optimizer steps of the run: ``max_steps``, else those of the epochs, a fraction of an epoch rounded up."""
    if recipe.train.max_steps is not None:
        return recipe.train.max_steps
    whole, rest = int(recipe.train.epochs), recipe.train.epochs - int(recipe.train.epochs)
    steps = sum(len(plan.epoch(epoch)) for epoch in range(whole))
    return max(1, steps + math.ceil(round(rest * len(plan.epoch(whole)), 6))) if rest else steps


def epochs_of(plan: Plan, steps: int) -> int:
    """How many epochs a run of ``steps`` steps begins."""
    epochs, left = 0, steps
    while left > 0:
        left -= len(plan.epoch(epochs))
        epochs += 1
    return epochs


def decisive(recipe: Recipe) -> dict[str, Any]:
    """Every setting that the weights depend on, flat, but for what names a place: a model or a file is known by its content."""
    flat = {key: value for key, value in flatten(recipe).items() if not key.startswith(_FREE)}
    for key in ("base_model.name", "base_model.revision", "base_model.dtype", "dataset.chat_template"):
        del flat[key]
    for key in ("dataset.train", "dataset.eval"):
        sources = flat.pop(key) or []
        flat |= {
            f"{key}.{number}.{name}": value
            for number, source in enumerate(sources)
            for name, value in source.items()
            if name != "path" and value is not None
        }
    return flat


def identity(recipe: Recipe, data: Prepared, total_steps: int, processes: int) -> dict[str, Any]:
    """What a resumed run must share with the one that it goes on with, flat, by dotted name."""
    flat = {key: value for key, value in flatten(recipe).items() if not key.startswith(_FREE)}
    files = {f"file {path}": digest for path, digest in data.files}
    return {**flat, **files, "processes": processes, "total steps": total_steps}


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Every value of a recipe by its dotted name."""
    flat: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{path}.{key}" if path else key)
        else:
            flat[path] = value

    walk(recipe.model_dump(mode="json"), "")
    return flat


def resolved(loaded: LoadedRecipe, recipe: Recipe, dtype: str, folder: Path) -> Recipe:
    """The recipe as the run's folder keeps it: with the dtype that the machine decided, and local paths as seen from there.

    Args:
        loaded: says where its relative paths start. ``recipe``: the loaded one, with what the run has settled.
    """

    def seen(path: str | None) -> str | None:
        if path is None or Path(path).is_absolute() or not loaded.resolve_path(path).exists():
            return path
        return os.path.relpath(loaded.resolve_path(path).resolve(), folder.resolve())

    def sources(section: Any) -> Any:
        return [s.model_copy(update={"path": seen(s.path)}) for s in section] if section else section

    model = recipe.base_model.model_copy(update={"dtype": dtype, "name": seen(recipe.base_model.name)})
    rows = recipe.dataset
    dataset = rows.model_copy(update={"train": sources(rows.train), "eval": sources(rows.eval), "chat_template": seen(rows.chat_template)})
    return recipe.model_copy(update={"base_model": model, "dataset": dataset})
