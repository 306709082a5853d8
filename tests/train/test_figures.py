"""Figures that are read one step late, as on a GPU, change nothing but when they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import helpers
import pytest
import torch

from peftcli.errors import TrainingError
from peftcli.methods.kinds import trainable_state
from peftcli.report.metrics import MetricsWriter
from peftcli.train import loop as loops


def late(yes: bool) -> Any:
    """The fused AdamW of the CPU takes ``found_inf`` too, so the late way of reading runs here as it does on a GPU."""
    return mock.patch.object(loops, "defers", lambda *_: yes)


def test_a_late_reading_gives_the_same_run(tmp_path: Path) -> None:
    found: list[tuple[Any, ...]] = []
    for name, yes in (("late", True), ("at once", False)):
        model, method = helpers.adapted("lora", rank=4)
        folder = tmp_path / name
        folder.mkdir()
        loop = helpers.make_loop(
            model, method, helpers.make_split([5, 9, 7, 11, 6, 8, 12]), folder, steps=9, batch_size=2, gradient_accumulation_steps=2,
            logging_steps=3, save_steps=4, metrics=MetricsWriter(folder / "metrics.jsonl", append=False, truncate_after_step=None),
        )  # fmt: skip
        with late(yes):
            loop.run()
        loop.close()
        saved = helpers.folder_bytes(folder / "checkpoints" / "step-4")
        found.append(
            (helpers.trace(folder), saved["trainable.safetensors"], {k: p.detach().clone() for k, p in trainable_state(model).items()})
        )
    assert [record["step"] for record in found[0][0]] == [1, 3, 6, 9]
    assert found[0][:2] == found[1][:2]
    for key, value in found[0][2].items():
        assert torch.equal(value, found[1][2][key]), key


def test_no_figure_is_read_before_the_next_steps_work_is_queued(tmp_path: Path) -> None:
    order: list[str] = []
    model, method = helpers.adapted("lora", rank=4)
    loop = helpers.make_loop(model, method, helpers.pattern_split(), tmp_path, steps=4, batch_size=8, logging_steps=100)
    method.before_step = lambda model, tick: order.append(f"queued {tick.step}")  # type: ignore[method-assign]
    told = loops.Figures.told

    def reading(self: loops.Figures) -> loops.Told:
        order.append(f"read {self.step}")
        return told(self)

    with late(True), mock.patch.object(loops.Figures, "told", reading):
        loop.run()
    # The first and the last step are logged.
    assert order == ["queued 1", "read 1", "queued 2", "queued 3", "read 2", "queued 4", "read 3", "read 4"]


def test_what_is_not_a_number_is_found_one_step_later_and_no_step_was_taken_on_it(tmp_path: Path) -> None:
    model, method = helpers.adapted("lora", rank=4)
    loop = helpers.make_loop(model, method, helpers.pattern_split(), tmp_path, steps=6, batch_size=8, logging_steps=100)
    weights: dict[int, dict[str, torch.Tensor]] = {}

    def poison(model: Any, tick: Any) -> None:
        if tick.step == 3:
            next(p for p in model.parameters() if p.requires_grad).grad.view(-1)[0] = float("nan")

    method.before_step = poison  # type: ignore[method-assign]
    method.after_step = lambda model, tick: weights.update(  # type: ignore[method-assign]
        {tick.step: {key: p.detach().clone() for key, p in trainable_state(model).items()}}
    )
    with late(True), pytest.raises(TrainingError, match=r"step 3: the gradient is not a number; no step was taken"):
        loop.run()
    assert sorted(weights) == [1, 2, 3]
    for key, value in trainable_state(model).items():
        assert torch.equal(value, weights[2][key]), key
        assert torch.equal(value, weights[3][key]), key


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_a_step_that_is_not_logged_waits_for_nothing(tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from peftcli.tasks.base import Layout
    from peftcli.train.optimizers import build_optimizer

    model, method = helpers.adapted("lora", dtype=torch.bfloat16, rank=4)
    model = model.to("cuda")
    loop = helpers.make_loop(
        model, method, helpers.make_split([60] * 12), tmp_path, steps=5, batch_size=4, logging_steps=100, max_grad_norm=1.0
    )
    AcceleratorState._reset_state(True)
    loop.accelerator = Accelerator()
    loop.layout = Layout(True, 3, torch.device("cuda"))
    loop.optimizer = build_optimizer(method.param_groups(model, 1e-3, 0.0), loop.settings, torch.device("cuda"))
    step = loop._step

    def strict(*args: Any) -> None:
        # The first two warm caches up and compile.
        torch.cuda.set_sync_debug_mode("error" if loop.progress.step >= 2 else "default")
        try:
            step(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    loop._step = strict  # type: ignore[method-assign]
    loop.run()
    assert loop.progress.step == 5
