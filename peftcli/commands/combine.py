"""``peftcli merge`` of several adapters: combine what they change, and write a merged model or one adapter."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from peftcli.adapters import Adapters, names_of, open_adapters
from peftcli.combine import RULES, LowRank, Rule, combinations, combine, low_rank
from peftcli.commands.merge import DTYPES, SPACE, check_output, held_out, reload, report
from peftcli.errors import CheckFailed, UsageError
from peftcli.interchange import hf_peft
from peftcli.interchange.low_rank import apply_factors
from peftcli.merge import check, in_float32, logits_of, merge, parity, probe_rows
from peftcli.methods.base import Context
from peftcli.output import put_in_place, write_model
from peftcli.result import QUANTIZATIONS, Place
from peftcli.tasks.base import Task

FORMS = ("model", "adapter")
# What the authors of TIES keep, and what PEFT's examples keep of DARE's.
_DENSITY = {"ties": 0.2, "dare": 0.5}


def run(
    paths: Sequence[Path],
    output: Path,
    *,
    weights: str | None,
    rule: str | None,
    density: float | None,
    rank: int | None,
    seed: int | None,
    form: str,
    dtype: str | None,
    base_model: str | None,
    quantization: str | None,
    overwrite: bool,
    as_json: bool,
    trust_remote_code: bool,
) -> None:
    """Combine, save, reload, compare and print; see the command's help for the arguments."""
    check_output(output, dtype, overwrite=overwrite)
    chosen = _rule(rule or "linear", density, rank, seed, form)
    if form == "adapter" and dtype is not None:
        raise UsageError("--dtype is of a merged model; adapters are written in float32")
    if quantization is not None and quantization not in (*QUANTIZATIONS, "none"):
        raise UsageError(f"--quantization: {quantization!r} is not one of {', '.join((*QUANTIZATIONS, 'none'))}")
    numbers = _weights(weights, len(paths), chosen)
    named = names_of(paths)
    adapters, places = open_adapters(named, base_model=base_model, quantization=quantization, trust_remote_code=trust_remote_code)
    facts: dict[str, Any] = {
        "form": form,
        "combine": rule or "linear",
        "adapters": {n: [str(named[n]), w] for n, w in zip(named, numbers, strict=True)},
    }
    if chosen.name in _DENSITY:
        facts["density"] = chosen.density
    rows = probe_rows(adapters.base.tokenizer, held_out(places[0].recipe, adapters.base, places[0].base_dir))
    if form == "adapter":
        _write_adapter(adapters, numbers, chosen, rank, rows, output, places[0], facts, as_json)
        return
    device = next(adapters.model.parameters()).device
    task = places[0].task
    model = combine(adapters, numbers, chosen)
    _some(model)
    if chosen.name == "svd":
        facts["rank"] = next(iter(combinations(model).values())).rule.rank
    stored = DTYPES[dtype] if dtype else adapters.base.dtype
    expected, model = _expected(task, model, chosen, rows, device)
    merged = merge(model, stored)
    put_in_place(output, partial(write_model, model=merged, tokenizer=adapters.base.tokenizer), hint=SPACE)
    # The weighted sum is compared with the adapters' own forward passes, over the base as it is stored.
    exact = stored == torch.float32 and (adapters.base.quantization is None or chosen.name != "linear")
    del merged, model, adapters
    compared = parity(expected, logits_of(task, reload(task, output, device), rows, device), exact=exact)
    report(compared, output, as_json, what=f"merged model against {_in_words(facts)}", **facts)
    check(compared, output)


def _rule(name: str, density: float | None, rank: int | None, seed: int | None, form: str) -> Rule:
    if name not in RULES:
        raise UsageError(f"--combine: {name!r} is not one of {', '.join(RULES)}")
    if form not in FORMS:
        raise UsageError(f"--as: {form!r} is not one of {', '.join(FORMS)}")
    if density is not None and name not in _DENSITY:
        raise UsageError(f"--density is for --combine {' and '.join(_DENSITY)}; {name} keeps every entry")
    if density is not None and not 0.0 < density <= 1.0:
        raise UsageError(f"--density: {density} is not above 0 and at most 1")
    if seed is not None and name != "dare":
        raise UsageError(f"--seed is for --combine dare; {name} draws no random numbers")
    if rank is not None and name != "svd" and form != "adapter":
        raise UsageError("--rank is for --combine svd and --as adapter; a merged model holds changes of any rank")
    # An adapter's file has a rank whatever the rule: there, svd and a sum that is cut to a rank are the same.
    plain = "linear" if name == "svd" and form == "adapter" else name
    return Rule(plain, density or _DENSITY.get(name, 1.0), seed or 0, rank)


def _weights(text: str | None, count: int, rule: Rule) -> list[float]:
    if text is None:
        return [1.0 if rule.name == "ties" else 1.0 / count] * count
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--weights: {text!r} is no list of numbers", hint="write them with commas: --weights 0.7,0.3") from None
    if len(numbers) != count:
        raise UsageError(f"--weights: {len(numbers)} weights for {count} adapters", hint="give one for each, in their order.")
    if not all(math.isfinite(number) for number in numbers):
        raise UsageError(f"--weights: {text!r} holds a number that is not finite")
    return numbers


def _some(model: Any) -> None:
    if not combinations(model):
        raise UsageError("none of the adapters changes a weight of the base, so there is nothing to write")


def _expected(task: Task[Any], model: Any, rule: Rule, rows: Any, device: torch.device) -> tuple[torch.Tensor, Any]:
    """Logits, in float32, of what is to be written, and the model: the sum of what the adapters compute, or the combined weights
    where the rule has no other form."""
    wide = in_float32(model)
    if rule.name != "linear":
        wide = merge(wide, torch.float32)
    return logits_of(task, wide, rows, device), wide


def _write_adapter(
    adapters: Adapters,
    weights: list[float],
    rule: Rule,
    rank: int | None,
    rows: Any,
    output: Path,
    first: Place,
    facts: dict[str, Any],
    as_json: bool,
) -> None:
    device = next(adapters.model.parameters()).device
    quantized = adapters.base.quantization is not None
    cut = rank is not None or facts["combine"] == "svd"
    model = combine(adapters, weights, rule)
    _some(model)
    found = low_rank(model, rank, exact=not cut)
    expected, _ = _expected(first.task, model, rule, rows, device)
    tuned, method = apply_factors(adapters.use(None), found.factors, quantized=quantized)
    facts |= {"rank": method.config.rank, "exact": found.exact, "energy_discarded": found.discarded}

    def write(folder: Path) -> None:
        hf_peft.save_adapter(
            folder, tuned, method, base_model=first.section.name, revision=first.section.revision, task_type=first.task.peft_type
        )
        adapters.base.tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(_card(facts, first), encoding="utf-8")

    put_in_place(output, write, hint=SPACE)
    again = hf_peft.apply_adapter(adapters.use(None), hf_peft.read_adapter(output), Context(frozen_quantized=quantized)).eval()
    compared = parity(expected, logits_of(first.task, in_float32(again), rows, device), exact=None if not found.exact else not quantized)
    report(compared, output, as_json, what=f"adapter of rank {facts['rank']} against {_in_words(facts)}", **facts)
    if not as_json and not found.exact:
        _say_what_is_lost(found)
    if not compared.passed:
        raise CheckFailed(f"the adapter in {output} differs from the sum of the adapters: KL {compared.kl:.3g}", hint="--as model")


def _say_what_is_lost(found: LowRank) -> None:
    Console().print(
        f"  the rank leaves out {found.discarded:.2%} of the change's energy; most in {found.worst_layer}: {found.worst:.2%}", markup=False
    )


def _in_words(facts: dict[str, Any]) -> str:
    parts = [f"{weight:g} {name}" for name, (_, weight) in facts["adapters"].items()]
    return f"{facts['combine']} of {', '.join(parts)}"


def _card(facts: dict[str, Any], first: Place) -> str:
    """The README.md beside a combined adapter."""
    head = {"base_model": first.section.name, "library_name": "peft", "tags": ["lora", "peftcli"]}
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())
    loss = (
        "It is their combination exactly." if facts["exact"] else f"It leaves out {facts['energy_discarded']:.2%} of the change's energy."
    )
    return (
        f"---\n{front}\n---\n\n# {first.section.name}, several adapters combined\n\n"
        f"A LoRA of rank {facts['rank']}: {_in_words(facts)}. {loss}\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM\nfrom peft import PeftModel\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{first.section.name}")\n'
        'model = PeftModel.from_pretrained(base, "THIS_FOLDER")\n```\n'
    )
