"""The output folder of a run: one writer at a time, the saved weights, and the proof that they are alive."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from peftcli.data.templates import set_stops
from peftcli.errors import Busy, CheckpointError, PeftcliError, UsageError
from peftcli.interchange import hf_peft
from peftcli.methods.base import Method
from peftcli.methods.kinds import trainable_state
from peftcli.model.load import Base, quiet
from peftcli.recipe.schema import Recipe
from peftcli.report.files import sync
from peftcli.report.schema import LiveAdapterCheck
from peftcli.tasks.base import Task

RESULTS = (
    "recipe.yaml",
    "adapter",
    "model",
    "metrics.jsonl",
    "skipped.jsonl",
    "report.json",
    "report.md",
    "report.html",
    "report.junit.xml",
    "eval.md",
    "eval.junit.xml",
    "recipe.lock",
    "checkpoints",
    "trackers",
)


class OutputFolder:
    """Claims a run's folder while the run is on.

    Args:
        resume: go on with the run that is there. ``overwrite``: an earlier run may go, once :meth:`clear` is called.

    Raises:
        Busy: another process writes there; says which.
        UsageError: a run is there already and neither was asked for, or the folder cannot be written.
    """

    def __init__(self, path: Path, *, resume: bool, overwrite: bool) -> None:
        self.path, self.resume, self.overwrite = path, resume, overwrite
        self._lock: Any = None

    def __enter__(self) -> Path:
        while not self._claim():
            pass
        try:
            self._lock.truncate(0)
            self._lock.write(f"process {os.getpid()}")
            self._lock.flush()
        except OSError as error:
            with contextlib.suppress(OSError):  # closing the file tries to write once more
                self._release()
            raise CheckpointError(f"cannot write {self.path / '.lock'}: {error.strerror or error}", hint="free some space.") from error
        there = self._there()
        if there and not self.resume and not self.overwrite:
            self._release()
            raise UsageError(
                f"output_dir: {self.path} holds an earlier run ({', '.join(there)})",
                hint="--resume goes on with it, --overwrite replaces it, output_dir=... takes another folder.",
            )
        return self.path

    def _there(self) -> list[str]:
        return [name for name in RESULTS if (self.path / name).exists()]

    def clear(self) -> None:
        """Remove what an earlier run left, unless this one goes on with it. Until then a new run that is refused has cost nothing."""
        for name in () if self.resume else self._there():
            target = self.path / name
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        for left in self.path.glob(".*.part"):  # of a process that was killed while it wrote a report
            left.unlink()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._release()

    def _claim(self) -> bool:
        """Take the lock; ``False`` where its holder removed the file in between, so that this lock guards nothing."""
        lock = self.path / ".lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(lock, "a+", encoding="utf-8")  # noqa: SIM115 - held open as long as the run
        except OSError as error:
            raise UsageError(
                f"output_dir: {self.path} cannot be written: {error.strerror or error}", hint="choose another output_dir."
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            self._lock.close()
            self._lock = None
            raise Busy(f"{self.path} is being written by {holder}", hint="wait for it, or choose another output_dir.") from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._lock.fileno()), lock.stat()):
                return True
        self._lock.close()
        return False

    def _release(self) -> None:
        if self._lock is not None:
            # Removed while it is held: after closing, it may be another process's.
            (self.path / ".lock").unlink(missing_ok=True)
            self._lock.close()
            self._lock = None


# Numbers that a checksum widens at once.
_PIECE = 1 << 20


def fingerprints(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Two checksums of every trainable parameter's bits, to tell later which have moved."""
    return {name: _checksum(parameter) for name, parameter in trainable_state(model).items()}


def _checksum(parameter: Tensor) -> tuple[int, int]:
    bits = parameter.detach().contiguous().view(-1).view(torch.int32 if parameter.element_size() == 4 else torch.int64)
    sums = torch.zeros(2, dtype=torch.int64, device=bits.device)
    # Wrapping arithmetic is as good a checksum as any. A piece at a time: wide copies of all would be five times the parameter.
    for start in range(0, bits.numel(), _PIECE):
        piece = bits[start : start + _PIECE].to(torch.int64)
        place = torch.arange(start + 1, start + len(piece) + 1, device=bits.device, dtype=torch.int64)
        sums += torch.stack([piece.sum(), (piece * place).sum()])
    return int(sums[0]), int(sums[1])


def save_result(folder: Path, model: Any, method: Method[Any], task: Task[Any], base: Base, recipe: Recipe) -> Path:
    """Write ``adapter/`` (or ``model/`` for methods whose result is a whole model) and return that folder."""
    tokenizer = base.tokenizer
    whole = method.caps.whole_model
    target = folder / ("model" if whole else "adapter")

    def write(aside: Path) -> None:
        if whole:
            write_model(aside, model, tokenizer)
        else:
            hf_peft.save_adapter(
                aside,
                model,
                method,
                base_model=recipe.base_model.name,
                revision=recipe.base_model.revision or base.revision,
                task_type=task.peft_type,
                fresh=base.fresh,
            )
            tokenizer.save_pretrained(aside)
        (aside / "README.md").write_text(model_card(recipe, method, task, whole=whole), encoding="utf-8")

    put_in_place(target, write, hint="free some space, then go on with --resume.")
    return target


def write_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """A whole model and its tokenizer as ``from_pretrained`` loads them; answers end where the chat template ends them."""
    set_stops(model, tokenizer)
    with quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def put_in_place(target: Path, write: Callable[[Path], object], *, hint: str) -> None:
    """Let ``write`` fill a folder aside, then put it in the place of ``target``: whole or not at all.

    Raises:
        CheckpointError: the disk is full or fails; what was there before stays.
    """
    aside = target.with_name(f".{target.name}.partial")
    try:
        if aside.exists():
            shutil.rmtree(aside)
        aside.mkdir(parents=True)
        write(aside)
        readable(aside)
        for path in [*aside.iterdir(), aside]:
            sync(path)
        if target.exists():
            shutil.rmtree(target)
        os.replace(aside, target)
        sync(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{target} cannot be written: {reason}", hint=hint) from error


def readable(folder: Path) -> None:
    """Give every file the permissions that the user's mask allows: safetensors writes through private temporary files."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~mask)


def model_card(recipe: Recipe, method: Method[Any], task: Task[Any], *, whole: bool) -> str:
    """The README.md beside the weights: what it is and how to load it. A function of the recipe alone."""
    options = {k: v for k, v in recipe.method.model_dump(mode="json").items() if k != "name"}
    head = task.head()
    size = "" if head is None else f", num_labels={len(head.labels)}"
    how = (
        f'model = {task.auto_model}.from_pretrained("THIS_FOLDER")'
        if whole
        else f'base = {task.auto_model}.from_pretrained("{recipe.base_model.name}"{size})\n'
        'model = PeftModel.from_pretrained(base, "THIS_FOLDER")'
    )
    imports = f"from transformers import {task.auto_model}, AutoTokenizer" + ("" if whole else "\nfrom peft import PeftModel")
    use = f'```python\n{imports}\n\n{how}\ntokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")\n```'
    library = "transformers" if whole else "peft"
    if not whole and method.peft is not None and not method.peft.stock:
        library, use = "peftcli", "```bash\npeftcli chat THIS_FOLDER\npeftcli eval THIS_FOLDER --data rows.jsonl\n```"
    known = {"base_model": recipe.base_model.name, "library_name": library, "tags": [method.config.name, "peftcli"]}
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in known.items())
    rows = "\n".join(f"| {key} | `{json.dumps(value)}` |" for key, value in options.items())
    table = f"| option | value |\n| --- | --- |\n{rows}\n" if rows else ""
    sources = ", ".join(source.path for source in recipe.dataset.train)
    return (
        f"---\n{front}\n---\n\n# {recipe.base_model.name}, fine-tuned with {method.config.name}\n\n"
        f"{method.summary} ({method.paper})\n\n{table}\nTrained on: {sources}\n\n"
        f"{use}\n\n"
        "Written by peftcli. The run's report and resolved recipe lie beside this folder.\n"
    )


def live_check(
    saved: Path, model: Any, method: Method[Any], before: dict[str, tuple[int, int]], *, steps: int, loss: Any
) -> LiveAdapterCheck:
    """Read the saved weights back from disk into ``model`` and see that they are whole, finite, moved, and the same model.

    Args:
        saved: folder written by :func:`save_result`.
        before: :func:`fingerprints` before the first step.
        steps: optimizer steps taken; some parameters get their first gradient in the second one.
        loss: a function that measures the model's loss on fixed rows; called before and after the weights are read.
    """
    expected: dict[str, Tensor]
    cut: set[str] = set()  # parameters of which nothing is left in the file: they may end where they began
    first = float(loss())
    try:
        if method.caps.whole_model:
            expected = dict(model.named_parameters())
            found = {k: v for file in sorted(saved.glob("*.safetensors")) for k, v in load_file(file).items()}
        else:
            expected = {hf_peft.file_key(model, method, name): target for name, target in method.file_targets(model).items()}
            stored = hf_peft.read_tensors(saved / hf_peft.WEIGHTS, empty=method.peft is not None and method.peft.empty)
            cut = {name for name in before if (kept := stored.get(hf_peft.file_key(model, method, name))) is not None and not kept.numel()}
            found = hf_peft.as_parameters(model, method, stored)
    except (PeftcliError, OSError, ValueError) as error:
        return LiveAdapterCheck(passed=False, keys=0, loss_before_save=first, note=str(error))
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    not_finite = sorted(key for key, tensor in found.items() if not torch.isfinite(tensor).all())
    now = fingerprints(model)
    unmoved = sorted(name for name, mark in before.items() if now.get(name) == mark and name not in cut)
    with torch.no_grad():
        for key in set(expected) & set(found):
            if expected[key].shape == found[key].shape:
                expected[key].zero_()
                expected[key].copy_(found[key])
            else:
                missing.append(key)
    second = float(loss())
    young = steps < 2
    note = "a run of one step cannot have moved every parameter" if young and unmoved else None
    sound = not (missing or unexpected or not_finite) and (young or not unmoved)
    return LiveAdapterCheck(
        passed=sound and first == second,
        keys=len(found),
        missing=missing,
        unexpected=unexpected,
        non_finite=not_finite,
        unmoved=unmoved,
        loss_before_save=first,
        loss_after_reload=second,
        note=note,
    )
