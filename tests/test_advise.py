"""`peftcli init` chooses what fits and says why; the memory estimate behind it follows the settings."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import pytest

from peftcli.advise import advise, parse_memory
from peftcli.commands import init as command
from peftcli.errors import DataError, UsageError
from peftcli.estimate import Estimate
from peftcli.forecast import forecast
from peftcli.methods import registry
from peftcli.recipe.load import parse_recipe


def need(model: Path, data: Path, *overrides: str, method: str = "{name: lora}") -> Estimate:
    loaded = parse_recipe(helpers.recipe_for(model, data, data / "out", method=method), "r.yaml", overrides)
    return forecast(loaded).need(loaded.recipe)


def test_memory_follows_batch_checkpointing_and_quantization(tiny_folders: dict[str, Path], tiny_data: Path) -> None:
    model = tiny_folders["llama"]
    plain = need(model, tiny_data, "train.batch_size=8")
    assert plain.total == sum(
        getattr(plain, p) for p in ("weights", "gradients", "optimizer", "activations", "allocator", "copies", "program")
    )
    assert plain.moment == "training"
    assert need(model, tiny_data, "train.batch_size=1").activations < plain.activations
    assert need(model, tiny_data, "train.batch_size=8", "train.gradient_checkpointing=true").activations < plain.activations
    quantized = need(model, tiny_data, "base_model.quantization=nf4")
    assert quantized.moment == "loading" or quantized.weights < plain.weights
    accumulated = need(model, tiny_data, "train.batch_size=8", "train.gradient_accumulation_steps=4")
    assert accumulated.gradients == 4 * accumulated.trainable


def test_training_every_weight_counts_them_once_more_for_saving(tiny_folders: dict[str, Path], tiny_data: Path) -> None:
    full = need(tiny_folders["llama"], tiny_data, "train.batch_size=1", method="{name: full}")
    assert full.trainable == full.parameters
    assert full.optimizer == 8 * full.parameters
    assert full.moment in ("training", "saving")


def question_rows(path: Path, count: int = 60) -> Path:
    rows = [{"question": f"{i} and {i}?", "answer": f"{2 * i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_columns_of_other_names_are_mapped_and_every_choice_has_a_reason(
    tmp_path: Path, tiny_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data, recipe = question_rows(tmp_path / "qa.jsonl"), tmp_path / "r.yaml"
    command.run(recipe, model=str(tiny_folders["llama"]), data=str(data), method=None, memory="16GB", overwrite=False, json=True)
    said = json.loads(capsys.readouterr().out)
    assert said["memory_bytes"] <= 0.9 * said["budget_bytes"] == 0.9 * 16e9
    loaded = parse_recipe(recipe.read_text(encoding="utf-8"), str(recipe)).recipe
    assert loaded.method.name == "lora"
    assert loaded.dataset.format == "alpaca"
    assert loaded.dataset.columns == {"instruction": "question", "output": "answer"}
    assert loaded.dataset.max_length == 64
    assert said["values"].keys() - said["why"].keys() == {"base_model.name", "output_dir"}
    assert all(reason in recipe.read_text(encoding="utf-8") for reason in said["why"].values())
    again = advise(str(tiny_folders["llama"]), str(data), recipe, memory=16 * 10**9)
    assert again.text == recipe.read_text(encoding="utf-8")


def test_too_little_memory_is_refused_with_what_would_do(tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="nothing fits into .* needs") as refused:
        advise(str(tiny_folders["llama"]), str(question_rows(tmp_path / "qa.jsonl")), tmp_path / "r.yaml", memory=10**8)
    assert refused.value.hint is not None
    assert "--memory" in refused.value.hint


def test_rows_of_no_known_kind_are_refused(tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"left": "a", "right": "b"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="left, right"):
        advise(str(tiny_folders["llama"]), str(path), tmp_path / "r.yaml")
    path.write_text('{"left": \n', encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl:1"):
        advise(str(tiny_folders["llama"]), str(path), tmp_path / "r.yaml")


@pytest.mark.parametrize(("text", "size"), [("24GB", 24 * 10**9), ("512 MiB", 2**29), ("1.5gb", 15 * 10**8)])
def test_sizes(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["24", "GB", "0GB", "-1GB", "24 parsecs"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="--memory"):
        parse_memory(text)


def test_without_a_model_and_rows_a_starter_recipe_is_written(tmp_path: Path) -> None:
    recipe = tmp_path / "new" / "r.yaml"
    command.run(recipe, model=None, data=None, method="qlora", memory=None, overwrite=False, json=False)
    assert parse_recipe(recipe.read_text(encoding="utf-8"), str(recipe)).recipe.method.name == "qlora"
    with pytest.raises(UsageError, match="exists already"):
        command.run(recipe, model=None, data=None, method=None, memory=None, overwrite=False, json=False)
    with pytest.raises(UsageError, match="--memory"):
        command.run(tmp_path / "s.yaml", model="m", data=None, method=None, memory="24GB", overwrite=False, json=False)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", [name for name in registry.names() if name != "bitfit"])
def test_every_method_can_be_estimated(name: str, kind: str, tiny_folders: dict[str, Path], tiny_data: Path) -> None:
    found = need(tiny_folders[kind], tiny_data, "base_model.dtype=bfloat16", method=f"{{name: {name}}}")
    assert found.activations > 0 or found.moment == "loading"
    assert found.trainable > 0
