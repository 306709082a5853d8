"""Open what a run, or stock PEFT, has left: base model, adapter and recipe, ready to evaluate, merge or talk to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftcli.errors import CheckpointError, ModelError, UsageError
from peftcli.interchange import adapter_hub, hf_peft
from peftcli.methods import registry
from peftcli.methods.base import Context, Method
from peftcli.model.load import Base, load_base, load_config, open_base
from peftcli.model.source import Source
from peftcli.recipe.load import load_recipe
from peftcli.recipe.schema import BaseModelSection, Recipe
from peftcli.recipe.tasks import CausalLMTask, Seq2SeqTask
from peftcli.tasks import registry as tasks
from peftcli.tasks.base import Task

DTYPES = ("auto", "float32", "bfloat16")
QUANTIZATIONS = ("nf4", "fp4", "int8")


@dataclass
class Result:
    """A tuned model.

    Attributes:
        model: base with the adapter applied, in evaluation mode.
        base: how it was loaded; ``base.tokenizer`` is the one saved with the result.
        method: ``None`` for a plain model folder. ``task``: what it has learned.
        recipe: of the run, where there is one; ``base_dir`` is where its relative paths start.
        weights: folder of the adapter or model.
    """

    model: Any
    base: Base
    method: Method[Any] | None
    task: Task[Any]
    recipe: Recipe | None
    base_dir: Path
    weights: Path


@dataclass(frozen=True)
class Place:
    """A result that has been found on disk, its base not yet loaded.

    Attributes:
        recipe, base_dir, weights: as of :class:`Result`.
        adapter: ``None`` where the result is a whole model.
        section: which base it is for; the whole model itself where there is no recipe.
    """

    recipe: Recipe | None
    base_dir: Path
    weights: Path
    adapter: hf_peft.AdapterFile | None
    section: BaseModelSection

    @property
    def method(self) -> Method[Any] | None:
        """``None`` for a plain model folder."""
        if self.recipe is not None:
            return registry.get(self.recipe.method.name)(self.recipe.method)
        return self.adapter.method if self.adapter is not None else None

    @property
    def task(self) -> Task[Any]:
        """What it has learned. Without a recipe an encoder-decoder turns texts into others, and everything else continues text."""
        if self.recipe is not None:
            return tasks.make(self.recipe.task)
        if self.adapter is not None:
            pairs = self.adapter.fields.get("task_type") == "SEQ_2_SEQ_LM"
        else:
            pairs = bool(load_config(Source(str(self.weights), str(self.weights), None, True), None).is_encoder_decoder)
        return tasks.make(Seq2SeqTask() if pairs else CausalLMTask())

    @property
    def seed(self) -> int:
        """Of the initial values that its base was given."""
        return self.recipe.train.seed if self.recipe is not None else 0

    @property
    def tokenizer_folder(self) -> Path | None:
        """Where the result has a tokenizer of its own, and where it has none."""
        has_tokenizer = any((self.weights / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))
        return self.weights if has_tokenizer else None


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def open_result(
    path: Path,
    *,
    base_model: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    with_adapter: bool = True,
    trust_remote_code: bool = False,
) -> Result:
    """Load a run's folder, an adapter's folder, or a whole model's folder.

    Args:
        base_model, dtype, quantization: override what the run or adapter says; ``quantization`` may be ``none``.
        with_adapter: ``False`` loads the base alone, with the result's tokenizer.

    Raises:
        UsageError: nothing of the kind lies there, or an option has no such value.
        CheckpointError: the adapter is damaged or does not fit.
        ModelError: the base model cannot be found.
    """
    _allowed("--dtype", dtype, DTYPES)
    _allowed("--quantization", quantization, (*QUANTIZATIONS, "none"))
    place = locate(path, base_model)
    adapter, section = place.adapter, place.section
    update: dict[str, object] = {"new_tokens": []}
    if dtype is not None:
        update["dtype"] = dtype
    if quantization is not None:
        update["quantization"] = None if quantization == "none" else quantization
    if adapter is None and with_adapter:
        update["quantization"] = None if quantization in (None, "none") else quantization
    section = section.model_copy(update=update)
    name = section.name if adapter is not None or not with_adapter else str(place.weights)
    opened = open_base(
        section.model_copy(update={"name": name}),
        device=default_device(),
        base_dir=place.base_dir,
        trust_remote_code=trust_remote_code,
        tokenizer_folder=place.tokenizer_folder,
    )
    base = load_base(opened, auto_model=place.task.auto_model, head=place.task.head(), seed=place.seed)
    model = base.model
    if adapter is not None and with_adapter:
        model = hf_peft.apply_adapter(model, adapter, Context(frozen_quantized=base.quantization is not None, fresh=base.fresh))
        model.eval()
    return Result(model, base, place.method, place.task, place.recipe, place.base_dir, place.weights)


def locate(path: Path, base_model: str | None = None) -> Place:
    """Find and check what lies in ``path``, without loading the base; see :func:`open_result`."""
    recipe, base_dir, weights = _locate(path)
    adapter = _read(weights) if (weights / hf_peft.CONFIG).is_file() else None
    return Place(recipe, base_dir, weights, adapter, _section(recipe, adapter, weights, base_model))


def _read(folder: Path) -> hf_peft.AdapterFile:
    """An adapter in PEFT's layout, or in that of AdapterHub's library, whose config has the same name."""
    return adapter_hub.read(folder) if adapter_hub.is_theirs(folder) else hf_peft.read_adapter(folder)


def _allowed(option: str, value: str | None, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        raise UsageError(f"{option}: {value!r} is not one of {', '.join(allowed)}")


def _locate(path: Path) -> tuple[Recipe | None, Path, Path]:
    """(recipe or None, folder that its relative paths start from, folder with the weights)."""
    if not path.is_dir():
        raise UsageError(f"there is no folder {path}", hint="name a run's output folder or an adapter's folder.")
    for folder, inner in ((path, "adapter"), (path, "model"), (path.parent, path.name)):
        recipe = folder / "recipe.yaml"
        weights = folder / inner
        if recipe.is_file() and inner in ("adapter", "model") and weights.is_dir():
            return load_recipe(recipe).recipe, folder, weights
    if (path / hf_peft.CONFIG).is_file() or (path / "config.json").is_file():
        return None, path, path
    if (path / "recipe.yaml").is_file():
        raise CheckpointError(
            f"{path} holds a run without a result: there is neither adapter/ nor model/", hint="finish it: peftcli train RECIPE --resume"
        )
    raise UsageError(
        f"{path} holds neither a run nor an adapter",
        hint="a run has recipe.yaml and adapter/ or model/; an adapter has adapter_config.json.",
    )


def _section(recipe: Recipe | None, adapter: hf_peft.AdapterFile | None, weights: Path, base_model: str | None) -> BaseModelSection:
    if recipe is not None:
        section = recipe.base_model
        return section if base_model is None else section.model_copy(update={"name": base_model, "revision": None})
    name = base_model or (adapter.base_model if adapter is not None else str(weights))
    if name is None:
        raise ModelError(f"{weights / hf_peft.CONFIG} does not name its base model", hint="say it: --base-model NAME")
    revision = adapter.fields.get("revision") if adapter is not None and base_model is None else None
    return BaseModelSection(name=name, revision=revision if isinstance(revision, str) else None, dtype="auto")
