"""``peftcli eval --tasks``: hand a result to EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from peftcli.commands.show import print_json
from peftcli.errors import DataError, UsageError
from peftcli.report.text import change, metric
from peftcli.result import Result

_BACKENDS = {"AutoModelForCausalLM": "causal", "AutoModelForSeq2SeqLM": "seq2seq"}
_Z = 1.959963984540054


def check_installed() -> None:
    """Raise UsageError with the command that installs the harness, where it is not there."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError(
            "--tasks hands the model to lm-evaluation-harness, which is not installed",
            hint=f"install it beside peftcli: {sys.executable} -m pip install 'lm-eval[hf]'  (or: pip install 'peftcli[lm-eval]')",
        )


def measure(
    result: Result,
    tasks: list[str],
    *,
    batch_size: int,
    limit: int | None,
    num_fewshot: int | None,
    include_path: Path | None,
    apply_chat_template: bool,
) -> dict[str, dict[str, Any]]:
    """The harness's results by task, for the model as it is in memory: any method, quantized or not, nothing merged or written.

    Args:
        tasks: names of tasks or groups of the harness. ``include_path``: a folder with task files of one's own.
        limit: examples of each task. ``num_fewshot``: examples shown before each question.

    Raises:
        UsageError: the harness is not installed or knows no such task, or the result writes no text.
        DataError: a task's data cannot be had.
    """
    check_installed()
    backend = _BACKENDS.get(result.task.auto_model)
    if backend is None:
        raise UsageError(f"lm-evaluation-harness measures models that write text; this one learned {result.task.section.name}")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    known = set(manager.all_tasks)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise UsageError(
            f"--tasks: lm-evaluation-harness knows no {', '.join(map(repr, unknown))} among its {len(known):,} tasks",
            hint="list them: lm_eval ls tasks; for task files of your own: --include-path FOLDER",
        )
    model = result.model
    # The harness ties embedding and output layer anew; here they are tied already, and adapters may stand between.
    model.tie_weights = lambda *_, **__: None
    longest = result.base.max_positions if result.method is None else result.method.row_limit(result.base.max_positions)
    wrapped = HFLM(pretrained=model, backend=backend, tokenizer=result.base.tokenizer, batch_size=batch_size, max_length=longest)
    try:
        found = simple_evaluate(
            model=wrapped,
            tasks=manager.match_tasks(tasks),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=apply_chat_template,
            log_samples=False,
        )
    except (OSError, ConnectionError) as error:
        raise DataError(f"--tasks: the data of a task cannot be had: {str(error).splitlines()[0]}") from error
    results: dict[str, dict[str, Any]] = found["results"]
    return results


def show(results: Mapping[str, Mapping[str, Any]], base: Mapping[str, Mapping[str, Any]] | None, title: str, *, json: bool) -> None:
    """Print the harness's figures, those of the base beside them where they were measured."""
    if json:
        print_json({"tasks": dict(results), **({"base": dict(base)} if base is not None else {})})
        return
    table = Table(title=f"{title}: lm-evaluation-harness", title_justify="left")
    for name in ("task", "metric", *(["base"] if base is not None else []), "value", "95 % interval", *(["difference"] if base else [])):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for task, figures in results.items():
        for key, value in figures.items():
            name, _, of = key.partition(",")
            if not isinstance(value, (int, float)) or name.endswith("_stderr") or not of:
                continue
            error = figures.get(f"{name}_stderr,{of}")
            between = ""
            if isinstance(error, (int, float)):
                between = f"{metric(name, value - _Z * error)} to {metric(name, value + _Z * error)}"
            row = [task, name if of == "none" else f"{name} ({of})", metric(name, value), between]
            if base is not None:
                before = base[task][key]
                row = [*row[:2], metric(name, before), *row[2:], change(name, value - before)]
            table.add_row(*row)
    Console().print(table)
