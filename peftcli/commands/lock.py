"""``peftcli lock``: write down what a recipe's run would be made of, without running it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from peftcli import environment
from peftcli import lock as locks
from peftcli.commands.show import print_json
from peftcli.forecast import forecast
from peftcli.recipe.load import LoadedRecipe
from peftcli.report.text import plural


def run(
    loaded: LoadedRecipe, output: Path, *, processes: int, init_adapter: Path | None, check: bool, json: bool, trust_remote_code: bool
) -> None:
    """Write the lock to ``output``, or with ``check`` compare it with what is there; see the command's help."""
    settings = loaded.recipe.train
    environment.make_repeatable(settings.seed, deterministic=settings.deterministic)
    seen = forecast(loaded, trust_remote_code=trust_remote_code)
    recipe = loaded.recipe.model_copy(update={"task": seen.task.section})
    found = locks.make_lock(recipe, seen.opened, seen.data, processes, init_adapter=init_adapter)
    if check:
        locks.refuse(locks.read_lock(output), found, str(output))
    else:
        locks.write_lock(output, found)
    if json:
        print_json(found.model_dump(mode="json"))
        return
    files, here = plural(len(found.data), "data file"), found.environment
    Console().print(
        f"{output} {'holds' if check else 'written'}: base model, tokenizer, {files}, {plural(len(found.recipe), 'setting')}, "
        f"{plural(found.steps, 'step')}, torch {here.torch} on {here.device_name or here.device}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
