"""``peftcli merge``: fold an adapter into its base, save an ordinary model folder, and prove the two are the same."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from peftcli.commands.show import print_json
from peftcli.data.prepare import prepare_eval
from peftcli.errors import DataError, UsageError
from peftcli.merge import Parity, check, in_float32, logits_of, merge, parity, probe_rows
from peftcli.model.load import Base, quiet
from peftcli.output import put_in_place, write_model
from peftcli.recipe.schema import Recipe
from peftcli.result import open_result
from peftcli.tasks import registry as tasks
from peftcli.tasks.base import Task

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ROWS = 16
SPACE = "free some space or choose another folder."


def run(
    path: Path,
    output: Path,
    *,
    dtype: str | None,
    base_model: str | None,
    overwrite: bool,
    json: bool,
    trust_remote_code: bool,
    quantization: str | None = None,
) -> None:
    """Merge, save, reload, compare and print; see the command's help for the arguments."""
    check_output(output, dtype, overwrite=overwrite)
    result = open_result(path, base_model=base_model, quantization=quantization, trust_remote_code=trust_remote_code)
    if result.method is not None and not result.method.caps.mergeable:
        raise UsageError(f"{result.method.config.name} cannot be folded into the base: {result.method.costs}")
    device = next(result.model.parameters()).device
    rows = probe_rows(result.base.tokenizer, held_out(result.recipe, result.base, result.base_dir))
    # Both sides are computed in float32, so that what is compared is the merge and not the rounding of bfloat16 products.
    adapted = logits_of(result.task, in_float32(result.model), rows, device)
    stored = DTYPES[dtype] if dtype else result.base.dtype
    merged = merge(result.model, stored)
    write = partial(write_model, model=merged, tokenizer=result.base.tokenizer)
    put_in_place(output, write, hint=SPACE)
    del merged, write
    result.model = None
    exact = stored == torch.float32 and result.base.quantization is None
    compared = parity(adapted, logits_of(result.task, reload(result.task, output, device), rows, device), exact=exact)
    report(compared, output, json)
    check(compared, output)


def check_output(output: Path, dtype: str | None, *, overwrite: bool) -> None:
    """Raises:
    UsageError: the folder holds something, or there is no such dtype.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]) and not overwrite:
        raise UsageError(f"--output: {output} is not empty", hint="name another folder, or replace it with --overwrite.")


def held_out(recipe: Recipe | None, base: Base, base_dir: Path) -> list[Any]:
    """A few held-out rows of the run; none where it has none or its files are gone."""
    if recipe is None or not (recipe.dataset.eval or recipe.dataset.eval_fraction):
        return []
    try:
        section = recipe.dataset if recipe.dataset.eval_fraction else recipe.dataset.model_copy(update={"eval_limit": _ROWS})
        rows = tasks.make(recipe.task).rows(section, base.tokenizer)
        split = prepare_eval(rows, base_dir=base_dir, seed=recipe.train.seed, max_positions=base.max_positions)
    except DataError:
        return []
    return [split.first_ids(row) for row in range(min(_ROWS, split.counts.rows))]


def reload(task: Task[Any], folder: Path, device: torch.device) -> Any:
    """The saved folder as anybody would load it, then computing in float32."""
    import transformers

    with quiet():
        model: Any = getattr(transformers, task.auto_model).from_pretrained(folder, dtype="auto")
    return model.float().to(device).eval()


def report(compared: Parity, output: Path, json: bool, *, what: str = "merged model against base + adapter", **more: Any) -> None:
    """Print how far what was written is from what it stands for; ``more`` are further facts for the JSON."""
    facts = {
        "folder": str(output),
        **more,
        "passed": compared.passed,
        "max_difference": compared.max_difference,
        "kl": compared.kl,
        "top1_agreement": compared.top1,
        "positions": compared.positions,
        "limits": compared.limits,
    }
    if json:
        print_json(facts)
        return
    console = Console()
    verdict = "[green]the same model[/]" if compared.passed else "[red]not the same model[/]"
    if not compared.limits:
        verdict = "[yellow]an approximation[/]"
    console.print(f"{what}, {compared.positions} positions: {verdict}")
    console.print(f"  largest logit difference {compared.max_difference:.3g}, KL {compared.kl:.3g}, same top token {compared.top1:.2%}")
    console.print(f"  {output}", markup=False)
