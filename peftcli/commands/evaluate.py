"""``peftcli eval``: measure a result on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from peftcli.account import eval_info, paired_test
from peftcli.commands.harness import Harness, check_installed
from peftcli.commands.harness import show as show_harness
from peftcli.commands.show import print_json
from peftcli.data.prepare import prepare_eval
from peftcli.data.splits import Split
from peftcli.errors import UsageError, nearest
from peftcli.evaluate import Evaluator, Scores
from peftcli.methods.kinds import trains_base_weights
from peftcli.recipe.schema import AnswerMetric, DatasetSection, EvalSection
from peftcli.report.catalogue import FIGURES, figure
from peftcli.report.console import print_gates
from peftcli.report.files import write_text_atomically
from peftcli.report.gates import gate_cases, gate_table, judge_eval, junit, refuse
from peftcli.report.markdown import cell
from peftcli.report.schema import Gate
from peftcli.report.text import change, metric, p_value, plural
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
    metrics: str | None,
    limit: int | None,
    compare_base: bool,
    harness: Harness | None,
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
    place = locate(path, base_model)
    recipe = place.recipe
    settings = recipe.eval if recipe is not None else EvalSection()
    if compare_base and place.method is None:
        raise UsageError(f"{path} is a whole model without a recipe, which does not say what base it could be compared with")
    if harness is not None:
        _ask_harness(path, harness, chosen, settings.batch_size, limit, compare_base=compare_base, json=json)
        return
    if asked := _asked(metrics):
        settings = settings.model_copy(update={"metrics": asked})
    wanted = (settings.generate or bool(asked)) if generate is None else generate
    split, before = None, None
    if compare_base or place.task.has_reference:
        bare = open_result(path, with_adapter=False, **chosen)
        split = _rows(bare, path, data, limit)
        if place.task.has_reference:
            split = _evaluator(bare, split).with_base(bare.model)
        before = _scores(bare, split, settings, wanted) if compare_base else None
        del bare  # one model at a time
    result = open_result(path, **chosen)
    split = split or _rows(result, path, data, limit)
    scores = _scores(result, split, settings, wanted)
    examples = [
        {"prompt": e.prompt, "reference": e.reference, "answer": a, "correct": judged(settings.metrics, a, e.references)}
        for e, a in zip(split.generation, scores.answers, strict=False)
    ]
    gates = judge_eval(recipe.expect, eval_info(asdict(scores))) if recipe is not None else []
    if gates:
        _write(result.weights.parent, gates, scores)
    if json:
        more: dict[str, Any] = {"gates": [gate.model_dump() for gate in gates]} if gates else {}
        if before is not None:
            tests = {name: asdict(found) for name, found in scores.since(before).items()}
            more |= {"base": {**numbers(before), "intervals": before.intervals}, "comparisons": tests}
        print_json({**numbers(scores), "intervals": scores.intervals, "answers": examples, **more})
    else:
        _show(scores, before, examples[: settings.examples], gates, str(path))
    refuse(gates)


def _ask_harness(
    path: Path, harness: Harness, chosen: dict[str, Any], batch_size: int, limit: int | None, *, compare_base: bool, json: bool
) -> None:
    """One model at a time in the hands of the harness."""
    check_installed()
    found = [
        harness.measure(open_result(path, with_adapter=adapted, **chosen), batch_size, limit)
        for adapted in ((True, False) if compare_base else (True,))
    ]
    show_harness(found[0], found[1] if compare_base else None, str(path), json=json)


def _asked(metrics: str | None) -> list[str]:
    """The measures of answers that ``--metrics`` names."""
    names = [name.strip() for name in (metrics or "").split(",") if name.strip()]
    known = get_args(AnswerMetric)
    if strange := [name for name in names if name not in known]:
        near = nearest(strange[0], known)
        raise UsageError(f"--metrics: {strange[0]!r} is not one of {', '.join(known)}", hint=f"did you mean {near!r}?" if near else None)
    return names


def _scores(result: Result, split: Split, settings: EvalSection, generate: bool) -> Scores:
    return _evaluator(result, split).scores(
        result.task.module(result.model),
        generate=generate,
        max_new_tokens=settings.max_new_tokens,
        limit=settings.generate_limit,
        metrics=settings.metrics,
    )


def _show(scores: Scores, before: Scores | None, examples: Sequence[dict[str, Any]], gates: Sequence[Gate], title: str) -> None:
    console = Console()
    console.print(table(scores, title, before))
    for example in examples:
        mark = {True: "[green]✓[/]", False: "[red]✗[/]", None: "·"}[example["correct"]]
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


def table(scores: Scores, title: str, before: Scores | None = None) -> Table:
    """The metrics with their 95 % intervals, the most telling first; where the base was measured too, its figures and the paired test."""
    tokens = f", {plural(scores.units, 'supervised token')}" if scores.units != scores.rows else ""
    shown = Table(title=f"{title}: {plural(scores.rows, 'held-out row')}{tokens}", title_justify="left")
    shown.add_column("metric")
    for name in ("base", "tuned", "95 % of tuned", "difference") if before is not None else ("value", "95 % interval"):
        shown.add_column(name, justify="right")
    values, base = scores.plain(), before.plain() if before is not None else {}
    tests = scores.since(before) if before is not None else {}
    for name in dict.fromkeys((*(name for name in FIGURES if name in values), *values)):
        interval, test = scores.intervals.get(name), tests.get(name)
        between = f"{metric(name, interval[0])} to {metric(name, interval[1])}" if interval is not None else ""
        row = [figure(name).label.lower(), metric(name, values[name]), between]
        if before is not None:
            moved = f"{change(name, test.value)}, {p_value(paired_test(test))}" if test is not None else ""
            row = [row[0], metric(name, base.get(name)), *row[1:], moved]
        shown.add_row(*row)
    return shown
