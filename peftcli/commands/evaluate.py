"""``peftcli eval``: measure a result on held-out rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from peftcli.commands.show import print_json
from peftcli.data.prepare import prepare_eval
from peftcli.errors import UsageError
from peftcli.evaluate import Evaluator, Scores
from peftcli.methods.kinds import trains_base_weights
from peftcli.recipe.schema import DatasetSection, EvalSection
from peftcli.report.catalogue import FIGURES
from peftcli.report.text import metric, plural
from peftcli.result import open_result
from peftcli.tasks.answers import judged
from peftcli.tasks.base import Layout


def run(
    path: Path,
    *,
    data: list[str] | None,
    base_model: str | None,
    quantization: str | None,
    dtype: str | None,
    generate: bool | None,
    limit: int | None,
    json: bool,
    trust_remote_code: bool,
) -> None:
    """Evaluate and print; see the command's help for the arguments."""
    result = open_result(path, base_model=base_model, dtype=dtype, quantization=quantization, trust_remote_code=trust_remote_code)
    recipe = result.recipe
    section = recipe.dataset if recipe is not None else None
    if data:
        places: dict[str, Any] = {"train": data, "eval": data, "eval_fraction": 0.0}
        section = DatasetSection(**{**(section.model_dump() if section else {}), **places})
    if section is None:
        raise UsageError(f"{path} is an adapter without a recipe, so it has no held-out rows of its own", hint="name them: --data FILE")
    if limit is not None:
        section = section.model_copy(update={"eval_limit": limit})
    base_dir = Path() if data else result.base_dir
    longest = result.base.max_positions if result.method is None else result.method.row_limit(result.base.max_positions)
    kind = result.task.rows(section, result.base.tokenizer)
    split = prepare_eval(kind, base_dir=base_dir, seed=recipe.train.seed if recipe else 42, max_positions=longest)
    settings = recipe.eval if recipe is not None else EvalSection()
    wanted = settings.generate if generate is None else generate
    packed = result.task.packs(result.model, result.base.model.config.get_text_config().vocab_size, max(split.lengths))
    device = next(result.model.parameters()).device
    mixed = str(result.base.dtype) == "torch.bfloat16" and trains_base_weights(result.model)
    evaluator = Evaluator(
        PartialState(cpu=device.type == "cpu"),
        result.task,
        split,
        result.base.tokenizer,
        Layout(packed, result.base.tokenizer.pad_token_id, device),
        settings.batch_size,
        mixed,
    )
    scores = evaluator.scores(
        result.task.module(result.model), generate=wanted, max_new_tokens=settings.max_new_tokens, limit=settings.generate_limit
    )
    examples = [
        {"prompt": e.prompt, "reference": e.reference, "answer": a, "correct": judged(settings.metrics, a, e.reference)}
        for e, a in zip(split.generation, scores.answers, strict=False)
    ]
    if json:
        print_json({**numbers(scores), "intervals": scores.intervals, "answers": examples})
        return
    console = Console()
    console.print(table(scores, str(path)))
    for example in examples[: settings.examples]:
        mark = "[green]✓[/]" if example["correct"] else "[red]✗[/]"
        console.print(f"{mark} ", end="")
        console.print(f"{example['prompt']}\n  expected {example['reference']}\n  answered {example['answer']}", markup=False)


def numbers(scores: Scores) -> dict[str, Any]:
    """The plain figures."""
    return {**scores.plain(), "supervised_tokens": scores.units, "rows": scores.rows, "seconds": scores.seconds}


def table(scores: Scores, title: str) -> Table:
    """The metrics with their 95 % intervals, the most telling first."""
    tokens = f", {plural(scores.units, 'supervised token')}" if scores.units != scores.rows else ""
    shown = Table(title=f"{title}: {plural(scores.rows, 'held-out row')}{tokens}", title_justify="left")
    shown.add_column("metric")
    shown.add_column("value", justify="right")
    shown.add_column("95 % interval", justify="right")
    values = scores.plain()
    for name in dict.fromkeys((*(name for name in FIGURES if name in values), *values)):
        interval = scores.intervals.get(name)
        between = f"{metric(name, interval[0])} to {metric(name, interval[1])}" if interval is not None else ""
        shown.add_row(name.replace("_", " "), metric(name, values[name]), between)
    return shown
