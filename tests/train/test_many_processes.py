"""Every method in two processes: what one process computes with twice the batch, the same weights in both, a file that loads."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import helpers
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from peftcli.interchange import hf_peft
from peftcli.methods import registry
from peftcli.methods.kinds import trainable_state

ROOT = Path(__file__).parents[2]
NAMES = registry.names()


def home(name: str) -> str:
    """GPT-2 where the method needs biases; one tied model, so that sharing meets several processes."""
    return {"bitfit": "gpt2", "full": "llama-tied"}.get(name, "llama")


def launch(processes: int, recipes: list[Path]) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = str(Path(__file__).with_name("many_runs.py"))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        script,
        *map(str, recipes),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[:6000]


def write(folder: Path, name: str, model: Path, data: Path, *, batch: int) -> Path:
    text = helpers.recipe_for(model, data, folder / name, method=f"{{name: {name}}}")
    path = folder / f"{name}.yaml"
    path.write_text(text.replace("batch_size: 4", f"batch_size: {batch}, gradient_accumulation_steps: 2").replace("1e-2", "2e-3"))
    return path


@pytest.fixture(scope="module")
def both(tiny_folders: dict[str, Path], tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of every method in two processes, and in one with twice the batch. 22 rows in steps of 12: in the last one
    of an epoch a process has no rows of its own in a micro step."""
    root = tmp_path_factory.mktemp("processes")
    for where in ("two", "one"):
        (root / where).mkdir()
    launch(2, [write(root / "two", name, tiny_folders[home(name)], tiny_data, batch=3) for name in NAMES])
    for name in NAMES:
        helpers.run(write(root / "one", name, tiny_folders[home(name)], tiny_data, batch=6).read_text())
    return root


@pytest.mark.parametrize("name", NAMES)
def test_the_trace_is_that_of_one_process_with_twice_the_batch(name: str, both: Path) -> None:
    two, one = helpers.trace(both / "two" / name), helpers.trace(both / "one" / name)
    assert [r["step"] for r in two] == [r["step"] for r in one]
    assert len(one) >= 4
    for a, b in zip(two, one, strict=True):
        assert a.keys() == b.keys()
        for key in b.keys() - {"eval_intervals"}:
            exact = key in ("step", "epoch", "learning_rate", "tokens", "supervised_tokens")
            assert a[key] == (b[key] if exact else pytest.approx(b[key], rel=2e-4, abs=1e-7)), key


@pytest.mark.parametrize("name", NAMES)
def test_the_processes_end_with_the_same_weights_and_state(name: str, both: Path) -> None:
    first, second = (load_file(both / "two" / f"{name}.rank-{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first), "masks, snapshots and frozen weights too"
    model, method = helpers.adapted(name, home(name))
    assert {f"model.{key}" for key in trainable_state(model)} <= {key.replace("model.model.", "model.", 1) for key in first} | first.keys()
    # AdaLoRA's masks and Delta-LoRA's snapshots are among the states.
    assert {f"state.{key}" for key in method.state()} <= first.keys()


def tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / "adapter" / hf_peft.WEIGHTS
    return load_file(path if path.is_file() else folder / "model" / "model.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_whole_and_holds_what_was_trained(name: str, both: Path) -> None:
    two, one = tensors(both / "two" / name), tensors(both / "one" / name)
    form = registry.get(name).peft
    assert list(two) == sorted(two)
    assert two.keys() == one.keys()
    for key in one:
        assert two[key].numel() or (form is not None and form.empty), key
        assert two[key].shape == one[key].shape
        assert float((two[key] - one[key]).abs().max() if two[key].numel() else 0.0) <= 2e-3, "a few units of the optimizer's noise"
    if form is None or not form.stock:
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        peft.PeftModel.from_pretrained(helpers.tiny_model(home(name)), both / "two" / name / "adapter")


def test_four_processes_take_the_rows_in_the_same_order(tiny_folders: dict[str, Path], tiny_data: Path, tmp_path: Path) -> None:
    for where in ("four", "one"):
        (tmp_path / where).mkdir()
    four = write(tmp_path / "four", "lora", tiny_folders["llama"], tiny_data, batch=2)
    launch(4, [four])
    helpers.run(write(tmp_path / "one", "lora", tiny_folders["llama"], tiny_data, batch=8).read_text())
    traces = [helpers.trace(tmp_path / where / "lora") for where in ("four", "one")]
    for a, b in zip(*traces, strict=True):
        assert a.get("learning_rate") == b.get("learning_rate")
        assert (a["step"], a.get("tokens"), a.get("supervised_tokens")) == (b["step"], b.get("tokens"), b.get("supervised_tokens"))
        for key in ("loss", "eval_loss"):
            assert a.get(key) == (pytest.approx(b[key], rel=1e-5) if key in b else None)
    ranks = [load_file(tmp_path / "four" / f"lora.rank-{rank}.safetensors") for rank in range(4)]
    assert all(torch.equal(ranks[0][key], other[key]) for other in ranks[1:] for key in other)


def test_one_two_and_four_processes_are_the_same_run_in_float64(tmp_path: Path) -> None:
    """Rows of very different lengths, two accumulation steps, a partial last step: order and learning rate exact, weights to 1e-10."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(Path(__file__).with_name("worlds.py")), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    one, two, four = (load_file(tmp_path / f"{processes}.safetensors") for processes in (1, 2, 4))
    assert len(one["rates"]) == 5
    assert len(set(one["rates"].tolist())) == 5, "it falls in every step"
    assert float(max(one[name].abs().max() for name in one if name.endswith("lora_B"))) > 1e-2
    for other in (two, four):
        assert torch.equal(one["rates"], other["rates"])
        assert torch.equal(one["rows"], other["rows"])
        assert one.keys() == other.keys()
        assert max(float((one[name] - other[name]).abs().max()) for name in one) <= 1e-10
