"""Rules between fields of a recipe. They read the tree, so they are reported together with faults of single fields."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peftcli.recipe import gate_rules
from peftcli.recipe.faults import Collector, place
from peftcli.recipe.nodes import Node, show
from peftcli.recipe.overrides import find
from peftcli.recipe.tasks import TASKS, TaskSection


def check(collector: Collector, task: type[TaskSection] | None) -> None:
    """Report every rule that the recipe breaks.

    Args:
        task: the class of its task's options; ``None`` where it names no task.
    """
    root = collector.root

    def value(key: str) -> Any:
        node = find(root, key)
        return None if node is None or isinstance(node.value, (dict, list)) else node.value

    def fault(key: str, message: str, allowed: str) -> None:
        found = place(root, key.split("."))
        node = found.node
        collector.at(found, message, found=_text(node), allowed=allowed)

    _exclusive(root, value, fault)
    dataset = find(root, "dataset")
    if dataset is None or not isinstance(dataset.value, dict):
        return  # the missing section is a fault of its own
    held_out = find(root, "dataset.eval")
    has_rows = (held_out is not None and held_out.value is not None) or value("dataset.eval_fraction") not in (None, 0, 0.0)
    rows = "dataset.eval, or dataset.eval_fraction above 0"
    for key in ("train.load_best_model_at_end", "train.early_stopping_patience"):
        if value(key) not in (None, False):
            if not has_rows:
                fault(key, "needs held-out rows", f"together with {rows}")
            if value("train.eval_steps") is None:
                fault(key, "needs evaluations during training", "together with train.eval_steps")
    if value("eval.generate") is True and not has_rows:
        fault("eval.generate", "needs held-out rows", f"together with {rows}")
    measures = find(root, "eval.metrics")
    listed = measures.value if measures is not None and isinstance(measures.value, list) else []
    if {item.value for item in listed if isinstance(item.value, str)} - {"exact_match"} and value("eval.generate") is not True:
        fault("eval.metrics", "measures generated answers", "together with eval.generate: true")
    if value("train.frozen_products") is not None and value("base_model.quantization") is not None:
        fault("train.frozen_products", "is for dense weights; these are quantized", "null, or without base_model.quantization")
    gate_rules.check(collector, task, has_rows=has_rows)
    if task is not None:
        _fits_task(root, task, value, fault)


def _fits_task(root: Node, task: type[TaskSection], value: Callable[[str], Any], fault: Callable[[str, str, str], None]) -> None:
    name = task.model_fields["name"].default
    allowed = ", ".join(("auto", *task.formats))
    known = {format for other in TASKS.values() for format in other.formats}
    for key in ("dataset.format", *_source_formats(root)):
        if value(key) in known - set(task.formats):
            fault(key, f"does not fit task {name}", allowed)
    if value("eval.generate") is True and not task.generates:
        fault("eval.generate", f"task {name} writes no answers", "false")
    if value("dataset.streaming") is True and not task.streams:
        fault("dataset.streaming", f"does not fit task {name}, whose rows are kept in memory", "false or null")
    if value("train.head_learning_rate") is not None and not task.fresh_head:
        fault("train.head_learning_rate", f"task {name} has no fresh output layer", "null")


def _source_formats(root: Node) -> list[str]:
    """Dotted keys of the formats that single sources name."""
    keys = []
    for part in ("train", "eval"):
        sources = find(root, f"dataset.{part}")
        if sources is not None and isinstance(sources.value, list):
            keys += [f"dataset.{part}.{index}.format" for index in range(len(sources.value))]
    return keys


def _exclusive(root: Node, value: Callable[[str], Any], fault: Callable[[str, str, str], None]) -> None:
    if value("train.batch_tokens") is not None and value("train.batch_size") is not None:
        fault("train.batch_tokens", "excludes train.batch_size", "one of the two; set the other to null or leave it out")
    size = find(root, "train.batch_size")
    if size is not None and size.value is None and value("train.batch_tokens") is None:
        fault("train.batch_size", "must not be null without train.batch_tokens", "a number for one of the two")
    if value("train.warmup_steps") is not None and value("train.warmup_ratio") not in (None, 0, 0.0):
        fault("train.warmup_steps", "excludes train.warmup_ratio", "one of the two; leave the other out")
    if value("train.memory_budget") is not None and value("train.gradient_checkpointing") is True:
        fault("train.memory_budget", "excludes train.gradient_checkpointing: true", "one of the two; the budget decides what is recomputed")
    held_out = find(root, "dataset.eval")
    if held_out is not None and held_out.value is not None and value("dataset.eval_fraction") not in (None, 0, 0.0):
        fault("dataset.eval_fraction", "excludes dataset.eval", "one of the two; set the other to null or leave it out")


def _text(node: Node) -> str | None:
    return None if isinstance(node.value, (dict, list)) else show(node.text, node.plain)
