"""Try for hours what the test suite tries for seconds: kills, bad recipes, mutated adapters, corrupted checkpoints.

    OMP_NUM_THREADS=1 python scripts/soak.py                                  # everything, as `make soak` does
    OMP_NUM_THREADS=1 python scripts/soak.py --methods lora full --kills 20   # less of it
    OMP_NUM_THREADS=1 python scripts/soak.py --methods                        # no kills

The counts are written to scripts/results/soak.json as they come, beside those of the parts that are not tried this time. The exit
code is 1 where anything was lost, passed in silence, or ended in a traceback.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib
import itertools
import json
import os
import random
import shutil
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import kills
import yaml
from kills import ROOT, helpers

from peftcli.errors import CheckpointError, PeftcliError, RecipeError
from peftcli.interchange import hf_peft
from peftcli.methods import registry
from peftcli.recipe import parse_recipe
from peftcli.recipe.render import dump_recipe
from peftcli.recipe.tasks import TASKS
from peftcli.train import checkpoint as checkpoints

sys.path.insert(0, str(ROOT / "tests" / "recipe"))
RESULTS = ROOT / "scripts" / "results" / "soak.json"
Count = dict[str, Any]
# What reading a stranger's file must never lead to.
_FORBIDDEN = ("socket.connect", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "exec", "compile")


def recipes(wanted: int, draw: random.Random) -> Count:
    """Whole recipes with random changes, damaged text, and random bytes: each is valid, or refused with places."""
    fuzz: Any = importlib.import_module("test_recipe_fuzz")
    found: collections.Counter[str] = collections.Counter(generated=0, valid=0, refused=0, tracebacks=0)
    faults: list[str] = []
    documents = _documents()
    for _ in range(wanted):
        text = _recipe(fuzz, draw.choice(documents), draw)
        found["generated"] += 1
        try:
            found["refused" if fuzz.outcome(text) is None else "valid"] += 1
        except Exception:
            found["tracebacks"] += 1
            faults.append(f"{text!r}: {traceback.format_exc()[-600:]}")
    return {**found, "faults": faults[:20]}


def _documents() -> list[str]:
    """A valid recipe of each method for each task that takes it, with every default written out."""
    found = []
    for method, task in itertools.product(registry.names(), TASKS):
        base = "{name: m, quantization: nf4}" if method == "qlora" else "m"
        text = f"base_model: {base}\nmethod: {method}\ntask: {task}\ndataset: rows.jsonl\n"
        with contextlib.suppress(RecipeError):
            found.append(dump_recipe(parse_recipe(text).recipe))
    return found


def _recipe(fuzz: Any, document: str, draw: random.Random) -> str | bytes:
    kind = draw.randrange(4)
    if kind < 2:
        changed = yaml.safe_load(document)
        for _ in range(draw.randrange(1, 6)):
            changed = fuzz.mutate(changed, draw)
        return json.dumps(changed) if kind else str(yaml.safe_dump(changed, allow_unicode=True))
    data = document.encode()
    start = draw.randrange(len(data))
    noise = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 5)))
    return data[:start] + noise + (data[start + draw.randrange(8) :] if kind == 2 else b"")


def adapters(wanted: int, draw: random.Random, work: Path) -> Count:
    """Adapter folders with changed bytes, headers and configs: each loads whole and finite, or is refused."""
    good = work / "adapter"
    helpers.write_adapter(good, "llama", {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]})
    found: collections.Counter[str] = collections.Counter(mutated=0, refused=0, loaded=0, tracebacks=0, forbidden=0)
    faults: list[str] = []
    before = {path.name: path.read_bytes() for path in good.iterdir()}
    hf_peft.apply_adapter(helpers.tiny_model("llama"), hf_peft.read_adapter(good))  # imports what it needs
    watched = _watch()
    for _ in range(wanted):
        name = draw.choice([hf_peft.CONFIG, hf_peft.WEIGHTS, hf_peft.WEIGHTS])
        changed = _mutated(name, before[name], draw)
        (good / name).write_bytes(changed)
        found["mutated"] += 1
        watched.clear()
        try:
            hf_peft.apply_adapter(helpers.tiny_model("llama"), hf_peft.read_adapter(good))
            found["loaded"] += 1
        except PeftcliError:
            found["refused"] += 1
        except Exception:
            found["tracebacks"] += 1
            faults.append(f"{name}: {traceback.format_exc()[-600:]}")
        if watched:
            found["forbidden"] += 1
            faults.append(f"{name}: {watched[0]}")
        (good / name).write_bytes(before[name])
    watched.append("over")
    return {**found, "faults": faults[:20]}


def _watch() -> list[str]:
    """Events that must not come, as they come."""
    seen: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _FORBIDDEN and seen != ["over"]:
            seen.append(f"{event} {str(arguments)[:200]}")

    sys.addaudithook(hook)
    return seen


def _mutated(name: str, data: bytes, draw: random.Random) -> bytes:
    """One change: a flipped bit, a cut, inserted bytes, or a value of the JSON inside replaced."""
    kind = draw.randrange(4)
    if kind == 0:
        place = draw.randrange(len(data))
        return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]
    if kind == 1:
        return data[: draw.randrange(len(data))]
    if kind == 2:
        place = draw.randrange(len(data) + 1)
        return data[:place] + bytes(draw.randrange(256) for _ in range(draw.randrange(1, 9))) + data[place:]
    if name == hf_peft.CONFIG:
        return json.dumps(_changed(json.loads(data), draw)).encode()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.dumps(_changed(json.loads(data[8 : 8 + size]), draw)).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


_JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    2**63,
    1e308,
    "",
    "x",
    "../../x",
    "builtins.eval",
    "F64",
    [],
    [1, [2]],
    [2**40, 2**40],
    {},
    {"a": {"b": 1}},
]


def _changed(value: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    changed = dict(value)
    key = draw.choice(list(changed))
    kind = draw.randrange(4)
    if kind == 0:
        del changed[key]
    elif kind == 1:
        changed[key + draw.choice([".x", "_", " "])] = changed.pop(key)
    elif kind == 2 and isinstance(changed[key], dict) and changed[key]:
        changed[key] = _changed(changed[key], draw)
    else:
        changed[key] = draw.choice(_JUNK)
    return changed


def corrupted(wanted: int, draw: random.Random, work: Path) -> Count:
    """Bit flips, cuts and lost files in the newest checkpoint: never loaded, the one before it taken instead."""
    model, method = helpers.adapted("lora", rank=4, target_modules=["q_proj"])
    split = helpers.pattern_split()
    helpers.make_loop(model, method, split, work, steps=7, batch_size=8, save_steps=2, save_total_limit=3, identity={"a": 1}).run()
    root = work / "checkpoints"
    newest, _ = checkpoints.newest(root)
    assert newest is not None
    files = sorted(newest.folder.iterdir())
    found: collections.Counter[str] = collections.Counter(corrupted=0, passed_over=0, silent_loads=0, tracebacks=0)
    faults: list[str] = []
    for _ in range(wanted):
        path = draw.choice(files)
        good = path.read_bytes()
        kind = draw.randrange(3)
        place = draw.randrange(len(good))
        path.write_bytes(good[:place] if kind == 0 else good[:place] + bytes([good[place] ^ 1 << draw.randrange(8)]) + good[place + 1 :])
        if kind == 1:
            path.unlink()
        found["corrupted"] += 1
        try:
            taken, notes = checkpoints.newest(root)
            right = taken is not None and taken.progress.step == newest.progress.step - 2 and len(notes) == 1
            found["passed_over" if right else "silent_loads"] += 1
            if not right:
                faults.append(f"{path.name}, change {kind} at byte {place}")
        except Exception:
            found["tracebacks"] += 1
            faults.append(f"{path.name}: {traceback.format_exc()[-600:]}")
        path.write_bytes(good)
    whole, notes = checkpoints.newest(root)
    if whole is None or whole.folder != newest.folder or notes:
        raise CheckpointError("the checkpoint that was put back is not whole")
    return {**found, "faults": faults[:20]}


def _killed(options: argparse.Namespace) -> list[tuple[str, int, list[str], dict[str, Any]]]:
    """What is killed: its name in the results, how often, the methods in turn, and how the runs are started."""

    def among(names: Sequence[str]) -> list[str]:
        return [name for name in names if name in options.methods]

    half = options.kills_of_the_command // 2
    return [
        *((family, options.kills, among(methods), {}) for family, methods in kills.FAMILIES.items()),
        ("two processes", options.kills_in_two, among(kills.IN_TWO), {"processes": 2}),
        ("the command", options.kills_of_the_command - half, among(kills.COMMAND), {"command": True}),
        ("the command, two processes", half, among(kills.COMMAND), {"command": True, "processes": 2}),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; see the module's head."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--methods", nargs="*", default=list(registry.names()), metavar="NAME", help="methods whose runs are killed")
    parser.add_argument("--kills", type=int, default=200, help="for each family of methods")
    parser.add_argument("--kills-in-two", type=int, default=60, help="of runs in two processes")
    parser.add_argument(
        "--kills-of-the-command", type=int, default=20, help="of `peftcli train` as a program of its own, half of them in two processes"
    )
    parser.add_argument("--recipes", type=int, default=10_000)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--checkpoints", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if os.environ.get("OMP_NUM_THREADS") != "1":
        parser.error("the runs are forks of this process: set OMP_NUM_THREADS=1")
    # What is not tried this time keeps the counts of the time before.
    found: Count = json.loads(options.results.read_text(encoding="utf-8")) if options.results.is_file() else {"kills": {}}

    def write() -> None:
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory(prefix="peftcli-soak-") as aside:
        work = Path(aside)
        # Kills first: the forks need a parent that has not computed anything.
        for name, wanted, methods, more in _killed(options):
            if methods and wanted:
                found["kills"][name] = kills.soak(methods, wanted, work / "kills", seed=options.seed, **more)
                shutil.rmtree(work / "kills")
                write()
                print(name, {key: value for key, value in found["kills"][name].items() if key != "faults"}, flush=True)
        parts: list[tuple[str, int, Callable[[int, random.Random], Count]]] = [
            ("recipes", options.recipes, recipes),
            ("adapters", options.adapters, lambda wanted, draw: adapters(wanted, draw, work)),
            ("checkpoints", options.checkpoints, lambda wanted, draw: corrupted(wanted, draw, work)),
        ]
        for name, wanted, part in parts:
            if wanted:
                found[name] = part(wanted, random.Random(f"{options.seed} {name}"))
                write()
                print(name, {key: value for key, value in found[name].items() if key != "faults"}, flush=True)
    write()
    faults = [fault for part in (*found["kills"].values(), *found.values()) if isinstance(part, dict) for fault in part.get("faults", ())]
    for fault in faults:
        print("FAULT:", fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
