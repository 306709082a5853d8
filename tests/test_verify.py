"""`peftcli verify`: a run that can be repeated passes; one byte, one weight or one line of arithmetic elsewhere does not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import helpers
import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from peftcli import lock as locks
from peftcli.commands import lock as lock_command
from peftcli.errors import CheckpointError, NotRepeatable, UsageError
from peftcli.recipe.load import load_recipe
from peftcli.report.progress import NullProgress
from peftcli.verify import Verdict, verify

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def original(tiny_folders: dict[str, Path], tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with dropout, evaluations between and a partial accumulation window, beside its own model and data."""
    root = tmp_path_factory.mktemp("verify")
    shutil.copytree(tiny_folders["llama"], root / "base")
    shutil.copytree(tiny_data, root / "data")
    text = helpers.recipe_for(root / "base", root / "data", root / "out")
    options = ("train.batch_size=3", "train.gradient_accumulation_steps=2", "train.eval_steps=3")
    helpers.run(text, *options, "eval.generate=true", "eval.max_new_tokens=4")
    return root


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    """A copy whose recipe names its own model and data."""
    copy = Path(shutil.copytree(original, tmp_path / "copy"))
    path = copy / "out" / "recipe.yaml"
    path.write_text(path.read_text().replace(str(original), str(copy)))
    return copy


def repeat(root: Path, **options: object) -> Verdict:
    AcceleratorState._reset_state(True)
    return verify(root / "out", root / "repeated", NullProgress(), **options)  # type: ignore[arg-type]


def records(root: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (root / "out" / "metrics.jsonl").read_text().splitlines()]


def rewrite(root: Path, changed: list[dict[str, object]]) -> None:
    (root / "out" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in changed))


def test_a_run_comes_out_the_same_to_the_last_byte(root: Path) -> None:
    found = repeat(root)
    assert found.exact
    assert (found.steps, found.largest) == (8, 0.0)
    assert found.records == len(records(root)) == 8 + 2 + 1
    assert found.weights == ("adapter/adapter_model.safetensors",)
    assert found.environment == ()
    assert helpers.folder_bytes(root / "out" / "adapter")["adapter_model.safetensors"]


def test_the_first_steps_alone_take_no_more_than_that(root: Path) -> None:
    found = repeat(root, steps=2)
    assert (found.steps, found.records, found.weights) == (2, 2, ())
    assert not (root / "repeated" / "adapter").exists()
    shutil.rmtree(root / "repeated")
    # A trace that lacks a step which the recipe says is logged is no trace of this recipe.
    rewrite(root, [record for record in records(root) if record["step"] in (1, 3) or "eval_loss" in record])
    with pytest.raises(NotRepeatable, match="no record of a step at step 2"):
        repeat(root, steps=2)


def change_data(root: Path) -> None:
    path = root / "data" / "train.jsonl"
    path.write_text(path.read_text().replace("please", "pleasE", 1))


def change_weight(root: Path) -> None:
    tensors = load_file(root / "base" / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] += 1e-6
    save_file(tensors, root / "base" / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("change", "message"), [(change_data, r"data file 1 \(train\.jsonl\)"), (change_weight, "base model weights")])
def test_one_byte_of_the_data_or_one_weight_of_the_base(change: Callable[[Path], None], message: str, root: Path) -> None:
    change(root)
    with pytest.raises(NotRepeatable, match=message) as caught:
        repeat(root)
    assert caught.value.exit_code == 11
    # Whoever changes the lock as well is found out by the trace.
    path = root / "out" / "recipe.lock"
    held = locks.read_lock(path)
    loaded = load_recipe(root / "out" / "recipe.yaml")
    lock_command.run(loaded, path, processes=1, init_adapter=None, check=False, json=False, trust_remote_code=False)
    assert locks.read_lock(path) != held
    with pytest.raises(NotRepeatable, match=r"the traces part at step \d"):
        repeat(root)


def test_one_line_of_the_loops_arithmetic(root: Path, tmp_path: Path) -> None:
    """A copy of the package whose steps scale the loss by one part in a million more."""
    package = tmp_path / "other"
    shutil.copytree(ROOT / "peftcli", package / "peftcli", ignore=shutil.ignore_patterns("__pycache__"))
    loop = package / "peftcli" / "train" / "loop.py"
    line = "accelerator.backward(loss.total * scale)"
    assert loop.read_text().count(line) == 1
    command = [sys.executable, "-m", "peftcli", "verify", str(root / "out")]
    env = {**os.environ, "PYTHONPATH": str(package), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    loop.write_text(loop.read_text().replace(line, "accelerator.backward(loss.total * scale * 1.000001)"))
    other = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert other.returncode == 11, other.stderr[-2000:]
    assert "the traces part at step 1: grad_norm was" in " ".join(other.stderr.split())
    assert "Traceback" not in other.stderr


@pytest.mark.parametrize(("field", "line"), [("loss", 4), ("learning_rate", 0), ("grad_norm", 8), ("eval_loss", 10)])
def test_the_first_step_at_which_the_traces_part_is_named(field: str, line: int, root: Path) -> None:
    changed = records(root)
    value = changed[line][field]
    assert isinstance(value, float)
    changed[line][field] = value * (1 + 1e-15) + 1e-18
    assert changed[line][field] != value
    rewrite(root, changed)
    with pytest.raises(NotRepeatable, match=rf"the traces part at step {changed[line]['step']}: {field} was") as caught:
        repeat(root)
    assert "the same number was due" in caught.value.message


def test_a_run_in_two_processes_is_repeated_in_two(root: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}

    def command(*arguments: str) -> tuple[int, str, str]:
        line = [sys.executable, "-m", "peftcli", *arguments]
        done = subprocess.run(line, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
        return done.returncode, done.stdout, " ".join(done.stderr.split())

    text = (root / "out" / "recipe.yaml").read_text()
    (root / "two.yaml").write_text(text.replace("../", "").replace("generate: true", "generate: false"))
    code, _, errors = command("train", str(root / "two.yaml"), f"output_dir={root / 'out'}", "--processes", "2", "--overwrite")
    assert code == 0, errors
    assert locks.read_lock(root / "out" / "recipe.lock").processes == 2
    code, shown, errors = command("verify", str(root / "out"), "--json")
    assert code == 0, errors
    found = json.loads(shown)
    assert (found["exact"], found["largest_difference"]) == (True, 0.0)
    assert found["weights"] == ["adapter/adapter_model.safetensors"]
    assert "Warning" not in errors, errors
    changed = records(root)
    changed[1]["loss"] = float(changed[1]["loss"]) + 1e-15  # type: ignore[arg-type]
    rewrite(root, changed)
    code, _, errors = command("verify", str(root / "out"), "--steps", "2")
    assert code == 11, errors
    assert errors.count("the traces part at step 2: loss was") == 1, "both processes find it, one says it"


def test_weights_that_are_not_the_trace_s(root: Path) -> None:
    path = root / "out" / "report.json"
    report = json.loads(path.read_text())
    report["files"]["adapter/adapter_model.safetensors"] = "0" * 64
    path.write_text(json.dumps(report))
    with pytest.raises(NotRepeatable, match="the traces are the same, but adapter/adapter_model.safetensors is not"):
        repeat(root)


def test_in_another_environment_a_tolerance_holds(root: Path) -> None:
    path = root / "out" / "recipe.lock"
    value = json.loads(path.read_text())
    value["environment"] |= {"torch": "2.99", "fingerprint": "0" * 64}
    path.write_text(json.dumps(value))
    changed = records(root)
    for record in changed:
        for name in ("loss", "grad_norm", "eval_loss"):
            if name in record:
                record[name] = float(record[name]) * 1.003  # type: ignore[arg-type]
    rewrite(root, changed)
    found = repeat(root)
    assert not found.exact
    assert found.largest == pytest.approx(0.003, rel=0.01)
    assert found.weights == ()
    assert found.environment == (
        f'environment torch: locked "2.99", here "{locks.read_lock(root / "repeated" / "recipe.lock").environment.torch}"',
    )
    assert found.tolerance == 0.02
    shutil.rmtree(root / "repeated")
    with pytest.raises(NotRepeatable, match=r"the traces part at step 1: loss was .* within 0\.001 of it was due"):
        repeat(root, tolerance=0.001)


def test_an_interrupted_run_is_repeated_as_far_as_it_came(root: Path) -> None:
    path = root / "out" / "report.json"
    report = json.loads(path.read_text())
    path.write_text(json.dumps({**report, "status": "interrupted"}))
    rewrite(root, [record for record in records(root) if record["step"] <= 5])  # type: ignore[operator]
    found = repeat(root)
    assert (found.steps, found.weights) == (5, ())
    path.unlink()
    shutil.rmtree(root / "repeated")
    assert repeat(root, steps=100).steps == 5


def test_what_cannot_be_verified_says_why(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder"):
        verify(tmp_path / "none", tmp_path / "x", NullProgress())
    rewrite(root, [])
    with pytest.raises(CheckpointError, match="holds no step"):
        repeat(root)
    (root / "out" / "recipe.lock").unlink()
    with pytest.raises(CheckpointError, match="every run"):
        repeat(root)
