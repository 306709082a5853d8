"""recipe.lock: what a run is made of, in the same bytes each time; and a run that refuses to be anything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers
import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from peftcli import lock as locks
from peftcli.commands import lock as command
from peftcli.errors import CheckpointError, NotRepeatable
from peftcli.recipe.load import load_recipe
from peftcli.report.progress import NullProgress
from peftcli.run import Options, train


@pytest.fixture
def recipe(tiny_folders: dict[str, Path], tiny_data: Path, tmp_path: Path) -> Path:
    """A recipe beside its own copies of model and data, with relative paths."""
    shutil.copytree(tiny_folders["llama"], tmp_path / "base")
    shutil.copytree(tiny_data, tmp_path / "data")
    path = tmp_path / "recipe.yaml"
    path.write_text(helpers.recipe_for(Path("base"), Path("data"), tmp_path / "out"))
    return path


def lock(recipe: Path, *overrides: str, **options: Any) -> Path:
    output = recipe.with_suffix(".lock")
    values = {"processes": 1, "init_adapter": None, "check": False, "json": False, "trust_remote_code": False, **options}
    command.run(load_recipe(recipe, overrides), output, **values)
    return output


def start(recipe: Path, *overrides: str, **options: Any) -> Any:
    AcceleratorState._reset_state(True)
    held = locks.read_lock(recipe.with_suffix(".lock"))
    return train(load_recipe(recipe, overrides), NullProgress(), Options(locked=held, locked_at=Path("recipe.lock"), **options))


def test_the_command_and_the_run_write_the_same_lock_anywhere(recipe: Path, tmp_path: Path) -> None:
    text = lock(recipe).read_text()
    assert lock(recipe).read_text() == text
    report = start(recipe)
    assert (tmp_path / "out" / "recipe.lock").read_text() == text
    assert "recipe.lock" in report.files
    held = locks.read_lock(tmp_path / "out" / "recipe.lock")
    assert held.batch_order_sha256 == report.data.batch_order_sha256
    assert held.base_model.weights_sha256 == report.model.sha256
    assert [file.sha256 for file in held.data] == [file.sha256 for file in report.data.files]
    assert held.environment == report.environment
    assert (held.steps, held.seed, held.processes) == (12, 42, 1)
    # The run's own recipe, with its paths as seen from there, stands for the same run.
    assert lock(tmp_path / "out" / "recipe.yaml").read_text() == text
    lock(recipe, "train.logging_steps=7", "eval.batch_size=3", f"output_dir={tmp_path / 'other'}", "expect.train.steps=> 0", check=True)


def test_what_a_call_left_in_the_tokenizer_is_locked_neither_way_and_stays() -> None:
    tokenizer = helpers.tiny_tokenizer()
    backend, plain = tokenizer.backend_tokenizer, locks._tokenizer(tokenizer)
    tokenizer(["one", "another"], padding="max_length", truncation=True, max_length=4)
    left = (backend.truncation, backend.padding)
    assert None not in left
    assert locks._tokenizer(tokenizer) == plain
    assert (backend.truncation, backend.padding) == left


def flip_weight(root: Path) -> None:
    tensors = load_file(root / "base" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-6
    save_file(tensors, root / "base" / "model.safetensors", metadata={"format": "pt"})


def edit(path: str, old: str, new: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        text = (root / path).read_text()
        assert old in text
        (root / path).write_text(text.replace(old, new, 1))

    return change


CHANGES: list[tuple[str, Callable[[Path], None], list[str], str]] = [
    ("one byte of the rows", edit("data/train.jsonl", "please", "pleasE"), [], r"data file 1 \(train\.jsonl\) sha256: locked \"\w{64}\", here \"\w{64}\"$"),
    ("one byte of the held-out rows", edit("data/eval.jsonl", "!", "?"), [], r"data file 2 \(eval\.jsonl\) sha256"),
    ("one weight", flip_weight, [], r"base model weights sha256"),
    ("the model's config", edit("base/config.json", "1e-06", "1e-05"), [], r"base model config sha256"),
    ("a token", edit("base/tokenizer.json", '"<pad>"', '"<pat>"'), [], r"tokenizer sha256"),
    ("the template", edit("base/chat_template.jinja", "message['role']", "message['role'] "), [], r"tokenizer chat template sha256"),
    ("a setting", lambda root: None, ["train.learning_rate=2e-3"], r"train\.learning_rate: locked 0\.01, here 0\.002$"),
    ("a method's option", lambda root: None, ["method.rank=5"], r"method\.rank: locked 4, here 5"),
    ("the order", lambda root: None, ["train.seed=7"], r"batch order sha256"),
    ("the length", lambda root: None, ["train.epochs=3"], r"steps: locked 12, here 18"),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change[0])
def test_a_locked_run_refuses_whatever_differs_and_names_it(
    change: tuple[str, Callable[[Path], None], list[str], str], recipe: Path, tmp_path: Path
) -> None:
    lock(recipe)
    _, apply, overrides, message = change
    apply(tmp_path)
    with pytest.raises(NotRepeatable, match=f"(?m){message}") as caught:
        start(recipe, *overrides)
    assert caught.value.exit_code == 11
    assert not (tmp_path / "out" / "metrics.jsonl").exists(), "nothing was begun"
    with pytest.raises(NotRepeatable, match=f"(?m){message}"):
        lock(recipe, *overrides, check=True)


def test_only_what_differs_is_named(recipe: Path) -> None:
    held = locks.read_lock(lock(recipe))
    assert locks.differences(held, held) == []
    environment = held.environment.model_copy(update={"torch": "9.9", "fingerprint": "0" * 64, "platform": "elsewhere"})
    other = held.model_copy(update={"environment": environment, "processes": 2})
    assert locks.differences(held, other) == [
        "processes: locked 1, here 2",
        f'environment torch: locked "{held.environment.torch}", here "9.9"',
    ]


def test_a_run_from_an_adapter_is_locked_with_it(recipe: Path, tmp_path: Path) -> None:
    lock(recipe)
    start(recipe)
    lock(recipe, init_adapter=tmp_path / "out")
    with pytest.raises(NotRepeatable, match=r"initial adapter sha256: locked \"\w+\", here null"):
        start(recipe, f"output_dir={tmp_path / 'second'}")
    start(recipe, f"output_dir={tmp_path / 'second'}", init_adapter=tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds no adapter_model"):
        lock(recipe, init_adapter=tmp_path / "data")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read"),
        ("{", "cannot read"),
        ("[]", "no lock of this version"),
        ('{"lock_version": 2}', "lock_version"),
        ("[" * 100_000, "cannot read"),
    ],
)
def test_a_damaged_lock_is_an_error_with_a_place(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.lock"
    with pytest.raises(CheckpointError, match="does not exist"):
        locks.read_lock(path)
    path.write_text(text)
    with pytest.raises(CheckpointError, match=message):
        locks.read_lock(path)


def test_a_resumed_run_keeps_its_lock_and_says_what_changed(recipe: Path, tmp_path: Path) -> None:
    class Said(NullProgress):
        def __init__(self) -> None:
            self.warnings: list[str] = []

        def warn(self, message: str) -> None:
            self.warnings.append(message)

    AcceleratorState._reset_state(True)
    train(load_recipe(recipe, ["train.save_steps=5"]), NullProgress(), Options())
    path = tmp_path / "out" / "recipe.lock"
    value = json.loads(path.read_text())
    value["environment"]["torch"] = "1.0"
    path.write_text(json.dumps(value))
    AcceleratorState._reset_state(True)
    said = Said()
    train(load_recipe(recipe, ["train.save_steps=5"]), said, replace(Options(), resume=True))
    assert json.loads(path.read_text()) == value
    assert any("environment torch: locked" in line for line in said.warnings)
