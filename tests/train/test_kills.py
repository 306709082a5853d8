"""SIGKILL at any moment, half of the times inside a save: what is resumed ends in the bytes of the run that was never killed."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import kills

from peftcli.methods import registry

ROOT = Path(__file__).parents[2]


def test_every_method_has_its_family() -> None:
    assert sorted(itertools.chain(*kills.FAMILIES.values())) == sorted(registry.names())


def test_twenty_kills_lose_nothing(tmp_path: Path) -> None:
    """By the script of `make soak`: LoRA with dropout, two epochs and a half, a partial accumulation window, every optimizer."""
    results = tmp_path / "soak.json"
    none = ["--kills-in-two", "0", "--kills-of-the-command", "0"]
    parts = ["--kills", "20", *none, "--recipes", "40", "--adapters", "40", "--checkpoints", "20"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / "soak.py"), "--methods", "lora", *parts, "--results", str(results)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(results.read_text())
    killed = found["kills"]["low rank"]
    assert (killed["kills"], killed["methods"]) == (20, {"lora": 20})
    # Which operation an attempt reaches depends on when the kill before hit: how many are inside a save is not fixed, none would be a fault.
    assert killed["inside_a_save"] + killed["inside_the_result"] >= 1
    assert killed["runs"] == killed["identical"] >= 1
    assert killed["faults"] == []
    assert (found["recipes"]["generated"], found["recipes"]["tracebacks"]) == (40, 0)
    assert (found["adapters"]["tracebacks"], found["adapters"]["forbidden"]) == (0, 0)
    assert found["adapters"]["refused"] + found["adapters"]["loaded"] == 40
    assert found["checkpoints"] == {"corrupted": 20, "passed_over": 20, "silent_loads": 0, "tracebacks": 0, "faults": []}


def test_a_kill_in_either_of_two_processes_loses_nothing(tmp_path: Path) -> None:
    """The forks must come from a process that has computed nothing, so not from this one."""
    code = (
        f"import json, pathlib, sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import kills\n"
        f"print(json.dumps(kills.soak(['lora'], 3, pathlib.Path({str(tmp_path / 'work')!r}), processes=2)))"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["faults"] == []
    assert found["kills"] == 3
    assert found["runs"] == found["identical"] >= 1
