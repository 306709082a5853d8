"""A recipe as far as it can be known without weights: its rows, its order of steps, and its memory."""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from peftcli.data.batching import Plan
from peftcli.data.prepare import Prepared, prepare
from peftcli.errors import OutOfMemoryError
from peftcli.estimate import Estimate, estimate, fake_model
from peftcli.kernels import fast
from peftcli.methods import registry
from peftcli.methods.base import Method
from peftcli.model.load import Opened, open_base
from peftcli.plan import make_plan
from peftcli.recipe.load import LoadedRecipe
from peftcli.recipe.schema import Recipe
from peftcli.report.gates import refuse_unmeasured
from peftcli.report.text import size
from peftcli.result import default_device
from peftcli.tasks import registry as tasks
from peftcli.tasks.base import Task
from peftcli.train.checkpoint import Checkpoint


@dataclass(frozen=True)
class Forecast:
    """What several recipes over the same model and rows share.

    Attributes:
        opened: the model. ``task``: settled by the rows. ``data``: the rows, as the model will see them.
        program: bytes of the process itself, 0 where memory is counted for a GPU.
    """

    opened: Opened
    task: Task[Any]
    data: Prepared
    program: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation."""
        return self.opened.dtype

    @property
    def device(self) -> torch.device:
        """Of the computation."""
        return self.opened.device

    def need(self, recipe: Recipe) -> Estimate:
        """The memory of a run of ``recipe``, whose ``base_model`` and ``dataset`` must be those of the forecast.

        Raises:
            OutOfMemoryError: nothing fits into its ``train.memory_budget``.
        """
        fast.switch(on=recipe.train.fast_paths)
        try:
            return self._need(recipe)
        finally:
            fast.switch(on=recipe.train.fast_paths)  # forgets what was taken

    def _need(self, recipe: Recipe) -> Estimate:
        method, mode = _method(recipe), FakeTensorMode(allow_non_fake_inputs=True)
        # A method whose result is a whole model trains float32 weights, whatever the computation's dtype.
        storage = torch.float32 if method.caps.whole_model else self.dtype
        model = fake_model(self.opened, storage, mode, self.task)
        return estimate(
            model,
            method,
            self.task,
            recipe,
            self.data,
            self.plan(recipe),
            self.dtype,
            mode,
            device=self.device,
            program=self.program,
            files=_bytes(self.opened),
            gguf=self.opened.source.gguf_file is not None,
        )

    def ran_out(self, recipe: Recipe, step: int, last: Checkpoint | None) -> OutOfMemoryError:
        """What to say when memory ran out in optimizer step ``step``: what was asked for, as far as it can be planned, and what to change.

        Args:
            last: the newest checkpoint, where there is one.
        """
        program = psutil.Process().memory_info().rss if self.device.type == "cpu" else 0
        # The process already holds the model; only what Python and the libraries take is left to guess, and so left out.
        need = replace(self, program=0).need(recipe.model_copy(update={"train": recipe.train.model_copy(update={"memory_budget": None})}))
        parts = ("weights", "gradients", "optimizer", "activations", "allocator", "copies")
        told = ", ".join(f"{part} {size(getattr(need, part))}" for part in parts if getattr(need, part))
        held = f"; this process holds {size(program)}" if program else ""
        return OutOfMemoryError(
            f"memory ran out in step {step}; the plan needs {size(need.total)}, during {need.moment} ({told}){held}",
            hint="lower train.batch_size (and raise train.gradient_accumulation_steps), lower dataset.max_length, set "
            "train.memory_budget or train.gradient_checkpointing=true, or base_model.quantization=nf4; `peftcli check RECIPE` estimates "
            "each." + (f" The last good checkpoint is {last.folder}." if last else ""),
        )

    def plan(self, recipe: Recipe) -> Plan:
        """The order of the rows, for one process."""
        return make_plan(recipe, self.data, 1)


def forecast(loaded: LoadedRecipe, *, trust_remote_code: bool = False) -> Forecast:
    """Find the model, read its tokenizer and the rows.

    Raises:
        PeftcliError: the model, the tokenizer or the data cannot be had, or do not fit the recipe.
    """
    recipe = loaded.recipe
    device = default_device()
    opened = open_base(recipe.base_model, device=device, base_dir=loaded.base_dir, trust_remote_code=trust_remote_code)
    task = tasks.make(recipe.task)
    rows = task.rows(recipe.dataset, opened.tokenizer)
    limit = _method(recipe).row_limit(opened.max_positions)
    data = prepare(rows, base_dir=loaded.base_dir, seed=recipe.train.seed, max_positions=limit)
    task.settle(rows)
    refuse_unmeasured(recipe.expect, task.figures)
    _import_layers(opened)
    program = psutil.Process().memory_info().rss if device.type == "cpu" else 0
    return Forecast(opened, task, data, program)


def _import_layers(opened: Opened) -> None:
    """Import the code of the model's layers: the process is going to hold it, some 100 MB with all that it imports."""
    with contextlib.suppress(ImportError):
        importlib.import_module(type(opened.config).__module__.replace("configuration_", "modeling_"))


def _bytes(opened: Opened) -> int:
    """Of the files that hold the weights, as far as they are here."""
    return sum(file.stat().st_size for file in Path(opened.source.location).glob("*.safetensors"))


def _method(recipe: Recipe) -> Method[Any]:
    return registry.get(recipe.method.name)(recipe.method)
