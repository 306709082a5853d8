"""``peftcli data``: look at the rows of a recipe as the model sees them, and count what they cost."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftcli.commands.show import print_json
from peftcli.data.prepare import Prepared, Split, prepare
from peftcli.data.splits import LabelledSplit
from peftcli.errors import UsageError
from peftcli.methods import registry
from peftcli.model.load import Opened, open_base
from peftcli.plan import count_steps, make_plan
from peftcli.recipe.load import LoadedRecipe
from peftcli.report.text import number, percent, plural
from peftcli.tasks import registry as tasks
from peftcli.tasks.base import Task

_SHARES = (0.5, 0.9, 0.99)
_BAR = 40


def show(loaded: LoadedRecipe, *, split: str, rows: int, row: int | None, json: bool, trust_remote_code: bool) -> None:
    """Render rows with what is learned coloured; see the command's help for the arguments."""
    task, opened, data = _read(loaded, trust_remote_code)
    chosen = data.train if split == "train" else data.eval
    if chosen is None:
        raise UsageError("--split: the recipe has no held-out rows", hint="name them: dataset.eval or dataset.eval_fraction.")
    total = len(chosen.origins)
    if row is not None and row > total:
        raise UsageError(f"--row: there are {total:,} rows in this split, and {row} is none of them")
    wanted = [row - 1] if row is not None else range(min(rows, total))
    shown = [(index, task.show(chosen, index, opened.tokenizer)) for index in wanted]
    if json:
        lengths = chosen.lengths
        print_json(
            [
                {"row": index + 1, "origin": chosen.origins[index], "tokens": lengths[index], "units": chosen.units(index), "runs": runs}
                for index, runs in shown
            ]
        )
        return
    console = Console()
    lengths = chosen.lengths
    for index, runs in shown:
        head = f"row {index + 1} of {total:,}  {chosen.origins[index]}  {plural(lengths[index], 'token')}"
        console.print(Text(head, style="bold"))
        text = Text()
        for piece, learned in runs:
            text.append(piece if console.is_terminal or not learned else f"⟦{piece}⟧", style="bold green" if learned else "dim")
        console.print(text, soft_wrap=not console.is_terminal)
        console.print()
    what = "green" if console.is_terminal else "⟦ ⟧"
    console.print(f"What is learned stands in {what}.", style="dim", highlight=False)


def stats(loaded: LoadedRecipe, *, json: bool, trust_remote_code: bool) -> None:
    """Count lengths, truncation, padding waste, what is learned, duplicates and leakage."""
    _, _, data = _read(loaded, trust_remote_code)
    facts: dict[str, Any] = {"audit": data.audit.to_dict()}
    for name, split in (("train", data.train), ("eval", data.eval)):
        if split is not None:
            facts[name] = _lengths(split)
    plan = make_plan(loaded.recipe, data, 1)
    micros = [list(micro) for step in plan.epoch(0) for share in step.shares for micro in share if micro]
    widths = [np.asarray(part) for part in data.train.widths]
    padded = sum(int(part[micro].max()) * len(micro) for micro in micros for part in widths)
    facts["steps"] = count_steps(loaded.recipe, plan)
    facts["padding_waste"] = 1 - sum(plan.lengths) / padded
    if json:
        print_json(facts)
        return
    _print(Console(), facts, data)


def _read(loaded: LoadedRecipe, trust_remote_code: bool) -> tuple[Task[Any], Opened, Prepared]:
    recipe = loaded.recipe
    opened = open_base(recipe.base_model, base_dir=loaded.base_dir, trust_remote_code=trust_remote_code)
    task = tasks.make(recipe.task)
    rows = task.rows(recipe.dataset, opened.tokenizer)
    limit = registry.get(recipe.method.name)(recipe.method).row_limit(opened.max_positions)
    data = prepare(rows, base_dir=loaded.base_dir, seed=recipe.train.seed, max_positions=limit)
    task.settle(rows)
    return task, opened, data


def _lengths(split: Split) -> dict[str, Any]:
    """Tokens of the rows: extremes, quantiles and a histogram whose edges double."""
    lengths = np.asarray(split.lengths)
    top = 1 << int(lengths.max() - 1).bit_length() if lengths.max() > 1 else 1
    edges = [0, *(edge for edge in (8 << k for k in range(20)) if edge <= top)]
    edges += [top] if edges[-1] < top else []
    histogram = [
        {"over": low, "up_to": high, "rows": int(((lengths > low) & (lengths <= high)).sum())} for low, high in itertools.pairwise(edges)
    ]
    while histogram[0]["rows"] == 0:
        del histogram[0]
    counts = split.counts
    # A row with a label as a whole has no tokens that carry loss.
    supervised = None if isinstance(split, LabelledSplit) else counts.supervised_tokens
    return {
        "rows": counts.rows,
        "tokens": counts.tokens,
        "supervised": supervised,
        "supervised_share": None if supervised is None else supervised / counts.tokens,
        "truncated": counts.truncated,
        "dropped": counts.dropped,
        "shortest": int(lengths.min()),
        "mean": float(lengths.mean()),
        "longest": int(lengths.max()),
        "quantiles": {str(share): int(np.quantile(lengths, share, method="higher")) for share in _SHARES},
        "histogram": histogram,
    }


def _print(console: Console, facts: dict[str, Any], data: Prepared) -> None:
    console.print(Text(data.audit.summary, style="bold"))
    splits = [(name, facts[key]) for name, key in (("training", "train"), ("held out", "eval")) if key in facts]
    table = Table("", *(name for name, _ in splits))
    for column in table.columns[1:]:
        column.justify = "right"
    for key in ("rows", "tokens", "supervised", "truncated", "dropped", "shortest", "mean", "longest"):
        if facts["train"][key] is not None:
            share = "supervised_share" if key == "supervised" else None
            table.add_row(key, *(f"{number(split[key])}{f' ({percent(split[share])})' if share else ''}" for _, split in splits))
    for part in _SHARES:
        table.add_row(f"{part:.0%} of the rows have at most", *(f"{split['quantiles'][str(part)]:,} tokens" for _, split in splits))
    audit, held_out = data.audit, len(splits) > 1
    table.add_section()
    table.add_row("exact duplicates of an earlier row", number(audit.duplicates), *([""] if held_out else []))
    if held_out:
        table.add_row("in the training rows too", "", number(audit.leaked_rows))
        table.add_row("asked there, otherwise answered", "", number(audit.leaked_inputs - audit.leaked_rows))
    console.print(table)
    most = max(bin_["rows"] for bin_ in facts["train"]["histogram"])
    console.print("tokens in a training row", style="bold")
    for bin_ in facts["train"]["histogram"]:
        bar = "█" * round(_BAR * bin_["rows"] / most) or ("▏" if bin_["rows"] else "")
        console.print(f"{bin_['over'] + 1:>7,} to {bin_['up_to']:>6,}  {bar} {bin_['rows']:,}", highlight=False)
    waste = percent(facts["padding_waste"])
    console.print(
        f"\n{plural(facts['steps'], 'step')}. Where rows are padded, {waste} of what the model computes is padding (group_by_length lowers"
        " it); packed rows have none."
    )
    for note in data.audit.notes:
        console.print(f"note: {note}", style="yellow", markup=False)
