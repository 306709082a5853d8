"""Gates of a recipe (``expect``) that could never be judged, found before anything is trained."""

from __future__ import annotations

from typing import Any

from peftcli.recipe.faults import Collector, place
from peftcli.recipe.nodes import Node, show
from peftcli.recipe.overrides import find
from peftcli.recipe.tasks import TaskSection
from peftcli.report import gates
from peftcli.report.catalogue import FIGURES, GENERATED

_MEASURED = ("eval", "eval_before", "comparisons")


def check(collector: Collector, task: type[TaskSection] | None, *, has_rows: bool) -> None:
    """Report every gate whose key is no figure of the report, or one that this recipe's run does not measure.

    Args:
        task: the class of its task's options; ``None`` where it names no task.
        has_rows: rows are held out.
    """
    root = collector.root
    section = find(root, "expect")
    for key in section.value if section is not None and isinstance(section.value, dict) else ():
        found = place(root, ["expect", key])
        if key not in gates.known():
            allowed = "eval.loss, eval.METRIC, train.peak_memory_bytes and the other numbers of report.json"
            collector.at(found, "is no figure of the report", key=True, found=show(key), allowed=allowed, nearest=gates.nearest_key(key))
        elif (why := _unmeasured(root, key, task, has_rows)) is not None:
            collector.at(found, why[0], key=True, found=show(key), allowed=why[1])


def _unmeasured(root: Node, key: str, task: type[TaskSection] | None, has_rows: bool) -> tuple[str, str] | None:
    """Why the run of this recipe does not measure ``key``, and what would make it; ``None`` where it does, as far as can be known."""
    part, _, rest = key.partition(".")
    if not has_rows and (part in _MEASURED or key.startswith("data.eval.")):
        return "is measured on held-out rows", "together with dataset.eval, or dataset.eval_fraction above 0"
    if part not in _MEASURED:
        return None
    if part != "eval" and _value(root, "eval.before") is False:
        return "needs the base model's figures", "together with eval.before: true"
    name = rest.partition(".")[0]
    if name in GENERATED:
        if _value(root, "eval.generate") is not True:
            return "is measured of generated answers", "together with eval.generate: true"
        listed = find(root, "eval.metrics")
        asked = [item.value for item in listed.value] if listed is not None and isinstance(listed.value, list) else ["exact_match"]
        if not any(isinstance(metric, str) and f"{name}_".startswith(f"{metric}_") for metric in asked):
            return "is not measured", f"together with {name.partition('_')[0] if name.startswith('rouge') else name} in eval.metrics"
    elif task is not None:
        own = ("loss", *task.figures_of.get(str(_value(root, "task.problem")), task.figures))
        if name in FIGURES and name not in own:
            return "is no figure of this task", ", ".join(own)
    return None


def _value(root: Node, key: str) -> Any:
    node = find(root, key)
    return None if node is None else node.value
