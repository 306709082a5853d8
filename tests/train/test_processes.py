"""Several processes, and signals: the command itself, as a user starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import helpers
import psutil
import pytest

from peftcli.output import OutputFolder
from peftcli.train import checkpoint as checkpoints

ROOT = Path(__file__).parents[2]


def start(recipe: Path, *arguments: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "peftcli", "train", str(recipe), *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"the command hangs: {output[-2000:]}")
    return process.returncode, output


def wait(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    """Until a run that has been started has come so far."""
    until = time.monotonic() + 100
    while not reached():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture
def recipe(tiny_folders: dict[str, Path], tiny_data: Path, tmp_path: Path) -> Path:
    text = helpers.recipe_for(tiny_folders["llama"], tiny_data, tmp_path / "out", method="{name: lora, rank: 4, alpha: 8}")
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace("batch_size: 4", "batch_size: 3, gradient_accumulation_steps: 2, eval_steps: 3, save_steps: 3"))
    return path


def test_two_processes_are_one_with_twice_the_batch(recipe: Path, tmp_path: Path) -> None:
    """22 rows, 2 x 3 x 2 for each step: the last step of an epoch leaves the second process without rows in a micro step."""
    code, output = finish(start(recipe, "--processes", "2"))
    assert code == 0, output[-3000:]
    report = helpers.run(recipe.read_text(), f"output_dir={tmp_path / 'one'}", "train.batch_size=6")
    two, one = helpers.trace(tmp_path / "out"), helpers.trace(tmp_path / "one")
    assert [r["step"] for r in two] == [r["step"] for r in one]
    for a, b in zip(two, one, strict=True):
        assert a.get("learning_rate") == b.get("learning_rate"), "the schedule moves once for each step, not for each process"
        assert (a.get("tokens"), a.get("supervised_tokens"), a["epoch"]) == (b.get("tokens"), b.get("supervised_tokens"), b["epoch"])
        for key in ("loss", "grad_norm", "eval_loss"):
            if key in b:
                assert a[key] == pytest.approx(b[key], rel=1e-5 if key == "grad_norm" else 1e-6), key
    assert report.train.world_size == 1
    found, notes = checkpoints.newest(tmp_path / "out" / "checkpoints")
    assert found is not None
    assert not notes
    assert (found.folder / "rng-1.safetensors").is_file()
    assert found.progress.identity["processes"] == 2
    code, output = finish(start(recipe, "--resume"))
    assert code == 7, output[-3000:]
    assert "processes: was 2, is 1" in " ".join(output.split())


@pytest.mark.parametrize(("number", "processes"), [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2), (signal.SIGINT, 2)])
def test_a_signal_writes_a_checkpoint_and_ends_with_its_code(number: signal.Signals, processes: int, recipe: Path, tmp_path: Path) -> None:
    process = start(recipe, "train.epochs=2000", "train.save_steps=null", "train.eval_steps=null", "--processes", str(processes))
    metrics = tmp_path / "out" / "metrics.jsonl"
    wait(process, lambda: metrics.is_file() and metrics.read_text().count("\n") >= 3)
    process.send_signal(number)
    code, output = finish(process)
    assert code == 128 + number, output[-3000:]
    assert "Traceback" not in output, output[-3000:]
    assert "forcefully" not in output, output[-3000:]
    found, notes = checkpoints.newest(tmp_path / "out" / "checkpoints")
    assert found is not None, output[-3000:]
    assert not notes
    assert found.progress.step >= 3
    assert not (tmp_path / "out" / ".lock").exists()
    assert "--resume" in output


def test_a_second_signal_leaves_at_once_and_tears_nothing(recipe: Path, tmp_path: Path) -> None:
    """A checkpoint in every step: the second one arrives while the first one's is being written, or close to it."""
    process = start(recipe, "train.epochs=2000", "train.save_steps=1", "train.eval_steps=null")
    root = tmp_path / "out" / "checkpoints"
    wait(process, (root / "step-3").is_dir)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code in (130, 143), output[-3000:]
    assert "Traceback" not in output, output[-3000:]
    found, notes = checkpoints.newest(root)
    assert found is not None
    assert not notes
    assert found.progress.step >= 3


@pytest.mark.parametrize("victim", ["the launcher", "one of the two"])
def test_no_process_outlives_one_that_is_killed(victim: str, recipe: Path, tmp_path: Path) -> None:
    """Left alone they would wait for each other, and hold the folder against `--resume`."""
    process = start(recipe, "train.epochs=2000", "--processes", "2")
    root = tmp_path / "out" / "checkpoints"
    wait(process, (root / "step-3").is_dir)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    (psutil.Process(process.pid) if victim == "the launcher" else workers[-1]).kill()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    code, output = finish(process)
    if victim == "the launcher":
        assert code == -signal.SIGKILL
    else:
        assert code == 128 + signal.SIGKILL
        assert "error: one of the 2 processes was killed by SIGKILL" in output
    found, notes = checkpoints.newest(root)
    assert found is not None
    assert not notes
    with OutputFolder(tmp_path / "out", resume=True, overwrite=False):
        pass
