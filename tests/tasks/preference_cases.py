"""Rows with two answers, or with one that is wanted or not, and runs on them, shared by the tests of the preference tasks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import helpers
from torch import Tensor, nn

from peftcli.data.prepare import prepare
from peftcli.recipe.load import parse_recipe
from peftcli.tasks import registry
from peftcli.tasks.base import Layout, Task

TASKS = ("dpo", "orpo", "simpo", "kto", "reward")
WORDS = ("red", "green", "blue", "gold", "grey")


def pairs(count: int, offset: int = 0) -> list[dict[str, Any]]:
    """Pairs of different lengths; the better answer repeats the prompt's word, the worse one shouts it."""
    rows = []
    for index in range(offset, offset + count):
        word = WORDS[index % 5]
        rows.append({"prompt": f"{index} {word}? ", "chosen": word * (1 + index % 3), "rejected": word.upper() + "!" * (index % 4)})
    return rows


def judged(count: int, offset: int = 0) -> list[dict[str, Any]]:
    """The answers of :func:`pairs`, one of each by turns."""
    kinds = ("chosen", "rejected", "rejected")
    return [
        {"prompt": row["prompt"], "completion": row[kinds[index % 3]], "label": index % 3 == 0}
        for index, row in enumerate(pairs(count, offset))
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def folder(root: Path) -> Path:
    """``pairs`` and ``judged`` rows: 22 to learn from (no multiple of the batch), 7 held out."""
    for name, make in (("pairs", pairs), ("judged", judged)):
        (root / name).mkdir()
        write(root / name / "train.jsonl", make(22))
        write(root / name / "eval.jsonl", make(7, 100))
    return root


def text(task: str, model: Path, data: Path, output: Path, *, method: str = "{name: lora, rank: 4, alpha: 8, dropout: 0.1}") -> str:
    """A recipe; ``task`` as in YAML, its name first."""
    name = task.removeprefix("{name: ").split(",")[0].removesuffix("}")
    plain = helpers.recipe_for(model, data / ("judged" if name == "kto" else "pairs"), output, method=method)
    return f"task: {task}\n{plain}"


def opened(task: str, rows: Path, **dataset: Any) -> tuple[Task[Any], Any]:
    """A task and its training rows, with the tiny tokenizer."""
    section = "".join(f", {key}: {value}" for key, value in dataset.items())
    recipe = parse_recipe(f"base_model: x\nmethod: lora\ntask: {task}\ndataset: {{train: {rows}{section}}}\n", "recipe.yaml").recipe
    made = registry.make(recipe.task)
    return made, prepare(made.rows(recipe.dataset, helpers.tiny_tokenizer()), base_dir=rows.parent, seed=0).train


def with_base(task: Task[Any], split: Any, base: nn.Module, layout: Layout) -> Any:
    """The rows with what the base makes of them, where the task asks."""
    if not task.has_reference:
        return split
    import torch

    with torch.no_grad():
        return task.with_base(split, task.base_module(base).measure(task.batch(split, range(len(split.rows)), layout)))


def launch(processes: int, recipes: Sequence[Path]) -> None:
    """Run recipes one after another in so many processes; each leaves its weights beside its output folder."""
    tests = Path(__file__).resolve().parent.parent
    path = os.pathsep.join([str(tests.parent), str(tests)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*torchrun, str(tests / "train" / "many_runs.py"), *map(str, recipes)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[:6000]


def answer_log_probs(model: nn.Module, row: Any) -> Tensor:
    """[answer tokens] float64, by the plain route: one row, no packing."""
    import torch

    ids = torch.from_numpy(row.input_ids.astype("int64"))[None]
    found = model(input_ids=ids).logits[0].double().log_softmax(-1)
    learned = torch.from_numpy(row.supervised)
    return found[:-1].gather(1, ids[0, 1:, None])[:, 0][learned[1:]]
