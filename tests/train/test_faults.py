"""What goes wrong around a run: memory, disks, numbers, folders. One line says what happened and what to do; nothing good is lost."""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch

from peftcli.errors import CheckpointError, DataError, ModelError, OutOfMemoryError, PeftcliError, TrainingError, UsageError
from peftcli.report.progress import NullProgress
from peftcli.report.write import read_report
from peftcli.train import checkpoint as checkpoints

ROOT = Path(__file__).parents[2]
UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False).returncode == 0


@pytest.fixture
def text(tiny_folders: dict[str, Path], tiny_data: Path, tmp_path: Path) -> str:
    return helpers.recipe_for(tiny_folders["llama"], tiny_data, tmp_path / "out")


class At(NullProgress):
    """Do something once a step is done."""

    def __init__(self, step: int, act: Callable[[], Any]) -> None:
        self.at, self.act = step, act

    def step(self, record: dict[str, Any]) -> None:
        if record["step"] == self.at:
            self.act()


@pytest.mark.parametrize("ask", [lambda: torch.empty(2**58), lambda: bytearray(2**58)], ids=["torch", "python"])
def test_out_of_memory_tells_the_plan_and_what_to_change(ask: Callable[[], Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(OutOfMemoryError, match=r"memory ran out in step 6; the plan needs \d.*weights \d.*activations") as caught:
        helpers.run(text, "train.save_steps=2", display=At(5, ask))
    assert caught.value.exit_code == 6
    assert "train.gradient_checkpointing=true" in (caught.value.hint or "")
    assert str(tmp_path / "out" / "checkpoints" / "step-4") in (caught.value.hint or "")
    report = read_report(tmp_path / "out")
    assert report.status == "failed"
    assert "memory ran out" in (report.error or "")
    assert helpers.run(text, "train.save_steps=2", resume=True).train.resumed_from == "step-4"


def test_not_a_number_stops_before_the_step_and_names_the_last_good_checkpoint(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.optim.AdamW.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = real(self, *args, **kwargs)
        steps.append(1)
        if len(steps) == 5:  # what a too high learning rate ends in
            self.param_groups[0]["params"][0].data.view(-1)[0] = float("nan")
        return result

    steps: list[int] = []
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(TrainingError, match=r"step 6: the loss is not a number; no step was taken") as caught:
        helpers.run(text, "train.save_steps=4")
    assert len(steps) == 5, "the optimizer took no step on it"
    assert f"The last good checkpoint is {tmp_path / 'out' / 'checkpoints' / 'step-4'}." in (caught.value.hint or "")
    good, notes = checkpoints.newest(tmp_path / "out" / "checkpoints")
    assert good is not None
    assert not notes
    assert all(torch.isfinite(tensor).all() for tensor in good.trainable.values())
    assert read_report(tmp_path / "out").status == "failed"
    assert not (tmp_path / "out" / "adapter").exists()


@contextmanager
def smallest_files(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)


@pytest.mark.parametrize("size", [0, 100, 2_000, 5_000, 30_000])
def test_a_full_disk_ends_the_run_with_its_cause(size: int, text: str, tmp_path: Path) -> None:
    """The lock of the folder, the recipe, the metrics, a checkpoint, the weights: each is the first that does not fit."""
    with smallest_files(size), pytest.raises(CheckpointError, match=r"File too large|cannot be written|No space") as caught:
        helpers.run(text, "train.save_steps=3")
    assert caught.value.exit_code == 7
    assert "\n" not in caught.value.message
    assert not (tmp_path / "out" / ".lock").exists()
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.machine
@pytest.mark.skipif(not can_mount(), reason="this user may not mount a file system of its own")
def test_a_file_system_that_is_really_full(text: str, tmp_path: Path) -> None:
    """The command on a file system with room for two checkpoints; what it leaves is copied away before that is gone."""
    small, kept, size = tmp_path / "small", tmp_path / "kept", tmp_path / "size"
    options = ("train.save_steps=1", "train.epochs=1")
    helpers.run(text, *options, f"output_dir={size}")
    whole = sum(map(len, helpers.folder_bytes(size / "checkpoints" / "step-5").values()))
    small.mkdir()
    (tmp_path / "recipe.yaml").write_text(text)
    train = [sys.executable, "-m", "peftcli", "train", str(tmp_path / "recipe.yaml"), *options, f"output_dir={small / 'out'}"]
    script = (
        f"mount -t tmpfs -o size={int(2.7 * whole)} tmpfs {small} && {shlex.join(train)}; code=$?; cp -r {small}/out {kept}; exit $code"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "300"}
    done = subprocess.run([*UNSHARE, "sh", "-c", script], env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 7, done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "No space left on device" in done.stderr
    found, notes = checkpoints.newest(kept / "checkpoints")
    assert found is not None, done.stderr[-3000:]
    assert not notes
    resumed = helpers.run(text, *options, f"output_dir={kept}", resume=True)
    assert resumed.train.resumed_from == found.folder.name
    assert (kept / "adapter" / "adapter_model.safetensors").read_bytes() == (size / "adapter" / "adapter_model.safetensors").read_bytes()


def test_an_earlier_run_stays_until_nothing_of_the_new_one_can_be_refused(
    text: str, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helpers.run(text, "train.max_steps=2")
    before = helpers.folder_bytes(tmp_path / "out")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    refused: list[tuple[str, type[PeftcliError]]] = [
        (f"dataset.train={broken}", DataError),
        (f"dataset.train={tmp_path / 'none.jsonl'}", DataError),
        (f"base_model.name={tmp_path / 'none'}", ModelError),
        ("method.target_modules=[nothing]", UsageError),
        ("train.batch_tokens=2", UsageError),
    ]
    for override, kind in refused:
        with pytest.raises(kind):
            helpers.run(text, override, overwrite=True)
        assert helpers.folder_bytes(tmp_path / "out") == before, override
    helpers.run(text, "train.max_steps=3", overwrite=True)
    assert read_report(tmp_path / "out").train.steps == 3


@pytest.mark.parametrize("name", ["Läufe/ünïcode 名前 🙂", "with space/and 'quotes'", "x" * 200])
def test_unusual_folder_names_work(name: str, text: str, tmp_path: Path) -> None:
    helpers.run(text, "train.max_steps=1", f"output_dir={json.dumps(str(tmp_path / name), ensure_ascii=False)}")
    assert read_report(tmp_path / name).train.steps == 1


@pytest.mark.parametrize("name", ["x" * 300, "/".join(["x" * 200] * 30)])
def test_paths_that_are_too_long_are_a_usage_error(name: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="File name too long"):
        helpers.run(text, f"output_dir={tmp_path / name}")


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/sys").is_dir(), reason="root may write everywhere else")
def test_a_read_only_folder_is_a_usage_error(text: str, tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    # Root is not held back by permissions; the kernel's own files refuse it too.
    target = Path("/proc/sys/peftcli") if os.geteuid() == 0 else folder / "out"
    with pytest.raises(UsageError, match="cannot be written"):
        helpers.run(text, f"output_dir={target}")
