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
from peftcli.model.load import quiet
from peftcli.output import put_in_place, write_model
from peftcli.result import Result, open_result

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ROWS = 16


def run(
    path: Path, output: Path, *, dtype: str | None, base_model: str | None, overwrite: bool, json: bool, trust_remote_code: bool
) -> None:
    """Merge, save, reload, compare and print; see the command's help for the arguments."""
    if dtype is not None and dtype not in _DTYPES:
        raise UsageError(f"--dtype: {dtype!r} is not one of {', '.join(_DTYPES)}")
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]) and not overwrite:
        raise UsageError(f"--output: {output} is not empty", hint="name another folder, or replace it with --overwrite.")
    result = open_result(path, base_model=base_model, trust_remote_code=trust_remote_code)
    if result.method is not None and not result.method.caps.mergeable:
        raise UsageError(f"{result.method.config.name} cannot be folded into the base: {result.method.costs}")
    device = next(result.model.parameters()).device
    rows = probe_rows(result.base.tokenizer, _held_out(result))
    # Both sides are computed in float32, so that what is compared is the merge and not the rounding of bfloat16 products.
    adapted = logits_of(in_float32(result.model), rows, device)
    merged = merge(result.model, _DTYPES[dtype] if dtype else result.base.dtype)
    write = partial(write_model, model=merged, tokenizer=result.base.tokenizer)
    put_in_place(output, write, hint="free some space or choose another folder.")
    del merged, write
    result.model = None
    compared = parity(adapted, logits_of(_reload(output, device), rows, device), exact=_exact(result, dtype))
    report(compared, output, json)
    check(compared, output)


def _exact(result: Result, dtype: str | None) -> bool:
    stored = _DTYPES[dtype] if dtype else result.base.dtype
    return stored == torch.float32 and result.base.quantization is None


def _held_out(result: Result) -> list[Any]:
    """A few held-out rows of the run; none where it has none or its files are gone."""
    recipe = result.recipe
    if recipe is None or not (recipe.dataset.eval or recipe.dataset.eval_fraction):
        return []
    try:
        section = recipe.dataset if recipe.dataset.eval_fraction else recipe.dataset.model_copy(update={"eval_limit": _ROWS})
        split = prepare_eval(
            section, result.base.tokenizer, base_dir=result.base_dir, seed=recipe.train.seed, max_positions=result.base.max_positions
        )
    except DataError:
        return []
    return list(split.input_ids[:_ROWS])


def _reload(folder: Path, device: torch.device) -> Any:
    """The saved folder as anybody would load it, then computing in float32."""
    from transformers import AutoModelForCausalLM

    with quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return model.float().to(device).eval()


def report(compared: Parity, output: Path, json: bool) -> None:
    """Print how far the merged model is from base + adapter."""
    facts = {
        "folder": str(output),
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
    console.print(f"merged model against base + adapter, {compared.positions} positions: {verdict}")
    console.print(f"  largest logit difference {compared.max_difference:.3g}, KL {compared.kl:.3g}, same top token {compared.top1:.2%}")
    console.print(f"  {output}", markup=False)
