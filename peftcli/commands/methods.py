"""``peftcli methods``: the table of methods, or one explained."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftcli.commands.show import print_json
from peftcli.methods import registry
from peftcli.recipe.schema import TrainSection

_RECIPE = """base_model: HuggingFaceTB/SmolLM2-135M-Instruct
method: {{name: {name}{options}}}
dataset: {{train: rows.jsonl, eval_fraction: 0.05, max_length: 1024}}
train: {{epochs: 2, batch_size: 8, learning_rate: {rate:g}}}
output_dir: runs/{name}"""


def run(name: str | None, *, json: bool) -> None:
    """Print all methods, or explain ``name``."""
    if name is None:
        rows = [facts(key) for key in registry.names()]
        if json:
            print_json(rows)
        else:
            Console().print(table(rows))
        return
    found = facts(name)
    if json:
        print_json(found)
    else:
        explain(found)


def facts(name: str) -> dict[str, Any]:
    """What the registry knows of a method."""
    cls = registry.get(name)
    options = [
        {"name": key, "default": field.get_default(call_default_factory=True), "meaning": field.description}
        for key, field in cls.Config.model_fields.items()
        if key != "name"
    ]
    return {
        "name": name,
        "summary": cls.summary,
        "solves": cls.solves,
        "costs": cls.costs,
        "paper": cls.paper,
        "mergeable": cls.caps.mergeable,
        "quantized_base": cls.caps.quantized_base,
        "whole_model": cls.caps.whole_model,
        "peft": cls.peft.peft_type if cls.peft and cls.peft.stock else None,
        "recommended": dict(cls.recommended),
        "options": options,
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """All methods, one a line."""
    shown = Table(show_lines=False)
    for title in ("method", "what it does", "4-bit base", "merges", "PEFT type", "paper"):
        shown.add_column(title, overflow="fold")
    for row in rows:
        shown.add_row(
            row["name"],
            row["summary"],
            "yes" if row["quantized_base"] else "no",
            "yes" if row["mergeable"] else "no",
            row["peft"] or "-",
            row["paper"],
        )
    return shown


def explain(found: dict[str, Any]) -> None:
    """One method: what it solves, what it costs, its options, and a recipe to copy."""
    console = Console()
    console.print(Text(found["name"], style="bold"), Text(f"  {found['summary']}"))
    console.print(f"\nsolves  {found['solves']}\ncosts   {found['costs']}\npaper   {found['paper']}", markup=False)
    if found["recommended"]:
        console.print(
            "sets    " + ", ".join(f"{k}: {v}" for k, v in found["recommended"].items()) + "  (where the recipe does not)", markup=False
        )
    if found["options"]:
        options = Table(title="options", title_justify="left")
        for title in ("option", "default", "meaning"):
            options.add_column(title, overflow="fold")
        for option in found["options"]:
            options.add_row(option["name"], str(option["default"]), Text(option["meaning"] or ""))
        console.print()
        console.print(options)
    console.print("\na recipe to copy\n", style="bold")
    console.print(recipe_for(found), markup=False)


def recipe_for(found: dict[str, Any]) -> str:
    """A short recipe that uses the method."""
    names = [option["name"] for option in found["options"]]
    options = ", rank: 16, alpha: 32" if {"rank", "alpha"} <= set(names) else ""
    kind = found["recommended"].get("base_model.quantization")
    model = "" if kind is None else f", quantization: {kind}"
    text = _RECIPE.format(
        name=found["name"],
        options=options,
        rate=found["recommended"].get("train.learning_rate", TrainSection.model_fields["learning_rate"].default),
    )
    if model:
        first, rest = text.split("\n", 1)
        text = f"base_model: {{name: {first.partition(': ')[2]}{model}}}\n{rest}"
    return text
