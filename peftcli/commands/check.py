"""``peftcli check``: everything that can be known about a run without training."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

from peftcli.commands.show import print_json
from peftcli.data.audit import plain_example, render_example
from peftcli.data.prepare import prepare
from peftcli.estimate import Estimate, estimate, fake_model
from peftcli.methods import registry
from peftcli.model.load import load_tokenizer, resolve_dtype
from peftcli.model.source import resolve
from peftcli.plan import count_steps, make_plan
from peftcli.recipe.load import LoadedRecipe
from peftcli.report.text import percent, size
from peftcli.result import default_device


def run(loaded: LoadedRecipe, *, json: bool, trust_remote_code: bool) -> None:
    """Validate, count, estimate and show one example; see the command's help."""
    recipe = loaded.recipe
    section = recipe.base_model
    source = resolve(section.name, loaded.base_dir)
    tokenizer = load_tokenizer(source, section.revision, trust_remote_code=trust_remote_code)
    if section.new_tokens:
        tokenizer.add_tokens(list(section.new_tokens))
    device = default_device()
    dtype = resolve_dtype(section.dtype, device)
    method = registry.get(recipe.method.name)(recipe.method)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # A method whose result is a whole model trains float32 weights, whatever the computation's dtype.
    storage = torch.float32 if method.caps.whole_model else dtype
    model = fake_model(source, section.revision, storage, mode, trust_remote_code=trust_remote_code)
    positions = getattr(model.config, "max_position_embeddings", None)
    data = prepare(recipe.dataset, tokenizer, base_dir=loaded.base_dir, seed=recipe.train.seed, max_positions=method.row_limit(positions))
    plan = make_plan(recipe, data, 1)
    process = psutil.Process().memory_info().rss if device.type == "cpu" else 0
    need = estimate(model, method, recipe, data.train, plan, dtype, mode, program=process)
    facts: dict[str, Any] = {
        "valid": True,
        "model": {
            "name": section.name,
            "parameters": need.parameters,
            "trainable_parameters": need.trainable,
            "dtype": str(dtype).removeprefix("torch."),
        },
        "method": recipe.method.name,
        "steps": count_steps(recipe, plan),
        "train": counts(data.train),
        "eval": counts(data.eval) if data.eval else None,
        "memory_bytes": {name: getattr(need, name) for name in _PARTS} | {"total": need.total},
        "label_audit": data.audit.to_dict(),
    }
    if json:
        print_json(facts)
        return
    show(facts, need, data, device.type)


_PARTS = ("weights", "gradients", "optimizer", "activations", "workspace", "program")


def counts(split: Any) -> dict[str, int]:
    """Rows and tokens of a split, with what was cut or left out."""
    found = split.counts
    return {name: getattr(found, name) for name in ("rows", "tokens", "supervised_tokens", "truncated", "dropped", "longest")}


def show(facts: dict[str, Any], need: Estimate, data: Any, device: str) -> None:
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
        f"estimated peak memory of a step on the {device}: [bold]{size(need.total)}[/] ({parts}); the allocator's own caches come on top"
    )
    for note in data.audit.notes:
        console.print(f"note: {note}", style="yellow", markup=False)
    console.print("\none row as the model sees it; only the highlighted tokens are learned:", style="bold")
    if console.is_terminal:
        console.print(render_example(data.audit))
    else:
        console.print(plain_example(data.audit), markup=False, highlight=False)
