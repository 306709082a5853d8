"""Whole runs of a tiny model: repeatable to the byte, resumed exactly, stopped for the documented reasons."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import helpers
import pytest
from safetensors.torch import load_file, save_file

from peftcli.errors import Busy, CheckpointError, PeftcliError, TrainingError, UsageError
from peftcli.output import OutputFolder
from peftcli.report.progress import NullProgress
from peftcli.train.signals import Interrupted


@pytest.fixture
def text(tiny_folders: dict[str, Path], tiny_data: Path, tmp_path: Path) -> str:
    return helpers.recipe_for(tiny_folders["llama"], tiny_data, tmp_path / "out")


class StopAt(NullProgress):
    """Ask for a stop, as a signal would, once a step is done."""

    def __init__(self, step: int, number: int) -> None:
        self.at, self.number = step, number

    def step(self, record: dict[str, Any]) -> None:
        if record["step"] == self.at:
            os.kill(os.getpid(), self.number)


def test_two_identical_runs_write_identical_bytes(text: str, tmp_path: Path) -> None:
    helpers.run(text)
    helpers.run(text, f"output_dir={tmp_path / 'again'}")
    first, second = helpers.folder_bytes(tmp_path / "out" / "adapter"), helpers.folder_bytes(tmp_path / "again" / "adapter")
    assert first == second
    assert len(first) >= 5
    assert helpers.trace(tmp_path / "out") == helpers.trace(tmp_path / "again")
    helpers.run(text, f"output_dir={tmp_path / 'other'}", "train.seed=43")
    assert helpers.folder_bytes(tmp_path / "other" / "adapter")["adapter_model.safetensors"] != first["adapter_model.safetensors"]


@pytest.mark.parametrize("number", [2, 15])
def test_a_run_stopped_in_its_second_epoch_goes_on_exactly(number: int, text: str, tmp_path: Path) -> None:
    """Dropout, accumulation with a partial window (22 rows, 2 x 3 for each step), a stop in epoch 1, evaluations between."""
    options = [
        "train.batch_size=3",
        "train.gradient_accumulation_steps=2",
        "train.eval_steps=2",
        "train.epochs=2.5",
        "train.logging_steps=2",
    ]
    whole = helpers.run(text, *options, f"output_dir={tmp_path / 'whole'}")
    with pytest.raises(Interrupted) as caught:
        helpers.run(text, *options, "train.logging_steps=1", "train.save_steps=2", display=StopAt(7, number))
    assert caught.value.exit_code == 128 + number
    assert caught.value.checkpoint.name == "step-7"
    state = json.loads((caught.value.checkpoint / "state.json").read_text())["progress"]
    assert state["epoch"] == 1
    assert 0 < state["position"] < 4
    report = helpers.run(text, *options, resume=True)
    assert report.train.resumed_from == "step-7"
    assert helpers.folder_bytes(tmp_path / "out" / "adapter") == helpers.folder_bytes(tmp_path / "whole" / "adapter")
    later = [r for r in helpers.trace(tmp_path / "whole") if r["step"] > 8]
    assert later
    assert [r for r in helpers.trace(tmp_path / "out") if r["step"] > 8] == later
    for field in ("steps", "epochs", "tokens", "supervised_tokens", "loss_best", "best_step"):
        assert getattr(report.train, field) == getattr(whole.train, field), field
    assert report.data.batch_order_sha256 == whole.data.batch_order_sha256
    assert report.eval is not None
    assert whole.eval is not None
    assert report.eval.loss == whole.eval.loss
    assert report.eval_before is not None
    assert whole.eval_before is not None
    assert report.eval_before.loss == whole.eval_before.loss


def test_a_resumed_run_whose_newest_checkpoint_is_torn_uses_the_one_before(text: str, tmp_path: Path) -> None:
    helpers.run(text, f"output_dir={tmp_path / 'whole'}")
    with pytest.raises(Interrupted):
        helpers.run(text, "train.save_steps=4", display=StopAt(10, 15))
    torn = tmp_path / "out" / "checkpoints" / "step-10" / "trainable.safetensors"
    torn.write_bytes(torn.read_bytes()[:-4])
    assert helpers.run(text, "train.save_steps=4", resume=True).train.resumed_from == "step-8"
    assert helpers.folder_bytes(tmp_path / "out" / "adapter") == helpers.folder_bytes(tmp_path / "whole" / "adapter")
    assert helpers.trace(tmp_path / "out") == helpers.trace(tmp_path / "whole"), "records after the checkpoint are written anew"


def test_resume_refuses_another_recipe_or_other_data(text: str, tiny_data: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    text = text.replace(str(tiny_data), str(data))
    with pytest.raises(Interrupted):
        helpers.run(text, display=StopAt(3, 15))
    for override, name in (("train.learning_rate=1e-3", r"train\.learning_rate"), ("method.rank=5", r"method\.rank"), ("train.seed=1", r"train\.seed"), ("train.epochs=3", "total steps")):  # fmt: skip
        with pytest.raises(CheckpointError, match=name):
            helpers.run(text, override, resume=True)
    rows = (data / "train.jsonl").read_text()
    (data / "train.jsonl").write_text(rows.replace("please", "PLEASE", 1))
    with pytest.raises(CheckpointError, match=r"file .*train\.jsonl"):
        helpers.run(text, resume=True)
    (data / "train.jsonl").write_text(rows)
    assert helpers.run(text, "train.logging_steps=7", resume=True).status == "completed"


def test_a_resumed_run_removes_what_a_killed_one_was_writing(text: str, tmp_path: Path) -> None:
    helpers.run(text, "train.save_steps=3")
    left = [
        tmp_path / "out" / ".report.json.x1y2.part",
        tmp_path / "out" / ".adapter.partial" / "half",
        tmp_path / "out" / ".adapter.partial",
    ]
    left[2].mkdir()
    left[1].touch()
    left[0].touch()
    helpers.run(text, "train.save_steps=3", resume=True)
    assert not [path for path in left if path.exists()]


def test_resume_without_a_checkpoint_says_so(text: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no whole checkpoint to resume from"):
        helpers.run(text, resume=True)


def test_a_folder_with_a_run_is_not_overwritten_unasked(text: str, tmp_path: Path) -> None:
    helpers.run(text, "train.max_steps=1")
    before = helpers.folder_bytes(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds an earlier run") as caught:
        helpers.run(text, "train.max_steps=1")
    assert "--overwrite" in (caught.value.hint or "")
    assert {k: v for k, v in helpers.folder_bytes(tmp_path / "out").items() if k != "notes.txt"} == before
    helpers.run(text, "train.max_steps=2", overwrite=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine", "what a run did not write stays"
    assert [record["step"] for record in helpers.trace(tmp_path / "out")] == [1, 2, 2], "two steps and the final evaluation"


def test_a_folder_in_use_is_refused_and_names_the_holder(text: str, tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out", resume=False, overwrite=False):
        started = time.monotonic()
        with pytest.raises(Busy, match=f"process {os.getpid()}") as caught:
            helpers.run(text)
        assert time.monotonic() - started < 2.0, "known before anything is loaded"
        assert caught.value.exit_code == 9
        with pytest.raises(Busy):
            helpers.run(text, overwrite=True)
    assert list((tmp_path / "out").iterdir()) == []
    helpers.run(text, "train.max_steps=1")


def test_an_unusable_folder_is_a_usage_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="cannot be written"):
        helpers.run(text, f"output_dir={tmp_path / 'file' / 'out'}")


@pytest.mark.parametrize(("options", "steps"), [(["train.max_steps=7"], 7), (["train.max_steps=2", "train.epochs=5"], 2), (["train.epochs=0.5"], 3), (["train.epochs=1.5"], 9), (["train.epochs=0.01"], 1), (["train.epochs=1.1", "train.batch_size=2", "dataset.limit=20"], 11)])  # fmt: skip
def test_length_of_a_run(options: list[str], steps: int, text: str) -> None:
    report = helpers.run(text, *options, "eval.before=false")
    assert report.train.steps == steps
    assert report.status == "completed"


def test_early_stopping_and_the_best_weights(text: str, tmp_path: Path) -> None:
    """A learning rate that is far too high: the held-out loss soon rises."""
    options = ["train.eval_steps=1", "train.early_stopping_patience=3", "train.load_best_model_at_end=true", "train.learning_rate=0.3", "train.epochs=20", "train.scheduler=constant"]  # fmt: skip
    report = helpers.run(text, *options)
    evaluations = {r["step"]: r["eval_loss"] for r in helpers.trace(tmp_path / "out") if "eval_loss" in r}
    best = min(evaluations, key=lambda step: evaluations[step])
    assert report.status == "stopped_early"
    assert report.train.steps == best + 3
    assert (report.train.best_step, report.train.loss_best) == (best, evaluations[best])
    assert report.eval is not None
    assert report.eval.loss == pytest.approx(evaluations[best], rel=1e-6)
    assert report.checks.live_adapter is not None
    assert report.checks.live_adapter.passed


def test_not_a_number_in_the_base_ends_with_exit_code_5(text: str, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny_folders["llama"], tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match="step 1: the loss is not a number") as caught:
        helpers.run(text.replace(str(tiny_folders["llama"]), str(broken)))
    assert caught.value.exit_code == 5
    assert not (tmp_path / "out" / "adapter").exists()
    assert not (tmp_path / "out" / ".lock").exists()


def test_starting_from_an_adapter(text: str, tmp_path: Path) -> None:
    first = helpers.run(text)
    assert first.eval is not None
    second = helpers.run(
        text, f"output_dir={tmp_path / 'second'}", "train.learning_rate=1e-8", "train.max_steps=2", init_adapter=tmp_path / "out"
    )
    assert second.eval is not None
    assert second.eval.loss == pytest.approx(first.eval.loss, rel=1e-4)
    with pytest.raises(PeftcliError, match="does not fit|needs"):
        helpers.run(text, f"output_dir={tmp_path / 'third'}", "method.rank=5", init_adapter=tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("llama-tied", "{name: full}"),
        ("gpt2", "{name: full}"),
        ("llama-tied", "{name: qlora, rank: 4}"),  # bitsandbytes has no Conv1D: GPT-2's layers are not quantized
        ("llama-tied", "{name: lora, modules_to_save: [lm_head]}"),
        ("gpt2", "{name: lora, modules_to_save: [lm_head]}"),
    ],
)
def test_other_models_and_methods_end_to_end(kind: str, method: str, text: str, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    text = text.replace(str(tiny_folders["llama"]), str(tiny_folders[kind])).replace(
        "{name: lora, rank: 4, alpha: 8, dropout: 0.1}", method
    )
    report = helpers.run(
        text,
        "train.gradient_checkpointing=true",
        "base_model.new_tokens=['green', 'please']" if "name: lora" in method else "train.epochs=2",
    )
    assert report.checks.live_adapter is not None
    assert report.checks.live_adapter.passed, report.checks.live_adapter
    assert report.eval is not None
    assert report.eval_before is not None
    assert report.eval.loss < report.eval_before.loss
