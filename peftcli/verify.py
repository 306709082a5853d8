"""Repeat a run from its lock and hold the repetition against it, step by step.

Under the environment that the run had, every number of its trace and every byte of its weights must come again. Under another one
(other libraries, another processor) rounding differs, and the trace must stay within a tolerance.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftcli import environment, launch
from peftcli import lock as locks
from peftcli.errors import CheckpointError, NotRepeatable, UsageError
from peftcli.recipe.load import LoadedRecipe, load_recipe
from peftcli.report.files import hash_files
from peftcli.report.metrics import read_metrics
from peftcli.report.progress import NullProgress
from peftcli.report.progress import Progress as Display
from peftcli.report.schema import Report
from peftcli.report.write import read_report
from peftcli.result import default_device
from peftcli.run import Options, train

# What a trace consists of, in the order in which a difference is told.
TRACE = ("learning_rate", "loss", "grad_norm", "eval_loss")
# Under another environment, by the base's dtype: how far loss and gradient norm may be from the run's, relative to it. Other instructions
# and threads moved short runs by 1e-5 in float32 and by 6 % in bfloat16 (scripts/measure_repeat.py); longer runs drift further. The
# schedule is arithmetic in float64 and hardly rounds.
TOLERANCE = {"float32": 0.02, "bfloat16": 0.1}
_SCHEDULE_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Verdict:
    """A run that could be repeated.

    Attributes:
        steps: optimizer steps that were repeated; ``records``: lines of the trace that were compared.
        exact: every number had to be the same; else within ``tolerance``, and ``largest`` is the largest relative difference seen.
        weights: files of the result whose bytes came again; empty where only the first steps were repeated or nothing exact is due.
        environment: what differs from the run's.
    """

    steps: int
    records: int
    exact: bool
    tolerance: float
    largest: float
    weights: tuple[str, ...]
    environment: tuple[str, ...]


class _Enough(BaseException):
    """The steps that were asked for are done."""


def verify(
    run: Path,
    folder: Path,
    display: Display,
    *,
    steps: int | None = None,
    tolerance: float | None = None,
    init_adapter: Path | None = None,
    trust_remote_code: bool = False,
) -> Verdict:
    """Repeat the run in folder ``run``, or its first ``steps`` steps, in ``folder``.

    Args:
        tolerance: in another environment, relative; ``None``: that of the base's dtype in :data:`TOLERANCE`.

    Raises:
        NotRepeatable: what is there is not what was locked, or the traces part; names the first step at which they do.
        CheckpointError: ``run`` holds no run with a lock and a trace.
    """
    locked, loaded, trace = _read(run)
    if locked.init_adapter_sha256 is not None and init_adapter is None:
        raise UsageError(f"{run} started from an adapter", hint="name it: --init-adapter FOLDER")
    tolerance = TOLERANCE.get(locked.base_model.dtype, max(TOLERANCE.values())) if tolerance is None else tolerance
    torch.set_num_threads(locked.environment.threads)
    here = environment.describe(default_device(), deterministic=loaded.recipe.train.deterministic)
    changed = locks.differences(locked, locked.model_copy(update={"environment": here}))
    exact = here.fingerprint == locked.environment.fingerprint and loaded.recipe.train.deterministic
    ended = _report(run)
    report = ended if ended is not None and ended.status in ("completed", "stopped_early") else None
    logged = [record["step"] for record in trace if "loss" in record]
    # A step that was not logged cannot be compared: the repetition goes on to the next one that was.
    last = min((step for step in logged if step >= (steps or logged[-1])), default=logged[-1])
    whole = report is not None and last == logged[-1]
    follow = _Follow(trace, None if whole else last, 0.0 if exact else tolerance, display)
    options = Options(
        init_adapter=init_adapter,
        trust_remote_code=trust_remote_code,
        # How the environments differ is known; all else has to be as it was.
        locked=locked.model_copy(update={"environment": here}),
        locked_at=run / locks.NAME,
    )
    with contextlib.suppress(_Enough):
        train(_quietly(loaded, folder), follow, options)
    weights: tuple[str, ...] = ()
    if whole:
        follow.ended()
        if exact and report is not None and launch.rank() == 0:
            weights = _same_weights(folder, report)
    return Verdict(last, follow.compared, exact, tolerance, follow.largest, weights, tuple(changed))


def _read(run: Path) -> tuple[locks.Lock, LoadedRecipe, list[dict[str, Any]]]:
    if not run.is_dir():
        raise UsageError(f"there is no folder {run}", hint="name a run's output folder.")
    locked = locks.read_lock(run / locks.NAME)
    trace = [record for record in read_metrics(run / "metrics.jsonl").records if any(name in record for name in TRACE)]
    if not any("loss" in record for record in trace):
        raise CheckpointError(f"{run / 'metrics.jsonl'} holds no step to compare with")
    return locked, load_recipe(run / "recipe.yaml"), trace


def _report(run: Path) -> Report | None:
    return read_report(run) if (run / "report.json").is_file() else None


def _quietly(loaded: LoadedRecipe, folder: Path) -> LoadedRecipe:
    """The run's recipe without what does not touch its weights: no answers, no trackers, no measurement of the base."""
    recipe = loaded.recipe
    update = {
        "output_dir": str(folder),
        "expect": {},
        "eval": recipe.eval.model_copy(update={"generate": False, "before": False}),
        "train": recipe.train.model_copy(update={"report_to": [], "save_steps": None}),
    }
    return LoadedRecipe(recipe.model_copy(update=update), loaded.path, loaded.base_dir)


def _same_weights(folder: Path, report: Report) -> tuple[str, ...]:
    """The weight files of the result, once each has the bytes that the run's report states."""
    files = {name: digest for name, digest in report.files.items() if name.endswith(".safetensors")}
    found = hash_files(folder, [name for name in files if (folder / name).is_file()])
    for name, digest in files.items():
        if found.get(name) != digest:
            raise NotRepeatable(f"the traces are the same, but {name} is not: sha256 was {digest}, is {found.get(name, 'missing')}")
    return tuple(files)


class _Follow(NullProgress):
    """Holds the records of the repetition against those of the run as they come, and ends it where they part.

    Args:
        last: the step after which it is enough; ``None`` goes to the end.
        tolerance: relative; 0 asks for the same numbers.
    """

    def __init__(self, trace: Sequence[dict[str, Any]], last: int | None, tolerance: float, display: Display) -> None:
        self.trace, self.last, self.tolerance, self.display = trace, last, tolerance, display
        self.compared, self.largest = 0, 0.0

    def start(self, total_steps: int, initial_step: int = 0) -> None:
        self.display.start(total_steps if self.last is None else self.last, initial_step)

    def note(self, message: str) -> None:
        self.display.note(message)

    def advance(self, step: int) -> None:
        self.display.advance(step)

    def warn(self, message: str) -> None:
        self.display.warn(message)

    def stop(self) -> None:
        self.display.stop()

    def evaluation(self, record: dict[str, Any]) -> None:
        self._compare(record)

    def step(self, record: dict[str, Any]) -> None:
        self._compare(record)
        if record["step"] == self.last:
            raise _Enough

    def _compare(self, record: dict[str, Any]) -> None:
        if self.compared == len(self.trace):
            raise NotRepeatable(f"step {record['step']}: the repetition goes on where the run had ended")
        was = self.trace[self.compared]
        kind = "an evaluation" if "eval_loss" in record else "a step"
        if was["step"] != record["step"] or ("eval_loss" in was) != ("eval_loss" in record):
            raise NotRepeatable(f"the run has no record of {kind} at step {record['step']} where the repetition has one")
        for name in TRACE:
            before, now = was.get(name), record.get(name)
            if before is None and now is None:
                continue
            apart = math.inf if before is None or now is None else abs(now - before) / max(abs(before), 1e-12)
            limit = self.tolerance if name != "learning_rate" else min(self.tolerance, _SCHEDULE_TOLERANCE)
            if apart > limit or not math.isfinite(apart):
                raise NotRepeatable(self._parted(name, before, now, record["step"]))
            self.largest = max(self.largest, apart)
        self.compared += 1

    def _parted(self, name: str, before: Any, now: Any, step: int) -> str:
        steps = [record["step"] for record in self.trace[: self.compared] if "loss" in record]
        since = steps[-1] + 1 if steps else 1
        span = f" (steps {since} to {step} are logged together)" if name == "loss" and since < step else ""
        due = f"within {self.tolerance:g} of it was due" if self.tolerance else "the same number was due"
        return f"the traces part at step {step}{span}: {name} was {before!r}, is {now!r}; {due}"

    def ended(self) -> None:
        """The repetition is over, and so has to be the trace."""
        if self.compared < len(self.trace):
            raise NotRepeatable(f"the repetition ended, but the run went on: it has a record of step {self.trace[self.compared]['step']}")
