"""``peftcli methods``: the table of methods, or one explained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftcli.commands.show import print_json
from peftcli.methods import registry
from peftcli.probe import FAMILIES, Capabilities, capabilities, probe
from peftcli.recipe.schema import TrainSection
from peftcli.report.text import percent

# The model of a recipe to copy, by family.
_MODELS = {
    "llama": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "gpt2": "openai-community/gpt2",
    "bert": "google-bert/bert-base-uncased",
    "t5": "google/flan-t5-small",
}
_RECIPE = """base_model: {model}
method: {{name: {name}{options}}}
dataset: {{train: train.jsonl, eval_fraction: 0.05, max_length: 1024}}
train: {{epochs: 2, batch_size: 8, learning_rate: {rate:g}}}
output_dir: runs/{name}"""


def run(name: str | None, *, live: bool, json: bool) -> None:
    """Print all methods, or explain ``name``. ``live``: with what a probe finds now instead of the shipped results."""
    names = registry.names() if name is None else [name]
    for key in names:
        registry.get(key)
    found = [facts(key, probe(key) if live else capabilities(key)) for key in names]
    if json:
        print_json(found if name is None else found[0])
    elif name is None:
        console = Console()
        console.print(table(found))
        console.print(legend(found, live), style="dim", markup=False, highlight=False)
    else:
        explain(found[0])


def facts(name: str, can: Capabilities) -> dict[str, Any]:
    """What the registry knows of a method and what it was seen to do."""
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
        "choose": cls.choose,
        "paper": cls.paper,
        "trainable_share": can.share,
        "trainable_parameters": can.trained,
        "counted_on": can.counted_on,
        "mergeable": can.mergeable is None,
        "whole_model": cls.caps.whole_model,
        "nf4": can.works_over_nf4,
        "families": can.works_on,
        "peft": cls.peft.peft_type if cls.peft and cls.peft.stock else None,
        "reasons": reasons(can),
        "recommended": dict(cls.recommended),
        "options": options,
    }


def reasons(can: Capabilities) -> dict[str, str]:
    """Why a method cannot do what it was not seen to do: by family, over NF4, merging."""
    said = {family: reason for family, reason in can.families.items() if reason is not None}
    nf4 = {reason for reason in can.nf4.values() if reason is not None}
    said |= {"nf4": "; ".join(sorted(nf4))} if nf4 else {}
    return said | ({"merge": can.mergeable} if can.mergeable is not None else {})


def merges(row: dict[str, Any]) -> str:
    """A cell: whether the result can be folded into the base."""
    return "whole" if row["whole_model"] else "yes" if row["mergeable"] else "no"


def among(works: Sequence[str], tried: Sequence[str]) -> str:
    """A cell: ``yes`` where there is no exception, else the exceptions, or what works where that is shorter."""
    if not works or len(works) == len(tried):
        return "yes" if works else "no"
    missing = [family for family in tried if family not in works]
    few, word = (missing, "not ") if len(missing) < len(works) else (list(works), "")
    return word + ", ".join(FAMILIES[family].title for family in few)


def families(row: dict[str, Any]) -> str:
    """A cell: the families that a method works on."""
    return "all" if len(row["families"]) == len(FAMILIES) else among(row["families"], list(FAMILIES))


def table(rows: list[dict[str, Any]]) -> Table:
    """All methods, one a line."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("method", "trains", "merges", "NF4", "families", "PEFT type", "paper"):
        whole = title in ("method", "paper")
        shown.add_column(title, justify="right" if title == "trains" else "left", overflow="fold", no_wrap=whole)
    for row in rows:
        shown.add_row(
            Text(row["name"], style="bold"),
            percent(row["trainable_share"]),
            merges(row),
            among(row["nf4"], row["families"]),
            families(row),
            row["peft"] or "-",
            row["paper"].rpartition("/")[2],
        )
    return shown


def legend(rows: list[dict[str, Any]], live: bool) -> str:
    """What the columns of :func:`table` mean."""
    counted = list(dict.fromkeys(row["counted_on"] for row in rows))
    others = "".join(f"; {', '.join(r['name'] for r in rows if r['counted_on'] == model)}: of {model}'s" for model in counted[1:])
    titles = ", ".join(family.title for family in FAMILIES.values())
    return (
        f"trains: share of {counted[0]}'s parameters with default options{others}. merges: whole is a result that needs no base.\n"
        f"families: {titles}. NF4: over a 4-bit base. Papers are on arxiv.org.\n"
        f"All of it was {'found just now' if live else 'found'} by applying, training and merging each method on tiny models.\n"
        "`peftcli methods NAME` explains one and gives a recipe to copy."
    )


def explain(found: dict[str, Any]) -> None:
    """One method: what it solves, what it costs, when to choose it, what it was seen to do, its options, and a recipe to copy."""
    console = Console()
    console.print(Text(found["name"], style="bold"), Text(f"  {found['summary']}"))
    console.print()
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    on = [FAMILIES[family].title for family in found["families"]]
    over = [FAMILIES[family].title for family in found["nf4"]]
    lines = {
        "solves": found["solves"],
        "costs": found["costs"],
        "choose it for": found["choose"],
        "trains": f"{percent(found['trainable_share'])} of {found['counted_on']}: {found['trainable_parameters']:,} numbers by default",
        "families": ", ".join(on) or "none",
        "NF4 base": ", ".join(over) or "no",
        "merges": merges(found),
        "PEFT type": found["peft"] or "none: stock PEFT does not have it",
        "paper": found["paper"],
    }
    if found["recommended"]:
        lines["sets"] = ", ".join(f"{k}: {v}" for k, v in found["recommended"].items()) + "  (where the recipe does not)"
    for name, reason in found["reasons"].items():
        title = FAMILIES[name].title if name in FAMILIES else {"nf4": "NF4", "merge": "merging"}[name]
        lines[f"no {title}" if name != "merge" else "no merging"] = reason
    for title, text in lines.items():
        if text:
            facts.add_row(title, Text(text))
    console.print(facts)
    if found["options"]:
        options = Table(title="options", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for title in ("option", "default", "meaning"):
            options.add_column(title, overflow="fold")
        for option in found["options"]:
            options.add_row(option["name"], _default(option["default"]), Text(option["meaning"] or ""))
        console.print()
        console.print(options)
    console.print("a recipe to copy\n", style="bold")
    console.print(recipe_for(found), markup=False, soft_wrap=True)


def _default(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def recipe_for(found: dict[str, Any]) -> str:
    """A short recipe that uses the method, with a model that it works on."""
    names = [option["name"] for option in found["options"]]
    family = next((family for family in _MODELS if family in found["families"]), "llama")
    kind = found["recommended"].get("base_model.quantization")
    model = _MODELS[family] if kind is None else f"{{name: {_MODELS[family]}, quantization: {kind}}}"
    return _RECIPE.format(
        name=found["name"],
        model=model,
        options=", rank: 16, alpha: 32" if {"rank", "alpha"} <= set(names) else "",
        rate=found["recommended"].get("train.learning_rate", TrainSection.model_fields["learning_rate"].default),
    )
