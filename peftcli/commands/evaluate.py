"""``peftcli eval``: measure a result on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from peftcli.account import eval_info
from peftcli.commands.show import print_json
from peftcli.data.prepare import prepare_eval
from peftcli.data.splits import Split
from peftcli.errors import UsageError
from peftcli.evaluate import Evaluator, Scores
from peftcli.methods.kinds import trains_base_weights
from peftcli.recipe.schema import DatasetSection, EvalSection
from peftcli.report.catalogue import FIGURES
from peftcli.report.console import print_gates
from peftcli.report.files import write_text_atomically
from peftcli.report.gates import gate_cases, gate_table, judge_eval, junit, refuse
from peftcli.report.markdown import cell
from peftcli.report.schema import Gate
from peftcli.report.text import metric, plural
from peftcli.result import Result, locate, open_result
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
    chosen: dict[str, Any] = {
        "base_model": base_model,
        "dtype": dtype,
        "quantization": quantization,
        "trust_remote_code": trust_remote_code,
    }
    split = None
    if locate(path, base_model).task.has_reference:
        bare = open_result(path, with_adapter=False, **chosen)
        split = _evaluator(bare, _rows(bare, path, data, limit)).with_base(bare.model)
        del bare  # one model at a time
    result = open_result(path, **chosen)
    recipe = result.recipe
    split = split or _rows(result, path, data, limit)
    settings = recipe.eval if recipe is not None else EvalSection()
    wanted = settings.generate if generate is None else generate
    evaluator = _evaluator(result, split)
    scores = evaluator.scores(
        result.task.module(result.model),
        generate=wanted,
        max_new_tokens=settings.max_new_tokens,
        limit=settings.generate_limit,
        metrics=settings.metrics,
    )
    examples = [
        {"prompt": e.prompt, "reference": e.reference, "answer": a, "correct": judged(settings.metrics, a, e.reference)}
        for e, a in zip(split.generation, scores.answers, strict=False)
    ]
    gates = judge_eval(recipe.expect, eval_info(asdict(scores))) if recipe is not None else []
    if gates:
        _write(result.weights.parent, gates, scores)
    if json:
        more = {"gates": [gate.model_dump() for gate in gates]} if gates else {}
        print_json({**numbers(scores), "intervals": scores.intervals, "answers": examples, **more})
    else:
        _show(scores, examples[: settings.examples], gates, str(path))
    refuse(gates)


def _show(scores: Scores, examples: Sequence[dict[str, Any]], gates: Sequence[Gate], title: str) -> None:
    console = Console()
    console.print(table(scores, title))
    for example in examples:
        mark = "[green]✓[/]" if example["correct"] else "[red]✗[/]"
        console.print(f"{mark} ", end="")
        console.print(f"{example['prompt']}\n  expected {example['reference']}\n  answered {example['answer']}", markup=False)
    print_gates(gates, console)


def _write(folder: Path, gates: Sequence[Gate], scores: Scores) -> None:
    """What CI shows: the gates as JUnit XML and as Markdown, beside the run's own."""
    title = f"{folder.resolve().name}: eval"
    write_text_atomically(folder / "eval.junit.xml", junit(title, list(gate_cases(gates)), scores.seconds))
    figures = [f"- {name}: {metric(name, value)}" for name, value in scores.plain().items()]
    heading = f"# {cell(title)}\n\n{plural(scores.rows, 'held-out row')}"
    write_text_atomically(folder / "eval.md", "\n\n".join([heading, gate_table(gates), "\n".join(figures)]) + "\n")


def _rows(result: Result, path: Path, data: list[str] | None, limit: int | None) -> Split:
    """The held-out rows of the run, or those of the files that are named instead."""
    recipe = result.recipe
    section = recipe.dataset if recipe is not None else None
    if data:
        places: dict[str, Any] = {"train": data, "eval": data, "eval_fraction": 0.0}
        section = DatasetSection(**{**(section.model_dump() if section else {}), **places})
    if section is None:
        raise UsageError(f"{path} is an adapter without a recipe, so it has no held-out rows of its own", hint="name them: --data FILE")
    if limit is not None:
        section = section.model_copy(update={"eval_limit": limit})
    longest = result.base.max_positions if result.method is None else result.method.row_limit(result.base.max_positions)
    kind = result.task.rows(section, result.base.tokenizer)
    base_dir = Path() if data else result.base_dir
    return prepare_eval(kind, base_dir=base_dir, seed=recipe.train.seed if recipe else 42, max_positions=longest)


def _evaluator(result: Result, split: Split) -> Evaluator:
    settings = result.recipe.eval if result.recipe is not None else EvalSection()
    packed = result.task.packs(result.model, result.base.model.config.get_text_config().vocab_size, max(split.lengths))
    device = next(result.model.parameters()).device
    return Evaluator(
        PartialState(cpu=device.type == "cpu"),
        result.task,
        split,
        result.base.tokenizer,
        Layout(packed, result.base.tokenizer.pad_token_id, device),
        settings.batch_size,
        str(result.base.dtype) == "torch.bfloat16" and trains_base_weights(result.model),
    )


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
