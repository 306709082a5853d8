"""Runs that are killed with SIGKILL again and again, and what is left of them in the end.

Each attempt is a fork of this process (two forks for a run in two processes), which has imported everything and computed nothing. It
is killed after a random time, or by itself at a random one of its file operations, most of which are inside a save. The next attempt
resumes, or begins anew where no checkpoint had been finished. What the last one leaves must be what a run leaves that was never
killed, byte for byte: weights, the newest checkpoint's tensors and state, the order of the rows, the trace.

A smaller number of kills hits `peftcli train` itself, started as a user starts it.
"""

from __future__ import annotations

import collections
import functools
import gc
import hashlib
import importlib
import itertools
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

helpers: Any = importlib.import_module("helpers")

# Methods whose state moves in the same way. The kills of a family go round its methods, and each method round the variants.
FAMILIES: dict[str, tuple[str, ...]] = {
    "low rank": ("lora", "delta_lora", "vera"),
    "products": ("loha", "lokr"),
    "adaptive rank": ("adalora",),
    "bottlenecks": ("adapter",),
    "prompts": ("prompt_tuning", "p_tuning", "prefix_tuning"),
    "scales and biases": ("ia3", "bitfit"),
    "weights of the base": ("full", "freeze", "head_only"),
    "quantized base": ("qlora",),
}
IN_TWO = ("lora", "adalora", "full", "qlora")
COMMAND = ("lora",)
# Two epochs and a half of 22 rows, 3 rows in each of 2 accumulation steps: the last step of an epoch is a partial one.
SETTINGS = ("train.batch_size=3", "train.gradient_accumulation_steps=2", "train.epochs=2.5", "eval.before=false")
_SGD = ("train.optimizer=sgd", "train.learning_rate=0.5")
_BEST = ("train.load_best_model_at_end=true",)
# A base (GPT-2 with dropout of its own), an optimizer, when checkpoints are written, and how many stay.
VARIANTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("llama", ("train.save_steps=1",)),
    ("gpt2", ("train.optimizer=adafactor", "train.save_steps=2", "train.save_total_limit=1")),
    ("llama", ("train.save_steps=1", "train.save_total_limit=2", "train.eval_steps=2", *_BEST, *_SGD)),
    ("gpt2", ("train.gradient_checkpointing=true", "train.save_steps=3", "dataset.group_by_length=true", "train.scheduler=linear")),
)  # fmt: skip
# A method's options where its defaults do not fit a model of two layers, and dropout where it has some.
OPTIONS: dict[str, str] = {
    "lora": "rank: 4, dropout: 0.1",
    "qlora": "rank: 4, dropout: 0.1",
    "delta_lora": "rank: 4, dropout: 0.0",
    "adalora": "init_rank: 6, target_rank: 4, dropout: 0.1",
    "freeze": "last_layers: 1",
}
_WATCHED = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


@dataclass
class Kills:
    """What became of the killed runs of one family.

    Attributes:
        methods: kills by method.
        inside_a_save: kills at a file operation of a checkpoint; ``inside_the_result``: at one of the weights, the reports or the trace.
        runs: that ended in spite of them; ``identical``: left the same bytes as the run that was never killed.
        fresh_starts: attempts that found no finished checkpoint. ``faults``: what went wrong, in words; empty.
    """

    methods: collections.Counter[str] = field(default_factory=collections.Counter)
    kills: int = 0
    inside_a_save: int = 0
    inside_the_result: int = 0
    runs: int = 0
    identical: int = 0
    fresh_starts: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Kind:
    """One recipe that is run again and again, and how it ends where nobody kills it.

    Attributes:
        seconds: that it takes; ``operations``: watched file operations of each process; ``left``: see :func:`left_by`.
    """

    method: str
    text: str
    settings: tuple[str, ...]
    seconds: float
    operations: tuple[int, ...]
    left: dict[str, str]


class Bench:
    """A place for runs, with the bases and rows that they take.

    Args:
        processes: of each run. ``command``: start `peftcli train` as a program of its own instead of a fork.
    """

    def __init__(self, work: Path, *, processes: int = 1, command: bool = False) -> None:
        self.work, self.processes, self.command = work, processes, command
        self.log, self.place = work / "log", work / "place"
        work.mkdir(parents=True, exist_ok=True)

    def prepare(self) -> None:
        """Bases and rows, made in a fork: this process must not compute, because a fork does not inherit threads."""
        _ended([_fork(self._prepare, self.log)])

    def _prepare(self) -> None:
        for kind in ("llama", "llama-bias", "gpt2"):
            helpers.save_folder(self.work / kind, kind)
        config = self.work / "gpt2" / "config.json"
        held = json.loads(config.read_text(encoding="utf-8"))
        config.write_text(json.dumps({**held, "resid_pdrop": 0.1, "embd_pdrop": 0.1}), encoding="utf-8")
        helpers.write_rows(self.work / "train.jsonl", 22)
        helpers.write_rows(self.work / "eval.jsonl", 6, offset=100)

    def kind(self, method: str, variant: int) -> Kind:
        """Run one recipe to its end.

        Raises:
            RuntimeError: it fails.
        """
        base, settings = VARIANTS[variant]
        base = "llama-bias" if (method, base) == ("bitfit", "llama") else base
        options = OPTIONS.get(method)
        text = helpers.recipe_for(
            self.work / base, self.work, self.work / "unused", method=f"{{name: {method}{', ' + options if options else ''}}}"
        )
        whole = self.work / f"{method}-{variant}"
        kind = Kind(method, text, (*SETTINGS, *settings), 0.0, (), {})
        started = time.monotonic()
        code = _ended(self.start(kind, whole, resume=False, count=True))
        if code:
            raise RuntimeError(f"{method}, variant {variant}: the run that is never killed ends with {code}: {_tail(self.log)}")
        seconds = time.monotonic() - started
        counts = () if self.command else tuple(int(self._count(rank).read_text()) for rank in range(self.processes))
        return Kind(method, text, kind.settings, seconds, counts, left_by(whole))

    def start(self, kind: Kind, folder: Path, *, resume: bool, count: bool = False, kill_at: tuple[int, int] | None = None) -> list[int]:
        """Process ids of an attempt. ``kill_at``: the process that kills itself, and at which of its file operations."""
        settings = (*kind.settings, f"output_dir={folder}")
        if self.command:
            return [_fork(functools.partial(self._command, kind.text, folder, settings, resume), self.log)]
        port = _free_port() if self.processes > 1 else 0
        children = []
        for rank in range(self.processes):
            at = kill_at[1] if kill_at is not None and kill_at[0] == rank else None
            counted = self._count(rank) if count else None
            work = functools.partial(self._train, kind.text, settings, folder, resume, at, counted, (rank, port))
            children.append(_fork(work, self.log if rank == 0 else self.log.with_suffix(f".{rank}")))
        return children

    def _command(self, text: str, folder: Path, settings: Sequence[str], resume: bool) -> None:
        recipe = folder.with_suffix(".yaml")
        recipe.write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "peftcli", "train", str(recipe), *settings, "--resume" if resume else "--overwrite"]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        os.execve(sys.executable, [*command, "--processes", str(self.processes)], env)  # noqa: S606 - no shell

    def _count(self, rank: int) -> Path:
        return self.work / f"operations-{rank}"

    def _train(
        self, text: str, settings: Sequence[str], folder: Path, resume: bool, at: int | None, count: Path | None, place: tuple[int, int]
    ) -> None:
        rank, port = place
        if self.processes > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.environ |= {"WORLD_SIZE": str(self.processes), "LOCAL_WORLD_SIZE": str(self.processes)}
        seen = _watch(folder, at, self.place)
        helpers.run(text, *settings, resume=resume, overwrite=not resume)
        if count is not None:
            count.write_text(str(seen()))


def soak(methods: Sequence[str], wanted: int, work: Path, *, seed: int = 0, processes: int = 1, command: bool = False) -> dict[str, Any]:
    """Kill runs of ``methods`` until ``wanted`` kills have hit, and count."""
    draw, found, started = random.Random(f"{seed} {' '.join(methods)} {processes}"), Kills(), time.monotonic()
    bench = Bench(work, processes=processes, command=command)
    bench.prepare()
    warm_up()
    whole: dict[tuple[str, int], Kind] = {}
    for number, (method, variant) in enumerate(_turns(methods)):
        if found.kills >= wanted or found.faults:
            break
        try:
            if (method, variant) not in whole:
                whole[method, variant] = bench.kind(method, variant)
            _one(bench, whole[method, variant], work / f"run-{number}", wanted, draw, found)
        except RuntimeError as error:
            found.faults.append(str(error))
    gc.unfreeze()
    found.seconds = round(time.monotonic() - started, 1)
    return {**asdict(found), "methods": dict(found.methods)}


def _turns(methods: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Method and variant of each run: no run of a family is like the one before."""
    for turn in itertools.count():
        for number, method in enumerate(methods):
            yield method, (turn + number) % len(VARIANTS)


def _one(bench: Bench, kind: Kind, folder: Path, wanted: int, draw: random.Random, found: Kills) -> None:
    """One run, killed until it ends by itself."""
    while True:
        resume = any((folder / "checkpoints").glob("step-*"))
        found.fresh_starts += not resume
        kill = found.kills < wanted
        at = None
        if kill and kind.operations and draw.random() < 0.5:
            # The other processes write through safetensors only, which no audit sees: they are killed after a random time.
            rank = draw.choice([rank for rank, operations in enumerate(kind.operations) if operations])
            at = rank, draw.randrange(1, kind.operations[rank] + 1)
        bench.place.unlink(missing_ok=True)
        children = bench.start(kind, folder, resume=resume, kill_at=at)
        if kill and at is None:
            _kill_after(children[draw.randrange(len(children))], draw.uniform(0.0, kind.seconds))
        code = _ended(children, linger=draw.uniform(0.0, 0.1))
        if code == -signal.SIGKILL:
            found.kills += 1
            found.methods[kind.method] += 1
            place = bench.place.read_text(encoding="utf-8") if bench.place.is_file() else ""
            found.inside_a_save += place == "checkpoints"
            found.inside_the_result += place not in ("", "checkpoints")
        elif code:
            found.faults.append(f"{kind.method}, {folder.name}: an attempt ends with {code}: {_tail(bench.log)}")
            return
        else:
            break
    found.runs += 1
    left = left_by(folder)
    wrong = sorted(name for name in kind.left.keys() | left.keys() if kind.left.get(name) != left.get(name))
    found.identical += not wrong
    if wrong:
        found.faults.append(f"{kind.method}, {folder.name} {kind.settings}: not as the run that was never killed: {', '.join(wrong)}")


def left_by(folder: Path) -> dict[str, str]:
    """Hashes of what a run has left, without what depends on the clock."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    newest = max((folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name.partition("-")[2]))
    files = [path for name in ("adapter", "model") for path in sorted((folder / name).glob("*"))]
    files += sorted(newest.glob("*.safetensors"))
    found = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    del state["progress"]["seconds"]
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    more = {"state": state, "checkpoints": kept, "metrics": report["eval"]["metrics"], "trace": helpers.trace(folder)}
    return {**found, "batch order": report["data"]["batch_order_sha256"]} | {name: json.dumps(value) for name, value in more.items()}


def warm_up() -> None:
    """Import what a run imports, and let the forks share it.

    Raises:
        RuntimeError: this process has threads, which a fork would lack.
    """
    for name in ("transformers.models.llama.modeling_llama", "transformers.models.gpt2.modeling_gpt2", "peftcli.quantization"):
        importlib.import_module(name)
    conversions: Any = importlib.import_module("transformers.conversion_mapping")
    conversions.get_checkpoint_conversion_mapping("llama")
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        raise RuntimeError(f"{threads} threads before the fork: set OMP_NUM_THREADS=1")
    gc.collect()
    gc.freeze()  # so that the forks share these pages


def _watch(folder: Path, kill_at: int | None, place: Path) -> Callable[[], int]:
    """Count file operations below ``folder``; at the one numbered ``kill_at`` this process says where it is and kills itself."""
    seen = 0
    prefix = f"{folder}/"

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in _WATCHED and arguments and str(arguments[0]).startswith(prefix):
            seen += 1
            if seen == kill_at:
                place.write_text(str(arguments[0]).removeprefix(prefix).partition("/")[0], encoding="utf-8")
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


def _ended(children: list[int], *, linger: float = 0.0) -> int:
    """How the processes of a run ended: 0, the first one's exit code, or the negative number of the signal that killed one.

    Args:
        linger: seconds that the others have after the first has died, as a launcher gives them.
    """
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child] and len(codes) < len(children):
            time.sleep(linger)
            left = set(children) - set(codes)
            for other in left:
                done, status = os.waitpid(other, os.WNOHANG)
                if done:
                    codes[other] = os.waitstatus_to_exitcode(status)
                else:
                    os.kill(other, signal.SIGKILL)
                    os.waitpid(other, 0)
            break
    return min(codes.values()) or max(codes.values())


def _kill_after(child: int, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-1500:]
