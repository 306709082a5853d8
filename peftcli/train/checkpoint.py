"""Checkpoints that are complete or absent, and hold everything that an exact resume needs. No pickle.

``checkpoints/step-<N>/`` holds ``trainable.safetensors`` (every trainable parameter by name), ``optimizer.safetensors``,
``method.safetensors``, ``rng-<process>.safetensors``, ``state.json`` and ``manifest.json`` with the sha256 of the others. It is
written aside, flushed and renamed, so a crash at any moment leaves either the whole folder or none.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftcli.errors import CheckpointError
from peftcli.model.source import file_sha256
from peftcli.report.files import sync

VERSION = 1
_STEP = re.compile(r"step-(\d+)")


@dataclass
class Progress:
    """Where a run stands; everything countable that a checkpoint carries on.

    ``step`` counts optimizer steps that are done, ``epoch`` and ``position`` say where the next step lies in the plan.
    ``before`` holds what was measured before training, ``identity`` what a resumed run must share.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    loss_first: float | None = None
    loss_last: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    window_loss: float = 0.0
    window_tokens: int = 0
    window_parts: dict[str, float] = field(default_factory=dict)
    before: dict[str, Any] | None = None
    identity: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read from disk and found whole."""

    folder: Path
    progress: Progress
    trainable: dict[str, Tensor]
    optimizer: dict[str, Any]
    method: dict[str, Tensor]


def rng_state() -> dict[str, Tensor]:
    """The random states of this process as tensors."""
    version, keys, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    inner = numpy_state["state"]
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *keys], dtype=torch.int64),
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.concatenate([inner["key"].astype(np.int64), [inner["pos"], numpy_state["has_gauss"]]])),
        "numpy_gauss": torch.tensor([numpy_state["gauss"]], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Tensor]) -> None:
    """The inverse of :func:`rng_state`."""
    torch.set_rng_state(state["torch"])
    python = state["python"].tolist()
    gauss = float(state["python_gauss"][0])
    random.setstate((python[0], tuple(python[1:]), None if math.isnan(gauss) else gauss))
    numbers = state["numpy"].numpy()
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": numbers[:-2].astype(np.uint32), "pos": int(numbers[-2])},
            "has_gauss": int(numbers[-1]),
            "gauss": float(state["numpy_gauss"][0]),
        }
    )
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as flat tensors and plain JSON values."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for index, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value.detach().cpu().contiguous()
            else:
                plain[f"{index}.{key}"] = value
    return tensors, plain


def load_optimizer(optimizer: torch.optim.Optimizer, flat: Mapping[str, Any]) -> None:
    """Put the state of :func:`optimizer_tensors` into a fresh optimizer over the same parameters."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in flat.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def stage(folder: Path, step: int) -> Path:
    """The folder that a checkpoint is written into before it gets its name; emptied if an earlier run died in it.

    Raises:
        CheckpointError: the disk refuses it.
    """
    aside = staged(folder, step)
    with _writing(aside):
        for left in folder.glob(".step-*.partial"):
            shutil.rmtree(left)
        aside.mkdir(parents=True)
    return aside


def staged(folder: Path, step: int) -> Path:
    """Where :func:`stage` puts the checkpoint of ``step``."""
    return folder / f".step-{step}.partial"


@contextlib.contextmanager
def _writing(aside: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint {aside.name.removeprefix('.').removesuffix('.partial')} cannot be written: "
            f"{getattr(error, 'strerror', None) or error}",
            hint=f"free some space or choose another output_dir; the checkpoints before it in {aside.parent} are whole.",
        ) from error


def write_rng(aside: Path, process: int) -> None:
    """Each process adds its own random state to the staged checkpoint.

    Raises:
        CheckpointError: the disk refuses it.
    """
    with _writing(aside):
        _save(rng_state(), aside / f"rng-{process}.safetensors")


def commit(
    aside: Path,
    *,
    progress: Progress,
    trainable: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    method: Mapping[str, Tensor],
    keep: int,
    protect: int | None,
) -> Path:
    """Complete the staged checkpoint, give it its name and drop old ones.

    Args:
        keep: how many of the newest stay.
        protect: a step (the best) whose checkpoint stays as well.

    Raises:
        CheckpointError: the disk is full or fails; the previous checkpoints are untouched.
    """
    folder = aside.parent
    final = folder / f"step-{progress.step}"
    with _writing(aside):
        tensors, plain = optimizer_tensors(optimizer)
        _save({name: p.detach().cpu() for name, p in trainable.items()}, aside / "trainable.safetensors")
        _save(tensors, aside / "optimizer.safetensors")
        _save(dict(method), aside / "method.safetensors")
        state = {"version": VERSION, "progress": asdict(progress), "optimizer": plain}
        (aside / "state.json").write_text(_text(state), encoding="utf-8")
        files = sorted(p for p in aside.iterdir())
        manifest = {"version": VERSION, "step": progress.step, "sha256": {p.name: file_sha256(p) for p in files}}
        (aside / "manifest.json").write_text(_text(manifest), encoding="utf-8")
        for path in [*files, aside / "manifest.json", aside]:
            sync(path)
        if final.exists():
            shutil.rmtree(final)
        os.replace(aside, final)
        sync(folder)
    # Later ones were passed over as damaged when the run was resumed: they must not count as the newest.
    for later in (step for step in _steps(folder) if step > progress.step):
        shutil.rmtree(folder / f"step-{later}", ignore_errors=True)
    tidy(folder, progress.step, keep, protect)
    return final


def tidy(folder: Path, now: int, keep: int, protect: int | None) -> None:
    """Remove what a run that stands at step ``now`` does not need: older checkpoints, and what an earlier process left half done.

    Args:
        keep: how many of the newest stay. ``protect``: a step whose checkpoint stays as well.
    """
    for left in folder.glob(".step-*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    for step in sorted(step for step in _steps(folder) if step <= now)[:-keep]:
        if step != protect:
            shutil.rmtree(folder / f"step-{step}", ignore_errors=True)


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return [int(match[1]) for path in folder.iterdir() if (match := _STEP.fullmatch(path.name))]


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and a note for each newer one that is not."""
    notes: list[str] = []
    for step in sorted(_steps(folder), reverse=True):
        try:
            return read(folder / f"step-{step}"), notes
        except CheckpointError as error:
            notes.append(error.message)
    return None, notes


def read(folder: Path) -> Checkpoint:
    """Read a checkpoint and verify every file against the manifest.

    Raises:
        CheckpointError: a file is missing, changed or unreadable.
    """
    try:
        text = (folder / "manifest.json").read_text(encoding="utf-8")
        manifest = json.loads(text)
        if manifest["version"] != VERSION:
            raise CheckpointError(f"{folder}: checkpoint version {manifest['version']} is not {VERSION}")
        # Nothing vouches for the manifest but its own form and the folder's name.
        if text != _text(manifest) or folder.name != f"step-{manifest['step']}":
            raise CheckpointError(f"{folder / 'manifest.json'} is damaged")
        for name, digest in manifest["sha256"].items():
            if Path(name).name != name or file_sha256(folder / name) != digest:
                raise CheckpointError(f"{folder / name} is damaged: its sha256 is not the manifest's")
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return Checkpoint(
            folder,
            Progress(**state["progress"]),
            load_file(folder / "trainable.safetensors"),
            {**load_file(folder / "optimizer.safetensors"), **state["optimizer"]},
            load_file(folder / "method.safetensors"),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is no whole checkpoint: {error}") from error


def read_rng(checkpoint: Checkpoint, process: int) -> dict[str, Tensor]:
    """The random state that ``process`` saved.

    Raises:
        CheckpointError: the run had fewer processes.
    """
    path = checkpoint.folder / f"rng-{process}.safetensors"
    if not path.exists():
        raise CheckpointError(f"{checkpoint.folder} was written by fewer processes than run now", hint="resume with the same --processes.")
    return load_file(path)


def _text(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in sorted(tensors.items())}, path, metadata={"format": "pt"})
