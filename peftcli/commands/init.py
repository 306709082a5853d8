"""``peftcli init``: write a recipe to start from: a commented one, or one chosen for a model, rows and a machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftcli.advise import Advice, advise, parse_memory
from peftcli.commands.show import print_json
from peftcli.errors import UsageError
from peftcli.recipe.load import parse_recipe
from peftcli.recipe.render import commented_recipe
from peftcli.report.text import size


def run(path: Path, *, model: str | None, data: str | None, method: str | None, memory: str | None, overwrite: bool, json: bool) -> None:
    """Write the recipe, say why it is as it is, and what to do next."""
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists already", hint="name another file, or replace it with --overwrite.")
    given = {"base_model.name": model, "dataset.train": data, "method.name": method}
    advice = None
    if model is not None and data is not None:
        advice = advise(model, data, path, memory=parse_memory(memory) if memory else None, method=method)
    elif memory is not None:
        raise UsageError("--memory: there is nothing to fit into it", hint="name the model and the rows as well: --model M --data FILE.")
    text = advice.text if advice else commented_recipe({key: value for key, value in given.items() if value is not None})
    parse_recipe(text, str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error
    if json:
        chosen: dict[str, Any] = {} if advice is None else {"values": advice.values, "why": shown(advice)}
        chosen |= {} if advice is None else {"memory_bytes": advice.need.total, "budget_bytes": advice.budget}
        print_json({"file": str(path), **chosen})
        return
    console = Console()
    if advice is not None:
        console.print(table(advice))
        peak = f"{size(advice.need.total)} at the peak, during {advice.need.moment}"
        console.print(f"estimated memory: {peak}; {size(advice.budget)} {advice.whose}", markup=False)
    console.print(f"wrote {path}; next: peftcli check {path}, then peftcli train {path}", markup=False)


def shown(advice: Advice) -> dict[str, str]:
    """The reasons of what the recipe holds."""
    return {key: reason for key, reason in advice.why.items() if key in advice.values}


def table(advice: Advice) -> Table:
    """Each choice with its reason."""
    made = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    made.add_column(style="bold", overflow="fold")
    made.add_column(overflow="fold")
    for key, reason in shown(advice).items():
        made.add_row(Text(f"{key}: {advice.values[key]}"), Text(reason))
    return made
