"""Runs that are killed with SIGKILL again and again, and what is left of them in the end.

Each attempt is a fork of this process, which has imported everything and computed nothing. It is killed after a random time, or at
a random one of its file operations in `checkpoints/`, which is inside a save. The next attempt resumes, or begins anew where no
checkpoint had been finished. What the last one leaves must be what a run leaves that was never killed, byte for byte.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

helpers: Any = importlib.import_module("helpers")

# Two epochs and a half of 22 rows, 3 rows in each of 2 accumulation steps: the last step of an epoch is a partial one.
SETTINGS = ("train.batch_size=3", "train.gradient_accumulation_steps=2", "train.epochs=2.5", "train.save_steps=1", "eval.before=false")
# A method's options where its defaults do not fit a model of two layers, and dropout where it has some.
OPTIONS: dict[str, str] = {
    "lora": "rank: 4, dropout: 0.1",
    "qlora": "rank: 4, dropout: 0.1",
    "adalora": "init_rank: 6, target_rank: 4, dropout: 0.1",
    "freeze": "last_layers: 1",
}
_WATCHED = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


@dataclass
class Kills:
    """What became of the killed runs of one method.

    Attributes:
        kills: SIGKILLs that hit a run; ``inside_a_save``: those at a file operation of a checkpoint.
        runs: that ended in spite of them; ``identical``: left the same bytes as the run that was never killed.
        fresh_starts: attempts that found no finished checkpoint. ``faults``: what went wrong, in words; empty.
    """

    kills: int = 0
    inside_a_save: int = 0
    runs: int = 0
    identical: int = 0
    fresh_starts: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


def soak(method: str, wanted: int, work: Path, *, seed: int = 0) -> dict[str, Any]:
    """Kill runs of ``method`` until ``wanted`` kills have hit, and count."""
    draw, found, started = random.Random(f"{seed} {method}"), Kills(), time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    kind = "llama-bias" if method == "bitfit" else "llama"
    model, data = work / "base", work / "data"
    # The parent must not compute: a fork does not inherit threads.
    _wait(_fork(functools.partial(_prepare, model, kind, data), work / "log"))
    options = OPTIONS.get(method)
    text = helpers.recipe_for(model, data, work / "whole", method=f"{{name: {method}{', ' + options if options else ''}}}")
    before = time.monotonic()
    code = _wait(_fork(functools.partial(_train, text, work / "whole", resume=False, count=work / "operations"), work / "log"))
    if code != 0:
        found.faults.append(f"the run that is never killed ends with {code}: {_tail(work / 'log')}")
        return asdict(found)
    length, operations = time.monotonic() - before, int((work / "operations").read_text())
    whole = left_by(work / "whole")
    while found.kills < wanted and not found.faults:
        _one(text, work / f"run-{found.runs}", wanted, draw, (length, operations), whole, found, work / "log")
    found.seconds = round(time.monotonic() - started, 1)
    return asdict(found)


def _one(
    text: str, folder: Path, wanted: int, draw: random.Random, size: tuple[float, int], whole: dict[str, str], found: Kills, log: Path
) -> None:
    """One run, killed until it ends by itself."""
    length, operations = size
    while True:
        resume = any((folder / "checkpoints").glob("step-*"))
        found.fresh_starts += not resume
        kill = found.kills < wanted
        inside = kill and draw.random() < 0.5
        at = draw.randrange(1, operations) if inside else None
        child = _fork(functools.partial(_train, text, folder, resume=resume, kill_at=at), log)
        if kill and not inside:
            _kill_after(child, draw.uniform(0.0, length))
        code = _wait(child)
        if code == -signal.SIGKILL:
            found.kills += 1
            found.inside_a_save += inside
        elif code == 0:
            break
        else:
            found.faults.append(f"{folder.name}: an attempt ends with {code}: {_tail(log)}")
            return
    found.runs += 1
    left = left_by(folder)
    wrong = sorted(name for name in whole.keys() | left.keys() if whole.get(name) != left.get(name))
    found.identical += not wrong
    if wrong:
        found.faults.append(f"{folder.name}: not as the run that was never killed: {', '.join(wrong)}")


def left_by(folder: Path) -> dict[str, str]:
    """Hashes of what a run has left, without what depends on the clock: weights, the newest checkpoint's tensors, order, trace."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    newest = max((folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name.partition("-")[2]))
    files = [path for name in ("adapter", "model") for path in sorted((folder / name).glob("*"))]
    files += sorted(newest.glob("*.safetensors"))
    found = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {**found, "batch order": report["data"]["batch_order_sha256"], "trace": json.dumps(helpers.trace(folder))}


def _prepare(model: Path, kind: str, data: Path) -> None:
    helpers.save_folder(model, kind)
    data.mkdir(exist_ok=True)
    helpers.write_rows(data / "train.jsonl", 22)
    helpers.write_rows(data / "eval.jsonl", 6, offset=100)


def _train(text: str, folder: Path, *, resume: bool, kill_at: int | None = None, count: Path | None = None) -> None:
    seen = _watch(folder / "checkpoints", kill_at)
    helpers.run(text, *SETTINGS, f"output_dir={folder}", resume=resume, overwrite=not resume)
    if count is not None:
        count.write_text(str(seen()))


def _watch(folder: Path, kill_at: int | None) -> Callable[[], int]:
    """Count file operations below ``folder``; at the one numbered ``kill_at`` this process kills itself."""
    seen = 0
    prefix = str(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in _WATCHED and arguments and str(arguments[0]).startswith(prefix):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return lambda: seen


def _fork(work: Callable[[], None], log: Path) -> int:
    child = os.fork()
    if child:
        return child
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _wait(child: int) -> int:
    """Exit code of a child; the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _kill_after(child: int, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-1500:]
