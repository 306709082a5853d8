"""``peftcli check``: everything that can be known about a run without training."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from peftcli.commands.show import print_json
from peftcli.data.audit import plain_example, render_example
from peftcli.estimate import Estimate
from peftcli.forecast import forecast
from peftcli.plan import count_steps
from peftcli.recipe.load import LoadedRecipe
from peftcli.recipe.schema import Recipe
from peftcli.report.text import percent, size


def run(loaded: LoadedRecipe, *, json: bool, trust_remote_code: bool) -> None:
    """Validate, count, estimate and show one example; see the command's help."""
    recipe = loaded.recipe
    seen = forecast(loaded, trust_remote_code=trust_remote_code)
    data, plan, need = seen.data, seen.plan(recipe), seen.need(recipe)
    facts: dict[str, Any] = {
        "valid": True,
        "model": {
            "name": recipe.base_model.name,
            "parameters": need.parameters,
            "trainable_parameters": need.trainable,
            "dtype": str(seen.dtype).removeprefix("torch."),
        },
        "method": recipe.method.name,
        "steps": count_steps(recipe, plan),
        "train": counts(data.train),
        "eval": counts(data.eval) if data.eval else None,
        "memory_bytes": {name: getattr(need, name) for name in _PARTS} | {"total": need.total, "moment": need.moment},
        "memory_plan": str(need.plan),
        "label_audit": data.audit.to_dict(),
    }
    if json:
        print_json(facts)
        return
    show(facts, need, data, seen.device.type, not_counted(recipe, seen.device.type))


_PARTS = ("weights", "gradients", "optimizer", "activations", "allocator", "copies", "program")


def not_counted(recipe: Recipe, device: str) -> str:
    """What the estimate leaves out, for this recipe."""
    parts = ["further processes"] if device == "cpu" else ["the allocator's own caches", "the host's memory"]
    return ", ".join([*parts, *(["the cache of generated answers"] if recipe.eval.generate else [])])


def counts(split: Any) -> dict[str, int]:
    """Rows and tokens of a split, with what was cut or left out."""
    found = split.counts
    return {name: getattr(found, name) for name in ("rows", "tokens", "supervised_tokens", "truncated", "dropped", "longest")}


def show(facts: dict[str, Any], need: Estimate, data: Any, device: str, left_out: str) -> None:
    """The same for a person."""
    console = Console()
    model = facts["model"]
    console.print(
        f"{model['name']}: {need.parameters:,} parameters, {need.trainable:,} trained "
        f"({percent(need.trainable / need.parameters)}) by {facts['method']}",
        markup=False,
    )
    table = Table()
    for title in ("rows", "train", "held out"):
        table.add_column(title, justify="left" if title == "rows" else "right")
    for name in facts["train"]:
        held = facts["eval"][name] if facts["eval"] else None
        table.add_row(name.replace("_", " "), f"{facts['train'][name]:,}", "-" if held is None else f"{held:,}")
    console.print(table)
    console.print(f"{facts['steps']:,} optimizer steps; every epoch trains {facts['train']['rows']:,} rows")
    parts = ", ".join(f"{name} {size(getattr(need, name))}" for name in _PARTS if getattr(need, name))
    console.print(
        f"estimated peak memory on the {device}: [bold]{size(need.total)}[/], during {need.moment} ({parts}); not counted: {left_out}"
    )
    if need.plan.choices:
        console.print(f"plan: {need.plan}")
    for note in data.audit.notes:
        console.print(f"note: {note}", style="yellow", markup=False)
    console.print("\none row as the model sees it; only the highlighted tokens are learned:", style="bold")
    if console.is_terminal:
        console.print(render_example(data.audit))
    else:
        console.print(plain_example(data.audit), markup=False, highlight=False)
