"""Checkpoints: complete or absent, verified when read, and enough to go on exactly."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch

from peftcli.errors import CheckpointError
from peftcli.methods.kinds import trainable_state
from peftcli.train import checkpoint as checkpoints
from peftcli.train.loop import Loop


def trained(folder: Path, steps: int = 6, **settings: Any) -> Loop:
    model, method = helpers.adapted("lora", rank=4, target_modules=["q_proj"])
    values = {"batch_size": 8, "save_steps": 2, "save_total_limit": 3, **settings}
    loop = helpers.make_loop(model, method, helpers.pattern_split(), folder, steps=steps + 1, identity={"a": 1}, **values)
    loop.total_steps = steps + 1
    loop.run()
    return loop


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    trained(root)
    return root / "checkpoints"


def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_what_a_checkpoint_holds(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["step-2", "step-4", "step-6"]
    files = sorted(p.name for p in (folder / "step-6").iterdir())
    assert files == [
        "manifest.json",
        "method.safetensors",
        "optimizer.safetensors",
        "rng-0.safetensors",
        "state.json",
        "trainable.safetensors",
    ]
    found, notes = checkpoints.newest(folder)
    assert found is not None
    assert not notes
    assert found.progress.step == 6
    assert found.progress.identity == {"a": 1}
    assert set(found.trainable) == {f"model.layers.{i}.self_attn.q_proj.lora_{x}" for i in (0, 1) for x in "AB"}


def test_random_states_come_back() -> None:
    random.seed(1)
    random.gauss(0, 1)  # leaves a second number waiting
    np.random.seed(2)
    np.random.randn()
    torch.manual_seed(3)

    def draw() -> list[float]:
        return [random.gauss(0, 1), random.random(), float(np.random.randn()), float(np.random.rand()), float(torch.rand(1))]

    state = {key: value.clone() for key, value in checkpoints.rng_state().items()}
    first = draw()
    draw()
    checkpoints.set_rng_state(state)
    assert draw() == first


def test_a_checkpoint_restores_weights_and_moments(folder: Path, tmp_path: Path) -> None:
    found, _ = checkpoints.newest(folder)
    assert found is not None
    model, method = helpers.adapted("lora", rank=4, target_modules=["q_proj"])
    loop = helpers.make_loop(model, method, helpers.pattern_split(), tmp_path, steps=7, batch_size=8, identity={"a": 1})
    loop._restore(found)
    for name, parameter in trainable_state(model).items():
        assert torch.equal(parameter, found.trainable[name])
    tensors, plain = checkpoints.optimizer_tensors(loop.optimizer)
    assert {**tensors, **plain}.keys() == found.optimizer.keys()
    assert all(torch.equal(tensors[key], found.optimizer[key]) for key in tensors)
    assert float(tensors["0.step"]) == 6.0


def damages() -> list[tuple[str, Callable[[Path], Any]]]:
    found: list[tuple[str, Callable[[Path], Any]]] = []
    names = ["manifest.json", "method.safetensors", "optimizer.safetensors", "rng-0.safetensors", "state.json", "trainable.safetensors"]
    for name in names:
        found.append((f"{name} missing", lambda f, name=name: (f / name).unlink()))
        found.append((f"{name} empty", lambda f, name=name: (f / name).write_bytes(b"")))
        found.append((f"{name} cut by one", lambda f, name=name: (f / name).write_bytes((f / name).read_bytes()[:-1])))
        found.append((f"{name} longer", lambda f, name=name: (f / name).write_bytes((f / name).read_bytes() + b"\n")))
    found.append(("manifest a list", lambda f: (f / "manifest.json").write_text("[]")))
    found.append(
        ("manifest of another step", lambda f: (f / "manifest.json").write_bytes((f.parent / "step-4" / "manifest.json").read_bytes()))
    )
    found.append(("another step's folder", lambda f: (shutil.rmtree(f), shutil.copytree(f.parent / "step-4", f))))
    found.append(("a file in its place", lambda f: (shutil.rmtree(f), f.write_text("x"))))
    return found


@pytest.mark.parametrize("damage", damages(), ids=lambda damage: damage[0])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    damage: tuple[str, Callable[[Path], Any]], folder: Path, tmp_path: Path
) -> None:
    root = copy(folder, tmp_path)
    damage[1](root / "step-6")
    found, notes = checkpoints.newest(root)
    assert found is not None
    assert found.progress.step == 4
    assert len(notes) == 1
    assert "step-6" in notes[0]


def test_no_bit_flip_or_truncation_loads(folder: Path, tmp_path: Path) -> None:
    root = copy(folder, tmp_path)
    newest = root / "step-6"
    draw = random.Random(0)
    files = sorted(newest.iterdir())
    for index in range(300):
        path = files[index % len(files)]
        good = path.read_bytes()
        bad = bytearray(good)
        if index % 4 == 3:
            del bad[draw.randrange(len(bad)) :]
        else:
            bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(bad))
        with pytest.raises(CheckpointError):
            checkpoints.read(newest)
        path.write_bytes(good)
    assert checkpoints.read(newest).progress.step == 6


def test_leftovers_of_a_crash_are_ignored_and_removed(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for name in (".step-9.partial", ".step-2.partial"):
        (root / name).mkdir(parents=True)
        (root / name / "state.json").write_text("{}")
    (root / "step-x").mkdir()
    assert checkpoints.newest(root) == (None, [])
    trained(tmp_path)
    assert sorted(p.name for p in root.iterdir()) == ["step-2", "step-4", "step-6", "step-x"]


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.6, 2.7, 2.8])
    model, method = helpers.adapted("lora", rank=4, target_modules=["q_proj"])
    loop = helpers.make_loop(
        model, method, helpers.pattern_split(), tmp_path, steps=8, batch_size=8, eval_steps=1, save_steps=1, save_total_limit=2,
        load_best_model_at_end=True, evaluate=lambda: {"loss": next(losses), "perplexity": 1.0, "token_accuracy": 0.5},
    )  # fmt: skip
    progress = loop.run()
    assert (progress.best_step, progress.best_loss) == (2, 1.0)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-2", "step-6", "step-7"]


def test_a_resumed_run_clears_up_after_one_that_was_killed_between_a_save_and_the_removal_of_the_oldest(tmp_path: Path) -> None:
    """Nothing has to be saved any more, so no later save would do it."""
    trained(tmp_path, steps=6, save_total_limit=3)
    root = tmp_path / "checkpoints"
    shutil.copytree(root / "step-2", root / ".step-6.partial")
    model, method = helpers.adapted("lora", rank=4, target_modules=["q_proj"])
    split = helpers.pattern_split()
    loop = helpers.make_loop(model, method, split, tmp_path, steps=7, batch_size=8, save_steps=2, save_total_limit=2, identity={"a": 1})
    found, notes = checkpoints.newest(root)
    assert not notes
    loop.run(found)
    assert sorted(p.name for p in root.iterdir()) == ["step-4", "step-6"]


def test_a_damaged_checkpoint_is_not_kept_as_the_newest(tmp_path: Path) -> None:
    """Counted as one, it would push out every whole one that is written before its step comes again."""
    trained(tmp_path, steps=6, save_total_limit=3)
    root = tmp_path / "checkpoints"
    (root / "step-6" / "trainable.safetensors").write_bytes(b"")
    (root / "step-4" / "state.json").write_bytes(b"")
    model, method = helpers.adapted("lora", rank=4, target_modules=["q_proj"])
    split = helpers.pattern_split()
    loop = helpers.make_loop(model, method, split, tmp_path, steps=4, batch_size=8, save_steps=1, save_total_limit=1, identity={"a": 1})
    found, notes = checkpoints.newest(root)
    assert found is not None
    assert len(notes) == 2
    loop.run(found)
    assert sorted(p.name for p in root.iterdir()) == ["step-3"]
    found, notes = checkpoints.newest(root)
    assert found is not None
    assert (found.progress.step, notes) == (3, [])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("where", ["mkdir", "save_file", "write_text", "fsync", "replace"])
def test_a_failing_disk_leaves_the_previous_checkpoint(where: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = trained(tmp_path, steps=3)
    root = tmp_path / "checkpoints"
    before = helpers.folder_bytes(root)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    target = {"mkdir": (Path, "mkdir"), "save_file": (checkpoints, "save_file"), "write_text": (Path, "write_text"), "fsync": (os, "fsync"), "replace": (os, "replace")}[where]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(*target, fail)
        with pytest.raises(CheckpointError, match=os.strerror(code)) as caught:
            loop.save(checkpoints.Progress(step=50))
    assert caught.value.exit_code == 7
    assert "\n" not in caught.value.message
    assert helpers.folder_bytes(root) == before


def test_a_full_disk_as_safetensors_reports_it(tmp_path: Path) -> None:
    """The library raises an error of its own where Python would raise OSError."""
    import resource
    import signal

    loop = trained(tmp_path, steps=3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(CheckpointError, match="cannot be written"):
            loop.save(checkpoints.Progress(step=50))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    found, notes = checkpoints.newest(tmp_path / "checkpoints")
    assert found is not None
    assert not notes
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_what_was_written_is_compared_with_what_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = trained(tmp_path, steps=3)
    real = checkpoints.read

    def other(path: Path) -> checkpoints.Checkpoint:
        found = real(path)
        next(iter(found.trainable.values())).view(-1)[0] += 1.0
        return found

    monkeypatch.setattr(checkpoints, "read", other)
    with pytest.raises(CheckpointError, match="what was written is not what was trained"):
        loop.save(checkpoints.Progress(step=50))


def test_a_checkpoint_of_another_run_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    found, _ = checkpoints.newest(folder)
    model, method = helpers.adapted("lora", rank=4, target_modules=["q_proj"])
    loop = helpers.make_loop(model, method, helpers.pattern_split(), tmp_path, steps=9, batch_size=8, identity={"a": 2, "b": 3})
    with pytest.raises(CheckpointError, match=r"a: was 1, is 2; b: was None, is 3"):
        loop.run(found)


def test_a_checkpoint_of_other_shapes_is_refused(folder: Path, tmp_path: Path) -> None:
    found, _ = checkpoints.newest(folder)
    for options, message in (({"rank": 5, "target_modules": ["q_proj"]}, r"\(4, 64\)"), ({"rank": 4}, "parameters are not the model's")):
        model, method = helpers.adapted("lora", **options)
        loop = helpers.make_loop(model, method, helpers.pattern_split(), tmp_path, steps=9, batch_size=8, identity={"a": 1})
        with pytest.raises(CheckpointError, match=message):
            loop.run(found)


def test_the_random_state_of_a_process_that_was_not_there(folder: Path) -> None:
    found, _ = checkpoints.newest(folder)
    assert found is not None
    with pytest.raises(CheckpointError, match="fewer processes"):
        checkpoints.read_rng(found, 1)


def test_state_is_json_and_tensors_only(folder: Path) -> None:
    state = json.loads((folder / "step-6" / "state.json").read_text())
    assert state["progress"]["step"] == 6
    assert not [p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".json", ".safetensors")]
