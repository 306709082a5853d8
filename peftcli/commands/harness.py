"""``peftcli eval --tasks``: hand a result to EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from peftcli.commands.show import print_json
from peftcli.errors import DataError, UsageError
from peftcli.report.text import change, number, percent
from peftcli.result import Result

_BACKENDS = {"AutoModelForCausalLM": "causal", "AutoModelForSeq2SeqLM": "seq2seq"}
_Z = 1.959963984540054


def check_installed() -> None:
    """See that the harness is there.

    Raises:
        UsageError: it is not; the hint is the command that installs it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError(
            "--tasks hands the model to lm-evaluation-harness, which is not installed",
            hint=f"install it beside peftcli: {sys.executable} -m pip install 'lm-eval[hf]'",
        )


@dataclass(frozen=True)
class Harness:
    """What lm-evaluation-harness is asked for.

    Attributes:
        tasks: names of its tasks or groups. ``include_path``: a folder with task files of one's own.
        num_fewshot: examples shown before each question. ``apply_chat_template``: put questions into the chat template.
    """

    tasks: tuple[str, ...]
    num_fewshot: int | None
    include_path: Path | None
    apply_chat_template: bool

    def measure(self, result: Result, batch_size: int, limit: int | None) -> dict[str, dict[str, Any]]:
        """Its results by task, for the model as it is in memory: any method, quantized or not, nothing merged or written.

        Args:
            limit: examples of each task.

        Raises:
            UsageError: the harness is not installed or knows no such task, or the model writes no text.
            DataError: a task's data cannot be had.
        """
        check_installed()
        backend = _BACKENDS.get(result.task.auto_model)
        if backend is None:
            raise UsageError(f"lm-evaluation-harness measures models that write text; this one has learned {result.task.section.name}")
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=None if self.include_path is None else str(self.include_path))
        unknown = [name for name in self.tasks if not manager.match_tasks([name])]
        if unknown:
            raise UsageError(
                f"--tasks: lm-evaluation-harness knows no {', '.join(map(repr, unknown))} among its {len(manager.all_tasks):,} tasks",
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
                tasks=manager.match_tasks(list(self.tasks)),
                task_manager=manager,
                num_fewshot=self.num_fewshot,
                limit=limit,
                apply_chat_template=self.apply_chat_template,
                log_samples=False,
            )
        except OSError as error:  # connection errors are among them
            raise DataError(f"--tasks: the data of a task cannot be had: {str(error).splitlines()[0]}") from error
        results: dict[str, dict[str, Any]] = found["results"]
        return results


def show(results: Mapping[str, Mapping[str, Any]], base: Mapping[str, Mapping[str, Any]] | None, title: str, *, json: bool) -> None:
    """Print the harness's figures, those of the base beside them where they were measured."""
    if json:
        print_json({"tasks": dict(results), **({"base": dict(base)} if base is not None else {})})
        return
    table = Table(title=f"{title}: lm-evaluation-harness", title_justify="left")
    names = (
        ("task", "metric", "value", "95 % interval") if base is None else ("task", "metric", "base", "tuned", "95 % of tuned", "difference")
    )
    for name in names:
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for task, figures in results.items():
        for key, value in figures.items():
            name, _, filtered = key.partition(",")
            if name.endswith("_stderr") or not filtered or not isinstance(value, (int, float)):
                continue
            error = figures.get(f"{name}_stderr,{filtered}")
            between = ""
            if isinstance(error, (int, float)):
                between = f"{_figure(name, value - _Z * error)} to {_figure(name, value + _Z * error)}"
            row = [name if filtered == "none" else f"{name} ({filtered})", _figure(name, value), between]
            if base is not None:
                before = base[task][key]
                row = [row[0], _figure(name, before), *row[1:], change("accuracy" if _is_share(name) else name, value - before)]
            table.add_row(task, *row)
    Console().print(table)


def _is_share(name: str) -> bool:
    return name.startswith("acc") or name in ("exact_match", "em")


def _figure(name: str, value: float) -> str:
    return percent(min(max(value, 0.0), 1.0)) if _is_share(name) else number(float(value))
